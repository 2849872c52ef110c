"""SFT, DPO, SimPO and CPO: the definitions in float64, groups of pairs and of ranks, and TRL's own trainers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from orpo_kernels import PreferenceOutput, Rows, plan, preference_loss_from_rows, reference, rows_from_labels
from orpo_kernels.methods import CPO, DPO, METHODS, ORPO, SFT, Method, SimPO, method_named

from .ranks import Ranks, topology

LENGTH, SIZE, VOCAB = 7, 12, 41
each_method = pytest.mark.parametrize("name", METHODS)


def by_logits(
    hidden: Tensor, weight: Tensor, labels: Tensor, method: Method, ref: Tensor, low_rank: Tensor | None = None
) -> Tensor:
    """The loss as a paper writes it, on logits in the dtype given; at least one token in every answer."""
    weight = weight if low_rank is None else torch.cat((weight, low_rank), 1)
    logps = (hidden @ weight.T).log_softmax(-1)
    mask = labels != -100
    token = torch.where(mask, logps.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1), 0)
    chosen, rejected = token.sum(1).chunk(2)
    chosen_mean, rejected_mean = (token.sum(1) / mask.sum(1)).chunk(2)
    ref_chosen, ref_rejected = ref.to(hidden.dtype).chunk(2)
    pairs = len(chosen)
    nll = -token[:pairs].sum() / mask[:pairs].sum()
    if isinstance(method, SFT):
        return nll
    if isinstance(method, ORPO):
        return reference.orpo_loss(hidden, weight, labels, beta=method.beta, alpha=method.alpha).loss
    margin = {
        DPO: lambda: method.beta * ((chosen - ref_chosen) - (rejected - ref_rejected)),
        SimPO: lambda: method.beta * (chosen_mean - rejected_mean) - method.gamma,
        CPO: lambda: method.beta * (chosen - rejected),
    }[type(method)]()
    return method.alpha * nll - F.logsigmoid(margin).mean()


def make(pairs: int = 3, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, labels of ragged answers of at least one token, and a reference."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2 * pairs, LENGTH, SIZE, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(VOCAB, SIZE, generator=generator, dtype=torch.float64).to(dtype)
    begin = torch.randint(0, 3, (2 * pairs, 1), generator=generator)
    end = torch.randint(4, 8, (2 * pairs, 1), generator=generator)
    place = torch.arange(LENGTH)
    labels = torch.randint(VOCAB, (2 * pairs, LENGTH), generator=generator)
    labels = labels.masked_fill((place < begin) | (place >= end), -100)
    return hidden, weight, labels, -10 * torch.rand(2 * pairs, generator=generator, dtype=torch.float64)


def ours(hidden: Tensor, weight: Tensor, labels: Tensor, method: Method, ref: Tensor, **options: Any) -> Any:
    rows = rows_from_labels(labels, nll_reduction=method.nll_reduction)
    return preference_loss_from_rows(hidden.flatten(0, 1), weight, rows, method, reference_logps=ref, **options)


# --- the definitions -----------------------------------------------------------------------------------------------


@each_method
@pytest.mark.parametrize("schedule", ["auto", "recompute"])
@given(pairs=st.integers(1, 4), seed=st.integers(0, 99), alpha=st.sampled_from([0.0, 0.5, 1.0]))
def test_loss_and_gradients_are_the_definition(name, schedule, pairs, seed, alpha):
    method = method_named(name, alpha=1.0 if name == "sft" else alpha)
    hidden, weight, labels, ref = make(pairs, seed=seed)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    loss, true = ours(*leaves, labels, method, ref, schedule=schedule).loss, by_logits(*leaves, labels, method, ref)
    torch.testing.assert_close(loss, true, rtol=1e-10, atol=1e-12)
    for mine, other in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(true, leaves), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-12)


@each_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_are_at_most_twice_those_of_plain_torch(name, dtype):
    """Of the gradients, in the same dtype; measured against float64 on the same rounded inputs."""
    method = method_named(name)
    hidden, weight, labels, ref = make(8, dtype)

    def gradients(function: Any, *tensors: Tensor) -> Tensor:
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        out = function(*leaves, labels, method, ref)
        return torch.cat([g.double().flatten() for g in torch.autograd.grad(getattr(out, "loss", out), leaves)])

    true = gradients(by_logits, hidden.double(), weight.double())
    error, plain = (float((gradients(f, hidden, weight) - true).norm() / true.norm()) for f in (ours, by_logits))
    assert error <= 2 * plain + 1e-7


@each_method
def test_pair_losses_are_what_the_loss_averages(name):
    """The method's own function of the scores, and the fused loss (ORPO's above all)."""
    method = method_named(name, alpha=0.0)
    hidden, weight, labels, ref = make()
    out = ours(hidden, weight, labels, method, ref)
    scores = torch.cat((out.chosen_logps, out.rejected_logps))
    torch.testing.assert_close(out.loss, method.pair_losses(scores, ref).mean(), rtol=1e-9, atol=1e-12)
    gains, rewards = method.gains(scores, ref), torch.cat((out.chosen_rewards, out.rejected_rewards))
    torch.testing.assert_close(rewards, method.beta * gains, rtol=1e-9, atol=1e-12)
    assert out.preferred.tolist() == (gains[:3] > gains[3:]).tolist()
    without = ours(hidden, weight, labels, replace(method, beta=0.0), ref)
    assert without.preferred.tolist() == out.preferred.tolist()


@each_method
def test_log_odds_are_the_same_number_for_every_method(name):
    hidden, weight, labels, ref = make()
    expected = reference.orpo_loss(hidden, weight, labels).log_odds
    torch.testing.assert_close(ours(hidden, weight, labels, method_named(name), ref).log_odds, expected)


@each_method
def test_low_rank_columns_alone_get_a_gradient(name):
    hidden, weight, labels, ref = make()
    low_rank = torch.randn(VOCAB, 3, dtype=torch.float64, requires_grad=True)
    longer = torch.cat((hidden, torch.randn(*hidden.shape[:2], 3, dtype=torch.float64)), -1)
    method = method_named(name)
    (mine,) = torch.autograd.grad(ours(longer, weight, labels, method, ref, low_rank=low_rank).loss, low_rank)
    (other,) = torch.autograd.grad(by_logits(longer, weight, labels, method, ref, low_rank), low_rank)
    torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-12)


@each_method
def test_an_empty_answer_leaves_the_pair_loss(name):
    """Its pair alone: the rest of the batch is as if it were not there, but for its NLL."""
    method = method_named(name, alpha=1.0 if name == "sft" else 0.0)
    hidden, weight, labels, ref = make(3)
    labels[[1, 4]] = -100
    out = ours(hidden.requires_grad_(), weight, labels, method, ref)
    kept = [0, 2, 3, 5]
    rest = ours(hidden[kept], weight, labels[kept], method, ref[kept])
    torch.testing.assert_close(out.loss, rest.loss)
    assert out.valid_pairs.tolist() == [True, False, True]
    out.loss.backward()
    assert torch.isfinite(hidden.grad).all()


@each_method
def test_nothing_at_all_is_zero(name):
    hidden, weight, labels, ref = make(2)
    out = ours(hidden.requires_grad_(), weight, torch.full_like(labels, -100), method_named(name), ref)
    out.loss.backward()
    assert out.loss == 0
    assert hidden.grad.abs().sum() == 0
    assert not out.valid_pairs.any()


def test_bad_input_is_a_sentence():
    hidden, weight, labels, ref = make(2)
    with pytest.raises(ValueError, match=r"reference_logps has shape \(3,\), but the batch has 2 pairs"):
        ours(hidden, weight, labels, DPO(), ref[:3])
    with pytest.raises(ValueError, match="DPO needs the reference model's log-probabilities"):
        ours(hidden, weight, labels, DPO(), None)
    with pytest.raises(ValueError, match="no method 'ppo'; the methods are sft, orpo"):
        method_named("ppo")
    with pytest.raises(ValueError, match="The method dpo has no option gamma; it has beta, alpha"):
        method_named("dpo", gamma=1.0)
    assert method_named("simpo", gamma=None) == SimPO()


# --- what the loss of one method can, that of every method can --------------------------------------------------------


def inputs(name: str) -> tuple[list[Tensor], dict[str, Any]]:
    """Leaves, hidden and weight, and the other arguments of `preference_loss_from_rows`."""
    hidden, weight, labels, ref = make(4, torch.float32)
    return call(name, hidden, weight, labels, ref)


def call(name: str, hidden: Tensor, weight: Tensor, labels: Tensor, ref: Tensor) -> tuple[list[Tensor], dict[str, Any]]:
    given = ref if METHODS[name].needs_reference else None
    options = {"rows": rows_from_labels(labels), "method": METHODS[name](), "reference_logps": given}
    return [hidden.flatten(0, 1).requires_grad_(), weight.requires_grad_()], options


def gradients(out: PreferenceOutput, leaves: list[Tensor]) -> list[Tensor]:
    return [*out, *torch.autograd.grad(3 * out.loss, leaves)]


def assert_all_close(some: list[Tensor], others: list[Tensor], rtol: float = 1e-5, atol: float = 1e-6) -> None:
    for a, b in zip(some, others, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@each_method
def test_groups_of_pairs(name):
    """A residual that does not fit as a whole: pair by pair, in fp32."""
    leaves, rest = inputs(name)
    rows = rest["rows"]
    budget = 4 * VOCAB * (SIZE + rows.largest_pair() + 2)
    assert plan(len(rows), SIZE, VOCAB, memory_budget=budget, largest_pair=rows.largest_pair).group_rows
    options = {"schedule": "resident", "memory_budget": budget}
    in_groups = gradients(preference_loss_from_rows(*leaves, **rest, **options), leaves)
    assert_all_close(in_groups, gradients(preference_loss_from_rows(*leaves, **rest), leaves))


@each_method
@pytest.mark.parametrize("schedule", ["single_pass", "resident", "recompute"])
def test_nothing_is_read_on_the_host_once_the_rows_are_known(name, schedule):
    """Tensors without data raise on `.item()`, `bool(tensor)` and the like: the same code would wait for a GPU."""
    with FakeTensorMode():
        hidden = torch.empty(500, SIZE, requires_grad=True)
        weight, bias = (torch.empty(*s, requires_grad=schedule != "single_pass") for s in ((VOCAB, SIZE), (VOCAB,)))
        numbers, ref, weights = (torch.empty(n, dtype=torch.float64) for n in (300, 8, 4))
        integers, scored = torch.empty(3, 300, dtype=torch.int64), torch.empty(300, dtype=torch.bool)
        rows = Rows(*integers.unbind(), scored, numbers, 4, pair_weight=weights)
        options = {"reference_logps": ref, "bias": bias, "logit_softcap": 5.0, "schedule": schedule}
        preference_loss_from_rows(hidden, weight, rows, METHODS[name](), **options).loss.backward()
        assert hidden.grad.shape == hidden.shape


@each_method
def test_a_compiled_graph_without_a_break(name):
    torch._dynamo.reset()
    leaves, rest = inputs(name)
    compiled = torch.compile(preference_loss_from_rows, fullgraph=True, backend="aot_eager")
    found = gradients(compiled(*leaves, **rest), leaves)
    assert_all_close(found, gradients(preference_loss_from_rows(*leaves, **rest), leaves))


def part(name: str, kind: str) -> list[Tensor]:
    """This rank's share of the batch: loss, and gradients of hidden states and weight, whole, 0 where others are."""
    hidden, weight, labels, ref = make(4, torch.float32)
    rank = torch.distributed.get_rank()
    held = torch.zeros(labels.shape, dtype=torch.bool)  # positions of this rank
    columns = slice(0, VOCAB)
    if kind == "data":
        held.view(2, 4, LENGTH)[:, slice(0, 1) if rank == 0 else slice(1, 4)] = True
        pairs = held[:, 0].nonzero().squeeze(1)
        leaves, rest = call(name, hidden[pairs], weight, labels[pairs], ref[pairs])
    elif kind == "sequence":
        held[:, slice(0, 5) if rank == 0 else slice(5, LENGTH)] = True
        leaves, rest = call(name, hidden[:, held[0]], weight, labels[:, held[0]], ref)
    else:
        held[:] = True
        columns = slice(0, 13) if rank == 0 else slice(13, VOCAB)
        leaves, rest = call(name, hidden, weight[columns], labels, ref)
    out = preference_loss_from_rows(*leaves, **rest, **{f"{kind}_group": topology().world})
    grads = torch.zeros_like(hidden), torch.zeros_like(weight)
    grads[0][held], grads[1][columns] = torch.autograd.grad(out.loss, leaves)
    return [out.loss.detach(), *grads]


