"""What every section of a config is: closed, frozen, without NaN."""

from pydantic import BaseModel, ConfigDict, JsonValue

# Fields about the machine, not the science: they never enter a fingerprint, so a run may change machines.
MACHINE: dict[str, JsonValue] = {"machine": True}


class Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
