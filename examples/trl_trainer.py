"""TRL's ORPOTrainer with the fused loss: what differs from a script of TRL's is one import line.

python -m examples.trl_trainer    (pip install '.[trl]'; several GPUs: accelerate launch -m examples.trl_trainer)
"""

from typing import Any

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from orpo_kernels.trl import ORPOConfig, ORPOTrainer  # was: from trl.experimental.orpo import ORPOConfig, ORPOTrainer

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
DATA = "examples/facts/facts.jsonl"
FOLDER = "runs/trl_trainer"
STEPS = 100


def as_chat(pair: dict[str, Any]) -> dict[str, Any]:
    question = [{"role": "user", "content": pair["prompt"]}]
    chosen, rejected = ([{"role": "assistant", "content": pair[side]}] for side in ("chosen", "rejected"))
    return {"prompt": question, "chosen": chosen, "rejected": rejected}


model = AutoModelForCausalLM.from_pretrained(MODEL)
tokenizer = AutoTokenizer.from_pretrained(MODEL)
pairs = load_dataset("json", data_files=DATA, split="train").map(as_chat).train_test_split(0.1, seed=0)

config = ORPOConfig(
    output_dir=FOLDER,
    max_length=256,
    beta=0.1,
    learning_rate=2e-5,
    max_steps=STEPS,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    bf16=torch.cuda.is_available(),
    report_to="none",
)
trainer = ORPOTrainer(
    model, config, train_dataset=pairs["train"], eval_dataset=pairs["test"], processing_class=tokenizer
)
trainer.train()
print(trainer.evaluate())
trainer.save_model()
