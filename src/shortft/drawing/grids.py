"""Labelled picture grids and single pictures, drawn with Pillow only."""

from __future__ import annotations

import io
import os
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from shortft.drawing.files import write_atomic
from shortft.drawing.text import Font, load_font, text_height, wrap

if TYPE_CHECKING:
    from torch import Tensor

INK = (34, 34, 34)
MUTED = (110, 110, 110)
BETTER = (0, 100, 160)  # blue and vermillion stay apart for colour-blind readers
WORSE = (190, 80, 0)
COLUMNS = 8  # of a block

Colour = tuple[int, int, int]
Note = tuple[str, Colour]


def to_uint8(images_BCHW: Tensor) -> np.ndarray:
    """Images in [0, 1], shape (B, C, H, W), as uint8 pixels of shape (B, H, W, C).

    Values outside [0, 1] are clamped, not-a-number becomes 0. For looking only: it has no gradient.
    """
    images = images_BCHW.detach().float().nan_to_num(0.0).clamp(0, 1)
    pixels = images.mul(255).round().byte().permute(0, 2, 3, 1).contiguous()
    array: np.ndarray = pixels.cpu().numpy()
    return array


def save_grid(
    path: str | os.PathLike[str],
    rows: Sequence[Tensor],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    title: str | None = None,
    scale: int | None = None,
    notes: Sequence[Sequence[Note | str]] | None = None,
) -> Path:
    """Save a labelled grid as PNG; row r, column c shows `rows[r][c]`.

    `rows`: tensors (n, 3, H, W) in [0, 1], all of one shape. `column_labels` (n of them, wrapped,
    never cut) stand above the columns, `notes[r][c]` below a picture. More than eight
    pictures continue in a further block below. `scale`: integer enlargement; by default small
    pictures grow to at least 128 pixels.
    """
    if not rows or len({tuple(row.shape) for row in rows}) != 1:
        raise ValueError(f"rows must be tensors of one shape, got {[tuple(r.shape) for r in rows]}")
    count, _, height, width = rows[0].shape
    if count == 0 or len(row_labels) != len(rows) or len(column_labels) != count:
        raise ValueError(
            f"{len(rows)} rows of {count} pictures need as many labels, "
            f"got {len(row_labels)} row labels and {len(column_labels)} column labels"
        )
    scale = scale or max(1, -(-128 // max(height, width)))
    cell_w, cell_h = width * scale, height * scale
    size = min(26, max(13, cell_w // 10))
    body, bold = load_font(size), load_font(size, bold=True)
    small = load_font(max(12, size - 1))
    gap = max(8, cell_w // 16)
    per_block = max(1, min(COLUMNS, count))
    blocks = [range(i, min(i + per_block, count)) for i in range(0, count, per_block)]

    side_lines = [wrap(label, bold, max(cell_w, 110)) for label in row_labels]
    side = max((bold.getlength(line) for lines in side_lines for line in lines), default=0)
    side_w = int(side) + 2 * gap if side else 0
    captions = [wrap(label, body, cell_w) for label in column_labels]
    note_h = text_height(small) + gap // 2 if notes else 0
    total_w = gap * 2 + side_w + per_block * (cell_w + gap) - gap
    title_lines = wrap(title, bold, total_w - 2 * gap) if title else []
    title_h = len(title_lines) * text_height(bold) + gap if title else 0
    caption_h = [max(len(captions[i]) for i in block) * text_height(body) for block in blocks]
    # A row is as tall as its picture or as its label, whichever needs more.
    row_h = [max(cell_h, len(lines) * text_height(bold)) + note_h for lines in side_lines]
    total_h = (
        gap * 2 + title_h + sum(h + gap // 2 + sum(row_h) + gap * len(rows) for h in caption_h)
    )
    total_h += gap * (len(blocks) - 1) - gap

    canvas = Image.new("RGB", (total_w, total_h), "white")
    draw = ImageDraw.Draw(canvas)
    pixels = [to_uint8(row) for row in rows]
    y = gap
    for line in title_lines:
        draw.text((gap, y), line, fill=INK, font=bold)
        y += text_height(bold)
    y += gap if title else 0
    for block, head in zip(blocks, caption_h, strict=True):
        for column, i in enumerate(block):
            x = gap + side_w + column * (cell_w + gap)
            top = y + head - len(captions[i]) * text_height(body)  # stand on the picture
            _draw_lines(draw, captions[i], body, x, top, cell_w, INK)
        y += head + gap // 2
        for r, lines in enumerate(side_lines):
            middle = y + (cell_h - len(lines) * text_height(bold)) // 2
            for n, line in enumerate(lines):
                draw.text((gap, max(y, middle) + n * text_height(bold)), line, fill=INK, font=bold)
            for column, i in enumerate(block):
                x = gap + side_w + column * (cell_w + gap)
                canvas.paste(_enlarge(pixels[r][i], scale), (x, y))
                # A hairline, outside the picture: white pictures stay visible on white paper.
                draw.rectangle((x - 1, y - 1, x + cell_w, y + cell_h), outline=(215, 215, 215))
                if notes:
                    note = notes[r][i]
                    text, colour = note if isinstance(note, tuple) else (note, MUTED)
                    top = y + cell_h + gap // 4
                    _draw_lines(
                        draw, [text], _fit(text, small, cell_w + gap), x, top, cell_w, colour
                    )
            y += row_h[r] + gap
        y += gap
    return write_atomic(path, _png(canvas))


def before_after(
    path: str | os.PathLike[str],
    before: Tensor,
    after: Tensor,
    prompts: Sequence[str],
    scores_before: Sequence[float] | Tensor | None = None,
    scores_after: Sequence[float] | Tensor | None = None,
) -> Path:
    """Save base pictures above tuned ones; column c has one prompt and one noise.

    `before`, `after`: (n, 3, H, W) in [0, 1]. With scores (n of them, higher is better) each
    picture carries its score, and the tuned one its change.
    """
    notes: list[list[Note | str]] | None = None
    if scores_before is not None and scores_after is not None:
        old, new = [float(s) for s in scores_before], [float(s) for s in scores_after]
        digits = _digits(old + new)
        notes = [
            [f"{score:.{digits}f}" for score in old],
            [_change(a, b, digits) for a, b in zip(old, new, strict=True)],
        ]
    return save_grid(path, [before, after], ["base", "tuned"], prompts, notes=notes)


def save_images(
    directory: str | os.PathLike[str],
    images: Tensor,
    prompts: Sequence[str],
    seeds: Sequence[int] | None = None,
    *,
    first: int = 0,
) -> list[Path]:
    """Save (n, 3, H, W) images in [0, 1] as `0000_red-apple_seed7.png` … inside `directory`.

    Numbers count from `first` on. Names hold only a-z, 0-9, `-` and `_`, so that no prompt can
    leave the folder; the number keeps them apart. Prompt and seed are also stored in the PNG as
    text.
    """
    if len(prompts) != len(images) or (seeds is not None and len(seeds) != len(images)):
        raise ValueError(f"{len(images)} images need as many prompts and seeds")
    paths = []
    for i, (pixels, prompt) in enumerate(zip(to_uint8(images), prompts, strict=True)):
        info = PngInfo()
        info.add_itxt("prompt", prompt)
        name = f"{first + i:04d}_{slug(prompt)}"
        if seeds is not None:
            info.add_itxt("seed", str(seeds[i]))
            name += f"_seed{seeds[i]}"
        data = _png(Image.fromarray(pixels), info)
        paths.append(write_atomic(Path(directory) / f"{name}.png", data))
    return paths


def slug(text: str) -> str:
    """`text` as a file name part: lower-case ASCII letters, digits and `-`; never empty."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain)[:60].strip("-") or "prompt"


def _enlarge(pixels: np.ndarray, scale: int) -> Image.Image:
    image = Image.fromarray(pixels)
    if scale == 1:
        return image
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.BICUBIC)


def _draw_lines(
    draw: ImageDraw.ImageDraw,
    lines: Sequence[str],
    font: Font,
    x: int,
    y: int,
    width: int,
    colour: Colour,
) -> None:
    """Text lines centred on the column that starts at x."""
    for n, line in enumerate(lines):
        left = x + (width - font.getlength(line)) / 2
        draw.text((left, y + n * text_height(font)), line, fill=colour, font=font)


def _fit(text: str, font: Font, width: int) -> Font:
    """The font, or a smaller one in which `text` is at most `width` wide."""
    size = int(font.size)
    while size > 8 and load_font(size).getlength(text) > width:
        size -= 1
    return load_font(size)


def _digits(values: Sequence[float]) -> int:
    """Decimals that show about three figures of the largest value."""
    largest = max((abs(v) for v in values if np.isfinite(v)), default=1.0)
    return 3 if largest < 1 else 2 if largest < 100 else 0


def _change(old: float, new: float, digits: int) -> Note:
    change = round(new - old, digits)
    colour = BETTER if change > 0 else WORSE if change < 0 else MUTED
    return f"{new:.{digits}f} ({change:+.{digits}f})", colour


def _png(image: Image.Image, info: PngInfo | None = None) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info, optimize=True)
    return buffer.getvalue()
