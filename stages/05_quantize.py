"""Stage 05: the merged student in 8 (or 4) bits by GPTQ, calibrated on training rows."""

import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

from llmkd import ranks, units
from llmkd.schema import Config
from llmkd.stage import MERGE, main, prepared, say, text_settings


def quantize(config: Config, arguments: Namespace) -> None:
    if not ranks.is_main():
        return
    if config.quantize is None:
        return say("quantize: null, nothing to do; 04_merge/model is the artifact")
    recipe = units.quantized(config)
    if recipe.stands:
        return say(f"{recipe.directory}: done")
    from llmkd.models.exits import FILE

    merged = Path(config.run) / MERGE / "model"
    with recipe.writing(config.seed, alone=True) as unit:
        facts = write_model(config, merged, unit.path / "model")
        unit.metrics.update(facts)
        if (merged / FILE).is_file():  # the exits' heads stay in float, as the model's own does
            shutil.copy(merged / FILE, unit.path / "model" / FILE)
    say(f"{recipe.directory}: {facts}")


def write_model(config: Config, merged: Path, directory: Path) -> dict[str, Any]:
    from llmkd.card import write_card
    from llmkd.quantize import quantize_gptq

    assert config.quantize
    asked, causal = config.quantize, config.task.kind == "causal_lm"
    facts = quantize_gptq(
        merged,
        directory,
        calibration(config, merged),
        bits=asked.bits,
        group_size=asked.group_size,
        desc_act=asked.desc_act,
    )
    distill = config.distill_of(config.student)
    write_card(
        directory,
        title=f"{config.student.name}, distilled, {asked.bits}-bit",
        facts={
            "teachers": ", ".join(config.teachers_of(config.student)),
            "student": config.student.model or config.student.name,
            "teachers' logits": "of next tokens" if causal else distill.view,
            "loss terms": ", ".join(f"{weight:g} {name}" for name, weight in distill.terms.items() if weight),
            "folds merged": config.folds.count,
            "bits": asked.bits,
            "group size": asked.group_size,
            "calibration rows": asked.calibration_rows,
            **({} if causal else {"labels": ", ".join(prepared(config)[1])}),
        },
        base_model=config.student.model,
        bits=asked.bits,
        causal=causal,
    )
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
    tokenizer = load_tokenizer(str(merged))
    encode = encoder(tokenizer, config.task.kind, **text_settings(config, config.student))
    return encode(table.take(rows).to_pylist())


if __name__ == "__main__":
    assert __doc__
    main(quantize, __doc__)
