"""At N = L/8 kcache gives what the definition gives: the brute-force oracle of ``tests.oracle``.

TopN that covers the context cannot see a wrong tail, a wrong mass or a row picked by stale scores; this can.
"""

from __future__ import annotations

import pytest
import torch

from kcache.attaching import attach
from kcache.cache import KCache
from kcache.policy import Policy
from tests.oracle import OraclePair
from tests.pair import forward
from tests.tiny_models import left_padding, make, tokens

BASE = {"dense_below": 0, "resident_layers": 0}
SCHEMES = {
    "default": Policy(topn=8, **BASE),
    "default_no_dense": Policy(topn=8, dense_layers=0, **BASE),
    "paper": Policy.paper(8, **BASE),
    "renormalise": Policy(topn=8, dense_layers=0, tail="renormalise", **BASE),
    "group_no_tail": Policy(topn=8, dense_layers=0, tail="none", **BASE),
    "head": Policy(topn=8, dense_layers=0, select="head", **BASE),
    "one_direction": Policy(topn=8, dense_layers=0, tail_rank=1, **BASE),
    "all_directions": Policy(topn=8, dense_layers=0, tail_rank=1000, **BASE),
    "one_row": Policy(topn=1, dense_layers=0, **BASE),
    "reference": Policy(topn=8, dense_layers=0, backend="reference", **BASE),
}
MAIN = ("default", "default_no_dense", "paper")


def pair(kind: str, scheme: str, **changes: object) -> OraclePair:
    attention = "eager" if kind in ("gemma2", "gpt_oss") else "sdpa"
    return OraclePair(make(kind, attention=attention), SCHEMES[scheme].replace(**changes))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", ["llama", "mha", "mqa"])
def test_padded_batch(kind: str, scheme: str) -> None:
    run = pair(kind, scheme)
    run.forward(tokens(1, 3, 58), left_padding([58, 31, 44]))
    run.decode(8)
    run.compare_picks()
    fetched = run.ours.stats.rows_fetched
    layers, heads = len(run.tiered), run.ours.tiered_layers[0].keys.shape[1]
    per_head = 4 if run.policy.select == "head" else heads
    assert fetched == 8 * layers * 3 * per_head * run.policy.topn


@pytest.mark.parametrize("scheme", MAIN)
@pytest.mark.parametrize("kind", ["qwen3", "ministral", "gemma3", "gpt2", "phi3", "gemma2", "gpt_oss"])
def test_every_family(kind: str, scheme: str) -> None:
    run = pair(kind, scheme, dense_layers=1) if scheme == "default" else pair(kind, scheme)
    run.forward(tokens(1, 2, 60), left_padding([60, 37]))
    run.decode(5)
    run.compare_picks()


@pytest.mark.parametrize("scheme", [*MAIN, "head"])
@pytest.mark.parametrize("seed", range(3))
def test_after_a_life_of_turns_crops_and_reorders(scheme: str, seed: int) -> None:
    """Random padding, a second turn that leaves holes, crops to anywhere in a block, beams, batch selects."""
    draw = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=draw))

    run = pair("llama", scheme)
    batch = 3
    for turn in range(3):
        lengths = [number(1, 40) for _ in range(batch)]
        lengths[number(0, batch - 1)] += 8
        run.forward(tokens(turn, batch, max(lengths)), left_padding(lengths))
        run.decode(number(1, 4), seed=turn)
        run.compare_picks()
        run.reorder(torch.tensor([number(0, batch - 1) for _ in range(batch)]))
        run.decode(2, seed=10 + turn)
        run.crop(number(1, min(30, run.length - 12)))
        run.decode(number(1, 17), seed=20 + turn)
        run.select(torch.tensor([number(0, batch - 1) for _ in range(batch)]))
        run.decode(2, seed=30 + turn)
        run.compare_picks()
    run.repeat(2)
    run.decode(3)
    run.select(torch.tensor([True, False, False, True, True, False]))
    run.decode(2)
    run.compare_picks()


@pytest.mark.parametrize("left", [1, 15, 16, 17, 31, 32, 33, 48])
@pytest.mark.parametrize("padded", [False, True])
def test_crop_to_every_place_in_a_block(left: int, padded: bool) -> None:
    run = pair("llama", "default_no_dense", topn=3)
    run.forward(tokens(1, 2, 50), left_padding([50, 50 - left + 1]) if padded else None)
    run.decode(1)
    run.crop(51 - left)
    run.decode(18)
    run.compare_picks()


def test_crop_to_nothing_and_start_over() -> None:
    run = pair("llama", "default_no_dense")
    run.forward(tokens(1, 2, 40), left_padding([40, 13]))
    run.decode(2)
    run.crop(42)
    run.forward(tokens(2, 2, 50), left_padding([7, 50]))
    run.decode(4)
    run.compare_picks()


