"""Every error kcache raises on purpose, the check of what kind of thing an argument is, and others' errors in short.

All derive from :class:`KCacheError`, so a caller can catch one type. Each message says what was given, what was
expected and what to do next; the command line prints it as one line and maps the class to an exit code.
"""

from __future__ import annotations


class KCacheError(Exception):
    """Base of every error kcache raises on purpose."""


class PolicyError(KCacheError, ValueError):
    """A :class:`~kcache.Policy` field has a value that makes no sense."""


class ModelNotFoundError(KCacheError):
    """The model name is neither a known name, a local folder, nor a reachable hub id."""


class UnsupportedModelError(KCacheError):
    """The model cannot be served exactly; the message names the reason."""


class DownloadError(KCacheError):
    """A download failed, was interrupted, or its checksum did not match."""


class DoesNotFitError(KCacheError, MemoryError):
    """The cache or the model does not fit in device or host memory; the message says what would."""


class ContextLengthError(KCacheError, ValueError):
    """The prompt (plus the tokens asked for) is longer than the model's context."""


class InputError(KCacheError, ValueError):
    """An argument, prompt or input file is not usable; the message says which and why."""


class CacheStateError(KCacheError, RuntimeError):
    """A cache was used in a way that cannot give a right answer (a second model, a wrong batch size, ...)."""


class GraphError(KCacheError):
    """A decode step cannot be recorded; decoding then goes on without, and nobody outside sees this."""


class FormatError(InputError):
    """What came over a socket or out of a recording is not what was expected there; the message says where."""


class WatchError(KCacheError):
    """A process cannot be watched: it is not there, it refused, or nothing can be published here."""


def expect(
    kind: type | tuple[type, ...], name: str, value: object, wanted: str, error: type[KCacheError] = InputError
) -> None:
    """Raise ``error`` if an argument is of another kind than the one that is wanted."""
    if not isinstance(value, kind):
        raise error(f"{name} must be {wanted}; got {type(value).__name__}")


def in_short(error: BaseException, most: int) -> str:
    """An error's text as one line of at most ``most`` characters; its kind, if it says nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else f"{text[: most - 1]}…"
