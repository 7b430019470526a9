"""Train the two scorers, small CLIPModels: `reward` is optimised by users, `held_out` only ever
measures.

    python tools/train_scorers.py reward   --work build/assets --minutes 8
    python tools/train_scorers.py held_out --work build/assets --minutes 8

Needs what data.py, train_vae.py and train_tokenizer.py wrote. The two differ in seed, size, patch
size and augmentation.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from data import ASSETS, BACKDROPS, TOOLS, caption, held_out_backdrops
from scorer_data import ScorerData, round_trip

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Size:
    """What differs between the two scorers."""

    seed: int
    patch: int
    width: int
    layers: int
    inner: int
    text_width: int
    text_layers: int


SIZES = {
    "reward": Size(seed=11, patch=8, width=128, layers=4, inner=384, text_width=128, text_layers=2),
    "held_out": Size(
        seed=29, patch=16, width=160, layers=3, inner=480, text_width=96, text_layers=2
    ),
}


def make_model(size: Size, tokenizer: CLIPTokenizer) -> CLIPModel:
    tokens = {
        name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": size.text_width,
        "intermediate_size": 3 * size.text_width,
        "num_hidden_layers": size.text_layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 20,
        "projection_dim": 128,
        **tokens,
    }
    vision = {
        "hidden_size": size.width,
        "intermediate_size": size.inner,
        "num_hidden_layers": size.layers,
        "num_attention_heads": 4,
        "image_size": 64,
        "patch_size": size.patch,
        "projection_dim": 128,
    }
    config = CLIPConfig(
        text_config=text, vision_config=vision, projection_dim=128, attn_implementation="eager"
    )
    return CLIPModel(config)


def normalised(images: Tensor) -> Tensor:
    """(B, 3, 64, 64) in [0, 1] -> CLIP's input."""
    return (images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def features(model: CLIPModel, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        image = model.get_image_features(pixel_values=normalised(images)).pooler_output
        text = model.get_text_features(input_ids=ids).pooler_output
    return torch.nn.functional.normalize(image.float(), dim=-1), torch.nn.functional.normalize(
        text.float(), dim=-1
    )


def contrastive_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """InfoNCE of (R, C) logits with several true columns a row; truth 1, 0, or -1 for a pair to
    leave out.
    """
    logits = logits.masked_fill(truth < 0, -1e4)
    hits = logits.masked_fill(truth < 1, -1e4)
    return (logits.logsumexp(1) - hits.logsumexp(1)).mean()


def train(model: CLIPModel, data: ScorerData, minutes: float, batch: int, lr: float) -> int:
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)
    start = shown = time.time()
    step = 0
    while (done := (time.time() - start) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = (
                lr * min(1, (step + 1) / 60) * max(0.5 * (1 + math.cos(math.pi * done)), 0.01)
            )
        drawn = data.draw(batch)
        image, text = features(model, drawn.images_BCHW, drawn.ids_BT)
        logits = model.logit_scale.exp() * image @ text.T
        # Junk pictures stand below the others: no caption may prefer them.
        extended = torch.cat([drawn.truth_BB, torch.zeros(len(image) - batch, batch)])
        loss = contrastive_loss(logits[:batch], drawn.truth_BB) + contrastive_loss(
            logits.T, extended.T
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(50))
        ema.update_parameters(model)
        step += 1
        if time.time() - shown > 20:
            shown = time.time()
            hit = (
                (drawn.truth_BB.gather(1, logits[:batch].argmax(1, keepdim=True)) == 1)
                .float()
                .mean()
            )
            rate = step * batch / (shown - start)
            print(
                f"{step} loss {loss.item() / 2:.3f} in-batch {hit:.3f} {rate:.0f} pairs/s",
                flush=True,
            )
    model.load_state_dict(ema.module.state_dict())
    return step


@torch.no_grad()
def retrieval(
    model: CLIPModel, tokenizer: CLIPTokenizer, images: Tensor, texts: list[str], right: Tensor
) -> float:
    """Share of images (N, 3, 64, 64) whose best text among `texts` is number right[i]."""
    ids = tokenizer(
        texts, padding="max_length", truncation=True, max_length=20, return_tensors="pt"
    ).input_ids
    parts = [features(model, part, ids) for part in images.split(128)]
    scores = torch.cat([image @ parts[0][1].T for image, _ in parts])
    return round(float((scores.argmax(1) == right).float().mean()), 4)


@torch.no_grad()
def report(
    model: CLIPModel, tokenizer: CLIPTokenizer, data: ScorerData, work: Path
) -> dict[str, float]:
    """Retrieval over all captions of the base model, and of the background among unseen
    combinations.
    """
    core = [n for n, p in enumerate(data.pictures) if not p.extra and p.colour is None]
    texts = list(dict.fromkeys(data.pictures[n].caption for n in core))
    right = torch.tensor([texts.index(data.pictures[n].caption) for n in core])
    rgba = data.rgba[core].float() / 255
    white = rgba[:, :3] * rgba[:, 3:] + (1 - rgba[:, 3:])
    names = list(BACKDROPS)
    hidden = [sorted(held_out_backdrops(data.pictures[n].concept))[0] for n in core]
    colour = torch.tensor([BACKDROPS[name] for name in hidden]).float() / 255
    backed = rgba[:, :3] * rgba[:, 3:] + colour[:, :, None, None] * (1 - rgba[:, 3:])
    vae = AutoencoderKL.from_pretrained(work / "vae").eval()
    chosen = torch.randperm(len(core), generator=torch.Generator().manual_seed(0))[:400]
    hits = 0.0
    for number in chosen.tolist():
        choices = [caption(data.pictures[core[number]].caption, backdrop=name) for name in names]
        target = torch.tensor([names.index(hidden[number])])
        hits += retrieval(model, tokenizer, backed[number : number + 1], choices, target)
    return {
        "clean": retrieval(model, tokenizer, white, texts, right),
        "round_trip": retrieval(
            model, tokenizer, round_trip(vae, white[chosen]), texts, right[chosen]
        ),
        "unseen_backdrop_concept": retrieval(model, tokenizer, backed, texts, right),
        "unseen_backdrop_colour": round(hits / len(chosen), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("name", choices=sorted(SIZES))
    parser.add_argument("--work", type=Path, default=Path("build/assets"))
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--resume", type=Path, help="start from these weights (fp32, under --work)")
    parser.add_argument("--out", type=Path, help="default: the package's scorers folder")
    args = parser.parse_args()
    size = SIZES[args.name]
    torch.manual_seed(size.seed)
    tokenizer = CLIPTokenizer.from_pretrained(args.work / "tokenizer")
    data = ScorerData(args.work, tokenizer, size.seed)
    model = make_model(size, tokenizer)
    if args.resume:
        model.load_state_dict(load_file(args.resume))
    steps = train(model, data, args.minutes, args.batch, args.lr)
    model.eval()
    row = {
        "scorer": args.name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": steps,
        "pairs": steps * args.batch,
        **report(model, tokenizer, data, args.work),
    }
    print(row)
    save_file(model.state_dict(), args.work / f"scorer_{args.name}.safetensors")
    out = args.out or ASSETS / "scorers" / args.name
    model.to(torch.float16).save_pretrained(out)
    square = {"height": 64, "width": 64}
    images = CLIPImageProcessor(
        size={"shortest_edge": 64}, crop_size=square, image_mean=list(MEAN), image_std=list(STD)
    )
    CLIPProcessor(images, tokenizer).save_pretrained(out)
    # One name that every version of transformers looks for.
    images.save_pretrained(out)
    log = TOOLS / "log" / f"scorer_{args.name}.csv"
    log.parent.mkdir(exist_ok=True)
    with log.open("w", newline="") as file:
        writer = csv.DictWriter(file, row)
        writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    main()
