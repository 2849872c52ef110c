"""A loop with Accelerate, on one process or many: accelerate launch -m examples.accelerate_loop

With DistributedDataParallel or FSDP2 (configurations in examples/distributed) the means run over all processes' pairs.
The loss does not call the model's forward, in which DistributedDataParallel does its work: `run_inside` runs it there.
"""

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from orpo_kernels import ORPOOutput
from orpo_kernels.transformers import PreferenceCollator, causal_lm_orpo_loss
from orpo_kernels.transformers.engines import run_inside

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
DATA = "examples/facts/facts.jsonl"
FOLDER = "runs/accelerate_loop"
STEPS = 100
PAIRS = 4

accelerator = Accelerator(mixed_precision="bf16" if torch.cuda.is_available() else "no")
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(MODEL)
examples: Any = [json.loads(line) for line in Path(DATA).read_text().splitlines()]
for example in examples:
    example["prompt"] = [{"role": "user", "content": example["prompt"]}]  # answers may stay strings

collator = PreferenceCollator(tokenizer, max_length=256)
loader: Any = DataLoader(examples, batch_size=PAIRS, shuffle=True, collate_fn=collator)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, weight_decay=0.0)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
inner = accelerator.unwrap_model(model)
group = torch.distributed.group.WORLD if accelerator.num_processes > 1 else None


def orpo(**batch: Any) -> ORPOOutput:
    with accelerator.autocast():
        return causal_lm_orpo_loss(inner, **batch, beta=0.1, data_group=group)


model.train()
step = 0
while step < STEPS:
    for batch in loader:
        out = run_inside(model, inner, orpo, batch)
        accelerator.backward(out.loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        loss = accelerator.reduce(out.loss.detach(), reduction="mean")
        accelerator.print(f"step {step}: loss {loss:.4f}")
        if step == STEPS:
            break
state = accelerator.get_state_dict(model)  # under FSDP2, all processes gather it
if accelerator.is_main_process:
    inner.save_pretrained(FOLDER, state_dict=state)
