"""Every family against diffusers' own pipelines, and their gradients, on tiny models."""

from __future__ import annotations

import gc
import json
import re
import shutil
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLFlux2, AutoencoderTiny, EulerDiscreteScheduler
from torch import Tensor, nn

from shortft import load_adapter
from shortft.adapter import AdapterInfo, load_into, save_adapter
from shortft.assets import asset
from shortft.chain import run_chain
from shortft.config import Config
from shortft.errors import UserError
from shortft.families import load_family
from shortft.families.base import Conditioning, Guidance
from shortft.families.flux import from_tokens, to_tokens
from shortft.families.text import BATCH, KnownPrompts, with_empty
from shortft.methods.shortft import shortft_plan
from shortft.networks import SHORTCUT, ModelNetworks, add_lora, lora_parameters, lora_state, view
from shortft.plans import Plan, base_plan, inference_plan
from shortft.preflight.outline import empty_family
from shortft.quiet import quiet
from shortft.sampling import Sampler, load_tuned
from shortft.step import decode
from shortft.trainer import Trainer
from tiny import randomise_loras, to_float64
from tiny_families import BUILDERS, autoencoder, tiny

PROMPTS = ["red apple", "panda face"]
SEEDS = [3, 4]
STEPS, K, SCALE = 6, 3, 3.0
GUIDED = ["sd", "sdxl", "sd3", "flux2"]  # classifier-free; FLUX.1's is an input of the network


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny models in the layout that the real ones have on disk."""
    root = tmp_path_factory.mktemp("models")
    for name in BUILDERS:
        save(tiny(name), root / name)
    return {name: root / name for name in BUILDERS}


@pytest.fixture(scope="module")
def loras(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A few-step LoRA of each."""
    root = tmp_path_factory.mktemp("loras")
    return {
        name: make_shortcut(load_family(str(path), device="cpu"), root / name)
        for name, path in models.items()
    }


def save(pipeline: Any, directory: Path) -> Path:
    with quiet():
        pipeline.save_pretrained(directory)
    if "Flux" in type(pipeline).__name__:
        (directory / "shortft.json").write_text(json.dumps({"resolution": 16}))
    return directory


def ours(
    family: Any, plan: Plan | None = None, nets: ModelNetworks | None = None, steps: int = STEPS
) -> Tensor:
    schedule = family.schedule(steps)
    nets = nets or ModelNetworks(family, guidance=Guidance(SCALE))
    sampler = Sampler(nets, schedule, plan or base_plan(schedule))
    return sampler.draw(PROMPTS, SEEDS)


def theirs(
    pipe: Any, resolution: int, scale: float = SCALE, steps: int = STEPS, **options: Any
) -> Tensor:
    images: Tensor = pipe(
        prompt=PROMPTS,
        num_inference_steps=steps,
        guidance_scale=scale,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        height=resolution,
        width=resolution,
        output_type="pt",
        **options,
    ).images
    return images


# The chain


@pytest.mark.parametrize("name", BUILDERS)
def test_chain_equals_the_familys_own_pipeline(models: dict[str, Path], name: str):
    family = load_family(str(models[name]), device="cpu")
    assert (family.name, family.resolution) == (name, 16)
    images, expected = ours(family), theirs(tiny(name), 16)
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)
    # Right is told from wrong: prompts and guidance change the images by far more.
    assert (expected[0] - expected[1]).abs().mean() > 0.01
    assert (expected - theirs(tiny(name), 16, scale=1.0)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name", "options", "scale"),
    [
        ("sd", {"second": True}, SCALE),
        ("sdxl", {"zeros_for_empty": False}, SCALE),
        ("sd3", {"t5": False}, SCALE),
        ("sd3", {"first": True}, SCALE),
        ("flux", {"guidance_embeds": False}, 1.0),
        ("flux2", {"distilled": True}, 1.0),
    ],
)
def test_variants_of_a_family(tmp_path: Path, name: str, options: dict[str, bool], scale: float):
    """SD 2.x (v-prediction), SDXL with an encoded empty prompt, SD3 without T5, SD3.0, and FLUX
    distilled."""
    pipe = tiny(name, **options)
    family = load_family(str(save(pipe, tmp_path)), device="cpu")
    nets = ModelNetworks(family, guidance=Guidance(scale))
    images = ours(family, nets=nets)
    torch.testing.assert_close(images, theirs(pipe, 16, scale), atol=1e-5, rtol=0)