@pytest.fixture(scope="module")
def ranks():
    with Ranks(2) as pool:
        yield pool


@pytest.mark.parametrize("kind", ["data", "vocab", "sequence"])
@each_method
def test_two_ranks_are_one_process(name, kind, ranks):
    """Gradients are averaged over data and sequence groups; over a vocabulary, those of hidden states are whole."""
    leaves, rest = inputs(name)
    loss = preference_loss_from_rows(*leaves, **rest).loss
    of_hidden, of_weight = torch.autograd.grad(loss, leaves)
    losses, hiddens, weights = zip(*ranks.run(part, name, kind), strict=True)
    total = sum(weights) if kind == "vocab" else sum(weights) / 2
    found = [(sum(hiddens) / 2).flatten(0, 1), total]
    torch.testing.assert_close(sum(losses) / 2, loss.detach(), rtol=1e-5, atol=1e-6)
    assert_all_close(found, [of_hidden, of_weight], rtol=1e-4)


@dataclass(frozen=True)
class Squared(Method):
    """A method of a user's, who gives its pair loss alone."""

    name = "squared"

    def pair_losses(self, scores: Tensor, reference: Tensor | None = None) -> Tensor:
        chosen, rejected = scores.view(2, -1)
        return (1 - self.beta * (chosen - rejected)) ** 2


