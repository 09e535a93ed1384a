"""The chat loop: turns, slash commands, stopping a reply, saving and loading."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from kcache import Policy, Sampling
from kcache.errors import InputError
from kcache_cli.chat import transcript
from kcache_cli.chat.conversation import Conversation
from kcache_cli.chat.repl import Repl, is_open, unquote
from kcache_cli.chat.slash import COMMANDS, SET_NAMES
from tests.cli.fakes import FakeModel, FakeSession

ANSWERS = (["one", " two"], ["three"], ["four"])


def converse(
    *lines: str | type[BaseException] | BaseException,
    answers: Sequence[Sequence[str]] = ANSWERS,
    as_json: bool = False,
    **more: Any,
) -> Conversation:
    """Type ``lines`` into a chat and leave; exception types stand for the keys that raise them."""
    session = FakeSession(FakeModel(), Policy(), answers)
    conversation = Conversation(session, "fake", 100, True, **more)  # type: ignore[arg-type]
    return type_into(conversation, *lines, as_json=as_json)


def type_into(
    conversation: Conversation, *lines: str | type[BaseException] | BaseException, as_json: bool = False
) -> Conversation:
    waiting = iter([*lines, EOFError])

    def read() -> str:
        line = next(waiting)
        if isinstance(line, str):
            return line
        raise line

    Repl(conversation, read, as_json).run()
    return conversation


def test_two_turns(capsys: pytest.CaptureFixture[str]) -> None:
    conversation = converse("hi", "", "   ", "again")
    out, err = capsys.readouterr()
    assert out == "one two\nthree\n"
    assert "host-only run" in err
    assert err.count("TTFT") == 2
    assert [message["content"] for message in conversation.session.messages] == ["hi", "one two", "again", "three"]


def test_what_cut_an_answer_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    session = FakeSession(FakeModel(), Policy(), [["a"] * 50, ["b"] * 50])
    conversation = Conversation(session, "fake", 40, True)  # type: ignore[arg-type]
    type_into(conversation, "hi")
    assert "cut at 40 tokens" in capsys.readouterr().err
    session.room = 10
    type_into(conversation, "again")
    err = capsys.readouterr().err
    assert "context is full" in err and "tokens · -n" not in err


def test_a_conversation_that_no_longer_fits_names_the_way_out(capsys: pytest.CaptureFixture[str]) -> None:
    session = FakeSession(FakeModel(context_length=8), Policy(), [["a"] * 3])
    conversation = Conversation(session, "fake", 40, True)  # type: ignore[arg-type]
    type_into(conversation, "words " * 20)
    assert "/clear" not in capsys.readouterr().err, "there is nothing to clear"
    type_into(conversation, "hi", "words " * 20)
    assert "the context is 8; /clear begins anew" in capsys.readouterr().err.replace("\n", " ")
    assert len(session.messages) == 2


def test_json_in_a_conversation(capsys: pytest.CaptureFixture[str]) -> None:
    converse("hi", "again", as_json=True)
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["text"] for answer in answers] == ["one two", "three"]


def test_ctrl_c_at_the_prompt_does_not_leave(capsys: pytest.CaptureFixture[str]) -> None:
    converse(KeyboardInterrupt, "hi")
    out, err = capsys.readouterr()
    assert out == "one two\n"
    assert "Ctrl-D" in err


def test_ctrl_c_stops_the_reply_only(capsys: pytest.CaptureFixture[str]) -> None:
    session = FakeSession(FakeModel(), Policy(), [["a"] * 50, ["b"]])

    def press(number: int) -> None:
        if number == 4:
            os.kill(os.getpid(), signal.SIGINT)

    session.before_token = press
    before = signal.getsignal(signal.SIGINT)
    conversation = type_into(Conversation(session, "fake", 100, True), "hi", "again")  # type: ignore[arg-type]
    out, err = capsys.readouterr()
    assert out == "aaa\nb\n"
    assert "stopped" in err
    assert conversation.session.messages[1]["content"] == "aaa"
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_while_a_prompt_is_read_says_at_once_what_it_waits_for(capsys: pytest.CaptureFixture[str]) -> None:
    session = FakeSession(FakeModel(), Policy(), [["a"] * 5, ["b"]])
    seen = []

    def press(number: int) -> None:
        if number == 1 and not seen:
            os.kill(os.getpid(), signal.SIGINT)
            seen.append(capsys.readouterr())

    session.before_token = press
    type_into(Conversation(session, "fake", 100, True), "hi", "again")  # type: ignore[arg-type]
    assert "stopping after this piece" in seen[0].err and seen[0].out == ""
    out, err = capsys.readouterr()
    assert out == "b\n"
    assert "stopped" in err and "stopping" not in err


def test_ctrl_c_twice_stops_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    session = FakeSession(FakeModel(), Policy(), [["a"] * 50, ["b"]])
    session.interrupt = lambda: None  # type: ignore[method-assign]  # an engine deep in a long step

    def press(number: int) -> None:
        if number == 4:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    session.before_token = press
    type_into(Conversation(session, "fake", 100, True), "hi", "again")  # type: ignore[arg-type]
    assert capsys.readouterr().out == "aaa\nb\n"


def test_errors_do_not_end_the_chat(capsys: pytest.CaptureFixture[str]) -> None:
    converse("word " * 600, "/nonsense", "/set topn 0", "/set topn x", "/set nothing 1", "/load nowhere", "hi")
    out, err = capsys.readouterr()
    assert out == "one two\n"
    for say in ("context", "no command /nonsense", "topn must be", "whole number", "no setting nothing", "nowhere"):
        assert say in err


def test_a_bug_does_not_end_the_chat(capsys: pytest.CaptureFixture[str]) -> None:
    session = FakeSession(FakeModel(), Policy(), [["a"] * 9, ["b"]])

    def fail(number: int) -> None:
        if number == 2:
            raise RuntimeError("CUDA error")

    session.before_token = fail
    type_into(Conversation(session, "fake", 100, True), "hi", "again")  # type: ignore[arg-type]
    out, err = capsys.readouterr()
    assert out == "a\nb\n"
    assert "CUDA error" in err


class TerminalError(Exception):
    """Like ``termios.error``, which is no OSError and not on every platform."""


@pytest.mark.parametrize("kind", [OSError, TerminalError])
def test_a_terminal_that_is_taken_away_ends_the_chat(kind: type[Exception], capsys: pytest.CaptureFixture[str]) -> None:
    conversation = converse(kind(errno.EIO, "Input/output error"), "hi")
    out, err = capsys.readouterr()
    assert out == "" and conversation.session.messages == []
    assert "error" not in err


def test_another_error_at_the_prompt_does_not_end_the_chat(capsys: pytest.CaptureFixture[str]) -> None:
    converse(OSError(errno.ENOSPC, "No space left on device"), "hi")
    out, err = capsys.readouterr()
    assert out == "one two\n"
    assert "No space left" in err


def test_a_closed_pipe_ends_the_chat() -> None:
    session = FakeSession(FakeModel(), Policy(), [["a"]])

    def fail(number: int) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    session.before_token = fail
    with pytest.raises(BrokenPipeError):
        type_into(Conversation(session, "fake", 100, True), "hi")  # type: ignore[arg-type]


def test_document_waits_for_the_first_question_and_for_the_next_after_clear() -> None:
    conversation = converse("why?", "and?", document="The report.\n")
    contents = [message["content"] for message in conversation.session.messages]
    assert contents == ["The report.\n\nwhy?", "one two", "and?", "three"]
    type_into(conversation, "/clear", "how?")
    assert conversation.session.messages[0]["content"] == "The report.\n\nhow?"


def test_several_lines() -> None:
    conversation = converse('"""first\nsecond"""')
    assert conversation.session.messages[0]["content"] == "first\nsecond"
    assert unquote('"""\na\n\nb\n"""') == "a\n\nb"
    assert unquote('say """x""" now') == 'say """x""" now'
    assert is_open('"""a')
    assert is_open('"""')
    assert not is_open('"""a"""')
    assert not is_open("a")
    assert not is_open('""""""')


