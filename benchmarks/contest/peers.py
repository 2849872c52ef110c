"""Everyone else who computes the ORPO loss, behind one signature, each through the real package's own code.

    loss = peer(hidden, weight, labels, nll_labels, beta, bias=None)

    hidden      (2B, T, H)  last hidden states, the B chosen sequences first
    weight      (V, H)      lm-head weight;  bias (V) or None
    labels      (2B, T)     int64, row t is the target of hidden t, -100 where the odds ratio does not look
    nll_labels  (B, T)      int64, the same for the chosen side's NLL (token mean over the batch)
    beta        float       weight of the odds ratio: loss = NLL + beta * OR
    loss        0-d, differentiable in hidden, weight and bias

Those with `Peer.softcap` also take logit_softcap=c, for logits c * tanh(logits / c).

Packages are imported when their peer is first called. What to know before believing a number about a peer stands with
its function.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from orpo_kernels import orpo_loss
from orpo_kernels.app.machine import has_bf16_gemm

IGNORE = -100
NATIVE_ROWS = 512  # in a chunk of torch's linear_cross_entropy


# ---------------------------------------------------------------------------------------------------------------------
# Plain torch: the whole logits, the textbook formula
# ---------------------------------------------------------------------------------------------------------------------


def odds_ratio(chosen: Tensor, rejected: Tensor) -> Tensor:
    """The odds-ratio loss (a mean over pairs) of mean log-probabilities, in the form that the paper's authors wrote."""
    log_odds = (chosen - rejected) - (torch.log1p(-torch.exp(chosen)) - torch.log1p(-torch.exp(rejected)))
    return -F.logsigmoid(log_odds).mean()


def plain(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    nll_labels: Tensor,
    beta: float,
    bias: Tensor | None = None,
    logit_softcap: float | None = None,
    upcast: bool = False,
) -> Tensor:
    """Logits and log-softmax of every position in the dtype of the hidden states, or fp32; sums over tokens in fp32."""
    logits = F.linear(hidden, weight, bias)
    if upcast:
        logits = logits.float()
    if logit_softcap is not None:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    log_probs = logits.log_softmax(-1)
    del logits  # plain at its strongest: nothing is kept that autograd does not keep, and one gather serves both labels
    pairs = nll_labels.shape[0]
    both = torch.stack([labels, torch.cat([nll_labels, torch.full_like(nll_labels, IGNORE)])], dim=-1)
    logps = log_probs.gather(-1, both.clamp(min=0))
    logps = torch.where(both != IGNORE, logps.to(torch.promote_types(logps.dtype, torch.float32)), 0.0)
    a = logps[..., 0].sum(-1) / (labels != IGNORE).sum(-1)
    nll = -logps[..., 1].sum() / (nll_labels != IGNORE).sum()
    return nll + beta * odds_ratio(a[:pairs], a[pairs:])


plain_fp32 = functools.partial(plain, upcast=True)


def plain_compiled(*args: Any, **options: Any) -> Tensor:
    """`plain_fp32` under torch.compile, which fuses upcast, soft-cap and log-softmax, again for every new shape."""
    return _compiled_plain()(*args, upcast=True, **options)


@functools.cache
def _compiled_plain() -> Callable[..., Tensor]:
    return torch.compile(plain, dynamic=False)


# ---------------------------------------------------------------------------------------------------------------------
# The losses that ship as ORPO: Liger, TRL and Unsloth
# ---------------------------------------------------------------------------------------------------------------------


def liger(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    nll_labels: Tensor,
    beta: float,
    bias: Tensor | None = None,
    *,
    compiled: bool = False,
) -> Tensor:
    """`liger_kernel.chunked_loss.LigerFusedLinearORPOLoss`, one pair per chunk (its default, and all it gets right).

    An empty response is NaN; dW accumulates in the weight's dtype. Compiled is its default: the first call takes half a
    minute, and again for a new batch size.
    """
    # `nll_target` must be as long as `target`, chosen half first: the normaliser counts the first half of *its* rows,
    # so the chosen rows alone would be divided by half of their tokens, silently. The rejected half is never read.
    nll_target = torch.cat([nll_labels, torch.full_like(nll_labels, IGNORE)])
    # It marks the length of `target` as dynamic, on the tensor that it is given: that must not be everybody's.
    return _liger(beta, compiled)(weight, hidden, labels.view_as(labels), bias=bias, nll_target=nll_target)[0]


