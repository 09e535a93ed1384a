"""``kcache generate``: batches, order, bad lines, continuing a job."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from kcache import TokenEvent
from kcache.errors import DoesNotFitError
from kcache_cli.batch.journal import Header, Journal
from kcache_cli.batch.plan import Sizes, batch_seed, form_batches, make_batches
from tests.cli.conftest import Run
from tests.cli.fakes import FakeEngine, FakeEvent

KEYS = ["id", "text", "finish_reason", "prompt_tokens", "completion_tokens"]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Eleven prompts of different lengths."""
    file = tmp_path / "in.jsonl"
    lines = [json.dumps({"id": f"p{number}", "prompt": "word " * (1 + 7 * number % 5)}) for number in range(11)]
    file.write_text("\n".join(lines) + "\n")
    return file


def lines_of(path: Path) -> list[dict[str, Any]]:
    assert path.read_bytes().endswith(b"\n")
    return [json.loads(line) for line in path.read_text().splitlines()]


def job(run: Run, source: Path, *args: str, engine: FakeEngine | None = None) -> Result:
    out = source.with_name("out.jsonl")
    return run("generate", "-i", str(source), "-o", str(out), "--batch-size", "3", *args, engine=engine)


def test_results_in_input_order_with_the_keys_promised(run: Run, prompts: Path) -> None:
    engine = FakeEngine()
    result = job(run, prompts, engine=engine)
    assert result.exit_code == 0
    assert result.stdout == ""
    rows = lines_of(prompts.with_name("out.jsonl"))
    assert [row["id"] for row in rows] == [f"p{number}" for number in range(11)]
    assert all(list(row) == KEYS for row in rows)
    assert [row["prompt_tokens"] for row in rows] == [1 + 7 * number % 5 for number in range(11)]
    assert "11 prompts" in result.stderr
    assert f"results so far are in {prompts.with_name('out.jsonl.kcache')}" in result.stderr


def test_batches_hold_neighbours_in_length_longest_first(run: Run, prompts: Path) -> None:
    engine = FakeEngine()
    job(run, prompts, engine=engine)
    lengths = [[len(ids) for ids in batch] for batch in engine.batches]
    assert [len(batch) for batch in lengths] == [3, 3, 3, 2]
    flat = [length for batch in lengths for length in batch]
    assert flat == sorted(flat, reverse=True)
    assert engine.seeds == [batch_seed(0, number) for number in range(4)]


def test_plan_is_made_before_loading_and_knows_the_longest(run: Run, prompts: Path) -> None:
    engine = FakeEngine()
    job(run, prompts, "-n", "10", engine=engine)
    assert engine.calls == ["plan", "load"]
    assert engine.plans[0]["need"] == 5 + 10, "tokens, not bytes"
    assert engine.plans[0]["batch_size"] == 3


def test_standard_input_and_output(run: Run) -> None:
    result = run("generate", "-i", "-", "-o", "-", input="one two\n\nthree\n")
    assert result.exit_code == 0
    assert [json.loads(line)["id"] for line in result.stdout.splitlines()] == [1, 3]
    assert run("generate", input="one\n").stdout.count("\n") == 1


def test_answers_that_were_cut_are_counted(run: Run) -> None:
    lines = "one\none two\none two three\n"  # answered by 3, 4 and 2 tokens
    result = run("generate", "-i", "-", "-o", "-", "-n", "2", input=lines)
    reasons = [json.loads(line)["finish_reason"] for line in result.stdout.splitlines()]
    assert reasons == ["length", "length", "stop"]
    assert "; 2 cut at 2 tokens, -n allows more" in result.stderr
    assert "cut" not in run("generate", "-i", "-", "-o", "-", input=lines).stderr


def test_output_does_not_vary(run: Run, prompts: Path) -> None:
    out = prompts.with_name("out.jsonl")
    job(run, prompts)
    first = out.read_bytes()
    job(run, prompts, "--overwrite")
    assert out.read_bytes() == first


