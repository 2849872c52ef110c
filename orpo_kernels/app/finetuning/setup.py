"""From settings to the model, the tokenizer and the tokenised pairs. What cannot be had is a `UserError`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import track

from ...transformers import TokenizedPair, UnusablePair, tokenize_pair
from ...transformers.encoder_decoder_collator import tokenize_in_two_parts
from ...transformers.images import tokenizer_of
from ..data import Preferences, load_preferences, split_pairs
from ..errors import UserError
from .held_out import Record, held_out_prompts, keys, known_record
from .pretrained import config_of, rows_and_positions
from .remarks import say
from .settings import DataSettings, TrainSettings, held_out_number


@dataclass(frozen=True)
class Pairs:
    """Preferences, and what the tokenizer made of each.

    Attributes:
        offered: all pairs of the source.
        preferences: those that the tokenizer takes.
        tokens: of each of these, by its index in `offered`.
    """

    offered: Preferences
    preferences: Preferences
    tokens: dict[int, TokenizedPair]

    @property
    def tokenized(self) -> list[TokenizedPair]:
        return list(self.tokens.values())

    def by_prompt(self) -> list[tuple[str, TokenizedPair]]:
        """The key of each one's prompt (`data.prompt_key`), and its tokens."""
        return list(zip(keys(self.preferences.pairs), self.tokenized, strict=True))


def load_pairs(settings: DataSettings, tokenizer: Any, console: Console, source: str = "", split: str = "") -> Pairs:
    """Read and tokenise `source` (by default `settings.data`), and say what was recognised and what not."""
    preferences = load_preferences(
        source or settings.data,
        split=split or settings.split,
        layout=settings.layout,
        columns=settings.column_names(),
        ignore_columns=settings.ignored_columns(),
    )
    given, tokenizer = tokenizer, tokenizer_of(tokenizer)
    rows, positions = rows_and_positions(tokenizer.name_or_path)
    max_length = min(settings.max_length, positions or settings.max_length)
    options: Any = {"max_length": max_length, "too_long": "cut" if settings.too_long == "cut" else "refuse"}
    tokenize = tokenization_of(tokenizer)
    tokens, refused = {}, {}
    shown = track(preferences.pairs, "Tokenising", console=console, transient=True, disable=not console.is_terminal)
    for index, pair in enumerate(shown):
        try:
            tokens[index] = tokenize(pair, given, **options)
        except UnusablePair as unusable:
            refused[index] = str(unusable)
        except (ValueError, TypeError) as error:  # of the tokenizer: no offsets, no EOS, no template
            raise UserError(f"{settings.model} has no tokenizer for these pairs. {error}") from error
    pairs = Pairs(preferences, preferences.without(refused), tokens)
    tokenized = pairs.tokenized
    say(console, pairs.preferences.describe())
    if not tokenized:
        first = pairs.preferences.problems[0]
        raise UserError(
            f"{source or settings.data} has no pair that the tokenizer of {settings.model} can take. Of row "
            f"{first.row}: {first.reason}."
        )
    _check_ids(tokenized, tokenizer, rows)
    if cut := [lost for pair in tokenized if (lost := pair.get("cut_tokens"))]:
        more = "--max-length takes more of them"
        if max_length < settings.max_length:
            more = f"{tokenizer.name_or_path} has {positions} positions, fewer than --max-length {settings.max_length}"
        say(
            console,
            f"{len(cut)} of {len(tokenized)} pairs have more than {max_length} tokens and were cut, by {sum(cut)} in "
            f"all: --too-long leave-out does without them, {more}.",
        )
    if "text" in preferences.layouts and (tokenizer.chat_template or getattr(given, "chat_template", None)):
        say(console, "Plain text for a model with a chat template: --layout chat would make messages of it.")
    return pairs


def has_images(pairs: Iterable[TokenizedPair]) -> bool:
    return any("images" in pair for pair in pairs)


def tokenization_of(tokenizer: Any) -> Callable[..., TokenizedPair]:
    """How pairs become tokens of the model that the tokenizer came with: in one sequence, or in two parts."""
    config = config_of(tokenizer_of(tokenizer).name_or_path)
    return tokenize_in_two_parts if config.is_encoder_decoder else tokenize_pair