liger_compiled = functools.partial(liger, compiled=True)


@functools.cache
def _liger(beta: float, compiled: bool) -> Callable[..., Any]:
    from liger_kernel.chunked_loss import LigerFusedLinearORPOLoss

    return LigerFusedLinearORPOLoss(ignore_index=IGNORE, beta=beta, compiled=compiled)


def trl_trainer(
    hidden: Tensor, weight: Tensor, labels: Tensor, nll_labels: Tensor, beta: float, bias: Tensor | None = None
) -> Tensor:
    """`trl.experimental.orpo.ORPOTrainer`: its own `concatenated_forward` and `odds_ratio_loss` around our logits.

    TRL takes unshifted labels, projects the last position too, and drops it again. So the labels get one position more
    in front, the hidden states one behind, and the model returns the logits of the whole. TRL reads the NLL targets
    from the ids under the attention mask, the odds-ratio targets from the labels: so both can be given. In bf16 its
    token sums are bf16.
    """
    trainer = _trl_trainer(beta)
    pairs = nll_labels.shape[0]
    unshifted = F.pad(labels, (1, 0), value=IGNORE)
    ids = F.pad(nll_labels, (1, 0), value=IGNORE)
    chosen = {"input_ids": ids.clamp(min=0), "attention_mask": (ids != IGNORE).long(), "labels": unshifted[:pairs]}
    rejected = {**chosen, "labels": unshifted[pairs:]}
    sides = {"chosen": chosen, "rejected": rejected}
    batch = {f"{side}_{name}": tensor for side, tensors in sides.items() for name, tensor in tensors.items()}

    def model(input_ids: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=F.linear(F.pad(hidden, (0, 0, 0, 1)), weight, bias))

    trainer.accelerator.device = hidden.device
    chosen_logps, rejected_logps, _, _, nll = trainer.concatenated_forward(model, batch)
    return nll - trainer.odds_ratio_loss(chosen_logps, rejected_logps)[0].mean()


