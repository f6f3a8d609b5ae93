"""``python -m reinforce`` is the command line."""

import sys
from pathlib import Path

# Python puts the working folder first, and a file in it would be imported in place of a package of its name.
if not getattr(sys.flags, "safe_path", False) and Path(sys.path[0]) == Path.cwd() != Path(__file__).parents[1]:
    del sys.path[0]

from reinforce.cli import main

main()
