"""`orpo-kernels` under torchrun: two processes on the CPU, which meet by gloo."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("typer")
pytest.importorskip("matplotlib")
pytest.importorskip("psutil")

import psutil
from accelerate.state import AcceleratorState, GradientState

from orpo_kernels.app.cli import main
from orpo_kernels.app.finetuning.folder import COMPLETE

from . import commands
from .commands import assert_same_run, records, write_chats
from .runs import forked

ALONE = (sys.executable, "-m", "orpo_kernels")
TWO = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "orpo_kernels")
FAST = ("--lr", "1e-3", "--eval-split", "4", "--max-length", "64")
PATIENCE = 120  # seconds until a process that waits for another for ever is given up


@pytest.fixture(scope="module")
def inputs(model, tmp_path_factory) -> tuple[str, str]:
    """A model without dropout, whose random numbers are each process's own, and twenty pairs."""
    return model, write_chats(tmp_path_factory.mktemp("inputs") / "pairs.jsonl", 20)


def start(launcher: tuple[str, ...], *arguments: Any, **variables: str) -> subprocess.Popen:
    command = [*launcher, *map(str, arguments), "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    root, pipe = Path(__file__).parents[1], subprocess.PIPE
    return subprocess.Popen(command, cwd=root, env=environment, stdout=pipe, stderr=pipe, text=True)


def kill(launcher: subprocess.Popen) -> None:
    """The launcher and, which outlive it, those that it has launched."""
    for process in (*psutil.Process(launcher.pid).children(recursive=True), launcher):
        process.kill()
    launcher.communicate()


def run(launcher: tuple[str, ...], *arguments: Any, fails: bool = False) -> dict[str, Any]:
    """The one JSON object on stdout, whatever number of processes there is."""
    process = start(launcher, *arguments)
    try:
        out, err = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        kill(process)
        raise
    assert (process.returncode != 0) == fails, err
    return json.loads(out)


def meeting() -> dict[str, str]:
    """Where two processes meet, each told by torchrun's variables."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def forked_as(rank: int, variables: dict[str, str], *arguments: Any, output: str | Path = os.devnull) -> int:
    """A process of two in a copy of this one, which forgets that it was alone."""

    def run() -> int:
        os.environ.update(variables, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        return main([*map(str, arguments)])

    return forked(run, output)


def test_two_processes_are_one_with_batches_twice_as_large(inputs, tmp_path):
    """Eight steps, each with the same loss and metrics and the same norm of the gradient."""
    eight = (*FAST, "--epochs", 2)
    alone = commands.run("train", *inputs, *eight, "--batch-size", 4, "--output", tmp_path / "alone")
    arguments = ("train", *inputs, *eight, "--batch-size", 2, "--output", tmp_path / "two")
    variables = meeting()
    processes = [forked_as(rank, variables, *arguments) for rank in range(2)]
    assert [os.waitpid(process, 0)[1] for process in processes] == [0, 0]
    two = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert (alone["processes"], two["processes"]) == (1, 2)
    assert alone["steps"] == two["steps"] == 8
    for name in ("accuracy", "log_odds"):
        assert two["after"][name] == pytest.approx(alone["after"][name], rel=1e-4)
    for ours, theirs in zip(records(tmp_path / "two"), records(tmp_path / "alone"), strict=True):
        for name in ("loss", "nll_loss", "or_loss", "log_odds", "accuracy", "grad_norm", "lr"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), (ours["step"], name)


@pytest.mark.slow
def test_two_killed_processes_go_on(inputs, tmp_path):
    arguments = ("train", *inputs, *FAST, "--epochs", 4, "--batch-size", 2, "--save-every", 1)
    run(TWO, *arguments, "--output", tmp_path / "whole")
    folder = tmp_path / "killed"
    process = start(TWO, *arguments, "--output", folder)
    while process.poll() is None and len(list(folder.glob(f"checkpoints/*/{COMPLETE}"))) < 2:
        time.sleep(0.01)
    assert process.poll() is None, "it was finished before it could be killed"
    kill(process)
    said = run(ALONE, *arguments, "--output", folder, "--resume", fails=True)
    assert "was started with 2 processes and would go on with 1" in said["error"]
    run(TWO, *arguments, "--output", folder, "--resume")
    assert_same_run(folder, tmp_path / "whole")


def start_nodes(folders: tuple[Path, Path], *arguments: Any) -> list[subprocess.Popen]:
    """A process on each of two nodes, which share nothing: each has an output folder of its own."""
    variables = {**meeting(), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    return [
        start(ALONE, *arguments, "--output", folder, RANK=str(rank), **variables) for rank, folder in enumerate(folders)
    ]


@pytest.mark.slow
def test_two_nodes_without_a_shared_file_system(inputs, tmp_path):
    """Stopped when only one had its third checkpoint complete, both go on from the second."""
    arguments = ("train", *inputs, *FAST, "--epochs", 2, "--batch-size", 2, "--save-every", 2)
    run(TWO, *arguments, "--output", tmp_path / "whole")
    folders = (tmp_path / "node0" / "run", tmp_path / "node1" / "run")
    nodes = start_nodes(folders, *arguments)
    while None in (codes := [node.poll() for node in nodes]) and not all(
        (folder / "checkpoints" / "checkpoint-4" / COMPLETE).exists() for folder in folders
    ):
        time.sleep(0.01)
    assert codes == [None, None], "they were finished before they could be killed"
    for node in nodes:
        kill(node)
    later = [folder / "checkpoints" / "checkpoint-6" for folder in folders]
    shutil.rmtree(later[1], ignore_errors=True)
    if not (later[0] / COMPLETE).exists():
        shutil.copytree(later[0].with_name("checkpoint-4"), later[0], dirs_exist_ok=True)
    nodes = start_nodes(folders, *arguments, "--resume")
    said = [node.communicate(timeout=PATIENCE)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    for folder in folders:
        assert_same_run(folder, tmp_path / "whole")
        assert [path.name for path in folder.parent.iterdir()] == ["run"]


@pytest.mark.slow
def test_a_sweep_by_two_processes(inputs, tmp_path):
    arguments = ("sweep", *inputs, *FAST, "--max-steps", 2, "--betas", "0,1", "--output")
    alone = run(ALONE, *arguments, tmp_path / "alone", "--batch-size", 4)
    two = run(TWO, *arguments, tmp_path / "two", "--batch-size", 2)
    for ours, theirs in zip(two["points"], alone["points"], strict=True):
        assert ours["nll"] == pytest.approx(theirs["nll"], rel=1e-5)
    assert json.loads((tmp_path / "two" / "sweep.json").read_text())["points"] == two["points"]


@pytest.mark.parametrize("command", ["evaluate", "compare"])
def test_what_runs_in_one_process_says_so(command, inputs, tmp_path):
    output = tmp_path / "output"
    process = forked_as(0, {}, command, *inputs, "--output", tmp_path / "o", output=output)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 2
    assert f"{command} runs in one process: start it without torchrun" in output.read_text()
