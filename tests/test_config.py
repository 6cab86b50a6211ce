"""The run's YAML: closed, typed, every problem at once, and dotted overrides."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from jsonschema import Draft202012Validator

from llmkd.config import json_schema, load, parse
from llmkd.errors import ConfigError
from llmkd.reference import pages
from llmkd.schema import Config

MINIMAL = """
run: runs/x
task: {kind: preference, train: train.parquet}
teachers: [{name: llama, model: meta/llama}]
student: {name: gemma, model: google/gemma}
"""


def problems(text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as error:
        parse(text, overrides, source="run.yaml")
    return str(error.value).split("\n")


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


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["student.name=llama"], "names ['llama', 'llama'] must differ"),
        (["folds.count=1", "distill.view=oof"], "distill.view = 'oof': needs folds.count of 2 or more"),
        (["views=[oof]"], "views = ['oof']: the student reads 'in_sample'"),
        (["views=[in_sample]", "distill.view=oof"], "views = ['in_sample']: the student reads 'oof'"),
        (["distill.teacher_weights={qwen: 1}"], "distill.teacher_weights.qwen: no teacher of that name"),
        (["distill.temperature={qwen: 1}"], "distill.temperature.qwen: no teacher of that name"),
        (
            ["distill.teacher_weights={llama: 0}", "distill.terms={ce: 0, kl: 1}"],
            "distill.teacher_weights: all 0",
        ),
        (["pretrain=[{data: d, models: [mistral]}]"], "pretrain.0.models: no model named 'mistral'"),
        (["evaluate.tta=swap"], "evaluate.tta = 'swap': needs task.swap: true"),
        (
            ["task.kind=classification", "task.labels=[n, p]", "task.swap=true"],
            "task.swap = True: only preference",
        ),
        (["task.kind=classification"], "task.labels: name the classes in order"),
        (["task.columns={promt: q}"], "task.columns.promt: no such field"),
        (["task.max_words={answer: 9}"], "task.max_words.answer: no such field"),
        (["task.template='{prompt} {answer}'"], "task.template: template names the unknown field {answer}"),
        (["task.template='{prompt} {response_a}'"], "task.template: template lacks the field {response_b}"),
        (
            ["task.transfer=null", "distill.phases=[{rows: [transfer]}]"],
            "phases.0.rows: 'transfer', but there",
        ),
        (["distill.phases=[{terms: {ce: 0, kl: 0, cosine: 0}}]"], "terms: weights must not all be 0"),
        (["distill.method=mutual"], "distill.method = 'mutual': needs peers"),
        (["peers=[{name: p, model: m}]"], "peers: only distill.method: mutual trains them"),
        (["teachers.llama.shift=2"], "llama.shift = 2: moves images, but task.kind is preference; remove it"),
        (
            [
                "task={kind: image, train: t, labels: [a, b], image: {shape: [2, 2]}}",
                "teachers=[]",
                "student={name: s, init: {architecture: llmkd-mlp}}",
                "peers=[{name: p, init: {architecture: llmkd-mlp}, shift: 1}]",
                "distill.method=mutual",
                "quantize=null",
            ],
            "p.shift = 1: a peer sees the student's images; set student.shift",
        ),
        (["distill.method=feature"], "distill.features: belong to method: feature"),
        (
            ["distill.method=online", "distill.view=oof"],
            "distill.view = 'oof': an online teacher is the fold's own",
        ),
        (
            ["student.teachers=[gemma]"],
            "student.teachers: 'gemma' is not trained before 'gemma': a chain in a circle",
        ),
        (["student.teachers=[nobody]"], "student.teachers: no teacher or earlier student named 'nobody'"),
        (["student.distill={epocs: 1}"], "student.distill.epocs: Extra inputs"),
        (["distill.params={jsd: {beta: 0.5}}"], "params: ['jsd'] are no terms of a weight above 0"),
        (["distill.weighting=fitted", "folds.count=1"], "distill.weighting = 'fitted': needs out-of-fold"),
        (
            ["distill.weighting=fitted", "distill.teacher_weights={llama: 2}"],
            "are what weighting: fitted finds",
        ),
        (["distill.weighting=fitted", "distill.method=online"], "fits cached logits, not teachers that run"),
        (
            ["distill.teacher_weights={llama: 0}", "distill.phases=[{terms: {ce: 0}}]"],
            "distill.phases.0.terms = {'ce': 0.0, 'kl': 1.0, 'cosine': 1.0}: refers to no teacher",
        ),
        (["task.features={numeric: [x]}"], "task.features: belongs to kind: tabular"),
        (["task.labels=[x, x]"], "task.labels = ['x', 'x']: names must differ"),
        (
            ["student.model=null", "student.init={architecture: llama, config: {hidden_size: 48}}"],
            "GPTQ packs multiples of 32, and the student's init.config.hidden_size is 48; choose one",
        ),
        (
            ["student.model=null", "student.init={architecture: bert, config: {intermediate_size: 64}}"],
            "quantize.group_size = 128: must divide the student's init.config.intermediate_size = 64",
        ),
    ],
)
def test_crosschecks(overrides: list[str], message: str) -> None:
    found = problems(MINIMAL, *overrides)
    assert len(found) == 1
    assert message in found[0]


CHAIN = MINIMAL.replace(
    "student: {name: gemma, model: google/gemma}",
    """students:
