"""`orpo-kernels plan MODEL`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from ..errors import UserError, first_line
from ..finetuning.settings import LARGEST_COUNT, check_counts, setting
from .console import Output
from .flags import command

if TYPE_CHECKING:
    from ..costs import Case, Cost
    from ..gpus import GPU

GIB = 2**30


@dataclass(frozen=True)
class PlanSettings:
    """What is to be trained where."""

    model: str = setting(
        help="The model: a folder, a config.json, a name on the hub, or a bare head HxV as in 4096x128256.",
        argument=True,
    )
    batch: int = setting(8, "Pairs in a micro-batch.")
    length: int = setting(1024, "Tokens of a sequence: prompt and answer together.")
    share: float = setting(
        1.0,
        "Share of the 2 x batch x length positions in the loss: neither padding nor prompts of rejected answers.",
    )
    gpu: str = setting("H100", "The GPU: A100 80GB, H100, H200, B200, MI300X, or the size of its memory as in 24GB.")
    lora: bool = setting(False, "Plan for adapters on a frozen head; otherwise all weights are trained.")
    dtype: Literal["bfloat16", "float16", "float32"] = setting("bfloat16", "The dtype of weights and hidden states.")

    def __post_init__(self) -> None:
        check_counts(self, 1, "batch", "length")
        if not 0 < self.share <= 1:
            raise UserError(f"--share is {self.share:g}, but has to be more than 0 and at most 1.")


@command(PlanSettings)
def plan(settings: PlanSettings, output: Output) -> None:
    """Say what head and loss cost: FLOP and bytes of every schedule and of every other implementation.

    Nothing is downloaded but the model's configuration, and nothing is run. Bytes are worked out from the shapes
    (the tests compare them with what the code allocates); times are bounds from the GPU's data sheet, which nobody
    reaches.

        orpo-kernels plan HuggingFaceTB/SmolLM2-135M-Instruct --batch 8 --length 1024 --gpu A100

        orpo-kernels plan 4096x128256 --gpu 24GB --lora
    """
    import torch

    from .. import costs
    from ..gpus import gpu_named

    head, parameters = _model(settings.model)
    try:
        gpu = gpu_named(settings.gpu)
    except (ValueError, OverflowError) as error:
        raise UserError(f"--gpu {error}") from error
    dtype = getattr(torch, settings.dtype)
    case = costs.Case(
        **head,
        sequences=2 * settings.batch,
        length=settings.length,
        rows=max(1, round(settings.share * 2 * settings.batch * settings.length)),
        dtype=dtype,
        trained=not settings.lora,
    )
    state = costs.training_state_bytes(parameters, 0 if settings.lora else parameters, dtype)
    # A cost has the gradient of the head's weight in it, which the state of a whole model has as well.
    own = case.gradient_bytes - case.hidden_bytes if parameters else -case.weight_bytes
    left = gpu.memory - state - case.hidden_bytes + own
    ours = costs.ours(case, budget=max(1, min(gpu.memory // 16, left)), target=gpu.target)
    everyone = [*ours, *costs.peers(case)]
    record = {
        "model": settings.model,
        **{name: value for name, value in asdict(case).items() if name != "dtype"},
        "dtype": settings.dtype,
        "gpu": asdict(gpu),
        "parameters": parameters,
        "training_state_bytes": state,
        "left_bytes": left,
        "recommended": ours[0].name.removeprefix("ours, "),
        "why": ours[0].plan.reason if ours[0].plan else "",
        "costs": [_record(cost, gpu, left) for cost in everyone],
    }
    output.result(record, _table(settings, case, gpu, everyone, left), *_sentences(parameters, gpu, state, left, ours))


def _record(cost: Cost, gpu: GPU, left: int) -> dict[str, Any]:
    return {
        "name": cost.name,
        "gemms": cost.gemms,
        "flops": cost.flops,
        "bytes": cost.bytes,
        "fits": cost.bytes <= left,
        "seconds_at_least": cost.flops / gpu.flops if gpu.flops else None,
        "note": cost.note,
    }


def _table(settings: PlanSettings, case: Case, gpu: GPU, everyone: list[Cost], left: int) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    head = "frozen" if settings.lora else "trained"
    table = Table(
        title=f"Head and loss of {settings.model}: H = {case.hidden_size}, V = {case.vocab_size}, {settings.dtype}, "
        f"{head}\n{settings.batch} pairs x {settings.length} tokens, {case.rows} of {case.positions} positions matter",
        box=SIMPLE_HEAD,
    )
    for column in ("loss", "GEMMs", "TFLOP", "GiB", "fits", "ms at least", "note"):
        table.add_column(column, justify="left" if column in ("loss", "note") else "right", overflow="fold")
    for index, cost in enumerate(everyone):
        fits = Text("yes", "green") if cost.bytes <= left else Text("no", "red")
        least = f"{1e3 * cost.flops / gpu.flops:.3g}" if gpu.flops else "?"
        figures: list[Any] = [str(cost.gemms), f"{cost.flops / 1e12:.3g}", f"{cost.bytes / GIB:.3f}", fits, least]
        last_of_ours = cost.name.startswith("ours") and not everyone[index + 1].name.startswith("ours")
        table.add_row(cost.name, *figures, cost.note, style="bold" if index == 0 else None, end_section=last_of_ours)
    table.caption = (
        "GiB: the peak beside hidden states and weight, with their gradients. ms: an estimate at the data sheet's peak"
    )
    return table


def _sentences(parameters: int, gpu: GPU, state: int, left: int, ours: list[Cost]) -> list[str]:
    from ...engine.work import format_bytes

    said = []
    if parameters:
        said.append(
            f"{parameters / 1e9:.3g} billion parameters: weights, gradients and AdamW take {format_bytes(state)} "
            f"of {gpu.name}'s {format_bytes(gpu.memory)}."
        )
    if left <= 0:
        said.append("That leaves nothing for a loss: use --lora, a larger GPU, or several of them.")
        return said
    said.append(f"{format_bytes(left)} are left for activations and the loss.")
    best, other, _ = ours
    assert best.plan is not None
    assert other.plan is not None
    said.append(f"Recommended, and what the loss takes by itself: {best.plan.explain()}")
    if other.gemms < best.gemms and other.bytes <= left:
        said.append(
            f"If the activations leave {format_bytes(other.bytes)}, memory_budget={other.plan.peak_bytes} makes it "
            f"{other.plan.schedule}: {other.gemms} GEMMs."
        )
    return said


def _model(text: str) -> tuple[dict[str, Any], int]:
    """(what a `Case` has of the head, parameters). These are counted on tensors without data; 0 for a bare head."""
    hidden_size, _, vocab_size = text.partition("x")
    if all(size.isdecimal() and len(size) <= len(str(LARGEST_COUNT)) for size in (hidden_size, vocab_size)):
        bare = {"hidden_size": int(hidden_size), "vocab_size": int(vocab_size)}
        if all(0 < size <= LARGEST_COUNT for size in bare.values()):
            return bare, 0
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from ...transformers.lm_head import logit_transform
    from ..finetuning.pretrained import trusts_code

    try:
        config = AutoConfig.from_pretrained(text, trust_remote_code=trusts_code())
        if config.is_encoder_decoder:
            raise UserError(f"{text} is an encoder-decoder model, which nobody plans for yet; give its head as HxV.")
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        head = model.get_output_embeddings()
        sizes = dict(zip(("vocab_size", "hidden_size"), head.weight.shape, strict=True))
    except UserError:
        raise
    except Exception as error:  # of many kinds: not there, no such architecture, no head
        raise UserError(
            f"{text} is no configuration of a causal language model that can be read, neither a folder nor a file nor "
            f"on the hub, and no head of the form HxV (as in 4096x128256): {first_line(error)}."
        ) from error
    _, softcap = logit_transform(config.get_text_config(decoder=True))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {**sizes, "bias": head.bias is not None, "softcap": softcap is not None}, parameters
