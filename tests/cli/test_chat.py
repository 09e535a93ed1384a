"""``kcache chat`` with standard input piped: one message, one answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Run
from tests.cli.fakes import FakeEngine

KEYS = [
    "text",
    "finish_reason",
    "prompt_tokens",
    "completion_tokens",
    "ttft_ms",
    "tok_s",
    "device_kv_bytes",
    "host_kv_bytes",
    "full_kv_bytes",
    "link_bytes_per_token",
]


def test_the_whole_input_is_one_message(run: Run) -> None:
    engine = FakeEngine()
    result = run("chat", input="first line\nsecond line\n\n", engine=engine)
    assert result.exit_code == 0
    assert result.stdout == "Hello there.\n"
    assert engine.sessions[0].messages[0]["content"] == "first line\nsecond line"


def test_footer_goes_to_standard_error(run: Run) -> None:
    result = run("chat", input="hi")
    footer = result.stderr.splitlines()[-2:]
    assert footer[0] == "prompt 1 · answer 3 tokens · TTFT 100 ms · 10.0 tok/s"
    assert footer[1] == (
        "host-only run: device tier (RAM) 3.0 MiB · host tier 1.0 MiB · full KV cache 4.0 MiB · link 0.00 MB/token"
    )


def test_json(run: Run) -> None:
    result = run("chat", "--json", input="hi", engine=FakeEngine(answers=[["a\x1b[1m", "\u2028é"]]))
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) == 1
    answer = json.loads(result.stdout)
    assert list(answer) == KEYS
    assert answer["text"] == "a\x1b[1m\u2028é"
    assert answer["completion_tokens"] == 2
    assert answer["finish_reason"] == "stop"
    assert answer["full_kv_bytes"] == 4 * 2**20
    assert "\x1b" not in result.stdout


def test_an_answer_that_was_cut_says_so(run: Run) -> None:
    assert run("chat", input="hi").stderr.count("cut") == 0
    result = run("chat", "-n", "2", input="hi")
    assert result.stderr.splitlines()[-3] == "the answer is cut at 2 tokens · -n allows more"
    assert json.loads(run("chat", "-n", "2", "--json", input="hi").stdout)["finish_reason"] == "length"


def test_model_text_is_shown_as_text(run: Run) -> None:
    pieces = ["[bold]x[/bold]", "\x1b[31m", "\x9b1m", "\u202e", "y\r\n", "\tz"]
    assert run("chat", input="hi", engine=FakeEngine(answers=[pieces])).stdout == "[bold]x[/bold][31m1my\n\tz\n"


def test_document_comes_before_the_question_in_one_message(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "report.txt"
    file.write_text("The report.\n")
    engine = FakeEngine()
    result = run("chat", "-f", str(file), "-s", "Be brief.", input="What is it?", engine=engine)
    assert result.exit_code == 0
    session = engine.sessions[0]
    assert session.system == "Be brief."
    assert session.messages[0] == {"role": "user", "content": "The report.\n\nWhat is it?"}


def test_several_documents_come_in_the_order_given(run: Run, tmp_path: Path) -> None:
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_text("The report.\n")
    two.write_text("The notes.\n")
    engine = FakeEngine()
    assert run("chat", "-f", str(one), "--file", str(two), input="What is it?", engine=engine).exit_code == 0
    assert engine.sessions[0].messages[0]["content"] == "The report.\n\nThe notes.\n\nWhat is it?"


def test_long_prompt_is_announced(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "long.txt"
    file.write_text("word " * 2000)
    result = run("chat", "-f", str(file), input="why?", engine=FakeEngine(context=4000))
    assert "reading 2,001 tokens" in result.stderr


def test_options_reach_the_session(run: Run) -> None:
    engine = FakeEngine()
    args = "--temperature 0.5 --top-p 0.9 --top-k 5 --seed 3 -n 2 --ctx 64 --allow-overflow"
    result = run("chat", "org/name", *args.split(), input="hi", engine=engine)
    assert result.stdout == "Hello there\n"
    session = engine.sessions[0]
    assert (session.sampling.temperature, session.sampling.top_p) == (0.5, 0.9)
    assert (session.sampling.top_k, session.sampling.seed) == (5, 3)
    assert session.max_length == 64
    assert session.allow_overflow
    assert engine.models[0].model == "org/name"
    assert engine.plans == [{"ctx": 64, "batch_size": 1, "allow_overflow": True}]


def test_what_is_remarkable_is_told(run: Run) -> None:
    engine = FakeEngine()
    engine.remarked.append("no two ways about it")
    assert "kcache: no two ways about it\n" in run("chat", input="hi", engine=engine).stderr


@pytest.mark.parametrize(
    ("message", "say"), [("", "no terminal to type at, and empty; pipe"), (" \n ", "empty"), (b"\xff\xfe", "not UTF-8")]
)
def test_bad_message_is_told_before_loading(run: Run, message: str | bytes, say: str) -> None:
    engine = FakeEngine()
    result = run("chat", input=message, engine=engine)
    assert result.exit_code == 2
    assert say in result.stderr
    assert engine.calls == []


@pytest.mark.parametrize(("content", "say"), [(b"", "empty"), (b"\xff", "not UTF-8")])
def test_bad_document_is_told_before_loading(run: Run, tmp_path: Path, content: bytes, say: str) -> None:
    file = tmp_path / "doc"
    file.write_bytes(content)
    engine = FakeEngine()
    result = run("chat", "-f", str(file), input="hi", engine=engine)
    assert result.exit_code == 2
    assert say in result.stderr
    assert engine.calls == []


def test_document_that_is_a_folder(run: Run, tmp_path: Path) -> None:
    result = run("chat", "-f", str(tmp_path), input="hi")
    assert result.exit_code == 2
    assert "cannot be read" in result.stderr


def test_document_too_long_says_both_sizes(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "long.txt"
    file.write_text("word " * 600)
    result = run("chat", "-f", str(file), input="hi")
    assert result.exit_code == 2
    assert "600 tokens" in result.stderr
    assert "512" in result.stderr
    assert "--allow-overflow" in result.stderr
    assert run("chat", "-f", str(file), "--allow-overflow", input="hi").exit_code == 0


def test_prompt_too_long(run: Run) -> None:
    result = run("chat", input="word " * 600)
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) <= 2
