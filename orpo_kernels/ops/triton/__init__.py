"""The operations of `torch_ops` as Triton kernels, one a file with its host wrapper beneath. fp32, fp16 and bf16.

Two have no kernel yet and are the eager ones: `statistics` and `recomputed_residual_`, of logits that exist, which only
the vocabulary group's `single_pass` and `resident` ask for.
"""

from ..torch_ops import recomputed_residual_, statistics
from .gather_rows import gather_rows
from .odds_ratio import odds_ratio
from .project_log_odds import project_log_odds
from .project_residual import project_residual
from .residual import residual_
from .scatter_rows import scatter_rows_
from .sequence_sums import sequence_sums

__all__ = [
    "gather_rows",
    "odds_ratio",
    "project_log_odds",
    "project_residual",
    "recomputed_residual_",
    "residual_",
    "scatter_rows_",
    "sequence_sums",
    "statistics",
]
