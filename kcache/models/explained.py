"""What transformers raises while it loads a model, as kcache's errors: one line that says what to do.

transformers, safetensors and accelerate raise nearly anything when files are missing, damaged, or of another kind.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from kcache.errors import DoesNotFitError, ModelNotFoundError, UnsupportedModelError, in_short
from kcache.models.names import Source


@contextmanager
def explained(source: Source) -> Iterator[None]:
    """Turn what transformers raises while it loads into a kcache error of one line."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DoesNotFitError(
            f"the weights of {source.name} do not fit the device; use device_map='auto', a smaller dtype, or "
            "quantization"
        ) from error
    except ImportError as error:
        raise UnsupportedModelError(f"loading {source.name} needs another package: {short(error)}") from error
    except OSError as error:
        raise ModelNotFoundError(
            f"the files of {source.name} cannot be used: {short(error)}; fetch them again"
        ) from error
    except Exception as error:
        if "remote_code" in str(error):
            raise UnsupportedModelError(
                f"{source.name} brings its own Python code; read it, and if you trust it, set trust_remote_code"
            ) from error
        if type(error).__name__ == "SafetensorError":
            raise ModelNotFoundError(
                f"the weights of {source.name} are damaged or incomplete ({short(error)}); fetch them again"
            ) from error
        raise UnsupportedModelError(f"transformers cannot load {source.name}: {short(error)}") from error


def short(error: Exception) -> str:
    """Return an error's text as one line of bounded length."""
    return in_short(error, 200).rstrip(".")
