"""The same pairs from every container: encodings, compressions, JSON in its shapes, CSV, saved data sets."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orpo_kernels.app.data import load_preferences
from orpo_kernels.app.errors import UserError

PAIRS = [{"prompt": f"Frage {i}: wie spät?", "chosen": f"gut, {i}; ja 今", "rejected": 'nein\n"x"'} for i in range(3)]


def json_lines(rows: list) -> str:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n"


def pretty(rows: list) -> str:
    return "\n".join(json.dumps(row, indent=2) for row in rows)


def table(delimiter: str) -> Callable[[list], str]:
    def written(rows: list) -> str:
        file = io.StringIO(newline="")
        writer = csv.DictWriter(file, rows[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
        return file.getvalue()

    return written


SHAPES: dict[str, tuple[str, Callable[[list], str]]] = {
    "lines": (".jsonl", json_lines),
    "lines, another suffix": (".ndjson", json_lines),
    "lines in .json": (".json", json_lines),
    "list": (".json", json.dumps),
    "list, pretty": (".json", lambda rows: json.dumps(rows, indent=4)),
    "list, .jsonl": (".jsonl", json.dumps),
    "list, pretty, .jsonl": (".jsonl", lambda rows: json.dumps(rows, indent=4)),
    "pretty objects, .jsonl": (".jsonl", pretty),
    "list under a key": (".json", lambda rows: json.dumps({"version": 1, "authors": ["x"], "data": rows})),
    "list under a key, pretty": (".json", lambda rows: "\n " + json.dumps({"data": rows}, indent=1)),
    "pretty objects": (".json", pretty),
    "pretty objects, commas": (".json", lambda rows: ",\n".join(json.dumps(row, indent=2) for row in rows)),
    "commas": (".csv", table(",")),
    "semicolons": (".csv", table(";")),
    "tabs": (".tsv", table("\t")),
    "tabs in .csv": (".csv", table("\t")),
}
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be")


def encoded(text: str, encoding: str) -> bytes:
    mark = "\ufeff" if encoding in ("utf-16-le", "utf-16-be") else ""
    return (mark + text).encode(encoding)


texts = st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), min_size=1, max_size=12).filter(str.strip)
rows = st.builds(lambda p, c: {"prompt": p, "chosen": c, "rejected": c + "x"}, texts, texts)


@given(
    st.lists(rows, min_size=1, max_size=4), st.sampled_from(sorted(SHAPES)), st.sampled_from(ENCODINGS), st.booleans()
)
def test_the_same_pairs_whatever_the_container(tmp_path_factory, pairs, shape, encoding, compressed):
    suffix, written = SHAPES[shape]
    path = tmp_path_factory.mktemp("file") / f"pairs{suffix}{'.gz' if compressed else ''}"
    content = encoded(written(pairs), encoding)
    path.write_bytes(gzip.compress(content) if compressed else content)
    found = load_preferences(str(path))
    assert (found.pairs, found.rows, found.problems) == (pairs, list(range(1, len(pairs) + 1)), [])


@pytest.mark.parametrize("shape", SHAPES)
def test_zstd(shape, tmp_path):
    arrow = pytest.importorskip("pyarrow")
    suffix, written = SHAPES[shape]
    path = tmp_path / f"pairs{suffix}.zst"
    with arrow.CompressedOutputStream(arrow.OSFile(str(path), "wb"), "zstd") as file:
        file.write(encoded(written(PAIRS), "utf-16"))
    assert load_preferences(str(path)).pairs == PAIRS


def test_one_object_pretty_printed(tmp_path):
    chat = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    row = {"messages": chat, "rejected_response": "B", "tools": [{"name": "f"}]}
    (tmp_path / "a.json").write_text(json.dumps(row, indent=2))
    assert load_preferences(str(tmp_path / "a.json")).pairs[0]["tools"] == [{"name": "f"}]


def test_a_broken_object_costs_itself_alone(tmp_path):
    broken = '{\n  "prompt": "Q",\n  "chosen": {]\n}'
    text = "\n".join([json.dumps(PAIRS[0], indent=2), broken, json.dumps(PAIRS[1], indent=2), '{"prompt": '])
    (tmp_path / "a.json").write_text(text)
    found = load_preferences(str(tmp_path / "a.json"))
    assert (found.pairs, found.rows) == (PAIRS[:2], [1, 3])
    assert [problem.row for problem in found.problems] == [2, 4]


def test_several_lists(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"train": PAIRS, "test": PAIRS}))
    with pytest.raises(UserError, match="holds lists of rows under train and test; write the one"):
        load_preferences(str(tmp_path / "a.json"))


# --- what Arrow adds -------------------------------------------------------------------------------------------------


def test_nulls_that_only_arrow_wrote(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    def row(arguments: dict, tool: dict, **more: Any) -> dict[str, Any]:
        call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
        return {
            "prompt": [{"role": "user", "content": "Q", **more}],
            "chosen": [call],
            "rejected": "B",
            "tools": [tool],
        }

    rows = [row({"city": "Paris"}, {"name": "f", "parameters": {"x": 1}}), row({"day": 2}, {"name": "g"}, name="Bob")]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text(json_lines(rows))
    expected = load_preferences(str(tmp_path / "a.jsonl")).pairs
    assert expected[0]["chosen"][0]["tool_calls"][0]["function"]["arguments"] == {"city": "Paris"}
    assert load_preferences(str(tmp_path / "a.parquet")).pairs == expected
    # A null that JSON has is the author's.
    (tmp_path / "b.jsonl").write_text(json_lines([row({"city": None}, {"name": "f", "default": None})]))
    [pair] = load_preferences(str(tmp_path / "b.jsonl")).pairs
    assert pair["chosen"][0]["tool_calls"][0]["function"]["arguments"] == {"city": None}
    assert pair["tools"] == [{"name": "f", "default": None}]


def test_data_sets_that_were_saved_to_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    whole = datasets.Dataset.from_list(PAIRS)
    whole.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": whole, "test": whole.select([1])}).save_to_disk(tmp_path / "several")
    assert load_preferences(str(tmp_path / "one")).pairs == PAIRS
    assert load_preferences(str(tmp_path / "several")).pairs == PAIRS
    assert load_preferences(str(tmp_path / "several"), split="test").pairs == PAIRS[1:2]
    with pytest.raises(UserError, match="has no split 'dev'; its splits are train, test"):
        load_preferences(str(tmp_path / "several"), split="dev")
    arrow_file = next((tmp_path / "one").glob("*.arrow"))
    arrow_file.write_bytes(arrow_file.read_bytes()[:100])
    with pytest.raises(UserError, match=r"no whole data set that was saved|cannot be read to its end"):
        load_preferences(str(tmp_path / "one"))
    arrow_file.unlink()
    with pytest.raises(UserError, match="no whole data set that was saved"):
        load_preferences(str(tmp_path / "one"))


# --- what cannot be read ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_damaged_archives(suffix, tmp_path):
    content = json_lines(PAIRS * 500).encode()
    path = tmp_path / f"pairs.jsonl{suffix}"
    if suffix == ".gz":
        whole = gzip.compress(content)
    else:
        arrow = pytest.importorskip("pyarrow")
        with arrow.CompressedOutputStream(arrow.OSFile(str(path), "wb"), "zstd") as file:
            file.write(content)
        whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:-1], b"no archive at all", whole[:20] + b"\0" * 40 + whole[60:]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=rf"pairs.jsonl{suffix} is damaged .*copy it again"):
            load_preferences(str(path))


def test_utf_16_that_was_cut_off(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(json_lines(PAIRS).encode("utf-16")[:-1])
    with pytest.raises(UserError, match="is damaged"):
        load_preferences(str(path))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.gz", "a.jsonl.zst"])
def test_data_that_may_not_be_read(name, tmp_path, monkeypatch):
    """Whoever runs the tests may be allowed to read everything; so the system's answer is given in its place."""
    path = tmp_path / name
    path.write_text("x")

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(io, "open", refuse)
    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(gzip, "open", refuse)
    with pytest.raises(UserError, match=rf"{name} cannot be read \(Permission denied\)"):
        load_preferences(str(path))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir(mode=0)
    with pytest.raises(UserError, match=r"data cannot be read \(Permission denied\)"):
        load_preferences(str(folder))


