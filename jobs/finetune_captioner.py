"""Fine-tune a captioner on a Ray cluster.

    ray job submit --working-dir . -- python jobs/finetune_captioner.py --config configs/finetune-coco38k.yaml

The job runs ``reinforce finetune-captioner CONFIG``. Its code is uploaded with the job; workers need only its
dependencies.
On ``ray job stop`` it writes a checkpoint, if RAY_JOB_STOP_WAIT_TIME_S (default: 3 s) on the head node is long enough.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the root of the uploaded code

from jobs.entry import run

if __name__ == "__main__":
    run("finetune-captioner", __doc__, "configs/finetune-coco38k.yaml")
