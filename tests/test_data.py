"""Preference files: every layout and format, and files with something wrong in them."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orpo_kernels.app.data import Preferences, load_preferences
from orpo_kernels.app.errors import UserError

from .chats import assistant, chat, system, user

# --- what a pair looks like, and what becomes of it ----------------------------------------------------------------


def share_gpt(speaker: str, text: str) -> dict[str, str]:
    return {"from": speaker, "value": text}


def hh(*turns: str) -> str:
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {turn}" for i, turn in enumerate(turns))


# How each layout writes (question, chosen, rejected), and what of it has to come out.
LAYOUTS: dict[str, Any] = {
    "text": lambda q, c, r: ({"prompt": q, "chosen": c, "rejected": r},) * 2,
    "chat": lambda q, c, r: (chat([user(q)], c, r),) * 2,
    "chat, answers as strings": lambda q, c, r: (
        {"prompt": [user(q)], "chosen": c, "rejected": r},
        chat([user(q)], c, r),
    ),
    "conversation": lambda q, c, r: (
        {"chosen": [user(q), assistant(c)], "rejected": [user(q), assistant(r)]},
        chat([user(q)], c, r),
    ),
    "conversation of several turns": lambda q, c, r: (
        {
            "chosen": [user("Hi"), assistant("Hello"), user(q), assistant(c)],
            "rejected": [user("Hi"), assistant("Hello"), user(q), assistant(r)],
        },
        chat([user("Hi"), assistant("Hello"), user(q)], c, r),
    ),
    "UltraFeedback": lambda q, c, r: (
        {
            "prompt": q,
            "prompt_id": "x",
            "chosen": [user(q), assistant(c)],
            "rejected": [user(q), assistant(r)],
            "messages": [user(q), assistant(c)],
            "score_chosen": 8.0,
            "score_rejected": 6.5,
        },
        chat([user(q)], c, r),
    ),
    "Intel Orca": lambda q, c, r: (
        {"system": "Be brief.", "question": q, "chosen": c, "rejected": r},
        chat([system("Be brief."), user(q)], c, r),
    ),
    "Intel Orca without a system message": lambda q, c, r: (
        {"system": "", "question": q, "chosen": c, "rejected": r},
        chat([user(q)], c, r),
    ),
    "Argilla's Orca": lambda q, c, r: (
        {"system": "Be brief.", "input": q, "chosen": c, "rejected": r, "ratings": [9, 3], "status": "tie"},
        chat([system("Be brief."), user(q)], c, r),
    ),
    "Argilla": lambda q, c, r: (
        {"source": "x", "instruction": q, "chosen_response": c, "rejected_response": r, "chosen_rating": 5.0},
        chat([user(q)], c, r),
    ),
    "ShareGPT": lambda q, c, r: (
        {"conversations": [share_gpt("human", q)], "chosen": share_gpt("gpt", c), "rejected": share_gpt("gpt", r)},
        chat([user(q)], c, r),
    ),
    "transcript": lambda q, c, r: (
        {"chosen": hh("Hi", "Hello", q, c), "rejected": hh("Hi", "Hello", q, r)},
        chat([user("Hi"), assistant("Hello"), user(q)], c, r),
    ),
}
# The layout's own name where it is another's.
FOUND = {
    "chat, answers as strings": "chat",
    "conversation of several turns": "conversation",
    "UltraFeedback": "conversation",
    "Intel Orca": "chat",
    "Intel Orca without a system message": "chat",
    "Argilla's Orca": "chat",
    "Argilla": "chat",
    "ShareGPT": "chat",
}

texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20).map(str.strip).filter(bool)
texts = texts.filter(lambda text: "Human:" not in text and "Assistant:" not in text)
pairs = st.tuples(st.sampled_from(sorted(LAYOUTS)), texts, texts, texts).filter(lambda pair: pair[2] != pair[3])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def broken_row(draw: Any) -> Any:
    """A row that is no pair, by one defect."""
    layout, question, chosen, rejected = draw(pairs)
    row, _ = LAYOUTS[layout](question, chosen, rejected)
    sides = [name for name in row if name.startswith(("chosen", "rejected")) and isinstance(row[name], str | list)]
    side = draw(st.sampled_from(sides or ["chosen"]))
    defect = draw(st.sampled_from(["missing", "null", "type", "empty", "equal", "surrogate", "no object"]))
    if defect == "missing":
        return {name: value for name, value in row.items() if name != side}
    if defect == "equal":
        return LAYOUTS[layout](question, chosen, chosen)[0]
    if defect == "no object":
        return draw(json_values.filter(lambda value: not isinstance(value, dict)))
    if defect == "surrogate":
        return LAYOUTS[layout](question, "\ud800" + chosen, rejected)[0]
    if defect == "empty":
        return {**row, side: draw(st.sampled_from(["", " \n", [], [assistant("")], [user(question), assistant(" ")]]))}
    return {**row, side: None if defect == "null" else draw(st.integers() | st.booleans() | st.just([3]) | st.just({}))}


rows = st.composite(lambda draw: (False, broken_row(draw)) if draw(st.booleans()) else (True, draw(pairs)))
broken_lines = st.sampled_from(
    [b'{"prompt": "a", "chosen": "b", "rej', b"\xff\xfe\x00", b"}", b"[" * 5000, b"1" * 5000]
)


def load(path: Path, **options: Any) -> Preferences:
    """What can be read; nothing, where that is nothing at all."""
    try:
        return load_preferences(str(path), **options)
    except UserError:
        return Preferences(str(path))


# --- fuzzed files --------------------------------------------------------------------------------------------------


@given(st.data())
def test_of_a_mixed_file_every_pair_is_found_and_every_other_row_named(tmp_path_factory, data):
    contents = data.draw(st.lists(rows() | st.tuples(st.none(), broken_lines), min_size=1, max_size=12))
    lines, expected, bad = [], {}, []
    for number, (is_pair, content) in enumerate(contents, start=1):
        if is_pair is None:
            lines.append(content)
        elif is_pair:
            row, expected[number] = LAYOUTS[content[0]](*content[1:])
            lines.append(json.dumps(row, ensure_ascii=data.draw(st.booleans())).encode())
        else:
            lines.append(json.dumps(content).encode())
        if not is_pair:
            bad.append(number)
    path = tmp_path_factory.mktemp("fuzz") / "pairs.jsonl"
    path.write_bytes(b"\n".join(lines) + data.draw(st.sampled_from([b"", b"\n", b"\r\n\n"])))
    if not expected:
        with pytest.raises(UserError, match="no usable pair"):
            load_preferences(str(path))
        return
    found = load_preferences(str(path))
    assert dict(zip(found.rows, found.pairs, strict=True)) == expected
    assert [problem.row for problem in found.problems] == bad
    assert all(problem.reason.startswith("it") for problem in found.problems)
    assert len(found.layouts) == len(expected)


@given(st.lists(st.tuples(texts, texts, texts), min_size=1, max_size=8), st.booleans())
def test_csv(tmp_path_factory, triples, with_tabs):
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter="\t" if with_tabs else ",")
    writer.writerow(["prompt", "chosen", "rejected"])
    writer.writerows(triples)
    path = tmp_path_factory.mktemp("fuzz") / ("pairs.tsv" if with_tabs else "pairs.csv")
    path.write_bytes(file.getvalue().encode())
    expected = {i: triple for i, triple in enumerate(triples, start=1) if triple[1] != triple[2]}
    found = load(path)
    assert {row: tuple(pair.values()) for row, pair in zip(found.rows, found.pairs, strict=True)} == expected


@given(
    st.binary(max_size=300), st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".parquet", ".csv.gz", ".json.zst"])
)
def test_any_bytes_are_read_or_refused(tmp_path_factory, content, suffix):
    path = tmp_path_factory.mktemp("fuzz") / f"pairs{suffix}"
    path.write_bytes(content)
    assert load(path).pairs == []


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_parquet_file_is_read_or_refused(tmp_path_factory, parquet_bytes, data):
    whole, expected = parquet_bytes
    cut = data.draw(st.integers(0, len(whole)))
    damaged = bytearray(whole[:cut] if data.draw(st.booleans()) else whole)
    for place in data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=2)):
        if place < len(damaged):
            damaged[place] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.mktemp("fuzz") / "pairs.parquet"
    path.write_bytes(damaged)
    found = load(path)
    if bytes(damaged) == whole:
        assert found.pairs == expected
    elif len(damaged) < len(whole):
        assert found.pairs == []


def test_a_damaged_name_of_a_column(tmp_path, parquet_bytes):
    """Which pyarrow finds out late, and not by an error of its own."""
    whole, _ = parquet_bytes
    path = tmp_path / "pairs.parquet"
    path.write_bytes(whole.replace(b"prompt", b"pr\xffmpt"))
    found = load(path)
    assert found.pairs == []


@pytest.fixture(scope="module")
def parquet_bytes() -> tuple[bytes, list]:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    expected = [chat([user(f"question {i}")], f"good {i}", f"bad {i}") for i in range(20)]
    buffer = io.BytesIO()
    parquet.write_table(arrow.Table.from_pylist(expected), buffer, row_group_size=5)
    return buffer.getvalue(), expected


def test_a_broken_row_group_costs_itself_alone(tmp_path, parquet_bytes):
    from pyarrow import parquet

    whole, expected = parquet_bytes
    group = parquet.ParquetFile(io.BytesIO(whole)).metadata.row_group(1)
    place = group.column(0).data_page_offset
    path = tmp_path / "pairs.parquet"
    path.write_bytes(whole[:place] + b"\xff" * 20 + whole[place + 20 :])
    found = load_preferences(str(path))
    assert found.pairs == expected[:5] + expected[10:]
    assert [problem.row for problem in found.problems] == [6, 7, 8, 9, 10]


# --- formats -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_are_recognised_in_every_format(name, tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    written = [LAYOUTS[name](f"Question {i}?", f"Right {i}.", f"Wrong {i}.") for i in range(3)]
    rows, expected = [row for row, _ in written], [pair for _, pair in written]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "c.json").write_text("\ufeff" + "\n".join(map(json.dumps, rows)), encoding="utf-8")
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    with (tmp_path / "e.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        cells = [{k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows]
        writer.writerows(cells)
    for path in sorted(tmp_path.iterdir()):
        found = load_preferences(str(path))
        assert found.pairs == expected, path.name
        assert found.layouts == [FOUND.get(name, name)] * 3
        assert found.problems == []


def test_a_data_set(tmp_path, monkeypatch):
    """A folder, as `datasets` reads it; the hub is the same call."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    expected = [chat([user(f"question {i}")], f"good {i}", f"bad {i}") for i in range(4)]
    folder = tmp_path / "data"
    folder.mkdir()
    datasets.Dataset.from_list(expected).to_parquet(folder / "train.parquet")
    datasets.Dataset.from_list(expected[:1]).to_parquet(folder / "test.parquet")
    assert load_preferences(str(folder)).pairs == expected
    assert load_preferences(str(folder), split="test").pairs == expected[:1]
    with pytest.raises(UserError, match="whose split 'dev' can be loaded"):
        load_preferences(str(folder), split="dev")


