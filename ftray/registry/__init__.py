"""Adapters by digest on any fsspec store."""
