"""Trainings by the frameworks of `orpo_kernels.integrations`, in processes of their own, with the loss or without.

A framework is a function (`FRAMEWORKS`): it trains the model and the pairs of `write_model`, and returns what it logs.
`python -m tests.frameworks llamafactory|swift|axolotl`, where that one is installed, measures a step with a vocabulary
of 128k, stock and ours, and writes the framework's line of the table in docs/frameworks.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from orpo_kernels.app.machine import kind

from .chats import assistant, user
from .test_collator import CHATML
from .training import chat_examples, tiny, tokenizer

ROOT = Path(__file__).parents[1]
# What all have in common: the logs are kept, with what they took, and random weights (of adapters) are the same ones.
PROGRAM = """
import json, runpy, sys, time, torch, transformers

class Clock(transformers.TrainerCallback):
    seconds = []

    def on_step_begin(self, *args, **options):
        self.began = time.perf_counter()

    def on_step_end(self, *args, **options):
        self.seconds.append(time.perf_counter() - self.began)

def kept(trainer, *args, **options):
    trainer.add_callback(Clock())
    result = train(trainer, *args, **options)
    if trainer.is_world_process_zero():
        with open("/proc/self/status") as status:
            peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
        kept = {"logs": trainer.state.log_history, "seconds": Clock.seconds, "peak_kib": peak}
        with open(sys.argv[0] + ".json", "w") as file:
            json.dump(kept, file)
    return result

if transformers.__version__.startswith("4."):  # it logs losses with four digits
    transformers.trainer.round = lambda value, digits: value
