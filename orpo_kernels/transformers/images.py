"""The pictures of a pair: they are read, put into its text by the model's own processor, and made into tensors.

`tokenize_pair` says how a pair names its pictures, which may also be what a `datasets.Image` column gives. The
processor says how many tokens a picture takes, and texts are expanded by it before they are tokenised, so that
everything else goes on as for text.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..text.pictures import content_of
from .rendering import Rendered, UnusablePair

if TYPE_CHECKING:
    from PIL.Image import Image

_ANIMATED = ("GIF", "PNG", "WEBP")  # a JPEG of several pictures (MPO) is a photograph with its preview
_TYPES = ("token_type_ids", "mm_token_type_ids")
_OF_TEXT = ("input_ids", "attention_mask", "text_replacement_offsets", *_TYPES)


def is_processor(tokenizer: Any) -> bool:
    """Whether this is a model's processor for pictures and text, and no tokenizer."""
    return hasattr(tokenizer, "image_processor") and hasattr(tokenizer, "tokenizer")


def tokenizer_of(given: Any) -> Any:
    """The tokenizer itself, or that of a processor."""
    return given.tokenizer if is_processor(given) else given


class Processor:
    """A model's processor (`AutoProcessor`), as tokenisation and collator use it.

    Attributes:
        tokenizer: its tokenizer, with the chat template of the processor.
        mark: what stands for a picture in a text that the processor is given.
        urls: whether pictures may be fetched from the net.

    Raises `TypeError` for a processor that does not say how it expands a text.
    """

    def __init__(self, processor: Any, urls: bool = False):
        self.processor, self.urls = processor, urls
        name = type(processor).__name__
        mark = getattr(processor, "image_token", None)
        if not isinstance(mark, str) or not hasattr(processor, "get_text_with_replacements"):
            raise TypeError(
                f"{name} does not say what stands for a picture in a text (image_token, text_replacement_offsets; "
                "transformers 5.23). Give a processor that does, or the tokenizer, for text alone."
            )
        if "labels" in processor.model_input_names:  # PaliGemma
            raise TypeError(
                f"{name} itself decides what is prompt and what is answer, and lays out the text by it; make the "
                "batches with it, and give them to causal_lm_orpo_loss."
            )
        self.mark = mark
        self.tokenizer = copy.copy(processor.tokenizer)
        template = getattr(processor, "chat_template", None)
        self.tokenizer.chat_template = template or self.tokenizer.chat_template

    def expanded(self, sides: tuple[Rendered, Rendered], images: Sequence[Image]) -> tuple[Rendered, Rendered]:
        """The texts with as many tokens in the place of every picture as it takes. Raises `UnusablePair`."""
        prompt = self.mark * len(images)
        found = self._run([prompt], [list(images)], return_text_replacement_offsets=True)
        replacements = [one["replacement"] for one in found["text_replacement_offsets"][0]]
        chosen, rejected = (_replaced(side, self.mark, replacements) for side in sides)
        return chosen, rejected

    def tensors(self, rows: Sequence[Sequence[Image]]) -> dict[str, Tensor]:
        """What the model takes beside text, of the pictures of some rows."""
        shown = [list(images) for images in rows if images]
        if not shown:
            return {}
        found = self._run([self.mark * len(images) for images in shown], shown, return_tensors="pt", padding=True)
        return {name: value for name, value in found.items() if name not in _OF_TEXT}

    def token_types(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Which of the tokens (rows, T) are a picture's, for a model that is told."""
        names = [name for name in self.processor.model_input_names if name in _TYPES]
        types = torch.isin(input_ids, torch.tensor(self.media_tokens, device=input_ids.device)).long()
        return dict.fromkeys(names, types)

    @property
    def media_tokens(self) -> tuple[int, ...]:
        return tuple(token for token in self.processor.image_token_ids if token is not None)

    def _run(self, texts: list[str], rows: list[list[Image]], **options: Any) -> Mapping[str, Any]:
        try:
            return self.processor(text=texts, images=rows, **options)
        except Exception as error:  # of many kinds: whatever a picture's size or a processor's arithmetic raises
            raise UnusablePair(f"its pictures cannot be processed ({_reason(error)})") from error


def _replaced(side: Rendered, mark: str, replacements: Sequence[str]) -> Rendered:
    pieces = side.text.split(mark)
    text = pieces[0] + "".join(new + piece for new, piece in zip(replacements, pieces[1:], strict=True))
    shift = len(text) - len(side.text)  # all pictures are in front of the answers
    return replace(side, text=text, answers=tuple((start + shift, stop + shift) for start, stop in side.answers))


# --- where pictures come from ----------------------------------------------------------------------------------------


def read_images(sources: Sequence[Any], urls: bool = False) -> list[Image]:
    """The pictures in RGB. Raises `UnusablePair`, which names the one that is missing or broken."""
    return [_read(number, source, urls) for number, source in enumerate(sources, start=1)]


def _read(number: int, source: Any, urls: bool) -> Image:
    from PIL import Image, ImageOps

    try:
        picture = source if isinstance(source, Image.Image) else Image.open(_stream(number, source, urls))
        if picture.format in _ANIMATED and getattr(picture, "is_animated", False):
            raise UnusablePair(f"its picture {number} ({_shown(source)}) is animated; give one of its frames")
        return ImageOps.exif_transpose(picture).convert("RGB")
    except UnusablePair:
        raise
    except Exception as error:  # PIL raises whatever its decoders do: OSError, SyntaxError, struct.error, ...
        raise UnusablePair(f"its picture {number} ({_shown(source)}) cannot be read ({_reason(error)})") from error


def _stream(number: int, source: Any, urls: bool) -> Any:
    """What PIL opens."""
    source = content_of(source)
    if isinstance(source, bytes | bytearray):
        return io.BytesIO(source)
    if not isinstance(source, str | Path):
        raise UnusablePair(
            f"its picture {number} is a {type(source).__name__}: neither a path nor bytes nor a PIL image"
        )
    if str(source).startswith(("http://", "https://")):
        if not urls:
            raise UnusablePair(
                f"its picture {number} ({_shown(source)}) is on the net; download it, or allow image_urls"
            )
        from urllib.request import urlopen

        with urlopen(str(source), timeout=30) as answer:
            return io.BytesIO(answer.read())
    if not Path(source).is_file():
        raise UnusablePair(f"its picture {number} is missing: there is no file {_shown(source)}")
    return Path(source)


def _shown(source: Any) -> str:
    if isinstance(source, Mapping):
        source = source.get("path") or source.get("bytes")
    text = str(source) if isinstance(source, str | Path) else f"{type(source).__name__}"
    return text if len(text) <= 80 else f"...{text[-77:]}"


def _reason(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text:.160}" if text else type(error).__name__
