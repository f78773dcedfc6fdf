"""The first line of every notebook: `config = course.start("03_attention", scale=scale, seed=seed)`."""

import importlib
import random
from types import ModuleType

from . import claims, figures, hardware
from .scales import ScaleConfig, check_seed, load_scale


def start(notebook: str, scale: str = "laptop", seed: int = 0, fresh: bool = False) -> ScaleConfig:
    """Load the scale, seed every generator, set threads and figure style, and begin a fresh list of claims.

    `fresh` computes every experiment anew instead of taking its recorded result.
    """
    import numpy as np
    import torch

    # here, because it belongs to notebooks alone and the command line starts without it
    from . import records

    config = load_scale(scale)
    check_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(hardware.threads(config))
    figures.apply_style()
    claims.open_notebook(notebook, config.name, seed)
    records.open_notebook(notebook, config, seed, fresh)
    print(f"scale {config.name} · seed {seed}")
    return config


def oracle(module: str, what: str = "the result") -> ModuleType | None:
    """Import an optional reference implementation; if it is not installed, say what it would have compared.

    Transformers then shows no bars of progress: they would stand in the notebook as warnings.
    """
    try:
        found = importlib.import_module(module)
    except ImportError:
        print(f"{module} is not installed: would have compared {what}")
        return None
    if module == "transformers":
        found.utils.logging.disable_progress_bar()
    return found