def test_a_method_of_a_users_has_its_gradient_by_autograd():
    leaves, rest = inputs("simpo")
    hidden, weight = leaves
    rows, method = rest["rows"], Squared(beta=0.3)
    out = preference_loss_from_rows(hidden, weight, rows, method)
    logps = (hidden.double() @ weight.double().t()).log_softmax(-1)[rows.position, rows.target]
    scores = torch.zeros(8, dtype=torch.float64).index_add(0, rows.sequence, logps)
    expected = method.pair_losses(scores).mean()
    torch.testing.assert_close(out.loss.double(), expected, rtol=1e-5, atol=1e-6)
    ours, theirs = (torch.autograd.grad(loss, leaves) for loss in (out.loss, expected))
    assert_all_close(ours, theirs, rtol=1e-4, atol=1e-5)


# --- TRL -----------------------------------------------------------------------------------------------------------


def tokenised(row: dict[str, Any]) -> dict[str, list[int]]:
    """A row of a TRL trainer's dataset as a pair of ours: CPO has the same columns, DPO the parts of them, SFT one."""
    if "input_ids" in row:
        prompt = row["labels"].count(-100)
        rejected = {"rejected_input_ids": row["input_ids"][:prompt], "rejected_labels": [-100] * prompt}
        return {"chosen_input_ids": row["input_ids"], "chosen_labels": row["labels"], **rejected}
    if "chosen_input_ids" in row:
        return {key: row[key] for key in row if key.split("_", 1)[-1] in ("input_ids", "labels")}
    prompt = row["prompt_ids"]
    pair = {}
    for side in ("chosen", "rejected"):
        pair[f"{side}_input_ids"] = prompt + row[f"{side}_ids"]
        pair[f"{side}_labels"] = [-100] * len(prompt) + row[f"{side}_ids"]
    return pair


