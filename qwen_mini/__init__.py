"""The Qwen2.5 technical report as a course that runs: one small module per notebook."""

__version__ = "0.1.0"

from .course import environment  # noqa: E402, F401  before any module loads torch, whose threads it sets
