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

    files, whole = _listed(source, found["repo"])
    names = _split_files(source, files, found["config"], found["split"], whole)
    if not whole:
        _check_no_gap(source, names)
    try:
        # from the last to the first: what an interruption leaves has a gap
        return [
            Path(hf_hub_download(found["repo"], n, repo_type="dataset", revision=CONVERTED))
            for n in reversed(names)
        ][::-1]
    except Exception as e:  # no network: each HTTP library below the Hub's has errors of its own
        raise _unreachable(source, e) from None


def _check_no_gap(source: Path, names: list[str]) -> None:
    """Raise InputError where the cache holds a part of a split; the Hub counts files from 0."""
    numbers = [int(stem) for name in names if (stem := Path(name).stem).isdigit()]
    if numbers != list(range(len(names))):
        raise InputError(
            f"{source}: the Hub cannot be reached, and its cache holds only a part of the files; "
            "fetch the rest with a network"
        )


def _listed(source: Path, repository: str) -> tuple[list[str], bool]:
    """(Parquet files that the Hub keeps of a data set, true), or (those in its cache, false)."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        files = HfApi().list_repo_files(repository, repo_type="dataset", revision=CONVERTED)
    except (HFValidationError, RepositoryNotFoundError):
        raise InputError(
            f"{source}: no such file, and the Hub has no data set of that name"
        ) from None
    except Exception as e:  # as above
        if cached := _cached(repository):
            return sorted(cached), False
        raise _unreachable(source, e) from None
    return sorted(f for f in files if f.endswith(".parquet")), True


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
    source: Path, files: list[str], config: str | None, split: str | None, whole: bool
) -> list[str]:
    """Those of one configuration and split; what is not named must be called `default` and `train`,
    or be the only one, which a cache cannot tell."""
    parts = [tuple(f.rsplit("/", 2)[:2]) for f in files if f.count("/") == 2]
    chosen = _one(source, "configuration", sorted({c for c, _ in parts}), config, "default", whole)
    splits = sorted({s for c, s in parts if c == chosen})
    wanted = _one(source, "split", splits, split, "train", whole)
    return [f for f in files if f.startswith(f"{chosen}/{wanted}/")]


def _one(
    source: Path, what: str, known: list[str], named: str | None, usual: str, whole: bool
) -> str:
    if named in known:
        return str(named)
    if named is None and (usual in known or (whole and len(known) == 1)):
        return usual if usual in known else known[0]
    form = "owner/name/config:split" if what == "configuration" else "owner/name:split"
    keeps = "the Hub keeps" if whole else "the Hub cannot be reached, and its cache holds"
    raise InputError(
        f"{source}: {keeps} no {what} {f'{named!r} ' if named else ''}of it that could be "
        f"read; there are {', '.join(known) or 'none'}; write it as {form}"
    )


def _unreachable(source: Path, error: Exception) -> InputError:
    return InputError(
        f"{source}: no such file, and the Hub cannot be reached ({one_line(error)}); fetch the "
        "data elsewhere and give its file"
    )
