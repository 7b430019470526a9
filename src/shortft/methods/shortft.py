"""ShortFT: shortcuts over the segments, one LoRA per segment, training in stages."""

from __future__ import annotations

from dataclasses import replace

from shortft.plans import Net, Placement, Plan, Step, adapters_at, inference_plan
from shortft.schedule import Schedule, segments


def shortft_plan(
    schedule: Schedule,
    k: int,
    stage: int,
    *,
    placement: Placement = "stacked",
    jump: str = "shortcut",
    pin: bool = False,
    first_by_shortcut: bool = False,
    tail: int = 1,
) -> Plan:
    """ShortFT's chain of one stage (arXiv 2507.22604 §3.2–3.4).

    Segments 1…stage run the original chain, later segments one shortcut call and the LoRA step.
    Gradient starts at the LoRA step of segment `stage` and is complete from there on:
    2(k - stage) + 1 calls carry it.

    Args:
        k: number of segments.
        stage: 1…k; stage k is exactly the chain of inference.
        placement: where LoRAs act, see `plans.adapters_at`; if at every timestep, a jump carries
            them over the whole segment, and no LoRA step follows it.
        jump: "shortcut", or without training "ddim" (one step of the base), "ddim_2" (two) or
            "dpm_2" (two steps of DPM-Solver++(2M)).
        pin: everything before the gradient is taken from a rollout of the inference chain, and
            jumps land on its values (straight-through).
        first_by_shortcut: in stage 1 jump over segment 1 too.
        tail: last timesteps of segment `stage` that train, where LoRAs act there.

    Raises:
        ValueError: for a stage outside 1…k, or a jump that cannot carry LoRAs.
    """
    if not 1 <= stage <= k:
        raise ValueError(f"stage must lie in 1…{k}, got {stage}")
    parts = segments(schedule, k)
    counts = adapters_at(parts, placement)
    everywhere = placement in ("segments", "everywhere")
    if everywhere and jump not in ("shortcut", "ddim"):
        raise ValueError(f"loras=segment jumps by shortcut or ddim, not by {jump}")
    steps: list[Step] = []
    net: Net
    for number, part in enumerate(parts, start=1):
        *walk, last = part
        jumps = number > stage or (first_by_shortcut and stage == number == 1)
        if jumps and everywhere:
            net = "shortcut" if jump == "shortcut" else "policy"
            steps.append(Step(part[0], last + 1, net, counts[last], trains=True, pin=pin))
            continue
        if jumps and walk:
            steps += jump_steps(schedule, walk[0], last, jump, pin=pin)
            walk = []
        trained = (*walk, last)[-tail:] if number == stage else (last,) if number > stage else ()
        for i in (*walk, last):
            trains = i in trained and counts[i] > 0
            if pin and not trains:
                steps.append(Step(i, i + 1, "cached", pin=True))
            else:
                net = "policy" if counts[i] else "base"
                steps.append(Step(i, i + 1, net, counts[i], trains=trains))
    trainable = tuple(range(stage, k + 1)) if placement in ("stacked", "segments") else (1,)
    return Plan(tuple(steps), trainable)


def jumps_plan(schedule: Schedule, k: int, *, jump: str, pin: bool) -> Plan:
    """One LoRA at every timestep, trained through one jump per segment: k calls, all with gradient.

    Stage 1 of ShortFT with its first segment jumped over too, and no LoRA steps.

    Args:
        jump: "shortcut", "ddim", or "half": the first half of the segments, k - k // 2 of them, by
            the shortcut, the others by a DDIM step each.
    """
    if jump == "half":
        early, late = (jumps_plan(schedule, k, jump=j, pin=pin) for j in ("shortcut", "ddim"))
        half = k - k // 2
        return replace(early, steps=early.steps[:half] + late.steps[half:])
    return shortft_plan(
        schedule, k, 1, placement="everywhere", jump=jump, pin=pin, first_by_shortcut=True
    )


def few_step_plan(schedule: Schedule, k: int) -> Plan:
    """The few-step model itself is tuned: its own chain, gradient through all k calls (Table 2)."""
    chain = inference_plan(schedule, k, "few_step")
    return replace(chain, steps=tuple(replace(s, trains=True) for s in chain.steps), trainable=(1,))


def jump_steps(schedule: Schedule, start: int, stop: int, jump: str, *, pin: bool) -> list[Step]:
    """The calls that carry the chain over a segment.

    Two-step jumps meet half-way in log-SNR, at the nearest point of the schedule; a segment
    without a point between its ends is jumped over at once.

    Raises:
        ValueError: for an unknown kind of jump.
    """
    if jump == "shortcut":
        return [Step(start, stop, "shortcut", pin=pin)]
    if jump not in ("ddim", "ddim_2", "dpm_2"):
        raise ValueError(f"jump {jump!r} is unknown")
    if jump == "ddim" or stop - start < 2:
        return [Step(start, stop, "base", pin=pin)]
    # Flow matching starts at pure noise: there the log-SNR is kept finite.
    log_snr = (schedule.alpha / schedule.sigma).log().clamp(min=-10)
    half = (log_snr[start] + log_snr[stop]) / 2
    middle = start + 1 + int((log_snr[start + 1 : stop] - half).abs().argmin())
    ratio = (log_snr[middle] - log_snr[start]) / (log_snr[stop] - log_snr[middle])
    second = float(1 / (2 * ratio)) if jump == "dpm_2" else 0.0
    return [
        Step(start, middle, "base"),
        Step(middle, stop, "base", pin=pin, extrapolate=second),
    ]
