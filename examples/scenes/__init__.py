"""Scenes of several emoji, with masks: what stored patch features give a student that segments, by codec."""
