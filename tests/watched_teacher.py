"""A stage whose online teachers are looked at before and after each forward:
`watched_teacher.py DIRECTORY stage.py ...` leaves DIRECTORY/rank<r>.json, one entry a look, and in
loaded<r>.json whether the frozen weights of each model were sharded as soon as they were loaded."""

import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

from llmkd import loading
from llmkd.methods.online import Online

directory, sys.argv = Path(sys.argv[1]), sys.argv[2:]
forward, looks = Online.forward, list[dict[str, Any]]()
load_model, loaded = loading.load_model, dict[str, bool]()


def look(method: Online) -> dict[str, Any]:
    """What this rank holds of the teachers' parameters, and whether any of them learns."""
    held = list(method.teachers.parameters())
    return {
        "sharded": all(hasattr(one, "ds_id") for one in held),
        "states": sorted({one.ds_status.name for one in held if hasattr(one, "ds_id")}),
        "whole": sum(one.numel() for one in held),
        "shards": sum(getattr(one, "ds_tensor", one).numel() for one in held),
        "numbers": sum(getattr(one, "ds_numel", one.numel()) for one in held),
        "count": len(held),
        "learn": sum(one.requires_grad or one.grad is not None for one in held),
        "modes": sorted({module.training for one in method.teachers for module in one.modules()}),
    }


def watched(method: Online, *args: Any, **kwargs: Any) -> Any:
    looks.append(look(method))
    found = forward(method, *args, **kwargs)
    looks.append(look(method))
    (directory / f"rank{os.environ['RANK']}.json").write_text(json.dumps(looks))
    return found


def told(config: Any, which: Any, *args: Any) -> Any:
    network, reader = load_model(config, which, *args)
    frozen = [one for one in network.parameters() if not one.requires_grad]
    loaded[which.name] = all(hasattr(one, "ds_id") for one in frozen)
    (directory / f"loaded{os.environ['RANK']}.json").write_text(json.dumps(loaded))
    return network, reader


with patch.object(Online, "forward", watched), patch.object(loading, "load_model", told):
    runpy.run_path(sys.argv[0], run_name="__main__")
