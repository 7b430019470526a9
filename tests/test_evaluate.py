"""Base against tuned: the same noise, and every picture against its own prompt."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shortft import evaluate as evaluation
from shortft.cli import main
from shortft.errors import NotFinite, UserError
from shortft.evaluate import evaluate
from shortft.rewards import make_reward
from shortft.rewards.base import Reward
from shortft.rewards.combine import WeightedSum
from shortft.rewards.symmetry import Symmetry
from test_adapter import make_adapter
from test_step import OWN, by_prompt
from tiny import tiny_family

PROMPTS = ["red apple", "rocket", "panda face"]


def test_an_adapter_without_strength_is_the_base_and_scores_are_of_their_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Pictures are made and scored four at a time, so that a batch ends inside a prompt."""
    make_adapter(tmp_path)
    monkeypatch.setattr(evaluation, "scored_at_once", lambda images: 4)
    options = {"seeds": 2, "num_steps": 4, "batch_size": 4}
    family, reward = tiny_family(), make_reward(OWN, visits=True)
    entered = []

    @contextmanager
    def at_work(device: torch.device) -> Iterator[None]:
        entered.append(device)
        yield
        assert entered.pop() == device

    def score(part: Reward, *args: object) -> torch.Tensor:
        assert entered == [family.device]  # what visits is there while it scores
        return part(*args)

    monkeypatch.setattr(reward, "at_work", at_work)
    monkeypatch.setattr(reward, "score", score)
    figures, pictures = evaluate(family, tmp_path, reward, PROMPTS, strength=0.0, **options)
    assert torch.equal(pictures.after, pictures.before)
    assert len({picture.numpy().tobytes() for picture in pictures.before}) == 6
    assert pictures.prompts == [prompt for prompt in PROMPTS for _ in range(2)]
    expected = by_prompt(pictures.before, pictures.prompts)
    torch.testing.assert_close(pictures.scores_before, expected)
    torch.testing.assert_close(pictures.scores_after, expected)
    told = figures["reward"]
    assert told["before"] == told["after"] == pytest.approx(float(expected.mean()), rel=1e-4)
    assert told["change_interval"] == (0, 0)


