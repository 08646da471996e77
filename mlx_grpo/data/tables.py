"""Rows of a data set, whatever form it has: JSONL, a JSON list, CSV, Parquet, a Hub data set.

The form is told by the content. Every complaint names file and row.
"""

import codecs
import csv
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlx_grpo.core.errors import InputError, one_line
from mlx_grpo.core.limits import check_regular
from mlx_grpo.data.hub import dataset_files
from mlx_grpo.files.manifest import sha256

Row = tuple[str, dict[str, Any]]
"""("file:line", object); "file:item 3" in a JSON list, "file:row 3" in Parquet."""
PARQUET, GZIP = b"PAR1", b"\x1f\x8b"
TEXT_ONLY = {".csv": None, ".tsv": "\t"}
LEAST_BOUND, MOST_TIMES = 64_000_000, 100
"""What a compressed file may unpack to: so many bytes, or so many times its own size. Text shrinks
to a third or a twentieth; gzip can shrink mere repetition to a thousandth."""
PARQUET_ROWS = 16
"""Read at a time: a text that fills a column is stored once, and takes its length in each row."""


def read_rows(source: Path, columns: Mapping[str, str] | None = None) -> Iterator[Row]:
    """Yield a place and an object for each row.

    Args:
        source: a file, or a Hub data set: owner/name, owner/name:split or owner/name/config:split.
        columns: names that fields are known by here, and those that they have in the file; an empty
            one changes nothing.

    Raises:
        InputError: nothing is there, it cannot be read, or a row is no object.
    """
    renamed = {new: old for new, old in (columns or {}).items() if old and old != new}
    for file in data_files(source):
        name = str(source if file == source else f"{source}/{file.name}")
        for place, row in _rows(file, name):
            yield place, _renamed(place, row, renamed)


def data_files(source: Path) -> list[Path]:
    """The files of a data set: itself, or those that the Hub has of it, fetched.

    Raises:
        InputError: nothing is there.
    """
    return [source] if source.exists() else dataset_files(source)


def digest(source: Path) -> str:
    """sha256 of a data set's content."""
    found = [sha256(file) for file in data_files(source)]
    return found[0] if len(found) == 1 else hashlib.sha256("".join(found).encode()).hexdigest()


def own_id(row: Mapping[str, Any]) -> str | None:
    """The id that a row gives itself."""
    return None if row.get("id") in (None, "") else str(row["id"])


def row_number(place: str) -> str:
    """The number at the end of a place."""
    return place.rpartition(":")[2].split()[-1]


def _renamed(place: str, row: dict[str, Any], renamed: Mapping[str, str]) -> dict[str, Any]:
    for new, old in renamed.items():
        if old not in row:
            raise InputError(
                f"{place}: field '{old}' is missing (--{new}-column); the row has {', '.join(row)}"
            )
        row = {k: v for k, v in row.items() if k not in (old, new)} | {new: row[old]}
    if "prompt" in renamed:  # what was named is meant
        row.pop("messages", None)
    return row


def _rows(file: Path, name: str) -> Iterator[Row]:
    check_regular(file)  # it is read twice, for its digest too
    try:
        data = file.read_bytes()
    except IsADirectoryError:
        raise InputError(f"{name}: a directory; name a file") from None
    if data.startswith(GZIP):
        data = _unzipped(data, name)
    if data.startswith(PARQUET):
        return _parquet(data, name)
    text = _decoded(data, name)
    suffix = next((s for s in reversed(file.suffixes) if s != ".gz"), "").lower()
    if suffix in TEXT_ONLY:
        return _csv(text, name, TEXT_ONLY[suffix])
    if text.lstrip().startswith("["):
        try:
            items = json.loads(text)
        except (ValueError, RecursionError):
            pass  # perhaps a line that is a list: the reader of lines knows which
        else:
            return _items(items, name)
    return _lines(text, name)


def _unzipped(data: bytes, name: str) -> bytes:
    bound, pieces, size = _bound(data), [], 0
    try:
        with gzip.open(io.BytesIO(data)) as file:
            while piece := file.read(1 << 20):
                pieces.append(piece)
                size += len(piece)
                _check_size(size, bound, name)
    except (OSError, EOFError, zlib.error) as e:
        raise InputError(f"{name}: a damaged gzip file ({one_line(e)})") from None
    return b"".join(pieces)


