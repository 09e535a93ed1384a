"""Doors and viewers: who is let in, who is thrown out, and that nobody is ever waited for."""

from __future__ import annotations

import socket
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kcache.errors import FormatError, WatchError
from kcache.watch import places, viewers
from kcache.watch.attach import Place, attach, find
from kcache.watch.codec import Message, pack, unpack
from kcache.watch.columns import read_frame
from kcache.watch.frame import Info
from kcache.watch.server import MOST_VIEWERS, Server
from kcache.watch.viewers import Board, SocketViewer
from kcache.watch.wire import LARGEST_REQUEST, MAGIC, VERSION, Unframer, framed, viewer_hello
from tests.watch.steps import Steps

HELLO: Message = {
    "kind": "hello",
    "info": {
        "pid": 7,
        "command": "test",
        "model": "tiny",
        "started_s": 0.0,
        "device": "CPU",
        "host_only": True,
        "weights_bytes": 1,
        "policy": {},
        "environment": {},
    },
}


@pytest.fixture
def server(sockets: Path) -> Iterator[Server]:
    made = Server(lambda: HELLO, port=0)
    yield made
    made.close()


@pytest.fixture
def steps() -> Steps:
    return Steps(layers=8, kv_heads=2, group=1, topn=64, tokens=400)


def call(server: Server, *messages: Message | bytes, tcp: bool = False) -> socket.socket:
    """Connect and say something; the server has heard it."""
    if tcp:
        assert server.port is not None
        end = socket.create_connection(("127.0.0.1", server.port))
    else:
        end = socket.socket(socket.AF_UNIX)
        end.connect(str(server.path))
    for message in messages:
        end.sendall(message if isinstance(message, bytes) and message[:1] == b"!" else framed(message))
    for _ in range(3):
        server.wait(0.05)
    end.settimeout(5)
    return end


def heard(end: socket.socket) -> list[Message]:
    """What is there to read."""
    end.setblocking(False)
    unframer, found = Unframer(), []
    while True:
        try:
            data = end.recv(1 << 20)
        except BlockingIOError:
            return found
        if not data:
            return [*found, {"kind": "closed"}]
        found += unframer.feed(data)


def test_the_socket_is_its_owners_alone(server: Server, sockets: Path) -> None:
    assert server.path is not None
    assert stat.S_IMODE(server.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(sockets.stat().st_mode) == 0o700
    assert server.path.parent == sockets
    server.close()
    assert not server.path.exists()


def test_a_folder_open_to_others_is_refused(sockets: Path) -> None:
    sockets.mkdir(mode=0o755)
    with pytest.raises(WatchError, match="mode 700"):
        Server(lambda: HELLO)
    with pytest.raises(WatchError, match="mode 700"):
        find()


def test_a_folder_that_is_a_link_is_refused(sockets: Path, tmp_path: Path) -> None:
    sockets.symlink_to(tmp_path)
    with pytest.raises(WatchError, match="folder of your own"):
        Server(lambda: HELLO)


def test_a_path_too_long_for_a_socket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / ("x" * 100)))
    with pytest.raises(WatchError, match="too long"):
        Server(lambda: HELLO)


def test_dead_sockets_are_cleared_away_and_live_ones_found(server: Server, sockets: Path) -> None:
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(sockets / "99999.sock"))
    dead.close()
    (sockets / "notes.sock").write_text("no socket")
    found = find()
    assert [place.path for place in found] == [server.path]
    assert not (sockets / "99999.sock").exists()
    assert (sockets / "notes.sock").exists()


def test_nothing_published_is_nothing_found(sockets: Path) -> None:
    assert find() == []
    assert places.sockets() == []


def test_two_servers_of_one_process_have_sockets_of_their_own(server: Server) -> None:
    other = Server(lambda: HELLO)
    assert other.path != server.path
    assert len(find()) == 2
    other.close()


def test_a_viewer_of_another_version_is_told(server: Server) -> None:
    end = call(server, {**viewer_hello(), "version": VERSION + 1})
    (answer, closed) = heard(end)
    assert answer["kind"] == "refused"
    assert f"version {VERSION + 1}, this process {VERSION}" in answer["reason"]
    assert closed == {"kind": "closed"}
    assert server.viewers == []


@pytest.mark.parametrize("token", [None, "", "wrong", 5])
def test_tcp_wants_the_token(server: Server, token: str | None) -> None:
    end = call(server, {**viewer_hello(), "token": token}, tcp=True)
    assert heard(end)[0] == {"kind": "refused", "reason": "the token is wrong or missing"}


def test_tcp_with_the_token(server: Server) -> None:
    end = call(server, viewer_hello(server.token), tcp=True)
    assert heard(end)[0]["kind"] == "hello"


def test_a_port_that_is_taken(server: Server) -> None:
    with pytest.raises(WatchError, match="cannot listen on port"):
        Server(lambda: HELLO, unix=False, port=server.port)


@pytest.mark.parametrize(
    "noise", [b"!\0\0\0\0\0\0", b"!" * 5000, framed(b"\xc1")[:], {"kind": "viewer", "magic": MAGIC + "?"}, {"a": 1}]
)
def test_nonsense_is_thrown_out(server: Server, noise: bytes | Message) -> None:
    call(server, noise)
    assert server.viewers == []
    assert heard(call(server, viewer_hello()))[0]["kind"] == "hello"