def test_bad_lines_are_left_out_and_named(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    long = "word " * 600
    file.write_text(
        'good\n{"id": 1, "prompt": \n'
        + json.dumps({"id": "long", "prompt": long})
        + "\n"
        + json.dumps({"id": "chat", "messages": [{"role": "user", "content": "no template"}]})
        + "\nalso good\n"
    )
    result = job(run, file)
    assert result.exit_code == 0
    assert [row["id"] for row in lines_of(tmp_path / "out.jsonl")] == [1, 5]
    for say in ("line 2: not valid JSON", "line 3: the prompt is 600 tokens", "line 4: fake has no chat template"):
        assert say in result.stderr
    assert "3 bad lines left out" in result.stderr
    again = job(run, file)
    assert "complete" in again.stderr
    assert job(run, file, "--allow-overflow", "--overwrite").exit_code == 0
    assert [row["id"] for row in lines_of(tmp_path / "out.jsonl")] == [1, "long", 5]


def test_many_bad_lines_are_summed_up(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text("good\n" + "{\n" * 50)
    result = job(run, file)
    assert len(result.stderr.splitlines()) < 30
    assert "51" in result.stderr


def test_strict_stops_at_a_bad_line_before_loading(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text("good\n{\n")
    engine = FakeEngine()
    result = job(run, file, "--strict", engine=engine)
    assert result.exit_code == 2
    assert "line 2" in result.stderr
    assert engine.calls == []
    assert not (tmp_path / "out.jsonl").exists()


def test_strict_stops_at_a_prompt_too_long_before_generating(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text("good\n" + "word " * 600)
    engine = FakeEngine()
    result = job(run, file, "--strict", engine=engine)
    assert result.exit_code == 2
    assert "line 2" in result.stderr
    assert engine.batches == []


@pytest.mark.parametrize(
    ("source", "target", "say"),
    [
        ("missing.jsonl", "out.jsonl", "cannot be read"),
        (".", "out.jsonl", "cannot be read"),
        ("in.jsonl", "nowhere/out.jsonl", "does not exist"),
        ("in.jsonl", ".", "is a folder"),
        ("in.jsonl", "in.jsonl", "is the input itself"),
        ("in.jsonl", "/proc/out.jsonl", "cannot be written"),
        ("empty.jsonl", "out.jsonl", "holds no prompts"),
        ("twice.jsonl", "out.jsonl", "lines 1 and 2 have the same id"),
    ],
)
def test_unusable_files_are_told_before_loading(run: Run, prompts: Path, source: str, target: str, say: str) -> None:
    folder = prompts.parent
    (folder / "empty.jsonl").write_text("\n\n")
    (folder / "twice.jsonl").write_text('{"id": 1, "prompt": "x"}\n' * 2)
    engine = FakeEngine()
    result = run("generate", "-i", str(folder / source), "-o", str(folder / target), engine=engine)
    assert result.exit_code == 2
    assert say in result.stderr
    assert engine.calls == []
    assert not list(folder.glob("*.kcache"))


def test_finished_job_is_left_alone(run: Run, prompts: Path) -> None:
    job(run, prompts)
    out = prompts.with_name("out.jsonl")
    before = out.stat().st_mtime_ns
    engine = FakeEngine()
    result = job(run, prompts, engine=engine)
    assert result.exit_code == 0
    assert "complete" in result.stderr
    assert engine.calls == []
    assert out.stat().st_mtime_ns == before
    journal = [json.loads(line) for line in out.with_name("out.jsonl.kcache").read_text().splitlines()]
    assert len(journal) == 2
    assert journal[1] == {"complete": True, "skipped": []}


@pytest.mark.parametrize(
    ("args", "say"),
    [
        (["--topn", "64"], "policy.topn: 128 then, 64 now"),
        (["--temperature", "0.7"], "temperature"),
        (["--seed", "1"], "seed"),
        (["-n", "9"], "max_tokens"),
        (["--batch-size", "4"], "batch_size"),
        (["--dtype", "float32"], "dtype"),
        (["--allow-overflow"], "allow_overflow"),
    ],
)
def test_other_settings_are_refused_without_overwrite(run: Run, prompts: Path, args: list[str], say: str) -> None:
    job(run, prompts)
    out = prompts.with_name("out.jsonl")
    before = out.read_bytes()
    engine = FakeEngine()
    result = job(run, prompts, *args, engine=engine)
    assert result.exit_code == 2
    assert say in result.stderr
    assert "--overwrite" in result.stderr
    assert engine.calls == []
    assert out.read_bytes() == before
    assert job(run, prompts, *args, "--overwrite").exit_code == 0
    assert len(lines_of(out)) == 11


def test_what_is_finished_can_be_kept_with_other_settings(run: Run, prompts: Path) -> None:
    """As where a job ended for lack of memory, and goes on with smaller batches and a smaller budget."""
    out = prompts.with_name("out.jsonl")
    assert job(run, prompts, engine=stopping(2)).exit_code == 130
    smaller = ("--batch-size", "2", "--kv-budget", "1GiB")
    refused = job(run, prompts, *smaller)
    assert refused.exit_code == 2 and "--keep what is finished" in refused.stderr
    engine = stopping(1)
    result = job(run, prompts, *smaller, "--keep", engine=engine)
    assert result.exit_code == 130 and "6 of 11 prompts are done" in result.stderr
    assert len(engine.batches[0]) == 2
    assert job(run, prompts, *smaller, engine=stopping(1)).exit_code == 130
    assert "batch_size" in job(run, prompts).stderr, "the first settings are those of another job now"
    result = job(run, prompts, *smaller)
    assert result.exit_code == 0 and "10 of 11 prompts are done" in result.stderr
    rows = lines_of(out)
    assert [row["id"] for row in rows] == [f"p{number}" for number in range(11)]
    assert sorted(row["text"].split(".")[2].split()[0] for row in rows) == ["1"] + ["2"] * 4 + ["3"] * 6
    for flags in ((), ("--keep",)):
        assert "complete" in job(run, prompts, *smaller, *flags).stderr
    assert "complete" in job(run, prompts, "--keep").stderr, "nothing is left to run with these"
    assert lines_of(out) == rows


def test_keep_is_no_way_to_another_input(run: Run, prompts: Path) -> None:
    job(run, prompts)
    prompts.write_text(prompts.read_text() + "one more\n")
    result = job(run, prompts, "--keep")
    assert result.exit_code == 2
    assert "another input" in result.stderr and "--keep" not in result.stderr
    assert job(run, prompts, "--keep", "--overwrite").exit_code == 2


def test_jobs_with_one_batch_size_for_all_are_continued(run: Run, prompts: Path) -> None:
    """Journals had a number before lengths had sizes of their own."""
    assert job(run, prompts, engine=stopping(2)).exit_code == 130
    journal = prompts.with_name("out.jsonl.kcache")
    header, *rest = journal.read_text().splitlines()
    old = {name: value for name, value in json.loads(header).items() if name != "batch_sizes"} | {"batch_size": 3}
    journal.write_text("\n".join([json.dumps(old), *rest]) + "\n")
    result = job(run, prompts)
    assert result.exit_code == 0
    assert "6 of 11 prompts are done" in result.stderr


def test_long_prompts_are_decoded_fewer_at_a_time(run: Run, tmp_path: Path) -> None:
    source = tmp_path / "in.txt"
    source.write_text("\n".join(["word " * 90, "word " * 80, *["word " * 3] * 5]) + "\n")
    engine = FakeEngine(batch_size=8)
    engine.sizes = ((50, 4), (100, 1))
    result = run("generate", "-i", str(source), "-n", "4", "--batch-size", "6", engine=engine)
    assert [len(batch) for batch in engine.batches] == [1, 1, 4, 1]
    assert "of the longest prompts 1 are decoded at a time, not 6" in result.stderr
    assert "at a time" not in run("generate", "-i", str(source), "-n", "4", engine=FakeEngine()).stderr


def test_stop_strings(run: Run, prompts: Path) -> None:
    engine = FakeEngine()
    assert job(run, prompts, "--stop", "Q:", "--stop", "\n\n", engine=engine).exit_code == 0
    assert set(engine.stops) == {("Q:", "\n\n")}
    assert "stop: ['Q:', '\\n\\n'] then, None now" in job(run, prompts).stderr
    assert job(run, prompts, "--overwrite").exit_code == 0
    empty = job(run, prompts, "--stop", "", "--overwrite")
    assert empty.exit_code == 2 and "--stop: is empty" in empty.stderr


def test_what_is_stopped_while_recorded_needs_another_name(run: Run, prompts: Path) -> None:
    record = ("--record", str(prompts.with_name("run.kcr")))
    assert "with another --record" in job(run, prompts, *record, engine=stopping(1)).stderr
    assert "--record" not in job(run, prompts, engine=stopping(1)).stderr


def test_other_input_and_other_model_are_refused(run: Run, prompts: Path) -> None:
    job(run, prompts)
    result = job(run, prompts, "other/model")
    assert "model: smollm2 then, other/model now" in result.stderr
    prompts.write_text(prompts.read_text() + "one more\n")
    result = job(run, prompts)
    assert result.exit_code == 2
    assert "another input" in result.stderr


def test_a_file_that_is_not_ours_is_refused(run: Run, prompts: Path) -> None:
    out = prompts.with_name("out.jsonl")
    out.write_text("precious\n")
    result = job(run, prompts)
    assert result.exit_code == 2
    assert out.read_text() == "precious\n"
    assert job(run, prompts, "--overwrite").exit_code == 0


def test_an_empty_file_is_written_to(run: Run, prompts: Path) -> None:
    prompts.with_name("out.jsonl").touch()
    assert job(run, prompts).exit_code == 0


def test_a_job_that_never_began_may_change_its_settings(run: Run, prompts: Path) -> None:
    engine = FakeEngine()
    engine.stop_after = 0
    assert job(run, prompts, engine=engine).exit_code == 130
    assert job(run, prompts, "--topn", "64").exit_code == 0


def test_what_is_remarkable_is_told(run: Run, prompts: Path) -> None:
    engine = FakeEngine()
    engine.remarked.append("no two ways about it")
    assert "kcache: no two ways about it\n" in job(run, prompts, engine=engine).stderr


def test_a_context_that_is_asked_for_and_too_small_is_told(run: Run, prompts: Path) -> None:
    assert "may be 261 tokens; more memory is taken than for 16" in job(run, prompts, "--ctx", "16").stderr
    assert "more memory is taken" not in job(run, prompts, "--ctx", "8k", "--overwrite").stderr


@pytest.mark.parametrize("stop_after", [0, 1, 2, 3])
def test_stopped_and_continued_gives_the_same_bytes(run: Run, prompts: Path, stop_after: int) -> None:
    out = prompts.with_name("out.jsonl")
    sampling = ["--temperature", "1", "--seed", "5"]
    job(run, prompts, *sampling)
    whole = out.read_bytes()
    job(run, prompts, *sampling, "--overwrite", engine=stopping(0))
    engine = stopping(stop_after)
    result = job(run, prompts, *sampling, engine=engine)
    assert result.exit_code == 130
    assert ("goes on from the last finished batch" if stop_after else "begins again") in result.stderr
    assert whole.startswith(out.read_bytes())
    engine = FakeEngine()
    result = job(run, prompts, *sampling, engine=engine)
    assert result.exit_code == 0
    assert len(engine.batches) == 4 - stop_after
    assert out.read_bytes() == whole
    if stop_after:
        assert f"{3 * stop_after} of 11 prompts are done" in result.stderr


def stopping(after: int) -> FakeEngine:
    engine = FakeEngine()
    engine.stop_after = after
    return engine


def test_a_continued_job_keeps_its_own_batch_size(run: Run, prompts: Path) -> None:
    out = prompts.with_name("out.jsonl")
    args = ["generate", "-i", str(prompts), "-o", str(out)]
    engine = FakeEngine(batch_size=4)
    engine.stop_after = 1
    assert run(*args, engine=engine).exit_code == 130
    engine = FakeEngine(batch_size=2)
    assert run(*args, engine=engine).exit_code == 0
    assert [len(batch) for batch in engine.batches] == [4, 3]


@pytest.mark.parametrize("where", ["output", "journal", "both"])
@pytest.mark.parametrize("cut", [1, 5, 40, 200])
def test_torn_files_are_mended(run: Run, prompts: Path, where: str, cut: int) -> None:
    out, journal = prompts.with_name("out.jsonl"), prompts.with_name("out.jsonl.kcache")
    job(run, prompts)
    whole = out.read_bytes()
    job(run, prompts, "--overwrite", engine=stopping(3))
    for name, path in (("output", out), ("journal", journal)):
        if where in (name, "both"):
            os.truncate(path, max(0, path.stat().st_size - cut))
    assert job(run, prompts).exit_code == 0
    assert out.read_bytes() == whole


@pytest.mark.parametrize("line", ['{"complete": true, "skipped": 5}', '{"batch": 1, "results": [1, 2]}'])
def test_a_line_that_no_job_writes_ends_a_journal(run: Run, prompts: Path, line: str) -> None:
    out, journal = prompts.with_name("out.jsonl"), prompts.with_name("out.jsonl.kcache")
    job(run, prompts)
    whole = out.read_bytes()
    journal.write_text(f"{journal.read_text().splitlines()[0]}\n{line}\n")
    out.unlink()
    assert job(run, prompts).exit_code == 0
    assert out.read_bytes() == whole


@pytest.mark.parametrize("cut", [1, 30, 300])
def test_a_finished_output_that_was_cut_is_mended(run: Run, prompts: Path, cut: int) -> None:
    out = prompts.with_name("out.jsonl")
    job(run, prompts)
    whole = out.read_bytes()
    os.truncate(out, len(whole) - cut)
    assert job(run, prompts).exit_code == 0
    assert out.read_bytes() == whole
    out.unlink()
    assert job(run, prompts).exit_code == 0
    assert out.read_bytes() == whole


def test_a_line_that_is_not_ours_is_not_touched(run: Run, prompts: Path) -> None:
    out = prompts.with_name("out.jsonl")
    job(run, prompts)
    rows = out.read_text().splitlines()
    rows[3] = rows[4]
    out.write_text("\n".join(rows) + "\n")
    result = job(run, prompts)
    assert result.exit_code == 2
    assert "line 4" in result.stderr


def test_two_runs_at_once(run: Run, prompts: Path) -> None:
    with Journal(prompts.with_name("out.jsonl"), Header("x", {})) as journal:
        journal.begin(Sizes(((1, 4),)))
        result = job(run, prompts)
    assert result.exit_code == 2
    assert "another kcache generate" in result.stderr


def test_full_disk_is_one_line(run: Run, prompts: Path) -> None:
    result = run("generate", "-i", str(prompts), "-o", "/dev/full")
    assert result.exit_code == 2
    assert "/dev/full: No space left" in result.stderr
    assert "Traceback" not in result.output


def test_a_disk_that_is_full_is_said_of_the_journal(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with (
            pytest.raises(OSError, match="too large") as caught,
            Journal(tmp_path / "out.jsonl", Header("x", {})) as journal,
        ):
            journal.begin(Sizes(((1, 4),)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.filename == str(tmp_path / "out.jsonl.kcache")


def test_output_that_is_no_regular_file_has_no_journal(run: Run, prompts: Path) -> None:
    assert run("generate", "-i", str(prompts), "-o", "/dev/null").exit_code == 0
    assert not Path("/dev/null.kcache").exists()


def test_make_batches() -> None:
    two, eight = Sizes(((10, 2),)), Sizes(((1, 8),))
    assert make_batches([1, 3, 2, 3], two) == [[1, 3], [2, 0]]
    assert make_batches([], two) == []
    long = make_batches([4006, 1011, 300, 2003, 5, 500], eight)
    assert long == [[0, 3], [1, 5, 2], [4]], "padding is up to half"
    assert make_batches([900, 3, 3, 3], eight) == [[0, 1, 2], [3]], "or no more than 2,048 tokens"


def test_prompts_that_begin_alike_are_decoded_together() -> None:
    """Where reading it once saves more than the steps of another batch take; the others stay together."""
    sizes = Sizes(((10_000, 8),))
    first, second = list(range(2000)), list(range(5000, 7000))
    prompts = [[*first, 7], [*second, 1, 2], [9] * 1500, [*first, 8, 8, 8], [*second, 4], [3, 4, 5]]
    assert form_batches(prompts, sizes, 10) == [[3, 0], [1, 4], [2, 5]]
    assert form_batches(prompts, sizes, 21) == make_batches([len(prompt) for prompt in prompts], sizes, 21)
    many = [[*first, *second[:at]] for at in range(0, 1000, 100)]
    assert form_batches(many, sizes, 1) == [[9, 8, 7, 6, 5, 4, 3, 2], [1, 0]], "one family is as many batches as ever"
    assert form_batches([[*first, 1], [*second, *first, *second]], sizes, 1) == [[1], [0]]
    assert form_batches([first, first, [5]], sizes, 10) == [[0, 1], [2]], "the same prompt twice"
    assert form_batches([], sizes, 10) == []


def test_short_prompts_go_more_at_a_time_than_long_ones() -> None:
    sizes = Sizes(((100, 4), (200, 2), (400, 1)))
    assert [sizes.of(tokens) for tokens in (1, 100, 101, 200, 201, 400, 500)] == [4, 4, 2, 2, 1, 1, 1]
    assert make_batches([150, 40, 90, 150, 300, 60, 50, 30], sizes) == [[4], [0, 3], [2, 5, 6, 1], [7]]
    assert make_batches([150, 40, 90, 150], sizes, new_tokens=60) == [[0], [3], [2, 1]]


def test_the_fake_event_is_like_the_real_one() -> None:
    assert list(FakeEvent._fields) == list(TokenEvent.__dataclass_fields__)


def test_what_is_there_survives_a_run_that_cannot_start(run: Run, prompts: Path) -> None:
    job(run, prompts)
    out = prompts.with_name("out.jsonl")
    before = out.read_bytes()
    result = job(run, prompts, "--overwrite", engine=FakeEngine(fails=DoesNotFitError("too big")))
    assert result.exit_code == 3
    assert out.read_bytes() == before
    assert "complete" in job(run, prompts).stderr


def test_a_run_that_cannot_start_leaves_nothing(run: Run, prompts: Path) -> None:
    assert job(run, prompts, engine=FakeEngine(fails=DoesNotFitError("too big"))).exit_code == 3
    prompts.write_text(prompts.read_text() + "word " * 600)
    assert job(run, prompts, "--strict").exit_code == 2
    assert [path.name for path in prompts.parent.iterdir() if path.is_file()] == ["in.jsonl"]


def test_journal_torn_at_any_byte(run: Run, prompts: Path) -> None:
    out, journal = prompts.with_name("out.jsonl"), prompts.with_name("out.jsonl.kcache")
    job(run, prompts)
    whole = out.read_bytes()
    job(run, prompts, "--overwrite", engine=stopping(3))
    written, kept = out.read_bytes(), journal.read_bytes()
    header = kept.index(b"\n") + 1
    for end in range(header, len(kept), 23):
        journal.write_bytes(kept[:end])
        out.write_bytes(written[: len(written) * end // len(kept)])
        assert job(run, prompts).exit_code == 0
        assert out.read_bytes() == whole
