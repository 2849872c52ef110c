"""What only several ranks need: the groups of a call, and the lm-head sharded over one of them (`sharded.py`)."""

from __future__ import annotations

from .groups import LEAST_SHARD, NO_GROUPS, Group, Groups, PeerError, Pending, VocabShard, local_head, summed

__all__ = [
    "LEAST_SHARD",
    "NO_GROUPS",
    "Group",
    "Groups",
    "PeerError",
    "Pending",
    "VocabShard",
    "local_head",
    "summed",
]
