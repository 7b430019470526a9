"""Draw prompts as one picture, by the pipeline that lies in a folder: guidance 3, 50 DDIM steps.

python tools/grid.py src/shortft/assets/emoji --out docs/images/fixed_prompts.png
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from data import ASSETS


def sample(
    pipe: StableDiffusionPipeline, prompts: list[str], seed: int, steps: int, guidance: float
) -> NDArray[np.float32]:
    """(N, 64, 64, 3) pictures in [0, 1]; picture i starts from the noise of seed + i."""
    pipe.set_progress_bar_config(disable=True)
    pictures = []
    for first in range(0, len(prompts), 24):
        part = prompts[first : first + 24]
        noise = [torch.Generator().manual_seed(seed + first + i) for i in range(len(part))]
        output = pipe(
            part,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=noise,
            output_type="np",
        )
        pictures.append(output.images)
    return np.concatenate(pictures)


def draw(
    pictures: NDArray[np.float32], labels: list[str], columns: int = 8, cell: int = 128
) -> Image.Image:
    """One sheet of all pictures, each with its label below."""
    text = 16
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (cell + 8), rows * (cell + 8 + text)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for number, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        x, y = number % columns * (cell + 8) + 4, number // columns * (cell + 8 + text) + 4
        image = Image.fromarray((picture * 255).round().astype(np.uint8))
        sheet.paste(image.resize((cell, cell), Image.Resampling.BICUBIC), (x, y))
        pen.rectangle((x - 1, y - 1, x + cell, y + cell), outline=(225, 225, 225))
        pen.text((x + cell / 2, y + cell + 1), label, fill=(60, 60, 60), font=font, anchor="ma")
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("--prompts", type=Path, default=ASSETS / "prompts" / "fixed.txt")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument(
        "--blind", type=int, help="shuffle with this seed and draw numbers instead of prompts"
    )
    args = parser.parse_args()
    prompts = args.prompts.read_text().splitlines()
    pipe = StableDiffusionPipeline.from_pretrained(args.pipeline, dtype=torch.float32)
    pipe.unet.set_attn_processor(AttnProcessor())
    pictures = sample(pipe, prompts, args.seed, args.steps, args.guidance)
    labels = prompts
    if args.blind is not None:
        order = list(range(len(prompts)))
        random.Random(args.blind).shuffle(order)
        pictures, labels = pictures[order], [str(place + 1) for place in range(len(order))]
        key = "".join(f"{place + 1} {prompts[number]}\n" for place, number in enumerate(order))
        args.out.with_suffix(".key.txt").write_text(key)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    draw(pictures, labels).save(args.out, optimize=True)


if __name__ == "__main__":
    main()
