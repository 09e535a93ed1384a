"""The policy: every choice that trades memory, speed and fidelity, in one frozen dataclass.

A policy is data. It validates itself on construction, compares by value and can be written to a TOML profile.
Nothing in it names a constant fitted on a particular model.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields, replace
from numbers import Integral
from typing import Any, Literal, get_args

from kcache.errors import PolicyError

Select = Literal["group", "head"]
Tail = Literal["lowrank", "renormalise", "none"]
Spread = Literal["need", "even"]
Bits = Literal[16, 8]
KeyBits = Literal["auto", 16, 8, "8+8"]
Offload = Literal["auto", "all", "none"]
BackendName = Literal["auto", "reference", "cpu", "triton"]
Graph = Literal["auto", "off"]

_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _UNITS |= {_letter: 1024**_power, f"{_letter}ib": 1024**_power, f"{_letter}b": 1000**_power}


def parse_bytes(size: int | str) -> int:
    """Turn ``20GiB``, ``512MB``, ``1.5g`` or a plain number into bytes.

    ``KiB/MiB/GiB/TiB`` and the bare letters are powers of 1024, ``KB/MB/GB/TB`` powers of 1000.

    Raises
    ------
    PolicyError
        If the text is not a size, or the size is negative.
    """
    if isinstance(size, bool):
        raise PolicyError(f"a size in bytes was expected, got {size!r}; write it as 20GiB, 512MiB or a number of bytes")
    if isinstance(size, int):
        if size < 0:
            raise PolicyError(f"a size in bytes cannot be negative, got {size}")
        return size
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([a-zA-Z]*)\s*", str(size))
    if match is None or match[2].lower() not in _UNITS:
        raise PolicyError(f"not a size: {size!r}; write it as 20GiB, 512MiB or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def parse_bits(given: Any) -> Any:
    """Numbers of bits as numbers, where text has them; anything else as it is."""
    return {"16": 16, "8": 8}.get(given.strip(), given) if isinstance(given, str) else given


def parse_tokens(count: int | str) -> int:
    """Turn ``32k``, ``1m`` or a plain number into a number of tokens; ``k`` is 1,024.

    Raises
    ------
    PolicyError
        If the text is not a whole number of at least one token.
    """
    match = re.fullmatch(r"\s*(\d+)\s*([kKmM]?)\s*", str(count))
    tokens = int(match[1]) * {"": 1, "k": 1024, "m": 1024**2}[match[2].lower()] if match else 0
    if tokens < 1:
        raise PolicyError(f"not a number of tokens: {count!r}; write it as 8192, 32k or 1m")
    return tokens


_WHOLE_NUMBERS = {
    "topn": (1, "it is the number of V rows fetched per KV head and step; try 64 or 128"),
    "dense_layers": (0, "0 tiers every layer"),
    "dense_below": (0, "0 uses TopN at every length"),
    "hot_rows": (0, "it is the number of V rows kept per KV head; 0 keeps none"),
    "prefill_chunk": (1, "4096 is a good value"),
    "tail_rank": (1, "leave it out for a sixteenth of the head size"),
    "resident_layers": (0, "leave it out to let the memory budget decide"),
}
_OPTIONAL = ("hot_rows", "tail_rank", "resident_layers")
_PIECE = 32768
_LEAST_PIECE = 256


@dataclass(frozen=True)
class Policy:
    """How a :class:`~kcache.KCache` splits memory between device and host, and what a decode step reads.

    Attributes
    ----------
    topn : int
        V rows fetched per KV head and decode step (per query head with ``select="head"``); with ``spread="need"`` on
        average.
    spread : {"need", "even"}
        ``"need"`` gives the rows to the layers and heads whose attention needs them, by one threshold on their
        probability that follows the average (:mod:`kcache.layers.spread`); ``"even"`` fetches exactly ``topn``
        everywhere, as the paper does.
    dense_layers : int
        The first layers keep V on the device and attend exactly; their attention is too diffuse for TopN.
    dense_below : int
        Contexts shorter than this many tokens stay on the device and attend exactly; V leaves once it is reached.
    select : {"group", "head"}
        ``"group"`` weighs a row by the largest probability that any of the query heads sharing a KV head gives it, and
        picks once per KV head; ``"head"`` picks per query head, as the paper does, and moves up to group-size times
        more rows.
    tail : {"lowrank", "renormalise", "none"}
        What stands in for the rows that were not picked: each row's projection on the few directions in which V of its
        head varies most (:mod:`kcache.tiers.lowrank`); nothing, with the picked weights rescaled to one; or nothing at
        all (the paper).
    tail_rank : int or None
        Directions per KV head of the low-rank tail; ``None`` is a sixteenth of the head size, which costs a sixteenth
        of V in device memory.
    hot_rows : int or None
        Recently fetched V rows that a CUDA device keeps per KV head and offloaded layer, so that most picks need not
        cross the link again; 0 for none, ``None`` for eight times ``topn`` but at most 4,096. Rounded up to a power of
        two, at least 8.
        Where both tiers are RAM, and with ``select="head"``, nothing is kept.
    k_bits : {"auto", 16, 8, "8+8"}
        With 16, K is kept in the type that the model computes in. With 8, K of offloaded layers is kept as whole
        numbers with a scale for each row, in half the device memory, and scored from them. Scores are then no longer
        exact: neither is a later piece of a prompt, which attends to what was kept, nor N at least the context. With
        ``"8+8"`` the other half is kept beside it: all rows are scored in 8 bits, which is half of what a step reads of
        K, and those picked are weighed in 16 (nearly: see docs/design.md), as is K for later pieces of a prompt. Memory
        is that of 16 and of the scales, 1.6 % more with heads of 128. ``"auto"`` is ``"8+8"`` where K is in a type of
        16 bits and our kernels decode, on CUDA with heads of sizes they take, and 16 elsewhere: the reference answers
        layers in 8 bits many times slower.
    v_bits : {16, 8}
        With 8, V crosses to the host and back in the same form: half the link's bytes and half the RAM. What was said
        of later pieces and of N at least the context holds here, too.
    offload : {"auto", "all", "none"}
        ``"auto"`` keeps V of as many layers on the device as ``kv_budget`` allows and offloads the rest (on a
        CPU-only machine without a ``kv_budget`` it means ``"all"``); ``"all"`` offloads every layer but the dense
        ones; ``"none"`` keeps all V on the device, which is exact full attention.
    kv_budget : int, str or None
        Device memory for the cache: K, resident V and policy overhead (``"20GiB"``, or bytes); of each device, where a
        model lies on several. ``None`` means what the device has free.
    resident_layers : int or None
        Keep V of exactly this many leading layers on the device, whatever the budget. ``None`` leaves it to
        ``offload`` and ``kv_budget``. ``dense_layers`` are resident in any case.
    prefill_chunk : int
        Longest piece of a prompt run through the model in one forward by kcache's own generation loops; of the prompts
        of a large batch pieces are shorter (:meth:`piece`).
    backend : {"auto", "reference", "cpu", "triton"}
        Who computes a decode step; ``"auto"`` takes the fastest that the layer's device can run.
    graph : {"auto", "off"}
        On CUDA, record a whole decode step once and replay it for every token (:mod:`kcache.graph`), where the model
        can; ``"off"`` runs the model anew for each.
    """

    topn: int = 128
    spread: Spread = "need"
    dense_layers: int = 2
    dense_below: int = 2048
    select: Select = "group"
    tail: Tail = "lowrank"
    tail_rank: int | None = None
    hot_rows: int | None = None
    k_bits: KeyBits = "auto"
    v_bits: Bits = 16
    offload: Offload = "auto"
    kv_budget: int | str | None = None
    resident_layers: int | None = None
    prefill_chunk: int = 4096
    backend: BackendName = "auto"
    graph: Graph = "auto"

    def __post_init__(self) -> None:
        for name, (least, hint) in _WHOLE_NUMBERS.items():
            if (value := getattr(self, name)) is not None or name not in _OPTIONAL:
                object.__setattr__(self, name, _whole_number(name, value, least, hint))
        _check_choice("spread", self.spread, get_args(Spread))
        _check_choice("select", self.select, get_args(Select))
        _check_choice("tail", self.tail, get_args(Tail))
        for name, known in (("k_bits", get_args(KeyBits)), ("v_bits", get_args(Bits))):
            bits = parse_bits(getattr(self, name))
            if bits not in known:
                choice = f"{', '.join(map(str, known[:-1]))} or {known[-1]}"
                raise PolicyError(f"{name} must be {choice}, got {bits!r}; 16 keeps rows as they are")
            object.__setattr__(self, name, known[known.index(bits)])  # not 8.0, nor a number of NumPy
        _check_choice("offload", self.offload, get_args(Offload))
        _check_choice("backend", self.backend, get_args(BackendName))
        _check_choice("graph", self.graph, get_args(Graph))
        if self.kv_budget is not None:
            try:
                object.__setattr__(self, "kv_budget", parse_bytes(self.kv_budget))
            except PolicyError as error:
                raise PolicyError(f"kv_budget: {error}") from None
        if self.offload == "none" and self.resident_layers is not None:
            raise PolicyError("offload='none' keeps every layer resident; leave resident_layers out, or offload='all'")

    @classmethod
    def paper(cls, topn: int = 128, **changes: Any) -> Policy:
        """The scheme of He & Wu (2024) as told: TopN per query head, no renormalisation, no tail, nothing dense."""
        told = {"spread": "even", "dense_layers": 0, "dense_below": 0, "select": "head", "tail": "none", "hot_rows": 0}
        return cls(topn=topn, **{**told, "k_bits": 16, **changes})

    def piece(self, batch: int) -> int:
        """Tokens of each of ``batch`` prompts that go through the model at a time.

        No more than 32,768 in all, which keep a card busy: activations and masks take memory from K. But 256 of each,
        since with every piece what V has left comes back once.
        """
        return min(self.prefill_chunk, max(_PIECE // max(1, batch), _LEAST_PIECE))

    @property
    def key_planes(self) -> int:
        """Halves of K that offloaded layers keep in 8 bits each: one, or both; 0 where rows are kept as they are."""
        return {"auto": 0, 16: 0, 8: 1, "8+8": 2}[self.k_bits]

    def settled(self, kernels: bool, itemsize: int) -> Policy:
        """The policy as it is for K of ``itemsize`` bytes a number, and layers that our ``kernels`` decode, or not."""
        if self.k_bits != "auto":
            return self
        return self.replace(k_bits="8+8" if kernels and itemsize == 2 and self.offload != "none" else 16)

    def replace(self, **changes: Any) -> Policy:
        """Return a copy with some fields changed; it is validated like a new one."""
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, in order, without those that are ``None``."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Policy:
        """Build a policy from plain values; unknown names raise :class:`~kcache.errors.PolicyError`."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(data) - set(known))
        if unknown:
            raise PolicyError(f"unknown policy field {unknown[0]!r}; the fields are {', '.join(known)}")
        return cls(**data)


def _whole_number(name: str, value: object, least: int, hint: str) -> int:
    """The number as an ``int``; those of NumPy are none."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise PolicyError(f"{name} must be a whole number of at least {least}, got {value!r}; {hint}")
    return int(value)


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise PolicyError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
