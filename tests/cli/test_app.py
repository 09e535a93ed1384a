"""The program as a whole: quick help, one-line errors, exit codes."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import kcache
from kcache import errors
from kcache_cli import exits
from kcache_cli.reference import reference
from tests.cli.conftest import Run
from tests.cli.fakes import FakeEngine

ROOT = Path(__file__).parents[2]


def python(*args: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **more}
    return subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, cwd=ROOT, env=environment, check=False, timeout=120
    )


@pytest.mark.parametrize("args", [["--help"], ["chat", "--help"], ["generate", "--help"], ["--version"]])
def test_help_does_not_import_what_is_slow(args: list[str]) -> None:
    code = (
        "import sys\n"
        f"sys.argv = ['kcache', *{args!r}]\n"
        "from kcache_cli.app import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "slow = {'torch', 'transformers', 'numpy', 'prompt_toolkit', 'textual'} & set(sys.modules)\n"
        "assert not slow, slow\n"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "args",
    [
        ["bench", "--ctx", "0"],
        ["bench", "--engine", "vllm"],
        ["plan", "--gpu", "tpu"],
        ["plan", "--hbm", "24"],
        ["chat", "./nowhere"],
        ["bench", "./nowhere"],
        ["generate", "./nowhere", "-i", __file__, "-o", "/nowhere/out.jsonl"],
        ["generate", "./nowhere", "-i", __file__],
        ["eval", "fidelity", "./nowhere"],
        ["eval", "needle", "--output", "/nowhere/rows.md"],
    ],
)
def test_wrong_values_are_refused_before_anything_slow_is_imported(args: list[str]) -> None:
    """With 1 where a model, and with 2 where anything else is not what it should be."""
    code = (
        "import sys\n"
        f"sys.argv = ['kcache', *{args!r}]\n"
        "from kcache_cli.app import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert end.code in (1, 2), end.code\n"
        "slow = {'torch', 'transformers', 'textual'} & set(sys.modules)\n"
        "assert not slow, slow\n"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


def processor_s(*args: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert python(*args).returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("args", [["--help"], ["chat", "--help"], ["eval", "--help"], ["inspect", "--help"]])
def test_help_answers_in_half_a_second(args: list[str]) -> None:
    """Of processor time, the best of three: the clock on the wall also measures what else runs here."""
    assert min(processor_s("-m", "kcache_cli", *args) for _ in range(3)) < 0.5


@pytest.mark.parametrize(
    ("args", "wanted"),
    [
        (["chat", "--help"], {"commands.chat"}),
        (["eval", "needle", "--help"], {"commands.eval", "evaluate.needle"}),
        (["--version"], set()),
    ],
)
def test_only_the_wanted_command_is_imported(args: list[str], wanted: set[str]) -> None:
    code = (
        "import sys\n"
        f"sys.argv = ['kcache', *{args!r}]\n"
        "from kcache_cli.app import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print(*sys.modules, file=sys.stderr)\n"
    )
    names = {name.removeprefix("kcache_cli.") for name in python("-c", code).stderr.split()}
    commands = {f"commands.{path.stem}" for path in (ROOT / "kcache_cli" / "commands").glob("*.py")}
    asked = {f"evaluate.{name}" for name in ("fidelity", "needle", "tasks")}
    assert names & (commands | asked) == wanted


@pytest.mark.parametrize("name", ["bench", "generate", "tune", "eval fidelity", "eval needle", "eval tasks", "plan"])
def test_examples_can_be_copied_from_80_columns(run: Run, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Lines are those of the docstring, as the reference has them: none was broken anew."""
    monkeypatch.setenv("COLUMNS", "80")
    section = reference().partition(f"## kcache {name}\n")[2].partition("```sh\n")[2].partition("```")[0]
    shown = [line.strip() for line in run(*name.split(), "--help").stdout.splitlines()]
    assert section
    for line in section.splitlines():
        assert line.strip() in shown


def test_help_lists_every_command(run: Run) -> None:
    files = {path.stem for path in (ROOT / "kcache_cli" / "commands").glob("*.py")} - {"__init__", "docs"}
    lines = [line.strip("│ ").split() for line in run("--help").stdout.splitlines() if line.startswith("│")]
    assert files <= {words[0] for words in lines if len(words) > 1}


