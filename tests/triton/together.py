"""Programs of a launch that run together, in Triton's interpreter, on memory as weak as a device's.

The interpreter runs one program after the other, each to its end, and every store is seen at once. Here programs start
in order, a few at a time, and at each access to memory another one may go on. A store waits in its program's buffer
until that program releases it, by an atomic that does, or until some time after its end; till then the program alone
sees it. A load that does not ask for the L2 cache (``.cg``) is answered by an L1 cache, shared with some of the other
programs, which keeps what it once read, 32 bytes at a time, until one of them acquires. So a count that is taken before
what it counts is stored, a counter set back too early or an order that happened to be the interpreter's gives wrong
results here as on a device.

What it cannot see: a program is one thread here, so that barriers among its warps are not tried; stores leave a buffer
all at once; loads are neither early nor, from the L2 cache, stale. An order that is not for a whole device is refused.
"""

from __future__ import annotations

import ctypes
import inspect
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle, interpreter_builder

_RELEASES = ("RELEASE", "ACQUIRE_RELEASE")
_ACQUIRES = ("ACQUIRE", "ACQUIRE_RELEASE")
_SECTOR = 32
_TURNS = 10_000


class Program(threading.Thread):
    """One program: it runs while it holds the turn."""

    def __init__(self, index: tuple[int, int, int], work: Callable[[], Any], cache: dict[int, bytearray]) -> None:
        super().__init__(daemon=True)
        self.index, self.work, self.cache = index, work, cache
        self.stores: dict[int, tuple[Any, Any]] = {}
        self.turn, self.done = threading.Semaphore(0), False
        self.error: BaseException | None = None


