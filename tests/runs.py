"""Training for the tests: killed in the middle, or by two processes together.

python -m torch.distributed.run --nproc-per-node 2 -m tests.runs ddp transformers FOLDER
python -m torch.distributed.run --nproc-per-node 2 -m tests.runs fsdp2 trl FOLDER
python -m torch.distributed.run --nproc-per-node 2 -m tests.runs evaluated trl FOLDER
python -m torch.distributed.run --nproc-per-node 2 -m tests.runs smollm2 fsdp2 FOLDER
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import signal
import sys
from collections.abc import Callable
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


def forked(run: Callable[[], Any], output: str | Path = os.devnull) -> int:
    """Run in a copy of this process, which has imported everything already, and leave with what it returns.

    Returns the process id. What the copy prints goes into the file `output`.
    """
    if child := os.fork():
        return child
    try:
        sys.stdout = sys.stderr = open(output, "w", encoding="utf-8", buffering=1)  # noqa: SIM115
        os.dup2(sys.stdout.fileno(), 1)
        os.dup2(sys.stdout.fileno(), 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background has none
        torch.set_num_threads(1)  # other tests' pool of threads did not come along: torch would wait for it for ever
        os._exit(run())
    finally:
        os._exit(70)


def make_trainer(
    kind: str, folder: Any, model: Any = None, callbacks: Any = None, evaluates: bool = False, **changes: Any
) -> Any:
    """Either of our trainers, with shuffled data and, where the trainer leaves it in, dropout. TRL's may `evaluate`."""
    model = tiny(attention_dropout=0.1) if model is None else model
    arguments = settings(folder, **{"train_sampling_strategy": "random", **changes})
    if kind == "trl":
        from datasets import Dataset

        from orpo_kernels.trl import ORPOConfig, ORPOTrainer

        data = Dataset.from_list(chat_examples())
        args = ORPOConfig(**arguments, max_length=96)
        held_out = {"eval_dataset": Dataset.from_list(chat_examples(7))} if evaluates else {}
        return ORPOTrainer(
            model, args, train_dataset=data, processing_class=tokenizer(), callbacks=callbacks, **held_out
        )

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


def evaluated(kind: str, folder: Path) -> None:
    """One of two processes: seven pairs in batches of two, so that one fills up the last."""
    trainer = make_trainer(kind, folder, tiny(), evaluates=True, ddp_backend="gloo")
    metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        (folder / "metrics.json").write_text(json.dumps(metrics))
    leave(trainer)


def leave(trainer: Any) -> None:
    """The end of one of several processes. Torn down one before the other, gloo's now and then wait for ever."""
    trainer.accelerator.wait_for_everyone()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


DEEPSPEED = {
    **dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto"),
    "gradient_clipping": "auto",
}
FSDP2 = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}


def allow_fsdp_on_a_cpu() -> None:
    """Accelerate has FSDP on accelerators alone; PyTorch has it over gloo as well."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    own = PartialState.__init__

    def init(self: Any, *args: Any, **options: Any) -> None:
        own(self, *args, **options)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = init


# What every engine asks of the training arguments, and what it wraps the model into.
ENGINES: dict[str, tuple[dict[str, Any], str]] = {
    "ddp": ({"ddp_backend": "gloo"}, "DistributedDataParallel"),
    "fsdp2": ({"ddp_backend": "gloo", **FSDP2}, "FSDPLlamaForCausalLM"),
    **{
        f"zero{stage}": ({"deepspeed": {**DEEPSPEED, "zero_optimization": {"stage": stage}}}, "DeepSpeedEngine")
        for stage in (1, 2)
    },
}


def together(engine: str, kind: str, folder: Path) -> None:
    """One of two processes: every step's logs go to a file, and the model of one that shards it."""
    arguments, wrapper = ENGINES[engine]
    if engine == "fsdp2":
        allow_fsdp_on_a_cpu()
    changes = {"train_sampling_strategy": "sequential", "gradient_accumulation_steps": 2}
    evaluation = {} if kind == "trl" else {"eval_strategy": "steps", "eval_steps": 2}
    trainer = make_trainer(kind, folder, tiny(), **{**changes, **evaluation, **arguments})
    if engine == "ddp" and evaluation:
        trainer.evaluate()  # before training, whose gradients have to meet all the same
        trainer.state.log_history.clear()
    trainer.train()
    assert type(trainer.model_wrapped).__name__ == wrapper
    if engine == "fsdp2":
        trainer.save_model(str(folder / "model"))
    if trainer.is_world_process_zero():
        (folder / "logs.json").write_text(json.dumps(trainer.state.log_history))
    leave(trainer)


