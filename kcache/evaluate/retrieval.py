"""Running retrieval cases: for each, one haystack, prefilled once, and the replies of full attention and every N.

The question and the reply's beginning are fed by decode steps, so what reads the haystack is TopN decoding, never the
exact prefill. ``ctx`` is about how many tokens are prefilled; the chat template's own come on top.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from typing import TYPE_CHECKING, Any, Literal, get_args

from kcache.cache import settled
from kcache.errors import ContextLengthError, InputError
from kcache.evaluate.aggregation import common_words, variable_tracking
from kcache.evaluate.forks import Contender, Prefix, contenders
from kcache.evaluate.haystack import Prose, split_prompt
from kcache.evaluate.needle import Problem, multikey, passkey
from kcache.policy import Policy

if TYPE_CHECKING:
    from kcache.models.loaded import LoadedModel

Kind = Literal["passkey", "multikey", "common-words", "variable-tracking"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_AT_DEPTHS = {"passkey": passkey, "multikey": multikey}
_EVERYWHERE = {"common-words": common_words, "variable-tracking": variable_tracking}


@dataclass(frozen=True)
class Case:
    """One haystack: what is hidden, in how many tokens, how deep (None for everywhere), and which drawing of it."""

    kind: str
    ctx: int
    depth: float | None
    sample: int

    @property
    def label(self) -> str:
        """The case in words."""
        where = "" if self.depth is None else f" · depth {self.depth:g}"
        return f"{self.kind} · {self.ctx:,} tokens{where}"


@dataclass(frozen=True)
class Spec:
    """What to ask: every kind at every context, the needles at every depth, ``samples`` times with other contents."""

    prose: Prose
    kinds: tuple[str, ...] = ("passkey", "multikey")
    ctxs: tuple[int, ...] = (2048, 4096, 7168)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    samples: int = 1
    seed: int = 0
    topns: tuple[int, ...] = (64, 128)
    policy: Policy = field(default_factory=lambda: Policy(offload="all", dense_below=0))

    def __post_init__(self) -> None:
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown or not self.kinds:
            given = repr(unknown[0]) if unknown else "nothing"
            raise InputError(f"no retrieval task {given}; there are {', '.join(KINDS)}")
        for depth in self.depths:
            if not 0 <= depth <= 1:
                raise InputError(f"a depth is between 0, the beginning, and 1, the end; got {depth:g}")

    @property
    def contenders(self) -> tuple[Contender, ...]:
        """Full attention, and the policy with each N."""
        return contenders(self.policy, self.topns)

    @property
    def cases(self) -> list[Case]:
        """All cases, the short ones first."""
        return [
            Case(kind, ctx, depth, sample)
            for ctx, kind, sample in product(sorted(self.ctxs), self.kinds, range(self.samples))
            for depth in (self.depths if kind in _AT_DEPTHS else (None,))
        ]


@dataclass(frozen=True)
class Row:
    """What one contender said in one case.

    Attributes
    ----------
    kind, ctx, depth, sample
        The case.
    engine : {"dense", "kcache"}
        Full attention, or TopN decoding.
    topn : int or None
    model, dtype, device, text : str
    seed : int
    policy : dict or None
    prompt_tokens, question_tokens : int
        Tokens prefilled, and fed by decode steps after them.
    answers : list of str
        What a right reply holds.
    reply : str
    score : float
        Share of ``answers`` in the reply.
    same_reply : bool
        Whether full attention said the same.
    rows_fetched : int
        V rows fetched; 0 means that every step attended exactly.
    seconds : float
        For question and reply, without the prefill.
    env : dict
        Where and when.
    """

    kind: str
    ctx: int
    depth: float | None
    sample: int
    engine: str
    topn: int | None
    model: str
    dtype: str
    device: str
    text: str
    seed: int
    policy: dict[str, Any] | None
    prompt_tokens: int = 0
    question_tokens: int = 0
    answers: list[str] = field(default_factory=list)
    reply: str = ""
    score: float = 0.0
    same_reply: bool = True
    rows_fetched: int = 0
    seconds: float = 0.0
    env: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, in order."""
        return asdict(self)


