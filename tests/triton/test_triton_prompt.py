"""A prompt's attention by Triton, whatever its mask, against attention written out in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kcache.attaching import attach
from kcache.backends import dense
from kcache.backends.plain import plain
from kcache.backends.triton import prefill
from kcache.backends.triton.common import interpreted
from kcache.backends.triton.prompt import attend_prompt
from kcache.cache import KCache
from kcache.decoding.forward import prefill as read
from kcache.policy import Policy
from tests.backends.test_dense import straight
from tests.tiny_models import left_padding, make, tokens

TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 0.02}
CASES: dict[str, dict[str, Any]] = {
    "causal with sinks": {"sinks": True},
    "causal with soft-capping": {"softcap": 3.0, "past": 33},
    "padded": {"masking": "padded"},
    "padded, a past": {"masking": "padded", "past": 300, "count": 40},
    "padded, one sequence whole": {"masking": "padded", "pads": (0, 150), "count": 200},
    "window": {"masking": "window", "count": 200, "past": 60},
    "window, padded": {"masking": "window", "pads": (0, 90), "count": 150},
    "holes": {"masking": "holes"},
    "holes, a past, sinks": {"masking": "holes", "past": 140, "sinks": True},
    "both ways": {"masking": "both ways"},
    "one mask for all": {"masking": "shared"},
    "everything": {"masking": "padded", "softcap": 2.0, "sinks": True, "group": 3, "past": 70, "dim": 80, "dim_v": 48},
    "two queries": {"count": 2, "past": 130, "masking": "padded"},
    "multi-head": {"group": 1, "kv_heads": 3, "masking": "padded"},
    "group of 16": {"group": 16, "kv_heads": 1, "count": 20, "masking": "padded"},
    "group of 7": {"group": 7, "kv_heads": 1, "count": 40, "masking": "window"},
    "head size 128": {"dim": 128, "masking": "padded", "count": 140},
    "head size 256": {"dim": 256, "masking": "padded", "batch": 1, "pads": (20,), "softcap": 5.0},
    "bf16": {"dtype": torch.bfloat16, "dim": 128, "masking": "padded"},
    "fp16": {"dtype": torch.float16, "masking": "holes"},
}


def draw(
    batch: int = 2, kv_heads: int = 2, group: int = 2, count: int = 70, past: int = 0, dim: int = 64,
    dim_v: int | None = None, masking: str = "causal", pads: tuple[int, ...] | None = None,
    softcap: float | None = None, sinks: bool = False, dtype: torch.dtype | None = None, seed: int = 0,
) -> tuple[Any, ...]:  # fmt: skip
    """Arguments of :func:`dense.attend`; rows behind the last are NaN, and nothing may read them."""
    generator = torch.Generator().manual_seed(seed)
    length, dtype = past + count, dtype or (torch.float32 if interpreted() else torch.bfloat16)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    query = randn(batch, count, kv_heads * group, dim).to(dtype).transpose(1, 2)
    keys, values = randn(batch, kv_heads, length + 9, dim), randn(batch, kv_heads, length + 9, dim_v or dim)
    keys[:, :, length:], values[:, :, length:] = float("nan"), float("nan")
    mask = None
    if masking != "causal":
        mask = torch.ones(count, length, dtype=torch.bool).tril(past).expand(batch, 1, -1, -1).clone()
        if masking in ("padded", "window"):
            starts = torch.randint(0, length, (batch,), generator=generator) if pads is None else torch.tensor(pads)
            if pads is not None or masking == "padded":
                mask &= (torch.arange(length)[None, :] >= starts[:, None])[:, None, None, :]
            if masking == "window":
                mask &= torch.ones(count, length, dtype=torch.bool).triu(past - 40)
        elif masking == "holes":
            mask &= torch.rand(mask.shape, generator=generator) < 0.3
        elif masking == "shared":
            mask = mask[:1].transpose(2, 3).contiguous().transpose(2, 3)  # of other strides, too
        elif masking == "both ways":
            mask |= True
    keys, values = keys.to(dtype)[:, :, :length], values.to(dtype)[:, :, :length]
    return query, keys, values, mask, dim**-0.5, softcap, randn(kv_heads * group) if sinks else None


def on(device: torch.device, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same arguments on a device, with what lies behind the last row of their buffers."""
    return tuple(_moved(value, device) if torch.is_tensor(value) else value for value in given)


