"""Pairs with pictures: the table of docs/images.md is what the code says today, and what becomes of a batch."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", minversion="5.23")

from orpo_kernels.methods import ORPO
from orpo_kernels.transformers import (
    PreferenceCollator,
    batch_rows,
    causal_lm_answers,
    causal_lm_orpo_loss,
    refuses_shared_prompt,
)
from orpo_kernels.transformers.batches import with_rows
from orpo_kernels.transformers.media import media_tokens
from orpo_kernels.transformers.packing import pack_pairs
from orpo_kernels.transformers.sharing import _SHARES_IMAGES

from .models import assert_same, lines_of
from .models import build as build_text
from .models import make_batch as text_batch
from .processors import PROCESSORS, picture
from .vision_models import IMAGE, MODELS, PAGE, build, make_pairs, padded_batch, pictures, row

LINES = lines_of(PAGE)


# The others are like one of these.
FAST = ("Llava", "LLaVA-NeXT", "Idefics3", "InternVL", "Mistral 3", "AyaVision", "LFM2-VL", "Gemma 3", "PaliGemma")
FAST += ("Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL", "GLM-4V", "Llama 4", "Video-LLaMA 3")


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
)
def test_the_table_tells_what_is_true(name):
    line = row(name)
    assert "differ**" not in line
    assert "differs**" not in line
    assert line in LINES, "run python -m tests.vision_models"


def test_the_table_holds_no_other_model():
    assert len(LINES) == 1 + len(MODELS)


@pytest.mark.slow
def test_what_may_share_pictures_has_been_tried():
    exact = [line.split(" | ")[0].removeprefix("| ") for line in LINES if "| exact |" in line]
    assert {build(name).config.model_type for name in exact} == set(_SHARES_IMAGES)


def test_pictures_count_and_the_tower_is_trained():
    model, batch = build("Llava"), padded_batch("Llava", build("Llava"))
    first = causal_lm_orpo_loss(model, **batch)
    first.loss.backward()
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "projector" in n)
    other = causal_lm_orpo_loss(model, **batch | {"pixel_values": batch["pixel_values"].flip(0)})
    assert not torch.allclose(first.loss, other.loss)


@pytest.mark.parametrize("prompt_nll", [True, False])
def test_tokens_of_a_picture_are_no_targets(prompt_nll):
    model = build("Idefics3")
    assert media_tokens(model) == (IMAGE,)
    batch = {key: value for key, value in padded_batch("Idefics3", model).items() if key != "pixel_values"}
    method = ORPO(prompt_nll=prompt_nll)
    padded = with_rows(batch, method, media_tokens=media_tokens(model))["rows"]
    packed = pack_pairs(make_pairs("Idefics3"), 0, capacity=0)
    shared = with_rows(packed, method, media_tokens=media_tokens(model))["rows"]
    for rows in (padded, shared):
        assert IMAGE not in rows.target
        assert (rows.nll_weight > 0).sum() == (8 + 2 * 6 if prompt_nll else 8)
    unaware = batch_rows(**{key: batch[key] for key in ("input_ids", "attention_mask", "labels")})
    assert (unaware.target == IMAGE).sum() == 2 * 4


def test_rows_made_on_the_host_are_those_of_the_loss():
    model = build("Llava")
    batch = padded_batch("Llava", model)
    made = with_rows(batch, ORPO(), media_tokens=media_tokens(model))
    torch.testing.assert_close(causal_lm_orpo_loss(model, **made).loss, causal_lm_orpo_loss(model, **batch).loss)


def test_answers_of_a_reference_see_the_pictures():
    model = build("Llava")
    batch = padded_batch("Llava", model)
    means = causal_lm_orpo_loss(model, **batch)
    answers = causal_lm_answers(model, **batch)
    expected = torch.cat((means.chosen_logps, means.rejected_logps))
    torch.testing.assert_close(answers.mean_logps, expected, check_dtype=False)
    blind = causal_lm_answers(model, **{key: value for key, value in batch.items() if key != "pixel_values"})
    assert not torch.allclose(blind.logps, answers.logps)


def count_pictures(model, monkeypatch):
    """The pictures that the tower has seen since."""
    seen, body = [], model.model
    original = body.get_image_features
    monkeypatch.setattr(
        body,
        "get_image_features",
        lambda pixel_values, *a, **o: seen.append(len(pixel_values)) or original(pixel_values, *a, **o),
    )
    return seen


def test_a_shared_picture_passes_the_tower_once(monkeypatch):
    model, pairs = build("Llava"), make_pairs("Llava")
    shared = pack_pairs(pairs, 0, capacity=0) | pictures("Llava", len(pairs))
    for batch in (padded_batch("Llava", model), shared):  # the first batch also runs through the model's own forward
        causal_lm_orpo_loss(model, **batch)
    seen = count_pictures(model, monkeypatch)
    causal_lm_orpo_loss(model, **padded_batch("Llava", model))
    causal_lm_orpo_loss(model, **shared)
    assert seen == [2 * len(pairs), len(pairs)]


@pytest.mark.parametrize("name", ["LLaVA-NeXT", "Idefics3"])
def test_sharing_is_exact_for_any_number_of_pictures(name):
    processor, shown = PROCESSORS[name](), [picture(20, 12), picture(12, 30, "blue"), picture(9, 9, "green")]
    model = build(name, vocab_size=len(processor.tokenizer), image=processor.image_token_id)
    pairs = []
    for length, images in ((1, shown[:1]), (9, shown[1:]), (3, []), (5, shown[2:])):
        content = [{"type": "image"}] * len(images) + [{"type": "text", "text": "what " * length}]
        pair = {"prompt": [{"role": "user", "content": content}], "chosen": "It is red", "rejected": "no " * length}
        pairs.append(pair | ({"images": images} if images else {}))
    padded, shared = (PreferenceCollator(processor, packing=packing)(pairs) for packing in ("padded", "shared"))
    assert shared["packed"].order() != [0, 1, 2, 3]
    assert_same(causal_lm_orpo_loss(model, **shared), causal_lm_orpo_loss(model, **padded), model)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("Qwen2-VL", "an axis each for time"), ("Gemma 3", "see each other in both directions (token_type_ids)")],
)
def test_shared_pictures_are_refused_by_name(name, reason):
    model = build(name)
    batch = pack_pairs(make_pairs(name), 0, capacity=0) | pictures(name, 2)
    assert reason in refuses_shared_prompt(model, images=True)
    with pytest.raises(ValueError, match="cannot share prompts"):
        causal_lm_orpo_loss(model, **batch)


def test_a_model_nobody_tried_pads():
    model = build("Llava")
    model.config.model_type = "something_new"
    assert "has not been tried with pictures" in refuses_shared_prompt(model, images=True)
    assert refuses_shared_prompt(model) is None


def test_a_model_of_text_takes_no_pictures():
    model, batch = build_text("Llama"), text_batch()
    with pytest.raises(TypeError, match="pixel_values, but the forward of LlamaForCausalLM takes none"):
        causal_lm_orpo_loss(model, **batch, pixel_values=torch.ones(4, 3, 4, 4))


def test_a_forward_that_does_more_with_pictures_is_found():
    model = build("Llava")
    forward = type(model).forward

    class Brighter(type(model)):
        def forward(self, input_ids=None, pixel_values=None, **others):
            pixels = None if pixel_values is None else pixel_values + 1
            return forward(self, input_ids=input_ids, pixel_values=pixels, **others)

    batch = padded_batch("Llava", model)
    model.__class__ = Brighter
    text = {key: value for key, value in batch.items() if key != "pixel_values"}
    causal_lm_orpo_loss(model, **text)
    with pytest.raises(ValueError, match="its logits differ"):
        causal_lm_orpo_loss(model, **batch)
