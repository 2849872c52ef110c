"""What only several ranks need: the groups of a call, and the lm-head sharded over one of them (`sharded.py`)."""

# ruff: noqa: F401

from .groups import LEAST_SHARD, NO_GROUPS, Group, Groups, PeerError, Pending, VocabShard, local_head, summed
