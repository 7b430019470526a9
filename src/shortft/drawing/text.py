"""Measured, wrapped text for Pillow pictures."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import matplotlib
from PIL import ImageFont

Font = ImageFont.FreeTypeFont


@lru_cache(maxsize=64)
def load_font(size: int, bold: bool = False) -> Font:
    """DejaVu Sans, which matplotlib ships: Pillow's own font has no accents, Greek, Cyrillic."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)


def text_height(font: Font) -> int:
    """Height of one line including its leading, in pixels."""
    ascent, descent = font.getmetrics()
    return ascent + descent


def wrap(text: str, font: Font, width: float) -> list[str]:
    """`text` in lines at most `width` pixels wide.

    Words longer than a line are broken, after one of ``_:,=/-`` where there is one.
    """
    lines: list[str] = []
    for word in text.split():
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        while font.getlength(word) > width and len(word) > 1:
            fits = [n for n in range(1, len(word)) if font.getlength(word[:n]) <= width] or [1]
            cut = max([n for n in fits if word[n - 1] in "_:,=/-"] or fits)
            lines.append(word[:cut])
            word = word[cut:]
        lines.append(word)
    return lines or [""]
