"""Rows with pictures: what becomes of them in a pair and in a batch, and what of those that are broken."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.23")
pytest.importorskip("PIL")

from PIL import Image

from orpo_kernels.text.pictures import fingerprint
from orpo_kernels.transformers import PreferenceCollator, UnusablePair, tokenize_pair, tokenize_pairs
from orpo_kernels.transformers.images import is_processor
from orpo_kernels.transformers.pairs import UsablePairs

from .processors import PROCESSORS, llava, picture, tokenizer

ANSWERS = {"chosen": "It is red", "rejected": "It is blue"}
PLACE = {"type": "image"}


def words(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def asked(*content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content[0] if isinstance(content[0], str) else list(content)}]


def pair(*content: Any, **more: Any) -> dict[str, Any]:
    return {"prompt": asked(*content or (PLACE, words("which colour?"))), **ANSWERS, **more}


@pytest.fixture(scope="module")
def processor():
    return llava()


def usable_or_not(row: dict[str, Any], processor: Any, **options: Any) -> tuple[Any, str | None]:
    pairs, refused = tokenize_pairs([row], processor, **options)
    return (pairs[0], None) if pairs else (None, refused[0].reason)


# --- the text --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROCESSORS)
def test_ids_and_pictures_are_the_processors_own(name):
    processor = PROCESSORS[name]()
    collator = PreferenceCollator(processor, packing="padded")
    shown = [picture(20, 12), picture(12, 40, "blue")]
    pairs = [pair(images=[one]) for one in shown] + [pair(PLACE, words(" and "), PLACE, images=shown)]
    batch = collator(pairs)
    texts, images = [], []
    for side in ("chosen", "rejected"):
        for one in pairs:
            messages = [*one["prompt"], {"role": "assistant", "content": [words(one[side])]}]
            texts.append(collator.tokenizer.apply_chat_template(messages, tokenize=False))
            images.append(one["images"])
    own = processor(text=texts, images=images, return_tensors="pt", padding=True, padding_side="right")
    assert batch.keys() == {*own.keys(), "labels"}
    for key, value in own.items():
        torch.testing.assert_close(batch[key], value, msg=key)
    media = torch.tensor(collator.processor.media_tokens)
    assert not torch.isin(batch["labels"], media).any()
    answer = batch["labels"][0][batch["labels"][0] >= 0]
    assert collator.tokenizer.decode(answer) == "It is red<|end|>"


FORMS = {
    "TRL": pair(PLACE, words("which colour?")),
    "TRL, strings": pair("which colour?"),
    "ms-swift": pair("<image>which colour?"),
    "LLaMA-Factory": {
        "prompt": [{"from": "human", "value": "<image>which colour?"}],
        "chosen": {"from": "gpt", "value": "It is red"},
        "rejected": {"from": "gpt", "value": "It is blue"},
    },
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("column", ["images", "image"])
def test_every_form_says_the_same(form, column, processor):
    expected = tokenize_pair(pair(images=[picture()]), processor)
    found = tokenize_pair({**FORMS[form], column: [picture()] if column == "images" else picture()}, processor)
    assert {**found, "images": 0} == {**expected, "images": 0}


def test_a_plain_text_has_its_pictures_where_it_says(processor):
    plain = {"prompt": "Look: <image> which?", "chosen": " red", "rejected": " blue", "images": [picture()]}
    text = processor.tokenizer.decode(tokenize_pair(plain, processor)["chosen_input_ids"])
    assert text == "Look: " + 16 * "<image>" + " which? red<|end|>"


def test_pairs_without_pictures_stand_beside_others(processor):
    collator = PreferenceCollator(processor, packing="padded")
    text = pair("which colour?")
    batch = collator([text, pair(images=[picture()]), text])
    assert len(batch["pixel_values"]) == 2
    assert "pixel_values" not in collator([text])
    assert collator([text])["input_ids"].equal(PreferenceCollator(collator.tokenizer)([text])["input_ids"])


def test_shared_prompts_have_each_picture_once_in_the_order_of_the_rows(processor):
    colours = ["red", "blue", "green", "white"]
    pairs = [
        pair(PLACE, words("what? " * length), images=[picture(colour=colour)])
        for colour, length in zip(colours, (1, 9, 3, 6), strict=True)
    ]
    batch = PreferenceCollator(processor, packing="shared")(pairs)
    order = batch["packed"].order()
    assert sorted(order) == [0, 1, 2, 3] != order  # the longest first
    one_by_one = PreferenceCollator(processor, packing="padded", answers="chosen")
    expected = torch.cat([one_by_one([pairs[index]])["pixel_values"] for index in order])
    assert batch["pixel_values"].equal(expected)
    # The rows hold their prompts in that order, too.
    firsts = [(batch["packed"].segments == 3 * index).nonzero()[0].tolist() for index in order]
    assert firsts == sorted(firsts)


# --- sources ---------------------------------------------------------------------------------------------------------


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["path", "string", "bytes", "PIL", "datasets", "datasets path"])
def test_a_picture_comes_in_many_ways(kind, tmp_path, processor):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(picture()))
    sources = {
        "path": path,
        "string": str(path),
        "bytes": path.read_bytes(),
        "PIL": picture(),
        "datasets": {"bytes": path.read_bytes(), "path": None},
        "datasets path": {"bytes": None, "path": str(path)},
    }
    collator = PreferenceCollator(processor)
    expected = collator([pair(images=[picture()])])["pixel_values"]
    assert collator([pair(images=[sources[kind]])])["pixel_values"].equal(expected)


TRUNCATED = encoded(Image.effect_noise((64, 64), 80))[:900]
GIF = encoded(picture(), "GIF", save_all=True, append_images=[picture(colour="blue")])
GOOD = {
    "CMYK": encoded(picture(mode="CMYK", colour=(0, 9, 9, 0)), "JPEG"),
    "one pixel": encoded(picture(1, 1)),
    "a line": encoded(picture(300, 1)),
    "grey": encoded(picture(mode="L", colour=9)),
    "16 bits": encoded(picture(mode="I;16", colour=9)),
    "palette": encoded(picture().convert("P")),
    "transparent": encoded(picture(mode="RGBA", colour=(1, 2, 3, 4))),
    "a still GIF": encoded(picture(), "GIF"),
    "20 megapixels": encoded(picture(5000, 4000), "JPEG"),
}
BROKEN = {
    "missing": ("no/such/file.png", "its picture 1 is missing: there is no file no/such/file.png"),
    "truncated": (TRUNCATED, r"its picture 1 \(bytes\) cannot be read"),
    "empty": (b"", "its picture 1 .* cannot be read"),
    "no picture": (b"hello" * 100, "its picture 1 .* cannot be read"),
    "animated": (GIF, r"its picture 1 \(bytes\) is animated"),
    "a number": (7, "its picture 1 is a int"),
    "a long name": ("x" * 5000, "its picture 1 .* cannot be read"),
    "no name": ("a\0b", "its picture 1 is missing"),
    "a folder": ("/", "its picture 1 is missing"),
    "on the net": ("https://example.org/a.png", "is on the net; download it, or allow image_urls"),
    "nothing": ({"bytes": None, "path": None}, "its picture 1 is a NoneType"),
}


@pytest.mark.parametrize("name", GOOD)
def test_odd_pictures_are_taken(name, processor):
    batch = PreferenceCollator(processor)([pair(images=[GOOD[name]])])
    assert batch["pixel_values"].shape == (2, 3, 16, 16)
    assert batch["pixel_values"].isfinite().all()


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_picture_is_named(name, processor):
    source, reason = BROKEN[name]
    with pytest.raises(UnusablePair, match=reason):
        tokenize_pair(pair(images=[source]), processor)
    pairs, refused = tokenize_pairs([pair(images=[source]), pair(images=[picture()])], processor)
    assert len(pairs) == 1
    assert [one.index for one in refused] == [0]


UNUSABLE = [
    (pair(PLACE, PLACE, images=[picture()]), "it has 1 pictures, but its prompt has 2 places"),
    (pair("<image> and <image>", images=[picture()] * 3), "it has 3 pictures, but its prompt has 2 places"),
    (pair(PLACE, words("which?")), "a part of type 'image', but only text is served"),
    (pair("<image>which?"), "it has 0 pictures, but its prompt has 1 places"),
    (pair(images=[picture()]) | {"chosen": "<image> red"}, "its chosen answer has '<image>'"),
    (pair({"type": "image", "url": "a.png"}, images=["b.png"]), "holds a picture .url.: put it into the column images"),
    (pair("which?", videos=["a.mp4"]), "it has videos, but only text and pictures are served"),
    (pair(images=[]), "a part of type 'image'"),
]


@pytest.mark.parametrize(("row", "reason"), UNUSABLE)
def test_rows_whose_pictures_do_not_fit_their_text_are_refused(row, reason, processor):
    with pytest.raises(UnusablePair, match=reason):
        tokenize_pair(row, processor)


def test_a_tokenizer_takes_no_pictures():
    with pytest.raises(UnusablePair, match="it has images, but only text is served"):
        tokenize_pair(pair(images=[picture()]), tokenizer())
    assert not is_processor(tokenizer())


def test_no_row_ends_in_a_traceback(processor, tmp_path):
    """Rows put together at random of what was good and bad above."""
    chance, collator = random.Random(0), PreferenceCollator(processor, max_length=40)
    sources = [*list(GOOD.values())[:6], *(source for source, _ in BROKEN.values()), picture(), None]
    contents = [(PLACE, words("which?")), ("<image>which?",), ("which?",), (PLACE, words("a"), PLACE), ("<image>" * 3,)]
    outcomes = {True: 0, False: 0}
    for _ in range(150):
        images = [chance.choice(sources) for _ in range(chance.choice((0, 1, 1, 1, 2, 3)))]
        row = pair(*chance.choice(contents), images=images)
        usable, refused = usable_or_not(row, processor, max_length=40)
        outcomes[refused is None] += 1
        if usable is not None:
            collator([usable])
            assert sum(token in collator.processor.media_tokens for token in usable["chosen_input_ids"]) % 16 == 0
    assert min(outcomes.values()) > 10


# --- truncation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROCESSORS)
def test_truncation_never_cuts_a_picture(name):
    processor = PROCESSORS[name]()
    row = pair(words("one two three four five six "), PLACE, words("which?"), images=[picture()])
    whole = tokenize_pair(row, processor)
    media = PreferenceCollator(processor).processor.media_tokens
    pictures, length = sum(token in media for token in whole["chosen_input_ids"]), len(whole["chosen_input_ids"])
    used = 0
    for max_length in range(2, length, 3):
        cut, refused = usable_or_not(row, processor, max_length=max_length)
        if cut is None:
            assert "would cut its pictures" in refused
            continue
        used += 1
        assert len(cut["chosen_input_ids"]) <= max_length
        assert sum(token in media for token in cut["chosen_input_ids"]) == pictures
        if name == "Qwen2-VL":  # what opens a picture stays as well
            assert "<|vision_start|>" in processor.tokenizer.decode(cut["chosen_input_ids"])
    assert 0 < used < len(range(2, length, 3))


# --- sets ------------------------------------------------------------------------------------------------------------


def test_a_set_keeps_ids_and_reads_pictures_anew(tmp_path, processor):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(picture()))
    rows = [pair(images=[str(path)]), pair(images=["gone.png"]), pair("which?")]
    usable = UsablePairs(rows, PreferenceCollator(processor))
    assert len(usable) == 2
    assert [(one.index, "missing" in one.reason) for one in usable.unusable] == [(1, True)]
    assert usable[0]["images"] == [str(path)]
    assert "images" not in usable[1]
    assert usable._kept[0]["images"] is None
    path.unlink()
    with pytest.raises(ValueError, match=r"cannot be used any more: its picture 1 is missing"):
        usable.collator([usable[0]])


def test_pictures_tell_pairs_apart(tmp_path):
    paths = [tmp_path / name for name in ("a.png", "b.png")]
    for path, colour in zip(paths, ("red", "blue"), strict=True):
        path.write_bytes(encoded(picture(colour=colour)))
    sources = [*map(str, paths), picture(), picture(colour="blue"), "gone.png", {"bytes": b"x", "path": "a"}]
    assert len(set(map(fingerprint, sources))) == len(sources)
    assert fingerprint(str(paths[0])) == fingerprint(encoded(picture()))
    for odd in ("x" * 5000, "a\0b", str(tmp_path), 7, None, Image.open(io.BytesIO(TRUNCATED))):
        assert fingerprint(odd)
    assert fingerprint(picture()) == fingerprint(picture())
    assert fingerprint(Path(paths[0])) == fingerprint(str(paths[0]))


def test_processors_that_cannot_be_served_are_named():
    class Old:
        image_processor = tokenizer = object()

    with pytest.raises(TypeError, match="Old does not say what stands for a picture"):
        PreferenceCollator(Old())

    class PaliGemmaProcessor(Old):
        image_token = "<image>"
        model_input_names = ("input_ids", "labels")
        get_text_with_replacements = None

    with pytest.raises(TypeError, match="PaliGemmaProcessor itself decides what is prompt"):
        PreferenceCollator(PaliGemmaProcessor())
