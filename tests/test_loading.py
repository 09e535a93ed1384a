"""Loading: what a name leads to, what is refused and in which words, and that nothing is fetched in vain."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BartConfig, BertConfig, LlamaConfig, MambaConfig, PretrainedConfig, ViTConfig

import kcache
from kcache.loading import parse_dtype
from kcache.models.hub import choose_files
from kcache.models.names import find_source
from tests import fake_hub
from tests.saved import save_tiny, write_gguf


def one_line(error: BaseException) -> str:
    """Return an error's message, having checked that it is one line that does not ramble."""
    message = str(error)
    assert message
    assert "\n" not in message
    assert len(message) < 400
    return message


def test_a_local_folder_loads_with_its_tokenizer(tiny_folder: Path) -> None:
    lm = kcache.load(tiny_folder)
    assert lm.name == str(tiny_folder)
    assert lm.device == torch.device("cpu") or torch.cuda.is_available()
    assert lm.context_length == 2048
    assert lm.model.dtype == torch.float32
    assert not lm.model.training
    assert not any(parameter.requires_grad for parameter in lm.model.parameters())
    assert lm.tokenizer.padding_side == "left"
    assert lm.tokenizer.pad_token == "<|pad|>"


def test_nothing_is_printed(tiny_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    kcache.load(str(tiny_folder))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("dtype", ["bfloat16", "bf16", "torch.bfloat16", torch.bfloat16])
def test_dtype_is_a_torch_dtype_or_its_name(tiny_folder: Path, dtype: Any) -> None:
    assert kcache.load(tiny_folder, dtype=dtype, device_map="cpu").model.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["int8", "bfloat", "", "load", torch.int32, 3, None])
def test_a_dtype_that_is_none_is_refused(dtype: Any) -> None:
    with pytest.raises(kcache.InputError, match="use auto, bfloat16") as caught:
        parse_dtype(dtype)
    one_line(caught.value)


def test_a_device_map_is_handed_to_accelerate(tiny_folder: Path) -> None:
    assert kcache.load(tiny_folder, device_map={"": "cpu"}).device == torch.device("cpu")
    assert kcache.load(tiny_folder, device_map=None).device == torch.device("cpu")


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "cpu:x"])
def test_a_device_that_is_not_there_is_refused_before_anything_is_fetched(device: str, kcache_home: Path) -> None:
    with pytest.raises(kcache.InputError, match="use auto") as caught:
        kcache.load("smollm2", device_map=device)
    one_line(caught.value)
    assert not kcache_home.exists()


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("./nowhere", "there is no file or folder"),
        ("/no/such/folder", "there is no file or folder"),
        ("a/b/c", "there is no file or folder"),
        ("model.gguf", "there is no file or folder"),
        ("", "unknown model"),
        ("two words", "unknown model"),
    ],
)
def test_a_name_that_leads_nowhere(name: str, part: str) -> None:
    for call in (kcache.load, kcache.load_config, kcache.pull):
        with pytest.raises(kcache.ModelNotFoundError, match=part) as caught:
            call(name)
        assert "smollm2" in one_line(caught.value)


