"""The documentation names what the code has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from shortft.methods.catalog import METHODS, VARIANTS

ROOT = Path(__file__).parent.parent


def test_methods_page_lists_every_method_option_and_variant():
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    names = [*METHODS, *VARIANTS, *(o for m in METHODS.values() for o in m.options)]
    assert [name for name in names if f"`{name}`" not in text] == []


@pytest.mark.parametrize("page", sorted(p.name for p in (ROOT / "docs").glob("*.md")))
def test_links_between_pages_lead_somewhere(page: str):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if not target.startswith("http"):
            assert (ROOT / "docs" / target).exists(), target
