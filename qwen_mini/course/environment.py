"""Environment variables: what must be set before torch is loaded, and all that a kernel sees."""

import functools
import os
import sys
import tempfile
from pathlib import Path

from . import hardware
from .paths import PACKAGE, home, runs
from .scales import ScaleConfig

# How long a thread that has nothing to do spins before it sleeps: GNU's runtime counts rounds, LLVM's
# and Intel's, which torch uses on macOS and Windows, milliseconds. By default they spin for so long
# that with another program on one of two cores two threads are slower than one, up to forty times:
# the thread that has work waits for a core on which the other one spins.
WAITING = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}

# Python's own variables may skip assertions, run code at the start, turn warnings into errors; these
# only say where the interpreter finds its files.
PYTHON_FILES = {"PYTHONHOME", "PYTHONPLATLIBDIR", "PYTHONUSERBASE", "PYTHONNOUSERSITE"}
PYTHON_FILES |= {"PYTHONPYCACHEPREFIX", "PYTHONDONTWRITEBYTECODE", "PYTHONEXECUTABLE"}

FOREIGN = [
    # they bind every fork's one thread to the same core, or keep threads from being started
    *("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY", "OMP_WAIT_POLICY"),
    *("OMP_DYNAMIC", "MKL_DYNAMIC", "OMP_THREAD_LIMIT"),
    # torchrun's and SLURM's: a notebook is one process
    *("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"),
]


def calm_threads() -> None:
    """Let threads that wait sleep, unless the user has said how; without effect once torch is loaded."""
    for name, value in WAITING.items():
        os.environ.setdefault(name, value)


def kernel_environment(
    config: ScaleConfig, records_only: bool = False, fresh: bool = False, jobs: int = 1
) -> dict[str, str | None]:
    """What a kernel does not take over from its caller: variables and their values, None for none.

    `records_only` refuses to compute what is not recorded, `fresh` computes everything anew; without
    either the caller's own wish holds. `jobs`: kernels that share the machine's threads.
    """
    own, threads = _own_folder(), str(max(1, hardware.threads(config) // jobs))
    search = [str(PACKAGE.parent), os.environ.get("PYTHONPATH")]
    foreign = {name for name in os.environ if name.startswith("PYTHON")} - PYTHON_FILES
    wish = {"QWEN_MINI_RECORDS": "only" if records_only else None, "FRESH": "1" if fresh else None}
    computing = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {
        **dict.fromkeys([*sorted(foreign), *FOREIGN]),
        **{name: os.environ.get(name, value) for name, value in WAITING.items()},
        **dict.fromkeys(computing, threads),
        "TOKENIZERS_PARALLELISM": "false",  # its threads do not survive a fork
        "PYTHONHASHSEED": "0",
        "PYTHONUTF8": "1",  # whatever the locale
        "PYTHONPATH": os.pathsep.join(filter(None, search)),
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",  # another one shows no figures
        "MATPLOTLIBRC": str(own / "matplotlibrc"),
        "IPYTHONDIR": str(own / "ipython"),  # the user's own may run code at the start
        "QWEN_MINI_HOME": str(home()),
        "QWEN_MINI_RUNS": str(runs()),
        **(wish if records_only or fresh else {}),
    }


def applied(changes: dict[str, str | None]) -> dict[str, str]:
    """This process's environment with `changes`."""
    wanted = {**os.environ, **changes}
    return {name: value for name, value in wanted.items() if value is not None}


def kernel_manager(environment: dict[str, str]) -> type:
    """A kernel manager's class: this interpreter, by its path, with `environment`.

    The name python3, which notebooks hold, may be another interpreter's.
    """
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = KernelSpec(argv=command, display_name="Python 3", language="python")

    class Manager(AsyncKernelManager):
        kernel_spec = spec

        def start_kernel(self, **options):
            return super().start_kernel(**options, env=environment)

    return Manager


def _own_folder() -> Path:
    """Where IPython and matplotlib find no settings of a user; goes with this process."""
    return Path(_temporary_folder().name)


@functools.cache
def _temporary_folder() -> tempfile.TemporaryDirectory:
    folder = tempfile.TemporaryDirectory(prefix="qwen_mini_kernel_", ignore_cleanup_errors=True)
    (Path(folder.name) / "matplotlibrc").touch()
    return folder


calm_threads()
