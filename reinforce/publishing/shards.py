"""The output folder of an export: its checks, what it has already, and what it is of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reinforce.errors import UserError
from reinforce.storage import Storage


def check_output(dataset: Storage, output: Storage) -> None:
    """Raise UserError if an export would write into the dataset, or cannot write."""
    if f"{output.root}/".startswith(f"{dataset.root}/") and type(output.fs) is type(dataset.fs):
        raise UserError(f"{output.url} is in the dataset. Give another folder.")
    output.check_writable()


def record_export(output: Storage, config: Mapping[str, Any], name: str, options: str | None = None) -> None:
    """Write what is exported to the file ``name``. Raises UserError if the folder has another export.

    The error names the keys that differ, of ``config`` or of its section ``options``.
    """
    before = output.read_json(name)
    if before is None:
        output.write_json(config, name)
    elif before != config:
        own, other = (config, before) if options is None else (config[options], before.get(options))
        other = other if isinstance(other, dict) else {}
        different = [key for key in {**own, **other} if other.get(key) != own.get(key)]
        raise UserError(
            f"{output.url} has an export with other {', '.join(different) or 'content'}. Repeat the options of that "
            "one, or give another folder."
        )
