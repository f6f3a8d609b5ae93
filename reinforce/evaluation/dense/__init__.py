"""Dense evaluations: semantic segmentation by a linear head on frozen patch features."""
