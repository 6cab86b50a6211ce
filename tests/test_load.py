"""Models and tokenizers: pad tokens, quantized bases, tiny configs; and every refusal in one line."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from llmkd.errors import ModelError
from llmkd.merge import merge_folds
from llmkd.methods.cached import Cached
from llmkd.models.artifact import load_artifact
from llmkd.models.load import (
    check_budget,
    init_model,
    keep_layers,
    load_causal_lm,
    load_classifier,
    load_tokenizer,
    train_tokenizer,
)
from llmkd.models.lora import add_lora, head_modules, load_trainable, save_trained, trainable, trainable_state
from llmkd.objective import HARD
from llmkd.train import fit, predict

ONE_LINE = r"\A[^\n]+\Z"
ALL = np.arange(24)


def load(source: Path, load_in: str = "fp32", **more: Any) -> Any:
    return load_classifier(str(source), tiny.LABELS, load_in=load_in, **{"pad_id": 0, **more})


@pytest.fixture
def saved_tokenizer(tmp_path: Path) -> Path:
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def without_pad(directory: Path) -> Path:
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["pad_token"]
    path.write_text(json.dumps(config))
    return directory


def test_a_tokenizer_without_pad_token_is_refused_with_the_remedy(saved_tokenizer: Path) -> None:
    with pytest.raises(ModelError, match="has no pad token; set pad_token:") as error:
        load_tokenizer(str(without_pad(saved_tokenizer)))
    assert str(saved_tokenizer) in str(error.value)
    assert "\n" not in str(error.value)


def test_pad_token_names_a_reserved_token_or_eos(saved_tokenizer: Path) -> None:
    found = load_tokenizer(str(without_pad(saved_tokenizer)), "<eos>")
    assert found.pad_token_id == found.eos_token_id == 2
    assert found.padding_side == "right"


def test_a_pad_token_outside_the_vocabulary_is_refused(saved_tokenizer: Path) -> None:
    with pytest.raises(ModelError, match=r"pad_token '<none>' is not in its vocabulary"):
        load_tokenizer(str(saved_tokenizer), "<none>")


def test_a_pad_id_beyond_the_embeddings_is_refused(tmp_path: Path) -> None:
    tiny.classifier().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"pad token id 64 is beyond its 64 embeddings"):
        load(tmp_path, pad_id=64)


@pytest.mark.parametrize("kind", ["tokenizer", "model"])
def test_what_is_not_there_is_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=ONE_LINE) as error:
        load_tokenizer(str(tmp_path / "none")) if kind == "tokenizer" else load(tmp_path / "none")
    assert str(tmp_path / "none") in str(error.value)


@pytest.mark.parametrize("loader", [load, lambda path: load_causal_lm(str(path), load_in="fp32")])
def test_pickled_weights_are_not_read(loader: Any, tmp_path: Path) -> None:
    model = tiny.classifier()
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        loader(tmp_path)


def test_labels_are_named_and_a_new_head_comes_from_the_seed(tmp_path: Path) -> None:
    tiny.causal_lm().save_pretrained(tmp_path)
    one, same, other = load(tmp_path, seed=1), load(tmp_path, seed=1), load(tmp_path, seed=2)
    assert one.config.id2label == {0: "a", 1: "b", 2: "tie"}
    assert one.config.get_text_config().pad_token_id == 0
    assert torch.equal(one.score.weight, same.score.weight)
    assert not torch.equal(one.score.weight, other.score.weight)


@pytest.mark.parametrize("load_in", ["bf16", "nf4", "int8"])
@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_the_head_stays_in_float32(architecture: str, load_in: str, tmp_path: Path) -> None:
    tiny.classifier(architecture).save_pretrained(tmp_path)
    head = getattr(load(tmp_path, load_in), "classifier" if architecture == "bert" else "score")
    assert type(head) is torch.nn.Linear
    assert head.weight.dtype == torch.float32


@pytest.mark.parametrize("able", ["bf16", "fp32"])
@pytest.mark.parametrize("load_in", ["nf4", "int8"])
def test_around_quantized_weights_is_what_the_machine_computes(
    load_in: str, able: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmkd.models.load.resolve_precision", lambda asked: able)
    computed = {"bf16": torch.bfloat16, "fp32": torch.float32}[able]
    stored = torch.float32 if able == "bf16" else torch.bfloat16  # the other one
    tiny.classifier().to(stored).save_pretrained(tmp_path)
    model = load(tmp_path, load_in)
    expected = stored if (load_in, able) == ("int8", "bf16") else computed
    assert model.model.embed_tokens.weight.dtype == model.model.norm.weight.dtype == expected
    if load_in == "nf4":
        assert model.model.layers[0].mlp.up_proj.compute_dtype == expected
    ids = torch.tensor([[5, 6, 7]])
    assert model.model(ids).last_hidden_state.dtype == expected


@pytest.mark.parametrize("load_in", ["nf4", "int8"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2"])
def test_a_quantized_base_trains_predicts_and_trains_again(
    architecture: str, load_in: str, tmp_path: Path
) -> None:
    """A forward without gradients repacks an nf4 base for the CPU, after which no backward works."""
    tiny.classifier(architecture).save_pretrained(tmp_path / "base")
    model, examples = add_lora(load(tmp_path / "base", load_in), r=4, alpha=8), tiny.examples()
    layers = {type(module).__name__ for module in model.modules()}
    assert {"nf4": "Linear4bit", "int8": "Linear8bitLt"}[load_in] in layers
    start, losses = trainable_state(model), []
    before = predict(model, examples, ALL, 64)
    for _ in range(2):
        load_trainable(model, start)
        history = fit(
            Cached(model, HARD),
            examples,
            ALL,
            tiny.training(tmp_path, epochs=3, learning_rate=1e-2),
            batch_rows=8,
            batch_tokens=128,
            dev=ALL,
        )
        losses.append([entry["loss"] for entry in history["loss"]])
        after = predict(model, examples, ALL, 64)
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert losses[0][-1] < losses[0][0]
    assert np.abs(before - after).max() > 0.01
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}


@pytest.mark.parametrize("load_in", ["nf4", "int8"])
def test_an_adapter_over_a_quantized_base_merges_into_a_float_one(load_in: str, tmp_path: Path) -> None:
    from peft import PeftModel

    tiny.classifier().save_pretrained(tmp_path / "base")
    model, examples = add_lora(load(tmp_path / "base", load_in), r=4, alpha=8), tiny.examples()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(0.3 * torch.randn_like(parameter))
    save_trained(model, trainable_state(model), tmp_path / "adapter")
    beside = PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter")
    merged = merge_folds(load(tmp_path / "base"), [tmp_path / "adapter"])
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    found, expected = (predict(one, examples, ALL, 64) for one in (merged, beside))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(found - predict(load(tmp_path / "base"), examples, ALL, 64)).mean() > 0.1


ODD: dict[str, dict[str, Any]] = {
    **tiny.CONFIGS,
    "roberta": tiny.SIZES,
    "distilbert": {"vocab_size": 64, "dim": 32, "hidden_dim": 32, "n_layers": 1, "n_heads": 2},
    "xlnet": {"vocab_size": 64, "d_model": 32, "d_inner": 32, "n_layer": 1, "n_head": 2},
}

NEW_PARTS = {
    "roberta": {"classifier"},
    "distilbert": {"pre_classifier", "classifier"},
    "xlnet": {"sequence_summary", "logits_proj"},
}


@pytest.fixture(params=[name for name in ODD if name != "qwen2"])  # Llama again, but for a bias
def headless(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A backbone alone, as hubs hold them: neither head nor, for an encoder, a pooler."""
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(3)
    more = {"initializer_range": 0.2}
    model = AutoModel.from_config(AutoConfig.for_model(request.param, **{**ODD[request.param], **more}))
    state = {name: tensor for name, tensor in model.state_dict().items() if "pooler" not in name}
    model.save_pretrained(tmp_path / request.param, state_dict=state)
    return tmp_path / request.param


