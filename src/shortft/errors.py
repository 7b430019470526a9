"""The one exception that means "the user can fix this"."""


class UserError(Exception):
    """A mistake in what the user asked for.

    The message is one line: the option or file, the value received, what is wrong with it, and
    the remedy. The command line prints it after ``error:`` and exits with code 2.
    """
