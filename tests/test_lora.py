"""Adapters and what is trained: float32, saved whole, head included, back with the same logits."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from llmkd.models.lora import add_lora, load_trainable, save_trained, trainable, trainable_state
from llmkd.models.pooling import class_logits

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_labels": 3,
    "pad_token_id": 0,
    "max_position_embeddings": 32,
}
DECODER = {**SIZES, "num_key_value_heads": 2}
CONFIGS = {
    "llama": DECODER,
    "qwen2": DECODER,
    "gemma2": {**DECODER, "head_dim": 8},
    "bert": SIZES,
    "roberta": SIZES,
    "distilbert": {
        "vocab_size": 64,
        "dim": 32,
        "hidden_dim": 64,
        "n_layers": 2,
        "n_heads": 4,
        "num_labels": 3,
    },
    "xlnet": {"vocab_size": 64, "d_model": 32, "d_inner": 64, "n_layer": 2, "n_head": 4, "num_labels": 3},
}
HEADS = {
    **{decoder: ["score"] for decoder in ("llama", "qwen2", "gemma2")},
    **{encoder: ["classifier"] for encoder in ("bert", "roberta")},
    "distilbert": ["pre_classifier", "classifier"],
    "xlnet": ["sequence_summary", "logits_proj"],
}
ARCHITECTURES = list(CONFIGS)
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])


def saved_base(architecture: str, directory: Path, **settings: Any) -> Path:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **CONFIGS[architecture], **settings)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(directory)
    return directory


def load(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(directory, dtype=dtype)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    model.eval()
    return class_logits(model, input_ids=IDS, attention_mask=MASK)


def shake(model: nn.Module) -> None:
    """Stands for training: every trainable tensor is moved."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(0.2 * torch.randn_like(parameter))


@pytest.fixture(params=ARCHITECTURES)
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return saved_base(request.param, tmp_path / "somewhere" / request.param)