@pytest.mark.parametrize("spacing", ["leading", "linspace"])
def test_a_chain_of_eulers_ends_without_noise(tmp_path: Path, spacing: str):
    """Whatever its configuration keeps of another scheduler's."""
    pipe = tiny("sd")
    left_over = {**pipe.scheduler.config, "set_alpha_to_one": False}
    pipe.scheduler = EulerDiscreteScheduler.from_config(left_over, timestep_spacing=spacing)
    family = load_family(str(save(pipe, tmp_path)), device="cpu")
    schedule = family.schedule(STEPS)
    assert schedule.alpha[-1] == 1 > schedule.alpha[-2]
    if spacing == "leading":  # on a line Euler's timesteps are fractions
        torch.testing.assert_close(ours(family), theirs(pipe, 16), atol=1e-5, rtol=0)


@pytest.mark.parametrize("steps", [1, 4, 20])
def test_flux2_at_other_numbers_of_steps(models: dict[str, Path], steps: int):
    """Its shift depends on them."""
    family, pipe = load_family(str(models["flux2"]), device="cpu"), tiny("flux2")
    images, expected = ours(family, steps=steps), theirs(pipe, 16, steps=steps)
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)
    schedule, visited = family.schedule(steps), pipe.scheduler.timesteps
    torch.testing.assert_close(schedule.timesteps.float(), visited, atol=1e-3, rtol=0)
    assert (schedule.shift == family.schedule(STEPS).shift) == (steps == STEPS)


@pytest.mark.parametrize(
    ("outline", "name", "options"),
    [
        ("sd15", "sd", {}),
        ("sdxl", "sdxl", {}),
        ("sd3", "sd3", {"first": True}),
        ("sd35", "sd3", {}),
        ("flux", "flux", {}),
        ("flux2", "flux2", {}),
    ],
)
def test_tiny_models_have_every_layer_of_the_real_ones(outline, name, options):
    real, pipe = empty_family(asset("outlines", outline)), tiny(name, **options)

    def layers(network: nn.Module) -> set[tuple[str, str]]:
        """Every parameter's name without numbers, and the kind of its layer."""
        return {
            (re.sub(r"\d+", "N", f"{path}.{key}"), type(layer).__name__)
            for path, layer in network.named_modules()
            for key, _ in layer.named_parameters(recurse=False)
        }

    assert layers(real.denoiser) <= layers(getattr(pipe, real.part))
    assert layers(real.vae) <= layers(pipe.vae)


@pytest.mark.parametrize(("name", "steps"), [("sd3", 10), ("sd3", 28), ("flux", 12)])
def test_jumps_over_whole_segments_are_the_pipeline_in_few_steps(models, name: str, steps: int):
    """So segments start where the pipeline calls a few-step model, whose LoRA was made for that."""
    family = load_family(str(models[name]), device="cpu")
    schedule = family.schedule(steps)
    nets = ModelNetworks(
        family,
        guidance=Guidance(1.0),
        shortcut_guidance=Guidance(SCALE),
        plain_jumps=True,
        loras=1,  # which starts as nothing
    )
    plan = inference_plan(schedule, 4, "few_step")
    images = Sampler(nets, schedule, plan).draw(PROMPTS, SEEDS)
    expected = theirs(tiny(name), 16, steps=4)
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)
    assert (expected - theirs(tiny(name), 16, steps=5)).abs().max() > 1e-3


