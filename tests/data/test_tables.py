"""Every form of a data set gives the same rows; what cannot be read is named."""

import gzip
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from mlx_grpo.core.errors import InputError
from mlx_grpo.data import hub, tables
from mlx_grpo.data.prompts import read_prompts
from mlx_grpo.data.tables import digest, read_rows

ROWS = [{"prompt": "say tea", "answer": "a"}, {"prompt": 'say\nÜ, "x"', "answer": "b"}]


def lines(rows: list[dict[str, Any]], end: str = "\n") -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows)


def parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = pyarrow.table({name: [row.get(name) for row in rows] for name in names})
    pyarrow.parquet.write_table(table, path)


TABLE = 'prompt{0}answer\nsay tea{0}a\n"say\nÜ, ""x"""{0}b\n'
FORMS: dict[str, Callable[[Path], Any]] = {
    "p.jsonl": lambda p: p.write_text(lines(ROWS)),
    "crlf.jsonl": lambda p: p.write_bytes(lines(ROWS, "\r\n").encode()),
    "bom.jsonl": lambda p: p.write_bytes(b"\xef\xbb\xbf" + lines(ROWS).encode()),
    "utf16.jsonl": lambda p: p.write_bytes(lines(ROWS).encode("utf-16")),
    "lines.json": lambda p: p.write_text(lines(ROWS)),
    "list.json": lambda p: p.write_text(json.dumps(ROWS)),
    "indented.json": lambda p: p.write_text(json.dumps(ROWS, indent=2)),
    "p.csv": lambda p: p.write_text(TABLE.format(",")),
    "bom.csv": lambda p: p.write_bytes(b"\xef\xbb\xbf" + TABLE.format(",").encode()),
    "semicolons.csv": lambda p: p.write_text(TABLE.format(";")),
    "tabs.tsv": lambda p: p.write_text(TABLE.format("\t")),
    "p.parquet": lambda p: parquet(p, ROWS),
    "p.jsonl.gz": lambda p: p.write_bytes(gzip.compress(lines(ROWS).encode())),
    "p.csv.gz": lambda p: p.write_bytes(gzip.compress(TABLE.format(",").encode())),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    FORMS[name](tmp_path / name)
    assert [row for _, row in read_rows(tmp_path / name)] == ROWS


@pytest.mark.parametrize(
    ("name", "places"),
    [("p.jsonl", "12"), ("p.csv", "23"), ("list.json", ["item 1", "item 2"]),
     ("p.parquet", ["row 1", "row 2"])],
)  # fmt: skip
def test_places_name_the_file_and_the_line_or_row(name: str, places: str, tmp_path: Path) -> None:
    FORMS[name](tmp_path / name)
    found = [place for place, _ in read_rows(tmp_path / name)]
    assert found == [f"{tmp_path / name}:{p}" for p in places]


def test_rows_without_an_id_are_numbered_in_every_form(tmp_path: Path) -> None:
    for name in ("list.json", "p.parquet", "p.jsonl"):
        FORMS[name](tmp_path / name)
        assert [r.id for r in read_prompts(tmp_path / name)] == ["1", "2"]


@pytest.mark.parametrize(
    ("name", "data", "complaint"),
    [
        ("a.jsonl", b'{"prompt": "x"}\n{"prompt\n', r"a\.jsonl:2: not valid JSON .* object a line"),
        ("b.json", b'{\n "data": []\n}', r"b\.json:1: .*this is one object over several lines"),
        ("c.json", b'[{"prompt": "x"}, 3]', r"c\.json:item 2: must be a JSON object, not int"),
        ("d.jsonl", b'[1]\n{"prompt": "x"}\n', r"d\.jsonl:1: must be a JSON object, not list"),
        ("e.json", b'[{"prompt": "x"},\n', r"e\.json:1: not valid JSON"),
        ("f.jsonl", b"\xff{}", r"f\.jsonl: not UTF-8 text \(byte 0\)"),
        ("g.csv", b"prompt\na,b\n", r"g\.csv:2: 2 cells under 1 names"),
        ("h.csv", b'prompt\n"a\n', r"h\.csv:2: not valid CSV"),
        ("i.gz", b"\x1f\x8bnot", r"i\.gz: a damaged gzip file"),
        (
            "i2.gz",
            gzip.compress(bytes(range(256)) * 9, mtime=0)[:-30] + b"x" * 30,
            "a damaged gzip file",
        ),
        ("i3.gz", gzip.compress(b"", mtime=0)[:10] + b"\xff" * 9, r"i3\.gz: a damaged gzip file"),
        ("j.parquet", b"PAR1" + bytes(99) + b"PAR1", r"j\.parquet: a damaged Parquet file"),
        ("k.json", b'["\\ud800"]', r"k\.json:item 1: a .*escape stands alone"),
    ],
)
def test_what_cannot_be_read_is_refused_by_place(
    name: str, data: bytes, complaint: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=complaint):
        list(read_rows(tmp_path / name))


Bomb = Callable[[Path, int], Any]
"""Writes a file of many megabytes that has the size of a few kilobytes."""


def zipped(path: Path, count: int) -> None:
    path.write_bytes(gzip.compress(b'{"prompt": "' + b"x" * (count * 1_000_000) + b'"}'))


def zipped_twice(path: Path, count: int) -> None:
    half = gzip.compress(b'{"prompt": "' + b"x" * (count * 500_000) + b'"}\n')
    path.write_bytes(half * 2)  # gzip files may be put one behind the other


def columns_of(compression: str, dictionary: bool) -> Bomb:
    def write(path: Path, count: int) -> None:
        texts = [(str(i % 2 if dictionary else i) + "x" * 999_990) for i in range(count)]
        table = pyarrow.table({"prompt": texts})
        pyarrow.parquet.write_table(table, path, compression=compression, use_dictionary=dictionary)

    return write


BOMBS: dict[str, Bomb] = {
    "bomb.jsonl.gz": zipped,
    "two.jsonl.gz": zipped_twice,
    "compressed.parquet": columns_of("zstd", dictionary=False),
    "repeated.parquet": columns_of("zstd", dictionary=True),  # says that it is small, and is not
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_compressed_file_that_unpacks_to_far_more_is_refused_before_it_has(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "LEAST_BOUND", 10_000_000)
    file = tmp_path / name
    BOMBS[name](file, 60)
    assert file.stat().st_size < 100_000
    tracemalloc.start()
    try:
        complaint = rf"{name}: unpacks to more than \d+ MB, .* as JSONL or CSV"
        with pytest.raises(InputError, match=complaint):
            list(read_rows(file))
        assert tracemalloc.get_traced_memory()[1] < 30_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", BOMBS)
def test_one_that_unpacks_to_what_text_does_is_read(name: str, tmp_path: Path) -> None:
    BOMBS[name](tmp_path / name, 20)
    assert sum(len(row["prompt"]) for _, row in read_rows(tmp_path / name)) > 19_000_000


def test_a_large_file_may_unpack_to_a_hundred_times_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "LEAST_BOUND", 0)
    file = tmp_path / "p.jsonl.gz"
    file.write_bytes(gzip.compress(lines([{"prompt": f"say {i}"} for i in range(999)]).encode()))
    assert len(list(read_rows(file))) == 999
    file.write_bytes(gzip.compress(lines(ROWS * 100_000).encode()))
    with pytest.raises(InputError, match="unpacks to more than"):
        list(read_rows(file))


def test_parquet_without_its_library_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "p.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"needs pyarrow: pip install 'mlx-grpo\[data\]'"):
        list(read_rows(tmp_path / "p.parquet"))


def test_messages_and_mixed_rows_come_out_of_parquet_as_they_went_in(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "hi"}], "level": 3},
        {"messages": [{"role": "user", "content": "hi", "name": "ann"}], "tags": ["a"]},
    ]
    parquet(tmp_path / "p.parquet", rows)
    assert [row for _, row in read_rows(tmp_path / "p.parquet")] == rows


