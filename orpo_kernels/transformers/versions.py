"""What differs between the versions that are served: a line for each difference, and when it can go.

`make test-versions` runs the tests in the versions of docs/versions.md.
"""

from __future__ import annotations

import inspect
import re
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

OLDEST_TRL = (0, 28)


def body_of(model: PreTrainedModel) -> nn.Module:
    """The model without its head; the model itself where there is no such thing. Of two parts, the decoder."""
    if model.config.is_encoder_decoder:
        return model.get_decoder()
    body = model.base_model
    if body is model and type(model).__name__ == "Gemma3ForCausalLM":  # transformers < 5: it names "language_model"
        body = getattr(model, "model", model)
    return body


def scaled_when_tied() -> tuple[str, ...]:
    """The kinds of models that scale the hidden states in front of a tied head, where their config does not say it."""
    kinds = ("t5", "longt5", "umt5", "switch_transformers")
    return kinds if version_of("transformers") >= (5,) else (*kinds, "mt5")  # transformers < 5


def loss_takes_counts(trainer: Trainer) -> None:
    """Tell a trainer that its loss is divided by the counts of the step already."""
    trainer.model_accepts_loss_kwargs = True  # transformers < 5.19 has no loss_is_scaled_for_ga; trl < 1.15 sets False


def compilation_by_environment(accelerator: Any) -> Any:
    """The plugin by which Accelerate would compile the model, where the trainer has none to hand on."""
    from transformers import Trainer

    if hasattr(Trainer, "_build_accelerator_args"):
        return None
    return accelerator.state.dynamo_plugin  # transformers < 5.2 says torch_compile=True in the environment


def groups_by_length(args: TrainingArguments) -> bool:
    """Whether batches are to be made of pairs of similar length."""
    if hasattr(args, "train_sampling_strategy") and args.train_sampling_strategy is not None:
        return args.train_sampling_strategy == "group_by_length"
    return getattr(args, "group_by_length", False)  # transformers < 5.2


def sampling(strategy: str) -> dict[str, Any]:
    """The training arguments for the order of the pairs: "random", "sequential" or "group_by_length"."""
    from transformers import TrainingArguments  # which brings Accelerate

    if "train_sampling_strategy" in inspect.signature(TrainingArguments).parameters:
        return {"train_sampling_strategy": strategy}
    return {"group_by_length": strategy == "group_by_length"}  # transformers < 5.2, which shuffles all else


def save_where_asked(model: PreTrainedModel) -> None:
    """Have the model saved by each process that is told to: the first one of every node."""
    overridden: Any = model
    overridden.should_save_on_this_rank = bool  # transformers 5.23, where the first of all alone writes weights


def version_of(package: str) -> tuple[int, ...]:
    """The numbers of the version that is installed; () where none is."""
    try:
        return tuple(map(int, re.findall(r"\d+", version(package))[:3]))
    except PackageNotFoundError:
        return ()


def check_trl() -> None:
    """Raise `ImportError` where there is no TRL that is served. (Before 0.26 there is no trl.experimental.orpo.)"""
    installed = version_of("trl")
    if installed < OLDEST_TRL:
        needed, given = (".".join(map(str, numbers)) for numbers in (OLDEST_TRL, installed))
        raise ImportError(
            f"orpo_kernels.trl needs trl {needed} or newer, and {f'trl {given}' if given else 'no trl'} is installed: "
            f"pip install 'trl>={needed}', or take orpo_kernels.transformers.trainer, which needs no trl."
        )
