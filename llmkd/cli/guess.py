"""What an unknown file is for: the kind of task, the column of each field, the labels, and why."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from llmkd.canonical import OWN_COLUMNS
from llmkd.cli import pairs
from llmkd.cli.columns import Column, hinted
from llmkd.errors import DataError

LABEL = "label class category target winner won preferred preference sentiment stars star rating topic intent"
LABEL += " verdict outcome income grade score choice vote result y"
PROMPT = "prompt question query instruction input context request user"
KEY = "id uid uuid guid key nr"
NAMES = {0: "a", 1: "b", 2: "tie"}


@dataclass
class Guess:
    """What a config's `task:` says. `fields` maps a task's field to its column; `why` has a line a guess."""

    kind: str
    fields: dict[str, str] = field(default_factory=dict)
    label: str | list[str] | None = None
    labels: list[str] = field(default_factory=list)
    label_values: dict[str, int] | None = None
    numeric: list[str] = field(default_factory=list)
    categorical: list[str] = field(default_factory=list)
    id: str | None = None
    turns: str = "text"
    chats: str | None = None  # the column that the texts were made from
    why: list[str] = field(default_factory=list)


def guess(columns: Sequence[Column], asked: Mapping[str, str], values: Mapping[str, str]) -> Guess:
    """asked: what flags say (kind, text, label, prompt, response_a, response_b, id); values: a winner's
    value -> a, b or tie. Raises DataError where a column is not there, or nothing can be told."""
    by_name = {column.name: column for column in columns}
    for what, name in asked.items():
        if what != "kind" and name not in by_name:
            raise DataError(f"--{what.replace('_', '-')} {name}: no such column; there are {_names(columns)}")
    for value, word in values.items():
        if word not in NAMES.values():
            raise DataError(f"--value {value}={word}: write a, b or tie")
    kind, why = _kind(columns, asked)
    found = {
        "preference": _preference,
        "classification": _classification,
        "tabular": _tabular,
        "causal_lm": _causal_lm,
    }[kind](columns, asked, values)
    found.id = asked.get("id") or _id(columns, found)
    found.why = [f"kind: {kind}, {why}", *found.why, _id_told(found, columns), *_unread(found, columns)]
    return found


def _kind(columns: Sequence[Column], asked: Mapping[str, str]) -> tuple[str, str]:
    names = [column.name.casefold() for column in columns]
    if "kind" in asked:
        return asked["kind"], "as you said"
    if asked.keys() & {"prompt", "response_a", "response_b"}:
        return "preference", "as you named its columns"
    if "text" not in asked and (pair := pairs.answers(columns)):
        return "preference", f"as `{pair[0].name}` and `{pair[1].name}` are two answers"
    if {"chosen", "rejected"} <= set(names):
        raise DataError(
            "columns chosen and rejected: which one won is told by their order, which a student must not "
            "read; shuffle them into response_a and response_b, and say in a column winner which one it was"
        )
    if any(column.kind == "chat" for column in columns):
        return "causal_lm", "as there are chats of role and content"
    long = "text" in asked or any(column.is_long for column in columns)
    labelled = "label" in asked or any(column.is_category for column in columns)
    if long and labelled:
        return "classification", "as there are texts and a column of a few values"
    if long:
        return "causal_lm", "as there are texts, and no column of a few values that could be a label"
    if labelled:
        return "tabular", "as there are numbers and categories, and no texts"
    raise DataError(
        f"no texts and no column of a few values among {_names(columns)}; name them: --text, --label"
    )


def _preference(columns: Sequence[Column], asked: Mapping[str, str], values: Mapping[str, str]) -> Guess:
    pair = pairs.answers(columns)
    a = asked.get("response_a") or (pair[0].name if pair else None)
    b = asked.get("response_b") or (pair[1].name if pair else None)
    if a is None or b is None:
        raise DataError(
            f"which two columns are the answers? name them: --response-a, --response-b; "
            f"there are {_names(columns)}"
        )
    rest = [column for column in columns if column.name not in (a, b, asked.get("label"))]
    texts = [column for column in rest if column.kind in ("text", "turns") and not column.is_category]
    likely = hinted(texts, PROMPT) or sorted(texts, key=lambda column: -column.characters)
    prompt = asked.get("prompt") or (likely[0].name if likely else None)
    if prompt is None:
        raise DataError(f"which column is the prompt? name it: --prompt, among {_names(columns)}")
    fields = {"prompt": prompt, "response_a": a, "response_b": b}
    found = Guess("preference", fields)
    by_name = {column.name: column for column in columns}
    if all(by_name[name].kind == "turns" for name in fields.values()):
        found.turns = "json"
    found.why = [f"{what}: column `{name}`, {_told(by_name[name])}" for what, name in fields.items()]
    _winner(
        found,
        [column for column in rest if column.name != prompt],
        by_name.get(asked.get("label", "")),
        values,
    )
    return found


def _winner(found: Guess, rest: Sequence[Column], asked: Column | None, values: Mapping[str, str]) -> None:
    a, b = found.fields["response_a"], found.fields["response_b"]
    if not asked and (flags := pairs.one_hot(hinted(rest, LABEL), a, b) or pairs.one_hot(rest, a, b)):
        found.label, found.labels = flags, [NAMES[number] for number in range(len(flags))]
        shown = ", ".join(f"`{name}`" for name in flags)
        found.why.append(f"label: columns {shown}: of each row one is 1, where a, b or a tie won")
        return
    few = [column for column in rest if column.is_category]
    candidates = [asked] if asked else [*hinted(few, LABEL), *few]
    numbers = {
        value: number for value, word in values.items() for number, name in NAMES.items() if name == word
    }
    for column in candidates:
        told = numbers if set(column.values) <= set(numbers) else pairs.winner(column.values, a, b)
        if told:
            found.label, by_number = column.name, {told[value]: value for value in column.values}
            found.labels = [
                by_number[number] for number in sorted(by_number)
            ]  # predictions in the file's words
            if column.kind == "number" or len(by_number) < len(column.values):
                found.labels = [NAMES[number] for number in sorted(by_number)]
                found.label_values = {value: told[value] for value in column.values}
            counts = zip(column.values, column.counts, strict=True)
            shown = ", ".join(f"{value!r} ({count}) = {NAMES[told[value]]}" for value, count in counts)
            found.why.append(f"label: column `{column.name}`: {shown}")
            return
    seen = f" `{candidates[0].name}` holds {', '.join(candidates[0].values[:6])};" if candidates else ""
    raise DataError(f"who won?{seen} name the column and its values: --label, --value VALUE=a|b|tie")


def _classification(columns: Sequence[Column], asked: Mapping[str, str], values: Mapping[str, str]) -> Guess:
    by_name = {column.name: column for column in columns}
    text = by_name[asked["text"]] if "text" in asked else _longest(columns)
    found = Guess("classification", {"text": text.name})
    why = "as you said" if "text" in asked else "the longest strings"
    found.why.append(f"text: column `{text.name}`, {why} ({_told(text)})")
    _label(found, [column for column in columns if column is not text], asked)
    return found


def _causal_lm(columns: Sequence[Column], asked: Mapping[str, str], values: Mapping[str, str]) -> Guess:
    chats = [column for column in columns if column.kind == "chat"]
    if chats and "text" not in asked:
        column = chats[0]
        why = f"messages: column `{column.name}`, chats of role and content"
        return Guess("causal_lm", {"messages": column.name}, why=[why])
    by_name = {column.name: column for column in columns}
    text = by_name[asked["text"]] if "text" in asked else _longest(columns)
    return Guess("causal_lm", {"text": text.name}, why=[f"text: column `{text.name}`, {_told(text)}"])


def _tabular(columns: Sequence[Column], asked: Mapping[str, str], values: Mapping[str, str]) -> Guess:
    found = Guess("tabular")
    _label(found, columns, asked)
    left_out, key = [], asked.get("id") or _id(columns, found)
    for column in columns:
        if column.name in (found.label, key):
            continue
        taken = column.name in OWN_COLUMNS or set('[]{}":,') & set(column.name)
        is_key = column.is_key and (column.kind == "text" or column.whole)
        if taken or is_key or column.kind not in ("number", "text") or column.distinct < 2:
            left_out.append(column.name)
        elif column.kind == "number":
            found.numeric.append(column.name)
        elif column.distinct <= max(50, column.rows // 10):
            found.categorical.append(column.name)
        else:
            left_out.append(column.name)
    if not found.numeric and not found.categorical:
        raise DataError(
            f"no column that could be a feature beside the label {found.label!r}: is it the label?"
        )
    found.why.append(f"features: {len(found.numeric)} numeric, {len(found.categorical)} categorical")
    if left_out:
        told = ", ".join(f"`{name}`" for name in left_out)
        found.why.append(f"left out: {told}: no feature, or of a name that is taken or that LightGBM refuses")
    return found


def _label(found: Guess, columns: Sequence[Column], asked: Mapping[str, str]) -> None:
    few = [column for column in columns if column.is_category]
    likely = hinted(few, LABEL) or sorted(few, key=lambda column: (column.missing, -few.index(column)))
    if "label" in asked:
        label = next((column for column in columns if column.name == asked["label"]), None)
        if label is None:
            raise DataError(f"--label {asked['label']}: is the text; name the text, too: --text")
        if not 2 <= label.distinct <= min(100, label.rows // 2):
            raise DataError(f"--label {label.name}: {label.distinct} distinct values; a label has 2 to 100")
    elif likely:
        label = likely[0]
    else:
        raise DataError(f"which column is the label? name it: --label, among {_names(columns)}")
    found.label, found.labels = label.name, _ordered(label)
    if label.kind == "number":  # or the file's 1 would be taken for the class of number 1
        found.label_values = {value: number for number, value in enumerate(found.labels)}
    shown = ", ".join(f"{value!r} ({count})" for value, count in zip(label.values, label.counts, strict=True))
    found.why.append(f"label: column `{label.name}`, {label.distinct} distinct values: {shown[:300]}")
    others = [f"`{column.name}`" for column in few if column is not label]
    if others and "label" not in asked:
        found.why.append(f"  it could also be {', '.join(others[:5])}: --label to correct it")


def _ordered(label: Column) -> list[str]:
    return sorted(
        label.values,
        key=float if label.kind == "number" and label.values[0] not in ("true", "false") else None,
    )


def _id(columns: Sequence[Column], found: Guess) -> str | None:
    others = _others(found, columns)
    keys = [column for column in columns if column.is_key and column.name in others and not column.is_long]
    named = hinted(keys, KEY)
    return named[0].name if named else None


def _id_told(found: Guess, columns: Sequence[Column]) -> str:
    if found.id:
        return f"id: column `{found.id}`, a value of its own in each row"
    rest = [column for column in columns if column.name in _others(found, columns) and not column.is_key]
    twice = [column for column in hinted(rest, KEY) if column.distinct > column.rows // 2]
    why = f", as `{twice[0].name}` is blank or the same in some rows" if twice else ""
    return f"id: none{why}; rows count"


def _unread(found: Guess, columns: Sequence[Column]) -> list[str]:
    """What no model will see, as a reader may take more to be read than is."""
    others = [] if found.kind == "tabular" else _others(found, columns)  # which tells what it left out
    said = [f"not read: {', '.join(f'`{name}`' for name in others)}"] if others else []
    texts = [column.name for column in columns if column.name in others and column.is_long]
    if found.kind == "classification" and texts:
        told = ", ".join(f"`{name}`" for name in texts)
        said.append(f"  texts, too: {told}; two answers to compare are told by --response-a, --response-b")
    return said


def _others(found: Guess, columns: Sequence[Column]) -> list[str]:
    used = {*found.fields.values(), *found.numeric, *found.categorical, found.id}
    used |= {*(found.label if isinstance(found.label, list) else [found.label])}
    return [column.name for column in columns if column.name not in used]


def _longest(columns: Sequence[Column]) -> Column:
    texts = [column for column in columns if column.kind == "text"]
    if not texts:
        raise DataError(f"which column is the text? name it: --text, among {_names(columns)}")
    return max(texts, key=lambda column: column.characters)


def _told(column: Column) -> str:
    return f"median {column.characters:g} characters"


def _names(columns: Sequence[Column]) -> str:
    return ", ".join(f"`{column.name}`" for column in columns)