def test_a_request_that_is_too_long_or_makes_no_sense(server: Server) -> None:
    for request in ({"kind": "ask", "rate_hz": "fast"}, {"kind": "ask", "picks": 1}, {"x": "y" * LARGEST_REQUEST}):
        call(server, viewer_hello(), request)
        assert server.viewers == []


def test_only_so_many_are_let_in(server: Server) -> None:
    ends = [call(server, viewer_hello()) for _ in range(MOST_VIEWERS)]
    assert heard(call(server)) == [{"kind": "closed"}]
    ends[0].close()
    server.wait(0.05)
    assert heard(call(server, viewer_hello()))[0]["kind"] == "hello"


def test_a_viewer_that_leaves_is_forgotten(server: Server, steps: Steps) -> None:
    end = call(server, viewer_hello())
    (viewer,) = server.viewers
    end.close()
    board = Board(steps.text)
    board.show(steps.step())
    viewer.serve(board)
    server.wait(0.05)
    assert server.viewers == []


def test_a_viewer_that_says_no_hello_is_dropped(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    call(server)
    assert len(server.viewers) == 1
    monkeypatch.setattr(viewers, "PATIENCE_S", 0.0)
    server.wait(0)
    assert server.viewers == []


def greeted(board: Board, clock: Callable[[], float]) -> tuple[SocketViewer, socket.socket]:
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    viewer = SocketViewer(ours, None, lambda: HELLO)
    theirs.sendall(framed(viewer_hello()))
    viewer.read()
    assert viewer.greeted
    return viewer, theirs


def test_a_slow_viewer_misses_frames_and_nothing_piles_up(monkeypatch: pytest.MonkeyPatch, steps: Steps) -> None:
    """It gets what it was being sent when it fell behind, then the newest; the sender never waits."""
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    board = Board(steps.text)
    viewer, theirs = greeted(board, lambda: now)
    most = 0
    for _ in range(50):
        now += 1.0
        viewer._moved_s = now
        board.show(steps.step())
        viewer.serve(board)
        most = max(most, len(viewer._out))
    assert viewer.waiting
    assert most <= len(board.packed(True)) + 4
    found: list[Message] = []
    theirs.setblocking(False)
    unframer = Unframer()
    while board.number not in [message.get("number") for message in found]:
        found += unframer.feed(theirs.recv(1 << 20))
        now += 1.0
        viewer.flush()
        viewer.serve(board)
    numbers = [message["number"] for message in found if message["kind"] == "frame"]
    assert numbers == [1, 50] or len(numbers) < 5
    assert numbers[-1] == 50


def test_a_viewer_that_reads_nothing_is_dropped(monkeypatch: pytest.MonkeyPatch, steps: Steps) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    board = Board(steps.text)
    viewer, _theirs = greeted(board, lambda: now)
    for _ in range(4):
        board.show(steps.step())
        viewer.serve(board)
        now += 1.0
    assert not viewer.is_dead
    now += viewers.PATIENCE_S + 1
    assert viewer.is_dead


def test_frames_come_at_the_rate_asked_for_with_or_without_picks(monkeypatch: pytest.MonkeyPatch, steps: Steps) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    board = Board(steps.text)
    ours, theirs = socket.socketpair()
    viewer = SocketViewer(ours, None, lambda: HELLO)
    theirs.sendall(framed(viewer_hello()) + framed({"kind": "ask", "rate_hz": 2, "picks": False}))
    viewer.read()
    for _ in range(40):  # two seconds
        board.show(steps.step())
        viewer.serve(board)
        now += 0.05
    frames = [read_frame(message) for message in heard(theirs) if message["kind"] == "frame"]
    assert 4 <= len(frames) <= 5
    assert all(layer.picks is None for frame in frames for layer in frame.layers)
    assert "picks" in unpack(board.packed(True))


def test_attaching_to_what_is_no_kcache(sockets: Path) -> None:
    sockets.mkdir(mode=0o700)
    door = socket.socket(socket.AF_UNIX)
    door.bind(str(sockets / "1.sock"))
    door.listen()
    with pytest.raises(WatchError, match="cannot reach"):
        attach(Place(sockets / "2.sock"))
    client, server = socket.socketpair()
    server.close()
    client.close()
    door.close()
    with pytest.raises(WatchError, match="cannot reach"):
        attach(Place(sockets / "1.sock"))


@pytest.mark.parametrize("length", [2**32 - 1, 40 * 2**20])
def test_a_message_announced_too_long_is_refused_at_once(length: int) -> None:
    with pytest.raises(FormatError, match="at most"):
        list(Unframer().feed(length.to_bytes(4, "big")))


def test_messages_arrive_in_any_pieces() -> None:
    data = framed({"a": 1}) + framed({"b": [1, 2]})
    for size in (1, 3, len(data)):
        unframer, found = Unframer(), []
        for at in range(0, len(data), size):
            found += unframer.feed(data[at : at + size])
        assert found == [{"a": 1}, {"b": [1, 2]}]


def test_info_comes_as_it_was_sent() -> None:
    from kcache.watch.columns import read_info

    assert read_info(unpack(pack(HELLO))["info"]) == Info(7, "test", "tiny", 0.0, "CPU", True, 1)
