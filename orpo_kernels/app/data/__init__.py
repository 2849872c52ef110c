"""Preference data as people have it: read a file or data set, see how its pairs are written, name what is unusable.

preferences = load_preferences("pairs.jsonl")
preferences.pairs      # for PreferenceCollator: prompt, chosen, rejected
preferences.problems   # row and reason of each that cannot be used
preferences.ignored    # columns that are no part of the conversation: ids, scores
"""

from __future__ import annotations

from .layouts import Layout
from .preferences import Preferences, Problem, load_preferences
from .splitting import prompt_key, split_pairs

__all__ = ["Layout", "Preferences", "Problem", "load_preferences", "prompt_key", "split_pairs"]
