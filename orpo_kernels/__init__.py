"""The ORPO loss of a causal language model from its last hidden states, without the tokens x vocabulary logits."""

from . import dialects, methods, reference
from .loss import ORPOLoss, ORPOOutput, orpo_loss, orpo_loss_from_rows
from .ops import backends
from .planning import Plan, plan
from .preference_loss import PreferenceOutput, preference_loss_from_rows
from .rows import Rows, rows_from_labels
from .sparsity import Sparsity, measured_sparsity
from .token_logps import token_logps

__version__ = "0.1.0"

__all__ = [
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
