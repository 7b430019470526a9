"""Making and checking shortcuts, on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest
import torch
from torch import Tensor, nn

from shortft.chain import run_chain
from shortft.cli import main
from shortft.config import Config
from shortft.distill import Bank, Distiller
from shortft.distill_command import distill, distill_command
from shortft.errors import UserError
from shortft.families.base import Conditioning, Guidance
from shortft.kept import write_adapter
from shortft.networks import SHORTCUT, view
from shortft.plans import base_plan
from shortft.sampling import load_tuned
from shortft.schedule import segments
from shortft.seeds import sample_seed
from shortft.shortcut_check import (
    Fidelity,
    Jumper,
    Jumping,
    better_than_ddim,
    check_command,
    jump_plan,
    measure,
)
from shortft.shortcuts import own_guidance
from shortft.trainer import Trainer
from test_export_families import saved
from test_lora_files import FAMILIES
from tiny import tiny_family, tiny_pipeline

STEPS, K, SCALE = 12, 4, 8.0
PROMPTS = ["red apple", "panda face", "rocket", "guitar"]


@pytest.fixture
def distiller() -> Distiller:
    family = tiny_family()
    return Distiller(family, family.schedule(STEPS), K, Guidance(SCALE), PROMPTS, rank=8)


def test_pieces_are_what_diffusers_walks(distiller: Distiller):
    bank = Bank()
    ends, drawn = distiller.true_pieces(bank, 3)
    pipe = tiny_pipeline()
    # The bank holds the first segment's start: the noise itself.
    noise = bank.begin[bank.start == 0]
    rows = bank.prompt[bank.start == 0]
    assert torch.equal(drawn, rows)
    states: dict[int, torch.Tensor] = {0: noise}

    def keep(_pipe, step: int, _timestep, values: dict) -> dict:
        states[step + 1] = values["latents"]
        return {}

    latents = pipe(
        [PROMPTS[int(row)] for row in rows],
        latents=noise,
        num_inference_steps=STEPS,
        guidance_scale=SCALE,
        output_type="latent",
        callback_on_step_end=keep,
    ).images
    torch.testing.assert_close(ends, latents, atol=1e-4, rtol=1e-4)
    for part in segments(distiller.schedule, K):
        inside = bank.start == part[0]
        assert set(bank.stop[inside].tolist()) == {part[-1]}
        torch.testing.assert_close(bank.begin[inside], states[part[0]], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(bank.end[inside], states[part[-1]], atol=1e-4, rtol=1e-4)


def test_visited_pieces_start_where_the_shortened_chain_goes(distiller: Distiller):
    for average in distiller.average.values():  # jumps that are not the base's
        average.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    bank = Bank()
    drawn = distiller.draws
    distiller.visited_pieces(bank, 2)
    distiller.draws = drawn
    _, cond, noise = distiller._draw(2)
    states: dict[str, dict[int, Tensor]] = {"jumps": {}, "base": {}}
    plans = {"jumps": jump_plan(distiller.schedule, K, first=False)}
    plans["base"] = base_plan(distiller.schedule)
    nets = Jumping(
        distiller.family, distiller.guidance, Jumper("", distiller.averaged(), Guidance())
    )
    for name, plan in plans.items():
        seen = states[name].__setitem__
        run_chain(plan, nets, noise, cond, distiller.schedule, observe=seen)
    for part in segments(distiller.schedule, K)[2:]:
        begin = bank.begin[bank.start == part[0]]
        torch.testing.assert_close(begin, states["jumps"][part[0]], atol=1e-4, rtol=1e-4)
        assert (begin - states["base"][part[0]]).abs().max() > 1e-2
    parts = segments(distiller.schedule, K)
    assert set(bank.start.tolist()) == {part[0] for part in parts[2:]}
    for part in parts[2:]:
        rows = bank.start == part[0]
        walked = distiller.walk(
            bank.begin[rows], distiller._prompts(bank.prompt[rows]), part[0], part[-1]
        )
        torch.testing.assert_close(bank.end[rows], walked)


@pytest.mark.parametrize("kind", ["regression", "consistency"])
def test_both_ways_bring_the_jumps_closer(distiller: Distiller, kind: str):
    bank = Bank()
    images, prompts = distiller.true_pieces(bank, 96)
    family, schedule = distiller.family, distiller.schedule
    cond, noise = family.encode(PROMPTS), family.noise([11, 12, 13, 14])

    def error() -> float:
        jumper = Jumper("shortcut", distiller.student, Guidance())
        (f,) = measure(family, [jumper], schedule, K, cond, noise, Guidance(SCALE))
        return sum(f.jump_error) / K

    before = error()
    optimizer = torch.optim.Adam(distiller.parameters.values(), lr=1e-3)
    for _ in range(150):
        if kind == "regression":
            distiller.update(lambda: distiller.regression_loss(bank, 32), optimizer)
        else:
            distiller.update(lambda: distiller.consistency_loss(images, prompts, 32), optimizer)
    assert error() < 0.93 * before


def test_a_guided_student_starts_as_a_guided_ddim_jump():
    family = tiny_family()
    guided = Guidance(SCALE)
    distiller = Distiller(
        family,
        family.schedule(STEPS),
        K,
        guided,
        PROMPTS,
        rank=4,
        student_guidance=guided,
    )
    jumpers = [distiller._jumper(), Jumper("guided DDIM jump", family.denoiser, guided)]
    cond, noise = family.encode(PROMPTS), family.noise([1, 2, 3, 4])
    ours, ddim = measure(family, jumpers, distiller.schedule, K, cond, noise, guided)
    assert ours.evaluations == 2
    assert ours.jump_error == pytest.approx(ddim.jump_error, rel=1e-5)
    bank = Bank()
    distiller.true_pieces(bank, 8)
    distiller.regression_loss(bank, 8).mean().backward()
    assert any(p.grad.abs().sum() > 0 for p in distiller.parameters.values())


def test_the_base_is_never_trained(distiller: Distiller):
    base = list(distiller.family.denoiser.parameters())
    before = [p.clone() for p in base]
    bank = Bank()
    distiller.true_pieces(bank, 4)
    optimizer = torch.optim.Adam(distiller.parameters.values(), lr=1e-2)
    distiller.update(lambda: distiller.regression_loss(bank, 4), optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, base, strict=True))
    assert not any(p.requires_grad for p in base)


def test_the_saved_file_is_the_averaged_lora_in_diffusers_layout(
    distiller: Distiller, tmp_path: Path
):
    for average in distiller.average.values():
        average.add_(0.01)
    path = tmp_path / "shortcut.safetensors"
    distiller.save(path)
    loaded = view(distiller.family.denoiser)
    distiller.family.load_lora(loaded, path, SHORTCUT)
    pipe = tiny_pipeline()
    pipe.load_lora_weights(tmp_path, weight_name=path.name)
    x, cond = distiller.family.noise([1]), distiller.family.encode(PROMPTS[:1])
    with torch.no_grad():
        expected = distiller.averaged()(x, 501, cond.positive, return_dict=False)[0]
        ours = loaded(x, 501, cond.positive, return_dict=False)[0]
        theirs = pipe.unet(x, 501, cond.positive, return_dict=False)[0]
        base = distiller.family.denoiser(x, 501, cond.positive, return_dict=False)[0]
    torch.testing.assert_close(ours, expected, atol=1e-3, rtol=1e-3)  # stored in fp16
    torch.testing.assert_close(theirs, ours, atol=1e-6, rtol=1e-5)
    assert (ours - base).abs().max() > 1e-2


def test_a_perfect_jumper_measures_as_perfect():
    """A network that knows the trajectory has error 0 and the chain's own images."""
    family = tiny_family()
    schedule = family.schedule(4)  # one timestep a segment: nothing is jumped over
    cond, noise = family.encode(PROMPTS[:2]), family.noise([1, 2])
    jumper = Jumper("none", family.denoiser, Guidance())
    (f,) = measure(family, [jumper], schedule, K, cond, noise, Guidance(SCALE))
    assert f.jump_error == (0.0,) * K
    assert f.chain_psnr == pytest.approx(100)


