"""What every loss here returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class PreferenceOutput(NamedTuple):
    """A loss and its metrics. Only `loss` is differentiable. fp32, float64 for float64 inputs.

    Attributes:
        loss: 0-d, alpha * nll_loss + pair_loss, for ORPO alpha * nll_loss + beta * pair_loss.
        nll_loss: 0-d, nats; 0 where there is no NLL row. With weights of the pairs, weighted: a part of `loss`.
        pair_loss: 0-d, the mean of the method's pair losses over the valid pairs, for ORPO that of
            -logsigmoid(log_odds); 0 where there is none. Weighted likewise.
        chosen_logps: (B,) log-probability of the chosen answer in nats: per token if the method is length-averaged, as
            ORPO is, else of the whole answer; 0 if it is empty.
        rejected_logps: (B,) the same of the rejected answer.
        log_odds: (B,) log odds ratio of chosen over rejected, of length-averaged log-probabilities for every method; 0
            for a pair that is not valid.
        valid_pairs: (B,) bool, False for a pair with an empty answer, which has no pair loss.
        chosen_rewards: (B,) beta times chosen_logps, for DPO beta times its difference to the reference's.
        rejected_rewards: (B,) the same of the rejected answer.
        preferred: (B,) bool, whether chosen_rewards is above rejected_rewards; with beta 0, whether it would be.

    What is of a pair, (B,), is as it is without weights.
    """

    loss: Tensor
    nll_loss: Tensor
    pair_loss: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    log_odds: Tensor
    valid_pairs: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    preferred: Tensor

    @property
    def or_loss(self) -> Tensor:
        """ORPO's name of `pair_loss`."""
        return self.pair_loss


ORPOOutput = PreferenceOutput  # the name it had where the method was ORPO
