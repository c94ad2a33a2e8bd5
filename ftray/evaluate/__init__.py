"""Looks at what a run has done: the report today."""
