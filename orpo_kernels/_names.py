"""What `import orpo_kernels` offers. Importing this imports torch."""

# ruff: noqa: F401

from . import dialects, methods, reference
from .logps import token_logps
from .loss import ORPOLoss, ORPOOutput, orpo_loss, orpo_loss_from_rows
from .ops import backends
from .planning import Plan, plan
from .preference_loss import PreferenceOutput, preference_loss_from_rows
from .rows import Rows, rows_from_labels
from .sparsity import Sparsity, measured_sparsity
