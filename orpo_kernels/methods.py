"""Preference-tuning methods as functions of the answers' log-probabilities: ORPO, SFT, DPO, SimPO and CPO.

With log p(y) = sum_t log p(y_t | x, y_<t) the log-probability of an answer, |y| its tokens, y+ the chosen and y- the
rejected answer, s = sigmoid, every one of them is

    loss = alpha * NLL(y+) + the mean over pairs of `pair_losses`

    method   alpha   pair loss                                                                   answers of the NLL
    sft      1       none                                                                        y+
    orpo     1       -beta log s(zeta(y+) - zeta(y-)),  zeta the log-odds of log p(y) / |y|      x and y+ (TRL)
    dpo      0       -log s(beta (log p(y+) / p_ref(y+) - log p(y-) / p_ref(y-)))                y+
    simpo    0       -log s(beta (log p(y+) / |y+| - log p(y-) / |y-|) - gamma)                  y+
    cpo      1       -log s(beta (log p(y+) - log p(y-)))                                        y+

`preference_loss_from_rows` runs a method on hidden states, `orpo_kernels.transformers.causal_lm_preference_loss` on a
model, and `orpo_kernels.transformers.trainer.PreferenceTrainer` in training. `method_named` finds one by its name.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .engine.objective import LARGEST_LOGP, Denominators, PairLoss, odds_ratio_loss, reciprocal, segment_sum
from .parallel import Group, summed
from .rows import Rows


class Answers(NamedTuple):
    """The answers of B pairs, the chosen ones first."""

    logps: Tensor  # (2B,) float64, log p(y) in nats, summed over the answer's tokens; 0 for an empty answer
    tokens: Tensor  # (2B,) float64, |y|

    @classmethod
    def of(cls, logps: Tensor, rows: Rows) -> Answers:
        """The sums over the scored rows, which have the log-probabilities (R,)."""
        tokens = segment_sum(rows.scored.double(), rows)
        return cls(segment_sum(torch.where(rows.scored, logps, 0), rows), tokens)

    @property
    def mean_logps(self) -> Tensor:
        """(2B,) float64, log p(y) / |y|."""
        return self.logps / self.tokens.clamp(min=1)

    @property
    def valid_pairs(self) -> Tensor:
        """(B,) bool: neither answer is empty."""
        return (self.tokens.view(2, -1) > 0).all(0)

    @property
    def log_odds(self) -> Tensor:
        """(B,) float64: zeta(y+) - zeta(y-); 0 for a pair that is not valid."""
        return _margins(zeta(torch.where(self.valid_pairs.repeat(2), self.mean_logps, -1.0)))


def zeta(mean_logps: Tensor) -> Tensor:
    """log p / (1 - p) of length-averaged log-probabilities, in float64. A p that rounds to 1 even there is bounded."""
    a = mean_logps.double().clamp(max=LARGEST_LOGP)
    return a - torch.log(-torch.expm1(a))


@dataclass(frozen=True)
class Method:
    """What all methods have in common.

    Attributes:
        beta: the strength of the preference; the paper's lambda for ORPO.
        alpha: the weight of the NLL of the chosen sequence.
        prompt_nll: whether that NLL covers the prompt as well.
        nll_reduction: "token", the mean over all its tokens, or "sequence", the mean over each sequence first.
        length_averaged: whether the method looks at log p(y) / |y| instead of log p(y). Logged log-probabilities and
            rewards are of that kind.
        needs_reference: whether it compares with a reference model.
        is_preference: whether it looks at the rejected answer at all.
        numbers: the names of the options that its loss is computed with.
    """

    beta: float = 0.1
    alpha: float = 0.0
    prompt_nll: bool = False
    nll_reduction: str = "token"

    name: ClassVar[str]
    length_averaged: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False
    is_preference: ClassVar[bool] = True
    numbers: ClassVar[tuple[str, ...]] = ("beta", "alpha")

    @property
    def forward_passes(self) -> int:
        """Sequences that run forward for each pair that is trained on, the reference's included."""
        return (2 if self.is_preference else 1) + (2 if self.needs_reference else 0)

    def scores(self, answers: Answers) -> Tensor:
        """(2B,) the log-probabilities that the method looks at."""
        return answers.mean_logps if self.length_averaged else answers.logps

    def gains(self, scores: Tensor, reference: Tensor | None = None) -> Tensor:
        """(2B,) the scores, or for a method with a reference their difference to its. TRL's rewards are beta times it.

        Raises `ValueError` where a reference is needed and there is none.
        """
        if not self.needs_reference:
            return scores
        if reference is None:
            raise ValueError(
                f"{self.name.upper()} needs the reference model's log-probabilities of the answers, reference_logps "
                "(2B,), and there are none; PreferenceTrainer computes them before training."
            )
        return scores - reference

    def pair_losses(self, scores: Tensor, reference: Tensor | None = None) -> Tensor:
        """(B,) the loss of each pair, from the scores (2B,) of its answers, the chosen ones first. Differentiable."""
        raise NotImplementedError

    def pair_gradients(self, scores: Tensor, reference: Tensor | None = None) -> Tensor:
        """(2B,) the derivatives of `pair_losses` by the scores: by autograd, unless a method has them by hand.

        (By hand alone it can be inside an operator of a graph, where autograd records nothing.)
        """
        with torch.enable_grad():
            scores = scores.detach().requires_grad_()
            return torch.autograd.grad(self.pair_losses(scores, reference).sum(), scores)[0]

    def loss(
        self,
        token_log_odds: Tensor,
        rows: Rows,
        counts: Denominators,
        ops: ModuleType,
        sequence_group: Group | None = None,
        reference: Tensor | None = None,
    ) -> PairLoss:
        """The loss of `rows` from their token log-odds (R,) float64, and its gradient: O(rows) work in float64.

        ORPO has a fused form of it. The rows may be those of a few whole pairs.

        ops: the backend.
        sequence_group: its ranks hold the sequences' other rows; they all get the same loss, and as many times the
            gradient of their own rows as there are ranks.
        reference: (2B,) float64, the reference's scores, where the method needs them.
        """
        nll_weight = rows.weighted_nll()
        answers, nll = _sums(F.logsigmoid(token_log_odds), rows, nll_weight, sequence_group)
        scores = self.scores(answers)
        weight = answers.valid_pairs * reciprocal(counts.pairs)
        if rows.pair_weight is not None:
            weight = weight * rows.pair_weight
        nll_share = reciprocal(counts.nll)
        nll_loss = nll * nll_share
        pair_loss = _times(weight, self.pair_losses(scores, reference)).sum()
        totals = torch.stack((self.alpha * nll_loss + pair_loss, nll_loss, pair_loss))

        # d logp / d m = sigmoid(-m); the scores are sums or means of log-probabilities.
        slopes = _times(weight.repeat(2), self.pair_gradients(scores, reference))
        slopes = slopes / answers.tokens.clamp(min=1) if self.length_averaged else slopes
        of_logps = torch.where(rows.scored, slopes[rows.sequence], 0) - self.alpha * nll_share * nll_weight
        grad = of_logps * torch.sigmoid(-token_log_odds)
        grad = grad if sequence_group is None else grad * sequence_group.size
        return PairLoss(torch.cat((totals, scores, answers.log_odds)), answers.valid_pairs, grad)


