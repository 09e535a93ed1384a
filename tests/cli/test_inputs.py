"""Reading prompts, good and bad."""

from __future__ import annotations

import pytest

from kcache.errors import InputError
from kcache_cli.batch.inputs import Entry, parse_inputs


def test_json_lines_and_plain_text() -> None:
    text = (
        '{"id": "a", "prompt": "one"}\n'
        "plain text \n"
        "\n"
        '  {"id": 7, "messages": [{"role": "user", "content": "two"}], "extra": 1}\r\n'
        '{"prompt": "three"}\n'
        "last"
    )
    inputs = parse_inputs(text.encode())
    assert inputs.bad == []
    assert inputs.remarks == ["line 2 and 1 more are taken for a prompt as it stands, beside lines of JSON"]
    assert parse_inputs(b'{"prompt": "x"}\n[1, 2]').remarks == [
        "line 2 is taken for a prompt as it stands, beside lines of JSON"
    ]
    assert parse_inputs(b"[1, 2]\n3").remarks == parse_inputs(b'{"prompt": "x"}').remarks == []
    assert inputs.entries == [
        Entry(1, "a", "one"),
        Entry(2, 2, "plain text "),
        Entry(4, 7, [{"role": "user", "content": "two"}]),
        Entry(5, 5, "three"),
        Entry(6, 6, "last"),
    ]


def test_content_in_parts_is_one_text() -> None:
    """As clients of the OpenAI API write it."""
    parts = '[{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]'
    inputs = parse_inputs(f'{{"messages": [{{"role": "user", "content": {parts}}}]}}'.encode())
    assert inputs.entries == [Entry(1, 1, [{"role": "user", "content": "one two"}])]
    for other in ('[{"type": "image_url", "image_url": "x"}]', "[]", '["x"]', '[{"type": "text", "text": 3}]'):
        bad = parse_inputs(f'{{"messages": [{{"role": "user", "content": {other}}}]}}'.encode()).bad
        assert "both text" in str(bad[0])


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_refused_by_its_name(encoding: str) -> None:
    with pytest.raises(InputError, match="UTF-16"):
        parse_inputs(("" if encoding == "utf-16" else "\ufeff").encode(encoding) + "hi\nyou".encode(encoding))


def test_keys_that_are_meant_to_be_read_and_are_not() -> None:
    lines = [
        '{"id": 1, "prompt": "x", "max_token": 5, "answer": "y", "idx": 1, "_id": 2, "prompt_id": 3, "speed": 4}',
        '{"prompt": "x", "max-tokens": 5, "ID": "a"}',
        '{"prompt": "x", "max_token": 5, "temperature": 0}',
        '{"mesages": []}',
    ]
    inputs = parse_inputs("\n".join(lines).encode())
    assert len(inputs.entries) == 3 and len(inputs.bad) == 1
    assert inputs.remarks == [
        'line 1 and 1 more: "max_token" is not read; --max-tokens says it for all prompts',
        'line 2: "max-tokens" is not read; --max-tokens says it for all prompts',
        'line 2: "ID" is not read; did you mean "id"?',
        'line 3: "temperature" is not read; --temperature says it for all prompts',
        'line 4: "mesages" is not read; did you mean "messages"?',
    ]


def test_a_binary_file_is_refused_by_its_name() -> None:
    with pytest.raises(InputError, match=r"^-i a\.gz: is not text \(byte 5 is zero\)"):
        parse_inputs(b"one\n\0two\nthree", "a.gz")


def test_byte_order_mark_and_letters() -> None:
    assert parse_inputs("\ufeff漢字\n".encode()).entries == [Entry(1, 1, "漢字")]


@pytest.mark.parametrize(
    ("line", "say"),
    [
        ('{"id": 1, "prompt": "x"', "not valid JSON"),
        ("{not json}", "not valid JSON"),
        ('{"id": 1}', "neither given"),
        ('{"id": 1, "prompt": "x", "messages": []}', "both given"),
        ('{"id": 1, "prompt": ""}', "empty"),
        ('{"id": 1, "prompt": " \\n"}', "empty"),
        ('{"id": 1, "prompt": null}', "must be a text"),
        ('{"id": 1, "prompt": NaN}', "NaN"),
        ('{"id": NaN, "prompt": "x"}', "NaN"),
        ('{"id": 1, "prompt": -Infinity}', "Infinity"),
        ('{"id": 1, "prompt": ["x"]}', "must be a text"),
        ('{"id": null, "prompt": "x"}', '"id" must be'),
        ('{"id": true, "prompt": "x"}', '"id" must be'),
        ('{"id": 1.5, "prompt": "x"}', '"id" must be'),
        ('{"id": [1], "prompt": "x"}', '"id" must be'),
        ('{"id": 1, "messages": []}', "must be a list"),
        ('{"id": 1, "messages": "x"}', "must be a list"),
        ('{"id": 1, "messages": ["x"]}', "not an object"),
        ('{"id": 1, "messages": [{"role": "user"}]}', "both text"),
        ('{"id": 1, "messages": [{"role": "user", "content": NaN}]}', "NaN"),
        ('{"id": 1, "messages": [{"role": "king", "content": "x"}]}', "king"),
        ('{"id": 1, "messages": [{"role": "user", "content": " "}]}', "empty"),
        ('{"id": 1, "prompt": "\\ud800"}', "surrogate"),
        ('{"id": "\\ud800", "prompt": "x"}', "surrogate"),
        ("{" * 5000, "not valid JSON"),
        ('{"id": 1, "prompt": ' + "[" * 100000, "not valid JSON"),
        ('{"id": ' + "9" * 5000 + ', "prompt": "x"}', "not valid JSON"),
    ],
)
def test_bad_lines_are_named_and_the_rest_is_read(line: str, say: str) -> None:
    inputs = parse_inputs(f"first\n{line}\nlast\n".encode())
    assert [entry.prompt for entry in inputs.entries] == ["first", "last"]
    assert [bad.line for bad in inputs.bad] == [2]
    assert say in str(inputs.bad[0])
    assert str(inputs.bad[0]).startswith("line 2: ")


def test_line_that_is_not_text() -> None:
    inputs = parse_inputs(b"one\n\xff\xfe\nthree")
    assert [entry.line for entry in inputs.entries] == [1, 3]
    assert "UTF-8" in inputs.bad[0].reason


@pytest.mark.parametrize(
    ("text", "say"),
    [
        ('{"id": "a", "prompt": "x"}\ny\n{"id": "a", "prompt": "z"}', 'lines 1 and 3 have the same id "a"'),
        ('{"id": 2, "prompt": "x"}\nplain', "lines 1 and 2 have the same id 2"),
        ('{"id": 2, "prompt": "x"}\n{"prompt": "y"}', "lines 1 and 2 have the same id 2"),
    ],
)
def test_same_id_twice_names_both_lines(text: str, say: str) -> None:
    with pytest.raises(InputError, match=say):
        parse_inputs(text.encode())


def test_number_and_text_are_different_ids() -> None:
    assert len(parse_inputs(b'{"id": 1, "prompt": "x"}\n{"id": "1", "prompt": "y"}').entries) == 2


def test_hash_is_of_the_bytes() -> None:
    assert parse_inputs(b"a").sha256 != parse_inputs(b"a\n").sha256
