"""What `import orpo_kernels` offers. Importing this imports torch."""

# ruff: noqa: F401

from . import dialects, methods, reference
from .engine.planning import Plan, plan
from .engine.work import Limits
from .loss import ORPOLoss, orpo_loss, orpo_loss_from_rows, preference_loss_from_rows, token_logps
from .ops import backends
from .output import ORPOOutput, PreferenceOutput
from .rows import Rows, rows_from_labels
from .sparsity import Sparsity, measured_sparsity
