"""``make ablations``: the questions of the MobileCLIP papers, at the demo's scale.

Each question is a few arms: students of configs/student-demo.yaml that differ in one thing, in what they are told to
do (``arms.py``) or in the dataset they learn from. Datasets are made first, then Ray trains the students, one core
each, several seeds of each arm (``trainings.py``). What is finished is read from their folders (``found.py``), judged
by a rule (``claims.py``) and written down (``page.py``), question by question as they are done.
"""
