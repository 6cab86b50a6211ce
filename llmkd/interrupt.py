"""SIGTERM and Ctrl-C: a training finishes its step and saves; a second one, seconds later, ends at once.

A rank whose launcher has ended takes that for a SIGTERM.
"""

import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
    if launcher := _launcher():
        threading.Thread(target=_outlived, args=(*launcher, over), daemon=True).start()
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


def _launcher() -> tuple[int, int | None] | None:
    """Of a rank that torchrun or deepspeed started (Linux): its parent, and where that is one node's
    deepspeed.launcher.launch the `deepspeed` command, which dies of a SIGTERM without a word to it."""
    parent = os.getppid()
    if "deepspeed.launcher.launch" in _words(parent):
        above = _parent(parent)
        command = above is not None and "deepspeed" in [Path(word).name for word in _words(above)[:2]]
        return parent, above if command else None
    return (parent, None) if "TORCHELASTIC_RUN_ID" in os.environ and _words(parent) else None


def _outlived(launcher: int, above: int | None, over: threading.Event) -> None:
    """Asks this rank to stop once its launcher has ended: nobody else would, and nobody waits for it."""
    while not over.wait(1):
        if os.getppid() != launcher or (above and _parent(launcher) not in (above, None)):
            return os.kill(os.getpid(), signal.SIGTERM)


def _words(pid: int) -> list[str]:
    """Of a process's command line; none where they cannot be read."""
    try:
        return os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes()).split("\0")
    except OSError:
        return []


def _parent(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[1])
    except OSError:
        return None


def _hear(number: int, frame: FrameType | None) -> None:
    global _asked, _since
    if _asked is not None:
        if time.monotonic() - _since >= SAME:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        return
    _asked, _since = number, time.monotonic()
    _past_the_dead()
    if not _deferring:
        raise Stopped(number)
    name = signal.Signals(number).name
    # not print: it may be what the signal interrupted
    with suppress(OSError):
        os.write(2, f"{name}: stops after this step or block; again in {SAME:.0f} s: at once\n".encode())


def _past_the_dead() -> None:
    """Where nobody reads stdout or stderr any more (a closed terminal, a launcher that ended), what is still
    written there must not end the step."""
    watch = select.poll()
    for stream in (1, 2):
        watch.register(stream, 0)
    for stream, event in watch.poll(0):
        if event & (select.POLLERR | select.POLLHUP):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
