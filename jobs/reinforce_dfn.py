"""Reinforce a dataset on a Ray cluster.

    ray job submit --working-dir . -- python jobs/reinforce_dfn.py --config configs/dfn5b.yaml

The same program as ``reinforce run CONFIG``; workers need only the dependencies, the code travels with the job.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where the code of the job lies

from jobs.entry import run

if __name__ == "__main__":
    run("run", __doc__, "configs/dfn5b.yaml")
