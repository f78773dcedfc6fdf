"""`python -m qwen_mini.course …` is `qwen-mini …`."""

from .cli import main

raise SystemExit(main())
