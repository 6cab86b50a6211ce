"""quantize: GPTQ keeps the head, forgets the calibration rows, and is no worse than rounding."""

import copy
import json
import logging
import os
import weakref
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTQConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from llmkd import quantize
from llmkd.errors import ModelError
from llmkd.gptq import _own_arguments
from llmkd.models.artifact import load_artifact, open_tensors
from llmkd.quantize import _batches, _block_stack, quantize_gptq

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_labels": 3,
    "pad_token_id": 0,
}
DECODER = SIZES | {"num_key_value_heads": 2, "head_dim": 16}
CONFIGS = {
    "llama": LlamaConfig(**DECODER),
    "qwen2": Qwen2Config(**SIZES, num_key_value_heads=2),
    "gemma2": Gemma2Config(**DECODER, sliding_window=8),  # rows outgrow the window of every second layer
    "bert": BertConfig(**SIZES),
}


def rows(count: int, seed: int) -> list[list[int]]:
    """Skewed token frequencies, so that the Hessians are far from round."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 20, (count,), generator=draw).tolist()
    return [(1 + 94 * torch.rand(n, generator=draw) ** 3).long().tolist() for n in lengths]


CALIBRATION, TEST = rows(96, 0), rows(48, 1)


def save_model(path: Path, config, dtype=torch.float32) -> Path:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(copy.deepcopy(config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
            elif not parameter.any():
                parameter.normal_(std=0.1)  # biases that matter
    model.to(dtype).save_pretrained(path)
    words = {"<pad>": 0} | {chr(97 + i): i + 1 for i in range(26)}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(path)
    return path


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model.eval()(torch.tensor([row])).logits.float() for row in TEST])


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def packed_logits(path: Path, bits: int) -> torch.Tensor:
    """gptqmodel's own forward pass through the packed layers, uncompiled (compiling takes seconds)."""
    config = GPTQConfig(bits=bits, backend="gptq_torch")
    model = AutoModelForSequenceClassification.from_pretrained(path, quantization_config=config)
    with torch.compiler.set_stance("force_eager"):
        return logits(model)


