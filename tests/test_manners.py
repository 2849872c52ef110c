"""No traceback for anything that a user can cause, JSON for machines, and a way to go on."""

from __future__ import annotations

import errno
import io
import json
import os
import shlex
import signal
import string
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("typer")
pytest.importorskip("matplotlib")

from orpo_kernels.app.cli import endings, main
from orpo_kernels.app.cli.console import Console, table
from orpo_kernels.app.errors import UserError
from orpo_kernels.app.finetuning import children, compare, evaluate, sweep
from orpo_kernels.app.finetuning.records import to_json
from orpo_kernels.app.finetuning.settings import CompareSettings, SweepSettings, TrainSettings, resuming_command
from orpo_kernels.app.finetuning.train import train

from .commands import pair, run, write_rows

COMMANDS = ("train", "evaluate", "sweep", "compare")
FAST = ("--batch-size", "2", "--max-steps", "2", "--eval-split", "4", "--max-length", "64")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_rows(tmp_path_factory.mktemp("data") / "pairs.jsonl", [pair(number) for number in range(12)])


# --- flags ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train", "Missing argument 'MODEL'"),
        ("train m d --batch-size two", "'--batch-size'"),
        ("train m d --no-such-flag", "No such option: --no-such-flag"),
        ("train m d --packing tight", "'--packing'"),
        ("train m d --config nowhere.yaml", "nowhere.yaml cannot be read"),
        ("no-such-command", "No such command 'no-such-command'"),
        ("train ./nowhere DATA", "There is no folder ./nowhere"),
        ("train MODEL nowhere.jsonl", "There is no file nowhere.jsonl"),
        ("train FOLDER DATA", "holds no model: there is no config.json"),
        ("train MODEL DATA --columns prompt", "write it like prompt=question"),
        ("train MODEL DATA --columns prompt=question", "it has no question"),
        ("train MODEL DATA --layout transcript", "no usable pair"),
        ("train MODEL DATA --eval-split test", "has no splits"),
        ("evaluate MODEL DATA --eval-split test", "give the share or number"),
        ("train m d --batch-size 0", "--batch-size is 0, but has to be at least 1"),
        ("train m d --beta -1", "--beta is -1.0, but has to be at least 0"),
        ("train m d --lr 0", "--lr is 0.0, but has to be above 0"),
        ("train m d --sparse-eps 2", "between 0 and 1"),
        ("train m d --max-length 1", "--max-length is 1"),
        ("sweep m d --betas a,b", "--betas is 'a,b'; write numbers"),
        (
            "train m d --eval-split 1.5",
            "--eval-split is 1.5, but has to be a share, at least 0 and below 1, or a whole",
        ),
        ("train m d --eval-split -1", "--eval-split is -1"),
        ("train m d --eval-split nan", "--eval-split is nan"),
        ("evaluate m d --eval-split -1", "--eval-split is -1"),
        ("evaluate m d --eval-split inf", "--eval-split is inf"),
        ("evaluate m d --eval-split 0", "--eval-split 0 holds out no pair"),
        ("evaluate m d --against m", "the very model"),
        ("train m d --seed 4294967296", "--seed is 4294967296, but has to be from 0 to 4294967295"),
        ("train m d --max-steps 2147483648", "has to be at most 2147483647"),
        ("train m d --lr inf", "--lr is inf, but has to be above 0 and finite"),
        ("train m d --beta inf", "--beta is inf"),
        ("train m d --method simpo --gamma nan", "--gamma is nan"),
        ("plan 4096x1000 --batch 0", "--batch is 0, but has to be at least 1"),
        ("plan 4096x1000 --share nan", "--share is nan"),
        ("plan 4096x1000 --gpu " + 400 * "9" + "GB", "--gpu"),
        # What has no effect, even if it says what is the default.
        ("train m d --lora-rank 16", "--lora-rank is for adapters; give --lora"),
        ("train m d --merge", "--merge is for adapters; give --lora"),
        ("train m d --gamma 1", "--gamma is SimPO's"),
        ("train m d --method sft --beta 0.1", "--beta is the strength of a preference"),
        ("train m d --method dpo --prompt-nll", "--prompt-nll is for losses with an NLL"),
        ("train m d --eval-split 0 --eval-every 5", "--eval-every is for held-out pairs"),
        ("train m d --epochs 1 --max-steps 5", "--epochs and --max-steps both"),
        ("train m DATA --split train", "--split is for data sets"),
        ("evaluate m DATA --split train", "--split is for data sets"),
        ("sweep m d --lr 1e-5 --lrs 1e-5,1e-4", "--lr and --lrs both"),
        ("sweep m d --method sft", "has no lambda"),
        ("sweep m d --eval-split 0", "--eval-split holds out none"),
        ("compare m d --eval-split 0.0", "--eval-split holds out none"),
    ],
)
def test_what_cannot_be_begun_is_a_sentence(arguments, message, model, data, tmp_path, monkeypatch):
    names = {"MODEL": model, "DATA": data, "FOLDER": str(Path(data).parent)}
    monkeypatch.chdir(tmp_path)
    said = run(*(names.get(word, word) for word in arguments.split()), status=2)["error"]
    assert message.lower() in said.lower()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", ["12", "999", "1e300"])
