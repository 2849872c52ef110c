"""Axolotl's `rl: orpo` without logits, by a plugin:

plugins:
  - orpo_kernels.integrations.axolotl.OrpoKernelsPlugin
rl: orpo
orpo_kernels:          # optional, as in orpo_kernels.trl.ORPOTrainer
  packing: auto
  sparse_eps: null
  end: trl
  exact_accumulation: true
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from axolotl.core.trainers.mixins import DistributedParallelMixin, RngLoaderMixin
from axolotl.core.trainers.mixins.optimizer import OptimizerInitMixin, OptimizerMixin
from axolotl.core.trainers.mixins.scheduler import SchedulerMixin
from axolotl.integrations.base import BasePlugin, PluginManager
from pydantic import BaseModel, ConfigDict

from ..trl import ORPOTrainer as FusedORPOTrainer

MODULE = __name__


class Options(BaseModel):
    """The section `orpo_kernels` of the configuration."""

    model_config = ConfigDict(extra="forbid")

    packing: Literal["auto", "padded", "shared"] = "auto"
    sparse_eps: float | None = None
    end: Literal["trl", "single"] = "trl"
    exact_accumulation: bool = True


class Arguments(BaseModel):
    """What the plugin adds to Axolotl's configuration."""

    orpo_kernels: Options | None = None


class ORPOTrainer(
    RngLoaderMixin, SchedulerMixin, OptimizerMixin, OptimizerInitMixin, DistributedParallelMixin, FusedORPOTrainer
):
    """Axolotl's ORPO trainer with the fused loss."""

    tag_names: ClassVar[list[str]] = ["axolotl", "orpo"]

    def __init__(self, *args: Any, **options: Any):
        section = getattr(PluginManager.get_instance().cfg, "orpo_kernels", None) or {}
        super().__init__(*args, **{**Options(**section).model_dump(), **options})


class OrpoKernelsPlugin(BasePlugin):
    """Sets `trainer_cls`. (By `get_trainer_cls`, Axolotl would make the trainer without its model.)"""

    def register(self, cfg: dict) -> None:
        if cfg.get("rl") == "orpo" and not cfg.get("trainer_cls"):
            cfg["trainer_cls"] = f"{MODULE}.{ORPOTrainer.__name__}"

    def get_input_args(self) -> str:
        return f"{MODULE}.{Arguments.__name__}"
