"""A past to decode after: random rows put straight into a cache, or a real text for those who pay for its prefill.

Every layer gets the same random K and V ``[B, Hkv, T, D]``, drawn once: speed does not depend on their values, except
that picks of random rows have no locality of their own. The text is the Python reference that ships with Python
(``pydoc_data.topics``, some 120,000 tokens), repeated where a context is longer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from kcache.decoding.forward import step_logits
from kcache.decoding.prompts import token_ids
from kcache.errors import UnsupportedModelError

if TYPE_CHECKING:
    from kcache.models.loaded import LoadedModel


_LONGEST_TOKEN = 8  # characters a token of prose has at most, on average over a context


@dataclass(frozen=True)
class LayerShape:
    """Rows of one layer: KV heads, K and V row sizes, dtype, device, and its window if it has one."""

    heads: int
    k_dim: int
    v_dim: int
    dtype: torch.dtype
    device: torch.device
    window: int | None = None

    def k_bytes(self, rows: int, batch: int) -> int:
        """Bytes of K of ``rows`` tokens."""
        return self._rows(rows) * batch * self.heads * self.k_dim * self.dtype.itemsize

    def v_bytes(self, rows: int, batch: int) -> int:
        """Bytes of V of ``rows`` tokens."""
        return self._rows(rows) * batch * self.heads * self.v_dim * self.dtype.itemsize

    def _rows(self, rows: int) -> int:
        return rows if self.window is None else min(rows, self.window)


def layer_shapes(model: PreTrainedModel) -> list[LayerShape]:
    """Shapes of the layers that keep K and V, learned by running two tokens.

    Raises
    ------
    UnsupportedModelError
        If a layer keeps something else: its context cannot be made up.
    """
    cache = DynamicCache(config=model.config)
    step_logits(model, cache, torch.zeros(1, 2, dtype=torch.long, device=model.device))
    shapes = []
    for index, layer in enumerate(cache.layers):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None or keys.dim() != 4 or hasattr(layer, "conv_states"):
            raise UnsupportedModelError(
                f"layer {index} of {type(model).__name__} keeps no K and V rows alone, so its context cannot be filled "
                "in; kcache bench cannot time this model"
            )
        window = getattr(layer, "sliding_window", None) if getattr(layer, "is_sliding", False) else None
        shapes.append(LayerShape(keys.shape[1], keys.shape[3], values.shape[3], keys.dtype, keys.device, window))
    return shapes


@torch.no_grad()
def fill(cache: Cache, shapes: list[LayerShape], ctx: int, batch: int) -> None:
    """Put ``ctx`` random rows into every layer, as a prefill would."""
    drawn: dict[LayerShape, tuple[torch.Tensor, torch.Tensor]] = {}
    for index, shape in enumerate(shapes):
        if shape not in drawn:
            drawn = {shape: (_random(shape, shape.k_dim, ctx, batch), _random(shape, shape.v_dim, ctx, batch))}
        cache.update(*drawn[shape], index)


def _random(shape: LayerShape, dim: int, ctx: int, batch: int) -> torch.Tensor:
    generator = torch.Generator(shape.device).manual_seed(dim)
    rows = torch.empty(batch, shape.heads, ctx, dim, dtype=shape.dtype, device=shape.device)
    return rows.normal_(generator=generator)


def reference_prose() -> str:
    """Return the text of the Python reference."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def real_ids(lm: LoadedModel, ctx: int, batch: int) -> torch.Tensor:
    """Token ids ``[B, ctx]`` of the reference prose; each sequence starts at another place of it."""
    text = reference_prose()
    rows = []
    for number in range(batch):
        start = number * len(text) // batch
        piece = (text[start:] + text[:start])[: ctx * _LONGEST_TOKEN]
        ids = torch.tensor(token_ids(lm, piece))
        rows.append(ids.repeat(-(-ctx // len(ids)))[:ctx])
    return torch.stack(rows).to(lm.device)


def held_bytes(cache: Cache) -> tuple[int, int]:
    """Bytes of K and V a stock cache holds on a device and in RAM; on a host-only run all of it counts as device."""
    held = {True: 0, False: 0}
    offloading = bool(getattr(cache, "offloading", False))
    for layer in cache.layers:
        for name in ("keys", "values"):
            rows = getattr(layer, name, None)
            if isinstance(rows, torch.Tensor):
                held[not (offloading and rows.device.type == "cpu")] += rows.nbytes
    return held[True], held[False]
