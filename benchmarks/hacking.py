"""What holds back a reward that is hacked: plain symmetry, which blank pictures win.

    python benchmarks/hacking.py --output-dir runs/hacking [--updates 80] [--only anchor]

Trains the embedded model by one method on symmetry alone with nothing against it, with the
guard, with anchors to the base of several weights, and with an ensemble of symmetry and text
alignment at several weights of their spread. Each adapter is measured on held-out prompts, two
noises each: mirror error, the scorer that no run has seen, diversity, contrast, and the drift from
the base in the last updates.
Runs are of equal updates, not of equal time. What is done is kept: start again to go on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from shortft.assets import EMBEDDED, prompts_for
from shortft.config import load_config
from shortft.drawing.curves import draw_curves
from shortft.evaluate import draw_before_after, evaluate
from shortft.families import load_family
from shortft.metrics import picture_statistics
from shortft.precision import settled
from shortft.recipes import recipe
from shortft.rewards import make_reward
from shortft.rewards.clip import ClipReward
from shortft.rewards.symmetry import Symmetry
from shortft.train import train

# The base's own scores, docs/measurements.md: both members of the ensemble start near 0.
BASE_ERROR, BASE_COSINE = 0.0976, 0.776


def mirrored(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Share of the base's mirror error that is gone: 1 for a perfectly symmetric picture."""
    return 1 + Symmetry()(images) / BASE_ERROR


def still_right(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Text alignment beyond the base's, in tenths of the cosine."""
    return (scorer(str(images.device))(images, prompts) - BASE_COSINE) / 0.1


@lru_cache
def scorer(device: str) -> ClipReward:
    return ClipReward.load(device=device)


def settings() -> dict[str, dict[str, Any]]:
    """The runs by name."""
    both = f"{__file__}:mirrored+{__file__}:still_right"
    return {
        "nothing": {"guard": "off"},
        "guard": {"guard": "stop", "guard_drop": 0.1},
        **{f"anchor {w:g}": {"guard": "off", "anchor": w} for w in (0.3, 1.0, 3.0, 10.0)},
        **{
            f"ensemble ~{w:g}": {"guard": "off", "reward": f"{both}~{w:g}"} for w in (0.0, 0.5, 1.0)
        },
    }


def run(root: Path, name: str, change: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Train and measure one setting, or read what was measured before."""
    folder = root / name.replace(" ", "-").replace("~", "")
    result = folder / "result.json"
    if result.exists():
        return dict(json.loads(result.read_text(encoding="utf-8")))
    common = {"reward": "symmetry", "minutes": None, "updates": args.updates, "tensorboard": False}
    common |= {"method": args.method, "learning_rate": args.learning_rate}
    common |= {"sample_every": max(1, args.updates // 8), "output_dir": folder}
    config = load_config(None, {**recipe("emoji"), **common, **change})
    adapter = train(config, auto_resume=True)
    draw_curves(folder / "metrics.jsonl", folder / "curves.png", title=name)
    log = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
    updates = [row for row in log if "reward" in row]
    family = load_family(EMBEDDED, precision=settled(config).precision)
    prompts = prompts_for(EMBEDDED, "held_out")[: args.prompts]
    reward = make_reward("symmetry", None, family.device)
    figures, pictures = evaluate(family, adapter, reward, prompts, seeds=2)
    draw_before_after(folder / "before_after.png", pictures, 2)
    drifts = [row["drift"] for row in updates[-5:] if "drift" in row]
    row = {
        "updates": len(updates),
        "minutes": sum(row["seconds"] for row in updates) / 60,
        "drift": sum(drifts) / len(drifts) if drifts else None,
        "contrast": float(picture_statistics(pictures.after).contrast.mean()),
        **{key: figures[key] for key in ("held_out", "diversity")},
        "mirror": figures["reports"]["symmetry"],
    }
    result.write_text(json.dumps(row, indent=2) + "\n", encoding="utf-8")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output-dir", type=Path, default=Path("runs/hacking"))
    parser.add_argument("--updates", type=int, default=80)
    parser.add_argument("--method", default="jumps")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--only", default="", help="settings whose name starts so")
    args = parser.parse_args()
    print(
        "| setting | updates | minutes | mirror error | held-out | diversity | contrast | drift |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, change in settings().items():
        if not name.startswith(args.only):
            continue
        row = run(args.output_dir, name, change, args)
        moved = [f"{row[k]['before']:.4f} → {row[k]['after']:.4f}" for k in ("mirror", "held_out")]
        moved.append(f"{row['diversity']['before']:.3f} → {row['diversity']['after']:.3f}")
        drift = "" if row["drift"] is None else f"{row['drift']:.4f}"
        print(
            f"| {name} | {row['updates']} | {row['minutes']:.1f} | {' | '.join(moved)} | "
            f"{row['contrast']:.3f} | {drift} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
