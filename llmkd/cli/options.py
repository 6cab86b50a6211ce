"""What the commands share: the flags that are the same everywhere, what they answer."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

STAGES = {  # as a user names them -> their scripts, in order
    "prepare": "00_prepare",
    "pretrain": "01_pretrain",
    "teachers": "02_teachers",
    "distill": "03_distill",
    "merge": "04_merge",
    "quantize": "05_quantize",
    "evaluate": "06_evaluate",
}


class Answer(NamedTuple):
    """What a command found: for --json, for people, and its exit code."""

    data: Any
    text: str
    code: int = 0


def config_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", "-c", required=True, metavar="FILE", help="the run's YAML")


def override_words(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides", nargs="*", metavar="key.subkey=value", help="dotted overrides of the config"
    )


def artifact_flags(parser: argparse.ArgumentParser) -> None:
    """How an artifact reads rows and computes."""
    parser.add_argument("artifact", help="a model directory, such as runs/demo/05_quantize/model")
    parser.add_argument("--tta", choices=["swap", "none"], help="average both orders of a pair, or not")
    parser.add_argument("--no-calibration", action="store_true", help="probabilities as the model gives them")
    parser.add_argument("--batch-tokens", type=int, default=16384, metavar="N", help="tokens of one batch")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="of a row, if not as it was trained")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the Python code that lies in the artifact"
    )
    parser.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="FIELD=COLUMN",
        help='where a field stands in the file, e.g. text="Review body"; may be repeated',
    )


def artifact_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """These flags as keyword arguments of `llmkd.predicting`."""
    return {
        "tta": arguments.tta,
        "calibrated": not arguments.no_calibration,
        "batch_tokens": arguments.batch_tokens,
        "precision": arguments.precision,
        "max_tokens": arguments.max_tokens,
        "trust_remote_code": arguments.trust_remote_code,
        "columns": pairs(arguments.column, "--column", "FIELD=COLUMN"),
    }


def pairs(given: Sequence[str], flag: str, form: str) -> dict[str, str]:
    """KEY=VALUE words as a dict; the first = parts them. Raises ConfigError."""
    from llmkd.errors import ConfigError

    for word in given:
        if not word.partition("=")[0] or not word.partition("=")[2]:
            raise ConfigError(f"{flag} {word!r}: write {flag} {form}")
    return {key: value for key, _, value in (word.partition("=") for word in given)}


def lines(data: Mapping[str, Any]) -> str:
    """A flat result for people: a line a fact, what is nested one further in."""
    shown = []
    for key, value in data.items():
        if isinstance(value, Mapping):
            shown += [f"{key}:", *(f"  {line}" for line in lines(value).splitlines())]
        else:
            told = "none" if value is None else round(value, 4) if isinstance(value, float) else value
            shown.append(f"{key}: {told}")
    return "\n".join(shown)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns of words, each as wide as its widest."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
