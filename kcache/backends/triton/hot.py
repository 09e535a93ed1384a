"""Hot rows: recently fetched V rows kept in device memory, so that most picks never cross the link.

A set-associative store of ``SETS x WAYS`` rows per row of work; a position belongs to set ``position % SETS`` and each
set drops its least recently picked row. Everything is decided on the device: between select and fetch, ``hot_admit``
says of a tile of picks where each is stored or, if it is not, will be; fetch reads what is stored there and the rest
over the link, and stores that on the way. A slot that is hit is never given away to another pick of the same tile.
Hits are counted per row of work.

What a layer keeps from step to step also says in which order its rows of work are best done: those with many picks
first, since nothing is left to hide behind when the last ones are fetched. A head that picks many rows does so for
many steps: a step's order was made by the step before it, of the picks of the one before that (:func:`hot_rank`).

State per row of work: ``tags`` (position held, -1 none) and ``stamps`` (step of the last pick) ``[SETS * WAYS]``,
``claims`` ``[SETS]`` (all 0 between steps), ``clock`` and ``hits`` (one number each). A step whose length is even reads
the first half of ``counts`` (picks) and ``order`` (rows of work) ``[2, R]`` and writes the second, an odd one the other
way about.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kcache.planning.sizes import HOT_WAYS, hot_capacity


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
            self.counts = torch.zeros(2, total, dtype=torch.int32, device=device)
            self.order = torch.arange(total, dtype=torch.int32, device=device).repeat(2, 1)

    @property
    def nbytes(self) -> int:
        """Bytes held on the device."""
        tensors = (self.store, self.tags, self.stamps, self.claims, self.clock, self.hits, self.counts, self.order)
        return sum(tensor.nbytes for tensor in tensors)

    def forget(self) -> None:
        """Forget every row: needed when positions change their meaning (a crop)."""
        self.tags.fill_(-1)
        self.stamps.zero_()
        self.clock.zero_()


@triton.jit
def hot_rank(counts, row, rows, TILE: tl.constexpr):
    """The place of a row of work when those with more picks come first, and equal ones in their own order."""
    own = tl.load(counts + row)
    place = row * 0
    for first in range(0, rows, TILE):
        other = first + tl.arange(0, TILE)
        count = tl.load(counts + other, mask=other < rows, other=-1)
        place += tl.sum(((count > own) | ((count == own) & (other < row))).to(tl.int32), 0)
    return place


@triton.jit
def hot_admit(
    position, live, tags, stamps, claims, row, now, TILE: tl.constexpr, SETS: tl.constexpr, WAYS: tl.constexpr
):
    """For each of a tile of picks the slot where it is stored, and the one where it is to be stored; -1 for none.

    Picks are distinct, so what a tile lets in is no other tile's hit.
    """
    way = tl.arange(0, WAYS)[None, :]
    stamp = tl.zeros([TILE, WAYS], tl.int32) + now
    home = tl.where(live, position % SETS, 0)
    at = row * SETS * WAYS + home[:, None] * WAYS + way
    held = tl.load(tags + at, mask=live[:, None], other=-1)
    match = (held == position[:, None]) & live[:, None]
    tl.store(stamps + at, stamp, mask=match)
    found = tl.max(match.to(tl.int32), 1) > 0
    missed = live & (found == 0)
    ticket = tl.atomic_add(claims + row * SETS + home, 1, mask=missed, sem="relaxed", scope="cta")
    ticket = tl.where(missed, ticket, 0)
    tl.debug_barrier()  # every hit of the tile has its stamp: no slot of one is given away
    age = tl.load(stamps + at, mask=missed[:, None], other=now)
    # The ticket-th oldest way of the set, unless it was picked in this very step.
    order = age
    victim = match & (match == 0)
    for turn in range(tl.minimum(tl.max(ticket, 0) + 1, WAYS)):
        oldest = order == tl.min(order, 1)[:, None]
        oldest = oldest & (way == tl.min(tl.where(oldest, way, WAYS), 1)[:, None])
        victim = victim | (oldest & (ticket == turn)[:, None])
        order = tl.where(oldest, 0x7FFFFFFF, order)
    victim = victim & (age < now) & missed[:, None]
    kept = tl.max(victim.to(tl.int32), 1) > 0
    tl.debug_barrier()  # every claim is made, and every age read
    tl.store(tags + at, tl.broadcast_to(position[:, None], [TILE, WAYS]), mask=victim)
    tl.store(stamps + at, stamp, mask=victim)
    tl.store(claims + row * SETS + home, 0, mask=missed)
    slot = home * WAYS + tl.sum(tl.where(match | victim, way, 0), 1)
    return tl.where(found, slot, -1), tl.where(kept, slot, -1)
