"""Pictures and captions for the embedded model: download, cut, recolour, split, list prompts.

    python tools/data.py --work build/assets

Reads `concepts.txt`; downloads three openly licensed emoji sets with `npm pack` (Noto, Twemoji,
Fluent); writes `pictures.safetensors` and `pictures.json` under --work, and the prompt lists into
the package's assets.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import tarfile
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file, save_file

TOOLS = Path(__file__).resolve().parent
ASSETS = TOOLS.parent / "src" / "shortft" / "assets"
SIZE = 64
PACKAGES = (
    "emoji-datasource-google@16.0.0",
    "emoji-datasource-twitter@16.0.0",
    "@lobehub/fluent-emoji-3d@1.1.0",
)
STYLES = {
    "noto": ("emoji-datasource-google-16.0.0/img/google/64", "png"),
    "twemoji": ("emoji-datasource-twitter-16.0.0/img/twitter/64", "png"),
    "fluent": ("lobehub-fluent-emoji-3d-1.1.0/assets", "webp"),
}
# Hue in degrees, factor on saturation, floor of the brightness: yellow and pink do not exist in the
# dark.
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (2, 1.0, 0.0),
    "orange": (28, 1.1, 0.55),
    "yellow": (50, 1.0, 0.75),
    "green": (120, 0.9, 0.0),
    "blue": (215, 1.0, 0.0),
    "purple": (275, 0.9, 0.0),
    "pink": (335, 0.6, 0.7),
}
BACKDROPS: dict[str, tuple[int, int, int]] = {
    "red": (238, 112, 106),
    "orange": (250, 182, 102),
    "yellow": (250, 228, 116),
    "green": (142, 208, 132),
    "blue": (122, 172, 242),
    "purple": (186, 152, 232),
    "pink": (250, 174, 204),
    "gray": (178, 178, 184),
}
SKIPPED = {"Flags", "Symbols", "Component"}


@dataclass(frozen=True)
class Concept:
    """One line of concepts.txt; `noun` is set where the thing is also drawn in other colours."""

    name: str
    caption: str
    noun: str | None


@dataclass(frozen=True)
class Picture:
    """What one RGBA picture shows. `concept` is the short name; `extra` pictures only serve the
    scorers.
    """

    concept: str
    style: str
    caption: str
    colour: str | None = None
    extra: bool = False


def read_concepts(path: Path = TOOLS / "concepts.txt") -> list[Concept]:
    concepts = []
    for line in path.read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            name, _, rest = line.partition(" = ")
            caption, _, noun = (part.strip() for part in rest.partition("|"))
            concepts.append(Concept(name.strip(), caption, noun or None))
    return concepts


def caption(text: str, style: str | None = None, backdrop: str | None = None) -> str:
    """The caption grammar: "{text}[, {style} style][, on a {colour} background]"."""
    if style:
        text += f", {style} style"
    if backdrop:
        text += f", on {'an' if backdrop[0] == 'o' else 'a'} {backdrop} background"
    return text


def ranked(key: str, values: list[str]) -> list[str]:
    """A fixed shuffle of `values` that depends on `key` alone, not on the order of the concept
    list.
    """
    return sorted(values, key=lambda value: zlib.crc32(f"{key}/{value}/shortft".encode()))


def held_out_backdrops(concept: str) -> set[str]:
    return set(ranked(concept, list(BACKDROPS))[:2])


def held_out_colours(concept: str) -> set[str]:
    return set(ranked(concept + "#", list(COLOURS))[:1])


def download(work: Path) -> None:
    """Fetch and unpack each package unless its folder is there already."""
    work.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        stem = package.lstrip("@").replace("/", "-").replace("@", "-")
        if (work / stem).is_dir():
            continue
        archive = work / f"{stem}.tgz"
        if not archive.exists():
            command = ["npm", "pack", package, "--silent", "--pack-destination", str(work)]
            subprocess.run(command, check=True)
        with tarfile.open(archive) as tar:
            tar.extractall(work / (stem + ".part"), filter="data")
        (work / (stem + ".part") / "package").rename(work / stem)
        (work / (stem + ".part")).rmdir()


def load_rgba(work: Path, style: str, image: str) -> NDArray[np.uint8] | None:
    """(64, 64, 4) picture of `image` ("1f34e.png" as named by emoji-datasource), None where the set
    lacks it.
    """
    folder, ending = STYLES[style]
    stem = image.removesuffix(".png")
    for name in (stem, stem.replace("-fe0f", "")):
        path = work / folder / f"{name}.{ending}"
        if path.exists():
            picture = Image.open(path).convert("RGBA")
            if picture.size != (SIZE, SIZE):
                picture = premultiplied_resize(picture)
            return np.asarray(picture, dtype=np.uint8)
    return None


def premultiplied_resize(picture: Image.Image) -> Image.Image:
    """Resize in premultiplied alpha: otherwise hidden colours of transparent pixels bleed into the
    edges.
    """
    return picture.convert("RGBa").resize((SIZE, SIZE), Image.Resampling.LANCZOS).convert("RGBA")


def rgb_to_hsv(rgb: NDArray[np.float32]) -> tuple[NDArray[np.float32], ...]:
    """(..., 3) in [0, 1] -> hue in degrees, saturation, value."""
    high, low = rgb.max(-1), rgb.min(-1)
    span = np.maximum(high - low, 1e-6)
    r, g, b = (rgb[..., i] for i in range(3))
    hue = np.where(
        high == r, (g - b) / span, np.where(high == g, 2 + (b - r) / span, 4 + (r - g) / span)
    )
    return (hue * 60) % 360, (high - low) / np.maximum(high, 1e-6), high


def hsv_to_rgb(
    hue: NDArray[np.float32], saturation: NDArray[np.float32], value: NDArray[np.float32]
) -> NDArray[np.float32]:
    k = (np.array([5, 3, 1], np.float32) + hue[..., None] / 60) % 6
    ramp = np.clip(np.minimum(k, 4 - k), 0, 1)
    return value[..., None] * (1 - saturation[..., None] * ramp)


def recolour(rgba: NDArray[np.uint8], colour: str) -> NDArray[np.uint8] | None:
    """Turn the dominant hue of a picture to `colour`, shading kept; None for a picture that is
    mostly grey.
    """
    hue, saturation, value = rgb_to_hsv((rgba[..., :3] / 255).astype(np.float32))
    weight = (rgba[..., 3] / 255.0) * saturation * value
    if weight.sum() < 0.12 * (rgba[..., 3] / 255.0).sum():
        return None
    bins = np.bincount((hue // 10).astype(int).ravel() % 36, weights=weight.ravel(), minlength=36)
    smooth = bins + np.roll(bins, 1) + np.roll(bins, -1)
    dominant = float(smooth.argmax()) * 10 + 5
    distance = (hue - dominant + 180) % 360 - 180
    turned = (np.abs(distance) < 40) & (saturation > 0.15)
    target, factor, floor = COLOURS[colour]
    new_hue = np.where(turned, (target + distance * 0.4) % 360, hue)
    new_saturation = np.where(turned, np.clip(saturation * factor, 0, 1), saturation)
    new_value = np.where(turned, floor + (1 - floor) * value, value)
    rgb = hsv_to_rgb(new_hue, new_saturation, new_value)
    return np.concatenate([(rgb * 255).round().astype(np.uint8), rgba[..., 3:]], -1)


def composite(
    rgba: NDArray[np.uint8], colour: tuple[int, int, int] = (255, 255, 255)
) -> NDArray[np.uint8]:
    """(..., 4) pictures over a plain colour -> (..., 3)."""
    alpha = rgba[..., 3:].astype(np.float32) / 255
    back = np.asarray(colour, np.float32)
    return (rgba[..., :3] * alpha + back * (1 - alpha)).round().astype(np.uint8)


def plain_name(entry: dict[str, Any]) -> str:
    return str(entry["short_name"]).replace("_", " ").replace("-", " ")


def build(work: Path) -> tuple[list[Picture], list[NDArray[np.uint8]]]:
    entries = json.loads((work / "emoji-datasource-google-16.0.0" / "emoji.json").read_text())
    by_name = {name: entry for entry in entries for name in entry["short_names"]}
    pictures: list[Picture] = []
    arrays: list[NDArray[np.uint8]] = []

    def add(picture: Picture, array: NDArray[np.uint8] | None) -> None:
        if array is not None:
            pictures.append(picture)
            arrays.append(array)

    concepts = read_concepts()
    for concept in concepts:
        for style in STYLES:
            rgba = load_rgba(work, style, by_name[concept.name]["image"])
            add(Picture(concept.name, style, concept.caption), rgba)
            for colour in COLOURS if concept.noun and rgba is not None else ():
                if rgba is not None and colour not in held_out_colours(concept.name):
                    text = f"{colour} {concept.noun}"
                    add(Picture(concept.name, style, text, colour), recolour(rgba, colour))
    used = {by_name[concept.name]["short_name"] for concept in concepts}
    for entry in entries:
        if entry["category"] not in SKIPPED and entry["short_name"] not in used:
            for style in STYLES:
                rgba = load_rgba(work, style, entry["image"])
                add(Picture(entry["short_name"], style, plain_name(entry), extra=True), rgba)
    return pictures, arrays


def load_pictures(work: Path) -> tuple[list[Picture], NDArray[np.uint8]]:
    """What main() wrote: descriptions and (N, 64, 64, 4) pictures."""
    records = json.loads((work / "pictures.json").read_text())
    return [Picture(**record) for record in records], load_file(work / "pictures.safetensors")[
        "rgba"
    ]


def write_prompts(folder: Path, seed: int = 0) -> dict[str, int]:
    """Training prompts (plain and combined), unseen combinations, and the fixed prompts of the
    grid.
    """
    rng = random.Random(seed)
    concepts = read_concepts()
    train = [concept.caption for concept in concepts]
    unseen_backdrops: list[str] = []
    unseen_colours: list[str] = []
    for concept in concepts:
        hidden = ranked(concept.name, list(BACKDROPS))[:2]
        unseen_backdrops += [caption(concept.caption, backdrop=backdrop) for backdrop in hidden]
        shown = [backdrop for backdrop in BACKDROPS if backdrop not in hidden]
        train.append(caption(concept.caption, backdrop=rng.choice(shown)))
        if concept.noun:
            hidden_colours = held_out_colours(concept.name)
            unseen_colours += [f"{colour} {concept.noun}" for colour in sorted(hidden_colours)]
            known = [colour for colour in COLOURS if colour not in hidden_colours]
            train += [f"{colour} {concept.noun}" for colour in rng.sample(known, 2)]
    taken = {concept.caption for concept in concepts}
    unseen_colours = [text for text in unseen_colours if text not in taken]
    held_out = rng.sample(unseen_backdrops, 96) + rng.sample(
        unseen_colours, min(32, len(unseen_colours))
    )
    fixed = (TOOLS / "fixed_prompts.txt").read_text().splitlines()
    folder.mkdir(parents=True, exist_ok=True)
    lists = {"train": list(dict.fromkeys(train)), "held_out": held_out, "fixed": fixed}
    for name, lines in lists.items():
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return {name: len(lines) for name, lines in lists.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("build/assets"))
    parser.add_argument(
        "--prompts", type=Path, default=ASSETS / "prompts", help="folder for the prompt lists"
    )
    args = parser.parse_args()
    download(args.work)
    pictures, arrays = build(args.work)
    save_file({"rgba": np.stack(arrays)}, args.work / "pictures.safetensors")
    (args.work / "pictures.json").write_text(json.dumps([asdict(picture) for picture in pictures]))
    core = [picture for picture in pictures if not picture.extra]
    print(
        f"{len(pictures)} pictures; base model: {len(core)} of "
        f"{len({p.concept for p in core})} concepts,"
    )
    print(
        f"of which {sum(p.colour is not None for p in core)} recoloured; "
        f"prompts: {write_prompts(args.prompts)}"
    )


if __name__ == "__main__":
    main()
