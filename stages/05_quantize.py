"""Stage 05: the merged student in 8 (or 4) bits by GPTQ, calibrated on training rows."""

import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

from llmkd import libraries, ranks, units
from llmkd.inputs import MERGE, prepared
from llmkd.schema import Config
from llmkd.settings import text_settings
from llmkd.stage import main, say


def quantize(config: Config, arguments: Namespace) -> None:
    if not ranks.is_main():
        return
    if config.quantize is None:
        return say("quantize: null, nothing to do; 04_merge/model is the artifact")
    recipe = units.quantized(config)
    if recipe.stands:
        return say(f"{recipe.directory}: done")
    libraries.load(libraries.WEIGHTS)
    from llmkd.description import FILE
    from llmkd.models import exits

    merged = Path(config.run) / MERGE / "model"
    with recipe.writing(config.seed, alone=True) as unit:
        facts = write_model(config, merged, unit.path / "model", unit.checkpoints / "gptq")
        unit.metrics.update(facts)
        # what it says of itself, its temperature included; the exits' heads stay in float, as its own does
        for name in (FILE, exits.FILE):
            if (merged / name).is_file():
                shutil.copy(merged / name, unit.path / "model" / name)
    say(
        f"{recipe.directory}: {facts['layers']} layers, weights off by {facts['weight_error_mean']:.2%} on "
        f"average; {facts['bytes_before']:,} bytes before, {facts['bytes_after']:,} after"
    )


def write_model(config: Config, merged: Path, directory: Path, checkpoints: Path) -> dict[str, Any]:
    from llmkd.card import of_config, write_card
    from llmkd.quantize import quantize_gptq

    assert config.quantize
    asked = config.quantize
    facts = quantize_gptq(
        merged,
        directory,
        calibration(config, merged),
        bits=asked.bits,
        group_size=asked.group_size,
        desc_act=asked.desc_act,
        trust_remote_code=config.student.trust_remote_code,
        checkpoints=checkpoints,
    )
    write_card(directory, **of_config(config, prepared(config)[1]))
    return facts


def calibration(config: Config, merged: Path) -> list[list[int]]:
    """Token ids of training rows, drawn by the run's seed; test rows never calibrate."""
    import numpy as np

    from llmkd import tasks
    from llmkd.models.load import load_tokenizer
    from llmkd.tasks.template import encoder

    assert config.quantize
    if config.task.kind == "causal_lm":
        from llmkd import lm

        return lm.calibration(config, merged)
    table, _, _ = prepared(config)
    train = np.flatnonzero(table["part"].to_numpy() == "train")
    count = min(config.quantize.calibration_rows, len(train))
    rows = np.sort(np.random.default_rng(config.seed).choice(train, count, replace=False))
    assert config.task.kind in tasks.KINDS
    tokenizer = load_tokenizer(str(merged), trust_remote_code=config.student.trust_remote_code)
    encode = encoder(tokenizer, config.task.kind, **text_settings(config, config.student))
    return encode(table.take(rows).to_pylist())


if __name__ == "__main__":
    assert __doc__
    main(quantize, __doc__)
