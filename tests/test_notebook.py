"""The quickstart notebook runs from top to bottom; CI gives it one update."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

NOTEBOOK = Path(__file__).parent.parent / "docs" / "quickstart.ipynb"


def test_the_quickstart_notebook_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SHORTFT_NOTEBOOK_UPDATES", "1")
    monkeypatch.setenv("SHORTFT_NOTEBOOK_DIR", str(tmp_path / "run"))
    names: dict[str, object] = {}
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"]  # outputs are not kept in the repository
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    base, tuned = names["base"], names["tuned"]
    assert isinstance(base, torch.Tensor)
    assert isinstance(tuned, torch.Tensor)
    assert base.shape == (4, 3, 64, 64)
    assert (base - tuned).abs().max() > 1e-3  # the adapter acts
    assert (tmp_path / "run" / "before_after.png").is_file()
    assert "reward " in capsys.readouterr().out
