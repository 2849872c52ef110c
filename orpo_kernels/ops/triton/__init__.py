"""The operations of `torch_ops` as Triton kernels, one a file with its host wrapper beneath. fp32, fp16 and bf16."""

# ruff: noqa: F401

from .are_within import are_within
from .column_statistics import column_statistics
from .count_rows import count_rows
from .gather_columns import gather_columns
from .gather_rows import gather_rows
from .label_rows import label_rows
from .odds_ratio import odds_ratio
from .project_log_odds import project_log_odds
from .project_residual import project_residual
from .recomputed_residual import recomputed_residual_
from .residual import residual_
from .scatter_rows import scatter_rows_
from .sequence_sums import sequence_sums
from .statistics import statistics
