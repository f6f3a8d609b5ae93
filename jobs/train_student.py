"""Train a student on a Ray cluster.

    ray job submit --working-dir . -- python jobs/train_student.py --config configs/mobileclip2-s0.yaml

The same program as ``reinforce train CONFIG``; workers need only the dependencies, the code travels with the job.
``ray job stop`` lets it write a checkpoint if RAY_JOB_STOP_WAIT_TIME_S on the head leaves it the time (default: 3 s).
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where the code of the job lies

from jobs.entry import run

if __name__ == "__main__":
    run("train", __doc__, "configs/mobileclip2-s0.yaml")
