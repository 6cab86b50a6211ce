"""A config for a guess, as YAML with comments: tiny models that run anywhere, real ones to uncomment."""

import json
import re
from collections.abc import Iterator, Mapping
from string import Template
from typing import Any

from llmkd.cli.guess import Guess

TEMPLATE = "{prompt}\\nA: {response_a}\\nB: {response_b}\\nBest:"


def quoted(value: str) -> str:
    """Any text as a YAML scalar, whatever characters it has."""
    text = json.dumps(value, ensure_ascii=False)
    return re.sub("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]", lambda found: f"\\u{ord(found[0]):04x}", text)


def draft(guess: Guess, facts: Mapping[str, Any]) -> str:
    """The YAML of a run.

    facts: source, run, train, test (files), rows (train rows to use; None for all), all_rows, folds,
    max_tokens, fit (what was measured, in words), real_tokens (the same for a hub model's tokenizer),
    batch_rows, seed, drop (whether rows with empty texts are dropped).
    """
    models = {"tabular": TABULAR, "causal_lm": LANGUAGE}.get(guess.kind, TEXT)
    numbers = {key: str(value) for key, value in facts.items()}
    told = {**numbers, "source": quoted(facts["source"]), "run": quoted(facts["run"])}
    told["tta"] = (
        "\nevaluate: {tta: swap}  # both orders of a pair, averaged" if guess.kind == "preference" else ""
    )
    told["train_file"] = quoted(facts["train"])
    text = guess.fields.get("text", "text")
    told["texts"] = f", columns: {{text: {quoted(text)}}}" if text != "text" else ""
    told["task"] = "\n".join(task(guess, facts))
    told["folds"] = "\n".join(folds(guess, facts))
    return Template(HEAD + models).substitute(told)


def task(guess: Guess, facts: Mapping[str, Any]) -> Iterator[str]:
    yield f"  kind: {guess.kind}"
    yield f"  train: {quoted(facts['train'])}"
    yield f"  test: {quoted(facts['test'])}  # judges in the end; never enters a fold"
    if facts["rows"]:
        yield f"  rows: {facts['rows']}  # of {facts['all_rows']}, to run in minutes; remove it for all"
    if guess.fields:
        yield "  columns:  # field of the task: column in the file"
        yield from (f"    {field}: {quoted(column)}" for field, column in guess.fields.items())
    if guess.chats:
        yield f"    # messages: {quoted(guess.chats)}  # in its place, for real models"
    if guess.label:
        names = [guess.label] if isinstance(guess.label, str) else guess.label
        told = ", ".join(map(quoted, names))
        yield f"  label: {told if isinstance(guess.label, str) else f'[{told}]'}"
        yield f"  labels: [{', '.join(map(quoted, guess.labels))}]  # the classes, in order"
    if guess.label_values:
        yield "  label_values:  # value in the file: number of its class, from 0"
        yield from (f"    {quoted(value)}: {number}" for value, number in guess.label_values.items())
    if guess.id:
        yield f"  id: {quoted(guess.id)}"
    if guess.kind == "tabular":
        yield "  features:"
        for what, columns in (("numeric", guess.numeric), ("categorical", guess.categorical)):
            yield f"    {what}: [{', '.join(map(quoted, columns))}]"
        return
    if facts["drop"]:
        yield "  empty: drop  # some rows have no text"
    if guess.turns == "json":
        yield "  turns: json  # a field is a list of turns"
    if guess.kind == "preference":
        yield "  swap: true  # each row in both orders"
        yield f'  template: "{TEMPLATE}"  # real models: remove it'
    real = f"real models: about {facts['real_tokens']}"
    yield f"  max_tokens: {facts['max_tokens']}  # {facts['fit']}; {real}"


def folds(guess: Guess, facts: Mapping[str, Any]) -> Iterator[str]:
    group = {"preference": ", group: prompt", "classification": ", group: text"}.get(guess.kind, "")
    count = 1 if guess.kind == "causal_lm" else facts["folds"]
    yield f"folds: {{count: {count}{group}}}" + ("  # rows that share it stay together" if group else "")


HEAD = """\
# Written by llmkd init from $source. What is not named has its default (docs/config.md).
# As it stands it runs on a laptop, from nothing but this file and the data.
run: $run
seed: $seed
precision: fp32  # tiny models are fastest in it
task:
$task
$folds
"""

