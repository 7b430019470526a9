"""The one exception that means "the user can fix this"."""


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
