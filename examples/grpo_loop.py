"""Reinforcement learning (GRPO) whose per-token log-probabilities come without logits, from `token_logps`.

python -m examples.grpo_loop    (pip install '.[transformers]')

The model answers questions of fact; an answer that holds the right one and none of the words of the wrong one is worth
1. GRPO (arXiv 2402.03300): several answers a question, their advantage within that group, PPO's clipped ratio to the
policy that wrote them, and a KL term to the model as it was. PPO differs only in where the advantages come from.
"""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from orpo_kernels import token_logps

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
DATA = "examples/facts/facts.jsonl"
FOLDER = "runs/grpo_loop"
STEPS = 50
QUESTIONS, ANSWERS, TOKENS, UPDATES = 4, 8, 16, 2
CLIP, KL = 0.2, 0.04

device = "cuda" if torch.cuda.is_available() else "cpu"
model: Any = AutoModelForCausalLM.from_pretrained(MODEL).to(device).eval()
reference: Any = AutoModelForCausalLM.from_pretrained(MODEL).to(device).eval()
tokenizer = AutoTokenizer.from_pretrained(MODEL, padding_side="left")
facts: list[dict[str, str]] = [json.loads(line) for line in Path(DATA).read_text().splitlines()]
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0)


def logps(policy: Any, sequences: torch.Tensor, mask: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
    """(N, T - 1) log-probabilities of the answers' tokens, 0 elsewhere. The prompts are never projected."""
    places = (mask.cumsum(1) - 1).clamp(min=0)
    hidden = policy.model(sequences, attention_mask=mask, position_ids=places).last_hidden_state[:, :-1]
    return token_logps(hidden, policy.lm_head.weight, sequences[:, 1:].masked_fill(~answer[:, 1:], -100))


def reward(fact: dict[str, str], text: str) -> float:
    right, wrong = (fact[side].rstrip(".").lower() in text.lower() for side in ("chosen", "rejected"))
    return float(right and not wrong)


for step in range(STEPS):
    batch = [facts[(QUESTIONS * step + i) % len(facts)] for i in range(QUESTIONS) for _ in range(ANSWERS)]
    chats = [[{"role": "user", "content": fact["prompt"]}] for fact in batch]
    texts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    prompts = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False).to(device)
    sequences = model.generate(**prompts, do_sample=True, max_new_tokens=TOKENS, pad_token_id=tokenizer.eos_token_id)
    begin = prompts["input_ids"].shape[1]
    ended = (sequences[:, begin:] == tokenizer.eos_token_id).cumsum(1)
    written = (ended - (sequences[:, begin:] == tokenizer.eos_token_id).long()) == 0  # the first end token counts
    answer = torch.cat((torch.zeros_like(prompts["input_ids"], dtype=torch.bool), written), 1)
    mask = torch.cat((prompts["attention_mask"], written.long()), 1)

    said = tokenizer.batch_decode(sequences[:, begin:], skip_special_tokens=True)
    rewards = torch.tensor([reward(fact, text) for fact, text in zip(batch, said, strict=True)], device=device)
    groups = rewards.view(QUESTIONS, ANSWERS)
    advantages = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).view(-1, 1)

    with torch.no_grad():
        old, anchor = (logps(policy, sequences, mask, answer) for policy in (model, reference))
    for _ in range(UPDATES):
        new, tokens = logps(model, sequences, mask, answer), answer[:, 1:]
        ratio, away = (new - old).exp(), anchor - new
        gain = torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
        penalty = away.exp() - away - 1  # an unbiased estimate of the KL divergence that is never negative
        loss = (((KL * penalty - gain) * tokens).sum(1) / tokens.sum(1)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    kl = (penalty * tokens).sum() / tokens.sum()
    print(f"step {step + 1}: reward {rewards.mean():.3f}, loss {loss:+.4f}, KL {kl:.2e}")
model.save_pretrained(FOLDER)