def test_prompts_come_to_the_device_for_the_batch_at_hand_alone(
    distiller: Distiller, monkeypatch: pytest.MonkeyPatch
):
    """Thousands of them would not fit a GPU."""
    counts: list[int] = []
    encode = distiller.family.encode

    def counted(prompts: Sequence[str]) -> Conditioning:
        counts.append(len(prompts))
        return encode(prompts)

    monkeypatch.setattr(distiller.family, "encode", counted)
    bank = Bank()
    ends, rows = distiller.true_pieces(bank, 3)
    distiller.regression_loss(bank, 2)
    distiller.consistency_loss(ends, rows, 1)
    assert counts == [3, 2, 1]


def test_jump_plan_has_one_jump_per_segment():
    schedule = tiny_family().schedule(STEPS)
    assert [s.net for s in jump_plan(schedule, K, first=True).steps] == ["shortcut", "base"] * K
    assert sum(s.net == "shortcut" for s in jump_plan(schedule, K, first=False).steps) == K - 1


def test_folded_into_the_weights_or_as_branches_the_lora_is_the_same(
    distiller: Distiller, monkeypatch: pytest.MonkeyPatch
):
    for parameter in distiller.parameters.values():
        nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(0))
    bank = Bank()
    distiller.true_pieces(bank, 8)
    draws, found = distiller.draws, []
    for folded_from in (1, 99):
        monkeypatch.setattr("shortft.distill.FOLDED_FROM", folded_from)
        distiller.draws = draws
        loss = distiller.regression_loss(bank, 8).mean()
        found.append([loss, *torch.autograd.grad(loss, list(distiller.parameters.values()))])
    assert float(found[0][0]) > 0.01
    for folded, branches in zip(*found, strict=True):
        torch.testing.assert_close(folded, branches, rtol=1e-3, atol=1e-5)


