"""Loading what a config names, from a hub or a directory: only safetensors are read, every error is one line,
and code that comes with a checkpoint is run only where `trust_remote_code: true` stands beside that model."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from llmkd import ranks
from llmkd.errors import ModelError

UNLOADABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError)


def register_nets() -> None:
    """Make this package's own architectures known to transformers' Auto classes; any number of times."""
    from llmkd.models import hashed, nets

    hashed.register()
    nets.register()


def from_hub(auto: Any, source: str, *, trust_remote_code: bool = False, **arguments: Any) -> Any:
    """`auto.from_pretrained` of a hub id or a directory. Raises ModelError."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    register_nets()
    kind = auto.__name__
    if "Model" in kind:
        arguments["use_safetensors"] = True
    if Path(source).is_absolute() and not Path(source).is_dir():
        raise ModelError(f"{source}: no such directory; name one that holds a saved model, or a hub id")
    if trust_remote_code:
        say_trusted(source)
    # code of others' may raise anything
    raised = (Exception,) if trust_remote_code else (*UNLOADABLE, SafetensorError, StrictDataclassError)
    try:
        # False, and not None, which asks on the terminal whether to run a repository's code.
        return auto.from_pretrained(source, trust_remote_code=trust_remote_code, **arguments)
    except raised as error:
        reason = " ".join(str(error).split())[:300]
        if "ignore_mismatched_sizes" in reason:
            reason = "its weights' sizes, or its number of labels, are not its config's or this run's; "
            reason += "name one that fits, or this one saved without its head"
        if "support an attention implementation" in reason:
            reason = "its architecture has no such attention; leave attention: out, or take eager"
        if wants_trust(error):
            reason = "it needs Python code that comes with it, and none is run unasked; read that code, then "
            reason += "set trust_remote_code: true beside its model: (in Python: load it, give the model)"
        raise ModelError(f"{source}: {kind} cannot load it: {reason}") from error


@cache
def say_trusted(source: str) -> None:
    """Once a process, before anything of it is run."""
    if ranks.is_main():
        print(f"{source}: trust_remote_code: true, so Python code that comes with it may be run", flush=True)


def wants_trust(error: Exception) -> bool:
    """Whether transformers refused to run a checkpoint's code."""
    return "trust_remote_code" in str(error)