def test_texts_that_parquet_holds_as_bytes_are_read_as_texts(tmp_path: Path) -> None:
    parquet(tmp_path / "p.parquet", [{"prompt": "wie weit? 5 \u00b5m".encode(), "level": 3}])
    assert [row for _, row in read_rows(tmp_path / "p.parquet")] == [
        {"prompt": "wie weit? 5 \u00b5m", "level": 3}
    ]


def test_a_time_finer_than_python_knows_is_one_line(tmp_path: Path) -> None:
    column = pyarrow.array([1], pyarrow.timestamp("ns"))
    table = pyarrow.table({"prompt": ["hi"], "when": column})
    pyarrow.parquet.write_table(table, tmp_path / "p.parquet")
    try:
        found = list(read_rows(tmp_path / "p.parquet"))
    except InputError as e:
        assert "p.parquet" in str(e)
    else:
        assert found[0][1]["prompt"] == "hi"  # where pandas is installed


def test_fields_are_known_by_the_names_that_are_given(tmp_path: Path) -> None:
    row = {"question": "2+2", "messages": [], "prompt": "old", "answer": "4"}
    (tmp_path / "p.jsonl").write_text(lines([row]))
    columns = {"prompt": "question", "response": ""}
    ((_, found),) = read_rows(tmp_path / "p.jsonl", columns)
    assert found == {"prompt": "2+2", "answer": "4"}
    ((_, same),) = read_rows(tmp_path / "p.jsonl", {"prompt": "prompt"})
    assert same["prompt"] == "old"


def test_a_field_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(lines(ROWS))
    with pytest.raises(InputError, match=r"p\.jsonl:1: .*'text' is missing \(--prompt-column\); the row has prompt, answer"):  # fmt: skip  # noqa: E501
        list(read_rows(tmp_path / "p.jsonl", {"prompt": "text"}))


