"""The embedded model's networks with their EMA and optimizer, as one thing that can be saved,
loaded and exported.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

WEIGHT_DECAY = 1e-4


def make_scheduler() -> DDIMScheduler:
    """Stable Diffusion 1.5's own settings."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
        prediction_type="epsilon",
    )


def make_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 96, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        projection_dim=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=20,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="eager",
    )
    return CLIPTextModel(config)


class Bundle:
    """UNet and text encoder in training, their EMA copies, the optimizer and the counters."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
        # The plain attention is the fastest here: fused attention has a slow bf16 backward on CPUs.
        unet.set_attn_processor(AttnProcessor())
        self.unet = unet.to(memory_format=torch.channels_last).train()
        self.text_encoder = text_encoder.train()
        self.networks = nn.ModuleDict({"unet": self.unet, "text_encoder": self.text_encoder})
        self.ema = copy.deepcopy(self.networks).eval().requires_grad_(False)
        self.parameters: list[Tensor] = list(self.networks.parameters())
        self.optimizer = torch.optim.AdamW(
            [
                {"params": list(self.unet.parameters()), "factor": 1.0},
                {"params": list(self.text_encoder.parameters()), "factor": 3.0},
            ],
            betas=(0.9, 0.99),
            weight_decay=WEIGHT_DECAY,
            fused=True,
        )
        self.alphas_cumprod: Tensor = make_scheduler().alphas_cumprod
        self.step = self.samples = 0
        self.fresh_since = 0  # the step at which the optimizer was new
        self.seconds = 0.0

    @torch.no_grad()
    def update_ema(self, decay: float) -> None:
        torch._foreach_lerp_([*self.ema.parameters()], self.parameters, 1 - decay)

    def pipeline(self, work: Path) -> StableDiffusionPipeline:
        return StableDiffusionPipeline(
            vae=AutoencoderKL.from_pretrained(work / "vae"),
            text_encoder=self.ema["text_encoder"],
            tokenizer=CLIPTokenizer.from_pretrained(work / "tokenizer"),
            unet=self.ema["unet"],
            scheduler=make_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def make_bundle(work: Path) -> Bundle:
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    return Bundle(make_unet(), make_text_encoder(tokenizer))


def save_bundle(bundle: Bundle, path: Path) -> None:
    """One file with weights, EMA, optimizer and counters, put in place in one move."""
    tensors = {f"model.{name}": value for name, value in bundle.networks.state_dict().items()}
    tensors |= {f"ema.{name}": value for name, value in bundle.ema.state_dict().items()}
    for name, parameter in bundle.networks.named_parameters():
        for key in ("exp_avg", "exp_avg_sq", "step"):
            if parameter in bundle.optimizer.state:
                tensors[f"adam.{key}.{name}"] = bundle.optimizer.state[parameter][key]
    counters = {
        "step": str(bundle.step),
        "samples": str(bundle.samples),
        "seconds": str(bundle.seconds),
    }
    part = path.with_suffix(".part")
    save_file(
        {name: value.contiguous() for name, value in tensors.items()}, part, metadata=counters
    )
    part.replace(path)


def load_bundle(bundle: Bundle, path: Path) -> None:
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        counters = file.metadata()

    def under(prefix: str) -> dict[str, Tensor]:
        return {
            name.removeprefix(prefix): value
            for name, value in tensors.items()
            if name.startswith(prefix)
        }

    bundle.networks.load_state_dict(under("model."))
    bundle.ema.load_state_dict(under("ema."))
    for name, parameter in bundle.networks.named_parameters():
        state = {key: tensors[f"adam.{key}.{name}"] for key in ("exp_avg", "exp_avg_sq", "step")}
        layout = torch.channels_last if parameter.dim() == 4 else torch.preserve_format
        bundle.optimizer.state[parameter] = {
            key: value.to(memory_format=layout) if value.dim() == 4 else value
            for key, value in state.items()
        }
    bundle.step, bundle.samples = int(counters["step"]), int(counters["samples"])
    bundle.seconds = float(counters["seconds"])


def load_pipeline(bundle: Bundle, folder: Path, log: Path) -> None:
    """Start from an exported pipeline with a new optimizer; counters from the log's last row."""
    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    for networks in (bundle.networks, bundle.ema):
        networks["unet"].load_state_dict(pipe.unet.state_dict())
        networks["text_encoder"].load_state_dict(pipe.text_encoder.state_dict())
    step, samples, seconds = log.read_text().splitlines()[-1].split(",")[:3]
    bundle.step = bundle.fresh_since = int(step)
    bundle.samples, bundle.seconds = int(samples), float(seconds)


def export(bundle: Bundle, work: Path, out: Path) -> None:
    """The EMA weights as a StableDiffusionPipeline folder in fp16."""
    pipe = bundle.pipeline(work)
    for part in (pipe.unet, pipe.text_encoder, pipe.vae):
        part.to(torch.float16)
    pipe.save_pretrained(out)
    # transformers would run the text encoder in the stored precision, diffusers the rest in fp32.
    config = out / "text_encoder" / "config.json"
    fields = {**json.loads(config.read_text(encoding="utf-8")), "dtype": "float32"}
    config.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    config = out / "vae" / "config.json"  # it names the folder that it was loaded from
    fields = json.loads(config.read_text(encoding="utf-8"))
    fields.pop("_name_or_path", None)
    config.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    (out / "shortft.json").write_text('{"guidance_scale": 3.0}\n', encoding="utf-8")
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"wrote {out}: {size / 1e6:.1f} MB")
