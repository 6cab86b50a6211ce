"""models/artifact and card: reading finished models, unpacking GPTQ weights, and what is refused."""

import gc
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from llmkd.card import write_card
from llmkd.errors import ModelError
from llmkd.models.artifact import BLOCK, ZERO_OFFSETS, load_artifact, size_bytes, unpack_layer, unpack_words

CONFIG = LlamaConfig(
    vocab_size=40,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_labels=3,
    pad_token_id=0,
    attention_bias=True,
)
IDS = torch.randint(1, 40, (4, 7), generator=torch.Generator().manual_seed(0))
GROUP = 16


def save_model(
    path: Path, auto=AutoModelForSequenceClassification, dtype=torch.float32, sizes=None, **save
) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(**{**CONFIG.to_dict(), **(sizes or {})})
    auto.from_config(config).to(dtype).save_pretrained(path, **save)
    words = {"<pad>": 0} | {chr(97 + i): i + 1 for i in range(26)}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(path)
    return path


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def pack_words(values: torch.Tensor, bits: int) -> torch.Tensor:
    """[n, m] values to int32 words, one value at a time in plain Python: the slow oracle."""
    count = 32 // bits
    words = torch.zeros(len(values) // count, values.shape[1], dtype=torch.int32)
    for row in range(len(words)):
        for column in range(values.shape[1]):
            packed = sum(int(values[row * count + i, column]) << (bits * i) for i in range(count))
            words[row, column] = packed - (1 << 32) if packed >= 1 << 31 else packed
    return words


def pack_layer(width: int, height: int, bits: int, form: str, seed: int):
    """The four packed tensors of a random layer, and the weight [out, in] they stand for."""
    draw = torch.Generator().manual_seed(seed)
    top = 2**bits
    values = torch.randint(0, top, (width, height), generator=draw)
    zeros = torch.randint(1, top, (width // GROUP, height), generator=draw)
    scales = (torch.rand(width // GROUP, height, generator=draw) * 0.02 + 0.01).half()
    groups = torch.arange(width)[torch.randperm(width, generator=draw)] // GROUP  # as desc_act leaves them
    stored = zeros - 1 if form == "gptq" else zeros
    tensors = {
        "qweight": pack_words(values, bits),
        "qzeros": pack_words(stored.T.contiguous(), bits).T.contiguous(),
        "scales": scales,
        "g_idx": groups.int(),
    }
    return tensors, ((values - zeros[groups]) * scales.float()[groups]).T.contiguous()


def save_packed(path: Path, bits: int = 8, form: str = "gptq") -> tuple[Path, torch.Tensor]:
    """A packed classifier, and the logits of the float model that it stands for."""
    model = AutoModelForSequenceClassification.from_pretrained(save_model(path))
    tensors = load_file(path / "model.safetensors")
    for seed, name in enumerate([n for n in tensors if "_proj.weight" in n]):
        height, width = tensors.pop(name).shape
        packed, weight = pack_layer(width, height, bits, form, seed)
        model.get_parameter(name).data = weight
        tensors |= {f"{name.removesuffix('weight')}{part}": value for part, value in packed.items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    edit_config(path, quantization_config={"quant_method": "gptq", "bits": bits, "checkpoint_format": form})
    return path, logits(model)


def edit_config(path: Path, **changes) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("bits", [4, 8])
def test_words_hold_the_lowest_value_first(bits):
    values = torch.randint(0, 2**bits, (64, 3), generator=torch.Generator().manual_seed(0))
    assert torch.equal(unpack_words(pack_words(values, bits), bits), values.int())
    assert unpack_words(torch.tensor([[0x01020304]]), 8).flatten().tolist() == [4, 3, 2, 1]
    assert unpack_words(torch.tensor([[-1]], dtype=torch.int32), bits).unique().tolist() == [2**bits - 1]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
def test_unpacked_model_gives_the_float_models_logits(bits, form, tmp_path):
    path, expected = save_packed(tmp_path, bits, form)
    model, tokenizer = load_artifact(path)
    torch.testing.assert_close(logits(model), expected)
    assert not model.training
    assert model.dtype == torch.float32
    assert tokenizer.pad_token_id == 0
    assert not hasattr(model.config, "quantization_config")


def test_a_zero_point_of_zero_survives_the_v1_borrow():
    """v1 subtracts one from whole words, so a zero point of 0 borrows from its neighbour."""
    zeros = torch.tensor([[0, 7, 0, 255]]).T
    words = pack_words(zeros, 8) - ZERO_OFFSETS["gptq"][8]
    tensors = {"qweight": torch.zeros(1, 4, dtype=torch.int32), "qzeros": words.T}
    tensors |= {"scales": torch.ones(1, 4).half(), "g_idx": torch.zeros(4, dtype=torch.int32)}
    read = {f"l.{name}": lambda value=value: value for name, value in tensors.items()}
    assert unpack_layer("l", read, 8, ZERO_OFFSETS["gptq"][8])[0].tolist() == [0, -7, 0, -255]


def resident(file: Path) -> int:
    """Bytes of the mappings of a file that this process holds in memory."""
    mine, found = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line.partition(" ")[0].count("-") == 1:  # a mapping's own line: its addresses, and its file
            mine = line.endswith(str(file))
        elif mine and line.startswith("Rss:"):
            found += 1024 * int(line.split()[1])
    return found


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux tells it")
def test_the_pages_of_packed_weights_are_let_go(tmp_path):
    """What stays mapped is what the model still reads there: the tensors that were never packed."""
    path = save_model(tmp_path, sizes={"hidden_size": 256, "intermediate_size": 16384, "head_dim": 64})
    tensors = load_file(path / "model.safetensors")
    names = [name for name in tensors if "_proj.weight" in name]
    sizes = {name: tuple(tensors.pop(name).shape) for name in names}
    kept = sum(tensor.nbytes for tensor in tensors.values())
    for name, (height, width) in sizes.items():
        words, groups = torch.full((width // 4, height), 0x01020304).int(), torch.zeros(width).int()
        parts = {"qweight": words, "qzeros": torch.zeros(1, height // 4).int(), "g_idx": groups}
        parts |= {"scales": torch.ones(1, height).half()}
        tensors |= {f"{name.removesuffix('weight')}{part}": value for part, value in parts.items()}
    file = path / "model.safetensors"
    save_file(tensors, file, metadata={"format": "pt"})
    edit_config(path, quantization_config={"quant_method": "gptq", "bits": 8})
    del tensors
    model, _ = load_artifact(path)
    logits(model)
    around = 2**21  # a page that is read brings neighbours along, up to a huge page of them
    assert resident(file) <= kept + around
    assert file.stat().st_size > 10 * (kept + around)
    del model
    gc.collect()
    assert resident(file) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_of_many_blocks_is_unpacked_whole_and_rounded_once(dtype):
    random = torch.Generator().manual_seed(0)
    inputs = 4 * BLOCK * 2 + 4  # a last block that is not full
    values = torch.randint(0, 256, (inputs, 4), generator=random)
    groups = torch.randint(0, 2, (inputs,), generator=random)  # in any order, as desc_act leaves them
    zeros = torch.randint(0, 256, (2, 4), generator=random)
    scales = torch.rand(2, 4, generator=random).half()
    tensors = {"qweight": pack_words(values, 8), "qzeros": pack_words(zeros.T, 8).T}
    tensors |= {"scales": scales, "g_idx": groups.int()}
    read = {f"l.{name}": lambda value=value: value for name, value in tensors.items()}
    found = unpack_layer("l", read, 8, 0, dtype)
    assert torch.equal(found, ((values - zeros[groups]).float() * scales.float()[groups]).to(dtype))
    assert found.T.is_contiguous()  # as a linear layer holds it


def test_dtypes(tmp_path):
    packed, _ = save_packed(tmp_path / "packed")
    assert load_artifact(packed, dtype=torch.bfloat16)[0].dtype == torch.bfloat16
    plain = save_model(tmp_path / "plain", dtype=torch.bfloat16)
    assert load_artifact(plain)[0].dtype == torch.bfloat16
    assert load_artifact(str(plain), dtype=torch.float32)[0].dtype == torch.float32


def test_float_model_in_shards(tmp_path):
    path = save_model(tmp_path, max_shard_size="20KB")
    shards = list(path.glob("*.safetensors"))
    assert len(shards) > 1
    torch.manual_seed(0)
    assert torch.equal(
        logits(load_artifact(path)[0]), logits(AutoModelForSequenceClassification.from_config(CONFIG).eval())
    )
    assert size_bytes(path) == sum(file.stat().st_size for file in shards)
    shards[0].unlink()
    with pytest.raises(ModelError, match=f"has no {shards[0].name}"):
        load_artifact(path)


@pytest.mark.parametrize("packed", [False, True])
def test_missing_and_unexpected_weights_are_named(packed, tmp_path):
    path = save_packed(tmp_path)[0] if packed else save_model(tmp_path)
    tensors = load_file(path / "model.safetensors")
    head = tensors.pop("score.weight")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"weights missing .*score\.weight"):
        load_artifact(path)
    odd = tensors | {"score.weight": head, "odd.weight": torch.ones(1)}
    save_file(odd, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"weights unexpected .*odd\.weight"):
        load_artifact(path)
    wide = tensors | {"score.weight": torch.ones(4, 32)}
    save_file(wide, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError):
        load_artifact(path)


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales", "g_idx"])
def test_missing_packed_tensors_are_named(part, tmp_path):
    path, _ = save_packed(tmp_path)
    tensors = load_file(path / "model.safetensors")
    del tensors[f"model.layers.1.mlp.up_proj.{part}"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"packed layer model\.layers\.1\.mlp\.up_proj lacks {part}"):
        load_artifact(path)


def test_packed_formats_that_are_not_read(tmp_path):
    path, _ = save_packed(tmp_path)
    for changes, words in [
        ({"bits": 4}, "does not fit 4 bits"),
        ({"bits": 3}, "packed in 3 bits"),
        ({"checkpoint_format": "marlin"}, "marlin"),
    ]:
        packing = {"quant_method": "gptq", "bits": 8, "checkpoint_format": "gptq"} | changes
        edit_config(path, quantization_config=packing)
        with pytest.raises(ModelError, match=words):
            load_artifact(path)
    shutil.rmtree(path)
    edit_config(save_model(path), quantization_config={"quant_method": "gptq", "bits": 8})
    with pytest.raises(ModelError, match="holds no qweight"):
        load_artifact(path)


def test_a_language_model_has_no_head(tmp_path):
    with pytest.raises(ModelError, match=r"score\.weight"):
        load_artifact(save_model(tmp_path, AutoModelForCausalLM))


def test_damaged_directories(tmp_path):
    with pytest.raises(ModelError, match=r"nowhere has no config\.json"):
        load_artifact(tmp_path / "nowhere")
    path = save_model(tmp_path / "model")
    weights = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(weights[:1000])
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        load_artifact(path)
    assert "\n" not in str(caught.value)
    (path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no model\.safetensors"):
        size_bytes(path)
    (path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelError, match="save_pretrained"):
        load_artifact(path)
    (path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not JSON"):
        load_artifact(path)


def test_no_tokenizer(tmp_path):
    path = save_model(tmp_path)
    for file in path.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match="has no tokenizer"):
        load_artifact(path)


def test_code_in_the_directory_is_never_run(tmp_path):
    path = save_model(tmp_path)
    (path / "evil.py").write_text("raise SystemExit('ran')")
    edit_config(path, model_type="evil", auto_map={"AutoConfig": "evil.C", "AutoModel": "evil.M"})
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_artifact(path)


ALONE = """
import json, sys
sys.modules["llmkd"] = None  # whoever imports it fails
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

path, text = sys.argv[1:]
said = pipeline("text-classification", model=path, top_k=None)([text])[0]
model = AutoModelForSequenceClassification.from_pretrained(path)
logits = model(**AutoTokenizer.from_pretrained(path)(text, return_tensors="pt")).logits
packed = sum(hasattr(module, "qweight") for module in model.modules())
labels = model.config.id2label
print(json.dumps({"said": said, "logits": logits.tolist(), "labels": labels, "packed": packed}))
"""


@pytest.mark.slow
def test_the_8_bit_directory_loads_where_this_package_is_not_installed(finished):
    """By transformers, optimum and gptqmodel alone: its layers packed, its labels by name."""
    path, text = finished / "05_quantize" / "model", "which?\nA: one\nB: two, three\nBest:"
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(path), text],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": ""},
        cwd=path,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["labels"] == {"0": "a", "1": "b", "2": "tie"}
    assert {one["label"] for one in found["said"]} == {"a", "b", "tie"}
    assert found["packed"] == 7
    model, tokenizer = load_artifact(path)
    with torch.no_grad():
        expected = model(**tokenizer(text, return_tensors="pt")).logits
    # there in bfloat16, as it was saved
    torch.testing.assert_close(torch.tensor(found["logits"]), expected, atol=5e-3, rtol=0)
    by_name = {one["label"]: one["score"] for one in found["said"]}
    scores = dict(zip(("a", "b", "tie"), expected.softmax(-1)[0].tolist(), strict=True))
    assert by_name == pytest.approx(scores, abs=3e-3)


def test_card(tmp_path):
    card = write_card(
        tmp_path,
        title="Arena 8-bit",
        facts={"teachers": "llama, qwen", "folds": 5, "weight_error": 0.0061234},
        scores={"log_loss": 0.87654321, "accuracy, both orders": 0.5},
        limits=["Judges English only."],
        base_model="google/gemma-2-9b-it",
        bits=8,
    ).read_text()
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: text-classification\n")
    for text in (
        'base_model: "google/gemma-2-9b-it"',
        '- "gptq"\n- "8-bit"\n---',
        "# Arena 8-bit",
        "- weight error: 0.006123",
        "- log loss: 0.8765",
        "- Judges English only.",
        "load_artifact",
        'pipeline("text-classification"',
        "predict_file",
    ):
        assert text in card
    data = ModelCard(card).data
    assert [(one.metric_type, one.metric_value) for one in data.eval_results] == [("log_loss", 0.876543)]
    assert data.tags == ["llmkd", "distillation", "gptq", "8-bit"]


def test_card_names_no_path_and_no_empty_section(tmp_path):
    card = write_card(
        tmp_path, title="plain", facts={"folds": 1}, base_model="/home/someone/model"
    ).read_text()
    assert "someone" not in card
    assert "gptq" not in card.lower()
    assert "## Scores" not in card
    assert "model-index" not in card
    assert str(tmp_path) not in card


def test_a_directory_of_two_names_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "clients/acme" in write_card(tmp_path, title="m", facts={}, base_model="clients/acme").read_text()
    (tmp_path / "clients" / "acme").mkdir(parents=True)
    assert "acme" not in write_card(tmp_path, title="m", facts={}, base_model="clients/acme").read_text()


def test_the_card_of_a_net_needs_this_package(tmp_path):
    card = write_card(tmp_path, title="net", facts={}, task="tabular-classification", plain=False).read_text()
    assert "pipeline_tag: tabular-classification" in card
    assert "predict_file" in card
    assert "pipeline(" not in card


def test_the_card_of_a_language_model(tmp_path):
    card = write_card(tmp_path, title="lm", facts={}, bits=8, task="text-generation").read_text()
    assert 'pipeline("text-generation"' in card
    assert ", causal=True)" in card
    assert "predict_file" not in card
