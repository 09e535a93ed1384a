"""What a cache needs in either tier, from a model's config alone.

A layer keeps a K row and a V row per token, ``kv_heads * head_dim`` values each. Sliding-window layers hold at most
their window, and layers of multi-head latent attention one latent and one rotary row per token; both stay on the
device. The cache itself plans again from the tensors that really arrive.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, LinearAttentionAndFullAttentionLayer

from kcache.errors import UnsupportedModelError
from kcache.planning.sizes import TierSizes, beyond_kernels, resident_layers
from kcache.policy import Policy

_SCORE_BYTES = 4  # scores are fp32
_LIST_BYTES = 8  # a row above the threshold: its weight and its position


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes of a cache at a given context and batch.

    Attributes
    ----------
    k_bytes, v_bytes : int
        All K, all V, wherever they are.
    resident_v_bytes, overhead_bytes : int
        V that stays on the device, and what the policy keeps beside it.
    device_bytes, host_bytes : int
        The sums per tier.
    full_kv_bytes : int
        A full KV cache on the device, for comparison.
    resident_layers, layers : int
        Layers whose V stays on the device, of all layers that have V.
    """

    k_bytes: int
    v_bytes: int
    resident_v_bytes: int
    overhead_bytes: int
    device_bytes: int
    host_bytes: int
    full_kv_bytes: int
    resident_layers: int
    layers: int


