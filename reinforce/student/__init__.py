"""Students: models that are trained from reinforced datasets."""
