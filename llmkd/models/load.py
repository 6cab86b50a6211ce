"""Models and tokenizers: from a hub id, a directory, or a tiny config with random weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmkd.errors import ModelError
from llmkd.models.lora import HEADS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load_tokenizer(source: str, pad_token: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint, with a pad token that is no other token of a text.

    Raises ModelError where there is none and `pad_token` does not name one.
    """
    from transformers import AutoTokenizer

    tokenizer = _from_hub(AutoTokenizer, source)
    if pad_token is not None:
        if tokenizer.convert_tokens_to_ids(pad_token) in (None, tokenizer.unk_token_id):
            raise ModelError(
                f"{source}: pad_token {pad_token!r} is not in its vocabulary; name a token that is"
            )
        tokenizer.pad_token = pad_token
    if tokenizer.pad_token_id is None:
        raise ModelError(
            f"{source}: its tokenizer has no pad token; set pad_token: to a reserved token (or its eos token)"
        )
    tokenizer.padding_side = "right"
    return tokenizer


def load_classifier(
    source: str,
    labels: Sequence[str],
    *,
    load_in: str,
    pad_id: int,
    attention: str | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """A sequence classifier with one logit a label. load_in: fp32, bf16, nf4 or int8.

    A checkpoint without a head gets a random one, drawn from `seed`; the head stays in float32.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification, set_seed

    _check_pad(_from_hub(AutoConfig, source), source, pad_id)
    set_seed(seed)
    names = dict(enumerate(labels))
    with _sharded_as(load_in):
        model, loading = _from_hub(
            AutoModelForSequenceClassification,
            source,
            output_loading_info=True,
            num_labels=len(labels),
            id2label=names,
            label2id={name: i for i, name in names.items()},
            pad_token_id=pad_id,
            **_weights(load_in),
            **({"attn_implementation": attention} if attention else {}),
        )
    _check_backbone(source, model.base_model_prefix, loading["missing_keys"])
    model.config.get_text_config().pad_token_id = pad_id
    for name in HEADS:
        if hasattr(model, name):
            getattr(model, name).float()
    return model


def load_causal_lm(source: str, *, load_in: str, attention: str | None = None) -> PreTrainedModel:
    """A decoder with its language-modelling head."""
    from transformers import AutoConfig, AutoModelForCausalLM

    _refuse_encoder(_from_hub(AutoConfig, source), source)
    more = {"attn_implementation": attention} if attention else {}
    with _sharded_as(load_in):
        return _from_hub(AutoModelForCausalLM, source, **_weights(load_in), **more)


@contextmanager
def _sharded_as(load_in: str) -> Iterator[None]:
    """ZeRO-3 shards what is loaded in the DeepSpeed config's own dtype, and that is float32 here, as the
    adapters are: without this a bf16 base would take twice its bytes."""
    from transformers.integrations.deepspeed import deepspeed_config, is_deepspeed_zero3_enabled

    config = deepspeed_config() if is_deepspeed_zero3_enabled() and load_in == "bf16" else None
    if config is None or "bf16" in config:
        yield
        return
    config["bf16"] = {"enabled": True}
    try:
        yield
    finally:
        del config["bf16"]


def _weights(load_in: str) -> dict[str, Any]:
    if load_in in DTYPES:
        return {"dtype": DTYPES[load_in]}
    from transformers import BitsAndBytesConfig

    skip = [*HEADS, "lm_head"]
    if load_in == "int8":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)}
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=skip,
    )
    return {"quantization_config": quantization, "dtype": torch.bfloat16}


def _from_hub(auto: Any, source: str, **arguments: Any) -> Any:
    """`auto.from_pretrained` with a one-line error; only safetensors are read, no remote code is run."""
    kind = auto.__name__
    if "Model" in kind:
        arguments["use_safetensors"] = True
    try:
        return auto.from_pretrained(source, **arguments)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"{source}: {kind} cannot load it: {reason}") from error


def _check_backbone(source: str, prefix: str, missing: Iterable[str]) -> None:
    """A head, and an encoder's pooler, may be new; any other weight that is missing would be random."""
    lost = sorted(name for name in missing if name.startswith(f"{prefix}.") and ".pooler." not in name)
    if lost:
        raise ModelError(
            f"{source}: {len(lost)} backbone weights are missing, first {lost[0]}; not this architecture"
        )


def _refuse_encoder(config: PreTrainedConfig, source: str) -> None:
    """transformers loads BERT and its kin as causal LMs that see the tokens to come, without a word."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        raise ModelError(
            f"{source}: {config.model_type} is an encoder; pretrain it with objective: supervised"
        )


def check_budget(config: PreTrainedConfig, source: str, max_tokens: int) -> None:
    """Raise ModelError where rows may be longer than the model has positions."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and max_tokens > positions:
        raise ModelError(
            f"{source}: max_tokens {max_tokens} is beyond its {positions} positions; lower max_tokens"
        )


def _check_pad(config: PreTrainedConfig, source: str, pad_id: int) -> None:
    known = config.get_text_config().vocab_size
    if pad_id >= known:
        raise ModelError(f"{source}: pad token id {pad_id} is beyond its {known} embeddings; choose another")


def init_model(
    architecture: str,
    settings: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    *,
    labels: Sequence[str],
    causal: bool,
    seed: int,
) -> None:
    """A model of random weights from a tiny config, saved in float32 beside its tokenizer."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, set_seed

    special = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    try:
        unknown = sorted(set(settings) - set(AutoConfig.for_model(architecture).to_dict()))
        if unknown:
            raise ValueError(f"{architecture} has no setting {unknown[0]!r}")
        config = AutoConfig.for_model(architecture, **{**special, **settings})
        if causal:
            _refuse_encoder(config, f"init: {architecture}")
        config.num_labels = len(labels)
        set_seed(seed)
        auto = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
        model = auto.from_config(config)
    except (ValueError, TypeError, KeyError, AssertionError, StrictDataclassError) as error:
        raise ModelError(
            f"init: {architecture} {dict(settings)}: {' '.join(str(error).split())[:300]}"
        ) from error
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer with <pad>, <bos>, <eos> of its own; every text starts with <bos>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<bos>", "<eos>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="right",
    )
