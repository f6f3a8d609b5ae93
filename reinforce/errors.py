"""Errors that the user can fix; the command line prints them as one message, without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Something in the config, the source or the environment is wrong. The message names the problem and the fix.

    ``exit_status`` is the exit status of a command that it ends.
    """

    exit_status = 2


class TooManyQuarantined(UserError):
    """A run was stopped because more shards were quarantined than the config allows."""

    exit_status = 1


class SetsMissing(UserError):
    """Sets of a suite are missing, so that the mean is not that of the suite; the others are evaluated."""

    exit_status = 3


class RayEnded(UserError):
    """Ray ended before the run did, for example because its process was killed, or did not start."""

    exit_status = 1


class HostLost(UserError):
    """A host of a training run was lost for good, and the other hosts cannot hold its ranks."""

    exit_status = 1


class StorageError(UserError):
    """A storage request failed after all retries. In a worker, it counts against no shard."""

    exit_status = 1


class DamagedJson(UserError):
    """A file is not a JSON object; ``args`` are its path and what it is."""

    def __str__(self) -> str:
        return f"{self.args[0]} is {self.args[1]}. Restore it from a backup or another copy."
