"""Data sets of the Hub: the Parquet files that it keeps of each public one, or the author's own."""

import re
from pathlib import Path

from mlx_grpo.core.errors import InputError, one_line

ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<config>[\w.-]+))?(?::(?P<split>[\w.-]+))?")
SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".gz")
CONVERTED = "refs/convert/parquet"
"""The branch with the Hub's own copy: CONFIG/SPLIT/0000.parquet and so on."""


def dataset_files(source: Path) -> list[Path]:
    """The files of a split, fetched into the Hub's cache.

    Args:
        source: owner/name, owner/name:split or owner/name/config:split.

    Raises:
        InputError: no such file and no such data set, no such split, or the Hub does not answer.
    """
    found = ID.fullmatch(str(source))
    # a directory of that name is here: a file was meant
    if not found or source.suffix in SUFFIXES or source.parent.is_dir():
        raise InputError(f"{source}: no such file")
    from huggingface_hub import hf_hub_download

    names = _split_files(source, _listed(source, found["repo"]), found["config"], found["split"])
    try:
        return [
            Path(hf_hub_download(found["repo"], n, repo_type="dataset", revision=CONVERTED))
            for n in names
        ]
    except Exception as e:  # no network: each HTTP library below the Hub's has errors of its own
        raise _unreachable(source, e) from None


def _listed(source: Path, repository: str) -> list[str]:
    """The Parquet files that the Hub keeps of a data set, or those in its cache."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        files = HfApi().list_repo_files(repository, repo_type="dataset", revision=CONVERTED)
    except (HFValidationError, RepositoryNotFoundError):
        raise InputError(
            f"{source}: no such file, and the Hub has no data set of that name"
        ) from None
    except Exception as e:  # as above
        files = _cached(repository)
        if not files:
            raise _unreachable(source, e) from None
    return sorted(f for f in files if f.endswith(".parquet"))


def _cached(repository: str) -> list[str]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        place = snapshot_download(
            repository, repo_type="dataset", revision=CONVERTED, local_files_only=True
        )
    except LocalEntryNotFoundError:
        return []
    return [p.relative_to(place).as_posix() for p in Path(place).rglob("*.parquet")]


def _split_files(
    source: Path, files: list[str], config: str | None, split: str | None
) -> list[str]:
    """Those of one configuration and split; what is not named must be the only one, or called
    `default` and `train`."""
    parts = [tuple(f.rsplit("/", 2)[:2]) for f in files if f.count("/") == 2]
    chosen = _one(source, "configuration", sorted({c for c, _ in parts}), config, "default")
    splits = sorted({s for c, s in parts if c == chosen})
    wanted = _one(source, "split", splits, split, "train")
    return [f for f in files if f.startswith(f"{chosen}/{wanted}/")]


def _one(source: Path, what: str, known: list[str], named: str | None, usual: str) -> str:
    if named in known:
        return str(named)
    if named is None and (usual in known or len(known) == 1):
        return usual if usual in known else known[0]
    form = "owner/name/config:split" if what == "configuration" else "owner/name:split"
    raise InputError(
        f"{source}: the Hub keeps no {what} {f'{named!r} ' if named else ''}of it that could be "
        f"read; there are {', '.join(known) or 'none'}; write it as {form}"
    )


def _unreachable(source: Path, error: Exception) -> InputError:
    return InputError(
        f"{source}: no such file, and the Hub cannot be reached ({one_line(error)}); fetch the "
        "data elsewhere and give its file"
    )