@pytest.mark.parametrize("name", BUILDERS)
def test_another_resolution(models: dict[str, Path], name: str):
    """FLUX's schedules, SDXL's time ids and SD3's cropped positions depend on it."""
    size = 32 if "flux" in name else 8
    family = load_family(str(models[name]), device="cpu", resolution=size)
    torch.testing.assert_close(ours(family), theirs(tiny(name), size), atol=1e-5, rtol=0)
    usual = load_family(str(models[name]), device="cpu").schedule(STEPS).timesteps
    same = torch.equal(family.schedule(STEPS).timesteps, usual)
    assert same == ("flux" not in name)
    with pytest.raises(UserError, match=f"--resolution {size + 1}: .* needs a multiple of"):
        load_family(str(models[name]), device="cpu", resolution=size + 1)


def test_positions_that_sd3_does_not_know(models: dict[str, Path]):
    with pytest.raises(UserError, match=r"--resolution 64: .* knows positions up to 32 pixels"):
        load_family(str(models["sd3"]), device="cpu", resolution=64)


def test_flux_tokens_are_those_of_the_pipeline():
    latents = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    pipe = tiny("flux")
    expected = pipe._pack_latents(latents, 2, 4, 6, 8)
    assert torch.equal(to_tokens(latents), expected)
    assert torch.equal(from_tokens(expected, 6, 8), latents)


@pytest.mark.parametrize("name", BUILDERS)
def test_conditioning_rows_dtype_and_text_encoders_that_left(models: dict[str, Path], name: str):
    family = load_family(str(models[name]), device="cpu")
    cond = family.encode([*PROMPTS, "fish"])
    assert len(cond) == 3
    rows = torch.tensor([2, 0])
    alone = family.encode(["fish", PROMPTS[0]])
    family.encode_ahead([*PROMPTS, "fish", "fish"])
    for other in (cond[rows], cond[[2, 0]], family.encode(["fish", PROMPTS[0]])):
        for field in ("positive", "negative", "pooled", "negative_pooled"):
            a, b = getattr(other, field), getattr(alone, field)
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    half = cond.to(torch.bfloat16)
    dtypes = {t.dtype for t in (half.positive, half.negative, half.pooled) if t is not None}
    assert dtypes == {torch.bfloat16}
    with pytest.raises(UserError, match="prompt 'pizza': not encoded before"):
        family.encode(["pizza"])


def test_prompts_encoded_ahead_leave_the_device_part_by_part():
    """And the empty prompt's embeddings, the same for all, are there once."""
    parts: list[weakref.ref[Conditioning]] = []

    def encode(prompts: Sequence[str]) -> Conditioning:
        gc.collect()
        assert all(part() is None for part in parts)
        states = torch.randn(len(prompts) + 1, 7, 4)
        cond = with_empty(states, states[:, 0])
        parts.append(weakref.ref(cond))
        return cond

    prompts = [f"prompt {i}" for i in range(4 * BATCH)]
    known = KnownPrompts(encode, prompts, torch.device("cpu"))
    assert len(parts) == 4
    cond = known(prompts)
    assert cond.positive.shape == cond.negative.shape == (len(prompts), 7, 4)
    for empty in (cond.negative, cond.negative_pooled):
        assert empty is not None
        assert empty.untyped_storage().nbytes() == empty[0].nbytes
    assert cond.positive.untyped_storage().nbytes() == cond.positive.nbytes


# Decoding


@pytest.mark.parametrize("name", BUILDERS)
def test_decoding_one_by_one_equals_decoding_at_once(models: dict[str, Path], name: str):
    """Images and gradient in fp64; what is kept is the latents of each picture, no activation."""
    family = load_family(str(models[name]), device="cpu")
    family.vae.double()  # type: ignore[attr-defined]
    noise = family.noise([1, 2, 3]).double()
    results, kept = [], []
    for recompute in (False, True):
        latents = noise.clone().requires_grad_()
        count = Kept()
        with torch.autograd.graph.saved_tensors_hooks(count.pack, lambda x: x):
            images = decode(family, latents, recompute=recompute)
        images.square().sum().backward()
        results.append((images, latents.grad))
        kept.append(count.numbers)
    torch.testing.assert_close(results[0], results[1], atol=1e-12, rtol=1e-12)
    assert results[0][1].abs().min() > 0
    assert kept[1] < kept[0] / 20


