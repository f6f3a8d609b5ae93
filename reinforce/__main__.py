"""``python -m reinforce`` is the command line."""

from reinforce.cli import main

main()
