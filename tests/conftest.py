"""Settings for all tests: no test reaches a network, opens a window, or takes a GPU unasked.

`CUDA_VISIBLE_DEVICES=0 make test` runs them on a GPU.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
torch.backends.cudnn.allow_tf32 = False  # tests compare results more closely than it computes


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny import save_tiny

    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def shortcut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from test_chain import make_shortcut
    from tiny import tiny_family

    return make_shortcut(tiny_family(), tmp_path_factory.mktemp("shortcut") / "s.safetensors")


@pytest.fixture
def settings(model: Path, shortcut: Path, tmp_path: Path) -> dict[str, object]:
    return tiny_settings(model, shortcut, tmp_path)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs end without curves.png: for those whose log equals that of a run which drew it."""
    monkeypatch.setattr("shortft.train.draw_curves", lambda *_, **__: None)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 kB, where the test may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.system(f"mount -t tmpfs -o size=256k tmpfs {disk} 2>/dev/null") != 0:
        pytest.skip("may not mount a small file system here")
    try:
        yield disk
    finally:
        os.system(f"umount {disk}")


def tiny_settings(model: Path, shortcut: Path, tmp_path: Path) -> dict[str, object]:
    """Of a run of seconds, in a folder of its own."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("red apple\npanda face\nrocket\n")
    return {
        "model": str(model),
        "shortcut": str(shortcut),
        "check_shortcut": False,  # it is random
        "prompts": prompts,
        "reward": "symmetry",
        "num_steps": 8,
        "rank": 2,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "guidance_scale": 2.0,
        "updates": 8,
        "sample_every": 4,
        "sample_prompts": 2,
        "checkpoint_every": 2,
        "progress": False,
        "tensorboard": False,
        "output_dir": tmp_path / "run",
    }
