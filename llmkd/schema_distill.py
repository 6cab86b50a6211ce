"""`distill:` in a run's YAML: method, losses, teachers' weights, phases, caches of next tokens."""

from typing import Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from llmkd.losses import LOSSES, parameter_faults
from llmkd.schema_base import Closed
from llmkd.schema_training import Training

View = Literal["in_sample", "oof"]
Part = Literal["train", "transfer", "test"]
TERMS = {"ce": 1.0, "kl": 1.0, "cosine": 1.0}  # the reference recipe's, each of weight 1
SEQUENCE_TERMS = {"ce": 1.0, "kl": 1.0}  # of next tokens


def _terms(fields: dict[str, Any]) -> dict[str, float]:
    """The terms of a `distill:` section that names none, by the fields that stand before them."""
    return dict(SEQUENCE_TERMS if fields.get("method") == "sequence" else TERMS)


class FeaturePair(Closed):
    """Hidden states to match: layer i is the output of layer i, 0 the embeddings."""

    teacher: str = Field(description="its name")
    teacher_layer: int = Field(ge=0, description="whose output is matched")
    student_layer: int = Field(ge=0, description="whose output learns it")


class Phase(Closed):
    """What differs from `distill:` in one of several trainings in a row, each from the last one's weights."""

    rows: list[Part] | None = Field(None, min_length=1, description="parts it learns from")
    terms: dict[str, float] | None = Field(None, description="weights; those not named stay")
    epochs: float | None = Field(None, gt=0, description="passes over its rows")
    learning_rate: float | None = Field(None, gt=0, description="peak")
    batch_rows: int | None = Field(None, ge=1, description="rows of one optimizer step")
    warmup: float | None = Field(None, ge=0, description="steps; below 1, a share of its steps")


class TokenCache(Closed):
    """Of a teacher's distribution over the next token, what stage 02 keeps."""

    how: Literal["sampled", "topk"] = Field("sampled", description="drawn without bias, or the likeliest")
    k: int = Field(21, ge=1, description="words a token; sampled, as many more as its bytes hold")
    bits: Literal[8, 16, 32] = Field(8, description="of a probability")


class Distill(Training):
    """(w_ce CE + sum_i w_i (w_kl KL_i + w_cos cos_i)) / sum of the weights."""

    method: Literal["cached", "online", "feature", "self_distillation", "mutual", "sequence"] = Field(
        "cached", description="how a student learns; docs/methods.md"
    )
    view: View = Field(
        "in_sample", description="logits of the fold's own teacher, or of those that did not see the row"
    )
    rows: list[Part] = Field(["train", "transfer"], min_length=1, description="parts it learns from")
    terms: dict[str, float] = Field(
        default_factory=lambda data: _terms(data),
        description="weight of each loss; those not named keep 1 of ce, kl and cosine (sequence: ce and kl)",
    )
    params: dict[str, dict[str, float]] = Field(default_factory=dict, description="a term's own arguments")
    temperature: float | dict[str, float] = Field(1.0, description="of soft labels; one, or by teacher")
    teacher_weights: dict[str, float] = Field(default_factory=dict, description="1 where not named")
    weighting: Literal["fixed", "confidence", "entropy", "ce", "fitted"] = Field(
        "fixed", description="teachers' shares: as given, by row, or fitted on out-of-fold logits"
    )
    normalize: bool = Field(True, description="divide the loss by the sum of its weights")
    features: list[FeaturePair] = Field(
        default_factory=list, description="layers that method: feature matches"
    )
    feature_weight: float = Field(1.0, gt=0, description="of hidden states, beside the terms")
    feature_loss: Literal["mse", "cosine"] = Field("mse", description="between hidden states")
    feature_at: Literal["tokens", "pooled"] = Field(
        "tokens", description="every token, for one tokenizer; pooled: a vector a row, for two"
    )
    peer_temperature: float = Field(4.0, gt=0, description="of mutual learning")
    exit_temperature: float = Field(3.0, gt=0, description="of self-distillation")
    cache: TokenCache | None = Field(TokenCache(), description="of a sequence's teachers; null: online")
    on_policy: float = Field(0, ge=0, le=1, description="share of batches in a sequence student's own words")
    phases: list[Phase] = Field(default_factory=list, description="several trainings in turn")
    baseline: bool = Field(False, description="also train the same student on hard labels alone")
    baseline_epochs: float | None = Field(None, gt=0, description="where it is not to train as long")
    epochs: float = Field(2, gt=0, description="passes over the rows; may be a fraction")
    learning_rate: float = Field(5e-5, gt=0, description="peak, of AdamW")

    @field_validator("terms", mode="before")
    @classmethod
    def _over_the_defaults(cls, terms: Any, info: ValidationInfo) -> Any:
        """Terms that are not named keep their weight: `terms: {kl: 2}` is not KL alone."""
        return {**_terms(info.data), **terms} if isinstance(terms, dict) else terms

    @model_validator(mode="after")
    def _known_terms(self) -> Self:
        temperatures = self.temperature.values() if isinstance(self.temperature, dict) else [self.temperature]
        unknown = sorted(set(self.terms) - set(LOSSES))
        idle = sorted(name for name in self.params if not self.terms.get(name))
        checks = {
            f"terms: unknown {unknown}; known are {sorted(LOSSES)}": unknown,
            "terms: weights must be 0 or more": min(self.terms.values()) < 0,
            "terms: weights must not all be 0": not any(self.terms.values()),
            "temperature: must be above 0": min(temperatures, default=1) <= 0,
            "teacher_weights: must be 0 or more": min(self.teacher_weights.values(), default=0) < 0,
        }
        checks |= dict.fromkeys((f"params: {fault}" for fault in parameter_faults(self.params)), True)
        checks[f"params: {idle} are no terms of a weight above 0"] = idle
        if any(checks.values()):
            raise ValueError("\n".join(message for message, fault in checks.items() if fault))
        return self

    def in_phases(self) -> list["Distill"]:
        """One section a phase; a section without phases is its own only one."""
        asked = [phase.model_dump(exclude_none=True) for phase in self.phases] or [{}]
        own = {name: getattr(self, name) for name in Distill.model_fields if name != "phases"}
        merged = [{**own, **phase, "terms": {**self.terms, **phase.get("terms", {})}} for phase in asked]
        return [Distill.model_validate(section) for section in merged]
