"""llmkd: an ensemble of large teachers distilled into one small 8-bit student."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmkd.one_call import distill_model

__all__ = ["distill_model"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`distill_model` is imported when it is asked for: the package itself stays light."""
    if name == "distill_model":
        from llmkd.one_call import distill_model

        return distill_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