def _check_ids(pairs: list[TokenizedPair], tokenizer: Any, rows: int | None) -> None:
    """Refuse ids that the model's embedding, of so many `rows`, does not have."""
    padding = [] if tokenizer.pad_token_id is None else [tokenizer.pad_token_id]
    largest = max(max(*pair["chosen_input_ids"], *pair["rejected_input_ids"], *padding) for pair in pairs)
    if rows is not None and largest >= rows:
        raise UserError(
            f"The tokenizer of {tokenizer.name_or_path} has the token {tokenizer.convert_ids_to_tokens(largest)!r} "
            f"with the id {largest}, but the model's embedding has {rows} rows, for the ids up to {rows - 1}: take the "
            "tokenizer that belongs to the model, or enlarge the embedding (resize_token_embeddings)."
        )


class Split(NamedTuple):
    """All pairs that the tokenizer takes; those to train on and those held out, tokenised; and which those are."""

    pairs: Pairs
    training: list[TokenizedPair]
    held_out: list[TokenizedPair]
    record: Record


def load_split(settings: TrainSettings, tokenizer: Any, console: Console) -> Split:
    """The data's two sides. Held out is nothing that is trained on, or was before, as far as the model's folder tells.

    Raises `UserError` where nothing is left to train on, and where pairs are to be held out and none is left.
    """
    known = known_record(settings.model, console)
    before = known.trained if known else frozenset()
    pairs = load_pairs(settings, tokenizer, console)
    number = held_out_number(settings.eval_split)
    if number is None:
        elsewhere = _elsewhere(settings, tokenizer, console)
        asked = keys(elsewhere.offered.pairs)
        prompts = frozenset(asked)
        training, held_out = pairs.by_prompt(), elsewhere.by_prompt()
    else:
        prompts = held_out_prompts(pairs.offered.pairs, number, settings.seed, settings.data)
        asked = [key for key in keys(pairs.offered.pairs) if key in prompts]
        training = [(key, pair) for key, pair in pairs.by_prompt() if key not in prompts]
        held_out = [(key, pair) for key, pair in pairs.by_prompt() if key in prompts]
    if not training:
        raise UserError(
            f"--eval-split {settings.eval_split} leaves no pair of {settings.data} to train on: give "
            f"{'a smaller one' if _can_be_split(pairs, settings.seed) else '0, to hold out none'}."
        )
    if all(pair.get("weight") == 0 for _, pair in training):
        raise UserError(
            f"All {len(training)} pairs of {settings.data} to train on have the weight 0: nothing is learnt."
        )
    trained = before.union(key for key, _ in training)
    fresh = [(key, pair) for key, pair in held_out if key not in trained]
    if old := sum(key in before for key, _ in held_out):
        say(console, f"{old} held-out pairs are left out: {settings.model} was trained on their prompts.")
    if both := len(held_out) - len(fresh) - old:
        say(
            console, f"{both} held-out pairs are left out: {settings.data} has their prompts too, which are trained on."
        )
    if asked and not fresh:
        raise UserError(
            f"All {len(asked)} pairs that --eval-split {settings.eval_split} holds out were refused or left out, so "
            f"that none can be evaluated: give {'other pairs' if number is None else 'a larger one'}, or 0 to hold out "
            "none."
        )
    record = Record(trained, prompts - trained)
    return Split(pairs, [pair for _, pair in training], [pair for _, pair in fresh], record)


def _can_be_split(pairs: Pairs, seed: int) -> bool:
    """Whether the least that can be held out, which is one prompt, leaves a pair to train on."""
    training, _ = split_pairs(pairs.offered.pairs, 1, seed)
    return not pairs.tokens.keys().isdisjoint(training)


def _elsewhere(settings: TrainSettings, tokenizer: Any, console: Console) -> Pairs:
    """Held-out pairs in a file, or in another split of the data set."""
    if Path(settings.eval_split).is_file():
        return load_pairs(settings, tokenizer, console, source=settings.eval_split)
    if Path(settings.data).is_file():
        raise UserError(
            f"--eval-split {settings.eval_split} is no number and no file, and {settings.data} has no splits."
        )
    return load_pairs(settings, tokenizer, console, split=settings.eval_split)