def test_paths_that_hold_no_data(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "gone.jsonl")
    (tmp_path / "a.parquet.gz").write_bytes(b"x")
    for path, reason in [
        (tmp_path / "empty", "empty is a folder without data"),
        (tmp_path / "link.jsonl", "is a link to .*gone.jsonl, which is not there"),
        (tmp_path / "gone.jsonl.gz", "There is no file .*gone.jsonl.gz"),
        (tmp_path / "gone", "There is no file .*gone"),
        (tmp_path / "a.parquet.gz", "ends in '.gz', but the formats are"),
        (tmp_path / ("x" * 300), "cannot be read"),
        (Path("~nobody-of-this-name/a.jsonl"), "There is no file"),
    ]:
        with pytest.raises(UserError, match=reason):
            load_preferences(str(path))


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (gzip.compress(b"{}"), "is compressed by gzip, and its name does not end in .gz: rename it"),
        (b"\x28\xb5\x2f\xfd\x00", "is compressed by zstd"),
        (b"PK\x03\x04", "is a ZIP archive, or a workbook"),
        (b"PAR1", "is a Parquet file"),
        ("prompt".encode("utf-32"), "is in UTF-32: save it in UTF-8"),
        ("prompt".encode("utf-16-le"), "is in UTF-16 without its byte order mark: save it in UTF-8"),
        ("prompt".encode("utf-16-be"), "is in UTF-16 without its byte order mark"),
    ],
    ids=["gzip", "zstd", "zip", "parquet", "utf-32", "utf-16-le", "utf-16-be"],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_what_is_no_text_is_named(name, content, cause, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=re.escape(f"{name} {cause}")):
        load_preferences(str(tmp_path / name))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_key_that_comes_twice_names_its_row(name, tmp_path):
    """JSON's reader would take the last."""
    rows = ['{"prompt": "Q", "prompt": "R", "chosen": "A", "rejected": "B"}', json.dumps(PAIRS[0])]
    (tmp_path / name).write_text("\n".join(rows))
    found = load_preferences(str(tmp_path / name))
    assert found.pairs == PAIRS[:1]
    assert [str(problem) for problem in found.problems] == ["row 1: it has 'prompt' twice"]


