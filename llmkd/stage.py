"""What every script in stages/ shares: its command line, its config, its parts, and how it ends."""

import argparse
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from llmkd import interrupt, ranks, run, tracking
from llmkd.config import load
from llmkd.errors import ConfigError, LlmkdError, Stopped
from llmkd.parser import Parser, while_read
from llmkd.schema import Config


def main(body: Callable[[Config, argparse.Namespace], None], description: str, *flags: str) -> None:
    """Run a stage's body with the config and the flags of this process's command line; see `telling`."""
    with while_read(), telling():
        config, arguments = parse(description, flags)
        tracking.check(config.tracking)
        body(config, arguments)


@contextmanager
def telling() -> Iterator[None]:
    """Around a command: what a user can mend ends as one line on stderr and exit code 2.

    SIGTERM and Ctrl-C end it with 143 and 130, once what can be gone on with is saved.
    """
    # Libraries' notices (a missing GPU kernel, an old cache name) are nothing that a user here can act on.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # Threads that spin while they wait make a shared machine ten times slower. Read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for library in ("torchao", "bitsandbytes", "torch.utils._pytree", "DeepSpeed"):
        logging.getLogger(library).setLevel(logging.ERROR)
    # DeepSpeed sets its own level when it is imported, and then warns of a machine without a GPU
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.module != "real_accelerator")
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        with interrupt.heard():
            yield
    except LlmkdError as error:
        _tell("\n".join(f"error: {line}" for line in str(error).split("\n")))
        sys.exit(2)
    except Stopped as stopped:
        name = signal.Signals(stopped.signal).name
        if ranks.is_main():
            _tell(f"stopped by {name}: {stopped}; the same command goes on from there")
        sys.exit(128 + stopped.signal)
    except PermissionError as error:
        _tell(f"error: {' '.join(str(error).split())}; give this user the right, or name another place")
        sys.exit(2)
    except Exception as error:
        if not run.is_disk_full(error):
            raise
        _tell(f"error: {' '.join(str(error).split())}; free some space, then the same command goes on")
        sys.exit(2)
    finally:
        ranks.stop()


def _tell(text: str) -> None:
    """On lines of its own, also where a progress bar stands."""
    from tqdm import tqdm

    tqdm.write(text, file=sys.stderr)


def parse(
    description: str, flags: Sequence[str] = (), argv: Sequence[str] | None = None
) -> tuple[Config, argparse.Namespace]:
    """--config, dotted overrides, and the stage's own flags (`--fold` and the like, each repeatable)."""
    parser = Parser(description=description)
    parser.add_argument("--config", required=True, help="the run's YAML, e.g. configs/demo.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.subkey=value", help="dotted overrides of the config"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # from the deepspeed launcher
    for flag in flags:
        parser.add_argument(
            f"--{flag}", action="append", default=[], help=f"only this {flag}; may be repeated"
        )
    arguments = parser.parse_intermixed_args(argv)
    return load(arguments.config, arguments.overrides), arguments


def chosen(asked: Sequence[str], known: Sequence[str], flag: str) -> list[str]:
    """The items a flag asks for, all of them by default. Raises ConfigError on one that is not there."""
    for item in asked:
        if item not in known:
            raise ConfigError(f"--{flag} {item}: there is no such {flag}; choose among {', '.join(known)}")
    return [item for item in known if not asked or item in asked]


def last_loss(history: Mapping[str, Any]) -> str:
    """What a training, or the last of several phases, ended at; there may be no step that was taken."""
    entries = history.get("phases", [history])[-1]["loss"]
    return f"loss {entries[-1]['loss']}" if entries else "no step was taken"


def say(text: str) -> None:
    if ranks.is_main():
        print(text, flush=True)


def parts(config: Config, what: str) -> list[str]:
    """What may run side by side of a stage: the config's models, its teacher:fold pairs, or its folds."""
    folds = [str(fold) for fold in range(config.folds.count)]
    if what == "models":
        return [model.name for model in config.models]
    if what == "folds":  # of a chain, a student's folds wait for those of the one before it
        return folds if len(config.students) == 1 else []
    asked = folds[:1] if config.task.kind == "causal_lm" else folds  # one cache serves all folds
    return [f"{teacher.name}:{fold}" for teacher in config.teachers for fold in asked]


if __name__ == "__main__":  # what `make -j` asks
    print(*parts(load(sys.argv[2], sys.argv[3:]), sys.argv[1]))
