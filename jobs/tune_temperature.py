"""Tune the teachers' logit scales (1 / temperature) on a Ray cluster.

    ray job submit --working-dir . -- python jobs/tune_temperature.py --config configs/tune-demo.yaml \\
        --set output=s3://YOUR-BUCKET/tuning

The job runs ``reinforce tune CONFIG``. Its code is uploaded with the job; workers need only the dependencies.
Submit the same job again to resume: finished trials are not repeated.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the root of the uploaded code

from jobs.entry import run

if __name__ == "__main__":
    run("tune", __doc__, "configs/tune-demo.yaml")