def adapted(base: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    return add_lora(load(base, dtype), r=4, alpha=8)


def test_peft_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora import awq, gptq

    def asked() -> bool:
        raise AssertionError("asking imports gptqmodel")

    for module in (awq, gptq):
        monkeypatch.setattr(module, "is_gptqmodel_available", asked)
    base = saved_base("llama", tmp_path / "llama")
    adapted(base)
    with pytest.raises(ValueError, match="No modules were targeted"):
        add_lora(load(base), r=4, alpha=8, targets=["nowhere"])
    assert {awq.is_gptqmodel_available, gptq.is_gptqmodel_available} == {asked}


def test_what_is_trained_is_float32_over_a_bf16_base(base: Path) -> None:
    model = adapted(base, torch.bfloat16)
    assert {parameter.dtype for parameter in trainable(model).values()} == {torch.float32}
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    assert torch.bfloat16 in {parameter.dtype for parameter in frozen}


def test_the_head_and_every_linear_layer_are_trained_and_nothing_else(base: Path) -> None:
    names, plain = list(trainable(adapted(base))), load(base)
    heads = tuple(f"{head}." for head in HEADS[base.name])
    linear = {
        name
        for name, module in plain.named_modules()
        if isinstance(module, nn.Linear) and not f"{name}.".startswith(heads)
    }
    adapters = [name for name in names if ".lora_" in name]
    with_adapter = {name.removeprefix("base_model.model.").split(".lora_")[0] for name in adapters}
    assert with_adapter == linear
    whole = {
        name.removeprefix("base_model.model.").replace("modules_to_save.default.", "")
        for name in set(names) - set(adapters)
    }
    assert whole == {name for name, _ in plain.named_parameters() if name.startswith(heads)}
    assert {name.partition(".")[0] for name in whole} == set(HEADS[base.name])


def test_alpha_over_r_scales_the_adapter(tmp_path: Path) -> None:
    base = saved_base("llama", tmp_path / "llama")
    layers = [m for m in add_lora(load(base), r=4, alpha=12).modules() if hasattr(m, "lora_A")]
    assert {layer.scaling["default"] for layer in layers} == {3.0}


def test_an_adapter_is_saved_with_its_head_and_comes_back_with_its_logits(base: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    model = adapted(base)
    untrained = logits(model)
    shake(model)
    expected = logits(model)
    save_trained(model, trainable_state(model), tmp_path / "adapter")
    shake(model)  # what is saved later must not follow
    loaded = PeftModel.from_pretrained(load(base), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), expected)
    assert (expected - untrained).abs().max() > 0.05


def test_an_adapter_is_saved_alike_in_every_process(tmp_path: Path) -> None:
    model: Any = add_lora(tiny.classifier(), r=2, alpha=4)
    model.peft_config["default"].target_modules = {"q_proj", "down_proj", "v_proj"}  # a set has no order
    save_trained(model, trainable_state(model), tmp_path)
    told = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert told == ["down_proj", "q_proj", "v_proj"]


def test_what_is_saved_is_the_state_given_not_the_model_now(tmp_path: Path) -> None:
    from peft import PeftModel

    base = saved_base("llama", tmp_path / "llama")
    model = adapted(base)
    shake(model)
    best, expected = trainable_state(model), logits(model)
    shake(model)
    save_trained(model, best, tmp_path / "adapter")
    torch.testing.assert_close(logits(PeftModel.from_pretrained(load(base), tmp_path / "adapter")), expected)


def test_an_adapter_directory_names_no_machine_path(base: Path, tmp_path: Path) -> None:
    model = adapted(base)
    save_trained(model, trainable_state(model), tmp_path / "adapter")
    files = [path for path in (tmp_path / "adapter").rglob("*") if path.is_file()]
    assert {path.name for path in files} == {"adapter_config.json", "adapter_model.safetensors"}
    for path in files:
        assert str(tmp_path).encode() not in path.read_bytes()
        assert str(Path.home()).encode() not in path.read_bytes()


def test_a_hub_id_stays_in_the_adapter(tmp_path: Path) -> None:
    model = adapted(saved_base("llama", tmp_path / "llama"))
    model.peft_config["default"].base_model_name_or_path = "meta-llama/Meta-Llama-3-70B"  # type: ignore[union-attr, index]
    save_trained(model, trainable_state(model), tmp_path / "adapter")
    assert "meta-llama/Meta-Llama-3-70B" in (tmp_path / "adapter" / "adapter_config.json").read_text()


def test_trainable_state_is_a_copy_that_load_trainable_puts_back(base: Path) -> None:
    model = adapted(base)
    shake(model)
    state, expected = trainable_state(model), logits(model)
    assert set(state) == set(trainable(model))
    shake(model)
    assert not torch.allclose(logits(model), expected)
    load_trainable(model, state)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)


def test_load_trainable_wants_every_name(tmp_path: Path) -> None:
    model = adapted(saved_base("llama", tmp_path / "llama"))
    state = trainable_state(model)
    gone = next(name for name in state if "score" in name)
    del state[gone]
    with pytest.raises(KeyError, match="score"):
        load_trainable(model, state)


def test_a_model_trained_in_full_comes_back_with_its_logits(base: Path, tmp_path: Path) -> None:
    model = load(base)
    shake(model)
    expected = logits(model)
    save_trained(model, trainable_state(model), tmp_path / "model")
    shutil.rmtree(base)
    torch.testing.assert_close(logits(load(tmp_path / "model")), expected)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2"])
def test_a_causal_lm_trained_in_full_comes_back_with_its_logits(
    architecture: str, tied: bool, tmp_path: Path
) -> None:
    """With tied weights the output layer is no parameter of its own, and must be there after reload."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **CONFIGS[architecture], tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config)
    shake(model)
    state = trainable_state(model)
    assert ("lm_head.weight" in state) == (not tied)
    save_trained(model, state, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    with torch.no_grad():
        found, expected = (m.eval()(input_ids=IDS, attention_mask=MASK).logits for m in (loaded, model))
    torch.testing.assert_close(found, expected)


def test_a_causal_adapter_trains_no_head(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **DECODER))
    names = list(trainable(add_lora(model, r=4, alpha=8, causal=True)))
    assert all(".lora_" in name for name in names)
    assert not [name for name in names if "lm_head" in name]
