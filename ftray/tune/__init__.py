"""Searches on Ray Tune: from a space to trials, and from their results to the best run file."""
