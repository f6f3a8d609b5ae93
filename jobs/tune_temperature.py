"""Tune the teachers' logit scales (1 / temperature) on a Ray cluster.

    ray job submit --working-dir . -- python jobs/tune_temperature.py --config configs/tune-demo.yaml

The same program as ``reinforce tune CONFIG``; workers need only the dependencies, the code travels with the job. The
same job again goes on after the trials that are finished.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from reinforce.cli import main


def job() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML config, for example configs/tune-demo.yaml")
    known, rest = parser.parse_known_args()
    main(["tune", known.config, *rest])


if __name__ == "__main__":
    job()
