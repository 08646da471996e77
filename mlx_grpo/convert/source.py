"""Find out what a source is: a local directory, a GGUF file, or a Hub id to be fetched."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mlx_grpo.core.errors import InputError, one_line
from mlx_grpo.files.atomic import read_json

ADAPTER_CONFIG = "adapter_config.json"
MODEL_STEMS = ("model", "pytorch_model")
ADAPTER_STEMS = ("adapter_model", "adapters")
HEADS = ("reward_head", "value_head")
FINETUNE = "finetune"
"""What the card of a model says of itself and its `base_model` where the weights are others."""
TEXT_FILES = (".json", ".jinja", ".txt", ".model")
Kind = Literal["model", "gguf", "peft", "mlx-lora"]


@dataclass(frozen=True)
class Source:
    """A checkpoint on this machine."""

    name: str
    """As the user wrote it."""
    path: Path
    kind: Kind
    config: dict[str, Any]
    """config.json of a model, adapter_config.json of an adapter, nothing for GGUF."""
    revision: str | None = None
    """Commit, where it came from the Hub."""

    @property
    def base(self) -> str | None:
        """What an adapter says it was trained on."""
        base = self.config.get("base_model_name_or_path" if self.kind == "peft" else "model")
        return base if isinstance(base, str) else None


def locate(name: str, revision: str | None = None) -> Source:
    """Resolve a path or Hub id.

    Raises:
        InputError: nothing is there, the Hub does not answer, the directory holds no known kind of
            model, or a revision is asked for of what is no repository.
    """
    path = Path(name).expanduser()
    if revision and path.exists():
        raise InputError(f"{path}: a local path has no revisions; leave out '{revision}'")
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(f"{path}: no such file")
        return Source(name, path, "gguf", {})
    if path.is_file():
        raise InputError(f"{path}: a file; give the directory it is in, a .gguf file or a Hub id")
    commit = None
    if not path.is_dir():
        path = _download(name, revision)
        commit = path.name  # the Hub's cache names a snapshot by its commit
    return Source(name, path, *_kind(path), commit)


def _kind(path: Path) -> tuple[Kind, dict[str, Any]]:
    if (path / ADAPTER_CONFIG).is_file() and not _is_model(path):
        config = read_json(path / ADAPTER_CONFIG)
        return ("peft" if "peft_type" in config else "mlx-lora"), config
    if not (path / "config.json").is_file():
        raise InputError(
            f"{path}: neither config.json nor {ADAPTER_CONFIG} is here; give the directory of a "
            "model or adapter, a .gguf file or a Hub id"
        )
    return "model", read_json(path / "config.json")


def _is_model(path: Path) -> bool:
    """Whether a directory with an adapter is to be read as a model.

    Trainers leave a config.json beside an adapter; weights of both kinds leave the choice open.
    """
    names = [f.name for f in path.iterdir()]
    whole = [n for n in names if _is_weights(n, MODEL_STEMS)]
    adapter = [n for n in names if _is_weights(n, ADAPTER_STEMS)]
    if whole and adapter and "config.json" in names:
        raise InputError(
            f"{path}: holds a model ({whole[0]}) and an adapter ({adapter[0]}); put one of them "
            "into a directory of its own"
        )
    return "config.json" in names and not adapter


def _is_weights(name: str, stems: tuple[str, ...]) -> bool:
    return name.startswith(stems) and name.endswith((".safetensors", ".bin"))


def _download(name: str, revision: str | None) -> Path:
    """Fetch what a conversion reads, and resume what was begun; returns the snapshot."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise InputError(f"{name}: no such directory (a Hub id looks like 'owner/name')")
    try:
        info = HfApi().model_info(name, revision=revision)
        wanted = needed_files([s.rfilename for s in info.siblings or ()])
        # by the name of the revision, which the cache then knows without a network
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except HFValidationError:
        raise InputError(f"{name}: neither a directory nor a Hub id") from None
    except HfHubHTTPError as e:
        raise InputError(
            f"{name}: no such directory, and the Hub refused it ({one_line(e)})"
        ) from None
    except Exception as e:  # no network: each HTTP library below the Hub's has errors of its own
        cached = _cached(name, revision)
        if cached is None:
            raise InputError(
                f"{name}: no such directory, and the Hub cannot be reached ({one_line(e)}); fetch "
                "it elsewhere and give its directory"
            ) from e
        if missing := _not_cached(cached):
            raise InputError(
                f"{name}: only partly in the Hub's cache ({missing} is not there), and the Hub "
                f"cannot be reached ({one_line(e)}); fetch the rest once with a network"
            ) from e
        return cached


def _not_cached(snapshot: Path) -> str | None:
    """What a conversion needs and a snapshot in the cache lacks."""
    names = {f.name for f in snapshot.iterdir() if f.exists()}
    for index in (n for n in names if n.endswith(".index.json")):
        if index.removesuffix(".index.json") not in names:
            shards = read_json(snapshot / index).get("weight_map") or {}
            if absent := sorted(set(shards.values()) - names):
                return str(absent[0])
    adapter = ADAPTER_CONFIG in names and not any(_is_weights(n, MODEL_STEMS) for n in names)
    stems = ADAPTER_STEMS if adapter else MODEL_STEMS
    if not any(_is_weights(n, stems) for n in names):
        return f"{stems[0]}*.safetensors"
    if not adapter and "tokenizer_config.json" not in names:
        return "tokenizer_config.json"
    return None


def _cached(name: str, revision: str | None) -> Path | None:
    """The snapshot that an earlier call fetched.

    Not from `snapshot_download`, which calls a snapshot incomplete that lacks what nobody needed.
    """
    from huggingface_hub import try_to_load_from_cache

    for file in ("config.json", ADAPTER_CONFIG):
        found = try_to_load_from_cache(name, file, revision=revision)
        if isinstance(found, str):
            return Path(found).parent
    return None


def needed_files(files: list[str]) -> list[str]:
    """Of a repository's files those that a conversion reads: top level, one format of weights."""
    top = [f for f in files if "/" not in f]
    texts = [f for f in top if f.endswith(TEXT_FILES) or f == "README.md"]
    whole = "config.json" in top and not any(_is_weights(f, ADAPTER_STEMS) for f in top)
    adapter = ADAPTER_CONFIG in top and not whole
    stems = ("adapter", *HEADS) if adapter else ("model", *HEADS)
    tensors = [f for f in top if f.endswith(".safetensors") and f.startswith(stems)]
    return texts + (tensors or [f for f in top if f.endswith(".bin") and "training" not in f])


def declared_base(directory: Path) -> str | None:
    """The Hub id that the card of a converted model gives as `base_model`; None where the model is
    a finetune of that one, with other weights."""
    other = _card_field(directory, "base_model_relation") == FINETUNE
    return None if other else _card_field(directory, "base_model")


def _card_field(directory: Path, name: str) -> str | None:
    """A field at the head of a directory's README.md."""
    card = directory / "README.md"
    if not card.is_file():
        return None
    for line in card.read_text(encoding="utf-8", errors="replace").splitlines()[:80]:
        if line.startswith(f"{name}:"):
            return line.removeprefix(f"{name}:").strip().strip("\"'") or None
    return None


def licence(directory: Path) -> str | None:
    """The licence that the card of a model or a licence file beside it names."""
    if named := _card_field(directory, "license"):
        return named
    file = next((f for f in sorted(directory.glob("LICEN[CS]E*")) if f.is_file()), None)
    if file is None:
        return None
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.strip() for line in lines if line.strip()), None)
