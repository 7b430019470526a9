"""Pictures are decoded again and looked at: sizes, pixels, text, counts."""

from __future__ import annotations

import errno
import io
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from shortft.drawing import curves, grids, plan_picture, plan_text
from shortft.drawing.files import write_atomic
from shortft.drawing.progress import TrainProgress, clock_text, memory_text, summary_table
from shortft.drawing.text import load_font, wrap
from shortft.methods.shortft import jumps_plan, shortft_plan
from shortft.plans import Plan, Step
from shortft.schedule import alphas_cumprod, ddim_schedule, segments


def flat(*colours: tuple[float, float, float], size: int = 64) -> torch.Tensor:
    """(n, 3, size, size): one picture of each colour."""
    return torch.tensor(colours)[:, :, None, None].expand(-1, -1, size, size).clone()


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        image.load()
        return np.asarray(image.convert("RGB"))


RED, GREEN, BLUE, GREY = (1.0, 0.0, 0.0), (0.0, 0.5, 0.0), (0.0, 0.0, 1.0), (0.9, 0.5, 0.2)


# --- grids -----------------------------------------------------------------------------------


def test_to_uint8_rounds_clamps_and_keeps_order() -> None:
    images = (
        torch.tensor([-1.0, 0.0, 0.5, 1.0, 2.0, math.nan]).reshape(1, 1, 1, 6).expand(1, 3, 1, 6)
    )
    array = grids.to_uint8(images)
    assert array.shape == (1, 1, 6, 3)
    assert array.dtype == np.uint8
    assert array[0, 0, :, 1].tolist() == [0, 0, 128, 255, 255, 0]


def test_to_uint8_takes_half_precision_with_gradient() -> None:
    images = torch.full((2, 3, 4, 4), 0.25, dtype=torch.bfloat16, requires_grad=True)
    assert (grids.to_uint8(images) == 64).all()


def blocks_of(array: np.ndarray, colour: tuple[float, float, float]) -> tuple[int, int, int, int]:
    """Bounding box (top, left, height, width) of the pixels of exactly this colour."""
    target = np.round(np.array(colour) * 255)
    rows, columns = np.nonzero((array == target).all(-1))
    height, width = int(np.ptp(rows)) + 1, int(np.ptp(columns)) + 1
    return int(rows.min()), int(columns.min()), height, width


def test_grid_shows_every_picture_enlarged_where_its_labels_say(tmp_path: Path) -> None:
    path = grids.save_grid(
        tmp_path / "new" / "grid.png",
        [flat(RED, GREEN), flat(BLUE, GREY)],
        ["first", "second"],
        ["left", "a caption that is much too long for one line of its column"],
    )
    array = pixels(path)
    red, green, blue, grey = (blocks_of(array, c) for c in (RED, GREEN, BLUE, GREY))
    for top, left, height, width in (red, green, blue):
        assert (height, width) == (128, 128)
        centre = array[top + 64, left + 64]
        np.testing.assert_array_equal(centre, array[top + 1, left + 1])
    assert red[0] == green[0] < blue[0] == grey[0]
    assert red[1] == blue[1] < green[1] == grey[1]
    caption = array[: green[0] - 1, green[1] : green[1] + 128]
    lines = np.diff((caption < 128).any((1, 2)).astype(int)).clip(min=0).sum()
    assert lines >= 3  # wrapped, and all of it there
    label = array[red[0] : red[0] + 128, : red[1] - 1]
    assert (label < 128).any()
    for edge in (array[0], array[-1], array[:, 0], array[:, -1]):
        assert (edge == 255).all()  # nothing is cut off at the border


def test_grid_continues_in_blocks_and_keeps_large_pictures(tmp_path: Path) -> None:
    colours = [(i / 16, 0.25, 0.75) for i in range(10)]
    wide = pixels(
        grids.save_grid(tmp_path / "a.png", [flat(*colours, size=200)], ["r"], ["x"] * 10)
    )
    tops = [blocks_of(wide, grids.to_uint8(flat(c))[0, 0, 0] / 255)[0] for c in colours]
    assert tops[:8] == tops[:1] * 8
    assert tops[8] == tops[9] > tops[0] + 200
    assert blocks_of(wide, grids.to_uint8(flat(colours[9]))[0, 0, 0] / 255)[2:] == (200, 200)


