"""Models and tokenizers: from a hub id, a directory, or a tiny config with random weights."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmkd.errors import ModelError
from llmkd.models.hub import from_hub, register_nets
from llmkd.models.lora import NEW, head_modules
from llmkd.models.pooling import resolve_precision

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load_tokenizer(
    source: str, pad_token: str | None = None, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint, with a pad token that is no other token of a text.

    trust_remote_code: here as below, whether Python code that comes with the checkpoint may be run.
    Raises ModelError where there is none and `pad_token` does not name one.
    """
    from transformers import AutoTokenizer

    tokenizer = from_hub(AutoTokenizer, source, trust_remote_code=trust_remote_code)
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


def on_device(model: Any, load_in: str = "fp32") -> Any:
    """The model on this process's accelerator, if there is one; an nf4 or int8 base was read onto it."""
    return model.to("cuda") if torch.cuda.is_available() and load_in not in ("nf4", "int8") else model


def load_classifier(
    source: str,
    labels: Sequence[str],
    *,
    load_in: str,
    pad_id: int,
    attention: str | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A sequence classifier with one logit a label. load_in: fp32, bf16, nf4 or int8.

    A checkpoint without a head, or an encoder's without a pooler, gets a random one, drawn from `seed`;
    heads (see `llmkd.models.lora.head_modules`) stay in float32.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification, set_seed

    config = from_hub(AutoConfig, source, trust_remote_code=trust_remote_code)
    _check_pad(config, source, pad_id)
    set_seed(seed)
    names = dict(enumerate(labels))
    with _sharded_as(load_in):
        model, loading = from_hub(
            AutoModelForSequenceClassification,
            source,
            output_loading_info=True,
            num_labels=len(labels),
            id2label=names,
            label2id={name: i for i, name in names.items()},
            pad_token_id=pad_id,
            trust_remote_code=trust_remote_code,
            **_weights(load_in, [] if load_in in DTYPES else _outside_blocks(config, trust_remote_code)),
            **({"attn_implementation": attention} if attention else {}),
        )
    model.__dict__[NEW] = _new_modules(source, model.base_model_prefix, loading["missing_keys"])
    model.config.get_text_config().pad_token_id = pad_id
    for name in head_modules(model):
        head = model.get_submodule(name).float()
        if load_in != "fp32":
            head.register_forward_pre_hook(_widen)
    return model


def _widen(head: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """A float32 head reads what a backbone of fewer bits gives it."""
    return tuple(
        value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for value in inputs
    )


def _outside_blocks(config: PreTrainedConfig, trust_remote_code: bool) -> list[str]:
    """Names of a classifier's modules beside its stack of blocks, such as head and pooler."""
    from transformers import AutoModelForSequenceClassification

    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config, trust_remote_code=trust_remote_code)
    stack, backbone = block_stack(model), model.base_model_prefix
    if stack is None:
        return [*head_modules(model), f"{backbone}.pooler"]
    inside = [f"{backbone}.{name}" for name, _ in getattr(model, backbone).named_children()]
    return [*head_modules(model), *(name for name in inside if not f"{stack}.".startswith(f"{name}."))]


def block_stack(model: torch.nn.Module) -> str | None:
    """Name of the one list of a model's blocks, such as `model.layers` or `bert.encoder.layer`, if any."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)  # type: ignore[operator, union-attr]
    lists = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == count
    ]
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    return outer[0] if len(outer) == 1 else None


def load_causal_lm(
    source: str, *, load_in: str, attention: str | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A decoder with its language-modelling head."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = from_hub(AutoConfig, source, trust_remote_code=trust_remote_code)
    if not (trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})):
        _refuse_encoder(config, source)
    more: dict[str, Any] = {"attn_implementation": attention} if attention else {}
    more |= {"trust_remote_code": trust_remote_code}
    with _sharded_as(load_in):
        return from_hub(AutoModelForCausalLM, source, **_weights(load_in), **more)


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


def _weights(load_in: str, whole: Sequence[str] = ()) -> dict[str, Any]:
    """What `from_pretrained` needs to hold weights so; the modules `whole` are never quantized.

    Where the machine computes no bf16 all around quantized weights is float32: a step in bf16 takes some
    twenty times as long there. Elsewhere it is bf16 around nf4, and the checkpoint's own around int8.
    """
    if load_in in DTYPES:
        return {"dtype": DTYPES[load_in]}
    from transformers import BitsAndBytesConfig

    around, skip = DTYPES[resolve_precision("auto")], [*whole, "lm_head"]
    if load_in == "int8":
        eight = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
        return {"quantization_config": eight, "dtype": "auto" if around == torch.bfloat16 else around}
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=around,
        llm_int8_skip_modules=skip,
    )
    return {"quantization_config": quantization, "dtype": around}


def _new_modules(source: str, prefix: str, missing: Iterable[str]) -> list[str]:
    """The backbone's modules that began at random. Only an encoder's pooler may: ModelError for others."""
    names = sorted(name for name in missing if name.startswith(f"{prefix}."))
    lost = [name for name in names if ".pooler." not in name]
    if lost:
        raise ModelError(
            f"{source}: {len(lost)} backbone weights are missing, first {lost[0]}; not this architecture"
        )
    return sorted({name.partition(".pooler.")[0] + ".pooler" for name in names})


def _refuse_encoder(config: PreTrainedConfig, source: str) -> None:
    """transformers loads BERT and its kin as causal LMs that see the tokens to come, without a word."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    masked = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    if masked or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
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


def keep_layers(
    source: str, layers: Sequence[int], directory: Path, *, trust_remote_code: bool = False
) -> None:
    """A shallower checkpoint: the blocks `layers` of the one at `source`, in that order, all else as it is.

    The start of a student that is smaller than its teacher (DistilBERT, Sanh et al. 2019, arXiv
    1910.01108). Writes model and tokenizer to `directory`, with the head that the checkpoint has, if any.
    Raises ModelError for a layer that does not exist, and for a model without one list of blocks.
    """
    from transformers import AutoConfig, AutoTokenizer

    trust = {"trust_remote_code": trust_remote_code}
    config = from_hub(AutoConfig, source, **trust)
    count = getattr(config.get_text_config(), "num_hidden_layers", 0)
    wrong = [layer for layer in layers if not 0 <= layer < count]
    if wrong or not layers:
        raise ModelError(f"{source}: keep_layers {[*layers]}: name layers of its {count}, 0 to {count - 1}")
    auto = _auto_class(config)
    model, loading = from_hub(auto, source, dtype="auto", output_loading_info=True, **trust)
    stack = block_stack(model)
    if stack is None:
        raise ModelError(
            f"{source}: {type(model).__name__} has no one list of {count} blocks to keep some of"
        )
    parent, _, name = stack.rpartition(".")
    blocks = model.get_submodule(stack)
    kept = torch.nn.ModuleList(copy.deepcopy(blocks[layer]) for layer in layers)
    setattr(model.get_submodule(parent), name, kept)
    _cut_config(model.config.get_text_config(), layers)
    missing = set(loading["missing_keys"])  # random here; left out, they are drawn where they are loaded
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in missing}
    model.save_pretrained(directory, state_dict=state)
    from_hub(AutoTokenizer, source, **trust).save_pretrained(directory)


def _auto_class(config: PreTrainedConfig) -> Any:
    import transformers

    written = (getattr(config, "architectures", None) or [""])[0]
    kinds = {
        "ForSequenceClassification": "AutoModelForSequenceClassification",
        "ForCausalLM": "AutoModelForCausalLM",
    }
    return getattr(transformers, next((kinds[end] for end in kinds if written.endswith(end)), "AutoModel"))


def _cut_config(config: Any, layers: Sequence[int]) -> None:
    """Settings that are lists with one entry a layer (`layer_types`) are cut along."""
    count = config.num_hidden_layers
    for name, value in config.to_dict().items():
        if "layer" in name and isinstance(value, list) and len(value) == count:
            setattr(config, name, [value[layer] for layer in layers])
    config.num_hidden_layers = len(layers)


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
    register_nets()
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
        model = auto.from_config(config, trust_remote_code=False)
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
