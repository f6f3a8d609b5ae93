"""Reinforce a dataset on a Ray cluster.

    ray job submit --working-dir . -- python jobs/reinforce_dfn.py --config configs/dfn5b.yaml

The job runs ``reinforce run CONFIG``. Its code is uploaded with the job; workers need only the dependencies.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the root of the uploaded code

from jobs.entry import run

if __name__ == "__main__":
    run("run", __doc__, "configs/dfn5b.yaml")