class Kept:
    """Numbers that a graph keeps for its backward pass, counted as often as they are named."""

    numbers = 0

    def pack(self, x: Tensor) -> Tensor:
        self.numbers += x.numel()
        return x


@pytest.mark.parametrize("name", BUILDERS)
def test_another_decoder_sees_the_latents_at_its_own_scale(
    models: dict[str, Path], tmp_path: Path, name: str
):
    """A small decoder, whose latents are scaled already, as the pipeline itself uses it."""
    pipe = tiny(name)
    small = small_decoder(name, pipe.vae.config.latent_channels)
    small.save_pretrained(tmp_path)
    family = load_family(str(models[name]), device="cpu", decoder=str(tmp_path))
    pipe.vae = small
    images, expected = ours(family), theirs(pipe, 16)
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)
    assert (images - ours(load_family(str(models[name]), device="cpu"))).abs().mean() > 0.05
    latents = family.noise([1]).requires_grad_()
    family.decode(latents).sum().backward()
    assert latents.grad is not None
    assert latents.grad.abs().min() > 0
    small_decoder(name, 5).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"--decoder .*other: is made for latents of 5 channels"):
        load_family(str(models[name]), device="cpu", decoder=str(tmp_path / "other"))


def small_decoder(name: str, channels: int) -> Any:
    """TAESD's class; for FLUX.2 its own, with statistics of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name == "flux2":
            vae = autoencoder(AutoencoderKLFlux2, latent_channels=channels, act_fn="relu")
            vae.bn.running_mean.normal_()
            return vae.eval()
        return AutoencoderTiny(
            latent_channels=channels,
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        ).eval()


def test_decoders_that_are_none(models: dict[str, Path], tmp_path: Path):
    with pytest.raises(UserError, match=r"--decoder .*: cannot be loaded .* an AutoencoderKL or"):
        load_family(str(models["sd"]), device="cpu", decoder=str(tmp_path))
    with pytest.raises(UserError, match="--decoder nowhere: no such model; give a directory or"):
        Config(decoder="nowhere")


@pytest.mark.parametrize(
    ("name", "changed", "said"),
    [
        ("sd", {"scaling_factor": 0.13025}, "scale 0.13025, .* has 0.18215"),
        ("sdxl", {"scaling_factor": 0.18215}, "scale 0.18215, .* has 0.13025"),
        ("flux", {"shift_factor": 0.0609}, "shift 0.0609, .* has 0.1159"),
        ("sd3", {"shift_factor": None}, "shift 0, .* has 0.0609"),
        ("sd", None, "4 pixels a side, .* has 2; give a decoder of the same family"),
    ],
)
def test_decoders_of_other_latents_are_refused(
    models: dict[str, Path],
    tmp_path: Path,
    name: str,
    changed: dict[str, float | None] | None,
    said: str,
):
    """The latents of SD and SDXL, and of SD3 and FLUX, have as many channels as one another."""
    if changed is None:
        AutoencoderTiny(
            encoder_block_out_channels=(8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            num_encoder_blocks=(1, 1, 1),
            num_decoder_blocks=(1, 1, 1),
        ).save_pretrained(tmp_path / "vae")
    else:
        config = shutil.copytree(models[name] / "vae", tmp_path / "vae") / "config.json"
        load_family(str(models[name]), device="cpu", decoder=str(config.parent))
        config.write_text(json.dumps({**json.loads(config.read_text()), **changed}))
    with pytest.raises(UserError, match=f"--decoder .*: is made for latents of {said}"):
        load_family(str(models[name]), device="cpu", decoder=str(tmp_path / "vae"))


def test_published_small_decoders_go_with_their_own_family(models: dict[str, Path]):
    """Their configurations are alike."""
    for name, decoder, right in (
        ("sdxl", "madebyollin/taesd", "madebyollin/taesdxl"),
        ("sd", "madebyollin/taesdxl@v1", "madebyollin/taesd"),
        ("sd3", "madebyollin/taef1", "madebyollin/taesd3"),
        ("flux", "somewhere/taesd3", "madebyollin/taef1"),
    ):
        said = f"--decoder {decoder}: tae.* of .*, a model of {name}; give {right}$"
        with pytest.raises(UserError, match=said):
            load_family(str(models[name]), device="cpu", decoder=decoder)
        with pytest.raises(UserError, match=f"--decoder {right}: cannot be loaded .the hub cannot"):
            load_family(str(models[name]), device="cpu", decoder=right)


# Training


def make_shortcut(family: Any, path: Path) -> Path:
    """A few-step LoRA on every kind of layer that a distilled one may change."""
    module = view(family.denoiser)
    generator = torch.Generator().manual_seed(3)
    add_lora(module, SHORTCUT, rank=2, targets=family.shortcut_targets, generator=generator)
    for parameter in lora_parameters(module, SHORTCUT).values():
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    family.save_lora(lora_state(module, SHORTCUT), path)
    return path


class Rig:
    """A tiny family with LoRAs and a shortcut, and a smooth loss of its images."""

    def __init__(
        self, model: Path, tmp_path: Path, guidance: Guidance, precision: str = "fp32"
    ) -> None:
        self.family = load_family(str(model), device="cpu", precision=precision)
        shortcut = make_shortcut(self.family, tmp_path / "shortcut.safetensors")
        self.nets = ModelNetworks(
            self.family, guidance=guidance, loras=K, rank=2, shortcut=shortcut
        )
        randomise_loras(self.nets)
        self.schedule = self.family.schedule(STEPS)
        self.cond, self.noise = self.family.encode(PROMPTS), self.family.noise(SEEDS)
        self.plan = shortft_plan(self.schedule, K, 1)
        self.parameters = self.nets.train_only(self.plan.trainable)

    def double(self) -> None:
        to_float64(self.family, self.nets)
        self.cond, self.noise = self.cond.to(torch.float64), self.noise.double()

    def loss(self, *, recompute: bool = False) -> Tensor:
        """At this contrast few pixels are clamped to [0, 1], so that the loss is smooth."""
        latents = run_chain(
            self.plan, self.nets, self.noise, self.cond, self.schedule, recompute=recompute
        )
        images = self.family.decode(0.03 * latents)
        return 10 * images.square().mean() + 0.1 * latents.square().mean()

    def gradients(self, **options: bool) -> list[Tensor]:
        loss = self.loss(**options)
        return list(torch.autograd.grad(loss, self.parameters, materialize_grads=True))


@pytest.mark.parametrize("name", BUILDERS)
def test_an_update_changes_only_loras(models: dict[str, Path], tmp_path: Path, name: str):
    rig = Rig(models[name], tmp_path, Guidance(SCALE))
    assert rig.nets._shortcut is not None
    modules = (rig.family.denoiser, rig.family.vae, rig.nets._shortcut)  # type: ignore[attr-defined]
    frozen = [p for module in modules for p in module.parameters()]
    before = [p.detach().clone() for p in frozen]
    loras = [p.detach().clone() for p in rig.parameters]
    rig.loss().backward()
    # The last block of SD3 throws away what it computes for the text: no gradient there.
    reached = [p for p in rig.parameters if p.grad is not None and bool(p.grad.any())]
    assert len(reached) > 0.9 * len(rig.parameters)
    torch.optim.AdamW(rig.parameters, lr=1e-2).step()
    assert all(torch.equal(a, b) for a, b in zip(frozen, before, strict=True))
    assert all(p.grad is None for p in frozen)
    moved = sum(not torch.equal(a, b) for a, b in zip(rig.parameters, loras, strict=True))
    assert moved > 0.9 * len(loras)


@pytest.mark.parametrize("name", BUILDERS)
def test_gradient_equals_finite_differences(models: dict[str, Path], tmp_path: Path, name: str):
    """Central differences; SD3 and FLUX round to fp32 inside, so the steps are not tiny."""
    rig = Rig(models[name], tmp_path, Guidance(SCALE))
    rig.plan = shortft_plan(rig.schedule, K, 2)
    rig.parameters = [p for n in (2, 3) for p in rig.nets.parameters_of(n).values()]
    rig.nets.train_only(rig.plan.trainable)
    rig.double()
    gradients = rig.gradients()
    generator = torch.Generator().manual_seed(5)
    h = 3e-4
    for _ in range(2):
        direction = [
            0.5 * g / g.norm().clamp(min=1e-12) + torch.randn(g.shape, generator=generator).double()
            for g in gradients
        ]
        slope = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True))
        measured = 0.0
        for sign in (1, -1):
            for parameter, d in zip(rig.parameters, direction, strict=True):
                parameter.data.add_(d, alpha=sign * h)
            with torch.no_grad():
                measured += sign * float(rig.loss()) / (2 * h)
            for parameter, d in zip(rig.parameters, direction, strict=True):
                parameter.data.sub_(d, alpha=sign * h)
        assert measured == pytest.approx(slope, rel=1e-4)


@pytest.mark.parametrize("name", BUILDERS)
def test_positive_and_both_branches(models: dict[str, Path], tmp_path: Path, name: str):
    """The same images; another gradient with classifier-free guidance, the same with FLUX's."""
    rig = Rig(models[name], tmp_path, Guidance(SCALE, "both"))
    both_loss, both = rig.loss(), torch.cat([g.flatten() for g in rig.gradients()])
    rig.nets.guidance = Guidance(SCALE, "positive")
    torch.testing.assert_close(rig.loss(), both_loss, atol=0, rtol=1e-5)
    positive = torch.cat([g.flatten() for g in rig.gradients()])
    assert positive.norm() > 0
    differs = float((both - positive).norm() / both.norm())
    assert differs > 0.01 if name in GUIDED else differs == 0