def test_an_optional_package_that_is_missing(tmp_path, monkeypatch):
    for name in ("pyarrow", "pyarrow.parquet", "datasets"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    (tmp_path / "folder").mkdir()
    for path, package in [("a.jsonl.zst", "pyarrow"), ("a.parquet", "pyarrow"), ("folder", "datasets")]:
        if path != "folder":
            (tmp_path / path).write_bytes(b"x")
        with pytest.raises(UserError, match=f"takes {package} to be read: pip install {package}"):
            load_preferences(str(tmp_path / path))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("prompt,chosen,chosen\na,b,c\n", "has several columns that are called chosen"),
        ("prompt,chosen,rejected\na,b\n", "Of row 1: it has 1 fields fewer than the header"),
        ("prompt,chosen,rejected\na,b,c,d\n", "Of row 1: it has 1 fields more than the header"),
    ],
)
def test_tables_that_do_not_fit_their_header(text, reason, tmp_path):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(UserError, match=reason):
        load_preferences(str(tmp_path / "a.csv"))


def test_a_column_without_a_name(tmp_path):
    """pandas writes its index into one."""
    (tmp_path / "a.csv").write_text(",prompt,chosen,rejected\n0,Q,A,B\n")
    found = load_preferences(str(tmp_path / "a.csv"))
    assert (found.pairs, found.ignored) == ([{"prompt": "Q", "chosen": "A", "rejected": "B"}], ['""'])


def test_letters_in_a_code_page_are_named(tmp_path):
    (tmp_path / "a.csv").write_bytes("prompt;chosen;rejected\nspät?;ja;nein\nQ;A;B\n".encode("cp1252"))
    found = load_preferences(str(tmp_path / "a.csv"))
    assert found.pairs == [{"prompt": "Q", "chosen": "A", "rejected": "B"}]
    assert "not UTF-8" in found.problems[0].reason


def test_a_pointer_of_git_lfs(tmp_path):
    for name in ("a.jsonl", "a.parquet", "folder/a.csv"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n")
        with pytest.raises(UserError, match=r"a\.\w+ is a pointer of Git LFS, not the data itself: git lfs pull"):
            load_preferences(str(path if path.parent == tmp_path else path.parent))


@pytest.mark.parametrize(
    ("names", "unread"),
    [
        (("a.jsonl", "c.jsonl"), None),
        (("train.jsonl", "test.jsonl"), None),
        (("a.jsonl", "dataset_infos.json", ".cache/x.json"), None),
        (("a.jsonl", "b.csv", "c.jsonl"), "b.csv"),
        (("train.jsonl", "more.jsonl"), "more.jsonl"),
    ],
)
def test_no_file_of_a_folder_goes_unread(names, unread, tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = table(",")(PAIRS) if name.endswith(".csv") else json_lines(PAIRS)
        path.write_text("{}" if name == "dataset_infos.json" else rows)
    if unread:
        with pytest.raises(UserError, match=f"files that would not be read: {unread}\\."):
            load_preferences(str(folder))
    else:
        read = [name for name in names if name in ("a.jsonl", "c.jsonl", "train.jsonl")]
        assert load_preferences(str(folder)).pairs == PAIRS * len(read)
