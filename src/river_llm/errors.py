"""Everything that can go wrong and that the user can fix.

Each message is one line: the cause, then the fix. The command line prints it and exits with 1.
"""


class RiverError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(RiverError, ValueError):
    """A setting is out of its range, or two settings exclude each other."""


class ModelLoadError(RiverError):
    """The backbone can't be found, read or held in memory."""


class UnsupportedModelError(RiverError):
    """The model has a layer that is no plain decoder layer, so the river can't follow it."""


class RiverFileError(RiverError):
    """A river on disk is cut short, of another format, or made from other weights."""


class PromptCacheError(RiverError):
    """A prompt cache on disk is damaged, or of another model or setting; or it can't be written."""


class ContextFullError(RiverError):
    """The prompt, or the prompt and what was generated, doesn't fit the model's context."""


class LogitsError(RiverError):
    """The logits of a token are no numbers, or leave no token to choose from."""


class DataError(RiverError):
    """A text, or an item of an evaluation, can't be read or used."""


class InterruptedRunError(RiverError):
    """Ctrl-C came before a run was whole; the message says how far it was. The command line exits
    with 130."""


class MissingExtraError(RiverError):
    """A package that only some users need is not installed."""