@pytest.mark.parametrize("name", BUILDERS)
def test_half_precision_and_recomputation(models: dict[str, Path], tmp_path: Path, name: str):
    """bf16 networks with fp32 LoRAs: nearly the same direction of gradient."""
    exact = Rig(models[name], tmp_path, Guidance(SCALE))
    half = Rig(models[name], tmp_path, Guidance(SCALE), precision="bf16")
    assert {p.dtype for p in half.family.denoiser.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in half.parameters} == {torch.float32}
    a = torch.cat([g.flatten() for g in exact.gradients()])
    b = torch.cat([g.flatten() for g in half.gradients(recompute=True)])
    # FLUX's networks themselves round the timestep, which these random weights notice most.
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > (0.75 if "flux" in name else 0.95)


@pytest.mark.parametrize(
    ("name", "options"), [("flux", {"guidance_embeds": False}), ("flux2", {"distilled": True})]
)
def test_distilled_models_take_no_guidance(tmp_path: Path, name: str, options: dict[str, bool]):
    model = save(tiny(name, **options), tmp_path)
    family = load_family(str(model), device="cpu")
    assert family.default_guidance_scale == 1
    with pytest.raises(UserError, match=r"--guidance-scale 3: .* takes no guidance"):
        ours(family)


@pytest.mark.parametrize("name", BUILDERS)
def test_the_trainer_runs_every_family(models: dict[str, Path], tmp_path: Path, name: str):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    config = Config(
        model=str(models[name]),
        prompts=prompts,
        reward="symmetry",
        shortcut="plain",
        num_steps=STEPS,
        segments=K,
        rank=2,
        batch_size=2,
        updates=3,
        output_dir=tmp_path / "run",
    )
    trainer = Trainer(config)
    before = {n: trainer.nets.state_of(n)[key].clone() for n, key in first_key(trainer)}
    _, outcome = trainer.update()
    assert not outcome.skipped
    assert outcome.grad_norm > 0
    after = {n: trainer.nets.state_of(n)[key] for n, key in first_key(trainer)}
    assert all(not torch.equal(after[n], before[n]) for n in before)