FILES = [
    "default/train/0000.parquet", "default/train/0001.parquet", "default/test/0000.parquet",
]  # fmt: skip
Hub = Callable[[list[str]], None]


@pytest.fixture
def on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """Stand in for the Hub: each file holds one row with its name."""
    import huggingface_hub

    def download(repository: str, name: str, repo_type: str, revision: str) -> str:
        assert (repo_type, revision) == ("dataset", hub.CONVERTED)
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        parquet(file, [{"prompt": name}])
        return str(file)

    def with_files(files: list[str]) -> None:
        listed = lambda *_, **__: [*files, "README.md"]  # noqa: E731
        monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", listed)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)

    return with_files


@pytest.mark.parametrize(
    ("files", "source", "found"),
    [
        (FILES, "me/data", FILES[:2]),
        (FILES, "me/data:test", FILES[2:]),
        (FILES, "me/data/default:train", FILES[:2]),
        (["main/validation/0000.parquet"], "me/data", ["main/validation/0000.parquet"]),
    ],
)
def test_a_hub_data_set_is_read_from_the_files_of_its_split(
    files: list[str], source: str, found: list[str], on_the_hub: Hub
) -> None:
    on_the_hub(files)
    rows = list(read_rows(Path(source)))
    assert [row["prompt"] for _, row in rows] == found
    assert rows[0][0] == f"{source}/0000.parquet:row 1"
    assert len({r.id for r in read_prompts(Path(source))}) == len(found)
    assert len(digest(Path(source))) == 64


@pytest.mark.parametrize(
    ("files", "source", "complaint"),
    [
        (FILES, "me/data:dev", "no split 'dev' of it that could be read; there are test, train"),
        (FILES, "me/data/other", "no configuration 'other' .*; there are default"),
        ([*FILES, "x/y/0.parquet"], "me/data/x:train", "no split 'train' .*; there are y"),
        (["a/train/0.parquet", "b/train/0.parquet"], "me/data", "no configuration of it .* a, b"),
        ([], "me/data", "there are none"),
    ],
)
def test_a_split_that_the_hub_does_not_have_is_named_with_those_it_has(
    files: list[str], source: str, complaint: str, on_the_hub: Hub
) -> None:
    on_the_hub(files)
    with pytest.raises(InputError, match=complaint):
        list(read_rows(Path(source)))


@pytest.mark.parametrize("source", ["no/such/file/here", "missing.jsonl", "data/rows.csv", "a b/c"])
def test_what_can_be_no_data_set_is_a_missing_file(source: str) -> None:
    with pytest.raises(InputError, match=r"no such file$"):
        list(read_rows(Path(source)))


def test_a_missing_file_in_a_directory_that_is_here_is_not_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"^data/prompts: no such file$"):
        list(read_rows(Path("data/prompts")))


@pytest.fixture
def in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """Put files into the Hub's cache, and leave the network."""
    from huggingface_hub import constants

    def with_files(files: list[str]) -> None:
        repository = tmp_path / "datasets--me--data"
        for name in files:
            file = repository / "snapshots" / "abc" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            parquet(file, [{"prompt": name}])
        reference = repository / "refs" / hub.CONVERTED
        reference.parent.mkdir(parents=True)
        reference.write_text("abc")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    return with_files


def test_what_was_fetched_before_is_read_without_a_network(in_the_cache: Hub) -> None:
    in_the_cache(FILES)
    assert [row["prompt"] for _, row in read_rows(Path("me/data"))] == FILES[:2]
    assert [row["prompt"] for _, row in read_rows(Path("me/data:test"))] == FILES[2:]


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        (["default/train/0001.parquet"], "its cache holds only a part of the files"),
        (["default/train/0000.parquet", "default/train/0002.parquet"], "only a part of the files"),
        (["default/test/0000.parquet"], "its cache holds no split of it .* there are test"),
        (["en/train/0000.parquet"], "its cache holds no configuration of it .* there are en"),
    ],
)
def test_a_part_in_the_cache_is_not_taken_for_the_whole(
    files: list[str], complaint: str, in_the_cache: Hub
) -> None:
    in_the_cache(files)
    with pytest.raises(InputError, match=complaint):
        list(read_rows(Path("me/data")))


def test_an_interrupted_download_leaves_a_gap(
    on_the_hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    on_the_hub(FILES)
    asked: list[str] = []

    def fails(_: str, name: str, **__: Any) -> str:
        asked.append(name)
        raise ConnectionError("gone")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fails)
    with pytest.raises(InputError, match="cannot be reached"):
        list(read_rows(Path("me/data")))
    assert asked == ["default/train/0001.parquet"]


def test_a_hub_out_of_reach_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    def fails(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", fails)
    monkeypatch.setattr(hub, "_cached", lambda _: [])
    with pytest.raises(InputError) as failure:
        list(read_rows(Path("me/data")))
    assert "the Hub cannot be reached (no route to host)" in str(failure.value)
    assert "\n" not in str(failure.value)
