"""The public functions: from hidden states and the lm-head weight to a loss, without the logits.

Keywords become three small objects here, `Head` (what the rows are multiplied by), `Compute` (how) and `Groups` (with
which ranks), and `Call` (`call.py`) goes on from there.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .devices import moved, rows_device
from .engine.call import Call
from .engine.checks import check_options, check_same_device
from .engine.head import Compute, Head
from .engine.work import Limits, accumulation_dtype
from .methods import ORPO, Method
from .output import PreferenceOutput
from .parallel import NO_GROUPS, Groups
from .rows import Rows, check_reduction, padded_rows, rows_from_labels


def orpo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    nll_labels: Tensor | None = None,
    pair_weight: Tensor | None = None,
    beta: float = 0.1,
    alpha: float = 1.0,
    nll_reduction: str = "token",
    nll_denominator: int | Tensor | None = None,
    pair_denominator: int | Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = False,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    schedule: str = "auto",
    memory_budget: int | None = None,
    backend: str = "auto",
    sparse_eps: float | None = None,
    limits: Limits | None = None,
    data_group: Any = None,
    vocab_group: Any = None,
    sequence_group: Any = None,
) -> PreferenceOutput:
    """ORPO: NLL of the chosen answers plus beta times -logsigmoid of the log odds ratio (arXiv 2403.07691).

    Args:
        hidden: (2B, T, H) last hidden states, the B chosen sequences first; fp16, bf16, fp32 or float64.
        weight: (V, H) lm-head weight in the same dtype; under autocast the dtypes may differ.
        labels: (2B, T) int64, the scored (odds-ratio) targets: the response's token ids, `ignore_index` elsewhere.
        bias: (V,) lm-head bias.
        nll_labels: (B, T) int64, the chosen sequences' NLL targets; `labels[:B]` by default.
        pair_weight: (B,) float64, finite and at least 0: what each pair's loss is multiplied by, in the NLL and in the
            odds ratio. The means are divided by the same counts as without weights, given or not: 2 is as if the pair
            were summed twice, 0 leaves it without gradient, and ones everywhere change no bit.
        beta: weight of the odds ratio, the paper's lambda.
        alpha: weight of the NLL.
        nll_reduction: "token", the mean over all NLL rows, or "sequence", the mean over each sequence first.
        nll_denominator: what the NLL's sum is divided by instead of this batch's own count of NLL rows ("token") or
            of chosen sequences with an NLL row ("sequence"). With the count of the whole batch, the micro-batches of
            gradient accumulation or of several devices add up to exactly the whole batch's loss and gradient.
        pair_denominator: the same for the odds ratio: the number of pairs with two non-empty answers.
        ignore_index: the label that is no target.
        shift: False if `labels[:, t]` is the target of `hidden[:, t]`; True for unshifted labels, where it is
            `labels[:, t + 1]`. The hidden states are not copied.
        logit_scale: logits = logit_scale * (hidden @ weight.T + bias)  (Cohere; Granite: 1 / logits_scaling).
        logit_softcap: c, logits = c * tanh(logits / c)  (Gemma 2).
        schedule: "auto", "single_pass", "resident" or "recompute"; see `plan`.
        memory_budget: bytes for the loss beside its inputs and the gradients; by default a sixteenth of the memory.
        backend: "auto", "torch", "native" or "triton".
        sparse_eps: None for exact gradients. A probability, 2**-14 say: the backward pass leaves out the tokens whose
            probability nowhere in a block of rows exceeds it, and puts the tail's mean in their place. The loss itself
            stays exact. What it saves and costs is in `docs/sparse.md`; `measured_sparsity` prints it for your data.
        limits: what chunks may be at the most, where the defaults for the device are not what you want; see `Limits`.
        data_group: a `torch.distributed.ProcessGroup` or one-dimensional `DeviceMesh` whose ranks hold different pairs.
            The means run over all of them: loss, nll_loss, or_loss and gradients, averaged over the ranks as DDP and
            FSDP do, are those of one process with the whole batch. Denominators that are given are those of all ranks.
        vocab_group: its ranks hold `weight` and `bias` by rows, [start, start + V_local) in rank order, and the same
            hidden states and labels, which stay global. All get the same loss and the whole gradient of `hidden`.
        sequence_group: its ranks hold some positions of every sequence, each with its labels. All get the same loss;
            gradients are to be averaged, as over data_group. Shift the labels before the sequences are split.

    Ranks that hold the same pairs, those of vocab_group and sequence_group, are given the same pair_weight.

    A `weight` or `bias` that is a DTensor is gathered over all mesh dimensions but that of vocab_group, and its
    gradient averaged and scattered over them.

    Raises:
        ValueError: shapes that do not fit, an odd batch, a label outside [0, V), a schedule that cannot serve, a
            pair_weight below 0 or not finite. (A GPU's labels and weights are looked at there: it reports them later.)
        TypeError: dtypes or devices that do not fit.
        RuntimeError: a backend that is not available; a second derivative; `parallel.PeerError` where another rank has
            failed.
    """
    groups = groups_of(data_group, vocab_group, sequence_group)
    compute = Compute(schedule, memory_budget, backend, sparse_eps, limits)
    method = ORPO(beta=beta, alpha=alpha)
    with groups.together(weight.device):
        head = Head.local(weight, bias, None, logit_scale, logit_softcap, groups)
        check_padded(hidden, labels, shift, nll_reduction, groups)
        average = groups.sequence is not None and nll_reduction == "sequence"  # over all ranks, later
        make = padded_rows if torch.compiler.is_compiling() else rows_from_labels
        rows = make(
            labels,
            nll_labels,
            shift=shift,
            ignore_index=ignore_index,
            nll_reduction="token" if average else nll_reduction,
            pair_weight=pair_weight,
        )
        call = Call.prepared(hidden.flatten(0, 1), rows, head, compute, groups)
    return call.loss(method, nll_denominator, pair_denominator, average_sequences=average)


def orpo_loss_from_rows(
    hidden: Tensor,
    weight: Tensor,
    rows: Rows,
    *,
    bias: Tensor | None = None,
    low_rank: Tensor | None = None,
    beta: float = 0.1,
    alpha: float = 1.0,
    nll_denominator: int | Tensor | None = None,
    pair_denominator: int | Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    schedule: str = "auto",
    memory_budget: int | None = None,
    backend: str = "auto",
    sparse_eps: float | None = None,
    limits: Limits | None = None,
    data_group: Any = None,
    vocab_group: Any = None,
    sequence_group: Any = None,
) -> PreferenceOutput:
    """`orpo_loss` for any layout: packed, padding-free, or with a shared prompt.

    Args:
        hidden: (N, H) last hidden states of all positions.
        rows: which positions predict which targets, in which sequence, and what each pair weighs; see `Rows`,
            `rows_from_labels` and `dialects`.
        low_rank: (V, r), more columns of the weight in any dtype: LoRA's B, where hidden (N, H + r) goes on with what B
            multiplies. The weight is copied. If it is frozen, these columns alone get a gradient and alone cost one.
        nll_denominator: instead of the sum of `rows.nll_weight`.
        sequence_group: every rank has its own rows and positions, and numbers sequences and pairs as the others do.

    All else is as in `orpo_loss`. Nothing is read back from a GPU here, except each pair's number of rows where a
    trained lm-head's residual exceeds the budget as a whole while its fp32 gradient does not.
    """
    return preference_loss_from_rows(
        hidden,
        weight,
        rows,
        ORPO(beta=beta, alpha=alpha),
        bias=bias,
        low_rank=low_rank,
        nll_denominator=nll_denominator,
        pair_denominator=pair_denominator,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        schedule=schedule,
        memory_budget=memory_budget,
        backend=backend,
        sparse_eps=sparse_eps,
        limits=limits,
        data_group=data_group,
        vocab_group=vocab_group,
        sequence_group=sequence_group,
    )


def preference_loss_from_rows(
    hidden: Tensor,
    weight: Tensor,
    rows: Rows,
    method: Method,
    *,
    reference_logps: Tensor | None = None,
    bias: Tensor | None = None,
    low_rank: Tensor | None = None,
    nll_denominator: int | Tensor | None = None,
    pair_denominator: int | Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    schedule: str = "auto",
    memory_budget: int | None = None,
    backend: str = "auto",
    sparse_eps: float | None = None,
    limits: Limits | None = None,
    data_group: Any = None,
    vocab_group: Any = None,
    sequence_group: Any = None,
) -> PreferenceOutput:
    """`orpo_loss_from_rows` for any method (`methods.py`); what ORPO can, every method can.

    Args:
        rows: a row's `nll_weight` is that of the method's NLL; the method's prompt_nll and nll_reduction are the
            business of whoever makes the rows.
        method: an instance of one of `orpo_kernels.methods`.
        reference_logps: (2B,) summed log-probabilities of the answers under the reference model, for DPO.

    All else is as in `orpo_loss_from_rows`. Raises as that; `ValueError` for a method that needs reference_logps and
    has none, or of a wrong shape.
    """
    groups = groups_of(data_group, vocab_group, sequence_group)
    compute = Compute(schedule, memory_budget, backend, sparse_eps, limits)
    with groups.together(weight.device):
        head = Head.local(weight, bias, low_rank, logit_scale, logit_softcap, groups)
        reference = checked_reference(reference_logps, method, rows)
        call = Call.prepared(hidden, rows, head, compute, groups)
    return call.loss(method, nll_denominator, pair_denominator, reference)


@torch.compiler.disable(
    reason="token_logps computes as many rows as labels ask for, which no graph of fixed shapes can"
)
def token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    schedule: str = "auto",
    memory_budget: int | None = None,
    backend: str = "auto",
    sparse_eps: float | None = None,
    limits: Limits | None = None,
    data_group: Any = None,
    vocab_group: Any = None,
    sequence_group: Any = None,
) -> Tensor:
    """log softmax(logits)[target] of every position, without the logits: the primitive for any other objective.

    Differentiable, with any upstream gradient. Two GEMMs where the lm-head is frozen, three or four where it is
    trained, one without gradient.

    Args:
        hidden: (..., H) last hidden states; fp16, bf16, fp32 or float64.
        weight: (V, H) lm-head weight; bias: (V,) or None.
        targets: (...) int64, the token each position predicts; `ignore_index` for none. Finding the positions with a
            target is a host synchronisation on a GPU.
        logit_scale, logit_softcap, schedule, memory_budget, backend, sparse_eps, limits: as in `orpo_loss`.
        vocab_group: as in `orpo_loss`: the ranks hold `weight` and `bias` by rows, and the same hidden states, targets
            and upstream gradient.
        data_group, sequence_group: taken so that the arguments are those of `orpo_loss`. A position's log-probability
            needs no other position, so over these nothing is exchanged and nothing scaled.

    Returns:
        (...) log-probabilities in nats, 0 at `ignore_index`; fp32, float64 for float64 inputs.

    Raises:
        ValueError, TypeError, RuntimeError: as `orpo_loss`.
    """
    groups = Groups.of(vocab_group=vocab_group)
    compute = Compute(schedule, memory_budget, backend, sparse_eps, limits)
    with groups.together(weight.device):
        head = Head.local(weight, bias, None, logit_scale, logit_softcap, groups)
        check_targets_shape(hidden, targets)
        flat = targets.flatten().to(rows_device(targets.device))
        hidden = hidden.reshape(-1, hidden.shape[-1])
        head.check(hidden, flat, "targets")
        position = (flat != ignore_index).nonzero().squeeze(1)
        target = flat[position]
        head.check_values(hidden, position, target, "targets")
        options = head.planned(hidden, len(target), compute)
    head.agree(groups, len(target), options)
    log_odds = head.token_log_odds(hidden, position, target, options)
    logps = F.logsigmoid(log_odds).to(accumulation_dtype(hidden.dtype))
    return logps.new_zeros(targets.numel()).index_put((position.to(logps.device),), logps).view(targets.shape)


@torch.compiler.disable(reason="computes as many rows as labels ask for, which no graph of fixed shapes can")
def row_logps(
    hidden: Tensor,
    weight: Tensor,
    rows: Rows,
    *,
    bias: Tensor | None = None,
    low_rank: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    **options: Any,
) -> Tensor:
    """(R,) float64 log-probabilities of live rows, on their device, differentiable.

    Arguments as in `orpo_loss_from_rows`.
    """
    head = Head.local(weight, bias, low_rank, logit_scale, logit_softcap)
    call = Call.prepared(hidden, rows, head, Compute(**options), NO_GROUPS)
    assert call.options is not None
    log_odds = head.token_log_odds(hidden, call.rows.position, call.rows.target, call.options)
    return F.logsigmoid(moved(log_odds, rows.position.device, torch.float64))


def groups_of(data_group: Any, vocab_group: Any, sequence_group: Any) -> Groups:
    """See `Groups.of`."""
    if data_group is None and vocab_group is None and sequence_group is None:
        return NO_GROUPS
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "data_group, vocab_group and sequence_group cannot be in a compiled graph: the ranks compare sizes on the "
            "host. Compile the body of the model alone (`model.base_model.compile()`)"
        )
    return Groups.of(data_group, vocab_group, sequence_group)


def check_padded(hidden: Tensor, labels: Tensor, shift: bool, nll_reduction: str, groups: Groups) -> None:
    """What a padded batch's shapes tell."""
    if hidden.dim() != 3:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)}, it must be (2B, T, H); see orpo_loss_from_rows for flat"
        )
    if labels.shape != hidden.shape[:2]:
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}, but hidden {tuple(hidden.shape)} "
            f"asks for {tuple(hidden.shape[:2])}"
        )
    check_same_device("hidden", hidden, "labels", labels)
    if shift and groups.sequence is not None:
        raise ValueError(
            "shift is True, but with a sequence_group the last position's label is on another rank: shift the "
            "labels before the sequences are split, and pass shift=False"
        )
    check_reduction(nll_reduction)


