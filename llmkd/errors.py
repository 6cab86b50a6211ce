"""The errors a user can mend: one line that names the thing, the value and the remedy."""


class LlmkdError(Exception):
    """Base of all errors that a stage prints as one line before it exits with code 2."""


class ConfigError(LlmkdError):
    """The run's YAML, an override or a DeepSpeed file is wrong."""


class DataError(LlmkdError):
    """The labelled rows or the pretraining text cannot be used as they are."""


class CacheError(LlmkdError):
    """A logits cache is not the one this config and these rows call for."""


class RunError(LlmkdError):
    """A run directory is incomplete, damaged, or was made from something else."""


class ModelError(LlmkdError):
    """A model, adapter, tokenizer or artifact cannot be used as asked."""


class Stopped(BaseException):
    """SIGTERM or Ctrl-C. No Exception, so that what mends or tells errors lets it pass."""

    def __init__(self, signal: int, where: str = "finished work is kept") -> None:
        super().__init__(where)
        self.signal = signal
