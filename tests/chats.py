"""Messages and pairs of them, as rows of preference data have them."""

from __future__ import annotations

from typing import Any


def message(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def user(content: Any, **more: Any) -> dict[str, Any]:
    return message("user", content, **more)


def assistant(content: Any = "", **more: Any) -> dict[str, Any]:
    return message("assistant", content, **more)


def system(content: str) -> dict[str, Any]:
    return message("system", content)


def chat(prompt: Any, chosen: Any = "A", rejected: Any = "B", **options: Any) -> dict[str, Any]:
    """A pair of messages: a prompt or an answer that is a string is one message."""
    prompt = [user(prompt)] if isinstance(prompt, str) else prompt
    chosen, rejected = ([assistant(side)] if isinstance(side, str) else side for side in (chosen, rejected))
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **options}
