"""Stage 04: the folds' adapters and heads averaged into one fresh float base, and calibrated out of fold."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from llmkd import description, libraries, ranks, units
from llmkd.inputs import base, prepared
from llmkd.loading import load_base
from llmkd.schema import Config
from llmkd.stage import main, say


def merge(config: Config, arguments: Namespace) -> None:
    if not ranks.is_main():
        return
    recipe = units.merged(config)
    if recipe.stands:
        return say(f"{recipe.directory}: done")
    libraries.load(libraries.WEIGHTS)
    folds = [student.directory for student in units.students(config)]
    with recipe.writing(config.seed, alone=True) as unit:
        model = unit.path / "model"
        write_model(config, base(config, config.student)[0], [fold / "adapter" for fold in folds], model)
        found = calibrated(config, folds)
        labels = [] if config.task.kind == "causal_lm" else prepared(config)[1]
        description.write(model, recipe.settings["description"], labels, found.get("temperature"))
        unit.metrics.update({"calibration": found} if found else {})
        if config.quantize is None:
            from llmkd.card import of_config, write_card

            write_card(model, **of_config(config, labels))
    say(f"{recipe.directory}: {len(folds)} folds merged by {config.merge.how}")


def write_model(config: Config, source: str, folds: list[Path], directory: Path) -> None:
    """The folds in a fresh float base, beside what turns rows into its inputs and any exits' heads."""
    from llmkd.merge import merge_folds
    from llmkd.models.exits import FILE, mean_exits, write_exits
    from llmkd.models.load import DTYPES

    model, reader = load_base(config, config.student, source, prepared(config)[1], "fp32")
    merge_folds(model, folds, config.merge.how)
    model.to(DTYPES[config.merge.dtype]).save_pretrained(directory)
    if config.student.is_net:
        from llmkd import features

        features.save(reader, directory)
    else:
        reader.save_pretrained(directory)
    if all((fold / FILE).is_file() for fold in folds):
        write_exits(mean_exits(folds), directory)


def calibrated(config: Config, folds: list[Path]) -> dict[str, Any]:
    """`llmkd.calibration.calibrate` by the folds' logits; {} of a language model, which leaves none."""
    if config.task.kind == "causal_lm":
        return {}
    from llmkd.calibration import calibrate

    table, labels, _ = prepared(config)
    return calibrate(table, [fold / "logits.parquet" for fold in folds], labels)


if __name__ == "__main__":
    assert __doc__
    main(merge, __doc__)