ZERO3 = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
EVALUATING = {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True}


def zero3_model(case: str) -> Any:
    """The model of a case of `zero3`, the same in one process."""
    model = tiny(tie_word_embeddings=case == "tied")
    if case != "lora":
        return model
    import peft

    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    return peft.get_peft_model(model, config)


def zero3_trainer(kind: str, folder: Path, case: str) -> Any:
    """A trainer that has its parameters in parts from its first step on; in the case "parts", before."""
    from transformers import TrainingArguments
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # of the case before, under which models would be made in parts
    changes = {
        "train_sampling_strategy": "sequential",
        "gradient_accumulation_steps": 2,
        "deepspeed": {**DEEPSPEED, "zero_optimization": ZERO3},
        **({"save_strategy": "steps", "save_steps": 2} if case == "whole" else {}),
        **({} if kind == "trl" else EVALUATING),
    }
    model = zero3_model(case)
    if case == "parts":
        arguments = TrainingArguments(**settings(folder, deepspeed=changes["deepspeed"]))
        model = type(model).from_pretrained(folder / "initial")  # while there are arguments
        assert arguments.deepspeed
        assert model.lm_head.weight.numel() == 0
    trainer = make_trainer(kind, folder / case, model, **changes)
    if case == "parts" and kind != "trl":
        assert trainer.data_collator.packing == "padded"
        trainer.data_collator = dataclasses.replace(trainer.data_collator, packing="shared")
    return trainer


def zero3(kind: str, folder: Path) -> None:
    """DeepSpeed ZeRO-3, with parameters in parts as well: one case behind the other; "resumed" goes on with "whole"."""
    for case in ("whole", "resumed", "parts", "tied", "lora"):
        trainer = zero3_trainer(kind, folder, case)
        trainer.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-2") if case == "resumed" else None)
        assert all(parameter.numel() == 0 for parameter in trainer.model.parameters())
        if case == "whole":
            trainer.save_model(str(folder / "model"))
        if trainer.is_world_process_zero():
            (folder / f"{case}.json").write_text(json.dumps(trainer.state.log_history))
    leave(trainer)


def smollm2(engine: str, folder: Path) -> None:
    """Ten steps of SmolLM2 on LLMBar, two pairs each, by one process or two; SGD needs no memory of its own."""
    from transformers import TrainingArguments

    from examples.smollm2 import load_smollm2
    from orpo_kernels.transformers import PreferenceCollator
    from orpo_kernels.transformers.trainer import ORPOTrainer

    from .test_real_model import whole_examples

    if engine == "fsdp2":
        allow_fsdp_on_a_cpu()
    model, own = load_smollm2()
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    arguments = settings(
        folder,
        max_steps=10,
        optim="sgd",
        learning_rate=0.05,
        per_device_train_batch_size=2 // processes,
        **(FSDP2 if engine == "fsdp2" else {}),
        **({"ddp_backend": "gloo"} if processes > 1 else {}),
    )
    trainer = ORPOTrainer(
        model,
        TrainingArguments(**arguments),
        data_collator=PreferenceCollator(own, max_length=256, end="trl"),
        train_dataset=whole_examples()[:20],
    )
    trainer.train()
    if trainer.is_world_process_zero():
        (folder / f"{engine}.json").write_text(json.dumps(trainer.state.log_history))
    leave(trainer)


def main() -> None:
    what, kind, folder = sys.argv[1:]
    torch.set_num_threads(1)
    runs = {engine: functools.partial(together, engine) for engine in ENGINES}
    runs |= {"zero3": zero3, "evaluated": evaluated, "smollm2": smollm2}
    runs[what](kind, Path(folder))


if __name__ == "__main__":
    main()
