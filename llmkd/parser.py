"""Command lines: what is wrong with one is told in one line, and whoever reads what it prints may stop."""

import argparse
import os
import select
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import NoReturn, TextIO


class Parser(argparse.ArgumentParser):
    """argparse, with a wrong command line told in one line as every other error is."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: "):
            flag = message.split(": ", 1)[1].split()[0].split("=")[0]
            message += nearest(flag, self._option_string_actions)
        print(f"error: {message}; see {self.prog} --help", file=sys.stderr)
        sys.exit(2)


def nearest(word: str, known: Iterable[str]) -> str:
    """What was meant, if anything is near enough; else all that there are."""
    names = list(known)
    close = get_close_matches(word, names, 1, 0.5)
    return f"; did you mean {close[0]}?" if close else f"; there are {', '.join(names)}"


@contextmanager
def while_read() -> Iterator[None]:
    """Around a program. A reader may close its pipe early, as `head` does: that ends it as SIGPIPE would."""
    try:
        yield
    except BrokenPipeError:
        closed = [stream for stream in (sys.stdout, sys.stderr) if stream and _closed(stream)]
        if not closed:
            raise  # another pipe's
        sys.exit(128 + signal.SIGPIPE)


def _closed(stream: TextIO) -> bool:
    """Whether nobody reads a stream; then what is left of it goes nowhere when the interpreter ends."""
    asked = select.poll()
    asked.register(stream.fileno(), 0)  # of no event, so it tells errors and hang-ups alone
    if closed := bool(asked.poll(0)):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return closed
