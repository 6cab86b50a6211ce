"""What a config would take: memory, time and disk, before anything is trained."""

import argparse

from llmkd.cli.options import Answer, config_flags, override_words, pairs


def add_flags(parser: argparse.ArgumentParser) -> None:
    config_flags(parser)
    override_words(parser)
    parser.add_argument("--devices", type=int, default=8, metavar="N", help="how many accelerators (8)")
    parser.add_argument("--memory-gb", type=float, default=80, metavar="GB", help="of one of them (80)")
    parser.add_argument("--tflops", type=float, default=312, help="of one of them, at its peak in bf16 (312)")
    parser.add_argument("--efficiency", type=float, default=0.4, help="the share of it that is reached (0.4)")
    parser.add_argument(
        "--rows",
        action="append",
        default=[],
        metavar="KEY=N",
        help="rows of a file that is not at hand, e.g. task.train=57477; may be repeated",
    )


def answer(arguments: argparse.Namespace) -> Answer:
    from llmkd import planning
    from llmkd.config import load
    from llmkd.errors import ConfigError

    rows = pairs(arguments.rows, "--rows", "KEY=N")
    wrong = [f"{key}={count}" for key, count in rows.items() if not count.isdecimal()]
    if wrong:
        raise ConfigError(f"--rows {wrong[0]}: write --rows KEY=N, e.g. task.train=57477")
    plan = planning.plan(
        load(arguments.config, arguments.overrides),
        devices=arguments.devices,
        memory_gb=arguments.memory_gb,
        tflops=arguments.tflops,
        efficiency=arguments.efficiency,
        rows={key: int(count) for key, count in rows.items()},
    )
    return Answer(plan, planning.table(plan))
