"""Hot rows: recently fetched V rows kept in device memory, so that most picks never cross the link.

A set-associative store of ``SETS x WAYS`` rows per row of work; a position belongs to set ``position % SETS`` and each
set drops its least recently picked row. Everything is decided on the device: between select and fetch, picks that are
stored get a new stamp, and then ``hot_admit`` says for every pick where it is stored or, if it is not, will be; fetch
brings what is missing into the store and reads all picks there. A slot that is hit in a step is never given away in
that step. Hits are counted per row of work.

State per row of work: ``tags`` (position held, -1 none) and ``stamps`` (step of the last pick) ``[SETS * WAYS]``,
``claims`` ``[SETS]`` (all 0 between steps), ``clock`` and ``hits`` (one number each).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kcache.sizes import HOT_WAYS, hot_capacity


class HotRows:
    """The device store of hot rows of one layer.

    Parameters
    ----------
    batch, heads : int
        Sequences and selection heads (KV heads; query heads when picks are made per query head).
    rows : int
        Rows kept per head; rounded up to a power of two, and to at least ``ways``.
    dim : int
        Size of a V row.
    dtype, device
        Of V, and of the store.
    ways : int
        Rows per set, a power of two.

    Attributes
    ----------
    store : Tensor ``[B, H, rows, Dv]``
    hits : Tensor ``[B, H]`` int64
        Picks found in the store since it was made.
    """

    def __init__(
        self,
        batch: int,
        heads: int,
        rows: int,
        dim: int,
        dtype: torch.dtype,
        device: torch.device,
        ways: int = HOT_WAYS,
    ) -> None:
        total = batch * heads
        self.ways = ways
        self.rows = max(ways, hot_capacity(rows))
        self.sets = self.rows // ways
        with torch.inference_mode(False):  # memory made in inference mode could not be written to outside of it
            self.store = torch.zeros(batch, heads, self.rows, dim, dtype=dtype, device=device)
            self.tags = torch.full((total, self.rows), -1, dtype=torch.int32, device=device)
            self.stamps = torch.zeros(total, self.rows, dtype=torch.int32, device=device)
            self.claims = torch.zeros(total, self.sets, dtype=torch.int32, device=device)
            self.clock = torch.zeros(total, dtype=torch.int32, device=device)
            self.hits = torch.zeros(batch, heads, dtype=torch.int64, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes held on the device."""
        tensors = (self.store, self.tags, self.stamps, self.claims, self.clock, self.hits)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def forget(self) -> None:
        """Forget every row: needed when positions change their meaning (a crop)."""
        self.tags.fill_(-1)
        self.stamps.zero_()
        self.clock.zero_()


@triton.jit
def hot_places(row, position, live, SETS: tl.constexpr, WAYS: tl.constexpr):
    """The set of each position, and where the tags and stamps of its ways are ``[n, WAYS]``."""
    home = tl.where(live, position % SETS, 0)
    return home, row * SETS * WAYS + home[:, None] * WAYS + tl.arange(0, WAYS)[None, :]


@triton.jit
def hot_admit(
    picks, tags, stamps, clock, claims, slots, coming, places, hits, row, count,
    WIDTH: tl.constexpr, TILE: tl.constexpr, SETS: tl.constexpr, WAYS: tl.constexpr,
):  # fmt: skip
    """Fill ``slots``: where a pick is stored, or will be once it has come, or -1; returns how many are to come.

    Those are listed, their positions in ``coming`` and their slots in ``places``. Every hit has its stamp already, so
    that no slot of one is given away. Picks are distinct, so what a tile lets in is no other tile's hit.
    """
    way = tl.arange(0, WAYS)
    now = tl.load(clock + row) + 1
    stamp = tl.zeros([TILE, WAYS], tl.int32) + now
    total = tl.load(hits + row)
    listed = count * 0
    for first in tl.range(0, count, TILE, num_stages=1):
        lane = first + tl.arange(0, TILE)
        live = lane < count
        position = tl.load(picks + row * WIDTH + lane, mask=live, other=-1)
        home, at = hot_places(row, position, live, SETS, WAYS)
        held = tl.load(tags + at, mask=live[:, None], other=-1)
        age = tl.load(stamps + at, mask=live[:, None], other=0)
        match = (held == position[:, None]) & live[:, None]
        found = tl.max(match.to(tl.int32), 1) > 0
        missed = live & (found == 0)
        ticket = tl.atomic_add(claims + row * SETS + home, 1, mask=missed)
        # The ticket-th oldest way of the set, unless it was picked in this very step.
        order = tl.zeros([TILE, WAYS], tl.int32)
        for other in tl.static_range(WAYS):
            one = tl.sum(tl.where(way[None, :] == other, age, 0), 1)[:, None]
            order += ((one < age) | ((one == age) & (other < way[None, :]))).to(tl.int32)
        victim = (order == ticket[:, None]) & (age < now) & missed[:, None]
        kept = tl.max(victim.to(tl.int32), 1) > 0
        tl.debug_barrier()
        tl.store(tags + at, tl.broadcast_to(position[:, None], [TILE, WAYS]), mask=victim)
        tl.store(stamps + at, stamp, mask=victim)
        tl.store(claims + row * SETS + home, 0, mask=missed)

        slot = home * WAYS + tl.sum(tl.where(match | victim, way[None, :], 0), 1)
        tl.store(slots + row * WIDTH + lane, tl.where(found | kept, slot, -1), mask=live)
        running = tl.cumsum(kept.to(tl.int32), 0)
        tl.store(coming + row * WIDTH + listed + running - 1, position, mask=kept)
        tl.store(places + row * WIDTH + listed + running - 1, slot, mask=kept)
        listed += tl.max(running, 0)
        total += tl.sum(found.to(tl.int64), 0)
        tl.debug_barrier()
    tl.store(clock + row, now)
    tl.store(hits + row, total)
    return listed
