"""The command `llmkd`: one small file a command. Help and a wrong word import nothing heavy."""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from types import ModuleType

from llmkd import __version__
from llmkd.cli import completion, evaluate, export, init, plan, predict, report, run, schema, status, verify
from llmkd.parser import Parser, nearest, while_read

COMMANDS: dict[str, ModuleType] = {
    "init": init,
    "plan": plan,
    "run": run,
    "status": status,
    "report": report,
    "predict": predict,
    "evaluate": evaluate,
    "export": export,
    "verify": verify,
    "schema": schema,
    "completion": completion,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command. Exit codes: 0; 1 where `verify` or `status --check` found something wrong; 2 for what
    a user can mend, told in one line; 130 and 143 where a signal stopped it; 141 where whoever reads had
    enough; else a failing stage's own."""
    with while_read():
        _main(argv)


def _main(argv: Sequence[str] | None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    parser, commands = tree()
    if not words or words[0].startswith("-"):
        parser.parse_args(words or ["--help"])
    elif words[0] not in commands:
        parser.error(f"no command {words[0]!r}{nearest(words[0], commands)}")
    arguments = commands[words[0]].parse_intermixed_args(words[1:])
    from llmkd.stage import telling

    with telling():
        # libraries may print what they like: with --json, stdout is for the one document
        with redirect_stdout(sys.stderr) if arguments.json else nullcontext():
            answer = COMMANDS[arguments.command].answer(arguments)
        text = json.dumps(answer.data, indent=1, ensure_ascii=False) if arguments.json else answer.text
        if text:
            print(text, flush=True)
    if answer.code:
        sys.exit(answer.code)


def tree() -> tuple[Parser, dict[str, Parser]]:
    """The parser of `llmkd` alone, and each command's."""
    parser = Parser(prog="llmkd", description="Large teachers distilled into one small 8-bit student.")
    parser.add_argument("--version", action="version", version=f"llmkd {__version__}")
    below = parser.add_subparsers(metavar="COMMAND", title="commands", required=True)
    for name, module in COMMANDS.items():
        assert module.__doc__
        first = module.__doc__.split("\n", 1)[0].rstrip(".")
        command = below.add_parser(
            name,
            help=first[0].lower() + first[1:],
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_flags(command)
        command.add_argument(
            "--json", action="store_true", help="one JSON document on stdout, words on stderr"
        )
        command.set_defaults(command=name)
    return parser, below.choices
