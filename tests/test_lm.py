"""Sequence distillation through the stages: what is cached, learnt, merged, packed and judged."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from conftest import STAGES
from safetensors.torch import load_file

from llmkd import capture, lm, lm_rows, run
from llmkd.config import load, parse
from llmkd.errors import CacheError, ConfigError, DataError, RunError
from llmkd.generation import evaluate_lm
from llmkd.inputs import base, prepared
from llmkd.layout import Layout
from llmkd.loading import load_model
from llmkd.models.artifact import load_artifact, open_tensors
from llmkd.models.lora import load_trained
from llmkd.settings import text_settings
from llmkd.tasks.arena import texts

SIZES = "num_attention_heads: 2, num_key_value_heads: 2, max_position_embeddings: 64"
CONFIG = """
run: {root}/run
seed: 3
precision: fp32
task: {{kind: causal_lm, train: {root}/train.parquet, test: {root}/test.parquet, max_tokens: 48}}
folds: {{count: 1}}
pretrain:
  - {{objective: causal_lm, data: {root}/train.parquet, models: [big], learning_rate: 3.0e-3, batch_rows: 8}}
teachers:
  - name: big
    init:
      architecture: llama
      config: {{hidden_size: 64, intermediate_size: 64, num_hidden_layers: 2, {sizes}}}
      tokenizer: {{vocab_size: 320}}
student:
  name: small
  init:
    architecture: llama
    config: {{hidden_size: 32, intermediate_size: 32, num_hidden_layers: 1, {tied}, {sizes}}}
    tokenizer: {{vocab_size: 320}}
  lora: null
distill: {{method: sequence, baseline: true, epochs: 1, learning_rate: 3.0e-3, batch_rows: 8}}
merge: {{dtype: fp32}}
quantize: {{bits: 8, group_size: 32, calibration_rows: 8}}
evaluate: {{continuations: 2, new_tokens: 6}}
"""
TIED = "tie_word_embeddings: true"
LEARN, REST = ("02_teachers", "03_distill"), ("03_distill", "04_merge", "06_evaluate")
# one step over all rows that moves nothing: what is logged is the untrained student's
STILL = ("distill.batch_rows=40", "distill.learning_rate=1.0e-30", "distill.baseline=false")
WHOLE = "distill.cache={how: topk, k: 320, bits: 32}"


def go(root: Path, *overrides: str, stages: tuple[str, ...] = STAGES) -> int:
    """The stages of `root`'s run, up to the first that fails; its exit code."""
    for name in stages:
        if code := tiny.stage(name, *overrides, config=root / "lm.yaml"):
            return code
    return 0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All seven stages, once; one training text is a test text too."""
    root = tmp_path_factory.mktemp("lm")
    said = texts(50, 1)
    pd.DataFrame({"text": said[:41]}).to_parquet(root / "train.parquet")
    pd.DataFrame({"text": said[40:50]}).to_parquet(root / "test.parquet")
    (root / "lm.yaml").write_text(CONFIG.format(root=root, sizes=SIZES, tied=TIED))
    assert go(root) == 0
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """The finished run in another place, over the same texts."""
    root = Path(shutil.copytree(made, tmp_path / "copy"))
    config = (made / "lm.yaml").read_text()
    (root / "lm.yaml").write_text(config.replace(f"run: {made}/run", f"run: {root}/run"))
    return root


def tiny_teacher(root: Path) -> str:
    """The config's own teacher, as an override."""
    import yaml

    return json.dumps(yaml.safe_load((root / "lm.yaml").read_text())["teachers"][0])


def metrics(root: Path) -> dict[str, Any]:
    return dict(json.loads((root / "run/06_evaluate/metrics.json").read_text()))


def logged(root: Path) -> dict[str, float]:
    return dict(run.manifest(root / "run/03_distill/small/fold0")["metrics"]["loss"][0])


def rows(root: Path, part: str) -> tuple[Any, Any]:
    config = load(root / "lm.yaml")
    tokenizer = lm.tokenizer_of(config)
    settings = text_settings(config, config.student)
    return lm_rows.examples(prepared(config)[0], tokenizer, part, **settings)[0], tokenizer


def causal(path: Path) -> Any:
    return load_artifact(path, causal=True)[0]