def first_key(trainer: Trainer) -> list[tuple[int, str]]:
    """A B matrix of each LoRA."""
    keys = {n: trainer.nets.state_of(n) for n in range(1, trainer.nets.loras + 1)}
    return [(n, next(k for k in state if "lora_B" in k)) for n, state in keys.items()]


# Files


@pytest.mark.parametrize("name", BUILDERS)
def test_adapter_in_the_familys_pipeline(models: dict[str, Path], tmp_path: Path, name: str):
    family = load_family(str(models[name]), device="cpu")
    nets = ModelNetworks(family, guidance=Guidance(SCALE), loras=K, rank=2)
    randomise_loras(nets, 0.3)
    schedule = family.schedule(STEPS)
    plan = inference_plan(schedule, K)
    active = [step for step in plan.steps if step.adapters]
    info = AdapterInfo(
        base_model="tiny",
        loras=K,
        rank=2,
        segments=K,
        placement="stacked",
        num_steps=STEPS,
        timesteps=[int(schedule.timesteps[step.start]) for step in active],
        stacked=[step.adapters for step in active],
        guidance_scale=SCALE,
        config={},
        cut_by=schedule.cut_by,
    )
    save_adapter(nets, info, tmp_path)
    tuned = ours(family, plan, nets)
    pipe = tiny(name)
    base = theirs(pipe, 16)
    router = load_adapter(pipe, tmp_path)
    torch.testing.assert_close(tuned, theirs(pipe, 16), atol=1e-5, rtol=0)
    assert (tuned - base).abs().max() > 1e-2
    router.remove()
    torch.testing.assert_close(theirs(pipe, 16), base, atol=1e-6, rtol=0)
    fresh = ModelNetworks(family, guidance=Guidance(SCALE), loras=K, rank=2, seed=9)
    load_into(fresh, tmp_path)
    torch.testing.assert_close(ours(family, plan, fresh), tuned, atol=0, rtol=0)


