"""Plans against the numbers of the paper, and against their own rules."""

from __future__ import annotations

import pytest

from shortft.methods.shortft import shortft_plan
from shortft.plans import Plan, Step, adapters_at, base_plan, inference_plan
from shortft.schedule import alphas_cumprod, ddim_schedule, flow_schedule, segments

SD15 = ddim_schedule(alphas_cumprod(), 50)


def timesteps(plan: Plan, **wanted: object) -> list[int]:
    return [
        int(SD15.timesteps[s.start])
        for s in plan.steps
        if all(getattr(s, key) == value for key, value in wanted.items())
    ]


@pytest.mark.parametrize(
    ("stage", "calls", "grad_calls"), [(1, 18, 7), (2, 29, 5), (3, 39, 3), (4, 50, 1)]
)
def test_call_counts_of_sd15(stage, calls, grad_calls):
    plan = shortft_plan(SD15, 4, stage)
    assert (plan.calls, plan.grad_calls) == (calls, grad_calls)
    assert plan.trainable == tuple(range(stage, 5))


def test_stage_one_of_sd15_step_by_step():
    plan = shortft_plan(SD15, 4, 1)
    assert timesteps(plan, trains=True) == [761, 501, 261, 1]
    jumps = [
        (int(SD15.timesteps[s.start]), int(SD15.timesteps[s.stop]))
        for s in plan.steps
        if s.net == "shortcut"
    ]
    assert jumps == [(741, 501), (481, 261), (241, 1)]
    assert [s.adapters for s in plan.steps if s.trains] == [1, 2, 3, 4]
    # LoRA 1 acts at all timesteps of segment 1, without gradient before its last one.
    assert timesteps(plan, adapters=1, trains=False) == list(range(981, 761, -20))
    assert plan.grad_mask == (False,) * 11 + (True,) * 7


def test_last_stage_is_the_chain_of_inference():
    last, inference = shortft_plan(SD15, 4, 4), inference_plan(SD15, 4)
    assert [(s.start, s.stop, s.net, s.adapters) for s in last.steps] == [
        (s.start, s.stop, s.net, s.adapters) for s in inference.steps
    ]
    assert inference.grad_calls == 0
    assert inference.calls == base_plan(SD15).calls == 50


@pytest.mark.parametrize("schedule", [SD15, flow_schedule(28), ddim_schedule(alphas_cumprod(), 5)])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_any_number_of_segments_and_steps(schedule, k):
    parts = segments(schedule, k)
    for stage in range(1, k + 1):
        plan = shortft_plan(schedule, k, stage)
        assert plan.steps[-1].stop == schedule.num_steps
        # A segment of a single timestep needs no jump.
        jumps = sum(len(part) > 1 for part in parts[stage:])
        assert plan.grad_calls == k - stage + 1 + jumps
        assert plan.calls == sum(map(len, parts[:stage])) + k - stage + jumps


def test_one_shared_lora_acts_at_the_same_places():
    own, shared = (
        adapters_at(segments(SD15, 4)),
        adapters_at(segments(SD15, 4), "shared"),
    )
    assert [bool(n) for n in own] == [bool(n) for n in shared]
    assert set(shared) == {0, 1}
    assert shortft_plan(SD15, 4, 2, placement="shared").trainable == (1,)


def test_gradient_mask_follows_the_inputs():
    def step(i: int, **kw: object) -> Step:
        return Step(i, i + 1, "policy", 1, **kw)  # type: ignore[arg-type]

    detached = Plan((step(0, trains=True), step(1, input_grad=0.0), step(2, trains=True)))
    assert detached.grad_mask == (True, False, True)
    scaled = Plan((step(0), step(1, trains=True), step(2, input_grad=0.1)))
    assert scaled.grad_mask == (False, True, True)


def test_plans_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="stage"):
        shortft_plan(SD15, 4, 5)
    with pytest.raises(ValueError, match="forward"):
        Step(3, 3, "base")
    with pytest.raises(ValueError, match="adapters"):
        Step(0, 1, "base", adapters=1)
    with pytest.raises(ValueError, match="adapters"):
        Step(0, 1, "policy")
    with pytest.raises(ValueError, match="only adapters train"):
        Step(0, 1, "shortcut", trains=True)
    with pytest.raises(ValueError, match="connected"):
        Plan((Step(0, 1, "base"), Step(2, 3, "base")))
    with pytest.raises(ValueError, match="point 0"):
        Plan((Step(1, 2, "base"),))