def blank_row(lm: LoadedModel, spec: Spec, case: Case, contender: Contender) -> Row:
    """Return the row of a case that has not been run: what it is of, and under which settings."""
    return Row(
        case.kind,
        case.ctx,
        case.depth,
        case.sample,
        contender.engine,
        contender.topn,
        lm.name,
        str(lm.model.dtype).removeprefix("torch."),
        str(lm.device),
        f"{spec.prose.name} {spec.prose.digest}",
        spec.seed,
        None if contender.topn is None else settled(contender.policy, lm.model).to_dict(),
    )


def make_problem(lm: LoadedModel, spec: Spec, case: Case) -> Problem:
    """Make the prompt of a case; the same for the same seed."""
    seed = f"{spec.seed}/{case.kind}/{case.ctx}/{case.depth}/{case.sample}"
    if case.depth is None:
        return _EVERYWHERE[case.kind](lm, spec.prose, case.ctx, seed)
    return _AT_DEPTHS[case.kind](lm, spec.prose, case.ctx, case.depth, seed)


def check_lengths(lm: LoadedModel, spec: Spec, cases: Sequence[Case]) -> None:
    """See before the first case is run that the prompts and replies of all fit the model's context.

    Raises
    ------
    ContextLengthError
    """
    if lm.context_length is None:
        return
    for case in cases:
        problem = make_problem(lm, spec, case)
        tokens = sum(map(len, _tokens(lm, problem))) + problem.max_new_tokens
        if tokens > lm.context_length:
            raise ContextLengthError(
                f"{case.label}: prompt and reply are {tokens:,} tokens and the context of {lm.name} is "
                f"{lm.context_length:,}; ask for a shorter haystack"
            )


def _tokens(lm: LoadedModel, problem: Problem) -> tuple[list[int], list[int]]:
    """What is prefilled, and what is fed by decode steps."""
    return split_prompt(lm, problem.context, problem.question, problem.lead)


def run_cases(
    lm: LoadedModel,
    spec: Spec,
    cases: Sequence[Case],
    watch: Callable[[str], None] = lambda label: None,
    env: dict[str, Any] | None = None,
) -> Iterator[list[Row]]:
    """Run ``cases``, yielding the rows of each, one per contender, as soon as it is done; ``env`` is put on each row.

    Whether they fit the model's context is for :func:`check_lengths` to see beforehand.
    """
    for number, case in enumerate(cases, start=1):
        label = f"{number} of {len(cases)} · {case.label}"
        watch(f"{label}: prefill")
        problem = make_problem(lm, spec, case)
        head, question = _tokens(lm, problem)
        room = len(question) + problem.max_new_tokens
        prefix = Prefix(lm, head)
        rows: list[Row] = []
        for contender in spec.contenders:
            watch(f"{label}: {contender.label}")
            fork = prefix.fork((), [contender.policy], room)
            (cache,) = fork.caches
            before, began = cache.stats.rows_fetched, time.perf_counter()
            reply = fork.reply(cache, question, problem.max_new_tokens, problem.stop)
            row = replace(
                blank_row(lm, spec, case, contender),
                prompt_tokens=len(head),
                question_tokens=len(question),
                answers=list(problem.answers),
                reply=reply,
                score=score(reply, problem.answers),
                same_reply=not rows or reply == rows[0].reply,
                rows_fetched=cache.stats.rows_fetched - before,
                seconds=round(time.perf_counter() - began, 3),
                env=env or {},
            )
            rows.append(row)
        yield rows


def score(reply: str, answers: Sequence[str]) -> float:
    """Share of ``answers`` that stand in the reply as whole words."""
    found = [answer for answer in answers if re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", reply)]
    return len(found) / len(answers)
