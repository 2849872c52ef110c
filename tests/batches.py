"""Random batches, the same batch at any dtype, and how far a result is from the float64 oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from orpo_kernels import ORPOOutput, Rows
from orpo_kernels.engine.objective import count_rows
from orpo_kernels.rows import DTYPES

IGNORE = -100
PLAIN_OPTIONS: dict[str, Any] = {
    "alpha": 1.0,
    "beta": 0.1,
    "nll_reduction": "token",
    "shift": False,
    "logit_scale": 1.0,
    "logit_softcap": None,
}  # of `plain_loss`


@dataclass(frozen=True)
class Batch:
    """float64 tensors of a padded batch, and the options of the loss."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    bias: Tensor | None = None
    nll_labels: Tensor | None = None
    pair_weight: Tensor | None = None
    train_hidden: bool = True
    train_weight: bool = True
    train_bias: bool = True
    options: dict[str, Any] = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> Batch:
        """The same numbers as `dtype` holds them: the oracle in float64 must see the rounded inputs too."""
        cast = {name: None if t is None else t.to(dtype) for name, t in self.floats().items()}
        return replace(self, **cast)

    def floats(self) -> dict[str, Tensor | None]:
        return {"hidden": self.hidden, "weight": self.weight, "bias": self.bias}

    def run(self, loss: Callable[..., ORPOOutput], **options: Any) -> tuple[ORPOOutput, dict[str, Tensor]]:
        """The outputs, and the gradients of what is trained."""
        trained = {"hidden": self.train_hidden, "weight": self.train_weight, "bias": self.train_bias}
        leaves = {
            name: None if t is None else t.detach().clone().requires_grad_(trained[name])
            for name, t in self.floats().items()
        }
        out = loss(
            leaves["hidden"],
            leaves["weight"],
            self.labels,
            bias=leaves["bias"],
            nll_labels=self.nll_labels,
            pair_weight=self.pair_weight,
            **self.options,
            **options,
        )
        if out.loss.requires_grad:
            out.loss.backward()
        grads = {name: leaf.grad for name, leaf in leaves.items() if leaf is not None and leaf.grad is not None}
        return out, grads


def random_weights(generator: torch.Generator, pairs: int) -> Tensor:
    """(B,) weights of pairs in [0, 2), about a third of them 0."""
    weights = 2 * torch.rand(pairs, generator=generator, dtype=torch.float64)
    return weights * (torch.rand(pairs, generator=generator) < 0.7)


def random_labels(generator: torch.Generator, shape: tuple[int, int], vocab: int, keep: float) -> Tensor:
    labels = torch.randint(vocab, shape, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < keep, labels, IGNORE)


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Ragged batches of every kind: holes, empty sequences, odd vocabularies, weighted pairs, every model's options."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    pairs, length = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    size, vocab = draw(st.integers(1, 17)), draw(st.integers(2, 71))
    spread = draw(st.sampled_from([0.3, 1.0, 4.0]))
    keep = draw(st.sampled_from([0.15, 0.5, 1.0]))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    options: dict[str, Any] = {
        "beta": draw(st.sampled_from([0.0, 0.1, 1.0])),
        "alpha": draw(st.sampled_from([0.0, 1.0])),
        "nll_reduction": draw(st.sampled_from(["token", "sequence"])),
        "shift": draw(st.booleans()),
        "logit_scale": draw(st.sampled_from([1.0, 0.25, 1.7])),
        "logit_softcap": draw(st.sampled_from([None, 5.0])),
    }
    train_hidden, train_weight = draw(st.sampled_from([(True, True), (True, False), (False, True)]))
    return Batch(
        hidden=normal(2 * pairs, length, size) * spread,
        weight=normal(vocab, size) / size**0.5,
        labels=random_labels(generator, (2 * pairs, length), vocab, keep),
        bias=normal(vocab) if draw(st.booleans()) else None,
        nll_labels=random_labels(generator, (pairs, length), vocab, 0.7) if draw(st.booleans()) else None,
        pair_weight=random_weights(generator, pairs) if draw(st.booleans()) else None,
        train_hidden=train_hidden,
        train_weight=train_weight,
        train_bias=train_weight or draw(st.booleans()),
        options=options,
    )


