"""ms-swift's `--rlhf_type orpo` without logits: a file for `--external_plugins`.

    swift rlhf --rlhf_type orpo --external_plugins $(python -m orpo_kernels.integrations.ms_swift) ...

For options of the loss, give a file of your own that calls `install(packing=..., sparse_eps=..., ...)`.
"""

from __future__ import annotations

from typing import Any

from orpo_kernels.integrations.collated import OPTIONS, CollatedPairsMixin
from orpo_kernels.methods import ORPO
from orpo_kernels.transformers.causal_lm import CausalLMOutput
from orpo_kernels.transformers.metrics import PAIR_METRICS, pair_metrics

TRAINER = "orpo_kernels.integrations.ms_swift.ORPOTrainer"

_options: dict[str, Any] = {}


def install(**options: Any) -> None:
    """Make ms-swift train ORPO by the fused loss.

    Args:
        options: packing, sparse_eps and exact_accumulation, as in `orpo_kernels.trl.ORPOTrainer`.
    """
    from swift.trainers import TrainerFactory

    if unknown := sorted(options.keys() - set(OPTIONS)):
        raise ValueError(f"ms-swift's ORPO has no option {', '.join(unknown)} here; it has {', '.join(OPTIONS)}.")
    _options.update(options)
    TrainerFactory.TRAINER_MAPPING["orpo"] = TRAINER


def __getattr__(name: str) -> Any:
    """The trainer is made when ms-swift asks for it: to print the path of this file, ms-swift is not needed."""
    if name != "ORPOTrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = trainer_class()
    return globals()[name]


def trainer_class() -> type:
    from swift.rlhf_trainers import ORPOTrainer as Stock

    class ORPOTrainer(CollatedPairsMixin, Stock):
        """ms-swift's trainer with the fused loss. The NLL is that of ms-swift: of the answers alone."""

        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **options)
            self.serve(ORPO(beta=self.beta, prompt_nll=False), padding_id=self.padding_value or 0, **_options)

        def batch_metrics(self, out: CausalLMOutput) -> dict[str, float]:
            values = self.accelerator.gather_for_metrics(pair_metrics(out)).nanmean(0).tolist()
            nll = self.accelerator.gather_for_metrics(out.nll_loss.detach()).mean().item()
            return dict(zip(PAIR_METRICS, values, strict=True)) | {"nll_loss": nll}

    return ORPOTrainer


if __name__ == "__main__":
    print(__file__)
elif __name__.startswith("_swift_external"):  # run by --external_plugins
    from orpo_kernels.integrations.ms_swift import install as install_once

    install_once()
