"""llmkd: an ensemble of large teachers distilled into one small 8-bit student."""

__version__ = "0.1.0"
