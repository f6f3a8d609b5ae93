"""``make bench-gpu``: what an accelerator does with this project's models.

``__main__.py`` lists the sections by their value: the limits of the card (``card.py``), whether its results are right
(``right.py``), whole shards and runs (``shards.py``), captions (``captions.py``), trainings (``students.py``) and
teachers (``teachers.py``). Models have random weights, unless a folder of real ones is given. Results are kept after
each section. On a CPU, ``--tiny`` runs the same code with tiny models, to test it.
"""