@functools.cache
def _trl_trainer(beta: float) -> Any:
    """As much of an ORPOTrainer as its loss reads, bound to the real methods."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.orpo import ORPOTrainer

    class LossOnly:
        is_encoder_decoder, aux_loss_enabled, padding_value = False, False, 0
        concatenated_inputs = staticmethod(ORPOTrainer.concatenated_inputs)
        get_batch_logps = staticmethod(ORPOTrainer.get_batch_logps)
        concatenated_forward = ORPOTrainer.concatenated_forward
        odds_ratio_loss = ORPOTrainer.odds_ratio_loss

        def __init__(self) -> None:
            self.beta, self.accelerator = beta, SimpleNamespace(device=torch.device("cpu"))

    return LossOnly()


def unsloth(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    nll_labels: Tensor,
    beta: float,
    bias: Tensor | None = None,
    logit_softcap: float | None = None,
) -> Tensor:
    """Unsloth's head, called as its ORPO trainer does: every row once, and the NLL's again if any target differs.

    Its metric of logits is left out. A frozen head's gradient is made in the forward pass (2 GEMMs), a trained one's
    logits again in the backward pass.
    """
    pairs = nll_labels.shape[0]
    nll_targets = torch.cat([nll_labels, torch.full_like(nll_labels, IGNORE)])
    scored, nll_rows = labels != IGNORE, nll_targets != IGNORE
    differ = bool((scored & nll_rows & (labels != nll_targets)).any())

    def token_logps(hidden: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        return _unsloth_head().fused_linear_logprobs(
            hidden, weight, targets, bias=bias, mask=mask, logit_softcapping=logit_softcap or 0.0
        )

    logps = token_logps(
        hidden, torch.where(scored, labels, nll_targets.clamp(min=0)), scored if differ else scored | nll_rows
    )
    nll_rows = nll_rows[:pairs]
    nll_logps = token_logps(hidden[:pairs], nll_labels.clamp(min=0), nll_rows) if differ else logps[:pairs]
    a = torch.where(scored, logps, 0.0).sum(-1) / scored.sum(-1)
    nll = -torch.where(nll_rows, nll_logps, 0.0).sum() / nll_rows.sum()
    return nll + beta * odds_ratio(a[:pairs], a[pairs:])


@functools.cache
def _unsloth_head() -> Any:
    """`unsloth_zoo.fused_losses.fused_linear`, from its file: importing the package patches torch for everybody."""
    package: Any = importlib.util.find_spec("unsloth_zoo")
    file = Path(package.submodule_search_locations[0], "fused_losses", "fused_linear.py")
    spec: Any = importlib.util.spec_from_file_location("unsloth_fused_linear", file)
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # The bytes of a chunk of logits: at most half of what is free, which it asks the package for; so its own limit.
    module._budget_bytes = lambda device: int(module._CHUNK_GB * 2**30)
    return module


# ---------------------------------------------------------------------------------------------------------------------
# Token log-probability kernels, with ORPO composed on top of the rows that matter: what a good engineer writes today
# ---------------------------------------------------------------------------------------------------------------------


class ValidRows(NamedTuple):
    """The positions with a target; a position whose two labels differ is two rows."""

    position: Tensor  # (R,) int64, index into hidden.flatten(0, 1)
    target: Tensor  # (R,) int64
    sequence: Tensor  # (R,) int64
    scored: Tensor  # (R,) bool, in the odds ratio
    nll: Tensor  # (R,) bool, in the NLL


def valid_rows(labels: Tensor, nll_labels: Tensor) -> ValidRows:
    """Labels (2B, T) and NLL labels (B, T) as rows: those of the odds ratio first, then those of the NLL alone."""
    nll = torch.cat([nll_labels, torch.full_like(nll_labels, IGNORE)]).flatten()
    labels, length = labels.flatten(), labels.shape[1]
    odds = (labels != IGNORE).nonzero().squeeze(1)
    alone = ((nll != IGNORE) & (nll != labels)).nonzero().squeeze(1)
    position = torch.cat([odds, alone])
    target = torch.cat([labels[odds], nll[alone]])
    scored = torch.arange(len(position), device=labels.device) < len(odds)
    return ValidRows(position, target, position // length, scored, nll[position] == target)


@dataclass(frozen=True)
class Composed:
    """ORPO on top of a function that gives the log-probabilities of rows: only the rows that matter are projected."""

    token_logps: Callable[..., Tensor]  # (R, H), (V, H), (V) or None, (R), options -> (R)
    odds_ratio: Callable[[Tensor, Tensor], Tensor] = odds_ratio  # mean log-probabilities (B), (B) -> 0-d

    def __call__(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        nll_labels: Tensor,
        beta: float,
        *args: Any,
        **options: Any,
    ) -> Tensor:
        return self.from_rows(hidden, weight, valid_rows(labels, nll_labels), len(nll_labels), beta, *args, **options)

    def from_rows(
        self,
        hidden: Tensor,
        weight: Tensor,
        rows: ValidRows,
        pairs: int,
        beta: float,
        bias: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """The same once the rows are known, which is where reading the labels ends; `options` are `token_logps`'s."""
        logps = self.token_logps(hidden.flatten(0, 1)[rows.position], weight, bias, rows.target, **options)
        sums = logps.new_zeros(2 * pairs).index_add(0, rows.sequence, torch.where(rows.scored, logps, 0.0))
        a = sums / logps.new_zeros(2 * pairs).index_add(0, rows.sequence, rows.scored.to(logps.dtype))
        nll = -torch.where(rows.nll, logps, 0.0).sum() / rows.nll.sum()
        return nll + beta * self.odds_ratio(a[:pairs], a[pairs:])


def _trl_odds_ratio(chosen: Tensor, rejected: Tensor) -> Tensor:
    trainer = _trl_trainer(1.0)
    trainer.accelerator.device = chosen.device  # elsewhere its rewards would wait for a copy between devices
    return -trainer.odds_ratio_loss(chosen, rejected)[0].mean()


def _trl_logps(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, logit_softcap: float | None = None
) -> Tensor:
    """It recomputes the logits in its backward pass."""
    from trl.kernels import ChunkedLogProbFunction

    return ChunkedLogProbFunction.apply(hidden, weight, bias, target, 1.0, 32768, logit_softcap, 1.0, ())[0]


