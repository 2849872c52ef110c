"""How a model rates preference pairs, and how sure that is: intervals by the bootstrap over pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import track

from ...transformers import EncoderDecoderCollator, PreferenceCollator, TokenizedPair, causal_lm_orpo_loss
from ...transformers.batches import batch_on
from ...transformers.packing import IGNORE_INDEX
from ...transformers.sharing import automatic_packing
from ..errors import Diverged, UserError
from .pretrained import compute_dtype, load_model
from .settings import EvaluateSettings, TrainSettings
from .setup import has_images

RESAMPLES = 2000
COVERED = 0.95
SCORES = ("accuracy", "margin", "log_odds", "nll", "chosen_perplexity", "rejected_perplexity")


@dataclass(frozen=True)
class Scores:
    """Of n pairs, float64 arrays (n). Log-probabilities are means over the answer's tokens, in nats.

    log_odds: those of the chosen answer minus those of the rejected one.
    chosen_tokens, rejected_tokens: how many tokens the means are over.
    """

    chosen_logps: np.ndarray
    rejected_logps: np.ndarray
    log_odds: np.ndarray
    chosen_tokens: np.ndarray
    rejected_tokens: np.ndarray

    @property
    def margins(self) -> np.ndarray:
        return self.chosen_logps - self.rejected_logps

    def metrics(self, which: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """`SCORES`, of all pairs, or of the pairs at the indices `which` (..., m): then arrays (...).

        accuracy: the share of pairs whose chosen answer has the higher mean log-probability.
        margin, log_odds: means over pairs.
        nll, chosen_perplexity: of all tokens of the chosen answers together; rejected_perplexity likewise.
        """
        take = np.arange(len(self.log_odds)) if which is None else which
        nll = _nll(self.chosen_logps[take], self.chosen_tokens[take])
        return {
            "accuracy": (self.margins > 0)[take].mean(-1),
            "margin": self.margins[take].mean(-1),
            "log_odds": self.log_odds[take].mean(-1),
            "nll": nll,
            "chosen_perplexity": np.exp(nll),
            "rejected_perplexity": np.exp(_nll(self.rejected_logps[take], self.rejected_tokens[take])),
        }


def _nll(logps: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    return -(logps * tokens).sum(-1) / tokens.sum(-1)


def score_model(
    name: str,
    tokenizer: Any,
    pairs: Sequence[TokenizedPair],
    settings: EvaluateSettings | TrainSettings,
    console: Console | None = None,
) -> Scores:
    """`score`, by the model of that name, loaded as the settings say onto the GPU where there is one.

    Raises `UserError` for a model that cannot be loaded or evaluated.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model = load_model(name, compute_dtype(settings.dtype)).to(device)
        return score(model, tokenizer, pairs, settings.batch_size, console, f"Rating by {name}")
    except (TypeError, ValueError) as error:
        raise UserError(f"{name} cannot be evaluated. {error}") from error


@torch.no_grad()
def score(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[TokenizedPair],
    batch_size: int,
    console: Console | None = None,
    title: str = "Rating",
) -> Scores:
    """Score the pairs in their order, with a bar on a terminal. One pass, no gradient.

    Raises `Diverged` where a value is not finite.
    """
    model.eval()
    packing, _ = automatic_packing(model, model.device, has_images(pairs))
    collate = PreferenceCollator(tokenizer, packing=packing)
    if model.config.is_encoder_decoder:
        collate = EncoderDecoderCollator.of(collate, model)
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i]["chosen_input_ids"]))  # similar lengths: less padding
    values = np.empty((3, len(pairs)))
    starts = range(0, len(order), batch_size)
    hidden = console is None or not console.is_terminal
    for start in track(starts, escape(title), console=console, transient=True, disable=hidden):
        chunk = order[start : start + batch_size]
        batch = batch_on(collate([pairs[i] for i in chunk]), model.device)
        out = causal_lm_orpo_loss(model, **batch, prompt_nll=False)
        values[:, chunk] = torch.stack([out.chosen_logps, out.rejected_logps, out.log_odds]).cpu().numpy()
    if broken := int((~np.isfinite(values)).any(0).sum()):
        raise Diverged(f"Its log-probabilities are not finite for {broken} of {len(pairs)} pairs.")
    chosen, rejected, log_odds = values
    return Scores(chosen, rejected, log_odds, _tokens(pairs, "chosen"), _tokens(pairs, "rejected"))


def _tokens(pairs: Sequence[Any], side: str) -> np.ndarray:
    counts = [sum(label != IGNORE_INDEX for label in pair[f"{side}_labels"][1:]) for pair in pairs]
    return np.array(counts, dtype=np.float64)


def intervals(scores: Scores, against: Scores | None = None, seed: int = 0) -> dict[str, dict[str, float]]:
    """Each metric's value, and the low and high end of its interval.

    The percentile bootstrap (Efron and Tibshirani 1993, ch. 13): pairs are drawn anew with replacement. With `against`,
    the metrics are differences to that model's on the same pairs, which are drawn together.
    """
    pairs = len(scores.log_odds)
    which = np.random.default_rng(seed).integers(pairs, size=(RESAMPLES, pairs))
    value, drawn = scores.metrics(), scores.metrics(which)
    if against is not None:
        base, base_drawn = against.metrics(), against.metrics(which)
        value = {name: value[name] - base[name] for name in SCORES}
        drawn = {name: drawn[name] - base_drawn[name] for name in SCORES}
    ends = 100 * (1 - COVERED) / 2
    result = {}
    for name in SCORES:
        low, high = np.percentile(drawn[name], [ends, 100 - ends])
        result[name] = {"value": float(value[name]), "low": float(low), "high": float(high)}
    return result