def test_an_update_in_parts_takes_their_mean_gradient(distiller: Distiller):
    bank = Bank()
    distiller.true_pieces(bank, 8)
    losses = [distiller.regression_loss(bank, n) for n in (4, 4)]
    chosen = list(distiller.parameters.values())
    wanted = torch.autograd.grad(torch.cat(losses).mean(), chosen, retain_graph=True)
    drawn = iter(losses)
    loss = distiller.update(lambda: next(drawn), torch.optim.SGD(chosen, lr=0.0), parts=2)
    assert loss == pytest.approx(float(torch.cat(losses).mean().detach()), rel=1e-6)
    norm = torch.cat([g.flatten() for g in wanted]).norm().clamp(min=1.0)  # clipped to 1
    for parameter, gradient in zip(chosen, wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient / norm, rtol=1e-4, atol=1e-7)


def state_of(distiller: Distiller) -> list[Tensor]:
    weights = (*distiller.parameters.values(), *distiller.average.values())
    return [weight.detach().clone() for weight in weights]


def test_an_update_that_is_not_finite_changes_nothing(distiller: Distiller):
    bank = Bank()
    distiller.true_pieces(bank, 4)
    optimizer = torch.optim.AdamW(distiller.parameters.values(), lr=1e-2)
    assert distiller.update(lambda: distiller.regression_loss(bank, 4), optimizer) is not None
    before = state_of(distiller)
    some = next(iter(distiller.parameters.values())).flatten()[:1]
    for bad in (
        lambda: distiller.regression_loss(bank, 4) * torch.inf,
        lambda: distiller.regression_loss(bank, 4) + (some * 0).sqrt(),  # its gradient alone
    ):
        assert distiller.update(bad, optimizer) is None
        for after, was in zip(state_of(distiller), before, strict=True):
            torch.testing.assert_close(after, was, rtol=0, atol=0)
    assert distiller.updates == 1


@pytest.mark.parametrize("value", [torch.nan, 1e6])  # beyond half precision
def test_what_is_not_finite_is_not_saved(distiller: Distiller, tmp_path: Path, value: float):
    path = tmp_path / "shortcut.safetensors"
    distiller.save(path)
    before = path.read_bytes()
    next(iter(distiller.average.values())).view(-1)[0] = value
    with pytest.raises(UserError, match="not finite in half precision"):
        distiller.save(path)
    assert path.read_bytes() == before


def test_a_full_disk_keeps_the_shortcut_before_it(distiller: Distiller, small_disk: Path):
    path = small_disk / "shortcut.safetensors"
    path.write_bytes(b"before")
    (small_disk / "other").write_bytes(bytes(240_000))
    with pytest.raises(OSError, match="No space left on device") as told:
        distiller.save(path)
    assert told.value.filename == str(path)
    assert path.read_bytes() == b"before"
    assert {file.name for file in small_disk.iterdir()} == {path.name, "other"}


