"""ONNX that gives torch's logits at any batch and length, and a folder to upload that tells its scores."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
from test_artifact import save_packed
from test_predicting import TEXT, reviews, save, written

from llmkd import description, export
from llmkd.errors import ModelError, RunError
from llmkd.export import export_hub, export_onnx
from llmkd.models.artifact import load_artifact
from llmkd.models.pooling import class_logits
from llmkd.predicting import predict_file


def onnx_logits(directory: Path, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(directory / "model.onnx", providers=["CPUExecutionProvider"])
    assert [one.name for one in session.get_inputs()] == ["input_ids", "attention_mask"]
    assert all(isinstance(size, str) for one in session.get_inputs() for size in one.shape)
    return session.run(["logits"], {"input_ids": ids, "attention_mask": mask})[0]


def check(artifact: Path, output: Path) -> None:
    """The graph's logits are the artifact's own, on rows of several lengths."""
    import torch

    facts = export_onnx(artifact, output)
    assert facts["max_difference"] <= 1e-3
    assert len({rows for rows, _ in facts["checked"]}) > 2
    assert len({length for _, length in facts["checked"]}) > 2
    model, _ = load_artifact(artifact, dtype=torch.float32)
    ids = np.random.default_rng(5).integers(0, 40, (6, 13))
    mask = (np.arange(13) < np.array([13, 1, 7, 12, 2, 5])[:, None]).astype(np.int64)
    with torch.no_grad():
        inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
        expected = class_logits(model, **inputs).numpy()
    np.testing.assert_allclose(onnx_logits(output, ids, mask), expected, atol=1e-4)
    names = {path.name for path in output.iterdir()}
    assert {"model.onnx", "config.json", "tokenizer.json"} <= names
    for path in output.iterdir():  # torch notes where each operation's code stands
        assert not [
            place for place in (str(tiny.ROOT), torch.__path__[0]) if place.encode() in path.read_bytes()
        ]
    assert "quantization_config" not in json.loads((output / "config.json").read_text())
    assert not list(output.parent.glob("*.partial"))


def test_an_encoder(tmp_path: Path) -> None:
    artifact = save(tmp_path / "model", TEXT, 2.0)
    check(artifact, tmp_path / "onnx")
    assert description.read(tmp_path / "onnx") == description.read(artifact)
    with pytest.raises(RunError, match=r"onnx: there is something already"):
        export_onnx(artifact, tmp_path / "onnx")


def test_a_decoder_in_8_bits(tmp_path: Path) -> None:
    check(save_packed(tmp_path / "model")[0], tmp_path / "onnx")


@pytest.mark.slow
def test_a_decoder_with_soft_caps_and_a_sliding_window(tmp_path: Path) -> None:
    model = tiny.classifier("gemma2", num_hidden_layers=2, sliding_window=4)
    model.save_pretrained(tmp_path / "model")
    tiny.tokenizer(size=300).save_pretrained(tmp_path / "model")
    check(tmp_path / "model", tmp_path / "onnx")


def write_sums(sizes: list[str | int]) -> Callable[..., None]:
    """What writes a graph of the right inputs that sums token ids, in place of the model's."""

    def write(module: object, file: Path, artifact: Path) -> None:
        import onnx
        from onnx import TensorProto, helper

        inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, sizes) for name in export.INPUTS]
        output = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [sizes[0], 1])
        axis = helper.make_tensor("axis", TensorProto.INT64, [1], [1])
        nodes = [
            helper.make_node("Cast", ["input_ids"], ["ids"], to=TensorProto.FLOAT),
            helper.make_node("ReduceSum", ["ids", "axis"], ["logits"]),
        ]
        graph = helper.make_graph(nodes, "sums", inputs, [output], [axis])
        imports = [helper.make_opsetid("", 18)]
        onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=10), file)

    return write


