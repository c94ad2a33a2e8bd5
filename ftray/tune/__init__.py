"""Searches on Ray Tune, and many runs on one base."""