def test_a_cell_of_csv_that_only_looks_like_a_chat(tmp_path):
    answers = ['[{"name": "x"}]', '{"role": "x"}', "[]", "[{", '["role", "content"]']
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["prompt", "chosen", "rejected"], *(["JSON, please", a, "no"] for a in answers)])
    assert [pair["chosen"] for pair in load_preferences(str(tmp_path / "a.csv")).pairs] == answers


def test_a_megabyte_in_a_cell(tmp_path):
    long = "so it is " * 300_000
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "p", "chosen": long, "rejected": "r"}))
    with (tmp_path / "b.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["prompt", "chosen", "rejected"], ["p", long, "r"]])
    for name in ("a.jsonl", "b.csv"):
        assert load_preferences(str(tmp_path / name)).pairs[0]["chosen"] == long


# --- choices, and errors -------------------------------------------------------------------------------------------


def write(tmp_path: Path, *rows: Any) -> str:
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_the_layout_can_be_told(tmp_path):
    path = write(tmp_path, {"prompt": "Q", "chosen": "A", "rejected": "B"}, chat([user("Q")], "A", "B"))
    assert load_preferences(path).layouts == ["text", "chat"]
    assert load_preferences(path, layout="chat").pairs == [chat([user("Q")], "A", "B")] * 2
    forced = load_preferences(path, layout="text")
    assert [str(problem) for problem in forced.problems] == ["row 2: its prompt is a list, not a string"]


def test_columns_can_be_told(tmp_path):
    path = write(tmp_path, {"ask": "Q", "good": "A", "bad": "B"})
    with pytest.raises(UserError, match=r"Of row 1: it has no chosen or chosen_response. Other columns"):
        load_preferences(path)
    columns = {"prompt": "ask", "chosen": "good", "rejected": "bad"}
    assert load_preferences(path, columns=columns).pairs == [{"prompt": "Q", "chosen": "A", "rejected": "B"}]
    with pytest.raises(UserError, match="no field 'answer'"):
        load_preferences(path, columns={"answer": "good"})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "Q", "chosen": "A"}, "it has no rejected or rejected_response"),
        ({"chosen": "A", "rejected": "B"}, "it has no prompt"),
        ({"prompt": 3, "chosen": "A", "rejected": "B"}, "its prompt is a int"),
        ({"prompt": "Q", "chosen": "A", "rejected": 7}, "its rejected is a int"),
        ({"prompt": "Q", "chosen": " ", "rejected": "B"}, "its chosen answer is empty"),
        ({"prompt": "Q", "chosen": "A", "rejected": "A"}, "are the same"),
        ({"prompt": [assistant("Q")], "chosen": "A", "rejected": "B"}, "is by 'assistant', not by 'user'"),
        ({"prompt": [{"role": "user"}], "chosen": "A", "rejected": "B"}, "without a role and a content"),
        ({"prompt": [], "chosen": "A", "rejected": "B"}, "its prompt has no message"),
        ({"prompt": [user("Q")], "chosen": [user("A")], "rejected": "B"}, "a message by 'user' behind the prompt"),
        ({"chosen": [user("A"), assistant("B")], "rejected": [user("C"), assistant("D")]}, "the same question"),
        ({"chosen": "Human: A", "rejected": "\n\nHuman: B\n\nAssistant: C"}, "the same question"),
        ({"chosen": hh("A", "B"), "rejected": "so\n\nHuman: A\n\nAssistant: C"}, "does not begin with a turn"),
        ("Q", "it is a string, not an object"),
    ],
)
def test_the_reason_is_named(row, reason, tmp_path):
    good = {"prompt": "Q", "chosen": "A", "rejected": "B"}
    found = load_preferences(write(tmp_path, good, row))
    assert [problem.row for problem in found.problems] == [2]
    assert reason in found.problems[0].reason
    assert f"1 row cannot be used: row 2: {found.problems[0].reason}." in found.describe()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "is empty"),
        ("a.jsonl", "\n\n", "It has no rows"),
        ("a.txt", "x", r"ends in '.txt', but the formats are .jsonl"),
        ("a.json", "[{", "it is not JSON"),
        ("a.parquet", "PAR1", "not a whole Parquet file"),
        ("a.csv", "prompt,chosen,rejected\n", "It has no rows"),
        ("a.csv", "prompt,chosen,rejected\na,b,c,d\n", "1 fields more than the header"),
    ],
)
def test_files_that_are_no_use(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        load_preferences(str(tmp_path / name))


def test_an_absent_file():
    with pytest.raises(UserError, match=r"There is no file nowhere/pairs.jsonl"):
        load_preferences("nowhere/pairs.jsonl")
