"""The one error users meet: a sentence that says what is wrong and what to do."""

from __future__ import annotations


class UserError(Exception):
    """Bad input: the command line prints its one sentence and exits with code 2."""