def precision(architecture: str) -> str:
    """XLNet's own code mixes float32 into a base of fewer bits, which only autocast mends."""
    return "bf16" if architecture == "xlnet" else "fp32"


def test_any_classifier_goes_from_adapter_to_artifact(headless: Path, tmp_path: Path) -> None:
    """What had to start at random, head or pooler, is trained, saved, averaged and there after reload."""
    from peft import PeftModel

    examples = tiny.examples()
    model = add_lora(load(headless, "bf16"), r=4, alpha=8)
    due = (
        {"classifier", "bert.pooler"} if headless.name == "bert" else NEW_PARTS.get(headless.name, {"score"})
    )
    assert due <= set(model.peft_config["default"].modules_to_save)  # type: ignore[union-attr, index, arg-type]
    start, folds = trainable_state(model), [tmp_path / "one", tmp_path / "two"]
    for seed, fold in enumerate(folds):
        load_trainable(model, start)
        training = tiny.training(tmp_path, learning_rate=1e-2, seed=seed)
        method = Cached(model, HARD, precision(headless.name))
        fit(method, examples, ALL, training, batch_rows=8, batch_tokens=256)
        save_trained(model, trainable_state(model), fold)
    one = merge_folds(load(headless), folds[:1])
    beside = PeftModel.from_pretrained(load(headless), folds[0])
    expected = predict(beside, examples, ALL, 256)
    np.testing.assert_allclose(predict(one, examples, ALL, 256), expected, atol=1e-4)
    assert np.abs(expected - predict(load(headless), examples, ALL, 256)).max() > 0.02
    merged = merge_folds(load(headless), folds)
    states = [merge_folds(load(headless), [fold]).state_dict() for fold in folds]
    for name, weight in merged.state_dict().items():
        torch.testing.assert_close(weight, (states[0][name] + states[1][name]) / 2, msg=name)
    merged.save_pretrained(tmp_path / "merged")
    tiny.tokenizer().save_pretrained(tmp_path / "merged")
    reloaded, _ = load_artifact(tmp_path / "merged")
    np.testing.assert_array_equal(*(predict(m, examples, ALL, 256) for m in (merged, reloaded)))


