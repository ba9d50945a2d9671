"""The one kind of error a user is meant to read."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in what the user gave. One sentence: which file, key, line or rank; what was expected; what to do.

    `megacode.cli` prints it without a traceback and exits with 2; so does the training entry point on every rank.
    """
