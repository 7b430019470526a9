"""Silence for libraries that comment on correct input."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hold back progress bars and log messages of diffusers and transformers; exceptions pass.

    What they say while a model loads (a missing optional torchvision, a module that stays in
    fp32) is nothing a user can or should act on. What they log as an error, such as a line for
    every size that differs, comes as an exception too. Bars of downloads stay: they take minutes.
    """
    import diffusers.utils.logging as diffusers_logging
    import huggingface_hub.utils as hub
    import transformers.utils.logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    levels = [library.get_verbosity() for library in libraries]
    bars = [library.is_progress_bar_enabled() for library in libraries]
    downloads = not hub.are_progress_bars_disabled()
    for library in libraries:
        library.set_verbosity(logging.CRITICAL)
        library.disable_progress_bar()
    if downloads:
        hub.enable_progress_bars()  # transformers takes them for its own
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for library, level, bar in zip(libraries, levels, bars, strict=True):
            library.set_verbosity(level)
            if bar:
                library.enable_progress_bar()
        if not downloads:
            hub.disable_progress_bars()  # transformers gave them back as well