@pytest.mark.parametrize("load_in", ["nf4", "int8"])
def test_heads_and_new_poolers_are_never_quantized(headless: Path, load_in: str) -> None:
    model = load(headless, load_in)
    for name, module in model.named_modules():
        if "Linear" in type(module).__name__:
            packed = type(module) is not torch.nn.Linear
            assert packed == (".layer" in name or name.startswith("layers")), name
    examples = tiny.examples()
    history = fit(
        Cached(add_lora(model, r=4, alpha=8), HARD, precision(headless.name)),
        examples,
        ALL,
        tiny.training(headless),
        batch_rows=24,
        batch_tokens=512,
    )
    assert history["steps"] == 1


@pytest.mark.parametrize("load_in", ["nf4", "int8"])
def test_a_pooler_beside_shared_blocks_is_not_quantized(load_in: str, tmp_path: Path) -> None:
    import transformers

    config = transformers.AlbertConfig(
        **{**tiny.SIZES, "num_hidden_layers": 2, "embedding_size": 16, "num_labels": 3}
    )
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    model = load(tmp_path, load_in)
    assert type(model.albert.pooler) is type(model.classifier) is torch.nn.Linear
    assert type(model.albert.encoder.albert_layer_groups[0].albert_layers[0].ffn) is not torch.nn.Linear


def source_of(architecture: str, auto: str, directory: Path, **more: Any) -> Path:
    import transformers

    torch.manual_seed(4)
    deep = (
        {"n_layer": 4} if architecture == "xlnet" else {"n_layers": 4} if architecture == "distilbert" else {}
    )
    settings = {**ODD[architecture], **(deep or {"num_hidden_layers": 4}), "num_labels": 3, **more}
    config = transformers.AutoConfig.for_model(architecture, **settings)
    getattr(transformers, auto).from_config(config).save_pretrained(directory)
    tiny.tokenizer().save_pretrained(directory)
    return directory


@torch.no_grad()
def states(model: Any) -> Any:
    """Hidden states and, of a classifier or causal LM, logits for some ids."""
    ids = torch.arange(5, 29).view(2, 12)
    return model.eval()(input_ids=ids, output_hidden_states=True)