@dataclass(frozen=True)
class ModelShape:
    """What of a model decides the size of its cache, and of the memory it works in.

    Attributes
    ----------
    k_row, v_row : int
        Bytes of one token's K and V in one layer, one sequence.
    layers : int
        Layers that can be tiered.
    untiered : int
        Layers that keep all their rows on the device.
    windows : tuple of int
        Rows that sliding-window layers hold at most.
    query_heads, group, dim, query_width : int
        Query heads, how many share a KV head, the size of a head, and the values of all heads together.
    hidden, inner, vocabulary : int
        Widths: of the residual stream, of what one token uses of a layer's MLP, of the logits.
    dtype_bytes : int
    """

    k_row: int
    v_row: int
    layers: int
    untiered: int
    windows: tuple[int, ...]
    query_heads: int
    group: int
    dim: int
    query_width: int
    hidden: int
    inner: int
    vocabulary: int
    dtype_bytes: int

    def settled(self, policy: Policy, kernels: bool) -> Policy:
        """The policy as a cache of the model has it on a device, on which our ``kernels`` run, or not."""
        kernels = kernels and policy.backend != "reference" and beyond_kernels(self.group, self.dim, self.dim) is None
        return policy.settled(kernels, self.dtype_bytes)

    @classmethod
    def of(cls, config: PreTrainedConfig, dtype_bytes: int) -> ModelShape:
        """Read a config.

        Raises
        ------
        UnsupportedModelError
            If it does not say how many attention heads there are.
        """
        text = config.get_text_config(decoder=True)
        heads = getattr(text, "num_attention_heads", None)
        if not isinstance(heads, int) or heads < 1:
            raise UnsupportedModelError(
                f"the config of this {config.model_type} model gives num_attention_heads as {heads!r}; its cache "
                "cannot be planned"
            )
        kv_heads = getattr(text, "num_key_value_heads", None) or heads
        dim = getattr(text, "head_dim", None) or text.hidden_size // heads
        layers = DynamicCache(config=text).layers
        full = sum(1 for layer in layers if type(layer) in (DynamicLayer, LinearAttentionAndFullAttentionLayer))
        latent, rotary = getattr(text, "kv_lora_rank", None) or 0, getattr(text, "qk_rope_head_dim", None) or 0
        is_latent = latent > 0 and rotary > 0
        experts = getattr(text, "num_experts_per_tok", None) or 1
        inner = getattr(text, "moe_intermediate_size", None) if experts > 1 else None
        inner = inner or getattr(text, "intermediate_size", None) or 4 * text.hidden_size
        return cls(
            k_row=(latent if is_latent else kv_heads * dim) * dtype_bytes,
            v_row=(rotary if is_latent else kv_heads * dim) * dtype_bytes,
            layers=0 if is_latent else full,
            untiered=full if is_latent else 0,
            windows=tuple(int(layer.get_max_length()) for layer in layers if getattr(layer, "is_sliding", False)),
            query_heads=heads,
            group=heads // kv_heads,
            dim=dim,
            query_width=heads * dim,
            hidden=text.hidden_size,
            inner=(inner if isinstance(inner, int) else max(inner)) * experts,
            vocabulary=text.vocab_size,
            dtype_bytes=dtype_bytes,
        )

    def shared(self, ranks: int) -> ModelShape:
        """One rank's part of a model whose heads are shared out."""
        return replace(
            self,
            k_row=self.k_row // ranks,
            v_row=self.v_row // ranks,
            query_heads=self.query_heads // ranks,
            query_width=self.query_width // ranks,
            inner=-(-self.inner // ranks),
        )

    def need(self, ctx: int, batch: int, policy: Policy, budget: int | None, hot: bool = False) -> MemoryNeed:
        """Bytes of a cache, with ``hot`` of one on a device that keeps hot rows; see :func:`cache_bytes`."""
        v_row = self.v_row * batch
        sizes = TierSizes.of(policy, self.layers, self.k_row * batch, v_row, self.dim, self.dtype_bytes, hot)
        other_rows = (self.untiered * ctx + sum(min(ctx, window) for window in self.windows)) * batch
        allowed = min((limit for limit in (policy.kv_budget, budget) if isinstance(limit, int)), default=None)
        if policy.offload == "none" or ctx < policy.dense_below:
            resident = self.layers
        else:
            others = other_rows * (self.k_row + self.v_row)
            resident = resident_layers(sizes, policy, ctx, None if allowed is None else allowed - others)
        host, tail = sizes.host(ctx, resident), sizes.tail(ctx, resident)
        k_bytes = sizes.k(ctx, resident) + self.k_row * other_rows
        v_bytes = sizes.v_row * resident * ctx + host + self.v_row * other_rows
        return MemoryNeed(
            k_bytes=k_bytes,
            v_bytes=v_bytes,
            resident_v_bytes=v_bytes - host,
            overhead_bytes=tail,
            device_bytes=k_bytes + v_bytes - host + tail,
            host_bytes=host,
            full_kv_bytes=(self.k_row + self.v_row) * (batch * self.layers * ctx + other_rows),
            resident_layers=resident,
            layers=self.layers,
        )

    def working_bytes(self, ctx: int, batch: int, policy: Policy, offloads: bool) -> int:
        """What is worked in beside the cache."""
        scratch = self.scratch_bytes(ctx, batch, policy, offloads)
        return self.activation_bytes(ctx, batch, policy, offloads) + scratch

    def scratch_bytes(self, ctx: int, batch: int, policy: Policy, offloads: bool) -> int:
        """Scores of one layer's decode step, and lists of the rows above a threshold; layers take turns with it.

        A cache that stays on the device as a whole needs none.
        """
        if not offloads:
            return 0
        picking = self.query_heads if policy.select == "head" else self.query_heads // self.group
        listed = picking * _LIST_BYTES if policy.spread == "need" else 0
        return batch * ctx * (self.query_heads * _SCORE_BYTES + listed)

    def activation_bytes(self, ctx: int, batch: int, policy: Policy, offloads: bool) -> int:
        """What the largest forward of a prefill works in, roughly: one layer's activations, and the last logits.

        With ``offloads``, a chunk that follows a past also holds V of two layers on their way through; rows in 8 bits
        are widened for one layer at a time. Prompts of a batch are padded, so there is a mask ``[B, 1, Q, L]``, which
        torch's kernels, those for fp32, take as numbers.
        """
        tokens = min(ctx, policy.piece(batch)) * batch
        masks = tokens * ctx * (1 if self.dtype_bytes == 2 else 1 + self.dtype_bytes) if batch > 1 else 0
        kv_width = (self.k_row + self.v_row) // self.dtype_bytes
        widest = 2 * self.hidden + max(3 * self.query_width + 2 * kv_width, 3 * self.inner)
        logits = batch * self.vocabulary * (self.dtype_bytes + _SCORE_BYTES)
        passing = (2 * (self.v_row // self.dtype_bytes) + self.v_row) if policy.v_bits == 8 else 2 * self.v_row
        passing += self.k_row if policy.key_planes else 0
        return tokens * widest * self.dtype_bytes + logits + masks + (passing * ctx * batch if offloads else 0)


def cache_bytes(
    config: PreTrainedConfig,
    ctx: int,
    batch: int,
    policy: Policy,
    dtype_bytes: int = 2,
    *,
    budget: int | None = None,
) -> MemoryNeed:
    """Bytes of a cache of ``batch`` sequences of ``ctx`` tokens.

    ``budget`` is the device memory the cache may take, if ``policy.kv_budget`` is not less. On a host-only machine
    ``offload="auto"`` offloads every layer but the dense ones. K is counted as ``policy.k_bits`` says, with ``"auto"``
    as in 16 bits; :meth:`Policy.settled` tells what that is on a device.
    """
    return ModelShape.of(config, dtype_bytes).need(ctx, batch, policy, budget)
