"""Reinforce a dataset on a Ray cluster.

    ray job submit --working-dir . -- python jobs/reinforce_dfn.py --config configs/dfn5b.yaml

The same program as ``reinforce run CONFIG``; workers need only the dependencies, the code travels with the job.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from reinforce.cli import main


def job() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML config, for example configs/dfn5b.yaml")
    known, rest = parser.parse_known_args()
    main(["run", known.config, *rest])


if __name__ == "__main__":
    job()
