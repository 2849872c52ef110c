"""The ORPO loss of a causal language model from its last hidden states, without the tokens x vocabulary logits."""

# ruff: noqa: F403, F405

from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = [
    "Limits",
    "ORPOLoss",
    "ORPOOutput",
    "Plan",
    "PreferenceOutput",
    "Rows",
    "Sparsity",
    "backends",
    "dialects",
    "measured_sparsity",
    "methods",
    "orpo_loss",
    "orpo_loss_from_rows",
    "plan",
    "preference_loss_from_rows",
    "reference",
    "rows_from_labels",
    "token_logps",
]

if TYPE_CHECKING:
    from ._names import *
else:

    def __getattr__(name):
        """The first name that is asked for imports torch, which takes a second that `orpo-kernels --help` has not."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from . import _names

        globals()[name] = value = getattr(_names, name)
        return value

    def __dir__():
        return sorted({*globals(), *__all__})