class Together:
    """Runs the programs of launches together; counts how often another one went on.

    Parameters
    ----------
    seed : int
    resident : int
        Programs that have begun and not ended, at most.
    multiprocessors : int
        L1 caches.
    """

    def __init__(self, seed: int, resident: int = 6, multiprocessors: int = 2) -> None:
        self.draw, self.resident = random.Random(seed), resident
        self.caches: list[dict[int, bytearray]] = [{} for _ in range(multiprocessors)]
        self.switches = 0
        self._now: Program | None = None
        self._back = threading.Semaphore(0)

    # -- who goes on ------------------------------------------------------------------------------------------------

    def run(self, works: list[tuple[tuple[int, int, int], Callable[[], Any]]]) -> None:
        """Run a launch; an error of a program is raised after all have been stopped where they stand."""
        waiting = [Program(index, work, self.draw.choice(self.caches)) for index, work in works]
        for cache in self.caches:
            cache.clear()
        for program in waiting:
            program.run = partial(self._run, program)  # type: ignore[method-assign]
        going: list[Program] = []
        ended: list[Program] = []
        turns = 0
        while waiting or going:
            turns += 1
            assert turns < _TURNS, f"programs {[each.index for each in going]} wait for ever"
            if ended and self.draw.random() < 0.05:
                self._release(ended.pop(self.draw.randrange(len(ended))))
            while waiting and len(going) < self.resident:
                going.append(waiting.pop(0))
                going[-1].start()
            self._now = self.draw.choice(going)
            interpreter_builder.grid_idx = self._now.index
            self._now.turn.release()
            self._back.acquire()
            if self._now.error is not None:
                raise self._now.error
            if self._now.done:
                going.remove(self._now)
                ended.append(self._now)
        self._now = None
        for program in ended:
            self._release(program)

    def _run(self, program: Program) -> None:
        program.turn.acquire()
        try:
            program.work()
        except BaseException as error:
            program.error = error
        program.done = True
        self._back.release()

    def _pause(self) -> Program | None:
        program = self._now
        if program is not None and threading.current_thread() is program and self.draw.random() < 0.3:
            self.switches += 1
            self._back.release()
            program.turn.acquire()
        return program

    # -- what it sees -----------------------------------------------------------------------------------------------

    def load(self, real: Callable[..., Any], ptrs: Any, mask: Any, other: Any, modifier: Any, *rest: Any) -> Any:
        program = self._pause()
        found = real(ptrs, mask, other, modifier, *rest)
        if program is None:
            return found
        wanted = np.flatnonzero(mask.data)
        addresses, numbers = ptrs.data.reshape(-1), found.data.reshape(-1)
        for nth in wanted.tolist():
            address = int(addresses[nth])
            if "CG" not in str(modifier):
                numbers[nth] = self._cached(program.cache, address, numbers.dtype)
            if address in program.stores:
                numbers[nth] = program.stores[address][1]
        return TensorHandle(numbers.reshape(found.data.shape), found.dtype)

    def store(self, real: Callable[..., Any], ptrs: Any, value: Any, mask: Any, *rest: Any) -> None:
        program = self._pause()
        if program is None:
            real(ptrs, value, mask, *rest)
            return
        addresses, numbers = ptrs.data.reshape(-1), value.data.reshape(-1)
        for nth in np.flatnonzero(mask.data).tolist():
            address = int(addresses[nth])
            program.stores[address] = (self._one(real, ptrs, value, nth, *rest), numbers[nth])
            self._note(program, address, numbers[nth])

    def atomic(self, real: Callable[..., Any], op: Any, ptr: Any, val: Any, mask: Any, sem: Any, scope: Any) -> Any:
        program = self._pause()
        if program is not None:
            order = interpreter_builder.ir_sem_to_interpreter_sem[sem].name
            assert order == "RELAXED" or "GPU" in str(scope).upper(), "ordered for some of the programs only"
            if order in _RELEASES:
                self._release(program)
            for address in ptr.data.reshape(-1)[np.flatnonzero(mask.data)].tolist():
                if address in program.stores:
                    program.stores.pop(address)[0]()
                program.cache.pop(address // _SECTOR, None)
            if order in _ACQUIRES:
                program.cache.clear()
        return real(op, ptr, val, mask, sem, scope)

    def _release(self, program: Program) -> None:
        for address, (write, number) in program.stores.items():
            write()
            self._note(program, address, number)
        program.stores.clear()

    @staticmethod
    def _note(program: Program, address: int, number: Any) -> None:
        """A program's cache has what it stored itself."""
        sector, at = program.cache.get(address // _SECTOR), address % _SECTOR
        if sector is not None:
            sector[at : at + number.itemsize] = number.tobytes()

    @staticmethod
    def _cached(cache: dict[int, bytearray], address: int, dtype: np.dtype) -> Any:
        """The number at an address, as it was when its sector was read."""
        first = address // _SECTOR
        if first not in cache:
            cache[first] = bytearray(ctypes.string_at(first * _SECTOR, _SECTOR))
        return np.frombuffer(cache[first], dtype, 1, address % _SECTOR)[0]

    @staticmethod
    def _one(real: Callable[..., Any], ptrs: Any, value: Any, nth: int, *rest: Any) -> Callable[[], Any]:
        def handle(of: Any) -> TensorHandle:
            return TensorHandle(of.data.reshape(-1)[nth : nth + 1].copy(), of.dtype)

        there = TensorHandle(np.ones(1, dtype=bool), interpreter.tl.int1)
        return partial(real, handle(ptrs), handle(value), there, *rest)


@contextmanager
def together(seed: int, resident: int = 6, multiprocessors: int = 2) -> Iterator[Together]:
    """Have launches within run their programs together."""
    those = Together(seed, resident, multiprocessors)
    builder = interpreter_builder
    load, store, atomic = builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw

    class Executor(interpreter.GridExecutor):
        def __init__(self, fn: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(_Gathered(fn, those), *args, **kwargs)

    with (
        mock.patch.object(interpreter, "GridExecutor", Executor),
        mock.patch.object(builder, "create_masked_load", partial(those.load, load)),
        mock.patch.object(builder, "create_masked_store", partial(those.store, store)),
        mock.patch.object(builder, "create_atomic_rmw", partial(those.atomic, atomic)),
    ):
        yield those


class _Gathered:
    """Stands for a kernel: takes note of each program, and runs all when the last of the grid is there."""

    def __init__(self, fn: Any, those: Together) -> None:
        self.fn, self.those = fn, those
        self.works: list[tuple[tuple[int, int, int], Callable[[], Any]]] = []
        self.__signature__ = inspect.signature(fn)
        self.__name__, self.__globals__, self.__annotations__ = fn.__name__, fn.__globals__, fn.__annotations__

    def __call__(self, **args: Any) -> None:
        index, dims = interpreter_builder.grid_idx, interpreter_builder.grid_dim
        self.works.append((index, partial(self.fn, **args)))
        if all(at == count - 1 for at, count in zip(index, dims, strict=True)):
            works, self.works = self.works, []
            self.those.run(works)
