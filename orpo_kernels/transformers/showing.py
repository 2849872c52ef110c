"""A pair as the model will see it: token by token, and what of it is trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.text import Text

from .packing import IGNORE_INDEX, SIDES, prompt_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What a token is, and the two colours that tokens next to each other take in turns.
STYLES = {
    "prompt": ("white on grey23", "white on grey35"),
    "answer": ("black on green3", "black on dark_sea_green3"),
    "end": ("black on gold1", "black on gold3"),
    "between": ("white on grey23", "white on grey35"),
    "padding": ("dim", "dim"),
}
MEANINGS = {
    "prompt": "read; of the chosen side also in the NLL, unless the NLL is on the answers alone",
    "answer": "trained on",
    "end": "trained on: the token that ends a turn",
    "between": "read: what comes between the turns of an answer",
    "padding": "neither",
}
SHOWN_AT_ENDS = 60  # tokens of a longer stretch that nobody trains on
SEPARATOR = "|"


class Token(NamedTuple):
    """A token of a side: what it is (a key of `STYLES`), and its text."""

    kind: str
    text: str


def tokens_of(pair: Mapping[str, Any], side: str, tokenizer: PreTrainedTokenizerBase) -> list[Token]:
    """The tokens of one side of a tokenised pair, as in a padded batch of this pair alone."""
    ids, labels = list(pair[f"{side}_input_ids"]), list(pair[f"{side}_labels"])
    first = prompt_length(labels)
    special = set(tokenizer.all_special_ids)
    tokens = []
    for index, (own, label) in enumerate(zip(ids, labels, strict=True)):
        kind = "prompt" if index < first else "between" if label == IGNORE_INDEX else "answer"
        tokens.append(Token("end" if kind == "answer" and own in special else kind, _text(own, tokenizer)))
    longest = max(len(pair[f"{name}_input_ids"]) for name in SIDES)
    return tokens + [Token("padding", "")] * (longest - len(ids))


def _text(token: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """What a token stands for; of one that is a part of a character, the tokenizer's own name."""
    text = tokenizer.decode([token])
    return tokenizer.convert_ids_to_tokens(token) if "\ufffd" in text else text


def legend() -> Text:
    """What the colours mean."""
    return Text("\n").join(_labelled(kind, [(meaning, STYLES[kind][0])]) for kind, meaning in MEANINGS.items())


def shown(pair: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, whole: bool = False) -> Text:
    """Both sides of a tokenised pair in colours, and readable without; needs `rich`.

    whole: also all tokens of long stretches that are not trained on.
    """
    lines = []
    for side in SIDES:
        tokens = tokens_of(pair, side, tokenizer)
        counts = {kind: sum(token.kind == kind for token in tokens) for kind in STYLES}
        told = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
        lines.append(Text(f"{side}: {told}", "bold"))
        for kind, stretch in groupby(tokens, key=lambda token: token.kind):
            lines.append(_labelled(kind, _painted(kind, [token.text for token in stretch], whole)))
    if cut := pair.get("cut_tokens"):
        lines.append(Text(f"{cut} tokens of both sides were cut", "bold red"))
    if (weight := pair.get("weight")) is not None:
        lines.append(Text(f"its loss is multiplied by {weight:g}", "bold"))
    return Text("\n").join(lines)


def _painted(kind: str, texts: Sequence[str], whole: bool) -> list[tuple[str, str]]:
    """(text, style) of tokens in a row, with a mark between them."""
    if kind == "padding":
        return [(f"{len(texts)} tokens", STYLES[kind][0])]
    left_out = len(texts) - 2 * SHOWN_AT_ENDS
    if left_out > 0 and not whole and kind in ("prompt", "between"):
        gap = [(f" ... {left_out} tokens ... ", "italic dim")]
        return [*_tokens(kind, texts[:SHOWN_AT_ENDS]), *gap, *_tokens(kind, texts[-SHOWN_AT_ENDS:])]
    return _tokens(kind, texts)


def _tokens(kind: str, texts: Sequence[str]) -> list[tuple[str, str]]:
    painted: list[tuple[str, str]] = []
    for index, text in enumerate(texts):
        painted += [(_visible(text), STYLES[kind][index % 2]), (SEPARATOR, "dim")]
    return painted[:-1]


def _visible(text: str) -> str:
    """White space that would not be seen, by its escapes."""
    return "".join({"\n": "\\n", "\t": "\\t", "\r": "\\r"}.get(char, char) for char in text)


def _labelled(kind: str, parts: list[tuple[str, str]]) -> Text:
    return Text.assemble((f"{kind:>8} ", "dim"), *parts)
