"""Tune the teachers' logit scales (1 / temperature) on a Ray cluster.

    ray job submit --working-dir . -- python jobs/tune_temperature.py --config configs/tune-demo.yaml

The same program as ``reinforce tune CONFIG``; workers need only the dependencies, the code travels with the job. The
same job again goes on after the trials that are finished.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where the code of the job lies

from jobs.entry import run

if __name__ == "__main__":
    run("tune", __doc__, "configs/tune-demo.yaml")
