"""A config's models as they lie on disk, and the rows as each of them reads them."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkd.schema import Config
from llmkd.schema_models import Model
from llmkd.settings import seed_of, text_settings

if TYPE_CHECKING:
    import pyarrow as pa

    from llmkd.batches import Examples


@cache
def settle() -> None:
    """Once in a process, after its imports and before its first model: what they left is never searched for
    garbage again, at 0.3 seconds a time, as each training starts and ends with a search."""
    gc.collect()
    gc.freeze()


def load_in(model: Model, precision: str) -> str:
    """A frozen base is held in the arithmetic's own precision; weights that are trained, in float32."""
    if model.load_in != "auto":
        return model.load_in
    return precision if model.lora else "fp32"


def load_model(
    config: Config, model: Model, source: str, labels: Sequence[str], precision: str
) -> tuple[Any, Any]:
    """A classifier or a language model, with its adapter where it has one, on its device; its tokenizer.

    One of the package's nets comes with its features' spec in place of a tokenizer.
    """
    from llmkd.models.load import on_device
    from llmkd.models.lora import add_lora

    settle()
    gc.collect()  # the model before this one, where there was one: its trainer holds it in a cycle
    network, reader = load_base(config, model, source, labels, load_in(model, precision))
    if model.lora:
        causal = config.task.kind == "causal_lm"
        network = add_lora(network, causal=causal, **model.lora.model_dump())
    return on_device(network, model.load_in), reader


def load_base(
    config: Config, model: Model, source: str, labels: Sequence[str], held_in: str
) -> tuple[Any, Any]:
    """A model for the task without an adapter, in fp32, bf16, nf4 or int8; and what reads rows for it."""
    if model.is_net:
        from transformers import AutoModelForSequenceClassification

        from llmkd import features
        from llmkd.models.nets import register

        register()
        network = AutoModelForSequenceClassification.from_pretrained(
            source, local_files_only=True, trust_remote_code=False
        )
        return network.float(), features.load(Path(source))
    from transformers import set_seed

    from llmkd.models.load import check_budget, load_causal_lm, load_classifier, load_tokenizer

    trust = {"trust_remote_code": model.trust_remote_code}
    tokenizer = load_tokenizer(source, model.pad_token, **trust)
    if config.task.kind == "causal_lm":
        network = load_causal_lm(source, load_in=held_in, attention=model.attention, **trust)
        set_seed(seed_of(config, model))  # an adapter is drawn next, alike on every rank
        check_budget(network.config, source, model.max_tokens or config.task.max_tokens)
        return network, tokenizer
    network = load_classifier(
        source,
        labels,
        load_in=held_in,
        pad_id=int(tokenizer.pad_token_id),  # type: ignore[arg-type]
        attention=model.attention,
        seed=seed_of(config, model),
        **trust,
    )
    check_budget(network.config, source, model.max_tokens or config.task.max_tokens)
    return network, tokenizer


def examples_of(config: Config, model: Model, table: pa.Table, reader: Any) -> Examples:
    """All rows as one model reads them: in its tokenizer's ids, or by its features' spec. A language
    model's are the training rows alone, less those without a target."""
    from llmkd import crossfit, features
    from llmkd.ids import Ids

    settings = text_settings(config, model)
    if config.task.kind == "causal_lm":
        from llmkd import lm_rows

        return lm_rows.examples(table, reader, "train", **settings)[0]
    if not model.is_net:
        return crossfit.text_examples(table, reader, config.task.kind, **settings)
    return features.examples(table, reader, Ids(table["id"]), crossfit.training_labels(table), **settings)
