"""What the model prefers and what it says: log-probabilities of held-out answers, and answers of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orpo_kernels.transformers import PreferenceCollator, causal_lm_orpo_loss

from .data import Fact

EVALUATION_BATCH = 16


@dataclass(frozen=True)
class Scores:
    """How the model rates the answers to some facts: float tensors (n), on the CPU.

    chosen_logps, rejected_logps: mean log-probability per token of the right and the wrong answer.
    log_odds: log-odds of the right answer minus those of the wrong one; positive where the right one is preferred.
    """

    facts: list[Fact]
    chosen_logps: Tensor
    rejected_logps: Tensor
    log_odds: Tensor

    @property
    def topics(self) -> list[str]:
        return list(dict.fromkeys(fact.topic for fact in self.facts))

    def of(self, topic: str) -> Scores:
        kept = [i for i, fact in enumerate(self.facts) if fact.topic == topic]
        tensors = (self.chosen_logps[kept], self.rejected_logps[kept], self.log_odds[kept])
        return Scores([self.facts[i] for i in kept], *tensors)

    def summary(self) -> dict[str, float | int]:
        """Preference accuracy (a share), and the means of the rest."""
        return {
            "pairs": len(self.facts),
            "accuracy": (self.log_odds > 0).double().mean().item(),
            "log_odds": self.log_odds.mean().item(),
            "chosen_logps": self.chosen_logps.mean().item(),
            "rejected_logps": self.rejected_logps.mean().item(),
        }


@torch.no_grad()
def evaluate(
    model: Any,
    collator: PreferenceCollator,
    facts: Sequence[Fact],
    on_batch: Callable[[int], None] = lambda pairs: None,
) -> Scores:
    """Score every fact; `on_batch` is told how many are done. One vocabulary-sized GEMM and no gradient."""
    model.eval()
    facts = sorted(facts, key=lambda fact: len(fact.prompt))  # similar lengths together: less padding
    outputs = []
    for start in range(0, len(facts), EVALUATION_BATCH):
        chunk = facts[start : start + EVALUATION_BATCH]
        out = causal_lm_orpo_loss(model, **collator([fact.chat for fact in chunk]), prompt_nll=False)
        outputs.append(torch.stack([out.chosen_logps, out.rejected_logps, out.log_odds]).cpu())
        on_batch(len(chunk))
    return Scores(facts, *torch.cat(outputs, dim=1))


@torch.no_grad()
def answer(model: Any, tokenizer: Any, fact: Fact, max_new_tokens: int = 16) -> str:
    """What the model answers by itself, word by most probable word."""
    model.eval()
    prompt = tokenizer.apply_chat_template(
        fact.chat["prompt"], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = model.generate(**prompt, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip()