def test_a_group_without_a_command_prints_its_help(run: Run) -> None:
    result = run("eval")
    assert result.exit_code == 2
    assert "fidelity" in result.output
    assert "error" not in result.output


def test_every_command_shows_examples(run: Run) -> None:
    for name in ("chat", "generate", "plan", "doctor", "models", "pull", "config"):
        result = run(name, "--help")
        assert result.exit_code == 0
        assert "Examples:" in result.stdout
        assert f"kcache {name}" in result.stdout
    assert "Examples:" in run("--help").stdout


def test_version(run: Run) -> None:
    assert run("--version").stdout == f"kcache {kcache.__version__}\n"


def test_reference_is_up_to_date() -> None:
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == reference(), "run `kcache docs -o docs/cli.md`"


def test_docs_check_notices_a_stale_file(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "cli.md"
    assert run("docs", "-o", str(file)).exit_code == 0
    assert run("docs", "-o", str(file), "--check").exit_code == 0
    file.write_text("old")
    assert run("docs", "-o", str(file), "--check").exit_code == 1


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.ModelNotFoundError("no model 'nope'"), 1),
        (errors.UnsupportedModelError("bert is an encoder"), 1),
        (errors.DownloadError("interrupted"), 1),
        (errors.KCacheError("other"), 1),
        (errors.InputError("bad"), 2),
        (errors.PolicyError("bad"), 2),
        (errors.ContextLengthError("long"), 2),
        (PermissionError(13, "Permission denied", "x"), 2),
        (errors.DoesNotFitError("about 4,096 tokens would fit"), 3),
        (MemoryError(), 3),
        (RuntimeError("a bug"), 1),
        (KeyboardInterrupt(), 130),
        (BrokenPipeError(32, "Broken pipe"), 1),
    ],
)
def test_errors_become_one_line_and_a_code(run: Run, error: BaseException, code: int) -> None:
    engine = FakeEngine(fails=error)
    result = run("chat", input="hi", engine=engine)
    assert result.exit_code == code
    assert "Traceback" not in result.output
    assert result.stdout == ""
    assert engine.calls == ["plan"]
    lines = result.stderr.splitlines()
    quiet = isinstance(error, (KeyboardInterrupt, BrokenPipeError))
    assert len(lines) == (0 if quiet else 1)
    if not quiet and str(error):
        assert str(error.args[-1]) in lines[0]


@pytest.mark.parametrize(
    ("args", "say"),
    [
        (["nonsense"], "nonsense"),
        (["chat", "--nonsense"], "--nonsense"),
        (["chat", "--topn", "many"], "--topn"),
        (["chat", "--topn", "0"], "topn must be a whole number of at least 1"),
        (["chat", "--topn", "-3"], "topn"),
        (["chat", "--offload", "some"], "--offload"),
        (["chat", "--kv-budget", "lots"], "not a size"),
        (["chat", "--kv-budget", "-1"], "not a size"),
        (["chat", "--temperature", "-1"], "temperature"),
        (["chat", "--temperature", "nan"], "temperature"),
        (["chat", "--top-p", "1.5"], "top_p"),
        (["chat", "--seed", "-1"], "--seed"),
        (["chat", "-n", "0"], "--max-tokens"),
        (["chat", "--ctx", "0"], "--ctx"),
        (["chat", "--policy", "nowhere.toml"], "nowhere.toml"),
        (["chat", "--offload", "none", "--resident-layers", "2"], "resident"),
        (["chat", "-f", "nowhere.txt"], "nowhere.txt"),
        (["chat", "smollm2", "hello"], "a message comes by standard input"),
        (["generate", "smollm2", "prompts.jsonl"], "(prompts.jsonl); prompts are read with -i FILE"),
        (["models", "--verify", "llama", "--output", "x.json"], "a page of Markdown; end its name in .md"),
        (["models", "--verify", "llama", "--json", "-o", "md"], "--json and -o md name two formats"),
        (["models", "--verify", "llama", "--json", "--output", "x.md"], "leave out -o and --json"),
        (["models", "--verify", "llama", "--output", "nowhere/x.md"], "the folder nowhere does not exist"),
        (["models", "--verify", "llama", "--output", "/"], "is a folder"),
    ],
)
def test_wrong_usage_is_told_before_anything_is_loaded(run: Run, args: list[str], say: str) -> None:
    engine = FakeEngine()
    result = run(*args, input="hi", engine=engine)
    assert result.exit_code == 2
    assert say in result.stderr
    assert len(result.stderr.splitlines()) <= 2
    assert "load" not in engine.calls