def by_hand(model: Any, teacher: Any, examples: Any) -> tuple[float, float]:
    """Mean cross-entropy and KL(teacher || model) over all next tokens, row by row from whole logits."""
    hard, soft = [], []
    for row in range(len(examples.ids)):
        inputs = examples.inputs(np.array([row]))
        with torch.no_grad():
            q, p = (one(**inputs).logits[0, :-1].double().log_softmax(-1) for one in (model, teacher))
        hard += (-q.gather(1, inputs["input_ids"][0, 1:, None])[:, 0]).tolist()
        soft += (p.exp() * (p - q)).sum(-1).tolist()
    return float(np.mean(hard)), float(np.mean(soft))


def test_rows_are_texts_less_those_of_the_test_part(made: Path) -> None:
    manifest = run.manifest(made / "run/00_prepare")
    assert manifest["rows"] == {"train": 40, "test": 10}
    assert manifest["metrics"]["report"]["leaks"]["dropped"] == 1


def test_the_cache_is_small_and_tells_its_size(made: Path) -> None:
    manifest = run.manifest(made / "run/02_teachers/big/fold0")
    found = manifest["metrics"]
    assert found["tokens"] == rows(made, "train")[0].weights.sum()
    assert found["bytes"] == sum(
        entry["bytes"] for name, entry in manifest["files"].items() if name.endswith(".safetensors")
    )
    assert Layout("sampled", 21, 320).token_bytes < found["bytes_per_token"]


def test_every_model_is_judged(made: Path) -> None:
    found = metrics(made)
    names = ["before", "baseline", "student", "merged", "quantized"]
    for figures in (found["teachers"]["big"], *(found[name] for name in names)):
        assert figures["tokens"] == rows(made, "test")[0].weights.sum()
        assert figures["perplexity"] == pytest.approx(math.exp(figures["nll"]))
        assert figures["tokens_per_second"] > 0
    for name in names:
        assert found[name]["kl/big"] > 0
        assert 0 <= found[name]["agreement/big"] <= 1
    assert found["student"]["perplexity"] < found["before"]["perplexity"]
    assert found["student"] != found["baseline"]
    assert found["merged"]["nll"] == pytest.approx(found["student"]["nll"], rel=1e-6)
    assert found["quantized"]["nll"] == pytest.approx(found["merged"]["nll"], abs=1e-2)
    assert abs(found["drift"]["kl"]) < 1e-3
    assert found["drift"]["agreement"] > 0.9
    assert found["size_bytes"]["quantized"] < found["size_bytes"]["merged"]
    assert len(found["continuations"]) == 2
    for one in found["continuations"]:
        assert set(one["said"]) == {"teacher big", *names}
        assert one["said"]["merged"] == one["said"]["student"]


def test_figures_by_the_plain_formula(made: Path) -> None:
    found, test = metrics(made), rows(made, "test")[0]
    teacher = causal(made / "run/01_pretrain/big/model")
    for name, path in (("before", "01_pretrain/small/model"), ("quantized", "05_quantize/model")):
        nll, divergence = by_hand(causal(made / "run" / path), teacher, test)
        assert found[name]["nll"] == pytest.approx(nll, rel=1e-5)
        assert found[name]["kl/big"] == pytest.approx(divergence, rel=1e-4)


def test_what_is_logged_by_the_plain_formula_cached_and_online(root: Path) -> None:
    """With all words cached at full precision, and with the teacher beside the student."""
    teacher, student = (causal(root / f"run/01_pretrain/{name}/model") for name in ("big", "small"))
    ce, kl = by_hand(student, teacher, rows(root, "train")[0])
    for how in (WHOLE, "distill.cache=null"):
        assert go(root, *STILL, how, "distill.temperature=1", stages=LEARN) == 0
        assert logged(root)["ce"] == pytest.approx(ce, rel=1e-4)
        assert logged(root)["kl/big"] == pytest.approx(kl, rel=1e-3)
        assert logged(root)["loss"] == pytest.approx((ce + kl) / 2, rel=1e-4)


