"""Training in processes of its own, for the tests: killed in the middle, or two of them together.

python -m tests.runs killed trl FOLDER
python -m torch.distributed.run --nproc-per-node 2 -m tests.runs together transformers FOLDER
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import TrainerCallback

from .training import chat_examples, settings, tiny, tokenizer

STEPS, CHECKPOINT_EVERY, KILLED_AT = 8, 2, 5


class Kill(TrainerCallback):
    """As a power cut would: no exception, no clean-up."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)


def make_trainer(kind: str, folder: Any, model: Any = None, callbacks: Any = None, **changes: Any) -> Any:
    """Either of our trainers, with shuffled data and, where the trainer leaves it in, dropout."""
    model = tiny(attention_dropout=0.1) if model is None else model
    arguments = settings(folder, **{"train_sampling_strategy": "random", **changes})
    if kind == "trl":
        from datasets import Dataset

        from orpo_kernels.trl import ORPOConfig, ORPOTrainer

        data = Dataset.from_list(chat_examples())
        args = ORPOConfig(**arguments, max_length=96)
        return ORPOTrainer(model, args, train_dataset=data, processing_class=tokenizer(), callbacks=callbacks)

    from transformers import TrainingArguments

    from orpo_kernels.transformers import PreferenceCollator
    from orpo_kernels.transformers.trainer import ORPOTrainer as PlainTrainer

    collator = PreferenceCollator(tokenizer(), max_length=96, end="trl")
    args = TrainingArguments(**arguments)
    return PlainTrainer(
        model,
        args,
        data_collator=collator,
        train_dataset=chat_examples(),
        eval_dataset=chat_examples(7),
        callbacks=callbacks,
    )


def interrupted(kind: str, folder: Any, callbacks: Any = None) -> Any:
    """A trainer that writes checkpoints; with `Kill` among its callbacks, it dies behind one."""
    schedule = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": CHECKPOINT_EVERY}
    return make_trainer(kind, folder, callbacks=callbacks, **schedule, gradient_accumulation_steps=2)


def together(kind: str, folder: Path) -> None:
    """One of several processes: every step's logs go to a file."""
    changes = {"train_sampling_strategy": "sequential", "ddp_backend": "gloo", "gradient_accumulation_steps": 2}
    evaluation = {} if kind == "trl" else {"eval_strategy": "steps", "eval_steps": 2}
    trainer = make_trainer(kind, folder, tiny(), **{**changes, **evaluation})
    trainer.train()
    assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
    if trainer.is_world_process_zero():
        (folder / "logs.json").write_text(json.dumps(trainer.state.log_history))
    trainer.accelerator.end_training()


def main() -> None:
    what, kind, folder = sys.argv[1:]
    torch.set_num_threads(1)
    if what == "killed":
        interrupted(kind, folder, [Kill()]).train()
    else:
        together(kind, Path(folder))


if __name__ == "__main__":
    main()