def plain_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None,
    nll_labels: Tensor | None,
    pair_weight: Tensor | None = None,
    beta: float,
    alpha: float,
    nll_reduction: str,
    shift: bool,
    logit_scale: float,
    logit_softcap: float | None,
) -> ORPOOutput:
    """What people write: whole logits in the model's dtype, log_softmax in fp32. The measure of acceptable error."""
    pairs = labels.shape[0] // 2
    nll_labels = labels[:pairs] if nll_labels is None else nll_labels
    logits = logit_scale * F.linear(hidden, weight, bias)
    if logit_softcap is not None:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    log_probs = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
    if shift:
        log_probs, labels, nll_labels = log_probs[:, :-1], labels[:, 1:], nll_labels[:, 1:]

    def pick(log_probs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        mask = labels != IGNORE
        logps = log_probs.gather(-1, torch.where(mask, labels, 0)[..., None]).squeeze(-1)
        return torch.where(mask, logps, 0), mask

    weights = log_probs.new_ones(pairs) if pair_weight is None else pair_weight.to(log_probs.dtype)
    logps, scored = pick(log_probs, labels)
    nll_logps, wanted = pick(log_probs[:pairs], nll_labels)
    if nll_reduction == "sequence":
        nll_logps, wanted = nll_logps / wanted.sum(1, keepdim=True).clamp(min=1), wanted.any(1)
    nll_loss = -(weights[:, None] * nll_logps).sum() / wanted.sum().clamp(min=1)
    means = logps.sum(1) / scored.sum(1).clamp(min=1)
    valid = scored.any(1).view(2, -1).all(0)
    a = torch.where(valid.repeat(2), means, -1.0)
    odds = a - torch.log1p(-torch.exp(a))
    log_odds = odds[:pairs] - odds[pairs:]
    or_loss = -(weights * F.logsigmoid(log_odds) * valid).sum() / valid.sum().clamp(min=1)
    loss = alpha * nll_loss + beta * or_loss
    chosen, rejected = means[:pairs], means[pairs:]
    rewards = beta * chosen, beta * rejected, chosen > rejected
    return ORPOOutput(loss, nll_loss, or_loss, chosen, rejected, log_odds, valid, *rewards)


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Frobenius norm of the difference over that of the truth."""
    norm = truth.double().norm().item()
    return (value.double() - truth.double()).norm().item() / norm if norm else float(value.double().norm())


def answer_logps(out: ORPOOutput) -> Tensor:
    """(2B,) those of all answers: a vector, in which errors do not cancel as they may in the loss."""
    return torch.cat((out.chosen_logps, out.rejected_logps)).detach()


def random_rows(
    generator: torch.Generator, num_positions: int, vocab: int, pairs: int, num_rows: int, weighted: bool = False
) -> Rows:
    """Rows in any order, positions repeated, sequences empty, NLL on chosen rows only; `weighted` pairs or not."""

    def integers(high: int) -> Tensor:
        return torch.randint(high, (num_rows,), generator=generator)

    sequence = integers(2 * pairs)
    weight = torch.rand(num_rows, generator=generator, dtype=torch.float64) * (
        torch.rand(num_rows, generator=generator) < 0.6
    )
    return Rows(
        position=integers(num_positions),
        target=integers(vocab),
        sequence=sequence,
        scored=torch.rand(num_rows, generator=generator) < 0.7,
        nll_weight=weight * (sequence < pairs),
        num_pairs=pairs,
        pair_weight=random_weights(generator, pairs) if weighted else None,
    )


@st.composite
def labelled(draw: st.DrawFn) -> tuple[Tensor, Tensor | None, int]:
    """Labels (2B, T) that lie in any order, those of the NLL (B, T) or None, and ignore_index."""
    pairs, length = draw(st.integers(0, 3)), draw(st.integers(0, 6))
    ignore_index = draw(st.sampled_from([-100, 0, 3]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))

    def labels(rows: int) -> Tensor:
        values = torch.randint(0, 4, (rows, length), generator=generator)
        return values.masked_fill(torch.rand(rows, length, generator=generator) < 0.5, ignore_index)

    own = labels(2 * pairs)
    own = own.t().contiguous().t() if draw(st.booleans()) else own
    return own, labels(pairs) if draw(st.booleans()) else None, ignore_index


def assert_same_rows(ours: Rows, mirror: Rows) -> None:
    """Bit for bit, and in the same order."""
    assert ours.num_pairs == mirror.num_pairs
    assert ours.padded is mirror.padded is False
    for name in DTYPES:
        a, b = getattr(ours, name), getattr(mirror, name)
        assert a.dtype == b.dtype
        assert torch.equal(a, b), name


def assert_known(rows: Rows) -> None:
    """What the rows' maker says of them is so."""
    plain, known = replace(rows), rows.known
    if known.counts is not None:
        torch.testing.assert_close(known.counts, count_rows(plain), rtol=1e-14, atol=0)
    if known.offsets is not None:
        sizes = torch.bincount(rows.sequence, minlength=2 * rows.num_pairs)
        assert known.offsets.diff().tolist() == sizes.tolist()
        assert torch.equal(rows.sequence, rows.sequence.sort().values)
    if known.unique_positions:
        assert len(set(rows.position.tolist())) == len(rows)