def _sums(logps: Tensor, rows: Rows, nll_weight: Tensor, sequence_group: Group | None) -> tuple[Answers, Tensor]:
    """The answers, and the sum of the NLL, of rows with the log-probabilities (R,)."""
    columns = (torch.where(rows.scored, logps, 0), rows.scored.double(), -_times(nll_weight, logps))
    sums = torch.stack([segment_sum(column, rows) for column in columns])
    of_answers, tokens, nll = summed(sums, [sequence_group], "the sums of the sequences")
    return Answers(of_answers, tokens), nll.sum()


def _times(weight: Tensor, values: Tensor) -> Tensor:
    """weight * values, where weight 0 wins over an infinite value."""
    return torch.where(weight != 0, weight * values, 0)


@dataclass(frozen=True)
class SFT(Method):
    """Supervised fine-tuning on the chosen answers: TRL's `SFTTrainer` on prompt-completion data. No pair loss.

    Its rewards are the length-averaged log-probabilities, so that its preference accuracy compares with the others'.
    """

    beta: float = 1.0
    alpha: float = 1.0

    name: ClassVar[str] = "sft"
    length_averaged: ClassVar[bool] = True
    is_preference: ClassVar[bool] = False

    def pair_losses(self, scores: Tensor, reference: Tensor | None = None) -> Tensor:
        return torch.zeros_like(_margins(scores))

    def pair_gradients(self, scores: Tensor, reference: Tensor | None = None) -> Tensor:
        return torch.zeros_like(scores)


