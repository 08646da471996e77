"""Find out what a source is: a local directory, a GGUF file, or a Hub id to be fetched."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mlx_grpo.errors import InputError
from mlx_grpo.files import read_json
from mlx_grpo.models.reward_model import REWARD_CONFIG

HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt"]
Kind = Literal["causal-lm", "sequence-classification", "reward-adapter", "reward-full", "gguf"]


@dataclass(frozen=True)
class Source:
    """A checkpoint on this machine."""

    name: str
    path: Path
    kind: Kind
    config: dict[str, Any]


def locate(name: str, revision: str | None = None) -> Source:
    """Resolve a path or Hub id.

    Raises:
        InputError: nothing is there, the Hub does not answer, or the directory holds no known kind
            of model.
    """
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(f"{path}: no such file")
        return Source(name, path, "gguf", {})
    if not path.is_dir():
        path = _download(name, revision)
    return Source(name, path, *_kind(path))


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise InputError(f"{name}: no such directory (a Hub id looks like 'owner/name')")
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=HUB_FILES))
    except HFValidationError:
        raise InputError(f"{name}: neither a directory nor a Hub id") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as e:
        reason = " ".join(str(e).split())[:160]
        raise InputError(
            f"{name}: no such directory, and the Hub could not deliver it ({reason})"
        ) from None


def _kind(path: Path) -> tuple[Kind, dict[str, Any]]:
    if (path / REWARD_CONFIG).is_file():
        config = read_json(path / REWARD_CONFIG)
        kind = config.get("kind")
        if kind not in ("adapter", "full"):
            raise InputError(
                f"{path / REWARD_CONFIG}: field 'kind' must be 'adapter' or 'full', not {kind!r}"
            )
        return ("reward-adapter" if kind == "adapter" else "reward-full"), config
    if not (path / "config.json").is_file():
        raise InputError(
            f"{path}: no config.json; give a model directory, a .gguf file or a Hub id"
        )
    config = read_json(path / "config.json")
    architectures = config.get("architectures") or [""]
    if str(architectures[0]).endswith("ForSequenceClassification"):
        return "sequence-classification", config
    return "causal-lm", config