train, transformers.Trainer.train = transformers.Trainer.train, kept
torch.manual_seed(0)
if __name__ == "__main__":  # and not in a process that prepares data
    """
# Axolotl puts the model of each of several processes onto a GPU, also where there is none.
AXOLOTL_ON_CPUS = """
    from axolotl.loaders.model import ModelLoader
    place = ModelLoader._set_device_map_config
    ModelLoader._set_device_map_config = lambda loader: (loader.cfg.update(device_map=None), place(loader))
    """

Logs = list[dict[str, float]]


def trained(program: str, arguments: list[Any], file: Path, processes: int = 1) -> Logs:
    """Run the program, kept as `file`, with arguments: what its training logs, step by step, and its evaluations."""
    file.write_text(PROGRAM + program + "\n")
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    run = subprocess.run(
        [sys.executable, *several, str(file), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=file.parent,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
            "HF_HUB_OFFLINE": "1",
            "TRL_EXPERIMENTAL_SILENCE": "1",
            "AXOLOTL_DO_NOT_TRACK": "1",
            **({"ACCELERATE_USE_CPU": "true"} if processes > 1 else {}),
        },
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-6000:]
    return [logs for logs in kept(file)["logs"] if "loss" in logs or "eval_loss" in logs]


def kept(file: Path) -> dict[str, Any]:
    """What the training by `file` left: "logs"; "seconds" of every step; "peak_kib", the most memory that it held."""
    return json.loads(Path(f"{file}.json").read_text())


def write_model(folder: Path, model: nn.Module | None = None, pairs: list[dict[str, Any]] | None = None) -> None:
    """A model, by default a tiny one, and pairs (messages) in the forms of the frameworks."""
    own = tokenizer()
    own.chat_template = CHATML
    own.save_pretrained(folder / "tiny")
    (tiny() if model is None else model).save_pretrained(folder / "tiny")
    texts = [{name: turns[0]["content"] for name, turns in pair.items()} for pair in pairs or chat_examples(8)]

    def write(name: str, rows: list[dict[str, Any]]) -> None:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    write(
        "sharegpt.jsonl",
        [
            {
                "conversations": [{"from": "human", "value": pair["prompt"]}],
                "chosen": {"from": "gpt", "value": pair["chosen"]},
                "rejected": {"from": "gpt", "value": pair["rejected"]},
            }
            for pair in texts
        ],
    )
    columns = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}
    info = {"file_name": "sharegpt.jsonl", "formatting": "sharegpt", "ranking": True, "columns": columns}
    (folder / "dataset_info.json").write_text(json.dumps({"pairs": info}))
    write(
        "swift.jsonl",
        [
            {"messages": [user(pair["prompt"]), assistant(pair["chosen"])], "rejected_response": pair["rejected"]}
            for pair in texts
        ],
    )
    sides = ("chosen", "rejected")
    argilla = [{side: [user(pair["prompt"]), assistant(pair[side])] for side in sides} for pair in texts]
    write("argilla.jsonl", argilla)


def llamafactory(
    folder: Path, name: str, own: dict[str, Any] | None = None, processes: int = 1, **changes: Any
) -> Logs:
    config = {
        "model_name_or_path": str(folder / "tiny"),
        "stage": "dpo",
        "do_train": True,
        "finetuning_type": "full",
        "pref_loss": "orpo",
        "pref_beta": 0.1,
        "dataset": "pairs",
        "dataset_dir": str(folder),
        "template": "chatml",
        "cutoff_len": 256,
        "output_dir": str(folder / name),
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "max_steps": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "overwrite_cache": True,
        **changes,
    }
    config |= {} if own is None else {"orpo_kernels": own}
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps(config))
    stock = "from llamafactory.train.tuner import run_exp; run_exp()"
    ours = "runpy.run_module('orpo_kernels.integrations.llamafactory', run_name='__main__')"
    return trained(stock if own is None else ours, [file], folder / f"{name}.py", processes)


def ms_swift(folder: Path, name: str, own: dict[str, Any] | None = None, processes: int = 1, **changes: Any) -> Logs:
    options = {
        "rlhf_type": "orpo",
        "model": folder / "tiny",
        "model_type": "llama",
        "template": "chatml",
        "tuner_type": "full",
        "dataset": folder / "swift.jsonl",
        "torch_dtype": "float32",
        "bf16": "false",
        "fp16": "false",
        "beta": 0.1,
        "max_length": 256,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_steps": 3,
        "num_train_epochs": 1,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "split_dataset_ratio": 0,
        "gradient_checkpointing": "false",
        "seed": 42,
        "check_model": "false",
        "use_hf": "true",
        "output_dir": folder / name,
        **changes,
    }
    if own is not None:
        plugin = folder / f"{name}_plugin.py"
        plugin.write_text(f"from orpo_kernels.integrations.ms_swift import install\ninstall(**{own!r})\n")
        options["external_plugins"] = plugin
    arguments = [part for key, value in options.items() for part in (f"--{key}", value)]
    program = "from swift import rlhf_main; from swift.rlhf_trainers import rlhf_mixin; rlhf_main()"
    return trained(program, arguments, folder / f"{name}.py", processes)


def axolotl(folder: Path, name: str, own: dict[str, Any] | None = None, processes: int = 1, **changes: Any) -> Logs:
    config = {
        "base_model": str(folder / "tiny"),
        "rl": "orpo",
        "orpo_alpha": 0.1,
        "chat_template": "tokenizer_default",
        "datasets": [{"path": str(folder / "argilla.jsonl"), "ds_type": "json", "type": "chat_template.argilla"}],
        "dataset_prepared_path": str(folder / "prepared"),
        "output_dir": str(folder / name),
        "sequence_len": 256,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_steps": 3,
        "num_epochs": 1,
        "learning_rate": 0.001,
        "lr_scheduler": "constant",
        "optimizer": "adamw_torch",
        "logging_steps": 1,
        "save_strategy": "no",
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "attn_implementation": "sdpa",
        "gradient_checkpointing": False,
        **changes,
    }
    if own is not None:
        config |= {"plugins": ["orpo_kernels.integrations.axolotl.OrpoKernelsPlugin"], "orpo_kernels": own}
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps(config))
    program = "runpy.run_module('axolotl.cli.train', run_name='__main__')"
    if processes > 1:
        program = AXOLOTL_ON_CPUS + program
    return trained(program, [file], folder / f"{name}.py", processes)


FRAMEWORKS: dict[str, Callable[..., Logs]] = {"llamafactory": llamafactory, "swift": ms_swift, "axolotl": axolotl}


# --- the table -----------------------------------------------------------------------------------------------------

TABLE = ROOT / "docs" / "frameworks.md"
HEADER = "| framework | s a step, stock | ours | GiB at most, stock | ours | CPU | date |"
ROUNDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("framework", choices=FRAMEWORKS)
    write_line(parser.parse_args().framework)


def write_line(framework: str) -> None:
    figures = (f"{value:.2f}" for value in measured(framework))
    line = f"| {' | '.join((framework, *figures, kind(), datetime.date.today().isoformat()))} |"
    before, header, after = TABLE.read_text().partition(f"{HEADER}\n")
    table, end, rest = after.partition("\n\n")
    rule, *lines = table.splitlines()
    others = [old for old in lines if not old.startswith(f"| {framework} |")]
    TABLE.write_text(before + header + "\n".join((rule, *sorted([*others, line]))) + end + rest)


def measured(framework: str) -> tuple[float, float, float, float]:
    """Seconds of a step, stock and ours, and GiB, the most that the process held: medians of turns, stock first."""
    runs: dict[str, list[dict[str, Any]]] = {"stock": [], "ours": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = tiny(vocab_size=128_256, hidden_size=256, intermediate_size=512, num_attention_heads=4, head_dim=64)
        write_model(folder, model, long_pairs())
        for turn in range(ROUNDS):
            for who in runs:
                name = f"{who}{turn}"
                FRAMEWORKS[framework](folder, name, own={} if who == "ours" else None)
                runs[who].append(kept(folder / f"{name}.py"))
                print(who, runs[who][-1]["seconds"], runs[who][-1]["peak_kib"], flush=True)
    seconds = (statistics.median(min(run["seconds"][1:]) for run in runs[who]) for who in runs)
    peaks = (statistics.median(run["peak_kib"] / 2**20 for run in runs[who]) for who in runs)
    return (*seconds, *peaks)  # type: ignore[return-value]


def long_pairs() -> list[dict[str, Any]]:
    """Eight pairs, prompts of 64 characters and answers of 160, which no framework cuts."""
    sizes = {"prompt": 64, "chosen": 160, "rejected": 160}

    def filled(name: str, turn: dict[str, str]) -> dict[str, str]:
        return {**turn, "content": (f"{turn['content']} " * sizes[name])[: sizes[name]]}

    return [{name: [filled(name, turn) for turn in turns] for name, turns in pair.items()} for pair in chat_examples(8)]


if __name__ == "__main__":
    main()
