"""The library does not know the application, what only several ranks need is apart, and all of it can be read."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "orpo_kernels"


def imported(path: Path) -> set[str]:
    """The modules of ours that a file imports, anywhere in it, by their full names."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(parts[: len(parts) - node.level]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            found |= {module, *(f"{module}.{name.name}" for name in node.names)}
    return {name for name in found if name.startswith("orpo_kernels")}


def files_of(*rooms: str) -> list[Path]:
    return [path for room in rooms for path in sorted((PACKAGE / room).rglob("*.py"))]


LIBRARY = [path for path in files_of("") if "app" not in path.parts and path.name != "__main__.py"]
ABOVE = ("orpo_kernels.transformers", "orpo_kernels.trl", "orpo_kernels.compat", "orpo_kernels.text")


@pytest.mark.parametrize(
    ("files", "unknown"),
    [
        pytest.param(LIBRARY, ("orpo_kernels.app",), id="the library knows nothing of the application"),
        pytest.param(files_of("engine", "ops", "parallel"), ABOVE, id="the engine knows neither models nor trainers"),
        pytest.param(
            [*files_of("engine/schedules", "ops"), PACKAGE / "engine/projection.py"],
            ("orpo_kernels.parallel",),
            id="one device needs no ranks",
        ),
    ],
)
def test_a_room_does_not_know_another(files: list[Path], unknown: tuple[str, ...]) -> None:
    assert not [(path.name, name) for path in files for name in imported(path) if name.startswith(unknown)]


# What one has in view at once. A longer function is two, and so is a kernel that does not fit.
LONGEST = 45


def test_a_function_is_seen_whole() -> None:
    """Its lines beneath the docstring."""
    lengths = []
    for path in files_of(""):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                first = node.body[1 if ast.get_docstring(node) and len(node.body) > 1 else 0]
                lengths.append((path.name, node.name, (node.end_lineno or first.lineno) - first.lineno + 1))
    assert not [found for found in lengths if found[2] > LONGEST]


# A day's reading, docstrings included, for whoever takes the library over. What would go beyond it takes the place of
# something else, or is the application's.
LINES = 13_750


def test_the_library_can_be_read_in_a_day() -> None:
    assert sum(len(path.read_text().splitlines()) for path in LIBRARY) <= LINES
