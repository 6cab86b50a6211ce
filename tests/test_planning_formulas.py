"""What one model takes: parameters, operations and bytes by formula, against torch and published sizes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from llmkd.planning import activations, lookup, memory, shapes, work
from llmkd.planning.way import Way, Zero, adapters, held, read_zero, trained

# millions of parameters as published with the models, language-modelling head included; encoders' backbones
PUBLISHED = {
    "meta-llama/Meta-Llama-3-8B": 8030.26,
    "meta-llama/Meta-Llama-3-70B-Instruct": 70553.71,
    "meta-llama/Llama-3.2-1B": 1235.81,
    "meta-llama/Llama-3.2-3B": 3212.75,
    "mistralai/Mistral-7B-v0.1": 7241.73,
    "mistralai/Mistral-7B-v0.3": 7248.02,
    "Qwen/Qwen2-0.5B": 494.03,
    "Qwen/Qwen2.5-1.5B": 1543.71,
    "Qwen/Qwen2.5-3B": 3085.94,
    "Qwen/Qwen2-7B": 7615.62,
    "Qwen/Qwen2.5-14B": 14770.03,
    "Qwen/Qwen2.5-32B": 32763.88,
    "Qwen/Qwen2-72B-Instruct": 72706.20,
    "google/gemma-2-2b": 2614.34,
    "google/gemma-2-9b-it": 9241.71,
    "google/gemma-2-27b": 27227.13,
    "sentence-transformers/all-MiniLM-L6-v2": 22.71,
    "bert-base-uncased": 109.48,
    "microsoft/deberta-v3-base": 183.83,
}
SMALL = {
    **tiny.CONFIGS,
    "mistral": tiny.DECODER,
    "deberta-v2": {
        **tiny.SIZES,
        "position_buckets": 8,
        "relative_attention": True,
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
        "position_biased_input": False,
        "pos_att_type": ["p2c", "c2p"],
        "type_vocab_size": 0,
    },
}
LORA = {"r": 4, "alpha": 8.0, "dropout": 0.0, "targets": "all-linear"}


def small(architecture: str, **more: Any) -> shapes.Shape:
    return lookup.from_init(architecture, {**SMALL[architecture], "num_hidden_layers": 2, **more}, 64)


def way(**more: Any) -> Way:
    return Way(**{"load_in": "fp32", "lora": None, "precision": "fp32", "classes": 3, **more})


@pytest.mark.parametrize("name", PUBLISHED)
def test_known_shapes_have_the_published_number_of_parameters(name: str) -> None:
    shape = lookup.named(name)
    count = shape.backbone + (0 if shape.encoder else shape.head(None))
    assert count / 1e6 == pytest.approx(PUBLISHED[name], abs=0.006)


def test_every_listed_shape_is_published() -> None:
    listed = {json.dumps(entry["config"]) for entry in lookup.known().values()}
    assert listed == {json.dumps(lookup.known()[name.lower()]["config"]) for name in PUBLISHED}


@pytest.mark.parametrize("architecture", SMALL)
def test_the_formula_counts_what_a_model_has(architecture: str) -> None:
    settings = {**SMALL[architecture], "num_hidden_layers": 2, "num_labels": 3}
    model = classifier(architecture, settings)
    shape = shapes.from_config(model.config.to_dict())
    assert shape.backbone + shape.head(3) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "bert", "deberta-v2"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "query", "query_proj", "dense", "down_proj"]])
def test_the_formula_counts_what_lora_trains(architecture: str, targets: Any) -> None:
    from llmkd.models.lora import add_lora, trainable

    settings = {**SMALL[architecture], "num_hidden_layers": 2, "num_labels": 3}
    model = add_lora(classifier(architecture, settings), r=4, alpha=8, targets=targets)
    found = trained(small(architecture), way(lora={**LORA, "targets": targets}))
    assert found == sum(p.numel() for p in trainable(model).values())


def classifier(architecture: str, settings: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_config(AutoConfig.for_model(architecture, **settings))


def test_an_unfamiliar_architecture_is_counted_on_the_meta_device(tmp_path: Path) -> None:
    settings = {**tiny.DECODER, "head_dim": 16, "num_labels": 3}
    model = classifier("qwen3", settings)
    model.save_pretrained(tmp_path)
    shape = lookup.named(str(tmp_path))
    assert shape.backbone + shape.head(3) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "bert"])
def test_forward_operations_are_those_that_torch_counts(architecture: str) -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    settings = {**SMALL[architecture], "num_hidden_layers": 2, "num_labels": 3}
    model, ids = classifier(architecture, settings), torch.ones(3, 20, dtype=torch.int64)
    model.set_attn_implementation("eager")  # torch does not count the fused kernel of a CPU
    with FlopCounterMode(display=False) as counted:
        model(input_ids=ids, attention_mask=ids)
    batches = work.Batches(3, 1, 60.0, 3 * 20.0**2, ((3, 20),), False)
    told = work.running_flops(small(architecture), 3, batches)
    assert told == pytest.approx(counted.get_total_flops(), rel=0.02)  # less head and pooler


def test_training_operations_a_weight_and_token() -> None:
    shape, batches = small("llama"), work.Batches(1, 1, 1000.0, 0.0, ((1, 1),), False)
    weights = shape.layers * shape.block * 1000
    full = work.training_flops(shape, way(), batches)
    assert full == 6 * weights
    assert work.training_flops(shape, way(checkpointing=True), batches) == 8 * weights
    own = 6 * adapters(shape, LORA) * 1000
    assert work.training_flops(shape, way(lora=LORA), batches) == 4 * weights + own
    squared = work.Batches(1, 1, 0.0, 100.0, ((1, 10),), False)
    attention = 4 * 2 * shape.attention * 100
    assert work.running_flops(shape, 3, squared) == attention
    assert work.training_flops(shape, way(lora=LORA), squared) == 3 * attention


def test_states_without_sharding() -> None:
    shape = small("llama")
    count = shape.backbone + shape.head(3)
    alone = memory.states(shape, way())
    assert alone == {
        "weights": 4 * count,
        "gradients": 4 * count,
        "optimizer": 8 * count,
        "buffers": 0,
        "host": 0,
    }
    assert memory.states(shape, way(ranks=2))["buffers"] == 4 * count  # DDP's buckets
    adapted = memory.states(shape, way(lora=LORA, load_in="bf16"))
    learnt = trained(shape, way(lora=LORA))
    assert adapted["weights"] == 2 * shape.backbone + 4 * learnt
    assert adapted["gradients"] == 4 * learnt


def test_nf4_holds_only_linear_weights_in_four_bits() -> None:
    shape = lookup.named("meta-llama/Meta-Llama-3-70B-Instruct")
    linear = shape.layers * shape.block
    base = held(shape, way(load_in="nf4", lora=LORA))
    assert base == pytest.approx(linear * 0.516 + 2 * (shape.backbone - linear), rel=1e-3)
    assert 36e9 < base < 39e9


def test_states_sharded_by_zero() -> None:
    shape, n = small("llama"), 4
    count = shape.backbone + shape.head(3)
    by_stage = [
        memory.states(shape, way(ranks=n, zero=Zero(stage=stage, bucket=0, live=0, prefetch=0)))
        for stage in (1, 2, 3)
    ]
    assert [one["optimizer"] for one in by_stage] == [12 * count / n] * 3
    assert [one["gradients"] for one in by_stage] == [4 * count, count, count]
    assert [one["weights"] for one in by_stage] == [4 * count, 4 * count, count]
    gathered = memory.states(shape, way(ranks=n, zero=Zero(stage=3, bucket=0, live=10, prefetch=0)))
    assert gathered["buffers"] == pytest.approx(40)
    away = memory.states(shape, way(ranks=n, zero=Zero(stage=2, offload_optimizer=True)))
    assert (away["optimizer"], away["gradients"], away["host"]) == (0, 0, 16 * count / n)


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero2_offload", "zero3"])
def test_the_shipped_deepspeed_files(name: str) -> None:
    found = read_zero(str(tiny.ROOT / f"configs/deepspeed/{name}.json"))
    assert found.stage == int(name[4])
    assert found.offload_optimizer == name.endswith("offload")
    assert found.bucket == 5e8  # DeepSpeed's own, where the file says nothing


def test_checkpointing_and_smaller_batches_save_activations() -> None:
    shape = lookup.named("google/gemma-2-2b")
    lora = {**LORA, "dropout": 0.05}
    whole = activations.activations(shape, way(lora=lora, load_in="bf16", precision="bf16"), (8, 512))
    half = activations.activations(shape, way(lora=lora, load_in="bf16", precision="bf16"), (4, 512))
    again = activations.activations(
        shape, way(lora=lora, load_in="bf16", precision="bf16", checkpointing=True), (8, 512)
    )
    assert half == pytest.approx(whole / 2, rel=0.01)
    assert again < whole / 8
    # an eager model's scores grow with the square of a row
    long = activations.activations(shape, way(lora=lora, load_in="bf16", precision="bf16"), (2, 2048))
    assert long > 1.2 * whole


def test_a_head_that_only_its_model_can_compute_makes_whole_logits() -> None:
    plain = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    plain |= {"num_attention_heads": 2, "vocab_size": 32_000}
    found = [
        activations.head(shapes.from_config({**plain, **more}), way(classes=None), (8, 1024))
        for more in ({}, {"logits_scaling": 8.0})
    ]
    assert found[1] > 8 * 1024 * 32_000 * 10
    assert found[0] < 0.1 * found[1]


def test_blocks_and_chunks_are_those_that_compute() -> None:
    from llmkd import chunked, closed_form
    from llmkd.models import blocks, passes

    planned = activations.CHUNK, activations.FEW, activations.WIDE, activations.QUERIES, activations.NUMBERS
    assert planned == (chunked.CHUNK, chunked.FEW, closed_form.WIDE, blocks.QUERIES, passes.NUMBERS)


def test_dropout_before_adapters_keeps_its_zeros_alone() -> None:
    shape, lora = small("llama"), {**LORA, "dropout": 0.1}
    widths = sum(width for _, width in shape.read("all-linear"))
    saved = (
        [activations.block_saved(shape, way(lora=one, device=device), 16) for one in (LORA, lora)]
        for device in ("cpu", "cuda")
    )
    (plain, on_cpu), (_, on_cuda) = saved
    assert on_cpu - plain == pytest.approx(0.8 * widths)
    assert on_cuda - plain == widths


def test_where_hidden_states_are_looked_at_the_last_layer_is_counted_whole() -> None:
    shape = small("llama", num_hidden_layers=4)
    short, whole, first = (
        activations.activations(shape, way(device="cpu", states=states, zero=Zero(stage)), (8, 32))
        for states, stage in ((False, 0), (True, 0), (False, 3))
    )
    assert whole == first, "under ZeRO-3 every layer is whole"
    assert whole - short > 0.5 * 8 * 32 * activations.block_saved(shape, way(device="cpu"), 32)


def test_batches_are_those_that_training_cuts() -> None:
    lengths = np.random.default_rng(0).integers(5, 60, 300)
    one = work.training_batches(lengths, 300, 32, 256)
    two = work.training_batches(lengths, 300, 32, 256, ranks=2)
    assert one.steps == 10
    assert max(rows * length for rows, length in one.largest) <= 256
    assert 300 * lengths.mean() < one.tokens < 1.3 * 300 * lengths.mean()
    assert one.accumulated
    assert two.steps == 10
    assert work.training_batches(lengths, 3000, 32, 256).tokens == pytest.approx(10 * one.tokens, rel=0.05)