class Slow:
    """A distiller on a clock that stands still but for what it says its work takes."""

    parameters: ClassVar = {"a": nn.Parameter(torch.zeros(1))}

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.updates, self.walks, self.measured, self.first = 0.0, 0, 0, 0, 0.0
        monkeypatch.setattr("shortft.distill_command.time.monotonic", lambda: self.now)

    def true_pieces(self, bank: Bank | None, count: int) -> tuple[Tensor, Tensor]:
        self.walks += 1
        self.now += 20
        piece, rows = torch.zeros(count, 1, 1, 1), torch.zeros(count, dtype=torch.long)
        if bank is not None:
            bank.add(0, 1, piece, piece, rows)
        return piece, rows

    def visited_pieces(self, bank: Bank, count: int) -> None:
        self.now += 20

    def update(self, *_: object) -> float:
        self.updates += 1
        self.first = self.first or self.now
        self.now += 1
        return 1.0

    def fidelity(self) -> Fidelity:
        self.measured += 1
        self.now += 100
        return Fidelity("shortcut", 1, (0.5,), 30.0, 20.0)


distilled = partial(
    distill, batch_size=4, learning_rate=1e-3, report=lambda _: None, save=lambda: None
)


def test_walking_and_measuring_leave_time_to_train(monkeypatch: pytest.MonkeyPatch):
    slow = Slow(monkeypatch)
    made = distilled(
        cast(Distiller, slow),
        "regression",
        minutes=60,
        trajectories=2000,
        fidelity=slow.fidelity,
        sample_batch=8,
    )
    assert made == 8 * slow.walks < 2000
    assert 3600 * 0.4 - 40 <= slow.updates < 3600 * 0.5  # of an hour, the rest of it walked
    assert slow.first == pytest.approx(3600 / 5, abs=40)
    assert slow.measured == 3  # after 3, 34 and 51 minutes: a tenth as much again
    assert slow.now == pytest.approx(3600 + 100 * slow.measured, abs=40)


