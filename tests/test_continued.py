"""Continued pretraining: in full and as an adapter, on text and on labelled rows; whole models come out."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from llmkd.errors import ModelError
from llmkd.models.continued import pretrain
from llmkd.models.load import load_causal_lm, load_classifier

LORA = {"r": 4, "alpha": 8}


def saved(kind: str, directory: Path, **settings: Any) -> Path:
    tokenizer = tiny.tokenizer()
    made = {"causal": tiny.causal_lm, "supervised": tiny.classifier}[kind]
    made(vocab_size=len(tokenizer), **settings).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def run(source: Path, directory: Path, kind: str, **more: Any) -> dict[str, Any]:
    weights = (tiny.examples().lengths - 1).astype(np.float64) if kind == "causal" else None
    return pretrain(
        str(source),
        directory,
        causal=kind == "causal",
        labels=tiny.LABELS,
        training=tiny.training(directory, epochs=3, learning_rate=2e-2),
        **{
            "examples": lambda tokenizer: tiny.examples(weights=weights),
            "lora": None,
            "load_in": "auto",
            "precision": "fp32",
            "pad_token": None,
            "attention": None,
            "seed": 1,
            "batch_rows": 8,
            "batch_tokens": 64,
            **more,
        },
    )


def load(kind: str, directory: Path) -> Any:
    if kind == "causal":
        return load_causal_lm(str(directory), load_in="fp32")
    return load_classifier(str(directory), tiny.LABELS, load_in="fp32", pad_id=0)


def mean_loss(kind: str, model: Any) -> float:
    from llmkd.methods.next_token import next_token
    from llmkd.train import dev_log_loss

    examples, rows = tiny.examples(), np.arange(24)
    if kind == "supervised":
        return dev_log_loss(model, examples, rows, 64, "fp32")
    with torch.no_grad():
        loss, _ = next_token(model.eval())(examples.inputs(rows), torch.from_numpy(examples.labels))
    weights = torch.from_numpy(examples.lengths - 1)
    return float((loss * weights).sum() / weights.sum())


@pytest.mark.parametrize("lora", [None, LORA])
@pytest.mark.parametrize("kind", ["causal", "supervised"])
def test_what_was_learnt_is_in_the_model_on_disk(
    kind: str, lora: dict[str, Any] | None, tmp_path: Path
) -> None:
    source = saved(kind, tmp_path / "base")
    history = run(source, tmp_path / "out", kind, lora=lora)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model"]
    model = load(kind, tmp_path / "out" / "model")
    before, after = mean_loss(kind, load(kind, source)), mean_loss(kind, model)
    assert after < before - 0.05
    assert abs(after - history["loss"][-1]["loss"]) < abs(before - history["loss"][-1]["loss"])
    assert not hasattr(model, "peft_config")


@pytest.mark.parametrize("tied", [True, False])
def test_a_language_model_keeps_its_output_layer(tied: bool, tmp_path: Path) -> None:
    source = saved("causal", tmp_path / "base", tie_word_embeddings=tied)
    run(source, tmp_path / "out", "causal")
    model = load("causal", tmp_path / "out" / "model")
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight) == tied
    assert mean_loss("causal", model) < mean_loss("causal", load("causal", source))


@pytest.mark.parametrize("load_in", ["nf4", "int8"])
@pytest.mark.parametrize("kind", ["causal", "supervised"])
def test_an_adapter_over_a_quantized_base_is_merged_into_a_float_one(
    kind: str, load_in: str, tmp_path: Path
) -> None:
    source = saved(kind, tmp_path / "base")
    run(source, tmp_path / "out", kind, lora=LORA, load_in=load_in, precision="bf16")
    model = load(kind, tmp_path / "out" / "model")
    assert not hasattr(model.config, "quantization_config")
    assert {type(module).__name__ for module in model.modules() if "Linear" in type(module).__name__} == {
        "Linear"
    }
    assert mean_loss(kind, model) < mean_loss(kind, load(kind, source)) - 0.05


def test_the_tokenizer_comes_along_and_a_second_phase_can_start_there(tmp_path: Path) -> None:
    """As the stage does it: text first, then labels, in one directory."""
    source = saved("causal", tmp_path / "base")
    run(source, tmp_path / "out", "causal")
    backbone = load("causal", tmp_path / "out" / "model").model.state_dict()
    run(tmp_path / "out" / "model", tmp_path / "out", "supervised", lora={**LORA, "targets": ["q_proj"]})
    model = load("supervised", tmp_path / "out" / "model")
    kept = [name for name in backbone if "q_proj" not in name]
    assert all(torch.equal(model.model.state_dict()[name], backbone[name]) for name in kept)
    assert (tmp_path / "out" / "model" / "tokenizer.json").is_file()


def test_supervised_rows_without_a_label_are_left_out(tmp_path: Path) -> None:
    from dataclasses import replace

    source, examples = saved("supervised", tmp_path / "base"), tiny.examples()
    labels = np.where(np.arange(24) < 8, examples.labels, -1)
    history = run(
        source,
        tmp_path / "out",
        "supervised",
        examples=lambda tokenizer: replace(examples, labels=labels),
    )
    assert history["steps"] == 3


def test_an_encoder_is_refused_for_text(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForMaskedLM

    tiny.tokenizer().save_pretrained(tmp_path / "base")
    config = AutoConfig.for_model("bert", **{**tiny.SIZES, "vocab_size": 300})
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path / "base")
    with pytest.raises(ModelError, match="is an encoder; pretrain it with objective: supervised"):
        run(tmp_path / "base", tmp_path / "out", "causal")
