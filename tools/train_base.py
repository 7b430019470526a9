"""Train the embedded text-to-image model and write it as a StableDiffusionPipeline.

    python tools/train_base.py --work build/assets --minutes 180   # stable, constant learning rate
    python tools/train_base.py --work build/assets --decay-minutes 15   # decay to 0, then export

Needs what data.py, train_vae.py and train_tokenizer.py wrote. The stable phase goes on from
`base/stable.safetensors` if it is there, so it can be stopped (`touch build/assets/base/stop`) and
continued at will; the decay starts from that file and leaves it alone, so that a longer stable
phase and another decay can follow. `--init src/shortft/assets/emoji` goes on from the shipped
pipeline where that file is lost. Grids and the log: `base/`.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from base_model import Bundle, export, load_bundle, load_pipeline, make_bundle, save_bundle
from captions import Sampler, load_latents
from data import ASSETS
from grid import draw, sample
from parallel import average, launch, same_everywhere

EMA = 0.998
CHECKPOINT_SECONDS, GRID_SECONDS, LOG_SECONDS = 180, 1800, 30


class Log:
    """Appends step, samples, seconds of training, phase, mean loss, samples per second, learning
    rate.
    """

    def __init__(self, path: Path, phase: str, bundle: Bundle) -> None:
        self.path, self.phase, self.bundle = path, phase, bundle
        self.restart()

    def restart(self) -> None:
        self.losses: list[float] = []
        self.start, self.samples = time.time(), self.bundle.samples

    def add(self, loss: float, lr: float) -> None:
        self.losses.append(loss)
        if (passed := time.time() - self.start) < LOG_SECONDS:
            return
        self.bundle.seconds += passed
        rate = (self.bundle.samples - self.samples) / passed
        row = [self.bundle.step, self.bundle.samples, round(self.bundle.seconds), self.phase]
        row += [f"{sum(self.losses) / len(self.losses):.4f}", f"{rate:.1f}", f"{lr:.2e}"]
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerow(row)
        print(*row, flush=True)
        self.restart()


def loss_weight(snr: Tensor) -> Tensor:
    """Weight of the squared epsilon error: about that of a v-prediction loss, less where pictures
    are nearly clean.
    """
    return ((1 + snr) / snr).clamp(max=20) * (5 / (1 + snr)).clamp(max=1)


def training_loss(
    bundle: Bundle, sampler: Sampler, batch: int, generator: torch.Generator
) -> Tensor:
    latents, ids = sampler.draw(batch, generator)
    # One timestep from each of `batch` equal parts of the schedule: less variance than independent
    # draws.
    places = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
    timesteps = (places * len(bundle.alphas_cumprod)).long()
    alpha_bar = bundle.alphas_cumprod[timesteps]
    noise = torch.randn(latents.shape, generator=generator)
    level = alpha_bar[:, None, None, None]
    noisy = (level.sqrt() * latents + (1 - level).sqrt() * noise).to(
        memory_format=torch.channels_last
    )
    with torch.autocast("cpu", torch.bfloat16):
        hidden = bundle.text_encoder(ids).last_hidden_state
        prediction = bundle.unet(noisy, timesteps, encoder_hidden_states=hidden).sample
    errors = (prediction.float() - noise).square().mean((1, 2, 3))
    return (loss_weight(alpha_bar / (1 - alpha_bar)) * errors).mean()


def write_grid(bundle: Bundle, work: Path, name: str) -> None:
    prompts = (ASSETS / "prompts" / "fixed.txt").read_text().splitlines()
    pipe = bundle.pipeline(work)
    pictures = sample(pipe, prompts, seed=0, steps=25, guidance=3.0)
    draw(pictures, prompts).save(work / "base" / f"{name}.png")


def train(bundle: Bundle, work: Path, args: argparse.Namespace, rank: int) -> None:
    """One phase: decay where --decay-minutes is given, else stable. Process 0 saves and logs."""
    decay = args.decay_minutes > 0
    sampler = Sampler(work, CLIPTokenizer.from_pretrained(work / "tokenizer"))
    generator = torch.Generator().manual_seed(args.seed + 7919 * bundle.step + rank)
    target = work / "base" / ("decayed.safetensors" if decay else "stable.safetensors")
    stop = work / "base" / "stop"
    seconds = 60 * (args.decay_minutes if decay else args.minutes)
    start = saved = drawn = time.time()
    log = Log(work / "base" / "log.csv", "decay" if decay else "stable", bundle)
    done = 0.0
    while done < 1:
        pace = 1 - done if decay else min(1.0, (bundle.step - bundle.fresh_since + 1) / 200)
        for group in bundle.optimizer.param_groups:
            group["lr"] = args.lr * pace * group["factor"]
        loss = training_loss(bundle, sampler, args.batch // args.workers, generator)
        bundle.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        done = average(bundle.parameters, 1.0 if stop.exists() else (time.time() - start) / seconds)
        torch.nn.utils.clip_grad_norm_(bundle.parameters, 1.0)
        bundle.optimizer.step()
        bundle.step += 1
        bundle.samples += args.batch
        if rank:
            continue
        bundle.update_ema(min(EMA, (1 + bundle.step) / (10 + bundle.step)))
        log.add(loss.item(), args.lr * pace)
        if time.time() - saved > CHECKPOINT_SECONDS:
            save_bundle(bundle, target)
            saved = time.time()
        if time.time() - drawn > GRID_SECONDS:
            write_grid(bundle, work, f"grid_{bundle.step:06d}")
            drawn = time.time()
            log.restart()
    if rank == 0:
        stop.unlink(missing_ok=True)
        save_bundle(bundle, target)
        write_grid(bundle, work, f"grid_{bundle.step:06d}{'_decayed' if decay else ''}")


def begin_from(pipeline: Path, work: Path) -> None:
    """Put an exported pipeline's VAE, tokenizer and kept log where this command looks for them."""
    for name in ("vae", "tokenizer"):
        if not (work / name).exists():
            shutil.copytree(pipeline / name, work / name)
    log = work / "base" / "log.csv"
    if not log.exists():
        shutil.copyfile(Path(__file__).parent / "log" / "base.csv", log)


