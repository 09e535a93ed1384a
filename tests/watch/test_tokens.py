"""What the publisher knows of tokens: their text, turn boundaries, progress and times."""

from __future__ import annotations

import pytest
import torch

from kcache.errors import FormatError
from kcache.machine.arriving import Arriving
from kcache.watch.capture import Finish, Forward, Kept
from kcache.watch.frame import Mark, SequenceFrame, Speed
from kcache.watch.tokens import Pieces, Tokens
from kcache.watch.transcript import TextCursor, Transcript, text_message
from tests.saved import byte_tokenizer

END = 1


def ids_of(text: str) -> list[int]:
    ids: list[int] = byte_tokenizer()(text)["input_ids"]
    return ids


def forward(past: int, rows: list[list[int]], at_s: float = 0.0, prompt: bool = True, run: int = 1) -> Forward:
    ids = torch.tensor(rows)
    mask = Arriving((ids != 0).long()) if prompt and past == 0 else None
    return Forward(run, at_s, past, ids.shape[1], len(rows), prompt, Arriving(ids), mask)


@pytest.fixture
def tokens() -> Tokens:
    return Tokens(Pieces(byte_tokenizer()), frozenset([END]))


def told(tokens: Tokens, cursor: TextCursor, transcript: Transcript) -> None:
    while (message := cursor.next(tokens)) is not None:
        transcript.apply(message)


def test_characters_that_span_tokens_are_with_their_first() -> None:
    pieces = Pieces(byte_tokenizer())
    assert pieces(ids_of("aé b")) == ["a", "é", "", " ", "b"]
    assert pieces(ids_of("\U0001f642!")) == ["\U0001f642", "", "", "", "!"]
    assert pieces([-1, *ids_of("x")]) == ["", "x"]
    assert Pieces(None)([5, 6]) == ["", ""]


def test_a_character_waits_for_its_end(tokens: Tokens) -> None:
    cursor, transcript = TextCursor(), Transcript()
    whole = ids_of("né")
    for at, token in enumerate(whole):
        tokens.take(forward(at, [[token]], prompt=False))
        told(tokens, cursor, transcript)
        assert transcript.pieces(1, 0, 3) == (["n", "", ""] if at < 2 else ["n", "é", ""])


def test_bytes_that_are_no_character_are_given_up_on(tokens: Tokens) -> None:
    cursor, transcript = TextCursor(), Transcript()
    lone = ids_of("é")[1]
    tokens.take(forward(0, [[lone] * 20 + ids_of("a")]))
    told(tokens, cursor, transcript)
    assert transcript.pieces(1, 20, 21) == ["a"]


def test_turns_are_marked_and_a_cut_takes_marks_and_text_back(tokens: Tokens) -> None:
    cursor, transcript = TextCursor(), Transcript()
    tokens.take(forward(0, [ids_of("hello ")]))
    tokens.take(forward(6, [ids_of("you")]))
    for at, letter in enumerate("yes"):
        tokens.take(forward(9 + at, [ids_of(letter)], prompt=False))
    assert tokens.marks == [Mark(0, "prompt"), Mark(9, "answer")]
    told(tokens, cursor, transcript)
    assert "".join(transcript.pieces(1, 0, 12)) == "hello youyes"
    cursor.crop(tokens.take(forward(10, [ids_of("more")])))
    assert tokens.marks == [Mark(0, "prompt"), Mark(9, "answer"), Mark(10, "prompt")]
    told(tokens, cursor, transcript)
    assert "".join(transcript.pieces(1, 0, 14)) == "hello youymore"


def test_a_new_cache_begins_anew(tokens: Tokens) -> None:
    cursor, transcript = TextCursor(), Transcript()
    tokens.take(forward(0, [ids_of("first")]))
    told(tokens, cursor, transcript)
    tokens.take(forward(0, [ids_of("two"), ids_of("2nd")], run=2))
    told(tokens, cursor, transcript)
    assert tokens.marks == [Mark(0, "prompt")]
    assert transcript.pieces(1, 0, 3) == ["", "", ""]
    assert ["".join(transcript.pieces(2, 0, 9, sequence)) for sequence in (0, 1, 2)] == ["two", "2nd", ""]


def test_progress_of_a_padded_batch(tokens: Tokens) -> None:
    tokens.take(forward(0, [[0, 0, 7], [7, 7, 7]]))
    tokens.take(forward(3, [[8], [8]], prompt=False))
    tokens.take(forward(4, [[END], [8]], prompt=False))
    tokens.take(forward(5, [[9], [8]], prompt=False))
    assert tokens.sequences() == [SequenceFrame(2, 4, 2, True), SequenceFrame(0, 6, 3, False)]
    cursor, transcript = TextCursor(), Transcript()
    told(tokens, cursor, transcript)
    assert transcript.pieces(1, 0, 2, 0) == ["", ""]
    assert all(transcript.pieces(1, 0, 2, 1))


def test_progress_of_a_batch_that_sequences_leave(tokens: Tokens) -> None:
    """Who has left keeps what it had, and those that stay go on where they were."""
    tokens.take(forward(0, [[7, 7], [7, 7], [7, 7], [7, 7]]))
    tokens.take(forward(2, [[3], [4], [5], [6]], prompt=False))
    tokens.finish(Finish(1, {0: 1, 3: 1}))
    tokens.keep(Kept(1, (1, 2)))
    tokens.take(forward(3, [[8], [9]], prompt=False))
    tokens.keep(Kept(1, (1,)))
    tokens.take(forward(4, [[10]], prompt=False))
    assert [row.ids[2:] for row in tokens.rows] == [[3], [4, 8], [5, 9, 10], [6]]
    assert [each.completion_tokens for each in tokens.sequences()] == [1, 2, 3, 1]
    assert [each.done for each in tokens.sequences()] == [True, False, False, True]
    tokens.take(forward(0, [[7, 7]], run=2))
    assert len(tokens.rows) == 1