def _native_logps(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
    """4 GEMMs, 3 if frozen."""
    options = torch.nn.LinearCrossEntropyOptions()
    if not hidden.is_cuda:  # its own choice, 8 rows at V = 49152 and 16-bit accumulators, takes ten times as long there
        options = torch.nn.LinearCrossEntropyOptions(
            chunking_method=None, batch_chunk_size=NATIVE_ROWS, acc_policy="accurate"
        )
    loss = F.linear_cross_entropy(hidden, weight, target, linear_bias=bias, reduction="none", options=options)
    return -loss.to(torch.promote_types(loss.dtype, torch.float32))


def _cce_logps(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, logit_softcap: float | None = None
) -> Tensor:
    """On a CPU only by torch_compile, which holds the logits; on a GPU it filters small gradients away."""
    from cut_cross_entropy import linear_cross_entropy

    if bias is not None:
        raise ValueError("cut_cross_entropy takes no lm-head bias: pass bias=None or leave this peer out.")
    impl = "cce" if hidden.is_cuda else "torch_compile"
    loss = linear_cross_entropy(hidden, weight, target, softcap=logit_softcap, reduction="none", impl=impl)
    return -loss.to(torch.promote_types(loss.dtype, torch.float32))


trl_composed = Composed(_trl_logps, _trl_odds_ratio)
torch_native = Composed(_native_logps)
cce = Composed(_cce_logps)


# ---------------------------------------------------------------------------------------------------------------------
# Ours, and the floor under everyone
# ---------------------------------------------------------------------------------------------------------------------


def ours(hidden: Tensor, weight: Tensor, labels: Tensor, nll_labels: Tensor, beta: float, **options: Any) -> Tensor:
    """`orpo_kernels.orpo_loss`, whose padded form is this signature; `options` go through (bias, schedule, ...)."""
    return orpo_loss(hidden, weight, labels, nll_labels=nll_labels, beta=beta, **options).loss


class GemmFloor:
    """The matrix products that exact gradients cannot do without, over `rows` rows and nothing else.

    forward: the logits. backward: dh and, if the weight requires grad, dW, into buffers that already exist. In the
    dtype of the hidden states, or in fp32 on a processor that would emulate it.
    """

    def __init__(self, rows: int, hidden: Tensor, weight: Tensor) -> None:
        dtype = hidden.dtype
        if not hidden.is_cuda and not has_bf16_gemm():
            dtype = torch.promote_types(dtype, torch.float32)
        flat, self.head = hidden.detach().flatten(0, 1).to(dtype), weight.detach().to(dtype)
        self.h = flat[torch.arange(rows, device=flat.device) % len(flat)].contiguous()
        self.logits, self.dh = self.h.new_empty(rows, len(self.head)), torch.empty_like(self.h)
        self.dw = torch.empty_like(self.head) if weight.requires_grad else None

    def forward(self) -> None:
        torch.mm(self.h, self.head.t(), out=self.logits)

    def backward(self) -> None:
        torch.mm(self.logits, self.head, out=self.dh)
        if self.dw is not None:
            torch.mm(self.logits.t(), self.h, out=self.dw)


# ---------------------------------------------------------------------------------------------------------------------
# The registry
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peer:
    """One peer: its loss in the common signature, and what it can."""

    name: str
    loss: Callable[..., Tensor]
    package: str = "torch"
    compiled: bool = False  # the first call of every new shape pays for torch.compile
    bias: bool = True
    softcap: bool = False
    opaque: bool = False  # one operation to torch: what it holds and multiplies inside cannot be counted
    slow: bool = False  # several times as slow as the others on a CPU: it gets fewer rounds

    def __call__(self, *args: Any, **options: Any) -> Tensor:
        return self.loss(*args, **options)

    @property
    def available(self) -> bool:
        if self.name == "torch native":
            return hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions")
        return importlib.util.find_spec(self.package) is not None


PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("plain", plain, softcap=True),
        Peer("plain fp32", plain_fp32, softcap=True),
        Peer("plain compiled", plain_compiled, compiled=True, softcap=True),
        Peer("Liger", liger, "liger_kernel"),
        Peer("Liger compiled", liger_compiled, "liger_kernel", compiled=True),
        Peer("TRL trainer", trl_trainer, "trl", slow=True),
        Peer("Unsloth", unsloth, "unsloth_zoo", opaque=True, softcap=True),
        Peer("TRL-composed", trl_composed, "trl", softcap=True),
        Peer("torch native", torch_native, opaque=True),
        Peer("CCE", cce, "cut_cross_entropy", compiled=True, bias=False, softcap=True),
    )
}
