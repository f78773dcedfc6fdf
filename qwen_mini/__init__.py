"""The Qwen2.5 technical report as a course that runs: one small module per notebook."""

__version__ = "0.1.0"
