"""Runs of a comparison, one after another, shared with other processes at the same folder."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shortft.compare.jobs import RESULT, Job, Workshop
from shortft.config import Config, to_yaml
from shortft.drawing.files import write_atomic
from shortft.errors import UserError

CLAIM, LOG = ".claim", "train.log"


def run_all(
    workshop: Workshop,
    evaluate_run: Callable[[Job, Config], dict[str, Any]],
    report: Callable[[str], None],
) -> None:
    """Do what is left of a comparison, together with other processes at it."""
    waited = False
    while not workshop.finished():
        jobs = list(workshop.jobs())
        left = [job for job in jobs if not job.done]
        for job in left:
            if claim(job.folder):
                waited = False
                try:
                    if not job.done:
                        kind = "trial" if job.search else f"seed {job.seed}"
                        report(
                            f"{job.reward}, {job.method}, {kind}, learning rate "
                            f"{job.learning_rate:g}: {len(left)} runs left"
                        )
                        run_job(workshop.config(job), job, evaluate_run)
                finally:
                    (job.folder / CLAIM).unlink(missing_ok=True)
                break
        else:
            if not waited:
                report(f"waiting for {len(left)} runs of other processes")
                waited = True
            time.sleep(2)


def run_job(
    config: Config, job: Job, evaluate_run: Callable[[Job, Config], dict[str, Any]]
) -> None:
    """Train in a process of its own (its memory is measured), then evaluate.

    Raises:
        UserError: if the training failed; its last words are given.
    """
    settings = job.folder / "run.yaml"
    write_atomic(settings, to_yaml(config).encode())
    command = [sys.executable, "-m", "shortft", "train", str(settings), "--auto-resume"]
    with (job.folder / LOG).open("a", encoding="utf-8") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
    if code:
        text = (job.folder / LOG).read_text(encoding="utf-8", errors="replace").strip()
        words = text.splitlines()[-1] if text else ""
        if job.search and "updates in a row" in words:  # a rate too high to train with: the worst
            failed = {"failed": words, "reward": {"before": None, "after": None}}
            write_atomic(job.folder / RESULT, (json.dumps(failed, indent=2) + "\n").encode())
            return
        raise UserError(f"{job.folder}: training failed ({words}); see {LOG} there")
    result = {
        **evaluate_run(job, config),
        "reward_spec": job.reward,
        "method": job.method,
        "seed": job.seed,  # of the training; the evaluation has its own
        "learning_rate": job.learning_rate,
    }
    write_atomic(job.folder / RESULT, (json.dumps(result, indent=2) + "\n").encode())


def claim(folder: Path) -> bool:
    """Take a run for this process; False if another living process has it.

    A claim of a process that is gone from this machine is taken over.
    """
    folder.mkdir(parents=True, exist_ok=True)
    own = f"{socket.gethostname()} {os.getpid()}"
    for _ in range(2):
        try:
            with (folder / CLAIM).open("x") as file:
                file.write(own)
            return True
        except FileExistsError:
            try:
                host, pid = (folder / CLAIM).read_text().split()
            except (OSError, ValueError):
                return False  # being written or being removed
            if host != socket.gethostname() or _alive(int(pid)):
                return False
            (folder / CLAIM).unlink(missing_ok=True)
    return False


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
