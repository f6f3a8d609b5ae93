"""``make first-hour`` and ``make bench-gpu``: what an accelerator does with this project's models.

``machine.py`` checks what is needed. ``sections/`` has the sections by their value: the limits of the card, whether its
results are right, whole shards and runs, captions, trainings and teachers. ``process.py`` measures each in a process
of its own. Models have random weights, unless a folder of real ones is given. Results are kept after each section. On a
CPU, ``--tiny`` runs the same code with tiny models, to test it.
"""
