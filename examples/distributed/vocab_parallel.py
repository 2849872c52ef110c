"""A data x vocabulary mesh in plain PyTorch: torchrun --nproc-per-node 4 -m examples.distributed.vocab_parallel

Ranks of one vocabulary group have the same pairs and a part of the lm-head each; FSDP2 shards body and head over the
data dimension besides. (The body of a larger model would be tensor-parallel over the vocabulary dimension as well.)
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from orpo_kernels import orpo_loss_from_rows
from orpo_kernels.transformers import PreferenceCollator
from orpo_kernels.transformers.batches import batch_rows

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
DATA = "examples/facts/facts.jsonl"
FOLDER = "runs/vocab_parallel"
STEPS = 100
PAIRS = 4  # of each vocabulary group
VOCAB_RANKS = 2

device = "cuda" if torch.cuda.is_available() else "cpu"
if device == "cuda":
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
dist.init_process_group("cuda:nccl,cpu:gloo" if device == "cuda" else "gloo")
mesh = init_device_mesh(device, (dist.get_world_size() // VOCAB_RANKS, VOCAB_RANKS), mesh_dim_names=("data", "vocab"))

model: Any = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).to(device)
tokenizer = AutoTokenizer.from_pretrained(MODEL)
body, weight = model.model, model.lm_head.weight.detach().clone()  # tied embeddings part here
head = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
head.weight = nn.Parameter(distribute_tensor(weight, mesh["vocab"], [Shard(0)]))
for layer in body.layers:
    fully_shard(layer, mesh=mesh["data"])
fully_shard(body, mesh=mesh["data"])
fully_shard(head, mesh=mesh["data"])

pairs: Any = [json.loads(line) for line in Path(DATA).read_text().splitlines()]
for pair in pairs:
    pair["prompt"] = [{"role": "user", "content": pair["prompt"]}]
collator = PreferenceCollator(tokenizer, max_length=256)
optimizer = torch.optim.AdamW([*body.parameters(), *head.parameters()], lr=2e-5, weight_decay=0.0)

groups: Any = {"data_group": mesh["data"], "vocab_group": mesh["vocab"]}
for step in range(STEPS):
    first = (step * mesh["data"].size() + mesh["data"].get_local_rank()) * PAIRS
    batch = collator([pairs[i % len(pairs)] for i in range(first, first + PAIRS)])
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    hidden = body(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)[0]
    out = orpo_loss_from_rows(hidden.flatten(0, 1), head.weight, batch_rows(**batch), beta=0.1, **groups)
    out.loss.backward()
    nn.utils.clip_grad_norm_(body.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    loss = out.loss.detach() / dist.get_world_size()
    dist.all_reduce(loss)
    if dist.get_rank() == 0:
        print(f"step {step + 1}: loss {loss:.4f}", flush=True)

sharded: Any = {f"model.{name}": value for name, value in body.state_dict().items()} | {"lm_head.weight": head.weight}
state = {name: value.full_tensor().cpu() for name, value in sharded.items()}
if dist.get_rank() == 0:
    model.config.tie_word_embeddings = False
    Path(FOLDER).mkdir(parents=True, exist_ok=True)
    type(model)(model.config).save_pretrained(FOLDER, state_dict=state)
dist.destroy_process_group()
