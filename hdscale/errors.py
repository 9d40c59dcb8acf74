"""Exceptions that commands turn into one readable line."""


class UserError(ValueError):
    """A mistake that the person who started the program can mend; exit code 2.

    The message is one line: the file or field, the rule, the value, and the way out.
    """

    def __init__(self, message: str, *, reported_by: int | None = None) -> None:
        """Take the message.

        Args:
            message: one line.
            reported_by: where all ranks raise the same error, the one rank that prints it; None: each prints its own.
        """
        super().__init__(message)
        self.reported_by = reported_by


class LostRankError(RuntimeError):
    """Another rank is gone, and with it the run; the message names it and its host. Exit code 1."""

    def __init__(self, message: str, *, reported_by: int) -> None:
        """Take the message.

        Args:
            message: one line.
            reported_by: the one rank that prints it.
        """
        super().__init__(message)
        self.reported_by = reported_by
