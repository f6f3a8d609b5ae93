"""What the jobs share: a job runs one command of ``reinforce`` with the code that travels with the job."""

from __future__ import annotations

import argparse

from reinforce.cli import main


def run(command: str, description: str | None, example: str) -> None:
    """Run ``reinforce COMMAND CONFIG`` with the arguments of this process.

    ``description`` is the help text, ``example`` the config it names. Arguments other than --config go to the command.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help=f"YAML config, for example {example}")
    known, rest = parser.parse_known_args()
    main([command, known.config, *rest])
