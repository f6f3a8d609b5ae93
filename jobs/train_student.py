"""Train a student on a Ray cluster.

    ray job submit --working-dir . -- python jobs/train_student.py --config configs/mobileclip2-s0.yaml

The job runs ``reinforce train CONFIG``. Its code is uploaded with the job; workers need only the dependencies.
On ``ray job stop`` it writes a checkpoint, if RAY_JOB_STOP_WAIT_TIME_S (default: 3 s) on the head node is long enough.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the root of the uploaded code

from jobs.entry import run

if __name__ == "__main__":
    run("train", __doc__, "configs/mobileclip2-s0.yaml")