@pytest.mark.parametrize("architecture", ODD)
def test_all_layers_kept_are_the_whole_classifier(architecture: str, tmp_path: Path) -> None:
    source = source_of(architecture, "AutoModelForSequenceClassification", tmp_path / "source")
    keep_layers(str(source), [0, 1, 2, 3], tmp_path / "kept")
    whole, kept = (states(load(path)) for path in (source, tmp_path / "kept"))
    torch.testing.assert_close(kept.logits, whole.logits, rtol=0, atol=0)
    found = load_tokenizer(str(tmp_path / "kept"))
    assert found("some words")["input_ids"] == tiny.tokenizer()("some words")["input_ids"]


@pytest.mark.parametrize("auto", ["AutoModel", "AutoModelForSequenceClassification", "AutoModelForCausalLM"])
@pytest.mark.parametrize("architecture", ["bert", "distilbert", "llama", "gemma2"])
def test_the_first_layers_kept_end_where_the_whole_models_do(
    architecture: str, auto: str, tmp_path: Path
) -> None:
    import transformers

    if auto == "AutoModelForCausalLM" and architecture in ("bert", "distilbert"):
        auto = "AutoModelForMaskedLM"
    source = source_of(architecture, auto, tmp_path / "source")
    keep_layers(str(source), [0, 1], tmp_path / "kept")
    whole = transformers.AutoModel.from_pretrained(source)
    kept = transformers.AutoModel.from_pretrained(tmp_path / "kept")
    assert kept.config.num_hidden_layers == 2
    expected = states(whole).hidden_states[2]
    if architecture in ("llama", "gemma2"):
        expected = whole.norm(expected)  # a decoder's last state is normed
    torch.testing.assert_close(states(kept).last_hidden_state, expected, rtol=1e-5, atol=1e-5)
    assert load(tmp_path / "kept").config.num_labels == 3


def test_layers_are_kept_in_the_order_asked_with_what_the_config_says_of_each(tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    source = source_of("gemma2", "AutoModelForCausalLM", tmp_path / "source", layer_types=kinds)
    keep_layers(str(source), [3, 1, 1], tmp_path / "kept")
    whole, kept = load(source), load(tmp_path / "kept")
    assert kept.config.layer_types == ["sliding_attention", "full_attention", "full_attention"]
    for at, of in enumerate([3, 1, 1]):
        for name, weight in kept.model.layers[at].state_dict().items():
            assert torch.equal(weight, whole.model.layers[of].state_dict()[name]), name
    causal = load_causal_lm(str(tmp_path / "kept"), load_in="fp32")
    assert torch.isfinite(states(causal).logits).all()


def test_a_pooler_that_was_not_there_is_not_written_as_if_it_were(tmp_path: Path) -> None:
    source = source_of("bert", "AutoModelForMaskedLM", tmp_path / "source")
    keep_layers(str(source), [0, 2], tmp_path / "kept")
    assert head_modules(load(tmp_path / "kept")) == ["classifier", "bert.pooler"]
    trained = source_of("bert", "AutoModelForSequenceClassification", tmp_path / "trained")
    keep_layers(str(trained), [0, 2], tmp_path / "again")
    assert head_modules(load(tmp_path / "again")) == ["classifier"]


@pytest.mark.parametrize("layers", [[0, 4], [-1], []])
def test_a_layer_that_does_not_exist_is_refused(layers: list[int], tmp_path: Path) -> None:
    source = source_of("llama", "AutoModel", tmp_path / "source")
    with pytest.raises(ModelError, match=r"name layers of its 4, 0 to 3") as error:
        keep_layers(str(source), layers, tmp_path / "kept")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "kept").exists()


def test_a_model_without_one_list_of_blocks_is_refused(tmp_path: Path) -> None:
    import transformers

    config = transformers.AlbertConfig(**{**tiny.SIZES, "num_hidden_layers": 2, "embedding_size": 16})
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path / "albert")  # blocks share weights
    tiny.tokenizer().save_pretrained(tmp_path / "albert")
    with pytest.raises(ModelError, match="has no one list of 2 blocks"):
        keep_layers(str(tmp_path / "albert"), [0], tmp_path / "kept")


