"""transformers.Trainer with the fused loss: raw pairs go in, checkpoints and evaluation are the Trainer's own.

python -m examples.transformers_trainer    (pip install '.[trainer]'; stopped half-way, it goes on when started again)
"""

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from orpo_kernels.transformers import ORPOTrainer, PreferenceCollator

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
DATA = "examples/facts/facts.jsonl"
FOLDER = "runs/transformers_trainer"
STEPS = 100


model = AutoModelForCausalLM.from_pretrained(MODEL)
tokenizer = AutoTokenizer.from_pretrained(MODEL)
facts = load_dataset("json", data_files=DATA, split="train")
chats = facts.map(lambda fact: {"prompt": [{"role": "user", "content": fact["prompt"]}]})  # answers may stay strings
pairs = chats.train_test_split(0.1, seed=0)

settings = TrainingArguments(
    output_dir=FOLDER,
    learning_rate=2e-5,
    max_steps=STEPS,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    eval_strategy="steps",
    eval_steps=STEPS // 2,
    save_steps=STEPS // 2,
    report_to="none",
)
trainer = ORPOTrainer(
    model,
    settings,
    data_collator=PreferenceCollator(tokenizer, max_length=256),
    train_dataset=pairs["train"],
    eval_dataset=pairs["test"],
    beta=0.1,
)
trainer.train(resume_from_checkpoint=get_last_checkpoint(FOLDER))
print(trainer.evaluate())
