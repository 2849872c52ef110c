"""The documents hang together: links lead somewhere, the site lists every page, the README is short and runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)", re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ +(.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text()):
        if re.match(r"\w+:", link):  # another site's
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {link}"
        if page.parent.name == "docs":  # all that the site has
            assert target.is_relative_to(page.parent), f"{page.name} links to {link}, which is not on the site"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {link}"


def test_the_site_lists_every_page() -> None:
    listed = set(re.findall(r"[\w./]+\.md", (ROOT / "mkdocs.yml").read_text()))
    assert listed == {str(page.relative_to(ROOT / "docs")) for page in ROOT.glob("docs/**/*.md")}


def test_the_readme_is_read_in_minutes() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_readmes_code_runs() -> None:
    pytest.importorskip("transformers")
    from .training import tiny, tokenizer

    ids = torch.randint(len(tokenizer()), (4, 9))
    names = {
        "model": tiny(),
        "tokenizer": tokenizer(),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.where(torch.arange(9) < 4, -100, ids),
        "examples": [{"prompt": "2 + 2 = ", "chosen": "four", "rejected": "five"}] * 2,
    }
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, names)
    assert names["model"].lm_head.weight.grad.isfinite().all()
    assert names["loss"].isfinite()
