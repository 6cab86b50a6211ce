"""SIGTERM and Ctrl-C: a training finishes its step and saves; a second signal ends at once."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from llmkd.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT)
_deferring = False  # a signal finds a process, not an argument: these two are the process's
_asked: int | None = None


@contextmanager
def heard() -> Iterator[None]:
    """While the block runs, a first signal raises Stopped, or is noted where `deferred`."""
    global _asked
    if threading.current_thread() is not threading.main_thread():  # only the main thread hears signals
        yield
        return
    before = {number: signal.signal(number, _hear) for number in SIGNALS}
    try:
        yield
    finally:
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


def asked() -> int | None:
    """The signal that asked this process to stop, if one did."""
    return _asked


def _hear(number: int, frame: FrameType | None) -> None:
    global _asked
    _asked = number
    for each in SIGNALS:  # the next one ends the process at once
        signal.signal(each, signal.SIG_DFL)
    if not _deferring:
        raise Stopped(number)
    name = signal.Signals(number).name
    # not print: it may be what the signal interrupted
    os.write(2, f"{name}: stops after this step; again: at once\n".encode())