def test_an_older_adapter_of_sd3_acts_where_it_was_trained(models, tmp_path: Path):
    """In our own chain as in the pipeline: it does not say how its chain was cut."""
    family = load_family(str(models["sd3"]), device="cpu")
    nets = ModelNetworks(family, guidance=Guidance(SCALE), loras=K, rank=2)
    randomise_loras(nets, 0.3)
    save_adapter(nets, AdapterInfo("tiny", K, 2, K, "stacked", STEPS, [], [], SCALE, {}), tmp_path)
    sampler = load_tuned(family, tmp_path, None, None)
    assert sampler.schedule.cut_by == "steps"
    assert sampler.plan != inference_plan(family.schedule(STEPS), K)
    images = sampler.draw(PROMPTS, SEEDS)
    pipe = tiny("sd3")
    load_adapter(pipe, tmp_path)
    torch.testing.assert_close(images, theirs(pipe, 16), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("name", "steps"), [("flux", STEPS), ("flux2", STEPS), ("flux2", 69)])
def test_half_precision_routes_every_step(models, tmp_path: Path, name: str, steps: int):
    """Pipelines hand over timestep / 1000 in half precision, off by up to four timesteps.

    69 steps of FLUX.2 lie closer than that where its shift presses them together.
    """
    family = load_family(str(models[name]), device="cpu", resolution=32)
    nets = ModelNetworks(family, guidance=Guidance(SCALE), loras=K, rank=2)
    info = AdapterInfo("tiny", K, 2, K, "stacked", steps, [], [], SCALE, {})
    save_adapter(nets, info, tmp_path)
    with quiet():
        pipe = tiny(name).to(torch.bfloat16)
    router = load_adapter(pipe, tmp_path)
    for number in (steps, STEPS):
        plan = inference_plan(family.schedule(number), K)
        active: list[int] = []
        hook = pipe.transformer.register_forward_hook(
            lambda *_, seen=active: seen.append(router._active or 0)
        )
        theirs(pipe, 32, scale=1.0, steps=number)
        hook.remove()
        assert active == [step.adapters for step in plan.steps]


@pytest.mark.parametrize("name", BUILDERS)
def test_loras_of_another_family_are_refused(models, loras, tmp_path: Path, name: str):
    family = load_family(str(models[name]), device="cpu")
    for other, path in loras.items():
        if other != name:
            with pytest.raises(UserError, match="cannot be loaded as a LoRA of"):
                family.load_lora(view(family.denoiser), path, SHORTCUT)
    (tmp_path / "junk").write_bytes(b"junk")
    with pytest.raises(UserError, match="junk: cannot be loaded"):
        family.load_lora(view(family.denoiser), tmp_path / "junk", SHORTCUT)