def test_consistency_keeps_ends_alone_and_each_with_its_prompt(
    distiller: Distiller, monkeypatch: pytest.MonkeyPatch
):
    walk, learn = distiller.true_pieces, distiller.consistency_loss
    walked: list[tuple[Tensor, Tensor]] = []
    learned: list[tuple[Tensor, Tensor]] = []

    def true_pieces(bank: Bank | None, count: int) -> tuple[Tensor, Tensor]:
        assert bank is None
        walked.append(walk(bank, count))
        return walked[-1]

    def consistency_loss(images: Tensor, prompts: Tensor, count: int) -> Tensor:
        learned.append((images, prompts))
        return learn(images, prompts, count)

    monkeypatch.setattr(distiller, "true_pieces", true_pieces)
    monkeypatch.setattr(distiller, "consistency_loss", consistency_loss)
    made = distilled(
        distiller,
        "consistency",
        minutes=0.05,
        trajectories=12,
        fidelity=lambda: pytest.fail("not for so short a time"),
        sample_batch=3,
    )
    assert made == 3 * len(walked)
    for found, parts in zip(learned[-1], zip(*walked, strict=True), strict=True):
        assert torch.equal(found, torch.cat(parts))
    # Put together once, when trajectories come, not for every update.
    assert len({id(images) for images, _ in learned}) <= len(walked)


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.fixture
def make(tmp_path: Path, model: Path) -> Callable[..., Path]:
    """`shortft shortcut` on the tiny model; its output."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))

    def call(**change: object) -> Path:
        settings: dict[str, Any] = {
            "model": str(model),
            "output": tmp_path / "shortcut.safetensors",
            "kind": "regression",
            "minutes": 0.05,
            "rank": 4,
            "batch_size": 8,
            "learning_rate": 1e-3,
            "num_steps": STEPS,
            "segments": K,
            "guidance_scale": SCALE,
            "shortcut_guidance_scale": 2.0,
            "trajectories": 64,
            "seed": 0,
            "resume": False,
            "precision": "fp32",
            "prompts_path": prompts,
            **change,
        }
        distill_command(**settings)
        return Path(settings["output"])

    return call


def test_a_shortcut_that_diverges_is_given_up_and_the_file_before_it_stays(make, monkeypatch):
    output = make(minutes=0.01)
    before = output.read_bytes(), output.with_suffix(".json").read_bytes()
    losses: list[Tensor] = []

    def diverges(landed: Tensor, *_: Tensor) -> Tensor:
        losses.append(landed.flatten(1).sum(1) * torch.nan)
        return losses[-1]

    monkeypatch.setattr("shortft.distill._distance", diverges)
    with pytest.raises(UserError, match=r"--learning-rate 0.001: 10 updates in a row .* lower it"):
        make(minutes=0.1, resume=True)
    assert len(losses) == 10
    assert (output.read_bytes(), output.with_suffix(".json").read_bytes()) == before


def test_a_resume_draws_what_was_not_drawn_before(make, monkeypatch):
    places: set[tuple[int, ...]] = set()

    def seed_of(seed: int, *place: int) -> int:
        places.add(place)
        return sample_seed(seed, *place)

    monkeypatch.setattr("shortft.distill.sample_seed", seed_of)
    output = make(minutes=0.01)
    first = places.copy()
    told = output.with_suffix(".json")
    places.clear()
    make(minutes=0.01, resume=True)
    assert places
    assert places.isdisjoint(first)
    card = json.loads(told.read_text())
    assert card.pop("draws") > 0
    told.write_text(json.dumps(card))  # as files were before it was kept
    make(minutes=0.01, resume=True)
    told.write_text(json.dumps({**card, "draws": "many"}))
    with pytest.raises(UserError, match=r"shortcut\.json: damaged"):
        make(resume=True)


def test_command_line_makes_and_checks_a_shortcut(
    make, model: Path, tmp_path: Path, capsys, monkeypatch
):
    prompts = tmp_path / "prompts.txt"
    output = make()
    card = json.loads(output.with_suffix(".json").read_text())
    assert card["updates"] > 0
    assert card["model"] == model.name  # which travels: no folders of the author's disk
    with pytest.raises(UserError, match="--resume"):
        make()
    make(resume=True)
    with pytest.raises(UserError, match="--rank"):
        make(resume=True, rank=2)
    told = r"--shortcut-guidance-scale 1.0: .*shortcut.json says that the LoRA was made for 2.0"
    with pytest.raises(UserError, match=told):
        make(resume=True, shortcut_guidance_scale=1.0)
    with pytest.raises(UserError, match="every segment is a single step"):
        make(output=tmp_path / "none.safetensors", num_steps=K)
    stopped = tmp_path / "stopped.safetensors"
    with monkeypatch.context() as patch:  # stopped while it measures, after a first save
        patch.setattr("shortft.distill_command.measure", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make(output=stopped, minutes=0.01)
    assert stopped.is_file()
    assert own_guidance(stopped) == 2.0
    stopped.unlink()  # stopped before its first save: the next one begins anew
    make(output=stopped, minutes=0.01, resume=True, shortcut_guidance_scale=1.0)
    assert own_guidance(stopped) == 1.0
    figures = tmp_path / "figures.json"
    code = check_command(
        str(model), str(output), 4, 0, STEPS, K, SCALE, None, None, figures, prompts
    )
    assert code in (0, 1)
    assert json.loads(figures.read_text())[0]["evaluations"] == 2  # it runs as it was made to
    assert ("no better" in capsys.readouterr().out) == (code == 1)
    assert [f["name"] for f in json.loads(figures.read_text())] == [
        "shortcut",
        "plain DDIM jump",
        "guided DDIM jump",
    ]
    # For another size of pictures, which changes some schedules.
    output = tmp_path / "large.safetensors"
    make(output=output, minutes=0.01, resolution=32)
    assert json.loads(output.with_suffix(".json").read_text())["resolution"] == 32
    options = ["--model", str(model), "--prompts", str(prompts), "--num-prompts", "2"]
    options += ["--num-steps", str(STEPS), "--segments", str(K), "--shortcut", str(output)]
    large = ["--resolution", "32"]
    found = {}
    for name, more in ("own", []), ("large", large), ("half", [*large, "--precision", "bf16"]):
        figures = tmp_path / f"{name}.figures.json"
        assert main(["check", *options, *more, "--output", str(figures)]) in (0, 1)
        found[name] = json.loads(figures.read_text())[1]["jump_error"]
    assert found["own"] != found["large"] != found["half"]  # other pictures, other numbers
    assert found["half"] == pytest.approx(found["large"], abs=0.01)
    assert main(["check", *options, "--resolution", "31"]) == 2
    assert "--resolution 31" in capsys.readouterr().err
    card = output.with_suffix(".json")
    assert main(["check", *options, *large, "--output", str(card)]) == 2
    assert "holds the shortcut's own settings" in capsys.readouterr().err
    assert json.loads(card.read_text())["resolution"] == 32


@pytest.mark.parametrize(("name", "scale"), [("flux", 3.5), ("sd3", 1.0)])
def test_without_a_word_it_is_guided_where_that_costs_nothing(
    make, name: str, scale: float, tmp_path: Path
):
    """FLUX.1-dev takes guidance as an input of the network, so that its student does too."""
    folder = saved(name, tmp_path / name)
    asked = {"model": str(folder), "guidance_scale": 3.5, "num_steps": 6, "segments": 3}
    output = make(minutes=0.01, **asked, shortcut_guidance_scale=None)
    card = json.loads(output.with_suffix(".json").read_text())
    assert card["shortcut_guidance_scale"] == scale
    assert card["held_out"][0]["evaluations"] == 1
    with pytest.raises(UserError, match=f"the LoRA was made for {scale}"):
        make(resume=True, **asked, shortcut_guidance_scale=2.0)
    output.with_suffix(".json").unlink()  # as other tools' few-step LoRAs are
    run = {"num_steps": 6, "segments": 3, "rank": 2, "guidance_scale": 3.5, "tensorboard": False}
    run["method"] = "tune_shortcut"
    run |= {"model": str(folder), "shortcut": str(output), "output_dir": tmp_path / "run"}
    trainer = Trainer(Config(**run))
    assert trainer.nets.shortcut_guidance.scale == scale
    assert trainer.jumps_by == ["file", scale, 1.0]
    sampler = load_tuned(trainer.family, write_adapter(trainer), None, None)
    assert sampler.nets.shortcut_guidance.scale == scale
    assert Trainer(Config(**run, shortcut_guidance_scale=2.0)).nets.shortcut_guidance.scale == 2
    figures = tmp_path / "check.json"
    options = ["--model", str(folder), "--shortcut", str(output), "--output", str(figures)]
    options += ["--num-prompts", "2", "--num-steps", "6", "--segments", "3"]
    found = []
    for more in ([], ["--shortcut-guidance-scale", str(scale)]):
        assert main(["check", *options, "--guidance-scale", "3.5", *more]) in (0, 1)
        found.append(json.loads(figures.read_text())[0]["jump_error"])
    assert found[0] == found[1]


def test_without_a_card_nobody_says_its_guidance_and_a_damaged_card_is_told(tmp_path: Path):
    path = tmp_path / "few-step.safetensors"
    assert own_guidance(path) is None
    path.with_suffix(".json").write_text('{"kind": "regression"}')
    assert own_guidance(path) is None
    path.with_suffix(".json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        own_guidance(path)


def test_a_lora_that_leaves_the_trajectory_is_found_out():
    family = tiny_family()
    distiller = Distiller(family, family.schedule(STEPS), K, Guidance(SCALE), PROMPTS, rank=4)
    for average in distiller.average.values():
        average.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    jumpers = [
        Jumper("bad", distiller.averaged(), Guidance()),
        Jumper("plain DDIM jump", family.denoiser, Guidance()),
    ]
    cond, noise = family.encode(PROMPTS), family.noise([1, 2, 3, 4])
    found = measure(family, jumpers, distiller.schedule, K, cond, noise, Guidance(SCALE))
    assert not better_than_ddim(found)


def test_guidance_alone_makes_no_shortcut():
    """A LoRA that changes next to nothing lands where the base does under the same guidance."""
    family = tiny_family()
    distiller = Distiller(family, family.schedule(STEPS), K, Guidance(SCALE), PROMPTS, rank=4)
    for average in distiller.average.values():
        average.add_(torch.randn(average.shape, generator=torch.Generator().manual_seed(1)) / 100)
    guided = Guidance(SCALE)
    jumpers = [
        Jumper("style", distiller.averaged(), guided),
        Jumper("plain DDIM jump", family.denoiser, Guidance()),
        Jumper("guided DDIM jump", family.denoiser, guided),
    ]
    cond, noise = family.encode(PROMPTS), family.noise([1, 2, 3, 4])
    style, plain, own = measure(family, jumpers, distiller.schedule, K, cond, noise, guided)
    assert better_than_ddim([style, plain])
    assert not better_than_ddim([style, plain, own])


def test_embedded_guidance_costs_no_evaluation():
    flux, sd = (FAMILIES[name]() for name in ("flux", "sd"))
    guided = Jumper("guided DDIM jump", sd.denoiser, Guidance(3.5))
    assert guided.evaluations(flux.encode(PROMPTS)) == 1
    assert guided.evaluations(sd.encode(PROMPTS)) == 2
