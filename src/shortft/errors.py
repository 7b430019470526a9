"""What stops a command or a run: above all the mistakes that the user can mend."""

import os


class UserError(Exception):
    """A mistake in what the user asked for.

    The message is one line: the option or file, the value received, what is wrong with it, and
    the remedy. The command line prints it after ``error:`` and exits with code 2.
    """


class Torn(UserError):
    """Something failed while weights were being changed: this state must not be saved."""


class AllAtOnce(UserError):
    """A mistake that every process of a run meets after the same update."""


class NotFinite(UserError):
    """A measured score is not a finite number.

    Attributes:
        tuned: whether it is a picture's of the tuned model.
    """

    def __init__(self, message: str, *, tuned: bool) -> None:
        super().__init__(message)
        self.tuned = tuned


class Stopped(BaseException):
    """A signal asked the run to stop; it did so at a safe place.

    Attributes:
        signal: its number; the exit code is 128 more.
    """

    def __init__(self, signal: int) -> None:
        super().__init__(signal)
        self.signal = signal


def traceback_file() -> str:
    """Where this process of a run keeps the traceback of somebody else's error."""
    rank = int(os.environ.get("RANK", "0"))
    return f"error-{rank}.txt" if rank else "error.txt"
