"""merge: the exact mean of the folds, heads included, and a clear refusal of everything else."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    Qwen2Config,
    RobertaConfig,
    XLNetConfig,
)

from llmkd.errors import ModelError
from llmkd.merge import merge_folds

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_labels": 3,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, num_key_value_heads=2),
    "qwen2": Qwen2Config(**SIZES, num_key_value_heads=2),
    "gemma2": Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8),
    "bert": BertConfig(**SIZES),
    "roberta": RobertaConfig(**SIZES),  # its head has two layers
    "gpt2": GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, num_labels=3, pad_token_id=0),  # Conv1D
    "xlnet": XLNetConfig(vocab_size=50, d_model=32, d_inner=64, n_layer=2, n_head=4, num_labels=3),
}
IDS = torch.randint(2, 50, (4, 9), generator=torch.Generator().manual_seed(1))


def make_base(kind: str = "llama"):
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(CONFIGS[kind]).eval()


def make_fold(path: Path, seed: int, kind: str = "llama", **lora) -> Path:
    """An adapter with random factors and a random head, as training would leave one."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": TaskType.SEQ_CLS} | lora
    model = get_peft_model(make_base(kind), LoraConfig(**settings))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3 if "lora" in name else 1.0)
    model.save_pretrained(path)
    return path


def edit_config(fold: Path, **changes) -> None:
    file = fold / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(fold: Path, change) -> None:
    tensors = load_file(fold / "adapter_model.safetensors")
    save_file(change(tensors), fold / "adapter_model.safetensors")


def merged_by_peft(fold: Path, kind: str = "llama") -> dict[str, torch.Tensor]:
    return PeftModel.from_pretrained(make_base(kind), fold).merge_and_unload().state_dict()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize("kind", sorted(CONFIGS.keys() - {"xlnet"}))
def test_one_fold_gives_the_adapted_models_logits(kind, tmp_path):
    fold = make_fold(tmp_path / "a", 1, kind)
    adapted = logits(PeftModel.from_pretrained(make_base(kind), fold))
    merged = logits(merge_folds(make_base(kind), [fold]))
    assert (adapted - logits(make_base(kind))).abs().max() > 0.01  # the adapter does something
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "roberta"])
def test_delta_is_the_mean_of_the_merged_models(kind, tmp_path):
    folds = [make_fold(tmp_path / str(seed), seed, kind) for seed in range(3)]
    singles = [merged_by_peft(fold, kind) for fold in folds]
    for name, weight in merge_folds(make_base(kind), folds).state_dict().items():
        mean = torch.stack([single[name].double() for single in singles]).mean(0)
        torch.testing.assert_close(weight.double(), mean, rtol=1e-5, atol=1e-6, msg=name)


def test_head_is_the_mean_of_the_heads(tmp_path):
    folds = [make_fold(tmp_path / str(seed), seed) for seed in range(2)]
    key = "base_model.model.score.weight"
    heads = [load_file(fold / "adapter_model.safetensors")[key] for fold in folds]
    merged = merge_folds(make_base(), folds)
    torch.testing.assert_close(merged.score.weight.detach(), (heads[0] + heads[1]) / 2)


@pytest.mark.parametrize("how", ["delta", "factors"])
def test_five_equal_folds_give_back_the_one(how, tmp_path):
    fold = make_fold(tmp_path / "a", 1)
    one, five = merge_folds(make_base(), [fold]), merge_folds(make_base(), [fold] * 5, how=how)
    torch.testing.assert_close(logits(five), logits(one), rtol=1e-4, atol=1e-5)


def test_factors_are_averaged_one_by_one(tmp_path):
    folds = [make_fold(tmp_path / str(seed), seed) for seed in range(3)]
    merged = merge_folds(make_base(), folds, how="factors")
    tensors = [load_file(fold / "adapter_model.safetensors") for fold in folds]
    module = "model.layers.1.mlp.down_proj"
    names = (f"base_model.model.{module}.lora_{x}.weight" for x in "AB")
    a, b = (torch.stack([t[name] for t in tensors]).mean(0) for name in names)
    expected = make_base().get_submodule(module).weight + 2 * (b @ a)  # alpha 8 over r 4
    torch.testing.assert_close(merged.get_submodule(module).weight, expected)
    exact = merge_folds(make_base(), folds).get_submodule(module).weight
    assert (exact - expected).norm() > 0.1 * expected.norm()  # the folds diverge, and then it matters


