"""A model that sees, from nothing: ORPO on pictures that are drawn here.

    python -m examples.pictures              # minutes on two cores
    python -m examples.pictures --shuffled   # the same, each question with another one's picture

A picture shows two shapes of two colours; asked for is the colour of one of them. Chosen is that colour, rejected the
colour of the other shape: nothing but the picture tells which is which, so that a model which does not look is right
half of the time. Model, tokenizer and processor are made here as well; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    TrainingArguments,
)

from orpo_kernels.transformers import PreferenceCollator
from orpo_kernels.transformers.trainer import PreferenceTrainer

COLOURS = ("red", "green", "blue", "yellow", "purple", "white")
SHAPES = ("square", "circle", "triangle")
CELL, CELLS = 8, 3  # a shape fills one of 3 x 3 cells of 8 x 8 pixels
SPECIAL = ("<pad>", "<user>", "<assistant>", "<end>", "<image>", "<unk>")
WORDS = ("which", "colour", "is", "the", *SHAPES, *COLOURS)
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}> "
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<image> {% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
    "<end>{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)


def draw(shapes: Sequence[tuple[str, str, int]]) -> Image.Image:
    """A picture of shapes: the kind, the colour and the cell of each."""
    picture = Image.new("RGB", (CELLS * CELL, CELLS * CELL))
    pen = ImageDraw.Draw(picture)
    for kind, colour, cell in shapes:
        x, y = cell % CELLS * CELL, cell // CELLS * CELL
        right, bottom = x + CELL - 1, y + CELL - 1
        if kind == "square":
            pen.rectangle((x, y, right, bottom), fill=colour)
        elif kind == "circle":
            pen.ellipse((x, y, right, bottom), fill=colour)
        else:
            pen.polygon(((x, bottom), (right, bottom), (x + CELL // 2, y)), fill=colour)
    return picture


def make_pairs(count: int, seed: int, shuffled: bool = False) -> list[dict[str, Any]]:
    """Questions with their pictures, as TRL's trainers take them; `shuffled`: each with another one's picture."""
    chance, pairs = random.Random(seed), []
    for _ in range(count):
        (asked, other), colours = chance.sample(SHAPES, 2), chance.sample(COLOURS, 2)
        cells = chance.sample(range(CELLS * CELLS), 2)
        question = [{"type": "image"}, {"type": "text", "text": f"which colour is the {asked}"}]
        pairs.append(
            {
                "prompt": [{"role": "user", "content": question}],
                "chosen": [{"role": "assistant", "content": colours[0]}],
                "rejected": [{"role": "assistant", "content": colours[1]}],
                "images": [draw(list(zip((asked, other), colours, cells, strict=True)))],
            }
        )
    if shuffled:
        pictures = [pair["images"] for pair in pairs]
        pairs = [pair | {"images": pictures[index - 1]} for index, pair in enumerate(pairs)]
    return pairs


def make_processor() -> LlavaProcessor:
    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *WORDS))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="<end>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>", "<image>"],
    )
    size = {"height": CELLS * CELL, "width": CELLS * CELL}
    return LlavaProcessor(
        CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False),
        tokenizer,
        patch_size=CELL,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the tower's first place, which is left out again
        chat_template=TEMPLATE,
    )


def make_model(seed: int = 0, width: int = 64) -> LlavaForConditionalGeneration:
    # At so small a width the usual 0.02 would leave the picture too faint to be learned from.
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": 4, "initializer_range": 0.1}
    tower = CLIPVisionConfig(
        **sizes, num_hidden_layers=1, image_size=CELLS * CELL, patch_size=CELL, projection_dim=width
    )
    text = LlamaConfig(
        **sizes,
        num_hidden_layers=2,
        vocab_size=len(SPECIAL) + len(WORDS),
        max_position_embeddings=64,
        pad_token_id=SPECIAL.index("<pad>"),
        eos_token_id=SPECIAL.index("<end>"),
        bos_token_id=None,
    )
    config = LlavaConfig(
        vision_config=tower,
        text_config=text,
        image_token_index=SPECIAL.index("<image>"),
        vision_feature_layer=-1,
        initializer_range=0.1,
    )
    torch.manual_seed(seed)
    return LlavaForConditionalGeneration(config)


def train(pairs: list[dict[str, Any]], held_out: list[dict[str, Any]], steps: int, folder: str) -> dict[str, float]:
    """What an evaluation of `held_out` says after training on `pairs`."""
    arguments = TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=64,
        learning_rate=2e-3,
        warmup_steps=min(50, steps),
        lr_scheduler_type="cosine",
        logging_steps=50,
        save_strategy="no",
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        seed=0,
    )
    trainer = PreferenceTrainer(
        make_model(),
        arguments,
        data_collator=PreferenceCollator(make_processor()),
        train_dataset=pairs,
        beta=1.0,
        loss_options={"prompt_nll": False},
    )
    trainer.train()
    return trainer.evaluate(held_out)


def main(arguments: Sequence[str] | None = None) -> float:
    """Train, print and return the accuracy on pictures that were held out."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shuffled", action="store_true", help="train on questions with other ones' pictures")
    parser.add_argument("--pairs", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=500)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        pairs = make_pairs(options.pairs, seed=1, shuffled=options.shuffled)
        metrics = train(pairs, make_pairs(512, seed=2), options.steps, folder)
    accuracy = metrics["eval_rewards/accuracies"]
    print(f"held-out accuracy: {100 * accuracy:.1f} % of 512 pairs")
    return accuracy


if __name__ == "__main__":
    main()
