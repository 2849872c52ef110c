"""`orpo-kernels train MODEL DATA`."""

from __future__ import annotations

from ..finetuning.settings import TrainSettings
from .console import Output
from .flags import command


@command(TrainSettings)
def train(settings: TrainSettings, output: Output) -> None:
    """Fine-tune a causal language model on preference data.

    MODEL is a folder or a name on the Hugging Face hub, DATA a JSON Lines, Parquet or CSV file or the name of a data set.

        orpo-kernels train HuggingFaceTB/SmolLM2-135M-Instruct pairs.jsonl --output runs/first
    """
    raise NotImplementedError
