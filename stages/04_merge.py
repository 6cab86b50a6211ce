"""Stage 04: the folds' adapters and heads averaged into one fresh float base."""

from argparse import Namespace
from pathlib import Path

from llmkd import ranks, run
from llmkd.config import Config, science
from llmkd.stage import DISTILL, MERGE, base, command, main, model_settings, prepared, say


def merge(config: Config, arguments: Namespace) -> None:
    if not ranks.is_main():
        return
    student, directory = config.student, Path(config.run) / MERGE
    folds = {
        f"{DISTILL}/{student.name}/fold{fold}": Path(config.run) / DISTILL / student.name / f"fold{fold}"
        for fold in range(config.folds.count)
    }
    for fold in folds.values():
        run.manifest(fold, command(config, DISTILL))
    source, inputs = base(config, student)
    inputs = {**inputs, **{name: run.digest(fold) for name, fold in folds.items()}}
    settings = {"merge": science(config.merge), "student": model_settings(student)}
    if run.stands(directory, run.fingerprint(MERGE, settings, inputs)):
        return say(f"{directory}: done")
    with run.writing(directory, MERGE, settings, inputs, config.seed, alone=True) as unit:
        write_model(config, source, [fold / "adapter" for fold in folds.values()], unit.path / "model")
    say(f"{directory}: {len(folds)} folds merged by {config.merge.how}")


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
