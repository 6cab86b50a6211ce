"""`task:` in a run's YAML: what a row is, and the columns, features or pixels that it is read from."""

from typing import Any, Literal

from pydantic import Field, model_validator

from llmkd.schema_base import Closed


class Features(Closed):
    """The columns of a tabular row. A step series names its columns in the order of time."""

    numeric: list[str] = Field(default_factory=list, description="columns of numbers; a gap is a value too")
    categorical: list[str] = Field(default_factory=list, description="columns of categories")
    steps: dict[str, list[str]] = Field(
        default_factory=dict, description="series name -> its columns, oldest first"
    )

    @property
    def columns(self) -> list[str]:
        return [*self.numeric, *self.categorical, *(name for names in self.steps.values() for name in names)]


class Image(Closed):
    """Raw bytes, one a pixel, row by row."""

    column: str = Field("image", description="the column that holds the bytes")
    shape: tuple[int, int] = Field(description="height and width in pixels")
    shift: int = Field(0, ge=0, description="pixels by which training images are moved at random")


class Transfer(Closed):
    """Further rows for soft labels; a label that they may have is not read. A bare path is `data:` alone."""

    data: str = Field(description="a file, a glob, hub:... or arena:..., as task.train")
    columns: dict[str, str] | None = Field(None, description="where they differ from task.columns")
    sentences: tuple[int, int] | None = Field(None, description="cut texts into sentences of so many words")
    rows: int | None = Field(None, ge=1, description="use the first this many rows only")

    @model_validator(mode="before")
    @classmethod
    def _path(cls, data: Any) -> Any:
        return {"data": data} if isinstance(data, str) else data


class Task(Closed):
    """What a row is and where the rows come from."""

    kind: Literal["preference", "classification", "tabular", "image", "causal_lm"] = Field(
        description="two answers to judge, a text, columns, pixels, or next tokens"
    )
    train: str = Field(description=".csv, .jsonl or .parquet, a glob of them, hub:owner/name:config:split")
    test: str | None = Field(None, description="rows that judge and enter no fold; stage 06 needs them")
    rows: int | None = Field(None, ge=1, description="use the first this many training rows only")
    transfer: Transfer | None = Field(None, description="further rows for soft labels alone")
    columns: dict[str, str] = Field(default_factory=dict, description="task field -> column in the file")
    label: str | list[str] | None = Field("label", description="a column, or one-hot columns in label order")
    labels: list[str] | None = Field(None, min_length=2, description="class names in order")
    label_values: dict[str, int] | None = Field(None, description="value in the file -> class number")
    id: str | None = Field(None, description="a column of unique ids; rows are numbered without one")
    extra: list[str] = Field(default_factory=list, description="further columns that the template may use")
    features: Features | None = Field(None, description="of tabular rows")
    image: Image | None = Field(None, description="of image rows")
    turns: Literal["text", "json"] = Field("text", description="json: a field is a JSON list of turns")
    empty: Literal["error", "drop"] = Field("error", description="what befalls rows without content")
    leaks: Literal["drop", "report", "error"] = Field(
        "drop", description="what befalls training rows that share content or group with a test row"
    )
    swap: bool = Field(False, description="of pairs: learn from both orders of every training row")
    max_tokens: int = Field(1024, ge=8, description="context budget; the longer answer is cut first")
    max_words: dict[str, int] | None = Field(None, description="field -> words kept before tokenizing")
    template: str | None = Field(
        None, description="row -> text, e.g. '{prompt}\\n{response_a}'; has a default"
    )
    mask_prompt: bool = Field(True, description="of chats, only what the assistant says is learnt")
    pack: bool = Field(
        False, description="texts into blocks of max_tokens, in which they do not see one another"
    )
