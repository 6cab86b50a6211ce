"""A completion script for bash, zsh or fish: source it, or put it where your shell looks.

bash: source <(llmkd completion bash); fish: llmkd completion fish | source; zsh: the same as bash, after
compinit.
"""

import argparse
from collections.abc import Mapping

from llmkd.cli.options import STAGES, Answer

SHELLS = ("bash", "zsh", "fish")


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS)


def answer(arguments: argparse.Namespace) -> Answer:
    """Commands, their flags and their flags' choices, the stages of `run`; file names for all else."""
    from llmkd.cli import tree

    write = {"bash": bash, "zsh": zsh, "fish": fish}[arguments.shell]
    script = write({name: flags(command) for name, command in tree()[1].items()})
    return Answer({"shell": arguments.shell, "script": script}, script)


def flags(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {name: action for action in parser._actions for name in action.option_strings}


Commands = Mapping[str, Mapping[str, argparse.Action]]


def words(name: str) -> list[str]:
    """What may stand in a command's line beside flags and files."""
    return list(STAGES) if name == "run" else list(SHELLS) if name == "completion" else []


def bash(commands: Commands) -> str:
    cases = []
    for name, known in commands.items():
        values = "".join(
            f'      {flag}) COMPREPLY=($(compgen -W "{" ".join(action.choices)}" -- "$word")); return ;;\n'
            for flag, action in known.items()
            if action.choices
        )
        given = "".join(
            f"{flag}|" for flag, action in known.items() if action.nargs != 0 and not action.choices
        )
        values += f"      {given[:-1]}) return ;;  # a file name\n" if given else ""
        cases.append(
            f'  {name})\n    case "$before" in\n{values}    esac\n'
            f'    known="{" ".join([*known, *words(name)])}" ;;\n'
        )
    return BASH.format(commands=" ".join(commands), cases="".join(cases))


BASH = """\
_llmkd() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" known=""
  COMPREPLY=()
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "{commands} --help --version" -- "$word"))
    return
  fi
  case "${{COMP_WORDS[1]}}" in
{cases}  esac
  COMPREPLY=($(compgen -W "$known" -- "$word"))
}}
complete -o default -F _llmkd llmkd"""


def zsh(commands: Commands) -> str:
    return "autoload -U +X bashcompinit && bashcompinit\n" + bash(commands)


def fish(commands: Commands) -> str:
    found = []
    for name, known in commands.items():
        found.append(f"complete -c llmkd -f -n __fish_use_subcommand -a {name}")
        where = f"complete -c llmkd -n '__fish_seen_subcommand_from {name}'"
        found += [f"{where} -a '{' '.join(words(name))}'"] if words(name) else []
        for action in dict.fromkeys(known.values()):
            names = " ".join(
                f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}"
                for flag in action.option_strings
            )
            told = (action.help or "").replace("\\", "\\\\").replace("'", "\\'")
            value = f" -x -a '{' '.join(action.choices)}'" if action.choices else ""
            value = value or (" -r" if action.nargs != 0 else "")
            found.append(f"{where} {names}{value} -d '{told}'")
    return "\n".join(found)