@dataclass(frozen=True)
class ORPO(Method):
    """Odds ratio preference optimization (arXiv 2403.07691, eq. 6 and 7): TRL's `ORPOTrainer`.

    Its loss is fused, and right for answers of any confidence; `pair_losses` is for looking at it.
    """

    alpha: float = 1.0
    prompt_nll: bool = True

    name: ClassVar[str] = "orpo"
    length_averaged: ClassVar[bool] = True

    def pair_losses(self, scores: Tensor, reference: Tensor | None = None) -> Tensor:
        return -self.beta * F.logsigmoid(_margins(zeta(scores)))

    def loss(
        self,
        token_log_odds: Tensor,
        rows: Rows,
        counts: Denominators,
        ops: ModuleType,
        sequence_group: Group | None = None,
        reference: Tensor | None = None,
    ) -> PairLoss:
        """By the kernels of the odds ratio, whose gradient is made by hand (`objective`)."""
        return odds_ratio_loss(token_log_odds, rows, self.alpha, self.beta, counts, ops, sequence_group)


class LogisticMethod(Method):
    """A method whose pair loss is -log s(logit), the logit being linear in the scores."""

    def pair_logits(self, scores: Tensor, reference: Tensor | None = None) -> Tensor:
        """(B,) beta times how far chosen is ahead of rejected."""
        return self.beta * _margins(self.gains(scores, reference))

    def pair_losses(self, scores: Tensor, reference: Tensor | None = None) -> Tensor:
        return -F.logsigmoid(self.pair_logits(scores, reference))

    def pair_gradients(self, scores: Tensor, reference: Tensor | None = None) -> Tensor:
        slope = self.beta * torch.sigmoid(-self.pair_logits(scores, reference))
        return torch.cat((-slope, slope))


@dataclass(frozen=True)
class DPO(LogisticMethod):
    """Direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290, eq. 7): TRL's `loss_type="sigmoid"`.

    With `alpha` it is DPO with the NLL of the chosen answer added (RPO, arXiv 2404.19733, with a mean over tokens).
    """

    name: ClassVar[str] = "dpo"
    needs_reference: ClassVar[bool] = True


@dataclass(frozen=True)
class SimPO(LogisticMethod):
    """Simple preference optimization (Meng, Xia, Chen 2024, arXiv 2405.14734, eq. 6): TRL's `loss_type="simpo"`.

    The defaults are the paper's for a base model: beta 2, gamma / beta = 0.5. (TRL has beta 0.1, gamma 0.5 and, unlike
    the paper, cpo_alpha 1: here `alpha`.)

    Attributes:
        gamma: the margin that the rewards are to have.
    """

    beta: float = 2.0
    gamma: float = 1.0

    name: ClassVar[str] = "simpo"
    length_averaged: ClassVar[bool] = True
    numbers: ClassVar[tuple[str, ...]] = ("beta", "alpha", "gamma")

    def pair_logits(self, scores: Tensor, reference: Tensor | None = None) -> Tensor:
        return super().pair_logits(scores) - self.gamma


@dataclass(frozen=True)
class CPO(LogisticMethod):
    """Contrastive preference optimization (Xu et al. 2024, arXiv 2401.08417, eq. 3 to 5): TRL's `CPOTrainer`."""

    alpha: float = 1.0

    name: ClassVar[str] = "cpo"


METHODS: dict[str, type[Method]] = {method.name: method for method in (SFT, ORPO, DPO, SimPO, CPO)}


def method_named(name: str, **options: Any) -> Method:
    """The method of that name, with its own defaults for options that are not given or None.

    Raises:
        ValueError: there is no such method, or it has no such option.
    """
    if name not in METHODS:
        raise ValueError(f"There is no method {name!r}; the methods are {', '.join(METHODS)}.")
    known = options_of(METHODS[name])
    options = {option: value for option, value in options.items() if value is not None}
    for option in options:
        if option not in known:
            raise ValueError(f"The method {name} has no option {option}; it has {', '.join(known)}.")
    return METHODS[name](**options)


def options_of(method: type[Method]) -> list[str]:
    """The names of a method's options."""
    return [field.name for field in fields(method)]


def all_options() -> set[str]:
    """The names of the options that any of the methods has."""
    return {name for method in METHODS.values() for name in options_of(method)}


def _margins(values: Tensor) -> Tensor:
    """(B,) chosen less rejected of (2B,)."""
    chosen, rejected = values.view(2, -1)
    return chosen - rejected