@pytest.mark.parametrize("command", COMMANDS)
def test_more_than_there_are_cannot_be_held_out(command, number, model, data, tmp_path):
    said = run(command, model, data, "--eval-split", number, "--output", tmp_path / "o", status=2)
    assert "cannot be held out of 12 pairs" in said["error"]
    assert "number up to 11" in said["error"]


def test_pairs_that_teach_nothing_are_no_training(model, tmp_path):
    path = write_rows(tmp_path / "pairs.jsonl", [{**pair(number), "weight": 0} for number in range(8)])
    said = run("train", model, path, *FAST, "--output", tmp_path / "run", status=2)
    assert said["error"] == f"All 4 pairs of {path} to train on have the weight 0: nothing is learnt."
    said = run("train", model, path, *FAST, "--max-length", 8, "--too-long", "leave-out", status=2)
    assert "Of row 1: it has" in said["error"]
    assert said["error"].endswith("tokens, more than max_length=8.")


def test_settings_from_a_file_need_no_company_at_their_defaults(model, data, tmp_path):
    (tmp_path / "c.yaml").write_text("lora_rank: 16\nmax_steps: 1\nepochs: 1\nsplit: train\neval_split: 4\n")
    run("train", model, data, "--config", tmp_path / "c.yaml", "--output", tmp_path / "run")
    (tmp_path / "c.yaml").write_text("lora_rank: 8\n")
    said = run("train", model, data, "--config", tmp_path / "c.yaml", "--output", tmp_path / "run", status=2)
    assert "--lora-rank is for adapters" in said["error"]


def test_the_machine_can_be_named_in_a_file(capsys, tmp_path):
    (tmp_path / "c.yaml").write_text("json: true\nbatch_size: two\n")
    assert main(["train", "m", "d", "--config", str(tmp_path / "c.yaml")]) == 2
    assert "--batch-size" in json.loads(capsys.readouterr().out)["error"]


WORDS = st.text(string.printable.replace("\n", "") + "äβ中🐱", min_size=1, max_size=8)
BROKEN = st.floats().filter(lambda number: not number.is_integer())
COUNTS = st.one_of(st.integers(-(10**20), -1), st.integers(2**32, 10**20), BROKEN, st.sampled_from(["", "x", "1.5"]))
SIZES = st.one_of(st.floats(max_value=-1e-9), st.sampled_from(["nan", "inf", "-inf", "", "x", "1,5", "1e999"]))
COUNT_FLAGS = "--batch-size --grad-accum --max-steps --epochs --eval-every --save-every --max-length --lora-rank --seed"
SIZE_FLAGS = "--beta --lr --gamma --sparse-eps"
CHOICES = {"--method", "--packing", "--dtype", "--layout", "--too-long"}
KNOWN = {"orpo", "sft", "dpo", "simpo", "cpo", "auto", "shared", "padded", "text", "chat", "cut", "fp32", "bf16"}
NONSENSE = st.one_of(
    st.tuples(st.sampled_from(COUNT_FLAGS.split()), COUNTS),
    st.tuples(st.sampled_from(SIZE_FLAGS.split()), SIZES),
    st.tuples(st.sampled_from(sorted(CHOICES)), WORDS.filter(lambda word: word not in KNOWN)),
    st.tuples(st.just("--eval-split"), st.one_of(st.floats(max_value=-1e-9), st.floats(1.001, 1.999))),
)