def test_a_path_is_a_message() -> None:
    assert converse("/etc/passwd is what?").session.messages[0]["content"] == "/etc/passwd is what?"


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    converse("/help")
    err = capsys.readouterr().err
    for name in ("/help", "/clear", "/set", "/stats", "/save", "/load", "/system", "/bye"):
        assert name in COMMANDS
        assert name in err
    assert '  """   ' in err and "  Ctrl-D   " in err
    assert all(len(line) <= 80 for line in err.splitlines())


@pytest.mark.parametrize("line", ["/bye", "/quit"])
def test_bye_leaves(line: str) -> None:
    assert converse(line, "hi").session.messages == []


def test_set(capsys: pytest.CaptureFixture[str]) -> None:
    conversation = converse(
        "/set temperature 0.5", "/set top_k 3", "/set topn 64", "/set kv_budget 1GiB", "/set max-tokens 1", "/set", "hi"
    )
    session = conversation.session
    assert (session.sampling.temperature, session.sampling.top_k) == (0.5, 3)
    assert session.policy == Policy(topn=64, kv_budget="1GiB")
    out, err = capsys.readouterr()
    assert out == "one\n"
    for name in SET_NAMES:
        assert name in err
    type_into(conversation, "/set temperature none", "/set topn default", "/set kv_budget none", "/set offload none")
    assert session.sampling.temperature is None
    assert session.policy == Policy(offload="none")
    type_into(conversation, "/set hot_rows 64", "/set tail_rank 4", "/set tail none", "/set offload auto")
    assert session.policy == Policy(hot_rows=64, tail_rank=4, tail="none")
    type_into(conversation, "/set hot_rows auto", "/set tail_rank auto", "/set tail default")
    assert session.policy == Policy()
    type_into(conversation, "/set k_bits 8+8")
    assert session.policy == Policy(k_bits="8+8")
    type_into(conversation, "/set k_bits 16")
    assert session.policy == Policy(k_bits=16)
    type_into(conversation, "/set k_bits 7", "/set k_bits auto")
    assert session.policy == Policy()


