"""Runs of a comparison, one after another, shared with other processes at the same folder."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import IO, Any

from shortft.cause import noting_cause
from shortft.compare.jobs import RESULT, Job, Workshop
from shortft.config import Config, to_yaml
from shortft.drawing.files import write_atomic
from shortft.errors import NotFinite, Stopped, UserError
from shortft.lock import Taken, locked

CLAIM, LOG = ".claim", "train.log"
KILLED = -9  # the exit code of a process that SIGKILL ended
Evaluate = Callable[[Job, Config], dict[str, Any]]


def run_all(workshop: Workshop, evaluate_run: Evaluate, report: Callable[[str], None]) -> None:
    """Do what is left of a comparison, together with other processes at it."""
    waited = False
    while not workshop.finished():
        left = [job for job in workshop.jobs() if not job.done]

        def announce(job: Job, count: int = len(left)) -> None:
            kind = "trial" if job.search else f"seed {job.seed}"
            report(
                f"{job.reward}, {job.method}, {kind}, learning rate {job.learning_rate:g}: "
                f"{count} runs left"
            )

        if any(run_if_free(workshop, job, evaluate_run, announce) for job in left):
            waited = False
        else:
            if not waited:
                report(f"waiting for {len(left)} runs of other processes")
                waited = True
            time.sleep(2)


def run_if_free(
    workshop: Workshop, job: Job, evaluate_run: Evaluate, announce: Callable[[Job], None]
) -> bool:
    """Do a run, if no other process is at it; whether it is done now."""
    job.folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked(job.folder / CLAIM) as claim:
            if not job.done:
                announce(job)
                run_job(workshop.config(job), job, evaluate_run, claim)
    except Taken:
        return False
    return True


def run_job(config: Config, job: Job, evaluate_run: Evaluate, claim: int | None = None) -> None:
    """Train in a process of its own (its memory is measured), then evaluate.

    Args:
        claim: descriptor of the run's lock, which the training holds as well: if this process is
            killed alone, nobody else takes the run before it ends.

    Raises:
        UserError: if the training failed, with its last words; if the evaluation did.
    """

    settings = job.folder / "run.yaml"
    write_atomic(settings, to_yaml(config).encode())
    command = [sys.executable, "-m", "shortft", "train", str(settings), "--auto-resume"]
    with (job.folder / LOG).open("a", encoding="utf-8") as log:
        code = _training(command, log, () if claim is None else (claim,))
    if code:
        text = (job.folder / LOG).read_text(encoding="utf-8", errors="replace").strip()
        words = text.splitlines()[-1] if text else ""
        if job.search and "updates in a row" in words:
            _note_failed(job, words)
            return
        if code == KILLED:
            words = "killed, as the system does where memory runs out"
        if not config.recompute and (code == KILLED or "out of memory with" in words):
            what = words if code == KILLED else "out of memory"
            words = (
                f"{what}; as {job.method}{',' if ':' in job.method else ':'}recompute=true it "
                "takes less, or give all methods what saves memory, in another --output-dir"
            )
        raise UserError(f"{job.folder}: training failed ({words}); see {LOG} there")
    try:
        with noting_cause(job.folder):
            measured = evaluate_run(job, config)
    except UserError as error:
        if not (job.search and isinstance(error, NotFinite) and error.tuned):
            raise UserError(f"{job.folder}: {error}") from error
        _note_failed(job, str(error))
        return
    result = {
        **measured,
        "reward_spec": job.reward,
        "method": job.method,
        "seed": job.seed,  # of the training; the evaluation has its own
        "learning_rate": job.learning_rate,
    }
    write_atomic(job.folder / RESULT, (json.dumps(result, indent=2) + "\n").encode())


def _training(command: Sequence[str], log: IO[str], descriptors: tuple[int, ...]) -> int:
    """The exit code of a process, which is asked to end where this one is stopped."""
    process: subprocess.Popen[bytes] | None = None
    try:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, pass_fds=descriptors
        )
        return process.wait()
    except Stopped:
        if process is not None:  # it writes a checkpoint, also where it was told itself
            process.terminate()
            process.wait()
        raise


def _note_failed(job: Job, words: str) -> None:
    """A rate that is too high to train with counts as the worst."""
    failed = {"failed": words, "reward": {"before": None, "after": None}}
    write_atomic(job.folder / RESULT, (json.dumps(failed, indent=2) + "\n").encode())