def _moved(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    whole = value if value._base is None else value._base
    return whole.to(device).as_strided(value.shape, value.stride(), value.storage_offset())


@pytest.mark.parametrize("case", CASES)
def test_triton_prompt_equals_fp64(case: str, device: torch.device) -> None:
    given = draw(seed=len(case), **CASES[case])
    got, want = attend_prompt(*on(device, given)), straight(*given)
    assert got.dtype == given[0].dtype
    assert got.shape == want.shape
    near = TOLERANCES[got.dtype]
    torch.testing.assert_close(got.cpu().double(), want, atol=near, rtol=near)
    assert got.transpose(1, 2).is_contiguous(), "as the model's next product wants it"


def test_triton_prompt_that_may_attend_nothing_gives_zeros(device: torch.device) -> None:
    query, keys, values, mask, *rest = draw(masking="padded", pads=(0, 30), sinks=True)
    mask[0, :, 20:25] = False
    out = attend_prompt(*on(device, (query, keys, values, mask, *rest)))
    assert not out[1, :, :30].any()
    assert not out[0, :, 20:25].any()
    assert out[0, :, :20].any(dim=-1).all()
    assert out.isfinite().all()


@pytest.mark.parametrize("scaling", [1e-4, 40.0, -0.3])
def test_triton_prompt_caps_scores_of_any_size(scaling: float, device: torch.device) -> None:
    query, keys, values, mask, _, _, _ = draw(masking="padded")
    given = query, keys, values, mask, scaling, 30.0, None
    out, want = attend_prompt(*on(device, given)), straight(*given)
    near = 10 * TOLERANCES[out.dtype]  # a score of 30 has so many units of its last place
    torch.testing.assert_close(out.cpu().double(), want, atol=near, rtol=near)


def test_triton_prompt_reads_sinks_of_any_stride(device: torch.device) -> None:
    query, keys, values, mask, *rest = draw(masking="padded")
    given = on(device, (query, keys, values, mask, *rest[:-1]))
    sinks = torch.tensor(1.5, device=device).expand(query.shape[1])
    assert torch.equal(attend_prompt(*given, sinks), attend_prompt(*given, sinks.clone()))


def test_triton_prompt_whose_heads_lie_far_apart(device: torch.device) -> None:
    """Head by head, a long prompt's queries are more numbers than 32 bits count."""
    query, keys, values, *rest = draw(batch=1, count=20, group=4, kv_heads=1, softcap=3.0, dtype=torch.float16)
    # Pages that nobody touches cost no memory on the host; on a device they would, 6 GiB.
    far = torch.empty(3 * 2**30 + 20 * 64, dtype=torch.float16, device=device)
    far = far.as_strided(query.shape, (0, 2**30, 64, 1)).copy_(query)
    given = on(device, (keys, values, *rest))
    assert torch.equal(attend_prompt(far, *given), attend_prompt(query.to(device), *given))


def test_triton_prompt_leaves_out_tiles(device: torch.device) -> None:
    """What lies before every query's first row, or behind its last, is never read."""
    query, keys, values, mask, *rest = draw(count=40, past=560, masking="padded", pads=(300, 0), seed=3)
    mask[1, ..., 200:] = False
    for rows in (keys, values):
        rows[0, :, :256] = float("nan")
        rows[1, :, 256:] = float("nan")
    out = attend_prompt(*on(device, (query, keys, values, mask, *rest)))
    assert out.isfinite().all()
    keys, values = keys.nan_to_num(0.0), values.nan_to_num(0.0)
    want = straight(query, keys, values, mask, *rest)
    near = TOLERANCES[out.dtype]
    torch.testing.assert_close(out.cpu().double(), want, atol=near, rtol=near)


# -- what it serves --------------------------------------------------------------------------------------------------


@pytest.fixture
def trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "holds", lambda *kind: True)


@pytest.mark.usefixtures("trusted")
def test_triton_prompts_that_are_served() -> None:
    query, keys, values, mask, scaling, *_ = draw(masking="padded", dtype=torch.bfloat16)
    sinks = torch.zeros(query.shape[1])
    for asked in ((mask, None, None), (None, 3.0, None), (None, None, sinks), (mask[:1], 3.0, sinks)):
        assert prefill.serves(query, keys, values, asked[0], scaling, *asked[1:])
    wrong: list[tuple[Any, ...]] = [
        (query, keys, values, None, scaling),
        (query.float(), keys.float(), values.float(), mask, scaling),
        (query, keys, values.half(), mask, scaling),
        (query, keys, values, torch.zeros(mask.shape), scaling),
        (query, keys, values, mask[..., 1:], scaling),
        (query, keys, values, mask.expand(-1, 4, -1, -1), scaling),
        (query, keys, values, torch.cat([mask, mask]), scaling),
        (query, keys[:, :, 1:], values, mask, scaling),
        (query[:, :3], keys, values, mask, scaling),
        (query[..., :8], keys[..., :8], values, mask, scaling),
        (query, keys, values, mask.to("meta"), scaling),
        (query, keys, values, mask, scaling, None, sinks[1:]),
        (*(rows[:1].expand(2**15, -1, -1, -1) for rows in (query, keys, values)), mask[:1], scaling),
        (query.clone().requires_grad_(), keys, values, mask, scaling),
    ]
    assert not [number for number, given in enumerate(wrong) if prefill.serves(*given)]


