"""Whether pairs fit a model: their ids into its embedding, their sequences into its positions."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

POSITIONS = ("max_position_embeddings", "max_seq_len")  # names in a config; the second is MPT's
# Models that count positions from the padding token's id on, so that the first ones of their table go unused.
FROM_PADDING = (
    *("roberta", "xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm"),
    *("camembert", "data2vec-text", "xmod"),
)

logger = logging.getLogger(__name__)


def positions_of(config: Any) -> int | None:
    """How long a sequence may be, by a model's config; None where that says nothing."""
    text = config.get_text_config(decoder=True)
    positions = next((found for name in POSITIONS if (found := getattr(text, name, None)) is not None), None)
    counts_from_padding = positions is not None and text.model_type in FROM_PADDING
    return positions - text.pad_token_id - 1 if counts_from_padding else positions


@dataclass
class Extent:
    """The largest id and the longest sequence of what is added."""

    largest_id: int = -1
    longest: int = 0

    def add(self, *sequences: Sequence[int]) -> Extent:
        self.largest_id = max(self.largest_id, *(int(max(ids, default=-1)) for ids in sequences))
        self.longest = max(self.longest, *map(len, sequences))
        return self


def check_fits(model: Any, extent: Extent, name: str, say: bool = True) -> None:
    """Warn (if `say`) of sequences of the set `name` that have more tokens than the model has positions.

    Not refused, because rotary positions go on beyond those that a config names. Raises `ValueError` for ids that the
    embedding does not have: on a GPU they would end the process in a kernel.
    """
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    rows = getattr(embedding, "num_embeddings", None)
    if rows is not None and extent.largest_id >= rows:
        raise ValueError(
            f"The {name} set has, or is padded with, the token id {extent.largest_id}, but the model's embedding has "
            f"{rows} rows, for the ids up to {rows - 1}: take the tokenizer that belongs to the model, or enlarge the "
            "embedding (resize_token_embeddings)."
        )
    config = getattr(model, "config", None)  # an encoder-decoder's prompts and answers have positions of their own
    positions = None if config is None or config.is_encoder_decoder else positions_of(config)
    if say and positions is not None and extent.longest > positions:
        logger.warning(
            "The %s set has a sequence of %d tokens, but the model has %d positions: give a max_length up to that, "
            "unless the model is to learn longer ones.",
            *(name, extent.longest, positions),
        )
