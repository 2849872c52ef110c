"""Moved to `orpo_kernels.app.data`."""

from ._moved import moved

_NAMES = ("Layout", "Preferences", "Problem", "load_preferences", "prompt_key", "split_pairs")

__getattr__ = moved(__name__, dict.fromkeys(_NAMES, "orpo_kernels.app.data"))
