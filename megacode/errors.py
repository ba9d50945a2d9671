"""The one kind of error a user is meant to read."""

from __future__ import annotations


class UserError(Exception):
    """A mistake of the user in one sentence: file, key, line or rank; expectation; remedy.

    `megacode.cli` prints it without a traceback and exits with code 2, on every rank.
    """
