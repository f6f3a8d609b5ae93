"""Looking at a dataset and choosing from it: ``reinforce inspect`` and ``reinforce select``. Nothing is changed."""