def test_a_beginning_that_is_read_once(tokens: Tokens) -> None:
    """What one sequence has read is the others', too; padding behind it is no token, and the names are all theirs."""
    cursor, transcript = TextCursor(), Transcript()
    tokens.name(("a", "b", "c"))
    tokens.take(forward(0, [ids_of("same ")]))
    told(tokens, cursor, transcript)
    tokens.keep(Kept(1, (0, 0, 0)))
    ends = [[0, 0, *ids_of("x")], [0, *ids_of("yz")], ids_of("uvw")]
    rows = torch.tensor(ends)
    tokens.take(Forward(1, 1.0, 5, 3, 3, True, Arriving(rows), Arriving((rows != 0).long())))
    told(tokens, cursor, transcript)
    assert ["".join(transcript.pieces(1, 0, 8, at)) for at in range(3)] == ["same x", "same yz", "same uvw"]
    assert [(each.padding, each.tokens) for each in tokens.sequences()] == [(0, 6), (0, 7), (0, 8)]
    assert transcript.names(1) == ("a", "b", "c")
    assert tokens.marks == [Mark(0, "prompt")]


def test_an_end_in_what_is_fed_step_by_step_ends_nothing(tokens: Tokens) -> None:
    tokens.take(forward(0, [[7, 7]], at_s=10.0))
    for step, token in enumerate((8, END, 8, 8)):
        tokens.take(forward(2 + step, [[token]], at_s=11.0 + step, prompt=False))
    assert tokens.sequences() == [SequenceFrame(0, 6, 4, False)]
    assert tokens.speed().tok_s == pytest.approx(1)
    tokens.take(forward(6, [[END]], at_s=15.0, prompt=False))
    assert tokens.sequences() == [SequenceFrame(0, 7, 5, True)]


def test_times_are_of_forwards_that_follow_each_other(tokens: Tokens) -> None:
    assert tokens.speed().tok_s is None
    tokens.take(forward(0, [[7, 7]], at_s=10.0))
    tokens.take(forward(2, [[7]], at_s=12.0))
    for step, at_s in enumerate((13.0, 13.1, 13.2, 13.4)):
        tokens.take(forward(3 + step, [[8]], at_s=at_s, prompt=False))
    speed = tokens.speed()
    assert speed.ttft_ms == pytest.approx(3000)
    assert speed.itl_ms == pytest.approx(400 / 3)
    assert speed.tok_s == pytest.approx(3 / 0.4)
    tokens.take(forward(7, [[8]], at_s=13.9, prompt=False))
    assert tokens.speed().itl_ms == pytest.approx(500)
    tokens.take(forward(8, [[7, 7]], at_s=90.0))
    assert tokens.speed() == Speed(), "while a prompt is read, those of the answer before are of something else"
    tokens.take(forward(10, [[8]], at_s=91.0, prompt=False))
    tokens.take(forward(11, [[8]], at_s=91.2, prompt=False))
    speed = tokens.speed()
    assert (speed.ttft_ms, speed.itl_ms) == (pytest.approx(1000), pytest.approx(200))


def test_names_are_those_of_one_run(tokens: Tokens) -> None:
    cursor, transcript = TextCursor(), Transcript()
    before: tuple[str, ...] = ()
    for run, names in ((1, ("a", "b")), (2, ()), (3, ("too", "many", "names")), (4, ("c", "d")), (5, ("e", "f"))):
        if names:
            tokens.name(names)
        tokens.take(forward(0, [[7, 7], [7, 7]], run=run))
        told(tokens, cursor, transcript)
        assert transcript.names(run) == (names if len(names) == 2 else ())
        assert transcript.names(run - 1) == before, "whose last frame may still be looked at"
        assert transcript.names(run - 2) == transcript.names(run + 1) == ()
        before = transcript.names(run)
    with pytest.raises(FormatError, match="names"):
        transcript.apply({**text_message(5, []), "names": [7]})


def test_what_ended_without_an_end_token_is_told_from_outside(tokens: Tokens) -> None:
    tokens.take(forward(0, [[7, 7], [7, 7]]))
    tokens.finish(Finish(1, {0: 1}))
    for step in range(3):
        tokens.take(forward(2 + step, [[8], [8]], at_s=1 + step / 2, prompt=False))
    tokens.finish(Finish(0, {1: 99}))  # of a run that is over
    assert tokens.sequences() == [SequenceFrame(0, 5, 1, True), SequenceFrame(0, 5, 3, False)]
    tokens.finish(Finish(1, {1: 4}))
    assert [row.completion_tokens for row in tokens.sequences()] == [1, 4]
    assert tokens.speed().tok_s == pytest.approx(1 / 0.5), "of those that went on in the last step"
    tokens.take(forward(5, [[7, 7], [7, 7]]))
    assert [row.done for row in tokens.sequences()] == [False, False]


def test_a_gap_in_the_text_is_refused() -> None:
    transcript = Transcript()
    transcript.apply(text_message(1, [(0, 0, ["a"])]))
    with pytest.raises(FormatError, match="missing"):
        transcript.apply(text_message(1, [(0, 5, ["b"])]))
    assert transcript.pieces(1, -3, -1) == []
    assert transcript.pieces(1, 0, 2) == ["a", ""]
