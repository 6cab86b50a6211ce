"""Measured peaks of training on a CPU beside those that `llmkd plan` tells.

    python benchmarks/plan_memory.py            # all cases, as a Markdown table
    python benchmarks/plan_memory.py llama      # those whose name has this in it

Each case is a training of two steps by `llmkd.train.fit` under torch's profiler, which sees every allocation
of a tensor, also inside a kernel. The peak is the highest sum of allocations not yet freed, beside the
weights; it does not depend on how busy the machine is. On one thread: each further one holds blocks of its
own. Models have random weights and some 13M parameters.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

SIZES = {
    "vocab_size": 2000,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
DECODER = {**SIZES, "num_key_value_heads": 4}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": DECODER,
    "qwen2": {
        **DECODER,
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
    },
    "gemma2": {**DECODER, "head_dim": 64, "sliding_window": 512},
    "bert": {**SIZES, "intermediate_size": 2048},
}
ROWS, LENGTH, R = 4, 256, 16


def cases() -> dict[str, dict[str, Any]]:
    """Arguments of `measured` and `planned`, by name."""
    found = {}
    for architecture in CONFIGS:
        for lora in (False, True):
            for precision in ("bf16",) if architecture == "qwen2" else ("fp32", "bf16"):
                for checkpointing in (False, True):
                    name = f"{architecture} {'LoRA' if lora else 'full'} {precision}"
                    name += " checkpointed" if checkpointing else ""
                    found[name] = case(
                        architecture, lora=lora, precision=precision, checkpointing=checkpointing
                    )
    found["llama LoRA bf16, no dropout"] = case("llama", lora=True, precision="bf16", dropout=0.0)
    found["llama LoRA bf16, 16 x 64"] = case("llama", lora=True, precision="bf16", rows=16, length=64)
    found["gemma2 LoRA bf16, 1 x 512"] = case("gemma2", lora=True, precision="bf16", rows=1, length=512)
    found["bert full fp32, 16 x 64, a step of one batch"] = case("bert", rows=16, length=64, micros=1)
    big = {**DECODER, "vocab_size": 16000}
    found["llama full fp32, next tokens"] = case("llama", causal=True, sizes=big)
    found["llama full bf16, next tokens"] = case("llama", causal=True, sizes=big, precision="bf16")
    found["llama LoRA bf16, next tokens"] = case("llama", causal=True, sizes=big, precision="bf16", lora=True)
    for architecture, precision in (("llama", "fp32"), ("gemma2", "bf16")):
        for method in ("self_distillation", "feature"):
            name = f"{architecture} LoRA {precision}, {method}"
            found[name] = case(architecture, lora=True, precision=precision, method=method)
    found["llama LoRA nf4"] = case("llama", lora=True, precision="bf16", load_in="nf4")
    found["llama LoRA nf4 checkpointed"] = case(
        "llama", lora=True, precision="bf16", load_in="nf4", checkpointing=True
    )
    return found


def case(
    architecture: str,
    *,
    lora: bool = False,
    precision: str = "fp32",
    checkpointing: bool = False,
    dropout: float = 0.05,
    rows: int = ROWS,
    length: int = LENGTH,
    micros: int = 2,
    method: str = "cached",
    causal: bool = False,
    load_in: str | None = None,
    sizes: dict[str, Any] | None = None,
) -> dict[str, Any]:
    held = load_in or (precision if lora else "fp32")
    adapter = {"r": R, "alpha": 2 * R, "dropout": dropout, "targets": "all-linear"} if lora else None
    return {
        "config": {"model_type": architecture, **(sizes or CONFIGS[architecture])},
        "lora": adapter,
        "precision": precision,
        "checkpointing": checkpointing,
        "load_in": held,
        "rows": rows,
        "length": length,
        "micros": micros,
        "method": "next_token" if causal else method,
        "causal": causal,
    }


def planned(asked: dict[str, Any]) -> float:
    """Bytes, by the memory model, on a CPU."""
    from llmkd.planning import memory
    from llmkd.planning.shapes import from_config
    from llmkd.planning.way import Way, held, trained

    way = Way(
        asked["load_in"],
        asked["lora"],
        asked["precision"],
        None if asked["causal"] else 3,
        asked["checkpointing"],
        states=asked["method"] in ("self_distillation", "feature"),
        device="cpu",
    )
    shape, micro = from_config(asked["config"]), (asked["rows"], asked["length"])
    teacher = 0.0  # of its own kind, as `llmkd.planning.stages.company` counts it
    if asked["method"] == "feature":
        teacher = held(shape, way) + 4.0 * bool(way.lora) * trained(shape, way)
    return memory.training(shape, way, [micro], asked["micros"] > 1, beside=teacher)["peak"]


def measured(asked: dict[str, Any]) -> float:
    """Bytes: the model's own tensors, and the highest sum of live allocations of its training."""
    import numpy as np
    from torch.profiler import ProfilerActivity, profile

    from llmkd.train import arguments, fit

    count = 2 * asked["micros"] * asked["rows"]
    rows = random_rows(count, asked["length"], asked["config"]["vocab_size"])
    with tempfile.TemporaryDirectory() as directory:
        method = learning(asked, saved(asked, Path(directory)))
        gc.collect()  # what an earlier case left behind must not be freed within this one
        weights = tensors(method)
        training = arguments(Path(directory), epochs=1, learning_rate=1e-4)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
            fit(
                method,
                rows,
                np.arange(count),
                training,
                batch_rows=asked["micros"] * asked["rows"],
                batch_tokens=asked["rows"] * asked["length"],
                gradient_checkpointing=asked["checkpointing"],
            )
    return weights + peak(watched)