def test_revision_and_gguf_file_must_apply(tiny_folder: Path) -> None:
    with pytest.raises(kcache.InputError, match="leave out revision"):
        kcache.load("smollm2", revision="main")
    with pytest.raises(kcache.InputError, match="on this machine"):
        kcache.load(tiny_folder, revision="main")
    with pytest.raises(kcache.ModelNotFoundError, match=r"has no file x\.gguf"):
        kcache.load(tiny_folder, gguf_file="x.gguf")


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(kcache.ModelNotFoundError, match=r"has no config\.json"):
        kcache.load(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(kcache.ModelNotFoundError, match=r"no \.gguf"):
        kcache.load(tmp_path / "notes.txt")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(kcache.KCacheError) as caught:
        kcache.load(tmp_path)
    one_line(caught.value)


def test_a_gguf_file_loads_by_its_path_or_by_folder_and_name(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    with pytest.raises(kcache.ModelNotFoundError, match=r"gguf_file='tiny\.gguf'"):
        kcache.load(tmp_path)
    by_path = kcache.load(path)
    by_name = kcache.load(tmp_path, gguf_file="tiny.gguf")
    assert by_path.context_length == by_name.context_length == 256
    ids = torch.tensor([[7, 8, 9]])
    torch.testing.assert_close(by_path.model(ids).logits, by_name.model(ids).logits)


def test_a_missing_tokenizer_is_said(tmp_path: Path) -> None:
    save_tiny(tmp_path, tokenizer=False)
    with pytest.raises(kcache.ModelNotFoundError, match="no usable tokenizer") as caught:
        kcache.load(tmp_path)
    one_line(caught.value)


def test_damaged_weights_are_said(tiny_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "copy")
    os.truncate(folder / "model.safetensors", 5000)
    with pytest.raises(kcache.ModelNotFoundError, match="damaged or incomplete") as caught:
        kcache.load(folder)
    one_line(caught.value)
    (folder / "model.safetensors").unlink()
    with pytest.raises(kcache.ModelNotFoundError, match="cannot be used") as caught:
        kcache.load(folder)
    one_line(caught.value)


REFUSED: list[tuple[PretrainedConfig, str]] = [
    (BartConfig(), "encoder-decoder"),
    (BertConfig(), "both directions"),
    (BertConfig(architectures=["BertForMaskedLM"]), "saved as BertForMaskedLM"),
    (LlamaConfig(architectures=["LlamaForSequenceClassification"]), "saved as LlamaForSequenceClassification"),
    (MambaConfig(), "no KV cache"),
    (ViTConfig(), "does not know as a causal language model"),
]


@pytest.mark.parametrize(("config", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_a_model_that_cannot_be_served_is_refused_with_the_reason(
    config: PretrainedConfig, reason: str, tmp_path: Path
) -> None:
    config.save_pretrained(tmp_path)
    for call in (kcache.load, kcache.load_config):
        with pytest.raises(kcache.UnsupportedModelError, match=reason) as caught:
            call(tmp_path)
        assert str(tmp_path) in one_line(caught.value)


def test_unknown_architectures_and_remote_code_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "never_heard_of"}')
    with pytest.raises(kcache.UnsupportedModelError) as caught:
        kcache.load_config(tmp_path)
    one_line(caught.value)
    remote = {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"}}
    (tmp_path / "config.json").write_text(json.dumps(remote))
    with pytest.raises(kcache.UnsupportedModelError, match="trust_remote_code") as caught:
        kcache.load_config(tmp_path)
    one_line(caught.value)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3", "gpt2", "phi3"])
def test_what_can_be_served_is_let_through(kind: str, tmp_path: Path, tiny_model: Any) -> None:
    tiny_model(kind).config.save_pretrained(tmp_path)
    assert kcache.load_config(tmp_path).model_type == tiny_model(kind).config.model_type


def test_the_demo_name_wins_and_a_path_reaches_a_folder_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2").mkdir()
    (tmp_path / "smollm2" / "config.json").write_text("{}")
    assert find_source("smollm2").kind == "demo"
    assert find_source("./smollm2").kind == "local"
    assert find_source("gpt2").kind == find_source("owner/name").kind == "hub"


def test_known_models_lists_the_demo_model_first(kcache_home: Path) -> None:
    entry = kcache.known_models()[0]
    assert (entry.name, entry.kind, entry.ready, entry.path) == ("smollm2", "demo", False, None)
    assert entry.size_bytes > 500_000_000


@pytest.mark.demo
def test_known_models_says_where_the_demo_model_is(demo_lm: kcache.LoadedModel) -> None:
    entry = kcache.known_models()[0]
    assert entry.ready
    assert entry.path is not None
    assert (entry.path / "model.safetensors").is_file()
    assert 500_000_000 < entry.size_bytes < 600_000_000


REPO = ["config.json", "tokenizer.json", "README.md", "modeling_own.py", "original/params.json", "model-Q4.gguf"]


@pytest.mark.parametrize(
    ("weights", "chosen"),
    [
        (["model.safetensors", "consolidated.safetensors", "pytorch_model.bin"], ["model.safetensors"]),
        (["model-1.safetensors", "model-2.safetensors"], ["model-1.safetensors", "model-2.safetensors"]),
        (["weights.safetensors", "onnx/model.safetensors"], ["weights.safetensors"]),
        (["pytorch_model.bin", "training_args.bin"], ["pytorch_model.bin"]),
    ],
)
def test_one_set_of_weights_is_chosen(weights: list[str], chosen: list[str]) -> None:
    texts = ["config.json", "tokenizer.json"]
    assert choose_files("o/n", REPO + weights, gguf_file=None, code=False, weights=True) == texts + chosen
    assert choose_files("o/n", REPO + weights, gguf_file=None, code=False, weights=False) == texts
    assert choose_files("o/n", REPO, gguf_file="model-Q4.gguf", code=False, weights=True) == [*texts, "model-Q4.gguf"]
    assert "modeling_own.py" in choose_files("o/n", REPO + weights, gguf_file=None, code=True, weights=True)


def test_a_repository_of_gguf_files_says_which() -> None:
    with pytest.raises(kcache.ModelNotFoundError, match=r"gguf_file: model-Q4\.gguf"):
        choose_files("o/n", REPO, gguf_file=None, code=False, weights=True)
    with pytest.raises(kcache.ModelNotFoundError, match="no file other"):
        choose_files("o/n", REPO, gguf_file="other.gguf", code=False, weights=True)


def run_python(script: str, *args: str, **env: str) -> list[Any]:
    """Run a script in a fresh interpreter (the hub client reads its settings once) and return its lines of JSON."""
    result = subprocess.run(
        [sys.executable, "-c", script, *args],
        env={**os.environ, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **env},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return [json.loads(line) for line in result.stdout.splitlines()]


HUB_SCRIPT = """
import json, sys
import kcache

def say(call, *args, **kwargs):
    try:
        result = call(*args, **kwargs)
        print(json.dumps(getattr(result, "name", None) or type(result).__name__))
    except kcache.KCacheError as error:
        print(json.dumps([type(error).__name__, str(error)]))

reports = []
say(kcache.load_config, "own/tiny")
say(kcache.load, "own/tiny", progress=lambda *report: reports.append(report))
print(json.dumps(reports[:1] + reports[-1:]))
say(kcache.load, "own/tiny", revision="nope")
say(kcache.load, "own/missing")
say(kcache.load, "own/gated")
say(kcache.load, "own/encoder")
say(kcache.load_config, "own/half")
print(json.dumps([entry.name for entry in kcache.known_models()]))
"""

OFFLINE_SCRIPT = """
import json, time
import kcache

began = time.perf_counter()
print(json.dumps(kcache.load("own/tiny").name))
for name in ("own/missing", "gpt2-of-nowhere", "own/half"):
    try:
        kcache.load(name)
    except kcache.ModelNotFoundError as error:
        print(json.dumps(str(error)))
print(json.dumps(time.perf_counter() - began))
"""


def test_a_hub_model_is_fetched_once_and_found_again_offline(tiny_folder: Path, tmp_path: Path) -> None:
    tiny, encoder = tmp_path / "repo", tmp_path / "encoder"
    shutil.copytree(tiny_folder, tiny)
    (tiny / "pytorch_model.bin").write_bytes(b"not wanted")
    encoder.mkdir()
    BertConfig().save_pretrained(encoder)
    (encoder / "model.safetensors").write_bytes(b"x" * 1000)
    home = {"HF_HOME": str(tmp_path / "hf"), "KCACHE_HOME": str(tmp_path / "kcache")}
    with fake_hub.serve({"own/tiny": tiny, "own/half": tiny, "own/encoder": encoder}) as (endpoint, requests):
        lines = run_python(HUB_SCRIPT, HF_ENDPOINT=endpoint, **home)
    config, loaded, reports, revision, missing, gated, refused, half, known = lines
    assert (config, loaded, half) == ("LlamaConfig", "own/tiny", "LlamaConfig")
    size = (tiny / "model.safetensors").stat().st_size
    assert reports == [[0, size, "downloading own/tiny"], [size, size, "downloading own/tiny"]]
    assert revision[0] == missing[0] == gated[0] == "ModelNotFoundError"
    assert "no revision 'nope'" in revision[1]
    assert "no model 'own/missing'" in missing[1]
    assert "accept its terms" in gated[1]
    assert refused[0] == "UnsupportedModelError"
    assert known == ["smollm2", "own/encoder", "own/half", "own/tiny"]
    assert not [request for request in requests if "pytorch_model.bin" in request]
    assert not [request for request in requests if "encoder" in request and "safetensors" in request]

    began = time.perf_counter()
    name, *errors, seconds = run_python(OFFLINE_SCRIPT, HF_ENDPOINT="http://127.0.0.1:9", **home)
    assert name == "own/tiny"
    assert all("the hub cannot be reached" in error for error in errors)
    assert len(errors) == 3
    assert "only a part" in errors[2]
    assert seconds < 20
    assert time.perf_counter() - began < 60