- {name: big, model: b}
- {name: small, model: s, teachers: [%s]}
""",
)


def test_a_chain_runs_one_way() -> None:
    config = parse(CHAIN % "llama, big", ["distill.epochs=3", "students.small.distill.epochs=7"])
    assert [config.teachers_of(student) for student in config.students] == [["llama"], ["llama", "big"]]
    assert [config.distill_of(student).epochs for student in config.students] == [3, 7]
    assert config.student.name == "small"
    found = problems(CHAIN.replace("model: b", "model: b, teachers: [small]") % "big")
    assert len(found) == 1
    assert "students.0.teachers: 'small' is not trained before 'big': a chain in a circle" in found[0]


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


def test_a_default_in_place_of_a_faulty_value_is_no_fault() -> None:
    tiny = "student={name: s, init: {architecture: llama, config: {hidden_size: 32}}}"
    for fault in ("quantize.group_size=48", "quantize=7"):
        found = problems(MINIMAL, tiny, fault, "evaluate.tta=swap")
        assert [line.partition(" = ")[0] for line in found] == [
            f"run.yaml: {fault.partition('=')[0]}",
            "run.yaml: evaluate.tta",
        ]


def test_student_and_students_are_not_both_given() -> None:
    assert "give student: or students:, not both" in problems(MINIMAL + "students: [{name: x, model: y}]")[0]


def test_several_crosschecks_are_told_at_once() -> None:
    assert len(problems(MINIMAL, "student.name=llama", "evaluate.tta=swap", "quantize.group_size=0")) == 3


@pytest.mark.parametrize(
    "overrides",
    [
        ["folds.count=1"],
        ["folds.count=1", "views=[in_sample]"],
        ["distill.view=oof", "views=[oof]"],
        ["distill.teacher_weights={llama: 0}"],
        ["distill.temperature={llama: 4}"],
        ["pretrain=[{data: d, models: [gemma, llama]}]"],
        ["task.swap=true", "evaluate.tta=swap"],
        ["task.kind=classification", "task.labels=[n, p]"],
        ["quantize=null"],
        ["quantize.group_size=-1"],
        ["student={name: s, init: {architecture: llama, config: {hidden_size: 48}}}", "quantize=null"],
        [
            "student={name: s, init: {architecture: llama, config: {hidden_size: 32}}}",
            "quantize.group_size=-1",
        ],
        ["student.lora=null", "student.load_in=bf16"],
    ],
)
def test_what_the_crosschecks_must_let_pass(overrides: list[str]) -> None:
    parse(MINIMAL, overrides)


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


def test_json_schema_is_closed_and_knows_the_machine_fields() -> None:
    schema = Config.model_json_schema()
    assert schema["additionalProperties"] is False
    assert set(schema["required"]) == {"run", "task", "students"}
    assert schema["$defs"]["Distill"]["properties"]["batch_tokens"]["machine"] is True


def test_training_is_what_a_trainer_takes_and_no_more() -> None:
    config = parse(MINIMAL, ["teachers.llama.epochs=3"])
    assert config.teachers[0].training()["epochs"] == 3
    assert "method" not in config.distill.training()
    assert config.distill.training().keys() == config.teachers[0].training().keys()


def test_terms_that_are_not_named_keep_their_weight() -> None:
    assert parse(MINIMAL, ["distill.terms.kl=2"]).distill.terms == {"ce": 1, "kl": 2, "cosine": 1}
    assert parse(MINIMAL, ["distill.terms={}"]).distill.terms == {"ce": 1, "kl": 1, "cosine": 1}


def test_faults_of_fields_and_across_sections_are_reported_together() -> None:
    found = problems(
        MINIMAL, "folds.count=0", "evaluate.tta=swap", "distill.terms.kl2=1", "distill.temperature=-1"
    )
    for part in (
        "folds.count = 0",
        "evaluate.tta = 'swap'",
        "unknown ['kl2']",
        "temperature: must be above 0",
    ):
        assert sum(part in line for line in found) == 1, (part, found)


SHIPPED = sorted((tiny.ROOT / "configs").glob("*.yaml"))


def refused(text: str) -> list[str]:
    """Where a config file breaks the JSON Schema."""
    errors = Draft202012Validator(json_schema()).iter_errors(yaml.safe_load(text))
    return [".".join(map(str, error.path)) + ": " + error.message for error in errors]


def test_the_json_schema_is_one() -> None:
    Draft202012Validator.check_schema(json_schema())


@pytest.mark.parametrize("path", [*SHIPPED, tiny.CONFIG], ids=lambda path: path.stem)
def test_the_json_schema_takes_every_shipped_config(path: Path) -> None:
    assert refused(path.read_text()) == []


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_an_editor_finds_the_json_schema_from_a_shipped_config(path: Path) -> None:
    first = path.read_text().split("\n")[0]
    assert first.startswith("# yaml-language-server: $schema=")
    assert (path.parent / first.split("=", 1)[1]).resolve() == tiny.ROOT / "docs" / "config.schema.json"


@pytest.mark.parametrize(
    "extra",
    [
        "tracking: wandb",
        "quantize: null",
        "distill: {terms: {kl: 2}, temperature: {llama: 4}, phases: [{epochs: 1}]}",
        "peers: [{name: p, init: {architecture: bert, tokenizer: {vocab_size: 400}}}]",
        "pretrain: [{data: d, lora: {r: 4}}]",
    ],
)
def test_the_json_schema_takes_what_is_read(extra: str) -> None:
    assert refused(f"{MINIMAL}\n{extra}") == []


def test_the_json_schema_takes_short_forms_and_a_chain() -> None:
    text = MINIMAL.replace("train.parquet", "train.parquet, transfer: more.parquet, label: [a, b]")
    chain = "students: [{name: g, model: m}, {name: s, model: m, distill: {epochs: 3}}]"
    assert refused(text.replace("student: {name: gemma, model: google/gemma}", chain)) == []


@pytest.mark.parametrize(
    ("extra", "where"),
    [
        ("epocs: 3", "'epocs' was unexpected"),
        ("distill: {epocs: 3}", "distill: "),
        ("distill: {epochs: 0}", "distill.epochs: "),
        ("folds: {count: 2.5}", "folds.count: "),
        ("quantize: {bits: 3}", "quantize: "),
        ("tracking: paper", "tracking: "),
        ("students: [{name: x, model: y}]", "each of"),
        ("merge: {how: sum}", "merge.how: "),
    ],
)
def test_the_json_schema_refuses_what_is_refused(extra: str, where: str) -> None:
    found = refused(f"{MINIMAL}\n{extra}")
    assert len(found) == 1
    assert where in found[0]
    with pytest.raises(ConfigError):
        parse(f"{MINIMAL}\n{extra}")


def test_the_json_schema_asks_for_a_student() -> None:
    assert len(refused("run: r\ntask: {kind: preference, train: t}")) == 1


def test_every_key_says_what_it_is_for() -> None:
    sections = {"": json_schema(), **json_schema()["$defs"]}
    bare = [
        f"{section}.{key}"
        for section, told in sections.items()
        for key, field in told.get("properties", {}).items()
        if not field.get("description")
    ]
    assert not bare


@pytest.mark.parametrize("name", list(pages()))
def test_the_reference_is_current(name: str) -> None:
    assert (tiny.ROOT / "docs" / name).read_text(encoding="utf-8") == pages()[name], (
        "run: python -m llmkd.reference"
    )


def test_a_class_called_no_is_no_boolean() -> None:
    text = "run: on\ntask: {kind: classification, train: t, labels: [no, yes], swap: false}\n"
    config = parse(text + "teachers: [{name: a, model: b}]\nstudent: {name: c, model: d}", ["run=off"])
    assert (config.run, config.task.labels, config.task.swap) == ("off", ["no", "yes"], False)
