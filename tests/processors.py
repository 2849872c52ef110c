"""Processors of models that see pictures, made at home: image processors of transformers and a tokenizer of our own."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>", "<image>", "<fake_token_around_image>", "<global-img>", "<soft>"]
SPECIAL += ["<end_of_utterance>", "<row_1_col_1>", "<|vision_start|>", "<|vision_end|>", "<video>", "<eoi>"]
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}MARK{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
    "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CORPUS = ["which colour is the square? It is red, not blue. What do you see in these pictures?"] * 3


def tokenizer(mark: str = "<image>", **special: str) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        eos_token="<|end|>",
        pad_token="<|end|>",
        chat_template=TEMPLATE.replace("MARK", mark),
        additional_special_tokens=SPECIAL[1:],
        extra_special_tokens=special,
    )


SIZE = {"height": 16, "width": 16}


def llava() -> Any:
    image = transformers.CLIPImageProcessorPil(size=SIZE, crop_size=SIZE, do_center_crop=False)
    return transformers.LlavaProcessor(
        image,
        tokenizer(),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE.replace("MARK", "<image>"),
    )


def llava_next() -> Any:
    image = transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": 16}, crop_size=SIZE, image_grid_pinpoints=[[16, 32], [32, 16]]
    )
    return transformers.LlavaNextProcessor(
        image, tokenizer(), patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def qwen2_vl() -> Any:
    image = transformers.Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 64, "longest_edge": 1024}
    )
    made = tokenizer("<|vision_start|><image><|vision_end|>", image_token="<image>", video_token="<video>")
    # One for videos takes torchvision.
    without_video = type(
        "Qwen2VLProcessor", (transformers.Qwen2VLProcessor,), {"check_argument_for_proper_class": lambda *_: None}
    )
    return without_video(image, made, SimpleNamespace(model_input_names=[]))


def idefics3() -> Any:
    image = transformers.Idefics3ImageProcessorPil(
        size={"longest_edge": 16}, max_image_size={"longest_edge": 16}, do_image_splitting=False
    )
    return transformers.Idefics3Processor(image, tokenizer(), image_seq_len=4)


def gemma3() -> Any:
    image = transformers.Gemma3ImageProcessorPil(size=SIZE)
    special = {"boi_token": "<image>", "eoi_token": "<eoi>", "image_token": "<soft>"}
    return transformers.Gemma3Processor(image, tokenizer(**special), image_seq_length=4)


PROCESSORS: dict[str, Callable[[], Any]] = {
    "Llava": llava,
    "LLaVA-NeXT": llava_next,
    "Qwen2-VL": qwen2_vl,
    "Idefics3": idefics3,
    "Gemma 3": gemma3,
}


def picture(width: int = 20, height: int = 12, colour: Any = "red", mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (width, height), colour)
