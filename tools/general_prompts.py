"""Write the general prompts that ship for models other than the embedded one.

    python tools/general_prompts.py      # into src/shortft/assets/prompts/general, at once

Prompts are put together from the word lists below by a fixed seed: 600 to train with, 100 held out.
No pair of subject and place is in both lists.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "src" / "shortft" / "assets" / "prompts" / "general"
TRAIN, HELD_OUT = 600, 100

SUBJECTS = """
a red fox; an old fisherman; a lighthouse keeper; a sleeping cat; a white horse
two dancing children; a violin player; a barn owl; a grey wolf; a baker with fresh bread
a steam locomotive; a wooden boat; a glass teapot; a bowl of ripe cherries
a stack of old books; a blue bicycle; an elderly gardener; a young astronaut
a clockwork robot; a dragon with green scales; a knight in worn armour; a sea turtle
a hummingbird; a chess board; a grandmother knitting; a street musician; a football player
a ballerina; a tall oak tree; a stone bridge; a small wooden cabin; a windmill
a castle on a rock; a hot air balloon; a vintage car; a sailing ship
a bouquet of sunflowers; a cup of coffee; a plate of pasta; a birthday cake; a polar bear
an elephant and her calf; a pair of penguins; a golden retriever puppy; a peacock
a waterfall; a snowy mountain; a field of lavender; a coral reef
a market stall full of spices; a telescope; a grand piano; a typewriter; a pocket watch
a pair of hiking boots; a straw hat; a potter at the wheel; a blacksmith; a nurse; a surfer
a mountaineer; a librarian; a painter; a wizard
""".strip()
PLACES = """
in a misty forest; on a quiet beach; in a busy city street; beside a frozen lake
in a sunlit kitchen; under a starry sky; in an old library; on a rooftop; in a desert canyon
in a meadow of wild flowers; at a railway station; in a narrow alley
in front of a brick wall; on a wooden table; in a greenhouse; by an open window
in heavy rain; in falling snow; among autumn leaves; near a volcano; on the moon
in a small harbour; in a candlelit room; on a hill at the edge of a village; inside a cave
""".strip()
STYLES = """
; photograph; oil painting; watercolour; pencil drawing; anime style; pixel art; concept art
film photograph; ink drawing; 3D render; poster; children's book illustration; charcoal sketch
""".strip()
LIGHTS = """
; at dawn; at dusk; in golden evening light; in soft morning light; at night; under a grey sky
with long shadows; with strong contrast; in muted colours; in bright colours
""".strip()
VIEWS = ["", "", "close-up of ", "wide view of ", "seen from above, "]


def words(text: str) -> list[str]:
    """Items between semicolons and line ends; the empty one stands for 'none'."""
    return [item.strip() for line in text.split("\n") for item in line.split(";")]


def main() -> int:
    draw = random.Random(0)
    places, styles, lights = words(PLACES), words(STYLES), words(LIGHTS)
    pairs = [(subject, place) for subject in words(SUBJECTS) for place in places]
    draw.shuffle(pairs)
    prompts = []
    for subject, place in pairs[: TRAIN + HELD_OUT]:
        parts = [f"{draw.choice(VIEWS)}{subject} {place}", draw.choice(lights), draw.choice(styles)]
        prompts.append(", ".join(part for part in parts if part))
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", prompts[:TRAIN]), ("held_out", prompts[TRAIN:])):
        (FOLDER / f"{name}.txt").write_text("\n".join(part) + "\n", encoding="utf-8")
        print(f"{name}: {len(part)} prompts")
    return 0


if __name__ == "__main__":
    sys.exit(main())