def phase(rank: int, args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    bundle = make_bundle(args.work)
    start = args.work / "base" / "stable.safetensors"
    if start.exists():
        load_bundle(bundle, start)
        print(f"going on from {start} at step {bundle.step}", flush=True)
    elif args.init:
        load_pipeline(bundle, args.init, args.work / "base" / "log.csv")
        print(f"going on from {args.init} at step {bundle.step}", flush=True)
    same_everywhere(bundle.parameters)
    train(bundle, args.work, args, rank)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("build/assets"))
    parser.add_argument("--minutes", type=float, default=180, help="length of the stable phase")
    parser.add_argument(
        "--decay-minutes", type=float, default=0, help="run the decay for so long, and export"
    )
    parser.add_argument(
        "--export-only", action="store_true", help="write the pipeline of the last decay"
    )
    parser.add_argument(
        "--out", type=Path, default=ASSETS / "emoji", help="where the pipeline goes"
    )
    parser.add_argument(
        "--batch", type=int, default=40, help="samples per step, over all processes"
    )
    parser.add_argument(
        "--init", type=Path, help="start from this exported pipeline: its VAE and tokenizer too"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--lr", type=float, default=7e-4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = args.work / "base"
    folder.mkdir(parents=True, exist_ok=True)
    start = folder / ("decayed.safetensors" if args.export_only else "stable.safetensors")
    if (args.decay_minutes or args.export_only) and not start.exists():
        parser.error(f"{start} is not there; run the phase before it first")
    if args.init:
        begin_from(args.init, args.work)
    load_latents(args.work)
    if not args.export_only:
        launch(phase, args, args.workers)
    if args.decay_minutes or args.export_only:
        bundle = make_bundle(args.work)
        load_bundle(bundle, folder / "decayed.safetensors")
        export(bundle, args.work, args.out)


if __name__ == "__main__":
    main()
