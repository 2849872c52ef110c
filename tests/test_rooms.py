"""The library does not know the application, and what only several ranks need is apart."""

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


def names_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


LIBRARY = [path for path in sorted(PACKAGE.rglob("*.py")) if "app" not in path.parts and path.name != "__main__.py"]


@pytest.mark.parametrize("path", LIBRARY, ids=names_of)
def test_the_library_imports_nothing_of_the_application(path: Path) -> None:
    assert not {name for name in imported(path) if name.startswith("orpo_kernels.app")}


@pytest.mark.parametrize("path", files_of("engine", "ops", "parallel"), ids=names_of)
def test_the_engine_knows_neither_models_nor_trainers(path: Path) -> None:
    above = ("orpo_kernels.transformers", "orpo_kernels.trl", "orpo_kernels.compat", "orpo_kernels.text")
    assert not {name for name in imported(path) if name.startswith(above)}


@pytest.mark.parametrize("path", [*files_of("engine/schedules", "ops"), PACKAGE / "engine/projection.py"], ids=names_of)
def test_one_device_needs_no_ranks(path: Path) -> None:
    assert not {name for name in imported(path) if name.startswith("orpo_kernels.parallel")}


# What one has in view at once. A longer function is two, and so is a kernel that does not fit.
LONGEST = 45


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=names_of)
def test_a_function_is_seen_whole(path: Path) -> None:
    """Its lines beneath the docstring."""
    lengths = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            first = node.body[1 if ast.get_docstring(node) and len(node.body) > 1 else 0]
            lengths.append((node.name, (node.end_lineno or first.lineno) - first.lineno + 1))
    assert not [(name, lines) for name, lines in lengths if lines > LONGEST]
