"""``make bench``: what the pipeline costs, compared with its limits on this machine.

Sections (``host.py``, ``accelerator.py``, ``memory.py``, ``student.py``, ``texts.py``) measure figures. Variants of a
section alternate in rounds, and each figure is a median. ``page.py`` writes the table in docs/performance.md.
Milliseconds and bytes depend on the machine; ratios are comparable between machines.
"""
