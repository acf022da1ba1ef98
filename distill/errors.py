"""The one exception that a user is meant to see."""

from __future__ import annotations


class UserError(Exception):
    """A mistake that the user can mend. The command line prints its one line and exits with code 2.

    The message says what is wrong and what to do, names the file or setting, and fits on one line.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))