def trl_trainer(name: str, model: nn.Module, folder: Any, **options: Any) -> Any:
    """TRL's own trainer for a method on a tiny model."""
    pytest.importorskip("trl.experimental.orpo")
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    from .training import chat_examples, settings, tokenizer

    arguments = settings(folder, max_length=96, **options)
    data = chat_examples(8)
    if name == "sft":
        trainer, config = SFTTrainer, SFTConfig(**arguments, completion_only_loss=True, packing=False)
        data = [{"prompt": example["prompt"], "completion": example["chosen"]} for example in data]
    elif name == "dpo":
        trainer, config = DPOTrainer, DPOConfig(**arguments, beta=0.3, precompute_ref_log_probs=True)
    else:
        cpo = {"cpo": {"beta": 0.3, "cpo_alpha": 0.7}, "simpo": {"beta": 2.0, "simpo_gamma": 1.2, "cpo_alpha": 0.5}}
        loss_type = "simpo" if name == "simpo" else "sigmoid"
        trainer, config = CPOTrainer, CPOConfig(**arguments, loss_type=loss_type, **cpo[name])
    return trainer(model=model, args=config, train_dataset=Dataset.from_list(data), processing_class=tokenizer())


SAME = {
    "sft": SFT(),
    "dpo": DPO(beta=0.3),
    "cpo": CPO(beta=0.3, alpha=0.7),
    "simpo": SimPO(beta=2.0, gamma=1.2, alpha=0.5),
}


