"""What is remembered of the link: measured once by any command that measures, published by those that run a model."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import kcache.speed.machine
import kcache.telemetry
from kcache_cli.engine import KCacheEngine
from kcache_cli.measured import link_gb_s, measure
from kcache_cli.paths import links_file
from tests.speed.test_machine import CPU, GPU


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Any:
    """A CUDA device of which only the name can be asked."""
    monkeypatch.setenv("KCACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: GPU.name)
    return torch.device("cuda", 0)


def measured(monkeypatch: pytest.MonkeyPatch, machine: Any) -> None:
    monkeypatch.setattr(kcache.speed.machine, "measure", lambda device, quick: machine)
    assert measure("auto") is machine


def test_measured_once_and_published_from_then_on(card: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    published: list[Any] = []
    monkeypatch.setattr(kcache, "publish", lambda lm, **options: published.append(options["link_gb_s"]))
    lm = SimpleNamespace(device=card)
    KCacheEngine().publish(lm, command="chat")
    measured(monkeypatch, GPU)
    KCacheEngine().publish(lm, command="chat")
    measured(monkeypatch, replace(GPU, h2d_gb_s=12.5))
    KCacheEngine().publish(lm, command="chat")
    assert published == [None, GPU.h2d_gb_s, 12.5]


def test_another_card_is_another_link(card: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, replace(GPU, name="another"))
    assert link_gb_s(card) is None


def test_without_a_link_there_is_nothing_to_remember(card: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, CPU)
    assert not links_file().exists()
    assert link_gb_s(torch.device("cpu")) is None


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": "b"}'])
def test_a_damaged_file_is_no_measurement(card: Any, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    links_file().write_text(text)
    assert link_gb_s(card) is None
    measured(monkeypatch, GPU)
    assert link_gb_s(card) == GPU.h2d_gb_s


def test_a_folder_that_cannot_be_written_stops_nothing(card: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KCACHE_HOME", "/dev/null/nowhere")
    measured(monkeypatch, GPU)
    assert link_gb_s(card) is None
