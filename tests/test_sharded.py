"""Models whose parameters an engine shards, on two processes, against one process with the whole batch."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

pytest.importorskip("transformers")
if not dist.is_available():
    pytest.skip("torch.distributed is not in this build of torch", allow_module_level=True)

from orpo_kernels.transformers import PreferenceCollator, causal_lm_orpo_loss
from orpo_kernels.transformers.engines import run_inside

from .batches import relative_error
from .ranks import Ranks, topology
from .training import chat_examples, tiny, tokenizer

# Which modules of a model are sharded by themselves; the rest belongs to the root.
LAYOUTS = {
    "root alone": lambda model: [],
    "layers": lambda model: [*model.model.layers],
    "layers and head": lambda model: [*model.model.layers, model.lm_head],
    "Accelerate": lambda model: [*model.model.layers, model.model.embed_tokens, [model.model.norm, model.lm_head]],
}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(2) as pool:
        yield pool


def sharded(model: nn.Module, layout: str, **options: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for module in LAYOUTS[layout](base):
        fully_shard(module, **options)
    return fully_shard(model, **options)


def batch_of(pairs: slice, packing: str = "padded") -> dict[str, Any]:
    return PreferenceCollator(tokenizer(), max_length=96, packing=packing)(chat_examples()[pairs])


def mine() -> slice:
    """Three pairs, one on the first rank and two on the second."""
    return (slice(0, 1), slice(1, 3))[dist.get_rank()]


def step(model: nn.Module, packing: str) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of this rank, and the gradients of the whole batch that the engine made of everyone's."""
    out = causal_lm_orpo_loss(model, **batch_of(mine(), packing), data_group=topology().world)
    out.loss.backward()
    grads = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return out.loss.detach(), grads


def with_fsdp(
    layout: str, packing: str = "padded", tied: bool = False, lora: bool = False, mixed: bool = False
) -> list[tuple[Tensor, dict[str, Tensor]]]:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)} if mixed else {}
    model = sharded(built(tied, lora), layout, **policy)
    return [step(model, packing) for _ in range(2)]  # the second call finds the model as the first has left it


def built(tied: bool, lora: bool) -> nn.Module:
    model = tiny(tie_word_embeddings=tied)
    if not lora:
        return model
    import peft

    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)


@functools.cache
def alone(tied: bool = False, lora: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    model = built(tied, lora)
    out = causal_lm_orpo_loss(model, **batch_of(slice(0, 3)))
    out.loss.backward()
    return out.loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check(results: list, truth: tuple[Tensor, dict[str, Tensor]], tolerance: float = 1e-5) -> None:
    loss, grads = truth
    for call in range(2):
        losses = torch.stack([steps[call][0] for steps in results])
        assert abs(float(losses.mean() - loss)) <= 1e-6 * abs(float(loss)) * tolerance / 1e-5
        for steps in results:
            assert steps[call][1].keys() == grads.keys()
            for name, grad in grads.items():
                assert relative_error(steps[call][1][name], grad) <= tolerance, (name, call)


@pytest.mark.parametrize("packing", ["padded", "shared"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fsdp2(ranks, layout, packing):
    check(ranks.run(with_fsdp, layout, packing), alone())


@pytest.mark.parametrize("layout", ["root alone", "layers"])
def test_fsdp2_with_tied_embeddings(ranks, layout):
    check(ranks.run(with_fsdp, layout, "padded", True), alone(tied=True))


@pytest.mark.parametrize("layout", ["layers", "Accelerate"])
def test_fsdp2_in_bf16(ranks, layout):
    """A mixed precision policy: the engine's casts, our loss in what it gathers."""
    check(ranks.run(with_fsdp, layout, "padded", False, False, True), alone(), tolerance=5e-2)


def test_fsdp2_with_lora_on_a_frozen_sharded_base(ranks):
    """Adapters in the layers and on the head, which is a unit of its own."""
    pytest.importorskip("peft")
    check(ranks.run(with_fsdp, "layers and head", "padded", False, True), alone(lora=True))


def with_zero3(packing: str, tied: bool, lora: bool) -> list[tuple[Tensor, dict[str, Tensor]]]:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    deepspeed.init_distributed(dist_backend="gloo")
    model = built(tied, lora)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,  # so that backward leaves the gradients where they are
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    def loss_of(**batch: Any) -> Any:
        return causal_lm_orpo_loss(engine.module, **batch, data_group=topology().world)

    steps = []
    for _ in range(2):
        assert all(parameter.numel() == 0 for parameter in model.parameters())  # in parts, on all ranks
        out = run_inside(engine, engine.module, loss_of, batch_of(mine(), packing))
        engine.backward(out.loss, scale_wrt_gas=False)
        trained = {name: weight for name, weight in engine.module.named_parameters() if weight.requires_grad}
        steps.append(
            (out.loss.detach(), {name: safe_get_full_grad(weight).clone() for name, weight in trained.items()})
        )
        engine.optimizer.zero_grad()
    return steps


@pytest.mark.slow
@pytest.mark.parametrize(
    ("packing", "tied", "lora"),
    [("padded", False, False), ("shared", False, False), ("padded", True, False), ("padded", False, True)],
    ids=["", "shared", "tied", "lora"],
)
def test_zero3(ranks, packing, tied, lora):
    """DeepSpeed's ZeRO-3, where the package is installed; adapters in the layers and on the head."""
    pytest.importorskip("deepspeed")
    check(ranks.run(with_zero3, packing, tied, lora), alone(tied=tied, lora=lora))
