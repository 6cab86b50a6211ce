"""Command lines: what is wrong with one is told in one line, as every other error is."""

import argparse
import sys
from collections.abc import Iterable
from difflib import get_close_matches
from typing import NoReturn


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
