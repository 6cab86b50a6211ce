"""A run's YAML read into its schema: dotted overrides, every problem at once, what enters a fingerprint."""

import copy
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from llmkd.errors import ConfigError
from llmkd.schema import Config


class _Loader(yaml.SafeLoader):
    """YAML 1.2 where PyYAML has 1.1: there 1e-6 is a string, and a class called no is False."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [one for one in found if one[0] != "tag:yaml.org,2002:bool" or first in "tTfF"]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse(text: str, overrides: Sequence[str] = (), *, source: str = "config") -> Config:
    """A config from YAML text and dotted overrides (`distill.epochs=3`, `teachers.llama.lora.r=8`).

    Raises ConfigError with one line for each problem: source, path, value, remedy.
    """
    try:
        data = yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{source}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{source}: expected keys and values at the top, found {type(data).__name__}")
    for override in overrides:
        _override(data, override)
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        problems = _all_problems(data, error)
        raise ConfigError("\n".join(f"{source}: {line}" for line in problems)) from None
    config._given = shlex.join(["--config", source, *overrides])
    return config


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config at `path`; see `parse`."""
    if not Path(path).is_file():
        raise ConfigError(f"{path}: no such config file; shipped ones are in configs/")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}: save it as UTF-8") from None
    return parse(text, overrides, source=str(path))


def _all_problems(data: dict[str, Any], error: ValidationError) -> list[str]:
    """Also the checks across sections, which pydantic leaves out while any field is faulty: they are
    made with the defaults of the faulty fields, where these have any."""
    found, left = list(_problems(data, error)), copy.deepcopy(data)
    if [problem["loc"] for problem in error.errors()] == [()]:
        return found
    removed = [_removed(left, _place(data, problem["loc"])) for problem in error.errors()]
    if all(removed):
        try:
            Config.model_validate(left)
        except ValidationError as more:
            if all(problem["loc"] == () for problem in more.errors()):
                faulty = tuple(".".join(map(str, _place(data, one["loc"]))) for one in error.errors())
                # a default that stands in for a faulty value is not the user's, and no fault of theirs
                found += (line for line in _problems(data, more) if not line.startswith(faulty))
    return found


def _place(data: dict[str, Any], place: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """A fault's place in the user's own words: `student` for a chain of one, no names of variants."""
    if place[:1] == ("students",) and "students" not in data:
        place = ("student", *place[2:])
    if place[:1] == ("teachers",) and len(place) > 2 and place[2] in ("llm", "lightgbm", "file"):
        place = (*place[:2], *place[3:])
    return place


def _removed(data: Any, place: tuple[str | int, ...]) -> bool:
    """Whether the value at `place` could be taken out, so that its default stands in."""
    for part in place[:-1]:
        data = data.get(part) if isinstance(data, dict) else None
    return bool(place) and isinstance(data, dict) and data.pop(place[-1], None) is not None


def _problems(data: dict[str, Any], error: ValidationError) -> Iterator[str]:
    for problem in error.errors():
        if problem["type"] == "default_factory_not_called":  # only echoes another fault of its section
            continue
        where = ".".join(str(part) for part in _place(data, problem["loc"]))
        message = problem["msg"].removeprefix("Value error, ")
        value = problem["input"]
        missing = problem["type"] == "missing"
        shown = "" if missing or isinstance(value, (dict, BaseModel)) else f" = {value!r:.80}"
        for line in message.split("\n"):
            yield f"{where}{shown}: {line}" if where else line


def _override(data: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"override {override!r}: write key.subkey=value")
    try:
        value = yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError):
        raise ConfigError(f"override {override!r:.80}: the value is not YAML") from None
    *parents, last = path.split(".")
    here: Any = data
    for part in parents:
        here = _child(here, part, override)
    if isinstance(here, list):
        here[_position(here, last, override)] = value
    else:
        here[last] = value


def _child(here: Any, part: str, override: str) -> Any:
    child = here[_position(here, part, override)] if isinstance(here, list) else here.setdefault(part, {})
    if child is None and isinstance(here, dict):  # `lora:` left empty in the YAML
        child = here[part] = {}
    if not isinstance(child, (dict, list)):
        raise ConfigError(f"override {override!r}: {part} holds {child!r}, which has no keys")
    return child


def _position(items: list[Any], part: str, override: str) -> int:
    """A list's item by number, or by its `name`."""
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    if part in names:
        return names.index(part)
    if part.isdigit() and int(part) < len(items):
        return int(part)
    raise ConfigError(f"override {override!r}: no item {part!r} among {len(items)} ({names})")


def science(section: BaseModel) -> dict[str, Any]:
    """A section without its machine fields: what a fingerprint is made of."""
    data: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("machine"):
            continue
        value = getattr(section, name)
        if isinstance(value, list) and value and isinstance(value[0], BaseModel):
            data[name] = [science(item) for item in value]
        else:
            data[name] = science(value) if isinstance(value, BaseModel) else value
    return data


def json_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of a config file as it is written: sparse, `student:` or `students:`, a bare
    path for `transfer:`. What holds across sections (`llmkd.crosschecks`) is not in it."""
    schema: dict[str, Any] = _untitled(Config.model_json_schema())
    properties, sections = schema["properties"], schema["$defs"]
    properties["student"] = {"$ref": "#/$defs/Student", "description": "the only one; a chain has students:"}
    schema["required"].remove("students")
    schema["oneOf"] = [{"required": ["student"]}, {"required": ["students"]}]
    sections["Task"]["properties"]["transfer"]["anyOf"].append({"type": "string"})
    own = sections["Student"]["properties"][
        "distill"
    ]  # each key of distill: has a default, so none is required
    sections["Student"]["properties"]["distill"] = {
        "$ref": "#/$defs/Distill",
        "description": own["description"],
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "A run of llmkd", **schema}


def _untitled(schema: Any) -> Any:
    """Without the titles that pydantic makes of names: they say nothing that the names do not."""
    if isinstance(schema, list):
        return [_untitled(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {key: _untitled(value) for key, value in schema.items() if (key, type(value)) != ("title", str)}