def test_messages_of_errors_cannot_drive_the_terminal(run: Run) -> None:
    result = run("chat", input="hi", engine=FakeEngine(fails=errors.InputError("a\x1b[31m\nred\u202e b")))
    assert result.stderr == "kcache: error: a[31m red b\n"


def test_traceback_on_request(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KCACHE_DEBUG", "1")
    result = run("chat", input="hi", engine=FakeEngine(fails=RuntimeError("a bug")))
    assert isinstance(result.exception, RuntimeError)


def test_out_of_memory_on_the_device_does_not_fit() -> None:
    error = type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory")
    assert exits.exit_code(error) == 3
    assert "--batch-size" in exits.describe(error)


def test_closed_pipe_is_quiet() -> None:
    command = f"{sys.executable} -m kcache_cli docs | head -c 10; echo status ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, check=False, timeout=120)
    assert done.stderr == ""
    assert done.stdout.startswith("# Commands")


def test_without_a_standard_output_nothing_is_said() -> None:
    command = f"{sys.executable} -m kcache_cli config --json >&-"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("kcache ge", "generate"),
        ("kcache chat sm", "smollm2"),
        ("kcache chat --offload n", "none"),
        ("kcache chat --policy pa", "paper"),
        ("kcache chat --top", "--topn"),
        ("kcache eval ne", "needle"),
    ],
)
def test_completion(words: str, offered: str) -> None:
    done = python(
        "-c",
        "from kcache_cli.app import main; main()",
        _KCACHE_COMPLETE="complete_bash",
        COMP_WORDS=words,
        COMP_CWORD=str(len(words.split()) - 1),
    )
    assert offered in done.stdout.split()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["chat", "--topn", "32K"], "'--topn': '32K' is not a whole number\n"),
        (["chat", "--temperature", "hot"], "'--temperature': 'hot' is not a number\n"),
        (["chat", "--dtype", "float64"], "'--dtype': 'float64' is not one of"),
        (["bench", "-o", "rows.json"], "'json', 'jsonl'; a file is named with --output\n"),
        (["bench", "-o", "xml"], "'json', 'jsonl'.\n"),
    ],
)
def test_a_value_that_is_none_is_named(run: Run, args: list[str], words: str) -> None:
    result = run(*args)
    assert result.exit_code == exits.USAGE
    assert words in result.stderr


@pytest.mark.parametrize(
    ("error", "blamed"),
    [
        (errors.UnsupportedModelError("it has no KV cache"), True),
        (TypeError("forward() got an unexpected keyword argument"), True),
        (errors.ModelNotFoundError("no such model"), False),
        (errors.InputError("no such file"), False),
    ],
)
def test_a_transformers_newer_than_any_that_was_tried_is_named(
    error: Exception, blamed: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exits.report(error)
    assert len(capsys.readouterr().err.splitlines()) == 1
    monkeypatch.setattr("kcache.models.support.NEWEST_TRIED", (5, 2))
    exits.report(error)
    assert ("pip install 'transformers<5.3'" in capsys.readouterr().err) == blamed


@pytest.mark.parametrize("width", [None, 40])
def test_a_terminal_breaks_no_words_of_an_error(
    width: int | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("kcache_cli.console.terminal_width", lambda: width)
    path = "/a/folder-with-a-long-name/and-another-one/config.json"
    error = errors.InputError(f"{path}: no such file; give a config.json, a folder or a hub id")
    assert exits.report(error) == exits.USAGE
    lines = capsys.readouterr().err.splitlines()
    assert " ".join(lines) == f"kcache: error: {error}"
    assert len(lines) == 1 if width is None else all(len(line) <= width or path in line for line in lines)
