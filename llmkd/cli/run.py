"""All stages of a config, or those named; finished work is skipped, and the same command goes on.

Stages: prepare, pretrain, teachers, distill, merge, quantize, evaluate. Each is a process of its own; where
that is safe (on Linux, without --launch or an NVIDIA or AMD GPU) libraries are imported once for all of them.
The first that fails ends the run with its exit code; Ctrl-C and SIGTERM are passed on, and what can be gone
on with is saved, also (on Linux) where this command itself is killed.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmkd.cli import processes
from llmkd.cli.options import STAGES, Answer, config_flags
from llmkd.cli.processes import Start, abreast
from llmkd.parser import nearest

if TYPE_CHECKING:
    from llmkd.schema import Config

PARTS = {"pretrain": "models", "teachers": "teachers", "distill": "folds"}  # see llmkd.stage.parts
FLAGS = {"models": ["--model"], "teachers": ["--teacher", "--fold"], "folds": ["--fold"]}
OWN = {  # the flags that a stage has itself
    "pretrain": ("model",),
    "teachers": ("teacher", "fold"),
    "distill": ("student", "fold", "only"),
    "evaluate": ("artifact",),
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    config_flags(parser)
    parser.add_argument(
        "words",
        nargs="*",
        metavar="STAGE | key.subkey=value",
        help="stages, by default all; dotted overrides of the config",
    )
    parser.add_argument(
        "-j",
        "--jobs",
        type=at_least_one,
        default=1,
        metavar="N",
        help="models, teachers and folds side by side, N at a time, each on its share of the cores",
    )
    parser.add_argument(
        "--launch", default="", metavar="WORDS", help='e.g. "deepspeed --num_accelerators 2", or torchrun'
    )
    for flag in dict.fromkeys(flag for flags in OWN.values() for flag in flags):
        whose = " and ".join(name for name, flags in OWN.items() if flag in flags)
        parser.add_argument(
            f"--{flag}",
            action="append",
            default=[],
            metavar="student|baseline" if flag == "only" else flag.upper(),
            help=f"of {whose}, only this; may be repeated",
        )


def at_least_one(word: str) -> int:
    if not word.isascii() or not word.isdigit() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is no number of at least 1")
    return int(word)


def answer(arguments: argparse.Namespace) -> Answer:
    from llmkd.cli import forks
    from llmkd.config import load

    overrides = [word for word in arguments.words if "=" in word]
    config = load(arguments.config, overrides)
    names = chosen([word for word in arguments.words if "=" not in word], config)
    own = own_flags(arguments, names)
    launch = shlex.split(arguments.launch) or [sys.executable]
    start: Start = processes.start if arguments.launch or not forks.possible() else forks.start
    done = []
    for name in names:
        print(f"{STAGES[name]}:", flush=True)
        started = time.monotonic()
        if start is forks.start and not forks.ready(needed(config, name, own)):
            start = processes.start
        before = [] if start is forks.start else launch
        base = [*before, str(script(STAGES[name])), "--config", arguments.config, *overrides]
        mine = {f"--{flag}": own[flag] for flag in OWN.get(name, ()) if flag in own}
        split = narrowed(parts(config, name), mine) if arguments.jobs > 1 else []
        commands = [[*base, *words] for words in split]
        code = abreast(commands, arguments.jobs, arguments.json, start)
        code = code or abreast([[*base, *flat(mine)]], 1, arguments.json, start)
        done.append({"stage": STAGES[name], "seconds": round(time.monotonic() - started, 2), "code": code})
        if code:
            break
    figures = f"; figures: llmkd report {shlex.quote(config.run)}" if "evaluate" in names else ""
    text = "" if code else f"{config.run}: {', '.join(names)} done{figures}"
    return Answer({"run": config.run, "stages": done}, text, code)


def needed(config: "Config", name: str, own: Mapping[str, Sequence[str]]) -> Sequence[str]:
    """The modules that a stage works with, to be imported before it is forked; none where nothing is due."""
    from llmkd import libraries
    from llmkd.cli.states import due

    mine = {flag: own[flag] for flag in OWN.get(name, ()) if flag in own}
    if "artifact" not in mine and not due(config, STAGES[name], mine):
        return ()
    return libraries.ROWS if name == "prepare" else libraries.ALL


def chosen(asked: Sequence[str], config: "Config") -> list[str]:
    """Names of stages in their order: those asked for, or all that the config has. Raises ConfigError."""
    from llmkd.errors import ConfigError

    short = {script: name for name, script in STAGES.items()}
    for word in asked:
        if word not in STAGES and word not in short:
            raise ConfigError(f"no stage {word!r}{nearest(word, STAGES)}")
    if asked:
        return [name for name in STAGES if name in {short.get(word, word) for word in asked}]
    return [name for name in STAGES if name != "evaluate" or config.task.test is not None]


def own_flags(arguments: argparse.Namespace, names: Sequence[str]) -> dict[str, list[str]]:
    """What the stages' own flags ask for. Raises ConfigError where a flag is of no stage that was named."""
    from llmkd.errors import ConfigError

    asked = {flag: vars(arguments)[flag] for flags in OWN.values() for flag in flags}
    given = {flag: values for flag, values in asked.items() if values}
    named = names if any("=" not in word for word in arguments.words) else []
    for flag, values in given.items():
        whose = [name for name, flags in OWN.items() if flag in flags]
        if not set(whose) & set(named):
            words = " or ".join(f"llmkd run {name} --{flag} {values[0]}" for name in whose)
            raise ConfigError(f"--{flag} {values[0]}: name the stage that it is for: {words}")
    return given


def narrowed(split: Sequence[Sequence[str]], mine: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """The parts that a stage's own flags leave, each with those flags that no part has."""
    left = [
        list(words)
        for words in split
        if all(value in mine.get(flag, [value]) for flag, value in zip(words[::2], words[1::2], strict=True))
    ]
    return [words + flat({flag: mine[flag] for flag in mine if flag not in words}) for words in left]


def flat(flags: Mapping[str, Sequence[str]]) -> list[str]:
    return [word for flag, values in flags.items() for value in values for word in (flag, value)]


def script(stage: str) -> Path:
    """A stage's script: `stages` stands beside the package, in a checkout and where it is installed."""
    from llmkd.errors import RunError

    path = Path(__file__).parents[2] / "stages" / f"{stage}.py"
    if not path.is_file():
        raise RunError(f"{path}: no such script; install llmkd again, or run it from a checkout")
    return path


def parts(config: "Config", name: str) -> list[list[str]]:
    """The flags of a stage's parts that may run side by side; none where there is but one."""
    from llmkd import stage

    if name not in PARTS:
        return []
    flags = FLAGS[PARTS[name]]
    found = [part.rsplit(":", len(flags) - 1) for part in stage.parts(config, PARTS[name])]
    words = [[word for pair in zip(flags, values, strict=True) for word in pair] for values in found]
    return words if len(words) > 1 else []