def test_grid_scale_and_title(tmp_path: Path) -> None:
    plain = pixels(grids.save_grid(tmp_path / "a.png", [flat(RED)], [""], [""], scale=3))
    titled = pixels(
        grids.save_grid(tmp_path / "b.png", [flat(RED)], [""], [""], title="A title", scale=3)
    )
    assert blocks_of(plain, RED)[2:] == (192, 192)
    assert titled.shape[0] > plain.shape[0]


def test_grid_refuses_labels_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="column labels"):
        grids.save_grid("never.png", [flat(RED, BLUE)], ["row"], ["only one"])
    with pytest.raises(ValueError, match="one shape"):
        grids.save_grid("never.png", [flat(RED), flat(RED, BLUE)], ["a", "b"], ["x"])


def test_before_after_colours_the_scores(tmp_path: Path) -> None:
    path = grids.before_after(
        tmp_path / "ba.png",
        flat(RED, RED),
        flat(GREEN, GREEN),
        ["up", "down"],
        scores_before=torch.tensor([0.1, 0.9]),
        scores_after=[0.5, 0.2],
    )
    array = pixels(path)
    top, left, height, _ = blocks_of(array, GREEN)
    below = array[top + height + 1 :]
    first, second = below[:, left : left + 128], below[:, left + 136 : left + 272]
    assert (first == grids.BETTER).all(-1).any()
    assert not (first == grids.WORSE).all(-1).any()
    assert (second == grids.WORSE).all(-1).any()


def test_save_images_names_stay_in_the_folder(tmp_path: Path) -> None:
    prompts = ["../../etc/passwd", "crème  brûlée", "苹果", "x" * 500]
    folder = tmp_path / "out"
    paths = grids.save_images(folder, flat(RED, GREEN, BLUE, GREY), prompts, [1, 2, 3, 4])
    assert [p.name for p in paths[:3]] == [
        "0000_etc-passwd_seed1.png",
        "0001_creme-brulee_seed2.png",
        "0002_prompt_seed3.png",
    ]
    assert sorted(folder.iterdir()) == sorted(paths)
    with Image.open(paths[2]) as image:
        image.load()
        assert image.size == (64, 64)
        assert image.getpixel((3, 3)) == (0, 0, 255)
        assert image.info["prompt"] == "苹果"
        assert image.info["seed"] == "3"