@pytest.mark.parametrize(
    "lora",
    [
        {"use_rslora": True},
        {"alpha_pattern": {"q_proj": 32}, "rank_pattern": {r"layers.1.*down_proj": 2}},
        {"target_modules": ["q_proj"], "r": 7},
    ],
)
def test_scales_are_pefts(lora, tmp_path):
    fold = make_fold(tmp_path / "a", 1, **lora)
    adapted = logits(PeftModel.from_pretrained(make_base(), fold))
    torch.testing.assert_close(logits(merge_folds(make_base(), [fold])), adapted, rtol=1e-4, atol=1e-4)


def test_ranks_may_differ_under_delta_only(tmp_path):
    folds = [make_fold(tmp_path / "a", 1), make_fold(tmp_path / "b", 2, r=2)]
    singles = [merged_by_peft(fold) for fold in folds]
    name = "model.layers.0.mlp.up_proj.weight"
    weight = merge_folds(make_base(), folds).state_dict()[name]
    torch.testing.assert_close(weight, (singles[0][name] + singles[1][name]) / 2, rtol=1e-5, atol=1e-6)
    with pytest.raises(ModelError, match=r"use merge\.how: delta"):
        merge_folds(make_base(), folds, how="factors")


def test_bfloat16_base_is_rounded_once(tmp_path):
    folds = [make_fold(tmp_path / str(seed), seed) for seed in range(3)]
    base = make_base().bfloat16()
    wide = {name: value.float() for name, value in base.state_dict().items()}
    merged = merge_folds(base, folds).state_dict()
    exact = make_base()
    exact.load_state_dict(wide)
    for name, weight in merge_folds(exact, folds).state_dict().items():
        assert merged[name].dtype == torch.bfloat16
        assert torch.equal(merged[name], weight.bfloat16()), name


def test_whole_models_are_averaged(tmp_path):
    singles = []
    for seed in range(3):
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_config(CONFIGS["bert"])
        model.save_pretrained(tmp_path / str(seed))
        singles.append(model.state_dict())
    merged = merge_folds(make_base("bert"), [tmp_path / str(seed) for seed in range(3)]).state_dict()
    for name, weight in merged.items():
        torch.testing.assert_close(weight, sum(single[name] for single in singles) / 3, msg=name)


def test_merged_model_keeps_its_logits_on_disk(tmp_path):
    merged = merge_folds(make_base(), [make_fold(tmp_path / "a", 1), make_fold(tmp_path / "b", 2)])
    merged.save_pretrained(tmp_path / "out")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again), logits(merged))


def without(key):
    return lambda tensors: {name: value for name, value in tensors.items() if not name.endswith(key)}


def spoiled(key, value):
    def change(tensors):
        return {n: torch.full_like(t, value) if n.endswith(key) else t for n, t in tensors.items()}

    return change


def emptied(key):
    return lambda tensors: {n: torch.empty(0) if n.endswith(key) else t for n, t in tensors.items()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("score.weight"), "lacks the trained head score.weight"),
        (without("1.self_attn.q_proj.lora_B.weight"), "has no tensor model.layers.1.self_attn.q_proj.lora_B"),
        (spoiled("score.weight", float("nan")), "score.weight holds NaN"),
        (spoiled("0.self_attn.q_proj.lora_A.weight", float("inf")), "q_proj.lora_A.weight holds NaN or inf"),
        (emptied("score.weight"), "score.weight was saved empty"),
        (lambda t: t | {"base_model.model.odd.weight": torch.ones(2)}, "odd.weight, which the base has not"),
    ],
)
def test_bad_tensors_are_named(change, words, tmp_path):
    fold = make_fold(tmp_path / "a", 1)
    edit_tensors(fold, change)
    with pytest.raises(ModelError, match=words):
        merge_folds(make_base(), [fold])


