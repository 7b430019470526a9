"""What `shortft shortcut` takes of a GPU's memory on the released architectures, counted, not run.

    python benchmarks/shortcut_memory.py
    python benchmarks/shortcut_memory.py sdxl --rank 64

Each network is built from its published configuration without weights; one unguided call of the
student goes through it, its LoRA as branches, and the tensors that autograd keeps are added up.
Text encoders have left by then. Temporary buffers are taken for a fifth, CUDA's own for 1 GB, as
in `shortft train --dry-run`.
"""

from __future__ import annotations

import argparse
import sys

import torch
from peft import LoraConfig, inject_adapter_in_model
from rich.console import Console
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode

from shortft.assets import asset
from shortft.cost import Kept
from shortft.families.base import Guidance
from shortft.preflight.estimate import FIXED, GB, ON_TOP
from shortft.preflight.outline import as_if_real, blank_prompt, empty_family, parameters
from shortft.quiet import quiet

MODELS = ("sd15", "sdxl", "sd3", "sd35", "flux2")
STATES = 20  # bytes for each number of the LoRA: itself, gradient, two moments, average


def counted(name: str, rank: int) -> tuple[int, int, int]:
    """Bytes of the frozen weights, numbers in the LoRA, and bytes that one sample keeps."""
    family = empty_family(asset("outlines", name), precision="bf16", gpu=True)
    weights = 2 * parameters(family.denoiser) + 2 * parameters(family.vae)
    family.denoiser.requires_grad_(False)
    targets = list(family.shortcut_targets)
    config = LoraConfig(r=rank, target_modules=targets, init_lora_weights=False)
    with torch.device("meta"):
        inject_adapter_in_model(config, family.denoiser)
    loras = [p for key, p in family.denoiser.named_parameters() if "lora_" in key]
    for parameter in loras:
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    with FakeTensorMode():
        as_if_real([family.denoiser])
        family.device = torch.device("cpu")
        kept = Kept(family.denoiser.parameters())
        noise = torch.empty(1, *family._latent_shape)
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, kept.unpack):
            # Held, so that no storage is freed and counted anew.
            _ = family.predict(family.denoiser, noise, 1.0, blank_prompt(family), Guidance())
    return weights, sum(parameter.numel() for parameter in loras), kept.total


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=list(MODELS), help=", ".join(MODELS))
    parser.add_argument("--rank", type=int, default=32)
    options = parser.parse_args()
    table = Table("model", "weights", "LoRA in M", "per sample", "one sample", "four samples")
    for name in options.models:
        with quiet():
            weights, numbers, sample = counted(name, options.rank)
        fixed = weights + STATES * numbers
        whole = [ON_TOP * (fixed + count * sample) + FIXED for count in (1, 4)]
        table.add_row(
            name,
            f"{weights / GB:.1f}",
            f"{numbers / 1e6:.0f}",
            f"{sample / GB:.1f}",
            *(f"{size / GB:.0f}" for size in whole),
        )
    Console(width=100).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
