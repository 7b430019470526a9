"""Schedules and jumps against diffusers' own schedulers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from shortft.schedule import (
    Schedule,
    alphas_cumprod,
    cut,
    ddim_schedule,
    flow_schedule,
    jump,
    schedule_from_config,
    segments,
    x0_at,
)


def fake_network(x: torch.Tensor, timestep: float) -> torch.Tensor:
    """Something nonlinear that depends on both arguments."""
    return torch.tanh(1.3 * x) * (0.5 + timestep / 1000) + 0.1 * x.flip(-1)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("steps", [1, 4, 50, 100])
@pytest.mark.parametrize("set_alpha_to_one", [False, True])
def test_chain_equals_diffusers_ddim(prediction_type, spacing, steps, set_alpha_to_one):
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=set_alpha_to_one,
        steps_offset=1,
        prediction_type=prediction_type,
        timestep_spacing=spacing,
    )
    scheduler.set_timesteps(steps)
    schedule = schedule_from_config({**scheduler.config, "_class_name": "DDIMScheduler"}, steps)
    assert schedule.timesteps.tolist() == scheduler.timesteps.tolist()

    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    ours = theirs = noise
    for i, t in enumerate(scheduler.timesteps):
        theirs = scheduler.step(fake_network(theirs, int(t)), t, theirs).prev_sample
        ours = jump(schedule, ours, fake_network(ours, int(t)), i, i + 1)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 7, 28])
def test_chain_equals_diffusers_flow_euler(shift, steps):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    schedule = schedule_from_config(
        {**scheduler.config, "_class_name": "FlowMatchEulerDiscreteScheduler"}, steps
    )
    torch.testing.assert_close(
        schedule.timesteps.float(), scheduler.timesteps, atol=1e-3, rtol=1e-6
    )
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    ours = theirs = noise
    for i, t in enumerate(scheduler.timesteps):
        theirs = scheduler.step(fake_network(theirs, float(t)), t, theirs).prev_sample
        ours = jump(schedule, ours, fake_network(ours, float(t)), i, i + 1)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def make_schedule(prediction_type: str) -> Schedule:
    if prediction_type == "flow":
        return flow_schedule(10, shift=2.0)
    return ddim_schedule(alphas_cumprod(), 10, prediction_type=prediction_type)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "flow"])
def test_a_perfect_prediction_leads_anywhere_on_the_line(prediction_type):
    """With the true prediction, x0 is found and a jump lands on alpha·x0 + sigma·eps."""
    schedule = make_schedule(prediction_type)
    generator = torch.Generator().manual_seed(1)
    x0, eps = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    for i, j in [(0, 1), (0, 10), (3, 7), (9, 10)]:
        alpha, sigma = schedule.alpha[i], schedule.sigma[i]
        x = alpha * x0 + sigma * eps
        truth = {
            "epsilon": eps,
            "v_prediction": alpha * eps - sigma * x0,
            "flow": eps - x0,
        }[prediction_type]
        expected = schedule.alpha[j] * x0 + schedule.sigma[j] * eps
        torch.testing.assert_close(jump(schedule, x, truth, i, j), expected)
        torch.testing.assert_close(x0_at(schedule, x, truth, i), x0)


def test_segments_of_sd15_are_the_papers():
    schedule = ddim_schedule(alphas_cumprod(), 50)
    ends = [
        (int(schedule.timesteps[part[0]]), int(schedule.timesteps[part[-1]]))
        for part in segments(schedule, 4)
    ]
    assert ends == [(981, 761), (741, 501), (481, 261), (241, 1)]


@pytest.mark.parametrize("steps", [4, 5, 13, 50, 1000])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_segments_cover_every_timestep_once_within_their_part(steps, k):
    schedule = ddim_schedule(alphas_cumprod(), steps)
    parts = segments(schedule, k)
    assert [i for part in parts for i in part] == list(range(steps))
    for number, part in enumerate(parts):
        low, high = 1000 * (k - number - 1) / k, 1000 * (k - number) / k
        for t in schedule.timesteps[list(part)].tolist():
            assert low <= t < high


@pytest.mark.parametrize("steps", [4, 5, 13, 50, 1000])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_segments_of_a_flow_hold_equal_numbers_of_steps(steps, k):
    parts = segments(flow_schedule(steps, shift=3.0), k)
    assert [i for part in parts for i in part] == list(range(steps))
    assert {len(part) for part in parts} <= {steps // k, -(-steps // k)}


@pytest.mark.parametrize(("shift", "steps", "k"), [(3.0, 28, 4), (3.1582, 28, 4), (3.0, 16, 8)])
def test_segments_of_a_shifted_flow_start_where_a_few_step_sampler_calls(shift, steps, k):
    """FLUX's grid of k steps, by diffusers' scheduler, is the segments' first timesteps."""
    few = FlowMatchEulerDiscreteScheduler(shift=shift)
    few.set_timesteps(sigmas=[1 - i / k for i in range(k)])
    schedule = flow_schedule(steps, shift=shift, smallest=1 / steps)
    parts = segments(schedule, k)
    assert [len(part) for part in parts] == [steps // k] * k
    starts = schedule.timesteps[[part[0] for part in parts]]
    torch.testing.assert_close(starts.float(), few.timesteps, atol=1e-3, rtol=1e-6)


@pytest.mark.parametrize(("shift", "steps", "k"), [(3.0, 28, 4), (3.0, 50, 8), (1.0, 16, 6)])
def test_segments_that_span_the_chain_start_where_sd3s_few_step_sampler_calls(shift, steps, k):
    """SD3's grid of k steps, by diffusers' scheduler: exact where it divides, else the next."""
    few = FlowMatchEulerDiscreteScheduler(shift=shift)
    few.set_timesteps(k)
    schedule = replace(flow_schedule(steps, shift=shift), cut_by="span")
    parts = segments(schedule, k)
    assert [i for part in parts for i in part] == list(range(steps))
    assert parts[-1] == (steps - 1,)
    starts = [part[0] for part in parts]
    for start, called in zip(starts, few.timesteps.tolist(), strict=True):
        assert float(schedule.timesteps[start]) <= called + 0.01
        assert start == 0 or float(schedule.timesteps[start - 1]) > called + 0.01
    if (steps - 1) % (k - 1) == 0:
        torch.testing.assert_close(
            schedule.timesteps[starts].float(), few.timesteps, atol=1e-2, rtol=1e-5
        )


@pytest.mark.parametrize(("steps", "k"), [(1, 1), (7, 1), (4, 4), (5, 4)])
def test_segments_that_span_a_short_chain(steps, k):
    parts = segments(replace(flow_schedule(steps), cut_by="span"), k)
    assert [i for part in parts for i in part] == list(range(steps))
    assert len(parts) == k
    assert k == 1 or parts[-1] == (steps - 1,)


def test_a_timestep_at_the_end_of_training_time_belongs_to_the_first_segment():
    times = (1000.0, 749.99999, 700.0, 499.0, 0.0)
    assert cut(times, 4, "time", 1000) == ((0, 1), (2,), (3,), (4,))


def test_what_cannot_be_cut_is_refused():
    with pytest.raises(ValueError, match="without a timestep"):
        segments(ddim_schedule(alphas_cumprod(), 3), 4)
    with pytest.raises(ValueError, match="at least 1"):
        segments(ddim_schedule(alphas_cumprod(), 3), 0)
    with pytest.raises(ValueError, match="num_steps"):
        ddim_schedule(alphas_cumprod(), 0)
    with pytest.raises(ValueError, match="spacing"):
        ddim_schedule(alphas_cumprod(), 5, spacing="sideways")
    with pytest.raises(ValueError, match="descend"):
        Schedule(torch.tensor([1.0, 2.0]), torch.ones(3), torch.ones(3), "epsilon")