@given(st.sampled_from(["train", "sweep", "compare"]), NONSENSE)
def test_nonsense_is_refused_by_the_name_of_its_flag(command, nonsense):
    """Whatever it is, before a model or data are looked for."""
    flag, value = nonsense
    given = f"{flag}={value}"  # else a value that begins with a dash is a flag
    command = "train" if flag in ("--beta", "--gamma", "--method") else command
    said = run(command, "./nowhere", "nowhere.jsonl", given, status=2)
    assert flag in said["error"]


@given(
    st.sampled_from([*COMMANDS, "plan", "doctor"]),
    st.lists(st.one_of(WORDS, st.sampled_from([*COUNT_FLAGS.split(), *SIZE_FLAGS.split(), *CHOICES])), max_size=5),
)
def test_whatever_is_typed_ends_in_a_sentence(command, words):
    asks_for_help = {"--help", "-h"} & set(words) or (command == "doctor" and not words)
    if not asks_for_help:
        run(command, "./nowhere", *words, status=2)


PLAIN = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), WORDS, st.dates())
VALUES = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=2))
FIELDS = st.sampled_from(
    ["batch_size", "beta", "lora", "columns", "method", "eval_split", "seed", "resume", "prompt_nll"]
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(st.dictionaries(FIELDS, VALUES, max_size=4).map(lambda v: json.dumps(v, default=str)), st.text()))
def test_whatever_is_in_a_configuration_file_ends_in_a_sentence(tmp_path, content):
    (tmp_path / "c.yaml").write_text(content, encoding="utf-8", errors="replace")
    run("train", "./nowhere", "nowhere.jsonl", "--config", tmp_path / "c.yaml", status=2)


# --- the machine ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("where", ["file", "file/inside", "full/of", "/dev/null/inside", "long" + 300 * "x"])
def test_outputs_that_cannot_be(where, command, model, data, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full" / "of").mkdir(parents=True)
    (tmp_path / "full" / "of" / "evaluation.json").write_text("mine")
    monkeypatch.chdir(tmp_path)
    fast = FAST if command != "evaluate" else FAST[:2]
    said = run(command, model, data, *fast, "--output", where, status=2)
    assert where[:8] in said["error"]
    assert (tmp_path / "file").read_text() == "mine"
    assert [path.name for path in (tmp_path / "full" / "of").iterdir()] == ["evaluation.json"]
    assert (tmp_path / "full" / "of" / "evaluation.json").read_text() == "mine"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "secret.jsonl"), "secret.jsonl cannot be used (Permission"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a/b"), "part of it is a file"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "a"), "it is a folder, not a file"),
        (OSError(errno.ENOSPC, "No space left on device"), "o cannot be used (No space left on device): make room"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "make room"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "smaller --batch-size"),
        (MemoryError(), "smaller --batch-size"),
    ],
)
def test_what_the_machine_refuses_is_a_sentence(error, message, tmp_path, monkeypatch):
    def refuse(*_: Any) -> None:
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "evaluate", refuse)
    assert message in run("evaluate", "m", "d", "--output", "o", status=2)["error"]
    assert not list(tmp_path.iterdir())  # no report


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_data_that_may_not_be_read(model, tmp_path):
    path = write_rows(tmp_path / "pairs.jsonl", [pair(0)])
    os.chmod(path, 0)
    assert "Permission denied" in run("evaluate", model, path, "--output", tmp_path / "e", status=2)["error"]


@pytest.mark.parametrize("folder", [None, "empty", "begun"])
def test_the_unforeseen_is_a_sentence_and_a_report(folder, tmp_path, monkeypatch):
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "evaluate", fail)
    if folder:
        (tmp_path / folder).mkdir()
        if folder == "begun":
            (tmp_path / folder / "evaluation.json").write_text("{}")
    said = run("evaluate", "m", "d", "--output", folder or "nowhere", status=70)["error"]
    assert "ZeroDivisionError: division" in said
    (report,) = (tmp_path / (folder if folder == "begun" else ".")).glob("orpo-kernels-report-*.txt")
    assert report.name in said
    text = report.read_text()
    for part in ("Traceback", "in fail", "ZeroDivisionError", "torch 2", "command line"):
        assert part in text
    assert not folder or folder == "begun" or not list((tmp_path / folder).iterdir())  # free for the next try


