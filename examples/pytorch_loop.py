"""A plain PyTorch loop. Gradient accumulation is exact: every step is that of one batch of all its micro-batches.

python -m examples.pytorch_loop    (pip install '.[transformers]')
"""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from orpo_kernels.transformers import PreferenceCollator, causal_lm_orpo_loss

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
DATA = "examples/facts/facts.jsonl"
FOLDER = "runs/pytorch_loop"
STEPS = 100
PAIRS, MICRO_BATCHES = 4, 2

device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).to(device)
tokenizer = AutoTokenizer.from_pretrained(MODEL)
examples: Any = [json.loads(line) for line in Path(DATA).read_text().splitlines()]
for example in examples:
    example["prompt"] = [{"role": "user", "content": example["prompt"]}]  # answers may stay strings

collator = PreferenceCollator(tokenizer, max_length=256)
loader = DataLoader(examples, batch_size=PAIRS, shuffle=True, drop_last=True, collate_fn=collator)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, weight_decay=0.0)
model.train()
for step in range(STEPS):
    batches = list(islice(loader, MICRO_BATCHES))
    # What the two means of the loss run over: the chosen sides' tokens but the first of each, and the pairs.
    tokens = sum(int(batch["attention_mask"][:PAIRS, 1:].sum()) for batch in batches)
    loss = 0.0
    for batch in batches:
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            out = causal_lm_orpo_loss(
                model, **batch, beta=0.1, nll_denominator=tokens, pair_denominator=PAIRS * len(batches)
            )
        out.loss.backward()
        loss += out.loss.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step + 1}: loss {loss:.4f}, log-odds {out.log_odds.mean():+.3f}")
model.save_pretrained(FOLDER)
