"""All stages of a config, or those named; finished work is skipped, and the same command goes on.

Stages: prepare, pretrain, teachers, distill, merge, quantize, evaluate. Each is a process of its own. The
first that fails ends the run with its exit code; Ctrl-C and SIGTERM are passed on, and what can be gone on
with is saved.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmkd.cli.options import STAGES, Answer, config_flags
from llmkd.parser import nearest

if TYPE_CHECKING:
    from llmkd.schema import Config

PARTS = {"pretrain": "models", "teachers": "teachers", "distill": "folds"}  # see llmkd.stage.parts
STDERR = 2  # its file descriptor
FLAGS = {"models": ["--model"], "teachers": ["--teacher", "--fold"], "folds": ["--fold"]}


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
        type=int,
        default=1,
        metavar="N",
        help="models, teachers and folds side by side, N at a time, each on its share of the cores",
    )
    parser.add_argument(
        "--launch", default="", metavar="WORDS", help='e.g. "deepspeed --num_accelerators 2", or torchrun'
    )


def answer(arguments: argparse.Namespace) -> Answer:
    from llmkd.config import load

    overrides = [word for word in arguments.words if "=" in word]
    config = load(arguments.config, overrides)
    names = chosen([word for word in arguments.words if "=" not in word], config)
    launch = shlex.split(arguments.launch) or [sys.executable]
    done = []
    for name in names:
        base = [*launch, str(script(STAGES[name])), "--config", arguments.config, *overrides]
        print(f"{STAGES[name]}:", flush=True)
        started = time.monotonic()
        commands = [[*base, *words] for words in parts(config, name)] if arguments.jobs > 1 else []
        code = abreast(commands, arguments.jobs, arguments.json) or abreast([base], 1, arguments.json)
        done.append({"stage": STAGES[name], "seconds": round(time.monotonic() - started, 2), "code": code})
        if code:
            break
    figures = f"; figures: llmkd report {shlex.quote(config.run)}" if "evaluate" in names else ""
    text = "" if code else f"{config.run}: {', '.join(names)} done{figures}"
    return Answer({"run": config.run, "stages": done}, text, code)


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


def abreast(commands: Sequence[Sequence[str]], jobs: int, quiet: bool) -> int:
    """Run commands, `jobs` at a time. The exit code of the first that failed, else 0.

    After a failure no further one is started, and those that run come to their end. `quiet` sends their
    stdout to stderr. A signal is passed on once, as a child takes a second one for "at once".
    """
    from llmkd import interrupt
    from llmkd.errors import Stopped

    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    if len(commands) > 1:
        cores = len(os.sched_getaffinity(0))
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // jobs)))
    waiting, running, failed = list(commands), list[subprocess.Popen[bytes]](), 0
    try:
        while running or (waiting and not failed):
            while waiting and len(running) < jobs and not failed:
                with interrupt.deferred():  # a signal now would lose sight of the child
                    running.append(start(waiting.pop(0), environment, quiet))
                if number := interrupt.asked():
                    raise Stopped(number)
            ended = [child for child in running if child.poll() is not None]
            running = [child for child in running if child not in ended]
            failed = failed or next((exit_code(child) for child in ended if child.returncode), 0)
            time.sleep(0 if ended else 0.05)
    except Stopped as stopped:
        stop(running, stopped.signal)
        raise
    return failed


def start(command: Sequence[str], environment: Mapping[str, str], quiet: bool) -> subprocess.Popen[bytes]:
    """In a process group of its own, or a terminal's Ctrl-C would reach it from there and from here."""
    from llmkd.errors import ConfigError

    try:
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=STDERR if quiet else None,
            process_group=0,
        )
    except FileNotFoundError:
        raise ConfigError(f"--launch {command[0]}: no such command; install it or correct it") from None


def stop(running: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    """Pass a signal on, and any further one, until all have ended."""
    from llmkd import interrupt

    def pass_on(number: int, frame: object = None) -> None:
        for child in running:
            if child.poll() is None:
                child.send_signal(number)

    for each in interrupt.SIGNALS:
        signal.signal(each, pass_on)
    pass_on(number)
    for child in running:
        child.wait()


def exit_code(child: subprocess.Popen[bytes]) -> int:
    """As a shell tells it: 128 and the signal for one that a signal ended."""
    code = child.returncode
    return 128 - code if code < 0 else code
