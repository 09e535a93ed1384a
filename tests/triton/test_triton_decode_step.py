"""The TopN decode step by Triton kernels against fp64 torch: shapes, types, masks, tails, edges."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from kcache.backends.base import DecodeStep, NarrowKeys
from kcache.backends.reference import ReferenceBackend
from kcache.backends.rounding import quantise, remainder
from kcache.backends.triton import Chip, DenseWorkspace, Tuning, Workspace, triton_decode
from kcache.backends.triton.backend import TritonBackend
from kcache.policy import Policy
from tests.triton.chips import CHIPS
from tests.triton.problem import Problem, assert_near, check_picks, expected, make_problem

SMALL = Tuning(score_block=64, score_stages=2, select_tile=64, gather_rows=16, tail_tile=16, chip=Chip(8))


def make_workspace(problem: Problem, tuning: Tuning = SMALL) -> Workspace:
    batch, kv_heads, capacity, dim = problem.keys.shape
    made = Workspace(
        batch, kv_heads, problem.group, dim, problem.values.shape[-1], capacity, problem.topn, problem.query.device,
        select=problem.select, tail=problem.tail, spread="even" if problem.threshold is None else "need",
        tail_rank=None if problem.lowrank is None else problem.lowrank.basis.shape[2], tuning=tuning,
    )  # fmt: skip
    for name in ("scores", "lse", "grown", "block_top", "partial", "shares", "held", "listed", "found"):
        scratch = getattr(made, name, None)
        if scratch is not None:
            scratch.fill_(float("nan") if scratch.is_floating_point() else 12345)
    return made


def run(problem: Problem, workspace: Workspace, length: int | torch.Tensor | None = None) -> Any:
    out = torch.full_like(problem.query[..., :1].expand(-1, -1, problem.values.shape[-1]), float("nan"))
    return triton_decode(
        problem.query, problem.keys, problem.values, problem.length if length is None else length,
        scaling=problem.scaling, workspace=workspace, lowrank=problem.lowrank, mask=problem.mask,
        softcap=problem.softcap, sinks=problem.sinks, threshold=problem.threshold, out=out,
        narrow=problem.narrow, value_scales=problem.value_scales,
    )  # fmt: skip


def check(problem: Problem, tuning: Tuning = SMALL) -> None:
    out, picks, mass = run(problem, make_workspace(problem, tuning))
    check_picks(problem, picks)
    want, want_mass = expected(problem, picks)
    assert_near(out, want, problem.query.dtype)
    torch.testing.assert_close(mass.double(), want_mass, rtol=1e-5, atol=1e-7)


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "multi-head": {"group": 1, "kv_heads": 3},
    "group of 3": {"group": 3, "dim": 64},
    "group of 16": {"group": 16, "kv_heads": 1},
    "head size 128": {"dim": 128},
    "head size 256": {"dim": 256, "batch": 1},
    "head size 80": {"dim": 80},
    "head size 96": {"dim": 96, "dim_v": 64},
    "padded": {"padded": True},
    "softcap": {"softcap": 5.0},
    "sinks": {"sinks": True},
    "all at once": {"padded": True, "softcap": 4.0, "sinks": True, "group": 4},
    "no tail": {"tail": "none"},
    "renormalised": {"tail": "renormalise"},
    "renormalised padded": {"tail": "renormalise", "padded": True},
    "tail of 1 direction": {"rank": 1, "padded": True},
    "tail of 17 directions": {"rank": 17, "length": 150},
    "tail of all directions": {"rank": 32, "dim": 32, "length": 40, "capacity": 300},
    "picked per query head": {"select": "head", "group": 4},
    "per head padded, no tail": {"select": "head", "tail": "none", "padded": True},
    "one pick": {"topn": 1},
    "picks not a power of two": {"topn": 13},
    "more picks than rows": {"topn": 32, "length": 20},
    "as many picks as rows": {"topn": 32, "length": 32},
    "first step": {"length": 1, "topn": 4},
    "second step": {"length": 2, "topn": 4},
    "long": {"length": 777, "topn": 20, "batch": 1},
    "a block exactly": {"length": 64, "capacity": 64},
    "flat": {"sharpness": 1e-3},
    "sharp": {"sharpness": 15.0},
    "bf16": {"dtype": torch.bfloat16},
    "bf16 all at once": {"dtype": torch.bfloat16, "padded": True, "softcap": 4.0, "sinks": True, "dim": 128},
    "fp16": {"dtype": torch.float16},
    "large capacity": {"length": 130, "capacity": 600},
    "above": {"threshold": 0.1},
    "above, long": {"threshold": 0.02, "length": 777, "batch": 3, "topn": 20},
    "above, padded": {"threshold": 0.1, "padded": True, "group": 3},
    "above, all at once": {"threshold": 0.1, "padded": True, "softcap": 4.0, "sinks": True, "group": 4, "batch": 3},
    "above, per query head": {"threshold": 0.1, "select": "head", "group": 4},
    "above, no tail": {"threshold": 0.1, "tail": "none"},
    "above, renormalised": {"threshold": 0.1, "tail": "renormalise"},
    "above, bf16": {"threshold": 0.1, "dtype": torch.bfloat16, "dim": 128},
    "above, fp16": {"threshold": 0.1, "dtype": torch.float16},
    "above, nothing": {"threshold": 0.0, "sharpness": 1e-3},
    "above, nearly all rows": {"threshold": 0.97},
    "above, more than the most": {"threshold": 0.6, "topn": 3, "length": 300},
    "above, more than the most, per head": {"threshold": 0.9, "topn": 1, "length": 150, "select": "head"},
    "above, one pick": {"threshold": 0.05, "topn": 1},
    "above, first step": {"threshold": 0.5, "length": 1, "topn": 4},
    "above, a chunk exactly": {"threshold": 0.3, "length": 64, "capacity": 64, "topn": 2},
    "K in 8 bits": {"k_bits": 8, "padded": True},
    "V in 8 bits": {"v_bits": 8, "padded": True, "threshold": 0.1},
    "8 bits": {"k_bits": 8, "v_bits": 8, "threshold": 0.1, "dtype": torch.bfloat16, "dim": 128, "group": 4},
    "8 bits, fp16, per head": {"k_bits": 8, "v_bits": 8, "dtype": torch.float16, "select": "head", "softcap": 3.0},
    "K in two planes": {"k_bits": "8+8"},
    "two planes, above, padded": {"k_bits": "8+8", "threshold": 0.1, "padded": True, "group": 3},
    "two planes, all at once": {
        "k_bits": "8+8",
        "v_bits": 8,
        "threshold": 0.1,
        "padded": True,
        "softcap": 4.0,
        "sinks": True,
        "group": 4,
        "batch": 3,
    },
    "two planes, bf16": {"k_bits": "8+8", "threshold": 0.1, "dtype": torch.bfloat16, "dim": 128, "group": 4},
    "two planes, fp16, per head": {"k_bits": "8+8", "dtype": torch.float16, "select": "head", "softcap": 3.0},
    "two planes, more picks than rows": {"k_bits": "8+8", "topn": 32, "length": 20, "padded": True},
    "two planes, renormalised": {"k_bits": "8+8", "threshold": 0.1, "tail": "renormalise", "sinks": True},
    "two planes, no tail": {"k_bits": "8+8", "tail": "none", "dim": 80},
    "two planes, nothing picked": {"k_bits": "8+8", "threshold": 0.0, "sharpness": 1e-3},
    "two planes, long": {"k_bits": "8+8", "threshold": 0.3, "length": 777, "topn": 200, "sharpness": 6.0},
    "above, large capacity": {"threshold": 0.1, "length": 130, "capacity": 600},
}


@pytest.mark.parametrize("case", CASES)
def test_triton_step_equals_fp64(case: str, device: torch.device) -> None:
    check(make_problem(seed=len(case), **CASES[case]).to(device))


def test_triton_step_does_not_depend_on_tuning(device: torch.device) -> None:
    problem = make_problem(length=300, topn=40, padded=True).to(device)
    check(problem, Tuning(score_block=128, select_tile=256, gather_rows=64, tail_tile=32, chip=Chip(2)))
    check(problem, Tuning(score_block=64, select_tile=16, gather_rows=16, tail_tile=16, chip=Chip(64)))
    problem = make_problem(length=300, topn=4, padded=True, threshold=0.4, batch=3).to(device)
    for tile in (16, 32, 1024):
        check(problem, Tuning(select_tile=tile, gather_rows=32, tail_tile=64, chip=Chip(8)))
    for ahead in (1, 2, 5, 100):
        check(problem, replace(SMALL, ahead=ahead, score_splits=3, tail_splits=2))


def test_triton_constant_rows_and_ties(device: torch.device) -> None:
    problem = make_problem(length=200, topn=24)
    problem.keys[:, :, :] = problem.keys[:, :, :1]
    check(problem.to(device))
    problem = make_problem(length=200, topn=24)
    problem.keys[:, :, 50:120] = problem.keys[:, :, 50:51] * 3
    problem.keys[:, :, 130:180] = problem.keys[:, :, 50:51]
    check(problem.to(device))


def test_triton_as_many_ties_as_select_searches(device: torch.device) -> None:
    """2,048 picks among 32,768 rows that are equal: their running count reaches a sign."""
    problem = make_problem(1, 1, 1, dim=16, length=32768, topn=2048, tail="none")
    problem.query[:] = 0
    problem = problem.to(device)
    _, picks, _ = run(problem, make_workspace(problem, replace(SMALL, score_block=1024)))
    assert torch.equal(picks.flatten().cpu(), torch.arange(2048, dtype=torch.int32))


@pytest.mark.parametrize("where", ["query", "keys"])
@pytest.mark.parametrize("number", [float("inf"), float("nan")])
@pytest.mark.parametrize(
    ("threshold", "tail"), [(None, "lowrank"), (0.5, "lowrank"), (0.5, "none"), (0.5, "renormalise")]
)
def test_triton_what_is_no_number_ends_in_none(
    where: str, number: float, threshold: float | None, tail: str, device: torch.device
) -> None:
    """And not in a search among weights beyond 1 that never ends."""
    problem = make_problem(1, 1, length=300, topn=4, threshold=threshold, tail=tail, sharpness=4.0)
    if where == "query":
        problem.query[0, 0, 0] = number
    else:
        problem.keys[0, 0, 5, 0] = abs(number) * problem.query[0, 0, 0].sign()
    problem = problem.to(device)
    out, _, _ = run(problem, make_workspace(problem))
    assert out[0, 0].isnan().all()
    assert where == "keys" or out[0, 1].isfinite().all()


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
@pytest.mark.parametrize("k_bits", [8, "8+8"])
@pytest.mark.parametrize("number", [float("inf"), float("nan")])
@pytest.mark.parametrize("where", ["query", "scale"])
def test_triton_so_it_does_with_k_in_8_bits(where: str, number: float, k_bits: int | str, device: torch.device) -> None:
    problem = make_problem(1, 1, length=300, topn=4, threshold=0.5, sharpness=4.0, k_bits=k_bits)
    assert problem.narrow is not None
    if where == "query":
        problem.query[0, 0, 0] = number
    else:
        problem.narrow.scales[0, 0, 5] = float("nan")  # of a row that holds such a number
    problem = problem.to(device)
    out, _, _ = run(problem, make_workspace(problem))
    assert out[0, 0].isnan().all()
    assert where == "scale" or out[0, 1].isfinite().all()


@pytest.mark.parametrize("which", ["step_kernel", "fetch_kernel"])
def test_triton_a_step_after_an_interrupted_one(
    which: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted:
        def __getitem__(self, grid: object) -> None:
            raise KeyboardInterrupt

    problem = make_problem().to(device)
    workspace = make_workspace(problem)
    with monkeypatch.context() as patch:
        patch.setattr(f"kcache.backends.triton.step.{which}", Interrupted())
        with pytest.raises(KeyboardInterrupt):
            run(problem, workspace)
    out, picks, _ = run(problem, workspace)
    assert_near(out, expected(problem, picks)[0], torch.float32)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_triton_threshold_among_ties(share: float, device: torch.device) -> None:
    """Constant rows: all lie above the threshold, far more than the most, or none does."""
    problem = make_problem(length=200, topn=3)
    problem.keys[:, :, :] = problem.keys[:, :, :1]
    problem.threshold = torch.full((2,), (1.5 - share) / 200)
    check(problem.to(device))


def test_triton_threshold_counts_what_it_picks(device: torch.device) -> None:
    problem = make_problem(length=200, topn=3, batch=3, threshold=0.3).to(device)
    workspace, tally = make_workspace(problem), torch.tensor([5, 0, 7], device=device)
    picked = torch.tensor([5, 0, 7], device=device)
    for _ in range(2):
        _, picks, _ = triton_decode(
            problem.query, problem.keys, problem.values, problem.length, scaling=problem.scaling, workspace=workspace,
            lowrank=problem.lowrank, threshold=problem.threshold, tally=tally,
        )  # fmt: skip
        picked += (picks >= 0).flatten(1).sum(1)
    assert torch.equal(tally, picked)


def test_triton_underflow_ties_at_zero(device: torch.device) -> None:
    problem = make_problem(length=100, topn=24)
    problem.query[:] = 0
    problem.query[:, :, 0] = 1
    problem.keys[:, :, :100, 0] = -1e4
    problem.keys[:, :, 7:10, 0] = 1e4
    check(problem.to(device))


def test_triton_all_rows_masked_gives_zeros(device: torch.device) -> None:
    problem = make_problem(padded=True)
    assert problem.mask is not None
    problem.mask[1] = False
    problem = problem.to(device)
    out, _, mass = run(problem, make_workspace(problem))
    assert (out[1] == 0).all()
    assert (mass[1] == 0).all()
    assert out[0].isfinite().all()


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("tail", ["lowrank", "renormalise", "none"])
@pytest.mark.parametrize("by", [-40.0, -10.0, -6.0, -4.0, 10.0, 40.0])
def test_triton_two_planes_where_one_errs_by_more_than_all_the_rest_weighs(
    by: float, tail: str, backend: str, device: torch.device
) -> None:
    """A row that the upper plane puts first comes last by both, or beyond what fp32 holds as a share of the old sum."""
    problem = make_problem(1, 1, 1, length=40, topn=4, tail=tail)
    problem.query[:], problem.query[..., 0] = abs(by), 4.0
    rows = problem.keys.nan_to_num(0.0) * 0.3
    rows[0, 0, 5] = 0.49 if by > 0 else -0.49
    rows[0, 0, 5, 0] = 127.0
    problem.keys, scales = quantise(rows)
    centre = torch.zeros(1, 1, rows.shape[3])
    problem.narrow = NarrowKeys(scales.squeeze(3), centre, remainder(rows, problem.keys, scales))
    problem = problem.to(device)
    step = DecodeStep(
        problem.query, problem.keys, problem.values, problem.length, problem.scaling,
        Policy(topn=4, tail=tail, spread="even", k_bits="8+8"), lowrank=problem.lowrank,  # type: ignore[arg-type]
        narrow=problem.narrow,
    )  # fmt: skip
    result = (ReferenceBackend() if backend == "reference" else TritonBackend(device)).decode(step)
    want, mass = expected(problem, result.picks)
    torch.testing.assert_close(result.out.double(), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(result.mass.double(), mass, rtol=1e-4, atol=1e-4)


def test_triton_masked_garbage_is_not_read(device: torch.device) -> None:
    problem = make_problem(padded=True, topn=64)
    assert problem.mask is not None
    holes = ~problem.mask
    problem.values[:, :, : problem.length][holes[:, None].expand(-1, 2, -1)] = float("nan")
    problem.keys[:, :, : problem.length][holes[:, None].expand(-1, 2, -1)] = float("nan")
    check(problem.to(device))


def test_triton_length_on_the_device_grows_in_one_workspace(device: torch.device) -> None:
    full = make_problem(length=150, capacity=192, padded=True).to(device)
    assert full.mask is not None
    workspace = make_workspace(full)
    length = torch.zeros(1, dtype=torch.int32, device=device)
    for rows in (1, 5, 64, 65, 150):
        problem = make_problem(length=150, capacity=192, padded=True).to(device)
        assert problem.mask is not None
        problem.length, problem.mask = rows, problem.mask[:, :rows].contiguous()
        problem.mask[:, -1] = True
        length.fill_(rows)
        out, picks, _ = run(problem, workspace, length)
        check_picks(problem, picks)
        assert_near(out, expected(problem, picks)[0], torch.float32)
    assert (workspace.done == 0).all()
    assert (workspace.tickets == 0).all()


def test_triton_strided_inputs(device: torch.device) -> None:
    problem = make_problem().to(device)
    wide = problem.keys.new_zeros(2, 4, *problem.keys.shape[2:])
    wide[:, ::2] = problem.keys
    problem.keys = wide[:, ::2]
    problem.query = torch.cat([problem.query, problem.query], 1)[:, :4]
    check(problem)


@pytest.mark.parametrize(("dim", "itemsize"), [(64, 2), (128, 1), (128, 2), (256, 2), (128, 4), (256, 4)])
@pytest.mark.parametrize("capability", CHIPS)
def test_triton_tiles_fit_in_shared_memory(dim: int, itemsize: int, capability: int, device: torch.device) -> None:
    """On cards with less than an H100's, too."""
    chip = CHIPS[capability]
    workspace = Workspace(
        1, 1, 1, dim, dim, 4096, 64, device, spread="need", itemsize=itemsize, tuning=Tuning(chip=chip)
    )
    tiles = chip.tiles_held(workspace.score_stages) * workspace.score_block * dim * itemsize
    assert workspace.score_stages >= 2
    assert workspace.score_block >= workspace.block
    assert 2 * (tiles + 12 * 1024) <= chip.shared_bytes, "two programs fit a multiprocessor"
    if capability == 90:
        assert workspace.score_stages == workspace.tuning.score_stages
    resident = DenseWorkspace(1, 1, 1, dim, dim, 4096, device, itemsize=itemsize, tuning=Tuning(chip=chip))
    assert (resident.stages - 1) * 2 * resident.block * dim * itemsize + 12 * 1024 <= chip.shared_bytes
    assert resident.block >= 16


def test_triton_unsupported_sizes_say_why(device: torch.device) -> None:
    with pytest.raises(ValueError, match="17 query heads"):
        Workspace(1, 1, 17, 64, 64, 128, 8, device)
    with pytest.raises(ValueError, match="topn=4096"):
        Workspace(1, 1, 1, 64, 64, 65536, 4096, device)
    Workspace(1, 1, 1, 64, 64, 65536, 4096, device, spread="need")


def test_triton_step_says_what_its_workspace_lacks(device: torch.device) -> None:
    problem = make_problem(threshold=0.1).to(device)
    workspace = make_workspace(problem)
    with pytest.raises(ValueError, match="no low-rank tail"):
        run(replace(problem, lowrank=None), workspace)
    with pytest.raises(ValueError, match="no threshold"):
        run(replace(problem, threshold=None), workspace)
