"""A prompt's attention by our own tiles equals attention written out in fp64, and never what torch would do better."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kcache.attaching import attach
from kcache.backends import dense
from kcache.backends.jit import prefill
from kcache.backends.jit.prompt import ROWS
from kcache.backends.jit.team import Team
from kcache.cache import KCache
from kcache.decoding.forward import prefill as read
from kcache.policy import Policy
from tests.backends.test_dense import straight
from tests.tiny_models import left_padding, make, tokens

BF16 = torch.bfloat16
here = pytest.mark.skipif(not prefill.is_served(), reason="no AVX-512 BF16 here, or AMX, with which torch is faster")


def draw(
    seed: int = 0, batch: int = 2, kv_heads: int = 2, group: int = 2, count: int = 70, past: int = 0, dim: int = 64,
    dim_v: int = 64, masking: str = "causal", sinks: bool = False, sharpness: float = 1.0,
) -> tuple[Any, ...]:  # fmt: skip
    """Arguments of :func:`dense.attend`, with K and V in larger buffers and the query turned, as a model gives them."""
    generator = torch.Generator().manual_seed(seed)
    length = past + count

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    query = (sharpness * randn(batch, count, kv_heads * group, dim)).to(BF16).transpose(1, 2)
    keys = randn(batch, kv_heads, length + 9, dim).to(BF16)[:, :, :length]
    values = randn(batch, kv_heads, length + 5, dim_v).to(BF16)[:, :, :length]
    mask = None
    if masking != "causal":
        mask = torch.ones(count, length, dtype=torch.bool).tril(past).expand(batch, 1, -1, -1)
        if masking == "padded":
            real = torch.arange(length)[None, :] >= torch.randint(0, length, (batch, 1), generator=generator)
            mask = mask & real[:, None, None, :]
        elif masking == "holes":
            mask = mask & (torch.rand(mask.shape, generator=generator) < 0.3)
        elif masking == "both ways":
            mask = torch.ones(1, 1, count, length + 3, dtype=torch.bool).expand(batch, -1, -1, -1)[..., :length]
    return query, keys, values, mask, dim**-0.5, None, randn(kv_heads * group) if sinks else None


def check(given_: tuple[Any, ...]) -> None:
    assert prefill.serves(*given_[:5])
    got, want = dense.attend(*given_), straight(*given_)
    assert got.dtype == BF16
    assert got.shape == want.shape
    torch.testing.assert_close(got.double(), want, atol=0.01, rtol=0.01)


@here
@settings(max_examples=150, derandomize=True, deadline=None, database=None)
@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 2),
    group=st.sampled_from([1, 2, 3]),
    count=st.sampled_from([32, ROWS - 1, ROWS, ROWS + 1, 2 * ROWS, 130]),
    past=st.sampled_from([0, 1, 63, 64, 255, 256, 300]),
    dims=st.sampled_from([(64, 64), (128, 128), (16, 16), (80, 80), (6, 32), (96, 48), (128, 144)]),
    masking=st.sampled_from(["causal", "causal", "padded", "holes", "both ways"]),
    sinks=st.booleans(),
    sharpness=st.sampled_from([0.0, 1.0, 10.0]),
)
def test_as_in_fp64(dims: tuple[int, int], **changes: Any) -> None:
    check(draw(dim=dims[0], dim_v=dims[1], **changes))


@here
def test_long_prompts_on_two_threads() -> None:
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            check(draw(count=700, past=1000, batch=1, group=3))
        finally:
            torch.set_num_threads(before)


@here
def test_a_query_that_may_attend_nothing_gives_zeros() -> None:
    query, keys, values, mask, *rest = draw(masking="padded")
    mask = mask.clone()
    mask[0, :, 10:30], mask[1] = False, False
    out = dense.attend(query, keys, values, mask, *rest)
    assert not out[1].any()
    assert not out[0, :, 10:30].any()
    assert out[0, :, 60:].any()


@here
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_nan_comes_out_where_it_went_in(number: float) -> None:
    query, keys, values, *rest = draw(count=64)
    keys[0, 0, 20, 3] = number
    out = dense.attend(query, keys, values, *rest)
    assert out[0, :2, :20].isfinite().all()
    assert out[0, 2:].isfinite().all()
    assert out[1].isfinite().all()
    if number != number:
        assert out[0, :2, 20:].isnan().all()


@here
def test_as_near_to_fp64_as_torch() -> None:
    given_ = draw(count=300, past=700, sharpness=3.0)
    query, keys, values, _, scaling, *_ = given_
    want = straight(*given_)
    theirs = dense._past_and_chunk(query, keys, values, 700, scaling)
    assert (dense.attend(*given_).double() - want).square().mean() <= (theirs.double() - want).square().mean() * 1.05


@here
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_a_model_s_prompt_in_chunks(kind: str, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits no further from those in fp32 than with torch's kernels, over a few models; windows are served, too."""
    ids, mask = tokens(3, 2, 150), left_padding([150, 90]) if padded else None
    models = [make(kind, seed, head_dim=32).to(BF16) for seed in range(6)]
    calls, ours, serves = [], prefill.attend_prompt, prefill.serves

    def counted(*given_: Any) -> torch.Tensor:
        calls.append(given_)
        return ours(*given_)

    def logits(of: Any) -> torch.Tensor:
        cache = KCache(of, Policy(prefill_chunk=64))
        with attach(of):
            return [last for last, _ in read(of, cache, ids, mask)][-1]

    def far(by_us: bool) -> float:
        monkeypatch.setattr(prefill, "serves", serves if by_us else lambda *given_: False)
        return sum(float((logits(model) - want).abs().mean()) for model, want in zip(models, wanted, strict=True))

    monkeypatch.setattr(prefill, "attend_prompt", counted)
    wanted = [logits(copy.deepcopy(model).float()) for model in models]
    theirs = far(by_us=False)
    assert not calls
    assert far(by_us=True) < 1.2 * theirs
    assert len(calls) == len(models) * 3 * models[0].config.num_hidden_layers


