"""The run's YAML: closed, typed, every problem at once, and dotted overrides."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_config import MINIMAL, problems

from llmkd.config import load, parse
from llmkd.errors import ConfigError
from llmkd.schema import Config


def test_minimal_config_and_its_defaults() -> None:
    config = parse(MINIMAL)
    assert config.distill.terms == {"ce": 1, "kl": 1, "cosine": 1}
    assert (config.distill.view, config.distill.temperature, config.distill.normalize) == (
        "in_sample",
        1,
        True,
    )
    assert (config.distill.learning_rate, config.distill.epochs) == (5e-5, 2)
    assert (config.teachers[0].learning_rate, config.teachers[0].epochs) == (1e-5, 1)
    assert config.teachers[0].lora is not None
    assert (config.teachers[0].lora.r, config.teachers[0].lora.alpha, config.teachers[0].lora.dropout) == (
        64,
        128,
        0.05,
    )
    assert config.quantize is not None
    assert (config.quantize.bits, config.quantize.group_size) == (8, 128)
    assert [model.name for model in config.models] == ["llama", "gemma"]


def test_every_problem_is_told_at_once_with_path_and_value() -> None:
    found = problems(
        MINIMAL,
        "folds.count=0",
        "teachers.llama.epochs=-1",
        "student.load_in=fp7",
        "distill.terms={kl: 1, jensen: 2}",
        "quantize.bits=3",
        "task.kind=poetry",
        "merge.howw=delta",
    )
    expected = {
        "folds.count = 0": "greater than or equal to 1",
        "teachers.0.epochs = -1": "greater than 0",
        "student.load_in = 'fp7'": "'nf4'",
        "distill: terms": "unknown ['jensen']; known are",
        "quantize.bits = 3": "4 or 8",
        "task.kind = 'poetry'": "'preference'",
        "merge.howw = 'delta'": "not permitted",
    }
    assert len(found) == len(expected)
    for where, why in expected.items():
        assert [line for line in found if line.startswith(f"run.yaml: {where}") and why in line], (
            where,
            found,
        )


@pytest.mark.parametrize(
    "where", ["", "task.", "folds.", "student.", "student.lora.", "distill.", "teachers.llama."]
)
def test_unknown_keys_are_refused_everywhere(where: str) -> None:
    found = problems(MINIMAL, f"{where}epocs=3")
    assert len(found) == 1
    assert f"{where}epocs = 3: Extra inputs".replace("llama", "0") in found[0]


@pytest.mark.parametrize("missing", ["run", "task", "student"])
def test_required_keys(missing: str) -> None:
    data = {key: value for key, value in yaml.safe_load(MINIMAL).items() if key != missing}
    assert problems(yaml.safe_dump(data)) == [f"run.yaml: {missing}: Field required"]


def test_a_student_s_own_terms_go_over_the_section_s() -> None:
    config = parse(MINIMAL, ["distill.terms={ce: 0.5, cosine: 0}", "student.distill.terms={kl: 2}"])
    assert config.distill_of(config.student).terms == {"ce": 0.5, "kl": 2, "cosine": 0}


def test_phases_keep_what_they_do_not_name() -> None:
    config = parse(
        MINIMAL, ["distill.phases=[{terms: {kl: 0}}, {epochs: 5, rows: [train]}]", "distill.terms.ce=2"]
    )
    first, second = config.distill.in_phases()
    assert first.terms == {"ce": 2, "kl": 0, "cosine": 1}
    assert (first.epochs, second.epochs, second.rows) == (2, 5, ["train"])
    assert second.terms == {"ce": 2, "kl": 1, "cosine": 1}


def test_student_and_students_are_not_both_given() -> None:
    assert "give student: or students:, not both" in problems(MINIMAL + "students: [{name: x, model: y}]")[0]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "student.init={architecture: llama}",
            "student: give exactly one of model: (a checkpoint) and init:",
        ),
        ("student.model=null", "student: give exactly one of"),
        (
            "teachers.0={name: a, model: b, lora: null, load_in: nf4}",
            "teachers.0: a base in nf4 cannot be trained",
        ),
        (
            "teachers.0={name: a, model: b, lora: null, load_in: int8}",
            "teachers.0: a base in int8 cannot be trained",
        ),
        ("student.name=../escape", "student.name = '../escape': use letters, digits"),
        ("student.name=a b", "student.name = 'a b': use letters"),
        ("student.name=", "student.name = None"),
        ("teachers=[]", "teachers: none, and distill.method = 'cached' learns from at least one"),
        ("distill.terms={ce: 0, kl: 0, cosine: 0}", "must not all be 0"),
        ("distill.betas=[1.5, 0.9]", "distill.betas.0 = 1.5"),
        ("quantize.group_size=0", "quantize.group_size = 0"),
        ("quantize.group_size=48", "quantize.group_size = 48"),
        ("pretrain=[{data: d, load_in: nf4}]", "a base in nf4 cannot be trained in full"),
        ("distill.terms={ce: 2, kl: -1}", "terms: weights must be 0 or more"),
        ("distill.terms={ce: .inf}", "distill.terms.ce = inf"),
        ("distill.terms={ce: .nan}", "distill.terms.ce = nan"),
        ("distill.temperature=0", "temperature: must be above 0"),
        ("distill.temperature={llama: -1}", "temperature: must be above 0"),
        ("distill.teacher_weights={llama: -1}", "teacher_weights: must be 0 or more"),
        ("distill.learning_rate=.nan", "distill.learning_rate = nan"),
        ("distill.deepspeed=no/such.json", "distill.deepspeed = 'no/such.json': no such file"),
        ("seed=-1", "seed = -1"),
        ("task.labels=[only]", "task.labels = ['only']"),
        ("task.labels=[false, 'yes']", "task.labels.0 = False"),  # a bare no is false in YAML 1.1
    ],
)
def test_single_faults(override: str, message: str) -> None:
    found = problems(MINIMAL, override)
    assert len(found) == 1
    assert message in found[0]


def value_at(config: Config, path: str) -> Any:
    here: Any = config.model_dump()
    for part in path.split("."):
        here = here[int(part)] if isinstance(here, list) else here[part]
    return here


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("distill.epochs=3", "distill.epochs", 3.0),  # a section the file leaves out
        ("teachers.0.epochs=3", "teachers.0.epochs", 3.0),
        ("teachers.llama.lora.r=8", "teachers.0.lora.r", 8),
        ("teachers.0={name: a, model: b}", "teachers.0.name", "a"),
        ("distill.temperature.llama=2", "distill.temperature.llama", 2.0),
        ("distill.learning_rate=1e-4", "distill.learning_rate", 1e-4),
        ("distill.terms={ce: 1e-4}", "distill.terms.ce", 1e-4),
        (
            "student.init={architecture: llama, config: {rms_norm_eps: 1e-6}}",
            "students.0.init.config.rms_norm_eps",
            1e-6,
        ),
        ("task.swap=true", "task.swap", True),
        (
            "task.template='{prompt}=x{response_a}{response_b}'",
            "task.template",
            "{prompt}=x{response_a}{response_b}",
        ),
        ("quantize=null", "quantize", None),
        ("run=runs/y", "run", "runs/y"),
    ],
)
def test_overrides(override: str, path: str, value: Any) -> None:
    extra = ["student.model=null"] if "student.init" in override else []
    found = value_at(parse(MINIMAL, [override, *extra]), path)
    assert found == value
    assert type(found) is type(value)


def test_overrides_go_in_order_and_into_an_empty_section() -> None:
    assert parse(MINIMAL + "distill:\n", ["distill.epochs=3", "distill.epochs=4"]).distill.epochs == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("epochs", "write key.subkey=value"),
        ("=3", "write key.subkey=value"),
        ("distill.epochs=[1", "the value is not YAML"),
        ("teachers.qwen.epochs=1", "no item 'qwen' among 1 (['llama'])"),
        ("teachers.1.epochs=1", "no item '1' among 1"),
        ("teachers.-1.epochs=1", "no item '-1'"),
        ("run.x.y=1", "run holds 'runs/x', which has no keys"),
    ],
)
def test_bad_overrides_are_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(MINIMAL, [override])
    assert repr(override) in str(error.value)
    assert message in str(error.value)


def test_an_override_into_a_null_item_is_refused() -> None:
    with pytest.raises(ConfigError, match="which has no keys"):
        parse(MINIMAL.replace("[{name: llama, model: meta/llama}]", "[null]"), ["teachers.0.epochs=1"])


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "not YAML"), ("- 1", "found list"), ("", "found NoneType")]
)
def test_text_that_is_no_config(text: str, message: str) -> None:
    found = problems(text)
    assert len(found) == 1
    assert message in found[0]


@pytest.mark.parametrize("number", ["1e-4", "1E-4", "1.0e-4", "0.0001", "+1e-4"])
def test_scientific_numbers_are_numbers_with_or_without_a_dot(number: str) -> None:
    text = MINIMAL.replace("model: google/gemma", f"init: {{architecture: llama, config: {{eps: {number}}}}}")
    found = parse(text).student.init
    assert found is not None
    assert found.config["eps"] == 1e-4


def test_load_reads_a_file_and_names_a_missing_one(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL, encoding="utf-8")
    assert load(path, ["seed=3"]).seed == 3
    with pytest.raises(ConfigError, match=r"none\.yaml: no such config file"):
        load(tmp_path / "none.yaml")


def test_a_config_cannot_be_changed_afterwards() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parse(MINIMAL).distill.epochs = 9  # type: ignore[misc]


def test_training_is_what_a_trainer_takes_and_no_more() -> None:
    config = parse(MINIMAL, ["teachers.llama.epochs=3"])
    assert config.teachers[0].training()["epochs"] == 3
    assert "method" not in config.distill.training()
    assert config.distill.training().keys() == config.teachers[0].training().keys()


def test_terms_that_are_not_named_keep_their_weight() -> None:
    assert parse(MINIMAL, ["distill.terms.kl=2"]).distill.terms == {"ce": 1, "kl": 2, "cosine": 1}
    assert parse(MINIMAL, ["distill.terms={}"]).distill.terms == {"ce": 1, "kl": 1, "cosine": 1}


def test_a_class_called_no_is_no_boolean() -> None:
    text = "run: on\ntask: {kind: classification, train: t, labels: [no, yes], swap: false}\n"
    config = parse(text + "teachers: [{name: a, model: b}]\nstudent: {name: c, model: d}", ["run=off"])
    assert (config.run, config.task.labels, config.task.swap) == ("off", ["no", "yes"], False)
