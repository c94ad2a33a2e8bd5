"""ftray: fine-tune language models on Ray, and serve every adapter that comes out."""

__version__ = "0.1.0"