@pytest.mark.parametrize("sizes", [(1, 1, 1, 70), (16, 16, 16, 16), (15, 2, 31, 1, 20), (3,) * 22])
def test_tail_of_a_chunked_prefill(sizes: tuple[int, ...]) -> None:
    """Chunks that end inside, before and behind a block; the first ones are all padding for one sequence."""
    run = pair("llama", "default_no_dense")
    mask = left_padding([sum(sizes), sum(sizes) - 35])
    run.exact = True
    at = 0
    with run.ours.exact():
        for number, size in enumerate(sizes):
            run.forward(tokens(number, 2, size), mask[:, at : at + size])
            at += size
    run.exact = False
    run.decode(5)
    run.compare_picks()


@pytest.mark.parametrize("dense_below", [20, 45, 49, 64])
def test_v_that_was_young_on_the_device_has_the_same_tail(dense_below: int) -> None:
    """V leaves in the middle of a padded run; means come from all rows, the young ones included."""
    run = pair("llama", "default_no_dense", dense_below=dense_below, topn=6)
    run.forward(tokens(1, 2, 30), left_padding([30, 11]))
    run.forward(tokens(2, 2, 17), left_padding([4, 17]))
    run.decode(22)
    run.compare_picks()
    run.crop(25)
    run.decode(30)
    run.compare_picks()


def test_fewer_real_rows_than_topn() -> None:
    """A short sequence beside a long one: picks run out of real rows and the rest weigh nothing."""
    for scheme in SCHEMES:
        run = pair("llama", scheme, topn=20)
        run.forward(tokens(1, 2, 50), left_padding([50, 2]))
        run.decode(4)


def test_gibberish_in_padding_rows_changes_nothing() -> None:
    """Rows of padding are fetched or averaged by nobody, whatever they hold."""
    model = make("llama")
    outs = []
    for filler in (0, 77):
        ids = tokens(1, 2, 60)
        mask = left_padding([60, 20])
        ids[mask == 0] = filler
        cache = KCache(model, SCHEMES["default_no_dense"])
        with attach(model):
            forward(model, cache, ids, mask)
            outs.append(forward(model, cache, tokens(2, 2, 1), left_padding([61, 21])))
    torch.testing.assert_close(outs[0], outs[1])


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("dense_below", [0, 51])
def test_rows_stored_without_attention_take_their_validity_from_the_next_mask(attached: bool, dense_below: int) -> None:
    """K and V of a padded batch moved over from another cache by ``update``, or stored before ``attach``."""
    model = make("llama")
    run = OraclePair(model, SCHEMES["default_no_dense"].replace(dense_below=dense_below))
    ids, mask = tokens(1, 2, 50), left_padding([50, 22])
    run.mask = mask
    run.exact = True
    run.stock_forward(ids, mask)
    run.exact = False
    if attached:
        with attach(model):
            for index, layer in enumerate(run.stock.layers):
                run.ours.update(layer.keys.clone(), layer.values.clone(), index)
    else:
        forward(model, run.ours, ids, mask)
    run.decode(3)
    run.compare_picks()
    run.reorder(torch.tensor([1, 0]))
    run.decode(2)
    run.compare_picks()


def test_rows_stored_without_attention_and_then_selected() -> None:
    """The last layer's rows are not in the tail yet when the batch changes."""
    model = make("llama")
    for change in ("select", "repeat", "crop"):
        run = OraclePair(model, SCHEMES["default_no_dense"])
        run.forward(tokens(1, 2, 30), left_padding([30, 12]))
        run.exact = True
        run.mask = torch.cat([run.mask, torch.ones(2, 25, dtype=torch.long)], 1)
        run.stock_forward(tokens(2, 2, 25), run.mask)
        run.exact = False
        with attach(model):
            for index, layer in enumerate(run.stock.layers):
                run.ours.update(layer.keys[:, :, 30:].clone(), layer.values[:, :, 30:].clone(), index)
        if change == "select":
            run.select(torch.tensor([1]))
        elif change == "repeat":
            run.repeat(2)
        else:
            run.crop(9)
        run.decode(3)
        run.compare_picks()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on CPU tensors only in Triton's interpreter")
@pytest.mark.parametrize(
    ("kind", "scheme"), [("llama", "default_no_dense"), ("llama", "paper"), ("gpt_oss", "default_no_dense")]
)
def test_kernels_through_the_cache(kind: str, scheme: str) -> None:
    """The Triton kernels, interpreted, on the buffers a cache really hands them."""
    pytest.importorskip("triton")
    sizes = {"num_hidden_layers": 1} if kind == "llama" else {"attention": "eager"}
    run = OraclePair(make(kind, head_dim=16, **sizes), SCHEMES[scheme].replace(backend="triton"))
    run.forward(tokens(1, 2, 58), left_padding([58, 31]))
    run.decode(1)
    run.compare_picks()
    run.reorder(torch.tensor([1, 0]))
    if kind == "llama":
        run.crop(5)
    run.forward(tokens(2, 2, 9), left_padding([3, 9]))
    run.decode(1)
    run.compare_picks()
    backend = run.ours.shared.backend(torch.device("cpu"))
    assert backend.name == "triton"
    assert backend._workspaces, "the reference answered instead"