@pytest.mark.parametrize("packing", ["padded", "shared"])
@pytest.mark.parametrize("name", SAME)
def test_loss_and_gradient_are_those_of_trls_trainer(name, packing, tmp_path):
    """One batch, a policy that is not its reference: loss and norm of the gradient to 1e-5."""
    pytest.importorskip("trl.experimental.orpo")
    from orpo_kernels.transformers import causal_lm_answers, causal_lm_preference_loss
    from orpo_kernels.transformers.collator import pad_pairs
    from orpo_kernels.transformers.packing import pack_pairs

    from .training import tiny

    model = tiny()
    theirs = trl_trainer(name, tiny(), tmp_path)
    rows = [theirs.train_dataset[index] for index in range(4)]
    batch = theirs._prepare_inputs(theirs.data_collator(rows))
    mine = {"padded": pad_pairs, "shared": pack_pairs}[packing]([tokenised(row) for row in rows], 2)
    if name == "dpo":
        mine["reference_logps"] = causal_lm_answers(tiny(), **mine).logps
    _move(model), _move(theirs.model)
    theirs.model.train()
    expected = theirs.compute_loss(theirs.model, batch)
    expected.backward()
    loss = causal_lm_preference_loss(model, **mine, method=SAME[name]).loss
    loss.backward()
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    norms = [torch.stack([p.grad.norm() for p in m.parameters()]).norm() for m in (model, theirs.model)]
    assert float(norms[0]) == pytest.approx(float(norms[1]), rel=1e-5)


def _move(model: nn.Module) -> None:
    """The same step away from the initial weights, as if it had been trained."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("name", SAME)
def test_a_run_logs_what_trls_logs(name, tmp_path):
    """Four steps from the same weights on the same tokens: losses, gradient norms and all metrics of TRL's we have."""
    pytest.importorskip("trl.experimental.orpo")
    from transformers import TrainingArguments

    from orpo_kernels.transformers import PreferenceCollator
    from orpo_kernels.transformers.trainer import PreferenceTrainer

    from .training import assert_same_logs, settings, tiny, tokenizer

    theirs = trl_trainer(name, tiny(), tmp_path / "theirs")
    pairs = [tokenised(row) for row in theirs.train_dataset]
    if name == "sft":  # something to be left out
        pairs = [
            {**p, "rejected_input_ids": p["chosen_input_ids"], "rejected_labels": p["chosen_labels"]} for p in pairs
        ]
    method = SAME[name]
    ours = PreferenceTrainer(
        tiny(),
        TrainingArguments(**settings(tmp_path / "ours")),
        data_collator=PreferenceCollator(tokenizer(), max_length=200),
        train_dataset=pairs,
        method=name,
        beta=method.beta,
        loss_options={"alpha": method.alpha} | ({"gamma": method.gamma} if name == "simpo" else {}),
    )
    ours.train()
    theirs.train()
    keys = {"loss", "grad_norm"} | ({f"rewards/{m}" for m in ("chosen", "rejected", "accuracies", "margins")})
    keys |= {"logps/chosen", "logps/rejected"}
    keys |= {"nll_loss"} if name in ("cpo", "simpo") else set()
    keys = {"loss", "grad_norm"} if name == "sft" else keys
    logged = [[logs for logs in trainer.state.log_history if "loss" in logs] for trainer in (ours, theirs)]
    assert len(logged[0]) == 4
    if name == "dpo":  # the first step's rewards are 0 but for rounding
        assert_same_logs(*([{key: logs[0][key] for key in ("loss", "grad_norm")}] for logs in logged))
        logged = [history[1:] for history in logged]
    assert_same_logs(*([{key: logs[key] for key in keys} for logs in history] for history in logged))
