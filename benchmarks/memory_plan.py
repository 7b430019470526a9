"""What one ShortFT update takes of a GPU's memory, computed on the full architectures, not run.

    python benchmarks/memory_plan.py                 # SD1.5, SDXL, SD3.5 medium and large, FLUX
    python benchmarks/memory_plan.py --rank 32 sdxl

Every network is built without memory for its weights (torch's meta device), and one call with
gradient goes through it: the tensors that autograd keeps are added up by their sizes. Attention
counts as the fused kernels keep it. What is left out: temporary buffers of single layers,
fragmentation, and the reward's own model. Batch 1, bf16 networks, fp32 LoRAs, stage 1 of four.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from full_models import MODELS
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from shortft.families.base import Conditioning, Guidance
from shortft.networks import ModelNetworks
from shortft.plans import Step
from shortft.quiet import quiet

GB = 1e9
GRAD_CALLS = 7  # of stage 1 of four


@dataclass(frozen=True)
class Memory:
    """Bytes. A call and the decoding: what autograd keeps of one, batch 1."""

    denoiser: int
    texts: int
    decoder: int
    lora_parameters: int
    call: int
    branch: int
    decode: int
    decode_small: int

    def totals(self) -> tuple[int, int, int]:
        """Nothing saved; recomputation; and everything that saves memory besides.

        The text encoders are gone. With recomputation one branch of one call or the decoding is
        alive at a time.
        """
        # Weights and gradient in fp32, two moments in fp32 or in 8 bits.
        learned, learned_8_bit = 16 * self.lora_parameters, 10 * self.lora_parameters
        fixed = self.denoiser + self.decoder
        return (
            fixed + learned + GRAD_CALLS * self.call + self.decode,
            fixed + learned + max(self.branch, self.decode),
            self.denoiser + learned_8_bit + max(self.branch, self.decode_small),
        )


class Kept:
    """Adds up the storages that a graph keeps, weights left out."""

    def __init__(self, *modules: nn.Module) -> None:
        self.seen = {p.untyped_storage()._cdata for m in modules for p in m.parameters()}
        self.alive: list[Tensor] = []  # a freed storage's place may be taken by another
        self.total = 0

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen.add(storage._cdata)
            self.alive.append(tensor)
            self.total += storage.nbytes()
        return tensor

    def of(self, function: Callable[[], Tensor]) -> int:
        with torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor):
            function()
        return self.total


class Fused(torch.autograd.Function):
    """Stands for a fused attention kernel: it keeps its inputs and its output."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out)
        return out


def fused(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
    return Fused.apply(query, key, value)


def measure(name: str, rank: int) -> Memory:
    """One model's figures."""
    family_class, make, tokens = MODELS[name]
    with torch.device("meta"):
        pipeline = make()
    texts = [module for part, module in pipeline.components.items() if "text_encoder" in part]
    family: Any = family_class(pipeline, name, device="meta")
    nets = ModelNetworks(family, guidance=Guidance(4.0), loras=4, rank=rank)
    loras = sum(p.numel() for n in range(1, 5) for p in nets.parameters_of(n).values())
    policy = nets.module(Step(0, 1, "policy", 4, trains=True))
    half = torch.bfloat16
    # Autocast does not know the meta device: LoRAs compute in bf16, as under it.
    for module in (family.denoiser, policy):
        module.to(half)
    exact = family_class._vae_dtype is not family_class.__mro__[-2]._vae_dtype
    family.vae.to(torch.float32 if exact else half)
    decoder = (4 if exact else 2) * count(family.vae)
    latents = torch.empty(1, *family._latent_shape, device="meta", dtype=half)
    cond = conditioning(family.denoiser.config, tokens).to("meta", half)

    def call(grad: str) -> int:
        guidance = Guidance(4.0, grad)  # type: ignore[arg-type]
        x = latents.clone().requires_grad_()
        kept = Kept(policy)
        return kept.of(lambda: family.predict(policy, x, 500.0, cond, guidance))

    decoded = latents.to(torch.float32 if exact else half).requires_grad_()
    decode = Kept(family.vae).of(lambda: family.decode(decoded))
    if "AutoencoderTiny" in family_class.decoders:
        with torch.device("meta"):  # TAESD's architecture
            family.vae = AutoencoderTiny(latent_channels=family._latent_shape[0]).to(half)
        family.vae.requires_grad_(False)
    return Memory(
        denoiser=2 * count(family.denoiser),
        texts=2 * sum(count(text) for text in texts),
        decoder=decoder,
        lora_parameters=loras,
        call=call("both"),
        branch=call("positive"),
        decode=decode,
        decode_small=Kept(family.vae).of(lambda: family.decode(decoded.to(half))),
    )


def conditioning(config: Any, tokens: int) -> Conditioning:
    """An encoded prompt of the right shape."""
    width = config.get("joint_attention_dim") or config.get("cross_attention_dim")
    pooled = config.get("pooled_projection_dim")
    if config.get("addition_embed_type") == "text_time":
        pooled = 1280
    states = torch.empty(1, tokens, width)
    vector = torch.empty(1, pooled) if pooled else None
    return Conditioning(states, states, vector, vector)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    listed = [name for name in MODELS if name != "small"]
    parser.add_argument("models", nargs="*", default=listed, help=", ".join(MODELS))
    parser.add_argument("--rank", type=int, default=128)
    options = parser.parse_args()
    F.scaled_dot_product_attention = fused
    torch.is_autocast_enabled = lambda _: True  # asked of the meta device, it raises
    table = Table(title=f"GB at batch 1, four LoRAs of rank {options.rank}")
    heads = (
        "model, denoiser, texts, decoder, LoRAs in M, one call, a branch, decoding, TAESD, "
        "all kept, recompute, all savings"
    )
    for head in heads.split(", "):
        table.add_column(head, justify="left" if head == "model" else "right")
    for name in options.models:
        with quiet():
            m = measure(name, options.rank)
        sizes = (m.denoiser, m.texts, m.decoder)
        parts = (m.call, m.branch, m.decode, m.decode_small, *m.totals())
        table.add_row(
            name,
            *(f"{size / GB:.1f}" for size in sizes),
            f"{m.lora_parameters / 1e6:.0f}",
            *(f"{size / GB:.1f}" for size in parts),
        )
    console = Console(width=130)
    console.print(table)
    console.print(
        "The last three columns are whole updates at batch 1 without the text encoders "
        "(--encode-ahead) and without the reward: activations of 7 calls kept; --recompute; and "
        "that with --optimizer adamw8bit and a TAESD --decoder."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