TEXT = """\
# Tiny models from random weights: they show that all of it fits together, and learn little.
teachers:
  - name: llama
    init:
      architecture: llama
      config: {
        hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, num_attention_heads: 2,
        num_key_value_heads: 2, max_position_embeddings: 512, initializer_range: 0.1
      }
      tokenizer: {vocab_size: 1000}
    lora: null  # trained in full
    epochs: 4
    learning_rate: 2.0e-3
    warmup: 0.1
    batch_rows: $batch_rows
  - name: qwen
    init:
      architecture: qwen2
      config: {
        hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, num_attention_heads: 4,
        num_key_value_heads: 2, max_position_embeddings: 512, initializer_range: 0.1
      }
      tokenizer: {vocab_size: 800}
    lora: null
    epochs: 4
    learning_rate: 2.0e-3
    warmup: 0.1
    batch_rows: $batch_rows
student:
  name: gemma
  init:
    architecture: gemma2
    config: {
      hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2,
      num_key_value_heads: 2, head_dim: 16, max_position_embeddings: 512, sliding_window: 512,
      initializer_range: 0.1
    }
    tokenizer: {vocab_size: 800}
  lora: null
distill:
  view: in_sample  # the logits of teachers on their own training rows; oof: of those that never saw a row
  baseline: true  # the same student without teachers, to see what they are worth
  epochs: 6
  learning_rate: 4.0e-3
  warmup: 0.1
  batch_rows: $batch_rows
quantize: {bits: 8, group_size: 32, calibration_rows: 128}$tta

# Real models, for GPUs: uncomment what follows, remove precision:, teachers:, student:, distill: and
# quantize: above, and raise max_tokens. Any hub id or directory of a model will do. See configs/lmsys.yaml
# for 70B, and llmkd plan for memory and hours.
# teachers:
#   - name: llama
#     model: meta-llama/Llama-3.1-8B-Instruct
#     pad_token: <|finetune_right_pad_id|>
#     load_in: nf4
#     lora: {r: 64, alpha: 128, dropout: 0.05}
#     learning_rate: 1.0e-5
#     warmup: 0.1
#     gradient_checkpointing: true
#   - name: qwen
#     model: Qwen/Qwen2.5-7B-Instruct
#     load_in: nf4
#     lora: {r: 64, alpha: 128, dropout: 0.05}
#     learning_rate: 1.0e-5
#     warmup: 0.1
#     gradient_checkpointing: true
# student:
#   name: gemma
#   model: google/gemma-2-2b-it
#   load_in: bf16
#   lora: {r: 64, alpha: 128, dropout: 0.05}
# distill:
#   baseline: true
#   epochs: 2
#   learning_rate: 5.0e-5
#   warmup: 0.1
#   gradient_checkpointing: true
# quantize: {bits: 8, group_size: 128, calibration_rows: 128}
"""

LANGUAGE = """\
# Tiny models from random weights: they show that all of it fits together, and learn little.
pretrain:  # the teacher learns the texts first
  - {objective: causal_lm, data: $train_file$texts, models: [llama], epochs: 3, learning_rate: 3.0e-3,
     batch_rows: 8, warmup: 0.05}
teachers:
  - name: llama
    init:
      architecture: llama
      config: {
        hidden_size: 96, intermediate_size: 256, num_hidden_layers: 2, num_attention_heads: 4,
        num_key_value_heads: 4, max_position_embeddings: 512
      }
      tokenizer: {vocab_size: 800}
student:  # of the teacher's vocabulary
  name: small
  init:
    architecture: llama
    config: {
      hidden_size: 64, intermediate_size: 128, num_hidden_layers: 1, num_attention_heads: 4,
      num_key_value_heads: 4, max_position_embeddings: 512
    }
    tokenizer: {vocab_size: 800}
  lora: null
distill:
  method: sequence
  baseline: true  # the same student without teachers, to see what they are worth
  epochs: 3
  learning_rate: 4.0e-3
  batch_rows: 8
  warmup: 0.05
quantize: {bits: 8, group_size: 32, calibration_rows: 128}

# Real models, for GPUs: uncomment what follows, remove precision:, pretrain:, teachers:, student:, distill:
# and quantize: above, and raise max_tokens. Teacher and student must share their vocabulary.
# teachers:
#   - name: qwen
#     model: Qwen/Qwen2.5-7B-Instruct
#     load_in: bf16
# student:
#   name: small
#   model: Qwen/Qwen2.5-0.5B-Instruct
#   lora: {r: 64, alpha: 128, dropout: 0.05}
# distill:
#   method: sequence
#   baseline: true
#   learning_rate: 5.0e-5
#   warmup: 0.05
#   gradient_checkpointing: true
# quantize: {bits: 8, group_size: 128, calibration_rows: 128}
"""

TABULAR = """\
teachers:
  - kind: lightgbm
    name: trees
    rounds: 500
    early_stopping: 50
    params: {learning_rate: 0.05, num_leaves: 15, min_data_in_leaf: 10}
student:
  name: net
  init: {architecture: llmkd-tabular, config: {hidden_sizes: [64, 64], embedding: 8, dropout: 0.1}}
distill:
  view: oof  # logits of trees that never saw a row
  baseline: true  # the same net without teachers, to see what they are worth
  epochs: 12
  learning_rate: 1.0e-3
  batch_rows: $batch_rows
merge: {dtype: fp32}
quantize: null  # GPTQ packs transformers, not small nets
"""
