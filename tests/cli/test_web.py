"""``kcache inspect --web``: who is let in, and that a window gets a dashboard that answers keys."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import aiohttp
import pytest

from kcache.watch.frame import Info
from kcache.watch.recorder import Recorder
from kcache_cli.web.order import VARIABLE, Order
from kcache_cli.web.server import WebServer
from tests.cli.conftest import Run
from tests.watch.steps import Steps

ROOT = Path(__file__).parents[2]
ADDRESS = re.compile(r"http://127\.0\.0\.1:(\d+)/\?token=([\w-]+)")
_PATIENCE_S = 60


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # a name that a shell would take apart
    path = tmp_path_factory.mktemp("web") / "a run; touch $(hurt) 'x'.kcr"
    steps = Steps(layers=4, kv_heads=2, group=2, topn=8, tokens=500)
    recorder = Recorder(path)
    recorder.begin(asdict(Info(12, "chat", "tiny-model", 1.8e9, "CPU", True, 100)))
    for _ in range(6):
        recorder.write(steps.step(), steps.text)
    recorder.close("the run ended")
    return path


@contextmanager
def serving(recording: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-m", "kcache_cli", "inspect", str(recording), "--web", "--port", "0"]
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    try:
        found = ADDRESS.search(process.stderr.readline())
        assert found is not None
        yield process, found[0]
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def address(recording: Path) -> Iterator[str]:
    with serving(recording) as (process, found):
        yield found
        process.send_signal(signal.SIGINT)
        assert process.wait(_PATIENCE_S) == 0


def ask(look: Callable[[aiohttp.ClientSession], Awaitable[object]]) -> object:
    async def run() -> object:
        jar = aiohttp.CookieJar(unsafe=True)  # which takes cookies of an address without a name
        async with aiohttp.ClientSession(cookie_jar=jar) as client:
            return await asyncio.wait_for(look(client), _PATIENCE_S)

    return asyncio.run(run())


def test_who_knows_the_address_gets_the_page(address: str) -> None:
    async def look(client: aiohttp.ClientSession) -> None:
        async with client.get(address) as response:
            assert response.status == 200 and "token" not in str(response.url)
            text = await response.text()
            policy = response.headers["Content-Security-Policy"]
        assert "kcache" in text and "default-src 'self'" in policy and "frame-ancestors 'none'" in policy
        (cookie,) = client.cookie_jar
        assert cookie["httponly"] and cookie["samesite"] == "Strict"
        async with client.get(response.url.with_path("/static/js/textual.js")) as script:
            assert script.status == 200

    ask(look)


@pytest.mark.parametrize("path", ["/", "/?token=guess", "/?token=", "/ws", "/static/js/textual.js", "/download/x"])
def test_nobody_else_does(address: str, path: str) -> None:
    async def look(client: aiohttp.ClientSession) -> int:
        async with client.get(address.partition("/?")[0] + path, allow_redirects=False) as response:
            return response.status

    assert ask(look) == 403


@pytest.mark.parametrize("headers", [{"Host": "evil.example"}, {"Origin": "http://evil.example"}, {"Origin": "null"}])
def test_other_pages_and_names_are_refused_even_with_the_cookie(address: str, headers: dict[str, str]) -> None:
    async def look(client: aiohttp.ClientSession) -> list[int]:
        async with client.get(address) as response:
            assert response.status == 200
        base, found = address.partition("/?")[0], []
        for path in ("/", "/ws"):
            async with client.get(base + path, headers=headers) as response:
                found.append(response.status)
        return found

    assert ask(look) == [403, 403]


def test_it_listens_on_loopback_alone(address: str) -> None:
    match = ADDRESS.search(address)
    assert match is not None
    outside = socket.gethostbyname(socket.gethostname())
    if outside.startswith("127."):
        outside = "127.0.0.2"  # loopback has more addresses than the one that is served
    with pytest.raises(OSError, match=r"refused|timed out|unreachable"):
        socket.create_connection((outside, int(match[1])), 2).close()


def test_a_window_shows_the_dashboard_and_answers_keys(address: str) -> None:
    async def look(client: aiohttp.ClientSession) -> tuple[str, str]:
        async with client.get(address):
            pass
        base = address.partition("/?")[0].replace("http:", "ws:")
        async with client.ws_connect(f"{base}/ws?width=120&height=40", max_msg_size=0) as window:
            first = await until(window, "tiny-model")
            await window.send_json(["stdin", "?"])
            return first, await until(window, "leave the dashboard")

    drawn, helped = ask(look)  # type: ignore[misc]
    assert "where attention looks" in drawn and "leave the dashboard" in helped


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGKILL, -signal.SIGKILL)])
def test_windows_that_are_open_neither_keep_the_server_nor_outlive_it(recording: Path, number: int, code: int) -> None:
    async def look(client: aiohttp.ClientSession) -> None:
        async with client.get(address):
            pass
        base = address.partition("/?")[0].replace("http:", "ws:")
        async with client.ws_connect(f"{base}/ws?width=120&height=40", max_msg_size=0) as window:
            await until(window, "tiny-model")
            dashboards = children(process.pid)
            assert dashboards
            process.send_signal(number)
            assert await asyncio.to_thread(process.wait, 10) == code
            for _ in range(100):
                if not any(Path(f"/proc/{pid}").exists() for pid in dashboards):
                    return
                await asyncio.sleep(0.1)
            raise AssertionError(f"left behind: {dashboards}")

    with serving(recording) as (process, address):
        ask(look)


def children(parent: int) -> list[int]:
    """The processes that a process has started, and those that they have."""
    text = Path(f"/proc/{parent}/task/{parent}/children").read_text()
    own = [int(pid) for pid in text.split()]
    return [*own, *(pid for child in own for pid in children(child))]


async def until(window: aiohttp.ClientWebSocketResponse, said: str) -> str:
    """Read what the window is sent until something is said; styles are left out."""
    text = ""
    async for message in window:
        data = message.data if isinstance(message.data, bytes) else message.data.encode()
        text += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", data.decode("utf-8", "replace"))
        if said in text:
            return text
    raise AssertionError(f"never said {said!r}: {text[-500:]!r}")


def test_no_word_of_the_user_is_on_a_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "")
    order = Order.of(Path("a; rm -rf $(x).kcr"), None, None)
    order.put()
    assert json.loads(os.environ[VARIABLE])["file"].endswith("a; rm -rf $(x).kcr")
    assert Order.take() == order
    assert WebServer(1).command.removeprefix("exec ") == f"{sys.executable} -m kcache_cli.web"


def test_a_port_that_is_taken(run: Run, recording: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run("inspect", str(recording), "--web", "--port", str(port))
    assert result.exit_code == 2
    assert f"--port {port}: " in result.stderr and "give another" in result.stderr


def test_nothing_to_serve(run: Run) -> None:
    result = run("inspect", "--web", "--port", "0")
    assert result.exit_code == 1 and "nothing that can be inspected is running" in result.stderr
