"""Stages as forks of this process, which has imported the libraries once for all of them.

What no fork survives is looked for first: threads that nobody stops (a pool of OpenMP's among them), and a
device whose driver was asked for. There each stage is a process of its own, see `processes`.
"""

import atexit
import os
import runpy
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partialmethod
from pathlib import Path
from typing import NoReturn

from llmkd import interrupt, libraries
from llmkd.cli.processes import STDERR, mortal

DEVICES = ("nvidia*", "kfd", "dxg")  # of CUDA, of ROCm, of CUDA under WSL; others are not known
OUTLIVING = "jemalloc_bg_thd"  # Arrow's allocator, which knows of forks and begins it anew in each


class Fork:
    """A process that was forked from this one: what `abreast` asks of a `subprocess.Popen`."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if ended else None
        return self.returncode

    def wait(self) -> int:
        while (code := self.poll()) is None:
            time.sleep(0.02)
        return code


def possible(devices: Path = Path("/dev")) -> bool:
    """Whether stages may be forks here: on Linux, from a process of one thread, without an NVIDIA or AMD GPU.

    Libraries may ask a GPU's driver for its devices while they are imported, and no fork survives that.
    """
    found = any(path for pattern in DEVICES for path in devices.glob(pattern))
    return sys.platform == "linux" and threading.active_count() == 1 and not found


def ready(modules: Sequence[str]) -> bool:
    """Import what the next stage needs. False where that has left threads which a fork would be without,
    and where the system has no room for a further process."""
    libraries.load(modules)
    if threading.active_count() > 1:
        return False
    try:
        if not (pid := _fork()):  # threads that know of forks, as OpenBLAS's do, end before one
            os._exit(0)
        os.waitpid(pid, 0)
        threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    except OSError:  # no fork, or a thread that ended while it was looked at
        return False
    return sum(name != OUTLIVING for name in threads) == 1


def start(command: Sequence[str], environment: Mapping[str, str], quiet: bool) -> Fork:
    """A script with its words in a fork, which behaves as a process that `processes.start` starts."""
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        if stream:
            stream.flush()  # or each fork would write once more what waits in it
    bound = mortal(os.getpid())
    before = signal.pthread_sigmask(signal.SIG_BLOCK, interrupt.SIGNALS)  # until its handlers are its own
    try:
        pid = _fork()
        if not pid:
            _become(command, environment, quiet, bound)
        os.setpgid(pid, pid)  # here and there: whichever comes first
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return Fork(pid)


def _fork() -> int:
    """From Python 3.12 on `os.fork` warns of threads, Arrow's among them: in the parent, when the child lives
    already, which would be lost to sight where warnings are errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _become(
    command: Sequence[str], environment: Mapping[str, str], quiet: bool, bound: Callable[[], None]
) -> NoReturn:
    """The rest of a fork's life. It ends here, and never by the code that had called for it."""
    code = 1
    try:
        os.setpgid(0, 0)
        bound()
        _streams(quiet)
        _adopt(environment)
        code = _run(command)
        # As an interpreter ends: threads, then exits. Python has no public name for either; its own forks, in
        # multiprocessing.process, call the first. Those that the parent has registered run here as well.
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
        code = code or 1
    finally:
        if code == -signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        os._exit(code & 0xFF)


def _streams(quiet: bool) -> None:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if quiet:
        os.dup2(STDERR, 1)
    sys.stdin, sys.stdout, sys.stderr = sys.__stdin__, sys.__stdout__, sys.__stderr__  # type: ignore[assignment]


def _adopt(environment: Mapping[str, str]) -> None:
    """The environment, with those of its words that libraries read while they are imported; random seeds."""
    given = {name: word for name, word in environment.items() if name not in os.environ}
    os.environ.update(environment)
    if "OMP_NUM_THREADS" in given:
        _limit(int(given["OMP_NUM_THREADS"]), environment)
    if torch := sys.modules.get("torch"):
        torch.default_generator.seed()  # each its own, as any process; Python's own sees to it itself
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    if "tqdm" in sys.modules and "TQDM_DISABLE" in given:
        bar = sys.modules["tqdm"].tqdm
        bar.__init__ = partialmethod(bar.__init__, disable=True)


def _limit(threads: int, environment: Mapping[str, str]) -> None:
    """What OMP_NUM_THREADS would have been to OpenMP, OpenBLAS and torch, had they not been imported yet.
    Names that they ask before it stand."""
    torch = sys.modules.get("torch")
    torch_threads = torch.get_num_threads() if torch and "MKL_NUM_THREADS" in environment else threads
    if "numpy" in sys.modules:
        from threadpoolctl import threadpool_limits

        pools = ("openmp",) if "OPENBLAS_NUM_THREADS" in environment else ("openmp", "blas")
        threadpool_limits(dict.fromkeys(pools, threads))
    if torch:
        torch.set_num_threads(torch_threads)


def _run(command: Sequence[str]) -> int:
    """A script as `python` would run it. Returns its exit code, -SIGINT after a Ctrl-C."""
    sys.argv = list(command)
    sys.path[0] = str(Path(command[0]).resolve().parent)
    try:
        interrupt.anew()
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return (error.code or 0) & 0xFF
        print(error.code, file=sys.stderr)
        return 1
    except BaseException as error:
        traceback.print_exc()
        return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    return 0