def test_wrap_keeps_every_letter_and_the_width() -> None:
    font = load_font(13)
    text = "a rocket on a blue background " + "unbreakable" * 8
    lines = wrap(text, font, 90)
    assert all(font.getlength(line) <= 90 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    # Names break between their parts.
    assert wrap("thinned:calls=4,late=2", font, 110) == ["thinned:calls=4,", "late=2"]
    assert wrap("shortft_shared_lora", font, 110) == ["shortft_shared_", "lora"]
    assert wrap("shortcut=unguided", font, 110) == ["shortcut=", "unguided"]


def test_failed_write_leaves_the_old_file_and_no_debris(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_atomic(tmp_path / "picture.png", b"old")

    def full_disk(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:1])
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_told_with_the_files_name(small_disk: Path) -> None:
    path = write_atomic(small_disk / "picture.png", b"old")
    with pytest.raises(OSError, match=r"No space left on device: .*picture.png"):
        write_atomic(path, bytes(300_000))
    assert path.read_bytes() == b"old"


# --- curves ----------------------------------------------------------------------------------


def metrics_file(path: Path, updates: int, **more: object) -> Path:
    rows: list[dict[str, object]] = []
    for update in range(1, updates + 1):
        row = {"update": update, "stage": 1 + update // 15, "reward": update / 50, "seconds": 1.5}
        rows.append({**row, "grad_norm": 0.1, "lr": 1e-3, "peak_memory_bytes": 1, **more})
        if update % 10 == 0:
            rows.append({"update": update, "eval_reward": 0.2, "eval_held_out": 0.3})
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_curves_picture(tmp_path: Path) -> None:
    path = curves.draw_curves(
        metrics_file(tmp_path / "m.jsonl", 40), tmp_path / "curves.png", "run"
    )
    array = pixels(path)
    assert array.shape[0] > 700
    assert array.shape[1] == 1320
    blue, orange = [
        (np.abs(array.astype(int) - c).sum(-1) < 12) for c in ((0, 114, 178), (230, 159, 0))
    ]
    for half in (slice(0, 660), slice(660, 1320)):  # by update, by time
        assert blue[:, half].sum() > 200
        assert orange[:, half].sum() > 100


def test_curves_show_the_parts_of_a_mixed_reward(tmp_path: Path) -> None:
    mixed = metrics_file(tmp_path / "m.jsonl", 20, parts={"clip": 0.2, "symmetry": -0.1})
    tall = pixels(curves.draw_curves(mixed, tmp_path / "c.png"))
    single = metrics_file(tmp_path / "n.jsonl", 20, parts={"clip": 0.2})
    assert tall.shape[0] > pixels(curves.draw_curves(single, tmp_path / "d.png")).shape[0] + 300


@pytest.mark.parametrize(
    "rows", [[], [{"update": 1, "reward": 1}], [{"update": 0, "eval_reward": 1}]]
)
@pytest.mark.filterwarnings("error")
def test_curves_of_almost_nothing(tmp_path: Path, rows: list[dict[str, float]]) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert pixels(curves.draw_curves(path, tmp_path / "c.png")).size


@pytest.mark.filterwarnings("error")
def test_curves_survive_values_that_are_not_numbers(tmp_path: Path) -> None:
    path = metrics_file(tmp_path / "m.jsonl", 30, grad_norm=math.nan, reward=None)
    assert pixels(curves.draw_curves(path, tmp_path / "c.png")).size


def test_metrics_of_a_resumed_and_killed_run(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text(
        '{"update": 1, "reward": 1}\n{"update": 2, "reward": 2}\n'
        '{"update": 2, "reward": 5}\n{"update": 2, "eval_reward": 3}\n{"upda'
    )
    metrics = curves.read_metrics(path)
    assert [(r["update"], r["reward"]) for r in metrics.updates] == [(1, 1), (2, 5)]
    assert len(metrics.evaluations) == 1
    path.write_text('{"upda\n{"update": 2, "reward": 2}\n')
    with pytest.raises(ValueError, match="line 1"):
        curves.read_metrics(path)


def test_running_mean_against_brute_force() -> None:
    values = np.array([1.0, 2.0, np.nan, 4.0, 10.0, 0.0])
    expected = [np.nanmean(values[max(0, i - 1) : i + 2]) for i in range(6)]
    np.testing.assert_allclose(curves.running_mean(values, 3), expected)


# --- plans -----------------------------------------------------------------------------------

SCHEDULE = ddim_schedule(alphas_cumprod(), 50)
TIMES = SCHEDULE.timesteps.tolist()
SEGMENTS = segments(SCHEDULE, 4)
STAGES = [(f"stage {s}", shortft_plan(SCHEDULE, 4, s)) for s in range(1, 5)]


def shown(*renderables: object, width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    for renderable in renderables:
        console.print(renderable)
    return console.export_text()


@pytest.mark.parametrize(
    ("stage", "calls", "grad_calls"), [(1, 18, 7), (2, 29, 5), (3, 39, 3), (4, 50, 1)]
)
def test_plan_text_counts_and_glyphs(stage: int, calls: int, grad_calls: int) -> None:
    title, plan = STAGES[stage - 1]
    text = shown(plan_text.plan_text(plan, TIMES, SEGMENTS, title, legend=False))
    assert f"stage {stage}: {calls} network calls, {grad_calls} with gradient" in text
    for when in ("981 → 761", "741 → 501", "481 → 261", "241 → 1"):
        assert when in text
    rows = [line.split() for line in text.splitlines() if "→" in line]
    assert sum(int(row[-2]) for row in rows) == calls
    assert sum(int(row[-1]) for row in rows) == grad_calls
    chain = "".join(row[4] for row in rows)
    assert sum(chain.count(glyph) for glyph in "·S1234") == calls
    assert chain.count("S") == chain.count("▶") == 4 - stage
    assert text.count("▲") == 4 - stage + 1
    assert "…" not in text  # nothing is cut


def test_plan_text_tells_jumps_by_the_shortcut_from_the_policys_without_colour() -> None:
    plan = jumps_plan(SCHEDULE, 4, jump="half", pin=False)
    text = shown(plan_text.plan_text(plan, TIMES, SEGMENTS))
    chain = [line.split()[4] for line in text.splitlines() if "→" in line]
    assert [jump.rstrip("─▶") for jump in chain] == ["S1", "S1", "1", "1"]
    assert "S1─▶ shortcut jump with" in text
    assert "S1─▶" not in shown(plan_text.plan_text(STAGES[0][1], TIMES, SEGMENTS))


def test_plan_text_marks_where_the_gradient_flows() -> None:
    text = shown(plan_text.plan_text(STAGES[1][1], TIMES, SEGMENTS))
    lines = text.splitlines()
    jump = next(i for i, line in enumerate(lines) if "S─" in line)
    begin, end = lines[jump].index("S"), lines[jump].index("3", 25)
    assert set(lines[jump + 1][begin:end]) == {"═"}
    assert lines[jump + 1][end] == "▲"
    assert max(map(len, lines)) <= 80


def test_plan_text_without_segments_and_with_partial_gradient() -> None:
    steps = tuple(Step(i, i + 1, "policy", 1, i == 40, 0.5 if i > 40 else 1.0) for i in range(50))
    text = shown(plan_text.plan_text(Plan(steps, (1,), "x0"), TIMES, title="other", legend=False))
    assert "1" * 50 in text
    assert "▲" + "~" * 9 in text
    assert "prediction of the last call" in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(("steps", "k"), [(4, 4), (10, 2), (200, 2), (500, 4)])
def test_plan_text_of_any_length_fits(steps: int, k: int) -> None:
    schedule = ddim_schedule(alphas_cumprod(), steps)
    plan = shortft_plan(schedule, k, 1)
    parts = segments(schedule, k)
    text = shown(plan_text.plan_text(plan, schedule.timesteps.tolist(), parts, legend=False))
    assert max(map(len, text.splitlines())) <= 80
    rows = [line.split() for line in text.splitlines() if "→" in line]
    assert sum(int(row[-2]) for row in rows) == plan.calls
    assert "…" not in text


def test_plan_png(tmp_path: Path) -> None:
    notes = ["1.2 GB, 1.0 s", "", "", "0.6 GB"]
    path = plan_picture.plan_png(tmp_path / "p.png", STAGES, TIMES, SEGMENTS, notes, "ShortFT")
    array = pixels(path).astype(int)
    assert array.shape[1] > 1200
    for edge in (array[0], array[-1], array[:, 0], array[:, -1]):
        assert (edge == 255).all()

    def area(colour: tuple[int, int, int]) -> np.ndarray:
        near: np.ndarray = np.abs(array - colour).sum(-1) < 10
        return near

    arcs, band = area((0, 114, 178)), area((205, 233, 223))
    quarter = len(array) // 4
    assert arcs[: quarter + 40].sum() > arcs[quarter + 40 : 2 * quarter].sum() > 0
    assert band.any()
    # Long in the first stages, short in the last.
    assert band[: 2 * quarter].sum() > 2 * band[2 * quarter :].sum()


def test_plan_png_of_other_methods(tmp_path: Path) -> None:
    frozen = Plan(tuple(Step(i, i + 1, "base") for i in range(50)))
    pinned = shortft_plan(SCHEDULE, 4, 1, pin=True)
    path = plan_picture.plan_png(tmp_path / "p.png", [("base", frozen), ("pin", pinned)], TIMES)
    assert pixels(path).size


# --- progress --------------------------------------------------------------------------------


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def plain_console() -> Console:
    return Console(file=io.StringIO(), width=80, force_terminal=False)


def printed(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_progress_prints_a_plain_line_now_and_then() -> None:
    clock, console = Clock(), plain_console()
    with TrainProgress(40, stages=4, console=console, clock=clock) as progress:
        for update in range(1, 41):
            clock.now += 1
            progress.update(update, 1 + update // 11, 0.5, peak_memory_bytes=1_234_000_000)
        progress.log("[evaluated] 0.7")
    lines = printed(console)
    assert lines[0] == "stage 1/4 · 1/40 · reward 0.500 · 1.00 s/update · 0:39 left · 1.2 GB"
    assert [line.split(" · ")[1] for line in lines if "·" in line] == [
        "1/40",
        "16/40",
        "31/40",
        "40/40",
    ]
    assert "[evaluated] 0.7" in lines


def test_progress_by_minutes_after_resume() -> None:
    clock, console = Clock(), plain_console()
    with TrainProgress(
        1000, minutes=5, console=console, clock=clock, start_update=100, start_seconds=120
    ) as progress:
        assert progress.fraction == pytest.approx(0.4)
        clock.now += 50  # 20 of them on pictures, which the budget does not count
        progress.update(101, 1, math.nan, seconds=30.0)
        assert progress.fraction == pytest.approx(0.5)
    assert "101/1000" in printed(console)[0]
    assert "2:30 left" in printed(console)[0]


def test_progress_reward_is_a_running_mean() -> None:
    console = plain_console()
    with TrainProgress(3, console=console, window=2, clock=Clock()) as progress:
        for update, reward in enumerate([5.0, 1.0, 2.0], start=1):
            progress.update(update, 1, reward)
    assert "reward 1.500" in printed(console)[-1]


def test_progress_on_a_terminal_is_one_live_bar() -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    with TrainProgress(2, console=console) as progress:
        progress.update(1, 1, 0.25)
        progress.update(2, 1, 0.75)
    assert isinstance(console.file, io.StringIO)
    assert "2/2 · reward 0.500" in console.file.getvalue()
    assert "━" in console.file.getvalue()


def test_progress_can_be_silent_and_needs_a_budget() -> None:
    console = plain_console()
    with TrainProgress(2, console=console, enabled=False) as progress:
        progress.update(1, 1, 0.25)
        progress.log("nothing")
    assert printed(console) == []
    with pytest.raises(ValueError, match="total_updates"):
        TrainProgress()


def test_summary_table() -> None:
    summary = {
        "reward": {"name": "clip", "before": 0.2, "after": 0.25},
        "held_out": {"name": "clip [held out]", "before": 0.3, "after": 0.27},
        "diversity": {"name": "spread", "before": 0.0, "after": 0.5},
        "updates": 400,
        "seconds": 301.0,
        "seconds_per_update": 0.71,
        "peak_memory_bytes": 1_230_000_000,
    }
    text = shown(summary_table(summary))
    assert "+0.0500 (+25 %)" in text
    assert "clip [held out]" in text
    assert "-0.0300 (-10 %)" in text
    assert "400 updates · 5:01 in all · 0.71 s per update · peak memory 1.2 GB" in text


def test_small_texts() -> None:
    assert [clock_text(s) for s in (5, 65.4, 7384, math.inf)] == ["0:05", "1:05", "2:03:04", "?"]
    assert memory_text(950e6) == "950 MB"


def test_the_package_itself_loads_nothing_heavy() -> None:
    code = "import sys, shortft.drawing; print({'torch', 'PIL', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.cwd()
    )
    assert done.stdout.strip() == "set()"