@pytest.mark.parametrize("causal", [True, False])
def test_a_tiny_config_becomes_a_model_beside_its_tokenizer(causal: bool, tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    settings = {
        key: value for key, value in tiny.DECODER.items() if key not in ("vocab_size", "pad_token_id")
    }
    for directory in ("one", "two"):
        init_model(
            "llama", settings, tokenizer, tmp_path / directory, labels=tiny.LABELS, causal=causal, seed=5
        )
    assert (tmp_path / "one/model.safetensors").read_bytes() == (
        tmp_path / "two/model.safetensors"
    ).read_bytes()
    found = load_tokenizer(str(tmp_path / "one"))
    assert found("some words")["input_ids"] == tokenizer("some words")["input_ids"]
    model = load_causal_lm(str(tmp_path / "one"), load_in="fp32") if causal else load(tmp_path / "one")
    assert model.config.vocab_size == len(tokenizer)
    assert (model.config.pad_token_id, model.config.bos_token_id, model.config.eos_token_id) == (0, 1, 2)


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("lama", {}),
        ("llama", {"hidden_size": "wide"}),
        ("llama", {"hidden_size": 33, "num_attention_heads": 2}),
        ("llama", {"hidden_act": "gelly"}),
        ("llama", {"hiden_size": 32}),
    ],
)
def test_a_tiny_config_that_cannot_be_is_refused(
    architecture: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=rf"\Ainit: {architecture} [^\n]+\Z"):
        init_model(
            architecture, settings, tiny.tokenizer(), tmp_path, labels=tiny.LABELS, causal=False, seed=0
        )


@pytest.mark.parametrize("auto", ["AutoModelForMaskedLM", "AutoModel"])
def test_an_encoder_is_no_causal_lm(auto: str, tmp_path: Path) -> None:
    """Saved without a head, BERT would load as a causal LM that sees the tokens to come."""
    import transformers

    config = transformers.AutoConfig.for_model("bert", **tiny.SIZES)
    getattr(transformers, auto).from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="is an encoder; pretrain it with objective: supervised"):
        load_causal_lm(str(tmp_path), load_in="fp32")
    with pytest.raises(ModelError, match="is an encoder; pretrain it with objective: supervised"):
        init_model("bert", {}, tiny.tokenizer(), tmp_path, labels=tiny.LABELS, causal=True, seed=0)


def test_a_backbone_that_did_not_load_is_refused(tmp_path: Path) -> None:
    """transformers fills missing weights with random ones and goes on."""
    from safetensors.torch import load_file, save_file

    tiny.classifier("llama").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    renamed = {name.replace("model.", "encoder."): tensor for name, tensor in weights.items()}
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"11 backbone weights are missing, first model\.embed_tokens"):
        load(tmp_path)


def test_a_budget_beyond_the_positions_is_refused() -> None:
    config = tiny.classifier("bert").config
    check_budget(config, "m", 64)
    with pytest.raises(ModelError, match="m: max_tokens 65 is beyond its 64 positions"):
        check_budget(config, "m", 65)


def test_a_trained_tokenizer_has_its_own_special_tokens_and_loses_no_byte() -> None:
    tokenizer = train_tokenizer(["bread and butter", "bread and jam"] * 9, 300)
    assert [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id] == [0, 1, 2]
    text = "bread, Brot und ¡pan! 面包 🍞"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tokenizer("bread")["input_ids"]) < 6, "merges were learnt"
    assert len(tokenizer) <= 300


def test_a_trained_tokenizer_comes_back_from_disk(saved_tokenizer: Path, tmp_path: Path) -> None:
    moved = Path(shutil.move(saved_tokenizer, tmp_path / "moved"))
    found, made = load_tokenizer(str(moved)), tiny.tokenizer()
    assert found("a few words")["input_ids"] == made("a few words")["input_ids"]
    assert (found.pad_token, found.padding_side) == ("<pad>", "right")
