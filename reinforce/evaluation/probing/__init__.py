"""Classifiers of image features: weighted nearest neighbours, and a linear probe."""