def check_targets_shape(hidden: Tensor, targets: Tensor) -> None:
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"targets has shape {tuple(targets.shape)}, but hidden {tuple(hidden.shape)} "
            f"asks for {tuple(hidden.shape[:-1])}"
        )
    if targets.dtype != torch.int64:
        raise TypeError(f"targets is {targets.dtype}, it must be torch.int64")


def checked_reference(reference_logps: Tensor | None, method: Method, rows: Rows) -> Tensor | None:
    """(2B,) float64, in the method's kind of score. What the method does not need is not looked at."""
    if not method.needs_reference or reference_logps is None:
        method.gains(rows.nll_weight.new_empty(0))  # says what it misses
        return None
    if reference_logps.shape != (2 * rows.num_pairs,):
        raise ValueError(
            f"reference_logps has shape {tuple(reference_logps.shape)}, but the batch has {rows.num_pairs} pairs: it "
            f"must be ({2 * rows.num_pairs},), the chosen answers first"
        )
    return moved(reference_logps, rows.position.device, torch.float64)


class ORPOLoss(nn.Module):
    """`orpo_loss` as a module: the options are given once, the tensors at each call.

    >>> loss_function = ORPOLoss(beta=0.1, shift=True)
    >>> loss_function(hidden, model.lm_head.weight, labels).loss.backward()
    """

    def __init__(
        self,
        *,
        beta: float = 0.1,
        alpha: float = 1.0,
        nll_reduction: str = "token",
        ignore_index: int = -100,
        shift: bool = False,
        logit_scale: float = 1.0,
        logit_softcap: float | None = None,
        schedule: str = "auto",
        memory_budget: int | None = None,
        backend: str = "auto",
        sparse_eps: float | None = None,
        limits: Limits | None = None,
        data_group: Any = None,
        vocab_group: Any = None,
        sequence_group: Any = None,
    ):
        super().__init__()
        check_options(logit_scale, logit_softcap, sparse_eps)
        self.beta = beta
        self.alpha = alpha
        self.nll_reduction = nll_reduction
        self.ignore_index = ignore_index
        self.shift = shift
        self.logit_scale = logit_scale
        self.logit_softcap = logit_softcap
        self.schedule = schedule
        self.memory_budget = memory_budget
        self.backend = backend
        self.sparse_eps = sparse_eps
        self.limits = limits
        self.data_group = data_group
        self.vocab_group = vocab_group
        self.sequence_group = sequence_group

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        *,
        bias: Tensor | None = None,
        nll_labels: Tensor | None = None,
        pair_weight: Tensor | None = None,
        nll_denominator: int | Tensor | None = None,
        pair_denominator: int | Tensor | None = None,
    ) -> PreferenceOutput:
        """See `orpo_loss`."""
        return orpo_loss(
            hidden,
            weight,
            labels,
            bias=bias,
            nll_labels=nll_labels,
            pair_weight=pair_weight,
            nll_denominator=nll_denominator,
            pair_denominator=pair_denominator,
            **self._options(),
        )

    def extra_repr(self) -> str:
        shown = {k: v for k, v in self._options().items() if v is not None or not k.endswith(("_group", "limits"))}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())

    def _options(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name in OPTIONS}


OPTIONS = frozenset(inspect.signature(ORPOLoss).parameters)
