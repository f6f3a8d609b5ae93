"""An object that is uploaded in parts; this module imports little, because a process of its own runs it."""

from reinforce.dataset.store import Store

BYTES = 101 * 2**20  # from 100 MiB s3fs uploads parts of 50 MiB


def write(folder: str) -> None:
    with Store(f"s3://bucket/{folder}").new_file("large.bin") as path, open(path, "wb") as file:
        file.truncate(BYTES)
