"""An object store behind a proxy, and runs whose source and output are there, for ``drills.soak.faults``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import reinforce
from tests.helpers.data import config_of, members_of, write_tar
from tests.helpers.s3_proxy import Proxy, s3_environment
from tests.helpers.s3_runs import layers
from tests.helpers.worker_in_process import worker_in_process

SHARDS = 6


class Bench:
    """An object store behind a proxy, and what an undisturbed run writes there."""

    def __init__(self, folder: Path, proxy: Proxy) -> None:
        self.folder, self.proxy = folder, proxy
        os.environ |= s3_environment(proxy.url)
        import s3fs

        self.s3 = s3fs.S3FileSystem(use_listings_cache=False, skip_instance_cache=True)
        self.s3.mkdir("bucket")
        self.tars = [write_tar(folder / f"{n}.tar", members_of(n, 4)) for n in range(SHARDS)]
        self.put_source("whole")
        self.run("whole")
        self.whole = layers(self.s3, "whole/out")
        assert len(self.whole) == 3 * SHARDS + 1, sorted(self.whole)

    def put_source(self, name: str) -> None:
        for path in self.tars:
            self.s3.put_file(str(path), f"bucket/{name}/source/{path.name}")

    def config(self, name: str, **changes: Any) -> dict[str, Any]:
        """The config of a case: one teacher, three layers.

        Its source counts as that of the undisturbed run, since the names of shards depend on their URLs.
        """
        teacher = {"class": "tests.helpers.models:ColorTeacher", "options": {"size": 16, "dim": 8}}
        moved = {f"s3://bucket/{name}/source": "s3://bucket/whole/source"} if name != "whole" else {}
        changes = {"captioners": {}, "teachers": {"red": teacher}, "moved": moved, **changes}
        return config_of(f"s3://bucket/{name}/source/*.tar", f"s3://bucket/{name}/out", **changes)

    def run(self, name: str, **changes: Any) -> reinforce.RunSummary:
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()
        with worker_in_process():
            return reinforce.run(self.config(name, **changes))
