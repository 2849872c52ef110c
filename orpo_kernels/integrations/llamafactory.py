"""LLaMA-Factory's `stage: dpo` with `pref_loss: orpo` or `simpo`, without logits.

    python -m orpo_kernels.integrations.llamafactory config.yaml
    torchrun --nproc-per-node 4 -m orpo_kernels.integrations.llamafactory config.yaml

in place of `llamafactory-cli train config.yaml`. Every other stage and pref_loss is LLaMA-Factory's own. A section
`orpo_kernels` of the file may set packing, sparse_eps and exact_accumulation, as in `orpo_kernels.trl.ORPOTrainer`.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from llamafactory.hparams.parser import read_args
from llamafactory.train.dpo import trainer as stock
from llamafactory.train.tuner import run_exp

from ..methods import ORPO, Method, SimPO
from ..transformers.causal_lm import CausalLMOutput
from .collated import OPTIONS, CollatedPairsMixin

SECTION = "orpo_kernels"
SERVED = ("orpo", "simpo")


class PreferenceTrainer(CollatedPairsMixin, stock.CustomDPOTrainer):
    """LLaMA-Factory's trainer for preference pairs with the fused loss.

    The NLL is that of LLaMA-Factory: of the answers alone, a mean over tokens and then over answers.
    """

    def __init__(self, *args: Any, finetuning_args: Any, **options: Any):
        own = {name: options.pop(name) for name in OPTIONS if name in options}
        super().__init__(*args, finetuning_args=finetuning_args, **options)
        self.serve(method_of(finetuning_args), padding_id=self.processing_class.pad_token_id, **own)

    def batch_metrics(self, out: CausalLMOutput) -> dict[str, float]:
        values = {
            "rewards/chosen": out.chosen_rewards,
            "rewards/rejected": out.rejected_rewards,
            "rewards/accuracies": out.preferred,
            "rewards/margins": out.chosen_rewards - out.rejected_rewards,
            "logps/chosen": out.chosen_logps,
            "logps/rejected": out.rejected_logps,
        }
        if self.method.name == "orpo":
            values |= {"sft_loss": -out.chosen_logps, "odds_ratio_loss": -F.logsigmoid(out.log_odds)}
        return {name: value.detach().float().mean().item() for name, value in values.items()}


def method_of(finetuning_args: Any) -> Method:
    """The method by LLaMA-Factory's settings. Raises `ValueError` for those that the loss has not."""
    if finetuning_args.ld_alpha is not None:
        raise ValueError(f"ld_alpha is {finetuning_args.ld_alpha}, which the fused loss does not have; leave it out.")
    nll: dict[str, Any] = {"prompt_nll": False, "nll_reduction": "sequence"}
    if finetuning_args.pref_loss == "orpo":
        return ORPO(beta=finetuning_args.pref_beta, alpha=1.0 + finetuning_args.pref_ftx, **nll)
    gamma = finetuning_args.simpo_gamma
    return SimPO(beta=finetuning_args.pref_beta, gamma=gamma, alpha=finetuning_args.pref_ftx, **nll)


def install(**own: Any) -> None:
    """Put the trainer where LLaMA-Factory finds its own, with these options, for the methods that are served."""
    if unknown := sorted(own.keys() - set(OPTIONS)):
        raise ValueError(f"{SECTION} has {', '.join(unknown)}; it may have {', '.join(OPTIONS)}.")
    theirs = stock.CustomDPOTrainer

    def trainer_of(*args: Any, finetuning_args: Any, **options: Any) -> Any:
        if finetuning_args.pref_loss in SERVED:
            return PreferenceTrainer(*args, finetuning_args=finetuning_args, **options, **own)
        return theirs(*args, finetuning_args=finetuning_args, **options)

    stock.CustomDPOTrainer = trainer_of  # run_dpo imports it by name when it is called


def main() -> None:
    args = read_args()
    install(**(args.pop(SECTION, None) or {}) if isinstance(args, dict) else {})
    run_exp(args)


if __name__ == "__main__":
    main()
