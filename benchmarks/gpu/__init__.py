"""``make bench-gpu``: models, captions, whole shards and trainings on an accelerator, each compared with its limit.

Weights are random and nothing is downloaded. On a CPU, ``--tiny`` runs the same code with tiny models, to test it.

Sections: the card (``card.py``), teachers (``towers.py``), a captioner (``captions.py``), shards from decoding to
Parquet (``shards.py``), and trainings of students (``students.py``).
"""