# -- what goes to torch ----------------------------------------------------------------------------------------------


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "is_served", lambda: True)


@pytest.mark.usefixtures("everywhere")
def test_what_the_tiles_do_not_serve() -> None:
    query, keys, values, mask, scaling, *_ = draw(masking="padded")
    assert prefill.serves(query, keys, values, mask, scaling)
    wrong: list[tuple[Any, ...]] = [
        (query.float(), keys.float(), values.float(), mask, scaling),
        (query.half(), keys.half(), values.half(), mask, scaling),
        (query, keys, values.float(), mask, scaling),
        (query, keys, values, torch.zeros(mask.shape), scaling),
        (query, keys, values, mask[..., 1:], scaling),
        (query, keys, values, mask.expand(-1, 4, -1, -1), scaling),
        (query[:, :, :31], keys, values, None, scaling),
        (query[..., :63], keys[..., :63], values, mask, scaling),
        (query, keys, values[..., :40], mask, scaling),
        (query, keys, values, mask, -0.1),
        (query, keys, values, mask, 1e-46),
        (query, keys, values[:, :, :-1], mask, scaling),
        (query, keys[:1], values[:1], mask, scaling),
        (query[..., :32], keys, values, mask, scaling),
        (torch.cat([query, query, query]), torch.cat([keys] * 3), torch.cat([values] * 3), mask, scaling),
        (query.to("meta"), keys.to("meta"), values.to("meta"), None, scaling),
    ]
    assert not [number for number, given_ in enumerate(wrong) if prefill.serves(*given_)]


@here
def test_gradients_are_torchs() -> None:
    query, keys, values, *rest = draw(sinks=True)
    for learns in (query, rest[-1]):
        learns.requires_grad_()
        dense.attend(query, keys, values, *rest).float().sum().backward()
        assert learns.grad is not None
        learns.requires_grad_(False)
        assert prefill.serves(query, keys, values, *rest)


@here
def test_who_wants_operators_gets_them() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    query, keys, values, *rest = draw()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert dense.attend(*(mode.from_tensor(rows) for rows in (query, keys, values)), *rest).shape == query.shape
    graph = make_fx(lambda asked: dense.attend(asked, keys, values, *rest))(query)
    assert "scaled_dot_product" in graph.code
    compiled = torch.compile(dense.attend, backend="eager", fullgraph=True)
    torch.testing.assert_close(
        compiled(query, keys, values, *rest), dense.attend(query, keys, values, *rest), atol=0.02, rtol=0.02
    )


@here
@pytest.mark.parametrize("name", ["NUMBA_CPU_NAME=generic", "NUMBA_ENABLE_AVX=0", "NUMBA_CPU_FEATURES=+sse2"])
def test_numba_told_of_another_machine(name: str) -> None:
    """LLVM would end the process."""
    code = "from tests.backends.test_prefill import *; g = draw(); assert not prefill.serves(*g[:5]); dense.attend(*g)"
    setting, _, value = name.partition("=")
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, setting: value}, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()


@here
@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("length", [64, 70, 127, 128])
def test_k_and_v_anywhere_in_memory(offset: int, length: int) -> None:
    query, keys, values, *rest = draw(count=length)
    room = torch.full((keys.numel() + values.numel() + 64,), float("nan"), dtype=BF16)
    moved = []
    for rows in (keys, values):
        place = room[offset : offset + rows.numel()].view(rows.shape)
        moved.append(place.copy_(rows))
        room, offset = room[offset + rows.numel() :], 1 - offset % 2
    check((query, *moved, *rest))


@here
def test_sharp_scores() -> None:
    check(draw(count=200, past=100, sharpness=300.0))


@pytest.mark.usefixtures("everywhere")
def test_one_thread_of_ours_for_many_of_torchs_is_no_bargain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "find_team", Team)
    given_ = draw()[:5]
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=threads: count)
        assert prefill.serves(*given_) == (threads == 1)


def test_machines_without_the_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    from llvmlite import binding

    from kcache.backends.jit.tiles import can_assemble

    ours = {"avx512f": True, "avx512bf16": True, "amx-bf16": False}
    for changes, there in (({}, True), ({"avx512bf16": False}, False), ({"amx-bf16": True}, False)):
        monkeypatch.setattr(binding, "get_host_cpu_features", lambda found={**ours, **changes}: found)
        assert can_assemble() == there
    monkeypatch.setattr(prefill, "is_served", lambda: False)
    given_ = draw()
    torch.testing.assert_close(dense.attend(*given_).double(), straight(*given_), atol=0.02, rtol=0.02)