def test_models_of_no_known_family(models: dict[str, Path], tmp_path: Path):
    index = {"_class_name": "PixArtAlphaPipeline", "_diffusers_version": "0.42.1"}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="is a PixArtAlphaPipeline; supported are Flux2Klein"):
        load_family(str(tmp_path))
    with pytest.raises(UserError, match="owner/name@main: no model there"):
        load_family("owner/name@main")
    # A copy: other tests need the model, in whichever order they run.
    damaged = shutil.copytree(models["sdxl"], tmp_path / "damaged")
    (damaged / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be loaded as a StableDiffusionXLPipeline"):
        load_family(str(damaged))


@pytest.mark.parametrize(
    ("name", "changed", "reason"),
    [
        ("sd", {"rescale_betas_zero_snr": True}, "rescaled or custom betas"),
        ("sd", {"prediction_type": "sample"}, "prediction_type 'sample' is not supported"),
        ("sdxl", {"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule 'squaredcos_cap_v2'"),
        ("sd3", {"use_karras_sigmas": True}, "use_karras_sigmas is not supported"),
        ("flux", {"shift_terminal": 0.1}, "shift_terminal is not supported"),
        ("flux2", {"invert_sigmas": True}, "invert_sigmas is not supported"),
    ],
)
def test_schedulers_are_refused_before_weights_are_read(
    models: dict[str, Path], tmp_path: Path, name: str, changed: dict[str, Any], reason: str
):
    model = shutil.copytree(models[name], tmp_path / "model")
    for weights in model.rglob("*.safetensors"):
        weights.unlink()
    file = model / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))
    with pytest.raises(UserError, match=f"--model {model}: its .*Scheduler cannot be .*{reason}"):
        load_family(str(model), device="cpu")


@pytest.mark.parametrize(
    ("name", "part", "method"),
    [("sd3", "text_encoder_3", "bitsandbytes"), ("flux", "transformer", "gguf")],
)
def test_quantised_parts_are_refused_before_weights_are_read(
    models: dict[str, Path], tmp_path: Path, name: str, part: str, method: str
):
    model = shutil.copytree(models[name], tmp_path / "model")
    for weights in model.rglob("*.safetensors"):
        weights.unlink()
    file = model / part / "config.json"
    quantised = {"load_in_4bit": True, "quant_method": method}
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "quantization_config": quantised}))
    said = rf"--model {model}: its {part} is quantised \({method}\), which is not supported; give"
    with pytest.raises(UserError, match=said):
        load_family(str(model), device="cpu")


def test_a_library_that_is_missing_is_said_in_one_line(models, tmp_path: Path, monkeypatch):
    """As T5's tokenizer needs one for files of an older kind."""

    def without(*args: object, **options: object) -> None:
        raise ImportError("\nT5Tokenizer requires the SentencePiece library\nmore")

    monkeypatch.setattr("transformers.T5EncoderModel.from_pretrained", without)
    said = r"StableDiffusion3Pipeline \(T5Tokenizer requires the SentencePiece library\); give"
    with pytest.raises(UserError, match=said):
        load_family(str(models["sd3"]), device="cpu")


def test_a_repository_with_half_precision_weights_only(tmp_path: Path):
    pipe = tiny("sd")
    with quiet():
        pipe.save_pretrained(tmp_path / "half", variant="fp16")
    assert not list(tmp_path.rglob("diffusion_pytorch_model.safetensors"))
    family = load_family(str(tmp_path / "half"), device="cpu")
    torch.testing.assert_close(ours(family), theirs(pipe, 16), atol=1e-5, rtol=0)


def test_bars_of_downloads_stay():
    import huggingface_hub.utils as hub
    from transformers.utils import logging

    assert logging.is_progress_bar_enabled()
    with quiet():
        assert not hub.are_progress_bars_disabled()
        assert not logging.is_progress_bar_enabled()
    assert logging.is_progress_bar_enabled()