def test_another_scorer_is_measured_and_variety_by_what_is_there(tmp_path: Path, model: Path):
    """Models other than the embedded one have no scorer of their own, but may be given one."""
    adapter, out = tmp_path / "run" / "adapter", tmp_path / "out"
    make_adapter(adapter)
    family, reward = tiny_family(), make_reward("symmetry")
    options = {"seeds": 2, "num_steps": 4}
    alone, pictures = evaluate(family, adapter, reward, PROMPTS, **options)
    assert "held_out" not in alone
    for images, of in ((pictures.before, "before"), (pictures.after, "after")):
        small = F.avg_pool2d(images, images.shape[-1] // 16) - 0.5
        pairs = small.flatten(1).view(len(PROMPTS), 2, -1)
        differ = 1 - F.cosine_similarity(pairs[:, 0], pairs[:, 1], dim=-1)
        assert alone["diversity"][of] == pytest.approx(float(differ.mean()), rel=1e-4)
    assert alone["diversity"]["name"] == "1 - cosine by thumbnails"
    watched, _ = evaluate(family, adapter, reward, PROMPTS, held_out=make_reward(OWN), **options)
    for images, of in ((pictures.before, "before"), (pictures.after, "after")):
        expected = float(by_prompt(images, pictures.prompts).mean())
        assert watched["held_out"][of] == pytest.approx(expected, rel=1e-4)
    assert watched["reward"] == alone["reward"]
    assert watched["diversity"] == alone["diversity"]
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    command = ["evaluate", "--adapter", str(adapter), "--model", str(model), "--seeds", "2"]
    command += ["--prompts", str(tmp_path / "prompts.txt"), "--reward", "symmetry"]
    command += ["--output-dir", str(out), "--num-steps", "4"]
    assert main([*command, "--held-out", "clip:1,symmetry:2"]) == 0
    told = json.loads((out / "evaluation.json").read_text())
    assert told["held_out"]["name"] == "clip:1,symmetry:2"
    assert told["diversity"]["name"] == "1 - cosine by clip"
    assert told["diversity"]["before"] != alone["diversity"]["before"]


@pytest.mark.parametrize("command", ["evaluate", "export"])
def test_a_reward_that_fails_is_named_before_anything_is_drawn(
    command: str,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    def draws(*args: object) -> None:
        raise AssertionError("something was drawn before the reward was tried")

    adapter, out = tmp_path / "run" / "adapter", tmp_path / "out"
    make_adapter(adapter)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    own = tmp_path / "own.py"
    own.write_text("def f(images, prompts):\n    return images[0, 7]\n")
    options = ["--adapter", str(adapter), "--model", str(model), "--output-dir", str(out)]
    options += ["--prompts", str(tmp_path / "prompts.txt"), "--reward", f"{own}:f"]
    with monkeypatch.context() as patched:
        patched.setattr("shortft.sampling.run_chain", draws)
        assert main([command, *options]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: --reward {own}:f: raised IndexError")
    assert told.count("\n") == 1
    assert "images[0, 7]" in (out / "error.txt").read_text()
    own.write_text("def f(images, prompts):\n    return images.mean((1, 2, 3))\n")
    assert main([command, *options]) == 0
    assert (out / "error.txt").exists() == (command == "evaluate")  # an export is for others


REPORTS = """
import torch


class Own:
    name, report_name, report_higher_is_better = "own", "own", True

    def __call__(self, images, prompts):
        return images.mean((1, 2, 3))

    def report(self, images, prompts):
        {body}
"""


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise KeyError('mood')", "its report raised KeyError: 'mood'"),
        ("return 1.0", "its report returned float; return one score per picture, shape"),
        ("return images.mean()", r"its report returned \(\); return one score"),
        (
            "return images.mean((1, 2, 3)) / 0",
            "its score of the base model's picture of 'red apple'",
        ),
    ],
)
def test_a_report_that_fails_is_named_in_one_line(tmp_path: Path, body: str, message: str):
    make_adapter(tmp_path)
    (tmp_path / "own.py").write_text(REPORTS.format(body=body))
    reward = make_reward(f"{tmp_path / 'own.py'}:Own")
    with pytest.raises(UserError, match=message) as caught:
        evaluate(tiny_family(), tmp_path, reward, PROMPTS, seeds=2, num_steps=4)
    assert not isinstance(caught.value, NotFinite)  # which would count as a rate that is too high


def test_a_report_that_works_in_place_leaves_the_pictures_alone(tmp_path: Path):
    make_adapter(tmp_path)
    (tmp_path / "own.py").write_text(REPORTS.format(body="return images.sub_(9).mean((1, 2, 3))"))
    options = {"seeds": 2, "num_steps": 4, "strength": 0.0}
    spoilt, pictures = evaluate(
        tiny_family(), tmp_path, make_reward(f"{tmp_path / 'own.py'}:Own"), PROMPTS, **options
    )
    _, others = evaluate(tiny_family(), tmp_path, make_reward("symmetry"), PROMPTS, **options)
    assert torch.equal(pictures.before, others.before)
    assert torch.equal(pictures.after, others.after)
    (told,) = spoilt["reports"].values()
    assert told["before"] == pytest.approx(float(others.before.mean()) - 9, rel=1e-4)


def test_a_reward_that_fails_later_is_named_too_and_trying_it_changes_no_random_numbers(
    tmp_path: Path,
):
    make_adapter(tmp_path)
    seen: list[int] = []

    class Moody(Symmetry):
        def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            seen.append(len(images))
            torch.rand(1)
            if len(seen) > 1:
                raise KeyError("mood")
            return super().__call__(images, prompts)

        def report(self, images: Tensor, prompts: Sequence[str] = ()) -> Tensor:
            return super().__call__(images, prompts)

    torch.manual_seed(0)
    with pytest.raises(UserError, match="--reward symmetry: raised KeyError: 'mood'"):
        evaluate(
            tiny_family(), tmp_path, WeightedSum([(Moody(), 1.0)]), PROMPTS, seeds=2, num_steps=4
        )
    assert seen == [2, 6]
    drawn = torch.rand(1)  # after the one number of the second call
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(2)[1:])