def test_system(capsys: pytest.CaptureFixture[str]) -> None:
    conversation = converse("/system", "/system Be brief.", "/system")
    assert conversation.session.system == "Be brief."
    assert "Be brief." in capsys.readouterr().err
    assert type_into(conversation, "/system none").session.system is None


def test_stats(capsys: pytest.CaptureFixture[str]) -> None:
    converse("/stats", "hi", "/stats")
    err = capsys.readouterr().err
    assert "the cache is empty" in err
    for say in ("device tier (RAM)", "full KV cache", "V rows fetched", "decode steps"):
        assert say in err


def test_save_and_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "talk.json"
    first = converse(
        "/system Be brief.", "/set temperature 0", "/set topn 64", "/set max_tokens 9", "hi", f"/save {file}"
    )
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["talk.json"]
    second = converse("other", f"/load {file}")
    assert second.session.messages == first.session.messages
    assert second.session.system == "Be brief."
    assert second.session.policy == Policy(topn=64)
    assert second.session.sampling == Sampling(temperature=0)
    assert second.max_tokens == 9
    assert "loaded 3 messages" in capsys.readouterr().err


def test_load_says_when_the_model_is_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "talk.json"
    conversation = converse("hi", f"/save {file}")
    conversation.model = "another"
    type_into(conversation, f"/load {file}")
    assert "written with fake" in capsys.readouterr().err


def test_load_says_which_settings_it_brings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "talk.json"
    settings = {"max_tokens": 40, "temperature": 99, "repetition_penalty": 1.5, "policy": {"topn": 64}}
    file.write_text(saved(settings=settings))
    converse("/set topn 64", "/set top_p 0.5", f"/load {file}", f"/load {file}")
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("loaded")]
    assert lines == [
        f"loaded 2 messages from {file}, and settings: "
        "max_tokens 40, temperature 99, top_p the model's own, repetition_penalty 1.5",
        f"loaded 2 messages from {file}",
    ]


def saved(**changes: Any) -> str:
    value = {
        "kcache_chat": 1,
        "model": "fake",
        "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
        "settings": {"max_tokens": 5, "policy": {"topn": 3}},
    }
    return json.dumps({**value, **changes})