KIND = (torch.float16, 2, 64, 32, True, True, True)


def test_triton_prompts_are_tried_first(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    assert prefill.holds.__wrapped__(device, *KIND)
    right = prefill.attend_prompt
    monkeypatch.setattr(prefill, "attend_prompt", lambda *given: right(*given) * 1.1)
    with pytest.warns(UserWarning, match="is off by"):
        assert not prefill.holds.__wrapped__(device, *KIND)

    def fails(*given: Any) -> torch.Tensor:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(prefill, "attend_prompt", fails)
    with pytest.warns(UserWarning, match="no such instruction"):
        assert not prefill.holds.__wrapped__(device, *KIND)


@pytest.mark.parametrize("masked", [True, False])
def test_triton_prompts_are_tried_on_several_whole_tiles(masked: bool) -> None:
    """As real ones consist of little else: for every head, even the largest tile of a head without a group."""
    query, keys, _, mask = prefill._tried_on(torch.device("cpu"), torch.float16, 1, 16, 16, masked)
    count, length = query.shape[2], keys.shape[2]
    seen = torch.ones(count, length, dtype=torch.bool).tril(length - count) if mask is None else mask[0, 0]
    assert seen[:128].all(0).unfold(0, 128, 128).all(1).sum() >= 2
    if mask is not None:
        assert not mask[1].any(-1).all(), "some attend nothing"
        rows = mask[2, 0].int()
        assert ((rows[:, 1:] - rows[:, :-1]) == -1).any(), "and some have holes"


def test_triton_prompts_are_tried_whatever_is_set(device: torch.device) -> None:
    with torch.device("meta"):
        assert prefill.holds.__wrapped__(device, *KIND)
    with torch.autocast(device.type, dtype=torch.bfloat16), torch.inference_mode():
        assert prefill.holds.__wrapped__(device, *KIND)


def test_triton_prompts_without_memory_are_tried_again(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("none left")

    prefill.holds.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(prefill, "attend_prompt", full)
        with pytest.raises(torch.OutOfMemoryError):
            prefill.holds(device, *KIND)
    assert prefill.holds(device, *KIND)


@pytest.mark.parametrize("kind", ["gemma2", "gpt_oss", "mistral", "llama"])
def test_triton_attends_a_model_s_padded_prompt(
    kind: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with torch's kernels, in chunks, windows and sinks included."""
    ids, mask = tokens(3, 2, 90).to(device), left_padding([90, 50]).to(device)
    how = "sdpa" if kind in ("mistral", "llama") else "eager"
    model = make(kind, dtype=torch.float16, attention=how, head_dim=32).to(device)
    calls, ours = [], prefill.attend_prompt

    def counted(*given: Any) -> torch.Tensor:
        calls.append(given)
        return ours(*given)

    def logits() -> torch.Tensor:
        with attach(model):
            return [last for last, _ in read(model, KCache(model, Policy(prefill_chunk=40)), ids, mask)][-1]

    monkeypatch.setattr(prefill, "attend_prompt", counted)
    monkeypatch.setattr(dense, "_kernels_for", lambda query: None)
    want = logits()
    assert not calls
    monkeypatch.setattr(dense, "_kernels_for", lambda query: prefill)
    torch.testing.assert_close(logits(), want, atol=0.01, rtol=0.01)
    assert len(calls) >= 3 * model.config.num_hidden_layers


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("heads", "dim", "sunk"), [(32, 128, False), (64, 64, True), (16, 256, False)])
def test_triton_prompts_at_real_sizes(heads: int, dim: int, sunk: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A padded piece after a past, taken by the way a model comes, beside attention written out."""
    options = {"dtype": torch.bfloat16, "device": "cuda"}
    query = torch.randn(2, 2048, heads, dim, **options).transpose(1, 2)
    keys, values = torch.randn(2, 8, 9000, dim, **options), torch.randn(2, 8, 9000, dim, **options)
    mask = torch.ones(2048, 9000, dtype=torch.bool, device="cuda").tril(9000 - 2048).expand(2, 1, -1, -1).clone()
    mask[1, ..., :5000] = False
    given = query, keys, values, mask, dim**-0.5, None, torch.randn(heads, **options) if sunk else None
    calls, ours = [], prefill.attend_prompt
    monkeypatch.setattr(prefill, "attend_prompt", lambda *asked: calls.append(asked) or ours(*asked))
    got = dense.attend(*given)
    assert calls
    torch.testing.assert_close(got, plain(*given), atol=0.02, rtol=0.02)
