"""A saved adapter inside an ordinary diffusers pipeline against our own chain."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from peft import LoraConfig
from safetensors import SafetensorError

from shortft import load_adapter
from shortft.adapter import AdapterInfo, load_into, read_info, save_adapter
from shortft.errors import UserError
from shortft.families.base import Guidance
from shortft.networks import ModelNetworks
from shortft.plans import Placement, base_plan, inference_plan
from shortft.sampling import Sampler
from test_lora_files import FAMILIES
from tiny import randomise_loras, tiny_family, tiny_pipeline

PROMPTS = ["red apple", "panda face"]
SEEDS = [3, 4]


def make_adapter(directory: Path, *, placement: Placement = "stacked") -> ModelNetworks:
    family = tiny_family()
    loras = 4 if placement in ("stacked", "segments") else 1
    nets = ModelNetworks(family, guidance=Guidance(3.0), loras=loras, rank=2)
    randomise_loras(nets, 0.3)
    schedule = family.schedule(10)
    plan = inference_plan(schedule, 4, placement)
    active = [s for s in plan.steps if s.adapters]
    info = AdapterInfo(
        base_model="tiny",
        loras=loras,
        rank=2,
        segments=4,
        placement=placement,
        num_steps=10,
        timesteps=[int(schedule.timesteps[s.start]) for s in active],
        stacked=[s.adapters for s in active],
        guidance_scale=3.0,
        config={},
    )
    save_adapter(nets, info, directory)
    return nets


def ours(nets: ModelNetworks, steps: int, *, tuned: bool = True, placement: Placement = "stacked"):
    schedule = nets.family.schedule(steps)
    parts = 1 if placement == "everywhere" else 4
    plan = inference_plan(schedule, parts, placement) if tuned else base_plan(schedule)
    return Sampler(nets, schedule, plan).draw(PROMPTS, SEEDS)


def theirs(pipe, steps: int) -> torch.Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    images: torch.Tensor = pipe(
        PROMPTS,
        num_inference_steps=steps,
        guidance_scale=3.0,
        generator=generators,
        output_type="pt",
    ).images
    return images


@pytest.mark.parametrize(
    ("placement", "steps"),
    [
        *((p, n) for p in ("stacked", "shared", "segments", "everywhere") for n in (10, 17)),
        ("everywhere", 3),  # fewer than segments, which such a LoRA does not need
    ],
)
def test_pipeline_equals_our_chain(tmp_path: Path, placement: Placement, steps: int):
    nets = make_adapter(tmp_path, placement=placement)
    pipe = tiny_pipeline()
    expected_base = theirs(pipe, steps)
    torch.testing.assert_close(ours(nets, steps, tuned=False), expected_base, atol=1e-5, rtol=0)
    load_adapter(pipe, tmp_path)
    tuned = theirs(pipe, steps)
    torch.testing.assert_close(ours(nets, steps, placement=placement), tuned, atol=1e-5, rtol=0)
    assert (tuned - expected_base).abs().max() > 1e-2


def test_other_samplers_of_flow_models_are_cut_as_flow_is(tmp_path: Path):
    """Into equal numbers of steps, whatever class the scheduler has."""
    make_adapter(tmp_path)
    pipe = tiny_pipeline()
    router = load_adapter(pipe, tmp_path)
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3}
    euler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    for scheduler in (UniPCMultistepScheduler(**flow), euler):
        pipe.scheduler = scheduler
        scheduler.set_timesteps(28)
        assert [*router._counts().values()] == [1] * 7 + ([0] * 6 + [2]) + ([0] * 6 + [3]) + (
            [0] * 6 + [4]
        )


def test_strength_and_removal(tmp_path: Path):
    make_adapter(tmp_path)
    pipe = tiny_pipeline()
    base = theirs(pipe, 10)
    router = load_adapter(pipe, tmp_path, strength=0.5)
    half = theirs(pipe, 10)
    router.set_strength(1.0)
    full = theirs(pipe, 10)
    router.set_strength(0.0)
    torch.testing.assert_close(theirs(pipe, 10), base, atol=1e-6, rtol=0)
    assert (half - base).abs().max() > 1e-3
    assert (full - half).abs().max() > 1e-3
    router.remove()
    torch.testing.assert_close(theirs(pipe, 10), base, atol=1e-6, rtol=0)
    load_adapter(pipe, tmp_path)  # and it can be loaded again
    torch.testing.assert_close(theirs(pipe, 10), full, atol=1e-6, rtol=0)


def test_routing_calls_the_network_as_often_as_the_base(tmp_path: Path):
    make_adapter(tmp_path)
    pipe = tiny_pipeline()
    load_adapter(pipe, tmp_path)
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    pipe.unet.register_forward_hook(count)
    theirs(pipe, 10)
    assert calls == 10


def test_strength_of_our_own_networks(tmp_path: Path):
    nets = make_adapter(tmp_path)
    pipe = tiny_pipeline()
    load_adapter(pipe, tmp_path, strength=0.4)
    nets.set_strength(0.4)
    torch.testing.assert_close(ours(nets, 10), theirs(pipe, 10), atol=1e-5, rtol=0)


def test_loading_into_new_networks(tmp_path: Path):
    nets = make_adapter(tmp_path)
    other = ModelNetworks(tiny_family(), guidance=Guidance(3.0), loras=4, rank=2, seed=9)
    load_into(other, tmp_path)
    torch.testing.assert_close(ours(other, 10), ours(nets, 10), atol=0, rtol=0)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_each_file_is_a_plain_diffusers_lora(tmp_path: Path, number: int):
    nets = make_adapter(tmp_path)
    pipe = tiny_pipeline()
    pipe.load_lora_weights(tmp_path, weight_name=f"lora_{number}.safetensors", adapter_name="x")
    loaded = {
        name.replace(".x.weight", ".weight"): p
        for name, p in pipe.unet.named_parameters()
        if "lora_" in name
    }
    saved = nets.state_of(number)
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)


def test_damaged_adapters_are_one_clear_error(tmp_path: Path):
    with pytest.raises(UserError, match=r"adapter\.json"):
        read_info(tmp_path)
    make_adapter(tmp_path)
    info = tmp_path / "adapter.json"
    fields = json.loads(info.read_text())
    info.write_text(json.dumps({**fields, "format": 99}))
    with pytest.raises(UserError, match="format 99"):
        read_info(tmp_path)
    wrong = [
        {"num_steps": None},
        {"num_steps": 0},
        {"loras": "3"},
        {"config": None},
        {"segments": 1},
    ]
    wrong += [{"placement": "x"}, {"cut_by": "x"}, {"timesteps": [None]}, {"guidance_scale": "x"}]
    for text in ("{", "[]", "null", *(json.dumps({**fields, **change}) for change in wrong)):
        info.write_text(text)
        with pytest.raises(UserError, match="damaged"):
            read_info(tmp_path)
    info.write_text(json.dumps(fields))
    (tmp_path / "lora_3.safetensors").write_bytes(b"junk")
    with pytest.raises(UserError, match=r"lora_3"):
        load_adapter(tiny_pipeline(), tmp_path)
    (tmp_path / "lora_3.safetensors").unlink()
    with pytest.raises(UserError, match=r"lora_3"):
        read_info(tmp_path)


@pytest.mark.parametrize("scheduler", ["PNDMScheduler", "DPMSolverMultistepScheduler"])
def test_other_schedulers_are_routed_by_their_own_timesteps(tmp_path: Path, scheduler: str):
    import diffusers

    make_adapter(tmp_path)
    pipe = tiny_pipeline()
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    base = theirs(pipe, 12)
    router = load_adapter(pipe, tmp_path)
    active: list[int] = []
    pipe.unet.register_forward_hook(lambda *_: active.append(router._active or 0))
    assert (theirs(pipe, 12) - base).abs().max() > 1e-3
    times = [round(float(t)) for t in pipe.scheduler.timesteps]
    ends = [max(i for i, t in enumerate(times) if 250 * (3 - s) <= t) for s in range(4)]
    assert [active[i] for i in ends] == [1, 2, 3, 4]
    assert sum(n > 0 for n in active) == sum(t >= 750 for t in times) + 3


def test_a_new_spacing_is_noticed(tmp_path: Path):
    """LoRAs that were routed already are routed as if the spacing had been so from the start."""
    from diffusers import DDIMScheduler

    make_adapter(tmp_path)
    pipe, fresh = tiny_pipeline(), tiny_pipeline()
    trailing = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    load_adapter(pipe, tmp_path)
    theirs(pipe, 10)
    pipe.scheduler = fresh.scheduler = trailing
    load_adapter(fresh, tmp_path)
    torch.testing.assert_close(theirs(pipe, 10), theirs(fresh, 10), atol=0, rtol=0)


def test_a_second_adapter_is_refused_and_a_failed_one_leaves_nothing(tmp_path: Path):
    make_adapter(tmp_path)
    pipe = tiny_pipeline()
    base = theirs(pipe, 10)
    router = load_adapter(pipe, tmp_path)
    with pytest.raises(UserError, match="remove"):
        load_adapter(pipe, tmp_path)
    router.remove()
    whole = (tmp_path / "lora_2.safetensors").read_bytes()
    for damaged in (b"junk", whole.replace(b'"F32"', b'"F3Z"', 1)):
        assert damaged != whole
        (tmp_path / "lora_2.safetensors").write_bytes(damaged)
        with pytest.raises(UserError, match=r"lora_2.*damaged"):
            load_adapter(pipe, tmp_path)
    torch.testing.assert_close(theirs(pipe, 10), base, atol=0, rtol=0)


def test_the_users_own_lora_stays_active(tmp_path: Path):
    make_adapter(tmp_path / "adapter")
    nets = make_adapter(tmp_path / "style")
    pipe = tiny_pipeline()
    pipe.load_lora_weights(
        tmp_path / "style", weight_name="lora_4.safetensors", adapter_name="style"
    )
    styled = theirs(pipe, 10)
    router = load_adapter(pipe, tmp_path / "adapter")
    router.set_strength(0.0)
    torch.testing.assert_close(theirs(pipe, 10), styled, atol=1e-6, rtol=0)
    router.remove()
    torch.testing.assert_close(theirs(pipe, 10), styled, atol=1e-6, rtol=0)
    assert nets.loras == 4


def style_of(directory: Path) -> dict[str, object]:
    make_adapter(directory)
    return {"pretrained_model_name_or_path_or_dict": directory, "weight_name": "lora_4.safetensors"}


@pytest.mark.parametrize("placement", ["stacked", "everywhere"])
@pytest.mark.parametrize("drawn", [False, True])
def test_a_lora_that_comes_later_acts_beside_the_adapter(
    tmp_path: Path, placement: Placement, drawn: bool
):
    make_adapter(tmp_path / "adapter", placement=placement)
    style = style_of(tmp_path / "style")
    both = []
    for style_first in (True, False):
        pipe = tiny_pipeline()
        if style_first:
            pipe.load_lora_weights(**style, adapter_name="style")
        load_adapter(pipe, tmp_path / "adapter")
        if not style_first:
            alone = theirs(pipe, 10) if drawn else None
            pipe.load_lora_weights(**style, adapter_name="style")
        both.append(theirs(pipe, 10))
    torch.testing.assert_close(both[0], both[1], atol=1e-5, rtol=0)
    if alone is not None:
        assert (both[1] - alone).abs().max() > 1e-3
    pipe.set_adapters("style", 0.5)  # still routed, beside the weaker style
    assert (theirs(pipe, 10) - both[1]).abs().max() > 1e-3
    pipe.delete_adapters("style")
    if alone is not None:
        torch.testing.assert_close(theirs(pipe, 10), alone, atol=1e-5, rtol=0)
    base = theirs(tiny_pipeline(), 10)
    pipe.disable_lora()
    torch.testing.assert_close(theirs(pipe, 10), base, atol=1e-5, rtol=0)


def test_after_removal_the_pipeline_takes_loras_as_before(tmp_path: Path):
    make_adapter(tmp_path / "adapter")
    style = style_of(tmp_path / "style")
    pipe, fresh = tiny_pipeline(), tiny_pipeline()
    router = load_adapter(pipe, tmp_path / "adapter")
    theirs(pipe, 10)
    router.remove()
    for one in (pipe, fresh):
        one.load_lora_weights(**style, adapter_name="style")
    torch.testing.assert_close(theirs(pipe, 10), theirs(fresh, 10), atol=1e-5, rtol=0)


@pytest.mark.parametrize("drawn", [False, True])
def test_an_adapter_that_the_pipeline_unloaded_routes_no_more(tmp_path: Path, drawn: bool):
    make_adapter(tmp_path / "one")
    make_adapter(tmp_path / "two", placement="everywhere")
    pipe, fresh = tiny_pipeline(), tiny_pipeline()
    load_adapter(pipe, tmp_path / "one")
    theirs(pipe, 10)
    pipe.unload_lora_weights()
    if drawn:
        torch.testing.assert_close(theirs(pipe, 10), theirs(fresh, 10), atol=1e-6, rtol=0)
    for one in (pipe, fresh):
        load_adapter(one, tmp_path / "two")
    assert len(pipe.unet._forward_pre_hooks) == 1
    torch.testing.assert_close(theirs(pipe, 10), theirs(fresh, 10), atol=1e-5, rtol=0)


@pytest.mark.parametrize("other", ["sdxl", "sd3", "flux"])
def test_an_adapter_that_does_not_fit_is_refused_and_changes_nothing(tmp_path: Path, other: str):
    family = FAMILIES[other]()
    nets = ModelNetworks(family, guidance=Guidance(), loras=1, rank=2)
    info = AdapterInfo("another", 1, 2, 4, "everywhere", 10, [1], [1], 1.0, {})
    save_adapter(nets, info, tmp_path / "other")
    style = style_of(tmp_path / "style")
    pipe = tiny_pipeline()
    for name in ("a", "b"):
        pipe.load_lora_weights(**style, adapter_name=name)
    pipe.set_adapters("b", 0.5)
    before = theirs(pipe, 10)
    with pytest.raises(UserError, match=r"lora_1.safetensors: does not fit this pipeline"):
        load_adapter(pipe, tmp_path / "other")
    assert pipe.get_active_adapters() == ["b"]
    assert set(pipe.unet.peft_config) == {"a", "b"}
    torch.testing.assert_close(theirs(pipe, 10), before, atol=0, rtol=0)
    make_adapter(tmp_path / "cut")  # one that diffusers finds out halfway

    def fails(*_: object, adapter_name: str, **options: object) -> None:
        whole(*_, adapter_name=adapter_name, **options)
        if adapter_name == "shortft_2":
            raise ValueError("no")

    whole, pipe.load_lora_weights = pipe.load_lora_weights, fails
    pipe.disable_lora()
    with pytest.raises(UserError, match=r"lora_2.safetensors: does not fit this pipeline"):
        load_adapter(pipe, tmp_path / "cut")
    pipe.enable_lora()
    torch.testing.assert_close(theirs(pipe, 10), before, atol=0, rtol=0)


@pytest.mark.parametrize("drawn", [False, True])
def test_what_was_disabled_comes_back_when_it_is_enabled_after_removal(tmp_path: Path, drawn: bool):
    make_adapter(tmp_path / "adapter")
    pipe = tiny_pipeline()
    pipe.load_lora_weights(**style_of(tmp_path / "style"), adapter_name="style")
    styled = theirs(pipe, 10)
    pipe.disable_lora()
    router = load_adapter(pipe, tmp_path / "adapter")
    if drawn:
        theirs(pipe, 10)
    router.remove()
    torch.testing.assert_close(theirs(pipe, 10), theirs(tiny_pipeline(), 10), atol=1e-6, rtol=0)
    pipe.enable_lora()
    torch.testing.assert_close(theirs(pipe, 10), styled, atol=1e-6, rtol=0)


def test_pipelines_that_share_a_denoiser_share_its_scheduler(tmp_path: Path):
    make_adapter(tmp_path)
    pipe = tiny_pipeline()
    load_adapter(pipe, tmp_path)
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    other = type(pipe)(**{**pipe.components, "scheduler": scheduler})
    with pytest.raises(RuntimeError, match="must share its scheduler object too"):
        theirs(other, 10)
    theirs(pipe, 10)


def test_fused_attention_is_refused(tmp_path: Path):
    make_adapter(tmp_path)
    pipe = tiny_pipeline()
    pipe.fuse_qkv_projections()
    with pytest.raises(UserError, match=r"unfuse_qkv_projections"):
        load_adapter(pipe, tmp_path)
    pipe.unfuse_qkv_projections()
    load_adapter(pipe, tmp_path)


def test_a_lora_of_the_few_step_model_acts_in_any_number_of_steps(tmp_path: Path):
    make_adapter(tmp_path, placement="few_step")
    pipe = tiny_pipeline()
    base = theirs(pipe, 2)
    load_adapter(pipe, tmp_path)
    assert (theirs(pipe, 2) - base).abs().max() > 1e-3


def test_removal_by_an_old_handle_or_after_a_switch_touches_nothing_else(tmp_path: Path):
    make_adapter(tmp_path / "adapter")
    pipe, fresh = tiny_pipeline(), tiny_pipeline()
    config = LoraConfig(r=2, target_modules=["to_q", "conv1"], init_lora_weights=False)
    torch.manual_seed(0)
    pipe.unet.add_adapter(config, "style")  # on layers that the adapter does not touch, too
    old = load_adapter(pipe, tmp_path / "adapter")
    pipe.set_adapters("shortft_1")  # the style is silenced
    theirs(pipe, 10)
    old.remove()
    torch.testing.assert_close(theirs(pipe, 10), theirs(fresh, 10), atol=1e-6, rtol=0)
    old = load_adapter(pipe, tmp_path / "adapter")
    pipe.unload_lora_weights()
    load_adapter(pipe, tmp_path / "adapter")
    tuned = theirs(pipe, 10)
    old.remove()
    torch.testing.assert_close(theirs(pipe, 10), tuned, atol=0, rtol=0)


def test_a_lora_that_is_fused_later_is_told(tmp_path: Path):
    make_adapter(tmp_path / "adapter")
    pipe = tiny_pipeline()
    pipe.load_lora_weights(**style_of(tmp_path / "style"), adapter_name="style")
    load_adapter(pipe, tmp_path / "adapter")
    pipe.fuse_lora(adapter_names=["style"])
    with pytest.raises(RuntimeError, match=r"call pipe.unfuse_lora\(\)"):
        theirs(pipe, 10)


def test_a_full_disk_keeps_the_adapter_before_it_and_what_others_put_there(tmp_path, monkeypatch):
    """safetensors tells it by an exception of its own, which is no OSError."""
    directory = tmp_path / "adapter"
    nets = make_adapter(directory)
    info = read_info(directory)
    (directory / "README.md").write_text("mine")
    before = {file.name: file.read_bytes() for file in directory.iterdir()}

    def full(*_: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left (os error 28)")

    monkeypatch.setattr(nets.family, "save_lora", full)
    with pytest.raises(OSError, match="No space left on device") as told:
        save_adapter(nets, info, directory)
    assert told.value.errno == errno.ENOSPC
    assert {file.name: file.read_bytes() for file in directory.iterdir()} == before
    monkeypatch.undo()
    directory.rename(directory.with_name(f".{directory.name}.old"))  # a crash between two renames
    save_adapter(nets, info, directory)
    assert {file.name for file in directory.iterdir()} == set(before)
    assert [file.name for file in directory.parent.iterdir() if file.name.startswith(".")] == []