def test_an_adapter_without_a_head_of_another_name_is_refused(tmp_path):
    """peft by itself saves `score` and `classifier` alone; XLNet's head would stay random."""
    fold = make_fold(tmp_path / "a", 1, "xlnet", target_modules=["layer_1"])
    with pytest.raises(ModelError, match=r"lacks the trained head logits_proj\.bias"):
        merge_folds(make_base("xlnet"), [fold])


def test_a_pooler_that_was_trained_in_full_is_merged_or_missed(tmp_path):
    lora = {"target_modules": ["query"], "modules_to_save": ["bert.pooler"]}
    folds = [make_fold(tmp_path / str(seed), seed, "bert", **lora) for seed in range(2)]
    key = "base_model.model.bert.pooler.dense.weight"
    poolers = [load_file(fold / "adapter_model.safetensors")[key] for fold in folds]
    merged = merge_folds(make_base("bert"), folds)
    torch.testing.assert_close(merged.bert.pooler.dense.weight.detach(), (poolers[0] + poolers[1]) / 2)
    for fold in folds:
        edit_tensors(fold, without("pooler.dense.weight"))
    with pytest.raises(ModelError, match=r"lacks the trained head bert\.pooler\.dense\.weight"):
        merge_folds(make_base("bert"), folds)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"bias": "all"}, "bias"),
        ({"peft_type": "IA3"}, "IA3"),
    ],
)
def test_adapters_that_are_not_plain_lora_are_refused(changes, words, tmp_path):
    fold = make_fold(tmp_path / "a", 1)
    edit_config(fold, **changes)
    with pytest.raises(ModelError, match=words):
        merge_folds(make_base(), [fold])


def test_folds_that_differ_are_named(tmp_path):
    one, other = make_fold(tmp_path / "a", 1), make_fold(tmp_path / "b", 2, target_modules=["q_proj"])
    with pytest.raises(ModelError, match=r"a has .*lora_A.weight and .*b has not"):
        merge_folds(make_base(), [one, other])
    third = make_fold(tmp_path / "c", 3)
    edit_config(third, base_model_name_or_path="somewhere/else")
    with pytest.raises(ModelError, match="somewhere/else"):
        merge_folds(make_base(), [one, third])
    make_base().save_pretrained(tmp_path / "whole")
    with pytest.raises(ModelError, match="is an adapter, the other a whole model"):
        merge_folds(make_base(), [one, tmp_path / "whole"])


def test_another_base_is_refused(tmp_path):
    fold = make_fold(tmp_path / "a", 1)
    with pytest.raises(ModelError, match=r"lacks the trained head classifier"):
        merge_folds(make_base("bert"), [fold])
    short = AutoModelForSequenceClassification.from_config(
        LlamaConfig(**SIZES | {"num_hidden_layers": 1}, num_key_value_heads=2)
    )
    with pytest.raises(ModelError, match=r"model.layers.1.* which the base has not"):
        merge_folds(short, [fold])
    wide = AutoModelForSequenceClassification.from_config(
        LlamaConfig(**SIZES | {"intermediate_size": 96}, num_key_value_heads=2)
    )
    with pytest.raises(ModelError, match=r"the base's weight \(32, 96\)"):
        merge_folds(wide, [fold])


def test_missing_files_and_arguments(tmp_path):
    with pytest.raises(ModelError, match="over 0 folds"):
        merge_folds(make_base(), [])
    with pytest.raises(ModelError, match=r"no adapter_config\.json nor config\.json"):
        merge_folds(make_base(), [tmp_path])
    fold = make_fold(tmp_path / "a", 1)
    with pytest.raises(ModelError, match="use delta or factors"):
        merge_folds(make_base(), [fold], how="linear")  # type: ignore[arg-type]
    (fold / "adapter_model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(ModelError, match="damaged"):
        merge_folds(make_base(), [fold])
    (fold / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no adapter_model\.safetensors"):
        merge_folds(make_base(), [fold])


def test_a_quantized_base_is_refused(tmp_path):
    base = make_base()
    base.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(ModelError, match="load it afresh in float32"):
        merge_folds(base, [make_fold(tmp_path / "a", 1)])