@pytest.mark.parametrize(
    ("sizes", "words"),
    [(["batch", "length"], r"differ from torch's by \d"), ([3, "length"], r"is fixed to 3; use .* in torch")],
)
def test_a_graph_that_is_not_the_model_is_refused_and_leaves_nothing(
    sizes: list[str | int], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = save(tmp_path / "model", TEXT)
    monkeypatch.setattr(export, "_write", write_sums(sizes))
    with pytest.raises(ModelError, match=words) as error:
        export_onnx(artifact, tmp_path / "onnx")
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_cannot_be_exported_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.causal_lm().save_pretrained(tmp_path / "lm")
    with pytest.raises(ModelError, match=r"is a language model"):
        export_onnx(tmp_path / "lm", tmp_path / "onnx")
    net = save(tmp_path / "net", None)
    (net / "features.json").write_text('{"kind": "image", "column": "image", "shape": [2, 3]}')
    with pytest.raises(ModelError, match=r"reads features, no tokens: use .*predict_file"):
        export_onnx(net, tmp_path / "onnx")
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxscript" else True)
    with pytest.raises(ModelError, match=r"needs onnxscript: pip install llmkd\[export\]"):
        export_onnx(net, tmp_path / "onnx")
    assert not list(tmp_path.glob("onnx*"))


def test_the_folder_where_one_stands_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with export._folder(Path()) as folder:
        (folder / "x").write_text("y")
    assert [path.name for path in tmp_path.rglob("*")] == ["empty", "x"]


def test_a_folder_for_the_hub_tells_its_scores_and_predicts_as_it_was_judged(
    finished: Path, tmp_path: Path
) -> None:
    from huggingface_hub import ModelCard

    facts = export_hub(finished, tmp_path / "hub")
    own = {path.name for path in (finished / "05_quantize/model").iterdir()}
    assert set(facts["files"]) == own
    card = ModelCard.load(tmp_path / "hub" / "README.md")
    metrics = json.loads((finished / "06_evaluate/metrics.json").read_text())["quantized"]
    results = {one.metric_type: one.metric_value for one in card.data.eval_results}
    assert results == pytest.approx(
        {name: metrics[name] for name in ("log_loss", "accuracy", "ece")}, abs=1e-6
    )
    assert card.data.pipeline_tag == "text-classification"
    assert "{prompt}\nA: {response_a}" in card.content
    assert str(finished) not in card.content
    said = json.loads((tmp_path / "hub/llmkd.json").read_text())
    assert (said["tta"], said["max_tokens"]) == ("swap", 64)
    with pytest.raises(RunError, match=r"hub: there is something already"):
        export_hub(finished, tmp_path / "hub")


def test_the_budget_it_was_judged_with_and_a_run_that_changed_since(copy: Path, tmp_path: Path) -> None:
    change = [f"run={copy}", "evaluate.tta=none", "evaluate.max_tokens=50"]
    assert tiny.stage("06_evaluate", *change) == 0
    export_hub(copy, tmp_path / "hub")
    said = json.loads((tmp_path / "hub/llmkd.json").read_text())
    assert (said["tta"], said["max_tokens"]) == ("none", 50)
    assert tiny.stage("05_quantize", f"run={copy}", "quantize.calibration_rows=4") == 0
    with pytest.raises(RunError, match=r"changed since it was judged; run stage 06 anew"):
        export_hub(copy, tmp_path / "again")
    shutil.rmtree(copy / "06_evaluate")
    with pytest.raises(RunError, match=r"not a finished directory"):
        export_hub(copy, tmp_path / "again")


def test_an_exported_folder_predicts_as_the_artifact(finished: Path, tmp_path: Path) -> None:
    frame = reviews(6).rename(columns={"review": "prompt"})
    source = written(frame.assign(response_a="some words", response_b="a few more"), tmp_path / "rows.csv")
    export_hub(finished, tmp_path / "hub")
    for name, artifact in (("ours", finished / "05_quantize/model"), ("hub", tmp_path / "hub")):
        predict_file(artifact, source, tmp_path / f"{name}.csv")
    assert (tmp_path / "ours.csv").read_text() == (tmp_path / "hub.csv").read_text()
