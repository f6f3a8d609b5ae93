"""``reinforce inspect``: a report on a dataset, as a folder of HTML pages."""
