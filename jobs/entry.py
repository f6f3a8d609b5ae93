"""Shared code of the jobs: each runs one command of ``reinforce`` with the code that was submitted with the job."""

from __future__ import annotations

import argparse

from reinforce.cli import main


def run(command: str, description: str | None, example: str) -> None:
    """Run ``reinforce COMMAND CONFIG`` with the command line of this process.

    ``--config`` becomes CONFIG; all other arguments are passed to the command. ``description`` is the help text and
    ``example`` a config to show in it.
    """
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"Other arguments are passed to `reinforce {command}`; `reinforce {command} --help` lists them.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help=f"path of a YAML config, for example {example}")
    known, rest = parser.parse_known_args()
    main([command, known.config, *rest])
