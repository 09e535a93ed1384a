"""Look at ``kcache inspect --web`` with a real browser: ``python benchmarks/browser.py run.kcr picture.png``.

Needs Chromium (or Chrome, ``--browser``) on this machine, nothing else: it is steered over its debugging protocol.
Fails unless the dashboard was drawn, from this machine alone, and answers a key.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp

ADDRESS = re.compile(r"http://127\.0\.0\.1:\d+/\?token=[\w-]+")
DEBUGGER = re.compile(r"ws://\S+")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
SIZE = (1280, 800)
_PATIENCE_S, _LOOK_S = 60.0, 0.25
_DRAWN_FRAMES = 20


@contextmanager
def started(command: list[str], pattern: re.Pattern[str]) -> Iterator[str]:
    """Run a command while the body does; gives what it says on standard error that matches."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True)
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if found := pattern.search(line):
                yield found[0]
                return
        raise SystemExit(f"{command[0]} ended before it was ready")
    finally:
        process.terminate()
        process.wait()


class Browser:
    """A page of a browser, over its debugging protocol."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._number = socket, 0
        self._session: str | None = None
        self.asked: list[str] = []
        self.reached: set[str] = set()
        self.frames = 0

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Have it do something; what happens meanwhile is noted."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        await self._socket.send_json(message | ({"sessionId": self._session} if self._session else {}))
        while True:
            answer = json.loads((await self._socket.receive(timeout=_PATIENCE_S)).data)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise SystemExit(f"{method}: {answer['error']['message']}")
                found: dict[str, Any] = answer["result"]
                return found
            self._note(answer.get("method"), answer.get("params", {}))

    def _note(self, event: str | None, params: dict[str, Any]) -> None:
        if event == "Network.requestWillBeSent":
            self.asked.append(params["request"]["url"])
        elif event == "Network.responseReceived":
            self.reached.add(urlsplit(params["response"]["url"]).netloc)
        elif event == "Network.webSocketFrameReceived":
            self.frames += 1

    async def open(self, address: str) -> None:
        """Go to an address in a page of its own."""
        target = await self.call("Target.createTarget", url="about:blank")
        session = await self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = session["sessionId"]
        await self.call("Network.enable")
        await self.call("Page.enable")
        await self.call("Emulation.setFocusEmulationEnabled", enabled=True)
        await self.call("Page.navigate", url=address)

    async def wait(self, is_so: Callable[[], bool], what: str) -> None:
        """Wait until something has happened."""
        for _ in range(int(_PATIENCE_S / _LOOK_S)):
            await asyncio.sleep(_LOOK_S)
            await self.call("Runtime.evaluate", expression="1")  # for the events that come before the answer
            if is_so():
                return
        raise SystemExit(f"not seen in {_PATIENCE_S:.0f} s: {what}")

    async def press(self, key: str, code: int, text: str = "") -> None:
        """Press a key."""
        for kind, said in (("keyDown", text), ("keyUp", "")):
            pressed = {"type": kind, "key": key, "windowsVirtualKeyCode": code}
            await self.call("Input.dispatchKeyEvent", **pressed, **({"text": said} if said else {}))

    async def click(self, x: int, y: int) -> None:
        """Click somewhere."""
        for kind in ("mousePressed", "mouseReleased"):
            await self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    async def picture(self) -> bytes:
        """What the page shows."""
        return base64.b64decode((await self.call("Page.captureScreenshot", format="png"))["data"])


async def look(address: str, debugger: str) -> bytes:
    """Open the dashboard, check it, and take its picture."""
    async with aiohttp.ClientSession() as client, client.ws_connect(debugger, max_msg_size=0) as socket:
        browser = Browser(socket)
        await browser.open(address)
        await browser.wait(lambda: browser.frames >= _DRAWN_FRAMES, "the dashboard, drawn and replaying")
        await browser.click(SIZE[0] // 2, SIZE[1] // 3)
        await browser.press(" ", 32, " ")
        await browser.wait(Still(browser).since, "a replay that stops when space is pressed")
        before = browser.frames
        await browser.press("End", 35)
        await browser.wait(lambda: browser.frames > before, "the last frame when End is pressed")
        await browser.wait(Still(browser).since, "the last frame, drawn")
        here = urlsplit(address).netloc
        strangers = {urlsplit(url).netloc for url in browser.asked if not url.startswith("data:")} - {here}
        if browser.reached & strangers:
            raise SystemExit(f"the page loaded something from {', '.join(sorted(browser.reached & strangers))}")
        print(f"drawn, {browser.frames} messages; space pauses, End goes to the end; from elsewhere: nothing")
        return await browser.picture()


class Still:
    """Whether nothing has come for a second and a half."""

    def __init__(self, browser: Browser) -> None:
        self._browser, self._seen, self._looks = browser, browser.frames, 0

    def since(self) -> bool:
        """Ask, once a look."""
        self._looks = self._looks + 1 if self._browser.frames == self._seen else 0
        self._seen = self._browser.frames
        return self._looks * _LOOK_S >= 1.5


def main() -> None:
    """Serve, look, write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recording", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--browser", default=next((name for name in BROWSERS if shutil.which(name)), "chromium"))
    options = parser.parse_args()
    serve = [sys.executable, "-m", "kcache_cli", "inspect", str(options.recording), "--web", "--port", "0"]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browse = [options.browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
        browse += [f"--user-data-dir={profile}", f"--window-size={SIZE[0]},{SIZE[1]}", "about:blank"]
        with started(serve, ADDRESS) as address, started(browse, DEBUGGER) as debugger:
            options.picture.write_bytes(asyncio.run(look(address, debugger)))


if __name__ == "__main__":
    main()
