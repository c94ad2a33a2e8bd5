"""Searches, and many runs on one base."""
