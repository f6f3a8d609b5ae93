"""Errors that the user can fix; the command line prints them as one message, without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Something in the config, the source or the environment is wrong. The message names the problem and the fix."""


class StorageError(UserError):
    """A storage request failed after all retries. In a worker, it costs the shard an attempt."""
