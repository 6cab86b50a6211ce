"""What a unit is made from: fingerprints that change with what matters, and stale inputs refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny

from llmkd import run, units
from llmkd.config import load
from llmkd.errors import RunError
from llmkd.schema import Config
from llmkd.settings import seed_of


def config(directory: Path, *overrides: str) -> Config:
    return load(tiny.CONFIG, [f"run={directory}", *overrides])


def everything(config: Config) -> list[units.Recipe]:
    baseline = units.students(config, "baseline")
    return [*teachers(config, [0, 1]), *units.students(config), *baseline, units.quantized(config)]


def teachers(config: Config, folds: list[int]) -> list[units.Recipe]:
    return [units.teacher(config, which, fold) for which in config.teachers for fold in folds]


def test_a_finished_run_stands(finished: Path) -> None:
    found = config(finished)
    recipes = everything(found)
    assert all(recipe.stands for recipe in recipes)
    digests = units.finished(found, *recipes)
    assert digests["03_distill/gemma-baseline/fold1"] == run.digest(
        finished / "03_distill/gemma-baseline/fold1"
    )


def test_the_machine_changes_nothing(finished: Path) -> None:
    zero = tiny.ROOT / "configs" / "deepspeed" / "zero3.json"
    machine = [
        "distill.batch_tokens=99",
        f"distill.deepspeed={zero}",
        f"teachers.llama.deepspeed={zero}",
        "teachers.qwen.gradient_checkpointing=true",
        "evaluate.batch_tokens=77",
    ]
    assert all(recipe.stands for recipe in everything(config(finished, *machine)))


@pytest.mark.parametrize(
    ("override", "make", "stale"),
    [
        ("teachers.qwen.learning_rate=1", lambda c: units.students(c), "02_teachers/qwen/fold0"),
        ("teachers.qwen.lora.r=2", lambda c: units.students(c), "02_teachers/qwen/fold0"),
        ("task.template='{prompt}{response_a}{response_b}'", units.students, "01_pretrain/gemma"),
        ("student.lora.alpha=1", units.merged, "03_distill/gemma/fold0"),
        ("distill.terms.kl=2", units.merged, "03_distill/gemma/fold0"),
        ("distill.view=oof", units.quantized, "03_distill/gemma/fold0"),
        ("merge.how=factors", units.quantized, "04_merge"),
        ("pretrain.0.epochs=7", units.merged, "01_pretrain/gemma"),
        ("pretrain.1.epochs=7", lambda c: teachers(c, [0]), "01_pretrain/qwen"),
        ("folds.group=null", lambda c: teachers(c, [0]), "00_prepare"),
        ("precision=bf16", lambda c: teachers(c, [0]), "01_pretrain/llama"),
        ("seed=9", lambda c: teachers(c, [0]), "00_prepare"),
    ],
)
def test_an_input_of_another_config_is_refused_with_its_command(
    override: str, make: Callable[[Config], object], stale: str, finished: Path
) -> None:
    with pytest.raises(RunError, match=r"\A[^\n]*made from another config[^\n]*\Z") as error:
        make(config(finished, override))
    assert str(finished / stale) in str(error.value)
    assert f"run: python stages/{stale.split('/')[0]}.py" in str(error.value)


def test_a_model_made_from_other_rows_is_refused(copy: Path) -> None:
    """Its tokenizer was trained on them, and its pretraining pairs were held against their test rows."""
    changed = ["task.test=arena:rows=44,seed=9"]
    assert tiny.stage("00_prepare", f"run={copy}", *changed) == 0
    with pytest.raises(RunError, match=r"01_pretrain/llama: made from other rows; run: python stages/01"):
        teachers(config(copy, *changed), [0])


def test_models_that_start_alike_are_no_clones() -> None:
    twin = "peers=[{name: twin, init: {architecture: llama, config: {hidden_size: 8}}}, "
    twin += "{name: other, init: {architecture: llama, config: {hidden_size: 8}}}]"
    found = config(Path("x"), twin, "distill.method=mutual")
    assert [seed_of(found, model) for model in found.models] == [3, 3, 3, 3, 4]


def test_a_baseline_is_made_from_no_teacher(finished: Path) -> None:
    def baseline(*overrides: str) -> units.Recipe:
        asked = config(finished, *overrides)
        return units.student(asked, asked.student, "baseline", 0)

    found = baseline()
    assert set(found.inputs) == {"00_prepare", "01_pretrain/gemma"}
    assert baseline("distill.terms.kl=2").stands
    assert not baseline("distill.epochs=3").stands


def test_whether_there_is_a_baseline_changes_no_student(finished: Path) -> None:
    assert all(student.stands for student in units.students(config(finished, "distill.baseline=false")))


@pytest.mark.parametrize(
    ("overrides", "folds"),
    [
        (["distill.view=in_sample"], [1]),
        (["distill.view=oof"], [0, 2, 3]),
        (["distill.weighting=fitted"], [1, 0, 2, 3]),
    ],
)
def test_a_student_s_inputs_are_the_teachers_of_its_view(
    overrides: list[str], folds: list[int], tmp_path: Path
) -> None:
    asked = config(tmp_path, *overrides, "folds.count=4")
    assert units.read_from(asked, 1, asked.distill) == folds
