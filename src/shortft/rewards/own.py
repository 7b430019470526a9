"""A user's own reward: ``path/to/file.py:name``, or an entry point. Loads no torch."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortft.errors import UserError
from shortft.paths import expand, is_file
from shortft.rewards.base import Reward

if TYPE_CHECKING:
    import torch
    from torch import Tensor

GROUP = "shortft.rewards"
"""Entry points under which an installed package offers its rewards."""


class OwnReward:
    """A user's function or object as a reward; what it returns is checked at every call."""

    def __init__(self, name: str, scorer: Any) -> None:
        self.name = name
        self._scorer = scorer
        self._reporter: Reward | None = scorer if isinstance(scorer, Reward) else None
        self.report_name = name if self._reporter is None else self._reporter.report_name
        self.report_higher_is_better = (
            True if self._reporter is None else self._reporter.report_higher_is_better
        )

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,), differentiable in the pixels.

        Raises:
            UserError: the user's code returned something else.
        """
        import torch

        scores = self._scorer(images_BCHW, prompts)
        batch = len(images_BCHW)
        if not isinstance(scores, torch.Tensor) or scores.shape != (batch,):
            shape = tuple(scores.shape) if isinstance(scores, torch.Tensor) else type(scores)
            raise UserError(
                f"--reward {self.name}: returned {shape} for {batch} pictures; return a tensor of "
                f"shape ({batch},), one score each"
            )
        if images_BCHW.requires_grad and torch.is_grad_enabled() and not scores.requires_grad:
            raise UserError(
                f"--reward {self.name}: no gradient reaches the pixels; compute the score from "
                "the tensor itself, without detach, no_grad, NumPy or PIL"
            )
        return scores if scores.dtype == torch.float64 else scores.float()

    def report(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """The object's own report (B,), or the score without gradient."""
        import torch

        with torch.no_grad():
            report = self._reporter.report if self._reporter else self
            return report(images_BCHW.detach(), prompts)


def is_file_spec(name: str) -> bool:
    """Whether `name` is written ``file.py:name``."""
    return ".py:" in name


def installed(name: str) -> EntryPoint | None:
    """The entry point of that name, if a package offers one."""
    return next(iter(entry_points(group=GROUP, name=name)), None)


def check_file(name: str) -> None:
    """Look into the file of ``file.py:name`` without running it.

    Raises:
        UserError: no such file, not Python, or the name is not defined in it.
    """
    path, attribute = split_spec(name)
    if not is_file(path):
        raise UserError(f"--reward {name}: no such file; check the path of {path.name}")
    try:
        body = ast.parse(path.read_bytes()).body
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"--reward {name}: {path.name} is not Python ({error})") from None
    if not any(attribute in _bound_names(node) for node in body):
        functions = [node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        raise UserError(
            f"--reward {name}: no {attribute} in {path.name}; it defines "
            f"{', '.join(functions) or 'nothing'}"
        )


def load_own(name: str, device: torch.device | str, dtype: torch.dtype) -> OwnReward:
    """Import the user's code and wrap it.

    A class is made without arguments, or with ``device`` and ``dtype`` as far as it asks for them,
    and must follow `Reward`; anything else is called with (images, prompts).

    Raises:
        UserError: the import fails, or the object cannot be a reward.
    """
    try:
        if is_file_spec(name):
            found = _from_file(name)
        else:
            entry = installed(name)
            assert entry is not None, "parse_reward_spec has found it"
            found = entry.load()
        if inspect.isclass(found):
            make: Callable[..., Any] = found
            asked = inspect.signature(make).parameters
            offered = {"device": device, "dtype": dtype}
            found = make(**{name: value for name, value in offered.items() if name in asked})
            if not isinstance(found, Reward):
                missing = sorted(_MEMBERS - set(dir(found)))
                raise UserError(
                    f"--reward {name}: the class has no {', '.join(missing)}; follow "
                    "rewards/base.py, or write a function (images, prompts) -> scores"
                )
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"--reward {name}: cannot be loaded ({type(error).__name__}: {error}); correct the "
            "file or install what it imports"
        ) from error
    if not callable(found):
        raise UserError(f"--reward {name}: is a {type(found).__name__}; give a function or a class")
    return OwnReward(name, found)


_MEMBERS = {"name", "report_name", "report_higher_is_better", "report", "__call__"}


def split_spec(name: str) -> tuple[Path, str]:
    path, _, attribute = name.rpartition(":")
    return expand(Path(path)), attribute


def _bound_names(node: ast.stmt) -> set[str]:
    """Names that a top-level statement may define, in any of Python's ways."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    names = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Name | ast.FunctionDef | ast.ClassDef):
            names.add(part.id if isinstance(part, ast.Name) else part.name)
        elif isinstance(part, ast.alias):
            names.add((part.asname or part.name).partition(".")[0])
    return names


def _imports(path: Path) -> set[str]:
    """Top-level names of the modules that a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def _from_file(name: str) -> Any:
    path, attribute = split_spec(name)
    beside = str(path.absolute().parent)
    if beside not in sys.path:  # last, so that a neighbour hides no installed package
        sys.path.append(beside)
    for imported in _imports(path):
        neighbours = (path.parent / f"{imported}.py", path.parent / imported / "__init__.py")
        found = importlib.util.find_spec(imported) if any(map(is_file, neighbours)) else None
        origin = Path(str(found.origin)).resolve() if found else None
        if found and origin not in [neighbour.resolve() for neighbour in neighbours]:
            raise UserError(
                f"--reward {name}: {path.name} imports {imported}, which is {found.origin} here, "
                "not the file beside it; rename that file"
            )
    module_name = f"shortft_own_{path.stem}"
    module_spec = importlib.util.spec_from_file_location(module_name, path)
    assert module_spec is not None  # its name ends in .py
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_name] = module  # dataclasses and pickle look there
    module_spec.loader.exec_module(module)
    return getattr(module, attribute)