def tensors(model: Any) -> float:
    """Bytes of a model's parameters, with the scales of those that are quantized."""
    found = 0.0
    for parameter in model.parameters():
        found += parameter.untyped_storage().nbytes()
        state = getattr(parameter, "quant_state", None)
        inner = getattr(state, "state2", None)
        more = [getattr(one, name, None) for one in (state, inner) for name in ("absmax", "code")]
        found += sum(tensor.untyped_storage().nbytes() for tensor in more if tensor is not None)
    return found


def saved(asked: dict[str, Any], directory: Path) -> str:
    """A checkpoint of random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    torch.manual_seed(0)
    config = AutoConfig.for_model(**asked["config"], num_labels=3)
    auto = AutoModelForCausalLM if asked["causal"] else AutoModelForSequenceClassification
    auto.from_config(config).save_pretrained(directory / "model")
    return str(directory / "model")


def learning(asked: dict[str, Any], source: str) -> Any:
    """What the student learns by: exits at three depths, or the states of a teacher like itself."""
    from llmkd.methods.cached import Cached
    from llmkd.methods.feature import Feature
    from llmkd.methods.next_token import next_token
    from llmkd.methods.self_distillation import SelfDistillation
    from llmkd.objective import HARD

    model, precision = loaded(asked, source), asked["precision"]
    if asked["method"] == "self_distillation":
        return SelfDistillation(model, HARD, [1, 2, 3], precision=precision)
    if asked["method"] == "feature":
        teachers = {"teacher": loaded(asked, source)}
        return Feature(model, HARD, teachers, [("teacher", 4, 4)], precision=precision)
    return next_token(model, precision) if asked["causal"] else Cached(model, HARD, precision)


def loaded(asked: dict[str, Any], source: str) -> Any:
    """As the stages load it."""
    from llmkd.models.load import load_causal_lm, load_classifier
    from llmkd.models.lora import add_lora

    if asked["causal"]:
        model: Any = load_causal_lm(source, load_in=asked["load_in"])
    else:
        model = load_classifier(source, ["a", "b", "tie"], load_in=asked["load_in"], pad_id=0)
    return add_lora(model, causal=asked["causal"], **asked["lora"]) if asked["lora"] else model


def random_rows(count: int, length: int, vocabulary: int) -> Any:
    import numpy as np

    from llmkd.batches import token_examples

    random = np.random.default_rng(0)
    tokens = random.integers(3, vocabulary, count * length).astype(np.int32)
    offsets = np.arange(count + 1, dtype=np.int64) * length
    return token_examples([f"row{i}" for i in range(count)], tokens, offsets, random.integers(0, 3, count), 0)


def peak(watched: Any) -> float:
    """Of a finished profile. Raises RuntimeError where it saw what it did not begin with being freed."""
    events = watched.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    live = highest = lowest = 0
    for _, bytes_ in changes:
        live += bytes_
        highest, lowest = max(highest, live), min(lowest, live)
    if lowest < -1e6:
        raise RuntimeError(f"{-lowest} bytes from before the training were freed in it; run the case alone")
    return float(highest)


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", default="", help="a part of the cases' names")
    wanted = parser.parse_args().name
    torch.set_num_threads(1)
    print("| training | measured, MB | planned, MB | planned / measured |\n|---|---|---|---|")
    for name, asked in cases().items():
        if wanted in name:
            found, told = measured(asked), planned(asked)
            print(f"| {name} | {found / 1e6:.1f} | {told / 1e6:.1f} | {told / found:.3f} |", flush=True)


if __name__ == "__main__":
    main()
