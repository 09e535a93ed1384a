"""Errors as a user sees them: one line on standard error, and an exit code.

==== ==========================================================================
0    done
1    the model is unknown or cannot be served; any other failure
2    wrong usage: a bad value, unreadable input, unwritable output
3    does not fit in memory; the message says what would
130  stopped with Ctrl-C
143  stopped by SIGTERM, and 129 by SIGHUP: 128 and the number of the signal (:mod:`kcache_cli.ending`)
==== ==========================================================================
"""

from __future__ import annotations

import os
import sys

import typer

from kcache.errors import ContextLengthError, InputError, KCacheError, PolicyError, UnsupportedModelError
from kcache_cli.text import between_words, one_line

FAILED = 1
USAGE = 2
DOES_NOT_FIT = 3
INTERRUPTED = 130
SIGNALLED = 128
_COMES_BY = {
    "generate": "prompts are read with -i FILE",
    "chat": "a message comes by standard input, a document with -f FILE",
}
_NOT_A = {"int_parsing": "a whole number", "float_parsing": "a number", "bool_parsing": "true or false"}


def debugging() -> bool:
    """Whether tracebacks are wanted (``KCACHE_DEBUG=1``)."""
    return os.environ.get("KCACHE_DEBUG", "") not in ("", "0")


def exit_code(error: BaseException) -> int:
    """The exit code that belongs to an error."""
    if isinstance(error, typer.TyperException):
        return error.exit_code
    if isinstance(error, MemoryError) or _is_device_out_of_memory(error):
        return DOES_NOT_FIT
    if isinstance(error, (PolicyError, InputError, ContextLengthError, OSError)):
        return USAGE
    return FAILED


def describe(error: BaseException) -> str:
    """One line that says what went wrong and, where it is known, what to do."""
    if isinstance(error, typer.TyperException):
        return one_line(_in_our_words(error))
    if isinstance(error, KCacheError):
        return one_line(str(error))
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return one_line(f"{where}{error.strerror or error}")
    if isinstance(error, MemoryError) or _is_device_out_of_memory(error):
        return "out of memory; use a smaller --batch-size, a shorter --ctx, or --offload all"
    return one_line(f"unexpected {type(error).__name__}: {error} (KCACHE_DEBUG=1 shows where)")


def _in_our_words(error: typer.TyperException) -> str:
    """Typer's message, with the value that was given where pydantic leaves it out."""
    message = error.format_message()
    problems = getattr(error.__cause__, "errors", None)
    for problem in problems() if callable(problems) else []:
        what = _NOT_A.get(problem["type"])
        said = problem["msg"] if what is None else f"{problem['input']!r} is not {what}"
        message = message.replace(problem["msg"], said.removeprefix("Value error, "))
    command = getattr(getattr(error, "ctx", None), "info_name", None)
    if "unexpected extra argument" in message and (where := _COMES_BY.get(command or "")):
        message = f"{message.rstrip('.')}; {where}"
    if "'--format'" in message and "." in message.partition(": ")[2].partition(" is not")[0]:
        message = f"{message.rstrip('.')}; a file is named with --output"
    return message


def report(error: BaseException, program: str = "kcache") -> int:
    """Print an error on standard error and return its exit code."""
    _say(f"{program}: error: {describe(error)}")
    code = exit_code(error)
    if code == FAILED and (isinstance(error, UnsupportedModelError) or not isinstance(error, KCacheError)):
        _blame_versions()
    return code


def _blame_versions() -> None:
    from kcache.models.support import untried

    if (found := untried()) is not None:
        what, command = found
        note(f"{what}; it may be the cause: {command}")


def warn(message: str) -> None:
    """Print a one-line warning on standard error."""
    _say(f"kcache: warning: {one_line(message)}")


def note(message: str) -> None:
    """Print a one-line remark on standard error."""
    _say(f"kcache: {one_line(message)}")


def _say(line: str) -> None:
    """Print a line on standard error, wrapped at words for a terminal, which would break it inside them."""
    from kcache_cli.console import terminal_width

    print(between_words(line, terminal_width()), file=sys.stderr)


def _is_device_out_of_memory(error: BaseException) -> bool:
    return type(error).__name__ == "OutOfMemoryError"
