"""What a call was given: models, labels and rows, checked before any weights are read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pyarrow as pa

from llmkd import rows
from llmkd.canonical import canonical
from llmkd.errors import DataError, ModelError
from llmkd.sources import read as read_source

if TYPE_CHECKING:
    import datasets
    import pandas as pd
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llmkd.batches import Rows

    Model: TypeAlias = str | Path | PreTrainedModel
    Source: TypeAlias = Model | tuple[Model, PreTrainedTokenizerBase]
    Data: TypeAlias = str | Path | pa.Table | pd.DataFrame | datasets.Dataset


@dataclass(frozen=True)
class Given:
    """A model as it was given, with what is known of it before its weights are read."""

    who: str
    model: str | PreTrainedModel
    config: Any
    tokenizer: PreTrainedTokenizerBase
    architecture: str

    @property
    def is_classifier(self) -> bool:
        return self.architecture.endswith("ForSequenceClassification")

    @property
    def labels(self) -> list[str]:
        return [str(self.config.id2label[i]) for i in range(self.config.num_labels)]


def given(role: str, source: Source, tokenizer: PreTrainedTokenizerBase | None, max_tokens: int) -> Given:
    """What was given, checked as far as its configuration tells. Raises ModelError."""
    from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

    from llmkd.models.hub import from_hub
    from llmkd.models.load import check_budget, load_tokenizer
    from llmkd.models.pooling import unwrapped

    model, own = source if isinstance(source, tuple) else (source, None)
    if isinstance(model, (str, Path)):
        model, who = str(model), f"{role} {model}"
        config = from_hub(AutoConfig, model)
        architecture = (getattr(config, "architectures", None) or ["a bare backbone"])[0]
        own = load_tokenizer(model) if own is None else own
    elif isinstance(unwrapped(model), PreTrainedModel):
        config, architecture = model.config, type(unwrapped(model)).__name__
        who, own = f"{role} ({architecture})", tokenizer if own is None else own
    else:
        raise ModelError(f"{role}: a {type(model).__name__} is no model: give a name, a path or the model")
    if not isinstance(own, PreTrainedTokenizerBase):
        raise ModelError(f"{who} has no tokenizer: give (model, tokenizer), or tokenizer= for all objects")
    one = Given(who, model, config, own, architecture)
    if (role == "teacher" or not isinstance(model, str)) and not one.is_classifier:
        raise ModelError(f"{who} is {architecture}, no sequence classifier: fine-tune it as one first")
    if role == "student" and getattr(config, "quantization_config", None):
        raise ModelError(f"{who} is quantized and cannot learn: give the checkpoint it was made from")
    if own.pad_token_id is None:
        raise ModelError(
            f"{who}: its tokenizer has no pad token: set tokenizer.pad_token to a reserved token"
        )
    known = config.get_text_config().vocab_size
    if len(own) > known:
        raise ModelError(
            f"{who} embeds {known} tokens, its tokenizer has {len(own)}: give it its own tokenizer"
        )
    check_budget(config, who, max_tokens)
    return one


def name_of(one: Given) -> str:
    """For the manifest, which names no absolute path."""
    if not isinstance(one.model, str):
        return one.architecture
    return Path(one.model).name if Path(one.model).is_dir() else one.model


def declared(data: Data, label_column: str) -> list[str]:
    """The class names that a datasets.Dataset carries with its labels, if any."""
    features = getattr(data, "features", None) if hasattr(data, "with_format") else None
    return list(getattr((features or {}).get(label_column), "names", ()))


def label_names(
    teachers: Sequence[Given], student: Given, asked: Sequence[str] | None, declared: Sequence[str]
) -> list[str]:
    """The labels in order, as asked for, or as the first of teachers, dataset and student names them.

    Names are compared wherever two sides have them, whatever their case; LABEL_0 and 0 are no names. The
    dataset's are not compared where labels are asked for. Raises ModelError or DataError.
    """
    for one in teachers:
        if one.config.num_labels < 2 or one.config.problem_type not in (None, "single_label_classification"):
            what = one.config.problem_type or "1 label"
            raise ModelError(f"{one.who} does not choose one label of several ({what}): take one that does")
    sides = [("labels=", list(asked))] if asked else []
    sides += [(one.who, one.labels) for one in teachers]
    sides += [("train_dataset", list(declared))] if declared and not asked else []
    sides += [(student.who, student.labels)] if student.is_classifier else []
    named = [side for side in sides if are_names(side[1])]
    first, names = named[0] if named else sides[0]
    for who, others in sides:
        alike = [name.casefold() for name in others] == [name.casefold() for name in names]
        if len(others) != len(names) or (are_names(others) and not alike):
            raise ModelError(
                f"{who} has the labels {', '.join(others)}, {first} has {', '.join(names)}: all need the "
                "same in the same order (labels= says what those of the rows are called)"
            )
    return names


def are_names(labels: Sequence[str]) -> bool:
    return not all(re.fullmatch(rf"(LABEL_)?{i}", name) for i, name in enumerate(labels))


def labelled_rows(
    source: Mapping[str, Data],
    kind: str,
    columns: Mapping[str, str],
    label: str,
    labels: Sequence[str],
    dev_share: float,
    seed: int,
) -> tuple[pa.Table, dict[str, Rows], int]:
    """One table, its row numbers by use (train, dev, eval), and how many training rows were left out."""
    tables = {part: canonical_rows(part, data, kind, columns, label, labels) for part, data in source.items()}
    table, report = rows.prepare(
        tables["train"], tables.get("test"), kind=kind, swap=False, group=None, folds=1, seed=seed
    )
    train = np.flatnonzero(table["part"].to_numpy() == "train")
    dev = dev_rows(table.take(train), dev_share, seed)
    evaluated = np.flatnonzero(table["part"].to_numpy() == "test")
    return table, {"train": train[~dev], "dev": train[dev], "eval": evaluated}, report["leaks"]["dropped"]


def canonical_rows(
    part: Any, data: Data, kind: str, columns: Mapping[str, str], label: str, labels: Sequence[str]
) -> pa.Table:
    argument = "train_dataset" if part == "train" else "eval_dataset"
    raw = table_of(argument, data)
    for name in (*columns.values(), label):
        if name not in raw.column_names:
            there = ", ".join(raw.column_names)
            option = "label_column" if name == label else "text_column"
            remedy = f"set {option}=" if kind == "classification" or name == label else "rename one"
            raise DataError(f"{argument} has no column {name!r}: there are {there}; {remedy}")
    return canonical(raw, part=part, kind=kind, columns=columns, label=label, labels=labels)[0]


def dev_rows(train: pa.Table, share: float, seed: int) -> Any:
    """Which training rows choose the checkpoint, (N,) bool: stratified, equal texts on one side."""
    from sklearn.model_selection import train_test_split

    if not share:
        return np.zeros(train.num_rows, dtype=bool)
    groups, first = np.unique(train["group"].to_numpy(), return_index=True)
    classes = train["label"].to_numpy()[first]
    try:
        _, held = train_test_split(groups, test_size=share, stratify=classes, random_state=seed)
    except ValueError as error:
        raise DataError(f"dev_share={share}: the rows cannot be parted ({error}): set it to 0") from error
    return np.isin(train["group"].to_numpy(), held)


def table_of(argument: str, data: Data) -> pa.Table:
    if isinstance(data, (str, Path)):
        return read_source(str(data))
    if isinstance(data, pa.Table):
        return data
    import datasets
    import pandas as pd

    if isinstance(data, pd.DataFrame):
        return pa.Table.from_pandas(data, preserve_index=False)
    if isinstance(data, datasets.Dataset):
        return data.with_format("arrow")[:]
    raise DataError(
        f"{argument} is a {type(data).__name__}: give a datasets.Dataset (one split), a table or a path"
    )
