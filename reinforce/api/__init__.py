"""The public functions and classes of ``reinforce``, which the command line calls, too."""