def test_a_cache_of_all_words_teaches_as_the_teacher_itself(root: Path) -> None:
    found = []
    for how in (WHOLE, "distill.cache=null"):
        assert go(root, how, "distill.baseline=false", "quantize=null", stages=("02_teachers", *REST)) == 0
        found.append(metrics(root)["merged"]["nll"])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_an_online_teacher_has_no_unit_and_another_makes_the_student_anew(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(root / "run/02_teachers")
    way = ("distill.cache=null", "distill.baseline=false", "quantize=null")
    assert go(root, *way) == 0
    assert not (root / "run/02_teachers").exists()
    assert "01_pretrain/big" in run.manifest(root / "run/03_distill/small/fold0")["inputs"]
    assert "baseline" not in metrics(root)


def test_two_teachers_of_one_vocabulary_are_cached_apart(root: Path) -> None:
    model = shutil.copytree(root / "run/01_pretrain/big/model", root / "twin")
    twin = f"{{name: twin, model: {model}}}"
    big = tiny_teacher(root)
    way = (f"teachers=[{big}, {twin}]", "distill.teacher_weights={twin: 3}", *STILL, WHOLE)
    assert go(root, *way, stages=LEARN) == 0
    found = logged(root)
    assert found["kl/twin"] == pytest.approx(found["kl/big"], rel=1e-5)
    assert found["loss"] == pytest.approx((found["ce"] + 4 * found["kl/big"]) / 5, rel=1e-4)


def test_the_student_s_own_words_are_judged_by_the_teacher(root: Path) -> None:
    way = ("distill.cache=null", "distill.on_policy=1", "distill.baseline=false", "distill.batch_rows=40")
    assert go(root, *way, stages=("03_distill",)) == 0
    assert "on_policy/kl/big" in logged(root)
    assert "ce" not in logged(root)


def test_a_lora_student_is_merged_and_quantized(root: Path) -> None:
    lora = "student.lora={r: 4, alpha: 8, dropout: 0}"
    assert go(root, lora, stages=STAGES[3:]) == 0
    assert (root / "run/03_distill/small/fold0/adapter/adapter_config.json").is_file()
    found = metrics(root)
    assert found["student"]["nll"] < found["before"]["nll"]
    assert found["merged"]["nll"] == pytest.approx(found["student"]["nll"], rel=1e-5)
    assert found["quantized"]["nll"] == pytest.approx(found["merged"]["nll"], abs=1e-2)


def test_blocks_over_all_texts(root: Path) -> None:
    assert go(root, "task.pack=true", stages=STAGES[2:]) == 0
    found = run.manifest(root / "run/02_teachers/big/fold0")["rows"]
    everything = sum(rows(root, "train")[0].lengths)
    assert found["rows"] > everything // 48, "texts were cut before"
    assert run.manifest(root / "run/03_distill/small/fold0")["rows"]["train"] == found["rows"]
    assert metrics(root)["rows"]["cut"] > 0, "by a block's end"


def folds(root: Path) -> list[Path]:
    return [root / f"run/03_distill/small/fold{fold}" for fold in (0, 1)]


def test_held_out_rows_choose_each_fold_s_best_state_and_the_merge_is_the_mean(root: Path) -> None:
    """Two folds with LoRA, the teacher asked once; a learning rate that soon makes the student worse."""
    way = ("folds.count=2", "student.lora={r: 4, alpha: 8, dropout: 0}", "distill.learning_rate=50")
    more = ("distill.evaluations=5", "distill.epochs=3", "distill.schedule=constant", "quantize=null")
    assert go(root, *way, *more) == 0
    assert [path.name for path in (root / "run/02_teachers/big").iterdir()] == ["fold0"]
    config = load(root / "lm.yaml", list(way))
    train, _ = rows_of(config, "train")
    numbers = lm_rows.fold_numbers(train, prepared(config)[0])
    judged, worse = [], 0
    for fold, path in enumerate(folds(root)):
        manifest = run.manifest(path)
        found = [one["dev_log_loss"] for one in manifest["metrics"]["dev"]]
        assert manifest["rows"]["train"] == (numbers != fold).sum() > 0
        assert manifest["metrics"]["best"] == min(found)
        worse += min(found) < found[-1]
        student = lm_student(config, path)
        held = np.flatnonzero(numbers == fold)
        assert nll(student, train, held) == pytest.approx(min(found), abs=1e-5)
        test = rows_of(config, "test")[0]
        judged.append(nll(student, test, np.arange(len(test.ids))))
    assert worse
    assert metrics(root)["student"]["nll"] == pytest.approx(np.mean(judged), abs=1e-5)
    one, two = (load_file(path / "adapter/adapter_model.safetensors") for path in folds(root))
    base = load_file(root / "run/01_pretrain/small/model/model.safetensors")
    merged, adapted = load_file(root / "run/04_merge/model/model.safetensors"), 0
    for name, weight in merged.items():
        down, up = (f"base_model.model.{name.removesuffix('.weight')}.lora_{which}.weight" for which in "AB")
        if down in one:
            adapted += 1
            deltas = [8 / 4 * fold[up] @ fold[down] for fold in (one, two)]
            torch.testing.assert_close(weight - base[name], sum(deltas) / 2, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(weight, base[name])
    assert adapted == 7


def test_factors_are_averaged_one_by_one(root: Path) -> None:
    way = ("folds.count=2", "student.lora={r: 4, alpha: 8, dropout: 0}", "distill.baseline=false")
    assert go(root, *way, "merge.how=factors", "distill.learning_rate=0.1", stages=STAGES[:5]) == 0
    one, two = (load_file(path / "adapter/adapter_model.safetensors") for path in folds(root))
    before = load_file(root / "run/01_pretrain/small/model/model.safetensors")
    merged = load_file(root / "run/04_merge/model/model.safetensors")
    adapted = [
        name for name in merged if f"base_model.model.{name.removesuffix('weight')}lora_A.weight" in one
    ]
    assert len(adapted) == 7
    for name in merged.keys() - set(adapted):
        assert torch.equal(merged[name], before[name])
    apart = 0.0
    for name in adapted:
        down, up = (f"base_model.model.{name.removesuffix('weight')}lora_{which}.weight" for which in "AB")
        expected = 8 / 4 * ((one[up] + two[up]) / 2) @ ((one[down] + two[down]) / 2)
        torch.testing.assert_close(merged[name] - before[name], expected, rtol=1e-4, atol=1e-6)
        exact = 8 / 4 * (one[up] @ one[down] + two[up] @ two[down]) / 2
        apart += float((exact - expected).norm() / exact.norm())
    assert apart > 0.1, "the folds diverge, and then it matters"


def test_folds_in_full_and_packed_are_averaged(root: Path) -> None:
    way = ("folds.count=2", "task.pack=true", "distill.baseline=false")
    assert go(root, *way, stages=STAGES[:5]) == 0
    config = load(root / "lm.yaml", list(way))
    train, _ = rows_of(config, "train")
    table = prepared(config)[0]
    counts = [run.manifest(path)["rows"]["train"] for path in folds(root)]
    assert sum(counts) == len(train.ids), "each block is one fold's"
    starts: dict[str, set[int]] = {}
    for text, fold in zip(table["text"].to_pylist(), table["fold"].to_pylist(), strict=True):
        starts.setdefault(text[:12], set()).add(fold)
    tokenizer = lm.tokenizer_of(config)
    for row, fold in enumerate(lm_rows.fold_numbers(train, table)):
        ids, places = (train.inputs(np.array([row]))[name][0] for name in ("input_ids", "position_ids"))
        for at in torch.nonzero(places == 0)[1:, 0].tolist():  # the first may be the rest of a text
            said = tokenizer.decode(ids[at : at + 12], skip_special_tokens=True)[:12]
            assert fold in starts.get(said, {fold})
    merged = load_file(root / "run/04_merge/model/model.safetensors")
    parts = [load_file(path / "adapter/model.safetensors") for path in folds(root)]
    for name, weight in parts[0].items():
        torch.testing.assert_close(merged[name], (weight + parts[1][name]) / 2)
        assert not torch.equal(weight, parts[1][name])


def rows_of(config: Any, part: str) -> tuple[Any, Any]:
    tokenizer = lm.tokenizer_of(config)
    settings = text_settings(config, config.student)
    return lm_rows.examples(prepared(config)[0], tokenizer, part, **settings)


def lm_student(config: Any, fold: Path) -> Any:
    source = base(config, config.student)[0]
    model, _ = load_model(config, config.student, source, (), "fp32")
    load_trained(model, fold / "adapter")
    return model


def nll(model: Any, examples: Any, chosen: Any) -> float:
    return evaluate_lm(model, examples, chosen, batch_tokens=500, vocab=320)["nll"]


def test_the_head_stays_in_float_and_a_packed_artifact_is_judged_alone(root: Path) -> None:
    merged, packed = root / "run/04_merge/model", root / "run/05_quantize/model"
    with open_tensors(merged) as before, open_tensors(packed) as after:
        assert torch.equal(before["model.embed_tokens.weight"](), after["model.embed_tokens.weight"]())
        assert not [name for name in after if "lm_head" in name], "tied"
        assert "model.layers.0.mlp.up_proj.qweight" in after
    assert "text-generation" in (packed / "README.md").read_text()
    assert "calibration" not in json.loads((packed / "config.json").read_text())["quantization_config"]
    assert go(root, "--artifact", str(packed), stages=("06_evaluate",)) == 0
    (alone,) = (root / "run").glob("06_evaluate-model-*")
    found = json.loads((alone / "metrics.json").read_text())["artifact"]
    for name in ("nll", "kl/big", "agreement/big", "tokens"):
        assert found[name] == metrics(root)["quantized"][name]


def test_a_second_start_writes_no_shard_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(root / "run/02_teachers")
    written: list[int] = []

    def fail(*arguments: Any) -> None:
        raise RunError("the machine went away")

    def count(directory: Path, index: int, *more: Any) -> None:
        written.append(index)
        write(directory, index, *more)

    write, finish = capture.write_shard, capture.finish
    monkeypatch.setattr(capture, "write_shard", count)
    monkeypatch.setattr(capture, "finish", fail)
    assert go(root, stages=("02_teachers",)) == 2
    assert written == [0]
    monkeypatch.setattr(capture, "finish", finish)
    assert go(root, stages=LEARN) == 0
    assert written == [0]


def test_what_a_cache_was_not_made_from_is_refused(root: Path) -> None:
    config, (train, tokenizer) = load(root / "lm.yaml"), rows(root, "train")
    more = (config, config.distill, ["big"])
    assert set(lm.open_caches(*more, tokenizer, train)) == {"big"}
    table = prepared(config)[0]
    settings = text_settings(config, config.student)
    shorter, _ = lm_rows.examples(table, tokenizer, "train", **{**settings, "max_tokens": 40})
    with pytest.raises(CacheError, match="was cached with other tokens"):
        lm.open_caches(*more, tokenizer, shorter)
    tokenizer.chat_template = "{{ messages }}"
    with pytest.raises(CacheError, match="another template"):
        lm.open_caches(*more, tokenizer, train)


@pytest.mark.parametrize(
    ("stages", "overrides", "told"),
    [
        (STAGES[1:], ["student.init.tokenizer.vocab_size=310"], "teacher big: another vocabulary (320 words"),
        (LEARN, ["distill.cache.k=400"], "k = 400 of a vocabulary of 320"),
        (("03_distill",), ["distill.cache.k=10"], "made from another config"),
        (("03_distill",), ["task.max_tokens=40"], "made from another config"),
    ],
)
def test_what_does_not_fit_is_one_line(
    root: Path, stages: tuple[str, ...], overrides: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert go(root, *overrides, stages=stages) == 2
    lines = [line for line in capsys.readouterr().err.split("\n") if line.startswith("error: ")]
    assert len(lines) == 1
    assert told in lines[0]


@pytest.mark.parametrize("cut", [False, True])
def test_a_changed_byte_or_a_lost_end_of_a_shard_is_named(
    cut: bool, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = root / "run/02_teachers/big/fold0/cache/shard-00000.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-5] if cut else content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    assert go(root, "distill.epochs=2", stages=("03_distill",)) == 2
    assert str(path) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("distill.view=oof", "distill.view = 'oof'"),
        ("task.columns={messages: m} task.pack=true", "task.pack = True: a chat"),
        ("distill.cache=null distill.on_policy=0.5 task.pack=true", "task.pack = True: distill.on_policy"),
        ("distill.method=cached", "distill.method = 'cached'"),
        ("distill.terms.reverse_kl=1", "distill.terms.reverse_kl"),
        ("distill.on_policy=0.5", "distill.on_policy = 0.5"),
        ("distill.weighting=entropy", "distill.weighting = 'entropy'"),
        ("distill.phases=[{epochs: 1}]", "distill.phases"),
        ("task.labels=[a, b]", "task.labels"),
        ("task.template='{text}'", "task.template"),
        ("task.columns={text: t, messages: m}", "task.columns"),
        ("teachers=[{kind: lightgbm, name: trees}]", "trees is no language model"),
        ("teachers.big.epochs=2", "teachers.big.epochs"),
        ("pretrain=[{data: x.parquet}]", "pretrain.0.objective = 'supervised'"),
    ],
)
def test_a_config_that_cannot_be(line: str, told: str) -> None:
    text = CONFIG.format(root="x", sizes=SIZES, tied=TIED)
    if line.startswith("teachers"):
        text = text.replace("models: [big], ", "")
    with pytest.raises(ConfigError) as caught:
        parse(text, re.split(r" (?=\w+\.\w+=)", line))
    assert [one for one in str(caught.value).split("\n") if told in one]


def test_next_tokens_need_the_task() -> None:
    with pytest.raises(ConfigError, match=r"task\.kind: causal_lm, not preference"):
        parse(tiny.CONFIG.read_text(), ["distill.method=sequence"])


def test_terms_of_next_tokens_are_ce_and_kl() -> None:
    config = parse(CONFIG.format(root="x", sizes=SIZES, tied=TIED), ["distill.terms={kl: 3}"])
    assert config.distill.terms == {"ce": 1, "kl": 3}


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_chats_are_learnt_where_the_assistant_speaks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = texts(24, 1)
    chats = [
        [{"role": "user", "content": text[:20]}, {"role": "assistant", "content": text[20:40]}]
        for text in said
    ]
    chats[3] = chats[3][:1]  # nobody answers
    written = [json.dumps(chat) for chat in chats]
    pd.DataFrame({"talk": written[:20]}).to_parquet(tmp_path / "train.parquet")
    pd.DataFrame({"talk": written[20:]}).to_parquet(tmp_path / "test.parquet")
    tokenizer = tiny.tokenizer(said, 300)
    for name, seed, template in (("big", 0, "{{ messages }}"), ("small", 1, TEMPLATE)):
        tiny.causal_lm(seed=seed, vocab_size=320).save_pretrained(tmp_path / name)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / name)
    path = tmp_path / "chats.yaml"
    path.write_text(
        f"run: {tmp_path}/run\nprecision: fp32\nquantize: null\nfolds: {{count: 1}}\nmerge: {{dtype: fp32}}\n"
        f"task: {{kind: causal_lm, train: {tmp_path}/train.parquet, test: {tmp_path}/test.parquet, "
        "columns: {messages: talk}, max_tokens: 64}\n"
        f"teachers: [{{name: big, model: {tmp_path}/big}}]\n"
        f"student: {{name: small, model: {tmp_path}/small, lora: {{r: 2, alpha: 4}}}}\n"
        "distill: {method: sequence, epochs: 1, batch_rows: 8}\nevaluate: {continuations: 1, new_tokens: 3}\n"
    )
    for name in STAGES:
        assert tiny.stage(name, config=path) == 0, name
    manifest = run.manifest(tmp_path / "run/02_teachers/big/fold0")
    assert manifest["rows"] == {"rows": 19, "cut": 0, "without_targets": 1}
    printed = capsys.readouterr().out
    assert "'without_targets': 1" in printed
    assert "big: has another chat template than the student" in printed
    assert run.manifest(tmp_path / "run/03_distill/small/fold0")["metrics"]["without_targets"] == 1
    answers = [tokenizer(chat[1]["content"])["input_ids"] for chat in chats[:20] if len(chat) > 1]
    assert manifest["metrics"]["tokens"] == sum(map(len, answers)), "eos in place of bos"
    found = json.loads((tmp_path / "run/06_evaluate/metrics.json").read_text())
    assert found["student"]["nll"] == pytest.approx(found["merged"]["nll"], rel=1e-5)
    first = chats[20][0]["content"]
    assert " ".join(found["continuations"][0]["prompt"].split()).startswith("<user>" + first.split()[0])


def test_a_column_without_chats_is_named() -> None:
    import pyarrow as pa

    with pytest.raises(DataError, match="train: no column 'talk'"):
        lm_rows.chats_as_text(pa.table({"text": ["a"]}), "talk", "train")
    with pytest.raises(DataError, match="train: row 1 of 'talk' is no list of role and content"):
        lm_rows.chats_as_text(pa.table({"talk": ["[]", "hello"]}), "talk", "train")


def test_pretraining_never_reads_a_test_text(made: Path) -> None:
    table = prepared(load(made / "lm.yaml"))[0]
    held = lm_rows.plain_texts(table, False, "test")
    assert lm_rows.without_test_texts(["new", f"  {held[0].upper()} "], table, False) == ["new"]
    with pytest.raises(DataError, match="every text is a test row's"):
        lm_rows.without_test_texts(held, table, False)