@pytest.mark.parametrize(
    "content",
    [
        "",
        "nonsense",
        saved()[:60],
        "[]",
        "null",
        saved(kcache_chat=2),
        saved(messages=3),
        saved(messages=[3]),
        saved(messages=[{"role": "user"}]),
        saved(messages=[{"role": "user", "content": None}]),
        saved(messages=[{"role": "wizard", "content": "x"}]),
        saved(messages=[{"role": "user", "content": "\ud800"}]),
        saved(settings=None),
        saved(settings={}),
        saved(settings={"max_tokens": 5}),
        saved(settings={"max_tokens": 0, "policy": {}}),
        saved(settings={"max_tokens": 5, "policy": {"topn": 0}}),
        saved(settings={"max_tokens": 5, "policy": {"colour": 0}}),
        saved(settings={"max_tokens": 5, "policy": {}, "temperature": -1}),
        saved(settings={"max_tokens": 5, "policy": {}, "temperature": "hot"}),
        saved(settings={"max_tokens": 5, "policy": {}, "temperature": float("nan")}),
    ],
)
def test_damaged_file_keeps_the_conversation(tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "talk.json"
    file.write_text(content)
    conversation = converse("hi", "/set topn 77", f"/load {file}", "again")
    out, err = capsys.readouterr()
    assert out == "one two\nthree\n"
    assert "talk.json" in err
    assert len(conversation.session.messages) == 4
    assert conversation.session.policy == Policy(topn=77)


def test_load_of_bytes_that_are_not_text(tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    file.write_bytes(b"\xff\x00\xfe")
    with pytest.raises(InputError, match="damaged: it is no text"):
        transcript.read(str(file))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "it is empty"),
        (" \n", "it is empty"),
        (saved()[:60], "it breaks off before its end"),
        (saved()[:-1], "it breaks off before its end"),
        ('{\n "kcache_chat": 1,\n oops}', "it is no JSON from line 3, column 2 on"),
        ("[]", "it does not begin with"),
        (saved(settings={}), "'max_tokens' is missing"),
        (saved(settings=None), "a part of it is of another kind than was saved"),
        ("[" * 100_000, "a part of it is of another kind"),
    ],
)
def test_what_is_wrong_with_a_damaged_file_in_words(tmp_path: Path, content: str, reason: str) -> None:
    file = tmp_path / "talk.json"
    file.write_text(content)
    with pytest.raises(InputError) as caught:
        transcript.read(str(file))
    assert f"is not a saved conversation, or is damaged: {reason}" in str(caught.value)


def test_save_keeps_the_old_file_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "talk.json"
    conversation = converse("hi", f"/save {file}")
    old = file.read_text()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kcache_cli.chat.transcript.os.fsync", full)
    with pytest.raises(InputError, match="No space left"):
        transcript.save(conversation, str(file))
    assert file.read_text() == old
    assert [path.name for path in tmp_path.iterdir()] == ["talk.json"]


@pytest.mark.parametrize("content", ["", "my notes\n", "[1]", '{"model": "fake"}', saved()[:60], saved() + saved()])
def test_save_replaces_nothing_but_saved_conversations(
    tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "notes.txt"
    file.write_text(content)
    converse("hi", f"/save {file}", "again")
    out, err = capsys.readouterr()
    assert out == "one two\nthree\n"
    assert "notes.txt is there already and is no saved conversation; take another name" in err
    assert file.read_text() == content
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("content", [saved(), saved(kcache_chat=2), " " + json.dumps(json.loads(saved()), indent=4)])
def test_save_replaces_a_saved_conversation(tmp_path: Path, content: str) -> None:
    file = tmp_path / "talk.json"
    file.write_text(content)
    converse("hi", f"/save {file}", "again", f"/save {file}")
    contents = [message["content"] for message in transcript.read(str(file)).messages]
    assert contents == ["hi", "one two", "again", "three"]


def test_save_leaves_pipes_and_devices_alone(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(InputError, match="is no saved conversation"):
        transcript.save(converse("hi"), str(pipe))
    assert stat.S_ISFIFO(pipe.stat().st_mode)


@pytest.mark.parametrize("name", ["", "missing/talk.json"])
def test_save_to_where_it_cannot_be(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    converse("hi", f"/save {tmp_path / name}", "/save", "again")
    out, err = capsys.readouterr()
    assert out == "one two\nthree\n"
    assert "cannot save" in err
    assert "which file" in err
