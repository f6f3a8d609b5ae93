"""Errors that are the user's to mend: printed as one message, without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Something in the config, the source or the environment is wrong; the message says what and the mend."""


class StorageError(UserError):
    """A storage did not do what it was asked, again and again. In a worker that costs the shard an attempt."""
