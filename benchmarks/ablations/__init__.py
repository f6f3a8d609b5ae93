"""``make ablations``: the questions of the MobileCLIP papers, at the demo's scale.

Each question compares several arms: students of configs/student-demo.yaml that differ in one thing, either in their
config (``arms.py``) or in the dataset they are trained on. Datasets are made first, then Ray trains the students, with
one core each and several seeds per arm (``trainings.py``). Finished trainings are read from their folders
(``results.py``), checked against the papers' claims (``claims.py``) and written to a page (``page.py``), question by
question.
"""
