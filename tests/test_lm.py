"""Sequence distillation through the stages: what is cached, learnt, merged, packed and judged."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import STAGES
from tiny_lm import LEARN, REST, STILL, WHOLE, go, metrics, rows

from llmkd import run
from llmkd.layout import Layout
from llmkd.models.artifact import load_artifact, open_tensors


def tiny_teacher(root: Path) -> str:
    """The config's own teacher, as an override."""
    import yaml

    return json.dumps(yaml.safe_load((root / "lm.yaml").read_text())["teachers"][0])


def logged(root: Path) -> dict[str, float]:
    return dict(run.manifest(root / "run/03_distill/small/fold0")["metrics"]["loss"][0])


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


def test_the_cache_is_small_and_tells_its_size(finished_lm: Path) -> None:
    manifest = run.manifest(finished_lm / "run/02_teachers/big/fold0")
    found = manifest["metrics"]
    assert found["tokens"] == rows(finished_lm, "train")[0].weights.sum()
    assert found["bytes"] == sum(
        entry["bytes"] for name, entry in manifest["files"].items() if name.endswith(".safetensors")
    )
    assert Layout("sampled", 21, 320).token_bytes < found["bytes_per_token"]


def test_every_model_is_judged(finished_lm: Path) -> None:
    found = metrics(finished_lm)
    names = ["before", "baseline", "student", "merged", "quantized"]
    for figures in (found["teachers"]["big"], *(found[name] for name in names)):
        assert figures["tokens"] == rows(finished_lm, "test")[0].weights.sum()
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


def test_figures_by_the_plain_formula(finished_lm: Path) -> None:
    found, test = metrics(finished_lm), rows(finished_lm, "test")[0]
    teacher = causal(finished_lm / "run/01_pretrain/big/model")
    for name, path in (("before", "01_pretrain/small/model"), ("quantized", "05_quantize/model")):
        nll, divergence = by_hand(causal(finished_lm / "run" / path), teacher, test)
        assert found[name]["nll"] == pytest.approx(nll, rel=1e-5)
        assert found[name]["kl/big"] == pytest.approx(divergence, rel=1e-4)


def test_what_is_logged_by_the_plain_formula_cached_and_online(copy_lm: Path) -> None:
    """With all words cached at full precision, and with the teacher beside the student."""
    teacher, student = (causal(copy_lm / f"run/01_pretrain/{name}/model") for name in ("big", "small"))
    ce, kl = by_hand(student, teacher, rows(copy_lm, "train")[0])
    for how in (WHOLE, "distill.cache=null"):
        assert go(copy_lm, *STILL, how, "distill.temperature=1", stages=LEARN) == 0
        assert logged(copy_lm)["ce"] == pytest.approx(ce, rel=1e-4)
        assert logged(copy_lm)["kl/big"] == pytest.approx(kl, rel=1e-3)
        assert logged(copy_lm)["loss"] == pytest.approx((ce + kl) / 2, rel=1e-4)


def test_a_cache_of_all_words_teaches_as_the_teacher_itself(copy_lm: Path) -> None:
    found = []
    for how in (WHOLE, "distill.cache=null"):
        assert go(copy_lm, how, "distill.baseline=false", "quantize=null", stages=("02_teachers", *REST)) == 0
        found.append(metrics(copy_lm)["merged"]["nll"])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_an_online_teacher_has_no_unit_and_another_makes_the_student_anew(
    copy_lm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(copy_lm / "run/02_teachers")
    way = ("distill.cache=null", "distill.baseline=false", "quantize=null")
    assert go(copy_lm, *way) == 0
    assert not (copy_lm / "run/02_teachers").exists()
    assert "01_pretrain/big" in run.manifest(copy_lm / "run/03_distill/small/fold0")["inputs"]
    assert "baseline" not in metrics(copy_lm)


def test_two_teachers_of_one_vocabulary_are_cached_apart(copy_lm: Path) -> None:
    model = shutil.copytree(copy_lm / "run/01_pretrain/big/model", copy_lm / "twin")
    twin = f"{{name: twin, model: {model}}}"
    big = tiny_teacher(copy_lm)
    way = (f"teachers=[{big}, {twin}]", "distill.teacher_weights={twin: 3}", *STILL, WHOLE)
    assert go(copy_lm, *way, stages=LEARN) == 0
    found = logged(copy_lm)
    assert found["kl/twin"] == pytest.approx(found["kl/big"], rel=1e-5)
    assert found["loss"] == pytest.approx((found["ce"] + 4 * found["kl/big"]) / 5, rel=1e-4)


def test_the_student_s_own_words_are_judged_by_the_teacher(copy_lm: Path) -> None:
    way = ("distill.cache=null", "distill.on_policy=1", "distill.baseline=false", "distill.batch_rows=40")
    assert go(copy_lm, *way, stages=("03_distill",)) == 0
    assert "on_policy/kl/big" in logged(copy_lm)
    assert "ce" not in logged(copy_lm)


def test_a_lora_student_is_merged_and_quantized(copy_lm: Path) -> None:
    lora = "student.lora={r: 4, alpha: 8, dropout: 0}"
    assert go(copy_lm, lora, stages=STAGES[3:]) == 0
    assert (copy_lm / "run/03_distill/small/fold0/adapter/adapter_config.json").is_file()
    found = metrics(copy_lm)
    assert found["student"]["nll"] < found["before"]["nll"]
    assert found["merged"]["nll"] == pytest.approx(found["student"]["nll"], rel=1e-5)
    assert found["quantized"]["nll"] == pytest.approx(found["merged"]["nll"], abs=1e-2)


def test_the_head_stays_in_float_and_a_packed_artifact_is_judged_alone(copy_lm: Path) -> None:
    merged, packed = copy_lm / "run/04_merge/model", copy_lm / "run/05_quantize/model"
    with open_tensors(merged) as before, open_tensors(packed) as after:
        assert torch.equal(before["model.embed_tokens.weight"](), after["model.embed_tokens.weight"]())
        assert not [name for name in after if "lm_head" in name], "tied"
        assert "model.layers.0.mlp.up_proj.qweight" in after
    assert "text-generation" in (packed / "README.md").read_text()
    assert "calibration" not in json.loads((packed / "config.json").read_text())["quantization_config"]
    assert go(copy_lm, "--artifact", str(packed), stages=("06_evaluate",)) == 0
    (alone,) = (copy_lm / "run").glob("06_evaluate-model-*")
    found = json.loads((alone / "metrics.json").read_text())["artifact"]
    for name in ("nll", "kl/big", "agreement/big", "tokens"):
        assert found[name] == metrics(copy_lm)["quantized"][name]
