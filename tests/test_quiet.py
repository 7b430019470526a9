"""Silence ends where it began: libraries' levels and bars are as the caller had them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import diffusers.utils.logging as diffusers_logging
import huggingface_hub.utils as hub
import pytest
import transformers.utils.logging as transformers_logging

from shortft.quiet import quiet

LIBRARIES = (diffusers_logging, transformers_logging)


def bars() -> tuple[bool, bool, bool]:
    shown = [library.is_progress_bar_enabled() for library in LIBRARIES]
    return (*shown, not hub.are_progress_bars_disabled())


def show(wanted: tuple[bool, bool, bool]) -> None:
    for library, on in zip(LIBRARIES, wanted, strict=False):  # transformers takes the hub along
        (library.enable_progress_bar if on else library.disable_progress_bar)()
    (hub.enable_progress_bars if wanted[2] else hub.disable_progress_bars)()


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = bars()
    yield
    show(before)


@pytest.mark.parametrize("wanted", list(itertools.product([True, False], repeat=3)))
def test_bars_and_levels_are_given_back(wanted: tuple[bool, bool, bool]):
    show(wanted)
    levels = [library.get_verbosity() for library in LIBRARIES]
    with quiet():
        assert bars() == (False, False, wanted[2])  # those of downloads stay
    assert bars() == wanted
    assert [library.get_verbosity() for library in LIBRARIES] == levels
