"""Stage 04: the folds' adapters and heads averaged into one fresh float base."""

from argparse import Namespace
from pathlib import Path

from llmkd import ranks, units
from llmkd.config import Config
from llmkd.stage import base, main, prepared, say


def merge(config: Config, arguments: Namespace) -> None:
    if not ranks.is_main():
        return
    recipe = units.merged(config)
    if recipe.stands:
        return say(f"{recipe.directory}: done")
    adapters = [student.directory / "adapter" for student in units.students(config)]
    with recipe.writing(config.seed, alone=True) as unit:
        write_model(config, base(config, config.student)[0], adapters, unit.path / "model")
    say(f"{recipe.directory}: {len(adapters)} folds merged by {config.merge.how}")


def write_model(config: Config, source: str, adapters: list[Path], directory: Path) -> None:
    from llmkd.merge import merge_folds
    from llmkd.models.load import DTYPES, load_classifier, load_tokenizer

    tokenizer = load_tokenizer(source, config.student.pad_token)
    model = load_classifier(
        source,
        prepared(config)[1],
        load_in="fp32",
        pad_id=int(tokenizer.pad_token_id),  # type: ignore[arg-type]
        seed=config.seed,
    )
    merge_folds(model, adapters, config.merge.how)
    model.to(DTYPES[config.merge.dtype]).save_pretrained(directory)  # type: ignore[arg-type]
    tokenizer.save_pretrained(directory)


if __name__ == "__main__":
    assert __doc__
    main(merge, __doc__)
