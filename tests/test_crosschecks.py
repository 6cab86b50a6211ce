"""What no single field of a config can know: refused with its place and value, or let pass."""

import json
from pathlib import Path

import pytest
from tiny_config import MINIMAL, problems

from llmkd.config import parse


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
        (
            ["teachers.llama.average_shifts=1"],
            "llama.average_shifts = 1: averages over images, but task.kind is preference; remove it",
        ),
        (
            [
                "task={kind: image, train: t, labels: [a, b], image: {shape: [2, 2]}}",
                "teachers=[{name: t, init: {architecture: llmkd-mlp}, average_shifts: 1}]",
                "student={name: s, init: {architecture: llmkd-mlp}}",
                "distill.method=online",
                "quantize=null",
            ],
            "t.average_shifts = 1: online reads no cached logits; remove it, or set",
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


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({}, None),
        (
            {"hidden_size": 100, "num_attention_heads": 4},
            "multiples of 32, and hidden_size of {} is 100; choose another model, or set quantize: null",
        ),
        ({"intermediate_size": 192}, "group_size = 128: must divide intermediate_size of {} = 192"),
        ({"intermediate_size": 192, "num_experts": 8}, None),  # the width of its experts, which are kept
        ({"intermediate_size": 192, "num_local_experts": 8}, None),
        ({"num_key_value_heads": 1, "head_dim": 16}, "num_key_value_heads x head_dim of {} is 16; choose"),
        (
            {"num_attention_heads": 12, "head_dim": 16},
            "must divide num_attention_heads x head_dim of {} = 192",
        ),
        ({"num_key_value_heads": 2, "head_dim": 32}, None),  # nothing reads keys or values by groups
    ],
)
def test_a_directory_s_widths_are_refused_with_the_config(
    sizes: dict[str, int], message: str | None, tmp_path: Path
) -> None:
    """As those of `init:` are: by its config.json, without a weight."""
    file = tmp_path / "config.json"
    whole = {"model_type": "llama", "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8}
    file.write_text(json.dumps({**whole, **sizes}))
    asked = f"student.model={tmp_path}"
    assert parse(MINIMAL, [asked, "quantize=null"])
    if message is None:
        assert parse(MINIMAL, [asked])
        return
    (found,) = problems(MINIMAL, asked)
    assert message.format(file) in found


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, '{"hidden_size": "wide"}'], ids=range(4))
def test_a_directory_that_tells_no_width_is_left_to_stage_01(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    assert parse(MINIMAL, [f"student.model={tmp_path}"])


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


def test_a_default_in_place_of_a_faulty_value_is_no_fault() -> None:
    tiny = "student={name: s, init: {architecture: llama, config: {hidden_size: 32}}}"
    for fault in ("quantize.group_size=48", "quantize=7"):
        found = problems(MINIMAL, tiny, fault, "evaluate.tta=swap")
        assert [line.partition(" = ")[0] for line in found] == [
            f"run.yaml: {fault.partition('=')[0]}",
            "run.yaml: evaluate.tta",
        ]


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
