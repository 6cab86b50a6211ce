"""SIGTERM and Ctrl-C: a training finishes its step and saves; a second one, seconds later, ends at once.

A rank whose launcher has ended takes that for a SIGTERM.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from llmkd.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# seconds in which a second signal is the first one once more: a terminal or a scheduler asks the launcher and
# its ranks, and torchrun's or deepspeed's launcher then asks the ranks again
SAME = 3.0
_deferring = False  # a signal finds a process, not an argument: these two are the process's
_asked: int | None = None
_since = 0.0


@contextmanager
def heard() -> Iterator[None]:
    """While the block runs, a first signal raises Stopped, or is noted where `deferred`."""
    global _asked
    if threading.current_thread() is not threading.main_thread():  # only the main thread hears signals
        yield
        return
    before = {number: signal.signal(number, _hear) for number in SIGNALS}
    over = threading.Event()
    if above := _launchers():
        threading.Thread(target=_outlived, args=(above, over), daemon=True).start()
    try:
        yield
    finally:
        over.set()
        _asked = None
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def deferred() -> Iterator[None]:
    """While the block runs, a signal is only noted: the block asks for it with `asked`, where it can stop."""
    global _deferring
    before, _deferring = _deferring, True
    try:
        yield
    finally:
        _deferring = before


def anew() -> None:
    """In a fork: hear signals as a process does that has just begun, whatever its parent was at."""
    global _asked, _deferring
    _asked, _deferring = None, False
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def asked() -> int | None:
    """The signal that asked this process to stop, if one did."""
    return _asked


def _launchers() -> list[int]:
    """A rank's launcher on this node, as process ids (Linux); nothing where this process is no rank."""
    if "LOCAL_RANK" not in os.environ or not Path("/proc/self/stat").exists():
        return []
    try:
        launcher = os.getppid()
        above = int(Path(f"/proc/{launcher}/stat").read_text().rpartition(")")[2].split()[1])
        # one node's `deepspeed` is two processes: the command, which dies of a SIGTERM without a word, and
        # deepspeed.launcher.launch, which it waits for
        command = os.fsdecode(Path(f"/proc/{above}/cmdline").read_bytes()).split("\0")
    except OSError:  # ended while it was looked at, or not ours to look at
        return [os.getppid()]
    return [launcher, above] if any(Path(word).name == "deepspeed" for word in command[:2]) else [launcher]


def _outlived(launchers: list[int], over: threading.Event) -> None:
    """Asks this rank to stop once its launcher has ended: nobody else would, and nobody waits for it."""
    while not over.wait(1):
        if _launchers() != launchers:
            return os.kill(os.getpid(), signal.SIGTERM)


def _hear(number: int, frame: FrameType | None) -> None:
    global _asked, _since
    if _asked is not None:
        if time.monotonic() - _since >= SAME:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        return
    _asked, _since = number, time.monotonic()
    if not _deferring:
        raise Stopped(number)
    name = signal.Signals(number).name
    # not print: it may be what the signal interrupted
    os.write(2, f"{name}: stops after this step or block; again in {SAME:.0f} s: at once\n".encode())