def _bound(data: bytes) -> int:
    return max(LEAST_BOUND, MOST_TIMES * len(data))


def _check_size(size: int, bound: int, name: str) -> None:
    if size > bound:
        raise InputError(
            f"{name}: unpacks to more than {bound / 1e6:,.0f} MB, the limit for a compressed file "
            "of this size; if its content is what you want, give it uncompressed, as JSONL or CSV"
        )


def _decoded(data: bytes, name: str) -> str:
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as e:
        raise InputError(f"{name}: not UTF-8 text (byte {e.start}); save it as UTF-8") from None


def _lines(text: str, name: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{name}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as e:
            raise InputError(
                f"{place}: not valid JSON ({e.msg}; column {e.colno}); give one JSON object a line,"
                f" or one list of them{_known_form(text)}"
            ) from None
        except (ValueError, RecursionError) as e:  # a number of thousands of digits, deep nesting
            raise InputError(f"{place}: not usable JSON ({e})") from None
        yield place, _checked(place, row, "\\u" in line)


def _known_form(text: str) -> str:
    """What a text is that is not JSONL, where that can be told."""
    try:
        return " (this is one object over several lines)" if json.loads(text) else ""
    except (ValueError, RecursionError):
        return ""


def _items(items: list[Any], name: str) -> Iterator[Row]:
    for number, row in enumerate(items, 1):
        place = f"{name}:item {number}"
        yield place, _checked(place, row)


def _checked(place: str, row: Any, escapes: bool = True) -> dict[str, Any]:
    """A row that is an object and, where it has escapes, holds no half characters."""
    try:
        if escapes:
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # JSON can spell what no text can hold
        raise InputError(
            f"{place}: a \\ud... escape stands alone; surrogates come in pairs"
        ) from None
    if not isinstance(row, dict):
        raise InputError(f"{place}: must be a JSON object, not {type(row).__name__}")
    return row


def _csv(text: str, name: str, delimiter: str | None) -> Iterator[Row]:
    """Rows under the names of the first line; empty cells are left out."""
    head = text.partition("\n")[0]
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=delimiter or max(",;\t", key=head.count),
        strict=True,
    )
    names: list[str] = []
    line = 1
    try:
        for cells in reader:
            place, line = f"{name}:{line}", reader.line_num + 1
            if not names:
                names = [c.strip() for c in cells]
            elif len(cells) > len(names):
                raise InputError(f"{place}: {len(cells)} cells under {len(names)} names")
            elif any(cells):
                yield place, {n: c for n, c in zip(names, cells, strict=False) if c}
    except csv.Error as e:
        raise InputError(f"{name}:{line}: not valid CSV ({e})") from None


def _parquet(data: bytes, name: str) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(
            f"{name}: reading Parquet needs pyarrow: pip install 'mlx-grpo[data]'; or give JSONL, "
            "one JSON object a line"
        ) from None
    try:
        table = pyarrow.parquet.ParquetFile(io.BytesIO(data))
        about, bound, number, size = table.metadata, _bound(data), 0, 0
        groups = (about.row_group(i).total_byte_size for i in range(about.num_row_groups))
        _check_size(sum(groups), bound, name)
        for batch in table.iter_batches(PARQUET_ROWS):
            size += batch.nbytes
            _check_size(size, bound, name)
            for row in batch.to_pylist():
                number += 1
                yield f"{name}:row {number}", _plain(row)
    except InputError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError) as e:  # dates finer than Python's, too
        raise InputError(
            f"{name}: a damaged Parquet file ({one_line(e)}); fetch it again, or give JSONL"
        ) from None


def _plain(value: Any) -> Any:
    """What JSON could hold: bytes, dates and other types of Arrow as texts, fields that are null in
    a row of mixed shapes left out."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if isinstance(value, bytes):  # a column of texts that does not say so, or of pictures
        return value.decode("utf-8", "replace")
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)