def round_to_nearest(model, layers: list[str], bits: int, group_size: int):
    for layer in layers:
        weight = model.get_submodule(layer).weight.data
        groups = weight.view(weight.shape[0], -1, group_size)
        scale = groups.abs().amax(-1, keepdim=True) * 2 / (2**bits - 1)
        values = (groups / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        weight.copy_((values * scale).view_as(weight))
    return model


@pytest.fixture(scope="module", params=CONFIGS)
def quantized(request, tmp_path_factory):
    """kind, float directory, 8-bit directory, facts: made once for several tests."""
    home = tmp_path_factory.mktemp(request.param)
    source = save_model(home / "float", CONFIGS[request.param])
    facts = quantize_gptq(source, home / "packed", CALIBRATION, group_size=32)
    return request.param, source, home / "packed", facts


def test_head_and_all_else_is_kept(quantized):
    _, source, packed, _ = quantized
    with open_tensors(source) as before, open_tensors(packed) as after:
        head = [name for name in before if name.startswith(("score", "classifier"))]
        kept = [name for name in before if name in after and not torch.equal(before[name](), after[name]())]
        assert head
        assert all(torch.equal(before[name](), after[name]()) for name in head)
        assert all(f"{name.rpartition('.')[0]}.qweight" in after for name in kept)  # float16 biases of layers


def test_the_model_is_gone_before_its_files_are_compared(tmp_path, monkeypatch):
    loaded, alive = [], []
    load, compare = quantize._load, quantize._compare

    def loading(*given):
        model = load(*given)
        loaded.append(weakref.ref(model))
        return model

    def comparing(*given):
        alive.extend(one() is not None for one in loaded)
        return compare(*given)

    monkeypatch.setattr(quantize, "_load", loading)
    monkeypatch.setattr(quantize, "_compare", comparing)
    source = save_model(tmp_path / "float", CONFIGS["llama"])
    quantize_gptq(source, tmp_path / "packed", CALIBRATION, group_size=32)
    assert alive == [False]


def test_no_worse_than_rounding(quantized):
    _, source, packed, _ = quantized
    exact = logits(load_artifact(source)[0])
    with open_tensors(packed) as tensors:
        layers = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    rounded = round_to_nearest(load_artifact(source)[0], layers, 8, 32)
    error = distance(logits(load_artifact(packed)[0]), exact)
    assert 0 < error < 0.03
    assert error < 1.3 * distance(logits(rounded), exact)


def test_unpacked_logits_are_gptqmodels(quantized):
    _, _, packed, _ = quantized
    assert distance(logits(load_artifact(packed)[0]), packed_logits(packed, 8)) < 1e-3


def test_nothing_of_the_calibration_or_the_machine_is_written(quantized):
    _, source, packed, _ = quantized
    packing = json.loads((packed / "config.json").read_text())["quantization_config"]
    assert packing["quant_method"] == "gptq"
    assert packing["checkpoint_format"] == "gptq"
    assert (packing["bits"], packing["group_size"], packing["sym"]) == (8, 32, True)
    text = "".join(file.read_text() for file in packed.glob("*.json"))
    assert "dataset" not in text
    assert str(source) not in text
    assert (packed / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_facts(quantized):
    kind, source, packed, facts = quantized
    assert facts["layers"] == 2 * (6 if kind == "bert" else 7)
    assert facts["calibration_rows"] == len(CALIBRATION)
    assert facts["calibration_tokens"] == sum(map(len, CALIBRATION))
    assert 0 < facts["weight_error_mean"] <= facts["weight_error_max"] < 0.01
    assert facts["bytes_after"] == (packed / "model.safetensors").stat().st_size
    assert facts["bytes_after"] < facts["bytes_before"] == (source / "model.safetensors").stat().st_size
    assert facts["quantized_weights"] * 3 < facts["bytes_before"] * 4


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("llama") / "float", CONFIGS["llama"])


@pytest.mark.parametrize(
    "settings",
    [
        {"group_size": 32},
        {"group_size": -1},
        {"group_size": 32, "symmetric": False},
        {"group_size": 32, "desc_act": True},
    ],
)
def test_four_bits(settings, llama, tmp_path):
    facts = quantize_gptq(llama, tmp_path / "packed", CALIBRATION, bits=4, **settings)
    unpacked = logits(load_artifact(tmp_path / "packed")[0])
    assert distance(unpacked, packed_logits(tmp_path / "packed", 4)) < 1e-3
    with open_tensors(llama) as tensors:
        layers = [name.removesuffix(".weight") for name in tensors if "proj" in name]
    rounded = round_to_nearest(load_artifact(llama)[0], layers, 4, 32)
    exact = logits(load_artifact(llama)[0])
    assert distance(unpacked, exact) < distance(logits(rounded), exact)  # what the Hessians are for
    assert facts["weight_error_max"] < 0.2


def test_same_inputs_same_bytes(llama, tmp_path):
    for name in ("one", "two"):
        quantize_gptq(llama, tmp_path / name, CALIBRATION[:16], group_size=32)
    one, two = (tmp_path / name / "model.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_bfloat16_stays_bfloat16_around_the_packed_layers(tmp_path):
    source = save_model(tmp_path / "float", CONFIGS["llama"], torch.bfloat16)
    quantize_gptq(source, tmp_path / "packed", CALIBRATION[:16], group_size=32)
    with open_tensors(tmp_path / "packed") as tensors:
        assert tensors["score.weight"]().dtype == torch.bfloat16
        assert tensors["model.embed_tokens.weight"]().dtype == torch.bfloat16
    assert json.loads((tmp_path / "packed" / "config.json").read_text())["dtype"] == "bfloat16"


def test_process_is_left_as_it_was(llama, tmp_path, capsys):
    root = logging.getLogger()
    before = (root.handlers[:], root.level, os.environ.get("GPTQMODEL_DISABLE_PACK_EXT"))
    quantize_gptq(llama, tmp_path / "packed", CALIBRATION[:16], group_size=32)
    assert (root.handlers[:], root.level, os.environ.get("GPTQMODEL_DISABLE_PACK_EXT")) == before
    assert capsys.readouterr().out == ""


def test_every_block_sees_its_own_mask_and_rotary():
    """Gemma 3 gives its full-attention blocks another mask and another rotary base than the sliding ones."""
    layers = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(**DECODER, sliding_window=8, layer_types=layers)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    batches = _batches([TEST[0] * 4], 96, 4096)
    blocks = list(model.get_submodule(_block_stack(model)).children())
    seen = []
    hook = blocks[1].register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    with torch.no_grad():
        model(torch.tensor(batches[0]["input_ids"]))
    right = seen.pop()
    hook.remove()
    with _own_arguments(model, blocks, batches), torch.no_grad():
        hook = blocks[1].register_forward_pre_hook(lambda _, args, kw: seen.append(kw), with_kwargs=True)
        shape = (len(batches[0]["input_ids"]), len(batches[0]["input_ids"][0]), 64)
        wrong = {"position_embeddings": None, "attention_mask": None}
        blocks[1](torch.zeros(shape), **wrong)  # as optimum calls it: with what belongs to block 0
    assert torch.equal(seen[-1]["position_embeddings"][0], right["position_embeddings"][0])
    assert not blocks[1]._forward_pre_hooks or list(blocks[1]._forward_pre_hooks) == [hook.id]


def test_rows_of_one_length_run_together_unpadded():
    batches = _batches([[1, 2, 3], [4], [5, 6, 7], [], [8, 9, 1], [2]], 10, 6)
    assert [batch["input_ids"] for batch in batches] == [[[4], [2]], [[1, 2, 3], [5, 6, 7]], [[8, 9, 1]]]
    assert all(mask == [1] * len(mask) for batch in batches for mask in batch["attention_mask"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bits": 2}, "bits is 2; use 8 or 4"),
        ({"group_size": 48}, "group_size is 48; use -1 or one of 16, 32"),
        (
            {"group_size": 128},
            r"q_proj has 64 inputs, which group_size 128 does not .* fits this model is 64",
        ),
        ({"damp": 0.0}, "between 0 and 1"),
        ({"batch_tokens": 0}, "batch_tokens is 0"),
        ({"calibration": []}, "no calibration row"),
        ({"calibration": [[]]}, "no calibration row"),
        ({"calibration": [[1, 96]]}, "token id 96 of 96"),
    ],
)
def test_wrong_settings_are_refused_before_the_run(settings, words, llama, tmp_path):
    arguments = {"calibration": CALIBRATION, "group_size": 32} | settings
    with pytest.raises(ModelError, match=words):
        quantize_gptq(llama, tmp_path / "packed", **arguments)
    assert not (tmp_path / "packed").exists()


def test_models_that_cannot_be_packed_are_refused(tmp_path):
    narrow = save_model(tmp_path / "narrow", LlamaConfig(**DECODER | {"intermediate_size": 100}))
    with pytest.raises(ModelError, match=r"gate_proj is 100 x 64; GPTQ packs multiples of 32"):
        quantize_gptq(narrow, tmp_path / "out", CALIBRATION, group_size=32)
    old = GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, num_labels=3, pad_token_id=0)
    with pytest.raises(ModelError, match="Conv1D"):
        quantize_gptq(save_model(tmp_path / "gpt2", old), tmp_path / "out", CALIBRATION, group_size=32)


def test_quantized_twice_is_refused(llama, tmp_path):
    file = save_model(tmp_path / "m", CONFIGS["llama"]) / "config.json"
    packed = json.loads(file.read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    file.write_text(json.dumps(packed))
    with pytest.raises(ModelError, match="quantized already"):
        quantize_gptq(tmp_path / "m", tmp_path / "out", CALIBRATION)