def test_the_unforeseen_without_a_place_for_its_report(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "evaluate", lambda *_: 1 / 0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "open", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "no")))
    assert "no report of it could be written" in run("evaluate", "m", "d", "--output", "o", status=70)["error"]


@pytest.mark.parametrize("rank", [0, 1])
def test_one_of_several_processes_leaves_at_once_and_the_first_one_speaks(rank, monkeypatch):
    """An interpreter's end waits for process groups, and these for the other processes."""
    done: list[Any] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr(os, "_exit", lambda status: done.append(status))
    monkeypatch.setattr(time, "sleep", lambda seconds: done.append("waits"))
    endings.leave(0)
    assert done == []
    endings.leave(2)
    assert done == (["waits", 2] if rank else [2])


# --- what is printed -----------------------------------------------------------------------------------------------

NAME = "modèle [/b] 中 :cat: $x^"


def ascii_stream() -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")


def test_names_that_the_encoding_lacks_stand_escaped_in_tables():
    stream = ascii_stream()
    shown = table(NAME, "", NAME)
    shown.add_row("a", NAME)
    Console(file=stream, width=120).print(shown)
    lines = stream.buffer.getvalue().decode("ascii").splitlines()  # type: ignore[attr-defined]
    assert sum(NAME.encode("ascii", "backslashreplace").decode() in line for line in lines) == 3
    assert len({len(line) for line in lines[1:]}) == 1


