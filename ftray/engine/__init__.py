"""Generation with many adapters at once. No Ray, no HTTP."""
