"""The error that is told to a user of the command line as it is."""

from __future__ import annotations


class UserError(ValueError):
    """What was given cannot be used. The message is a sentence or two: what was wrong, and what to do."""