@pytest.mark.parametrize("machine", [[], ["--json"]])
def test_commands_where_stdout_is_ascii(machine, model, data, tmp_path, monkeypatch):
    streams = {name: ascii_stream() for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    folder = tmp_path / NAME.replace("/", "")
    folder.symlink_to(model)
    output = tmp_path / "évaluation 中"
    monkeypatch.setenv("COLUMNS", "400")
    assert main(["evaluate", str(folder), data, "--output", str(output), "--batch-size", "4", *machine]) == 0
    out = streams["stdout"].buffer.getvalue().decode("ascii")  # type: ignore[attr-defined]
    if machine:
        assert json.loads(out)["models"].keys() == {str(folder)}
        assert json.loads(out)["files"][0].startswith(str(output))
    else:
        assert r"mod\xe8le" in out
        assert r"\xe9valuation \u4e2d/evaluation.json" in out
    assert json.loads((output / "evaluation.json").read_text(encoding="utf-8"))["models"].keys() == {str(folder)}


def test_a_name_that_is_no_unicode(model, data, tmp_path):
    """A file's name is bytes; what is no UTF-8 among them Python keeps as lone surrogates."""
    record = run("evaluate", model, data, "--output", tmp_path / os.fsdecode(b"e\xff"), "--batch-size", 4)
    assert all(Path(path).is_file() for path in record["files"])


@pytest.mark.parametrize("machine", [[], ["--json"]])
def test_who_reads_no_more_is_told_no_more(machine, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(["plan", "4096x1000", *machine]) == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("machine", [[], ["--json"]])
def test_an_outcome_that_cannot_be_written_is_an_error(machine, monkeypatch, capsys):
    with open("/dev/full", "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(["plan", "4096x1000", *machine]) == 2
    assert "No space left on device" in capsys.readouterr().err


def test_an_error_that_cannot_be_written_is_said_to_people():
    """In a process of its own, whose stdout is the file descriptor."""
    typed = [sys.executable, "-m", "orpo_kernels", "plan", "4096x1000", "--batch", "0", "--json"]
    with open("/dev/full", "w", encoding="utf-8") as full:
        ended = subprocess.run(typed, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith("Error: ")
    assert "Traceback" not in ended.stderr


def test_json_has_no_numbers_that_json_has_not():
    record = {"a": float("nan"), "b": [float("inf"), {"c": -float("inf")}], "d": 1.5, "e": Path("x")}
    assert json.loads(to_json(record)) == {"a": None, "b": [None, {"c": None}], "d": 1.5, "e": "x"}


# --- interrupted ---------------------------------------------------------------------------------------------------


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("machine", [False, True])
@pytest.mark.parametrize("command", ["sweep", "compare"])
def test_ctrl_c_says_how_to_go_on(command, machine, model, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "train", interrupt)
    monkeypatch.setattr(compare, "_train", interrupt)
    output = tmp_path / "a folder"
    typed = [command, model, data, *FAST, "--output", str(output)]
    assert main([*typed, *(["--json"] if machine else [])]) == 130
    out = capsys.readouterr().out
    told = json.loads(out)["error"] if machine else " ".join(out.split())
    words = shlex.split(told.partition("To go on: ")[2])
    assert words[:4] == ["orpo-kernels", command, model, data]
    assert "--resume" in words
    for flag in ("--batch-size 2", "--max-steps 2", "--eval-split 4", "--max-length 64"):
        assert flag in " ".join(words)
    assert words[words.index("--output") + 1] == str(output)
    assert main([*words[1:], "--json"]) == 130  # it can be typed


def test_the_words_to_go_on_say_all_that_was_set():
    sweep = SweepSettings("m", "d", lora=True, prompt_nll=False, betas="0,1", lrs="1e-4", eval_split="6")
    said = shlex.join(resuming_command("sweep", sweep))
    expected = "orpo-kernels sweep m d --prompt-nll --eval-split 6 --lora --resume --betas 0,1 --lrs 1e-4"
    assert sorted(said.split()) == sorted(
        [*expected.replace("--prompt", "--no-prompt").split(), "--output", "runs/sweep"]
    )
    compare = resuming_command("compare", CompareSettings("m", "d", methods="sft,dpo"))
    assert {"compare", "--methods", "sft,dpo", "--resume"} <= set(compare)


def test_an_interrupt_ends_the_run_in_its_own_process_too(tmp_path):
    """It is passed on where it came to this process alone, and the child can say its own."""
    heed = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background has none
    child = f"""
import pathlib, signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)
folder = pathlib.Path({str(tmp_path)!r})
try:
    (folder / "ready").touch()
    time.sleep(600)
except KeyboardInterrupt:
    (folder / "interrupted").touch()
"""

    def send_when_ready() -> None:
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    sender = threading.Thread(target=send_when_ready)
    sender.start()
    with pytest.raises(KeyboardInterrupt):
        children.run_child([sys.executable, "-c", child])
    sender.join()
    signal.signal(signal.SIGINT, heed)
    assert (tmp_path / "interrupted").exists()


def test_a_comparison_that_is_terminated_leaves_no_orphan(tmp_path):
    script = f"""
import sys
from orpo_kernels.app.finetuning import children
child = "import os, pathlib, time; pathlib.Path(sys.argv[1]).write_text(str(os.getpid())); time.sleep(600)"
children.run_child([sys.executable, "-c", "import sys; " + child, {str(tmp_path / "pid")!r}])
"""
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=Path(__file__).parents[1])
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()):
        assert parent.poll() is None
        time.sleep(0.05)
    parent.terminate()
    assert parent.wait() == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_comparison_that_is_killed_leaves_no_orphan(tmp_path):
    """SIGKILL lets it say nothing; its run hears of it by the end of its stdin."""
    pid, ended = tmp_path / "pid", tmp_path / "ended"
    child = f"""
import os, pathlib, signal, time
from orpo_kernels.app.cli.dependent import end_with_stdin
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background has none
end_with_stdin()
pathlib.Path({str(pid)!r}).write_text(str(os.getpid()))
how = "by itself"
try:
    time.sleep(20)
except KeyboardInterrupt:
    how = "interrupted"
pathlib.Path({str(ended)!r}).write_text(how)
"""
    script = f"""
import sys
from orpo_kernels.app.finetuning import children
children.run_child([sys.executable, "-c", {child!r}])
"""
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=Path(__file__).parents[1])
    while not (pid.exists() and pid.read_text()):
        assert parent.poll() is None
        time.sleep(0.05)
    assert not ended.exists()
    parent.kill()
    parent.wait()
    with suppress(ProcessLookupError):
        while not (ended.exists() and ended.read_text()):
            os.kill(int(pid.read_text()), 0)
            time.sleep(0.05)
    assert ended.read_text() == "interrupted"


# --- runs that fail ------------------------------------------------------------------------------------------------


def test_a_sweep_names_the_run_that_diverges_and_goes_on(model, data, tmp_path, capsys):
    arguments = ("sweep", model, data, *FAST, "--betas", "0,1", "--lrs", "1e30,1e-4", "--output", tmp_path / "s")
    record = run(*arguments)
    assert [(point["beta"], point["lr"]) for point in record["points"]] == [(0, 1e-4), (1, 1e-4)]
    assert [(failed["beta"], failed["lr"]) for failed in record["failed"]] == [(0, 1e30), (1, 1e30)]
    assert record["winner"] in record["points"]
    for failed in record["failed"]:
        assert "give a smaller --lr" in failed["reason"]
        assert Path(failed["output"]).name == f"beta-{failed['beta']:g}_lr-1e+30"
    assert json.loads((tmp_path / "s" / "sweep.json").read_text())["failed"] == record["failed"]
    assert main([*map(str, arguments), "--resume"]) == 0  # and in the table
    shown = capsys.readouterr().out
    assert shown.count("failed") >= 2
    assert "give a smaller --lr" in " ".join(shown.split())
    said = run("sweep", model, data, *FAST, "--betas", "0", "--lrs", "1e30", "--output", tmp_path / "t", status=2)
    assert "No run came to its end" in said["error"]


def test_what_no_run_can_do_ends_a_sweep_at_once(data, tmp_path):
    said = run("sweep", "./nowhere", data, *FAST, "--output", tmp_path / "s", status=2)
    assert said["error"] == "There is no folder ./nowhere."
    assert not (tmp_path / "s").exists()


def test_a_sweep_goes_on_behind_what_nobody_has_foreseen(model, data, tmp_path, monkeypatch):
    def fail_once(settings: TrainSettings, *args: Any, **options: Any) -> dict[str, Any]:
        summary = train(settings, *args, **options)
        if settings.beta == 0:
            raise ZeroDivisionError("some\ncause")
        return summary

    monkeypatch.setattr(sweep, "train", fail_once)
    record = run("sweep", model, data, *FAST, "--betas", "0,1", "--output", tmp_path / "s")
    assert [point["beta"] for point in record["points"]] == [1]
    (failed,) = record["failed"]
    assert failed["reason"].startswith("ZeroDivisionError: some cause (what led to it is in ")
    assert list(Path(failed["output"]).glob("orpo-kernels-report-*"))


def test_a_comparison_names_the_method_that_fails_and_goes_on(model, data, tmp_path, monkeypatch, capsys):
    def here(settings: TrainSettings) -> dict[str, Any]:
        from rich.console import Console

        summary = train(settings, Console(stderr=True))
        if settings.method == "dpo":
            raise UserError("It has failed.")
        return summary

    monkeypatch.setattr(compare, "_train", here)
    arguments = ("compare", model, data, *FAST, "--methods", "dpo,orpo", "--output", tmp_path / "c")
    record = run(*arguments)
    assert [outcome["method"] for outcome in record["outcomes"]] == ["before", "orpo"]
    assert record["failed"] == [{"method": "dpo", "reason": "It has failed.", "output": str(tmp_path / "c" / "dpo")}]
    assert main([*map(str, arguments), "--resume"]) == 0
    assert "It has failed." in capsys.readouterr().out
    said = run("compare", model, data, *FAST, "--methods", "dpo", "--output", tmp_path / "d", status=2)
    assert said["error"] == "No run came to its end. It has failed."


# --- whose files they are ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "names"),
    [
        ("evaluate", ["evaluation.json", "pairs.jsonl", "margins.png"]),
        ("sweep", ["sweep.json", "sweep.png", "beta-0_lr-0.0001/metrics.jsonl"]),
        ("compare", ["compare.json", "compare.png", "orpo/notes.txt"]),
    ],
)
def test_files_of_others_are_left_alone(command, names, model, data, tmp_path):
    for number, name in enumerate(names):
        folder = tmp_path / str(number)
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("precious")
        flags = {"sweep": (*FAST, "--betas", 0, "--lr", 1e-4), "compare": (*FAST, "--methods", "orpo")}.get(command, ())
        said = run(command, model, data, *flags, "--output", folder, status=2)
        assert f"{folder}" in said["error"]
        assert [path for path in folder.rglob("*") if path.is_file()] == [folder / name]
        assert (folder / name).read_text() == "precious"


def test_an_evaluation_can_be_repeated(model, data, tmp_path):
    first, second = (run("evaluate", model, data, "--output", tmp_path / "e", "--batch-size", 4) for _ in range(2))
    assert first == second
