# SPDX-License-Identifier: MIT
"""Tests of streamproxy: raw bytes in, raw bytes out.

A test plays upstream and client itself, mostly in one thread: what upstream sends after a piece
was read cannot have carried it, so order needs no clock.  A deadline only turns what never comes
into a failure.  Programs that a test needs beyond Python skip it where they are missing, or, with
TEST_REQUIRE_ALL=1, fail it.
"""

from __future__ import annotations

import ast
import asyncio
import base64
import builtins
import collections
import concurrent.futures
import contextlib
import dataclasses
import errno
import functools
import gc
import http.client
import itertools
import json
import logging
import os
import queue
import random
import re
import select
import selectors
import shlex
import shutil
import signal
import socket
import ssl
import string
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import unittest.mock
import urllib.parse
import weakref
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

import streamproxy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Self

HERE = Path(__file__).resolve().parent
PROGRAM = HERE / "streamproxy.py"
README = HERE / "README.md"
resource: Any = pytest.importorskip("resource") if os.name == "posix" else None
DEADLINE = 20.0  # seconds until what should have happened is called missing
ORDERS = int(os.environ.get("TEST_ORDERS", "500"))  # of all that may happen, that are played; garbage is in proportion
KEY = "sk-Qk7vNw3zTt9pXb2e"  # in no output of any test: see no_key_anywhere


def program(*names: str) -> str:
    """The path of the first of names that is installed; else the test skips, or fails where all is required."""
    path = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/usr/local/sbin"
    for name in names:
        found = shutil.which(name, path=path)
        if found:
            return found
    return missing(f"{names[0]} is not installed")


def missing(reason: str) -> Any:
    (pytest.fail if os.environ.get("TEST_REQUIRE_ALL") else pytest.skip)(reason)


def without_proxies() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}


def sdk_python(names: str) -> str:
    """The Python that has what pip installs for tests, names among it."""
    python = os.environ.get("TEST_SDKS")
    return python or str(missing(f"TEST_SDKS names no Python that has {names}"))


class SdkScripts:
    """The Python of the SDKs, which runs one script after another, so that it imports them once."""

    LOOP = """
import contextlib, io, json, sys, traceback
for line in sys.stdin:
    script, *sys.argv[1:] = json.loads(line)
    fault = ""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            exec(script, {"__name__": "__main__"})
        except BaseException:
            fault = traceback.format_exc()
    print(json.dumps([said.getvalue(), fault]), flush=True)
"""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sdk_python("openai and anthropic"), "-c", self.LOOP], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=without_proxies(), text=True,
        )  # fmt: skip

    def run(self, script: str, *args: str) -> str:
        """What a script prints."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps([script, *args]) + "\n")
        self.process.stdin.flush()
        assert select.select([self.process.stdout], [], [], 120)[0], "the script does not end"
        said, fault = json.loads(self.process.stdout.readline())
        assert not fault, fault
        return str(said)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="session")
def sdk_scripts() -> Iterator[SdkScripts]:
    with contextlib.closing(SdkScripts()) as scripts:
        yield scripts


@pytest.fixture(autouse=True)
def no_key_anywhere(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """No part of the key of 8 characters is in what the test logged or printed (nor in what Client reads)."""
    caplog.set_level(logging.DEBUG, logger="streamproxy")
    yield
    while Peer.opened:
        Peer.opened.pop().close()
    check_no_key(caplog.text + "".join(capfd.readouterr()))


@pytest.fixture(scope="session", autouse=True)
def log_at_once() -> Iterator[None]:
    """What a test waits for in the log need not wait for more to be written with it."""
    with unittest.mock.patch.object(streamproxy, "LOG_PAUSE", 0.001):
        yield


def check_no_key(text: str) -> None:
    assert not [KEY[at : at + 8] for at in range(len(KEY) - 7) if KEY[at : at + 8] in text]


# ---------------------------------------------------------------- upstream and client, played by hand


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


class Peer:
    """One end of a connection, closed after the test if not before."""

    opened: ClassVar[list[socket.socket]] = []

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.opened.append(sock)
        self.sock.settimeout(DEADLINE)
        if sock.family in (socket.AF_INET, socket.AF_INET6):  # what is sent piece by piece waits for no acknowledgement
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.seen = b""  # read, not yet taken

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def send(self, *data: bytes) -> None:
        self.sock.sendall(b"".join(data))

    def more(self) -> bool:
        """Read once; False at the end of the connection."""
        data = self.sock.recv(65536)
        self.seen += data
        return bool(data)

    def until(self, mark: bytes) -> bytes:
        """Take what comes up to and with mark."""
        while mark not in self.seen:
            assert self.more(), f"ended before {mark!r}: {self.seen!r}"
        taken, _, self.seen = self.seen.partition(mark)
        return taken + mark

    def exactly(self, size: int) -> bytes:
        while len(self.seen) < size:
            assert self.more(), f"ended within {size} bytes: {self.seen!r}"
        taken, self.seen = self.seen[:size], self.seen[size:]
        return taken

    def rest(self) -> bytes:
        """Take all until the end of the connection; a reset is an error."""
        while self.more():
            pass
        taken, self.seen = self.seen, b""
        return taken

    def gone(self) -> bool:
        """Wait until the other side has closed the connection."""
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            while self.sock.recv(65536):
                pass
        return True

    def reset(self) -> None:
        reset(self.sock)


@dataclasses.dataclass
class Head:
    line: bytes
    fields: dict[str, str]

    @property
    def status(self) -> int:
        return int(self.line.split()[1])


class Client(Peer):
    """Whoever asks the proxy."""

    def __init__(self, server: Any, timeout: float = DEADLINE) -> None:
        sock: socket.socket
        if isinstance(server, socket.socket):
            sock = server
        elif server.url.startswith("unix:"):
            sock = socket.socket(socket.AF_UNIX)
            try:
                sock.connect(server.url[5:])
            except OSError:
                sock.close()
                raise
        else:
            url = urllib.parse.urlsplit(server.url)
            sock = socket.create_connection((url.hostname, url.port), timeout)
        super().__init__(sock)

    def more(self) -> bool:
        more = super().more()
        check_no_key(self.seen.decode("latin-1"))
        return more

    def ask(
        self, body: object = None, method: str = "POST", path: str = "/", version: str = "1.1", **fields: str
    ) -> Client:
        """Send a request; fields are header fields with _ for -."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode() if body is not None else b""
        lines = [f"{method} {path} HTTP/{version}", "Host: localhost"]
        lines += [f"Content-Length: {len(data)}"] if body is not None else []
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in fields.items()]
        self.send("\r\n".join([*lines, "", ""]).encode(), data)
        return self

    def head(self) -> Head:
        line, *fields = self.until(b"\r\n\r\n")[:-4].split(b"\r\n")
        return Head(line, dict(field.decode("latin-1").split(": ", 1) for field in fields))

    def chunk(self) -> bytes:
        data = self.exactly(int(self.until(b"\r\n"), 16) + 2)
        assert data.endswith(b"\r\n")
        return data[:-2]

    def body(self) -> bytes:
        """The data of all chunks up to the last, which must come."""
        return b"".join(iter(self.chunk, b""))

    def error(self) -> tuple[int, str]:
        """The status and sentence of an error answer."""
        head = self.head()
        assert head.fields["Content-Type"] == "application/json"
        payload = json.loads(self.exactly(int(head.fields["Content-Length"])))
        assert list(payload) == ["error"]
        return head.status, payload["error"]


class Provider:
    """A listening upstream whose connections a test takes one by one."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        self.listener = socket.create_server((host, 0), backlog=512)
        self.listener.settimeout(DEADLINE)
        self.url = f"http://{host}:{self.listener.getsockname()[1]}/v1"

    def take(self) -> UpstreamPeer:
        """The next connection, its request read."""
        return UpstreamPeer(self.listener.accept()[0])

    def nobody_came(self) -> bool:
        self.listener.settimeout(0)
        try:
            self.listener.accept()
        except BlockingIOError:
            return True
        return False


class UpstreamPeer(Peer):
    """Upstream's end of a connection."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self.read_request()

    def read_request(self) -> None:
        self.head = self.until(b"\r\n\r\n").decode()
        length = re.search(r"(?i)\r\ncontent-length: ([0-9]+)\r\n", self.head)
        self.body = self.exactly(int(length[1]) if length else 0)

    def start(self, *events: bytes) -> None:
        self.send(STREAM_HEAD, *map(chunk, events))

    def event(self, *events: bytes) -> None:
        self.send(*map(chunk, events))

    def finish(self) -> None:
        self.send(chunk(STOP), chunk(DONE), b"0\r\n\r\n")


STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
CLOSE_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(payload: object) -> bytes:
    return b"data: " + (payload if isinstance(payload, bytes) else json.dumps(payload).encode()) + b"\n\n"


def delta(text: object, finish_reason: str | None = None, **more: object) -> bytes:
    return event({"choices": [{"index": 0, "delta": {"content": text, **more}, "finish_reason": finish_reason}]})


ROLE = event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
STOP = event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
DONE = event(b"[DONE]")


@contextlib.contextmanager
def running(provider: Provider | None, **settings: Any) -> Iterator[streamproxy.Server]:
    """A server in front of provider, stopped at the end whatever is still open."""
    given = {
        "bind": "127.0.0.1:0", "api_key": KEY, "drain_timeout": 0.0, "upstream": "http://127.0.0.1:9",
        "access_log": "all", **settings,
    }  # fmt: skip
    if provider and "upstream" not in settings:
        given["upstream"] = provider.url
    server = streamproxy.Server(streamproxy.Settings(**given))
    server.start()
    try:
        yield server
    finally:
        if not server.draining:
            server.stop()


def elapse(server: streamproxy.Server, seconds: float) -> None:
    """Have the server's clock be so much later, at once."""
    loop = server.hub.loop

    def advance() -> None:
        before = loop.clock
        loop.clock = lambda: before() + seconds

    loop.post(advance)


@pytest.fixture
def provider() -> Iterator[Provider]:
    provider = Provider()
    yield provider
    provider.listener.close()


@pytest.fixture
def server(provider: Provider) -> Iterator[streamproxy.Server]:
    with running(provider) as server:
        yield server


PROMPT = {"prompt": "Say hello"}
EVENTS = {"Accept": "text/event-stream"}


def log_entries(caplog: pytest.LogCaptureFixture, count: int) -> list[streamproxy.LogEntry]:
    """The lines that requests left in the log, once there are count of them."""
    return wait_for(lambda: [r.msg for r in caplog.records if r.levelno == logging.INFO and isinstance(r.msg, dict)],
                    lambda entries: len(entries) >= count)


def caught_up(server: streamproxy.Server) -> None:
    """Wait until the server has seen all that came before."""
    with Client(server).ask(method="GET", path="/healthz", Connection="close") as client:
        assert client.head().status == 200 and client.rest() == b"ok\n"


def wait_for(look: Any, good: Any = bool) -> Any:
    deadline = time.monotonic() + DEADLINE
    while not good(seen := look()):
        assert time.monotonic() < deadline, f"still {seen!r}"
        time.sleep(0.005)
    return seen


def cuts(data: bytes) -> Iterator[list[bytes]]:
    """data whole, byte by byte, with empty reads between, and cut in two at every position."""
    yield [data]
    yield [data[at : at + 1] for at in range(len(data))]
    yield [part for at in range(len(data)) for part in (b"", data[at : at + 1])]
    yield from ([data[:at], data[at:]] for at in range(1, len(data)))


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets variables; those of proxies and CGI are gone."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "REQUEST_METHOD"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)

    def set_variables(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_variables


# ---------------------------------------------------------------- what several sections use

SCRIPT = {
    "max_tokens": 400,
    "temperature": 0.5,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "reasoning_effort": "none",
}


class Jobs(collections.deque):  # type: ignore[type-arg]
    """In the place of Workers: what threads are given to do, done when the test says."""

    def __init__(self, *_: object) -> None:
        super().__init__()

    def run(self, job: Callable[[], object]) -> None:
        self.append(job)

    def close(self, timeout: float) -> None:
        while self:
            self.popleft()()


class Lines:
    """In the place of LogWriter: what was logged, and at once."""

    def __init__(self) -> None:
        self.requests: list[streamproxy.LogEntry] = []
        self.errors: list[str] = []
        self.error = self.errors.append
        self.steps: list[streamproxy.LogEntry] = []
        self.debug = self.steps.append
        self.dropped = 0

    def start(self) -> None:
        pass

    def info(self, line: object) -> None:
        if isinstance(line, streamproxy.LogEntry):
            self.requests.append(line)

    def close(self, timeout: float) -> None:
        pass


class Still:
    """A hub whose loop stands still until the test turns it; the test is threads, upstream and clock, too."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.upstreams: list[Peer] = []

    def replaced(self) -> Any:
        """While this is entered, what is made has no thread."""
        return unittest.mock.patch.multiple(streamproxy, Workers=Jobs, LogWriter=Lines)

    def hold(self, hub: streamproxy.Hub) -> None:
        self.hub, self.jobs, self.lines = hub, hub.workers, hub.log
        hub.loop.clock = lambda: self.now
        hub.loop.now = self.now

    def turn(self, count: int = 1) -> None:
        for _ in range(count):
            self.hub.loop.turn(0)

    def at(self, seconds: float) -> None:
        """Turn with the clock at seconds."""
        self.now = 1000.0 + seconds
        self.turn()

    def dialed(self, connection: Any) -> None:
        """Have the oldest dial end, with a connection or an error."""
        def dial(lifeline: streamproxy.Lifeline) -> streamproxy.Connection:
            if isinstance(connection, Exception):
                raise connection
            return connection  # type: ignore[no-any-return]
        with unittest.mock.patch.object(self.hub.upstream, "dial", dial):
            self.jobs.popleft()()
        self.turn()

    def connect(self) -> Peer:
        """Have the oldest dial end with a connection, and the request on it."""
        near, far = socket.socketpair()
        near.setblocking(False)
        self.upstreams.append(Peer(far))
        self.dialed(streamproxy.Connection(near, self.hub.upstream.target.key))
        return self.upstreams[-1]

    def close(self) -> None:
        for peer in self.upstreams:
            peer.sock.close()
        self.hub.pool.close()
        self.hub.loop.close()


class Reader(streamproxy.Peer):
    """Who asked for the stage's stream, as an exchange and its client are."""

    def __init__(self, sock: socket.socket, loop: streamproxy.Loop) -> None:
        super().__init__(sock, loop)
        self.client, self.blocked_at = self, []
        self.over = 0
        self.faults: list[Exception] = []

    def begin_stream(self) -> tuple[bytes, bool]:
        self.stream.head()
        return b"HEAD ", True

    def tell(self, step: str, **facts: object) -> None:
        self.stream.hub.tell("", step, facts)

    def on_blocked(self) -> None:
        self.blocked_at.append(self.loop.now)

    def on_drained(self) -> None:
        self.stream.on_drained()

    def on_lost(self) -> None:
        self.stream.drop(streamproxy.Disconnected("The client left."))

    def on_stream_over(self) -> None:
        self.over += 1

    def on_fault(self, error: Exception) -> None:
        self.faults.append(error)
        self.stream.fail(streamproxy.internal_error(error))


class Stage(Still):
    """A stream between two socket pairs, moved turn by turn."""

    def __init__(self, answer: Any = None, head: bytes = STREAM_HEAD, **settings: Any) -> None:
        super().__init__()
        with self.replaced():
            self.hold(streamproxy.Hub(streamproxy.Settings(api_key=KEY, **settings)))
        near, far = socket.socketpair()
        near.setblocking(False)
        self.client = Peer(far)
        self.reader = Reader(near, self.hub.loop)
        call = streamproxy.prompt_call(streamproxy.Adapted(PROMPT, self.hub.settings, streamproxy.Refusals()))
        self.stream = self.reader.stream = self.hub.stream(call, answer or streamproxy.TextAnswer(), self.reader)
        self.head = head
        self.stream.ask()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.drop(streamproxy.Aborted("The test is over."))
        assert self.reader.over == 1  # told, and once
        self.reader.close()
        self.client.sock.close()
        self.close()

    @property
    def ended(self) -> bool:
        return self.stream.over

    def begin(self) -> None:
        """Upstream has been asked, and has sent its head."""
        self.upstream = self.connect()
        assert self.upstream.until(b"\r\n\r\n").startswith(b"POST /v1/chat/completions HTTP/1.1\r\n")
        self.upstream.send(self.head)
        self.turn()

    def block(self) -> None:
        """Send until the client, which does not read, takes no more."""
        while not self.stream.viewer.blocked:
            self.upstream.send(chunk(delta("x" * 30000)))
            self.turn()

    def unblock(self) -> None:
        """Read until it does."""
        while self.stream.viewer.blocked:
            self.client.more()
            self.turn()

    def seen(self, seconds: float | None = None) -> bytes:
        """Turn with the clock at seconds, if given; what the client then has."""
        self.now = self.now if seconds is None else 1000.0 + seconds
        self.turn()
        self.client.sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            self.client.more()
        self.client.sock.settimeout(DEADLINE)
        taken, self.client.seen = self.client.seen, b""
        return taken


def keep_warm(stage: Still) -> Peer:
    """A connection that is between two requests; upstream's end of it."""
    near, far = socket.socketpair()
    near.setblocking(False)
    connection = streamproxy.Connection(near, stage.hub.upstream.target.key)
    connection.opened_at = stage.now
    stage.hub.pool.settle(connection, streamproxy.BodyDecoder(0))
    stage.upstreams.append(Peer(far))
    return stage.upstreams[-1]


H = b"Host: localhost\r\n"


def token_file(folder: Path, text: str, mode: int = 0o640) -> str:
    path = folder / "tokens"
    path.write_text(text)
    path.chmod(mode)
    return str(path)


ALICE, BOB = "alice-5f1c9e7a", "bob-0c4d8b21"


class StillServer(Still):
    """A server whose loop stands still until the test turns it."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        given = {"bind": "127.0.0.1:0", "upstream": "http://upstream.example/v1", "access_log": "all", **settings}
        with self.replaced():
            self.server = streamproxy.Server(streamproxy.Settings(api_key=KEY, **given))
        self.hold(self.server.hub)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.server._close_clients()  # and what is kept for them
        self.turn()
        self.close()
        self.server.stop()
        self.server.server_close()  # a server that was draining leaves that to whoever stops it

    def client(self, comes_back: bool = False) -> Client:
        """One that has connected; comes_back: where nothing is begun."""
        near, far = socket.socketpair()
        near.setblocking(False)
        streamproxy.Client(near, ("127.0.0.1", 0), self.server.doors[-1 if comes_back else 0])
        return Client(far)

    def silent(self, client: Client) -> bool:
        """Whether the client has been sent nothing, and is still connected."""
        client.sock.setblocking(False)
        try:
            client.sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        finally:
            client.sock.settimeout(DEADLINE)
        return False


@pytest.fixture
def no_thread(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """What keeps threads from being started while it is entered."""
    def fail(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    @contextlib.contextmanager
    def patched() -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", fail)
            yield

    return patched


OK = b"HTTP/1.1 200 OK\r\n"
SSE = b"Content-Type: text/event-stream\r\n"
JSON = b"Content-Type: application/json\r\n"
A = delta("a")


def error_answer(status: int, body: bytes = b"", fields: bytes = b"") -> bytes:
    return b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n%b\r\n" % (status, len(body), fields) + body


ASKED = {"model": "gpt-6-luna", "messages": [{"role": "user", "content": "Say hello"}], "stream": True}
API_PATHS = ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings", "/v1/messages"]


def api_error(client: Client) -> tuple[int, str, str]:
    """The status, message and code of an error answer of the API's shape."""
    head = client.head()
    payload = json.loads(client.exactly(int(head.fields["Content-Length"])))
    assert set(payload) - {"type"} == {"error"} and list(payload["error"]) == ["message", "type", "param", "code"]
    return head.status, payload["error"]["message"], payload["error"]["code"]


def idle(server: streamproxy.Server) -> int:
    return server.snapshot()["warm connections"]


def leave(client: Client, how: str) -> None:
    if how == "half":
        client.sock.shutdown(socket.SHUT_WR)
    else:
        (client.reset if how == "reset" else client.sock.close)()


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificate(
        tmp_path_factory.mktemp("tls"), "DNS:localhost,DNS:api.example,DNS:proxy.example,IP:127.0.0.1,IP:::1"
    )


def make_certificate(folder: Path, names: str) -> Path:
    """A key and a certificate for names in one file."""
    command = [
        program("openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj",
        "/CN=test",
    ]
    files = ["-addext", f"subjectAltName={names}", "-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    subprocess.run([*command, *files], check=True, stderr=subprocess.DEVNULL)
    (folder / "both.pem").write_bytes((folder / "key.pem").read_bytes() + (folder / "cert.pem").read_bytes())
    return folder / "both.pem"


def take_tls(provider: Provider, certificate: Path) -> UpstreamPeer:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(str(certificate))
    return UpstreamPeer(context.wrap_socket(provider.listener.accept()[0], server_side=True))


def tls_url(provider: Provider) -> str:
    return provider.url.replace("http:", "https:")


# Requests that are refused before their body, which never comes.
NEVER_COMING = {
    "404": b"POST /nothing HTTP/1.1\r\n" + H + b"Content-Length: 50000\r\n\r\n",
    "405": b"PUT / HTTP/1.1\r\n" + H + b"Content-Length: 50000\r\n\r\n",
    "403": b"POST / HTTP/1.1\r\n" + H + b"Origin: http://other.example\r\nContent-Length: 50000\r\n\r\n",
    "413": b"POST / HTTP/1.1\r\n" + H + b"Content-Length: 50000000\r\n\r\n",
    "408": b"POST / HTTP/1.1\r\n" + H + b"Content-Length: 50000\r\n\r\n{",
    "400": b"POST / HTTP/1.1\r\n" + H + b"Transfer-Encoding: chunked\r\n\r\nx\r\n",
}


def drip(client: Client, data: bytes, size: int) -> None:
    """Send without a look at what comes, as a client does that reads once all is sent."""
    for at in range(0, len(data), size):
        client.send(data[at : at + size])


def descriptors_now() -> int:
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


def run_with(**constants: object) -> str:
    """Code that runs the program, with other values for its constants; imported, it need not be compiled each time."""
    lines = [f"streamproxy.{name} = {value!r}" for name, value in constants.items()]
    return "; ".join(["import streamproxy", *lines, "streamproxy.run_script()"])


RUN = run_with()


@contextlib.contextmanager
def launched(*flags: str, code: str = "", **environ: str) -> Iterator[tuple[Any, streamproxy.Server]]:
    """The program in a process of its own, or code that runs it, and something with its url."""
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code or RUN, "--bind", "127.0.0.1:0", *flags],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=HERE, env={**os.environ, "OPENAI_API_KEY": KEY, **environ},
        text=True,
    )  # fmt: skip
    try:
        line = process.stdout.readline()  # type: ignore[union-attr]
        found = re.fullmatch(r"streamproxy \S+ on (http://127\.0\.0\.1:\d+)\n", line)
        assert found, (line, process.stderr and process.stderr.read())
        yield process, Front(found[1])  # type: ignore[misc]
    finally:
        process.kill()
        out, err = process.communicate()
        check_no_key(out + err)
        assert "Traceback" not in err and "Warning" not in err, err


@dataclasses.dataclass
class Front:
    """Whatever stands before the proxy and takes its requests."""

    url: str


def run(*flags: str, code: str = "", **environ: str) -> tuple[int, str, str]:
    """Exit status, output and errors of the program, or of code that runs it."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OPENAI_", "STREAMPROXY_"))}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code or RUN, *flags], capture_output=True,
        cwd=HERE, env={**clean, **environ}, text=True, check=False, timeout=DEADLINE,
    )  # fmt: skip
    check_no_key(done.stdout + done.stderr)
    return done.returncode, done.stdout, done.stderr


def refused(front: Any) -> bool:
    """Whether nobody listens there; not where nobody answers, as in the moment before that."""
    try:
        Client(front, 0.05).sock.close()
    except socket.timeout:
        return False
    except OSError:
        return True
    return False


def free_port() -> int:
    """A port for a server that is told its number: none of those that the system gives to connections meanwhile."""
    while True:
        port = random.randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


# 1, 2 ------------------------------------------------------------------ The module, its limits and errors


def test_import_does_nothing() -> None:
    code = (
        "import logging, os, sys, threading; before = set(os.environ), os.listdir('/proc/self/fd') if "
        "os.path.isdir('/proc/self/fd') else 0\n"
        "import streamproxy\n"
        "assert threading.active_count() == 1 and not logging.getLogger('streamproxy').handlers and not "
        "logging.root.handlers\n"
        "assert before == (set(os.environ), os.listdir('/proc/self/fd') if os.path.isdir('/proc/self/fd') else 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-W", "error", "-c", f"import sys; sys.path.insert(0, {str(HERE)!r})\n{code}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.skipif(sys.version_info < (3, 10), reason="sys.stdlib_module_names came with 3.10")
def test_module_imports_the_standard_library_alone() -> None:
    nodes = list(ast.walk(ast.parse(PROGRAM.read_text(encoding="utf-8"))))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} <= sys.stdlib_module_names


def test_module_tells_the_sections_of_what_it_names() -> None:
    source = PROGRAM.read_text(encoding="utf-8")
    _, *parts = re.split(r"(?m)^# ([0-9]+) -{5,} .+$", source)
    sections = dict(zip(parts[::2], parts[1::2]))
    assert list(sections) == [str(number) for number in range(1, len(sections) + 1)]
    named = re.findall(r"(?m)^    ([0-9]+)  (\w+) ", str(streamproxy.__doc__))
    assert len(named) > 5
    for number, name in named:
        if hasattr(streamproxy, name):
            assert f"\nclass {name}" in sections[number], name


def test_module_is_made_of_small_parts() -> None:
    for node in ast.walk(ast.parse(PROGRAM.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            assert int(node.end_lineno or 0) - node.lineno < 40, node.name
        if isinstance(node, ast.ClassDef):
            stored = re.findall(r"Name\(id='self', ctx=Load\(\)\), attr='(\w+)', ctx=Store", ast.dump(node))
            assert len(set(stored)) <= 15, node.name


@pytest.mark.parametrize(("name", "says"), [
    ("__main__", "SystemExit: streamproxy needs Python 3.9 or later"),
    ("streamproxy", "ImportError: streamproxy needs Python 3.9 or later"),
])
def test_module_says_that_python_is_too_old(name: str, says: str) -> None:
    tree = ast.parse(PROGRAM.read_text(encoding="utf-8"), feature_version=(3, 8))  # which it has to read, to say so
    code = compile(ast.Module(tree.body, []), "streamproxy.py", "exec")
    with unittest.mock.patch.object(sys, "version_info", (3, 8, 20)), pytest.raises(BaseException) as raised:
        exec(code, {"__name__": name})  # noqa: S102
    assert f"{raised.type.__name__}: {raised.value}" == says


def test_module_says_its_licence_and_runs_by_itself() -> None:
    lines = PROGRAM.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "#!/usr/bin/env python3" and lines[1] == "# SPDX-License-Identifier: MIT"
    assert os.access(PROGRAM, os.X_OK)


# 1 -------------------------------------------------------------------- Limits


def test_memo_works_a_value_out_once_and_keeps_a_bounded_number_and_nothing_of_what_is_long() -> None:
    asked: list[object] = []
    memo = streamproxy.Memo(lambda key: (asked.append(key), str(key) * 2)[1], 3)
    long = "b" * (streamproxy.MAX_MEMO_KEY + 1)
    for key in ("a", 7, "a", 7, b"c"):
        assert memo[key] == str(key) * 2
    assert asked == ["a", 7, b"c"] and memo[long] == long * 2 and len(memo) == 3
    assert memo["d"] == "dd" and list(memo) == ["d"]
    failing = streamproxy.Memo(int, 3)
    with pytest.raises(ValueError, match="invalid literal"):
        failing["x"]
    assert not failing


# 4 -------------------------------------------------------------------- Event streams: WHATWG HTML section 9.2


def message(data: str, type: str = "message", last_event_id: str = "") -> streamproxy.Event:
    return streamproxy.Event(type, data, last_event_id)


EVENT_STREAMS = {
    # The examples of section 9.2.6, verbatim.
    "spec: stock ticker": (b"data: YHOO\ndata: +2\ndata: 10\n\n", [message("YHOO\n+2\n10")]),
    "spec: comment, id, id reset, leading space": (
        b": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third event\n\n",
        [message("first event", last_event_id="1"), message("second event"), message(" third event")],
    ),
    "spec: empty data": (b"data\n\ndata\ndata\n\ndata:\n\n", [message(""), message("\n"), message("")]),
    "spec: one space is removed": (b"data:test\n\ndata: test\n\n", [message("test"), message("test")]),
    # The rules.
    "LF": (b"data: a\n\n", [message("a")]),
    "CRLF": (b"data: a\r\n\r\n", [message("a")]),
    "CR": (b"data: a\r\r", [message("a")]),
    "mixed line ends": (b"data: a\rdata: b\ndata: c\r\n\ndata: d\n\r", [message("a\nb\nc"), message("d")]),
    "CRLF is one line end": (b"data: a\r\ndata: b\r\n\r\n", [message("a\nb")]),
    "BOM": (b"\xef\xbb\xbfdata: a\n\n", [message("a")]),
    "only one BOM": (b"\xef\xbb\xbf\xef\xbb\xbfdata: a\n\ndata: b\n\n", [message("b")]),
    "BOM later is part of a name": (b"data: a\n\n\xef\xbb\xbfdata: b\n\n", [message("a")]),
    "event type": (b"event: ping\ndata: a\n\ndata: b\n\n", [message("a", "ping"), message("b")]),
    "event type without data is dropped": (b"event: ping\n\ndata: b\n\n", [message("b")]),
    "last event type counts": (b"event: x\nevent: y\ndata: a\n\n", [message("a", "y")]),
    "empty event type": (b"event\ndata: a\n\n", [message("a")]),
    "id lasts": (b"id: 7\ndata: a\n\ndata: b\n\n", [message("a", last_event_id="7"), message("b", last_event_id="7")]),
    "id with NUL is ignored": (b"id: 7\0\ndata: a\n\n", [message("a")]),
    "id alone is no event": (b"id: 7\n\ndata: a\n\n", [message("a", last_event_id="7")]),
    "comments": (b":\n: x\n:data: no\ndata: a\n\n", [message("a")]),
    "unknown fields": (b"foo: 1\nData: 2\n data: 3\ndata : 4\ndata: a\n\n", [message("a")]),
    "colon in value": (b"data: a: b\n\n", [message("a: b")]),
    "blank lines": (b"\n\n\n\r\n\rdata: a\n\n\n\n", [message("a")]),
    "data: within data": (b"data: data: a\n\n", [message("data: a")]),
    "UTF-8": ("data: ä€👋\n\n".encode(), [message("ä€👋")]),
    "broken UTF-8": (b"data: \xf0\x9f\x91 \xff\n\n", [message("\ufffd \ufffd")]),
    "other line separators are text": (
        "data: a\x0b\x0c\x1c\x85\u2028b\n\n".encode(), [message("a\x0b\x0c\x1c\x85\u2028b")],
    ),
    "the end drops nothing whole": (b"data: a\n\ndata: b", [message("a")]),
}


@pytest.mark.parametrize("name", EVENT_STREAMS)
def test_parser_whole_bytewise_and_cut_everywhere(name: str) -> None:
    data, expected = EVENT_STREAMS[name]
    for parts in cuts(data):
        parser = streamproxy.EventParser()
        assert [event for part in parts for event in parser.feed(part)] == expected, parts


def test_parser_event_comes_with_its_blank_line_not_later() -> None:
    for end in (b"\n\n", b"\r\r", b"\r\n\r"):  # the LF of the last CRLF may come when it likes
        parser = streamproxy.EventParser()
        assert parser.feed(b"data: a" + end[:-1]) == []
        assert parser.feed(end[-1:]) == [message("a")]
        assert parser.feed(b"\ndata: b\n\n") == [message("b")]


def test_parser_cut_at_three_places_at_random() -> None:
    rng = random.Random(9)
    stream = b"".join(data for data, _ in EVENT_STREAMS.values() if data.endswith(b"\n\n"))
    expected = streamproxy.EventParser().feed(stream)
    for _ in range(300):
        a, b, c = sorted(rng.randrange(len(stream)) for _ in range(3))
        parser = streamproxy.EventParser()
        parts = (stream[:a], stream[a:b], stream[b:c], stream[c:])
        assert [event for part in parts for event in parser.feed(part)] == expected


@pytest.mark.parametrize("data", [b"data: a", b"data: a\n", b"data: a\r", b"data: a\r\n"])
def test_parser_close_gives_the_event_without_its_blank_line(data: bytes) -> None:
    for parts in cuts(data):
        parser = streamproxy.EventParser()
        assert [event for part in parts for event in parser.feed(part)] == []
        assert parser.close() == [message("a")]
        assert parser.close() == []


@pytest.mark.parametrize("piece", [b"x" * 10, b"data\n", b"data: xxxx\n", b": x\ndata: " + b"y" * 90 + b"\n"])
def test_parser_event_that_never_ends_is_refused(piece: bytes) -> None:
    parser = streamproxy.EventParser(max_event_size=1000)
    with pytest.raises(streamproxy.UpstreamError, match="over 1000 bytes"):
        for _ in range(1000):
            assert parser.feed(piece) == []


def test_parser_limit_is_for_one_event_not_for_the_stream() -> None:
    parser = streamproxy.EventParser(max_event_size=100)
    for _ in range(100):
        assert parser.feed(b": comment\n\ndata: " + b"x" * 90 + b"\n\n") == [message("x" * 90)]


STRAYS = {
    "field": (b"error: x\n\n", [message("x", "error")]),
    "field behind data": (b"data: a\nerror: x\n\n", [message("a\nx", "error")]),
    "bare lines": (b'{"a":\n1}\n\n', [message('{"a":\n1}', "")]),
    "no field": (b"x: y\n\ndata: a\n\n", [message("x: y", ""), message("a")]),
    "before the data of its block": (b"data: [DONE]\n{}\n\n", [message("{}", ""), message("[DONE]")]),
    "event without data": (b"event: error\n\n", [message("", "error")]),
    "fields of the standard": (b": a\nid: \0\nretry: x\nevent: b\nid\n\n", []),
    "at the end": (b"{}", [message("{}", "")]),
}  # fmt: skip


@pytest.mark.parametrize("name", STRAYS)
def test_parser_gives_what_is_no_field_where_it_is_not_strict(name: str) -> None:
    data, expected = STRAYS[name]
    for parts in cuts(data):
        parser = streamproxy.EventParser(strict=False)
        assert [event for part in parts for event in parser.feed(part)] + parser.close() == expected
    strict = streamproxy.EventParser()
    assert all(event.type in ("message", "b") for event in strict.feed(data) + strict.close())
    with pytest.raises(streamproxy.Garbled):
        for _ in range(100):
            streamproxy.EventParser(max_event_size=100, strict=False).feed(b"{}\n" * 60)


def test_parser_counts_comments_and_blank_lines_as_signs_of_life() -> None:
    parser = streamproxy.EventParser()
    parser.feed(b": a\n\n:\ndata: b\n\nretry: 3\n\n\n")
    assert parser.idle == 5


@pytest.mark.parametrize("stream", [
    b"data: a\n\n: c\n\n", b"data: a\r\n\r\nevent: b\r\ndata: c\r\n\r\n", b"data: a\r\rdata: b\r\r",
    b"\n\n\ndata: a\n\n\n",
])  # fmt: skip
def test_cutter_gives_all_bytes_and_each_event_when_it_is_whole(stream: bytes) -> None:
    for parts in cuts(stream):
        cutter, events = streamproxy.EventCutter(), b""
        for part in parts:
            events += cutter.feed(part)
            assert not cutter.rest or not re.search(rb"\n\n|\n\r\n|\r\r", cutter.rest[:-1])
        assert events + cutter.rest == stream


@pytest.mark.parametrize(("rest", "passes"), [
    (b"event: x\n", True), (b"event: x\r\nid: 3\r\n", True), (b": comm", True), (b"data: {", True),
    (b"data: {\"err", False), (b"event: x\ndata: abc", False),
    (b'{"error": 1', False), (b"error: sk-x", False), (b"d", True),
])  # fmt: skip
def test_cutter_passes_on_what_says_nothing_yet(rest: bytes, passes: bool) -> None:
    cutter = streamproxy.EventCutter()
    assert cutter.feed(rest) == b"" and cutter.pass_on() == (rest if passes else b"")
    assert cutter.passed == (len(rest) if passes else 0)
    if passes:
        assert cutter.feed(b"\n\n" if rest.startswith(b"d") else b"z\n\n") and cutter.pass_on() == b""


@pytest.mark.parametrize("data", ["", "a", "a\nb", "a\r\nb", "a\rb", "\n", "data: x\n\nevent: y", " a", "ä👋"])
def test_encoded_event_parses_back(data: str) -> None:
    encoded = streamproxy.encode_event(data, "kind", "7")
    expected = data.replace("\r\n", "\n").replace("\r", "\n")
    assert streamproxy.EventParser().feed(encoded) == [message(expected, "kind", "7")]


# 6 -------------------------------------------------------------------- Answers: payload in, text out


def answer_to(*events: bytes, answer: Any = None) -> tuple[streamproxy.TextAnswer, bytes]:
    """An answer after events and the end of the body, and all it gave for the client."""
    answer = answer or streamproxy.TextAnswer()
    out = b"".join(answer.feed(data) for data in events)
    out += answer.close(None)
    return answer, out + (answer.end() if answer.state == answer.DONE else b"")


PAYLOADS = {
    "text": ({"choices": [{"delta": {"content": "x"}}]}, b"x"),
    "role with null content": ({"choices": [{"delta": {"role": "assistant", "content": None}}]}, b""),
    "no content": ({"choices": [{"delta": {"role": "assistant"}}]}, b""),
    "no delta": ({"choices": [{"index": 0}]}, b""),
    "null delta": ({"choices": [{"delta": None}]}, b""),
    "no choices": ({"choices": [], "usage": {"total_tokens": 3}}, b""),
    "null choices": ({"choices": None}, b""),
    "choices missing": ({"object": "ping"}, b""),
    "usage beside an empty delta": ({"choices": [{"delta": {}}], "usage": {"total_tokens": 3}}, b""),
    "null error": ({"error": None, "choices": [{"delta": {"content": "x"}}]}, b"x"),
    "finish_reason beside text": ({"choices": [{"delta": {"content": "x"}, "finish_reason": "stop"}]}, b"x"),
    "another index": ({"choices": [{"index": 1, "delta": {"content": "x"}}]}, b"x"),
    "typed parts": ({"choices": [{"delta": {"content": [{"type": "text", "text": "x"}, {"type": "thinking"}]}}]}, b"x"),
    "reasoning": ({"choices": [{"delta": {"reasoning_content": "hm", "content": None}}]}, b""),
    "data: in text": (
        {"choices": [{"delta": {"content": "data: x\n\ndata: [DONE]\n\n"}}]}, b"data: x\n\ndata: [DONE]\n\n",
    ),
}


@pytest.mark.parametrize("name", PAYLOADS)
def test_answer_takes_what_servers_in_wide_use_send(name: str) -> None:
    payload, text = PAYLOADS[name]
    answer, out = answer_to(delta("<"), event(payload), delta(">"), STOP, DONE)
    assert (out, answer.failure, answer.state) == (b"<" + text + b">", None, answer.DONE)


GARBAGE = [
    b"{", b"not json", b"[]", b"3", b'"text"', b'{"choices": 1}', b'{"choices": [1]}', b'{"choices": [{"delta": 1}]}',
    b'{"choices": [{"delta": {"content": true}}]}', b': {"choices": []}', b"[" * 100000,
]


@pytest.mark.parametrize("data", GARBAGE, ids=lambda data: data[:40].decode())
def test_answer_garbage_is_a_failure_and_what_came_before_counts(data: bytes) -> None:
    answer, out = answer_to(delta("a") + event(data) + delta("b") + DONE)
    assert out == b"a"
    assert isinstance(answer.failure, streamproxy.Garbled) and answer.state != answer.DONE


@pytest.mark.parametrize("last", [
    STOP,
    DONE,
    STOP + DONE,
    event(b"[DONE] "),
    STOP + event(b"oops"),
    STOP + event(b"oops") + DONE,
    delta("", "length"),
    DONE[:-1],
    DONE[:-2],
    STOP[:-2],
])
def test_answer_complete_after_done_or_finish_reason_blank_line_or_not(last: bytes) -> None:
    for parts in cuts(delta("a") + last):
        answer, out = answer_to(*parts)
        assert (out, answer.state, answer.failure) == (b"a", answer.DONE, None)


@pytest.mark.parametrize("events", [
    b"",
    delta("a"),
    delta("a") + STOP[:-4],
    b": ping\n\n",
    ROLE,
    event({"choices": []}),
])
def test_answer_without_an_end_is_truncated(events: bytes) -> None:
    answer, _ = answer_to(events)
    assert answer.failure and answer.failure.ending == "truncated" and answer.state != answer.DONE


@pytest.mark.parametrize(("data", "status", "message"), [
    (event({"error": {"message": "Overloaded", "code": "overloaded"}}), 502, "Overloaded"),
    (event({"error": "Overloaded"}), 502, "Overloaded"),
    (event({"error": {"message": "Slow down", "code": 429}}), 429, "Slow down"),
    (event({"error": {"message": "x" * 5000}}), 502, "x" * 1000),
    (event({"error": {"metadata": 1}}), 502, "Upstream reported an error."),
    (b'event: error\ndata: {"message": "Bad"}\n\n', 502, "Bad"),
    (b'event: error\ndata: "Bad"\n\n', 502, "Bad"),
    (event({"error": {"message": "Overloaded"}})[:-2], 502, "Overloaded"),  # no blank line after it
])
@pytest.mark.parametrize("after", [b"", STOP + DONE])
def test_answer_is_never_complete_after_an_error_event(data: bytes, status: int, message: str, after: bytes) -> None:
    after = after if data.endswith(b"\n\n") else b""
    answer, out = answer_to(delta("a", "stop") + data + after)
    assert answer.failure and answer.state != answer.DONE
    assert (out, answer.failure.status, answer.failure.message) == (b"a", status, message)
    assert message not in answer.failure.logged or message == answer.failure.logged


def piece(text: str = "b", noise: str = "x", reason: str | None = None, **more: object) -> dict[str, Any]:
    """The payload of an event as OpenAI sends it, and others without the noise."""
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": reason}
    return {"id": "i", "model": "m", "choices": [choice], **more, **({"obfuscation": noise} if noise else {})}


def as_sent(payload: dict[str, Any], **how: Any) -> bytes:
    return json.dumps(payload, **{"separators": (",", ":"), "ensure_ascii": False, **how}).encode()


def choices(*texts: str, **more: object) -> list[dict[str, Any]]:
    return [{**piece(text)["choices"][0], "index": index, **more} for index, text in enumerate(texts)]


def other(text: str) -> dict[str, Any]:
    return {"x": {"delta": {"content": text}}}


X_USAGE: dict[str, Any] = {"x": {"usage": {"y": 1}}}

# Two events, the second after the first or after the same in another form: what both give, and why they fail.
TWO_EVENTS: dict[str, tuple[dict[str, Any], bytes, str, str]] = {
    "another text": (piece("a"), as_sent(piece()), "ab", ""),
    "another text without noise": (piece("a", ""), as_sent(piece("b", "")), "ab", ""),
    "another noise": (piece("a"), as_sent(piece(noise="longer")), "ab", ""),
    "noise for the first time": (piece("a", ""), as_sent(piece()), "ab", ""),
    "no text": (piece("a"), as_sent(piece("")), "a", ""),
    "Greek": (piece("a"), as_sent(piece("β")), "aβ", ""),
    "a quote": (piece("a"), as_sent(piece('"')), 'a"', ""),
    "an escape": (piece("a"), as_sent(piece("b\n")), "ab\n", ""),
    "an escape in the noise": (piece("a"), as_sent(piece(noise="\n")), "ab", ""),
    "a tab that is not escaped": (piece("a"), as_sent(piece("\t")).replace(b"\\t", b"\t"), "a\t", ""),
    "a line separator": (piece("a"), as_sent(piece("\u2028")), "a\u2028", ""),
    "cut off": (piece("a"), as_sent(piece())[:-1], "a", "not JSON"),
    "cut off behind the noise": (piece("a"), as_sent(piece())[:-2], "a", "not JSON"),
    "cut off in the text": (piece("a"), as_sent(piece()).partition(b'b"')[0], "a", "not JSON"),
    "two run into one": (piece("a"), as_sent(piece())[:60] + as_sent(piece()), "a", "not JSON"),
    "a brace too many": (piece("a"), as_sent(piece()) + b"}", "a", "not JSON"),
    "an error": (piece("a"), as_sent(piece(error={"message": "Bad"})), "a", "Bad"),
    "an error that is none": (piece("a", error=None), as_sent(piece(error=None)), "ab", ""),
    "a failure": (piece("a"), as_sent(piece(reason="error")), "ab", "failed"),
    "an end": (piece("a"), as_sent(piece(reason="stop")), "ab", ""),
    "an end, and another": (piece("a", reason="stop"), as_sent(piece(reason="stop")), "ab", ""),
    "usage": (piece("a"), as_sent(piece(usage={"total_tokens": 3})), "ab", ""),
    "usage each time": (piece("a", usage={"x": 1}), as_sent(piece(usage={"x": 1})), "ab", ""),
    "usage that is null": (piece("a", usage=None), as_sent(piece(usage=None)), "ab", ""),
    "usage elsewhere": (piece("a", usage=None, **X_USAGE), as_sent(piece(usage=None, **X_USAGE)), "ab", ""),
    "another choice": (piece("a"), as_sent(piece(choices=choices("b", "c"))), "abc", ""),
    "two choices": (piece(choices=choices("a", "")), as_sent(piece(choices=choices("b", ""))), "ab", ""),
    "another's end": (
        piece(choices=choices("a") + [{"index": 1, "finish_reason": "stop"}]),
        as_sent(piece(choices=choices("b") + [{"index": 1, "finish_reason": "stop"}])), "ab", ""),
    "an index": (piece(choices=choices("a", index=1)), as_sent(piece(choices=choices("b", index=1))), "ab", ""),
    "a role": (piece(choices=choices("a", role="x")), as_sent(piece(choices=choices("b", role="x"))), "ab", ""),
    "a text elsewhere": ({**other("a"), **piece("a")}, as_sent({**other("b"), **piece("a")}), "aa", ""),
    "a text elsewhere alone": (
        {**other("a"), "choices": [{"text": "a"}]}, as_sent({**other("b"), "choices": [{"text": "a"}]}), "aa", ""),
    "no model": ({"choices": choices("a")}, as_sent({"choices": choices("b")}), "ab", ""),
}  # fmt: skip


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("name", TWO_EVENTS)
def test_answer_is_the_same_whether_an_event_is_parsed_or_known_but_for_its_text(name: str, number: int) -> None:
    first, second, text, words = TWO_EVENTS[name]
    for kind in (streamproxy.TextAnswer, lambda: streamproxy.EventAnswer("id")):
        seen = []
        for blank in ("", " "):  # with blanks, no event is like the first
            answer = kind()
            answer.choices = number
            out = answer.feed(event(as_sent(first, separators=("," + blank, ":" + blank)))) + answer.feed(event(second))
            notes = {name: value for name, value in vars(answer.notes).items() if name != "_redact"}
            seen.append((out, answer.state, answer.life, str(answer.failure), notes))
            if kind is streamproxy.TextAnswer and number == 1:
                assert out.decode() == text and words in str(answer.failure)
        assert seen[0] == seen[1]


def test_answer_parses_no_second_event_that_is_like_the_first_but_for_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    load, parsed = streamproxy.load_event, []
    monkeypatch.setattr(streamproxy, "load_event", lambda event: (parsed.append(event.data), load(event))[1])
    long = "x" * streamproxy._SHORT_JSON
    texts = ["a", "b", "c", "\n", "d", long, "e", "f"]
    answer, out = answer_to(*(event(as_sent(piece(text, noise=str(at)))) for at, text in enumerate(texts)), STOP, DONE)
    assert out.decode() == "".join(texts) and answer.state == answer.DONE
    assert [texts.index(json.loads(data)["choices"][0]["delta"]["content"]) for data in parsed[:-1]] == [0, 3, 5, 6]


def test_answer_fails_with_an_error_event_that_is_like_the_text_before_it() -> None:
    answer, out = answer_to(event(as_sent(piece("a"))), b"event: error\n" + event(as_sent(piece())))
    assert out == b"a" and answer.failure


def test_answer_has_the_usage_that_came_last() -> None:
    first, second = as_sent(piece(usage={"total_tokens": 1})), as_sent(piece("", usage={"total_tokens": 2}))
    answer, _ = answer_to(*map(event, (first, first, second, first)), DONE)
    assert answer.notes.usage == {"total_tokens": 1}


def test_answer_joins_surrogate_pairs_split_over_events() -> None:
    halves = [
        b'{"choices":[{"delta":{"content":"%b"}}]}' % text
        for text in (b"a\\ud83d", b"\\udc4b", b"b\\ud83d", b"c\\udc4b")
    ]
    assert answer_to(*map(event, halves), DONE)[1].decode() == "a👋b\ufffdc\ufffd"
    assert answer_to(event(halves[0]), DONE)[1].decode() == "a\ufffd"
    assert answer_to(event(halves[0]), ROLE, STOP, event(halves[1]), DONE)[1].decode() == "a👋"


def test_answer_as_events_of_our_own() -> None:
    usage = event({"choices": [], "usage": {"total_tokens": 3}})
    events = (
        delta("a\n"),
        delta(None, reasoning_content="h"),
        delta("", reasoning="m"),
        delta("ä", "length"),
        usage,
        DONE,
    )
    answer, out = answer_to(*events, answer=streamproxy.EventAnswer("id7"))
    assert out.decode() == (
        'id: id7\ndata: {"text": "a\\n"}\n\n'
        'event: reasoning\ndata: {"text": "h"}\n\n'
        'event: reasoning\ndata: {"text": "m"}\n\n'
        'data: {"text": "ä"}\n\n'
        'event: done\ndata: {"finish_reason": "length", "usage": {"total_tokens": 3}}\n\n'
    )
    assert (answer.notes.pieces, answer.notes.size) == (2, 4)


def passed_to(*parts: bytes, label: str = "text/event-stream", status: int = 200, **options: Any) -> tuple[Any, bytes]:
    """A PassedAnswer after parts and the end of the body, and all that the client has of it."""
    fields = {"content-type": label, "transfer-encoding": "chunked", **options.pop("fields", {})}
    answer = streamproxy.PassedAnswer(**options).start(status, {name: value for name, value in fields.items() if value})
    out = b"".join(map(answer.feed, parts))
    return answer, out + answer.close(None)


def stray(payload: object) -> bytes:
    return json.dumps(payload).encode() + b"\n\n"


def one_choice(index: int = 0, **members: object) -> bytes:
    return event({"choices": [{"index": index, **members}]})


def typed_part(type: str, text: object) -> dict[str, object]:
    """A typed part of a message: its text stands under what its type ends with."""
    return {"type": type, re.split(r"[._]", type)[-1]: text}


EMPTY = {"index": 0, "delta": {}, "finish_reason": None}

# What servers send to say that they failed, after a status of 200.
ERRORS_IN_STREAMS = {
    "OpenAI": event({"error": {"message": "Sorry", "type": "server_error", "param": None, "code": None}}),
    "string": event({"error": "Sorry"}),
    "event: error": b'event: error\ndata: {"message": "Sorry"}\n\n',
    "event: error of text": b"event: error\ndata: Sorry\n\n",
    "event: error of nothing": b"event: error\n\n",
    "event: error, its type last": b'data: {"message": "Sorry"}\nevent: error\n\n',
    "Bedrock's exception": b'event: modelStreamErrorException\ndata: {"message": "Sorry"}\n\n',
    "Anthropic": event({"type": "error", "error": {"type": "overloaded_error", "message": "Sorry"}}),
    "Responses": event({"type": "error", "code": "server_error", "message": "Sorry", "param": None}),
    "DashScope": b'event:error\n:HTTP_STATUS/400\ndata:{"code": "InvalidParameter", "message": "Sorry"}\n\n',
    "vLLM": event({"object": "error", "message": "Sorry", "type": "BadRequestError", "code": 400}),
    "flat, of a type that says it": event({"message": "Sorry", "type": "bad_request"}),
    "flat, typed": event({"message": "Sorry", "type": "invalid_request_error"}),
    "llama.cpp's field": b'error: {"code": 500, "message": "Sorry", "type": "server_error"}\n\n',
    "field of text": b"error: Sorry\n\n",
    "field without a blank": b'error:{"message": "Sorry"}\r\n\r\n',
    "field, [DONE] in the same block": b'error: {"message": "Sorry"}\ndata: [DONE]\n\n',
    "bare JSON": stray({"error": {"message": "Sorry"}}),
    "bare JSON, [DONE] in the same block": b'{"error": "Sorry"}\ndata: [DONE]\n\n',
    "bare JSON over lines": json.dumps({"error": {"message": "Sorry"}}, indent=2).encode() + b"\n\n",
    "bare FastAPI": stray({"detail": "Sorry"}),
    "FastChat": event({"text": "Sorry", "error_code": 50001}),
    "Baidu": event({"error_code": 336003, "error_msg": "Sorry"}),
    "errorMessage": event({"errorMessage": "Sorry", "errorType": "Runtime"}),
    "error_message": event({"error_message": "Sorry"}),
    "err_msg": event({"err_code": 7, "err_msg": "Sorry"}),
    "code and msg": event({"code": 1211, "msg": "Sorry"}),
    "code in words and message": event({"code": "InvalidParameter", "message": "Sorry", "request_id": "x"}),
    "status and message": event({"status": "error", "message": "Sorry"}),
    "Spring": event({"timestamp": "x", "status": 500, "error": "Internal Server Error", "message": "Sorry"}),
    "NestJS": event({"statusCode": 400, "message": ["Sorry"], "error": "Bad Request"}),
    "problem+json": event({"type": "about:blank", "title": "Bad", "status": 402, "detail": "Sorry"}),
    "gateway": event({"message": "Sorry"}),
    "AWS": event({"Message": "Sorry", "__type": "com.amazon#Throttling"}),
    "Dify": event({"event": "error", "status": 400, "code": "invalid_param", "message": "Sorry"}),
    "FastAPI": event({"detail": "Sorry"}),
    "FastAPI's list": event({"detail": [{"loc": ["body", "x"], "msg": "Sorry", "type": "missing"}]}),
    "success is false": event({"success": False, "errors": [{"code": 5007, "message": "Sorry"}], "messages": []}),
    "errors": event({"errors": ["Sorry"]}),
    "Gemini's array": event([{"error": {"code": 500, "message": "Sorry", "status": "INTERNAL"}}]),
    "array, later": event([{}, {"error": "Sorry"}]),
    "no choices": event({"id": "x", "object": "chat.completion.chunk", "choices": [], "error": {"message": "Sorry"}}),
    "null choices": event({"choices": None, "base_resp": {"status_code": 1008, "status_msg": "Sorry"}}),
    "beside choices": event({"choices": [EMPTY], "error": {"message": "Sorry"}}),
    "within the choice": one_choice(delta={}, error={"code": 502, "message": "Sorry"}, finish_reason="error"),
    "within the choice that goes on": one_choice(delta={}, finish_reason=None, error={"message": "Sorry"}),
    "within the delta": one_choice(delta={"content": "", "error": "Sorry"}, finish_reason=None),
    "Groq": event({"choices": [EMPTY], "x_groq": {"id": "r", "error": "Sorry"}}),
    "vendor's member alone": event({"data": {"error": {"message": "Sorry"}}}),
    "Tencent": event({"Response": {"Error": {"Code": "AuthFailure", "Message": "Sorry"}, "RequestId": "x"}}),
    "true": event({"error": True, "message": "Sorry"}),
    "number": event({"error": 500, "message": "Sorry"}),
    "text in data": b"data: Error: Sorry\n\n",
    "in brackets": b"data: [ERROR] Sorry\n\n",
    "type of a class": b"data: InternalServerError: Sorry\n\n",
}  # fmt: skip
WORDLESS = ("event: error of nothing",)


@pytest.mark.parametrize("name", ERRORS_IN_STREAMS)
def test_error_in_any_clothes_is_a_failure_in_upstream_s_words_and_in_v1_cut_behind_all_bytes(name: str) -> None:
    wrong = ERRORS_IN_STREAMS[name]
    for before, after in ((b"", DONE), (delta("a"), b""), (delta("a"), STOP + DONE), (delta("a", "stop"), DONE)):
        for answer in (streamproxy.TextAnswer(), streamproxy.EventAnswer("id")):
            answer, out = answer_to(before, wrong, after, answer=answer)
            assert answer.failure and answer.state != answer.DONE and (b"a" in out) == bool(before)
            assert "Sorry" in answer.failure.message or name in WORDLESS, answer.failure.message
            assert "Sorry" not in answer.failure.logged
        for parts in ((before, wrong, after), (before + wrong + after,), (ROLE + before, wrong + after)):
            answer, out = passed_to(*parts)
            assert answer.failure and answer.state != answer.DONE
            assert out == b"".join(parts)


@pytest.mark.parametrize("name", ERRORS_IN_STREAMS)
def test_error_in_any_clothes_is_one_however_it_is_cut(name: str) -> None:
    stream = delta("a") + ERRORS_IN_STREAMS[name] + DONE
    for parts in cuts(stream):
        answer, out = answer_to(*parts)
        assert (out, bool(answer.failure)) == (b"a", True)
        answer, out = passed_to(*parts)
        assert (out, bool(answer.failure)) == (stream, True)


@pytest.mark.parametrize("name", [name for name in ERRORS_IN_STREAMS if "of text" not in name])
def test_error_in_any_clothes_is_heard_without_its_blank_line(name: str) -> None:
    wrong = ERRORS_IN_STREAMS[name].rstrip(b"\r\n")
    for answer, _ in (answer_to(delta("a"), wrong), passed_to(delta("a"), wrong)):
        assert answer.failure and answer.failure.ending == "error"


FILTER_DOWN = {"error": {"code": "content_filter_error", "message": "The contents are not filtered"}}
GOOD = {"index": 0, "delta": {"content": "x"}, "finish_reason": None}
# What looks like an error and is none; each says "x", or nothing.
HARMLESS = {
    **{f"error: {json.dumps(error)}": event({"error": error, "choices": [GOOD]}) for error in (
        None, {}, "", [], False, 0, {"message": "", "code": None}, {"message": None, "type": "", "code": 0}, "null",
        "None",
        {"code": 0, "message": "success"}, {"code": "0", "message": "ok"}, {"code": 200}, [{}], {"details": {}},
    )},
    "null error without choices": event({"id": "x", "object": "chat.completion.chunk", "error": None}),
    "code and message of success": event({"choices": [GOOD], "code": 0, "message": "success", "error_code": 0}),
    "the same without choices": event({"code": 200, "msg": "success", "data": None}),
    "base_resp": event({"choices": [GOOD], "base_resp": {"status_code": 0, "status_msg": "success"}}),
    "error_code 0": event({"text": "", "error_code": 0, "error_msg": "Success!", "usage": {"total_tokens": 3}}),
    "detail of usage": event({"choices": [], "usage": {"total_tokens": 3}, "detail": {"reasoning_tokens": 0}}),
    "usage": event({"choices": [], "usage": {"total_tokens": 3, "completion_tokens_details": {"reasoning_tokens": 0}}}),
    "Azure's first": event({"choices": [], "model": "", "prompt_filter_results": [{"content_filter_results": {}}]}),
    "Azure's filter was down": one_choice(delta={"content": "x"}, content_filter_results=FILTER_DOWN),
    "Azure's filter of the prompt": event({"choices": [], "prompt_filter_results": FILTER_DOWN}),
    "errors are none": event({"choices": [], "success": True, "errors": [], "messages": ["fine"], "usage": None}),
    "status": event({"status": "processing", "message": "Your request is queued", "progress": 3}),
    "null detail": event({"choices": [GOOD], "detail": None}),
    "logprobs": one_choice(delta={"content": "x"}, logprobs={"content": [{"token": "error", "logprob": -0.1}]}),
    "NaN": b'data: {"choices": [{"delta": {"content": "x"}, "logprobs": {"x": [NaN, Infinity, -Infinity]}}]}\n\n',
    "large number": b'data: {"created": 1e999, "choices": [{"delta": {"content": "x"}}], "seed": 1234567890123456}\n\n',
    "ping": b'event: ping\ndata: {"type": "ping"}\n\n',
    "ping of text": b"event: ping\ndata: 2026-01-01 error\n\n",
    "ping of an error": b'event: ping\ndata: {"error": "no"}\n\n',
    "typed ping": event({"type": "ping", "cost": "0"}),
    "another's event": b"event: heartbeat\ndata: 17\n\nevent: x\ndata: not JSON\n\n",
    "unknown field": b"foo: bar\n\nnonsense\n\n:\n\nretry: x\nid: 3\n\n",
    "bare JSON": stray({"status": "alive"}),
    "blank data": b"data:\n\ndata: \n\n",
    "tool call": one_choice(delta={"tool_calls": [{"function": {"arguments": '{"error": {"message": "no"}}'}}]}),
    "tool call named error": one_choice(
        delta={"tool_calls": [{"index": 0, "id": "error", "function": {"name": "error"}}]}
    ),
    "annotations": one_choice(delta={"content": "x", "annotations": [{"type": "error", "error": "no"}]}),
    "role": one_choice(delta={"role": "error", "content": None}),
    "queue": event({"object": "queue", "message": "2 before you"}),
    "news of another type": b'event: status\ndata: {"message": "Searching", "detail": "the web"}\n\n',
    "text of another type": b"event: log\ndata: Error: cache miss\n\n",
    "news, typed": event({"type": "progress", "message": "Searching", "detail": "the web"}),
    "tool that failed": event({"type": "response.output_item.done", "item": {"status": "failed", "error": "no"}}),
    "code that ran": event({"type": "response.code_interpreter_call_code.done", "code": "print(1)"}),
    "tool result": event({"type": "content_block_start", "content_block": {"content": {"error_code": "unavailable"}}}),
    "content that is false": one_choice(delta={"role": "assistant", "content": False}),
    "a tool's result": b'event: tool_result\ndata: {"type": "tool_result", "isError": true, "on_error": "go on"}\n\n',
    "a filter's error": event({"x_filter_error": {"message": "it was down"}}),
    "a measure": event({"train_error": 0.3, "is_error": False, "last_exception": None, "parse_errors": {}}),
    "code of a vendor": event({"choices": [], "x_meta": {"code": "abc", "error": None}, "usage": {"total_tokens": 3}}),
}  # fmt: skip


@pytest.mark.parametrize("name", HARMLESS)
def test_what_is_harmless_is_no_error(name: str) -> None:
    for spaced in (HARMLESS[name], HARMLESS[name].replace(b'": ', b'":').replace(b', "', b',"')):
        stream = delta("<") + spaced + delta(">") + STOP + DONE
        answer, out = answer_to(*re.split(b"(?<=\n\n)", stream))
        assert (answer.failure, answer.state, out.replace(b"x", b"")) == (None, answer.DONE, b"<>"), answer.failure
        for parts in (re.split(b"(?<=\n\n)", stream), [stream]):
            answer, out = passed_to(*parts)
            assert (answer.failure, answer.state, out) == (None, answer.DONE, stream), answer.failure


@pytest.mark.parametrize("text", [
    '"error": {"message": "no"}', "event: error", "\n\nevent: error\ndata: x\n\n", '{"error": "x"}', "Error: x",
    "data: [DONE]",
    '","finish_reason":"error"', '"choices":[{"error":"x"}]', "error: x", '"finish_reason":null', '\\"error\\": 1',
])  # fmt: skip
def test_a_model_may_talk_of_errors(text: str) -> None:
    compact = json.dumps(
        {"choices": [{"delta": {"content": text}, "finish_reason": None}]}, separators=(",", ":")
    ).encode()
    for payload in (delta(text), delta(None, reasoning=text), one_choice(message={"content": text}), event(compact)):
        stream = ROLE + payload + STOP + DONE
        answer, out = answer_to(stream)
        assert (answer.failure, out.decode()) == (None, "" if b"reasoning" in payload else text)
        answer, out = passed_to(stream)
        assert (answer.failure, answer.state, out) == (None, answer.DONE, stream)


@pytest.mark.parametrize("reason", [
    "error", "ERROR", "abort", "aborted", "insufficient_system_resource", "network_error", "failed", "cancelled",
    "timeout", "timed_out",
    "engine_error", "server_error", "error_toxic", "interrupted", "MALFORMED_FUNCTION_CALL", {"type": "abort"},
])  # fmt: skip
def test_finish_reason_may_say_that_the_answer_failed(reason: Any) -> None:
    for stream in (
        delta("a") + delta("b", reason),
        delta("a") + delta("b", reason) + DONE,
        delta("ab", "stop") + delta("", reason) + STOP,
    ):
        for answer, out in (answer_to(stream), passed_to(stream)):
            assert answer.failure and answer.failure.message.startswith(
                "Upstream says that its answer failed (finish_reason "
            )
            assert answer.state != answer.DONE and out in (b"ab", stream)


@pytest.mark.parametrize("reason", ["", "null", "NULL", "none", None, False, {}, "FINISH_REASON_UNSPECIFIED"])
def test_finish_reason_may_say_nothing(reason: Any) -> None:
    for answer, _ in (answer_to(delta("a", reason)), passed_to(ROLE, delta("a", reason))):
        assert answer.failure and answer.failure.ending == "truncated" and answer.state == answer.OPEN
    for answer, _ in (answer_to(delta("a", reason), DONE), passed_to(ROLE, delta("a", reason), STOP)):
        assert answer.state == answer.DONE and answer.notes.finish_reason in (None, "stop")


@pytest.mark.parametrize(
    "reason",
    ["stop", "length", "content_filter", "tool_calls", "eos", "end_turn", "SAFETY", "sensitive", "x", "repetition"],
)
def test_finish_reason_may_be_any_other_and_is_told(reason: str) -> None:
    answer, out = answer_to(delta("a"), delta("", reason), answer=streamproxy.EventAnswer("id"))
    assert json.loads(out.split(b"event: done\ndata: ")[1]) == {"finish_reason": reason, "usage": None}
    assert (answer.state, answer.notes.finish_reason) == (answer.DONE, reason)
    assert passed_to(ROLE, delta("a", reason))[0].notes.finish_reason == reason


def test_finish_reason_may_come_early_or_in_every_chunk_and_what_follows_counts() -> None:
    answer = streamproxy.TextAnswer()
    for first in ({"role": "assistant", "content": ""}, {"reasoning_content": "hm"}):
        assert answer.feed(one_choice(delta=first, finish_reason="stop")) == b""
        assert answer.state == answer.SETTLED  # it is not in a hurry
    assert answer.feed(delta("a", "stop")) == b"a" and answer.state == answer.ENDING
    life = answer.life
    assert answer.feed(b": ping\n\n") == b"" and answer.life == life  # only an event starts the moment anew
    assert answer.feed(delta("b", "stop")) == b"b" and answer.life > life
    assert answer.state == answer.SETTLED  # nor is it now: another may follow that as well
    empty = streamproxy.TextAnswer()
    assert empty.feed(ROLE + STOP) == b"" and empty.state == empty.ENDING  # an answer may have no text
    assert answer.close(None) == b"" and answer.state == answer.DONE


def test_answer_goes_on_behind_tools_that_a_gateway_runs() -> None:
    for reason in ("tool_calls", "function_call"):
        answer = streamproxy.TextAnswer()
        assert answer.feed(one_choice(delta={"tool_calls": [{"index": 0}]}) + delta("", reason)) == b""
        assert answer.state == answer.SETTLED
        assert answer.feed(A + STOP) == b"a" and answer.state == answer.ENDING
        assert answer.close(None) == b"" and answer.state == answer.DONE


@pytest.mark.parametrize("data", [
    b": OPENROUTER PROCESSING", b"null", b"ping", b"[PING]", b"keep-alive", b"heartbeat", b"",
])
def test_sign_of_life_that_is_data_is_no_text_and_no_fault(data: bytes) -> None:
    answer, out = answer_to(event(data) + A + event(data) + delta("b") + STOP, DONE)
    assert (out, answer.failure, answer.state) == (b"ab", None, answer.DONE)
    answer = streamproxy.TextAnswer().start(200, {"content-type": "text/event-stream"})
    assert answer.feed(event(data)) == b"" and answer.life


def test_events_without_blank_lines_between_them_are_events() -> None:
    lines = b"".join(each[:-1] for each in (ROLE, A, delta("b"), STOP, DONE))
    for end in (b"", b"\n"):
        answer, out = answer_to(lines + end)
        assert (out, answer.failure, answer.state) == (b"ab", None, answer.DONE)
        answer, out = passed_to(lines + end)
        assert (out, answer.failure, answer.state) == (lines + end, None, answer.DONE)
    error = event({"error": {"message": f"Wrong key {KEY}"}})
    redact = streamproxy.redactor(KEY)
    answer, out = passed_to(A[:-1] + error, DONE, redact=redact)
    assert answer.failure and KEY.encode() not in out and out.startswith(A[:-1])
    parser = streamproxy.EventParser(strict=False)
    typed = parser.feed(b"event: a\ndata: {}\nevent: b\ndata: {}\ndata: {}\nevent: c\n\n")
    assert [each.type for each in typed] == ["a", "b", "c"]
    pretty = b'data: {"choices": [\ndata: {"delta":\ndata: {"content": "a"}\ndata: }\ndata: ]}\n\n'
    assert answer_to(pretty + STOP + DONE)[1] == b"a"
    assert [each.data for each in streamproxy.EventParser().feed(b"data: {}\ndata: {}\n\n")] == ["{}\n{}"]


def test_lines_that_are_no_fields_do_not_pile_up_where_events_begin_between_them() -> None:
    parser = streamproxy.EventParser(2000, strict=False)
    events = [each for _ in range(100) for each in parser.feed(b"x" * 1000 + b"\ndata: {}\n")]
    assert [each.type for each in events] == ["", "message"] * 99
    with pytest.raises(streamproxy.Garbled):
        parser.feed((b"x" * 1000 + b"\n") * 2)


def test_sentence_of_an_error_is_looked_for_once_in_each_member_and_in_few_of_them() -> None:
    error: object = {"message": ""}
    for _ in range(5):
        error = {"error": error}
    looked = unittest.mock.Mock(wraps=streamproxy.sentence_of)
    with unittest.mock.patch.object(streamproxy, "sentence_of", looked):
        streamproxy.sentence_of(error)
        once = looked.call_count
        assert once < 7 * len(streamproxy._SENTENCES)
        streamproxy.sentence_of({f"{number}error": error for number in range(1000)})
    assert looked.call_count < 12 * once


DETAIL = typed_part("reasoning.text", "r")
# Where servers put text and reasoning: events, what is told.
TEXT_ELSEWHERE = {
    "other indexes": ([delta(None, reasoning="r"), *(one_choice(1, delta={"content": x}) for x in "ab")], "ab", "r"),
    "several indexes": ([one_choice(index, delta={"content": "ab"[index]}) for index in (0, 1)], "ab", ""),
    "index -1": ([one_choice(-1, delta={"content": "a"}, finish_reason="stop")], "a", ""),
    "two in one": ([event({"choices": [{"index": x, "delta": {"content": "ab"[x]}} for x in (0, 1)]})], "ab", ""),
    "refusal": ([delta(None, refusal="I cannot"), delta(None, refusal=" help.")], "I cannot help.", ""),
    "message in an event": ([one_choice(message={"role": "assistant", "content": "a"}, finish_reason="stop")], "a", ""),
    "message with reasoning": ([one_choice(message={"content": "a", "reasoning_content": "r"})], "a", "r"),
    "message behind deltas": ([delta("a"), delta("b"), one_choice(delta={}, message={"content": "ab"})], "ab", ""),
    "message beside deltas": ([one_choice(delta={"content": x}, message={"content": "ab"}) for x in "ab"], "ab", ""),
    "messages in pieces": ([one_choice(message={"content": x}) for x in "ab"], "ab", ""),
    "messages that grow": ([one_choice(message={"content": x}) for x in ("a", "ab", "ab")], "ab", ""),
    "message of bare text": ([one_choice(message="a", finish_reason="stop")], "a", ""),
    "completion": ([one_choice(text="a", finish_reason=None), one_choice(text="a", finish_reason="stop")], "aa", ""),
    "output_text": ([delta([{"type": "output_text", "text": "a"}])], "a", ""),
    "numbers": ([delta(6), delta(0), delta(-1.5), delta([7, {"type": "text", "text": 8}])], "60-1.578", ""),
    "one part": ([delta(typed_part("text", "a"))], "a", ""),
    "parts of text": ([delta(["a", {"text": "b"}])], "ab", ""),
    "part of a refusal": ([delta([typed_part("refusal", "a")])], "a", ""),
    "other parts": ([delta([typed_part("image_url", {"url": "data:"}), typed_part("text", "a")])], "a", ""),
    "Mistral's thinking": (
        [delta([typed_part("thinking", [typed_part("text", "r")]), typed_part("text", "a")])], "a", "r",
    ),
    "Anthropic's thinking": ([delta([{**typed_part("thinking", "r"), "signature": "s"}]), delta("a")], "a", "r"),
    "redacted thinking": ([delta([{"type": "redacted_thinking", "data": "x"}]), delta("a")], "a", ""),
    "reasoning": ([delta("", reasoning="r"), delta("a")], "a", "r"),
    "reasoning_content": ([delta(None, reasoning_content="r"), delta("a")], "a", "r"),
    "reasoning_text": ([delta(None, reasoning_text="r"), delta("a")], "a", "r"),
    "details": ([delta("", reasoning_details=[DETAIL, typed_part("reasoning.encrypted", "x")]), delta("a")], "a", "r"),
    "reasoning twice": ([delta("", reasoning="r", reasoning_details=[DETAIL]), delta("a")], "a", "r"),
    "summary": ([delta("", reasoning_details=[typed_part("reasoning.summary", "r")]), delta("a")], "a", "r"),
    "blocks": ([delta("", reasoning_content="r", thinking_blocks=[typed_part("thinking", "r")]), delta("a")], "a", "r"),
    "thinking": ([delta("", thinking="r"), delta("a")], "a", "r"),
    "bare JSON": ([stray({"choices": [{"delta": {"content": "a"}, "finish_reason": "stop"}]}), DONE], "a", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", TEXT_ELSEWHERE)
def test_answer_finds_text_and_reasoning_wherever_they_are(name: str) -> None:
    events, text, reasoning = TEXT_ELSEWHERE[name]
    for answer in (streamproxy.TextAnswer(), streamproxy.EventAnswer("id")):
        answer, out = answer_to(ROLE, *events, STOP, answer=answer)
        assert answer.state == answer.DONE and answer.notes.finish_reason in ("stop", None)
        if answer.pings:
            told = streamproxy.EventParser().feed(out)[:-1]
            out = "".join(json.loads(event.data)["text"] for event in told if event.type == "message").encode()
            assert "".join(json.loads(event.data)["text"] for event in told if event.type == "reasoning") == reasoning
        assert out.decode() == text


def test_answer_takes_the_first_choice_where_several_were_asked_for() -> None:
    answer = streamproxy.TextAnswer()
    answer.choices = 2
    second = event({"choices": [{"index": 1, "delta": {"content": "no"}, "finish_reason": "stop"}]})
    assert answer_to(second, delta("a"), second, STOP, answer=answer)[1] == b"a"


@pytest.mark.parametrize("payload", [
    {"choices": [], "usage": {"total_tokens": 3}},
    {"choices": [{"index": 0, "delta": {}, "usage": {"total_tokens": 3}}]},
    {"choices": [], "x_groq": {"id": "x", "usage": {"total_tokens": 3}}},
    {"choices": [{"delta": {}, "usage": {"total_tokens": 3}}], "usage": None},
    {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "usage": {"total_tokens": 3}},
])  # fmt: skip
def test_usage_stands_where_it_likes(payload: dict[str, Any]) -> None:
    for answer, _ in (answer_to(delta("a"), event(payload), DONE), passed_to(ROLE, delta("a"), event(payload), DONE)):
        assert answer.notes.usage == {"total_tokens": 3} and answer.state == answer.DONE


@pytest.mark.parametrize(("usage", "told"), [
    ({"total_tokens": 3, "details": {"cached": None}}, {"total_tokens": 3, "details": {"cached": None}}),
    ({KEY: 3}, {streamproxy.HIDDEN: 3}),
    ({"details": {"a": {f"x{KEY}": 3}}}, {"details": {"a": {"x" + streamproxy.HIDDEN: 3}}}),
    ({"details": [{KEY: 3}], "cost": 0.5}, {"details": [{streamproxy.HIDDEN: 3}], "cost": 0.5}),
    ({"total_tokens": 3, "plan": KEY}, {"total_tokens": 3, "plan": streamproxy.HIDDEN}),
    ({"total_tokens": float("inf")}, None),
    ({"details": {"cost": float("nan")}}, None),
])  # fmt: skip
def test_usage_is_told_without_secrets_wherever_they_stand(usage: dict[str, Any], told: object) -> None:
    notes = streamproxy.Notes(streamproxy.redactor(KEY))
    notes.take({"usage": usage})
    assert notes.usage == told


def typed_payload(type: str, **members: object) -> bytes:
    return event({"type": type, **members})


RESPONSE_MEMBERS = {
    "id": "r",
    "object": "response",
    "model": "m",
    "status": "completed",
    "error": None,
    "usage": {"total_tokens": 3},
}
TYPED_ENDS = {
    "response.completed": typed_payload("response.completed", response=RESPONSE_MEMBERS),
    "response.cancelled": typed_payload("response.cancelled", response={"status": "cancelled"}),
    "response.incomplete": typed_payload(
        "response.incomplete", response={**RESPONSE_MEMBERS, "incomplete_details": {"reason": "x"}}
    ),
    "response.failed": typed_payload(
        "response.failed", response={**RESPONSE_MEMBERS, "error": {"code": "x", "message": "x"}}
    ),
    "message_stop": typed_payload("message_stop"),
    "type last": event({"response": RESPONSE_MEMBERS, "type": "response.completed"}),
}  # fmt: skip


@pytest.mark.parametrize("name", TYPED_ENDS)
@pytest.mark.parametrize("done", [b"", DONE])
@pytest.mark.parametrize("named", [b"", b"event: %b\n"])
def test_typed_streams_are_whole_after_their_end_whether_the_type_is_in_the_json_alone(
    name: str, done: bytes, named: bytes
) -> None:
    last = (named and named % name.encode()) + TYPED_ENDS[name]
    begin = typed_payload("response.created", response={**RESPONSE_MEMBERS, "status": "in_progress", "usage": None})
    begin += typed_payload("response.output_text.delta", delta="error") + typed_payload(
        "response.output_item.done", item={"type": "mcp_call", "error": "tool failed"}
    )
    for parts in (
        [begin, last, done],
        list(re.split(b"(?<=\n\n)", begin + last + done)),
        [begin + last[:-2]],
        [begin + last + done],
    ):
        answer, out = passed_to(*parts)
        assert (answer.failure, answer.state, out) == (None, answer.DONE, b"".join(parts))
    assert answer.notes.model == "m" and (answer.notes.usage == {"total_tokens": 3}) == (
        "cancelled" not in name and "message" not in name
    )
    answer, _ = passed_to(begin, last[: len(last) // 2], done)
    assert answer.failure or done


@pytest.mark.parametrize(
    "wrong",
    [
        typed_payload("error", code="server_error", message="x"),
        b"event: error\n" + typed_payload("error", error={"type": "overloaded_error"}),
    ],
)
def test_typed_streams_are_cut_after_an_error(wrong: bytes) -> None:
    for after in (b"", DONE):
        answer, out = passed_to(typed_payload("response.created"), wrong, after)
        assert answer.failure and out == typed_payload("response.created") + wrong + after


@pytest.mark.parametrize(("first", "last"), [
    ("response.created", "response.completed"), ("message_start", "message_stop"),
])
def test_typed_streams_are_not_ended_by_done(first: str, last: str) -> None:
    begin, ends = typed_payload(first) + typed_payload("x.delta", delta="a"), typed_payload(last)
    for parts in ((begin, DONE), (begin + DONE,), (begin, DONE[:9], DONE[9:]), (begin, DONE[:-1])):
        answer, out = passed_to(*parts)
        assert answer.failure.ending == "truncated" and out == b"".join(parts)
    for parts in ((begin, ends, DONE), (begin + ends + DONE,), (begin, DONE, ends), (typed_payload("x.delta"), DONE)):
        answer, out = passed_to(*parts)
        assert (answer.state, answer.failure, out) == (answer.DONE, None, b"".join(parts))


def test_messages_tell_model_usage_and_stop_reason() -> None:
    answer, _ = passed_to(
        b"event: message_start\n"
        + typed_payload("message_start", message={"model": "claude", "usage": {"input_tokens": 3}}),
        b"event: content_block_delta\n"
        + typed_payload("content_block_delta", delta={"type": "text_delta", "text": "a"}),
        typed_payload("message_delta", delta={"stop_reason": "max_tokens"}, usage={"output_tokens": 9}),
        b"event: message_stop\n" + typed_payload("message_stop"),
        messages=True,
    )
    assert (answer.notes.model, answer.notes.finish_reason, answer.notes.usage) == (
        "claude",
        "max_tokens",
        {"input_tokens": 3, "output_tokens": 9},
    )


JSON_ANSWER = json.dumps(
    {"model": "m", "choices": [{"message": {"content": "ab"}, "finish_reason": "stop"}], "usage": {"total_tokens": 3}}
).encode()
STREAMED = ROLE + delta("a") + delta("b", "stop") + DONE
LABELS = [
    "text/event-stream",
    "",
    "text/event-stream, text/event-stream",
    "text/plain",
    "application/octet-stream",
    "application/json",
    "text/html; charset=x",
]


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize(
    "body",
    [
        STREAMED,
        b"\xef\xbb\xbf" + STREAMED,
        b": hi\n\n" + STREAMED,
        b"\n\n" + STREAMED,
        JSON_ANSWER,
        b"\xef\xbb\xbf" + JSON_ANSWER,
        b" \n" + JSON_ANSWER,
    ],
)
def test_first_bytes_tell_what_a_body_is_whatever_its_label(label: str, body: bytes) -> None:
    for parts in cuts(body):
        answer = streamproxy.TextAnswer()
        answer.start(200, {"content-type": label})
        assert answer_to(*parts, answer=answer)[1] == b"ab" and answer.state == answer.DONE
    for parts in ([body], [body[at : at + 1] for at in range(len(body))]):
        for framing in ({"transfer-encoding": "chunked"}, {"transfer-encoding": ""}):
            answer, out = passed_to(*parts, label=label, fields=framing)
            assert (out, answer.state, answer.notes.finish_reason) == (body, answer.DONE, "stop")
            cut, out = passed_to(body[: len(body) // 2], label=label, fields=framing)
            whole_doc = body.endswith(b"}") and framing["transfer-encoding"]  # by its framing
            assert bool(cut.failure) != bool(whole_doc) or label == "application/octet-stream"


@pytest.mark.parametrize("label", LABELS)
def test_json_error_is_told_whatever_its_label(label: str) -> None:
    for body in (
        b'{"error": {"message": "Quota"}}',
        b'[{"error": {"message": "Quota"}}]',
        b'{"detail": "Quota"}',
        b'{"error": "Quota"}\n\n' + DONE,
    ):
        answer = streamproxy.TextAnswer()
        answer.start(200, {"content-type": label})
        answer, out = answer_to(body, answer=answer)
        assert out == b"" and answer.failure and answer.failure.message == "Quota"
        if DONE in body:
            assert passed_to(body, label=label)[0].failure


@pytest.mark.parametrize(("label", "body", "whole"), [
    ("audio/mpeg", b"ID3\xff", True), ("image/png", b"\x89PNG", True), ("application/octet-stream", b"\xff\xfb", True),
    ("text/plain", b"Hello", False),
    ("", b"", False), ("application/json", b"", False), ("application/json", b"[1", False),
    ("application/json", b"[1]", True), ("text/html", b"<p>", False),
    ("application/json", b"12", True), ("", b"data", False),
])  # fmt: skip
def test_document_that_the_connection_s_end_ends_is_whole_only_if_it_parses(
    label: str, body: bytes, whole: bool
) -> None:
    answer, out = passed_to(body, label=label, fields={"transfer-encoding": ""})
    assert (answer.state == answer.DONE, bool(answer.failure)) == (whole, not whole)
    assert answer.failure is None or answer.failure.ending == "truncated"
    answer, out = passed_to(body, label=label)
    assert (answer.state, out) == (answer.DONE, body)  # by its framing it is


def test_json_document_is_held_until_it_is_whole_and_others_are_not() -> None:
    answer = streamproxy.PassedAnswer()
    answer.start(200, {"content-type": "application/json", "content-length": "9"})
    assert (
        not answer.eager and not answer.pings and answer.feed(b' {"a"') == b"" and answer.notes.events and answer.life
    )
    answer.close(streamproxy.UpstreamError("cut"))
    assert answer.failure and answer.failure.message == "cut"
    answer, out = passed_to(b' {"a"', b": 1}", label="application/json", fields={"content-length": "9"})
    assert out == b' {"a": 1}' and answer.fields["Content-Length"] == "9" and answer.notes.pieces == 1
    answer = streamproxy.PassedAnswer()
    answer.start(200, {"content-type": "audio/mpeg", "content-length": "4"})
    assert (
        answer.eager
        and answer.fields["Content-Length"] == "4"
        and [answer.feed(b"ab"), answer.feed(b"cd")] == [b"ab", b"cd"]
    )
    large = b"[" + b"0," * 9_000_000
    answer, out = passed_to(large[:100], large[100:], b"0]", label="application/json")
    assert out == large + b"0]" and answer.state == answer.DONE  # too large to be held


def test_large_json_document_is_only_skimmed() -> None:
    document = {"model": "m", "data": [0] * 200_000, "usage": {"total_tokens": 3, "details": {"x": 1}}}
    answer, _ = passed_to(json.dumps(document).encode(), label="application/json")
    assert (answer.notes.model, answer.notes.usage) == ("m", {"total_tokens": 3, "details": {"x": 1}})


@pytest.mark.parametrize("coding", ["none", "", "identity", "identity, identity", "utf-8", "Identity", "aws-chunked"])
def test_what_is_no_compression_is_none(coding: str) -> None:
    for answer in (streamproxy.TextAnswer(), streamproxy.PassedAnswer()):
        answer.start(200, {"content-type": "text/event-stream", "content-encoding": coding})
        assert answer.feed(STREAMED) and not answer.failure


@pytest.mark.parametrize("coding", ["gzip", "GZip", "deflate", "br", "zstd", "x-gzip", "identity, gzip", "compress"])
def test_compressed_answer_is_refused(coding: str) -> None:
    for answer in (streamproxy.TextAnswer(), streamproxy.PassedAnswer()):
        answer.start(200, {"content-type": "text/event-stream", "content-encoding": coding})
        assert answer.failure and answer.feed(STREAMED) == answer.close(None) == b""


def refused_with(status: int, document: bytes, api: bool = False, redact: Any = str, **fields: str) -> Any:
    """The failure of an answer with this status and document."""
    asked = streamproxy.PassedAnswer(redact) if api else streamproxy.TextAnswer(redact)
    answer = asked.start(status, {name.replace("_", "-"): value for name, value in fields.items()})
    assert (
        answer is not asked and [answer.feed(document[:9]), answer.feed(document[9:]), answer.close(None)] == [b""] * 3
    )
    assert answer.failure and answer.encode_failure(answer.failure) == asked.encode_failure(answer.failure)
    return answer.failure


def deflated(data: bytes, wbits: int) -> bytes:
    packer = zlib.compressobj(wbits=wbits)
    return packer.compress(data) + packer.flush()


@pytest.mark.parametrize(
    ("coding", "wbits"), [("gzip", 31), ("x-gzip", 31), ("deflate", 15), ("deflate", -15), ("identity, gzip", 31)]
)
def test_compressed_error_is_read_and_bounded(coding: str, wbits: int) -> None:
    document = b'{"error": {"message": "Sorry"}}'
    failure = refused_with(400, deflated(document, wbits), api=True, content_encoding=coding)
    assert (failure.status, failure.message, failure.document) == (400, "Sorry", document)
    bomb = deflated(b'{"error": {"message": "Sorry", "x": "' + b"y" * 50_000_000, wbits)
    failure = refused_with(422, bomb, api=True, content_encoding=coding)
    assert (failure.message, failure.document) == ("Sorry", b"")
    assert (
        refused_with(400, b"\xff\xff" + document, content_encoding=coding).message
        == "Upstream refused the request with status 400."
    )


def test_error_compressed_in_a_way_we_cannot_read_keeps_its_status() -> None:
    failure = refused_with(429, b"\x28\xb5\x2f\xfd", api=True, content_encoding="zstd", retry_after="7")
    assert (failure.status, failure.fields["Retry-After"], failure.document) == (429, "7", b"")


FASTAPI = {"detail": [{"loc": ["body", "x", 0], "msg": "Sorry", "type": "missing", "input": {"code": "secret"}}]}
# Documents with which servers refuse, what the client is told, what kind of error the log tells.
DOCUMENTS = {
    "OpenAI": ({"error": {"message": "Sorry", "type": "invalid", "param": "x", "code": "y"}}, "Sorry", "invalid, y"),
    "Anthropic": ({"type": "error", "error": {"type": "an_error", "message": "Sorry"}}, "Sorry", "an_error"),
    "Gemini": ([{"error": {"code": 400, "message": "Sorry", "status": "INVALID"}}], "Sorry", "400, INVALID"),
    "Mistral": ({"object": "error", "message": FASTAPI, "type": "invalid"}, "body.x.0: Sorry", "invalid, missing"),
    "FastAPI": (FASTAPI, "body.x.0: Sorry", "missing"),
    "FastAPI, two": ({"detail": [{"loc": ["body"], "msg": "a"}, {"loc": ["url"], "msg": "b"}]}, "body: a; url: b", ""),
    "FastAPI, a string": ({"detail": "Sorry"}, "Sorry", ""),
    "detail of an object": ({"detail": {"error": {"message": "Sorry", "code": "x"}}}, "Sorry", "x"),
    "Cloudflare": ({"success": False, "errors": [{"code": 5007, "message": "Sorry"}], "result": None}, "Sorry", "5007"),
    "code and msg": ({"code": 1211, "msg": "Sorry"}, "Sorry", "1211"),
    "Baidu": ({"error_code": 336003, "error_msg": "Sorry"}, "Sorry", "336003"),
    "string": ({"error": "Sorry"}, "Sorry", ""),
    "xAI": ({"code": "Some words", "error": "Sorry"}, "Sorry", ""),
    "TGI": ({"error": "Sorry", "error_type": "validation"}, "Sorry", "validation"),
    "Hugging Face": ({"error": ["Sorry", "Really"]}, "Sorry; Really", ""),
    "ASP.NET": ({"type": "about:blank", "title": "Bad", "errors": {"x": ["Sorry"]}}, "Sorry", "about:blank"),
    "problem+json": ({"title": "Payment Required", "status": 402, "detail": "Sorry"}, "Sorry", "402"),
    "Spring": ({"timestamp": "t", "status": 404, "error": "Not Found", "message": ""}, "Not Found", "404"),
    "OAuth": ({"error": "invalid_grant", "error_description": "Sorry"}, "Sorry", ""),
    "AWS": ({"Message": "Sorry"}, "Sorry", ""),
    "Apigee": ({"fault": {"faultstring": "Sorry", "detail": {"errorcode": "x"}}}, "Sorry", "x"),
    "bare string": ("Sorry", "Sorry", ""),
    "lines": ({"error": {"message": "So\nrry\t!"}}, "So rry !", ""),
    "code alone": ({"error": {"code": "overloaded"}}, None, "overloaded"),
    "empty": ({}, None, ""),
    "number": (5, None, ""),
    "null": (None, None, ""),
    "deep": ({"error": {"message": {"error": {"message": {"detail": "Sorry"}}}}}, "Sorry", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", DOCUMENTS)
def test_refusal_is_told_in_upstream_s_words_and_passes_whole_in_v1(name: str) -> None:
    payload, words, kinds = DOCUMENTS[name]
    document = json.dumps(payload).encode()
    for status in (400, 402, 404, 408, 409, 413, 415, 422, 425, 429, 503):
        logged = f"Upstream refused the request with status {status}" + (f" ({kinds})." if kinds else ".")
        failure = refused_with(status, document, request_id="r")
        assert (failure.status, failure.message, failure.logged) == (status, words or logged, logged)
        failure = refused_with(status, document, api=True, request_id="r")
        assert (failure.status, failure.document, failure.fields["Request-Id"]) == (status, document, "r")
        assert streamproxy.encode_error(failure, "/v1/messages") == document
        assert json.loads(streamproxy.encode_error(failure, "/")) == {"error": words or logged}
        failure = refused_with(status, json.dumps({"x": "y" * 70_000, "error": "z"}).encode(), api=True)
        assert failure.document == b"" and json.loads(streamproxy.encode_error(failure, "/v1/x"))["error"]["message"]


@pytest.mark.parametrize(("document", "words"), [
    (b"model 'llama3' not found, try pulling it first", "model 'llama3' not found, try pulling it first"),
    (b"x" * 3000, "x" * 1000), (b" \n", ""),
    (b"<html>\r\n<head><title>413 Too Large</title></head>\r\n<body>nginx", "413 Too Large"), (b"", ""),
    (b"<html>", "Upstream refused the request with status 404 (a page of HTML)."),
    (b"<?xml?><Error><Code>x</Code><Message>Sorry</Message></Error>", "Sorry"),
    (b'{"error": {"message": "So\\u0072ry", "input": "cut', "Sorry"), (b"\xff\xfe", "\ufffd\ufffd"),
    (b'id:1\nevent:error\n:HTTP_STATUS/400\ndata:{"code":"InvalidParameter","message":"Sorry"}\n\n', "Sorry"),
    (b'data: {"error": {"message": "Sorry"}}\r\n\r\ndata: [DONE]\r\n\r\n', "Sorry"),
    (b'data: busy\n\ndata: {"error": {"message": "Sorry"}}', "Sorry"),
])  # fmt: skip
def test_refusal_that_is_no_json_is_told_too(document: bytes, words: str) -> None:
    failure = refused_with(404, document)
    assert failure.message == words or not words and failure.message == "Upstream refused the request with status 404."
    failure = refused_with(404, document, api=True, content_type="text/html")
    assert failure.document == (document if words else b"")
    assert failure.fields.get("Content-Type") == (
        "text/plain; charset=utf-8" if words and document[:1] != b"{" else None
    )


@pytest.mark.parametrize(("status", "document", "message"), [
    (401, b'{"error": {"message": "no", "code": "bad"}}', "Upstream refused our API key with status 401 (bad)."),
    (403, b'{"error": {"message": "no", "code": "unsupported_country", "type": "request_forbidden"}}',
     "Upstream refused the request with status 403 (request_forbidden, unsupported_country)."),
    (403, b"<html>Just a moment...</html>", "Upstream refused the request with status 403 (a page of HTML)."),
    (403, b"", "Upstream refused the request with status 403."),
    (302, b"", "Upstream redirects with status 302, which is not followed."),
    (500, b'{"error": "trace"}', "Upstream failed with status 500."),
    (502, b"<html>", "Upstream failed with status 502 (a page of HTML)."),
    (418, b"", "Upstream refused the request with status 418."), (504, b"", "Upstream failed with status 504."),
])  # fmt: skip
def test_refusal_between_upstream_and_us_is_502_and_says_of_what_kind_it_is(
    status: int, document: bytes, message: str
) -> None:
    for api in (False, True):
        failure = refused_with(status, document, api=api)
        told = message if status == 403 else re.sub(r" \(.*\)", "", message)  # the kind is for the log
        assert (failure.status, failure.message, failure.logged, failure.document) == (502, told, message, b"")


@pytest.mark.parametrize(
    ("status", "told", "passed"),
    [
        (429, "7", "7"),
        (503, "9", "9"),
        (529, "", "1"),
        (503, "soon", "1"),
        (429, "299.997", "300"),
        (429, "0.5", "1"),
        (400, "", None),
        (429, "Sun, 22 Nov 2026 10:00:00 GMT", "Sun, 22 Nov 2026 10:00:00 GMT"),
    ],
)
def test_refusal_about_load_says_when_to_come_again(status: int, told: str, passed: str | None) -> None:
    for api in (False, True):
        failure = refused_with(
            status, b'{"error": {"message": "Sorry"}}', api=api, **({"retry_after": told} if told else {})
        )
        assert failure.fields.get("Retry-After") == passed and failure.message == "Sorry"
        assert failure.status == (503 if status == 529 and not api else status)


def test_fields_that_pass_back_and_the_key_in_none_of_them() -> None:
    redact = streamproxy.redactor(KEY)
    passing = ["retry-after", "retry-after-ms", "x-should-retry", "x-request-id", "request-id", "openai-processing-ms",
               "openai-version", "x-ratelimit-limit-requests", "anthropic-ratelimit-tokens-limit"]  # fmt: skip
    for status in (200, 400, 401, 429, 500):
        for name in [*passing, "content-type"]:
            asked = streamproxy.PassedAnswer(redact)
            answer = asked.start(status, {name: f"x {KEY} y", "transfer-encoding": "chunked"})
            answer.feed(b"{}")
            answer.close(None)
            told = {
                **asked.fields,
                "Content-Type": asked.content_type,
                **(answer.failure.fields if answer.failure else {}),
            }
            check_no_key(repr(told) + repr(answer.notes.request_id))
            assert name == "content-type" or name.title() in told
    answer = streamproxy.PassedAnswer()
    answer.start(200, {name: "x" for name in [*passing, "set-cookie", "openai-organization", "server", "x-hop"]})
    assert {name.lower() for name in answer.fields} == set(passing)
    assert streamproxy.TextAnswer().start(200, {"x-request-id": "r"}).fields == {}


ESCAPED = "".join(f"\\u{ord(letter):04x}" for letter in KEY)


@pytest.mark.parametrize("key", [KEY, ESCAPED, ESCAPED.upper().replace("\\U", "\\u"), KEY[:4] + ESCAPED[24:]])
@pytest.mark.parametrize("wrong", [
    'data: {"error": {"message": "Bad key %s."}}\n\n',
    'event: error\ndata: {"type": "error", "error": {"message": "%s"}}\n\n', 'error: {"message": "%s"}\n\n',
    '{"error": "%s"}\n\n', 'data: {"detail": "%s"}\n\n',
    'data: {"choices": [{"delta": {"content": ""}, "error": {"message": "%s"}}]}\n\n', "event: error\ndata: %s\n\n",
    'data: {"error": {"message":\ndata: "%s"}}\r\n\r\n',
])  # fmt: skip
def test_key_is_in_no_error_of_a_stream_however_it_is_cut(wrong: str, key: str) -> None:
    redact = streamproxy.redactor(KEY)
    stream = ROLE + (wrong % key).encode() + DONE
    for parts in (
        [stream],
        [stream[at : at + 1] for at in range(len(stream))],
        *([stream[:at], stream[at:]] for at in range(len(ROLE), len(stream), 7)),
    ):
        answer, out = passed_to(*parts, redact=redact)
        assert answer.failure and out.startswith(ROLE) and out.endswith(DONE) and b"[redacted]" in out
        for text in (
            out.decode(),
            answer.failure.message,
            answer.failure.logged,
            re.sub(r"\\u00(..)", lambda code: chr(int(code[1], 16)), out.decode()),
        ):
            check_no_key(text)


@pytest.mark.parametrize("status", [200, 400])
@pytest.mark.parametrize("key", [KEY, ESCAPED])
def test_key_is_in_no_error_document(status: int, key: str) -> None:
    document = b'{"error": {"message": "Bad key %b."}}' % key.encode()
    answer = streamproxy.PassedAnswer(streamproxy.redactor(KEY)).start(status, {"content-type": "application/json"})
    out = answer.feed(document) + answer.close(None)
    assert (answer.failure.document if answer.failure else out) == b'{"error": {"message": "Bad key [redacted]."}}'
    assert status == 400 or answer.fields["Content-Length"] == str(len(out))


def test_what_a_model_says_passes_though_it_looks_like_the_key() -> None:
    stream = ROLE + delta(f"error {KEY}") + delta(ESCAPED) + STOP + DONE
    assert passed_to(stream, redact=streamproxy.redactor(KEY))[1] == stream
    document = JSON_ANSWER.replace(b'"ab"', b'"%b"' % KEY.encode())
    assert passed_to(document, label="application/json", redact=streamproxy.redactor(KEY))[1] == document


def test_in_v1_what_comes_behind_the_end_passes_and_is_no_life() -> None:
    for last in (DONE, event({"error": "x"}), b"event: message_stop\ndata: {}\n\n", delta("", "error")):
        answer = streamproxy.PassedAnswer()
        answer.start(200, {"content-type": "text/event-stream"})
        assert answer.feed(ROLE + last) == ROLE + last and answer.state == answer.ENDING
        life = answer.life
        more = delta("more") + b": comment\n\n" + b"data: "
        assert [answer.feed(more[:7]), answer.feed(more[7:-6]), answer.feed(more[-6:])] == [
            b"data: {",
            more[7:-6],
            b"data: ",
        ]
        assert answer.life == life and answer.close(None) == b""
        assert (answer.state == answer.DONE) != bool(answer.failure)


def test_life_grows_with_events_comments_and_bytes_of_documents() -> None:
    for answer in (streamproxy.TextAnswer(), streamproxy.PassedAnswer()):
        answer.start(200, {"content-type": "text/event-stream"})
        lives = [answer.life]
        for data in (b": keep-alive\n\n", b":\n", b"\n", ROLE, b": x\n\n", b"event: ping\ndata: x\n\n", b"id: 3\n\n"):
            answer.feed(data)
            lives.append(answer.life)
        assert len(set(lives)) == len(lives) - isinstance(answer, streamproxy.PassedAnswer) and answer.notes.events == 2
    answer.feed(b"data: {")
    assert answer.life == lives[-1]  # an event that drips in is none yet
    answer = streamproxy.PassedAnswer()
    answer.start(200, {"content-type": "application/json"})
    assert [(answer.feed(b"\n"), answer.life, answer.notes.events) for _ in range(2)] == [(b"", 1, 1), (b"", 2, 2)]


def test_heartbeats_stand_between_events_alone() -> None:
    for messages, ping in ((False, b": ping\n"), (True, b'event: ping\ndata: {"type": "ping"}\n\n')):
        answer = streamproxy.PassedAnswer(messages=messages)
        assert not answer.pings
        answer.start(200, {"content-type": "text/event-stream"})
        assert answer.pings and answer.eager and answer.ping() == ping
        for at in range(1, len(ROLE)):
            answer = streamproxy.PassedAnswer(messages=messages)
            answer.start(200, {"content-type": "text/event-stream"})
            begin = answer.feed(b": x\n\n" + ROLE[:at])[5:]
            assert answer.ping() == (b"" if begin else ping)  # as the client sees it
            assert begin + answer.feed(ROLE[at:]) == ROLE and answer.ping() == ping
    for label in ("application/json", "audio/mpeg"):
        assert not streamproxy.PassedAnswer().start(200, {"content-type": label}).pings


def test_stream_that_was_asked_for_may_be_open_before_upstream_s_head_and_its_refusal_is_an_event() -> None:
    for messages in (False, True):
        asked = streamproxy.PassedAnswer(messages=messages, stream=True)
        assert asked.pings and asked.content_type == "text/event-stream"
        assert asked.encode_failure(streamproxy.UpstreamError("x")) == b""
        assert asked.ping() and asked.client_head()
        answer = asked.start(429, {"retry-after": "7"})
        answer.feed(b'{"error": {"message": "Slow down"}}')
        answer.close(None)
        assert answer.failure
        told = streamproxy.EventParser().feed(answer.encode_failure(answer.failure))
        assert [event.type for event in told] == ["error" if messages else "message"]
        assert json.loads(told[0].data)["error"]["message"] == "Slow down"
        asked = streamproxy.PassedAnswer(stream=True)
        assert asked.ping() and asked.client_head()
        asked.start(200, {"content-type": "text/event-stream"})
        asked.feed(ROLE)
        assert asked.encode_failure(streamproxy.UpstreamError("x")) == b""  # upstream's events have begun: a cut tells
    for document, words in ((JSON_ANSWER, "document"), (b'{"error": "Sorry"}', "Sorry")):
        asked = streamproxy.PassedAnswer(stream=True)
        assert asked.ping() and asked.client_head()
        asked.start(200, {"content-type": "application/json"})
        assert asked.feed(document) + asked.close(None) == b"" and asked.failure and words in asked.failure.message
        assert asked.encode_failure(asked.failure)


@pytest.mark.parametrize(("status", "document", "type", "code"), [
    (400, b'{"error": {"message": "m",\n"type": "t", "code": "too_long"}}', "t", "too_long"),
    (429, b"Slow down", "rate_limit_error", "rate_limit_exceeded"), (500, b"{}", "api_error", "bad_gateway"),
    (429, b"", "rate_limit_error", "rate_limit_exceeded"),
    (529, b'{"error": "m"}', "overloaded_error", "overloaded"),
])
def test_failure_behind_a_ping_is_of_the_same_kind_as_before_one(
    status: int, document: bytes, type: str, code: str
) -> None:
    asked = streamproxy.PassedAnswer(stream=True)
    assert asked.ping() and asked.client_head()
    answer = asked.start(status, {})
    assert answer.feed(document) + answer.close(None) == b""
    (event,) = streamproxy.EventParser().feed(answer.encode_failure(answer.failure))
    error = json.loads(event.data)["error"]
    assert (error["type"], error["code"]) == (type, code)


def test_time_out_behind_a_ping_is_told_as_one() -> None:
    with Stage(streamproxy.PassedAnswer(stream=True), heartbeat=1, first_byte_timeout=3) as stage:
        stage.upstream = stage.connect()
        assert b": ping" in stage.seen(1.5)
        data = re.findall(rb"(?m)^data: (.+)$", stage.seen(9) + stage.seen(9))
        assert [json.loads(text)["error"]["code"] for text in data] == ["timeout"]


@pytest.mark.parametrize(("label", "body", "status"), [
    ("application/json", b"", 200), ("", b"", 200), ("text/plain", b"", 200), ("application/json", b"", 204),
    ("", b"", 205), ("text/plain", b"words", 200), ("", b"words", 200), ("application/json", b"null", 200),
    ("application/json", JSON_ANSWER[:-9], 200),
])
def test_what_is_no_answer_fails_where_a_stream_was_asked_for(label: str, body: bytes, status: int) -> None:
    answer, out = passed_to(body, label=label, status=status, stream=True)
    assert out == b"" and answer.failure.status == 502
    answer, out = passed_to(body, label=label, status=status)
    assert (out, answer.failure) == (body, None)
    for media in ("audio/mpeg", "application/octet-stream"):
        answer, out = passed_to(b"ID3", label=media, stream=True)
        assert (out, answer.failure) == (b"ID3", None)


def test_refusal_whose_body_does_not_end_is_told_once_its_document_is_whole() -> None:
    head = b"HTTP/1.1 429 No\r\nRetry-After: 7\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n"
    for document in (b'{"error": {"message": "Slow down"}}', b"Slow down", b""):
        with Stage(head=head, idle_timeout=5, first_byte_timeout=5) as stage:
            stage.begin()
            stage.upstream.send(document)
            stage.turn(2)
            assert not stage.ended
            stage.seen(streamproxy.END_GRACE + 0.1)
            assert stage.ended == document.startswith(b"{")
            stage.seen(6)
            failure = stage.stream.failure
            assert stage.ended and failure.status == 429 and failure.fields["Retry-After"] == "7"
            assert failure.message == ("Slow down" if document else "Upstream refused the request with status 429.")


def test_refusal_whose_document_was_cut_is_told_in_our_words() -> None:
    cut = streamproxy.UpstreamError("cut")
    for document, passes in ((b'{"error":{"mess', False), (b'{"error":{"message":"x"}}', True), (b"words", True)):
        answer = streamproxy.PassedAnswer().start(429, {})
        answer.feed(document)
        answer.close(cut)
        assert answer.failure and answer.failure.status == 429 and bool(answer.failure.document) == passes


def compact(text: str = "a", reason: str | None = None, **more: object) -> bytes:
    payload = {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": reason}], **more}
    return event(json.dumps(payload, separators=(",", ":")).encode())


C = compact()


@contextlib.contextmanager
def time_in_proportion() -> Iterator[None]:
    """What is done in it is given so much that it takes milliseconds, or, if each byte is looked at for each, minutes.

    Of this thread's own time: a machine under load changes nothing.
    """
    began_at = time.thread_time()
    yield
    assert time.thread_time() - began_at < 5


def stage_with_comments(**settings: Any) -> Stage:
    """A stage of /v1 whose stream has begun."""
    stage = Stage(streamproxy.PassedAnswer(stream=True), heartbeat=15.0, **settings)
    stage.begin()
    stage.upstream.send(chunk(C))
    assert C in stage.seen()
    return stage


@pytest.mark.parametrize("comment", [b": ping\n", b": ping\r\n", b": ping\n\n", b": a\n: b\n", b":\n"])
def test_comment_passes_and_is_life_with_a_blank_line_or_not(comment: bytes) -> None:
    with stage_with_comments(idle_timeout=60.0) as stage:
        for seconds in range(14, 1400, 14):
            stage.upstream.send(chunk(comment))
            assert comment[:-1] in stage.seen(seconds) and not stage.ended
        stage.upstream.send(chunk(b"\n" + C), chunk(compact("", "stop") + DONE))
        stage.turn()
        assert C + compact("", "stop") in stage.seen() and stage.stream.answer.notes.events == 4


@pytest.mark.parametrize("comment", [b": " + b"x" * 300 + b"\n", b": ping\n" * 40, b": " + b"x" * 30_000 + b"\n"])
def test_comments_that_are_long_or_many_are_life(comment: bytes) -> None:
    with stage_with_comments(idle_timeout=60.0) as stage:
        for seconds in range(50, 500, 50):
            stage.upstream.send(chunk(comment))
            stage.turn(3)
            assert comment[-2:] + b"\r\n" in stage.seen(seconds) and not stage.ended


def test_comment_without_an_end_is_not_looked_at_again_with_each_piece() -> None:
    answer = streamproxy.PassedAnswer().start(200, {"content-type": "text/event-stream"})
    answer.feed(C + b": ")
    with time_in_proportion():
        for _ in range(1000):
            answer.feed(b"x" * 2048)


def test_byte_order_mark_behind_a_ping_costs_no_event() -> None:
    answer = streamproxy.PassedAnswer(stream=True)
    sent = answer.ping()
    answer.client_head()  # with which that leaves
    answer.start(200, {"content-type": "text/event-stream"})
    sent += answer.feed(b"\xef\xbb\xbf" + C) + answer.feed(C + DONE)
    assert len(streamproxy.EventParser().feed(sent)) == 3


@pytest.mark.parametrize("type", [
    "image_generation.completed", "image_edit.completed", "speech.audio.done", "transcript.text.done",
])
@pytest.mark.parametrize("named", [True, False])
def test_answer_of_images_or_speech_is_whole_with_its_last_event(type: str, named: bool) -> None:
    last = (f"event: {type}\n" if named else "").encode() + event({"type": type})
    for end in (b"", DONE):
        answer, out = passed_to(last * 2 + end)
        assert (out, answer.state, answer.failure) == (last * 2 + end, answer.DONE, None)
    answer, _ = passed_to(last, event({"type": "image_generation.partial_image"}))
    assert answer.state == answer.DONE
    for parts in ((event({"type": "image_generation.partial_image"}),), (last[:-4],), (last[:-3],) if named else ()):
        answer, _ = passed_to(*parts)
        assert answer.failure, parts
    for images in (1, 2):
        answer, _ = passed_to(last * images, choices=2)
        assert bool(answer.failure) == (images < 2)


@pytest.mark.parametrize("stop_reason", ["my secret words", 128009, None])
def test_words_that_vllm_stopped_at_are_not_told(stop_reason: object) -> None:
    answer, _ = passed_to(one_choice(delta={}, finish_reason="stop", stop_reason=stop_reason), DONE)
    assert answer.notes.finish_reason == "stop"


@pytest.mark.parametrize(("comment", "beats"), [
    (b": working\n", True), (b": half a li", False), (b"event: x\n", False),
])
def test_heartbeats_go_on_behind_a_comment_that_is_whole(comment: bytes, beats: bool) -> None:
    with stage_with_comments(idle_timeout=0.0) as stage:
        stage.upstream.send(chunk(comment))
        stage.seen(1)
        assert (streamproxy.PING in b"".join(map(stage.seen, range(2, 60)))) == beats


def test_comment_that_comes_in_pieces_and_ends_up_in_an_event() -> None:
    for text in (b": a\n: b\n" + C + DONE, b": a\r\n\r\n: b\n\n" + C + b": c\n" + C + DONE):
        for first in range(len(text)):
            for second in range(first, len(text), 7):
                parts = text[:first], text[first:second], text[second:]
                answer, out = passed_to(C, *filter(None, parts))
                assert out == C + text and answer.state == answer.DONE


@pytest.mark.parametrize(("label", "document"), [
    ("text/html", b"<html>busy</html>"), ("application/json", b""), ("application/x-ndjson", b'{"a":1}\n{"b'),
    ("application/json", b'{"data":"%b"}' % (b"A" * 3000)), ("application/json", b'{"data":"%b"}' % (b"A" * 300_000)),
    ("text/event-stream", b"dat"), ("text/event-stream", b""),
])
def test_what_is_no_stream_is_never_whole_where_one_was_begun(label: str, document: bytes) -> None:
    answer = streamproxy.PassedAnswer(stream=True)
    sent = answer.ping()
    answer.client_head()  # with which that leaves
    answer.start(200, {"content-type": label, "content-length": str(len(document))})
    sent += answer.feed(document) + answer.close(None)
    assert answer.failure
    told = answer.encode_failure(answer.failure)
    events = streamproxy.EventParser().feed(sent + told)
    words = [json.loads(event.data)["error"]["message"] for event in events]
    assert words == [answer.failure.message] * bool(told) and bool(told) == (document != b"dat")  # else a cut tells


def test_fields_that_stand_where_a_large_document_is_cut_for_a_look_are_no_fields() -> None:
    for size in range(1950, 2080):
        fields = f'"note":"{"n" * size}","model":"gpt-x","usage":{{"prompt_tokens":1,"details":{{"a":1}}}}'
        document = f'{{{fields},"data":"{"y" * 300_000}","end":1}}'.encode()
        length = {"content-length": str(len(document)), "transfer-encoding": ""}
        answer, out = passed_to(document, label="application/json", fields=length)
        assert out == document and not answer.failure and answer.notes.model in (None, "gpt-x"), size


@pytest.mark.parametrize(("last", "passes"), [
    (compact("***bold***", "stop")[:-1], True), (compact("***bold***", "stop")[:-2], True),
    (compact("***bold***", "stop")[:-4], False), (b'data: {"error": {"message": "***"}}', False),
])
def test_last_event_without_its_blank_line_passes_as_it_is_unless_it_may_be_an_error(last: bytes, passes: bool) -> None:
    _, out = passed_to(C, last, redact=streamproxy.redactor(KEY))
    assert (out == C + last) == passes and (b"***" in out) == passes


def test_usage_and_model_are_noted_wherever_they_stand() -> None:
    usage = {"prompt_tokens": 1, "completion_tokens": 2}
    last = compact(usage=usage)
    for parts in ((last,), (last[:10], last[10:]), (C + last,), (C + last[:-1], last[-1:]), (C, C, last)):
        answer = streamproxy.PassedAnswer().start(200, {"content-type": "text/event-stream"})
        for part in (compact(model="gpt-x"), *parts):
            if not answer.skim(part):
                answer.feed(part)
        assert answer.notes.usage == usage, parts
    unnamed = event({"choices": [], "model": "", "prompt_filter_results": []})
    for count in range(1, streamproxy.MAX_UNNAMED):
        answer = streamproxy.PassedAnswer().start(200, {"content-type": "text/event-stream"})
        for part in (unnamed * count, compact(model="gpt-x"), C):
            if not answer.skim(part):
                answer.feed(part)
        assert answer.notes.model == "gpt-x"


@pytest.mark.parametrize(("members", "model"), [
    ('"model":"gpt-x"', "gpt-x"), (r'"model":"gpt-\u0078"', "gpt-x"), ('"model": "gpt-x"', "gpt-x"), ('"a":1', None),
    ('"provider":{"model":"inner"},"model":"gpt-x"', "gpt-x"), (r'"note":"\"model\":\"no\"","model":"gpt-x"', "gpt-x"),
    ('"note":"}{","model":"gpt-x"', "gpt-x"), ('"model":""', None), ('"model":null', None), ('"model":"ä"', "ä"),
    (f'"model":"{"m" * 200}"', "m" * 100), (f'"model":"x{KEY}"', "x[redacted]"),
])
def test_model_is_noted_from_the_first_event_that_names_it(members: str, model: str | None) -> None:
    first = f'data: {{{members},"choices":[{{"delta":{{"content":"model"}},"finish_reason":null}}]}}\n\n'.encode()
    answer, out = passed_to(first, redact=streamproxy.redactor(KEY))
    assert (answer.notes.model, answer.notes.events, out) == (model, 1, first)


@pytest.mark.parametrize("cut", [0, 1, 9, None])
def test_error_in_a_document_that_is_labelled_a_stream_is_told_by_its_status(cut: int | None) -> None:
    document = b'{"error":{"message":"slow down","code":429}}'
    head = STREAM_HEAD[:STREAM_HEAD.index(b"Transfer")] + b"Content-Length: %d\r\n\r\n" % len(document)
    with Stage(streamproxy.PassedAnswer(stream=True), head=head + document[:cut]) as stage:
        stage.begin()
        stage.upstream.send(document[len(document) if cut is None else cut :])
        stage.turn(2)
        assert stage.ended and stage.stream.failure.status == 429
        assert (document in stage.seen()) == (cut == 0)  # a head that has left cannot be taken back


def test_event_larger_than_is_held_passes_as_it_comes() -> None:
    large = b"event: x\ndata: " + b"y" * 9000 + b"\n\n"
    with unittest.mock.patch.object(streamproxy, "MAX_EVENT_SIZE", 2000):
        for step in (100, 700, 9999):
            stream = C + large + C + large + DONE
            answer, out = passed_to(*(stream[at : at + step] for at in range(0, len(stream), step)))
            assert (out, answer.state, answer.failure) == (stream, answer.DONE, None)
        answer = streamproxy.PassedAnswer().start(200, {"content-type": "text/event-stream"})
        assert b"".join(map(answer.feed, (large[:1500], large[1500:3000], large[3000:4000]))) == large[:4000]


@pytest.mark.parametrize("media", ["text/html", "application/xhtml+xml"])
def test_page_is_no_answer_to_whoever_asked_for_a_stream(media: str) -> None:
    page = b"<html>blocked</html>"
    answer, out = passed_to(page, label=f"{media}; charset=utf-8", stream=True)
    assert out == b"" and "a document where a stream was asked for" in str(answer.failure)
    answer, out = passed_to(JSON_ANSWER, label=f"{media}; charset=utf-8", stream=True)
    assert (out, answer.failure) == (JSON_ANSWER, None)
    answer, out = passed_to(page, label=f"{media}; charset=utf-8")
    assert (out, answer.failure) == (page, None)


def test_error_in_a_bare_document_behind_a_ping_is_an_event_of_its_own() -> None:
    answer = streamproxy.PassedAnswer(stream=True)
    sent = answer.ping()
    answer.client_head()
    answer.start(200, {"content-type": "text/event-stream"})
    sent += answer.feed(b'{"error": {"message": "busy"}}') + answer.close(None)
    assert answer.failure
    sent += answer.encode_failure(answer.failure)
    assert [json.loads(event.data)["error"]["message"] for event in streamproxy.EventParser().feed(sent)] == ["busy"]


def test_error_in_a_typed_delta_is_none_of_the_text() -> None:
    fine = b'event: response.output_text.delta\ndata: {"type": "response.output_text.delta", "delta": "x"}\n\n'
    assert streamproxy.is_dull(fine) and not streamproxy.is_dull(fine.replace(b'"delta":', b'"error":'))


@pytest.mark.parametrize("last", [b"0;sig=x", b"00;sig=x", b"0 ;sig=x", b"0 ", b"000"])
def test_last_chunk_of_upstream_may_have_an_extension_wherever_it_is_cut(last: bytes) -> None:
    data = b"3;a=b\r\nabc\r\n" + last + b"\r\n\r\n"
    for at in range(len(data)):
        decoder = streamproxy.ChunkedDecoder(lenient=True)
        assert decoder.feed(data[:at]) + decoder.feed(data[at:]) == b"abc" and decoder.complete, at


@pytest.mark.parametrize(("block", "count"), [
    (C, 1), (C * 3, 3), (C + compact("", "stop"), 0), (compact("", "stop"), 0), (compact("error"), 0),
    (C + compact("error"), 0),
    (C + event({"detail": "x"}), 0), (event({"detail": "x"}), 0), (C + DONE, 0), (DONE, 0), (C + b"event: x\n" + C, 0),
    (b"event: x\n" + C, 0), (b"d: " + C[6:], 0),
    (b": " + C[6:], 0), (C + b": x\n\n", 0), (C + b"\n", 0), (C + C.replace(b"\n\n", b"\r\rdata: x\n\n"), 0),
    (C[:-2] + b"\rdata: [DONE]\n\n", 0), (C[:-2] + b"\r\r", 0), (C[:-2] + b"\r\r" + DONE, 0),
    (delta("a"), 0), (b"\n\n", 0), (b"", 0),
    (event(b'{"choices":[{"finish_reason":null},{"finish_reason":"stop"}]}'), 0),
    (event(b'{"choices":[],"finish_reason":null}'), 0),
    (C.replace(b"data: ", b"data:") * 2, 2), (C + event(b'{"choices":[{"delta":{}}]}'), 2),
])  # fmt: skip
def test_events_in_which_a_completion_just_goes_on(block: bytes, count: int) -> None:
    assert streamproxy.goes_on(block.decode("latin-1")) == count


@pytest.mark.parametrize("ends", [(b"\n\n",), (b"\r\n\r\n",), (b"\n\n", b"\r\n\r\n")])
@pytest.mark.parametrize("spare", [[], [b"\n"], [b"\n", b"\n"]])
def test_events_of_a_block_are_split_and_a_line_end_too_many_is_by_itself(
    ends: tuple[bytes, ...], spare: list[bytes]
) -> None:
    events = [line + end for end in ends for line in (b"data: a", b"event: b\ndata: c", b": d")]
    pieces = [*spare, *(piece for event in events for piece in (event, *spare))]
    assert streamproxy.split_events(b"".join(pieces)) == pieces and streamproxy.split_events(b"") == []


@pytest.mark.parametrize("line", [b"\r", b"\r\n", b"\n", b"a\r", b"a\n", b"a\r\n", b"a"])
def test_block_of_many_lines_is_cut_at_once(line: bytes) -> None:
    with time_in_proportion():
        assert b"".join(streamproxy.split_events(line * 200_000 + b"\r\r")) == line * 200_000 + b"\r\r"


@pytest.mark.parametrize(("piece", "dull"), [
    (C, True), (delta("a"), True), (delta("a").replace(b"\n", b"\r\n"), True),
    (event({"choices": [{"delta": {}}]}), True), (delta("a", "stop"), False),
    (delta('"error"'), False), (delta("an error"), True), (compact(usage=None), True), (compact(usage={"x": 1}), False),
    (DONE, False), (event({}), False),
    (event({"choices": []}), False), (b"event: content_block_delta\ndata: {}\n\n", True),
    (b"event: message_delta\ndata: {}\n\n", False),
    (b"event: response.output_text.delta\r\ndata: {}\r\n\r\n", True),
    (event({"type": "response.output_text.delta"}), True), (event({"type": "message_stop"}), False),
    (event({"type": "message_delta"}), False), (b"event: x.partial_image\ndata: {}\n\n", True),
    (b"event: error\ndata: {}\n\n", False),
    (delta("a").replace(b"\n\n", b"\rdata: [DONE]\n\n"), False), (C[:-1], False), (b": x\n\n", False),
    (compact(usage=None, x={"usage": {"y": 1}}), False), (event({**json.loads(C[6:]), "usage": {"x": 1}}), False),
    (b"event: delta\ndata: {}\ndata: {}\n\n", False),
])  # fmt: skip
def test_event_that_need_not_be_looked_at(piece: bytes, dull: bool) -> None:
    assert streamproxy.is_dull(piece) == dull


def random_json(rng: random.Random, depth: int = 5) -> Any:
    """A value that is like those of servers in its names, and in nothing else."""
    if depth and rng.random() < 0.6:
        names = [
            "error",
            "message",
            "choices",
            "delta",
            "content",
            "finish_reason",
            "usage",
            "detail",
            "code",
            "msg",
            "type",
            "text",
            "errors",
            "model",
            "index",
            "status",
            "x_groq",
            "reasoning",
            "reasoning_details",
            "refusal",
            "loc",
            "object",
            "response",
            "stop_reason",
            "incomplete_details",
            "event",
        ]
        members = {rng.choice(names): random_json(rng, depth - 1) for _ in range(rng.randrange(4))}
        return members if rng.random() < 0.7 else list(members.values())
    return rng.choice(
        [
            None,
            True,
            False,
            0,
            1,
            -1,
            500,
            1.5,
            float("nan"),
            float("inf"),
            "",
            "x",
            "error",
            "null",
            "\ud83d",
            "[DONE]",
            [],
            {},
            "\u00e9" * 9,
            10**400,
        ]
    )


def test_answers_never_raise_whatever_json_comes() -> None:
    rng = random.Random(12)
    for _ in range(4000):
        payload = random_json(rng)
        payload = (
            {"choices": [payload, *rng.choices([payload, random_json(rng, 2)], k=rng.randrange(2))]}
            if rng.random() < 0.5
            else payload
        )
        data = json.dumps(payload, ensure_ascii=rng.random() < 0.9).encode("utf-8", "surrogatepass")
        for answer in (streamproxy.TextAnswer(), streamproxy.EventAnswer("id"), streamproxy.PassedAnswer()):
            asked = answer.start(
                rng.choice([200, 200, 200, 400, 500]),
                {"content-type": rng.choice(["text/event-stream", "application/json", ""])},
            )
            body = rng.choice(
                [data, event(data), b"event: error\n" + event(data), data + b"\n\n", STOP + event(data) + DONE]
            )
            out = asked.feed(body[: len(body) // 2]) + asked.feed(body[len(body) // 2 :]) + asked.close(None)
            assert (asked.state == asked.DONE) != bool(asked.failure)
            if asked.failure:
                json.loads(streamproxy.encode_error(asked.failure, "/"))
            elif answer.pings and not isinstance(answer, streamproxy.PassedAnswer):
                for told in streamproxy.EventParser().feed(out + answer.end()):
                    json.loads(told.data, parse_constant=pytest.fail)


def random_stream(rng: random.Random) -> bytes:
    """Events of every kind, with one of the line ends."""
    kinds = [
        *ERRORS_IN_STREAMS.values(),
        *HARMLESS.values(),
        *TYPED_ENDS.values(),
        delta("a"),
        delta("\U0001f44b"),
        STOP,
        DONE,
        ROLE,
        b": c\n\n",
        b"\n",
        delta("b", "stop"),
    ]
    kinds += [delta("word " * 9).replace(b'": ', b'":')] * 40
    stream = b"".join(rng.choices(kinds, k=rng.randrange(1, 12))).replace(b"\r\n", b"\n")
    return stream.replace(b"\n", rng.choice([b"\n", b"\n", b"\r\n", b"\r"]))[: rng.choice([None, -1, -2, -9])]


def test_answers_are_the_same_however_their_body_is_cut() -> None:
    rng = random.Random(11)
    for _ in range(600):
        stream = random_stream(rng)
        results = set()
        for _ in range(4):
            places = sorted(rng.choices(range(len(stream) + 1), k=rng.randrange(6)))
            parts = [stream[a:b] for a, b in zip([0, *places], [*places, len(stream)])]
            answer, out = passed_to(*parts)
            assert out == stream
            text, told = answer_to(*parts)
            results.add(
                (
                    answer.state,
                    answer.failure and answer.failure.message,
                    answer.notes.events,
                    repr(answer.notes.usage),
                    answer.notes.finish_reason,
                    text.state,
                    text.failure and text.failure.message,
                    told,
                    repr(text.notes.usage),
                    text.notes.finish_reason,
                )
            )
        assert len(results) == 1, stream


def test_api_event_that_seems_to_go_on_is_looked_at_in_the_state_it_arrives_in() -> None:
    goes_on = b'{"choices":[{"finish_reason":null}]}\n'
    answer = streamproxy.PassedAnswer()
    answer.start(200, {"content-type": "text/event-stream"})
    answer.feed(b": " + goes_on + b"\n")
    assert answer.notes.events == 0  # a comment is none
    answer.feed(b"data: " + goes_on + b"e")
    answer.feed(b"vent: error\n\n")
    assert answer.failure and answer.notes.events == 1


# 8 -------------------------------------------------------------------- HTTP framing and heads: RFC 9112


# ---------------------------------------------------------------- chunked coding

CHUNKED = {
    "one chunk": (b"5\r\nhello\r\n0\r\n\r\n", b"hello"),
    "several": (b"1\r\na\r\n2\r\nbc\r\n0\r\n\r\n", b"abc"),
    "data that looks like framing": (b"7\r\n\r\n0\r\n\r\n\r\n0\r\n\r\n", b"\r\n0\r\n\r\n"),
    "hexadecimal, either case, leading zeros": (
        b"00A\r\n0123456789\r\n00b\r\n0123456789a\r\n000\r\n\r\n", b"01234567890123456789a",
    ),
    "extensions": (b'1;a\r\nx\r\n1 ; b = c ;d="e;\\"f"\r\ny\r\n0;z\r\n\r\n', b"xy"),
    "trailers": (b"1\r\nx\r\n0\r\nA: b\r\nC:\r\n\r\n", b"x"),
    "empty": (b"0\r\n\r\n", b""),
}
BROKEN_CHUNKED = {
    "plus": b"+5\r\nhello\r\n",
    "minus": b"-5\r\nhello\r\n",
    "0x": b"0x5\r\nhello\r\n",
    "underscore": b"1_0\r\n0123456789abcdef\r\n",
    "space before": b" 5\r\nhello\r\n",
    "space after": b"5 \r\nhello\r\n",
    "not hexadecimal": b"g\r\n",
    "no size": b"\r\nhello\r\n",
    "LF alone": b"5\nhello\n",
    "size too long": b"1" + b"0" * 15 + b"\r\n",
    "data too long": b"5\r\nhello!\r\n0\r\n\r\n",
    "data too short": b"5\r\nhell\r\n0\r\n\r\n",
    "CR without LF": b"5\r\nhello\r0\r\n\r\n",
    "bad extension": b"5;=x\r\nhello\r\n",
    "NUL in extension": b'5;a="\0"\r\nhello\r\n',
    "endless extension": b"5;" + b"a" * 9000,
    "bad trailer": b"0\r\nno colon\r\n\r\n",
    "endless trailers": b"0\r\n" + b"A: b\r\n" * 5000,
}  # fmt: skip


@pytest.mark.parametrize("name", CHUNKED)
def test_chunked_whole_bytewise_and_cut_everywhere(name: str) -> None:
    data, expected = CHUNKED[name]
    for parts in cuts(data + b"HTTP/1.1 200 OK"):  # what follows the body is no part of it
        decoder = streamproxy.ChunkedDecoder()
        assert b"".join(map(decoder.feed, parts)) == expected, parts
        assert decoder.complete and not decoder.broken


@pytest.mark.parametrize("name", CHUNKED)
def test_chunked_every_cut_off_end_is_truncated(name: str) -> None:
    data, expected = CHUNKED[name]
    for size in range(len(data)):
        decoder = streamproxy.ChunkedDecoder()
        assert expected.startswith(decoder.feed(data[:size]))
        assert not decoder.complete and not decoder.broken
        decoder.close()
        assert not decoder.complete


@pytest.mark.parametrize("name", BROKEN_CHUNKED)
def test_chunked_strict_grammar(name: str) -> None:
    data = b"2\r\nok\r\n" + BROKEN_CHUNKED[name]
    for parts in [[data], [data[at : at + 1] for at in range(len(data))]]:
        decoder = streamproxy.ChunkedDecoder()
        assert b"".join(map(decoder.feed, parts)).startswith(b"ok")  # what came before still counts
        assert decoder.broken and not decoder.complete


@pytest.mark.parametrize(("wire", "strict"), [
    (b"1 \r\na\r\n0\r\n\r\n", False), (b"1\t \r\na\r\n0 \r\n\r\n", False),
    (b"0" * 30 + b"1\r\na\r\n000\r\n\r\n", False), (b"1;x=y \r\na\r\n0\r\n\r\n", False),
    (b"1\r\na\r\n0\r\nTrailer : x\r\n\r\n", False), (b"01\r\na\r\n00\r\n\r\n", True), (b"0" * 30 + b" \r\n\r\n", False),
])  # fmt: skip
def test_chunked_from_upstream_zeros_and_blanks_are_harmless(wire: bytes, strict: bool) -> None:
    for parts in cuts(wire):
        decoder = streamproxy.ChunkedDecoder(lenient=True)
        assert b"".join(map(decoder.feed, parts)) == (b"a" if b"a" in wire else b"")
        assert decoder.complete and not decoder.broken
        decoder = streamproxy.ChunkedDecoder()
        _ = [decoder.feed(part) for part in parts]
        assert decoder.complete == strict


@pytest.mark.parametrize("wire", [
    b" 1\r\na\r\n", b"+1\r\na\r\n", b"0x1\r\na\r\n", b"1 1\r\na\r\n", b"\r\na\r\n", b"1\r\na \r\n", b" \r\n",
    b"1\x0b\r\na\r\n",
])  # fmt: skip
def test_chunked_from_upstream_other_faults_are_faults(wire: bytes) -> None:
    decoder = streamproxy.ChunkedDecoder(lenient=True)
    decoder.feed(wire)
    assert decoder.broken


def test_chunk_of_no_data_is_nothing_since_it_would_end_the_body() -> None:
    assert streamproxy.encode_chunk(b"") == b""
    assert streamproxy.encode_chunk(b"x" * 26) == b"1a\r\n" + b"x" * 26 + b"\r\n"


# ---------------------------------------------------------------- heads


def test_head_of_upstream_may_have_blanks_before_a_colon() -> None:
    data = b"HTTP/1.1 200 OK\r\nContent-Type : a\r\nX\t: b:c\r\n\r\nrest"
    assert streamproxy.parse_answer_head(data) == (200, {"content-type": "a", "x": "b:c"}, b"rest")
    for bad in (b" A: b", b"A b: c", b" : c"):
        with pytest.raises(ValueError, match="grammar"):
            streamproxy.parse_answer_head(b"HTTP/1.1 200 OK\r\n%b\r\n\r\n" % bad)
    with pytest.raises(ValueError, match="grammar"):
        streamproxy.parse_fields(["Host : a"])


@pytest.mark.parametrize(("fields", "expected"), [
    (b"Content-Length: 5\r\nTransfer-Encoding: chunked", {"transfer-encoding": "chunked", "connection": "close"}),
    (b"Transfer-Encoding: chunked, Chunked", {"transfer-encoding": "chunked", "connection": "close"}),
    (b"Content-Length: 5\r\nContent-Length: 5", {"content-length": "5", "connection": "close"}),
    (b"Content-Length: 5\r\nContent-Length: 6", {"content-length": "5, 6", "connection": "close"}),
])
def test_head_of_upstream_that_frames_its_body_twice_is_the_last(fields: bytes, expected: dict[str, str]) -> None:
    assert streamproxy.parse_answer_head(b"HTTP/1.1 200 OK\r\n%b\r\n\r\n" % fields) == (200, expected, b"")


def test_head_of_upstream_with_more_than_400_fields_is_said_to_have_too_many() -> None:
    head = b"HTTP/1.1 200 OK\r\n%b\r\n"
    assert streamproxy.parse_answer_head(head % (b"a: b\r\n" * 400)) == (200, {"a": ", ".join(["b"] * 400)}, b"")
    with pytest.raises(ValueError, match="too many header fields"):
        streamproxy.parse_answer_head(head % (b"a: b\r\n" * 401))


def test_head_lines_are_remembered_but_not_for_ever_nor_long_ones_nor_secrets() -> None:
    known = streamproxy.FieldLines(streamproxy.parse_field_line, streamproxy.MAX_FIELD_LINES)
    for number in range(3 * streamproxy.MAX_FIELD_LINES):
        assert known[f"Name: \t{number} "] == ("name", str(number))
        assert len(known) <= streamproxy.MAX_FIELD_LINES
    known.clear()
    secrets = (
        "Authorization: Bearer a", "X-API-Key: a", "api-key: a", "Cookie: a=b", "Set-Cookie: a=b",
        "Proxy-Authorization: Basic YTpi", "Sec-WebSocket-Protocol: realtime, openai-insecure-api-key.a",
        "Ocp-Apim-Subscription-Key: a", "X-Goog-API-Key: a", "X-Amz-Security-Token: a", "X-Forwarded-Access-Token: a",
        "Cf-Access-Jwt-Assertion: a", "X-Client-Secret: a", "X-Session-Id: a", "Idempotency-Key: a",
    )  # fmt: skip
    for line in (*secrets, "A: " + "b" * 100):
        assert known[line][1] == line.partition(": ")[2] and not known
    for line in ("X-RateLimit-Limit-Tokens: 1", "Content-Type: a", "User-Agent: a", "Host: a"):
        assert known[line] == (line.partition(":")[0].lower(), line[-1]) == known.pop(line)
    assert streamproxy.parse_fields(["A: b", "C: d", "a: e", "A:"]) == {"a": "b, e, ", "c": "d"}


@pytest.mark.parametrize("value", ["a\r\nSet-Cookie: b", "a\nb", "a\rb", "a\0b", "a\x7fb", "ł"])
def test_head_cannot_be_forged_by_a_value(value: str) -> None:
    with pytest.raises(ValueError, match="header field"):
        streamproxy.encode_head("HTTP/1.1 200 OK", {"X-Name": value})


@pytest.mark.parametrize("start", [b"", b"\r\n"])
def test_head_is_there_at_its_end_and_not_before_wherever_it_is_cut(start: bytes) -> None:
    head = start + b"POST /?a=b HTTP/1.1\r\nHost: localhost\r\nA: \xe9\r\nContent-Length: 5\r\n\r\n"
    for size in range(len(head)):
        assert streamproxy.parse_request_head(head[:size]) is None, head[:size]
    for rest in (b"", b"GET", b"12345\r\n\r\n"):
        parsed = streamproxy.parse_request_head(head + rest)
        assert parsed and parsed[1] == rest
        request = parsed[0]
        assert (request.method, request.path, request.query, request.http11) == ("POST", "/", "a=b", True)
        assert request.fields == {"host": "localhost", "a": "\xe9", "content-length": "5"}
        assert request.body.feed(b"1234567") == b"12345" and request.body.complete and request.body.rest == b"67"


# What cannot become a head any more, and the status that says so.
NO_HEADS = {
    "TLS": (b"\x16\x03\x01", 400),
    "TLS behind an empty line": (b"\r\n\x16", 400),
    "a space": (b" ", 400),
    "two empty lines": (b"\r\n\r\n", 400),
    "a bare LF": (b"\n", 400),
    "a bare CR": (b"\rG", 400),
    "a bare LF behind the method": (b"GET\n", 400),
    "HTTP/0.9": (b"GET /\r\n", 400),
    "HTTP/0.9 behind an empty line": (b"\r\nGET /\r\n", 400),
    "a bare LF behind the request line": (b"GET / HTTP/1.1\n", 400),
    "a bare LF behind a field": (b"GET / HTTP/1.1\r\nA: b\n", 400),
    "a bare LF in the last line only": (b"GET / HTTP/1.1\r\nHost: a\r\n\n", 400),
    "the HTTP/2 preface": (b"PRI * HTTP/2.0\r\n", 505),
    "a version that is not ours": (b"GET / HTTP/2.0\r\n", 505),
    "three words": (b"GET / x HTTP/1.1\r\n", 400),
    "a line too long": (b"x" * 65537, 414),
    "a line too long behind an empty one": (b"\r\n" + b"x" * 65537, 414),
    "a target too long": (b"GET /" + b"x" * 70000 + b" HTTP/1.1\r\n\r\n", 414),
    "fields too long": (b"GET / HTTP/1.1\r\nA: " + b"x" * 65536, 431),
    "fields too long, and whole": (b"GET / HTTP/1.1\r\nHost: a\r\nA: " + b"x" * 65536 + b"\r\n\r\n", 431),
    "too many fields": (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"A: b\r\n" * 100 + b"\r\n", 431),
    "too many fields, and more to come": (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 101, 431),
}


@pytest.mark.parametrize("name", NO_HEADS)
def test_head_that_cannot_come_any_more_is_told_at_once(name: str) -> None:
    data, status = NO_HEADS[name]
    with pytest.raises(streamproxy.RequestError) as raised:
        streamproxy.parse_request_head(data)
    assert raised.value.status == status and raised.value.message.endswith(".")
    if len(data) < 200:
        with pytest.raises(streamproxy.RequestError):
            [streamproxy.parse_request_head(data[:size]) for size in range(len(data) + 1)]


@pytest.mark.parametrize("data", [
    b"GET / HTTP/1.1\r\nA: " + b"x" * (65536 - 35) + b"\r\nHost: a\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\n" + b"A: b\r\n" * 99 + b"\r\n", b"\r\nGET / HTTP/1.1\r\nHost:a\r\n\r\n",
    b"GET / HTTP/1.0\r\n\r\n",
], ids=lambda data: f"{data[:12]!r}, {len(data)} bytes")  # fmt: skip
def test_head_as_large_as_it_may_be_or_as_small(data: bytes) -> None:
    parsed = streamproxy.parse_request_head(data)
    assert parsed and parsed[1] == b"" and parsed[0].method == "GET"


# RFC 9112 section 3.2.2: a server must take the absolute form; here, only of the host that the request is for.
@pytest.mark.parametrize(("target", "path", "query"), [
    (b"http://localhost/a?b=c", "/a", "b=c"),
    (b"HTTPS://LocalHost/a", "/a", ""),
    (b"http://localhost", "/", ""),
    (b"http://localhost?b", "/", "b"),
    (b"http://other/a", "http://other/a", ""),
    (b"ftp://localhost/a", "ftp://localhost/a", ""),
    (b"*", "*", ""),
    (b"localhost:80", "localhost:80", ""),
    (b"//localhost/a", "//localhost/a", ""),
    (b"/a?b?c", "/a", "b?c"),
    (b"/http://localhost/", "/http://localhost/", ""),
])  # fmt: skip
def test_head_target_forms(target: bytes, path: str, query: str) -> None:
    parsed = streamproxy.parse_request_head(b"GET " + target + b" HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert parsed and (parsed[0].path, parsed[0].query) == (path, query)


# RFC 9112 section 9.3.
@pytest.mark.parametrize(("version", "connection", "kept"), [
    (b"1.1", b"", True),
    (b"1.1", b"Connection: close\r\n", False),
    (b"1.1", b"Connection: Close\r\n", False),
    (b"1.1", b"Connection: keep-alive\r\n", True),
    (b"1.1", b"Connection: x, close ,y\r\n", False),
    (b"1.1", b"Connection: x\r\nConnection: close\r\n", False),
    (b"1.1", b"Connection: closed\r\n", True),
    (b"1.2", b"", True),
    (b"1.0", b"", False),
    (b"1.0", b"Connection: keep-alive\r\n", False),
])  # fmt: skip
def test_head_says_whether_the_connection_is_kept(version: bytes, connection: bytes, kept: bool) -> None:
    parsed = streamproxy.parse_request_head(b"GET / HTTP/" + version + b"\r\nHost: a\r\n" + connection + b"\r\n")
    assert parsed and parsed[0].keeps_alive == kept


def test_query_of_raw_utf_8_is_read_as_such(server: streamproxy.Server, provider: Provider) -> None:
    with Client(server) as client:
        client.send("GET /?prompt=Grüße HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n\r\n".encode())
        with provider.take() as upstream:
            assert json.loads(upstream.body)["messages"][0]["content"] == "Grüße"


# 9 -------------------------------------------------------------------- Settings

GOOD_SETTINGS = [
    ("bind", "[::1]:0", "[::1]:0"),
    ("bind", "unix:/run/x y.sock", "unix:/run/x y.sock"),
    ("bind", "localhost:65535", "localhost:65535"),
    ("upstream", "http://h:1/v1?api-version=3", "http://h:1/v1?api-version=3"),
    ("auth_header", "api-key: {key}", "api-key: {key}"),
    ("param", "temperature=1", {**SCRIPT, "temperature": 1}),
    ("param", "reasoning_effort=", {n: SCRIPT[n] for n in SCRIPT if n[0] != "r"}),
    (
        "param", '{"max_tokens": null, "stop": ["x"]}',
        {**{n: SCRIPT[n] for n in SCRIPT if n != "max_tokens"}, "stop": ["x"]},
    ),
    ("allow_path", "/v1/images/generations,/v1/audio/speech", ("/v1/images/generations", "/v1/audio/speech")),
    ("keep_alive_timeout", "0", 0.0),
    ("client_param", "model, temperature", ("model", "temperature")),
    ("idle_timeout", "0", 0.0),
    ("heartbeat", "0.25", 0.25),
    ("max_body", "1", 1),
    ("max_streams", "0", 0),
    ("demo", "TRUE", True),
    ("allow_anonymous", "off", False),
    ("log_format", "json", "json"),
    ("log_level", "debug", "debug"),
    ("access_log", "off", "off"),
]  # fmt: skip
BAD_SETTINGS = [
    ("bind", "h:65536"),
    ("bind", "h:+1"),
    ("bind", "::1:8000"),
    ("bind", "unix:"),
    ("upstream", "ftp://h/"),
    ("upstream", "file:///etc/passwd"),
    ("upstream", "h/v1"),
    ("upstream", "http://u:p@h/"), ("upstream", "http://u:p/q@h/"), ("upstream", "u:p@h"),
    ("upstream", "http://h:x/"),
    ("upstream", "http:///v1"),
    ("upstream", "http://h/v 1"),
    ("upstream", "http://h/#x"),
    ("auth_header", "Authorization"),
    ("auth_header", "A: b"),
    ("auth_header", "A b: {key}"),
    ("auth_header", "A: {key}\r\nB: c"),
    ("auth_header", "A: {key}{key}"),
    ("param", "temperature"),
    ("param", "x={"),
    ("param", "stream=false"),
    ("param", "messages=[]"),
    ("param", '{"model": "x"}'),
    ("param", "[1]"),
    ("param", "=1"),
    ("client_param", "messages"),
    ("client_param", "a b"),
    ("idle_timeout", "-1"),
    ("idle_timeout", "1e3"),
    ("idle_timeout", "nan"),
    ("idle_timeout", "1_0"),
    ("idle_timeout", "x"),
    ("allow_path", "/v1"),
    ("allow_path", "/v1/"),
    ("allow_path", "images"),
    ("allow_path", "/v2/x"),
    ("allow_path", "/v1/a/../b"),
    ("allow_path", "/v1/a?b"),
    ("allow_path", "/v1//a"),
    ("allow_path", "/v1/a/"),
    ("allow_path", "*"),
    ("keep_alive_timeout", "-1"),
    ("param", "temperature=NaN"),
    ("max_body", "0"),
    ("max_body", "1.5"),
    ("max_streams", "-1"),
    ("demo", "maybe"),
    ("log_format", "xml"),
    ("log_level", "verbose"),
    ("access_log", "yes"),
    ("host", "a:1"),
    ("host", "unix:/s"),
    ("host", "http://h"),
    ("port", "65536"),
    ("port", "-1"),
    ("port", "tcp"),
]  # fmt: skip


def variables(name: str, value: str) -> dict[str, str]:
    return {
        "OPENAI_API_KEY": KEY, {setting.name: setting.variable for setting in streamproxy.Settings.TABLE}[name]: value,
    }


@pytest.mark.parametrize(("name", "text", "value"), GOOD_SETTINGS)
def test_setting_from_variable_flag_or_text(name: str, text: str, value: object) -> None:
    load = streamproxy.Settings.load
    assert getattr(load(variables(name, text)), name) == value
    repeated = name in ("param", "client_param", "allow_path")
    assert getattr(load({"OPENAI_API_KEY": KEY}, {name: [text] if repeated else text}), name) == value
    assert repeated or getattr(
        streamproxy.Settings(api_key=KEY, **{name: text}), name
    ) == value  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "text"), BAD_SETTINGS)
def test_bad_setting_is_one_line_that_says_what_is_allowed(name: str, text: str) -> None:
    with pytest.raises(streamproxy.SettingsError) as caught:
        streamproxy.Settings.load(variables(name, text))
    line = str(caught.value)
    may_be_key = name == "auth_header" and "{key}" not in text
    shown = "***" if may_be_key else re.sub("(//|^)u:[^@]*@", r"\1***@", text)
    assert "\n" not in line and "allowed: " in line and ascii(shown) in line
    assert "--" + name.replace("_", "-") in line


@pytest.mark.parametrize("text", ["ftp://u:p4ss@h/", "ftp://u:p4/ss@h/", "ftp://u:p4?ss@h/", "u:p4?ss@h", "u:p4/ss@h"])
def test_password_in_an_address_is_not_shown(text: str) -> None:
    with pytest.raises(streamproxy.SettingsError) as caught:
        streamproxy.Settings(api_key=KEY, upstream=text)
    assert "***" in str(caught.value) and "p4" not in str(caught.value) and "ss@" not in str(caught.value)


def test_settings_flag_over_variable_over_default() -> None:
    environ = {"OPENAI_API_KEY": KEY, "STREAMPROXY_MODEL": "from-variable", "STREAMPROXY_PARAM": '{"temperature": 1}'}
    assert streamproxy.Settings.load({"OPENAI_API_KEY": KEY}).model == "gpt-6-luna"
    assert streamproxy.Settings.load(environ).model == "from-variable"
    settings = streamproxy.Settings.load(environ, {"model": "from-flag", "param": ["max_tokens=", "top_p=0.5"]})
    assert settings.model == "from-flag"
    assert settings.param == {**{n: SCRIPT[n] for n in SCRIPT if n != "max_tokens"}, "top_p": 0.5}
    assert settings.param.given == settings.replace(model="x").param.given == {"max_tokens", "top_p"}
    assert streamproxy.Settings(api_key=KEY, param={"top_p": 1, "seed": None}).param == {"top_p": 1}
    assert streamproxy.Settings.load({**environ, "STREAMPROXY_MODEL": ""}).model == "gpt-6-luna"


def test_settings_an_empty_variable_is_none_and_an_empty_flag_is_a_value() -> None:
    environ = {"OPENAI_API_KEY": KEY, "STREAMPROXY_MODEL": "", "STREAMPROXY_SYSTEM": "Be kind."}
    assert streamproxy.Settings.load(environ).system == "Be kind."
    assert streamproxy.Settings.load(environ, {"system": ""}).system == ""
    with pytest.raises(streamproxy.SettingsError, match="--model"):
        streamproxy.Settings.load(environ, {"model": ""})


def test_settings_key_from_a_file_or_the_environment_not_both(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(KEY + "\n")
    assert streamproxy.Settings.load({"OPENAI_API_KEY_FILE": str(file)}).api_key == KEY
    for environ, words in [
        ({"OPENAI_API_KEY_FILE": str(file), "OPENAI_API_KEY": KEY}, "both"),
        ({"OPENAI_API_KEY_FILE": str(tmp_path / "none")}, "no such file"),
        ({"OPENAI_API_KEY": KEY, "STREAMPROXY_CHECK_TOKEN": "t", "STREAMPROXY_CHECK_TOKEN_FILE": str(file)}, "both"),
        ({"OPENAI_API_KEY": KEY + " " + KEY}, "OPENAI_API_KEY: this value is not allowed"),
        ({}, "OPENAI_API_KEY"),
    ]:
        with pytest.raises(streamproxy.SettingsError, match=words) as caught:
            streamproxy.Settings.load(environ)
        check_no_key(str(caught.value))


def test_settings_no_key_is_fine_for_a_loopback_upstream_or_the_demo() -> None:
    for values in ({"upstream": "http://localhost:1/v1"}, {"upstream": "http://[::1]/"}, {"demo": True}):
        assert streamproxy.Settings(**values).api_key == ""  # type: ignore[arg-type]
    with pytest.raises(streamproxy.SettingsError, match="no API key"):
        streamproxy.Settings(upstream="http://localhost.example/")


def test_a_port_alone_is_of_this_machine_and_one_after_a_colon_is_every_address() -> None:
    assert streamproxy.Settings(api_key=KEY, bind="8000").bind == "127.0.0.1:8000"
    assert streamproxy.Settings(api_key=KEY, bind=":8000", allow_anonymous=True).bind == "0.0.0.0:8000"
    with pytest.raises(streamproxy.SettingsError, match="'0.0.0.0:8000' lets others spend your money"):
        streamproxy.Settings(api_key=KEY, bind=":8000")
    for text in ("65536", ":65536", ":", "123456"):
        with pytest.raises(streamproxy.SettingsError, match="allowed: PORT, :PORT, HOST:PORT"):
            streamproxy.Settings(api_key=KEY, bind=text)


@pytest.mark.parametrize("bind", ["0.0.0.0:0", "[::]:0", "192.0.2.1:80", "example.com:80"])
@pytest.mark.parametrize("name", ["bind", "resume_bind"])
def test_settings_others_are_let_in_only_where_that_is_said(name: str, bind: str) -> None:
    with pytest.raises(streamproxy.SettingsError, match=f"^--{name.replace('_', '-')} .*--allow-anonymous"):
        streamproxy.Settings(api_key=KEY, **{name: bind})
    assert bind in streamproxy.Settings(api_key=KEY, allow_anonymous=True, **{name: bind}).addresses.values()
    assert bind in streamproxy.Settings(check="http://chat.example", **{name: bind}).addresses.values()  # serves nobody


@pytest.mark.parametrize(("name", "near"), [
    ("STREAMPROXY_MODLE", "STREAMPROXY_MODEL is the nearest, and "),
    ("STREAMPROXY_IDLE_TIME_OUT", "STREAMPROXY_IDLE_TIMEOUT is the nearest, and "),
    ("STREAMPROXY_UPSTREAM", "OPENAI_BASE_URL is the nearest, and "),
    ("STREAMPROXY_API_KEY", "OPENAI_API_KEY is the nearest, and "),
    ("STREAMPROXY_API_KEY_FILE", "OPENAI_API_KEY_FILE is the nearest, and "),
    ("STREAMPROXY_", ""),
    ("STREAMPROXY_X", ""),
    ("STREAMPROXY_PORT_X", "STREAMPROXY_PORT is the nearest, and "),
])
def test_variable_that_begins_as_ours_do_and_is_none_is_refused_with_the_nearest(name: str, near: str) -> None:
    words = f"{name}: there is no such variable; {near}--help lists them all"
    for value in (KEY, ""):
        with pytest.raises(streamproxy.SettingsError, match=f"^{re.escape(words)}$"):
            streamproxy.Settings.load({"OPENAI_API_KEY": KEY, name: value})


def test_variables_of_kubernetes_for_a_service_of_our_name_are_none_of_ours() -> None:
    # What a pod has in its environment beside Services streamproxy, with ports http and 9, and streamproxy-web.
    environ = {
        "STREAMPROXY_SERVICE_HOST": "10.0.0.1", "STREAMPROXY_SERVICE_PORT": "80", "STREAMPROXY_SERVICE_PORT_HTTP": "80",
        "STREAMPROXY_PORT": "tcp://10.0.0.1:80", "STREAMPROXY_PORT_80_TCP": "tcp://10.0.0.1:80",
        "STREAMPROXY_PORT_80_TCP_PROTO": "tcp", "STREAMPROXY_PORT_80_TCP_PORT": "80",
        "STREAMPROXY_PORT_80_TCP_ADDR": "10.0.0.1", "STREAMPROXY_PORT_9_UDP": "udp://10.0.0.1:9",
    }  # fmt: skip
    environ.update({name.replace("STREAMPROXY_", "STREAMPROXY_WEB_"): text for name, text in environ.items()})
    assert streamproxy.Settings.load({"STREAMPROXY_DEMO": "1", **environ}).bind == "127.0.0.1:8000"
    assert streamproxy.Settings.load({"STREAMPROXY_DEMO": "1", "STREAMPROXY_PORT": "80"}).bind == "127.0.0.1:80"


@pytest.mark.parametrize(("given", "bind"), [
    ({"port": "9000"}, "127.0.0.1:9000"),
    ({"port": "0"}, "127.0.0.1:0"),
    ({"host": "0.0.0.0"}, "0.0.0.0:8000"),
    ({"host": "::1", "port": "1"}, "[::1]:1"),
    ({"host": "[::1]"}, "[::1]:8000"),
    ({"host": "localhost"}, "localhost:8000"),
])
def test_host_and_port_are_parts_of_bind(given: dict[str, str], bind: str) -> None:
    settings = streamproxy.Settings.load({}, {"demo": "1", "allow_anonymous": "1", **given})
    assert (settings.bind, settings.host, settings.port) == (bind, "", None)
    assert streamproxy.Settings(demo=True, allow_anonymous=True, **given).bind == bind  # type: ignore[arg-type]
    assert settings.replace(model="x").bind == bind and settings.replace(port=2).bind == re.sub(r"\d+$", "2", bind)
    for flags in ({"bind": "127.0.0.1:8000"}, {"bind": "unix:/s"}):
        with pytest.raises(streamproxy.SettingsError) as caught:
            streamproxy.Settings.load({"STREAMPROXY_DEMO": "1", "STREAMPROXY_BIND": flags["bind"]}, given)
        assert str(caught.value) == f"STREAMPROXY_BIND and --{next(iter(given))} are both given; allowed: one of them"


def test_what_is_in_force_is_shown_with_where_it_is_from_and_without_secrets(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(KEY)
    flags = "--port", "0", "--param", "top_p=0.5", "--param", "max_tokens=", "--allow-host", "a,b", "--system", "a\nb"
    query = f"api-version=3&key={KEY}"
    status, out, err = run(
        "--print-settings", *flags, OPENAI_API_KEY_FILE=str(tmp_path / "key"), STREAMPROXY_ALLOW_HOST="c",
        OPENAI_BASE_URL=f"http://h/v1?{query}", STREAMPROXY_HOST="localhost", STREAMPROXY_DEMO="yes",
        STREAMPROXY_CHECK=f"http://h/?{query}",
    )  # fmt: skip
    assert (status, err) == (0, "")
    rows = [line.split(None, 1)[0:1] + line[27:].split("  ", 1) for line in out.splitlines()]
    shown = {name: (source, value.strip()) for name, source, value in rows}
    names = [setting.flag or setting.variable for setting in streamproxy.Settings.TABLE]
    assert list(shown) == [name for name in names if name not in ("--host", "--port")]
    script = 'temperature=0.5 frequency_penalty=0 presence_penalty=0 reasoning_effort="none" top_p=0.5'
    assert {name: row for name, row in shown.items() if row[0] != "default"} == {
        "--bind": ("STREAMPROXY_HOST, --port", "localhost:0"), "--upstream": ("OPENAI_BASE_URL", "http://h/v1?***"),
        "OPENAI_API_KEY": ("OPENAI_API_KEY_FILE", "***"), "--param": ("--param", script),
        "--system": ("--system", r"'a\nb'"), "--allow-host": ("--allow-host", "a, b"),
        "--demo": ("STREAMPROXY_DEMO", "on"), "--check": ("STREAMPROXY_CHECK", "http://h/?***"),
    }  # fmt: skip
    defaults = {row.flag or row.variable: row.shown for row in streamproxy.Settings.TABLE}
    assert all(value == defaults[name] for name, (source, value) in shown.items() if source == "default")
    assert run("--print-settings") == run()  # as for serving, there has to be a key


def test_settings_show_no_key() -> None:
    settings = streamproxy.Settings(api_key=KEY, upstream=f"http://h/v1?key={KEY}", check=f"http://h/?key={KEY}")
    check_no_key(repr(settings))


@pytest.mark.parametrize(("name", "given", "taken"), [
    ("allow_origin", "HTTPS://App.Example:443", "https://app.example"),
    ("allow_origin", "http://app.example:80", "http://app.example"),
    ("allow_origin", "http://app.example:443", "http://app.example:443"),
    ("allow_origin", "https://app.example:80", "https://app.example:80"),
    ("allow_origin", "https://app.example:4430", "https://app.example:4430"),
    ("allow_origin", "http://[::1]:3000", "http://[::1]:3000"),
    ("allow_origin", "capacitor://localhost", "capacitor://localhost"),
    ("allow_host", "Chat.Example", "chat.example"),
    ("allow_host", "[FD00::1]", "fd00::1"),
    ("allow_host", "fd00::1", "fd00::1"),
])
def test_setting_that_names_who_may_ask_is_taken_as_requests_have_it(name: str, given: str, taken: str) -> None:
    assert getattr(streamproxy.Settings(demo=True, **{name: given}), name) == (taken,)


@pytest.mark.parametrize(("name", "given", "allowed"), [
    ("allow_origin", "https://*.example.com", "SCHEME://HOST or SCHEME://HOST:PORT"),
    ("allow_origin", "https://app.example/", "SCHEME://HOST or SCHEME://HOST:PORT"),
    ("allow_origin", "https://m\xfcnchen.example", "SCHEME://HOST or SCHEME://HOST:PORT"),
    ("allow_origin", "null", "SCHEME://HOST or SCHEME://HOST:PORT"),
    ("allow_host", "chat.example:8000", "a host name, without a port"),
    ("allow_host", "[fd00::1]:8000", "a host name, without a port"),
    ("allow_host", "*.example", "a host name, without a port"),
])
def test_setting_that_no_request_can_match_is_refused(name: str, given: str, allowed: str) -> None:
    with pytest.raises(streamproxy.SettingsError, match=re.escape(allowed)):
        streamproxy.Settings(demo=True, **{name: given})


def test_settings_given_as_texts_in_a_tuple_are_read() -> None:
    settings = streamproxy.Settings(demo=True, trusted_proxy=("192.0.2.0/24",))
    assert streamproxy.Access(settings).address_of("192.0.2.1", "198.51.100.1") == "198.51.100.1"
    with pytest.raises(streamproxy.SettingsError, match="or a network such as"):
        streamproxy.Settings(demo=True, trusted_proxy=("192.0.2.1/24",))
    with pytest.raises(TypeError, match="no such setting: modle"):
        streamproxy.Settings(demo=True, modle="x")
    with pytest.raises(AttributeError):
        settings.model = "x"


# ---------------------------------------------------------------- the key in what upstream says

LONG_KEY = "sk-proj-" + "".join(random.Random(1).choices(string.ascii_letters + string.digits + "-_", k=156))
PROJECT = "sk-proj-"


def redacted(text: str, key: str) -> str:
    """text without parts of key, found one by one."""
    found = [at for at in range(len(text)) if len(text[at:]) > 7 and text[at : at + 8] in key]
    hidden = {at + ahead for at in found for ahead in range(8)}
    return re.sub("\0+", "[redacted]", "".join("\0" if at in hidden else text[at] for at in range(len(text))))


@pytest.mark.parametrize("key", [KEY, KEY[:8], LONG_KEY, LONG_KEY * 3, "aaaaaaaaaa", "abcabcabcabc", 'a"b\\c"d\\e"f'])
def test_redactor_finds_what_a_search_one_by_one_finds(key: str) -> None:
    redact, chance = streamproxy.redactor(key), random.Random(7)
    for _ in range(300):
        begins = [chance.randrange(len(key)) for _ in range(chance.randrange(8))]
        pieces = [
            key[at : at + chance.randrange(14)] + chance.choice(["", "", " ", "\xe4", "\U0001f44b", "\ud83d", "x"])
            for at in begins
        ]
        assert redact("".join(pieces)) == redacted("".join(pieces), key)


def test_redactor_finds_parts_across_the_borders_of_its_blocks() -> None:
    for at in range(streamproxy._BLOCK_SIZE - 20, streamproxy._BLOCK_SIZE + 1):
        assert streamproxy.redactor(KEY)("." * at + KEY + ".") == "." * at + "[redacted]."


@pytest.mark.parametrize("secret", [
    KEY, KEY[:8], KEY[-8:], KEY[3:12], "sk-Qk***********Xb2e", "sk-" + "*" * 152 + "Xb2e", "***Xb2e", "sk***",
])
def test_redactor_takes_out_the_key_its_parts_and_masked_keys(secret: str) -> None:
    redact = streamproxy.redactor(KEY)
    for text in ("Wrong key {} here", "Wrong key:\n{}\n", '{{"k":"{}"}}', "{}", "x {} y {}"):
        assert redact(text.format(secret, secret)) == text.format("[redacted]", "[redacted]")


@pytest.mark.parametrize("key", ["", "x", "none", "EMPTY", "sk-1234", KEY])
@pytest.mark.parametrize("text", [
    "The model `x` does not exist, none of EMPTY", "next", "sk-1234 is wrong", "", KEY[:7] + " " + KEY[1:8], "2**3",
])
def test_redactor_leaves_text_that_holds_no_8_characters_of_the_key(key: str, text: str) -> None:
    assert streamproxy.redactor(key)(text) == text


HARD_TEXTS = {
    "its beginning, which is known": (PROJECT * 500_000, "[redacted]"),
    "the key": (LONG_KEY * 25_000, "[redacted]"),
    "masks": ("*** " * 1_000_000, "[redacted]"),
    "7 characters of it": ((LONG_KEY[:7] + "!") * 500_000, None),
    "parts of 7": ((LONG_KEY[9:16] + LONG_KEY[43:50]) * 285_000, None),
    "one character": ("a" * 4_000_000, None),
    "backwards": (LONG_KEY[::-1] * 25_000, None),
    "not ASCII": ("\xe4" * 2_000_000, None),
    "noise": ("".join(random.Random(2).choices(LONG_KEY, k=40_000)) * 100, None),
    "the key in escapes": ("".join(f"\\u{ord(letter):04x}" for letter in LONG_KEY) * 1000, "[redacted]"),
    "backslashes": ("\\" * 4_000_000, None),
    "half an escape": ("\\u00" * 1_000_000, None),
    "stars": ("*" * 4_000_000, "[redacted]"),
    "a mask behind much": ("a" * 4_000_000 + "***", "a" * 3_999_000 + "[redacted]"),
}


@pytest.mark.parametrize("name", HARD_TEXTS)
def test_redactor_takes_4_mb_whatever_they_are(name: str) -> None:
    text, expected = HARD_TEXTS[name]
    redact = streamproxy.redactor(LONG_KEY)
    shown = redact(text)
    assert shown == (text if expected is None else expected) or (name == "parts of 7" and shown == "[redacted]")


# KEY stands for it, ESC for it with each character escaped.
KEYED_DOCUMENTS = {
    "plain": ('{"error": {"message": "Wrong KEY", "x": 1.0}}', '{"error": {"message": "Wrong [redacted]", "x": 1.0}}'),
    "escaped": ('{"error": {"message": "Wrong ESC"}, "n":1e2}', '{"error": {"message": "Wrong [redacted]"}, "n":1e2}'),
    "one escape": ('["\\u0073' + KEY[1:] + '"]', '["[redacted]"]'),
    "capitals": ('["\\u006B' + KEY[2:9] + '"]', '["[redacted]"]'),
    "a name": ('{"ESC": 1}', '{"[redacted]": 1}'),
    "behind an escape": ('["\\nKEY", "\\u00e4"]', '["\\n[redacted]", "\\u00e4"]'),
    "masked behind an escape": ('["a\\nsk-***b"]', '["a\\n[redacted]"]'),
    "masked": ('{"a":"Unknown***model","b":"KEY"}', '{"a":"[redacted]","b":"[redacted]"}'),
    "no JSON": ("Wrong KEY!", "Wrong [redacted]!"),
    "no JSON with quotes": ('Wrong "key" KEY \\x', 'Wrong "key" [redacted] \\x'),
    "cut": ('{"error": "\\u00e4 KEY', '{"error": "\\u00e4 [redacted]'),
    "half a pair": ('["\\ud83dKEY"]', '["\\ud83d[redacted]"]'),
    "other letters": ('["\xe4\\tKEY"]', '["\xe4\\t[redacted]"]'),
    "UTF-16": ("\0".join('["KEY"]'.replace("KEY", KEY)), '["[redacted]"]'),
    "in many strings": ('["KEY"' + ', "KEY"' * 900 + "]", '["[redacted]"' + ', "[redacted]"' * 900 + "]"),
    "in very many strings": ('["KEY"' + ', "KEY"' * 5000 + "]", "[redacted]"),
    "one large string": ('{"message": "bad\\n", "input": "' + KEY * 200_000 + '"}', "[redacted]"),
    "masked behind other letters": ('["\\u4e2dsk-***b"]', '["\\u4e2d[redacted]"]'),
    "behind a backslash": ('["\\\\ESC"]', '["\\\\\\u0073[redacted]"]'),
    "a slash": ('["a\\/b", "KEY"]', '["a/b", "[redacted]"]'),
}


@pytest.mark.parametrize("name", KEYED_DOCUMENTS)
def test_redacted_document_has_no_key_where_json_is_decoded(name: str) -> None:
    document, expected = KEYED_DOCUMENTS[name]
    document = document.replace("KEY", KEY).replace("ESC", "".join(f"\\u{ord(character):04x}" for character in KEY))
    assert streamproxy.redact_bytes(document.encode(), streamproxy.redactor(KEY)) == expected.encode()


def test_redacted_document_need_not_be_utf_8() -> None:
    assert (
        streamproxy.redact_bytes(b'["\xff' + KEY.encode() + b'"]', streamproxy.redactor(KEY)) == b'["\xff[redacted]"]'
    )


@pytest.mark.parametrize(
    "document",
    [
        b'{"a":"\\u00e4\\n\\"" , "a":1e5, "x":[NaN]}',
        b"",
        b"\xff\xfe",
        b'"\\ud83d"',
        b"{",
        b'["\\',
        b"<html>\\u0073",
        json.dumps(["a\n" * 9] * 20_000).encode(),
        KEY[:7].encode(),
        b'["\\x"]',
    ],
)
def test_redacted_document_without_the_key_is_the_same_bytes(document: bytes) -> None:
    assert streamproxy.redact_bytes(document, streamproxy.redactor(KEY)) == document


# Lines of a program that uses the module, and what is wrong with each: "" for nothing.
TYPED = {
    'Settings(bnid="127.0.0.1:0")': "bnid",
    'Settings(max_streams="many")': "max_streams",
    "Settings(param=3)": "param",
    'Settings("127.0.0.1:0")': "positional",
    'settings.bind = "127.0.0.1:0"': '"bind"',
    "stream_text(3, settings)": "asked|Argument 1",
    "stream_text('x', settings).finish_reason + 1": "None|operator",
    'Settings(param={"top_p": 0.5}, client_param=["top_p"], idle_timeout=5, allow_host="a.example,b.example")': "",
    "settings.replace(**dict.fromkeys(['model'], 'x')).param.given": "",
    'for text in stream_text([{"role": "user", "content": ["x"]}], settings): print(text.upper())': "",
    "print(ProxyError('x').status + 1, Server(settings).url.upper())": "",
}


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_settings_and_the_library_are_typed(checker: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    script = tmp_path / "program.py"
    script.write_text("from streamproxy import *\nsettings = Settings()\n" + "".join(f"{line}\n" for line in TYPED))
    if checker == "mypy":
        command = [sdk_python("mypy"), "-m", "mypy", "--follow-imports=silent", "--cache-dir=/dev/null"]
    else:
        command = [program("node"), str(request.getfixturevalue("npm_folder") / "node_modules/pyright/index.js")]
    (tmp_path / "streamproxy.py").symlink_to(PROGRAM)
    told = subprocess.run([*command, "program.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert told.returncode == 1, told.stderr
    wrong = dict(re.findall(r"program\.py:([0-9]+):(?:[0-9]+)?.*? error: (.*)", told.stdout))
    for number, (line, words) in enumerate(TYPED.items(), start=3):
        said = wrong.pop(str(number), "")
        assert re.search(words, said) if words else said == "", f"{line}: {said!r}"
    assert wrong == {}


# 10 ------------------------------------------------------------------- Requests


def test_post_asks_upstream_as_the_script_did(server: streamproxy.Server, provider: Provider) -> None:
    with Client(server).ask({"prompt": "ä", "temperature": 9, "model": "x"}), provider.take() as upstream:
        assert upstream.head.startswith("POST /v1/chat/completions HTTP/1.1\r\n")
        assert f"\r\nAuthorization: Bearer {KEY}\r\n" in upstream.head
        assert "\r\nContent-Type: application/json\r\n" in upstream.head
        assert "\r\nAccept-Encoding: identity\r\n" in upstream.head
        assert json.loads(upstream.body) == {
            "model": "gpt-6-luna", "messages": [{"role": "user", "content": "ä"}], "stream": True, "max_tokens": 400,
            "temperature": 0.5, "frequency_penalty": 0, "presence_penalty": 0, "reasoning_effort": "none",
            "stream_options": {"include_usage": True},
        }  # fmt: skip


def test_post_asks_upstream_as_the_settings_say(provider: Provider) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "name": "x"}]
    with running(
        provider, upstream=provider.url + "/?api-version=3", auth_header="api-key: {key}", model="m", system="Be kind.",
        param={"top_p": 1}, client_param=("model", "seed", "stop"),
    ) as server:  # fmt: skip
        with Client(server).ask({"messages": messages, "model": "n", "seed": 7, "n": 2}), provider.take() as upstream:
            assert upstream.head.startswith("POST /v1/chat/completions?api-version=3 HTTP/1.1\r\n")
            assert f"\r\napi-key: {KEY}\r\n" in upstream.head and "Authorization" not in upstream.head
            assert json.loads(upstream.body) == {
                "model": "n", "messages": [{"role": "system", "content": "Be kind."}, *messages], "stream": True,
                "top_p": 1, "seed": 7, "stream_options": {"include_usage": True},
            }  # fmt: skip


def test_post_with_no_key_sends_no_auth_header(provider: Provider) -> None:
    with running(provider, api_key="") as server, Client(server).ask(PROMPT), provider.take() as upstream:
        assert "authorization" not in upstream.head.lower()


# ---------------------------------------------------------------- models, queries and bodies

# Members by which a request of LiteLLM, OpenRouter, OpenAI or Anthropic asks more models, and how they may be spelt.
MORE_MODELS: list[dict[str, Any]] = [
    {"models": ["gpt-6-luna", "gpt-5"]},
    {"Models": ["gpt-5"]},
    {"MODELS": "gpt-5"},
    {"model\u017f": ["gpt-5"]},
    {"fallbacks": ["gpt-5"]},
    {"fallbacks": [{"gpt-5": ["gpt-6-luna"]}]},
    {"FallBacks": "gpt-5"},
    {"fallback_models": ["gpt-5"]},
    {"fallback_model": "gpt-5"},
    {"context_window_fallbacks": [{"gpt-5": []}]},
    {"content_policy_fallbacks": ["gpt-5"]},
    {"context_window_fallback_dict": {"gpt-5": "gpt-6-luna"}},
    {"fallbacks": [{"model": "gpt-5"}]},
    {"model_list": [{"x": {"y": "gpt-5"}}]},
    {"deployment_id": "gpt-5"},
    {"engine": "gpt-5"},
    {"extra_body": {"models": ["gpt-5"]}},
    {"plugins": [{"id": "x", "model": "gpt-5"}]},
    {"tools": [{"type": "image_generation", "model": "gpt-5"}]},
    {"tools": [{"type": "advisor", "Model": "gpt-5"}]},
    {"user_config": {"x": "gpt-5"}},
    {"route": "fallback", "models": ["gpt-5"]},
    {"preset": "gpt-5"},
    {"draft_model": "gpt-5"},
]  # fmt: skip


@pytest.mark.parametrize(("body", "status", "words"), [
    (b'{"model": "gpt-5"}', 403, "'gpt-5'"),
    (b"{}", 400, "one"),
    (b'{"model": "gpt-6-luna", "model": "gpt-5"}', 400, "twice"),
    (b'{"model": "gpt-6-luna", "Model": "gpt-5"}', 400, "one"),
    (b'{"MODEL": "gpt-6-luna"}', 400, "one"),
    (b'{"model": 1}', 400, "string"),
    (b'{"model": ["gpt-6-luna"]}', 400, "string"),
    (b'[{"model": "gpt-6-luna"}]', 400, "object"),
    (b"x", 400, "JSON"),
    (b'{"model": "gpt-6-luna"} {"model": "gpt-5"}', 400, "JSON"),
    (b'{"model": "gpt-6-luna", "x": NaN}', 400, "JSON"),
    ('{"model": "gpt-5"}'.encode("utf-16-le"), 400, "JSON"),
    (b'{"model": "gpt-6-luna\\u0000"}', 403, "x00"),
    *[(json.dumps({"model": "gpt-6-luna", **more}).encode(), 403, "--allow-model") for more in MORE_MODELS],
])
def test_api_model_that_may_not_be_used_is_refused(
    server: streamproxy.Server, provider: Provider, body: bytes, status: int, words: str
) -> None:
    with Client(server).ask(body, path="/v1/chat/completions") as client:
        got, message, _ = api_error(client)
        assert got == status and words in message
    assert provider.nobody_came()


@pytest.mark.parametrize("more", [
    {"models": ["gpt-6-luna", "b"]},
    {"fallbacks": ["b"], "disable_fallbacks": True},
    {"tools": [{"type": "function", "function": {"name": "gpt-5", "model": "gpt-5"}}]},
    {"tools": [{"name": "x", "input_schema": {"properties": {"model": {"enum": ["gpt-5"]}}}}]},
    {"tools": [{"type": "image_generation", "model": "b"}]},
    {"messages": [{"role": "user", "content": {"model": "gpt-5"}}]},
    {"metadata": {"model": "gpt-5"}},
    {"response_format": {"json_schema": {"models": ["gpt-5"]}}},
    {"tools": [{"type": "function", "name": "x", "parameters": {"properties": {"fallback_model": "gpt-5"}}}]},
    {"modalities": ["text"]},
    {"stop": ["gpt-5"]},
    {"provider": {"allow_fallbacks": False, "order": ["gpt-5"]}},
    {"input": [{"type": "message", "model": "gpt-5"}]},
    {"fallbacks": None, "models": ["gpt-6-luna"]},
    {
        "fallbacks": [
            {"model": "b", "messages": [{"role": "user", "content": "gpt-5"}]}, "gpt-6-luna", {"b": ["gpt-6-luna"]},
        ]
    },
])
def test_api_members_that_name_no_other_model_pass(more: dict[str, Any]) -> None:
    settings, asked = streamproxy.Settings(api_key=KEY, allow_model=("b",)), {"model": "gpt-6-luna", **more}
    assert streamproxy.check_model(json.dumps(asked).encode(), settings) == asked


def test_api_members_nested_without_end_are_looked_through() -> None:
    nested = b'{"model": "gpt-6-luna", "x": ' + b"[" * 900 + b'{"models": "gpt-5"}' + b"]" * 900 + b"}"
    with pytest.raises(streamproxy.RequestError):
        streamproxy.check_model(nested, streamproxy.Settings(api_key=KEY))


def test_api_models_that_may_be_used(provider: Provider) -> None:
    for allowed, body in [
        (("a", "b"), b'{"model": "b"}'), (("*",), b'{"model": "any", "Model": "thing"}'), (("*",), b"no JSON at all"),
    ]:
        with running(provider, allow_model=allowed) as server:
            with Client(server).ask(body, path="/v1/completions"), provider.take() as upstream:
                assert upstream.body == body


@pytest.mark.parametrize(("query", "method", "expected"), [
    ("", "POST", ""),
    ("beta=true", "POST", "beta=true"),
    ("model=x", "POST", ""),
    ("beta=true&model=x", "POST", "beta=true"),
    ("b%65ta=1", "POST", "b%65ta=1"),
    ("beta=true;model=x", "POST", ""),
    ("Beta=1&api-version=2&key=3", "POST", ""),
    ("limit=2&after=a_b&order=asc", "POST", ""),
    ("beta=a%3Bmodel%3Dx", "POST", "beta=a%3Bmodel%3Dx"),
    ("limit=2&after=a_b&before=c&order=asc&include=x", "GET", "limit=2&after=a_b&before=c&order=asc&include=x"),
    ("stream=true&starting_after=4&beta", "GET", "stream=true&starting_after=4&beta"),
    ("include[]=a.b&include%5B%5D=c&model=x&m%6fdel=x", "GET", "include[]=a.b&include%5B%5D=c"),
    ("limit=1&&Limit=2&limit%00=3&limits=4", "GET", "limit=1"),
    ("beta=1&limit=1", "DELETE", "beta=1"),
    ("after=YQ==&model", "GET", "after=YQ=="),
    ("beta=\xe4", "GET", ""),
])
def test_harmless_query(query: str, method: str, expected: str) -> None:
    assert streamproxy.harmless_query(query, method) == expected


@pytest.mark.parametrize(("asked", "count"), [
    ({}, 1),
    ({"n": 2}, 2),
    ({"n": 2.0}, 2),
    ({"n": "2"}, 2),
    ({"n": "2.0"}, 2),
    ({"N": 3}, 3),
    ({"n": None}, 1),
    ({"n": "x"}, 1),
    ({"n": [2]}, 1),
    ({"n": True}, 1),
    ({"n": 0}, 1),
    ({"n": -2}, 1),
    ({"n": "nan"}, 1),
    ({"n": "inf"}, 1),
    ({"n": 1, "N": "2"}, 2),
    ({"prompt": ["a", "b"]}, 2),
    ({"prompt": [[1], [2]], "n": "3"}, 6),
    ({"prompt": [1, 2]}, 1),
    ({"prompt": "ab"}, 1),
    ({"prompt": []}, 1),
    ({"Prompt": ["a", "b"]}, 2),
])
def test_choices_are_counted_as_lenient_servers_do(asked: dict[str, Any], count: int) -> None:
    assert streamproxy.count_choices(asked) == count


# ---------------------------------------------------------------- defaults that upstream refuses by name


def openai_error(message: str, param: str | None = None, code: str | None = None) -> bytes:
    return json.dumps({
        "error": {"message": message, "type": "invalid_request_error", "param": param, "code": code}
    }).encode()


def pydantic_error(
    place: list[str], kind: str = "extra_forbidden", message: str = "Extra inputs are not permitted"
) -> list[dict[str, Any]]:
    return [{"type": kind, "loc": place, "msg": message, "input": "none"}]


def vllm_error(message: str, param: str | None = None) -> bytes:
    return json.dumps({
        "object": "error", "message": message, "type": "BadRequestError", "param": param, "code": 400,
    }).encode()


# As the servers say it: OpenAI, Azure, FastAPI, vLLM, Mistral, Groq, Gemini, Anthropic, Fireworks, LiteLLM, xAI,
# Moonshot, Bedrock, Cerebras, serde, JSON Schema.
REFUSED_PARAMETERS = [
    (
        "max_tokens",
        openai_error(
            "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' "
            "instead.",
            "max_tokens", "unsupported_parameter",
        ),
    ),
    (
        "max_tokens",
        openai_error(
            "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
        ),
    ),
    (
        "temperature",
        openai_error(
            "Unsupported value: 'temperature' does not support 0.5 with this model. Only the default (1) value is "
            "supported.",
            "temperature", "unsupported_value",
        ),
    ),
    (
        "temperature",
        openai_error(
            "Unsupported value: 'temperature' does not support 0.5 with this model. Only the default (1) value is "
            "supported."
        ),
    ),
    (
        "reasoning_effort",
        openai_error(
            "Unsupported value: 'none' is not supported with the 'o3' model. Supported values are: 'low'.",
            "reasoning_effort", "unsupported_value",
        ),
    ),
    (
        "reasoning_effort",
        openai_error(
            "Invalid value: 'none'. Supported values are: 'low', 'medium', and 'high'.", "reasoning_effort",
            "invalid_value",
        ),
    ),
    ("reasoning_effort", openai_error("Unrecognized request argument supplied: reasoning_effort")),
    ("presence_penalty", openai_error("Unrecognized request arguments supplied: presence_penalty, stop_x")),
    (
        "stream_options",
        openai_error(
            "Unknown parameter: 'stream_options.include_usage'.", "stream_options.include_usage", "unknown_parameter"
        ),
    ),
    (
        "reasoning_effort",
        openai_error("'none' is not one of ['minimal', 'low', 'medium', 'high'] - 'reasoning_effort'"),
    ),
    ("reasoning_effort", json.dumps({"detail": pydantic_error(["body", "reasoning_effort"])}).encode()),
    (
        "reasoning_effort",
        json.dumps({
            "detail": pydantic_error(["body", "reasoning_effort"], "literal_error", "Input should be 'low' or 'high'")
        }).encode(),
    ),
    (
        "stream_options",
        json.dumps({
            "detail": pydantic_error(
                ["body", "stream_options", "include_usage"], "value_error.extra", "extra fields not permitted"
            )
        }).encode(),
    ),
    (
        "frequency_penalty",
        json.dumps({
            "object": "error", "message": {"detail": pydantic_error(["body", "frequency_penalty"])}, "type": "x",
            "param": None,
        }).encode(),
    ),
    (
        "reasoning_effort",
        vllm_error(
            "[{'type': 'extra_forbidden', 'loc': ('body', 'reasoning_effort'), 'msg': 'Extra inputs are not "
            "permitted', 'input': 'none'}]"
        ),
    ),
    (
        "reasoning_effort",
        vllm_error(
            "1 validation error for Request\nreasoning_effort\n  Extra inputs are not permitted "
            "[type=extra_forbidden, input_value='none', input_type=str]"
        ),
    ),
    (
        "reasoning_effort",
        vllm_error(
            "1 validation error:\n  {'type': 'literal_error', 'loc': ('body', 'reasoning_effort'), 'msg': \"Input "
            "should be 'low'\", 'input': 'none'}"
        ),
    ),
    ("presence_penalty", openai_error("property 'presence_penalty' is unsupported")),
    ("reasoning_effort", openai_error("`reasoning_effort` is not supported with this model")),
    (
        "reasoning_effort",
        openai_error("reasoning_effort must be one of `low`, `medium`, or `high`", "reasoning_effort"),
    ),
    ("max_tokens", b"Unsupported param: max_tokens"),
    (
        "frequency_penalty",
        json.dumps([{
            "error": {
                "code": 400, "status": "INVALID_ARGUMENT",
                "message": 'Invalid JSON payload received. Unknown name "frequency_penalty": Cannot find field.',
            }
        }]).encode(),
    ),
    (
        "presence_penalty",
        (b'{"type":"error","error":{"type":"invalid_request_error","message":"presence_penalty: Extra inputs are not '
         b'permitted"}}'),
    ),
    (
        "temperature",
        (b'{"type":"error","error":{"type":"invalid_request_error","message":"`temperature` is deprecated for this '
         b'model."}}'),
    ),
    (
        "reasoning_effort",
        openai_error(
            "Extra inputs are not permitted, field: 'reasoning_effort', value: 'none'", None, "invalid_request_error"
        ),
    ),
    (
        "reasoning_effort",
        openai_error(
            "litellm.UnsupportedParamsError: openai does not support parameters: ['reasoning_effort'], for "
            "model=gpt-4.1-mini. To drop these, set x"
        ),
    ),
    (
        "max_tokens",
        openai_error(
            "litellm.BadRequestError: OpenAIException - Error code: 400 - {'error': {'message': \"Unsupported "
            "parameter: 'max_tokens' is not supported\"}}"
        ),
    ),
    (
        "presence_penalty",
        (b'{"code":"Client specified an invalid argument","error":"Model grok-4 does not support parameter '
         b'presencePenalty."}'),
    ),
    ("presence_penalty", b'{"code":"x","error":"Argument not supported on this model: presencePenalty"}'),
    ("presence_penalty", openai_error("Presence penalty is not enabled for this model")),
    (
        "frequency_penalty",
        openai_error(
            "litellm.UnsupportedParamsError: vertex_ai does not support parameters: ['frequency_penalty'], for model=x",
            "None",
        ),
    ),
    ("frequency_penalty", openai_error("property 'frequency_penalty' is unsupported", "validation_error")),
    ("reasoning_effort", openai_error("Reasoning is mandatory for this endpoint and cannot be disabled.")),
    ("temperature", openai_error("invalid temperature: only 1 is allowed for this model")),
    (
        "frequency_penalty",
        (b'{"message":"Malformed input request: #: extraneous key [frequency_penalty] is not permitted, please '
         b'reformat your input and try again."}'),
    ),
    (
        "frequency_penalty",
        (b'{"message":"body.frequency_penalty: property \'body.frequency_penalty\' is '
         b'unsupported","param":"frequency_penalty","code":"wrong_api_format"}'),
    ),
    (
        "reasoning_effort",
        (b"Failed to deserialize the JSON body into the target type: unknown field `reasoning_effort`, expected one of "
         b"`max_tokens`, `temperature` at line 1"),
    ),
    (
        "reasoning_effort",
        (b"Failed to deserialize the JSON body into the target type: reasoning_effort: unknown variant `none`, "
         b"expected `low` at line 1 column 9"),
    ),
    (
        "reasoning_effort",
        b'{"errors":[{"message":"Additional properties are not allowed (\'reasoning_effort\' was unexpected)"}]}',
    ),
    ("reasoning_effort", b'{"error":"invalid request: unknown field: reasoning_effort"}'),
    ("reasoning_effort", b'{"error":{"message":"Reasoning effort is not enabled for this model"}}'),
    ("stream_options", b'{"detail":"stream_options is not supported"}'),
    ("max_completion_tokens", openai_error("Unrecognized request argument supplied: max_completion_tokens")),
    ("temperature", openai_error("This model doesn't support temperature.")),
    ("temperature", b'{"errors":[{"field":"temperature","message":"not supported"}]}'),
    ("temperature", b'{"errors":[{"path":"/temperature","message":"Unknown property"}]}'),
    ("temperature", b'{"error":"Invalid parameter: temperature"}'),
    ("stream_options", b'{"detail":"create() got an unexpected keyword argument \'stream_options\'"}'),
    ("temperature", b'{"message":"temperature is not a valid parameter"}'),
    ("temperature", b'{"message":"The parameter temperature cannot be set for this model"}'),
    (
        "temperature",
        json.dumps({
            "detail": [{
                "loc": ["body", "temperature"], "msg": "extra fields not permitted", "type": "value_error.extra",
            }]
        }).encode(),
    ),
    # TensorRT-LLM, Xinference, Volcengine Ark, relays that check with zod, Vertex, Bedrock.
    (
        "reasoning_effort",
        vllm_error(
            "[{'type': 'enum', 'loc': ('body', 'reasoning_effort', 'enum[ReasoningEffort]'), 'msg': \"Input should be "
            "'High' or 'Low'\", 'input': 'none'}]"
        ),
    ),
    (
        "reasoning_effort",
        b'{"detail":"Invalid reasoning_effort for qwen3.8. Supported values are xhigh, medium, and low."}',
    ),
    (
        "reasoning_effort",
        openai_error(
            "The parameter `reasoning_effort` specified in the request are not valid: value `none` is invalid. Request "
            "id: 0217",
            None, "InvalidParameter",
        ),
    ),
    ("reasoning_effort", openai_error('Invalid option: expected one of "low"|"high"|"max"', "reasoning_effort")),
    ("reasoning_effort", openai_error("reasoning_effort 'none' unsupported; use minimal|low|medium|high|xhigh")),
    (
        "reasoning_effort",
        (b'[{"error":{"code":400,"message":"Budget 0 is invalid. This model only works in thinking mode.",'
         b'"status":"INVALID_ARGUMENT"}}]'),
    ),
    (
        "reasoning_effort",
        openai_error("Unable to submit request because The model does not support setting thinking_budget to 0."),
    ),
    (
        "temperature",
        openai_error(
            "litellm.BadRequestError: BedrockException - {\"message\":\"The model returned the following errors: "
            "temperature may only be set to 1 when thinking is enabled.\"}"
        ),
    ),
    ("temperature", openai_error("unknown field `temperature`, expected one of `reasoning_effort`, `stop`")),
]
# Errors that say nothing of the kind, or only seem to: about other members, about how large a value is, and what a
# client wrote.
NOT_REFUSED = [
    b"",
    b"{}",
    b"[]",
    b"null",
    b"\xff",
    b"Bad Request",
    openai_error(
        "max_tokens is too large: 400. This model supports at most 100 completion tokens", "max_tokens",
        "invalid_value",
    ),
    vllm_error(
        "'max_tokens' or 'max_completion_tokens' is too large: 400. This model's maximum context length is 300 tokens",
        "max_tokens",
    ),
    openai_error("This model does not support images.", "messages"),
    openai_error("Unsupported parameter: 'max_tokens'", "messages[0].role", "invalid_value"),
    json.dumps({"detail": pydantic_error(["body", "messages", "0", "max_tokens"])}).encode(),
    openai_error("This model does not support more than 300 max_tokens"),
    openai_error("max_tokens is not allowed to exceed 300"),
    openai_error("The value of temperature must be at most 1"),
    json.dumps({
        "detail": [{
            "type": "missing", "loc": ["body", "x"], "msg": "Field required",
            "input": {"prompt": "Unsupported parameter: max_tokens"},
        }]
    }).encode(),
    vllm_error(
        "[{'type': 'missing', 'loc': ('body', 'x'), 'msg': 'Field required', 'input': \"Unsupported parameter: "
        "'max_tokens'\"}]"
    ),
    json.dumps({"detail": pydantic_error(["query", "x"])}).encode(),
    openai_error("Unsupported image. max_tokens: 400"),
    openai_error("Unknown parameter: 'foo'. Use 'max_tokens' instead."),
    openai_error("unknown field `foo`, expected one of `max_tokens`, `temperature`"),
    json.dumps([[[[[[[[[[[[{"error": "Unsupported parameter: max_tokens"}]]]]]]]]]]]]).encode(),
    b"[" * 100_000,
    openai_error("x" * 600 + " Unsupported parameter: max_tokens"),
    openai_error("Invalid parameter: 'max_tokens' must be less than 300"),
    b'{"errors":[{"field":"max_tokens","message":"Must be at most 100"}]}',
    openai_error("max_tokens_to_sample: Extra inputs are not permitted"),
    openai_error("Invalid 'max_tokens': integer below minimum value.", "max_tokens", "integer_below_min_value"),
]
SENT = [
    "max_tokens", "max_completion_tokens", "temperature", "frequency_penalty", "presence_penalty", "reasoning_effort",
    "stream_options",
]


@pytest.mark.parametrize(("name", "document"), REFUSED_PARAMETERS)
def test_refused_parameter_is_told(name: str, document: bytes) -> None:
    assert streamproxy.refused_parameter(document, reversed(SENT)) == streamproxy.refused_parameter(document, SENT)
    assert streamproxy.refused_parameter(document, SENT) == name
    # To speak of what may be refused by its name alone is enough, where nothing is.
    others = [other for other in SENT if other not in (name, "reasoning_effort")]
    assert streamproxy.refused_parameter(document, others) is None


def test_refused_parameter_is_told_in_an_event() -> None:
    document = b"event: error\ndata: %b\n\ndata: [DONE]\n\n" % refuse("temperature")
    assert streamproxy.refused_parameter(document, SENT) == "temperature"


def test_refused_parameter_is_told_by_another_name() -> None:
    gemini = b'[{"error":{"code":400,"message":"Penalty is not enabled for models/gemini-2.5-flash"}}]'
    penalties = [name for name in SENT if "penalty" in name]
    assert [streamproxy.refused_parameter(gemini, SENT[SENT.index(name) :]) for name in penalties] == penalties
    assert streamproxy.refused_parameter(gemini, set(SENT) - set(penalties)) is None


@pytest.mark.parametrize("document", NOT_REFUSED)
def test_refused_parameter_is_not_seen_where_none_is_refused(document: bytes) -> None:
    assert streamproxy.refused_parameter(document, SENT) is None


def refuse(name: str) -> bytes:
    return openai_error(
        f"Unsupported parameter: '{name}' is not supported with this model.", name, "unsupported_parameter"
    )


def adapted(
    refusals: streamproxy.Refusals, asked: dict[str, Any] | None = None, **settings: Any
) -> streamproxy.Adapted:
    return streamproxy.Adapted(asked or PROMPT, streamproxy.Settings(api_key=KEY, **settings), refusals)


def members(request: streamproxy.Adapted) -> set[str]:
    return set(json.loads(request.encode())) - {"model", "messages", "stream"}


def test_defaults_that_are_refused_are_left_out_once_each_and_remembered_for_the_model() -> None:
    refusals = streamproxy.Refusals()
    request = adapted(refusals)
    assert members(request) == {*SCRIPT, "stream_options"}
    for name, left in [
        ("max_tokens", {*SCRIPT, "stream_options", "max_completion_tokens"} - {"max_tokens"}),
        ("temperature", {*SCRIPT, "stream_options", "max_completion_tokens"} - {"max_tokens", "temperature"}),
        ("stream_options", {"max_completion_tokens", "frequency_penalty", "presence_penalty", "reasoning_effort"}),
    ]:  # fmt: skip
        assert request.take_refusal(400, refuse(name)) and members(request) == left
        assert not request.take_refusal(400, refuse(name))
    assert json.loads(request.encode())["max_completion_tokens"] == 400
    # nothing is remembered of a request that was not taken
    assert members(adapted(refusals)) == {*SCRIPT, "stream_options"}
    request.keep()
    assert members(adapted(refusals)) == left and members(adapted(refusals, model="x")) == {*SCRIPT, "stream_options"}


def test_max_tokens_goes_under_its_other_name_and_back() -> None:
    refusals = streamproxy.Refusals()
    first = adapted(refusals)
    assert first.take_refusal(400, refuse("max_tokens"))
    first.keep()
    second = adapted(refusals)
    assert "max_completion_tokens" in members(second) and second.take_refusal(422, refuse("max_completion_tokens"))
    assert "max_tokens" in members(second)
    assert second.take_refusal(400, refuse("max_tokens"))
    assert not members(second) & {"max_tokens", "max_completion_tokens"}  # both, by now
    assert not second.take_refusal(400, refuse("max_completion_tokens"))


@pytest.mark.parametrize(("name", "settings"), [
    ("temperature", {"param": ["temperature=0.5"]}),
    ("temperature", {"client_param": ("temperature",)}),
    ("max_tokens", {"param": ["max_tokens=400"]}),
    ("stream_options", {"param": ['stream_options={"x": 1}']}),
    ("max_completion_tokens", {"param": ["max_completion_tokens=9"]}),
    ("seed", {"param": ["seed=1"]}),
    ("model", {}),
    ("messages", {}),
    ("stream", {}),
])
def test_what_the_operator_set_or_a_client_may_set_stands_and_so_does_its_refusal(
    name: str, settings: dict[str, Any]
) -> None:
    request = adapted(streamproxy.Refusals(), **settings)
    assert name in json.loads(request.encode()) and not request.take_refusal(400, refuse(name))
    assert name in json.loads(request.encode())


@pytest.mark.parametrize(("settings", "asked", "gone"), [
    ({"param": ["stream_options="]}, {}, "stream_options"),
    ({"param": ["max_tokens="]}, {}, "max_tokens"),
    ({"param": ["max_tokens="]}, {}, "max_completion_tokens"),
    ({"param": ["max_completion_tokens=9"]}, {}, "max_tokens"),
    ({"client_param": ("max_completion_tokens",)}, {"max_completion_tokens": 9}, "max_tokens"),
])
def test_defaults_that_are_not_wanted_are_not_sent(settings: dict[str, Any], asked: dict[str, Any], gone: str) -> None:
    assert gone not in json.loads(adapted(streamproxy.Refusals(), {**PROMPT, **asked}, **settings).encode())


def test_refusals_count_with_their_status_alone_and_are_remembered_of_a_thousand_models() -> None:
    refusals = streamproxy.Refusals()
    for status in (200, 401, 403, 404, 429, 500):
        assert not adapted(refusals).take_refusal(status, refuse("temperature"))
    for number in range(streamproxy.MAX_MODELS + 10):
        request = adapted(refusals, {**PROMPT, "model": str(number)}, client_param="model")
        assert request.take_refusal(400, refuse("temperature"))
        request.keep()
    assert [
        bool(refusals.of(str(number))) for number in (0, 9, 10, streamproxy.MAX_MODELS + 9)
    ] == [False, False, True, True]


# 11 ------------------------------------------------------------------- Access


@pytest.mark.parametrize("path", ["/", "/?prompt=x", "/v1/chat/completions", "/v1/models"])
def test_token_is_needed_where_it_costs_money(
    provider: Provider, tmp_path: Path, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    tokens = token_file(tmp_path, f"# people\nalice {ALICE}\n\nbob {BOB}\n")
    how: dict[str, Any] = {"path": path, "method": "POST" if path in ("/", "/v1/chat/completions") else "GET"}
    body = None if how["method"] == "GET" else {**ASKED, "prompt": "x"} if path != "/" else PROMPT
    accept = EVENTS if path == "/?prompt=x" else {}
    with running(provider, token_file=tokens) as server, Client(server) as client:
        for fields in (
            {}, {"Authorization": "Bearer x"}, {"Authorization": f"Basic {ALICE}"}, {"x-api-key": ALICE + "x"},
            {"api-key": "\xff"},
        ):
            client.ask(body, **how, **accept, **fields)
            head = client.head()
            assert (head.status, head.fields["WWW-Authenticate"]) == (401, "Bearer")
            client.exactly(int(head.fields["Content-Length"]))
        for name, fields in [
            ("alice", {"Authorization": f"bearer {ALICE}"}), ("bob", {"x-api-key": BOB}), ("alice", {"api-key": ALICE}),
            ("alice", {"Authorization": "Basic x", "api-key": ALICE}),
        ]:
            if path == "/v1/models":
                assert client.ask(None, **how, **fields).head().fields["Content-Type"] == "application/json"
                break
            with Client(server).ask(body, **how, **accept, **fields) as other, provider.take() as upstream:
                assert ALICE not in upstream.head and BOB not in upstream.head
                upstream.send(error_answer(404))
                assert other.head().status == 404
            wait_for(
                lambda name=name: [
                    record for record in caplog.records if getattr(record.msg, "get", {}.get)("client") == name
                ]
            )
    assert ALICE not in caplog.text and BOB not in caplog.text


def test_token_is_not_needed_for_the_page_and_health(tmp_path: Path) -> None:
    with running(None, token_file=token_file(tmp_path, f"a {ALICE}")) as server, Client(server) as client:
        for path in ("/", "/healthz", "/readyz"):
            client.send(f"HEAD {path} HTTP/1.1\r\nHost: any.example\r\n\r\n".encode())
            assert client.head().status == 200


class Watched:
    """A token file, and who looks at it, on a clock of the test's own."""

    def __init__(self, folder: Path, text: str, mode: int = 0o640) -> None:
        self.now, self.path = 1000.0, Path(token_file(folder, text, mode))
        self.tokens = streamproxy.Tokens(str(self.path), lambda: self.now)

    def look(self, text: str | bytes | None = None, mode: int = 0o640, later: float = 0.0) -> list[str]:
        """What is said of the file, after text was written to it, or so many seconds later."""
        self.now += later
        if text is not None:
            self.path.write_bytes(text.encode() if isinstance(text, str) else text)
            self.path.chmod(mode)
        return self.tokens.look()

    def known(self) -> list[str]:
        return [token for token in (ALICE, BOB) if self.tokens.name_of(token)]


def test_tokens_of_a_changed_file_count_at_the_next_look(tmp_path: Path) -> None:
    file = Watched(tmp_path, f"alice {ALICE}")
    assert file.known() == [ALICE] and file.look() == []
    for text, known in [
        (f"alice {ALICE}\nbob {BOB}\n", [ALICE, BOB]), (f"bob {BOB}\n", [BOB]),
        (f"\n # x\r\nalice {ALICE}\r\n", [ALICE]),
    ]:
        assert file.look(text) == [] and file.known() == known
    other = tmp_path / "other"
    other.write_text(f"bob {BOB}\n")
    other.chmod(0o600)
    other.rename(file.path)
    assert file.known() == [ALICE]  # nobody but look touches the file
    assert file.look() == [] and file.known() == [BOB]


@pytest.mark.parametrize("text", ["", "\n", "# alice\n", f"# alice {ALICE}", " \n\t\n"])
def test_tokens_are_all_revoked_by_a_file_that_names_none_which_is_said_once(tmp_path: Path, text: str) -> None:
    file = Watched(tmp_path, f"alice {ALICE}\n")
    assert [("nobody is let in" in line) for line in file.look(text)] == [True] and file.known() == []
    assert file.look() == file.look(later=100) == []
    assert file.look(f"bob {BOB}\n") == [] and file.known() == [BOB]


BAD_TOKEN_FILES = [
    ("alice\n", "line 1"),
    (f"# x\nbob {BOB}\nbob {BOB} x\n", "line 3"),
    (f"a/b {BOB}\n", "line 1"),
    (b"\xff\n", "UTF-8"),
    ("x" * (streamproxy.MAX_TOKEN_FILE_SIZE + 1), "larger"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "words"), BAD_TOKEN_FILES)
def test_tokens_of_a_broken_file_are_not_taken_which_is_said_once_a_minute(
    tmp_path: Path, text: str | bytes, words: str
) -> None:
    file = Watched(tmp_path, f"alice {ALICE}\n")
    assert [words in line and "last version counts" in line and BOB not in line for line in file.look(text)] == [True]
    assert file.look() == file.look(later=59) == [] and len(file.look(later=1)) == 1 and file.known() == [ALICE]
    assert file.look(f"bob {BOB}\n") == [] and file.known() == [BOB] and len(file.look(text)) == 1


def test_tokens_are_all_revoked_by_a_file_that_is_deleted_which_is_said_once(tmp_path: Path) -> None:
    file = Watched(tmp_path, f"alice {ALICE}\n")
    file.path.unlink()
    assert [("nobody is let in" in line) for line in file.look()] == [True] and file.known() == []
    assert file.look() == file.look(later=100) == []
    assert file.look(f"bob {BOB}\n") == [] and file.known() == [BOB]


@pytest.mark.parametrize("how", ["FIFO", "folder", "device"])
def test_tokens_of_what_is_no_file_are_not_taken_and_nobody_waits(tmp_path: Path, how: str) -> None:
    file = Watched(tmp_path, f"alice {ALICE}\n")
    file.path.unlink()
    {"FIFO": os.mkfifo, "folder": os.mkdir, "device": functools.partial(os.symlink, "/dev/zero")}[how](file.path)
    words = {"folder": "directory"}.get(how, "not a regular file")
    assert [words in line for line in file.look()] == [True] and file.look() == [] and len(file.look(later=60)) == 1
    assert file.known() == [ALICE]


def test_tokens_in_a_file_that_others_may_read_count_which_is_said_once_a_minute(tmp_path: Path) -> None:
    file = Watched(tmp_path, f"alice {ALICE}\n", 0o644)
    assert ["chmod o-rwx" in line for line in file.look()] == [True] and file.known() == [ALICE]
    assert file.look(f"bob {BOB}\n", 0o604) == [] and file.known() == [BOB]
    assert len(file.look(later=60)) == 1 and file.look(f"bob {BOB}\n", 0o600) == []
    assert len(file.look("", 0o644)) == 2 and file.known() == []  # a revoked token, and who may read


def test_token_in_a_last_line_without_its_end_counts_once_it_has_stayed_for_a_second(tmp_path: Path) -> None:
    file = Watched(tmp_path, f"alice {ALICE}")
    for half in ("b", "bob", "bob ", f"bob {BOB[:5]}", f"bob {BOB}"):  # as somebody writes it
        assert file.look(f"alice {ALICE}\n{half}", later=0.9) == [] and file.known() == [ALICE]
        assert file.tokens.name_of(BOB[:5]) is None
    assert file.look(later=0.9) == [] and file.known() == [ALICE] and file.look(later=0.1) == []
    assert file.known() == [ALICE, BOB]
    assert file.look(f"bob {BOB}") == [] and file.known() == [BOB]  # one that counted goes on
    assert file.look(f"alice {ALICE}") == [] and file.known() == []  # revoked at once
    assert file.look(later=1) == [] and file.known() == [ALICE]
    assert file.look("alice") == [] and "line 1" in file.look(later=1)[0]


def test_looks_at_the_token_file_do_not_overtake_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = Watched(tmp_path, f"alice {ALICE}\n")
    began, go_on = threading.Event(), threading.Event()
    real = os.fstat

    def slow(number: int) -> os.stat_result:
        began.set()
        assert go_on.wait(DEADLINE)
        return real(number)

    monkeypatch.setattr(os, "fstat", slow)
    first = threading.Thread(target=file.tokens.look)
    first.start()
    assert began.wait(DEADLINE)
    second = threading.Thread(target=file.look, args=("# none\n",))
    second.start()
    wait_for(lambda: file.path.read_text() == "# none\n")
    assert file.known() == [ALICE]  # and nobody waits for those who look
    go_on.set()
    first.join()
    second.join()
    assert file.known() == []


def test_token_that_is_revoked_is_refused_by_the_server(
    provider: Provider, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = Path(token_file(tmp_path, f"alice {ALICE}\n"))
    with running(provider, token_file=str(path)) as server, Client(server) as client:
        for text, status, words in [
            (None, 403, ""), ("", 401, "nobody is let in"), (f"alice {ALICE}\n", 403, ""), ("x\n", 403, "line 1"),
        ]:
            caplog.clear()
            path.write_text(text) if text is not None else None
            def told() -> int:
                client.ask(method="GET", path="/v1/models/x", Authorization=f"Bearer {ALICE}")
                head = client.head()
                client.exactly(int(head.fields["Content-Length"]))
                return head.status
            wait_for(told, lambda got, status=status: got == status)
            wait_for(lambda words=words: words in caplog.text)


@pytest.mark.parametrize(("text", "mode"), [("", 0o640), ("x", 0o600), ("a b c", 0o600), ("# a b", 0o600), (None, 0)])
def test_token_file_that_cannot_be_used_is_a_bad_setting(tmp_path: Path, text: str | None, mode: int) -> None:
    path = token_file(tmp_path, text, mode) if text is not None else str(tmp_path / "none")
    assert run("--demo", "--token-file", path)[::2][0] == 2
    with pytest.raises(streamproxy.SettingsError, match="--token-file"):
        streamproxy.Access(streamproxy.Settings(demo=True, token_file=path))


def test_tokens_let_other_addresses_be_bound(tmp_path: Path) -> None:
    assert streamproxy.Settings(
        api_key=KEY, bind="0.0.0.0:0", token_file=token_file(tmp_path, f"a {ALICE}")
    ).bind == "0.0.0.0:0"


@pytest.mark.parametrize(("host", "settings", "status"), [
    ("localhost", {}, 411),
    ("LOCALHOST:1", {}, 411),
    ("127.0.0.1:9", {}, 411),
    ("127.9.9.9", {}, 411),
    ("[::1]:9", {}, 411),
    ("evil.example", {}, 403),
    ("localhost.evil.example", {}, 403),
    ("192.0.2.1", {}, 403),
    ("chat.example", {"allow_host": ("chat.example",)}, 411),
    ("CHAT.example:443", {"allow_host": ("chat.example",)}, 411),
    ("x.chat.example", {"allow_host": ("chat.example",)}, 403),
    ("chat.example.", {"allow_host": ("chat.example",)}, 403),
    ("0.0.0.0", {}, 403),
])
def test_host_of_a_server_without_tokens(host: str, settings: dict[str, Any], status: int) -> None:
    with running(None, **settings) as server, Client(server) as client:
        client.send(f"POST / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        got, message = client.error()
        assert got == status and (status != 403 or "--allow-host" in message)


@pytest.mark.parametrize("path", ["/", "/v1/chat/completions"])
@pytest.mark.parametrize(("settings", "fields"), [({}, {}), ({}, {"Idempotency_Key": "k"}), ({"resume": 30}, {})])
def test_who_comes_back_where_nothing_is_kept_is_no_new_prompt(
    provider: Provider, path: str, settings: dict[str, Any], fields: dict[str, str]
) -> None:
    asked = PROMPT if path == "/" else ASKED
    with running(provider, **settings) as server:
        with Client(server).ask(asked, path=path, Last_Event_ID="x.3", **fields) as client:
            head = client.head()
            assert head.status == 410 and b"Last-Event-ID" in client.exactly(int(head.fields["Content-Length"]))
        assert provider.nobody_came()


@pytest.mark.skipif(not hasattr(socket, "TCP_NOTSENT_LOWAT"), reason="of Linux and macOS")
def test_little_waits_in_the_system_for_a_client_that_reads_slowly(server: streamproxy.Server) -> None:
    with Client(server) as client:
        client.send(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert client.head().status == 200
        (accepted,) = server.clients
        assert accepted.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT) == streamproxy.MAX_UNSENT


def test_host_that_is_bound_is_one_of_the_server_s_names_in_any_case() -> None:
    access = streamproxy.Access(streamproxy.Settings(api_key=KEY, bind="Chat.Example:80", allow_anonymous=True))
    access.check_host("chat.EXAMPLE:80", str)
    with pytest.raises(streamproxy.RequestError, match="--allow-host"):
        access.check_host("x.chat.example", str)


def test_host_does_not_matter_with_tokens(tmp_path: Path) -> None:
    with running(None, token_file=token_file(tmp_path, f"a {ALICE}")) as server, Client(server) as client:
        client.send(b"GET / HTTP/1.1\r\nHost: any.example\r\n\r\n")
        assert client.head().status == 200


@pytest.mark.parametrize(("host", "status"), [
    ("localhost", 200),
    ("127.0.0.1", 200),
    ("chat.example", 200),
    ("CHAT.example:8080", 200),
    ("evil.example", 403),
    ("unix", 403),
])
def test_host_of_a_server_without_tokens_matters_behind_a_unix_socket_too(
    tmp_path: Path, host: str, status: int
) -> None:
    with running(None, bind=f"unix:{tmp_path}/s", allow_host=("chat.example",)) as server, Client(server) as client:
        for path in ("/", "/v1/models"):
            client.send(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nSec-Fetch-Site: same-origin\r\n\r\n".encode())
            head = client.head()
            client.exactly(int(head.fields["Content-Length"]))
            assert head.status == status


ORIGIN = "https://app.example"


@pytest.mark.parametrize(("fields", "ok"), [
    ({}, True),
    ({"Origin": "http://localhost"}, True),
    ({"Origin": "https://LOCALHOST"}, True),
    ({"Origin": ORIGIN}, True),
    ({"Origin": "https://evil.example"}, False),
    ({"Origin": "null"}, False),
    ({"Origin": ORIGIN + ".evil.example"}, False),
    ({"Origin": ORIGIN + ":444"}, False),
    ({"Origin": "http://app.example"}, False),
    ({"Origin": "http://localhost:81"}, False),
    ({"Origin": "file://"}, False),
    ({"Sec-Fetch-Site": "cross-site"}, False),
    ({"Sec-Fetch-Site": "same-origin", "Origin": "http://x"}, True),
    ({"Sec-Fetch-Site": "cross-site", "Origin": ORIGIN}, True),
    ({"Sec-Fetch-Site": "none"}, True),
    ({"Sec-Fetch-Site": "same-site"}, False),
    ({"Sec-Fetch-Site": "same-site", "Origin": "http://x.localhost"}, False),
])
@pytest.mark.parametrize("path", ["/", "/?prompt=x", "/v1/chat/completions"])
def test_origin_of_a_page(provider: Provider, fields: dict[str, str], ok: bool, path: str) -> None:
    with running(provider, allow_origin=(ORIGIN,)) as server, Client(server) as client:
        how: dict[str, Any] = {"method": "GET", **EVENTS} if "?" in path else {
            "body": {**ASKED, "prompt": "x"} if path != "/" else PROMPT, "Content-Type": "text/plain",
        }
        client.ask(path=path, **how, **fields)
        if ok:
            provider.take().send(error_answer(404))
        else:
            assert provider.nobody_came()
        head = client.head()
        assert head.status == (404 if ok else 403)
        assert head.fields.get("Access-Control-Allow-Origin") == (ORIGIN if fields.get("Origin") == ORIGIN else None)


EXPOSED = [
    "X-Request-Id", "Request-Id", "Retry-After", "Retry-After-Ms", "X-Should-Retry", "X-RateLimit-Remaining-Tokens",
    "X-RateLimit-Reset-Requests", "Anthropic-RateLimit-Input-Tokens-Remaining", "Anthropic-RateLimit-Requests-Limit",
]  # fmt: skip


@pytest.mark.parametrize(("asked", "allowed"), [
    ("authorization,content-type", "authorization, content-type"),
    ("X-Stainless-OS, user-agent", "X-Stainless-OS, user-agent"),
    ("", ""),
    ("anthropic-dangerous-direct-browser-access,x-own", "anthropic-dangerous-direct-browser-access, x-own"),
    ("a b, c,\xe4,d", "c, d"),
])
def test_cors_preflight_lets_an_allowed_origin_send_any_field(tmp_path: Path, asked: str, allowed: str) -> None:
    wanted = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": asked}
    with running(None, allow_origin=(ORIGIN,), token_file=token_file(tmp_path, f"a {ALICE}")) as server:
        with Client(server) as client:
            client.send(f"OPTIONS /v1/responses/resp_1 HTTP/1.1\r\nHost: localhost\r\nOrigin: {ORIGIN}\r\n".encode())
            client.send("".join(f"{name}: {value}\r\n" for name, value in wanted.items()).encode("latin-1"), b"\r\n")
            head = client.head()
            assert head.status == 204
            assert {
                name: value for name, value in head.fields.items() if name.startswith("Access-Control-Allow")
                or name == "Vary"
            } == {
                "Access-Control-Allow-Origin": ORIGIN, "Access-Control-Allow-Methods": "GET, DELETE, OPTIONS",
                "Access-Control-Allow-Headers": allowed, "Vary": "Origin",
            }  # fmt: skip
            client.ask(method="OPTIONS", path="/", Origin="https://evil.example", **wanted)
            status, message = client.error()
            assert status == 403 and "--allow-origin" in message
            client.ask(method="OPTIONS", path="/")
            assert client.head().fields["Allow"] == "GET, HEAD, OPTIONS, POST"
            client.ask(PROMPT, Origin=ORIGIN)
            head = client.head()
            assert (head.status, head.fields["Access-Control-Allow-Origin"]) == (401, ORIGIN)  # the page can read why
            assert set(EXPOSED) <= set(head.fields["Access-Control-Expose-Headers"].split(", "))


@pytest.mark.parametrize(("forwarded", "trusted", "client"), [
    ("", (), "127.0.0.1"),
    ("192.0.2.7", (), "192.0.2.7"),
    ("192.0.2.7, 198.51.100.1", (), "198.51.100.1"),
    ("192.0.2.7, 198.51.100.1", ("198.51.100.0/24",), "192.0.2.7"),
    ("198.51.100.2, 198.51.100.1", ("198.51.100.0/24",), "198.51.100.2"),
    ("192.0.2.7, nonsense", (), "127.0.0.1"),
    ("nonsense, 192.0.2.7", ("192.0.2.7",), "192.0.2.7"),
    ("2001:db8::7", (), "2001:db8::7"),
    ("192.0.2.7:555", (), "192.0.2.7"),
    ("[2001:db8::1]:443", (), "2001:db8::1"),
    ('"[2001:db8::1]"', (), "2001:db8::1"),
    ('"[::ffff:192.0.2.7]:1"', (), "192.0.2.7"),
    ('"192.0.2.7:1"', (), "192.0.2.7"),
    ("[2001:db8::1%eth0]", (), "2001:db8::1"),
    ("192.0.2.7:5, 198.51.100.1:6", ("198.51.100.0/24",), "192.0.2.7"),
    ("unknown", (), "127.0.0.1"),
    ("192.0.2.7:x", (), "127.0.0.1"),
    ("[2001:db8::1", (), "127.0.0.1"),
    ("192.0.2.7:555555", (), "127.0.0.1"),
    ("_hidden:1", (), "127.0.0.1"),
    ("192.0.2.7, ", (), "127.0.0.1"),
    ("192.0.2.7\t", (), "192.0.2.7"),
    ("127.0.0.1", (), "127.0.0.1"),
])
def test_forwarded_address_counts_from_trusted_proxies_alone(
    caplog: pytest.LogCaptureFixture, forwarded: str, trusted: tuple[str, ...], client: str
) -> None:
    settings = streamproxy.Settings.load({"OPENAI_API_KEY": KEY, "STREAMPROXY_TRUSTED_PROXY": ",".join(trusted)})
    access = streamproxy.Access(settings)
    assert access.address_of("127.0.0.1", forwarded) == client
    assert access.address_of("203.0.113.9", forwarded) == "203.0.113.9"
    assert access.address_of("unix", forwarded) == (
        client if client != "127.0.0.1" or forwarded == "127.0.0.1" else "unix"
    )


def test_limits_of_streams_for_each_client_and_ipv6_network(provider: Provider) -> None:
    with running(provider, max_streams_per_client=1) as server:
        def ask(address: str) -> Client:
            return Client(server).ask(PROMPT, X_Forwarded_For=address)
        with ask("2001:db8::1"), provider.take() as upstream:
            with ask("2001:db8::2") as second:
                head = second.head()
                assert (head.status, head.fields["Retry-After"]) == (429, "1")
            with ask("2001:db8:0:1::1") as third, provider.take() as other:
                other.start(A)
                assert third.head().status == 200
            upstream.start(STOP, DONE)
        wait_for(lambda: not server.snapshot()["streams"])
        with ask("2001:db8::2") as second, provider.take() as upstream:
            upstream.start(A)
            assert second.head().status == 200


def test_limits_of_requests_a_minute_say_truly_when_to_come_again() -> None:
    now = 100.0
    limits = streamproxy.Limits(streamproxy.Settings(api_key=KEY, requests_per_minute=6), lambda: now)
    def ask(client: str) -> int:
        try:
            limits.enter(client)
            limits.leave(client)
            return 0
        except streamproxy.RequestError as error:
            assert error.status == 429
            return int(error.fields["Retry-After"])
    assert [ask("a") for _ in range(7)] == [0] * 6 + [10] and ask("b") == 0
    now += 4.5
    assert ask("a") == 6
    now += 5.4
    assert ask("a") == 1
    now += 0.1
    assert (ask("a"), ask("a")) == (0, 10)
    now += 1000
    assert [ask("a") for _ in range(7)] == [0] * 6 + [10]
    limits.enter("a", counts=False)
    assert ask("a") == 10


class Name(str):
    """One that can be seen to be forgotten."""


def test_limits_forget_quiet_clients() -> None:
    now = 100.0
    limits = streamproxy.Limits(streamproxy.Settings(api_key=KEY, requests_per_minute=6), lambda: now)
    known: weakref.WeakSet[Name] = weakref.WeakSet()
    for number in range(streamproxy.MAX_QUIET_CLIENTS + 100):
        now += 0.02
        name = Name(number)
        known.add(name)
        limits.enter(name)
        limits.leave(name)
    gc.collect()
    assert streamproxy.MAX_QUIET_CLIENTS / 4 < len(known) < streamproxy.MAX_QUIET_CLIENTS


def test_limits_look_seldom_for_whom_to_forget_where_nobody_is_quiet() -> None:
    looks = []
    settings = streamproxy.Settings(api_key=KEY, requests_per_minute=1)
    limits = streamproxy.Limits(settings, lambda: looks.append(1) or 100.0)
    count = 2 * streamproxy.MAX_QUIET_CLIENTS
    for number in range(count):
        limits.enter(str(number))
        limits.leave(str(number))
    assert len(looks) == count + 1  # to enter, and once to forget


def test_limit_of_one_stream_lets_a_client_ask_again_as_soon_as_it_saw_the_end(provider: Provider) -> None:
    answer = STREAM_HEAD + chunk(A) + chunk(STOP) + chunk(DONE) + b"0\r\n\r\n"
    with running(provider, max_streams_per_client=1) as server:
        clients = [Client(server) for _ in range(100)]
        with clients[0].ask(PROMPT), provider.take() as upstream:
            for client, following in zip(clients, clients[1:]):
                upstream.send(answer)
                assert client.head().status == 200 and client.body() == b"a"
                following.ask(PROMPT)
                upstream.read_request()


def test_limits_refuse_before_a_body_is_read(provider: Provider) -> None:
    with running(provider, requests_per_minute=1) as server:
        with Client(server).ask(PROMPT), provider.take():
            pass
        with Client(server) as client:
            client.send(b"POST / HTTP/1.1\r\n" + H + b"Content-Length: 1000000\r\nExpect: 100-continue\r\n\r\n")
            head = client.head()
            assert head.status == 429 and 50 <= int(head.fields["Retry-After"]) <= 60
    assert provider.nobody_came()


def test_page_of_an_allowed_origin_may_read_that_there_is_nothing(provider: Provider) -> None:
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type,x-y"}
    with running(provider, allow_origin="https://app.example") as server, Client(server) as client:
        head = client.ask(method="OPTIONS", path="/v1/nothing", Origin="https://app.example", **asked).head()
        assert (head.status, head.fields["Access-Control-Allow-Headers"]) == (204, "content-type, x-y")
        client.ask({}, path="/v1/nothing", Origin="https://app.example")
        assert api_error(client)[0] == 404
        client.ask(method="OPTIONS", path="/v1/nothing", Origin="https://other.example", **asked)
        assert api_error(client)[0] == 404


# 13 ------------------------------------------------------------------- Loop


def test_loop_without_epoll_reads_and_writes_as_well(provider: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(streamproxy.select, "epoll", raising=False)  # type: ignore[attr-defined]
    text = "x" * 3_000_000
    with running(provider) as server, Client(server).ask(PROMPT) as client, provider.take() as upstream:
        sender = threading.Thread(target=lambda: (upstream.start(*[delta(text)] * 12), upstream.finish()))
        sender.start()
        assert client.head().status == 200
        wait_for(lambda: [asking for asking in list(server.clients) if asking.pending])
        got = bytearray(client.seen)
        while not got.endswith(b"0\r\n\r\n"):
            got += client.sock.recv(1_000_000)
        assert streamproxy.ChunkedDecoder().feed(bytes(got)).decode() == text * 12  # more than sockets hold
        sender.join()


def test_loop_posts_from_many_threads_all_run_in_order() -> None:
    loop, seen = streamproxy.Loop(), []
    loop.start()
    threads = [
        threading.Thread(
            target=lambda n=n: [loop.post(lambda i=i: seen.append((n, i))) for i in range(200)]
        )  # type: ignore[misc]
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    loop.stop()
    loop.close()
    assert len(seen) == 1600
    assert all([i for n, i in seen if n == number] == list(range(200)) for number in range(8))


def alarms_alive() -> int:
    return sum(isinstance(thing, streamproxy.Alarm) for thing in gc.get_objects())


@pytest.mark.parametrize("stops", ["before it looks", "behind its look", "with a socket at hand"])
def test_loop_of_a_process_that_was_stopped_hears_what_came_before_its_alarms_go_off(stops: str) -> None:
    now, told = 1000.0, []
    loop = streamproxy.Loop(lambda: now)
    pairs = [socket.socketpair(), socket.socketpair()]

    def stop() -> float:
        nonlocal now
        pairs[1][0].send(b"meanwhile")
        loop.clock = lambda: now
        now = 1002.0
        return now

    def clock_behind_the_look() -> float:
        loop.clock = stop
        return now

    def on_ready(number: int) -> None:
        pairs[number][1].recv(100)
        told.append(number)
        if number == 0 and stops == "with a socket at hand":
            stop()

    for number, (_, near) in enumerate(pairs):
        loop.watch(near, streamproxy.READ, lambda events, number=number: on_ready(number))  # type: ignore[misc]
    streamproxy.Alarm(loop, lambda: told.append(-1)).by(1001.0)
    pairs[0][0].send(b"before")
    if stops == "before it looks":
        loop.clock = stop
    elif stops == "behind its look":
        loop.clock = clock_behind_the_look
    for _ in range(3):
        loop.turn(0)
    assert sorted(told[:2]) == [0, 1] and told[2:] == [-1]
    loop.close()
    for sock in itertools.chain(*pairs):
        sock.close()


def test_loop_of_a_process_that_was_stopped_between_two_sockets_knows_when_it_hears_the_second() -> None:
    now, told = 1000.0, []
    loop = streamproxy.Loop(lambda: now)
    pairs = [socket.socketpair(), socket.socketpair()]

    def on_ready(events: int) -> None:
        nonlocal now
        told.append(loop.now)
        now = 1002.0

    for far, near in pairs:
        loop.watch(near, streamproxy.READ, on_ready)
        far.send(b"before")
    loop.turn(0)
    assert told == [1000.0, 1002.0]
    loop.close()
    for sock in itertools.chain(*pairs):
        sock.close()


def test_loop_alarms_that_were_set_anew_do_not_pile_up() -> None:
    now = 100.0
    loop = streamproxy.Loop(lambda: now)
    calls: list[float] = []
    alarm = streamproxy.Alarm(loop, lambda: calls.append(now))
    before = alarms_alive()
    for number in range(20_000):
        other = streamproxy.Alarm(loop, lambda: calls.append(-1))
        other.by(now + 2 + number)
        other.close()
        alarm.by(now + 30_000 - number)
    assert alarms_alive() < before + 2500
    now += 10_000.9
    loop.turn(0)
    assert calls == []
    now += 0.1
    loop.turn(0)
    loop.turn(0)
    assert calls == [now]
    loop.close()


def test_loop_begins_a_few_new_requests_a_turn_and_goes_on_with_all_that_is_under_way() -> None:
    loop = streamproxy.Loop()
    begun: list[int] = []
    for number in range(streamproxy.MAX_BEGINNINGS + 3):
        loop.begin(functools.partial(begun.append, number))
    loop.turn(0)
    assert begun == list(range(streamproxy.MAX_BEGINNINGS))
    loop.post(lambda: begun.append(-1))
    loop.turn()  # which waits for nothing while there is something to begin
    assert begun[streamproxy.MAX_BEGINNINGS :] == [
        -1, *range(streamproxy.MAX_BEGINNINGS, streamproxy.MAX_BEGINNINGS + 3),
    ]
    loop.close()


def test_loop_ends_what_costs_before_it_begins_something_new() -> None:
    loop, seen = streamproxy.Loop(), []
    for number in range(streamproxy.MAX_BEGINNINGS):
        loop.begin(functools.partial(seen.append, number))
    loop.begin(functools.partial(seen.append, -1), urgent=True)
    loop.turn(0)
    assert seen == [-1, *range(streamproxy.MAX_BEGINNINGS - 1)]
    loop.close()


def test_loop_has_a_few_alarms_go_off_a_turn() -> None:
    now = 100.0
    loop, calls = streamproxy.Loop(lambda: now), []
    for number in range(streamproxy.MAX_ALARMS + 3):
        streamproxy.Alarm(loop, functools.partial(calls.append, number)).by(101 + number / 1000)
    now = 102.0
    loop.turn(0)
    assert calls == list(range(streamproxy.MAX_ALARMS))
    loop.turn()  # which waits for nothing while there are more
    assert calls == list(range(streamproxy.MAX_ALARMS + 3))
    loop.close()


def test_loop_has_alarms_go_off_once_all_that_was_ready_before_was_seen_to(monkeypatch: Any) -> None:
    monkeypatch.setattr(streamproxy, "MAX_READY", 4)
    now, seen = 100.0, []
    loop = streamproxy.Loop(lambda: now)
    pairs = [socket.socketpair() for _ in range(20)]
    for number, (near, far) in enumerate(pairs):
        far.send(b"x")  # which nobody reads: it is always ready
        loop.watch(near, streamproxy.READ, lambda events, number=number: seen.append(number))  # type: ignore[misc]
    streamproxy.Alarm(loop, functools.partial(seen.append, -1)).by(now)
    while -1 not in seen:
        loop.turn(0)
    assert sorted(set(seen)) == list(range(-1, 20)) and len(seen) <= 30
    loop.close()
    for near, far in pairs:
        near.close()
        far.close()


# 14 ------------------------------------------------------------------- Threads


class Threads:
    """Workers with real threads, of which the test says whether the next can be started."""

    def __init__(self) -> None:
        self.loop, self.reports, self.none_left = streamproxy.Loop(), [], False
        self.workers = streamproxy.Workers(self.loop, self.reports.append, self.start)
        self.go = threading.Semaphore(0)
        self.done: list[int] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for _ in range(1000):
            self.go.release()
        self.workers.close(DEADLINE)
        self.loop.close()

    def start(self, work: Callable[[], None]) -> None:
        if self.none_left:
            raise RuntimeError("can't start new thread")
        streamproxy.start_thread(work)

    def run(self, number: int, waits: Callable[[], Any] = streamproxy.held_up) -> None:
        """A job that is held up, or else takes its time."""
        def job() -> None:
            with waits():
                self.go.acquire()
            self.done.append(number)
        self.workers.run(job)

    def turn_until(self, good: Any) -> None:
        wait_for(lambda: self.loop.turn(0) or good())


def test_workers_are_a_few_and_one_more_for_each_that_is_held_up() -> None:
    with Threads() as threads:
        for number in range(40):
            threads.run(number)
        wait_for(lambda: len(threads.workers) >= 40)
        for _ in range(40):
            threads.go.release()
        wait_for(lambda: len(threads.workers) == streamproxy.MAX_WORKERS)  # parked for good
        assert sorted(threads.done) == list(range(40)) and not threads.reports
        threads.run(40)
        threads.go.release()
        wait_for(lambda: len(threads.done) == 41)
        assert len(threads.workers) == streamproxy.MAX_WORKERS


def test_workers_are_no_more_where_they_take_their_time() -> None:
    with Threads() as threads:
        for number in range(40):
            threads.run(number, contextlib.nullcontext)
        for number in range(40):
            assert len(threads.workers) == streamproxy.MAX_WORKERS
            threads.go.release()
            wait_for(lambda number=number: len(threads.done) == number + 1)  # type: ignore[misc]
        assert sorted(threads.done) == list(range(40)) and not threads.reports


def test_who_waits_for_what_is_there_is_not_held_up(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    @contextlib.contextmanager
    def held_up() -> Iterator[None]:
        waits.append(time.monotonic())
        yield

    monkeypatch.setattr(streamproxy, "held_up", held_up)
    near, far = socket.socketpair()
    with near, far:
        deadline = streamproxy.Deadline(streamproxy.Lifeline(), DEADLINE)
        assert deadline.wait([near], selectors.EVENT_WRITE) == [near] and not waits
        assert deadline.wait([near], selectors.EVENT_READ, 0.001) == [] and len(waits) == 1


def test_dials_that_wait_for_upstream_keep_no_other_from_it(listener: Listener) -> None:
    with running(None, upstream=f"https://127.0.0.1:{listener.port}") as server, contextlib.ExitStack() as stack:
        for _ in range(30):
            stack.enter_context(Client(server).ask(PROMPT))
        for _ in range(30):
            assert stack.enter_context(listener.accept()).recv(1) == b"\x16"  # of a handshake


def test_job_is_done_while_the_thread_that_seemed_free_has_just_got_another(monkeypatch: pytest.MonkeyPatch) -> None:
    holds, got, go_on = threading.Event(), threading.Event(), threading.Event()

    class Jobs(queue.SimpleQueue):  # type: ignore[type-arg]
        def get(self) -> Any:
            job = super().get()
            if holds.is_set():
                got.set()
                go_on.wait(DEADLINE)
            return job

    monkeypatch.setattr(queue, "SimpleQueue", Jobs)
    with Threads() as threads:
        threads.go.release()
        threads.run(0)
        wait_for(lambda: threads.done == [0])
        holds.set()
        threads.run(1)  # which waits
        assert got.wait(DEADLINE)
        threads.workers.run(lambda: threads.done.append(2))
        holds.clear()
        go_on.set()
        threads.turn_until(lambda: threads.done == [0, 2])


def test_jobs_for_which_no_thread_can_be_started_are_done_by_those_there_are() -> None:
    with Threads() as threads:
        threads.run(0)
        threads.none_left = True
        for number in range(1, 10):
            threads.run(number)
        threads.turn_until(lambda: threads.reports)
        assert len(threads.workers) == 1
        for _ in range(10):
            threads.go.release()
        threads.turn_until(lambda: len(threads.done) == 10)
        assert set(threads.reports) == {"no thread can be started: the system's limit is reached"}


def test_jobs_for_which_there_is_no_thread_at_all_are_done_once_there_can_be_one() -> None:
    with Threads() as threads:
        threads.none_left = True
        threads.go.release()
        threads.run(0)
        for _ in range(20):
            threads.loop.turn(0.001)
        assert not threads.done and threads.reports
        threads.none_left = False
        threads.turn_until(lambda: threads.done)


def test_fault_in_a_job_is_said_and_costs_no_thread() -> None:
    with Threads() as threads:
        for _ in range(20):
            threads.workers.run(lambda: 1 / 0)
        wait_for(lambda: len(threads.reports) == 20)
        assert re.fullmatch(r"fault in a thread: ZeroDivisionError in line \d+", threads.reports[0])
        threads.go.release()
        threads.run(0)
        wait_for(lambda: threads.done)


def test_workers_hold_nothing_of_a_job_that_is_done() -> None:
    class Job:
        def run(self) -> None:
            pass

    with Threads() as threads:
        job = Job()
        known = weakref.ref(job)
        threads.workers.run(job.run)
        del job
        wait_for(lambda: (gc.collect(), known() is None)[1])


# 15 ------------------------------------------------------------------- Log


def test_log_for_which_no_thread_can_be_started_is_written_later(
    caplog: pytest.LogCaptureFixture, no_thread: Any
) -> None:
    writer = streamproxy.LogWriter()
    with no_thread():
        writer.start()
        writer.info("a")
    assert not caplog.records
    writer.info("b")
    writer.close(DEADLINE)
    assert [record.msg for record in caplog.records] == ["a", "b"]


def test_log_has_its_thread_from_the_start_on_and_needs_none_later(
    server: streamproxy.Server, caplog: pytest.LogCaptureFixture, no_thread: Any
) -> None:
    with no_thread():
        caught_up(server)
        assert log_entries(caplog, 1)


class Faulty(logging.Handler):
    """Notes what it is given, and raises once, at a place."""

    def __init__(self, place: str, error: BaseException) -> None:
        super().__init__()
        self.place, self.error, self.lines = place, error, []

    def fail(self, place: str) -> None:
        if place == self.place:
            self.place = ""
            raise self.error

    def filter(self, record: logging.LogRecord) -> bool:
        self.fail("filter")
        return True

    def emit(self, record: logging.LogRecord) -> None:
        self.fail("emit")
        self.lines.append(record.msg)

    def flush(self) -> None:
        self.fail("flush")


@pytest.mark.parametrize("error", [ValueError(), MemoryError(), SystemExit(1), KeyboardInterrupt(), GeneratorExit()])
@pytest.mark.parametrize("place", ["filter", "emit", "flush"])
def test_log_goes_on_whatever_somebodys_handler_raises(place: str, error: BaseException) -> None:
    faulty, writer = Faulty(place, error), streamproxy.LogWriter()
    streamproxy.log.addHandler(faulty)
    try:
        writer.info("a")
        wait_for(lambda: not faulty.place)
        writer.info("b")
        writer.close(DEADLINE)
    finally:
        streamproxy.log.removeHandler(faulty)
    assert {"b", "1 lines of log were lost"} <= set(faulty.lines)


def test_log_has_a_handler_flushed_that_has_no_lines_and_seems_to_be_nothing() -> None:
    class Sized(Faulty):
        def __len__(self) -> int:
            return 0

    sized, writer = Sized("flush", ValueError()), streamproxy.LogWriter()
    streamproxy.log.addHandler(sized)
    try:
        writer.info("a")
        writer.close(DEADLINE)
    finally:
        streamproxy.log.removeHandler(sized)
    assert not sized.place  # which flush has seen


def test_log_goes_to_a_handler_that_comes_while_no_line_does(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = threading.Event()

    class Lines(queue.SimpleQueue):  # type: ignore[type-arg]
        def get(self) -> Any:
            if not self.qsize():
                waits.set()
            return super().get()

    monkeypatch.setattr(queue, "SimpleQueue", Lines)
    monkeypatch.setattr(streamproxy.log, "propagate", False)  # to pytest's own handlers
    lines: list[object] = []
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        writer = streamproxy.LogWriter()
        writer.output = streamproxy.Output(nowhere, "text")
        writer.start()
        assert waits.wait(DEADLINE)
        with logging_through(lambda record: lines.append(record.msg)):
            writer.info("a")
            writer.close(DEADLINE)
    assert lines == ["a"]


@contextlib.contextmanager
def logging_through(emit: Callable[[logging.LogRecord], object], as_filter: bool = False) -> Iterator[None]:
    """The log with a handler, or a filter, of an embedding program's."""
    handler = logging.Handler()
    if as_filter:
        streamproxy.log.addFilter(emit)  # type: ignore[arg-type]
    else:
        handler.emit = emit  # type: ignore[assignment,method-assign]
        streamproxy.log.addHandler(handler)
    try:
        yield
    finally:
        streamproxy.log.removeFilter(emit)  # type: ignore[arg-type]
        streamproxy.log.removeHandler(handler)


@pytest.mark.parametrize("as_filter", [False, True], ids=["a handler", "a filter"])
@pytest.mark.parametrize("trouble", ["raises", "raises once", "exits", "blocks"])
def test_logging_of_somebody_s_touches_no_request_and_not_the_end(
    server: streamproxy.Server, provider: Provider, trouble: str, as_filter: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamproxy, "CLOSE_TIMEOUT", 0.2)
    calls, go = [], threading.Event()

    def emit(record: logging.LogRecord) -> bool:
        calls.append(record)
        if trouble == "blocks":
            go.wait(DEADLINE)
        elif trouble == "exits":
            raise SystemExit
        elif trouble == "raises" or len(calls) == 1:
            raise ValueError("the log's server is away")
        return True

    with logging_through(emit, as_filter), Client(server).ask(PROMPT) as client, provider.take() as upstream:
        upstream.start(A)
        assert client.head().status == 200 and client.chunk() == b"a"
        for _ in range(20):
            caught_up(server)
        server.hub.log.error("an error of the loop's own")
        wait_for(lambda: calls)
        caught_up(server)
        upstream.event(delta("b"))
        upstream.finish()
        assert client.chunk() == b"b" and client.chunk() == b""
        if trouble == "raises once":
            wait_for(lambda: len(calls) > 20)
        began = time.monotonic()
        server.stop()
        assert time.monotonic() < began + streamproxy.CLOSE_TIMEOUT + 2
        go.set()


def test_lines_of_log_that_were_lost_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    go, writer, count = threading.Event(), streamproxy.LogWriter(), streamproxy.MAX_LOG_LINES + 250
    stuck = threading.Event()
    with logging_through(lambda record: (stuck.set(), go.wait(DEADLINE))):
        writer.info("first")
        assert stuck.wait(DEADLINE)
        for number in range(count):
            writer.info(f"line {number}")
        go.set()
        wait_for(lambda: len(caplog.records) >= count - 250 + 2)
        writer.info("last")
        writer.close(DEADLINE)
    told = [record.getMessage() for record in caplog.records]
    lost = sum(int(words.split()[0]) for words in told if words.endswith("lines of log were lost"))
    kept = [words for words in told if words.startswith("line ")]
    assert kept == [f"line {number}" for number in range(len(kept))] and len(kept) + lost == count
    assert told[-1] == "last"


def test_lines_that_a_full_disk_took_are_counted_once_there_is_room(caplog: Any) -> None:
    writer, room, flushes = streamproxy.LogWriter(), threading.Event(), []

    def flush() -> None:
        flushes.append(1)
        if not room.is_set():
            raise OSError(errno.ENOSPC, "no space")

    with logging_through(lambda record: None):
        streamproxy.log.handlers[-1].flush = flush  # type: ignore[method-assign]
        for number in range(3):
            writer.info(f"line {number}")
            wait_for(lambda number=number: len(flushes) > number)
        room.set()
        writer.info("last")
        writer.close(DEADLINE)
    told = [record.getMessage() for record in caplog.records if "lost" in record.getMessage()]
    assert told[-1] == "3 lines of log were lost"


def test_error_is_said_at_once_and_then_once_a_second_with_how_often_it_was(caplog: pytest.LogCaptureFixture) -> None:
    now = 100.0
    writer = streamproxy.LogWriter(lambda: now)
    for second in range(30):
        now = 100.0 + second / 10
        writer.error("no room")
        if second == 15:
            writer.error("another")
    writer.close(DEADLINE)
    assert [record.getMessage() for record in caplog.records] == [
        "no room", "no room (10 times)", "another", "no room (10 times)",
    ]


# 16 to 18 ------------------------------------------------------------- Clients, their exchanges, paths


# ---------------------------------------------------------------- POST /


def test_post_text_leaves_piece_by_piece_as_it_arrives(server: streamproxy.Server, provider: Provider) -> None:
    with Client(server).ask(PROMPT) as client, provider.take() as upstream:
        upstream.start(ROLE, delta("Hello"))
        head = client.head()
        assert (head.line, client.chunk()) == (b"HTTP/1.1 200 OK", b"Hello")
        assert head.fields["Content-Type"] == "text/plain; charset=utf-8"
        assert head.fields["X-Accel-Buffering"] == "no"
        assert head.fields["Cache-Control"] == "no-cache, no-transform"
        assert head.fields["X-Content-Type-Options"] == "nosniff"
        assert head.fields["Incremental"] == "?1"
        assert re.fullmatch("[0-9a-f]{16}", head.fields["X-Request-Id"])
        for text in (" wörld", "\n", "data: x\n\n", "👋"):
            upstream.event(delta(text))
            assert client.chunk().decode() == text
        upstream.finish()
        assert client.chunk() == b""


def test_post_as_events(server: streamproxy.Server, provider: Provider) -> None:
    with Client(server).ask(PROMPT, Accept="text/html, text/event-stream;q=0.9", X_Request_Id="id-7") as client:
        with provider.take() as upstream:
            upstream.start(delta("a"))
            head = client.head()
            assert (head.fields["Content-Type"], head.fields["X-Request-Id"]) == ("text/event-stream", "id-7")
            assert client.chunk() == b'id: id-7\ndata: {"text": "a"}\n\n'
            upstream.event(delta(None, reasoning="hm"))
            assert client.chunk() == b'event: reasoning\ndata: {"text": "hm"}\n\n'
            upstream.finish()
            assert client.body() == b'event: done\ndata: {"finish_reason": "stop", "usage": null}\n\n'


def test_post_a_json_completion_is_an_answer_in_one_piece(server: streamproxy.Server, provider: Provider) -> None:
    document = json.dumps({
        "choices": [{"message": {"content": "Hällo"}, "finish_reason": "stop"}], "usage": {"total_tokens": 3},
    }).encode()
    for framing, body in [
        (b"Content-Length: %d" % len(document), document),
        (b"Transfer-Encoding: chunked", chunk(document) + b"0\r\n\r\n"),
    ]:
        with Client(server).ask(PROMPT) as client, provider.take() as upstream:
            upstream.send(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n", framing, b"\r\n\r\n", body[:20])
            upstream.send(body[20:])
            assert (client.head().status, client.body().decode()) == (200, "Hällo")


@pytest.mark.parametrize(("body", "sentence"), [
    (b"", "Invalid JSON data"),
    (b"prompt=x", "Invalid JSON data"),
    (b'{"prompt": "x"', "Invalid JSON data"),
    (b'{"prompt": NaN}', "Invalid JSON data"),
    (b'{"prompt": "\xff"}', "Invalid JSON data"),
    (b"[" * 200000, "nested too deeply"),
    (b'{"prompt": "a", "prompt": "b"}', "named twice"),
    (b'{"prompt": "a", "x": {"y": 1, "y": 1}}', "named twice"),
    (b'{"prompt": "a", "n": 1' + b"0" * 5000 + b"}", "too large"),
    (b'{"prompt": "a", "n": 1e999}', "too large"),
    (b'{"prompt": "a\\ud83d"}', "surrogate"),
    (b'\xef\xbb\xbf{"prompt": "a"}', "Invalid JSON data"),
    ('{"prompt": "a"}'.encode("utf-16"), "Invalid JSON data"),
    (b"[]", "object"),
    (b'"x"', "object"),
    (b"null", "object"),
    (b"{}", "object"),
    (b'{"prompt": "x", "messages": []}', "either"),
    (b'{"prompt": ""}', '"prompt"'),
    (b'{"prompt": 1}', '"prompt"'),
    (b'{"prompt": null}', '"prompt"'),
    (b'{"messages": []}', '"messages"'),
    (b'{"messages": "x"}', '"messages"'),
    (b'{"messages": [1]}', '"messages"'),
    (b'{"messages": [{"role": "user"}]}', '"messages"'),
    (b'{"messages": [{"role": 1, "content": "x"}]}', '"messages"'),
])
def test_post_bad_body_is_400_and_upstream_is_not_asked(
    server: streamproxy.Server, provider: Provider, body: bytes, sentence: str
) -> None:
    with Client(server) as client:
        status, error = client.ask(body).error()
        assert status == 400 and sentence in error
        assert client.ask(method="GET", path="/healthz").head().status == 200  # on the same connection
    assert provider.nobody_came()


REFUSED = [
    (b"GET /nothing HTTP/1.1\r\nHost: localhost\r\n\r\n", 404, {}),
    (b"GET /healthz/ HTTP/1.1\r\nHost: localhost\r\n\r\n", 404, {}),
    (b"PUT / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n\r\nx", 405, {"Allow": "GET, HEAD, OPTIONS, POST"}),
    (b"DELETE /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n", 405, {"Allow": "GET, HEAD, OPTIONS"}),
    (b"POST / HTTP/1.1\r\nHost: localhost\r\n\r\n", 411, {}),
    (b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip\r\n\r\n0\r\n\r\n", 400, {}),
    (b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999\r\n\r\n", 413, {}),
    (b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n", 400, {}),
    (b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: +1\r\n\r\nx", 400, {}),
    (b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nx", 400, {}),
    (b"GET / HTTP/2.0\r\n\r\n", 505, {}),
    (b"GET / HTTP/1.1 x\r\n\r\n", 400, {}),
    (b"GET\r\n\r\n", 400, {}),
    (b"GET /\r\n", 400, {}),
    (b"GET /" + b"x" * 70000 + b" HTTP/1.1\r\n\r\n", 414, {}),
    (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n", 431, {}),
    (b"GET / HTTP/1.1\r\nA: " + b"x" * 70000 + b"\r\n\r\n", 431, {}),
    (b"GET /?prompt= HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n\r\n", 400, {}),
    (b"GET /?prompt=a&prompt=b HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n\r\n", 400, {}),
    (b"GET /?prompt=%ff HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n\r\n", 400, {}),
]  # fmt: skip


@pytest.mark.parametrize(("request_bytes", "status", "fields"), REFUSED, ids=lambda value: str(value)[:50])
def test_refused_request_gets_a_status_and_a_sentence(
    server: streamproxy.Server, provider: Provider, request_bytes: bytes, status: int, fields: dict[str, str]
) -> None:
    with Client(server) as client:
        client.send(request_bytes)
        head = client.head()
        assert head.status == status and fields.items() <= head.fields.items()
        assert list(json.loads(client.exactly(int(head.fields["Content-Length"])))) == ["error"]
    assert provider.nobody_came()


SMUGGLED = b"GET /smuggled HTTP/1.1\r\n" + H + b"\r\n"

# Requests that are refused, or taken, with SMUGGLED behind or within them; its path must never be asked for.  {n} is
# its length.
HIDING = {
    # RFC 9112 section 6.1: a coding beside a length, an unknown coding, a coding in HTTP/1.0
    "6.1 chunked and a length": (
        b"POST / HTTP/1.1\r\n" + H + b"Content-Length: {n}\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400,
    ),
    "6.1 a length and chunked": (
        b"POST / HTTP/1.1\r\n" + H + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n", 400,
    ),
    "6.1 gzip, chunked": (b"POST / HTTP/1.1\r\n" + H + b"Transfer-Encoding: gzip, chunked\r\n\r\n", 400),
    "6.1 chunked, identity": (b"POST / HTTP/1.1\r\n" + H + b"Transfer-Encoding: chunked, identity\r\n\r\n", 400),
    "6.1 chunked twice": (
        b"POST / HTTP/1.1\r\n" + H + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n", 400,
    ),
    "6.1 xchunked": (b"POST / HTTP/1.1\r\n" + H + b"Transfer-Encoding: xchunked\r\n\r\n", 400),
    "6.1 chunked with a vertical tab": (b"POST / HTTP/1.1\r\n" + H + b"Transfer-Encoding: \x0bchunked\r\n\r\n", 400),
    "6.1 empty coding": (b"POST / HTTP/1.1\r\n" + H + b"Transfer-Encoding:\r\n\r\n", 400),
    "6.1 HTTP/1.0 chunked": (b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "6.1 chunked for a GET": (b"GET / HTTP/1.1\r\n" + H + b"Transfer-Encoding: chunked\r\n\r\n", 400),
    # section 6.2 and 6.3: one length of digits
    **{f"6.3 length {value!r}": (b"POST / HTTP/1.1\r\n" + H + b"Content-Length: " + value + b"\r\n\r\n", 400)
       for value in (
           b"+1", b"-1", b"0x5", b"1_0", b"1.0", b"1e1", b"5,5", b"5, 5", b"0,{n}", b"1 0", b"", b"\xb2", b"9" * 16,
           b"\x0b1", b'"1"',
       )},
    "6.3 two lengths": (b"POST / HTTP/1.1\r\n" + H + b"Content-Length: 0\r\nContent-Length: {n}\r\n\r\n", 400),
    "6.3 the same length twice": (
        b"POST / HTTP/1.1\r\n" + H + b"Content-Length: {n}\r\nContent-Length: {n}\r\n\r\n", 400,
    ),
    "6.3 two lengths for a GET": (
        b"GET /healthz HTTP/1.1\r\n" + H + b"Content-Length: 0\r\nContent-Length: {n}\r\n\r\n", 400,
    ),
    "6.3 a GET's body": (b"GET /healthz HTTP/1.1\r\n" + H + b"Content-Length: {n}\r\n\r\n", 400),
    "6.3 a body for a method not there": (b"POST /healthz HTTP/1.1\r\n" + H + b"Content-Length: {n}\r\n\r\n", 405),
    "6.3 a body for a path not there": (b"POST /nothing HTTP/1.1\r\n" + H + b"Content-Length: {n}\r\n\r\n", 404),
    "6.3 a body for an unknown method": (b"BREW / HTTP/1.1\r\n" + H + b"Content-Length: {n}\r\n\r\n", 501),
    # section 5.1: no space before the colon; 5.2: no folding; 2.2: CR and LF
    "5.1 space before the colon": (b"GET /healthz HTTP/1.1\r\n" + H + b"Content-Length : {n}\r\n\r\n", 400),
    "5.1 tab before the colon": (b"GET /healthz HTTP/1.1\r\n" + H + b"Content-Length\t: {n}\r\n\r\n", 400),
    "5.1 space before the coding's colon": (
        b"POST / HTTP/1.1\r\n" + H + b"Transfer-Encoding : chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n", 400,
    ),
    "5.1 no colon": (b"GET /healthz HTTP/1.1\r\n" + H + b"no colon\r\nContent-Length: {n}\r\n\r\n", 400),
    "5.1 no name": (b"GET /healthz HTTP/1.1\r\n" + H + b": x\r\nContent-Length: {n}\r\n\r\n", 400),
    "5.2 folded": (b"GET /healthz HTTP/1.1\r\n" + H + b"A: b\r\n Content-Length: {n}\r\n\r\n", 400),
    "5.2 folded at once": (b"GET /healthz HTTP/1.1\r\n Content-Length: {n}\r\n" + H + b"\r\n", 400),
    "2.2 bare CR in a value": (b"GET /healthz HTTP/1.1\r\n" + H + b"A: b\rContent-Length: {n}\r\n\r\n", 400),
    "2.2 bare LF": (b"GET /healthz HTTP/1.1\r\n" + H + b"A: b\nContent-Length: {n}\r\n\r\n", 400),
    "2.2 bare LF behind the request line": (b"GET /healthz HTTP/1.1\nHost: localhost\r\n\r\n", 400),
    "2.2 NUL in a value": (b"GET /healthz HTTP/1.1\r\n" + H + b"A: \0\r\nContent-Length: {n}\r\n\r\n", 400),
    "2.2 NUL in a name": (b"GET /healthz HTTP/1.1\r\n" + H + b"Content-\0Length: {n}\r\n\r\n", 400),
    # section 3
    "3 two spaces": (b"GET  /healthz HTTP/1.1\r\n" + H + b"\r\n", 400),
    "3 a tab": (b"GET\t/healthz HTTP/1.1\r\n" + H + b"\r\n", 400),
    "3 space in the target": (b"GET /a /healthz HTTP/1.1\r\n" + H + b"\r\n", 400),
    "3 no version": (b"GET /healthz\r\n" + H + b"\r\n", 400),
    "3 lower-case version": (b"GET /healthz http/1.1\r\n" + H + b"\r\n", 400),
    "3 HTTP/1.10": (b"GET /healthz HTTP/1.10\r\n" + H + b"\r\n", 400),
    "3 HTTP/0.9": (b"GET /healthz\r\n", 400),
    "3 HTTP/2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    "3 TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    "3 control character in the target": (b"GET /\x1b HTTP/1.1\r\n" + H + b"\r\n", 400),
    "3 space before the method": (b" GET /healthz HTTP/1.1\r\n" + H + b"\r\n", 400),
    # section 3.2: one Host, and what the target may be
    "3.2 no Host": (b"GET /healthz HTTP/1.1\r\n\r\n", 400),
    "3.2 two Hosts": (b"GET /healthz HTTP/1.1\r\n" + H + H + b"\r\n", 400),
    "3.2 Host with a space": (b"GET /healthz HTTP/1.1\r\nHost: local host\r\n\r\n", 400),
    "3.2 empty Host": (b"GET /healthz HTTP/1.1\r\nHost:\r\n\r\n", 400),
    "3.2 Host with a path": (b"GET /healthz HTTP/1.1\r\nHost: localhost/x\r\n\r\n", 400),
    "3.2 Host with a user": (b"GET /healthz HTTP/1.1\r\nHost: a@localhost\r\n\r\n", 400),
    "3.2.2 absolute form of another": (b"GET http://other/healthz HTTP/1.1\r\n" + H + b"\r\n", 404),
    "3.2.2 absolute form of ours": (b"GET http://LOCALHOST/healthz HTTP/1.1\r\n" + H + b"\r\n", 200),
    "3.2.3 authority form": (b"CONNECT localhost:80 HTTP/1.1\r\n" + H + b"\r\n", 404),
    "3.2.4 asterisk form": (b"OPTIONS * HTTP/1.1\r\n" + H + b"\r\n", 404),
    "3.2 not normalised": (b"GET /x/../healthz HTTP/1.1\r\n" + H + b"\r\n", 404),
    "3.2 percent": (b"GET /%68ealthz HTTP/1.1\r\n" + H + b"\r\n", 404),
    # section 7.1
    "7.1 size with a sign": (b"POST / HTTP/1.1\r\n" + H + b"Transfer-Encoding: chunked\r\n\r\n+{n}\r\n", 400),
    "7.1 LF behind a size": (b"POST / HTTP/1.1\r\n" + H + b"Transfer-Encoding: chunked\r\n\r\n0\n\r\n", 400),
    "7.1 chunk too short": (
        b"POST / HTTP/1.1\r\n" + H + b"Transfer-Encoding: chunked\r\n\r\n3\r\nab\r\n0\r\n\r\n", 400,
    ),
    "7.1 whole, and not JSON": (
        b"POST / HTTP/1.1\r\n" + H + b"Transfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n", 400,
    ),
    "sizes: fields": (b"GET /healthz HTTP/1.1\r\n" + H + b"A: b\r\n" * 100 + b"\r\n", 431),
    "sizes: head": (b"GET /healthz HTTP/1.1\r\n" + H + b"A: " + b"b" * 66000 + b"\r\n\r\n", 431),
    "sizes: request line": (b"GET /" + b"b" * 70000 + b" HTTP/1.1\r\n" + H + b"\r\n", 414),
}  # fmt: skip
# Those whose framing is clear, so that the connection goes on, with what follows.
KEPT = {
    "6.3 a GET's body", "6.3 a body for a method not there", "6.3 a body for a path not there",
    "6.3 a body for an unknown method", "3.2.2 absolute form of another", "3.2.2 absolute form of ours",
    "3.2.3 authority form", "3.2.4 asterisk form", "3.2 not normalised", "3.2 percent", "7.1 whole, and not JSON",
}  # fmt: skip


@pytest.mark.parametrize("name", HIDING)
def test_no_request_hides_in_another(
    server: streamproxy.Server, provider: Provider, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    data, status = HIDING[name]
    kept, body = name in KEPT, b"{n}" in HIDING[name][0]
    with Client(server) as client:
        with contextlib.suppress(ConnectionError):
            client.send(
                data.replace(b"{n}", b"%d" % len(SMUGGLED)), SMUGGLED if body or not kept else b"",
                b"GET /healthz HTTP/1.1\r\n" + H + b"Connection: close\r\n\r\n",
            )
        got = client.rest()
    assert [int(code) for code in re.findall(rb"HTTP/1\.1 (\d{3}) ", got)] == ([status, 200] if kept else [status])
    assert kept or b"\r\nConnection: close\r\n" in got
    assert not [entry for entry in log_entries(caplog, 1) if "smuggled" in entry["path"]] and provider.nobody_came()


@pytest.mark.parametrize(("version", "chunked"), [("1.2", True), ("1.0", False)])
def test_other_minor_versions_are_framed_as_the_one_they_are_like(
    server: streamproxy.Server, provider: Provider, version: str, chunked: bool
) -> None:
    with Client(server).ask(PROMPT, version=version) as client, provider.take() as upstream:
        upstream.start(A)
        assert ("Transfer-Encoding" in client.head().fields) == chunked
        upstream.finish()
        assert client.exactly(1 if not chunked else 4) == (b"1\r\na" if chunked else b"a")


def test_refused_large_body_does_not_cost_the_client_its_answer(provider: Provider) -> None:
    with running(provider, max_body=1000) as server, Client(server) as client:
        client.ask(b"x" * 500000)  # closing with this unread would reset the connection
        assert client.error() == (413, "The body is larger than 1000 bytes.")


def test_expect_100_continue_is_said_after_our_own_checks(provider: Provider) -> None:
    with running(provider, max_body=100) as server:
        with Client(server) as client:
            client.send(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 101\r\nExpect: 100-continue\r\n\r\n")
            assert client.head().status == 413
        with Client(server) as client:
            client.send(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 15\r\nExpect: 100-continue\r\n\r\n")
            assert client.until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            client.send(b'{"prompt": "x"}')
            provider.take().start(delta("a"))
            assert client.head().status == 200


def test_kept_connection_takes_one_request_after_another_even_sent_at_once(
    server: streamproxy.Server, provider: Provider
) -> None:
    with Client(server) as client:
        client.ask(PROMPT).ask({"prompt": "second"}).ask(method="GET", path="/healthz")
        for text in ("one", "two"):
            with provider.take() as upstream:
                upstream.start(delta(text))
                assert (client.head().status, client.chunk().decode()) == (200, text)
                client.ask(method="GET", path="/healthz")  # arrives while an answer is on its way
                upstream.finish()
                assert client.chunk() == b""
        for _ in range(3):
            assert client.head().status == 200 and client.exactly(3) == b"ok\n"


def test_http_1_0_is_delimited_by_close(server: streamproxy.Server, provider: Provider) -> None:
    with Client(server).ask(PROMPT, version="1.0", Connection="keep-alive") as client, provider.take() as upstream:
        upstream.start(delta("Hello"))
        head = client.head()
        assert "Transfer-Encoding" not in head.fields and head.fields["Connection"] == "close"
        assert client.exactly(5) == b"Hello"
        upstream.finish()
        assert client.rest() == b""


def test_http_1_0_cut_answer_is_a_reset(server: streamproxy.Server, provider: Provider) -> None:
    with Client(server).ask(PROMPT, version="1.0") as client, provider.take() as upstream:
        upstream.start(delta("Hello"))
        assert client.head().status == 200 and client.exactly(5) == b"Hello"
        upstream.sock.close()
        with pytest.raises(ConnectionResetError):
            client.rest()


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL")
@pytest.mark.parametrize("path", ["/", "/v1/chat/completions"])
def test_http_1_0_answer_of_a_process_that_is_killed_does_not_look_whole(provider: Provider, path: str) -> None:
    with launched(OPENAI_BASE_URL=provider.url) as (process, front):
        asked = PROMPT if path == "/" else ASKED
        with Client(front).ask(asked, path=path, version="1.0") as client, provider.take() as upstream:
            upstream.start(A)
            assert client.head().status == 200 and client.until(b"a")
            process.kill()
            with pytest.raises(ConnectionResetError):
                client.rest()


# ---------------------------------------------------------------- GET /


def test_post_that_reconnects_is_not_a_new_prompt(server: streamproxy.Server, provider: Provider) -> None:
    with Client(server).ask(PROMPT, Last_Event_ID="1", **EVENTS) as client:
        assert client.head().status == 204
    assert provider.nobody_came()


def test_surrogate_halves_in_what_upstream_says_are_replaced(server: streamproxy.Server, provider: Provider) -> None:
    for bad, expected in [
        (b'{"error": {"message": "bad \\ud83d"}}', b"event: error"),
        (b'{"choices": [{"finish_reason": "\\ud83d"}]}', b"event: done"),
    ]:
        with Client(server).ask(PROMPT, **EVENTS) as client, provider.take() as upstream:
            upstream.start(A, event(bad), DONE)
            client.head()
            assert expected in client.body()


def test_eventsource_gets_its_answer_once(server: streamproxy.Server, provider: Provider) -> None:
    with Client(server).ask(method="GET", path="/?prompt=Gr%C3%BC%C3%9Fe+%26", **EVENTS) as client:
        with provider.take() as upstream:
            assert json.loads(upstream.body)["messages"] == [{"role": "user", "content": "Grüße &"}]
            upstream.start(delta("a"))
            head = client.head()
            assert head.fields["Content-Type"] == "text/event-stream"
            assert client.chunk() == f'id: {head.fields["X-Request-Id"]}\ndata: {{"text": "a"}}\n\n'.encode()
            upstream.finish()
            client.body()
            client.ask(method="GET", path="/?prompt=x", Last_Event_ID="1", **EVENTS)
            head = client.head()
            assert head.status == 204 and "Content-Length" not in head.fields
    assert provider.nobody_came()


def test_health(server: streamproxy.Server) -> None:
    with Client(server).ask(method="GET", path="/healthz?x") as client:
        assert client.head().status == 200 and client.exactly(3) == b"ok\n"


# ---------------------------------------------------------------- /v1: bodies that pass through


@pytest.mark.parametrize("path", API_PATHS)
def test_api_bodies_pass_unchanged_and_as_they_arrive(
    server: streamproxy.Server, provider: Provider, path: str
) -> None:
    asked = b' { "model":"gpt-6-luna" , "stream":true, "x": "\xc3\xa4\\u00e4" }'
    with Client(server).ask(asked, path=path, Accept="application/json") as client, provider.take() as upstream:
        assert upstream.head.startswith(f"POST {path} HTTP/1.1\r\n") and upstream.body == asked
        upstream.send(STREAM_HEAD)
        head = client.head()  # before any event
        assert head.status == 200 and head.fields["Content-Type"] == "text/event-stream"
        assert head.fields["X-Accel-Buffering"] == "no"
        for data in (b": ping\n\n", b"event: x\ndata: {\"a\": 1}\n\n", b"data: {", b"}\n\n", b"data: [DONE]\n\n"):
            upstream.event(data)
            assert client.chunk() == data
        upstream.send(b"0\r\n\r\n")
        assert client.chunk() == b""


def test_api_json_answer_keeps_its_length(server: streamproxy.Server, provider: Provider) -> None:
    with Client(server).ask(ASKED, path="/v1/chat/completions") as client, provider.take() as upstream:
        upstream.send(OK + JSON + b"Content-Length: 10\r\n\r\n{\"a\":", b" 123}")
        head = client.head()
        assert head.fields["Content-Length"] == "10" and "Transfer-Encoding" not in head.fields
        assert client.exactly(10) == b'{"a": 123}'
        client.ask(method="GET", path="/healthz")
        assert client.head().status == 200


def test_api_fields_that_pass_and_those_that_do_not(provider: Provider) -> None:
    with running(provider, auth_header="api-key: {key}", upstream=provider.url + "?api-version=7") as server:
        with Client(server) as client:
            sent = {
                "Authorization": "Bearer theirs", "x-api-key": "theirs", "api-key": "theirs", "Cookie": "a=b",
                "OpenAI-Organization": "org", "Connection": "keep-alive, x-hop", "x-hop": "1",
                "Accept-Encoding": "gzip", "Content-Type": "application/json; x=y", "Accept": "application/json",
                "anthropic-version": "2023-06-01", "anthropic-beta": "b", "OpenAI-Beta": "c", "Idempotency-Key": "d",
                "User-Agent": "OpenAI/Python 9", "traceparent": "00-1-2-01", "tracestate": "a=1",
                "X-Client-Request-Id": "e", "X-Stainless-Retry-Count": "2", "X-Stainless-OS": "Linux",
            }
            client.ask(ASKED, path="/v1/chat/completions?beta=true&model=gpt-5&api-version=8", **sent)
            with provider.take() as upstream:
                line, *lines = upstream.head.strip().split("\r\n")
                assert line == "POST /v1/chat/completions?api-version=7&beta=true HTTP/1.1"
                assert {name.lower(): value for name, value in (field.split(": ", 1) for field in lines)} == {
                    "host": provider.url[7:-3], "accept-encoding": "identity", "api-key": KEY,
                    "content-type": "application/json", "accept": "application/json", "anthropic-version": "2023-06-01",
                    "anthropic-beta": "b", "openai-beta": "c", "idempotency-key": "d", "traceparent": "00-1-2-01",
                    "tracestate": "a=1", "x-client-request-id": "e", "x-stainless-retry-count": "2",
                    "user-agent": f"streamproxy/{streamproxy.__version__} OpenAI/Python 9",
                    "content-length": str(len(json.dumps(ASKED))),
                }
                upstream.send(
                    OK,
                    b"Content-Type: application/json\r\nContent-Length: 2\r\nx-request-id: req_7\r\nRetry-After: 3\r\n"
                    b"x-ratelimit-limit-requests: 9\r\n"
                    b"anthropic-ratelimit-tokens-limit: 8\r\nSet-Cookie: a=b\r\nopenai-organization: org\r\n"
                    b"openai-project: p\r\nServer: x\r\n"
                    b"llm_provider-transfer-encoding: chunked\r\nKeep-Alive: timeout=5\r\n"
                    b"Connection: x-hop\r\nx-hop: 1\r\n",
                    b"X-Many: y\r\n" * 30, b"\r\n{}",
                )
            fields = {name.lower(): value for name, value in client.head().fields.items()}
            assert client.exactly(2) == b"{}"
            expected = {
                "content-type": "application/json", "content-length": "2", "x-request-id": "req_7", "retry-after": "3",
                "x-ratelimit-limit-requests": "9", "anthropic-ratelimit-tokens-limit": "8",
            }
            assert expected.items() <= fields.items()
            ours = {"date", "x-content-type-options", "x-accel-buffering", "cache-control", "incremental", "keep-alive"}
            assert set(fields) - set(expected) == ours


@pytest.mark.parametrize(("coding", "status"), [
    ("gzip", 415),
    ("zstd", 415),
    ("br", 415),
    ("GZIP", 415),
    ("identity, gzip", 415),
    ("x", 415),
    ("identity", 404),
    ("", 404),
    ("none", 404),
    ("utf-8", 404),
    ("Identity, identity", 404),
])
@pytest.mark.parametrize("path", ["/", "/v1/chat/completions", "/v1/images/generations"])
def test_compressed_body_is_refused_before_it_is_read(provider: Provider, coding: str, status: int, path: str) -> None:
    with running(provider, allow_path="/v1/images/generations") as server, Client(server) as client:
        body = ASKED if path != "/" else PROMPT
        client.ask(body, path=path, Content_Encoding=coding)
        if status == 404:
            with provider.take() as upstream:
                assert "content-encoding" not in upstream.head.lower()
                upstream.send(error_answer(404))
        head = client.head()
        assert head.status == status
        answer = client.exactly(int(head.fields["Content-Length"])).decode()
        assert status == 404 or (
            head.fields["Accept-Encoding"], coding.rpartition(" ")[2] in answer
        ) == ("identity", True)
    assert provider.nobody_came()


def test_compressed_body_passes_with_its_bytes_where_any_model_may_be_asked(provider: Provider) -> None:
    body = zlib.compress(json.dumps(ASKED).encode())
    with running(provider, allow_model="*") as server, Client(server).ask(
        body, path="/v1/responses", Content_Encoding="deflate"
    ), provider.take() as upstream:
        assert "\r\nContent-Encoding: deflate\r\n" in upstream.head and upstream.body == body


@pytest.mark.parametrize("kind", ["multipart/form-data; boundary=x", "Audio/wav", "image/png"])
def test_body_in_which_no_model_can_be_seen_needs_that_any_may_be_asked(provider: Provider, kind: str) -> None:
    path = "/v1/audio/transcriptions"
    with running(provider, allow_path=path) as server, Client(server).ask(
        b"--x", path=path, Content_Type=kind
    ) as client:
        status, message, _ = api_error(client)
        assert status == 415 and "--allow-model" in message
    with running(provider, allow_path=path, allow_model="*") as server:
        with Client(server).ask(b"--x", path=path, Content_Type=kind), provider.take() as upstream:
            assert upstream.head.startswith(f"POST {path} HTTP/1.1\r\n")
            assert f"\r\nContent-Type: {kind}\r\n" in upstream.head and upstream.body == b"--x"


@pytest.mark.parametrize(("method", "path", "has_body"), [
    *[
        ("POST", f"/v1/{name}", True)
        for name in (
            "chat/completions", "completions", "responses", "embeddings", "messages", "messages/count_tokens",
            "responses/input_tokens", "images/generations",
        )
    ],
    ("POST", "/v1/responses/resp_1/cancel", False),
    ("GET", "/v1/responses/resp_1", False),
    ("GET", "/v1/responses/resp_bGl0=", False),
    ("DELETE", "/v1/responses/resp_1", False),
    ("GET", "/v1/responses/resp_1/input_items", False),
])
def test_api_route_passes_to_the_same_path(provider: Provider, method: str, path: str, has_body: bool) -> None:
    with running(provider, allow_path="/v1/images/generations") as server, Client(server) as client:
        client.ask(
            ASKED if has_body else b"" if method == "POST" else None, path=path + "?limit=2&beta=1&model=x",
            method=method,
        )
        with provider.take() as upstream:
            query = "?limit=2&beta=1" if method == "GET" else "?beta=1"
            assert upstream.head.startswith(f"{method} {path}{query} HTTP/1.1\r\n")
            assert json.loads(upstream.body or b"null") == (ASKED if has_body else None)


@pytest.mark.parametrize(("method", "path", "status"), [
    ("GET", "/v1/responses", 405),
    ("GET", "/v1/chat/completions", 405),
    ("DELETE", "/v1/chat/completions/x", 404),
    ("GET", "/v1/files", 404),
    ("GET", "/v1/responses/../files", 404),
    ("GET", "/v1/responses/..", 404),
    ("POST", "/v1/responses/resp_1", 405),
    ("GET", "/v1/responses/resp_1/cancel", 405),
    ("GET", "/v1/responses/input_tokens", 405),
    ("DELETE", "/v1/models/x", 405),
    ("POST", "/v1/images/edits", 404),
    ("GET", "/v1/images/generations", 405),
    ("GET", "/v1/responses/%2e%2e/files", 404),
    ("POST", "/v1/responses/a/b/cancel", 404),
    ("GET", "/v1/responses/a%2Fb", 404),
    ("PUT", "/v1/responses/resp_1", 405),
])
def test_api_has_no_other_routes(provider: Provider, method: str, path: str, status: int) -> None:
    with running(provider, allow_path="/v1/images/generations") as server, Client(server).ask(
        b"" if method == "POST" else None, path=path, method=method
    ) as client:
        assert api_error(client)[0] == status
    assert provider.nobody_came()


@pytest.mark.parametrize(("body", "status"), [
    (b"", None),
    (b"{}", None),
    (b'{"model": "gpt-6-luna"}', None),
    (b'{"model": "gpt-5"}', 403),
    (b'{"models": ["gpt-5"]}', 403),
    (b"x", 400),
    (b'{"Model": "gpt-6-luna"}', 400),
])
def test_api_body_that_needs_no_model_may_name_no_other(body: bytes, status: int | None) -> None:
    settings = streamproxy.Settings(api_key=KEY)
    if status is None:
        streamproxy.check_model(body, settings, needed=False)
        return
    with pytest.raises(streamproxy.RequestError) as caught:
        streamproxy.check_model(body, settings, needed=False)
    assert caught.value.status == status


def test_api_counting_tokens_does_not_count_among_the_requests_of_a_minute(provider: Provider) -> None:
    with running(provider, requests_per_minute=1) as server, Client(server) as client:
        for path, status in [("/v1/messages/count_tokens", 404)] * 3 + [
            ("/v1/messages", 404), ("/v1/messages", 429), ("/v1/messages/count_tokens", 404),
        ]:
            client.ask(ASKED, path=path)
            if status == 404:
                upstream = provider.take()
                upstream.send(error_answer(404, b"", b"Connection: close\r\n"))
            head = client.head()
            client.exactly(int(head.fields["Content-Length"]))
            assert head.status == status


@pytest.mark.parametrize(("path", "meant"), [
    ("/chat/completions", "/v1/chat/completions"),
    ("//v1/chat/completions", "/v1/chat/completions"),
    ("/v1//chat/completions", "/v1/chat/completions"),
    ("/v1/messages/", "/v1/messages"),
    ("/v1/v1/messages", "/v1/messages"),
    ("/api/v1/responses", "/v1/responses"),
    ("/V1/Chat/Completions", "/v1/chat/completions"),
    ("/openai/v1/embeddings/", "/v1/embeddings"),
    ("/openai/deployments/gpt/chat/completions", "/v1/chat/completions"),
    ("/v1beta/openai/chat/completions", "/v1/chat/completions"),
    ("/v2/models", "/v1/models"),
    ("/models/a/b", "/v1/models/a/b"),
    ("/responses/resp_A/input_items", "/v1/responses/resp_A/input_items"),
    ("/v1/chat/completion", "/v1/chat/completions"),
    ("/healthz/", "/healthz"),
    ("//readyz", "/readyz"),
    ("/HEALTHZ", "/healthz"),
    ("/images/generations", "/v1/images/generations"),
    ("/v1/models/", "/v1/models"),
    ("//", "/"),
    ("/v1", None),
    ("/v1/", None),
    ("/x", None),
    ("/v1/files", None),
    ("/v1/threads/x/messages", None),
    ("/v1/../v1/messages", None),
    ("/v1/images/edits", None),
    ("*", None),
    ("", None),
])
def test_path_that_is_nearly_one_of_ours_says_which(path: str, meant: str | None) -> None:
    settings = streamproxy.Settings(api_key=KEY, allow_path="/v1/images/generations")
    assert streamproxy.meant_path(path, settings) == (meant if path else "/")


def test_path_below_models_that_is_allowed_passes_on() -> None:
    with StillServer(allow_path=["/v1/models/load"]) as still, still.client() as client:
        client.ask({"model": streamproxy.DEFAULT_MODEL}, path="/v1/models/load")
        still.turn(3)
        assert read_call(still, still.connect())[0].startswith("POST /v1/models/load HTTP/1.1\r\n")


def test_address_behind_very_many_proxies_is_not_looked_for() -> None:
    access, looks = streamproxy.Access(streamproxy.Settings(api_key=KEY)), []
    with unittest.mock.patch.object(streamproxy, "plain_address", lambda address: looks.append(address) or address):
        assert access.address_of("unix", "192.0.2.1" + ",::1" * 15_000) == "::1"
    assert len(looks) == streamproxy.MAX_HOPS


@pytest.mark.parametrize("path", ["/v" + "1" * 60_000, "/v1" * 20_000, "/v1/openai/deployments/" + "x" * 60_000])
def test_path_that_is_long_is_looked_at_at_once(path: str) -> None:
    with time_in_proportion():
        streamproxy.meant_path(path, streamproxy.Settings(api_key=KEY))


def test_404_says_which_path_is_meant(server: streamproxy.Server) -> None:
    with Client(server) as client:
        client.ask(ASKED, path="/chat/completions")
        assert client.error() == (404, "There is nothing at this path: /v1/chat/completions is meant.")
        client.ask(ASKED, path="/v1/v1/messages")
        assert "/v1/messages is meant" in api_error(client)[1]


def test_api_models_are_those_that_may_be_asked_without_upstream(provider: Provider) -> None:
    for allowed, expected in [((), ["gpt-6-luna"]), (("a/b", "gpt-6-luna"), ["gpt-6-luna", "a/b"])]:
        with running(provider, allow_model=allowed) as server, Client(server) as client:
            head = client.ask(method="GET", path="/v1/models?limit=9").head()
            listed = json.loads(client.exactly(int(head.fields["Content-Length"])))
            assert head.fields["Content-Type"] == "application/json" and listed["object"] == "list"
            assert listed["has_more"] is False
            assert [
                (model["id"], model["object"], model["type"]) for model in listed["data"]
            ] == [(name, "model", "model") for name in expected]
            assert {type(model["created"]) for model in listed["data"]} == {int}
            assert (listed["first_id"], listed["last_id"]) == (expected[0], expected[-1])
            head = client.ask(method="GET", path=f"/v1/models/{expected[-1]}").head()
            assert json.loads(client.exactly(int(head.fields["Content-Length"]))) == listed["data"][-1]
    assert provider.nobody_came()


def test_api_models_are_upstream_s_where_any_may_be_asked(provider: Provider) -> None:
    with running(provider, allow_model="*") as server, Client(server).ask(
        method="GET", path="/v1/models?limit=9&x=y"
    ) as client:
        with provider.take() as upstream:
            assert upstream.head.startswith("GET /v1/models?limit=9&x=y HTTP/1.1\r\n")
            assert "ontent-" not in upstream.head
            upstream.send(OK + JSON + b"Content-Length: 2\r\n\r\n{}")
            assert client.head().status == 200 and client.exactly(2) == b"{}"


@pytest.mark.parametrize(("path", "status"), [
    ("/v1/models/gpt-6-luna", 200),
    ("/v1/models/a/b", 200),
    ("/v1/models/a%2Fb", 200),
    ("/v1/models/gpt-5", 403),
    ("/v1/models/../files", 404),
    ("/v1/models/a/%2e%2e/files", 404),
    ("/v1/models/", 404),
    ("/v1/files", 404),
    ("/v1/chat/completions/", 404),
    ("/v1/MODELS", 404),
    ("/v1//models", 404),
])
@pytest.mark.parametrize("allowed", ["a/b", "*"])
def test_api_paths_are_matched_exactly(provider: Provider, path: str, status: int, allowed: str) -> None:
    with running(provider, allow_model=(allowed,)) as server, Client(server).ask(method="GET", path=path) as client:
        if status in (200, 403) and allowed == "*":
            with provider.take() as upstream:
                assert upstream.head.startswith(f"GET {path} HTTP/1.1\r\n")
        else:
            assert client.head().status == status and provider.nobody_came()


@pytest.mark.parametrize(("answer", "status", "code"), [
    (error_answer(401, b'{"error": {"message": "Wrong key"}}'), 502, "bad_gateway"),
    (error_answer(500), 502, "bad_gateway"),
    (error_answer(404), 404, "not_found"),
    (error_answer(302), 502, "bad_gateway"),
    (b"", 502, "bad_gateway"),
    (OK + b"Content-Encoding: gzip\r\n\r\n", 502, "bad_gateway"),
    (error_answer(413), 413, "request_too_large"),
    (error_answer(429), 429, "rate_limit_exceeded"),
])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_api_errors_have_its_shape(
    server: streamproxy.Server, provider: Provider, path: str, answer: bytes, status: int, code: str
) -> None:
    with Client(server).ask(ASKED, path=path) as client:
        with provider.take() as upstream:
            upstream.send(answer)
        assert api_error(client)[::2] == (status, code)


@pytest.mark.parametrize(("path", "anthropic"), [
    ("/v1/messages", True),
    ("/v1/messages/count_tokens", True),
    ("/v1/messages/x", True),
    ("/v1/responses", False),
])
def test_api_error_of_ours_is_one_of_the_api_that_was_asked(
    server: streamproxy.Server, path: str, anthropic: bool
) -> None:
    with Client(server).ask({}, path=path) as client:
        head = client.head()
        payload = json.loads(client.exactly(int(head.fields["Content-Length"])))
        assert (payload.get("type"), head.fields.get("Request-Id")) == (
            ("error", head.fields["X-Request-Id"]) if anthropic else (None, None)
        )


def test_api_error_of_upstream_about_the_request_passes_whole_but_for_the_key(
    server: streamproxy.Server, provider: Provider
) -> None:
    document = b'{"error": {"message": "Bad model", "type": "t", "param": "model", "code": "c", "more": "%b"}}'
    with Client(server).ask(ASKED, path="/v1/chat/completions") as client, provider.take() as upstream:
        upstream.send(error_answer(429, document % KEY.encode(), b"Retry-After: 7\r\n"))
        head = client.head()
        assert (head.status, head.fields["Retry-After"]) == (429, "7") and "X-Should-Retry" not in head.fields
        assert client.exactly(int(head.fields["Content-Length"])) == document % b"[redacted]"


def test_api_sdks_are_told_not_to_try_again_what_may_have_been_paid_for(provider: Provider) -> None:
    with running(provider, first_byte_timeout=0.2) as server, Client(server).ask(
        ASKED, path="/v1/chat/completions"
    ) as client:
        with provider.take():
            head = client.head()
            assert (head.status, head.fields["X-Should-Retry"]) == (504, "false")
    with running(None) as server, Client(server).ask(ASKED, path="/v1/chat/completions") as client:
        head = client.head()
        assert head.status == 502 and "X-Should-Retry" not in head.fields


def passed(
    server: streamproxy.Server, provider: Provider, head: bytes, wire: bytes, http10: bool = False
) -> tuple[bytes, bool]:
    """What a client gets of an answer, and whether it ended as it should."""
    with Client(server).ask(ASKED, path="/v1/chat/completions", version="1.0" if http10 else "1.1") as client:
        with provider.take() as upstream:
            upstream.send(head, wire)
        got = client.head()
        if got.status != 200:
            return b"", False
        try:
            if "Content-Length" in got.fields:
                return client.exactly(int(got.fields["Content-Length"])), True
            if "Transfer-Encoding" not in got.fields:
                return client.rest(), True
            data = b""
            with contextlib.suppress(AssertionError):
                while part := client.chunk():
                    data += part
                return data, True
        except (AssertionError, ConnectionError):
            return client.seen, False
        return data, False


def test_api_a_cut_anywhere_is_a_cut(server: streamproxy.Server, provider: Provider) -> None:
    wire = chunk(delta("a")) + chunk(delta("data: [DONE]\n\n")) + chunk(delta("b", "stop")) + chunk(DONE) + b"0\r\n\r\n"
    finished = wire.index(b'"stop"}]}') + len(b'"stop"}]}')  # the event that says so is whole
    for size in range(len(STREAM_HEAD + wire)):
        at = size - len(STREAM_HEAD)
        _, whole = passed(server, provider, (STREAM_HEAD + wire)[:size], b"")
        assert whole == (at >= finished), size
    assert passed(server, provider, STREAM_HEAD, wire)[1]


ENDS = {
    "[DONE]": (DONE, True),
    "finish_reason": (STOP, True),
    "neither": (delta("a"), False),
    "no event": (b"", False),
    "comments": (b": x\n\n", False),
    "message_stop": (b'event: message_stop\ndata: {"type":"message_stop"}\n\n', True),
    "[DONE] in text": (delta("\ndata: [DONE]\n\n"), False),
    "response.completed": (b'event: response.completed\ndata: {"x": "' + b"y" * 200000 + b'"}\n\n', True),
    "error": (event({"error": {"message": "x"}}) + DONE, False),
    "response.created": (b"event: response.created\ndata: {}\n\n", False),
    "error event": (b'event: error\ndata: {"type": "error"}\n\n' + DONE, False),
    "null error": (event({"error": None, "choices": []}) + DONE, True),
    "empty finish_reason": (delta("a", ""), False),
    "finish_reason elsewhere": (
        event({"native": {"finish_reason": "x"}, "choices": [{"index": 0, "finish_reason": None}]}), False,
    ),
    "error beside choices": (
        event({"id": "x", "error": {"message": "x"}, "choices": [{"finish_reason": "error"}]}) + DONE, False,
    ),
    "typed error": (event({"type": "error", "error": {"type": "x"}}) + DONE, False),
    "spaced error": (event(b'{ "error": "x" }') + DONE, False),
    "error that is no JSON": (b"event: error\ndata: overloaded\n\n" + DONE, False),
    "error with a space": (event(b'{"error" : ["x"]}') + DONE, False),
    "number for an error": (event(b'{"error":500}') + DONE, False),
    "finish_reason with a space": (event(b'{"choices" : [{"finish_reason" : "stop"}]}'), True),
    "two spaces": (b"data:  [DONE]\n\n", True),
    "mixed line ends": (b": ping\n\ndata: [DONE]\r\n\r\n", True),
    "cut within the last event": (b'event: response.completed\ndata: {"type": "response.completed", "half', False),
    "cut behind its type": (b"event: message_stop\nda", False),
    "no blank line": (b'event: message_stop\ndata: {"type":"message_stop"}', True),
    "one of two choices, spaced": (
        event(b'{"choices":[{"index":0,"finish_reason":null},{"index":1,"finish_reason": "stop"}]}'), True,
    ),
    "one of two choices": (
        event(b'{"choices":[{"index":0,"finish_reason":null},{"index":1,"finish_reason":"stop"}]}'), True,
    ),
    "choice goes on beside an error": (event(b'{"error":"x","choices":[{"finish_reason":null}]}') + DONE, False),
    "choice goes on in an error event": (b'data: {"choices":[{"finish_reason":null}]}\nevent: error\n\n' + DONE, False),
    "CR line ends": (b"data: {}\r\rdata: [DONE]\r\r", True),
    "BOM": (b"\xef\xbb\xbfdata: [DONE]\n\n", True),
    "finish_reason in text": (delta('"finish_reason":"stop"'), False),
    "CRLF": (b"data: [DONE]\r\n\r\n", True),
}


@pytest.mark.parametrize("name", ENDS)
def test_api_stream_is_whole_only_with_its_end_event(server: streamproxy.Server, provider: Provider, name: str) -> None:
    body, expected = ENDS[name]
    body = body if name == "BOM" else ROLE + body
    for head, wire in [
        (STREAM_HEAD, chunk(body) + b"0\r\n\r\n"), (CLOSE_HEAD, body),
        (OK + SSE + b"Content-Length: %d\r\n\r\n" % len(body), body),
    ]:
        got, whole = passed(server, provider, head, wire)
        assert (body.startswith(got), whole) == (True, expected) and (got == body or not expected)
    for http10 in (False, True):
        assert passed(
            server, provider, STREAM_HEAD,
            b"".join(
                chunk(body[at : at + 1]) for at in range(min(len(body), 2000))
            ) + (chunk(body[2000:]) if body[2000:] else b"")
                          + b"0\r\n\r\n",
            http10,
        )[1] == expected  # fmt: skip


@pytest.mark.parametrize("name", ENDS)
def test_api_stream_whose_events_come_one_by_one_ends_with_the_same(name: str) -> None:
    body, expected = ENDS[name]
    answer = streamproxy.PassedAnswer()
    answer.start(200, {"content-type": "text/event-stream"})
    out = b"".join(map(answer.feed, re.split(b"(?<=\n\n)", body)))
    assert out + answer.close(None) == body
    assert (answer.state == answer.DONE) == expected


def test_api_several_choices_need_as_many_finish_reasons(server: streamproxy.Server, provider: Provider) -> None:
    def ended(*events: bytes, **more: object) -> bool:
        with Client(server).ask({**ASKED, **(more or {"n": 2})}, path="/v1/completions") as client:
            with provider.take() as upstream:
                upstream.start(*events)
            client.head()
            with contextlib.suppress(AssertionError):
                client.body()
                return True
            return False
    second = event({"choices": [{"index": 1, "delta": {}, "finish_reason": "stop"}]})
    assert [
        ended(A, STOP), ended(A, STOP, STOP), ended(A, STOP, second), ended(A, STOP, DONE),
    ] == [False, False, True, True]
    assert [
        ended(A, STOP, prompt=["a", "b"]), ended(A, STOP, second, prompt=["a", "b"]), ended(A, STOP, metadata={"n": 3}),
    ] == [False, True, True]


def test_api_a_slow_last_event_is_waited_for_and_what_follows_done_is_not(
    server: streamproxy.Server, provider: Provider
) -> None:
    with Client(server).ask(ASKED, path="/v1/responses") as client, provider.take() as upstream:
        upstream.start(ROLE, b"event: response.completed\n")
        client.head()
        client.until(b"event: response.completed\n\r\n")
        caught_up(server)
        elapse(server, 2 * streamproxy.END_GRACE)
        caught_up(server)
        upstream.event(b'data: {"type": "response.completed"}\n\n')
        assert client.chunk() == b'data: {"type": "response.completed"}\n\n'
        upstream.event(DONE)
        assert client.chunk() == DONE
        elapse(server, streamproxy.END_GRACE)
        assert client.chunk() == b""  # while upstream's body has not ended


@pytest.mark.parametrize("tls", [False, True])
def test_api_document_that_a_reset_ends_is_cut(
    provider: Provider, certificate: Path, monkeypatch: pytest.MonkeyPatch, tls: bool
) -> None:
    if hasattr(ssl, "OP_IGNORE_UNEXPECTED_EOF"):  # which some versions of Python set of themselves
        context = ssl.create_default_context(cafile=str(certificate))
        context.options |= ssl.OP_IGNORE_UNEXPECTED_EOF
        monkeypatch.setattr(ssl, "create_default_context", lambda **_: context)
    with running(provider, upstream=tls_url(provider) if tls else provider.url, ca_file=str(certificate)) as server:
        with Client(server) as client:
            client.ask(ASKED, path="/v1/chat/completions")
            with take_tls(provider, certificate) if tls else provider.take() as upstream:
                upstream.send(OK + JSON + b'\r\n{"choices":[{"mess')
                if tls:
                    socket.socket.shutdown(upstream.sock, socket.SHUT_RDWR)  # with no close_notify
                else:
                    upstream.reset()
                head = client.head()
                assert (head.status, head.fields["X-Should-Retry"]) == (502, "false")


def test_api_errors_keep_fields_and_the_connection(server: streamproxy.Server, provider: Provider) -> None:
    with Client(server) as client:
        client.ask(ASKED, path="/v1/chat/completions")
        with provider.take() as upstream:
            for _ in range(3):
                upstream.send(
                    error_answer(
                        429, b'{"error": {"message": "x***y \\ud83d"}}',
                        b"x-request-id: r\r\nx-ratelimit-remaining: 0\r\nRetry-After: 7\r\n",
                    )
                )
                head = client.head()
                fields = {name.lower(): value for name, value in head.fields.items()}
                assert (
                    head.status, fields["x-request-id"], fields["x-ratelimit-remaining"], fields["retry-after"]
                ) == (429, "r", "0", "7")
                assert json.loads(
                    client.exactly(int(fields["content-length"]))
                )["error"]["message"].startswith("[redacted]")
                client.ask(ASKED, path="/v1/chat/completions")
                upstream.read_request()


def test_api_form_cannot_carry_another_model(server: streamproxy.Server, provider: Provider) -> None:
    with Client(server).ask(
        ASKED, path="/v1/completions", Content_Type="application/x-www-form-urlencoded"
    ), provider.take() as upstream:
        assert "\r\nContent-Type: application/json\r\n" in upstream.head and "form" not in upstream.head


def test_api_idle_clock_counts_events_behind_comments(provider: Provider) -> None:
    with running(provider, idle_timeout=50, first_byte_timeout=50) as server:
        with Client(server).ask(ASKED, path="/v1/chat/completions") as client:
            with provider.take() as upstream:
                upstream.send(STREAM_HEAD)
                for _ in range(8):
                    elapse(server, 15)
                    upstream.event(b": keep\n\n" + ROLE)
                    caught_up(server)
                upstream.finish()
                assert client.head().status == 200 and client.body().endswith(DONE)


def test_api_document_is_whole_by_its_framing(server: streamproxy.Server, provider: Provider) -> None:
    for head, wire, expected in [
        (OK + JSON + b"Content-Length: 5\r\n\r\n", b"[123]", True),
        (OK + JSON + b"Content-Length: 5\r\n\r\n", b"[123", False),
        (OK + JSON + b"Transfer-Encoding: chunked\r\n\r\n", chunk(b"[12") + chunk(b"3]") + b"0\r\n\r\n", True),
        (OK + JSON + b"Transfer-Encoding: chunked\r\n\r\n", chunk(b"[12") + chunk(b"3]"), False),
        (OK + JSON + b"\r\n", b"[123]", True),
    ]:
        assert passed(server, provider, head, wire) == ((b"[123]", True) if expected else (b"", False))


def test_api_idle_clock_starts_anew_with_comments(provider: Provider) -> None:
    with running(provider, idle_timeout=40, heartbeat=0) as server, Client(server).ask(
        ASKED, path="/v1/chat/completions"
    ) as client:
        with provider.take() as upstream:
            upstream.start(A)
            for _ in range(8):
                elapse(server, 10)
                upstream.event(b": keep-alive\n\n")
                caught_up(server)
            upstream.finish()
            assert client.head().status == 200 and client.body().endswith(b": keep-alive\n\n" + STOP + DONE)


def test_api_client_leaves(server: streamproxy.Server, provider: Provider) -> None:
    for start in (b"", STREAM_HEAD, STREAM_HEAD + chunk(A)):
        with Client(server).ask(ASKED, path="/v1/chat/completions") as client, provider.take() as upstream:
            upstream.send(start)
            if start:
                client.head()
            client.sock.close()
            assert upstream.gone()


def test_api_large_bodies_pass_both_ways(provider: Provider) -> None:
    with running(provider, max_body=9_000_000) as server, Client(server) as client:
        asked = json.dumps({**ASKED, "image": "x" * 8_000_000}).encode()
        client.send(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n"
            b"Content-Length: %d\r\n\r\n" % len(asked)
        )
        assert client.until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.send(asked)
        with provider.take() as upstream:
            assert upstream.body == asked
            big = event({"image": "y" * 1_000_000})
            sender = threading.Thread(target=lambda: (upstream.start(big), upstream.finish()))
            sender.start()
            client.head()
            assert client.body() == big + STOP + DONE
            sender.join()


@pytest.mark.parametrize(("method", "path", "upgrade", "status"), [
    ("GET", "/v1/responses", "WebSocket", 426),
    ("GET", "/v1/realtime?model=x", "websocket", 426),
    ("GET", "/v1/chat/completions", "h2c, websocket", 426),
    ("POST", "/v1/nothing", "websocket", 426),
    ("GET", "/v1/models", "h2c", 200),
    ("GET", "/", "websocket", 200),
    ("GET", "/v1", "websocket", 404),
])
def test_upgrade_to_websocket_is_refused_below_v1(
    server: streamproxy.Server, method: str, path: str, upgrade: str, status: int
) -> None:
    with Client(server).ask(
        b"" if method == "POST" else None, method, path, Connection="Upgrade", Upgrade=upgrade
    ) as client:
        head = client.head()
        assert head.status == status and ("Upgrade" in head.fields) == (status == 426)
        if status == 426:
            assert json.loads(client.rest())["error"]["type"] == "invalid_request_error"


# ---------------------------------------------------------------- hostile input


def test_request_behind_an_empty_line_is_not_acted_on_before_its_end() -> None:
    with StillServer() as still, still.client() as client:
        client.send(b"\r\nPOST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5")
        still.turn(2)
        hidden = b"GET /readyz HTTP/1.1\r\nHost: localhost\r\n\r\n"
        client.send(b"5\r\n\r\n" + hidden.ljust(55, b" "))
        still.turn(2)
        assert client.error()[0] == 400
        client.sock.shutdown(socket.SHUT_WR)
        still.turn()
        assert client.rest() == b"" and len(still.lines.requests) == 1 and not still.jobs


def test_empty_line_behind_a_body_is_no_request(provider: Provider, caplog: pytest.LogCaptureFixture) -> None:
    with running(provider, keep_alive_timeout=0.3) as server, Client(server) as client:
        client.send(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n\r\n")
        head = client.head()
        assert head.status == 200 and client.exactly(3) == b"ok\n" and client.rest() == b""
    assert len(log_entries(caplog, 1)) == 1


MANY = 3 * streamproxy.MAX_BEGINNINGS


def test_clients_that_leave_at_once_hold_up_no_text_and_cost_nothing_more() -> None:
    with StillServer() as still:
        clients = [still.client().ask(PROMPT) for _ in range(MANY)]
        still.turn(4)
        upstreams = [still.connect() for _ in clients]
        still.turn()
        for client in clients[1:]:
            client.sock.close()
        upstreams[0].send(STREAM_HEAD, chunk(delta("a")))
        still.turn()
        assert clients[0].head().status == 200 and clients[0].chunk() == b"a"
        assert len(still.lines.requests) == streamproxy.MAX_BEGINNINGS
        still.turn(3)
        assert len(still.lines.requests) == MANY - 1 and still.server.snapshot()["streams"] == 1
        clients[0].sock.close()


def test_client_that_left_while_many_do_is_not_asked_for_any_more() -> None:
    with StillServer() as still:
        others = [still.client() for _ in range(MANY)]
        client = still.client().ask(PROMPT)
        still.turn(4)
        for leaving in [client, *others]:  # the last is seen to first
            leaving.sock.close()
        upstream = still.connect()
        still.turn(5)
        assert upstream.rest() == b"" and not still.server.clients and len(still.lines.requests) == 1


@pytest.mark.parametrize("tokens", [False, True])
def test_bodies_that_come_at_once_are_begun_with_a_few_a_turn(tokens: bool, tmp_path: Path) -> None:
    settings = {"token_file": token_file(tmp_path, f"alice {ALICE}\n")} if tokens else {}
    with StillServer(**settings) as still:
        clients = [still.client() for _ in range(MANY)]
        for client in clients:
            client.send(
                f"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 15\r\nx-api-key: {ALICE}\r\n\r\n".encode()
            )
        still.turn(4)
        while tokens and still.jobs:
            still.jobs.popleft()()
            still.turn(5)
        assert not still.jobs
        for client in clients:
            client.send(b'{"prompt": "a"}')
        still.turn()
        assert len(still.jobs) == streamproxy.MAX_BEGINNINGS
        still.turn(3)
        assert len(still.jobs) == MANY
        still.jobs.clear()


def test_requests_that_waited_for_the_token_file_are_begun_with_a_few_a_turn(tmp_path: Path) -> None:
    with StillServer(token_file=token_file(tmp_path, f"alice {ALICE}\n")) as still:
        [still.client().ask(PROMPT, x_api_key=ALICE) for _ in range(MANY)]
        still.turn(5)
        for _ in range(2):  # the first look was begun for the first of them
            still.jobs.popleft()()
            still.turn(2)
        assert 0 < len(still.jobs) <= 1 + 2 * streamproxy.MAX_BEGINNINGS
        still.turn(3)
        assert len(still.jobs) == MANY
        still.jobs.clear()


LONG = "x" * streamproxy.MAX_PARSED


@pytest.mark.parametrize(("path", "body"), [
    ("/", {"prompt": LONG}), ("/v1/embeddings", {"model": streamproxy.DEFAULT_MODEL, "input": LONG}),
])  # fmt: skip
def test_large_body_is_looked_at_by_a_thread(path: str, body: dict[str, str]) -> None:
    with StillServer() as still, still.client().ask(body, path=path) as client:
        still.turn(5)
        assert len(still.jobs) == 1 and still.silent(client)
        still.jobs.popleft()()
        still.turn()
        assert LONG.encode() in read_call(still, still.connect())[1]


@pytest.mark.parametrize(("body", "status"), [(b"x" * 50_000, 400), (b"{}" + b" " * 50_000, 400)])
def test_large_body_that_is_none_is_refused_like_any_other(body: bytes, status: int) -> None:
    with StillServer() as still, still.client().ask(body) as client:
        still.turn(5)
        still.jobs.popleft()()
        still.turn()
        assert client.error()[0] == status and not still.jobs
        assert [entry["status"] for entry in still.lines.requests] == [status]


@pytest.mark.parametrize("how", ["the client leaves", "drain", "a fault"])
def test_large_body_of_whom_nobody_waits_any_more_is_not_asked(how: str) -> None:
    parse = {"a fault": lambda body: 1 // 0}.get(how, streamproxy.parse_request)
    with StillServer() as still, still.client().ask({"prompt": LONG}) as client:
        still.turn(5)
        if how == "the client leaves":
            client.sock.close()
        elif how == "drain":
            still.server._abort()
        still.turn()
        with unittest.mock.patch.object(streamproxy, "parse_request", parse):
            still.jobs.popleft()()
        still.turn(2)
        assert not still.jobs and still.server.snapshot()["streams"] == 0
        status = {"the client leaves": 499, "drain": 503, "a fault": 500}[how]
        assert [entry["status"] for entry in still.lines.requests] == [status]
        assert how == "the client leaves" or client.error()[0] == status


def test_head_that_drips_in_is_looked_at_when_a_line_ends() -> None:
    with StillServer() as still, still.client() as client:
        parse = unittest.mock.Mock(wraps=streamproxy.parse_request_head)
        with unittest.mock.patch.object(streamproxy, "parse_request_head", parse):
            for byte in b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Long: %b\r\n\r\n" % (b"x" * 500):
                client.send(bytes([byte]))
                still.turn()
        assert client.head().status == 200 and parse.call_count == 5


@pytest.mark.parametrize("state", ["LINGERING", "an empty line"])
def test_drain_waits_but_a_moment_for_who_has_nothing_to_ask(state: str) -> None:
    with StillServer(drain_timeout=100.0) as still:
        client = still.client()
        if state == "LINGERING":
            client.send(b"POST /none HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900000\r\n\r\nabc")
        else:
            client.send(b"\r\n")
        still.turn(2)
        assert repr(next(iter(still.server.clients))) == f"<Client {'LINGERING' if state == 'LINGERING' else 'IDLE'}>"
        still.server.state = still.server.DRAINING
        still.hub.loop.post(still.server._drain)
        still.turn()
        still.at(streamproxy.END_GRACE)
        assert not still.server.clients


@pytest.mark.parametrize("how", ["close", "reset", "half"])
@pytest.mark.parametrize("when", ["it waits for a thread", "a thread dials", "a thread has dialed"])
def test_client_that_leaves_while_its_connection_is_opened_costs_nothing(how: str, when: str) -> None:
    with StillServer() as still:
        client = still.client().ask(PROMPT)
        still.turn(2)
        near, far = socket.socketpair()
        connection = streamproxy.Connection(near, still.hub.upstream.target.key)

        def dial(lifeline: streamproxy.Lifeline) -> streamproxy.Connection:
            if when == "a thread dials":
                leave(client, how)
                still.turn(2)
            return connection

        if when == "it waits for a thread":
            leave(client, how)
            still.turn(2)
        with unittest.mock.patch.object(still.hub.upstream, "dial", dial):
            still.jobs.popleft()()
        if when == "a thread has dialed":
            leave(client, how)
        still.turn(3)
        with Peer(far) as upstream:
            assert when == "a thread has dialed" or upstream.rest() == b""  # it was asked nothing
            assert upstream.gone()
        assert not still.server.clients and still.server.snapshot()["streams"] == 0 and not still.jobs
        assert [entry["ending"] for entry in still.lines.requests] == ["disconnect"]


def test_request_with_a_chunked_body_cut_anywhere_is_read_at_once(
    server: streamproxy.Server, provider: Provider
) -> None:
    body = chunk(b"[") + chunk(b"]") + b"0\r\nX: y\r\n\r\n"
    with Client(server) as client:
        for parts in cuts(body):
            client.send(b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
            for part in parts:
                client.send(part)
                time.sleep(0.002)  # so that they arrive one by one
            assert client.error() == (400, "The body must be a JSON object.")


def test_request_with_a_chunked_body_is_decoded(server: streamproxy.Server, provider: Provider) -> None:
    body = json.dumps(PROMPT).encode()
    with Client(server) as client:
        client.send(
            b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n", chunk(body[:5]),
            chunk(body[5:]), b"0\r\nX: y\r\n\r\n",
        )
        client.ask(method="GET", path="/healthz")
        with provider.take() as upstream:
            assert json.loads(upstream.body)["messages"] == [{"role": "user", "content": "Say hello"}]
            upstream.start(A)
            upstream.finish()
        assert client.head().status == 200 and client.body() == b"a" and client.head().status == 200


@pytest.mark.parametrize("more", [b"", b"\r\n", b"GET / HTTP/1.0\r\n\r\n"], ids=[
    "nothing", "an empty line", "a request",
])
@pytest.mark.parametrize("how", ["upstream is cut", "abort"])
def test_http_1_0_cut_answer_is_a_reset_whatever_the_client_sent_behind_its_request(
    provider: Provider, how: str, more: bytes
) -> None:
    with running(provider) as server, Client(server).ask(PROMPT, version="1.0") as client, provider.take() as upstream:
        client.send(more)
        upstream.start(A)
        assert client.head().status == 200 and client.exactly(1) == b"a"
        caught_up(server)
        if how == "abort":
            server.stop()
        else:
            upstream.sock.close()
        with pytest.raises(ConnectionResetError):
            client.rest()


def test_connection_that_lingers_has_its_clock_also_behind_a_long_stream() -> None:
    with StillServer(client_timeout=20.0, keep_alive_timeout=75.0) as still, still.client() as client:
        client.ask(PROMPT, Connection="close").ask(PROMPT)
        still.turn(2)
        upstream = still.connect()
        upstream.send(STREAM_HEAD, chunk(A))
        for second in (50, 100):
            still.at(second)
            upstream.send(chunk(A))
            still.turn()
        upstream.send(chunk(DONE))
        still.turn(2)
        assert client.head().status == 200 and client.body() == b"aaa"
        assert client.rest() == b"" and len(still.server.clients) == 1  # it lingers: the second request was not read
        still.at(119.9)
        assert still.server.clients
        still.at(120)
        assert not still.server.clients


def test_request_behind_an_aborted_answer_is_refused_at_once_and_upstream_not_asked(
    provider: Provider, caplog: pytest.LogCaptureFixture
) -> None:
    with running(provider, drain_timeout=0.0) as server, Client(server).ask(PROMPT, **EVENTS) as client:
        with provider.take() as upstream:
            upstream.start(A)
            client.head()
            client.ask({"prompt": "second"})
            caught_up(server)
            began = time.monotonic()
            with stopping(server):
                assert b"event: error" in client.body()
                assert client.error() == (503, "The server is shutting down.") and client.rest() == b""
                client.sock.close()
            assert time.monotonic() < began + streamproxy.ABORT_GRACE / 2
    assert provider.nobody_came() and [entry["ending"] for entry in log_entries(caplog, 3)].count("aborted") == 2


@pytest.mark.parametrize("status", NEVER_COMING)
def test_refused_request_whose_body_never_comes_holds_no_thread_and_ends(
    server: streamproxy.Server, provider: Provider, status: str
) -> None:
    caught_up(server)
    before, limit = threading.active_count(), server.settings.client_timeout
    clients = [Client(server) for _ in range(200)]
    for client in clients:
        client.send(NEVER_COMING[status])
    if status == "408":
        wait_for(lambda: server.snapshot()["streams"] == len(clients))  # each waits for its body
        elapse(server, limit)
    for client in clients:
        assert client.error()[0] == int(status)
    assert threading.active_count() <= before + 1 and server.snapshot()["threads"] == 0  # that of the log
    caught_up(server)
    assert server.snapshot()["connections"] >= 200  # it waits for what they still send
    elapse(server, limit)
    wait_for(lambda: not server.snapshot()["connections"])
    assert provider.nobody_came()


@pytest.mark.parametrize("status", ["404", "403", "413"])
def test_refusal_reaches_a_client_that_sends_all_of_a_large_body_first(
    server: streamproxy.Server, provider: Provider, status: str
) -> None:
    with Client(server) as client:
        head = NEVER_COMING[status].replace(b"50000000", b"30000000").replace(b"50000\r", b"30000000\r")
        drip(client, head + b"x" * 30_000_000, 1_000_000)
        assert client.error()[0] == int(status)
        client.sock.shutdown(socket.SHUT_WR)
        assert client.rest() == b""


# ---------------------------------------------------------------- time and the log


# When what is sent, by the clock, and when a client that says no more is too late with it.
@pytest.mark.parametrize(("sent", "late_at"), [
    ({0: b"P"}, 30),
    ({0: b"P", 29: b"OST / HTTP/1.1\r\n"}, 30),
    ({0: b"P", 29: b"OST / HTTP/1.1\r\n" + H + b"Content-Length: 20\r\n\r\n{"}, 30),
    ({5: b"P", 29: b"OST / HTTP/1.1\r\n"}, 35),
    ({5: b"POST / HTTP/1.1\r\n" + H + b"Content-Length: 20\r\n\r\n{", 34: b"}"}, 35),
    ({29: b"\r\n"}, 30),
])  # fmt: skip
def test_head_and_body_must_arrive_within_one_timeout(sent: dict[int, bytes], late_at: int) -> None:
    with StillServer(client_timeout=30.0) as still, still.client() as client:
        for second, data in sent.items():
            still.at(second)
            client.send(data)
            still.turn(2)
        still.at(late_at - 0.1)
        assert still.silent(client)
        still.at(late_at)
        if b"".join(sent.values()).strip():
            assert client.error() == (408, "The request did not arrive in time.")
            assert [entry["status"] for entry in still.lines.requests] == [408]
        still.turn()
        assert client.rest() == b""


def test_head_that_drips_in_is_not_looked_through_each_time(monkeypatch: Any) -> None:
    looks, parse = [], streamproxy.parse_request_head
    monkeypatch.setattr(streamproxy, "parse_request_head", lambda data: (looks.append(len(data)), parse(data))[1])
    with StillServer() as still, still.client() as client:
        head = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nA: " + b"x" * 3000 + b"\r\n\r\n"
        for at in range(len(head)):
            client.send(head[at : at + 1])
            still.turn()
        still.turn()
        assert client.head().status == 200 and len(looks) <= 6


def test_what_comes_behind_an_error_waits_for_a_client_that_does_not_read() -> None:
    with StillServer() as still, still.client().ask(ASKED, path="/v1/chat/completions") as client:
        still.turn(2)
        asking, upstream = next(iter(still.server.clients)), still.connect()
        upstream.sock.setblocking(False)
        upstream.send(STREAM_HEAD, chunk(event({"error": {"message": "no"}})))
        left = chunk(event({"x": "y" * 50_000})) * 200
        for _ in range(300):
            with contextlib.suppress(BlockingIOError):
                left = left[upstream.sock.send(left) :]
            still.turn()
        assert asking.pending and len(left) > 5_000_000
        upstream.sock.close()
        client.sock.close()
        still.turn(3)
        assert not still.server.clients


@pytest.mark.parametrize("answered", [True, False])
def test_idle_connection_has_a_clock_of_its_own_once_it_is_kept(answered: bool) -> None:
    with StillServer(client_timeout=30.0, keep_alive_timeout=75.0) as still, still.client() as client:
        if answered:
            still.at(20)
            client.ask(method="GET", path="/healthz")
            still.turn(2)
            assert client.head().status == 200 and client.exactly(3) == b"ok\n"
        still.at(94.9 if answered else 29.9)
        assert still.silent(client)
        still.at(95 if answered else 30)
        assert client.rest() == b"" and not still.server.clients and len(still.lines.requests) == answered


def test_request_on_a_kept_connection_has_the_time_of_any_other() -> None:
    with StillServer(client_timeout=30.0, keep_alive_timeout=75.0) as still, still.client() as client:
        client.ask(method="GET", path="/healthz")
        still.turn(2)
        assert client.head().status == 200 and client.exactly(3) == b"ok\n"
        still.at(74)
        client.send(b"GET ")
        still.turn(2)
        still.at(103.9)
        assert still.silent(client)
        still.at(104)
        assert client.error()[0] == 408


def fill(still: StillServer, upstream: Peer, asking: streamproxy.Client) -> None:
    """Have upstream send until the client, which does not read, takes no more."""
    while not asking.pending:
        upstream.send(chunk(delta("x" * 30000)))
        still.turn()


def test_client_that_stops_reading_is_cut_after_client_timeout_of_no_progress() -> None:
    with StillServer(client_timeout=30.0, idle_timeout=5.0) as still, still.client().ask(PROMPT) as client:
        still.turn(2)
        asking, upstream = next(iter(still.server.clients)), still.connect()
        upstream.send(STREAM_HEAD)
        fill(still, upstream, asking)
        still.at(29)
        assert still.server.clients
        client.more()  # progress, and the clock starts anew
        while asking.pending:
            client.more()
            still.turn()
        fill(still, upstream, asking)
        still.at(58.9)
        assert still.server.clients
        still.at(59)
        assert not still.server.clients and upstream.gone() and still.server.snapshot()["streams"] == 0
        assert [
            (entry["ending"], entry["error"]) for entry in still.lines.requests
        ] == [("aborted", "The client stopped reading.")]


def test_client_that_does_not_read_a_short_answer_is_cut_too() -> None:
    with StillServer(client_timeout=30.0) as still, still.client() as client:
        client.send(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 200)  # the page: more than sockets hold
        still.turn(300)
        asking = next(iter(still.server.clients))
        assert asking.pending
        answered = len(still.lines.requests)
        still.at(29.9)
        assert still.server.clients and len(still.lines.requests) == answered
        still.at(30)
        assert not still.server.clients and still.lines.requests[-1]["ending"] == "aborted"
        assert len(still.lines.requests) == answered + 1


def test_slow_request_is_408_and_idle_connection_closed(provider: Provider) -> None:
    starts = [
        b"POST", b"POST / HTTP/1.1\r\nHost: localhost\r\nA:",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{",
    ]
    with running(provider, client_timeout=0.2) as server:
        clients = []
        for start in starts:
            clients.append(Client(server))
            clients[-1].send(start)
        unused = Client(server)
        for client in clients:
            assert client.error() == (408, "The request did not arrive in time.")
            assert client.rest() == b""
        assert unused.rest() == b""  # a connection nobody uses ends without a word


def test_slow_request_is_cut_in_total_not_per_byte(provider: Provider) -> None:
    with running(provider, client_timeout=0.3) as server, Client(server) as client:
        with pytest.raises((AssertionError, ConnectionError)):
            for _ in range(2000):
                client.send(b"x")
                client.sock.settimeout(0.01)
                with contextlib.suppress(socket.timeout):
                    assert client.more() and b"408" not in client.seen


def test_client_that_vanishes_leaves_no_traceback(server: streamproxy.Server, caplog: pytest.LogCaptureFixture) -> None:
    for data in (b"", b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{", b"GET / HTTP/1.1\r\n"):
        client = Client(server)
        client.send(data)
        client.reset()
    wait_for(lambda: not server.snapshot()["connections"])
    assert "Traceback" not in caplog.text and "fault" not in caplog.text


def test_fault_in_a_request_is_500_with_its_place_in_its_line_of_the_log(
    server: streamproxy.Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamproxy, "encode_request", lambda asked, settings, refused: 1 / 0)
    with Client(server).ask(PROMPT) as client:
        assert client.error() == (500, "Internal error.")
        assert client.ask(method="GET", path="/healthz").head().status == 200
    entry = log_entries(caplog, 2)[0]
    assert entry["status"] == 500
    assert re.fullmatch(r"Internal error: ZeroDivisionError in line \d+", str(entry["error"]))
    assert "Traceback" not in caplog.text


def test_log_line_of_a_stream(server: streamproxy.Server, provider: Provider, caplog: pytest.LogCaptureFixture) -> None:
    with Client(server).ask({"prompt": "my secret"}, X_Request_Id="id-7") as client, provider.take() as upstream:
        upstream.start(ROLE, delta("ä"), delta("b"), event({"choices": [], "usage": {"total_tokens": 3}}))
        upstream.finish()
        client.head()
        client.body()
    entry = log_entries(caplog, 1)[0]
    assert list(entry) == [
        "time", "id", "client", "method", "path", "status", "ending", "error", "seconds", "upstream", "ttft", "model",
        "finish_reason", "pieces", "bytes", "usage", "upstream_id",
    ]
    varying = ("time", "seconds", "ttft", "model", "finish_reason", "upstream_id")
    assert {name: value for name, value in entry.items() if name not in varying} == {
        "id": "id-7", "client": "127.0.0.1", "method": "POST", "path": "/", "status": 200, "ending": "complete",
        "error": None, "upstream": provider.url[7:-3], "pieces": 2, "bytes": 3, "usage": {"total_tokens": 3},
    }  # fmt: skip
    assert 0 <= entry["ttft"] <= entry["seconds"] < DEADLINE
    assert re.match(
        r"time=\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z id=id-7 client=127.0.0.1 method=POST path=/ status=200 "
        r"ending=complete seconds=",
        str(entry),
    )
    assert str(entry).endswith(' finish_reason=stop pieces=2 bytes=3 usage={"total_tokens":3}')
    assert "secret" not in caplog.text


def test_log_holds_no_query_and_cannot_be_forged(
    server: streamproxy.Server, provider: Provider, caplog: pytest.LogCaptureFixture
) -> None:
    with Client(server) as client:
        client.send(b"GET /a[2Jb=c\xff\"?prompt=secret HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: a b\r\n\r\n")
        assert client.head().status == 404
    entry = log_entries(caplog, 1)[0]
    assert re.search(r' path="/a\[2Jb=c\\u00ff\\"" status=404 ', str(entry)), str(entry)
    assert "secret" not in caplog.text and re.fullmatch("[0-9a-f]{16}", entry["id"])


def test_log_cuts_a_method_and_a_path_that_are_long_in_the_line_and_in_the_step(
    server: streamproxy.Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "streamproxy")
    with Client(server) as client:
        client.send(b"%b /%b HTTP/1.1\r\nHost: localhost\r\n\r\n" % (b"M" * 1000, b"p" * 1000))
        assert client.head().status == 404
    wait_for(lambda: " status=404 " in caplog.text)
    entries = [record.msg for record in caplog.records if "method" in record.msg]
    told = [(entry["method"], entry["path"]) for entry in entries]
    assert told == [("M" * 20, "/" + "p" * 199)] * 2


def test_log_does_not_quote_a_request_line_that_it_cannot_read(
    server: streamproxy.Server, caplog: pytest.LogCaptureFixture
) -> None:
    with Client(server) as client:
        client.send(b"GET /?prompt=my secret words HTTP/1.1\r\n\r\n")
        assert client.error() == (400, "The request line is not in HTTP's grammar.")
    assert " status=400 " in str(log_entries(caplog, 1)[0]) and "secret" not in caplog.text


def test_upstream_message_is_not_logged_since_it_may_quote_the_prompt(
    server: streamproxy.Server, provider: Provider, caplog: pytest.LogCaptureFixture
) -> None:
    with Client(server).ask(PROMPT) as client, provider.take() as upstream:
        upstream.send(error_answer(400, b'{"error": {"message": "I dislike: my secret"}}'))
        assert client.error() == (400, "I dislike: my secret")
    assert log_entries(caplog, 1)[0]["error"] == "Upstream refused the request with status 400."


def test_log_tells_each_step_to_who_wants_to_know_and_nothing_that_is_said(
    provider: Provider, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    refusal = {"error": {"message": "Unsupported parameter: 'max_tokens' of a secret", "param": "max_tokens"}}
    with running(provider, token_file=token_file(tmp_path, f"alice {ALICE}\n")) as server:
        for level in (logging.DEBUG, logging.INFO):
            caplog.set_level(level, logger="streamproxy")
            caplog.clear()
            with Client(server) as client:
                client.ask({"prompt": "a secret"}, Authorization=f"Bearer {ALICE}", X_Request_Id="1")
                if level == logging.DEBUG:
                    upstream = provider.take()
                    upstream.send(error_answer(400, json.dumps(refusal).encode()))
                upstream.read_request()
                upstream.send(STREAM_HEAD.replace(b"\r\n", f"\r\nX-Request-Id: {KEY}\r\n".encode(), 1))
                upstream.event(delta("a secret"))
                upstream.finish()
                assert client.head().status == 200 and client.body() == b"a secret"
            log_entries(caplog, 1)
            steps = [dict(record.msg) for record in caplog.records if record.levelno == logging.DEBUG]
            if level == logging.DEBUG:
                told = steps
            assert "secret" not in caplog.text and ALICE not in caplog.text  # nor the key: see no_key_anywhere
    assert not steps and {entry["id"] for entry in told} == {"1"}
    name = provider.url[7:-3]
    asked = {"peer": name, "method": "POST", "path": "/chat/completions"}
    expected: list[dict[str, Any]] = [
        {"step": "request", "client": "127.0.0.1", "method": "POST", "path": "/"},
        {"step": "let in", "client": "alice"},
        {"step": "dial", "upstream": name, "proxy": None},
        {"step": "connected", "peer": name},
        {"step": "ask", **asked, "warm": False, "adapted": None},
        {"step": "head", "status": 400, "type": None, "upstream_id": None},
        {"step": "failure", "error": "Upstream refused the request with status 400.", "again": True},
        {"step": "ask", **asked, "warm": True, "adapted": ["max_tokens"]},
        {"step": "head", "status": 200, "type": "text/event-stream"},
        {"step": "first text"},
    ]
    assert [entry["step"] for entry in told] == [entry["step"] for entry in expected]
    for entry, known in zip(told, expected):
        assert {name: entry[name] for name in known} == known and list(entry)[:4] == ["time", "level", "id", "step"]
    assert 0 <= told[3]["seconds"] < DEADLINE and told[4]["bytes"] < told[7]["bytes"] < 1000


def test_log_tells_how_a_request_fails_that_began_before_anybody_wanted_to_know(
    server: streamproxy.Server, provider: Provider, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="streamproxy")
    with Client(server).ask(PROMPT, X_Request_Id="1") as client, provider.take() as upstream:
        upstream.start(A)
        assert client.head().status == 200 and client.chunk() == b"a"
        caplog.set_level(logging.DEBUG, logger="streamproxy")
        upstream.send(b"no chunk\r\n")
        log_entries(caplog, 1)
    steps = [(record.msg["id"], record.msg["step"]) for record in caplog.records if record.levelno == logging.DEBUG]
    assert steps == [("1", "failure")]


def test_log_of_health_checks_and_of_none(provider: Provider, caplog: pytest.LogCaptureFixture) -> None:
    for which, paths in {"on": ["/", "/metrics", "/readyz"], "all": [*HEALTH, "/readyz"], "off": []}.items():
        caplog.clear()
        with running(provider, access_log=which, leave_delay=DEADLINE) as server:
            with Client(server) as client:
                for path in HEALTH:
                    client.ask(method="GET", path=path)
                    head = client.head()
                    assert head.status == 200 and client.exactly(int(head.fields["Content-Length"]))
                thread = threading.Thread(target=server.stop)
                thread.start()
                wait_for(lambda: server.draining)
                client.ask(method="GET", path="/readyz")
                assert client.head().status == 503
            server.abort()
            thread.join()
        assert [entry["path"] for entry in log_entries(caplog, len(paths))] == paths


HEALTH = ["/healthz", "/", "/readyz", "/metrics"]


# 19 to 21 ------------------------------------------------------------- Addresses, connections, upstream

SLOW: dict[str, Any] = {"connect_timeout": 0.1}


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What names lead to: a list of sockets or (family, address), an exception, or what is called for it."""
    table: dict[str, Any] = {}
    real = socket.getaddrinfo

    def look_up(host: str, port: int, *options: Any) -> list[Any]:
        found = table.get(host)
        found = found() if callable(found) else found
        if isinstance(found, Exception):
            raise found
        if found is None:
            return real(host, port, *options)
        return [(family, socket.SOCK_STREAM, 6, "", address) for family, address in map(place_of, found)]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return table


def place_of(peer: Any) -> tuple[int, Any]:
    return peer if isinstance(peer, tuple) else (peer.family, peer.getsockname())


@pytest.fixture
def no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamproxy, "DIAL_GRACE", 0.0)


def dial_settings(upstream: str = "http://api.example/v1", **values: Any) -> streamproxy.Settings:
    return streamproxy.Settings(**{"upstream": upstream, "api_key": KEY, **values})


class Listener:
    """A peer that listens; with a certificate, it speaks TLS."""

    def __init__(self, family: int = socket.AF_INET, certificate: Path | None = None) -> None:
        self.sock = socket.create_server(("127.0.0.1" if family == socket.AF_INET else "::1", 0), family=family)
        self.sock.settimeout(DEADLINE)
        self.port = self.sock.getsockname()[1]
        self.family, self.getsockname = family, self.sock.getsockname
        self.context = tls_server(certificate) if certificate else None

    def accept(self) -> socket.socket:
        sock = self.sock.accept()[0]
        sock.settimeout(DEADLINE)
        return self.context.wrap_socket(sock, server_side=True) if self.context else sock

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()


def tls_server(certificate: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(str(certificate))
    context.set_alpn_protocols(["h2", "http/1.1"])
    return context


@pytest.fixture
def listener() -> Iterator[Listener]:
    with Listener() as listener:
        yield listener


@contextlib.contextmanager
def silent_address() -> Iterator[tuple[int, Any]]:
    """One that no packet comes back from: a listener whose queue is full."""
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(full.getsockname())
        yield place_of(full)


class WatchedLifeline(streamproxy.Lifeline):
    """It tells when something that it can cut is waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.holds = threading.Event()

    def hold(self, *waited: Any) -> None:
        super().hold(*waited)
        self.holds.set()


class Dialing:
    """A dial in a thread of its own."""

    def __init__(self, upstream: streamproxy.Upstream) -> None:
        self.lifeline = WatchedLifeline()
        self._upstream = upstream
        self._result: Any = None
        self.thread = threading.Thread(target=self._run, name="dial", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self._result = self._upstream.dial(self.lifeline)
        except Exception as error:  # noqa: BLE001
            self._result = error

    def outcome(self) -> Any:
        """The connection, or the exception."""
        self.thread.join(DEADLINE)
        assert not self.thread.is_alive()
        result, self._result = self._result, None
        return result

    def result(self) -> Any:
        result = self.outcome()
        if isinstance(result, Exception):
            raise result
        return result

    def error(self) -> tuple[int, str]:
        failure = self.outcome()
        assert isinstance(failure, streamproxy.UpstreamError)
        return failure.status, failure.message.replace("Upstream cannot be reached: ", "~ ")


def dial_failure(upstream: streamproxy.Upstream) -> tuple[int, str]:
    return Dialing(upstream).error()


def is_ready(sock: socket.socket, timeout: float = DEADLINE) -> bool:
    return bool(select.select([sock], [], [], timeout)[0])


def read_next(connection: streamproxy.Connection) -> bytes:
    """What comes next: a selector is asked before each read, as the loop does."""
    while is_ready(connection.sock):
        data = connection.read()
        if data is not None:
            return data
    raise AssertionError("nothing came")


def head_from(sock: socket.socket) -> str:
    data = b""
    while not data.endswith(b"\r\n\r\n"):
        byte = sock.recv(1)
        assert byte, f"ended within a head: {data!r}"
        data += byte
    return data.decode("latin-1")


CALL = streamproxy.Call("/chat/completions", b"{}", {"Accept": "*/*"})


def connects(upstream: streamproxy.Upstream, listener: Listener) -> bool:
    connection = Dialing(upstream).result()
    with listener.accept() as peer, contextlib.closing(connection):
        assert connection.read() is None and connection.write(b"ping") and peer.recv(10) == b"ping"
        peer.sendall(b"pong")
        return read_next(connection) == b"pong"


class SlowName:
    """A look-up that ends when it is told to."""

    def __init__(self, result: Any) -> None:
        self.result, self.calls, self.go = result, 0, threading.Event()
        self.threads: set[threading.Thread] = set()

    def __call__(self) -> Any:
        self.calls += 1
        self.threads.add(threading.current_thread())
        assert self.go.wait(DEADLINE)
        return self.result


@pytest.fixture(params=["TLSv1_2", "TLSv1_3"])
def tls_version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class TlsUpstream:
    """A TLS upstream, and connections to it, both ends."""

    def __init__(self, certificate: Path, tls_version: str = "") -> None:
        self.listener = Listener(certificate=certificate)
        if tls_version:
            self.context.maximum_version = self.context.minimum_version = getattr(ssl.TLSVersion, tls_version)
        self.upstream = streamproxy.Upstream(
            dial_settings(f"https://127.0.0.1:{self.listener.port}/v1", ca_file=str(certificate))
        )

    @property
    def context(self) -> ssl.SSLContext:
        assert self.listener.context
        return self.listener.context

    def open(self) -> tuple[Any, Any]:
        dialing = Dialing(self.upstream)
        peer = self.listener.accept()
        return dialing.result(), peer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.listener.sock.close()


CONNECTED = b"HTTP/1.1 200 Connection established\r\n\r\n"


class TlsThrough:
    """TLS through a socket that may be one of TLS."""

    def __init__(self, sock: Any, context: ssl.SSLContext) -> None:
        self.sock = sock
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_side=True)
        self._do(self.tls.do_handshake)

    def _do(self, act: Any, *arguments: Any) -> Any:
        while True:
            try:
                result = act(*arguments)
                self.sock.sendall(self.outgoing.read())
                return result
            except ssl.SSLWantReadError:
                self.sock.sendall(self.outgoing.read())
                self.incoming.write(self.sock.recv(65536))

    def recv(self, size: int) -> bytes:
        return bytes(self._do(self.tls.read, size))

    def sendall(self, data: bytes) -> None:
        self._do(self.tls.write, data)


# ---------------------------------------------------------------- calls and targets

CALL_FIELDS = f"Host: api.example\r\nAccept-Encoding: identity\r\nAuthorization: Bearer {KEY}\r\n"


@pytest.mark.parametrize(("upstream", "call", "line"), [
    ("http://api.example/v1", CALL, "POST /v1/chat/completions"),
    ("http://api.example/v1/", CALL, "POST /v1/chat/completions"),
    ("http://api.example", CALL, "POST /chat/completions"),
    ("http://api.example/v1?a=b", CALL, "POST /v1/chat/completions?a=b"),
    ("http://api.example/v1?a=b", streamproxy.Call("/m", b"", {}, "GET", "c=d"), "GET /v1/m?a=b&c=d"),
    ("http://api.example/v1", streamproxy.Call("/m", b"", {}, "GET", "c=d"), "GET /v1/m?c=d"),
    ("http://api.example/v1", streamproxy.Call("/r/1/cancel", b""), "POST /v1/r/1/cancel"),
    ("http://api.example/v1", streamproxy.Call("/r/1", b"", {}, "DELETE"), "DELETE /v1/r/1"),
])
def test_request_of_a_call(upstream: str, call: streamproxy.Call, line: str) -> None:
    fields = "".join(f"{name}: {value}\r\n" for name, value in call.fields.items())
    length = f"Content-Length: {len(call.body)}\r\n" if call.method == "POST" else ""
    wanted = f"{line} HTTP/1.1\r\n{CALL_FIELDS}{fields}{length}\r\n".encode() + call.body
    assert streamproxy.Target(dial_settings(upstream)).encode_head(call) + call.body == wanted


def test_request_with_a_key_of_its_own_field_or_none() -> None:
    template = dial_settings(auth_header="api-key: {key}")
    assert b"\r\napi-key: " + KEY.encode() + b"\r\n" in streamproxy.Target(template).encode_head(CALL)
    without = streamproxy.Target(dial_settings("http://[::1]:8080/v1", api_key="")).encode_head(CALL) + CALL.body
    assert b"\r\nHost: [::1]:8080\r\nAccept-Encoding: identity\r\nAccept: */*\r\nContent-Length: 2\r\n\r\n{}" in without


@pytest.mark.parametrize(("upstream", "proxy", "line", "fields"), [
    ("http://api.example/v1", "http://p:1", "POST http://api.example/v1/chat/completions HTTP/1.1", ""),
    ("http://api.example:81/v1", "https://u:w@p", "POST http://api.example:81/v1/chat/completions HTTP/1.1", "dTp3"),
    ("https://api.example/v1", "http://u:w@p", "POST /v1/chat/completions HTTP/1.1", ""),
])
def test_request_through_a_proxy(upstream: str, proxy: str, line: str, fields: str) -> None:
    asked = streamproxy.Target(dial_settings(upstream), streamproxy.Proxy(proxy)).encode_head(CALL).decode() + "{}"
    shown = asked.partition("Proxy-Authorization: Basic ")[2]
    assert asked.startswith(f"{line}\r\n") and shown[: len(fields)] == fields
    assert fields or "roxy-" not in asked


@pytest.mark.parametrize("call", [
    streamproxy.Call("/a\r\nb", b""),
    streamproxy.Call("/a b", b""),
    streamproxy.Call("/a", b"", query="x\ny"),
    streamproxy.Call("/a", b"", query="x y"),
    streamproxy.Call("/a", b"", query="ł"),
    streamproxy.Call("/a", b"", {"A": "b\r\nC: d"}),
    streamproxy.Call("/a", b"", {"A": "b\0"}),
    streamproxy.Call("/a", b"", {"A": "ł"}),
])
def test_request_that_would_forge_a_line_is_not_encoded(call: streamproxy.Call) -> None:
    with pytest.raises(ValueError, match="bad value|latin-1"):
        streamproxy.Target(dial_settings()).encode_head(call)


def test_targets_that_share_no_connection_differ_in_their_keys() -> None:
    urls = ("http://a/v1", "http://b/v1", "https://a/v1", "http://a:81/v1")
    proxies = (None, streamproxy.Proxy("http://p"), streamproxy.Proxy("https://p"), streamproxy.Proxy("q"))
    keys = [streamproxy.Target(dial_settings(url), proxy).key for url in urls for proxy in proxies]
    assert len(set(keys)) == 16 and streamproxy.Target(dial_settings("http://a:80/v2"), None).key == keys[0]


# ---------------------------------------------------------------- proxies of the environment


@pytest.mark.parametrize(("text", "scheme", "address", "user"), [
    ("http://proxy:8080", "http", "proxy:8080", ""),
    ("http://proxy:8080/", "http", "proxy:8080", ""),
    ("proxy:8080", "http", "proxy:8080", ""),
    ("proxy", "http", "proxy:80", ""),
    ("HTTPS://proxy", "https", "proxy:443", ""),
    ("https://proxy:8443/", "https", "proxy:8443", ""),
    ("http://[fd00::1]:8080", "http", "[fd00::1]:8080", ""),
    ("[::1]:3128", "http", "[::1]:3128", ""),
    ("user:secret@proxy:1/", "http", "proxy:1", "user:secret"),
    ("http://us%40er:p%3Aa%2Fs%20s@proxy", "http", "proxy:80", "us@er:p:a/s s"),
    ("http://user@proxy", "http", "proxy:80", "user:"),
    ("http://us@er:pass@proxy", "http", "proxy:80", "us@er:pass"),
    ("http://%C3%BC:%C3%9F@proxy", "http", "proxy:80", "ü:ß"),
])
def test_proxy_as_curl_reads_it(text: str, scheme: str, address: str, user: str) -> None:
    proxy = streamproxy.Proxy(text)
    shown = base64.b64decode(proxy.fields.get("Proxy-Authorization", "")[len("Basic ") :]).decode()
    assert (proxy.scheme, proxy.address, shown) == (scheme, address, user) and "secret" not in repr(proxy)


P, S = "http://p", "https://s"


@pytest.mark.parametrize(("url", "proxies", "found"), [
    ("http://api.example/v1", {}, None),
    ("http://api.example/v1", {"http": P, "https": S}, "p:80"),
    ("https://api.example/v1", {"http": P, "https": S}, "s:443"),
    ("https://api.example/v1", {"http": P}, None),
    ("https://api.example/v1", {"http": P, "all": S}, "s:443"),
    ("https://api.example/v1", {"https": P, "all": S}, "p:80"),
    ("https://api.example/v1", {"ftp": P}, None),
    ("http://127.0.0.1:11434/v1", {"http": P, "all": S}, None),
    ("http://127.8.0.1/v1", {"http": P}, None),
    ("http://[::1]:8000/v1", {"http": P}, None),
    ("https://localhost/v1", {"https": P}, None),
    ("http://LOCALHOST/v1", {"http": P}, None),
    ("http://localhost/v1", {"http": "socks5://p"}, None),
    ("http://api.example/v1", {"https": "socks5://p"}, None),
    ("http://api.example/v1", {"http": "socks5://p", "no": "example"}, None),
])
def test_proxy_for_an_upstream(url: str, proxies: dict[str, str], found: str | None) -> None:
    proxy = streamproxy.find_proxy(url, proxies)
    assert (proxy and proxy.address) == found


@pytest.mark.parametrize(("url", "rules", "bypassed"), [
    ("http://api.example/v1", "*", True),
    ("http://api.example/v1", "other, *", True),
    ("http://api.example/v1", "", False),
    ("http://api.example/v1", " , ,", False),
    ("http://api.example/v1", "api.example", True),
    ("http://api.example/v1", "other,API.Example", True),
    ("http://api.example/v1", "other api.example", True),
    ("http://API.example/v1", "api.example.", True),
    ("http://api.example./v1", "api.example", True),
    ("http://api.example/v1", ".example", True),
    ("http://api.example/v1", "*.example", True),
    ("http://api.example/v1", "example", True),
    ("http://api.example/v1", "i.example", False),
    ("http://api.example/v1", ".api.example", True),
    ("http://api.example/v1", "api.example.com", False),
    ("http://api.example/v1", "api.example:80", True),
    ("http://api.example/v1", "api.example:443", False),
    ("https://api.example/v1", "api.example:443", True),
    ("http://api.example:81/v1", ".example:81", True),
    ("http://api.example:81/v1", "*:81", True),
    ("http://10.1.2.3/v1", "10.1.2.3", True),
    ("http://10.1.2.3/v1", "10.0.0.0/8", True),
    ("http://10.1.2.3:81/v1", "10.1.0.0/8", True),
    ("http://10.1.2.3/v1", "10.0.0.0/16", False),
    ("http://10.1.2.3/v1", "10.1.2.3:80", True),
    ("http://10.1.2.3/v1", "10.1.2.3:81", False),
    ("http://10.1.2.3/v1", "2.3", False),
    ("http://10.1.2.3/v1", "fd00::/8", False),
    ("http://[fd00::5]/v1", "fd00::/8", True),
    ("http://[fd00::5]/v1", "[fd00::5]", True),
    ("http://[fd00::5]/v1", "fd00:0:0::5", True),
    ("http://[fd00::5]:81/v1", "[fd00::5]:81", True),
    ("http://[fd00::5]:81/v1", "[fd00::5]:82", False),
    ("http://[fd00::5]/v1", "::1,10.0.0.0/8", False),
    ("http://api.example/v1", "10.0.0.0/8,::1,0.0.0.0/0", False),
])
def test_proxy_that_no_proxy_rules_out(environment: Callable[..., None], url: str, rules: str, bypassed: bool) -> None:
    assert (streamproxy.find_proxy(url, {"http": P, "https": P, "no": rules}) is None) == bypassed


@pytest.mark.parametrize(("variables", "url", "found"), [
    ({"http_proxy": "p"}, "http://api.example/v1", "p:80"),
    ({"HTTP_PROXY": "p"}, "http://api.example/v1", "p:80"),
    ({"HTTP_PROXY": "p", "REQUEST_METHOD": "GET"}, "http://api.example/v1", None),
    ({"http_proxy": "p", "HTTP_PROXY": "q"}, "http://api.example/v1", "p:80"),
    ({"https_proxy": "", "HTTPS_PROXY": "q"}, "https://api.example/v1", None),
    ({"HTTPS_PROXY": "q"}, "https://api.example/v1", "q:80"),
    ({"ALL_PROXY": "q"}, "https://api.example/v1", "q:80"),
    ({"all_proxy": "p", "ALL_PROXY": "q"}, "http://api.example/v1", "p:80"),
    ({"HTTPS_PROXY": "p", "all_proxy": "q", "NO_PROXY": "10.0.0.0/8"}, "https://10.2.3.4/v1", None),
    ({"HTTPS_PROXY": "p", "no_proxy": "other", "NO_PROXY": "api.example"}, "https://api.example/v1", "p:80"),
])
def test_proxy_variables(
    environment: Callable[..., None], variables: dict[str, str], url: str, found: str | None
) -> None:
    environment(**variables)
    proxy = streamproxy.Upstream(dial_settings(url)).target.proxy
    assert (proxy and proxy.address) == found


@pytest.mark.parametrize(("variable", "value", "shown"), [
    ("HTTPS_PROXY", "socks5://user:secret@p:1080", "a proxy of socks5://"),
    ("https_proxy", "SOCKS5H://p:1080", "a proxy of socks5h://"),
    ("ALL_PROXY", "socks4a://p", "a proxy of socks4a://"),
    ("HTTPS_PROXY", "ftp://p", "a proxy of ftp://"),
    ("HTTPS_PROXY", "user:secret@p:port", "this value"),
    ("HTTPS_PROXY", "user:se://cret@p", "this value"),
    ("HTTPS_PROXY", "http://user:sec/ret@p", "a proxy of http://"),
    ("HTTPS_PROXY", "http://p:99999", "a proxy of http://"),
    ("HTTPS_PROXY", "http://", "a proxy of http://"),
    ("HTTPS_PROXY", "http://[::1", "a proxy of http://"),
])
def test_proxy_that_cannot_be_used_is_refused(
    environment: Callable[..., None], variable: str, value: str, shown: str
) -> None:
    environment(**{variable: value})
    with pytest.raises(streamproxy.SettingsError) as caught:
        streamproxy.Upstream(dial_settings("https://api.example/v1"))
    allowed = "is not allowed; allowed: http:// or https://, and NO_PROXY for what needs none"
    assert str(caught.value) == f"{variable.upper()}: {shown} {allowed}"


def test_certificates_that_cannot_be_read_are_refused_where_they_are_needed(
    environment: Callable[..., None], tmp_path: Path
) -> None:
    missing = str(tmp_path / "none.pem")
    streamproxy.Upstream(dial_settings("http://api.example/v1", ca_file=missing))
    for url, variables in (("https://api.example/v1", {}), ("http://api.example/v1", {"http_proxy": "https://p"})):
        environment(**variables)
        with pytest.raises(streamproxy.SettingsError, match="--ca-file"):
            streamproxy.Upstream(dial_settings(url, ca_file=missing))


# ---------------------------------------------------------------- addresses


@pytest.fixture
def silent() -> Iterator[tuple[int, Any]]:
    with silent_address() as address:
        yield address


NO_FAMILY, NO_WAY = (99, ("127.0.0.1", 1)), (socket.AF_INET, ("255.255.255.255", 9))


def refusing() -> tuple[int, Any]:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        return place_of(gone)


def test_families_take_turns_beginning_with_the_first() -> None:
    rows = [(family, number) for number, family in enumerate((6, 6, 6, 4, 4, 6))]
    assert streamproxy.interleave(rows) == [(6, 0), (4, 3), (6, 1), (4, 4), (6, 2), (6, 5)]
    assert streamproxy.interleave([]) == []


def test_socket_does_not_block_delays_nothing_and_is_kept_known(listener: Listener) -> None:
    connection = Dialing(streamproxy.Upstream(dial_settings(f"http://127.0.0.1:{listener.port}"))).result()
    options = {(socket.IPPROTO_TCP, socket.TCP_NODELAY): 1, (socket.SOL_SOCKET, socket.SO_KEEPALIVE): 1}
    if hasattr(socket, "TCP_KEEPIDLE"):
        options[(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)] = 60
    with contextlib.closing(connection):
        assert {option: connection.sock.getsockopt(*option) for option in options} == options
        assert connection.sock.gettimeout() == 0 and (connection.reused, connection.broken) == (False, False)


def test_silent_first_address_holds_up_the_second_for_a_moment(names: Any, listener: Listener, silent: Any) -> None:
    names["api.example"] = [silent, listener]
    began = time.monotonic()
    assert connects(streamproxy.Upstream(dial_settings()), listener)
    assert time.monotonic() - began >= streamproxy.ATTEMPT_DELAY


@pytest.mark.parametrize("first", ["refuses", "lacks its family", "has no way"])
def test_failing_first_address_holds_up_nothing(
    names: Any, listener: Listener, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    monkeypatch.setattr(streamproxy, "ATTEMPT_DELAY", 1000.0)
    bad = {"refuses": refusing(), "lacks its family": NO_FAMILY, "has no way": NO_WAY}[first]
    names["api.example"] = [bad, bad, listener]
    assert connects(streamproxy.Upstream(dial_settings()), listener)


@pytest.mark.parametrize("second", ["refuses", "lacks its family"])
def test_failing_second_address_holds_up_nothing(
    names: Any, listener: Listener, monkeypatch: pytest.MonkeyPatch, silent: Any, second: str
) -> None:
    monkeypatch.setattr(streamproxy, "ATTEMPT_DELAY", 0.4)
    names["api.example"] = [silent, refusing() if second == "refuses" else NO_FAMILY, listener]
    began = time.monotonic()
    assert connects(streamproxy.Upstream(dial_settings()), listener)
    assert 0.4 <= time.monotonic() - began < 0.8


def test_losers_are_closed(names: Any, listener: Listener, monkeypatch: pytest.MonkeyPatch, silent: Any) -> None:
    monkeypatch.setattr(streamproxy, "ATTEMPT_DELAY", 0.05)
    names["api.example"] = [silent, silent, refusing(), silent, listener, silent]
    before = descriptors_now()
    assert connects(streamproxy.Upstream(dial_settings()), listener)
    assert descriptors_now() == before


@pytest.mark.usefixtures("no_grace")
@pytest.mark.parametrize(("attempts", "status", "reason"), [
    (["family", "refused"], 502, "connection refused"),
    (["refused", "family"], 502, "connection refused"),
    (["silent", "refused"], 502, "connection refused"),
    (["silent"], 504, "it took too long"),
    (["silent", "family", "no way"], 504, "it took too long"),
    (["family", "no way"], 502, "network is unreachable"),
    (["family"], 502, "address family not supported by protocol"),
    ([], 502, "cannot assign requested address"),
])
def test_most_telling_failure_is_told(
    names: Any, silent: Any, monkeypatch: pytest.MonkeyPatch, attempts: list[str], status: int, reason: str
) -> None:
    monkeypatch.setattr(streamproxy, "ATTEMPT_DELAY", 0.01)
    bad = {"refused": refusing(), "silent": silent, "family": NO_FAMILY, "no way": NO_WAY}
    names["api.example"] = [bad[attempt] for attempt in attempts]
    assert dial_failure(streamproxy.Upstream(dial_settings(**SLOW))) == (status, f"~ {reason}.")


def test_lack_of_descriptors_is_told(names: Any, silent: Any) -> None:
    names["api.example"] = [refusing(), silent, refusing()]
    upstream = streamproxy.Upstream(dial_settings(**SLOW))
    first = threading.Thread(target=int)  # as the first thread ends, older C libraries open a file, or abort
    first.start()
    first.join()
    wait_for(lambda: not os.path.exists(f"/proc/self/task/{first.native_id}"))  # it ends a little after join()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        result = dial_failure(upstream)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert result == (502, "~ too many open files.")


def test_descriptors_past_1024(listener: Listener) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, 4096), hard), hard))
    held = [os.open(os.devnull, os.O_RDONLY)]
    try:
        while held[-1] < 1100:
            held.append(os.dup(held[0]))
        connection = Dialing(streamproxy.Upstream(dial_settings(f"http://127.0.0.1:{listener.port}"))).result()
        assert connection.sock.fileno() > 1024
        connection.close()
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# ---------------------------------------------------------------- names


def look_ups() -> int:
    return sum(thread.name == "look-up" for thread in threading.enumerate())


def test_dials_of_a_name_wait_for_one_look_up(names: Any, listener: Listener) -> None:
    name = names["api.example"] = SlowName([listener])
    upstream = streamproxy.Upstream(dial_settings())
    dialings = [Dialing(upstream) for _ in range(8)]
    for dialing in dialings:
        assert dialing.lifeline.holds.wait(DEADLINE)
    assert look_ups() == 1
    name.go.set()
    for dialing in dialings:
        dialing.result().close()
    assert name.calls == 1
    Dialing(upstream).result().close()
    assert name.calls == 2  # what was found is not kept
    wait_for(lambda: not look_ups())


@pytest.mark.parametrize(("result", "reason"), [
    (socket.gaierror(socket.EAI_NONAME, "no"), "its name was not found"),
    (UnicodeEncodeError("idna", "x", 0, 1, "label too long"), "its name was not found"),
    (OSError(errno.EMFILE, "no"), "too many open files"),
    (MemoryError(), "it failed"),
])
def test_look_up_that_fails_is_told_to_each(names: Any, result: Exception, reason: str) -> None:
    name = names["api.example"] = SlowName(result)
    upstream = streamproxy.Upstream(dial_settings())
    dialings = [Dialing(upstream) for _ in range(3)]
    for dialing in dialings:
        assert dialing.lifeline.holds.wait(DEADLINE)
    name.go.set()
    if isinstance(result, MemoryError):
        for dialing in dialings:
            with pytest.raises(MemoryError):
                dialing.result()
        return
    assert [dialing.error() for dialing in dialings] == [(502, f"~ {reason}.")] * 3


def test_name_that_no_name_server_can_be_asked_for() -> None:
    assert dial_failure(streamproxy.Upstream(dial_settings("http://a..b/v1")))[0] == 502
    assert dial_failure(streamproxy.Upstream(dial_settings(f"http://{'a' * 64}.example/v1")))[0] == 502


@pytest.mark.usefixtures("no_grace")
def test_look_up_that_hangs_holds_one_thread_and_nobody(names: Any, listener: Listener) -> None:
    name = names["api.example"] = SlowName([listener])
    upstream = streamproxy.Upstream(dial_settings(**SLOW))
    gc.collect()  # what earlier tests left
    before, held = threading.active_count(), queues()
    for _ in range(2):
        dialings = [Dialing(upstream) for _ in range(8)]
        assert [dialing.error() for dialing in dialings] == [(504, "~ it took too long.")] * 8
    assert threading.active_count() == before + 1 and name.calls == 1
    if sys.implementation.name == "cpython":
        assert queues() <= held
    late = Dialing(upstream)
    assert late.lifeline.holds.wait(DEADLINE)
    name.go.set()
    late.result().close()
    assert name.calls == 1
    wait_for(lambda: threading.active_count() == before)


def test_no_look_up_is_begun_for_a_dial_that_was_cut_before_a_thread_had_it(names: Any, listener: Listener) -> None:
    name = names["api.example"] = SlowName([listener])
    lifeline = streamproxy.Lifeline()
    lifeline.cut()
    with pytest.raises(streamproxy.UpstreamError):
        streamproxy.Upstream(dial_settings()).dial(lifeline)
    assert not (name.calls or look_ups())


def queues() -> int:
    return sum(isinstance(found, queue.SimpleQueue) for found in gc.get_objects())


def test_other_names_do_not_wait_for_one_that_hangs(
    names: Any, listener: Listener, environment: Callable[..., None]
) -> None:
    name = names["api.example"] = SlowName([listener])
    resolver, deadline = streamproxy.Resolver(), streamproxy.Deadline(streamproxy.Lifeline(), DEADLINE)
    thread = threading.Thread(target=resolver.find, args=("api.example", 80, deadline), daemon=True)
    thread.start()
    wait_for(lambda: name.calls)
    names["other.example"] = [listener]
    assert resolver.find("other.example", 80, deadline)[0][4] == listener.getsockname()
    name.go.set()
    thread.join(DEADLINE)


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_address_is_not_looked_up(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    calls = []
    real = socket.getaddrinfo

    def look_up(*asked: Any) -> Any:
        calls.append((threading.current_thread(), asked[-1]))
        return real(*asked)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    with Listener(socket.AF_INET if "." in host else socket.AF_INET6) as listener:
        dialing = Dialing(streamproxy.Upstream(dial_settings(f"http://{host}:{listener.port}/v1")))
        dialing.result().close()
    assert calls == [(dialing.thread, socket.AI_NUMERICHOST)]


def test_name_is_looked_up_where_no_thread_is_left(
    names: Any, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    names["api.example"] = [listener]
    dialed = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if thread.name == "look-up":
            raise RuntimeError("can't start new thread")
        dialed(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    assert connects(streamproxy.Upstream(dial_settings()), listener)


# ---------------------------------------------------------------- TLS


def read_all(connection: streamproxy.Connection) -> bytes:
    return b"".join(iter(lambda: read_next(connection), b""))


@pytest.fixture
def tls_pair(certificate: Path, tls_version: str) -> Iterator[tuple[Any, Any]]:
    with TlsUpstream(certificate, tls_version) as secure:
        connection, peer = secure.open()
        with contextlib.closing(connection), peer:
            yield connection, peer


def test_tls_speaks_http_1_names_the_host_and_takes_both_ways(certificate: Path, names: Any) -> None:
    with Listener(certificate=certificate) as listener:
        names["api.example"] = [listener]
        shown = []
        assert listener.context
        listener.context.sni_callback = lambda _sock, name, _context: shown.append(name)
        upstream = streamproxy.Upstream(dial_settings("https://api.example/v1", ca_file=str(certificate)))
        dialing = Dialing(upstream)
        with listener.accept() as peer, contextlib.closing(dialing.result()) as connection:
            assert isinstance(peer, ssl.SSLSocket)
            assert peer.selected_alpn_protocol() == "http/1.1" and shown == ["api.example"] and not peer.session_reused
            assert connection.read() is None and connection.write(b"ping") and peer.recv(10) == b"ping"
            peer.sendall(b"pong")
            assert read_next(connection) == b"pong"


@pytest.mark.parametrize("fault", ["nobody vouches for it", "it is another's", "it names no address"])
def test_dial_verifies_the_certificate(certificate: Path, tmp_path: Path, fault: str) -> None:
    subject = {"it is another's": "DNS:elsewhere.example", "it names no address": "DNS:localhost"}.get(fault)
    shown = make_certificate(tmp_path, subject) if subject else certificate
    with Listener(certificate=shown) as listener:
        upstream = streamproxy.Upstream(
            dial_settings(f"https://127.0.0.1:{listener.port}", ca_file=str(shown) if subject else "")
        )
        dialing = Dialing(upstream)
        with pytest.raises(ssl.SSLError, match="(?i)alert"):
            listener.accept().recv(1)
        assert dialing.error() == (502, "~ its certificate is not trusted.")


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"", b"\x15\x03\x01\x00\x02\x02\x28"])
def test_tls_that_upstream_does_not_speak(listener: Listener, answer: bytes) -> None:
    dialing = Dialing(streamproxy.Upstream(dial_settings(f"https://127.0.0.1:{listener.port}")))
    with listener.accept() as peer:
        assert peer.recv(1) == b"\x16"
        peer.sendall(answer)
        peer.shutdown(socket.SHUT_WR)
        assert dialing.error() == (502, "~ the TLS handshake failed.")


@contextlib.contextmanager
def between(certificate: Path, tls_version: str, **values: Any) -> Iterator[tuple[Any, Any, socket.socket]]:
    """A connection; upstream's side of TLS, whose bytes are given on by hand; and the socket to give them to."""
    with Listener() as listener:
        url = f"https://127.0.0.1:{listener.port}/v1"
        dialing = Dialing(streamproxy.Upstream(dial_settings(url, ca_file=str(certificate), **values)))
        sock = listener.accept()
        context = tls_server(certificate)
        context.maximum_version = context.minimum_version = getattr(ssl.TLSVersion, tls_version)
        tls = TlsInMemory(context, sock)
        with contextlib.closing(dialing.result()) as connection, sock:
            yield connection, tls, sock


@pytest.mark.parametrize("stage", ["tunnel", "handshake"])
def test_reset_while_it_is_opened_is_told(listener: Listener, environment: Callable[..., None], stage: str) -> None:
    if stage == "tunnel":
        environment(https_proxy=f"127.0.0.1:{listener.port}")
    url = "https://api.example/v1" if stage == "tunnel" else f"https://127.0.0.1:{listener.port}"
    dialing = Dialing(streamproxy.Upstream(dial_settings(url)))
    with listener.accept() as peer:
        assert peer.recv(1)
        reset(peer)
    assert dialing.error() == (502, "~ connection reset by peer.")


class TlsInMemory:
    """A TLS server in memory."""

    def __init__(self, context: ssl.SSLContext, sock: Any) -> None:
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_side=True)
        while True:
            try:
                self.tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                sock.sendall(self.outgoing.read())
                self.incoming.write(sock.recv(65536))
        self.tickets = b""
        if self.tls.version() == "TLSv1.3":
            self.tickets = self.outgoing.read()
        sock.sendall(self.outgoing.read())

    def records(self, *texts: bytes) -> bytes:
        for text in texts:
            self.tls.write(text)
        return self.outgoing.read()

    def closure(self) -> bytes:
        with contextlib.suppress(ssl.SSLError):
            self.tls.unwrap()
        return self.outgoing.read()


@pytest.mark.parametrize("size", [1, 2, 5, 29, 1000, 20000, 10**6])
def test_tls_records_however_they_are_cut(certificate: Path, tls_version: str, size: int) -> None:
    sizes = (1, 10, 200, 3000, 16384 if size > 100 else 20, 1)
    texts = [bytes([65 + number]) * length for number, length in enumerate(sizes)]
    with between(certificate, tls_version) as (connection, tls, sock):
        data, got = tls.tickets + tls.records(*texts) + tls.closure(), []
        for at in range(0, len(data), size):
            sock.sendall(data[at : at + size])
            if size < 100:
                assert is_ready(connection.sock)
                got.append(connection.read())
        while b"" not in got:
            got.append(read_next(connection))
        assert b"".join(filter(None, got)) == b"".join(texts) and got[-1] == b"" and not connection.broken


def test_tls_tickets_alone_are_nothing_to_read(certificate: Path) -> None:
    with between(certificate, "TLSv1_3") as (connection, tls, sock):
        sock.sendall(tls.tickets)
        assert is_ready(connection.sock) and connection.read() is None
        assert not is_ready(connection.sock, 0) and connection.read() is None
        sock.sendall(tls.records(b"a"))
        assert read_next(connection) == b"a"


@pytest.mark.parametrize(("end", "broken"), [
    ("closure", False), ("closure and end", False), ("end", True), ("cut", True), ("garbage", True), ("reset", True),
])
@pytest.mark.parametrize("before", [b"", b"text"])
@pytest.mark.parametrize("ignoring", [False, True])
def test_tls_end_is_told_from_a_cut(
    certificate: Path, tls_version: str, monkeypatch: pytest.MonkeyPatch, end: str, broken: bool, before: bytes,
    ignoring: bool,
) -> None:
    if ignoring:
        ignore_unexpected_end(certificate, monkeypatch)
    with between(certificate, tls_version) as (connection, tls, sock):
        data = tls.tickets + (tls.records(before) if before else b"")
        data += tls.closure() if "closure" in end else b""
        data += tls.records(b"x" * 100)[:50] if end == "cut" else b""
        data += b"HTTP/1.1 400 Bad Request\r\n\r\n" if end == "garbage" else b""
        sock.sendall(data)
        if end in ("closure and end", "end", "cut"):
            sock.shutdown(socket.SHUT_WR)
        elif end == "reset":
            if before:
                assert read_next(connection) == before
            reset(sock)
            before = b""
        assert read_all(connection) == before and connection.broken == broken
        if end == "garbage":
            assert sock.recv(1) == (b"\x15" if tls_version == "TLSv1_2" else b"\x17")  # an alert
        assert read_next(connection) == b""  # and stays so


def ignore_unexpected_end(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As some versions of Python do of themselves."""
    if not hasattr(ssl, "OP_IGNORE_UNEXPECTED_EOF"):
        pytest.skip("OpenSSL knows no such option")
    context = ssl.create_default_context(cafile=str(certificate))
    context.options |= ssl.OP_IGNORE_UNEXPECTED_EOF
    monkeypatch.setattr(ssl, "create_default_context", lambda **_: context)


def test_tls_closure_behind_text_is_seen_by_a_selector(certificate: Path, tls_version: str) -> None:
    with between(certificate, tls_version) as (connection, tls, sock):
        sock.sendall(tls.tickets + tls.records(b"a", b"b") + tls.closure() + b"what follows does not count")
        assert read_next(connection) == b"ab" and is_ready(connection.sock, 0)
        assert connection.read() == b"" and not connection.broken


def has_arrived(connection: Any, size: int) -> None:
    """Wait until size bytes can be read from the socket."""
    wait_for(lambda: is_ready(connection.sock) and len(connection.sock.recv(1 << 20, socket.MSG_PEEK)) >= size)


def test_tls_one_read_takes_all_that_came(tls_pair: Any) -> None:
    connection, peer = tls_pair
    peer.sendall(b"x" * 40_000)
    peer.sendall(b"y")
    has_arrived(connection, 40_002)
    got = connection.read()
    while len(got) < 40_001:  # the last record came after the look
        got += read_next(connection)
    assert got == b"x" * 40_000 + b"y" and connection.read() is None


def test_tls_one_read_takes_no_more_than_it_may(certificate: Path, tls_version: str) -> None:
    with between(certificate, tls_version) as (connection, tls, sock):
        data = tls.tickets + tls.records(b"x" * 16384)
        sock.sendall(data[:-1])
        has_arrived(connection, len(data) - 1)
        assert connection.read() is None
        rest = data[-1:] + tls.records(*[b"y" * 10_000] * 6)
        sock.sendall(rest)
        has_arrived(connection, len(rest))
        got = connection.read()
        assert 40_000 < len(got) <= streamproxy.READ_SIZE
        while len(got) < 76_384:
            got += read_next(connection)
        assert connection.read() is None


def test_tls_what_came_with_the_handshake_is_not_lost(certificate: Path) -> None:
    with Listener() as listener:
        dialing = Dialing(
            streamproxy.Upstream(dial_settings(f"https://127.0.0.1:{listener.port}/v1", ca_file=str(certificate)))
        )
        sock = listener.accept()
        context = tls_server(certificate)
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = context.wrap_bio(incoming, outgoing, server_side=True)
        for _ in range(2):
            with contextlib.suppress(ssl.SSLWantReadError):
                tls.do_handshake()
                break
            sock.sendall(outgoing.read())
            incoming.write(sock.recv(65536))
        tls.do_handshake()
        tls.write(b"early")
        sock.sendall(outgoing.read())
        with contextlib.closing(dialing.result()) as connection, sock:
            assert (connection.read() or read_next(connection)) == b"early"


def test_tls_update_of_keys_is_answered(certificate: Path, tmp_path: Path) -> None:
    port = free_port()
    command = [program("openssl"), *f"s_server -tls1_3 -accept {port} -cert {certificate} -key {certificate}".split()]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as server:
        assert server.stdin and server.stdout
        try:
            while b"ACCEPT" not in server.stdout.readline():
                pass
            connection = Dialing(
                streamproxy.Upstream(dial_settings(f"https://127.0.0.1:{port}", ca_file=str(certificate)))
            ).result()
            for text in (b"one\n", b"K\n", b"two\n", b"K\n", b"three\n"):  # K: an update, with a request to do likewise
                server.stdin.write(text)
                server.stdin.flush()
                if text == b"K\n":
                    assert is_ready(connection.sock) and connection.read() is None
                    continue
                assert read_next(connection) == text
                assert connection.write(b"answer to " + text)
                while b"answer to " + text not in server.stdout.readline():
                    pass
            connection.close()
        finally:
            server.kill()


def test_tls_sessions_are_resumed(certificate: Path, tls_version: str) -> None:
    with TlsUpstream(certificate, tls_version) as secure:
        reused = []
        for _ in range(3):
            connection, peer = secure.open()
            reused.append(peer.session_reused)
            peer.sendall(b"a")
            assert read_next(connection) == b"a"
            connection.close()
            peer.close()
        assert reused == [False, True, True]


@pytest.fixture
def copied_sessions(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Sessions that were asked for, each of which is a copy."""
    copied: list[Any] = []
    real: Any = ssl.SSLObject.session

    def copy(tls: ssl.SSLObject) -> Any:
        copied.append(real.fget(tls))
        return copied[-1]

    monkeypatch.setattr(ssl.SSLObject, "session", property(copy))
    return copied


def test_tls_one_session_is_kept_of_many(certificate: Path, tls_version: str, copied_sessions: list[Any]) -> None:
    with TlsUpstream(certificate, tls_version) as secure:
        pairs = [secure.open() for _ in range(3)]
        for is_reused in (False, True):
            for connection, peer in pairs:
                assert peer.session_reused == is_reused
                peer.sendall(b"a")
                assert read_next(connection) == b"a"
                connection.close()
                peer.close()
            pairs = [secure.open() for _ in range(3)]
        for connection, peer in pairs:
            connection.close()
            peer.close()
        assert len(copied_sessions) == 1


def test_tls_without_tickets_is_asked_once_for_a_session(certificate: Path, copied_sessions: list[Any]) -> None:
    with TlsUpstream(certificate, "TLSv1_3") as secure:
        secure.context.num_tickets = 0
        for _ in range(3):
            connection, peer = secure.open()
            peer.sendall(b"a")
            assert read_next(connection) == b"a" and not peer.session_reused
            connection.close()
            peer.close()
        assert len(copied_sessions) == 1


def test_tls_session_that_upstream_has_forgotten_costs_only_a_handshake(
    certificate: Path, tls_version: str, copied_sessions: list[Any]
) -> None:
    with TlsUpstream(certificate, tls_version) as secure:
        for is_reused in (False, True, False, True):
            pairs = [secure.open() for _ in range(2)]
            for connection, peer in pairs:
                assert peer.session_reused == is_reused
                peer.sendall(b"a")
                assert read_next(connection) == b"a"
                connection.close()
                peer.close()
            if is_reused:
                secure.listener.context = tls_server(certificate)
        assert len(copied_sessions) == 2


def test_tls_close_says_so(tls_pair: Any) -> None:
    connection, peer = tls_pair
    peer.suppress_ragged_eofs = False
    connection.close()
    assert peer.recv(10) == b""


# ---------------------------------------------------------------- sending


@pytest.fixture(params=["plain", "TLSv1_2", "TLSv1_3"])
def both_ends(request: pytest.FixtureRequest, listener: Listener) -> Iterator[tuple[Any, Any]]:
    with contextlib.ExitStack() as stack:
        if request.param == "plain":
            connection = Dialing(streamproxy.Upstream(dial_settings(f"http://127.0.0.1:{listener.port}"))).result()
            peer = listener.accept()
        else:
            secure = stack.enter_context(TlsUpstream(request.getfixturevalue("certificate"), request.param))
            connection, peer = secure.open()
        stack.enter_context(contextlib.closing(connection))
        yield connection, stack.enter_context(peer)


def test_body_is_sent_as_the_socket_takes_it(both_ends: Any) -> None:
    connection, peer = both_ends
    body = os.urandom(1024) * 20 * 1024
    assert not connection.write(b"head" + body) and not connection.flush() and not connection.write(b"tail")
    got = bytearray()
    while not connection.flush():
        got += peer.recv(1 << 20)
    assert connection.flush() and connection.read() is None
    while len(got) < len(body) + 8:
        got += peer.recv(1 << 20)
    assert got == b"head" + body + b"tail"


def test_what_was_sent_has_left(both_ends: Any) -> None:
    connection, peer = both_ends
    sent = 0
    while connection.write(b"x" * 30_000):
        sent += 30_000
    got = 0
    while got < sent:  # without a further flush
        got += len(peer.recv(1 << 20))


def test_answer_comes_while_a_body_is_sent_and_after_it_cannot_be(both_ends: Any) -> None:
    connection, peer = both_ends
    assert not connection.write(b"x" * 20_000_000)
    peer.sendall(b"early ")
    assert read_next(connection) == b"early "
    peer.sendall(b"answer")
    assert is_ready(connection.sock)
    peer.close()  # with bytes unread: a reset
    with pytest.raises(OSError, match=r".*"):
        while True:
            connection.flush()
    assert read_next(connection) == b"answer" and read_next(connection) == b""


def test_nothing_to_send(both_ends: Any) -> None:
    connection, _ = both_ends
    assert connection.flush() and connection.write(b"") and connection.read() is None


def test_connection_that_is_reset_is_broken_and_one_that_is_closed_is_not(listener: Listener) -> None:
    for is_reset in (False, True):
        connection = Dialing(streamproxy.Upstream(dial_settings(f"http://127.0.0.1:{listener.port}"))).result()
        peer = listener.accept()
        peer.sendall(b"last")
        assert read_next(connection) == b"last"
        (reset if is_reset else socket.socket.close)(peer)
        assert read_next(connection) == b"" and connection.broken == is_reset
        connection.close()


# ---------------------------------------------------------------- through proxies


@pytest.mark.parametrize(("proxy_tls", "tls"), [(False, False), (True, False), (False, True), (True, True)])
def test_through_a_proxy(
    names: Any, environment: Callable[..., None], certificate: Path, proxy_tls: bool, tls: bool
) -> None:
    with Listener(certificate=certificate if proxy_tls else None) as listener:
        names["proxy.example"] = [listener]
        scheme = "https" if proxy_tls else "http"
        environment(ALL_PROXY=f"{scheme}://user:p%40ss@proxy.example:81/", NO_PROXY="other.example")
        upstream = streamproxy.Upstream(dial_settings(f"http{'s' * tls}://api.example/v1", ca_file=str(certificate)))
        dialing = Dialing(upstream)
        with listener.accept() as proxy:
            end: Any = proxy
            if tls:
                wanted = "CONNECT api.example:443 HTTP/1.1\r\nHost: api.example:443\r\n"
                assert head_from(proxy) == wanted + "Proxy-Authorization: Basic dXNlcjpwQHNz\r\n\r\n"
                proxy.sendall(CONNECTED)
                end = TlsThrough(proxy, tls_server(certificate))
            connection = dialing.result()
            assert isinstance(connection, streamproxy.TlsConnection) == (tls or proxy_tls) and connection.read() is None
            sent = upstream.target.encode_head(CALL) + CALL.body
            assert connection.write(sent)
            got = end.recv(65536).decode()
            assert got == sent.decode() and got.startswith("POST /v1" if tls else "POST http://api.example/v1")
            assert ("dXNlcjpwQHNz" in got) != tls
            for size in (1, 1000, 100_000):
                end.sendall(b"x" * size)
                while size:
                    size -= len(read_next(connection))
            assert connection.read() is None
            connection.close()


def test_sessions_with_proxy_and_upstream_are_resumed(
    names: Any, environment: Callable[..., None], certificate: Path, tls_version: str
) -> None:
    with Listener(certificate=certificate) as listener:
        names["proxy.example"] = [listener]
        environment(HTTPS_PROXY="https://proxy.example")
        upstream = streamproxy.Upstream(dial_settings("https://api.example/v1", ca_file=str(certificate)))
        context = tls_server(certificate)
        for made in (listener.context, context):
            assert made
            made.maximum_version = getattr(ssl.TLSVersion, tls_version)
        for is_reused in (False, True):
            dialing = Dialing(upstream)
            with listener.accept() as proxy:
                assert isinstance(proxy, ssl.SSLSocket)
                head_from(proxy)
                proxy.sendall(CONNECTED)
                end = TlsThrough(proxy, context)
                with contextlib.closing(dialing.result()) as connection:
                    assert (proxy.session_reused, end.tls.session_reused) == (is_reused, is_reused)
                    end.sendall(b"a")
                    assert read_next(connection) == b"a"


@pytest.mark.parametrize(("url", "address"), [
    ("https://[fd00::1]/v1", "[fd00::1]:443"),
    ("https://[fd00::1]:8443/v1", "[fd00::1]:8443"),
    ("https://api.example:444/v1", "api.example:444"),
])
def test_tunnel_names_host_and_port(
    listener: Listener, environment: Callable[..., None], url: str, address: str
) -> None:
    environment(HTTPS_PROXY=f"http://127.0.0.1:{listener.port}")
    dialing = Dialing(streamproxy.Upstream(dial_settings(url)))
    with listener.accept() as proxy:
        assert head_from(proxy) == f"CONNECT {address} HTTP/1.1\r\nHost: {address}\r\n\r\n"
    assert dialing.error() == (502, "~ the proxy closed the connection without an answer.")


@pytest.mark.parametrize(("answer", "reason"), [
    (b"HTTP/1.1 407 Authenticate\r\nContent-Length: 6\r\n\r\nsecret", "the proxy refused with status 407"),
    (b"HTTP/1.0 503\r\n\r\n", "the proxy refused with status 503"),
    (b"HTTP/1.1 302 Found\r\nLocation: http://portal/\r\n\r\n", "the proxy refused with status 302"),
    (b"HTTP/1.1 101 Switching Protocols\r\n\r\n", "the proxy refused with status 101"),
    (b"HTTP/1.1 200 OK\r\nVia", "the proxy closed the connection without an answer"),
    (b"", "the proxy closed the connection without an answer"),
    (b"SSH-2.0-OpenSSH\r\n", "the proxy's answer cannot be read"),
    (b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 20_000, "the proxy's answer cannot be read"),
    (CONNECTED, "the TLS handshake failed"),
    (CONNECTED + b"HTTP/1.1 400 Bad Request\r\n\r\n", "the TLS handshake failed"),
])
def test_tunnel_that_is_refused_says_why(
    listener: Listener, environment: Callable[..., None], answer: bytes, reason: str
) -> None:
    environment(HTTPS_PROXY=f"http://user:secret@127.0.0.1:{listener.port}")
    dialing = Dialing(streamproxy.Upstream(dial_settings("https://api.example/v1")))
    with listener.accept() as proxy:
        head_from(proxy)
        with contextlib.suppress(OSError):  # it may have closed: it has been told enough
            proxy.sendall(answer)
            proxy.shutdown(socket.SHUT_WR)
        assert dialing.error() == (502, f"~ {reason}.")


@pytest.mark.parametrize("answer", [
    b"HTTP/1.1 100 Continue\r\n\r\n" + CONNECTED,
    b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\n",
    b"HTTP/1.1 204 \r\nVia: 1.1 x\r\n\r\n",
])
@pytest.mark.parametrize("size", [1, 1000])
def test_tunnel_answers(
    listener: Listener, environment: Callable[..., None], certificate: Path, answer: bytes, size: int
) -> None:
    environment(HTTPS_PROXY=f"127.0.0.1:{listener.port}")
    dialing = Dialing(streamproxy.Upstream(dial_settings("https://api.example/v1", ca_file=str(certificate))))
    with listener.accept() as proxy:
        head_from(proxy)
        for at in range(0, len(answer), size):
            proxy.sendall(answer[at : at + size])
        with tls_server(certificate).wrap_socket(proxy, server_side=True) as peer:
            connection = dialing.result()
            peer.sendall(b"a")
            assert read_next(connection) == b"a"
            connection.close()


def test_what_comes_behind_the_tunnel_s_answer_counts(listener: Listener, environment: Callable[..., None]) -> None:
    environment(HTTPS_PROXY=f"127.0.0.1:{listener.port}")
    dialing = Dialing(streamproxy.Upstream(dial_settings("https://api.example/v1")))
    with listener.accept() as proxy:
        head_from(proxy)
        proxy.sendall(CONNECTED + b"\x15\x03\x01\x00\x02\x02\x28")  # an alert
        assert dialing.error() == (502, "~ the TLS handshake failed.")


def test_no_secret_in_what_is_shown(environment: Callable[..., None]) -> None:
    environment(HTTP_PROXY="http://user:secret@127.0.0.1:1")
    upstream = streamproxy.Upstream(dial_settings())
    with pytest.raises(streamproxy.UpstreamError) as caught:
        upstream.dial(streamproxy.Lifeline())
    shown = repr((upstream, upstream.target, upstream.target.proxy, caught.value))
    assert not any(word in shown for word in ("secret", KEY, "dXNlcjpzZWNyZXQ"))


# ---------------------------------------------------------------- ends of dials

DIAL_STAGES = [
    "look-up", "connecting", "tunnel", "tunnel's answer", "handshake", "proxy's handshake", "middle of the handshake",
]


@contextlib.contextmanager
def held_up(
    stage: str, names: Any, environment: Callable[..., None], certificate: Path, **values: Any
) -> Iterator[tuple[streamproxy.Upstream, Callable[[], Any]]]:
    """An upstream that takes for ever at a stage; and what returns once a dial has got there."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(Listener())
        names["api.example"] = names["proxy.example"] = [listener]
        url, variables = "https://api.example/v1", {}

        def arrive() -> None:
            peer = stack.enter_context(listener.accept())
            if "tunnel" in stage:
                head_from(peer)
                peer.sendall(CONNECTED[:20] if "answer" in stage else b"")
            else:
                assert peer.recv(1) == b"\x16"
            if "middle" in stage:
                peer.sendall(b"\x16\x03\x03\x00\x40\x02")

        if stage == "look-up":
            name = names["api.example"] = SlowName([listener])
            stack.callback(name.go.set)
            arrive = lambda: wait_for(lambda: name.calls)
        elif stage == "connecting":
            names["api.example"] = [stack.enter_context(silent_address())] * 3
            arrive = lambda: None
        elif "tunnel" in stage:
            variables = {"https_proxy": "http://proxy.example"}
        elif "proxy" in stage:
            variables = {"https_proxy": "https://proxy.example"}
        def arrive_or_be_late() -> None:
            listener.sock.settimeout(1.0)
            with contextlib.suppress(AssertionError, OSError):
                arrive()

        environment(**variables)
        upstream = streamproxy.Upstream(dial_settings(url, ca_file=str(certificate), **values))
        yield upstream, arrive_or_be_late if values else arrive  # on a busy machine, a short time may be over before


@pytest.mark.usefixtures("no_grace")
@pytest.mark.parametrize("stage", DIAL_STAGES)
def test_dial_ends_at_its_time(names: Any, environment: Callable[..., None], certificate: Path, stage: str) -> None:
    with held_up(stage, names, environment, certificate, **SLOW) as (upstream, arrive):
        began = time.monotonic()
        dialing = Dialing(upstream)
        arrive()
        assert dialing.error() == (504, "~ it took too long.")
        assert SLOW["connect_timeout"] <= time.monotonic() - began < SLOW["connect_timeout"] + 2


@pytest.mark.parametrize("stage", DIAL_STAGES)
@pytest.mark.parametrize("timeout", [0.0, 1000.0])
def test_dial_ends_when_it_is_cut(
    names: Any, environment: Callable[..., None], certificate: Path, stage: str, timeout: float
) -> None:
    with held_up(stage, names, environment, certificate, connect_timeout=timeout) as (upstream, arrive):
        dialing = Dialing(upstream)
        arrive()
        began = time.monotonic()
        dialing.lifeline.cut()
        assert dialing.error()[0] == 502 and time.monotonic() - began < 1


def test_dial_that_is_cut_as_it_begins_to_connect_ends_at_once(
    names: Any, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lifeline, tune = streamproxy.Lifeline(), streamproxy.tune

    def cut(sock: socket.socket) -> None:
        tune(sock)
        lifeline.cut()

    monkeypatch.setattr(streamproxy, "tune", cut)
    with silent_address() as address:
        names["api.example"] = [address]
        upstream = streamproxy.Upstream(dial_settings("https://api.example/v1", ca_file=str(certificate), **SLOW))
        with pytest.raises(streamproxy.UpstreamError) as raised:
            upstream.dial(lifeline)
    assert raised.value.status == 502  # 504: it has waited for its time


def test_dial_that_was_cut_before_opens_nothing(names: Any, listener: Listener) -> None:
    names["api.example"] = [listener]
    lifeline = streamproxy.Lifeline()
    lifeline.cut()
    for upstream in (
        streamproxy.Upstream(dial_settings()), streamproxy.Upstream(dial_settings(f"http://127.0.0.1:{listener.port}"))
    ):
        with pytest.raises(streamproxy.UpstreamError):
            upstream.dial(lifeline)
    listener.sock.settimeout(0.05)
    with pytest.raises(socket.timeout):
        listener.accept()


def test_cut_after_a_dial_touches_nothing(listener: Listener) -> None:
    dialing = Dialing(streamproxy.Upstream(dial_settings(f"http://127.0.0.1:{listener.port}")))
    with contextlib.closing(dialing.result()) as connection, listener.accept() as peer:
        dialing.lifeline.cut()
        assert connection.write(b"a") and peer.recv(1) == b"a"


def nothing_left(before: tuple[int, int], references: Any) -> None:
    """The counts are as before, and nothing that is referred to is there."""
    wait_for(lambda: threading.active_count() <= before[0] and descriptors_now() <= before[1])
    if sys.implementation.name == "cpython":
        assert [reference() for reference in references if reference()] == []


@contextlib.contextmanager
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.fixture
def made_for_dials(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """References to what is made for dials."""
    references: list[Any] = []

    def watch(kind: type[Any]) -> None:
        real = kind.__init__

        def init(self: Any, *arguments: Any, **options: Any) -> None:
            if kind is not socket.socket or threading.current_thread().name == "dial":
                references.append(weakref.ref(self))
            real(self, *arguments, **options)

        monkeypatch.setattr(kind, "__init__", init)

    for kind in (
        streamproxy.Upstream, streamproxy.Trust, streamproxy.DialHandler, streamproxy.ProxyHandler,
        streamproxy.Lifeline, streamproxy.Deadline, streamproxy.Race, streamproxy.Connection, streamproxy.TlsConnection,
        socket.socket,
    ):
        watch(kind)
    return references


@pytest.mark.usefixtures("no_grace")
@pytest.mark.parametrize("end", ["time", "cut"])
@pytest.mark.parametrize("stage", DIAL_STAGES)
def test_dial_that_failed_leaves_nothing(
    names: Any, environment: Callable[..., None], certificate: Path, made_for_dials: list[Any], stage: str, end: str
) -> None:
    everything = threading.active_count(), descriptors_now()
    values = SLOW if end == "time" else {}
    with no_collector(), held_up(stage, names, environment, certificate, **values) as (upstream, arrive):
        before = len(made_for_dials)
        dialing = Dialing(upstream)
        arrive()
        if end == "cut":
            dialing.lifeline.cut()
        failure = dialing.outcome()
        assert isinstance(failure, streamproxy.UpstreamError) and failure.__context__ is None
        if sys.implementation.name == "cpython":  # while the failure is kept
            assert [reference() for reference in made_for_dials[before:] if reference()] == [dialing.lifeline]
        del dialing, upstream, failure
    nothing_left(everything, made_for_dials)


def test_connection_that_is_closed_leaves_nothing(
    names: Any, environment: Callable[..., None], certificate: Path, made_for_dials: list[Any]
) -> None:
    with Listener(certificate=certificate) as listener, no_collector():
        before = threading.active_count(), descriptors_now()
        names["proxy.example"] = [listener]
        environment(HTTPS_PROXY="https://proxy.example")
        upstream = streamproxy.Upstream(dial_settings("https://api.example/v1", ca_file=str(certificate)))
        lasting = len(made_for_dials)
        context = tls_server(certificate)
        for _ in range(3):
            dialing = Dialing(upstream)
            with listener.accept() as proxy:
                head_from(proxy)
                proxy.sendall(CONNECTED)
                end = TlsThrough(proxy, context)
                connection = dialing.result()
                end.sendall(b"a")
                assert read_next(connection) == b"a"
            connection.close()
            del dialing, connection, end, proxy
            nothing_left(before, made_for_dials[lasting:])
        assert len(made_for_dials) == lasting + 3 * 9
        del upstream
        nothing_left(before, made_for_dials)


def test_many_dials_at_once(names: Any, certificate: Path) -> None:
    """Every other is cut somewhere on its way: each ends, and nothing is left."""
    with Listener(certificate=certificate) as listener, silent_address() as silent:
        names["api.example"] = [silent, listener]
        upstream = streamproxy.Upstream(dial_settings("https://api.example/v1", ca_file=str(certificate)))
        before, over = (threading.active_count(), descriptors_now()), threading.Event()

        def serve() -> None:
            while not over.is_set():
                with contextlib.suppress(OSError):
                    listener.accept().close()

        server = threading.Thread(target=serve, daemon=True)
        server.start()
        dialings = [Dialing(upstream) for _ in range(40)]
        for number, dialing in enumerate(dialings[::2]):
            time.sleep(0.01)  # anywhere: before, within or after
            dialing.lifeline.cut()
        for dialing in dialings:
            with contextlib.suppress(streamproxy.UpstreamError):
                dialing.result().close()
        over.set()
        socket.create_connection(listener.getsockname()).close()  # which ends an accept
        server.join(DEADLINE)
        dialings.clear()
        del dialing
        wait_for(lambda: (threading.active_count(), descriptors_now()) == before)


# ---------------------------------------------------------------- through TLS and proxies, in a server


def test_tls_pieces_arrive_one_by_one_and_all_of_those_that_share_a_record(
    provider: Provider, certificate: Path
) -> None:
    with running(provider, upstream=tls_url(provider), ca_file=str(certificate)) as server:
        with Client(server).ask(PROMPT) as client:
            with take_tls(provider, certificate) as upstream:
                upstream.start(ROLE, A)
                assert client.head().status == 200 and client.chunk() == b"a"
                upstream.event(delta("b"))
                assert client.chunk() == b"b"
                text = "x" * 10
                upstream.send(b"".join(chunk(delta(text)) for _ in range(3000)), chunk(DONE))
                assert client.body().decode() == text * 3000


def test_tls_records_that_arrive_together_are_all_read(provider: Provider, certificate: Path) -> None:
    with running(provider, upstream=tls_url(provider), ca_file=str(certificate)) as server:
        with Client(server).ask(PROMPT) as client:
            with take_tls(provider, certificate) as upstream:
                upstream.start(ROLE)
                for size in range(1, 300):
                    upstream.event(delta("x" * size))
                client.head()
                left = sum(range(1, 300))
                while left:  # nothing more comes that could push on what was left behind
                    left -= len(client.chunk())


def test_tls_text_that_shares_a_record_with_the_head_is_not_held_back(provider: Provider, certificate: Path) -> None:
    with running(provider, upstream=tls_url(provider), ca_file=str(certificate)) as server:
        with Client(server).ask(PROMPT) as client:
            with take_tls(provider, certificate) as upstream:
                upstream.start(*[delta("x" * 100)] * 60)  # 12 kB: more than the head's buffer holds, less than a record
                client.head()
                got = b""
                while len(got) < 6000:
                    got += client.chunk()


def test_tls_client_leaves(provider: Provider, certificate: Path) -> None:
    with running(provider, upstream=tls_url(provider), ca_file=str(certificate)) as server:
        with Client(server).ask(PROMPT) as client, take_tls(provider, certificate) as upstream:
            client.sock.close()  # its thread waits for the head
            assert upstream.gone()


def test_tls_client_leaves_within_the_handshake(provider: Provider, certificate: Path) -> None:
    with running(provider, upstream=tls_url(provider), ca_file=str(certificate)) as server:
        client = Client(server).ask(PROMPT)
        upstream = Peer(provider.listener.accept()[0])
        upstream.more()  # the handshake has begun
        client.sock.close()
        assert upstream.gone()
        wait_for(lambda: not server.snapshot()["connections"])


@pytest.mark.parametrize("fault", ["nobody vouches for it", "it is another's"])
def test_tls_certificate_is_verified(provider: Provider, certificate: Path, tmp_path: Path, fault: str) -> None:
    other = fault == "it is another's"
    shown = make_certificate(tmp_path, "DNS:elsewhere.example") if other else certificate
    with running(provider, upstream=tls_url(provider), ca_file=str(shown) if other else "") as server:
        with Client(server).ask(PROMPT) as client:
            with pytest.raises((OSError, AssertionError)):
                take_tls(provider, shown)
            assert client.error() == (502, "Upstream cannot be reached: its certificate is not trusted.")


def test_proxy_of_the_environment_is_used(provider: Provider, environment: Callable[..., None]) -> None:
    environment(http_proxy=provider.url)
    with running(None, upstream="http://api.example/v1") as server:
        with Client(server).ask(PROMPT) as client, provider.take() as proxy:
            assert proxy.head.startswith("POST http://api.example/v1/chat/completions HTTP/1.1\r\n")
            proxy.start(A)
            assert client.head().status == 200 and client.chunk() == b"a"


def test_proxy_that_is_itself_spoken_to_over_tls(
    provider: Provider, certificate: Path, environment: Callable[..., None]
) -> None:
    environment(http_proxy=tls_url(provider))
    with running(None, upstream="http://api.example/v1", ca_file=str(certificate)) as server:
        with Client(server).ask(PROMPT) as client:
            with take_tls(provider, certificate) as proxy:
                assert proxy.head.startswith("POST http://api.example/v1/chat/completions HTTP/1.1\r\n")
                proxy.start(A)
                assert client.head().status == 200 and client.chunk() == b"a"


def test_proxy_connect_for_tls(provider: Provider, tmp_path: Path, environment: Callable[..., None]) -> None:
    certificate = make_certificate(tmp_path, "DNS:api.example")
    environment(HTTPS_PROXY=provider.url)
    with running(None, upstream="https://api.example/v1", ca_file=str(certificate)) as server:
        with Client(server).ask(PROMPT) as client:
            proxy = provider.take()
            assert proxy.head.startswith("CONNECT api.example:443 HTTP/1.") and "uthorization" not in proxy.head
            proxy.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(str(certificate))
            with UpstreamPeer(context.wrap_socket(proxy.sock, server_side=True)) as upstream:
                upstream.start(A)
                assert client.head().status == 200 and client.chunk() == b"a"


def test_proxy_is_not_used_for_no_proxy_and_the_demo(
    provider: Provider, environment: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    environment(http_proxy="http://127.0.0.1:9/")
    environment(no_proxy="127.0.0.1")
    with running(provider) as server, Client(server).ask(PROMPT), provider.take():
        pass
    environment(no_proxy="")
    monkeypatch.setattr(streamproxy, "DEMO_PAUSE", 0.0005)
    with running(None, demo=True, api_key="") as server, Client(server).ask(PROMPT) as client:
        assert client.head().status == 200
        client.until(b"Say ")


def test_redirect_is_not_followed_with_the_key(server: streamproxy.Server, provider: Provider) -> None:
    other = Provider()
    with Client(server).ask(PROMPT) as client, provider.take() as upstream:
        upstream.send(error_answer(307, fields=f"Location: {other.url}\r\n".encode()))
        assert client.error()[0] == 502
    assert other.nobody_came()
    other.listener.close()


# ---------------------------------------------------------------- connections that stay warm


def test_warm_connections_are_bounded_and_end_after_a_while() -> None:
    with Stage() as stage:
        pool, key = stage.hub.pool, stage.hub.upstream.target.key
        ends = []
        for number in range(streamproxy.MAX_IDLE_CONNECTIONS + 1):
            stage.at(number / 1000)
            ends.append(keep_warm(stage))
        assert ends[0].gone() and len(pool) == streamproxy.MAX_IDLE_CONNECTIONS
        taken = pool.take(key)
        assert taken and taken.reused
        assert taken.sock.send(b"x") and ends[-1].exactly(1) == b"x"  # the one that was used last
        stage.hub.loop.unwatch(taken.sock)
        stage.jobs.clear()
        stage.stream.drop(streamproxy.Disconnected("It would be cut."))
        stage.at(streamproxy.KEEP_ALIVE_TIMEOUT + 1)
        assert not len(pool) and ends[1].gone() and taken.sock.send(b"y")
        taken.close()


@pytest.mark.parametrize("size", [0, 5])
def test_warm_connection_that_is_old_retires(size: int) -> None:
    with Stage() as stage:
        stage.at(streamproxy.MAX_CONNECTION_AGE + 1)
        near, far = socket.socketpair()
        near.setblocking(False)
        connection = streamproxy.Connection(near, "upstream")
        connection.opened_at = 1000.0
        stage.hub.pool.settle(connection, streamproxy.BodyDecoder(size))
        with Peer(far) as upstream:
            if size:
                assert not len(stage.hub.pool) and stage.seen() == b""
                upstream.send(b"x" * size)
                stage.turn()
            assert not len(stage.hub.pool) and upstream.gone()


@pytest.mark.parametrize("more", [b"", b"HTTP/1.1 408 Request Timeout\r\n"])
def test_warm_connection_whose_end_came_with_its_answer_is_not_used_in_the_same_turn(more: bytes) -> None:
    with Stage() as stage:
        near, far = socket.socketpair()
        near.setblocking(False)
        connection = streamproxy.Connection(near, "upstream")
        connection.opened_at = 1000.0
        with Peer(far) as upstream:
            upstream.send(more)
            upstream.sock.shutdown(socket.SHUT_WR)
            stage.hub.pool.settle(connection, streamproxy.BodyDecoder(0))
            assert len(stage.hub.pool) == 1 and stage.hub.pool.take("upstream") is None
            assert not len(stage.hub.pool) and upstream.gone()


def one_answer(server: streamproxy.Server, upstream: UpstreamPeer, text: str = "a") -> None:
    """An answer over upstream's connection, of which the request was read; the connection is idle afterwards."""
    upstream.start(delta(text))
    upstream.finish()


def ask_again(server: streamproxy.Server, client: Client, upstream: UpstreamPeer) -> None:
    """Have one answer, and a second request sent over the connection that it left warm."""
    one_answer(server, upstream)
    assert client.head().status == 200 and client.body() == b"a"
    wait_for(lambda: idle(server) == 1)
    client.ask(PROMPT)
    upstream.read_request()


@pytest.mark.parametrize("last", [b"0\r\n\r\n", b"0\r\nA: b\r\n\r\n", b""])
def test_connection_is_used_again_once_its_answer_has_ended(
    server: streamproxy.Server, provider: Provider, last: bytes
) -> None:
    with Client(server).ask(PROMPT) as client, provider.take() as upstream:
        upstream.start(A)
        upstream.send(chunk(STOP), chunk(DONE), last)
        assert client.head().status == 200 and client.body() == b"a"  # which does not wait for the last chunk
        assert idle(server) == 0 or last
        upstream.send(b"" if last else b"0\r\n\r\n")
        for text in ("b", "c"):
            wait_for(lambda: idle(server) == 1)
            client.ask(PROMPT)
            upstream.read_request()
            one_answer(server, upstream, text)
            assert client.head().status == 200 and client.body() == text.encode()
    assert provider.nobody_came()


NOT_KEPT = {
    "told to close": (OK + SSE + b"Transfer-Encoding: chunked\r\nConnection: Close\r\n\r\n", b"0\r\n\r\n"),
    "HTTP/1.0": (b"HTTP/1.0 200 OK\r\n" + SSE + b"Transfer-Encoding: chunked\r\n\r\n", b"0\r\n\r\n"),
    "says more than its answer": (STREAM_HEAD, b"0\r\n\r\nHTTP/1.1 200 OK\r\n"),
    "breaks its framing after [DONE]": (STREAM_HEAD, b"0x\r\n"),
}


@pytest.mark.parametrize("name", NOT_KEPT)
def test_connection_is_not_kept_where_its_end_is_in_doubt(
    server: streamproxy.Server, provider: Provider, name: str
) -> None:
    head, last = NOT_KEPT[name]
    with Client(server).ask(PROMPT) as client, provider.take() as upstream:
        upstream.send(head, chunk(A), chunk(DONE), last)
        assert client.head().status == 200 and client.body() == b"a" and upstream.gone()


def test_idle_connection_that_says_something_or_closes_is_dropped(
    server: streamproxy.Server, provider: Provider
) -> None:
    for last in (b"HTTP/1.1 408 Request Timeout\r\n\r\n", b""):
        with Client(server).ask(PROMPT) as client, provider.take() as upstream:
            one_answer(server, upstream)
            assert client.head().status == 200 and client.body() == b"a"
            wait_for(lambda: idle(server) == 1)
            upstream.send(last)
            if not last:
                upstream.sock.shutdown(socket.SHUT_WR)
            assert upstream.gone() and idle(server) == 0


@pytest.mark.parametrize("how", ["close", "reset"])
def test_reused_connection_that_was_closed_already_is_tried_once_more_on_a_new_one(
    server: streamproxy.Server, provider: Provider, how: str
) -> None:
    with Client(server).ask(PROMPT) as client, provider.take() as upstream:
        ask_again(server, client, upstream)
        (upstream.reset if how == "reset" else upstream.sock.close)()
        with provider.take() as second:
            second.start(delta("b"))
            assert client.head().status == 200 and client.chunk() == b"b"
            second.finish()
            assert client.body() == b""
            wait_for(lambda: idle(server) == 1)
            client.ask(PROMPT)
            second.read_request()
            second.sock.close()
        with provider.take() as third:
            third.sock.close()  # a new one: once more is enough
        assert client.error()[0] == 502
    assert provider.nobody_came()


def test_reused_connection_that_ends_after_a_byte_of_the_answer_is_not_tried_again(
    server: streamproxy.Server, provider: Provider
) -> None:
    with Client(server).ask(PROMPT) as client, provider.take() as upstream:
        ask_again(server, client, upstream)
        upstream.send(b"H")
        upstream.sock.close()
        assert client.error()[0] == 502
    assert provider.nobody_came()


def test_client_leaves_while_a_dead_connection_is_replaced(server: streamproxy.Server, provider: Provider) -> None:
    with Client(server).ask(PROMPT) as client, provider.take() as upstream:
        ask_again(server, client, upstream)
        upstream.sock.close()
        with provider.take() as second:
            client.sock.close()
            assert second.gone()
    wait_for(lambda: not server.snapshot()["connections"])


def test_tls_connection_is_used_again(provider: Provider, certificate: Path) -> None:
    with running(provider, upstream=tls_url(provider), ca_file=str(certificate)) as server:
        with Client(server).ask(PROMPT) as client:
            with take_tls(provider, certificate) as upstream:
                for text in ("a", "b"):
                    one_answer(server, upstream, text)
                    assert client.head().status == 200 and client.body() == text.encode()
                    wait_for(lambda: idle(server) == 1)
                    client.ask(PROMPT)
                    upstream.read_request()
                client.sock.close()
                assert upstream.gone()
    assert provider.nobody_came()


# 22 ------------------------------------------------------------------- Sources


# ---------------------------------------------------------------- on a clock of the test's own


@pytest.mark.parametrize(("limits", "due", "status"), [
    ({}, 10, 504), ({"connect_timeout": 3.0}, 3, 504), ({"connect_timeout": 0.0, "total_timeout": 50.0}, 50, 504),
    ({"connect_timeout": 0.0, "total_timeout": 0.0, "first_byte_timeout": 7.0}, None, 0),
])
def test_connecting_has_a_clock_of_its_own(limits: dict[str, float], due: float | None, status: int) -> None:
    with Stage(**limits) as stage:
        assert stage.seen((due or 100000) - 0.1) == b"" and not stage.ended
        stage.at(due or 200000)
        assert stage.ended == bool(due)
        assert not due or (stage.stream.failure and stage.stream.failure.status == status)


def test_dial_that_ends_after_its_stream_leaves_nothing() -> None:
    with Stage() as stage:
        stage.at(10)
        assert stage.ended and stage.connect().gone() and not stage.hub.pool and stage.hub.pool.take("upstream") is None


@pytest.mark.parametrize("head_at", [None, 8])
def test_first_event_clock_starts_when_upstream_is_asked(head_at: float | None) -> None:
    with Stage(first_byte_timeout=20.0) as stage:
        stage.at(5)
        upstream = stage.connect()
        if head_at:
            stage.at(head_at)
            upstream.send(stage.head)
            assert stage.seen() == b""
        stage.at(24.9)
        assert not stage.ended
        stage.at(25)
        assert stage.stream.failure and stage.stream.failure.status == 504
        assert stage.stream.failure.message == "Upstream took too long to start its answer." and upstream.gone()


def test_idle_clock_starts_anew_with_every_event_and_comment() -> None:
    with Stage(idle_timeout=5.0) as stage:
        stage.begin()
        for second in range(0, 40, 4):
            stage.upstream.send(chunk(delta("x")))
            assert stage.seen(second).endswith(b"1\r\nx\r\n")
        stage.at(40.9)
        stage.upstream.send(chunk(b": ping\n\n"))
        stage.at(45.8)
        stage.at(50.7)
        assert not stage.ended
        stage.at(50.8)
        assert stage.stream.failure and stage.stream.failure.status == 504 and not stage.stream.viewer.intact
        assert stage.upstream.gone()


def test_clock_is_not_looked_at_before_what_came_while_the_process_was_stopped() -> None:
    with Stage(idle_timeout=5.0, first_byte_timeout=5.0) as stage:
        upstream = stage.connect()
        upstream.send(STREAM_HEAD, chunk(delta("a")))
        assert stage.seen(100) == b"HEAD 1\r\na\r\n" and not stage.ended
        upstream.send(chunk(delta("b")))
        assert stage.seen(200) == b"1\r\nb\r\n" and not stage.ended
        stage.at(205)
        assert stage.ended


@pytest.mark.parametrize("late", ["total time-out", "abort"])
def test_settled_answer_is_complete_whatever_comes_then(late: str) -> None:
    with Stage(total_timeout=50.0) as stage:
        stage.begin()
        stage.upstream.send(chunk(delta("x")))
        stage.at(49.5)
        stage.upstream.send(chunk(STOP))
        stage.at(49.6)
        if late == "abort":
            stage.stream.fail(streamproxy.Aborted("The server is shutting down."))
        assert stage.seen(50.0).endswith(b"0\r\n\r\n")
        assert stage.ended and stage.stream.viewer.intact and not stage.stream.failure


def ask_warm(stage: Stage) -> Peer:
    """Ask again, on a warm connection; upstream's end of it."""
    warm = keep_warm(stage)
    stage.jobs.clear()
    stage.stream.ask()
    assert not stage.jobs and warm.until(b"\r\n\r\n")
    return warm


def test_connect_clock_starts_anew_where_a_stream_is_opened_afresh() -> None:
    with Stage(connect_timeout=10.0) as stage:
        warm = ask_warm(stage)
        stage.at(0.4)
        warm.sock.close()
        stage.turn()
        assert len(stage.jobs) == 1 and not stage.ended
        stage.at(10.3)
        assert not stage.ended
        stage.at(10.4)
        assert stage.ended and stage.stream.failure
        assert stage.stream.failure.message == "Upstream took too long to connect."


@pytest.mark.parametrize(("seconds", "sent", "again"), [(0.4, b"", True), (0.6, b"", False), (0.4, b"H", False)])
def test_warm_connection_that_was_closed_is_replaced_unless_it_may_have_been_read(
    seconds: float, sent: bytes, again: bool
) -> None:
    with Stage() as stage:
        warm = ask_warm(stage)
        stage.at(seconds)
        warm.send(sent)
        warm.sock.close()
        stage.turn(2)
        assert stage.ended != again and len(stage.jobs) == again
        if again:
            upstream = stage.connect()
            upstream.sock.close()  # a new one: once more is enough
            stage.turn()
        assert stage.ended and stage.stream.failure and stage.stream.failure.status == 502 and not stage.jobs


def test_stale_warm_connection_is_not_replaced_for_a_stream_that_was_aborted() -> None:
    with Stage() as stage:
        warm = ask_warm(stage)
        stage.stream.fail(streamproxy.Aborted("The server is shutting down."))
        warm.sock.close()
        stage.turn(2)
        assert stage.ended and not stage.jobs and stage.stream.failure and stage.stream.failure.ending == "aborted"


def test_aborted_while_a_stale_connection_is_replaced() -> None:
    with Stage() as stage:
        ask_warm(stage).sock.close()
        stage.turn()
        stage.stream.fail(streamproxy.Aborted("The server is shutting down."))
        assert stage.ended and stage.connect().gone()
        assert stage.stream.failure and stage.stream.failure.ending == "aborted"


def test_request_that_was_not_sent_does_not_count_as_asked() -> None:
    with Stage() as stage:
        ask_warm(stage).sock.close()
        assert stage.stream.asked
        stage.turn()
        assert not stage.stream.asked
        stage.dialed(streamproxy.UpstreamError("Upstream cannot be reached: connection refused."))
        assert stage.ended and not stage.stream.asked


def test_idle_clock_does_not_count_time_in_which_we_did_not_listen() -> None:
    with Stage(idle_timeout=5.0) as stage:
        stage.begin()
        stage.block()
        stage.now += 100
        stage.unblock()
        stage.now += 4.9
        stage.turn()
        assert not stage.ended


@pytest.mark.parametrize("later", [(), (delta("", usage=1), event({"choices": [], "usage": {"total_tokens": 3}}))])
def test_after_finish_reason_usage_is_awaited_for_a_moment_only(later: tuple[bytes, ...]) -> None:
    with Stage() as stage:
        stage.begin()
        stage.upstream.send(chunk(delta("x", "stop")))
        stage.at(0)
        stage.upstream.send(*map(chunk, later))
        assert stage.seen(0.9) == b"HEAD 1\r\nx\r\n" and not stage.ended
        late = 1.9 if later else 1.0  # the moment starts anew with each event
        assert stage.seen(late - 0.1) == b"" and not stage.ended
        assert stage.seen(late) == b"0\r\n\r\n"
        assert stage.ended and stage.stream.viewer.intact and not stage.stream.failure
        assert stage.stream.answer.notes.usage == ({"total_tokens": 3} if later else None)


# ---------------------------------------------------------------- upstreams that misbehave


def test_upstream_heads_that_stall_half_way_hold_up_nobody_else(server: streamproxy.Server, provider: Provider) -> None:
    for _ in range(streamproxy.MAX_WORKERS + 4):
        Client(server).ask(PROMPT)
        provider.take().send(b"HTTP/1.1 200 OK\r\nContent-T")
    with Client(server).ask(method="GET", path="/healthz") as client:
        assert client.head().status == 200


# What upstream sends before it closes; the status that the client gets; how the log calls the ending.
BEFORE_THE_FIRST_TEXT = {
    "closes without a word": (b"", 502, "error"),
    "closes within its head": (OK + b"Content-Ty", 502, "error"),
    "is not HTTP": (b"SSH-2.0-OpenSSH\r\n", 502, "error"),
    "endless head": (OK + b"A: b\r\n" * 1000, 502, "error"),
    "no event at all": (STREAM_HEAD + b"0\r\n\r\n", 502, "truncated"),
    "role and nothing more": (STREAM_HEAD + chunk(ROLE) + b"0\r\n\r\n", 502, "truncated"),
    "comments only": (STREAM_HEAD + chunk(b": ping\n\n") + b"0\r\n\r\n", 502, "truncated"),
    "cut before any text": (STREAM_HEAD + chunk(ROLE), 502, "truncated"),
    "garbage": (STREAM_HEAD + chunk(event(b"{")), 502, "error"),
    "chunk size with a sign": (STREAM_HEAD + b"+5\r\n", 502, "error"),
    "error event": (STREAM_HEAD + chunk(event({"error": {"message": "Sorry"}})) + chunk(DONE), 502, "error"),
    "error as a string": (STREAM_HEAD + chunk(event({"error": "Sorry"})), 502, "error"),
    "another content type": (OK + b"Content-Type: text/html\r\n\r\n<p>", 502, "error"),
    "no content type": (OK + b"\r\nHello", 502, "error"),
    "compressed": (OK + SSE + b"Content-Encoding: gzip\r\n\r\n" + A, 502, "error"),
    "two lengths": (OK + SSE + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n", 502, "error"),
    "negative length": (OK + SSE + b"Content-Length: -5\r\n\r\n", 502, "error"),
    "transfer coding unknown": (OK + SSE + b"Transfer-Encoding: gzip, chunked\r\n\r\n", 502, "error"),
    "JSON cut by close": (OK + JSON + b'Content-Length: 99\r\n\r\n{"choices": [', 502, "truncated"),
    "JSON that is no completion": (OK + JSON + b"\r\n{}", 502, "error"),
    "JSON error with status 200": (OK + JSON + b'\r\n{"error": {"message": "Sorry"}}', 502, "error"),
    "status 204": (b"HTTP/1.1 204 No Content\r\n\r\n", 502, "error"),
    "redirect": (error_answer(302, fields=b"Location: http://127.0.0.1:9/\r\n"), 502, "error"),
    "101": (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n", 502, "error"),
    "400": (error_answer(400, b'{"error": {"message": "Bad model"}}'), 400, "error"),
    "401": (error_answer(401, b'{"error": {"message": "Wrong key ' + KEY.encode() + b'"}}'), 502, "error"),
    "403": (error_answer(403), 502, "error"),
    "404 not JSON": (error_answer(404, b"<html>"), 404, "error"),
    "413": (error_answer(413, b'{"message": "Too long"}'), 413, "error"),
    "418": (error_answer(418), 502, "error"),
    "422 with the key in it": (
        error_answer(422, b'{"detail": "' + KEY.encode() + b" " + KEY[:9].encode() + b'"}'), 422, "error",
    ),
    "422 endless": (b"HTTP/1.1 422 X\r\n\r\n" + b"x" * 999 + b"." * 100000, 422, "error"),
    "429": (error_answer(429, b'{"error": {"message": "Slow down"}}', b"Retry-After: 7\r\n"), 429, "error"),
    "500": (error_answer(500, b'{"error": {"message": "secret trace"}}'), 502, "error"),
    "500 cut": (b"HTTP/1.1 500 X\r\nContent-Length: 99\r\n\r\nx", 502, "error"),
    "503": (error_answer(503, fields=b"Retry-After: 9\r\n"), 503, "error"),
    "529": (error_answer(529, b'{"error": {"message": "Sorry"}}'), 503, "error"),
}


@pytest.mark.parametrize("name", BEFORE_THE_FIRST_TEXT)
@pytest.mark.parametrize("mode", ["text", "events"])
def test_failure_before_the_first_text_still_has_its_status(
    server: streamproxy.Server, provider: Provider, caplog: pytest.LogCaptureFixture, name: str, mode: str
) -> None:
    answer, status, ending = BEFORE_THE_FIRST_TEXT[name]
    with Client(server).ask(PROMPT, **(EVENTS if mode == "events" else {})) as client:
        with provider.take() as upstream:
            upstream.send(answer)
        head = client.head()
        sentence = json.loads(client.exactly(int(head.fields["Content-Length"])))["error"]
        assert head.status == status and sentence.endswith((".", "Sorry", "model", "down", "long", "]")), sentence
        assert ("Retry-After" in head.fields) == (status in (429, 503))
        assert client.ask(method="GET", path="/healthz").head().status == 200  # the connection is fine
    entry = log_entries(caplog, 1)[0]
    assert (entry["status"], entry["ending"]) == (status, ending)
    assert provider.nobody_came()  # nothing is tried twice


def test_upstream_message_reaches_the_client_where_it_is_about_the_request(
    server: streamproxy.Server, provider: Provider
) -> None:
    for answer, expected in [
        (error_answer(400, b'{"error": {"message": "Bad\\nmodel"}}'), (400, "Bad model")),
        (error_answer(429, b'{"error": "Slow"}', b"Retry-After: 7\r\n"), (429, "Slow")),
        (error_answer(500, b'{"error": "trace"}'), (502, "Upstream failed with status 500.")),
        (error_answer(401, b'{"error": "who?"}'), (502, "Upstream refused our API key with status 401.")),
        (error_answer(307), (502, "Upstream redirects with status 307, which is not followed.")),
    ]:  # fmt: skip
        with Client(server).ask(PROMPT) as client, provider.take() as upstream:
            upstream.send(answer)
            assert client.error() == expected


@pytest.mark.parametrize(("told", "passed"), [
    (b"7", "7"),
    (b"Sun, 22 Nov 2026 10:00:00 GMT", "Sun, 22 Nov 2026 10:00:00 GMT"),
    (b"soon", "1"),
])
def test_retry_after_of_429_passes_if_it_is_one(
    server: streamproxy.Server, provider: Provider, told: bytes, passed: str
) -> None:
    with Client(server).ask(PROMPT) as client, provider.take() as upstream:
        upstream.send(error_answer(429, fields=b"Retry-After: " + told + b"\r\n"))
        assert client.head().fields["Retry-After"] == passed


# What upstream sends after the first text, before it closes (or resets).
AFTER_THE_FIRST_TEXT = {
    "closes": b"",
    "ends its body with no end event": b"0\r\n\r\n",
    "closes within an event": chunk(delta("b")[:-9]),
    "closes within a chunk": b"ff\r\ndata",
    "breaks the chunked coding": b"0x5\r\nhello\r\n",
    "sends garbage": chunk(event(b"oops")),
    "sends an error": chunk(event({"error": "Sorry"})),
    "sends an error and [DONE]": chunk(
        event({"error": {"message": "Sorry"}})
    ) + chunk(STOP) + chunk(DONE) + b"0\r\n\r\n",
    "sends an error event": chunk(b'event: error\ndata: {"message": "Sorry"}\n\n'),
}  # fmt: skip


@pytest.mark.parametrize("name", AFTER_THE_FIRST_TEXT)
@pytest.mark.parametrize("reset", [False, True])
def test_failure_after_the_first_text_leaves_the_body_unterminated(
    server: streamproxy.Server, provider: Provider, caplog: pytest.LogCaptureFixture, name: str, reset: bool
) -> None:
    with Client(server).ask(PROMPT) as client, provider.take() as upstream:
        upstream.start(A)
        assert client.head().status == 200 and client.chunk() == b"a"
        upstream.send(AFTER_THE_FIRST_TEXT[name])
        (upstream.reset if reset else upstream.sock.close)()
        assert client.rest() == b""  # neither a last chunk nor a second answer
    assert log_entries(caplog, 1)[0]["ending"] == (
        "truncated" if "closes" in name or "ends" in name and "sends" not in name else "error"
    ) or reset


@pytest.mark.parametrize("name", AFTER_THE_FIRST_TEXT)
def test_failure_after_the_first_text_is_an_event_in_sse_mode(
    server: streamproxy.Server, provider: Provider, name: str
) -> None:
    with Client(server).ask(PROMPT, **EVENTS) as client:
        with provider.take() as upstream:
            upstream.start(A)
            client.head()
            assert client.chunk().endswith(b'data: {"text": "a"}\n\n')
            upstream.send(AFTER_THE_FIRST_TEXT[name])
        last = client.body()
        assert re.fullmatch(rb'event: error\ndata: \{"error": "[^"]+"\}\n\n', last)
        assert client.ask(method="GET", path="/healthz").head().status == 200


COMPLETE = {
    "[DONE] and the last chunk": chunk(STOP) + chunk(DONE) + b"0\r\n\r\n",
    "[DONE] alone, and nothing after it is "
                                                                           "waited for": chunk(DONE),
    "finish_reason, body ends": chunk(STOP) + b"0\r\n\r\n",
    "[DONE] with no blank line": chunk(b"data: [DONE]") + b"0\r\n\r\n",
    "finish_reason beside text": chunk(delta("", "stop")) + b"0\r\n\r\n",
    "trailers": chunk(DONE) + b"0\r\nA: b\r\n\r\n",
}  # fmt: skip


@pytest.mark.parametrize("name", COMPLETE)
def test_complete_answer_ends_while_upstream_is_still_open(
    server: streamproxy.Server, provider: Provider, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    with Client(server).ask(PROMPT) as client, provider.take() as upstream:
        upstream.start(A)
        upstream.send(COMPLETE[name])
        assert client.head().status == 200 and client.body() == b"a"
        elapse(server, streamproxy.END_GRACE)
        assert "alone" not in name or upstream.gone()
    assert log_entries(caplog, 1)[0]["ending"] == "complete"


@pytest.mark.parametrize("end", [STOP, DONE, STOP + DONE])
def test_complete_answer_delimited_by_close_or_length(
    server: streamproxy.Server, provider: Provider, end: bytes
) -> None:
    for head in (
        CLOSE_HEAD, OK + SSE + b"Content-Length: %d\r\n\r\n" % len(A + end), b"HTTP/1.0 200 OK\r\n" + SSE + b"\r\n"
    ):
        with Client(server).ask(PROMPT) as client:
            with provider.take() as upstream:
                upstream.send(head + A + end)
            assert client.head().status == 200 and client.body() == b"a"


def test_cut_answer_delimited_by_close_or_length(server: streamproxy.Server, provider: Provider) -> None:
    for head in (CLOSE_HEAD, OK + SSE + b"Content-Length: 9999\r\n\r\n", b"HTTP/1.0 200 OK\r\n" + SSE + b"\r\n"):
        with Client(server).ask(PROMPT) as client:
            with provider.take() as upstream:
                upstream.send(head + A)
            assert client.head().status == 200 and client.chunk() == b"a" and client.rest() == b""


@pytest.mark.parametrize("interim", [
    b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n",
    b"HTTP/1.1 102 X\r\n\r\nHTTP/1.1 103 X\r\n\r\n",
])
def test_interim_answers_are_not_the_answer(server: streamproxy.Server, provider: Provider, interim: bytes) -> None:
    with Client(server).ask(PROMPT) as client, provider.take() as upstream:
        upstream.send(interim)
        upstream.start(A)
        assert client.head().status == 200 and client.chunk() == b"a"


def test_events_cut_and_joined_anywhere_lose_nothing(server: streamproxy.Server, provider: Provider) -> None:
    rng = random.Random(3)
    texts = [
        rng.choice(["Hello", " wörld", "\n", "data: ", "👋", "\r\n\r\n", "[DONE]", '"', "\\", "\u2028", "0\r\n\r\n"])
        + str(n) for n in range(60)
    ]
    body = b"".join(map(delta, texts)) + STOP + DONE
    for _ in range(20):
        places = sorted(rng.sample(range(1, len(body)), 40))
        wire = b"".join(chunk(body[a:b]) for a, b in zip([0, *places], [*places, len(body)])) + b"0\r\n\r\n"
        with Client(server).ask(PROMPT) as client, provider.take() as upstream:
            upstream.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            upstream.send(STREAM_HEAD)
            at = 0
            while at < len(wire):
                size = rng.choice([1, 2, 3, 7, 50, 400, 3000])
                upstream.send(wire[at : at + size])
                at += size
            assert client.head().status == 200 and client.body().decode() == "".join(texts)


def test_an_event_of_a_megabyte_passes(server: streamproxy.Server, provider: Provider) -> None:
    text = "ä" * 500000
    with Client(server).ask(PROMPT) as client, provider.take() as upstream:
        sender = threading.Thread(target=lambda: (upstream.start(delta(text)), upstream.finish()))
        sender.start()
        assert client.head().status == 200 and client.body().decode() == text
        sender.join()


def test_upstream_unreachable_is_502_without_its_address(names: dict[str, Any]) -> None:
    names["no-such-host.invalid"] = socket.gaierror(socket.EAI_NONAME, "no such name")  # whatever the resolver does
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    for upstream, reason in [(url, "connection refused"), ("http://no-such-host.invalid/v1", "its name was not found")]:
        with running(None, upstream=upstream) as server, Client(server).ask(PROMPT) as client:
            assert client.error() == (502, f"Upstream cannot be reached: {reason}.")


@pytest.mark.parametrize(("limit", "answer"), [
    ("first_byte_timeout", b""),
    ("first_byte_timeout", STREAM_HEAD),
    ("idle_timeout", STREAM_HEAD + chunk(ROLE)),
])
def test_upstream_too_slow_is_504(provider: Provider, limit: str, answer: bytes) -> None:
    with running(provider, **{limit: 0.2}) as server, Client(server).ask(PROMPT) as client, provider.take() as upstream:
        upstream.send(answer)
        status, sentence = client.error()
        assert status == 504 and sentence.startswith("Upstream took too long to ")
        assert upstream.gone()


def test_connecting_too_slow_is_504_also_where_no_packet_comes_back() -> None:
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))  # its queue full, it is silent
        for _ in range(4):
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(full.getsockname())
        server = stack.enter_context(
            running(None, upstream=f"http://127.0.0.1:{full.getsockname()[1]}", connect_timeout=0.3)
        )
        client = stack.enter_context(Client(server).ask(PROMPT))
        assert client.error() == (504, "Upstream took too long to connect.")
        wait_for(lambda: not server.snapshot()["streams"])


def test_silence_before_the_head_is_filled_with_pings_and_ended_by_an_event(provider: Provider) -> None:
    with running(provider, heartbeat=0.1) as server, Client(server).ask(PROMPT, **EVENTS) as client:
        with provider.take() as upstream:
            assert client.head().status == 200
            assert client.chunk() == client.chunk() == b": ping\n"
            upstream.send(error_answer(429, b'{"error": "Slow down"}'))
            assert client.body().replace(b": ping\n", b"") .endswith(b'event: error\ndata: {"error": "Slow down"}\n\n')


def test_upstream_that_refuses_a_large_body_unread_is_heard(provider: Provider) -> None:
    with running(provider, max_body=50_000_000) as server, Client(server) as client:
        client.ask({"prompt": "x" * 20_000_000})
        upstream = Peer(provider.listener.accept()[0])
        upstream.until(b"\r\n\r\n")
        upstream.send(error_answer(413, b'{"error": {"message": "Too large"}}', b"Connection: close\r\n"))
        upstream.sock.shutdown(socket.SHUT_WR)
        reading = threading.Thread(target=upstream.gone)
        reading.start()
        assert client.error() == (413, "Too large")
        reading.join()


def refuse_parameter(upstream: UpstreamPeer, name: str, words: str) -> None:
    said = {"error": {"message": words, "param": name, "code": "unsupported_parameter"}}
    document = json.dumps(said).encode()
    upstream.send(
        b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\n",
        b"Content-Length: %d\r\n\r\n" % len(document) + document,
    )


def test_default_that_upstream_refuses_by_name_is_left_out_then_and_from_then_on(
    server: streamproxy.Server, provider: Provider
) -> None:
    with Client(server).ask(PROMPT) as client, provider.take() as upstream:
        asked = json.loads(upstream.body)
        assert {"max_tokens", "temperature", "stream_options"} < set(asked)
        refuse_parameter(upstream, "max_tokens", "Use 'max_completion_tokens' instead.")
        upstream.read_request()  # on the same connection
        del asked["max_tokens"]
        assert json.loads(upstream.body) == {**asked, "max_completion_tokens": 400}
        refuse_parameter(upstream, "temperature", "Only the default (1) value is supported.")
        upstream.read_request()
        del asked["temperature"]
        assert json.loads(upstream.body) == {**asked, "max_completion_tokens": 400}
        upstream.start(A)
        upstream.finish()
        assert client.head().status == 200 and client.body() == b"a"
        client.ask(PROMPT)
        upstream.read_request()
        assert json.loads(upstream.body) == {**asked, "max_completion_tokens": 400}
        refuse_parameter(upstream, "messages", "This is not a default.")
        assert client.error() == (400, "This is not a default.")


def test_parameter_that_the_operator_set_is_not_left_out(provider: Provider) -> None:
    with running(provider, param="temperature=0.2") as server, Client(server).ask(PROMPT) as client:
        with provider.take() as upstream:
            refuse_parameter(upstream, "temperature", "Only the default (1) value is supported.")
            assert client.error() == (400, "Only the default (1) value is supported.")


def test_blanks_that_do_no_harm_are_taken_from_upstream(server: streamproxy.Server, provider: Provider) -> None:
    with Client(server).ask(PROMPT) as client, provider.take() as upstream:
        upstream.send(b"HTTP/1.1 200 OK\r\nContent-Type : text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        for data in (A, STOP, DONE):
            upstream.send(b"000%x  \r\n" % len(data), data, b"\r\n")
        upstream.send(b"0 \r\n\r\n")
        assert client.head().status == 200 and client.body() == b"a"


@pytest.mark.parametrize("fields", [b"", b"Content-Length: 0\r\n", b"Content-Type: application/json\r\n"])
@pytest.mark.parametrize(("method", "path"), [("DELETE", "/v1/responses/r1"), ("POST", "/v1/chat/completions")])
def test_api_answer_that_has_no_body_passes_without_one(
    provider: Provider, method: str, path: str, fields: bytes
) -> None:
    with running(provider, allow_model="*") as server:
        with Client(server).ask(b"", method=method, path=path) as client, provider.take() as upstream:
            upstream.send(b"HTTP/1.1 204 No Content\r\n" + fields + b"\r\n")
            head = client.head()
            assert head.status == 204 and not {"Transfer-Encoding", "Content-Length"} & head.fields.keys()
            client.ask(method="GET", path="/healthz")
            assert client.head().status == 200  # nothing stood between


@pytest.mark.parametrize("then", ["leaves the connection open", "closes", "resets"])
def test_refusal_of_upstream_that_reads_no_more_of_a_large_body_is_heard_at_once(provider: Provider, then: str) -> None:
    with running(provider, max_body=50_000_000, first_byte_timeout=DEADLINE) as server:
        with Client(server) as client:
            sender = threading.Thread(target=client.ask, args=({"prompt": "x" * 30_000_000},))
            sender.start()
            with Peer(provider.listener.accept()[0]) as upstream:
                upstream.until(b"\r\n\r\n")
                upstream.send(error_answer(413, b'{"error": {"message": "It is too large"}}'))
                if then == "closes":
                    upstream.sock.shutdown(socket.SHUT_WR)
                elif then == "resets":
                    wait_for(lambda: client.sock.recv(1, socket.MSG_PEEK))
                    upstream.reset()
                assert client.error() == (413, "It is too large")
            sender.join()
            assert server.snapshot()["warm connections"] == 0  # which has half a request on it


# 23 ------------------------------------------------------------------- Viewers


def test_head_leaves_after_one_heartbeat_in_sse_mode_and_errors_come_as_events() -> None:
    with Stage(streamproxy.EventAnswer("id"), heartbeat=5.0, connect_timeout=60.0) as stage:
        assert stage.seen(4.9) == b""
        assert stage.seen(5) == b"HEAD 7\r\n: ping\n\r\n"  # before upstream has said a word
        assert stage.seen(9.9) == b""
        assert stage.seen(10) == b"7\r\n: ping\n\r\n"
        stage.dialed(streamproxy.UpstreamError("Upstream cannot be reached: it is a test."))
        sent = stage.seen()
        assert sent.endswith(
            b'event: error\ndata: {"error": "Upstream cannot be reached: it is a test."}\n\n\r\n0\r\n\r\n'
        )
        assert stage.ended and stage.stream.viewer.intact and stage.stream.failure


def test_pings_come_only_in_silence() -> None:
    with Stage(streamproxy.EventAnswer(""), heartbeat=5.0) as stage:
        stage.begin()
        for second in (3, 6, 9):
            stage.upstream.send(chunk(delta("x")))
            assert b"ping" not in stage.seen(second)
        assert stage.seen(13.9) == b""
        assert stage.seen(14) == b"7\r\n: ping\n\r\n"


def test_eventsource_knows_its_id_before_the_first_ping() -> None:
    with Stage(streamproxy.EventAnswer("id7", reconnects=True), heartbeat=5.0, connect_timeout=60.0) as stage:
        assert stage.seen(5) == b"HEAD 10\r\nid: id7\n\n: ping\n\r\n"
        assert stage.seen(10) == b"7\r\n: ping\n\r\n"
        stage.begin()
        stage.upstream.send(chunk(delta("x")))
        assert b'id: id7\ndata: {"text": "x"}\n\n' in stage.seen()


def test_client_that_does_not_read_stops_upstream_being_read_and_nothing_is_lost() -> None:
    with Stage() as stage:
        stage.begin()
        stage.upstream.sock.setblocking(False)
        texts = [f"{n:06} " for n in range(50000)]
        wire, sent = b"".join(chunk(delta(text)) for text in texts) + chunk(DONE), 0
        for _ in range(500):  # until nobody takes any more
            with contextlib.suppress(BlockingIOError):
                sent += stage.upstream.sock.send(wire[sent : sent + 100000])
            stage.turn()
        assert sent < len(wire)
        assert 0 < len(stage.reader.pending) < streamproxy.READ_SIZE
        got = b""
        while not stage.ended:
            with contextlib.suppress(BlockingIOError):
                sent += stage.upstream.sock.send(wire[sent : sent + 100000])
            got += stage.seen()
        stage.reader.close()
        decoder = streamproxy.ChunkedDecoder()
        assert decoder.feed((got + stage.client.rest())[len("HEAD ") :]).decode() == "".join(texts)
        assert decoder.complete


def test_what_a_slow_client_has_not_taken_is_not_copied_each_time_it_takes_some() -> None:
    with Stage() as stage:
        stage.begin()
        stage.stream.record.append(b"x" * 20_000_000)
        stage.stream.viewer.open()
        assert stage.stream.viewer.blocked
        before = stage.reader.pending
        stage.client.sock.recv(1_000_000)
        stage.turn()
        after = stage.reader.pending
        assert 0 < len(after) < len(before) and memoryview(after).obj is memoryview(before).obj
        while stage.stream.viewer.blocked:
            stage.client.sock.recv(1_000_000)
            stage.turn()


def test_connection_sends_no_more_a_turn_than_its_socket_takes_at_once() -> None:
    sock = unittest.mock.Mock()
    sock.send = unittest.mock.Mock(side_effect=lambda data: min(len(data), 1000))
    connection = streamproxy.Connection(sock, "upstream")
    assert not connection.write(b"head", b"x" * 100_000)
    assert [bytes(call.args[0]) for call in sock.send.mock_calls] == [b"head", b"x" * 100_000]
    for _ in range(98):
        assert not connection.flush()
    assert connection.flush() and sock.send.call_count == 101 and connection.flush()


def large_call(stage: Stage) -> None:
    """Have the stage's request be larger than what sockets hold."""
    stage.stream.call = streamproxy.Call("/chat/completions", b"x" * 20_000_000)


@pytest.mark.parametrize("rest", ["all in one", "the end a moment later"])
def test_connection_is_not_used_again_where_upstream_answered_before_it_had_all_of_the_request(rest: str) -> None:
    with Stage() as stage:
        large_call(stage)
        upstream = stage.connect()
        upstream.until(b"\r\n\r\n")
        upstream.send(stage.head, chunk(delta("a", "stop")))
        stage.turn()
        assert stage.seen() == b"HEAD 1\r\na\r\n"
        upstream.send(chunk(DONE), b"0\r\n\r\n" if rest == "all in one" else b"")
        stage.turn()
        assert stage.ended and stage.stream.viewer.intact and upstream.gone() and not stage.hub.pool


def test_upstream_is_not_read_beyond_what_the_client_takes_while_it_is_still_sent_to() -> None:
    with Stage() as stage:
        large_call(stage)
        upstream = stage.connect()
        upstream.until(b"\r\n\r\n")
        upstream.send(stage.head)
        stage.turn()
        stage.upstream = upstream
        stage.block()
        upstream.sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                upstream.sock.send(chunk(delta("y" * 30000)))
        for _ in range(20):  # we go on to send, and to be answered
            upstream.sock.recv(200_000)
            stage.turn()
        assert len(stage.stream.record.take()) < streamproxy.READ_SIZE
        upstream.sock.settimeout(DEADLINE)


def test_upstream_is_not_read_beyond_what_a_client_takes_of_a_stream_that_just_goes_on() -> None:
    with Stage(streamproxy.PassedAnswer(stream=True)) as stage:
        stage.begin()
        sent = 0
        while not stage.stream.viewer.blocked:
            stage.upstream.send(chunk(C))
            sent += 1
            stage.turn()
        held = len(stage.reader.pending)
        stage.upstream.send(chunk(C) * 100)
        stage.turn(3)
        assert len(stage.reader.pending) == held and not stage.stream.record.fresh
        decoder, body, head = streamproxy.ChunkedDecoder(), b"", len(b"HEAD ")
        while len(body) < len(C) * (sent + 100):
            body += decoder.feed(stage.seen()[head:])
            head = 0
        assert body == C * (sent + 100)


def test_connection_on_which_upstream_changes_the_protocol_is_not_used_again() -> None:
    with Stage() as stage:
        upstream = stage.connect()
        upstream.send(b"HTTP/1.1 101 Switching Protocols\r\nContent-Length: 0\r\n\r\n")
        stage.turn()
        assert stage.ended and upstream.gone() and not stage.hub.pool


def test_truncated_after_back_pressure_still_gives_all_text_that_came() -> None:
    with Stage() as stage:
        stage.begin()
        total = 0
        while not stage.stream.viewer.blocked:
            stage.upstream.send(chunk(delta("x" * 30000)))
            total += 30000
            stage.turn()
        stage.upstream.sock.close()
        while not stage.ended:
            stage.client.more()
            stage.turn()
        stage.reader.close()
        got = stage.client.rest()
        assert got.count(b"x") == total and not got.endswith(b"0\r\n\r\n")
        assert stage.stream.failure and stage.stream.failure.ending == "truncated"


@pytest.mark.parametrize("end", ["silence", "[DONE]", "cut"])
def test_settled_while_blocked_still_ends_a_moment_after_the_client_reads(end: str) -> None:
    with Stage(head=STREAM_HEAD + chunk(delta("x" * 600_000)) + chunk(delta("y", "stop"))) as stage:
        upstream = stage.connect()
        upstream.sock.setblocking(False)
        left = stage.head
        while left or not stage.stream.viewer.blocked:  # until the end, too, was read
            with contextlib.suppress(BlockingIOError):
                left = left[upstream.sock.send(left) :]
            stage.turn()
        while stage.stream.answer.state < streamproxy.Answer.ENDING:
            stage.client.more()
            stage.turn()
        blocked = stage.stream.viewer.blocked
        stage.now += 5.0
        stage.turn(2)
        assert stage.ended != blocked
        if end == "[DONE]":
            upstream.send(chunk(DONE))
        elif end == "cut":
            upstream.sock.close()
        stage.unblock()
        stage.turn(2)
        assert stage.ended or end == "silence"
        stage.now += 1.0
        stage.turn(2)
        assert stage.ended and stage.stream.viewer.intact and not stage.stream.failure


# 24 ------------------------------------------------------------------- Streams


# ---------------------------------------------------------------- on a clock of the test's own


def test_stream_moves_piece_by_piece() -> None:
    with Stage() as stage:
        stage.begin()
        stage.upstream.send(chunk(ROLE))
        assert stage.seen() == b""  # nothing leaves before there is text
        stage.upstream.send(chunk(delta("a")))
        assert stage.seen() == b"HEAD 1\r\na\r\n"
        stage.upstream.send(chunk(delta("b")), chunk(delta("cd")))
        assert stage.seen() == b"3\r\nbcd\r\n"  # what arrived together leaves together
        stage.upstream.send(chunk(STOP), chunk(DONE))
        assert stage.seen() == b"0\r\n\r\n"
        assert stage.ended and stage.stream.viewer.intact and not stage.stream.failure


def test_stream_takes_all_that_came_with_the_head() -> None:
    texts = [f"{n:05} " for n in range(1200)]
    with Stage(head=STREAM_HEAD + b"".join(chunk(delta(text)) for text in texts)) as stage:
        stage.begin()  # 100 KB: more than one read
        got = b"".join(stage.seen() for _ in range(20))
        assert streamproxy.ChunkedDecoder().feed(got[len("HEAD ") :]).decode() == "".join(texts)


def test_total_clock() -> None:
    with Stage(total_timeout=100.0) as stage:
        stage.begin()
        for second in range(0, 100, 20):
            stage.upstream.send(chunk(delta("x")))
            stage.at(second)
        stage.at(99.9)
        assert not stage.ended
        stage.at(100)
        assert stage.ended and stage.stream.failure


def test_clocks_without_limits_never_go_off() -> None:
    names = ["connect_timeout", "first_byte_timeout", "idle_timeout", "total_timeout", "client_timeout", "heartbeat"]
    with Stage(streamproxy.EventAnswer("id"), **dict.fromkeys(names, 0.0)) as stage:
        stage.begin()
        stage.upstream.send(chunk(delta("x")))
        assert stage.seen()
        assert stage.seen(1e7) == b"" and not stage.ended


def test_fault_in_one_stream_is_told_to_its_owner_and_the_loop_goes_on() -> None:
    with Stage() as stage:
        stage.begin()
        stage.stream.answer.feed = None  # type: ignore[assignment,method-assign]
        stage.upstream.send(chunk(delta("x")))
        stage.turn()
        assert stage.ended and stage.stream.failure and stage.stream.failure.status == 500
        assert [type(error) for error in stage.reader.faults] == [TypeError]
        assert re.fullmatch(r"fault in the loop: TypeError in line \d+", stage.lines.errors[0])
        seen: list[int] = []
        stage.hub.loop.post(lambda: seen.append(1))
        stage.turn()
        assert seen == [1]


# ---------------------------------------------------------------- clients that leave


@pytest.mark.parametrize("how", ["close", "reset", "half"])
@pytest.mark.parametrize("stage", ["before the head", "before the first event", "after the role", "mid-stream"])
@pytest.mark.parametrize("mode", ["text", "events"])
def test_client_leaves_and_upstream_is_closed(
    server: streamproxy.Server, provider: Provider, caplog: pytest.LogCaptureFixture, mode: str, stage: str, how: str
) -> None:
    client = Client(server).ask(PROMPT, **(EVENTS if mode == "events" else {}))
    with client, provider.take() as upstream:
        if stage != "before the head":
            upstream.start(*{"before the first event": [], "after the role": [ROLE], "mid-stream": [ROLE, A]}[stage])
        if stage == "mid-stream":
            client.head()
            client.chunk()
        leave(client, how)
        assert upstream.gone()
    entry = log_entries(caplog, 1)[0]
    assert (entry["ending"], entry["status"]) == ("disconnect", 200 if stage == "mid-stream" else 499)


def test_client_leaves_while_upstream_does_not_take_the_request(provider: Provider) -> None:
    with running(provider, max_body=50_000_000) as server:
        client = Client(server).ask({"prompt": "x" * 20_000_000})
        upstream = Peer(provider.listener.accept()[0])  # reads nothing
        client.sock.close()
        assert upstream.gone()
        wait_for(lambda: not server.snapshot()["connections"])


def test_client_leaves_behind_a_request_sent_ahead(server: streamproxy.Server, provider: Provider) -> None:
    client = Client(server).ask(PROMPT)
    with provider.take() as upstream:
        client.ask(PROMPT)
        client.sock.close()
        assert upstream.gone()


def test_client_that_sends_without_end_while_its_answer_is_on_its_way_is_cut(
    server: streamproxy.Server, provider: Provider, caplog: pytest.LogCaptureFixture
) -> None:
    with Client(server).ask(PROMPT) as client, provider.take() as upstream:
        with contextlib.suppress(ConnectionError):
            for _ in range(100):
                client.send(b"x" * 10000)
        assert upstream.gone()
    assert log_entries(caplog, 1)[0]["ending"] == "aborted"


# 25 ------------------------------------------------------------------- Kept answers


class KeptStage(StillServer):
    """A server that keeps answers, an upstream that is asked by hand, and clients that come and go."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(resume=20.0, **settings)

    def asks(self, how: str, key: str = "k", last: str = "", comes_back: bool = False, **fields: str) -> Client:
        """A client that asks for an answer: by POST in one of three modes, or as an EventSource."""
        client = self.client(comes_back)
        fields.update({"Last-Event-ID": last} if last else {})
        fields.update(EVENTS if how in ("events", "source") else {})
        if how == "source":
            client.ask(method="GET", path="/?prompt=Say+hello", **fields)
        elif how == "v1":
            client.ask(CHAT, path="/v1/chat/completions", Idempotency_Key=key, **fields)
        else:
            client.ask(PROMPT, Idempotency_Key=key, **fields)
        self.turn(4)
        return client

    def plain(self, method: str, path: str, **fields: str) -> Head:
        client = self.client().ask(method=method, path=path, **fields)
        self.turn(4)
        return client.head()

    def taken(self, client: Client) -> bytes:
        """What the client has been sent."""
        self.turn(4)
        client.sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while client.more():
                pass
        client.sock.settimeout(DEADLINE)
        return client.seen

    def leaves(self, client: Client) -> None:
        client.sock.close()
        self.turn(4)


def kept_events(server: streamproxy.Server, event: str) -> float:
    return server.hub.metrics.values["kept_events_total"][event,]


CLOSING_HEAD = STREAM_HEAD[:-2] + b"Connection: close\r\n\r\n"
CHAT = {"model": streamproxy.DEFAULT_MODEL, "messages": [{"role": "user", "content": "hi"}], "stream": True}


def unchunked(data: bytes) -> tuple[dict[str, str], bytes, bool]:
    """The fields and the body of what came of an answer, and whether that is its end."""
    head, _, rest = data.partition(b"\r\n\r\n")
    fields = dict(line.split(": ", 1) for line in head.decode("latin-1").split("\r\n")[1:] if ": " in line)
    decoder = streamproxy.ChunkedDecoder()
    return fields, decoder.feed(rest), decoder.complete


def answer_parts() -> list[bytes]:
    return [chunk(part) for part in (delta("Hé"), delta("llo\n\nid: 1"), delta("ᄐ" * 9), STOP, DONE)] + [b"0\r\n\r\n"]


def complete_answer(stage: KeptStage, how: str) -> bytes:
    client = stage.asks(how, "whole")
    upstream = stage.connect()
    upstream.send(CLOSING_HEAD, *answer_parts())
    stage.turn(4)
    return unchunked(stage.taken(client))[1]


def test_kept_answer_that_is_a_document_as_large_as_is_kept_ends_once() -> None:
    with KeptStage() as stage:
        client = stage.asks("v1")
        upstream, data = stage.connect(), whole({**COMPLETION, "x": "y" * (streamproxy.MAX_KEPT_SIZE - 100)})
        upstream.sock.setblocking(False)
        while data:
            with contextlib.suppress(BlockingIOError):
                data = data[upstream.sock.send(data) :]
            stage.turn()
        stage.taken(client)
        assert (stage.server.answers.running, stage.server.limits.total) == (0, 0)


def test_kept_answer_that_ends_as_it_gets_room_ends_once() -> None:
    with KeptStage(resume_memory=150_000, idle_timeout=0.0) as stage:
        reader, other = stage.asks("v1", "reader"), stage.asks("text", "other")
        mine, theirs = stage.connect(), stage.connect()
        theirs.send(STREAM_HEAD)
        stage.leaves(other)
        filling = next(kept for kept in stage.server.answers._by_id.values() if kept.claim.key == "other")
        while not filling.pending:
            theirs.send(chunk(delta("x" * 5000)))
            stage.turn(2)
        mine.send(whole(COMPLETION))
        stage.taken(reader)
        assert (stage.server.answers.running, stage.server.limits.total) == (1, 1)


def test_kept_answers_that_wait_for_room_let_the_loop_rest() -> None:
    with KeptStage(resume_memory=250_000, idle_timeout=0.0, heartbeat=0.0) as stage:
        clients = [stage.asks("text", key) for key in "ab"]
        upstreams = [stage.connect() for _ in clients]
        for upstream in upstreams:
            upstream.send(STREAM_HEAD)
            upstream.sock.setblocking(False)
        for _ in range(2000):
            for upstream in upstreams:
                with contextlib.suppress(BlockingIOError):
                    upstream.sock.send(chunk(delta("x" * 3000)))
            stage.turn()
        assert stage.server.answers.waiting
        clients[0].sock.recv(400_000)
        stage.turn(100)
        assert not stage.hub.loop._begun


@pytest.mark.parametrize("how", ["text", "events", "source", "v1"])
def test_kept_answer_cut_after_each_byte_is_made_whole_and_asked_for_once(how: str) -> None:
    with KeptStage() as stage:
        whole = complete_answer(stage, how)
        id = re.findall(rb"(?m)^id: (.*)\.", whole)
        whole = whole.replace(id[0], b"ID") if id else whole
        for size in range(1, len(whole) + 1):
            key = f"key-{size}"
            client = stage.asks(how, key)
            upstream = stage.connect()
            upstream.send(CLOSING_HEAD, *answer_parts()[: 1 + size % 6])
            fields, came, _ = unchunked(stage.taken(client))
            name = fields["Stream-Id"]
            came = came.replace(name.encode(), b"ID")[:size]
            if how in ("events", "source"):  # what was not whole is dropped by whoever reads events
                came = came[: came.rfind(b"\n\n") + 2 if b"\n\n" in came else 0]
                last = f"{name}.{len(re.findall(b'(?m)^id: ', came))}"
            else:
                last = f"{name}.{len(came)}"
            stage.leaves(client)
            with contextlib.suppress(OSError):  # it is not heard behind [DONE]
                upstream.send(*answer_parts()[1 + size % 6 :])
            if size % 2:
                stage.turn(4)
            if size % 3 or how == "source":
                again = stage.asks(how, key, last)
            else:
                again = stage.client().ask(method="GET", path=f"/streams/{name}", Last_Event_ID=last)
            data = stage.taken(again)
            if how == "source" and came == whole and data.startswith(b"HTTP/1.1 204 "):
                continue
            fields, rest, ended = unchunked(data)
            assert fields["Stream-Id"] == name and ended
            assert came + rest.replace(name.encode(), b"ID") == whole, (size, came, rest)
        assert not stage.jobs and stage.server.limits.total == 0


class Returner:
    """A client of a kept answer that reads a little at a time, is cut at random, and comes back for the rest."""

    def __init__(self, stage: KeptStage, how: str, rng: random.Random) -> None:
        self.stage, self.how, self.rng = stage, how, rng
        self.got, self.name, self.ended = b"", "", False
        self.client = stage.asks(how)

    def read(self) -> None:
        if self.ended:
            return
        self.client.sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            self.client.seen += self.client.sock.recv(self.rng.choice([1, 50, 5000, 400_000]))
        if b"\r\n\r\n" not in self.client.seen:
            return
        fields, body, self.ended = unchunked(self.client.seen)
        self.name = fields["Stream-Id"]
        if self.ended or self.rng.random() < 0.2:
            if self.how == "events":
                body = body[: body.rfind(b"\n\n") + 2 if b"\n\n" in body else 0]
            self.got += body
            if not self.ended:
                self.stage.leaves(self.client)
                count = len(re.findall(b"(?m)^id: ", self.got)) if self.how == "events" else len(self.got)
                self.client = self.stage.asks(self.how, last=f"{self.name}.{count}")


@pytest.mark.parametrize("how", ["text", "events", "v1"])
def test_kept_answer_fuzzed_comes_whole_to_two_slow_clients_that_are_cut_again_and_again(how: str) -> None:
    for seed in range(12):
        rng = random.Random(seed)
        with KeptStage() as stage:
            returners = [Returner(stage, how, rng), Returner(stage, how, rng)]
            pieces = ["".join(rng.choices("aé\n\U0001f600 :id", k=rng.choice([1, 30, 9000]))) for _ in range(40)]
            parts = [chunk(delta(piece)) for piece in pieces] + [chunk(STOP), chunk(DONE) + b"0\r\n\r\n"]
            upstream = stage.connect()
            upstream.send(CLOSING_HEAD)
            stage.turn(2)
            while parts or not all(returner.ended for returner in returners):
                if parts and rng.random() < 0.5:
                    upstream.send(parts.pop(0))
                stage.turn(2)
                rng.choice(returners).read()
            one, two = (returner.got.replace(returner.name.encode(), b"ID") for returner in returners)
            assert one == two and not stage.jobs
            if how == "text":
                assert one.decode() == "".join(pieces)
            elif how == "v1":
                assert one == b"".join(delta(piece) for piece in pieces) + STOP + DONE
            else:
                events = streamproxy.EventParser().feed(one)
                assert [event.last_event_id for event in events] == [f"ID.{n + 1}" for n in range(len(events))]
                shown = [json.loads(event.data)["text"] for event in events if event.type == "message"]
                assert "".join(shown) == "".join(pieces)


def test_kept_answer_says_its_id_and_one_without_a_key_has_none() -> None:
    with KeptStage(instance="a", heartbeat=5.0) as stage:
        client = stage.client().ask(PROMPT)
        stage.turn(4)
        upstream = stage.connect()
        upstream.send(STREAM_HEAD, chunk(delta("x")))
        assert b"Stream-Id" not in stage.taken(client)
        stage.leaves(client)
        assert upstream.gone() and stage.server.limits.total == 0

        client = stage.asks("source")
        stage.connect()
        stage.at(6)  # a ping brings the id before the first word
        fields, body, _ = unchunked(stage.taken(client))
        assert re.fullmatch("a-[0-9a-f]{32}", fields["Stream-Id"])
        assert body == b"id: %b.0\n\n: ping\n" % fields["Stream-Id"].encode()
        stage.leaves(client)
        again = stage.asks("source", last=fields["Stream-Id"] + ".0")
        assert unchunked(stage.taken(again))[:2][1] == body and not stage.jobs


def test_kept_answer_attached_before_its_head_after_its_failure_and_by_two_at_once() -> None:
    with KeptStage() as stage:
        first, second = stage.asks("text"), stage.asks("text")
        assert len(stage.jobs) == 1 and stage.server.limits.total == 1
        upstream = stage.connect()
        upstream.send(STREAM_HEAD, chunk(delta("x")))
        stage.turn(4)
        old = stage.client().ask(PROMPT, version="1.0", Idempotency_Key="k")
        stage.turn(4)
        assert unchunked(stage.taken(first))[1] == unchunked(stage.taken(second))[1] == b"x"
        upstream.sock.close()
        stage.turn(4)
        late = stage.asks("text")
        for client in (first, second, late):
            data = stage.taken(client)
            assert unchunked(data)[1:] == (b"x", False) and client.gone()
        assert old.gone()

        paid = stage.asks("text", "paid"), stage.asks("text", "paid")
        stage.connect().sock.close()
        stage.turn(4)
        for client in (*paid, stage.asks("text", "paid")):
            assert client.head().status == 502
        assert not stage.jobs
        stage.asks("text", "unpaid")
        upstream = stage.connect()
        upstream.send(error_answer(429, b'{"error": {"message": "slow down"}}', b"Connection: close\r\n"))
        stage.turn(4)
        stage.asks("text", "unpaid")  # it cost nothing: it is asked for again
        assert len(stage.jobs) == 1


def test_kept_answer_that_is_not_what_was_asked_for() -> None:
    with KeptStage() as stage:
        client = stage.asks("text")
        upstream = stage.connect()
        upstream.send(STREAM_HEAD, chunk(delta("abc")))
        name = unchunked(stage.taken(client))[0]["Stream-Id"]
        other = stage.client().ask({"prompt": "else"}, Idempotency_Key="k")
        stage.turn(4)
        assert other.head().status == 422
        assert stage.asks("v1").head().status == stage.asks("events").head().status == 422
        for last in ("x", f"{name}.4", f"{name}.-1", f"{name}.", f"{name}.1.1", "0" * 32 + ".1", f"{name}.٣", "9" * 99):
            assert stage.asks("text", last=last.encode().decode("latin-1")).head().status == 410, last
            field = {"Last-Event-ID": last.encode().decode("latin-1")}
            assert stage.plain("GET", f"/streams/{name}", **field).status == 410
        assert stage.asks("text", "new", f"{name}.1").head().status == 410  # it may have been before a crash
        assert stage.plain("GET", f"/streams/{name[:-1]}x").status == 404
        assert stage.plain("GET", "/streams/x", **EVENTS).status == 204
        assert stage.asks("source", last="x.1").head().status == 204
        for key in ("", "a b", "ü", "x" * 256):
            assert stage.asks("text", key).head().status == 400
        assert stage.plain("PUT", "/streams").fields["Allow"] == "DELETE, OPTIONS"
        # Another's is as unknown as one that never was.
        theirs = stage.plain("GET", f"/streams/{name}", X_Forwarded_For="192.0.2.1")
        assert theirs.status == 404
        assert stage.plain("DELETE", f"/streams/{name}", X_Forwarded_For="192.0.2.1").status == 204
        stage.asks("text", X_Forwarded_For="192.0.2.1")
        assert len(stage.jobs) == 1 and stage.server.answers.running == 2
    with StillServer() as stage:
        client = stage.client().ask(method="GET", path="/streams/x")
        stage.turn(4)
        assert client.head().status == 404


def test_kept_answer_stopped_is_not_dropped() -> None:
    with KeptStage() as stage:
        client, events = stage.asks("text"), stage.asks("events", "e")
        upstream, second = stage.connect(), stage.connect()
        upstream.send(STREAM_HEAD, chunk(delta("abc")))
        second.send(STREAM_HEAD, chunk(delta("abc")))
        name = unchunked(stage.taken(client))[0]["Stream-Id"]
        stage.taken(events)
        for _ in range(2):
            assert stage.plain("POST", f"/streams/{name}/stop").status == 204
        assert upstream.gone() and client.gone() and unchunked(client.seen)[1:] == (b"abc", False)
        assert stage.plain("DELETE", "/streams", Idempotency_Key="e").status == 204
        assert second.gone() and b"event: error" in unchunked(stage.taken(events))[1]
        assert stage.asks("text").head().status == stage.asks("events", "e").head().status == 410
        assert stage.plain("GET", f"/streams/{name}").status == 410 and not stage.jobs
        assert stage.plain("DELETE", "/streams").status == 400
        # One that overtakes its POST; and what it was for is over then.
        assert stage.plain("DELETE", "/streams", Idempotency_Key="early").status == 204
        for _ in range(2):  # and what is sent again for its sake
            assert stage.asks("text", "early").head().status == 410 and not stage.jobs
        assert stage.plain("DELETE", "/streams", Idempotency_Key="never").status == 204
        stage.at(61)
        stage.asks("text", "never")
        assert len(stage.jobs) == 1
        with unittest.mock.patch.object(streamproxy, "MAX_STOPS", 3):
            for number in range(9):
                stage.plain("DELETE", "/streams", Idempotency_Key=f"{number}")
        assert len(stage.server.answers._stops) == 3 and kept_events(stage.server, "stopped") == 2
        assert [line.get("ending") for line in stage.lines.requests if line.get("stream")][:2] == ["aborted"] * 2


def test_kept_answer_without_clients_goes_on_for_so_long_and_is_kept_for_so_long() -> None:
    with KeptStage(heartbeat=0.0, idle_timeout=0.0) as stage:
        client = stage.asks("text")
        upstream = stage.connect()
        upstream.send(STREAM_HEAD, chunk(delta("abc")))
        name = unchunked(stage.taken(client))[0]["Stream-Id"]
        stage.leaves(client)
        stage.at(15)
        client = stage.asks("text", last=f"{name}.1")
        assert unchunked(stage.taken(client))[1] == b"bc"
        stage.at(30)
        stage.leaves(client)
        stage.at(49)
        assert stage.server.answers.running == stage.server.limits.total == 1
        stage.at(51)
        assert upstream.gone() and stage.server.answers.running == stage.server.limits.total == 0
        line = stage.lines.requests[-1]
        assert (line["ending"], line["stream"], line["pieces"]) == ("abandoned", name, 1)
        assert stage.lines.requests[-2]["from"] == 1 and "from" in stage.lines.requests[-2]
        assert unchunked(stage.taken(stage.asks("text")))[1:] == (b"abc", False)
        stage.at(72)
        assert len(stage.server.answers) == stage.server.answers.used == 0
        assert stage.plain("GET", f"/streams/{name}").status == 404


def test_kept_record_reads_as_bytes_in_a_row_do() -> None:
    for seed in range(20):
        rng, record, made = random.Random(seed), streamproxy.KeptRecord(), b""
        for number in range(rng.choice([5, 200])):
            for _ in range(rng.choice([0, 1, 3])):
                record.loose.append(b"id: %d.\n\n" % number + b"x" * rng.choice([0, 9, 900, 99_000]))
            made += b"".join(record.loose)
            assert record.end == len(made)
            record.settle()
            if rng.random() < 0.1:
                record.forget(rng.randint(0, len(record)))
            assert len(record) == len(made) - record.begin
            for at in (record.begin, len(made), rng.randint(record.begin, len(made))):
                assert record.read(at) == made[at : at + streamproxy.READ_SIZE]
            mark = b"id: %d.\n" % rng.randint(0, number)
            found = made.find(mark, record.begin)
            assert record.place_behind(mark) == (found + len(mark) + 1 if found >= 0 else -1)


def test_kept_answer_is_read_as_far_as_there_is_room() -> None:
    """A client that is fast does not wait for a slow one, until the record is full; then what both have had goes."""
    with unittest.mock.patch.object(streamproxy, "MAX_KEPT_SIZE", 300_000), KeptStage() as stage:
        client = stage.asks("text")
        upstream = stage.connect()
        upstream.send(STREAM_HEAD, chunk(delta("abc")))
        name = unchunked(stage.taken(client))[0]["Stream-Id"]
        kept = next(iter(stage.server.answers._by_id.values()))
        stage.leaves(client)
        sent = 3
        while not kept.pending:  # nobody reads
            upstream.send(chunk(delta("x" * 30000)))
            stage.turn(2)
            sent += 30000
        assert 300_000 <= kept.record.end <= sent and kept.record.begin == 0 and kept.stream.viewer.blocked
        client = stage.asks("text", last=f"{name}.1")
        body = b""
        while sent > 1 + len(body):
            body = unchunked(stage.taken(client))[1]
        assert not kept.pending and kept.record.begin and set(body[2:]) == {ord("x")}
        for _ in range(20):  # with a client, it may be longer than the record
            upstream.send(chunk(delta("y" * 30000)))
            stage.taken(client)
            assert len(kept.record) < 400_000
        assert stage.asks("text").head().status == 410  # the begin is lost, not the end
        assert stage.plain("GET", f"/streams/{name}", Last_Event_ID=f"{name}.1", **EVENTS).status == 204
        assert unchunked(stage.taken(stage.asks("text", last=f"{name}.{kept.record.end - 5}")))[1] == b"y" * 5
        upstream.send(*[chunk(STOP), chunk(DONE), b"0\r\n\r\n"])
        assert unchunked(stage.taken(client))[2]


def test_kept_answers_share_a_memory_in_which_the_oldest_that_ended_makes_room() -> None:
    with KeptStage(resume_memory=5 * (streamproxy.RECORD_COST + 100) + streamproxy.READ_SIZE) as stage:
        for number in range(10):
            client = stage.asks("text", str(number))
            stage.connect().send(CLOSING_HEAD, *answer_parts())
            assert unchunked(stage.taken(client))[2] and "Stream-Id" in unchunked(client.seen)[0]
        answers = stage.server.answers
        assert answers.used <= answers.memory and 4 <= len(answers) < 10
        stage.asks("text", "9")
        assert not stage.jobs
        before = len(answers)
        clients = [stage.asks("text", f"more {number}".replace(" ", "-")) for number in range(20)]
        for _ in clients:
            stage.connect().send(STREAM_HEAD, chunk(delta("x")))
        named = ["Stream-Id" in unchunked(stage.taken(client))[0] for client in clients]
        assert any(named) and not all(named) and len(answers) <= before + 1
        assert answers.used <= answers.memory


def test_kept_answers_that_wait_for_room_go_on_once_others_are_forgotten() -> None:
    with KeptStage(resume_memory=150_000, idle_timeout=0.0) as stage:
        first, second = stage.asks("text", "first"), stage.asks("text", "second")
        upstreams = stage.connect(), stage.connect()
        for upstream in upstreams:
            upstream.send(CLOSING_HEAD, chunk(delta("x")))
        stage.taken(first)
        stage.taken(second)
        kepts = list(stage.server.answers._by_id.values())
        stage.leaves(first)
        stage.at(15)
        stage.leaves(second)  # which is so kept for longer
        while not kepts[0].pending or not kepts[1].pending:
            for upstream in upstreams:
                upstream.send(chunk(delta("x" * 5000)))
                stage.turn(2)
        upstreams[1].send(chunk(STOP), chunk(DONE), b"0\r\n\r\n")
        stage.turn(4)
        assert not kepts[1].over  # nobody reads, and there is no room
        stage.at(21)
        stage.turn(4)
        assert kepts[0].over and kepts[1].over and kepts[1].stream.viewer.intact and not kepts[1].stream.failure


def test_kept_answer_that_is_read_goes_on_where_others_have_filled_the_memory() -> None:
    with KeptStage(resume_memory=150_000, idle_timeout=0.0) as stage:
        clients = [stage.asks("text", key) for key in ("read", "unread", "again")]
        upstreams = [stage.connect() for _ in clients]
        for upstream in upstreams:
            upstream.send(STREAM_HEAD, chunk(delta("abc")))
        names = [unchunked(stage.taken(client))[0]["Stream-Id"] for client in clients]
        stage.leaves(clients[1])
        stage.leaves(clients[2])
        read, unread, again = stage.server.answers._by_id.values()
        for upstream, kept in zip(upstreams[1:], (unread, again)):
            while not kept.pending:
                upstream.send(chunk(delta("x" * 5000)))
                stage.turn(4)
        for _ in range(20):
            upstreams[0].send(chunk(delta("y" * 20)))
            assert len(unchunked(stage.taken(clients[0]))[1]) % 20 == 3  # none of it waits
        assert unchunked(clients[0].seen)[1] == b"abc" + b"y" * 400 and not read.pending
        # One that comes back, and has had all that there is.
        client = stage.asks("text", "again", f"{names[2]}.{again.record.end}")
        upstreams[2].send(chunk(delta("z" * 20)))
        body = unchunked(stage.taken(client))[1]
        assert body[-20:] == b"z" * 20 and set(body[:-20]) <= {ord("x")} and not again.pending
        assert unread.pending and stage.server.answers.used < 150_000 + 3 * streamproxy.READ_SIZE


def test_kept_answer_as_the_log_and_the_numbers_have_it() -> None:
    with KeptStage() as stage:
        first = stage.asks("text")
        upstream = stage.connect()
        stage.at(1)
        waits = stage.asks("text")
        stage.at(2)
        upstream.send(STREAM_HEAD, chunk(delta("abc")))
        stage.taken(first)
        stage.at(5)
        late = stage.asks("text")
        upstream.send(chunk(STOP), chunk(DONE), b"0\r\n\r\n")
        for client in (first, waits, late):
            assert unchunked(stage.taken(client))[1:] == (b"abc", True)
        told = [(line["from"], line["ttft"]) for line in stage.lines.requests]
        assert told == [(None, 2.0), (0, 1.0), (0, None)]
        numbers = stage.hub.metrics.histograms
        for name in ("time_to_first_token_seconds", "overhead_seconds"):
            assert sum(numbers[name].counts) == 1, name
        assert numbers["time_to_first_token_seconds"].sum == 2.0

        def kept() -> list[float]:
            values = {name: stage.hub.metrics.values[name] for name in ("kept_answers", "kept_bytes")}
            stage.server.answers.count_into(stage.hub.metrics)
            states = [values["kept_answers"][state,] for state in ("watched", "alone", "ended")]
            return [*states, values["kept_bytes"][()], kept_events(stage.server, "attached")]

        assert kept() == [0, 0, 1, streamproxy.RECORD_COST + 3, 2]
        other = stage.asks("text", "other")
        assert kept() == [1, 0, 1, 2 * streamproxy.RECORD_COST + 3, 2]
        stage.leaves(other)
        assert kept() == [0, 1, 1, 2 * streamproxy.RECORD_COST + 3, 2]
        stage.at(26)
        assert kept() == [0, 0, 1, streamproxy.RECORD_COST, 2] and kept_events(stage.server, "abandoned") == 1


def test_kept_answer_asked_for_twice_at_once_takes_one_place_and_is_asked_for_once() -> None:
    with KeptStage(max_streams=2) as stage:
        body = json.dumps(PROMPT).encode()
        clients = [stage.client(), stage.client()]
        for client in clients:  # both are let in before there is an answer
            client.sock.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                                b"Idempotency-Key: k\r\nContent-Length: %d\r\n\r\n" % len(body))  # fmt: skip
            stage.turn(4)
        assert stage.server.limits.total == 2
        for client in clients:
            client.sock.sendall(body)
            stage.turn(4)
        assert len(stage.jobs) == stage.server.limits.total == 1


def test_kept_answer_s_large_piece_reaches_who_keeps_up_once() -> None:
    with KeptStage() as stage:
        client = stage.asks("text")
        upstream = stage.connect()
        upstream.send(STREAM_HEAD, chunk(delta("abc")))
        assert unchunked(stage.taken(client))[1] == b"abc"
        kept = next(iter(stage.server.answers._by_id.values()))
        assert len(kept.keeping_up) == 1
        large = "x" * (2 * streamproxy.READ_SIZE)
        upstream.send(chunk(delta(large)), chunk(delta("def", "stop") + DONE), b"0\r\n\r\n")
        assert unchunked(stage.taken(client))[1:] == (b"abc" + large.encode() + b"def", True)


def test_kept_answer_ends_for_one_client_alone_whose_own_part_fails() -> None:
    with KeptStage() as stage:
        first, second = stage.asks("text"), stage.asks("text")
        upstream = stage.connect()
        upstream.send(STREAM_HEAD, chunk(delta("abc")))
        stage.taken(first)
        next(iter(stage.server.clients)).on_fault(ValueError("a fault"))
        stage.turn(4)
        upstream.send(chunk(delta("def")), chunk(STOP), chunk(DONE), b"0\r\n\r\n")
        ends = {unchunked(stage.taken(client))[1:] for client in (first, second)}
        assert ends == {(b"abc", False), (b"abcdef", True)}


def test_kept_answer_that_is_a_document_has_a_rest_of_the_right_length() -> None:
    with KeptStage() as stage:
        stage.leaves(stage.asks("v1"))
        document = json.dumps(COMPLETION).encode()
        stage.connect().send(whole(COMPLETION))
        stage.turn(4)
        kept = next(iter(stage.server.answers._by_id.values()))
        for at in (0, 1, len(document) - 1, len(document)):
            head, _, rest = stage.taken(stage.asks("v1", last=f"{kept.id}.{at}")).partition(b"\r\n\r\n")
            assert b"\r\nContent-Length: %d\r\n" % len(rest) in head and document[:at] + rest == document
        assert not stage.jobs


def test_kept_answer_that_an_eventsource_has_had_is_204_for_it() -> None:
    with KeptStage() as stage:
        client = stage.asks("source")
        stage.connect().send(CLOSING_HEAD, *answer_parts())
        name = unchunked(stage.taken(client))[0]["Stream-Id"]
        last = len(re.findall(b"(?m)^id: ", client.seen))
        assert stage.asks("source", last=f"{name}.{last - 1}").head().status == 200
        for none in (last, last + 1, 10**12):
            assert stage.asks("source", last=f"{name}.{none}").head().status == 204
        field = {"Last-Event-ID": f"{name}.{last}"}
        assert stage.plain("GET", f"/streams/{name}", **field, **EVENTS).status == 204 and not stage.jobs


def test_kept_answers_that_were_abandoned_leave_no_memory_behind(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="streamproxy")  # of steps, it would keep each
    with KeptStage(max_streams=0, idle_timeout=0.0) as stage:
        tracemalloc = pytest.importorskip("tracemalloc")  # which PyPy has not

        def many(count: int) -> None:
            for number in range(count):
                client = stage.asks("text", f"{number}")
                stage.connect().send(STREAM_HEAD, chunk(delta("abc")))
                stage.turn(2)
                client.sock.close()
                stage.turn(2)
                stage.upstreams.pop().sock.close()
                Peer.opened.clear()
            stage.now += 21
            stage.turn(200)
            stage.now += 21
            stage.turn(200)
            stage.lines.requests.clear()
            assert len(stage.server.answers) == stage.server.answers.used == stage.server.limits.total == 0

        many(400)  # which fills what keeps the last few lines of heads
        gc.collect()
        gc.disable()  # what is over is gone by its count of references
        try:
            tracemalloc.start()
            before = tracemalloc.get_traced_memory()[0]
            many(400)
            grown = tracemalloc.get_traced_memory()[0] - before
        finally:
            tracemalloc.stop()
            gc.enable()
        assert grown < 400 * 1000, grown  # lines of heads, and dicts that were larger


def test_kept_answer_is_waited_for_in_a_drain_and_ended_in_an_abort(provider: Provider) -> None:
    for drain in (30.0, 0.0):
        with running(provider, resume=60.0, drain_timeout=drain) as server:
            client = Client(server).ask(PROMPT, Idempotency_Key="k")
            upstream = provider.take()
            upstream.start(delta("abc"))
            client.head()
            client.sock.close()
            wait_for(lambda server=server: len(server.clients) == 0)
            stopping, began = threading.Thread(target=server.stop), time.monotonic()
            stopping.start()
            if drain:
                caught = wait_for(lambda server=server: server.state == server.DRAINING)
                assert caught and server.limits.total == 1 and stopping.is_alive()
                upstream.finish()
            assert upstream.gone()
            assert drain or time.monotonic() - began < streamproxy.ABORT_GRACE  # at once, not when that is over
            stopping.join(DEADLINE)
            assert not stopping.is_alive() and server.answers.running == server.limits.total == 0


def test_kept_answer_is_all_that_is_told_where_clients_come_back(caplog: pytest.LogCaptureFixture) -> None:
    with KeptStage(resume_bind="127.0.0.1:0", access_log="on", max_streams=1) as stage:
        client = stage.asks("text")
        stage.connect().send(STREAM_HEAD, chunk(delta("abc")))
        name = unchunked(stage.taken(client))[0]["Stream-Id"]

        def back(body: object = None, *question: str, **fields: str) -> bytes:
            client = stage.client(comes_back=True).ask(body, *question, **fields)
            return stage.taken(client)

        for data in (
            back(PROMPT, Idempotency_Key="k"), back(None, "GET", f"/streams/{name}"),
            back(PROMPT, Idempotency_Key="k", Last_Event_ID=f"{name}.0"),
        ):
            assert unchunked(data)[1] == b"abc"
        before = len(stage.lines.requests)
        for data in (
            back(PROMPT), back(PROMPT, Idempotency_Key="other"), back(None, "GET", "/?prompt=Hi", **EVENTS),
            back(CHAT, "POST", "/v1/chat/completions", Idempotency_Key="c"), back(None, "GET", "/v1/models"),
            back(None, "DELETE", "/streams", Idempotency_Key="other"),
            back(PROMPT, Idempotency_Key="k", X_Forwarded_For="192.0.2.1"),  # another's
            back(None, Idempotency_Key="other", Content_Length="900000"),  # of which the body is not waited for
        ):
            assert data.startswith(b"HTTP/1.1 421 Misdirected Request\r\n"), data
        assert len(stage.lines.requests) == before
        numbers = stage.hub.metrics
        assert not any(numbers.values["refusals_total"].values()) and not numbers.values["endings_total"]["error",]
        assert numbers.values["requests_total"]["/", "421"] == 5
        for status, data in {
            422: back({"prompt": "else"}, Idempotency_Key="k"), 404: back(None, "GET", "/streams/x"),
            410: back(PROMPT, Idempotency_Key="other", Last_Event_ID="x.1"),
            204: back(None, "GET", "/?prompt=Hi", **EVENTS, Last_Event_ID="x.1"),
            200: back(None, "GET", "/readyz"),
        }.items():
            assert data.startswith(b"HTTP/1.1 %d " % status), data
        assert back(None, "DELETE", "/streams", Idempotency_Key="k").startswith(b"HTTP/1.1 204 ")
        assert unchunked(stage.taken(client))[1:] == (b"abc", False) and not stage.jobs
        assert stage.asks("text", "other") and len(stage.jobs) == 1  # none of that has stopped it


def test_drain_leaves_where_clients_come_back_open_until_there_is_nothing_to_come_back_for() -> None:
    with KeptStage(resume_bind="127.0.0.1:0", drain_timeout=600.0, idle_timeout=0.0) as stage:
        server, door = stage.server, stage.server.doors[1].listener
        server.doors[1].open()
        kept = stage.client().ask(method="GET", path="/healthz", Via="1.1 proxy")
        stage.turn(4)
        client = stage.asks("text")
        upstream = stage.connect()
        upstream.send(STREAM_HEAD, chunk(delta("abc")))
        assert stage.taken(kept) and unchunked(stage.taken(client))[1] == b"abc"
        server.state = server.DRAINING
        server._drain()
        assert refused(server) and door.is_open
        stage.leaves(client)
        upstream.send(*map(chunk, (STOP, DONE)), b"0\r\n\r\n")
        stage.turn(4)
        stage.at(19)
        assert not server._is_empty() and server._waited_for().endswith(", 1 connection in all, 1 kept answer")
        kept.ask(PROMPT, Idempotency_Key="second")  # on a connection that a proxy has kept
        stage.turn(4)
        stage.at(30)
        assert len(server.answers) == 1 and door.is_open
        upstream.send(STREAM_HEAD, chunk(delta("def")), *map(chunk, (STOP, DONE)), b"0\r\n\r\n")
        assert unchunked(stage.taken(kept).partition(b"ok\n")[2])[1:] == (b"def", True) and kept.gone()
        with Client(Front(f"http://127.0.0.1:{door.sock.getsockname()[1]}")) as late:
            stage.turn(4)
            assert len(server.clients) == 1
            late.ask(PROMPT, Idempotency_Key="second")
            assert unchunked(stage.taken(late))[1:] == (b"def", True)
        stage.at(49)
        assert door.is_open and not server._is_empty()
        stage.at(51)
        assert not door.is_open and server._is_empty()


def test_drain_with_nothing_to_come_back_for_leaves_at_once_and_an_abort_whatever_there_is() -> None:
    for has_some in (False, True):
        with KeptStage(resume_bind="127.0.0.1:0", drain_timeout=600.0) as stage:
            if has_some:
                client = stage.asks("text")
                stage.connect().send(CLOSING_HEAD, *answer_parts())
                stage.taken(client)
                stage.leaves(client)
            server = stage.server
            server.state = server.DRAINING
            server._drain()
            assert server._is_empty() == (not has_some)
            server._abort()
            assert server._is_empty()


@pytest.mark.parametrize("part", range(8))
def test_kept_answers_in_any_order_of_what_may_happen(part: int) -> None:
    for seed in range(part, 2 * ORDERS, 8):
        play_kept(random.Random(seed))


def play_kept(rng: random.Random) -> None:
    """Have some of all that may happen to answers that are kept happen; look each time whether all is as it must be."""
    hows = ("text", "events", "v1", "source")
    with unittest.mock.patch.object(streamproxy, "MAX_KEPT_SIZE", 3000), KeptStage(
        resume_memory=rng.choice([10**6, 150_000]), max_streams=rng.choice([0, 3]), heartbeat=rng.choice([0.0, 2.0]),
        resume_bind="127.0.0.1:0",
    ) as stage:
        server, answers, clients, names = stage.server, stage.server.answers, [], []
        for _ in range(rng.choice([20, 60])):
            choice, how, key = rng.random(), rng.choice(hows), rng.choice("abc")
            if choice < 0.3:
                last = f"{rng.choice(names)}.{rng.choice([0, 1, 2, 50])}" if names and rng.random() < 0.5 else ""
                clients.append(stage.asks(how, key, last, server.draining or rng.random() < 0.2))
            elif choice < 0.4 and clients:
                stage.leaves(clients.pop(rng.randrange(len(clients))))
            elif choice < 0.55 and stage.jobs:
                if rng.random() < 0.2:
                    stage.dialed(streamproxy.UpstreamError("Upstream cannot be reached."))
                else:
                    with contextlib.suppress(OSError):  # it may have been stopped
                        stage.connect().send(STREAM_HEAD)
            elif choice < 0.8 and stage.upstreams:
                upstream = rng.choice(stage.upstreams)
                ends = chunk(STOP) + chunk(DONE) + b"0\r\n\r\n"
                with contextlib.suppress(OSError):
                    upstream.send(rng.choice([chunk(delta("x" * rng.choice([1, 900]))), ends]))
                    if rng.random() < 0.1:
                        upstream.sock.close()
            elif choice < 0.86:
                stage.plain("DELETE", "/streams", Idempotency_Key=key)
            elif choice < 0.9 and names:
                stage.plain("POST", f"/streams/{rng.choice(names)}/stop")
            elif choice < 0.905:
                answers.abort(streamproxy.Aborted("The server is shutting down."))
            elif choice < 0.91:
                server.state = server.DRAINING
                server._drain()
            else:
                stage.now += rng.choice([0.1, 3.0, 11.0, 21.0, 70.0])
            stage.turn(6)
            begins = any(client.door.begins for client in server.clients) or not server.draining
            assert server.doors[1].listener.is_open == (begins or len(answers) > 0), "all can come back"
            if not server.doors[1].listener.is_open:
                break
            names = list(answers._by_id)
            kepts = answers._by_id.values()
            running_now = [kept for kept in kepts if not kept.over]
            assert answers.running >= len(running_now)
            assert answers.used == sum(kept.size for kept in kepts), "memory"
            assert server.limits.total >= answers.running
            for kept in kepts:
                assert kept.watches or kept._due < float("inf")
                assert kept.over or kept.watches or kept._due <= stage.now + 20.0
                held = any(watch.viewer.client.pending for watch in kept.watches)
                assert held or not kept.watches or not (kept.over or kept.pending), "nobody waits for nothing"
        for client in clients:
            client.sock.close()
        stage.turn(30)
        stage.now += 21
        stage.turn(30)
        assert answers.running == 0, "nothing runs on unread"
        stage.now += 21
        stage.turn(30)
        assert len(answers) == answers.used == server.limits.total == len(answers.waiting) == 0
        assert not stage.lines.errors and (server._is_empty() or not server.draining)


# 26 ------------------------------------------------------------------- Demo upstream


def test_library_demo_needs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamproxy, "DEMO_PAUSE", 0.0005)
    assert "You asked: “Hi”" in "".join(streamproxy.stream_text("Hi", streamproxy.Settings(demo=True)))


@pytest.mark.parametrize(("path", "asked", "status", "words"), [
    ("/v1/completions", {"prompt": "hi"}, 404, "The built-in API has chat completions alone."),
    ("/v1/messages", {"messages": [], "max_tokens": 1}, 404, "The built-in API has chat completions alone."),
    ("/v1/chat/completions", {"messages": []}, 400, "The last of the messages has no content."),
    ("/v1/chat/completions", {"messages": ["hi"]}, 400, "The last of the messages has no content."),
])
def test_demo_says_what_it_is_not_asked_for(path: str, asked: dict[str, Any], status: int, words: str) -> None:
    with running(None, demo=True) as server, Client(server) as client:
        client.ask({"model": streamproxy.DEFAULT_MODEL, **asked}, path=path)
        assert api_error(client)[:2] == (status, words)


def test_demo_reads_a_message_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamproxy, "DEMO_PAUSE", 0)
    parts = [{"type": "text", "text": "Hello"}, {"type": "text", "text": " there"}]
    asked = {"model": streamproxy.DEFAULT_MODEL, "messages": [{"role": "user", "content": parts}]}
    with running(None, demo=True) as server, Client(server) as client:
        client.ask(asked, path="/v1/chat/completions")
        answer = json.loads(client.exactly(int(client.head().fields["Content-Length"])))
        assert answer["choices"][0]["message"]["content"].startswith("You asked: “Hello there”")


# 27 ------------------------------------------------------------------- Server


def descriptors() -> int:
    gc.collect()
    return descriptors_now()


# ---------------------------------------------------------------- addresses


def test_unix_socket_is_replaced_when_stale_and_removed_at_the_end(provider: Provider, tmp_path: Path) -> None:
    path = tmp_path / "proxy.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with running(provider, bind=f"unix:{path}") as server:
        assert server.url == f"unix:{path}"
        with Client(server).ask(PROMPT) as client, provider.take() as upstream:
            upstream.start(A)
            assert client.head().status == 200 and client.chunk() == b"a"
        with pytest.raises(OSError, match="[Aa]ddress"), running(provider, bind=f"unix:{path}"):
            pass
        with Client(server).ask(method="GET", path="/healthz") as client:  # it was not taken away
            assert client.head().status == 200
    assert not path.exists()


def test_unix_socket_of_a_successor_is_left_alone(provider: Provider, tmp_path: Path) -> None:
    with running(provider, bind=f"unix:{tmp_path}/s") as server:
        (tmp_path / "s").unlink()
        with running(provider, bind=f"unix:{tmp_path}/s") as successor:
            server.stop()
            assert ready(Client(successor)) == (200, None)
        assert not (tmp_path / "s").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a connection too many is refused")
def test_unix_socket_whose_owner_hangs_is_told_in_one_line(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as hangs, contextlib.ExitStack() as stack:
        hangs.bind(f"{tmp_path}/s")
        hangs.listen(0)
        with pytest.raises(BlockingIOError):
            while True:
                waits = stack.enter_context(socket.socket(socket.AF_UNIX))
                waits.setblocking(False)
                waits.connect(f"{tmp_path}/s")
        words = f"streamproxy: cannot listen at unix:{tmp_path}/s: whoever has it takes no connections\n"
        assert run("--demo", "--bind", f"unix:{tmp_path}/s") == (1, "", words)


@pytest.mark.parametrize("bind", ["unix:s", "127.0.0.1:0"])
def test_reuse_port_where_there_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, bind: str) -> None:
    monkeypatch.delattr(socket, "SO_REUSEPORT", raising=False)
    with pytest.raises(streamproxy.SettingsError, match="--reuse-port.*: it is for HOST:PORT, on Linux, BSD and macOS"):
        streamproxy.Server(streamproxy.Settings(bind=bind, api_key=KEY, reuse_port=True))


def test_unix_socket_clients_may_have_bound_their_own(provider: Provider, tmp_path: Path) -> None:
    with running(provider, bind=f"unix:{tmp_path}/s"), socket.socket(socket.AF_UNIX) as sock:
        sock.bind(f"{tmp_path}/c")
        sock.connect(f"{tmp_path}/s")
        sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert sock.recv(100).startswith(b"HTTP/1.1 200 OK\r\n")


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6")
def test_ipv4_client_of_a_socket_for_both_has_its_own_address(
    provider: Provider, caplog: pytest.LogCaptureFixture
) -> None:
    with running(provider, bind="[::]:0", allow_anonymous=True) as server:
        url = server.url.replace("[::]", "127.0.0.1")
        for fields, client in (({}, "127.0.0.1"), ({"X-Forwarded-For": "192.0.2.9"}, "192.0.2.9")):
            caplog.clear()
            with Client(Front(url)).ask(method="GET", path="/healthz", **fields) as asking:
                assert asking.head().status == 200
            assert log_entries(caplog, 1)[0]["client"] == client


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6")
def test_ipv6(provider: Provider) -> None:
    with running(provider, bind="[::1]:0") as server:
        assert re.fullmatch(r"http://\[::1\]:\d+", server.url)
        with Client(server).ask(method="GET", path="/healthz") as client:
            assert client.head().status == 200


# ---------------------------------------------------------------- connections and threads


def test_no_limits_in_a_real_server(provider: Provider) -> None:
    names = ["connect_timeout", "first_byte_timeout", "idle_timeout", "total_timeout", "client_timeout", "heartbeat"]
    for value in (0.0, 999999999.0):
        with running(provider, **dict.fromkeys(names, value)) as server, Client(server).ask(PROMPT) as client:
            with provider.take() as upstream:
                upstream.start(A)
                upstream.finish()
                assert client.head().status == 200 and client.body() == b"a"


def test_max_streams_more_get_503_at_once(provider: Provider) -> None:
    with running(provider, max_streams=1) as server:
        with Client(server).ask(PROMPT), provider.take() as upstream:
            with Client(server).ask(PROMPT) as second:
                head = second.head()
                assert (head.status, head.fields["Retry-After"]) == (503, "1")
            upstream.start(STOP, DONE)
        wait_for(lambda: not server.snapshot()["streams"])
        with Client(server).ask(PROMPT) as third, provider.take() as upstream:
            upstream.start(delta("x"))
            assert third.head().status == 200


def test_more_connections_than_are_allowed_are_told_so_once_they_ask(
    provider: Provider, caplog: pytest.LogCaptureFixture
) -> None:
    with running(provider, max_streams=1) as server:
        most = 2 + streamproxy.SPARE_CONNECTIONS
        clients = [Client(server) for _ in range(most)]
        wait_for(lambda: server.snapshot()["connections"] == most)
        for path in ("/", "/v1/chat/completions"):
            with Client(server).ask(PROMPT, path=path) as extra:
                head = extra.head()
                assert (head.status, head.fields["Retry-After"], head.fields["Connection"]) == (503, "1", "close")
                assert b"Too many connections." in extra.exactly(int(head.fields["Content-Length"]))
                assert extra.rest() == b""
        for path in ("/healthz", "/readyz"):  # whoever looks after us must not be told that we are dead
            with Client(server).ask(method="GET", path=path) as extra:
                assert extra.head().status == 200
        clients.pop().sock.close()
        wait_for(lambda: server.snapshot()["connections"] < most)
        with Client(server).ask(PROMPT) as client, provider.take() as upstream:
            upstream.start(A)
            assert client.head().status == 200
    entries = log_entries(caplog, 4)
    assert [entry["error"] for entry in entries[:2]] == ["Too many connections."] * 2 and provider.nobody_came()


def test_connections_far_beyond_those_allowed_are_closed_at_once_and_that_is_said(
    caplog: pytest.LogCaptureFixture
) -> None:
    with running(None, max_streams=1) as server:
        most = 2 + streamproxy.SPARE_CONNECTIONS + streamproxy.MAX_SURPLUS
        clients = [Client(server) for _ in range(most)]
        wait_for(lambda: server.snapshot()["connections"] == most)
        for _ in range(5):
            with Client(server) as extra:
                assert extra.rest() == b""
        wait_for(lambda: "a connection was closed: there are too many" in caplog.text)
        assert caplog.text.count("there are too many") == 1  # in a second
        for client in clients:
            client.sock.close()
        wait_for(lambda: not server.snapshot()["connections"])
        with Client(server).ask(method="GET", path="/") as client:
            assert client.head().status == 200


def test_connection_without_a_whole_request_holds_no_thread(server: streamproxy.Server) -> None:
    caught_up(server)
    before = threading.active_count()
    starts = [b"", b"POST / HTTP/1.1\r\nHost: a\r\n", b"POST / HTTP/1.1\r\n" + H + b"Content-Length: 9\r\n\r\n{"]
    clients = [Client(server) for _ in range(120)]
    for client, start in zip(clients, starts * 40):
        client.send(start)
    wait_for(lambda: server.snapshot()["connections"] >= 120)
    caught_up(server)
    assert threading.active_count() == before and server.snapshot()["threads"] == 0
    for client in clients:
        client.sock.close()


def test_streams_and_kept_connections_hold_no_thread(server: streamproxy.Server, provider: Provider) -> None:
    clients = [Client(server) for _ in range(150)]
    upstreams = {}
    for number, client in enumerate(clients):
        if number % 3:
            client.ask(PROMPT)
            upstreams[number] = provider.take()  # the first token is waited for
            if number % 3 == 1:
                upstreams[number].start(A)
                assert client.head().status == 200 and client.chunk() == b"a"
        else:
            assert client.ask(method="GET", path="/healthz").head().status == 200 and client.exactly(3) == b"ok\n"
    assert server.snapshot()["threads"] <= streamproxy.MAX_WORKERS  # which are parked
    assert (server.snapshot()["connections"], server.snapshot()["streams"]) == (150, 100)
    for number, upstream in upstreams.items():
        if number % 3 == 2:
            upstream.start(A)
        upstream.finish()
        if number % 3 == 2:
            assert clients[number].head().status == 200
        assert clients[number].body() == (b"a" if number % 3 == 2 else b"")
    for client in clients:
        assert client.ask(method="GET", path="/healthz").head().status == 200
    assert server.snapshot()["streams"] == 0


def test_request_for_which_no_thread_can_be_started_waits_for_one(
    server: streamproxy.Server, provider: Provider, caplog: pytest.LogCaptureFixture, no_thread: Any
) -> None:
    caught_up(server)
    log_entries(caplog, 1)
    with no_thread():
        clients = [Client(server).ask(PROMPT) for _ in range(2 * streamproxy.MAX_WORKERS)]
        with Client(server).ask(method="GET", path="/healthz") as client:  # needs none
            assert client.head().status == 200
        wait_for(lambda: "no thread can be started" in caplog.text)
        assert provider.nobody_came() and server.snapshot()["threads"] == 0
    provider.listener.settimeout(DEADLINE)
    for _ in clients:
        provider.take().start(A)
    for client in clients:
        assert client.head().status == 200 and client.chunk() == b"a"


def test_requests_for_which_no_other_thread_can_be_started_are_seen_to_by_those_there_are(
    provider: Provider, caplog: pytest.LogCaptureFixture, no_thread: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(provider, connect_timeout=0) as server:  # the last waits for as long as all others take
        caught_up(server)
        log_entries(caplog, 1)  # its thread is there
        dial, go, dialing = server.hub.upstream.dial, threading.Semaphore(0), []
        monkeypatch.setattr(
            server.hub.upstream, "dial", lambda lifeline: (dialing.append(1), go.acquire(), dial(lifeline))[2]
        )
        first = Client(server).ask({"prompt": "0"})
        wait_for(lambda: dialing)
        with no_thread():
            others = range(1, 2 * streamproxy.MAX_WORKERS)
            clients = [first, *[Client(server).ask({"prompt": str(number)}) for number in others]]
            wait_for(lambda: "no thread can be started" in caplog.text)
            wait_for(lambda: server.snapshot()["threads"] == 1)  # one that cannot be started counts for a moment
            for number in range(len(clients)):  # by that thread, one after the other
                assert wait_for(lambda number=number: len(dialing) == number + 1)
                go.release()
                with provider.take() as upstream:
                    client = clients[int(json.loads(upstream.body)["messages"][0]["content"])]
                    upstream.start(A)
                    assert client.head().status == 200 and client.chunk() == b"a"


def test_streams_go_on_and_end_and_warm_connections_are_used_while_no_thread_can_be_started(
    server: streamproxy.Server, provider: Provider, caplog: pytest.LogCaptureFixture, no_thread: Any
) -> None:
    caught_up(server)
    log_entries(caplog, 1)
    with Client(server).ask(PROMPT) as client, provider.take() as upstream:
        upstream.start(A)
        client.head()
        with no_thread():
            upstream.finish()
            assert client.body() == b"a"
            wait_for(lambda: idle(server) == 1)
            client.ask(PROMPT)
            upstream.read_request()
            upstream.start(A)
            upstream.finish()
            assert client.head().status == 200 and client.body() == b"a"
            assert client.ask(method="GET", path="/healthz").head().status == 200
    assert [entry["ending"] for entry in log_entries(caplog, 4)] == ["complete"] * 4 and "no thread" not in caplog.text


def test_connection_for_which_no_descriptor_is_left_is_accepted_later(
    server: streamproxy.Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    accept = server.listener.accept

    def accept_later() -> Any:
        if not caplog.records:
            raise OSError(errno.EMFILE, "Too many open files")
        return accept()

    monkeypatch.setattr(server.listener, "accept", accept_later)
    with Client(server).ask(method="GET", path="/healthz") as client:
        assert client.head().status == 200
    wait_for(lambda: "a connection was not accepted: too many open files" in caplog.text)


def test_2000_connections_opened_and_dropped_leave_nothing_behind(
    server: streamproxy.Server, provider: Provider
) -> None:
    def good() -> None:
        with Client(server).ask(method="GET", path="/healthz") as client:
            assert client.head().status == 200
        wait_for(lambda: not server.snapshot()["connections"])
    good()
    before = threading.active_count(), descriptors()
    pieces = [b"", b"G", b"GET / HTTP/1.1\r\n", b"POST / HTTP/1.1\r\n" + H + b"Content-Length: 9\r\n\r\n{", b"\0" * 99]
    for number in range(2000):
        with contextlib.suppress(ConnectionError):
            client = Client(server)
            client.send(pieces[number % 5])
        (client.reset if number % 3 else client.sock.close)()
        client.opened.clear()
    good()
    assert wait_for(lambda: (threading.active_count(), descriptors()), lambda now: now == before) == before


def test_1500_slow_connections_leave_a_good_client_undisturbed(provider: Provider) -> None:
    kinds = {"slow heads": ["-H"], "slow bodies": ["-B", "-s", "8192"], "slow readers": ["-X", "-k", "1"]}
    with running(provider, client_timeout=1.0) as server, contextlib.ExitStack() as stack:
        flags = ["-c", "500", "-r", "1000", "-i", "1", "-l", "1", "-p", "1", "-u", f"{server.url}/"]
        attacks = [
            stack.enter_context(subprocess.Popen(
                [program("slowhttptest"), *flags, *kind], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            ))
            for kind in kinds.values()
        ]  # fmt: skip
        wait_for(lambda: server.snapshot()["connections"] > 600)
        while any(attack.poll() is None for attack in attacks):
            with Client(server).ask(PROMPT) as client, provider.take() as upstream:
                upstream.start(A)
                assert client.head().status == 200 and client.chunk() == b"a"
                upstream.event(delta("b"))
                assert client.chunk() == b"b"
                upstream.finish()
                assert client.chunk() == b""
            Peer.opened.clear()
        wait_for(lambda: not server.snapshot()["connections"])


def mutated(rng: random.Random, data: bytes) -> bytes:
    """data with a few bytes changed, dropped, doubled or swapped for what parsers stumble over."""
    out = bytearray(data)
    for _ in range(rng.randrange(1, 5)):
        at = rng.randrange(len(out) + 1)
        kind = rng.randrange(5)
        if kind == 0:
            out[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            del out[at : at + rng.randrange(1, 9)]
        elif kind == 2:
            out[at:at] = out[at : at + rng.randrange(1, 30)]
        else:
            out[at:at] = rng.choice([
                b"\r", b"\n", b"\r\n", b"\0", b" ", b":", b"\xff", b'"', b"{", b"0", b"-1", b"[" * 50, b"\r\n\r\n",
                b"\\ud800", b"chunked", b",", b"9" * 20,
            ])
    return bytes(out)


def test_fuzzed_heads_and_bodies_never_stop_the_server(provider: Provider, caplog: pytest.LogCaptureFixture) -> None:
    rng = random.Random(11)
    bodies = [json.dumps(PROMPT).encode(), json.dumps({**ASKED, "x": [1.5, None, {"y": "\u00e4"}]}).encode()]
    seeds = [
        b"GET /?prompt=a HTTP/1.1\r\n" + H + b"Accept: text/event-stream\r\n\r\n",
        b"OPTIONS / HTTP/1.1\r\n" + H + b"Origin: http://localhost\r\n\r\n",
    ]
    for body in bodies:
        seeds.append(
            b"POST / HTTP/1.1\r\n" + H + b"Content-Length: %d\r\nX-Forwarded-For: 192.0.2.1\r\n\r\n" % len(body) + body
        )
        seeds.append(
            b"POST /v1/chat/completions HTTP/1.1\r\n" + H
            + b"Transfer-Encoding: chunked\r\nAuthorization: Bearer x\r\n\r\n" + chunk(body) + b"0\r\n\r\n"
        )
    with running(provider, upstream="http://127.0.0.1:9/v1", client_timeout=5.0) as server:
        for number in range(4 * ORDERS):
            with Client(server) as client:
                with contextlib.suppress(OSError):
                    client.send(mutated(rng, rng.choice(seeds)))
                    client.sock.shutdown(socket.SHUT_WR)
                    for answer in re.findall(rb"HTTP/1\.1 (\d\d\d) ", client.rest()):
                        assert answer in (
                            b"200", b"204", b"400", b"403", b"404", b"405", b"411", b"413", b"415", b"431", b"501",
                            b"502", b"505", b"100",
                        ), answer
            Peer.opened.clear()
            if number % 100 == 0:
                with Client(server).ask(method="GET", path="/healthz") as client:
                    assert client.head().status == 200
    assert "fault" not in caplog.text and "Traceback" not in caplog.text


def test_fuzzed_answers_of_upstream_never_stop_the_server(provider: Provider, caplog: pytest.LogCaptureFixture) -> None:
    rng = random.Random(12)
    body = ROLE + A + delta("b", reasoning="c") + event({"choices": [], "usage": {"total_tokens": 1}}) + STOP + DONE
    document = json.dumps({"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}]}).encode()
    seeds = [
        STREAM_HEAD + chunk(body) + b"0\r\n\r\n", CLOSE_HEAD + body,
        OK + JSON + b"Content-Length: %d\r\n\r\n" % len(document) + document,
        error_answer(429, b'{"error": {"message": "x"}}', b"Retry-After: 1\r\n"),
        b"HTTP/1.1 103 X\r\n\r\n" + STREAM_HEAD + chunk(body),
    ]
    with running(provider) as server:
        for number in range(4 * ORDERS):
            api = number % 2
            with Client(server).ask(ASKED if api else PROMPT, path="/v1/chat/completions" if api else "/") as client:
                with provider.take() as upstream:
                    upstream.send(mutated(rng, rng.choice(seeds)))
                    upstream.sock.shutdown(socket.SHUT_WR)
                    assert client.head().status in (200, 400, 404, 413, 422, 429, 502)
            Peer.opened.clear()
            if number % 100 == 0:
                with Client(server).ask(PROMPT) as client, provider.take() as upstream:
                    upstream.start(A)
                    upstream.finish()
                    assert client.head().status == 200 and client.body() == b"a"
    assert "fault" not in caplog.text and "Traceback" not in caplog.text


def test_200_clients_leave_at_once_and_no_thread_or_descriptor_is_left(
    server: streamproxy.Server, provider: Provider
) -> None:
    caught_up(server)
    wait_for(lambda: not server.snapshot()["connections"])
    before = descriptors()
    clients = [Client(server).ask(PROMPT) for _ in range(200)]
    upstreams = [provider.take() for _ in clients]
    for number, upstream in enumerate(upstreams):
        if number % 3:
            upstream.start(*[ROLE, A][: number % 3])
    for number, client in enumerate(clients):
        leave(client, "reset" if number % 2 else "close")
    for upstream in upstreams:
        assert upstream.gone()
        upstream.sock.close()
    wait_for(lambda: {**server.snapshot(), "threads": 0}, lambda counts: not any(counts.values()))
    wait_for(lambda: server.snapshot()["threads"], lambda count: count <= streamproxy.MAX_WORKERS)
    assert wait_for(descriptors, lambda now: now == before)


def test_300_requests_at_once_are_all_answered(provider: Provider) -> None:
    def serve(sock: socket.socket) -> None:
        with UpstreamPeer(sock) as upstream:
            upstream.start(ROLE, A)
            upstream.finish()

    def accept() -> None:
        for _ in range(300):
            threading.Thread(target=serve, args=(provider.listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    with running(provider) as server:
        clients = [Client(server).ask(PROMPT) for _ in range(300)]
        for client in clients:
            assert client.head().status == 200 and client.body() == b"a"
            client.sock.close()


# ---------------------------------------------------------------- the token file, looked at by a thread


def read_call(still: Still, upstream: Peer) -> tuple[str, bytes]:
    """Head and body of the request that upstream got."""
    upstream.sock.setblocking(False)
    while True:
        with contextlib.suppress(BlockingIOError):
            upstream.more()
        head, end, body = upstream.seen.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)\r\ncontent-length: ([0-9]+)", head)
        if end and len(body) >= int(length[1] if length else 0):
            upstream.sock.settimeout(DEADLINE)
            upstream.seen = b""
            return head.decode(), body
        still.turn()


def send_some(still: StillServer, client: Client, data: bytes) -> bytes:
    """Send what is taken of data; what is left."""
    client.sock.setblocking(False)
    for _ in range(100):
        with contextlib.suppress(BlockingIOError):
            data = data[client.sock.send(data) :]
        still.turn()
    client.sock.settimeout(DEADLINE)
    return data


@pytest.mark.parametrize("coding", ["length", "chunked"])
def test_large_body_that_comes_while_the_token_file_is_looked_at_is_taken(tmp_path: Path, coding: str) -> None:
    body = json.dumps({"prompt": "x" * 300_000}).encode()
    with StillServer(token_file=token_file(tmp_path, "a token-a\n")) as still, still.client() as client:
        fields = f"Content-Length: {len(body)}" if coding == "length" else "Transfer-Encoding: chunked"
        left = f"POST / HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer token-a\r\n{fields}\r\n\r\n".encode()
        left += body if coding == "length" else chunk(body) + b"0\r\n\r\n"
        left = send_some(still, client, left)
        asking = next(iter(still.server.clients))
        assert streamproxy.MAX_PIPELINED < len(asking.data) <= streamproxy.MAX_PIPELINED + streamproxy.TAKE_SIZE
        still.jobs.popleft()()  # the look
        assert not send_some(still, client, left)
        still.turn()
        still.jobs.popleft()()  # the look at the body
        still.turn()
        sent = json.loads(read_call(still, still.connect())[1])
        assert sent["messages"] == [{"role": "user", "content": "x" * 300_000}]


def asks_much(still: StillServer, client: Client) -> tuple[UpstreamPeer | Peer, bytes]:
    """Have client ask, with a body of which upstream has not got all; upstream, and the body."""
    client.ask(PROMPT)
    still.turn(2)
    body = next(iter(still.server.clients)).exchange.stream.call.body = b"x" * 3_000_000  # type: ignore[union-attr]
    return still.connect(), body


def test_answer_that_is_whole_before_the_request_is_sent_waits_for_nothing_more() -> None:
    with StillServer() as still, still.client() as client:
        upstream, body = asks_much(still, client)
        upstream.send(STREAM_HEAD, chunk(A + STOP))
        still.turn(2)
        upstream.sock.setblocking(False)
        for _ in range(100):  # no more than had left is sent
            with contextlib.suppress(BlockingIOError):
                upstream.seen += upstream.sock.recv(1 << 20)
            still.turn()
        assert len(upstream.seen) < len(body)
        still.at(streamproxy.END_GRACE)
        assert client.head().status == 200 and client.body() == b"a"


def test_request_to_upstream_is_sent_on_while_its_answer_comes() -> None:
    with StillServer(idle_timeout=3) as still, still.client() as client:
        upstream, body = asks_much(still, client)
        upstream.send(STREAM_HEAD, chunk(A))
        still.turn(2)
        upstream.seen = upstream.seen.replace(b"x", b"")
        assert read_call(still, upstream)[1] == body
        still.at(3)
        assert client.head().status == 200 and client.exactly(6) == b"1\r\na\r\n" and client.rest() == b""
        assert still.lines.requests[0]["ending"] == "aborted"


def test_upstream_that_does_not_read_on_may_pause_as_long_as_any() -> None:
    with StillServer(idle_timeout=10, first_byte_timeout=0) as still, still.client() as client:
        upstream, _ = asks_much(still, client)
        upstream.send(STREAM_HEAD, chunk(A))
        still.turn(2)
        still.at(9)
        assert still.server.snapshot()["streams"] == 1
        still.at(10)
        assert still.server.snapshot()["streams"] == 0 and client.head().status == 200
        assert still.lines.requests[0]["error"] == "Upstream took too long to go on with its answer."


@pytest.mark.parametrize(("seconds", "again"), [(0.1, True), (120, False)])
def test_408_is_asked_again_at_once_or_not_at_all(seconds: float, again: bool) -> None:
    with StillServer(first_byte_timeout=0, heartbeat=0) as still, still.client() as client:
        upstream = keep_warm(still)  # type: ignore[arg-type]
        client.ask(PROMPT)
        still.turn(2)
        assert upstream.more() and b"Say hello" in upstream.seen
        still.now = 1000.0 + seconds
        upstream.send(error_answer(408, b'{"error": {"code": "Timeout", "message": "The operation was timeout."}}'))
        still.turn(3)
        assert bool(still.jobs) == again
        if not again:
            assert client.error() == (408, "The operation was timeout.")


@pytest.mark.parametrize("comes", [b"", b'{"prompt": "x"}'])
def test_client_that_takes_no_100_nor_what_is_told_behind_it_is_dropped(comes: bytes) -> None:
    with StillServer(client_timeout=5) as still, still.client() as client:
        asking, near = filled(still)
        client.send(b"POST / HTTP/1.1\r\n" + H + b"Content-Length: 15\r\nExpect: 100-continue\r\n\r\n")
        still.turn(2)
        assert asking.pending
        client.send(comes)
        still.turn(2)
        for seconds in (5, 10):
            still.at(seconds)
            still.turn()
        assert near.fileno() == -1 and not still.server.clients and not still.server.snapshot()["streams"]
        assert len(still.lines.requests) == 1


def test_answer_leaves_though_its_client_sends_more_than_is_listened_to() -> None:
    with StillServer(client_timeout=5) as still, still.client() as client:
        asking, near = filled(still)
        client.send(b"POST /healthz/stream?events=1 HTTP/1.1\r\n" + H + b"Content-Length: 1000000\r\n\r\n")
        still.turn(2)
        assert asking.pending
        assert send_some(still, client, b"x" * 1_000_000)
        asking.sock = near
        still.turn(2)
        assert client.head().status == 200 and client.chunk()


def test_connection_that_is_kept_behind_a_body_that_is_late_lives_as_long_as_any() -> None:
    with StillServer(keep_alive_timeout=2) as still, still.client() as client:
        client.send(b"POST /healthz HTTP/1.1\r\n" + H + b"Content-Length: 10\r\n\r\n")
        still.turn(2)
        assert client.head().status == 405
        still.at(3)
        client.send(b"x" * 10)
        still.turn(2)
        still.at(4.5)
        assert still.server.clients
        still.at(5)
        assert not still.server.clients


def test_looked_at_token_file_admits_nobody_who_was_refused_meanwhile(tmp_path: Path) -> None:
    with StillServer(token_file=token_file(tmp_path, "a token-a\n")) as still, still.client() as client:
        client.ask(PROMPT, Authorization="Bearer token-a")
        still.turn(2)
        asking, near = filled(still)
        asking.abort(streamproxy.Aborted("The server is shutting down."))
        assert asking.pending
        still.jobs.popleft()()
        still.turn(3)
        assert not still.jobs and still.server.snapshot()["streams"] == 0
        asking.sock = near
        still.turn(3)
        client.sock.shutdown(socket.SHUT_WR)
        still.turn(3)
        got = client.rest()
        assert got.startswith(b"HTTP/1.1 503 ") and got.count(b"HTTP/1.1 ") == 1 and len(still.lines.requests) == 1


def test_request_whose_body_is_whole_just_as_it_is_refused_is_not_asked() -> None:
    with StillServer() as still, still.client() as client:
        client.send(b"POST / HTTP/1.1\r\n" + H + b'Content-Length: 15\r\n\r\n{"prompt": ')
        still.turn(2)
        asking, near = filled(still)
        client.send(b'"x"}')
        still.hub.loop.post(lambda: asking.abort(streamproxy.Aborted("The server is shutting down.")))
        still.turn(3)
        assert asking.pending and not still.jobs
        asking.sock = near


class Full:
    """A socket that takes nothing as yet."""

    def __init__(self, sock: socket.socket) -> None:
        self.fileno, self.recv, self.close, self.shutdown = sock.fileno, sock.recv, sock.close, sock.shutdown

    def send(self, data: bytes) -> int:
        raise BlockingIOError


def filled(still: StillServer) -> tuple[Any, socket.socket]:
    """The one client, as the server has it, whose socket takes nothing from now on; and that socket."""
    asking = next(iter(still.server.clients))
    near, asking.sock = asking.sock, Full(asking.sock)  # type: ignore[assignment]
    return asking, near


# ---------------------------------------------------------------- metrics


def metrics_of(server: streamproxy.Server, **fields: str) -> dict[str, float]:
    """The value of each series of /metrics, by its name and labels as they stand there."""
    with Client(server).ask(method="GET", path="/metrics", Connection="close", **fields) as client:
        head, text = client.head(), client.rest().decode()
    assert (head.status, head.fields["Content-Type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    lines = [line.rpartition(" ") for line in text.splitlines() if line[0] != "#"]
    assert len({name for name, _, _ in lines}) == len(lines)
    return {name.replace("streamproxy_", ""): float(value) for name, _, value in lines}


def grown(before: dict[str, float], after: dict[str, float], *families: str) -> dict[str, float]:
    """What was counted between two looks, but for zeros."""
    found = {name: value - before.get(name, 0) for name, value in after.items() if name.partition("{")[0] in families}
    return {name: value for name, value in found.items() if value}


def test_metrics_histogram_counts_a_value_in_each_bucket_that_it_fits() -> None:
    histogram = streamproxy.Histogram((0.5, 1))
    for value in (0.25, 0.5, 0.75, 1, 8):  # a bound is in its bucket
        histogram.observe(value)
    assert "".join(histogram.lines("x")) == (
        'x_bucket{le="0.5"} 2\n'
        'x_bucket{le="1"} 4\n'
        'x_bucket{le="+Inf"} 5\n'
        "x_sum 10.5\n"
        "x_count 5\n"
    )  # fmt: skip


def test_metrics_labels_are_escaped_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamproxy, "MAX_NAMED_CLIENTS", 2)
    metrics = streamproxy.Metrics(names_clients=True)
    for name in ('a"\\\n', "b", "c", "d", "b", ""):
        metrics.values["text_bytes_total"][metrics.client(name)] += 1
    lines = metrics.encode().decode().split("\n")
    assert [line for line in lines if line.startswith("streamproxy_text_bytes_total{")] == [
        r'streamproxy_text_bytes_total{client="a\"\\\n"} 1',
        'streamproxy_text_bytes_total{client="b"} 2',
        'streamproxy_text_bytes_total{client="other"} 2',
        'streamproxy_text_bytes_total{client=""} 1',
    ]
    assert streamproxy.Metrics().client("a") == ()


@pytest.mark.parametrize(("usage", "tokens"), [
    ({"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}, {"input": 5, "output": 7}),
    ({"prompt_tokens": 5, "completion_tokens": 7, "prompt_tokens_details": {"cached_tokens": 4},
      "completion_tokens_details": {"reasoning_tokens": 3}}, {"input": 5, "output": 7, "cached": 4, "reasoning": 3}),
    ({"input_tokens": 5, "output_tokens": 7, "output_tokens_details": {"reasoning_tokens": 3}},
     {"input": 5, "output": 7, "reasoning": 3}),
    ({"input_tokens": 5, "cache_read_input_tokens": 4}, {"input": 5, "cached": 4}),
    ({"prompt_tokens": "5", "completion_tokens": True, "input_tokens": -1, "output_tokens": 1e300,
      "prompt_tokens_details": [1]}, {}),
    ({"prompt_tokens": 10**300}, {}),
])  # fmt: skip
def test_metrics_tokens_of_each_api(usage: dict[str, Any], tokens: dict[str, int]) -> None:
    assert streamproxy.tokens_in(usage) == tokens


@pytest.mark.parametrize(("path", "route"), [
    ("/", "/"), ("/metrics", "/metrics"), ("/x", "other"), ("/v1/x", "other"), ("-", "other"),
    ("/v1/chat/completions", "/v1/chat/completions"), ("/v1/models", "/v1/models"),
    ("/v1/models/org/name", "/v1/models/{model}"), ("/v1/responses", "/v1/responses"),
    ("/v1/responses/resp_1", "/v1/responses/{id}"), ("/v1/responses/resp_1/cancel", "/v1/responses/{id}/cancel"),
    ("/v1/responses/resp_1/input_items", "/v1/responses/{id}/input_items"),
    ("/v1/responses/input_tokens", "/v1/responses/input_tokens"), ("/v1/responses/compact", "/v1/responses/compact"),
    ("/v1/messages/count_tokens", "/v1/messages/count_tokens"), ("/streams", "/streams"), ("/streams/", "other"),
    ("/streams/x", "/streams/{id}"), ("/streams/x/stop", "/streams/{id}/stop"), ("/streams//stop", "other"),
    ("/streams/x/y", "other"),
])  # fmt: skip
def test_metrics_name_the_route_not_the_path(path: str, route: str) -> None:
    for resume in (True, False):
        there = resume or not path.startswith("/streams")
        is_allowed = path == "/v1/responses/compact"
        assert streamproxy.resource_at(path, is_allowed, resume).name == (route if there else "other")


def test_metrics_of_a_stream(server: streamproxy.Server, provider: Provider) -> None:
    before = metrics_of(server)
    with Client(server).ask(PROMPT) as client, provider.take() as upstream:
        wait_for(lambda: metrics_of(server)["streams"], lambda count: count == 1)
        upstream.start(ROLE)
        for text in ("a", "b", "cd"):
            upstream.event(delta(text))
            assert (text > "a" or client.head()) and client.chunk() == text.encode()
        usage = {"prompt_tokens": 5, "completion_tokens": 3}
        upstream.send(chunk(STOP), chunk(event({"choices": [], "usage": usage})), chunk(DONE), b"0\r\n\r\n")
        client.until(b"0\r\n\r\n")
        client.ask(PROMPT)
        upstream.read_request()
        upstream.sock.close()
        with provider.take() as upstream:  # for the connection had been closed
            upstream.send(error_answer(429))
            assert client.until(b'"}\n')
    after = wait_for(lambda: metrics_of(server), lambda seen: seen["connections"] == 1)
    assert after["streams"] == 0
    assert grown(before, after, "requests_total", "endings_total", "text_bytes_total", "tokens_total",
                 "upstream_connections_total", "upstream_failures_total", "refusals_total") == {
        'requests_total{route="/",status="200"}': 1, 'requests_total{route="/",status="429"}': 1,
        'requests_total{route="/metrics",status="200"}': after['requests_total{route="/metrics",status="200"}'],
        'endings_total{ending="complete"}': after['requests_total{route="/metrics",status="200"}'] + 1,
        'endings_total{ending="error"}': 1, "text_bytes_total": 4,
        'tokens_total{type="input"}': 5, 'tokens_total{type="output"}': 3,
        'upstream_connections_total{reused="false"}': 2, 'upstream_connections_total{reused="true"}': 1,
        'upstream_failures_total{reason="stale"}': 1, 'upstream_failures_total{reason="rate_limit"}': 1,
    }  # fmt: skip
    counts = {name: after[f"{name}_seconds_count"] for name in (
        "time_to_first_token", "overhead", "time_between_pieces")}  # fmt: skip
    assert counts == {"time_to_first_token": 1, "overhead": 1, "time_between_pieces": 2}
    assert 0 < after["overhead_seconds_sum"] <= after["request_duration_seconds_sum"]
    assert after["process_open_fds"] > 5 and abs(after["process_start_time_seconds"] - time.time()) < 3600


def test_process_figures_need_nothing_but_the_process_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    open_any = open

    def open_own(path: str, *args: Any) -> Any:
        if path.startswith("/proc/") and not path.startswith("/proc/self/"):  # as with systemd's ProcSubset=pid
            raise FileNotFoundError(path)
        return open_any(path, *args)

    monkeypatch.setattr(builtins, "open", open_own)
    first = streamproxy.process_figures()
    assert {name.removeprefix("process_") for name in first} == {
        "cpu_seconds_total", "max_fds", "open_fds", "start_time_seconds", "virtual_memory_bytes",
        "resident_memory_bytes",
    }
    started = "process_start_time_seconds"
    assert streamproxy.process_figures()[started] == first[started] and abs(first[started] - time.time()) < 3600


def test_metrics_times_by_the_clock() -> None:
    with Stage(streamproxy.EventAnswer("id"), heartbeat=15.0) as stage:
        metrics = stage.hub.metrics
        stage.begin()
        for second in (0, 0.02, 0.25):
            stage.upstream.send(chunk(delta("x")))
            assert b"x" in stage.seen(second)
        stage.upstream.send(chunk(delta("y")), chunk(delta("z")))  # one read
        stage.at(0.5)
        metrics.between_pieces.observe_noted()
        assert metrics.between_pieces.sum == pytest.approx(0.5) and sum(metrics.between_pieces.counts) == 3
        stage.at(1.75)  # of a loop that was held up for 0.75 s
        lag = metrics.histograms["loop_lag_seconds"]
        assert lag.sum == pytest.approx(0.75) and sum(lag.counts) == 1
        for second in (15.75, 16, 31):
            stage.at(second)
        assert b"\nstreamproxy_heartbeats_total 2\n" in metrics.encode()
        assert sum(lag.counts) == 2  # nothing comes: it sleeps
        stage.upstream.send(chunk(STOP), chunk(DONE))
        stage.turn(2)


# What is sent, to a server with which settings, and the reason.
@pytest.mark.parametrize(("settings", "line", "fields", "reason"), [
    ({}, "POST /", "", "no_length"),
    ({}, "POST /nothing", "Content-Length: 0", "not_found"),
    ({}, "PUT /", "Content-Length: 0", "method"),
    ({"max_body": 1}, "POST /", "Content-Length: 2", "max_body"),
    ({}, "POST /", "Content-Encoding: zstd\r\nContent-Length: 0", "media_type"),
    ({}, "POST /", "Content-Length: 0", "bad_request"),
    ({}, "POST /", "Content-Length: 0\r\nOrigin: https://evil.example", "allow_origin"),
    ({"requests_per_minute": 1}, "GET /v1/models", "", "requests_per_minute"),
    ({"max_streams": 1}, "GET /v1/models", "", "max_streams"),
    ({"max_streams_per_client": 1}, "GET /v1/models", "", "max_streams_per_client"),
    ({}, "GET /v1/models/secret", "", "allow_model"),
    ({}, "GET /v1/responses", "Upgrade: websocket", "websocket"),
    ({}, "GET /" + "x" * 70000, "", "head_size"),
    ({}, "BREW /", "", "method"),
])  # fmt: skip
def test_metrics_reason_of_a_refusal(
    provider: Provider, settings: dict[str, Any], line: str, fields: str, reason: str
) -> None:
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(running(provider, **settings))
        if settings and set(settings) < {"requests_per_minute", "max_streams", "max_streams_per_client"}:
            stack.enter_context(Client(server).ask(PROMPT))
            wait_for(lambda: server.snapshot()["streams"])
        with Client(server) as client:
            lines = [f"{line} HTTP/1.1", "Host: localhost", *filter(None, [fields]), "", ""]
            client.send("\r\n".join(lines).encode())
            assert client.head().status >= 400
        assert grown({}, metrics_of(server), "refusals_total") == {f'refusals_total{{reason="{reason}"}}': 1}
        assert reason in streamproxy.REFUSING


# What upstream does, by the second, and the reason; None: it closes.
@pytest.mark.parametrize(("said", "reason"), [
    ({10: None}, "first_byte_timeout"),
    ({0: b"nonsense\r\n\r\n"}, "garbled"),
    ({0: STREAM_HEAD + chunk(event(b"nonsense"))}, "garbled"),
    ({0: None}, "closed"),
    ({0: STREAM_HEAD + chunk(A), 1: None}, "truncated"),
    ({0: STREAM_HEAD + chunk(A), 5: b""}, "idle_timeout"),
    ({0: STREAM_HEAD + chunk(A), 4: chunk(A), 8: chunk(A), 12: b""}, "total_timeout"),
    ({0: STREAM_HEAD + chunk(A) + chunk(event({"error": {"message": "no"}}))}, "reported"),
    *(({0: error_answer(status)}, reason) for status, reason in {
        401: "api_key", 403: "api_key", 404: "refused", 429: "rate_limit", 500: "failed", 503: "failed", 302: "redirect"
    }.items()),
])  # fmt: skip
def test_metrics_reason_of_a_failure_of_upstream(said: dict[int, bytes | None], reason: str) -> None:
    with Stage(first_byte_timeout=10.0, idle_timeout=5.0, total_timeout=12.0) as stage:
        upstream = stage.connect()
        upstream.until(b"}")
        for second, data in said.items():
            if data is not None:
                upstream.send(data)
            elif second < 10:
                upstream.sock.shutdown(socket.SHUT_WR)
            stage.at(second)
            stage.turn(2)
        wanted = f'streamproxy_upstream_failures_total{{reason="{reason}"}} 1\n'.encode()
        assert stage.ended and wanted in stage.hub.metrics.encode() and reason in streamproxy.FAILURES


@pytest.mark.parametrize(("error", "reason"), [
    (socket.gaierror(), "dns"), (ssl.SSLError(), "tls"), (socket.timeout(), "connect_timeout"),
    (ConnectionRefusedError(), "connect"),
])  # fmt: skip
def test_metrics_reason_of_a_dial_that_fails(error: Exception, reason: str) -> None:
    upstream = streamproxy.Upstream(streamproxy.Settings(api_key=KEY))
    patched = unittest.mock.patch.object(upstream, "open", side_effect=error)
    with patched, pytest.raises(streamproxy.ProxyError) as seen:
        upstream.dial(streamproxy.Lifeline())
    assert seen.value.reason == reason and reason in streamproxy.FAILURES


def test_metrics_need_a_token_where_there_are_tokens_and_name_its_client(provider: Provider, tmp_path: Path) -> None:
    tokens = token_file(tmp_path, f"alice {ALICE}\nbob {BOB}\n")
    with running(provider, token_file=tokens) as server:
        with Client(server).ask(method="GET", path="/metrics") as client:
            assert client.error()[0] == 401
            client.ask(method="GET", path="/metrics", Authorization=f"Bearer {BOB}", Sec_Fetch_Site="cross-site")
            assert client.error()[0] == 403
            client.ask(method="HEAD", path="/metrics", Authorization=f"Bearer {BOB}")
            assert int(client.head().fields["Content-Length"]) > 1000
            client.ask(PROMPT, Authorization=f"Bearer {ALICE}")
            with provider.take() as upstream:
                upstream.start(A)
                upstream.finish()
                client.until(b"0\r\n\r\n")
        seen = metrics_of(server, Authorization=f"Bearer {BOB}")
        assert grown({}, seen, "requests_total", "text_bytes_total", "refusals_total") == {
            'requests_total{route="/metrics",status="401",client=""}': 1,
            'requests_total{route="/metrics",status="403",client=""}': 1,
            'requests_total{route="/metrics",status="200",client="bob"}': 1,
            'requests_total{route="/",status="200",client="alice"}': 1,
            'text_bytes_total{client="alice"}': 1,
            'refusals_total{reason="token"}': 1, 'refusals_total{reason="allow_origin"}': 1,
        }  # fmt: skip
    with running(provider) as server, Client(server) as client:  # without tokens: as the other routes
        client.send(b"GET /metrics HTTP/1.1\r\nHost: evil.example\r\n\r\n")
        assert client.error()[0] == 403
        assert metrics_of(server)['refusals_total{reason="allow_host"}'] == 1


PARSE_METRICS = """
import sys
from prometheus_client.parser import text_string_to_metric_families
for text in sys.stdin.read().split("\\0"):
    families = {family.name: family for family in text_string_to_metric_families(text)}
    for family in families.values():
        if family.type == "histogram":
            buckets = [sample.value for sample in family.samples if sample.name.endswith("_bucket")]
            count = [sample.value for sample in family.samples if sample.name.endswith("_count")]
            assert buckets == sorted(buckets) and buckets[-1:] == count, family
print(*families)
"""


def test_metrics_under_load_are_accepted_by_prometheus(tmp_path: Path) -> None:
    promtool, python = program("promtool"), sdk_python("prometheus_client")
    tokens = token_file(tmp_path, "".join(f"client{n} {ALICE}{n}\n" for n in range(8)))
    stopped, asked = threading.Event(), threading.Semaphore(0)

    def ask(number: int) -> None:
        while not stopped.is_set():
            with Client(server).ask(PROMPT, Authorization=f"Bearer {ALICE}{number}", Connection="close") as client:
                client.until(b"e")  # and leave
            asked.release()

    with running(None, demo=True, token_file=tokens) as server:
        threads = [threading.Thread(target=ask, args=[number]) for number in range(8)]
        for thread in threads:
            thread.start()
        texts = []
        with Client(server) as client:
            for _ in range(40):
                assert asked.acquire(timeout=DEADLINE)
                client.ask(method="GET", path="/metrics", x_api_key=f"{ALICE}1")
                texts.append(client.exactly(int(client.head().fields["Content-Length"])).decode())
        stopped.set()
        for thread in threads:
            thread.join()
    for text in (texts[0], texts[-1]):
        told = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True, check=False)
        assert (told.returncode, told.stdout, told.stderr) == (0, "", "")
    told = subprocess.run(
        [python, "-c", PARSE_METRICS], input="\0".join(texts), capture_output=True, text=True, check=False
    )
    names = [re.sub("_total$", "", family.name) for family in streamproxy.METRICS]
    assert told.returncode == 0, told.stderr
    assert told.stdout.split() == [name for name in names if name != "streamproxy_tokens"]  # nobody waited for those


# ---------------------------------------------------------------- the end


def test_stop_answers_who_connected_while_the_loop_was_busy(provider: Provider) -> None:
    with running(provider, drain_timeout=0.0) as server:
        busy, go = threading.Event(), threading.Event()
        server.hub.loop.post(lambda: (busy.set(), go.wait(DEADLINE)))
        busy.wait(DEADLINE)
        with Client(server).ask(PROMPT) as client:
            stopping = threading.Thread(target=server.stop)
            stopping.start()
            wait_for(lambda: server.draining)
            go.set()
            assert client.rest().startswith(b"HTTP/1.1 503 ")
            client.sock.close()
            stopping.join(DEADLINE)
            assert not stopping.is_alive() and not server.snapshot()["connections"]


def test_drain_lets_streams_end_and_takes_nobody_new(provider: Provider) -> None:
    with running(provider, drain_timeout=DEADLINE) as server:
        idle = Client(server)
        with Client(server).ask(PROMPT) as client, provider.take() as upstream:
            upstream.start(A)
            client.head()
            stopping = threading.Thread(target=server.stop)
            stopping.start()
            wait_for(lambda: refused(server))
            elapse(server, streamproxy.IDLE_GRACE)
            assert idle.rest() == b""  # a connection between two requests is closed in a moment
            upstream.event(delta("b"))
            upstream.finish()
            assert client.body() == b"ab"
            elapse(server, streamproxy.IDLE_GRACE)
            assert client.rest() == b""
            stopping.join(DEADLINE)
            assert not stopping.is_alive()


def test_stop_is_obeyed_while_clients_keep_connecting(provider: Provider) -> None:
    with running(provider, drain_timeout=DEADLINE) as server:
        over = threading.Event()

        def knock() -> None:
            while not over.is_set():
                with contextlib.suppress(OSError, AssertionError), Client(server) as client:
                    client.ask(method="GET", path="/healthz", Connection="close").head()

        threads = [threading.Thread(target=knock) for _ in range(12)]
        for thread in threads:
            thread.start()
        time.sleep(0.2)
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        stopping.join(DEADLINE / 2)
        stopped = not stopping.is_alive()
        over.set()
        for thread in [*threads, stopping]:
            thread.join()
        assert stopped


def test_stop_twice_or_before_the_start_is_fine(provider: Provider) -> None:
    settings = streamproxy.Settings(bind="127.0.0.1:0", upstream=provider.url)
    with streamproxy.Server(settings) as server:
        server.stop()
    unused = streamproxy.Server(settings)
    unused.stop()
    for stopped in (server, unused):
        with pytest.raises(RuntimeError, match="a server that was stopped does not serve again"):
            stopped.start()


def test_stop_that_is_interrupted_leaves_nothing(provider: Provider) -> None:
    def interrupt(words: str) -> None:
        raise KeyboardInterrupt

    server = streamproxy.Server(streamproxy.Settings(bind="127.0.0.1:0", upstream=provider.url))
    server.start()
    with Client(server).ask(PROMPT, Accept="text/event-stream") as client, provider.take() as upstream:
        upstream.start(A)
        client.head()
        with pytest.raises(KeyboardInterrupt):
            server.stop(interrupt)
        assert upstream.gone() and b"The server is shutting down." in client.rest()
    assert (server.state, server.snapshot()["connections"]) == (server.STOPPED, 0)
    with socket.create_server(server.server_address[:2]):
        pass


def test_drain_says_that_a_connection_ends_with_its_answer(provider: Provider) -> None:
    with running(provider, drain_timeout=DEADLINE) as server, Client(server) as client:
        client.send(b"GET /healthz HTTP/1.1\r\n")
        caught_up(server)  # the request has begun: this is not a connection between two
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        wait_for(lambda: refused(server))
        client.send(b"\r\n")
        assert client.head().fields["Connection"] == "close"
        client.sock.close()
        stopping.join(DEADLINE)


def test_drain_serves_who_connected_before_it(provider: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(provider, drain_timeout=DEADLINE) as server:
        clients = [Client(server) for _ in range(20)]
        for client in clients:
            client.ask(method="GET", path="/healthz")
        monkeypatch.setattr(streamproxy, "IDLE_GRACE", 0.2)  # for those that were answered before
        server.stop()
        for client in clients:
            head = client.head()
            assert head.status == 200 and head.fields.get("Connection") in ("close", None)


@pytest.mark.parametrize("mode", ["text", "events", "nothing sent"])
def test_drain_aborts_truthfully_at_its_end_or_when_hurried(
    provider: Provider, caplog: pytest.LogCaptureFixture, mode: str
) -> None:
    with running(provider, drain_timeout=DEADLINE) as server:
        with Client(server).ask(PROMPT, **(EVENTS if mode == "events" else {})) as client, provider.take() as upstream:
            if mode != "nothing sent":
                upstream.start(A)
                client.head()
                client.chunk()
            stopping = threading.Thread(target=server.stop)
            stopping.start()
            wait_for(lambda: server.draining)
            server.abort()
            if mode == "nothing sent":
                assert client.error() == (503, "The server is shutting down.")
            elif mode == "events":
                assert client.body() == b'event: error\ndata: {"error": "The server is shutting down."}\n\n'
            else:
                assert client.rest() == b""
            assert upstream.gone()
            client.sock.close()
            stopping.join(DEADLINE)
            assert not stopping.is_alive()
    assert log_entries(caplog, 1)[0]["ending"] == "aborted"


def test_drain_ends_half_sent_requests_and_stalled_http_1_0_clients_truthfully(
    provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamproxy, "ABORT_GRACE", 0.3)
    with running(provider, drain_timeout=0.0) as server, Client(server) as half, Client(server) as stalled:
        half.send(b"POST / HTTP/1.1\r\n")
        stalled.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stalled.ask(PROMPT, version="1.0")
        with provider.take() as upstream:
            upstream.send(STREAM_HEAD)
            with contextlib.suppress(OSError):
                upstream.sock.settimeout(0.3)
                while True:
                    upstream.event(delta("x" * 60000))
            began = time.monotonic()
            server.stop()
            assert time.monotonic() < began + 2
            assert b" 503 " in half.rest()
            with pytest.raises(ConnectionResetError):
                stalled.rest()


def test_drain_that_is_hurried_answers_half_sent_bodies_at_once(
    provider: Provider, caplog: pytest.LogCaptureFixture
) -> None:
    with running(provider, drain_timeout=0.0) as server, Client(server) as client:
        client.send(b"POST / HTTP/1.1\r\n" + H + b"Content-Length: 9\r\n\r\n{")
        caught_up(server)
        began = time.monotonic()
        with stopping(server):
            assert client.error() == (503, "The server is shutting down.") and client.rest() == b""
            client.sock.close()
        assert time.monotonic() < began + streamproxy.ABORT_GRACE / 2  # nobody waited for the rest
    assert log_entries(caplog, 2)[1]["ending"] == "aborted"


@pytest.mark.parametrize("sent", [b"", b"\r\n"])
def test_drain_waits_for_nobody_who_has_asked_nothing(provider: Provider, sent: bytes) -> None:
    with running(provider, drain_timeout=DEADLINE) as server, Client(server) as client:
        client.ask(method="GET", path="/healthz").send(sent)
        assert client.head().status == 200 and client.exactly(3) == b"ok\n"
        caught_up(server)
        with stopping(server):
            elapse(server, streamproxy.IDLE_GRACE)
            assert client.rest() == b""


def test_drain_waits_but_a_moment_for_who_sends_on_what_was_refused(provider: Provider) -> None:
    with running(provider, drain_timeout=DEADLINE) as server, Client(server) as client:
        client.send(NEVER_COMING["413"])
        assert client.error()[0] == 413
        caught_up(server)
        with stopping(server):
            elapse(server, streamproxy.END_GRACE)


@contextlib.contextmanager
def stopping(server: streamproxy.Server) -> Iterator[threading.Thread]:
    """While a server stops."""
    thread = threading.Thread(target=server.stop)
    thread.start()
    wait_for(lambda: server.draining)
    yield thread
    thread.join(DEADLINE)
    assert not thread.is_alive()


def ready(client: Client) -> tuple[int, str | None]:
    """What /readyz says, and Connection."""
    head = client.ask(method="GET", path="/readyz").head()
    client.exactly(int(head.fields["Content-Length"]))
    return head.status, head.fields.get("Connection")


def test_leave_delay_takes_connections_and_requests_while_readyz_says_503(
    provider: Provider, caplog: pytest.LogCaptureFixture
) -> None:
    with running(provider, leave_delay=DEADLINE, drain_timeout=DEADLINE) as server, Client(server) as kept:
        assert ready(kept) == (200, None)
        with stopping(server):
            assert server.state == server.LEAVING
            assert ready(kept) == (503, "close") and kept.rest() == b""
            with Client(server) as new:
                assert ready(new) == (503, "close")
            with Client(server).ask(PROMPT) as client, provider.take() as upstream:
                upstream.start(A)
                upstream.finish()
                assert client.head().fields["Connection"] == "close" and client.body() == b"a"
            server.abort()
    words = [record.getMessage() for record in caplog.records if record.getMessage().startswith("shut")]
    assert words[0].startswith("shutting down in 20 s (--leave-delay): waiting for 0 streams, ")
    assert words[1:] == ["shut down: 1 stream ended, 0 cut off"]


def test_drain_says_how_many_streams_it_waits_for_and_what_became_of_them(
    provider: Provider, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[str] = []
    with running(provider, drain_timeout=DEADLINE) as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(server).ask(PROMPT)) for _ in range(3)]
        upstreams = [stack.enter_context(provider.take()) for _ in clients]
        for upstream in upstreams:
            upstream.start(A)
        for client in clients:
            assert client.head().status == 200
        thread = threading.Thread(target=server.stop, args=[told.append])
        thread.start()
        wait_for(lambda: [record for record in caplog.records if record.getMessage().startswith("shutting down")])
        wait_for(lambda: told)  # which comes behind that line
        for upstream in upstreams[:2]:
            upstream.finish()
        wait_for(lambda: server.snapshot()["streams"] == 1)
        server.abort()
        thread.join()
    words = [record.getMessage() for record in caplog.records if record.getMessage().startswith("shut")]
    waits = "waiting for 3 streams, 3 connections in all"
    assert words == [
        f"shutting down: {waits}; a second signal ends them at once", "shut down: 2 streams ended, 1 cut off"
    ]
    assert told[0] == waits


def test_stop_tells_again_what_it_waits_for(provider: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamproxy, "TELL_INTERVAL", 0.01)
    box: queue.SimpleQueue[str] = queue.SimpleQueue()
    with running(provider, drain_timeout=DEADLINE) as server, Client(server) as client:
        client.send(b"GET / HTTP/1.1\r\n")
        caught_up(server)
        thread = threading.Thread(target=server.stop, args=[box.put])
        thread.start()
        for _ in range(3):
            assert box.get(timeout=DEADLINE).startswith("waiting for 0 streams, ")
        server.abort()
        client.sock.close()
        thread.join()


def test_drain_waits_for_a_request_that_may_be_on_its_way_however_long_a_connection_was_idle() -> None:
    with StillServer(drain_timeout=100.0) as still:
        client = still.client()
        still.at(20)
        still.server.state = still.server.DRAINING
        still.hub.loop.post(still.server._drain)
        still.turn()
        still.at(20 + streamproxy.IDLE_GRACE - 0.1)
        assert still.silent(client)
        still.at(20 + streamproxy.IDLE_GRACE)
        still.turn(2)
        assert not still.server.clients


def test_abort_waits_for_no_connection_that_has_had_its_answer() -> None:
    with StillServer() as still, still.client() as client:
        client.ask(PROMPT, Via="1.1 nginx", **EVENTS)
        still.turn(3)
        still.connect().send(STREAM_HEAD, chunk(A))
        still.turn(3)
        assert client.head().fields["Keep-Alive"]
        still.server.state = still.server.DRAINING
        still.server._drain()
        still.turn(2)
        still.server._abort()
        still.turn(3)
        assert not still.server.clients and b"event: error" in client.body()


@pytest.mark.parametrize(("fields", "seconds"), [
    ({"X_Forwarded_For": "192.0.2.1"}, 75.0), ({"Via": "1.1 x"}, 75.0), ({"Forwarded": "for=192.0.2.1"}, 75.0),
    ({}, streamproxy.IDLE_GRACE), (None, streamproxy.IDLE_GRACE),
])
def test_drain_closes_a_connection_once_no_proxy_can_be_using_it(fields: dict[str, str] | None, seconds: float) -> None:
    with StillServer(drain_timeout=100.0) as still:
        clients = [still.client(), still.client()]
        for client in clients if fields is not None else ():
            client.ask(method="GET", path="/healthz", **fields)
            still.turn(2)
            assert client.head().fields.get("Connection") is None and client.exactly(3) == b"ok\n"
        still.server.state = still.server.DRAINING
        still.hub.loop.post(still.server._drain)
        still.turn()
        still.at(seconds - 0.1)
        still.turn(2)
        assert still.silent(clients[0]) and still.silent(clients[1])
        assert repr(still.server.clients) and len(still.server.clients) == 2
        clients[0].ask(method="GET", path="/healthz")  # as long as it is open, it is answered
        still.turn(2)
        head = clients[0].head()
        assert head.fields["Connection"] == "close" and clients[0].exactly(3) == b"ok\n" and clients[0].rest() == b""
        still.at(seconds)
        assert clients[1].rest() == b"" and not still.server.clients


@pytest.mark.parametrize("is_short", [False, True])
def test_drain_of_an_address_that_others_reach_waits_for_connections_that_are_being_made(is_short: bool) -> None:
    with StillServer(drain_timeout=100.0, bind="0.0.0.0:0", allow_anonymous=True) as still:
        with Client(Front(still.server.url.replace("0.0.0.0", "127.0.0.1"))) as client:
            if is_short:  # of descriptors, a moment before
                lack = OSError(errno.EMFILE, "")
                with unittest.mock.patch.object(still.server.listener, "accept", side_effect=lack):
                    assert not still.server.doors[0]._accept()
            still.server.state = still.server.DRAINING
            still.hub.loop.post(still.server._drain)
            still.turn(2)
            assert still.server.listener.is_open and len(still.server.clients) == 1
            still.at(streamproxy.SHORTAGE_PAUSE)
            assert still.server.listener.is_open
            still.at(streamproxy.HANDSHAKE_PAUSE)
            assert not still.server.listener.is_open
            client.ask(method="GET", path="/healthz")
            still.turn(2)
            assert client.head().fields["Connection"] == "close" and client.exactly(3) == b"ok\n"


def test_drain_keeps_what_waits_for_its_turn_to_begin() -> None:
    with StillServer(drain_timeout=100.0) as still:
        clients = [still.client() for _ in range(3 * streamproxy.MAX_BEGINNINGS)]
        still.at(20.0)  # all of them could be closed
        for client in clients:
            client.ask(method="GET", path="/healthz")
        still.server.state = still.server.DRAINING
        still.hub.loop.post(still.server._drain)
        still.turn(5)
        assert all(client.head().status == 200 for client in clients)


# ---------------------------------------------------------------- what is stuck, short or over


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="no SIGSTOP")
def test_process_that_was_stopped_goes_on_with_what_came_meanwhile(provider: Provider) -> None:
    with launched("--idle-timeout", "1", "--client-timeout", "1", OPENAI_BASE_URL=provider.url) as (process, front):
        with Client(front).ask(PROMPT) as client, provider.take() as upstream, Client(front) as slow:
            upstream.start(A)
            assert client.head().status == 200 and client.chunk() == b"a"
            slow.send(b"GET /healthz HTTP/1.1\r\n")
            caught_up(front)
            process.send_signal(signal.SIGSTOP)
            assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])  # each of its threads
            upstream.event(delta("b"))
            slow.send(b"Host: localhost\r\n\r\n")
            time.sleep(1.1)  # longer than either clock
            process.send_signal(signal.SIGCONT)
            assert client.chunk() == b"b" and slow.head().status == 200
            upstream.finish()
            assert client.chunk() == b""


@pytest.mark.skipif(
    not hasattr(resource, "prlimit") or sys.implementation.name != "cpython",
    reason="needs prlimit(2) and CPython",
)
def test_lack_of_memory_costs_the_requests_that_need_it_and_no_others(provider: Provider) -> None:
    with launched("--max-body", "100000000", OPENAI_BASE_URL=provider.url, MALLOC_ARENA_MAX="1") as (process, front):
        with Client(front).ask(PROMPT) as client, provider.take() as upstream:
            upstream.start(A)
            assert client.head().status == 200 and client.chunk() == b"a"
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
            most = 1024 * int(re.search(r"VmSize:\s*(\d+)", status)[1]) + 30_000_000  # type: ignore[index]
            resource.prlimit(process.pid, resource.RLIMIT_AS, (most, most))
            large = [Client(front) for _ in range(4)]
            for other in large:
                drip(
                    other, b"POST / HTTP/1.1\r\n" + H + b"Content-Length: 40000000\r\n\r\n" + b" " * 40_000_000,
                    1_000_000,
                )
            assert {other.error()[0] for other in large} <= {400, 500}
            caught_up(front)
            upstream.event(delta("b"))
            upstream.finish()
            assert client.chunk() == b"b" and client.chunk() == b""


def test_lack_of_descriptors_is_told_to_who_asks_and_said_in_the_log_once_a_second(
    provider: Provider, tmp_path: Path
) -> None:
    limited = (
        "import resource, time, streamproxy; resource.setrlimit(resource.RLIMIT_NOFILE, (30, 30));"
        # it says so in vain each 0.1 s, and its log's second is shorter
        " streamproxy.LogWriter.__init__.__defaults__ = (lambda: 3 * time.monotonic(),); streamproxy.run_script()"
    )
    front, began, errors = Front(f"unix:{tmp_path}/s"), time.monotonic(), ""
    process = subprocess.Popen(
        [sys.executable, "-c", limited, "--bind", front.url], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        env={**os.environ, "OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": provider.url}, cwd=HERE, text=True,
    )  # fmt: skip
    try:
        wait_for(lambda: process.poll() is not None or not refused(front))
        with Client(front) as first:
            first.ask(method="GET", path="/healthz")
            assert first.head().status == 200 and first.exactly(3) == b"ok\n"
            others = [Client(front) for _ in range(60)]
            while " times)" not in errors and time.monotonic() < began + DEADLINE and process.stderr:
                errors += process.stderr.readline()
            first.ask(PROMPT)  # the first of the process's that needs upstream
            status, sentence = first.error()
            assert status in (500, 502, 503) and "too many open files" in sentence, (status, sentence)
            for client in others:
                client.sock.close()
            first.ask(PROMPT)
            with provider.take() as upstream:
                upstream.start(A)
                assert first.head().status == 200 and first.chunk() == b"a"
                upstream.finish()
                assert first.chunk() == b""
    finally:
        process.terminate()
        errors += process.communicate()[1]
    lines = [line for line in errors.splitlines() if "a connection was not accepted" in line]
    most = 2 + 3 * (time.monotonic() - began)
    assert 2 <= len(lines) <= most and all("too many open files" in line for line in lines), errors
    assert re.search(r"\(\d+ times\)", errors) and "Traceback" not in errors and "The client left" not in errors, errors


# What becomes of a large request, or answer.
LARGE = [
    "answered", "not JSON", "refused by upstream", "cut by upstream", "garbled by upstream", "a large document",
    "a large error", "left",
]


@pytest.mark.skipif(
    not os.path.exists("/proc/self/statm") or sys.implementation.name != "cpython",
    reason="needs /proc and CPython",
)
@pytest.mark.parametrize("fate", LARGE)
def test_memory_of_what_is_over_is_given_back_without_a_collector(
    server: streamproxy.Server, provider: Provider, fate: str
) -> None:
    prompt = b'{"prompt": "' + b"x" * 1_000_000 + (b'"}' if fate != "not JSON" else b"")
    document = json.dumps({
        "choices": [{"index": 0, "message": {"content": "y" * 1_000_000}, "finish_reason": "stop"}]
    }).encode()
    answers = {
        "answered": STREAM_HEAD + chunk(A) + chunk(DONE) + b"0\r\n\r\n",
        "refused by upstream": error_answer(400, b'{"error": {"message": "no"}}'),
        "cut by upstream": STREAM_HEAD + chunk(A),
        "garbled by upstream": OK + JSON + b"Content-Length: 1000000\r\n\r\n" + b"{" * 1_000_000,
        "a large document": OK + JSON + b"Content-Length: %d\r\n\r\n" % len(document) + document,
        "a large error": error_answer(422, b'{"error": {"message": "' + b"z" * 1_000_000 + b'"}}'),
    }

    def memory() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()  # type: ignore[union-attr]

    def once() -> None:
        with Client(server).ask(prompt, Connection="close") as client:
            if fate == "not JSON":
                assert client.error()[0] == 400
                return
            with UpstreamPeer(provider.listener.accept()[0]) as upstream:
                if fate == "left":
                    client.sock.close()
                    assert upstream.gone()
                    return
                with contextlib.suppress(OSError):  # it may have heard enough
                    upstream.send(answers[fate])
                    upstream.sock.shutdown(socket.SHUT_WR)
                assert client.gone()
        Peer.opened.clear()

    gc.collect()
    gc.disable()
    try:
        for _ in range(10):
            once()
        count, most = (60, 200_000) if fate == "answered" else (20, 300_000)
        for _ in range(3):  # what is in pieces takes more for once; what is kept does so each time
            before = memory()
            for _ in range(count):
                once()
            grown = (memory() - before) / count
            if grown < most:
                break
        assert grown < most, f"{grown:.0f} bytes a request"
    finally:
        gc.enable()


# ---------------------------------------------------------------- all of it, in hundreds of orders

ONLY_ORDER = os.environ.get("TEST_ORDER", "")  # the one to play again

# Small, so that each is met in an order of a hundred steps.
SMALL = {
    "MAX_PARSED": 100,
    "MAX_PIPELINED": 600,
    "MAX_DISCARDED": 300,
    "MAX_ALARMS": 2,
    "MAX_READY": 2,
    "SPARE_CONNECTIONS": 2,
    "MAX_SURPLUS": 2,
    "MAX_IDLE_CONNECTIONS": 2,
    "MAX_BEGINNINGS": 2,
}


class PlayedLoop(streamproxy.Loop):
    """One that knows who watches what, and which alarms were set."""

    def __init__(self, **given: Any) -> None:
        self.owners: dict[int, Any] = {}
        self.alarms: list[streamproxy.Alarm] = []
        super().__init__(**given)

    started = True

    def start(self) -> None:
        pass

    def stop(self) -> None:
        for _ in range(5):
            self.turn(0)

    def watch(self, sock: socket.socket, events: int, call: Any) -> None:
        owner = call.__self__
        before = self.owners.get(sock.fileno(), owner)
        handed_over = {type(before), type(owner)} == {streamproxy.Source, streamproxy.Spare}
        assert before is owner or handed_over, (before, owner)
        self.owners[sock.fileno()] = owner
        super().watch(sock, events, call)

    def unwatch(self, sock: socket.socket) -> None:
        assert sock.fileno() >= 0, "closed before it is unwatched"
        self.owners.pop(sock.fileno(), None)
        super().unwatch(sock)

    def arm(self, alarm: streamproxy.Alarm, when: float) -> None:
        if all(alarm is not known for known in self.alarms):
            self.alarms.append(alarm)
        super().arm(alarm, when)


class PlayedShutdown(streamproxy.Shutdown):
    """One that plays on until all is over, or the time for it."""

    play: ClassVar[Play]

    def wait(self, timeout: float, tell: Callable[[], object]) -> bool:
        return self.play.on_stopping(timeout)


def narrow(sock: socket.socket) -> socket.socket:
    """sock, of which little is taken at a time, as of those that it accepts."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2048)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    return sock


class Wire:
    """An end of a connection that is played: what it has still to send, and what it got."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.sock.setblocking(False)
        self.left = b""  # to send
        self.got = bytearray()
        self.end = ""  # how it was seen to end
        self.closed = self.reset = False

    def send(self, size: int) -> None:
        with contextlib.suppress(BlockingIOError):
            try:
                self.reset = self.reset or (bool(self.left) and self.is_too_late())
                self.left = self.left[0 if self.closed else self.sock.send(self.left[:size]) :]
            except ConnectionError:  # which is told once
                self.left, self.reset = b"", True

    def is_too_late(self) -> bool:
        """Whether the other side has closed, so that nobody will hear what is sent."""
        if self.closed or not hasattr(select, "POLLRDHUP"):
            return False
        poll = select.poll()
        poll.register(self.sock, select.POLLRDHUP)
        return bool(poll.poll(0))

    def read(self, size: int) -> None:
        with contextlib.suppress(BlockingIOError):
            try:
                while size > 0 and not self.end:
                    data = self.sock.recv(min(size, 65536))
                    self.got += data
                    size -= len(data)
                    self.end = "" if data else "reset" if self.reset else "end"
            except ConnectionError:
                self.end = "reset"

    def close(self, reset: bool = False) -> None:
        if reset:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()
        self.closed = True


@dataclasses.dataclass
class Asked:
    """A request of a played client, and what upstream made of it."""

    id: str
    kind: str
    method: str = "POST"
    http10: bool = False
    tokens: int = 0  # that upstream sent
    whole: bool = False  # upstream has said that these were all
    asked: int = 0  # how often upstream has read it whole


class PlayedClient(Wire):
    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self.asked: list[Asked] = []
        self.is_garbage = self.half = False


class PlayedUpstream(Wire):
    """A connection to upstream; its answer is a list of pieces that are sent one by one."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self.script: list[Any] = []
        self.asked: Asked | None = None
        self.hears = True  # or it has said what nobody asked for
        self.answers = 0  # that it has begun

    def close(self, reset: bool = False) -> None:
        if self.asked and self.answers > 1 and not self.said:
            self.asked.asked -= 1  # it looks as if it had been closed before: the request may be sent once more
        super().close(reset)


class Play:
    """One order of what clients, upstream, threads, clocks and the server do, as a seed has it."""

    KINDS = (
        *("text", "events", "api") * 5,
        "source",
        "health",
        "page",
        "nothing",
        "no json",
        "large",
        "no length",
        "preflight",
        "models",
    )

    def __init__(self, seed: int, folder: str) -> None:
        self.rng = random.Random(seed)
        self.over_tcp = seed % 10 == 0  # where a reset is one; else over what is faster
        self.still = Still()
        self.clients: list[PlayedClient] = []
        self.upstreams: list[PlayedUpstream] = []
        self.requests: dict[str, Asked] = {}
        self.nears: list[socket.socket] = []
        self.faulty, self.hit = False, ""
        self.alive: dict[str, weakref.WeakSet[Any]] = {}
        self.begun = 0  # exchanges
        self.has_tokens = self.rng.random() < 0.3
        limits = {"max_streams": self.rng.choice([0, 3, 6]), "max_streams_per_client": self.rng.choice([0, 0, 4])}
        self.settings = streamproxy.Settings(
            bind="127.0.0.1:0" if self.over_tcp else f"unix:{folder}/s",
            api_key=KEY,
            upstream="http://upstream.example/v1",
            max_body=20_000,
            heartbeat=5.0,
            connect_timeout=10.0,
            first_byte_timeout=20.0,
            idle_timeout=8.0,
            total_timeout=60.0,
            client_timeout=30.0,
            token_file=token_file(Path(folder), "a token-a\n") if self.has_tokens else "",
            drain_timeout=self.rng.choice([0.0, 100.0]), access_log="all",
            allow_model=("*",) if self.rng.random() < 0.5 else (),
            **limits,
        )

    def run(self) -> None:
        """Play it in a process that has nothing else to do, and see that nothing is left of it."""
        before = descriptors_now()
        with contextlib.ExitStack() as self.stack:
            stack = self.stack
            stack.callback(self.close)
            if self.over_tcp:
                self.listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            stack.enter_context(self.still.replaced())
            values = {name: self.rng.choice([value, getattr(streamproxy, name)]) for name, value in SMALL.items()}
            values["READ_SIZE"], values["TAKE_SIZE"] = self.rng.choice([500, 65536]), self.rng.choice([100, 16384])
            played = {"Loop": PlayedLoop, "Shutdown": PlayedShutdown}
            stack.enter_context(unittest.mock.patch.multiple(streamproxy, **played, **values))
            for kind in (
                "Client",
                "Request",
                "Exchange",
                "Stream",
                "Answer",
                "Job",
                "Source",
                "Record",
                "Viewer",
                "Spare",
            ):
                stack.enter_context(self.followed(kind))
            PlayedShutdown.play = self
            self.server = streamproxy.Server(self.settings)
            self.still.hold(self.server.hub)
            self.server.hub.upstream.dial = self.dial  # type: ignore[method-assign]
            narrow(self.server.socket)
            self.server.start()
            self.patience = self.rng.choice([0.0, 0.05, 0.3])  # how often who could say all says a part, or nothing
            for _ in range(self.rng.choice([20, 60, 150])):
                self.step()
            self.end()
        left = {kind: list(alive) for kind, alive in self.alive.items() if alive}
        assert not left or sys.implementation.name != "cpython", left  # without a collector
        assert descriptors_now() == before, "descriptors"

    def followed(self, kind: str) -> Any:
        """Have the objects of a kind be known as long as they live."""
        made = getattr(streamproxy, kind)
        alive = self.alive[kind] = weakref.WeakSet()
        before = made.__init__

        def init(this: Any, *args: Any, **more: Any) -> None:
            alive.add(this)
            self.begun += kind == "Exchange"
            before(this, *args, **more)

        return unittest.mock.patch.object(made, "__init__", init)

    def close(self) -> None:
        for wire in [*self.clients, *self.upstreams]:
            wire.sock.close()
        del PlayedShutdown.play

    # What may happen next.

    def step(self) -> None:
        clients = [client for client in self.clients if not client.closed]
        upstreams = [upstream for upstream in self.upstreams if not upstream.closed]
        choice = self.rng.random()
        if choice < 0.04 or not clients:
            self.connect()
        elif self.still.jobs and choice < 0.25:
            self.finish_job()
        elif upstreams and choice < 0.6:
            self.play_upstream(self.rng.choice(upstreams))
        elif choice < 0.95:
            self.play_client(self.rng.choice(clients))
        elif choice < 0.99:
            self.still.now += self.rng.choice([0.01, 0.3, 0.6, 1.0, 4.0, *([9.0, 31.0, 76.0] if self.patience else [])])
        elif choice < 0.995:
            self.inject_fault()
        for _ in range(self.rng.choice([0, 1, 1, 2])):
            self.turn()

    def connect(self) -> None:
        sock = narrow(socket.socket(self.server.socket.family))
        sock.connect(self.server.server_address)
        self.clients.append(PlayedClient(sock))

    def play_client(self, client: PlayedClient) -> None:
        choice = self.rng.random()
        if choice < 0.4:
            for _ in range(self.rng.choice([1, 1, 1, 2, 4])):
                if len(client.asked) < 8 and (not client.left or self.rng.random() < 0.1):
                    client.left += self.request(client)
            client.send(self.some())
        elif choice < 0.6:
            client.send(self.some())
        elif choice < 0.95:
            client.read(self.some())
        elif choice < 0.96:
            client.left += self.rng.choice([b"\r\n", b"x" * 50, b"\x16\x03\x01", b"GET /\r\n", b"x" * 2000])
            client.is_garbage = True
        elif choice < 0.965:
            with contextlib.suppress(OSError):
                client.sock.shutdown(socket.SHUT_WR)
                client.half = True
        elif choice < 0.98:
            client.close(reset=self.rng.random() < 0.5)

    def some(self) -> int:
        """How much is sent, or read, at a time."""
        return self.rng.choice([1, 10, 100, 2000]) if self.rng.random() < self.patience else 10**6

    def request(self, client: PlayedClient) -> bytes:
        """The bytes of a request, which the client is to send."""
        kind = self.rng.choice(self.KINDS)
        asked = Asked(f"r{len(self.requests)}.", kind)
        self.requests[asked.id] = asked
        client.asked.append(asked)
        path, fields, body = "/", f"Host: localhost\r\nX-Request-Id: {asked.id}\r\n", b""
        prompt = f"id={asked.id} " + "x" * self.rng.choice([0, 0, 0, 1500, 18_000])
        if kind in ("text", "events", "no length"):
            body = json.dumps({"prompt": prompt}).encode()
        elif kind == "api":
            body, path = json.dumps({**ASKED, "prompt": prompt}).encode(), "/v1/chat/completions"
        elif kind == "large":
            body = b"x" * 21_000
        elif kind == "no json":
            body = b"{"
        else:
            asked.method = "OPTIONS" if kind == "preflight" else "HEAD" if self.rng.random() < 0.1 else "GET"
            path = {"health": "/healthz", "page": "/", "nothing": "/nothing", "source": f"/?prompt=id={asked.id}"}.get(
                kind, "/v1/models"
            )
        if kind in ("events", "source"):
            fields += "Accept: text/event-stream\r\n"
            asked.method = "POST" if body else "GET"
        asked.http10 = self.rng.random() < 0.1
        if self.has_tokens and self.rng.random() < 0.9:
            fields += "Authorization: Bearer token-a\r\n"
        if self.rng.random() < 0.1:
            fields += "Connection: close\r\n"
        if body and self.rng.random() < 0.1:
            fields += "Expect: 100-continue\r\n"
        if body and self.rng.random() < 0.2 and not asked.http10:
            fields += "Transfer-Encoding: chunked\r\n"
            body = b"".join(map(chunk, filter(None, (body[:7], body[7:])))) + b"0\r\n\r\n"
        elif body and kind != "no length":
            fields += f"Content-Length: {len(body)}\r\n"
        return f"{asked.method} {path} HTTP/1.{1 - asked.http10}\r\n{fields}\r\n".encode() + (
            body if kind != "no length" else b""
        )

    def dial(self, lifeline: Any) -> streamproxy.Connection:
        """What a thread comes to; as if it took no time, which is as good as any: the loop hears of it in its own."""
        choice = self.rng.random()
        if choice < 0.1:
            raise streamproxy.UpstreamError("Upstream cannot be reached: connection refused.")
        if self.over_tcp:
            near = narrow(socket.socket())
            near.connect(self.listener.getsockname())
            far = self.listener.accept()[0]
        else:
            near, far = socket.socketpair()
        narrow(near).setblocking(False)
        self.nears.append(near)
        self.upstreams.append(PlayedUpstream(narrow(far)))
        return streamproxy.Connection(near, self.server.hub.upstream.target.key)

    def finish_job(self) -> None:
        self.still.jobs.rotate(self.rng.randrange(len(self.still.jobs)))
        self.still.jobs.popleft()()

    def inject_fault(self) -> None:
        """Have the next call of something raise."""
        place, name = self.rng.choice(
            [
                (streamproxy, "encode_head"),
                (streamproxy, "parse_request"),
                (streamproxy, "encode_error"),
                (streamproxy, "parse_answer_head"),
                (streamproxy.Target, "encode"),
                (streamproxy.Limits, "enter"),
                (streamproxy.TextAnswer, "start"),
                (streamproxy.Answer, "feed"),
                (streamproxy.Answer, "close"),
                (streamproxy.Client, "begin"),
                (streamproxy.Client, "expect_body"),
                (streamproxy.Source, "on_ready"),
                (streamproxy.Source, "open"),
                (streamproxy.Viewer, "more"),
                (streamproxy.Viewer, "last"),
                (streamproxy.Stream, "on_drained"),
                (streamproxy.BodyDecoder, "feed"),
                (streamproxy.Client, "abort"),
                (streamproxy.Pool, "take"),
                (streamproxy.Exchange, "refuse"),
            ]
        )
        before = vars(place).get(name)
        if not before or self.faulty:
            return

        def fail(*args: Any, **more: Any) -> Any:
            if getattr(place, name) is fail:
                setattr(place, name, before)
                self.hit = f"{place.__name__}.{name}"
                raise ZeroDivisionError(name)
            return before(*args, **more)

        setattr(place, name, fail)
        self.stack.callback(setattr, place, name, before)
        self.faulty = True

    # What upstream does.

    def play_upstream(self, upstream: PlayedUpstream) -> None:
        choice = self.rng.random()
        if (
            not (upstream.asked or upstream.left or upstream.got) and choice < 0.05
        ):  # it is idle, or its request is on its way
            if choice < 0.04:
                upstream.close(reset=choice < 0.02)
            else:
                upstream.left += self.rng.choice(
                    [b"HTTP/1.1 408 Request Timeout\r\n\r\n", b"\0", b"HTTP/1.1 200 OK\r\n"]
                )
                upstream.send(10**6)
                upstream.hears = False
        elif choice < 0.35:
            upstream.read(self.some())
            self.hear(upstream)
        elif choice < 0.99:
            for _ in range(self.rng.choice([1, 1, 2, 4, 20])):
                self.say(upstream)
            upstream.send(7 if self.rng.random() < self.patience else 10**6)
        else:
            upstream.close(reset=self.rng.random() < 0.5)

    def hear(self, upstream: PlayedUpstream) -> None:
        """Take the next request, and think of an answer, if there is one."""
        head, end, rest = bytes(upstream.got).partition(b"\r\n\r\n")
        if not end or upstream.asked or not upstream.hears:
            return
        length = re.search(rb"(?i)\r\ncontent-length: ([0-9]+)", head)
        size = int(length[1]) if length else 0
        early = self.rng.random() < 0.05
        found = re.search(rb"id=(r\d+\.)", rest)
        if len(rest) < size and not (early and found):
            return
        asked = self.requests[found[1].decode()] if found else Asked("", "models")
        asked.asked += len(rest) >= size
        assert asked.asked <= 1, f"{asked.id} was paid for twice"
        upstream.asked, upstream.got = asked, bytearray(rest[size:])
        upstream.script, upstream.said = self.answer(asked), False
        upstream.answers += 1
        asked.tokens, asked.whole = 0, False

    def answer(self, asked: Asked) -> list[Any]:
        """The pieces of an answer: bytes, or what is done between them."""
        rng, close = self.rng, b"Connection: close\r\n" if self.rng.random() < 0.2 else b""
        choice = rng.random()
        if choice < 0.1:
            status = rng.choice([400, 401, 429, 500])
            document = b'{"error": {"message": "no"}}'
            return [
                b"HTTP/1.1 %d X\r\n" % status + JSON + close + b"Content-Length: %d\r\n\r\n" % len(document),
                document,
                "over",
            ]
        if choice < 0.15:
            return [
                rng.choice([b"garbage\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n", CLOSE_HEAD[:20]]),
                rng.choice(["cut", "reset", "silence"]),
            ]
        if choice < 0.2 and asked.kind in ("text", "events", "source"):
            text = f"[{asked.id}0:]"
            document = json.dumps(
                {"choices": [{"index": 0, "message": {"content": text}, "finish_reason": "stop"}]}
            ).encode()
            return [
                "token",
                b"HTTP/1.1 200 OK\r\n" + JSON + close + b"Content-Length: %d\r\n\r\n" % len(document),
                "whole",
                document,
                "over",
            ]
        chunked = rng.random() < 0.8
        wrap = chunk if chunked else bytes
        pieces: list[Any] = [STREAM_HEAD.replace(b"\r\n\r\n", b"\r\n" + close + b"\r\n") if chunked else CLOSE_HEAD]
        for number in range(rng.choice([0, 1, 3, 30])):
            text = f"[{asked.id}{number}:{'x' * rng.choice([0, 0, 0, 1000, 5000])}]"
            pieces += ["token", wrap(delta(text))]
            if rng.random() < 0.1:
                pieces.append(wrap(b": ping\n\n"))
        fate = rng.random()
        if fate < 0.15:
            return [*pieces, rng.choice(["cut", "reset", "silence"])]
        if fate < 0.2:
            return [*pieces, wrap(rng.choice([event(b"oops"), event({"error": {"message": "no"}})])), "silence"]
        if fate < 0.23 and chunked:
            return [*pieces, b"0x\r\n", "silence"]
        end = rng.choice(
            [[STOP], [DONE], [STOP, DONE], [STOP, event({"choices": [], "usage": {"total_tokens": 1}}), DONE]]
        )
        pieces += ["whole", *map(wrap, end)]
        return [*pieces, *([b"0\r\n\r\n"] if chunked else []), "over" if chunked else "cut"]

    def say(self, upstream: PlayedUpstream) -> None:
        """The next piece of the answer."""
        asked = upstream.asked
        if not upstream.script or not asked:
            return
        piece = upstream.script.pop(0)
        while piece in ("token", "whole"):
            asked.tokens += piece == "token"
            asked.whole = asked.whole or piece == "whole"
            piece = upstream.script.pop(0)
        if isinstance(piece, bytes):
            upstream.left += piece
            upstream.said = True
        elif piece == "over":
            upstream.asked = None
        elif upstream.left:
            upstream.script.insert(0, piece)
        elif piece != "silence":
            upstream.close(reset=piece == "reset")

    # What must hold.

    def is_alive(self, owner: Any, fd: int) -> bool:
        """Whether fd is a socket of its owner's, which is not over."""
        if isinstance(owner, streamproxy.Client):
            return owner in self.server.clients and owner.sock.fileno() == fd
        if isinstance(owner, streamproxy.Source):
            return owner.state != owner.OVER and owner.connection.sock.fileno() == fd
        if isinstance(owner, streamproxy.Spare):
            return owner.connection.sock.fileno() == fd
        return isinstance(owner, PlayedLoop) or owner.listener.sock.fileno() == fd

    def turn(self) -> None:
        self.still.turn()
        for words in self.still.lines.errors:
            assert self.faulty or words.startswith(
                ("a connection was closed: there are too many", "the token file cannot be looked at")
            ), words
        server, loop = self.server, self.server.hub.loop
        for fd, owner in loop.owners.items():
            assert self.is_alive(owner, fd), f"{owner!r} watches what it should not"
        exchanges = [client.exchange for client in server.clients if client.exchange]
        for client in server.clients:
            busy = client.state in (client.BODY, client.ANSWERING)
            assert client.state != client.CLOSED and busy == bool(client.exchange), client
            assert not busy or client.exchange.client is client
            listens = client.sock.fileno() in loop.owners
            assert listens or client.lost or len(client.data) > streamproxy.MAX_PIPELINED, f"{client!r} does not listen"
        streams = [source.stream for source in list(self.alive["Source"]) if source.state != source.OVER]
        for stream in streams:
            assert not stream.over and sum(stream is other for other in streams) == 1
            assert any(exchange.stream is stream for exchange in exchanges), f"{stream._source!r} is nobody's"
        for viewer in list(self.alive["Viewer"]):
            if viewer.state != viewer.OVER and viewer.state != viewer.SILENT:
                assert (
                    any(exchange.stream and exchange.stream.viewer is viewer for exchange in exchanges)
                    or viewer.client.lost
                ), f"{viewer!r} is nobody's"
        counts = server.snapshot()
        places = sum(bool(exchange.place) for exchange in exchanges)
        assert counts["streams"] == places, (counts, places)
        assert counts["connections"] == len(server.clients) and len(self.still.lines.requests) == self.begun - len(
            exchanges
        )
        assert len(self.alive["Spare"]) >= counts["warm connections"]

    # How it ends.

    def end(self) -> None:
        how = self.rng.choice(["stop", "clients leave", "clients read on", "silence"])
        if how == "clients leave":
            for client in self.clients:
                if not client.closed:
                    client.close(reset=self.rng.random() < 0.5)
        if how != "stop":
            self.play_on(1000, reads=how == "clients read on")
            assert not self.server.clients, f"{how}: {self.server.clients} of {self.server.snapshot()}"
        self.server.stop()
        for call in list(self.server.hub.loop.alarms):
            assert call.call is None or call.at == float("inf"), call.call
        assert list(self.server.hub.loop.owners.values()) == [self.server.hub.loop]  # who listens to its bell
        self.server.hub.loop.alarms.clear()
        self.server.hub.loop.owners.clear()
        assert all(near.fileno() < 0 for near in self.nears)  # closed, not only forgotten
        counts = self.server.snapshot()
        assert counts == {"connections": 0, "streams": 0, "threads": 0, "warm connections": 0}, counts
        lines = self.still.lines.requests
        assert len(lines) == self.begun
        ids = [line["id"] for line in lines if line["id"] in self.requests]
        assert len(ids) == len(set(ids)), "a request has two lines"
        for client in self.clients:
            if not client.closed:
                client.read(10**9)
                left = self.check_answers(client, {str(line["id"]): line for line in lines})
                assert not left or how != "clients read on" or self.faulty, f"{left} were not answered"

    def play_on(self, seconds: float, reads: bool) -> bool:
        """Let the clock go on; whether all is over then."""
        until = self.still.now + seconds
        while self.still.now < until and (self.server.clients or self.still.jobs):
            if self.still.jobs and self.rng.random() < 0.8:
                self.finish_job()
            for client in self.clients:
                if reads and not client.closed:
                    client.send(9999)
                    client.read(10**6)
            for upstream in self.upstreams:
                if not upstream.closed and self.rng.random() < 0.7:
                    upstream.read(10**6)
                    self.hear(upstream)
                    self.say(upstream)
                    if not upstream.closed:
                        upstream.send(10**6)
            self.turn()
            self.still.now += self.rng.choice([0.01, 0.1, 1.0, 3.0])
        return not self.server.clients

    def on_stopping(self, timeout: float) -> bool:
        for _ in range(3):
            self.turn()
        return self.play_on(timeout, reads=self.rng.random() < 0.5)

    def check_answers(self, client: PlayedClient, lines: dict[str, Any]) -> list[Asked]:
        """What a client got is what it asked for, in order; what looks complete is; return what should be answered."""
        data, asked = bytes(client.got), list(client.asked)
        while data and not client.is_garbage:
            head, end, data = data.partition(b"\r\n\r\n")
            if not end:
                assert client.end
                return []
            line, *fields = head.decode("latin-1").split("\r\n")
            status = int(re.fullmatch(r"HTTP/1\.1 (\d{3}) [A-Za-z -]+", line)[1])  # type: ignore[index]
            known = dict(field.split(": ", 1) for field in fields)
            if status == 100:
                continue
            request = asked.pop(0)
            if known["X-Request-Id"] != request.id:
                assert status in (408, 503) or self.faulty, (status, request)  # of one whose head was not read
                return []
            body, whole = b"", True
            if request.method == "HEAD" or status == 204:
                pass
            elif "Content-Length" in known:
                size = int(known["Content-Length"])
                body, data = data[:size], data[size:]
                whole = len(body) == size
            elif "Transfer-Encoding" in known:
                decoder = streamproxy.ChunkedDecoder()
                body = decoder.feed(data)
                whole, data = decoder.complete, decoder.rest
                assert not decoder.broken
            else:
                sure = self.over_tcp or lines[request.id]["ending"] == "complete"
                body, data, whole = data, b"", sure and client.end == "end"
            self.check_body(request, status, body, whole, lines[request.id])
            if not whole or known.get("Connection") == "close":
                assert not data
                return []
        known = [lines[request.id]["error"] for request in client.asked if request.id in lines]
        flooded = "The client sent too much while its answer was on its way." in known
        slow = "large" in [request.kind for request in client.asked]  # whose rest may not have come in time
        excused = flooded or slow or client.is_garbage or client.left or client.reset or client.half
        return [] if excused else asked

    def check_body(self, request: Asked, status: int, body: bytes, whole: bool, entry: Any) -> None:
        said = f"{request} {status} {body[-300:]!r} {whole=} {entry}"
        assert entry["status"] == status, said
        if request.kind in ("text", "events", "source", "api") and status == 200:
            numbers = [int(number) for number in re.findall(rb"\[" + request.id.encode() + rb"(\d+):x*\]", body)]
            assert numbers == list(range(len(numbers))), said
            assert not re.search(rb"\[(?!" + request.id.encode() + rb")r\d+\.", body), said  # another's
            if whole and b'{"error": ' not in body:
                assert entry["ending"] == "complete" or self.faulty, said
                assert request.whole and len(numbers) == request.tokens, said
            elif whole:
                assert entry["ending"] != "complete", said
        elif whole and status == 200:
            assert entry["ending"] == "complete", said
        else:
            assert entry["ending"] != "complete" or status == 204 or not whole, said


def test_orders_of_all_that_may_happen(tmp_path: Path) -> None:
    gc.collect()
    gc.disable()
    try:
        for seed in [int(ONLY_ORDER)] if ONLY_ORDER else range(ORDERS):
            try:
                Play(seed, str(tmp_path)).run()
            except BaseException as error:
                raise AssertionError(f"order {seed} (TEST_ORDER={seed}): {error!r}") from error
            if seed % 100 == 0:
                gc.collect()
    finally:
        gc.enable()


# 28 ------------------------------------------------------------------- Library


@pytest.mark.parametrize(("asked", "messages"), [
    ("Say hello", [{"role": "user", "content": "Say hello"}]),
    (({"role": role, "content": role} for role in ("system", "user")),
     [{"role": role, "content": role} for role in ("system", "user")]),
])  # fmt: skip
def test_library_text_of_what_is_asked_and_how_it_ended(provider: Provider, asked: Any, messages: object) -> None:
    answer = streamproxy.stream_text(asked, streamproxy.Settings(upstream=provider.url, api_key=KEY))
    with provider.take() as upstream:  # it is asked at once
        assert json.loads(upstream.body)["messages"] == messages
        upstream.start(ROLE, delta("H\xe4"))
        assert next(answer) == "H\xe4"  # before the end
        assert (answer.finish_reason, answer.usage) == (None, None)
        usage = event({"choices": [], "usage": {"total_tokens": 3}})
        upstream.event(delta("\U0001f44b"), delta("", "length"), usage, DONE)
        assert list(answer) == ["\U0001f44b"]
    assert (answer.finish_reason, answer.usage) == ("length", {"total_tokens": 3})
    answer.close()
    assert list(answer) == []


def test_library_yields_no_empty_text_for_a_part_of_a_character(provider: Provider) -> None:
    answer = streamproxy.stream_text("x", streamproxy.Settings(upstream=provider.url))
    size = streamproxy.READ_SIZE - 1
    with provider.take() as upstream:
        upstream.start(delta("a" * size + "\U0001f44b" * 10))
        upstream.finish()
        pieces = list(answer)
    assert all(pieces) and "".join(pieces) == "a" * size + "\U0001f44b" * 10


# What upstream sends; and str(error), error.status and the text before it.
LIBRARY_FAILURES: dict[str, tuple[bytes, str, int, list[str]]] = {
    "cut": (STREAM_HEAD + chunk(A), "Upstream closed the connection within its answer.", 502, ["a"]),
    "reported": (STREAM_HEAD + chunk(A) + chunk(event({"error": {"message": "It broke."}})), "It broke.", 502, ["a"]),
    "refused": (error_answer(400, b'{"error": {"message": "Too long by 3."}}'), "Too long by 3.", 400, []),
    "with the key": (error_answer(429, b'{"error": "No %b."}' % KEY.encode()), "No [redacted].", 429, []),
    "without": (error_answer(401), "Upstream refused our API key with status 401.", 502, []),
}


def test_library_failure_is_raised_after_the_text_that_came_and_is_a_sentence(provider: Provider) -> None:
    before = threading.active_count(), descriptors()
    for sent, words, status, text in LIBRARY_FAILURES.values():
        got: list[str] = []
        answer = streamproxy.stream_text("x", streamproxy.Settings(upstream=provider.url, api_key=KEY))
        with provider.take() as upstream:
            upstream.send(sent)
        with pytest.raises(streamproxy.ProxyError) as raised:
            got.extend(answer)
        assert (str(raised.value), raised.value.status, got) == (words, status, text)
        assert list(answer) == []
    assert wait_for(lambda: (threading.active_count(), descriptors()), lambda now: now == before)


@pytest.mark.parametrize("asked", ["", [], "\ud800", [{"role": "user"}], {"prompt": "x"}])
def test_library_what_cannot_be_asked_is_said_at_once_and_leaves_nothing_open(provider: Provider, asked: Any) -> None:
    before = threading.active_count(), descriptors()
    with pytest.raises(streamproxy.RequestError, match="non-empty|surrogate") as raised:
        streamproxy.stream_text(asked, streamproxy.Settings(upstream=provider.url))
    assert raised.value.status == 400 and (threading.active_count(), descriptors()) == before


@pytest.mark.parametrize("how", ["close", "another thread", "break", "collected by its loop"])
def test_library_leaving_the_loop_closes_upstream(provider: Provider, how: str) -> None:
    before = threading.active_count(), descriptors()
    answer = streamproxy.stream_text("x", streamproxy.Settings(upstream=provider.url))
    with provider.take() as upstream:
        upstream.start(A)
        for text in answer:
            assert text == "a"
            if how == "close":
                answer.close()
            if how != "another thread":
                break
            threading.Thread(target=answer.close).start()  # and this waits for the next piece
            with pytest.raises(streamproxy.ProxyError, match="left before its end"):
                next(answer)
        collect: Callable[[], object] = gc.collect
        if how == "collected by its loop":
            stream = answer._stream
            assert stream
            cycle: list[object] = [answer]
            cycle.append(cycle)
            collect = functools.partial(stream.hub.loop.post, gc.collect)
            del stream, cycle
        del answer
        collect()  # as PyPy would in time
        assert upstream.gone()
    assert wait_for(lambda: (threading.active_count(), descriptors()), lambda now: now == before)


def test_library_program_that_ends_within_an_answer_ends_at_once_and_silently(provider: Provider) -> None:
    code = f"from streamproxy import *; text = stream_text('x', Settings(upstream={provider.url!r})); print(next(text))"
    process = subprocess.Popen([sys.executable, "-W", "error", "-c", code], cwd=HERE, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    with provider.take() as upstream:
        upstream.start(A)
        assert process.communicate(timeout=DEADLINE) == ("a\n", "") and process.returncode == 0
        assert upstream.gone()


# 30 ------------------------------------------------------------------- Command line


def test_command_line_demo_end_to_end_and_drain_on_sigterm() -> None:
    code = "import sys, streamproxy; streamproxy.DEMO_PAUSE = 0.01; sys.exit(streamproxy.main())"
    with launched("--demo", code=code) as (process, front):
        client = Client(front).ask({"prompt": "Grüße 👋"}, Connection="close")
        assert client.head().status == 200
        first = client.chunk()
        process.send_signal(signal.SIGTERM)
        assert "Grüße 👋" in (first + client.body()).decode()
        assert process.wait(DEADLINE) == 0
        assert process.stderr and " ending=complete " in process.stderr.read()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_command_line_second_signal_aborts_at_once(provider: Provider, number: signal.Signals) -> None:
    with launched(OPENAI_BASE_URL=provider.url) as (process, front), Client(front).ask(PROMPT) as client:
        with provider.take() as upstream:
            upstream.start(A)
            client.head()
            client.chunk()
            process.send_signal(number)
            wait_for(lambda: refused(front))
            process.send_signal(number)
            assert client.rest() == b"" and upstream.gone()
            assert process.wait(DEADLINE) == 0
            assert process.stderr and " ending=aborted " in process.stderr.read()


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP")
def test_command_line_sighup_has_the_token_file_read_and_says_what_came_of_it(tmp_path: Path) -> None:
    path = Path(token_file(tmp_path, "a token-a\n"))
    words = "looked again, as asked: "
    with launched("--demo", "--token-file", str(path)) as (process, _):
        for text, says in {
            "a token-a\nb token-b\nb token-c\n": "the token file names 2 clients",
            "a token-a b\n": "the token file was not taken, its last version counts: line 1 is not NAME TOKEN",
            "a token-a\n": "the token file names 1 client",
        }.items():
            path.write_text(text)
            process.send_signal(signal.SIGHUP)
            line = next(line for line in process.stderr if words in line)
            assert re.fullmatch(r"time=[-\d]+T[\d:.]+Z level=info message=" + re.escape(f'"{words}{says}"\n'), line)
    with launched("--demo") as (process, _):
        process.send_signal(signal.SIGHUP)
        assert f"{words}there is no token file (--token-file)" in process.stderr.readline()


# What ends with SIGTERM, and what is done before.
STUCK = {
    "stderr": "",
    "resolver": "socket.getaddrinfo = lambda *_: threading.Event().wait(60)",
    "client": "",
}


@pytest.mark.parametrize("what", STUCK)
def test_command_line_sigterm_ends_what_is_stuck(provider: Provider, what: str) -> None:
    begin = "import socket, sys, threading, streamproxy; streamproxy.ABORT_GRACE = 0.3; streamproxy.CLOSE_TIMEOUT = 0.2"
    upstream = "http://api.example/v1" if what == "resolver" else provider.url
    with contextlib.ExitStack() as stack:
        front = Front(f"unix:{stack.enter_context(tempfile.TemporaryDirectory())}/s")
        flags = ["--bind", front.url, "--drain-timeout", "0.1"]
        process = subprocess.Popen(
            [sys.executable, "-c", f"{begin}\n{STUCK[what]}\nsys.exit(streamproxy.main())", *flags],
            env={**os.environ, "OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": upstream}, stdout=subprocess.DEVNULL,
            stderr=stuck_pipe(stack) if what == "stderr" else subprocess.DEVNULL, cwd=HERE,
        )  # fmt: skip
        stack.callback(process.wait)
        stack.callback(process.kill)
        wait_for(lambda: process.poll() is not None or not refused(front))
        with Client(front).ask(method="GET", path="/healthz") as first:
            assert first.head().status == 200  # it heeds signals by now
        client = stack.enter_context(Client(front).ask(PROMPT))
        if what != "resolver":
            peer = stack.enter_context(provider.take())
            peer.start(A)
            client.head()
        if what == "client":
            peer.sock.settimeout(0.3)
            with contextlib.suppress(socket.timeout):
                while True:
                    peer.event(delta("x" * 60000))
        process.terminate()
        assert process.wait(DEADLINE / 2) == 0


# What is put before the program, so that from some time on no thread can be started but those that dial.
NO_THREAD = """
import sys, threading, streamproxy
start = threading.Thread.start
def refuse(thread):
    if thread._target.__name__ != "process_request_thread":
        raise RuntimeError
    start(thread)
def announce(server, say=streamproxy._announce):
    threading.Thread.start = refuse
    say(server)
"""


def test_command_line_signals_count_where_no_more_thread_can_be_started(provider: Provider) -> None:
    code = f"{NO_THREAD}\nstreamproxy._announce = announce\nsys.exit(streamproxy.main())"
    with launched(OPENAI_BASE_URL=provider.url, code=code) as (process, front):
        with Client(front).ask(PROMPT) as client, provider.take() as upstream, Client(front).ask(PROMPT) as other:
            provider.take().start(A)
            upstream.start(A)
            assert client.head().status == other.head().status == 200
            process.send_signal(signal.SIGTERM)
            wait_for(lambda: refused(front))
            upstream.finish()
            assert client.body() == b"a"
            process.send_signal(signal.SIGTERM)
            assert other.rest() == b"1\r\na\r\n"
        assert process.wait(DEADLINE) == 0


@pytest.mark.parametrize("entry", ["sys.exit(streamproxy.main())", "streamproxy.run_script()"])
def test_command_line_without_a_thread_is_one_line_and_status_1(entry: str) -> None:
    code = f"{NO_THREAD}\nthreading.Thread.start = refuse\n{entry}"
    words = "streamproxy: no thread can be started: the system's limit is reached\n"
    assert run(code=code, OPENAI_API_KEY=KEY, STREAMPROXY_BIND="127.0.0.1:0") == (1, "", words)


@pytest.mark.skipif(not shutil.which("sh"), reason="needs a shell")
def test_command_line_serves_with_standard_streams_that_are_closed(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        served = []
        for number, closed in enumerate(["2>&-", ">&-", ">&- 2>&-", "<&- >&- 2>&-"]):
            front = Front(f"unix:{tmp_path}/{number}")
            command = shlex.join([sys.executable, "-c", RUN, "--demo", "--bind", front.url])
            process = stack.enter_context(subprocess.Popen(["sh", "-c", f"exec {command} {closed}"], cwd=HERE))
            stack.callback(process.kill)
            served.append((closed, process, front))
        for closed, process, front in served:
            wait_for(lambda: process.poll() is not None or not refused(front))  # noqa: B023
            assert process.poll() is None, closed
        clients = [Client(front).ask(PROMPT, Connection="close") for *_, front in served * 3]
        for client in clients:
            assert client.head().status == 200 and client.chunk() == b"You "
            client.sock.close()
        for closed, process, _ in served:
            process.send_signal(signal.SIGTERM)
            assert process.wait(DEADLINE) == 0, closed


def log_of_one_answer(provider: Provider, *flags: str) -> str:
    """What a process writes to stderr that answers once, and is ended."""
    with launched(*flags, OPENAI_BASE_URL=provider.url) as (process, front):
        with Client(front).ask(PROMPT) as client, provider.take() as upstream:
            upstream.start(A)
            upstream.finish()
            client.head()
            client.body()
        process.send_signal(signal.SIGTERM)
        return str(process.stderr.read())


def test_command_line_json_log(provider: Provider) -> None:
    entries = map(json.loads, log_of_one_answer(provider, "--log-format", "json").splitlines())
    entry = next(entry for entry in entries if "ending" in entry)
    assert (entry["ending"], entry["pieces"], entry["usage"]) == ("complete", 1, None)


def test_command_line_log_level(provider: Provider) -> None:
    text = log_of_one_answer(provider, "--log-level", "debug")
    assert re.search(r"time=\S+Z level=debug id=[0-9a-f]{16} step=\"first text\"\n", text)
    assert " ending=complete " in text


@pytest.mark.skipif(not hasattr(signal, "SIGTERM") or os.name != "posix", reason="no SIGTERM")
@pytest.mark.parametrize(("name", "words"), [
    ("socket.getaddrinfo", "streamproxy: ended by a signal before it served\n"),  # which hangs
    ("streamproxy._tune_process", " message=\"shut down: 0 streams ended, 0 cut off\"\n"),
])
def test_command_line_signal_that_comes_before_it_serves(name: str, words: str) -> None:
    begin = f"import os, signal, socket, sys, time, streamproxy\ndo = {name}"
    wait = "threading.Event().wait(60)" if "socket" in name else "do()"
    body = f"os.kill(os.getpid(), signal.SIGTERM); return {wait}"
    code = f"{begin}\nimport threading\ndef late(*_): {body}\n{name} = late\nsys.exit(streamproxy.main())"
    status, _, err = run("--demo", "--bind", "127.0.0.1:0", code=code)
    assert status == 0 and err.endswith(words)


def test_readme_line_for_tokens_and_their_cost_takes_10_000_lines_of_log(tmp_path: Path) -> None:
    jq, random_ = program("jq"), random.Random(1)
    command = shlex.split(readme_block("journalctl -o cat"))
    path = tmp_path / "log"
    file = path.open("w")
    output = streamproxy.Output(file, "json")
    totals = {name: [0, 0] for name in ("alice", "bob", "::1")}
    for number in range(5_000):
        who, used = random_.choice(list(totals)), [random_.randrange(5000), random_.randrange(500)]
        names = ("prompt_tokens", "completion_tokens") if number % 2 else ("input_tokens", "output_tokens")
        usage = dict(zip(names, used)) if number % 10 else None
        totals[who] = [a + b for a, b in zip(totals[who], used if usage else (0, 0))]
        stream = {"stream": f"s{number}"} if number % 3 else {}  # which is read again
        entry = streamproxy.LogEntry(time=str(number), id="1", client=who, ending="complete", usage=usage, **stream)
        for line in (entry, entry if stream else "words"):
            output.add(logging.INFO, 0.0, line)
    with file:
        output.flush()
    lines = f"streamproxy 0.1.0 on http://127.0.0.1:8000\n\n{path.read_text()}"
    jq_line = [jq, *command[command.index("jq") + 1 :]]
    done = subprocess.run(jq_line, input=lines, capture_output=True, text=True, check=False)
    rows = {who: list(map(float, cells)) for who, *cells in (row.split("\t") for row in done.stdout.splitlines())}
    assert done.stderr == "" and rows.keys() == totals.keys()
    for who, (taken, given) in totals.items():
        assert rows[who] == [taken, given, pytest.approx((taken * 0.40 + given * 1.60) / 1e6)]


def test_command_line_no_key() -> None:
    assert run() == (2, "", "streamproxy: no API key: set OPENAI_API_KEY or OPENAI_API_KEY_FILE, or try --demo\n")


def test_command_line_bad_value_is_one_line_and_status_2() -> None:
    cases = [
        ["--idle-timeout", "x"], ["--bind", "0.0.0.0:80"], ["--ca-file", "/no/such/file"], ["--nonsense"],
        ["--mod", "x"], ["extra"], ["--model"],
    ]  # fmt: skip
    code = f"""
import sys, streamproxy
for flags in {cases}:
    try:
        status = streamproxy.main(flags)
    except SystemExit as end:
        status = end.code
    print("end", status, file=sys.stderr)
"""
    status, out, err = run(code=code, OPENAI_API_KEY=KEY)
    assert (status, out) == (0, "")
    assert re.fullmatch(r"(streamproxy: [^\n]+\nend 2\n)*", err) and err.count("end 2") == len(cases)


NO_FLAG = "a secret has no flag, which others could read; allowed:"


@pytest.mark.parametrize(("arguments", "words"), [
    (["--modle", "x"], "--modle: there is no such flag; --model is the nearest, and --help lists them all"),
    (["--nonsense-1=x"], "--nonsense-1: there is no such flag; --help lists them all"),
    (["--api-key", KEY], f"--api-key: {NO_FLAG} OPENAI_API_KEY or OPENAI_API_KEY_FILE"),
    ([f"--check-token={KEY}"], f"--check-token: {NO_FLAG} STREAMPROXY_CHECK_TOKEN or STREAMPROXY_CHECK_TOKEN_FILE"),
    ([f"--api-key {KEY}"], f"--api-key: {NO_FLAG} OPENAI_API_KEY or OPENAI_API_KEY_FILE"),
    (["--demo", KEY], "an argument belongs to no flag; --help lists them all"),
])
def test_flag_that_is_not_there_is_told_without_its_value(arguments: list[str], words: str) -> None:
    assert run(*arguments) == (2, "", f"streamproxy: {words}\n")


def test_command_line_address_taken_is_one_line_and_status_1() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        bind = f"127.0.0.1:{taken.getsockname()[1]}"
        for flags in (["--bind", bind], ["--bind", "127.0.0.1:0", "--resume-bind", bind]):
            assert run("--demo", *flags) == (
                1, "", f"streamproxy: cannot listen at {bind}: address already in use\n",
            )


def test_command_line_path_of_a_socket_that_is_too_long_is_one_line_and_status_1(tmp_path: Path) -> None:
    bind = f"unix:{tmp_path}/{'s' * 108}"
    assert run("--demo", "--bind", bind) == (1, "", f"streamproxy: cannot listen at {bind}: file name too long\n")


@pytest.mark.parametrize("host", ["a..b", "a" * 64 + ".example"])
def test_command_line_name_that_cannot_be_one_is_one_line_and_status_1(host: str) -> None:
    status, out, err = run("--demo", "--bind", f"{host}:80", "--allow-anonymous")
    assert (status, out) == (1, "") and re.fullmatch(f"streamproxy: cannot listen at {host}:80: [^\n]+\n", err)


def test_command_line_fault_has_its_traceback_and_status_1() -> None:
    code = "import streamproxy; streamproxy._serve = lambda *_: 1 / 0; streamproxy.run_script()"
    status, _, err = run("--demo", "--bind", "127.0.0.1:0", code=code)
    assert status == 1 and "ZeroDivisionError" in err


def test_command_line_help_lists_every_setting() -> None:
    status, out, _ = run("--help", COLUMNS="300")
    assert status == 0
    for setting in streamproxy.Settings.TABLE:
        assert setting.variable in out and setting.flag in out
    assert f"streamproxy {streamproxy.__version__}" in run("--version")[1]


# ---------------------------------------------------------------- outputs that are stuck


def stuck_pipe(stack: contextlib.ExitStack) -> int:
    """The end to write to of a pipe that is full, and that nobody reads."""
    reader, writer = os.pipe()
    stack.callback(os.close, reader)
    stack.callback(os.close, writer)
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"x" * 4096)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"x")
    os.set_blocking(writer, True)
    return writer


def orphaned_pipe(stack: contextlib.ExitStack) -> int:
    """One whose reader is gone."""
    reader, writer = os.pipe()
    os.close(reader)
    stack.callback(os.close, writer)
    return writer


def full_disk(stack: contextlib.ExitStack) -> int:
    if not os.path.exists("/dev/full"):
        missing("there is no /dev/full")
    return stack.enter_context(open("/dev/full", "wb", buffering=0)).fileno()


OUTPUTS = {
    "nobody reads it": stuck_pipe,
    "its reader is gone": orphaned_pipe,
    "its disk is full": full_disk,
    "it is closed": None,
}


@contextlib.contextmanager
def launched_into(name: str, kind: str, *flags: str, **environ: str) -> Iterator[tuple[Any, Front]]:
    """The program, of whose standard output or error a kind of trouble is made."""
    with contextlib.ExitStack() as stack:
        front = Front(f"unix:{stack.enter_context(tempfile.TemporaryDirectory())}/s")  # a port could not be read
        command = [sys.executable, "-c", run_with(CLOSE_TIMEOUT=0.2), "--bind", front.url, *flags]
        outputs: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        make = OUTPUTS[kind]
        if make:
            outputs[name] = make(stack)
        else:
            command = ["sh", "-c", f'exec "$@" {1 + (name == "stderr")}>&-', "sh", *command]
        environ = {**os.environ, "OPENAI_API_KEY": KEY, **environ}
        process = subprocess.Popen(command, **outputs, env=environ, cwd=HERE)
        stack.callback(process.wait)
        stack.callback(process.kill)
        wait_for(lambda: process.poll() is not None or not refused(front))
        assert process.poll() is None
        yield process, front


@pytest.mark.parametrize("name", ["stdout", "stderr"])
@pytest.mark.parametrize("kind", OUTPUTS)
def test_output_that_cannot_be_written_touches_no_request_and_not_the_end(
    provider: Provider, name: str, kind: str
) -> None:
    with launched_into(name, kind, OPENAI_BASE_URL=provider.url) as (process, front):
        with Client(front).ask(PROMPT) as client, provider.take() as upstream:
            upstream.start(A)
            assert client.head().status == 200 and client.chunk() == b"a"
            with Client(front) as other:
                for _ in range(streamproxy.MAX_LOG_LINES // 50 + 2):
                    other.send(b"GET /healthz HTTP/1.1\r\n%b\r\n" % H * 50)
                    for _ in range(50):
                        assert other.head().status == 200 and other.exactly(3) == b"ok\n"
            upstream.event(delta("b"))
            assert client.chunk() == b"b"
            process.send_signal(signal.SIGTERM)
            wait_for(lambda: refused(front))
            upstream.finish()
            assert client.chunk() == b""
        assert process.wait(DEADLINE) == 0


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_output_that_is_stuck_does_not_keep_a_second_signal_from_ending_all(provider: Provider, name: str) -> None:
    with launched_into(name, "nobody reads it", OPENAI_BASE_URL=provider.url) as (process, front):
        with Client(front).ask(PROMPT) as client, provider.take() as upstream:
            upstream.start(A)
            assert client.head().status == 200 and client.chunk() == b"a"
            process.send_signal(signal.SIGTERM)
            wait_for(lambda: refused(front))
            process.send_signal(signal.SIGTERM)
            assert client.rest() == b"" and upstream.gone()
            assert process.wait(DEADLINE / 2) == 0


@pytest.mark.skipif(not shutil.which("sh"), reason="needs a shell")
@pytest.mark.parametrize(("flags", "to", "status"), [
    (["--idle-timeout", "x"], "2>/dev/full", 2), (["--idle-timeout", "x"], "2>&-", 2), (["--modle"], "2>/dev/full", 2),
    (["--version"], ">/dev/full", 0), (["--help"], ">/dev/full", 0), (["--help"], ">&-", 0),
])
def test_words_that_cannot_be_written_do_not_change_the_status(flags: list[str], to: str, status: int) -> None:
    if not os.path.exists("/dev/full"):
        missing("there is no /dev/full")
    command = ["sh", "-c", f'exec "$@" {to}', "sh", sys.executable, "-c", RUN, *flags]
    ended = subprocess.run(command, check=False, cwd=HERE, stderr=subprocess.PIPE)
    assert ended.returncode == status and b"Traceback" not in ended.stderr


# ---------------------------------------------------------------- other systems, and forks

# As on Windows: what is not there, or means nothing, and how pairs of sockets are made.
BARE = """
import hashlib  # PyPy's needs poll
import os, select, selectors, signal, socket, sys
def pair(*_):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        return near, listener.accept()[0]
socket.socketpair, selectors.DefaultSelector, os.chmod = pair, selectors.SelectSelector, lambda *_: None
absent = {
    os: "fork set_blocking O_NONBLOCK", select: "epoll poll kqueue",
    selectors: "EpollSelector PollSelector KqueueSelector", signal: "SIGHUP",
    socket: "AF_UNIX SO_REUSEPORT TCP_KEEPIDLE TCP_KEEPINTVL TCP_KEEPCNT",
}
for module, names in absent.items():
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)
sys.modules["resource"] = None
import streamproxy
os.name = sys.platform = "nt"
sys.exit(streamproxy.main())
"""


def test_demo_is_served_without_what_other_systems_lack(tmp_path: Path) -> None:
    tokens = token_file(tmp_path, f"a {ALICE}\n")
    with launched("--demo", "--token-file", tokens, code=BARE) as (process, front):
        with Client(front).ask({"prompt": "Hi"}, Authorization=f"Bearer {ALICE}") as client:
            assert client.head().status == 200 and client.chunk() and client.chunk()
            process.send_signal(signal.SIGINT)
            wait_for(lambda: refused(front))
            process.send_signal(signal.SIGINT)
            assert client.gone()
        assert process.wait(DEADLINE) == 0
    words = "streamproxy: --bind (STREAMPROXY_BIND): this system has no unix sockets; allowed: HOST:PORT\n"
    assert run("--demo", "--bind", "unix:s", code=BARE) == (2, "", words)


# A program that has forked when a request comes: its child has copies of all descriptors until that ends.
FORKS = """
import os, sys, warnings, streamproxy
warnings.simplefilter("ignore")
begin_stream, (reader, writer) = streamproxy.Exchange.begin_stream, os.pipe()
def fork(exchange):
    if not os.fork():
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    return begin_stream(exchange)
streamproxy.Exchange.begin_stream = fork
sys.exit(streamproxy.main())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_connections_end_although_a_forked_child_has_copies_of_them(provider: Provider) -> None:
    with launched(code=FORKS, OPENAI_BASE_URL=provider.url) as (process, front):
        with Client(front).ask(PROMPT, Connection="close") as client, provider.take() as upstream:
            upstream.start(A)
            upstream.finish()
            assert client.head().status == 200 and client.body() == b"a" and client.rest() == b""
            with Client(front).ask(PROMPT) as leaving:
                upstream.read_request()
                upstream.start(A)
                assert leaving.head().status == 200
            assert upstream.gone()
        process.terminate()
        wait_for(lambda: refused(front))


# 31 ------------------------------------------------------------------- Chat page


def test_page_has_a_policy_that_lets_in_its_own_script_and_style_only(server: streamproxy.Server) -> None:
    with Client(server).ask(method="GET", path="/?x") as client:
        head = client.head()
        page = client.exactly(int(head.fields["Content-Length"])).decode()
        policy = head.fields["Content-Security-Policy"]
    assert head.fields["Content-Type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in policy and "unsafe" not in policy and policy.count("'sha256-") == 2
    assert not re.search(r"""(?i)https?://|src=|@import|url\(|\son\w+=|\sstyle=|innerHTML""", page)
    with Client(server).ask(method="HEAD") as client:
        assert client.head().fields["Content-Length"] == str(len(page.encode()))


def got_page(server: streamproxy.Server) -> tuple[str, str | None]:
    with Client(server).ask(method="GET") as client:
        head = client.head()
        return client.exactly(int(head.fields["Content-Length"])).decode(), head.fields.get("Content-Security-Policy")


def test_page_tells_title_and_model_as_text(server: streamproxy.Server, provider: Provider) -> None:
    with running(provider, title="<script>{{model}}", model='"&x') as other:
        page, policy = got_page(other)
    assert "<title>&lt;script&gt;{{model}}</title>" in page and '<span id="model">&quot;&amp;x</span>' in page
    assert policy == got_page(server)[1]


def test_page_of_ones_own_is_looked_at_again(
    provider: Provider, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "own.html"
    file.write_text("<p>one")
    with running(provider, page=str(file)) as server:
        assert got_page(server) == ("<p>one", None)
        file.write_text("<p>two")
        assert got_page(server) == ("<p>two", None)
        for bad in (b"", b"x" * (streamproxy.MAX_PAGE_SIZE + 1)):
            file.write_bytes(bad)
            assert got_page(server)[0] == "<p>two"
        wait_for(lambda: "the page was not taken, its last version counts: it is empty" in caplog.text)
        file.write_text("<p>three")
        assert got_page(server)[0] == "<p>three"
        if os.name == "posix":
            file.unlink()
            os.mkfifo(file)  # whose reader waits for a writer
            assert got_page(server)[0] == "<p>three"
            wait_for(lambda: "its last version counts: it is not a regular file" in caplog.text)
    with pytest.raises(streamproxy.SettingsError, match="--page .STREAMPROXY_PAGE.: cannot use .*regular file"):
        streamproxy.Server(streamproxy.Settings(page=str(tmp_path) if os.name == "nt" else "/dev/null", demo=True))


def test_page_of_ones_own_that_cannot_be_looked_at_holds_up_nobody(
    provider: Provider, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a network's file system that hangs."""
    file, answers, look = tmp_path / "own.html", threading.Event(), streamproxy.OwnPage.look
    file.write_text("<p>one")
    monkeypatch.setattr(streamproxy, "LOOK_TIMEOUT", 0.01)
    monkeypatch.setattr(streamproxy.OwnPage, "look", lambda page: answers.wait(DEADLINE) and look(page))
    with running(provider, page=str(file)) as server:
        file.write_text("<p>two")
        assert [got_page(server)[0] for _ in range(2)] == ["<p>one"] * 2
        said = "the page cannot be looked at, its last version counts: it takes too long"
        wait_for(lambda: caplog.text.count(said) == 1)
        answers.set()
        wait_for(lambda: got_page(server)[0] == "<p>two")


# ----------------------------------------------------------------------- The documents


def readme_table(header: str) -> list[list[str]]:
    """The cells of each row of README's table that begins with header."""
    _, found, rest = README.read_text(encoding="utf-8").partition(f"\n{header}\n|---")
    assert found
    lines = itertools.takewhile(lambda line: line.startswith("|"), rest.splitlines()[1:])
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def readme_block(begin: str) -> str:
    """README's block of code that begins so: between fences, or indented."""
    lines = README.read_text(encoding="utf-8").splitlines()
    at = next(number for number, line in enumerate(lines) if line.strip().startswith(begin))
    fenced = "```" in lines[at - 1]
    body = itertools.takewhile(lambda line: line != "```" if fenced else line[:4] == "    ", lines[at:])
    return textwrap.dedent("\n".join(body)) + "\n"


def readme_blocks() -> list[str]:
    """All of README's blocks of code."""
    text = README.read_text(encoding="utf-8")
    fenced = re.findall(r"(?ms)^```\w*\n(.*?)^```$", text)
    text = re.sub(r"(?ms)^```.*?^```$", "", text)
    return fenced + [textwrap.dedent(block) for block in re.findall(r"(?m)^\n((?:    .*\n)+)", text)]


def test_readme_every_block_of_code_is_read_by_a_test() -> None:
    calls = re.findall(r"""readme_block\((["'])(.+?)\1\)""", Path(__file__).read_text(encoding="utf-8"))
    begins = tuple(begin for _, begin in calls) + tuple(f"# {name}" for name in FRONTS)
    begins += ("python3 streamproxy.py", "python3 -m venv")  # see readme_commands, and .ci/run
    blocks = readme_blocks()
    assert len(blocks) > 25
    assert [block for block in blocks if not block.startswith(begins)] == []


def test_readme_first_version_of_the_changes_is_the_program_s() -> None:
    said = re.findall(r"(?m)^\*\*(.+)\*\*, ([0-9]{4}-[0-9]{2}-[0-9]{2})$", README.read_text(encoding="utf-8"))
    versions = [tuple(map(int, version.split("."))) for version, _ in said]
    assert said[0][0] == streamproxy.__version__ and len(versions) > 1
    assert versions == sorted(set(versions), reverse=True)
    assert [day for _, day in said] == sorted((day for _, day in said), reverse=True)
    command = [sys.executable, "-W", "error", str(PROGRAM), "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"streamproxy {streamproxy.__version__}\n", "")


def test_readme_settings_table_is_the_code_s() -> None:
    rows = [line for line in README.read_text(encoding="utf-8").splitlines() if re.match(r"\| (`--|–)", line)]
    expected = []
    for setting in streamproxy.Settings.TABLE:
        shown = f"`{setting.flag} {setting.metavar}`".replace(" `", "`") if setting.flag else "–"
        cells = [shown, f"`{setting.variable}`", setting.shown, setting.help]
        expected.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    assert rows == expected


def test_documents_name_no_flag_or_variable_that_does_not_exist() -> None:
    text = README.read_text(encoding="utf-8") + (HERE / "nginx.conf.example").read_text()
    ours = re.findall(r"streamproxy\.py[^`\n]*", text) + re.findall(r"`(--[a-z-]+)", text)
    flags = {flag for command in ours for flag in re.findall(r"--[a-z][a-z-]+", command)}
    others = {"--help", "--version", "--print-settings"}
    assert flags - {setting.flag for setting in streamproxy.Settings.TABLE} <= others
    names = {setting.variable for setting in streamproxy.Settings.TABLE}
    names |= {setting.file_variable for setting in streamproxy.Settings.TABLE if setting.secret}
    assert set(re.findall(r"\b(?:STREAMPROXY|OPENAI)_[A-Z_]+", text)) <= names
    tests, script = Path(__file__).read_text(encoding="utf-8"), (HERE / ".ci/run").read_text(encoding="utf-8")
    told = set(re.findall(r"\bTEST_[A-Z]+(?:_[A-Z]+)*", text + script))
    assert told <= set(re.findall(r"environ\.get\(\"(TEST_\w+)", tests)) and len(told) == 4


def readme_commands() -> list[tuple[dict[str, str], list[str]]]:
    """The variables and flags of each command line in README.md that starts the program."""
    text = README.read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"(?:^    |`)((?:\w+=\S+ )?python3 /?streamproxy\.py[^`\n#]*)", text, re.MULTILINE)
    split = [[word for word in shlex.split(command)] for command in commands]
    return [
        (dict(word.split("=", 1) for word in words[: words.index("python3")]), words[words.index("python3") + 2 :])
        for words in split
    ]


def test_readme_commands_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = readme_commands()
    assert len(commands) >= 9
    for environ, flags in commands:
        if "--version" not in flags:
            settings = streamproxy.Settings.load(environ, vars(streamproxy.build_parser().parse_args(flags)))
            if "--param" in flags:  # to let the model reason
                asked = json.loads(streamproxy.encode_request(PROMPT, settings))
                assert (asked["max_completion_tokens"], asked["reasoning_effort"]) == (4000, "low")
                assert "max_tokens" not in asked


UPSTREAMS = {
    "Azure": ("POST /openai/deployments/DEPLOYMENT/chat/completions?api-version=2024-10-21 HTTP/1.1", "api-key: "),
    "Anthropic": ("POST /v1/messages HTTP/1.1", "x-api-key: "),
    "Ollama": ("POST /v1/chat/completions HTTP/1.1", ""),
    "vLLM": ("POST /v1/chat/completions HTTP/1.1", ""),
    "llama.cpp": ("POST /v1/chat/completions HTTP/1.1", ""),
    "another streamproxy": ("POST /v1/chat/completions HTTP/1.1", "Authorization: Bearer "),
}  # fmt: skip


@pytest.mark.parametrize("name", UPSTREAMS)
def test_readme_line_for_each_upstream_asks_it_rightly(provider: Provider, name: str) -> None:
    line, field = UPSTREAMS[name]
    row = re.search(rf"^\| {re.escape(name)} \| `(.+)` \|$", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert row
    words = shlex.split(row[1])
    settings = streamproxy.Settings.load(
        {"OPENAI_API_KEY": KEY} if field else {},
        vars(streamproxy.build_parser().parse_args(words[words.index("python3") + 2 :])),
    )
    there = urllib.parse.urlsplit(settings.upstream)
    upstream_url = there._replace(scheme="http", netloc=urllib.parse.urlsplit(provider.url).netloc).geturl()
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(
            running(
                None, upstream=upstream_url, auth_header=settings.auth_header, model=settings.model,
                api_key=settings.api_key,
            )
        )
        path = "/v1/messages" if name == "Anthropic" else "/v1/chat/completions"
        stack.enter_context(Client(server).ask({**ASKED, "model": settings.model}, path=path))
        upstream = stack.enter_context(provider.take())
        assert upstream.head.startswith(line + "\r\n")
        assert (f"\r\n{field}{KEY}\r\n" in upstream.head if field else KEY not in upstream.head)


def test_readme_another_streamproxy_as_upstream(provider: Provider, tmp_path: Path) -> None:
    with running(provider, token_file=token_file(tmp_path, f"proxy {ALICE}")) as far:
        with running(None, upstream=far.url + "/v1", api_key=ALICE) as near:
            for path, body in (("/", PROMPT), ("/v1/chat/completions", ASKED)):
                with Client(near).ask(body, path=path) as client, provider.take() as upstream:
                    upstream.start(A)
                    assert client.head().status == 200 and b"a" in client.chunk()
                    upstream.finish()
                    client.body()


def test_readme_table_of_metrics_is_the_code_s() -> None:
    rows = readme_table("| metric | type | labels | what |")
    shown = [(family.name, family.type, ", ".join(family.labels) or "–", family.help) for family in streamproxy.METRICS]
    assert rows == [[f"`{name}`", *cells] for name, *cells in shown]
    text = " ".join(README.read_text(encoding="utf-8").split())
    kinds = dict.fromkeys(kind for kind, *_ in streamproxy._USAGE)
    for names in (streamproxy.REFUSING, streamproxy.FAILURES, kinds):
        assert ", ".join(f"`{name}`" for name in names) in text


def series_in(asked: Sequence[str]) -> set[str]:
    """The metrics that expressions of Prometheus ask for; they are there, and so are their labels."""
    there = {}  # names of series, and their labels
    for family in streamproxy.METRICS:
        labels = {*family.labels, "instance", "job"}
        there[family.name] = labels
        if family.type == "histogram":
            there[f"{family.name}_bucket"] = {*labels, "le"}
    used = set()
    for expr in asked:
        names = set(re.findall(r"\b(?:streamproxy|process)_\w+", expr))
        used |= {name.replace("_bucket", "") for name in names}
        assert names and names <= set(there)
        by = {label for labels in re.findall(r"(?:by|on) \(([^)]*)\)", expr) for label in labels.split(", ")}
        by |= set(re.findall(r"[{,](\w+)[!=]", expr))
        assert all(by <= there[name] for name in names), expr
    return used


def test_readme_dashboard_asks_for_metrics_that_there_are(tmp_path: Path) -> None:
    dashboard = json.loads(readme_block('{"title": "streamproxy"'))
    ids, places = zip(*((panel["id"], tuple(panel["gridPos"].values())) for panel in dashboard["panels"]))
    assert len(set(ids)) == len(set(places)) == len(ids)
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    used = series_in(asked)
    shown = {family.name for family in streamproxy.METRICS if family.name.startswith("streamproxy_")}
    assert shown <= used
    rules = [{"record": f"panel:{n}", "expr": e.replace("$__rate_interval", "1m")} for n, e in enumerate(asked)]
    (tmp_path / "rules").write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    check = [program("promtool"), "check", "rules", str(tmp_path / "rules")]
    told = subprocess.run(check, capture_output=True, text=True, check=False)
    assert told.returncode == 0 and f"SUCCESS: {len(rules)} rules found" in told.stdout, told.stdout + told.stderr


# When each of README's rules fires, and when it does not: what of series, and how they grow in a minute.
ALERTS = {
    "StreamproxyKeyRefused": [('streamproxy_upstream_failures_total{reason="api_key",', "0+1x20", "0+0x20")],
    "StreamproxyUpstreamFails": [
        ('streamproxy_upstream_failures_total{reason="connect",', "0+2x20", "0+1x20"),
        ('streamproxy_upstream_failures_total{reason="stale",', "0+20x20", "0+20x20"),
        ('streamproxy_upstream_connections_total{reused="true",', "0+8x20", "0+20x20"),
        ('streamproxy_upstream_connections_total{reused="false",', "0+8x20", "0+20x20"),
    ],
    "StreamproxyFull": [('streamproxy_refusals_total{reason="max_streams",', "0+1x20", "5+0x20")],
    "StreamproxyShortOfDescriptors": [
        ("process_open_fds{", "950+0x20", "800+0x20"), ("process_max_fds{", "1000+0x20", "1000+0x20"),
        ("streamproxy_build_info{", "1+0x20", "1+0x20"),
    ],
    "StreamproxyLogStuck": [("streamproxy_log_lines_dropped_total{", "0+1x20", "7+0x20")],
}  # fmt: skip


def test_readme_rules_of_prometheus_tell_of_what_they_are_for(tmp_path: Path) -> None:
    rules = readme_block("groups:")
    assert series_in([line for line in rules.splitlines() if re.search("(?:streamproxy|process)_[a-z]", line)])
    assert re.findall(r"alert: (\w+)", rules) == list(ALERTS)
    cases = []
    for name, series in ALERTS.items():
        for fires in (True, False):
            told = [{"exp_labels": {"instance": "1"}}] if fires else []
            if name in ("StreamproxyKeyRefused", "StreamproxyFull") and fires:
                told[0]["exp_labels"]["reason"] = series[0][0].split('"')[1]
            cases.append({
                "interval": "1m", "name": f"{name}, {fires}",
                "input_series": [
                    {"series": begin + 'instance="1"}', "values": values[not fires]} for begin, *values in series
                ],
                "alert_rule_test": [{"eval_time": "20m", "alertname": name, "exp_alerts": told}],
            })
    (tmp_path / "rules").write_text(rules)
    (tmp_path / "tests").write_text(json.dumps({"rule_files": ["rules"], "tests": cases}))
    test = [program("promtool"), "test", "rules", str(tmp_path / "tests")]
    done = subprocess.run(test, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_readme_table_of_what_is_wrong_has_the_words_of_the_program() -> None:
    source = PROGRAM.read_text(encoding="utf-8")
    found = {f"{words[:1].upper()}{words[1:]}:" for words in streamproxy.CURES[""][1]}
    told = set()
    for seen, _, said in readme_table("| what is seen | why | `--check` says |"):
        sentences = [words for words in re.findall("`([^`=]+)`", seen) if " " in words]
        assert all(part in source for words in sentences for part in words.split(" ... ")), seen
        told |= {words for words in re.findall("`([^`]+)`", said) if words[:2] != "--"}
    assert told and told <= found


def test_readme_links_lead_to_its_sections() -> None:
    text = README.read_text(encoding="utf-8")
    sections = re.findall(r"^#+ (.+)$", re.sub(r"(?ms)^```.*?^```$", "", text), re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in sections}
    links = re.findall(r"\]\(#([^)]+)\)", text)
    assert links and set(links) <= anchors


@pytest.mark.parametrize(("words", "is_so"), [
    ("250 ms after one another", streamproxy.ATTEMPT_DELAY == 0.25),
    ("open for a minute", streamproxy.KEEP_ALIVE_TIMEOUT == 60),
    ("read to its end, up to 128", streamproxy.MAX_IDLE_CONNECTIONS == 128),
    ("after 5 minutes they are closed", streamproxy.MAX_CONNECTION_AGE == 300),
    ("Silent ones are probed once a minute", streamproxy.PROBES["TCP_KEEPIDLE"] == 60),
    ("a second more", streamproxy.END_GRACE == 1),
    ("for up to 30 s more", streamproxy.LINGER_TIMEOUT == 30),
    ("4,000 lines wait", streamproxy.MAX_LOG_LINES == 4000),
    ("of the first 100 that ask", streamproxy.MAX_NAMED_CLIENTS == 100),
    ("whole, up to 16 MiB", streamproxy.MAX_EVENT_SIZE == 16 << 20),
    ("own document, up to 64 KiB", streamproxy.MAX_ERROR_SIZE == 64 << 10),
    ("one read of 64 KiB", streamproxy.READ_SIZE == 64 << 10),
    ("a head of over 64 KiB or 100 fields", (streamproxy.MAX_HEAD_SIZE, streamproxy.MAX_FIELDS) == (64 << 10, 100)),
    ("and 256; 256 more", (streamproxy.SPARE_CONNECTIONS, streamproxy.MAX_SURPLUS) == (256, 256)),
    ("up to four, and more", streamproxy.MAX_WORKERS == 4),
    ("complained of once a minute", streamproxy.COMPLAINT_INTERVAL == 60),
    ("programs are closed after a second", streamproxy.IDLE_GRACE == 1),
    ("(`Keep-Alive: timeout=75`)", streamproxy.Settings(api_key=KEY).keep_alive_timeout == 75),
])
def test_readme_numbers_are_the_code_s(words: str, is_so: bool) -> None:
    assert words in " ".join(README.read_text(encoding="utf-8").split()) and is_so


GET_MODELS = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
POST_PROMPT = b'POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 15\r\n\r\n{"prompt": "x"}'
# What brings each status of README's table: settings, and what is sent.
STATUSES: dict[int, tuple[dict[str, Any], bytes]] = {
    400: ({}, b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n\r\nx"),
    401: ({"token_file": f"alice {ALICE}"}, GET_MODELS),
    403: ({}, b"GET /v1/models HTTP/1.1\r\nHost: evil.example\r\n\r\n"),
    404: ({}, b"POST /chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n"),
    405: ({}, b"PUT / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n"),
    408: ({"client_timeout": 0.1}, b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{"),
    411: ({}, b"POST / HTTP/1.1\r\nHost: localhost\r\n\r\n"),
    413: ({"max_body": 1}, POST_PROMPT),
    414: ({}, b"GET /" + b"x" * 70000),
    415: ({}, b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Encoding: zstd\r\nContent-Length: 1\r\n\r\nx"),
    426: ({}, b"GET /v1/responses HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"),
    429: ({"max_streams_per_client": 1}, GET_MODELS),
    431: ({}, b"GET / HTTP/1.1\r\nA: " + b"x" * 70000),
    500: ({"param": {"x": set()}}, POST_PROMPT),
    501: ({}, b"BREW / HTTP/1.1\r\nHost: localhost\r\n\r\n"),
    502: ({"upstream": "http://127.0.0.1:9"}, POST_PROMPT),
    503: ({"max_streams": 1}, GET_MODELS),
    504: ({"first_byte_timeout": 0.1}, POST_PROMPT),
    505: ({}, b"GET / HTTP/2.0\r\n\r\n"),
}
WITH_FIELDS = {
    401: "WWW-Authenticate", 405: "Allow", 426: "Upgrade", 429: "Retry-After", 501: "Allow", 503: "Retry-After",
}  # fmt: skip


def test_readme_lists_each_status_of_ours() -> None:
    rows = readme_table("| status | meaning |")
    assert {int(status) for cells in rows for status in cells[0].split(", ")} == set(STATUSES)


@pytest.mark.parametrize("status", STATUSES)
def test_readme_status_of_ours(provider: Provider, tmp_path: Path, status: int) -> None:
    settings, request = STATUSES[status]
    if "token_file" in settings:
        settings = {"token_file": token_file(tmp_path, settings["token_file"])}
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(running(provider, **settings))
        if status in (429, 503):
            stack.enter_context(Client(server).ask(PROMPT))
            wait_for(lambda: server.snapshot()["streams"])
        client = stack.enter_context(Client(server))
        client.send(request)
        head = client.head()
        assert head.status == status and (status not in WITH_FIELDS or WITH_FIELDS[status] in head.fields)
        assert list(json.loads(client.exactly(int(head.fields["Content-Length"])))) == ["error"]


SAYS = b'{"error": {"message": "Words", "type": "kind", "code": "tag"}}'
# What becomes of upstream's statuses: on "/", in /v1, and the words.
UPSTREAM_SAYS: dict[int, tuple[int, int, str]] = {
    **{status: (status, status, "Words") for status in (400, 402, 404, 408, 409, 413, 415, 422, 425, 429, 503)},
    529: (503, 529, "Words"),
    401: (502, 502, "Upstream refused our API key with status 401."),
    403: (502, 502, "Upstream refused the request with status 403 (kind, tag)."),
    302: (502, 502, "Upstream redirects with status 302, which is not followed."),
    418: (502, 502, "Upstream refused the request with status 418."),
    500: (502, 502, "Upstream failed with status 500."),
}


def test_readme_lists_the_statuses_of_upstream_that_pass() -> None:
    passed, likewise, *others = readme_table("| upstream says | the client sees |")
    listed = {int(status) for cells in (passed, likewise) for status in cells[0].split(", ")}
    assert listed == {status for status, (_, seen, _) in UPSTREAM_SAYS.items() if seen != 502}
    assert listed == set(streamproxy.PASSED_STATUSES)
    assert [cells[0].split(", ")[0] for cells in others] == ["401", "403", "3xx", "an error with status 200"]


@pytest.mark.parametrize("status", UPSTREAM_SAYS)
@pytest.mark.parametrize("path", ["/", "/v1/chat/completions"])
def test_readme_status_of_upstream(
    server: streamproxy.Server, provider: Provider, caplog: pytest.LogCaptureFixture, path: str, status: int
) -> None:
    with Client(server).ask(PROMPT if path == "/" else ASKED, path=path) as client, provider.take() as upstream:
        upstream.send(error_answer(status, SAYS))
        head = client.head()
        said = json.loads(client.exactly(int(head.fields["Content-Length"])))["error"]
    on_root, in_api, sentence = UPSTREAM_SAYS[status]
    seen = on_root if path == "/" else in_api
    assert head.status == seen and (said if path == "/" else said["message"]) == sentence
    assert ("X-Should-Retry" in head.fields) == (status == 408 or (seen == 502 and status >= 500))  # else: unpaid
    assert head.fields.get("Retry-After") == ("1" if seen in (429, 503, 529) else None)
    assert path == "/" or seen == 502 or json.dumps({"error": said}).encode() == SAYS
    assert "(kind, tag)" in str(log_entries(caplog, 1)[0]["error"]) and "Words" not in caplog.text


@pytest.mark.parametrize(("answer", "status"), [
    (b'{"error": {"message": "Words"}}', 502),
    (b'{"error": {"message": "Words", "code": 429}}', 429),
    (b'{"error": {"message": "Words", "code": 401}}', 502),
])
def test_readme_error_with_status_200(
    server: streamproxy.Server, provider: Provider, answer: bytes, status: int
) -> None:
    document = OK + JSON + b"Content-Length: %d\r\n\r\n%b" % (len(answer), answer)
    for wire in (STREAM_HEAD + chunk(b"data: " + answer + b"\n\n"), document):
        with Client(server).ask(PROMPT) as client, provider.take() as upstream:
            upstream.send(wire)
            assert client.error() == (status, "Words")


@pytest.mark.parametrize(("answer", "told"), [
    (error_answer(500), {"X-Should-Retry": "false"}),
    (b"", {"X-Should-Retry": "false"}),
    (OK + JSON + b"Content-Length: 9\r\n\r\n{", {"X-Should-Retry": "false"}),
    (error_answer(500, fields=b"X-Should-Retry: true\r\n"), {"X-Should-Retry": "true"}),
    (error_answer(500, fields=b"Retry-After: 9\r\n"), {"Retry-After": "9"}),
    (error_answer(429, fields=b"Retry-After-Ms: 50\r\n"), {"Retry-After": "1", "Retry-After-Ms": "50"}),
    (error_answer(409, fields=b"X-Should-Retry: false\r\n"), {"X-Should-Retry": "false"}),
])
def test_readme_whether_to_ask_again(
    server: streamproxy.Server, provider: Provider, answer: bytes, told: dict[str, str]
) -> None:
    with Client(server).ask(ASKED, path="/v1/chat/completions") as client:
        with provider.take() as upstream:
            upstream.send(answer)
        fields = client.head().fields
    assert {name: value for name, value in fields.items() if "etry" in name} == told


def finish(reason: str) -> bytes:
    return event({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})


# Errors, in the clothes that README names; each has [DONE] behind it.
CLOTHES = {
    "an event": b'event: error\ndata: {"message": "Words"}\n\n',
    "a field": b'error: {"message": "Words"}\n\n',
    "a member": event({"error": "Words"}),
    "a bare line of JSON": b'{"error": {"message": "Words"}}\n\n',
    "error_code": event({"text": "Words", "error_code": 50001}),
    "detail": event({"detail": "Words"}),
    "a member that is called so": event({"internalServerException": {"message": "Words"}}),
    "finish_reason error": finish("error"),
    "finish_reason abort": finish("abort"),
    "finish_reason of the like": finish("insufficient_system_resource"),
}


@pytest.mark.parametrize("name", CLOTHES)
def test_readme_error_in_its_clothes(
    server: streamproxy.Server, provider: Provider, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    with Client(server).ask(PROMPT, **EVENTS) as client, provider.take() as upstream:
        upstream.start(A, CLOTHES[name], DONE)
        client.head()
        last = client.body().partition(b"\n\n")[2]
        assert last.startswith(b"event: error\ndata: ") and last.count(b"\n\n") == 1
        assert b"finish_reason" in CLOTHES[name] or last.endswith(b'data: {"error": "Words"}\n\n')
    with Client(server).ask(ASKED, path="/v1/chat/completions") as client, provider.take() as upstream:
        upstream.start(A, CLOTHES[name], DONE)
        upstream.send(streamproxy.LAST_CHUNK)
        client.head()
        assert client.rest().endswith(DONE + b"\r\n")  # all bytes, and no last chunk
    assert [entry["ending"] for entry in log_entries(caplog, 2)] == ["error", "error"] and "Words" not in caplog.text


@pytest.mark.parametrize(("events", "text", "ending"), [
    (A + finish("null"), "a", "truncated"),
    (A + finish(""), "a", "truncated"),
    (finish("stop") + A + STOP, "a", "complete"),
    (delta("a", "stop") + delta("b", "stop"), "ab", "complete"),
    (delta("", "stop", role="assistant") + delta("", reasoning="b") + A + STOP, "a", "complete"),
    (A + finish("length"), "a", "complete"),
    (A + finish("content_filter"), "a", "complete"),
])
def test_readme_finish_reason(
    server: streamproxy.Server, provider: Provider, caplog: pytest.LogCaptureFixture, events: bytes, text: str,
    ending: str,
) -> None:
    with Client(server).ask(PROMPT) as client, provider.take() as upstream:
        upstream.start(events)
        upstream.send(streamproxy.LAST_CHUNK)
        client.head()
        assert (client.body() if ending == "complete" else client.chunk() + client.rest()).decode() == text
    entry = log_entries(caplog, 1)[0]
    assert entry["ending"] == ending and (ending != "complete" or f'"{entry["finish_reason"]}"'.encode() in events)


@pytest.mark.parametrize("label", [
    "text/plain", "application/octet-stream", "application/json", "text/event-stream, text/event-stream", "",
])
def test_readme_labels_count_less_than_the_first_bytes(
    server: streamproxy.Server, provider: Provider, label: str
) -> None:
    document = b'{"choices": [{"message": {"content": "a"}, "finish_reason": "stop"}]}'
    for body in (A + STOP, document) if "plain" not in label and "octet" not in label else (A + STOP,):
        with Client(server).ask(PROMPT) as client:
            with provider.take() as upstream:
                upstream.send(OK, f"Content-Type: {label}\r\n".encode() if label else b"", b"\r\n", body)
            assert client.head().status == 200 and client.body() == b"a"


def test_readme_log_names_are_those_of_an_entry(
    provider: Provider, caplog: pytest.LogCaptureFixture
) -> None:
    with running(provider, resume=60.0) as server:
        with Client(server).ask(PROMPT, Idempotency_Key="k") as client, provider.take() as upstream:
            upstream.start(A, STOP)
            upstream.finish()
            name = client.head().fields["Stream-Id"]
            client.body()
        with Client(server).ask(PROMPT, Idempotency_Key="k", Last_Event_ID=f"{name}.1") as client:
            client.head()
            assert client.body() == b""
        names = list(log_entries(caplog, 2)[1])
    assert {name for cells in readme_table("| name | what |") for name in cells[0].split(", ")} == set(names)
    shown = re.findall(r"(\w+)=", readme_block("time=2"))
    assert shown == [name for name in names if name in shown]
    assert set(names) - set(shown) == {"error", "upstream_id", "stream", "from"}


# Fields that OpenAI's and Anthropic's APIs, and what is before them, are known to send.
SENT_BACK = [
    "Content-Type", "Date", "Server", "Set-Cookie", "Connection", "Keep-Alive", "Transfer-Encoding", "Vary", "Via",
    "X-Request-Id", "Request-Id", "Retry-After", "Retry-After-Ms", "X-Should-Retry", "OpenAI-Processing-Ms", "ETag",
    "OpenAI-Version", "OpenAI-Organization", "OpenAI-Project", "Anthropic-Organization-Id", "Content-Encoding",
    "X-RateLimit-Limit-Requests", "X-RateLimit-Reset-Tokens", "Anthropic-RateLimit-Tokens-Limit", "X-Robots-Tag",
    "Access-Control-Allow-Origin", "Access-Control-Expose-Headers", "LLM_Provider-X", "Alt-Svc", "Location", "CF-Ray",
]  # fmt: skip


def test_readme_fields_that_pass() -> None:
    up, back = (set(re.findall("`([A-Z][A-Za-z*-]+)`", cells[1].title())) for cells in readme_table("| | fields |"))
    assert {name.lower() for name in up} == {*streamproxy.PASSED_FIELDS, "user-agent"}
    passed = [name.title() for name in SENT_BACK if streamproxy.name_back(name.lower())]
    assert {re.sub("(?<=-Ratelimit-).*", "*", name) for name in passed} | {"Content-Type"} == back


def test_readme_paths_are_those_of_the_api() -> None:
    settings = streamproxy.Settings(api_key=KEY, allow_path=("/v1/images/generations", "/v1/audio/speech"))
    documented = collections.defaultdict(set)
    for methods, paths in readme_table("| method | path |"):
        names, found = re.findall("[A-Z]+", methods), re.findall("`(/v1/[^`]+)`", paths)
        for at, path in enumerate(found):  # a method for each path, or all for one
            each = len(found) == len(names) > 1
            documented[path.replace("/ID", "/resp_1")].update([names[at]] if each else names)
    for path, allowed in documented.items():
        assert set(streamproxy.api_routes(path, path in settings.allow_path)) == allowed, path
    assert documented.keys() >= set(API_PATHS)
    for route in streamproxy.ROUTES:
        assert "models" in route.path or any(re.fullmatch(route.path, path) for path in documented), route.path


def test_readme_query_that_goes_on() -> None:
    said = re.search(r"of a query only `beta` goes on, for\s+GET also ([^.]+)\.", README.read_text(encoding="utf-8"))
    assert said
    for name in re.findall("`([a-z_]+)`", said[1]):
        assert streamproxy.harmless_query(f"{name}=1&model=x", "GET") == f"{name}=1"
        assert not streamproxy.harmless_query(f"{name}=1", "POST")


@pytest.mark.parametrize(("url", "proxies", "used"), [
    ("https://api.example/v1", {"https": "http://p:1", "http": "http://p:2", "all": "http://p:3"}, "p:1"),
    ("https://api.example/v1", {"http": "http://p:2", "all": "https://p"}, "p:443"),
    ("https://api.example/v1", {"https": "http://p:1", "no": "example"}, None),
    ("https://10.1.2.3/v1", {"https": "http://p:1", "no": "10.0.0.0/8"}, None),
    ("https://[2001:db8::1]/v1", {"https": "http://p:1", "no": "2001:db8::1"}, None),
    ("http://127.0.0.1:8001/v1", {"http": "http://p:1"}, None),
    ("http://localhost/v1", {"all": "http://p:1"}, None),
])
def test_readme_proxies_of_the_environment(url: str, proxies: dict[str, str], used: str | None) -> None:
    proxy = streamproxy.find_proxy(url, proxies)
    assert (proxy and proxy.address) == used


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "all_proxy"])
def test_readme_socks_proxy_is_refused_at_the_start(name: str) -> None:
    status, out, err = run(OPENAI_API_KEY=KEY, no_proxy="", **{name: "socks5://me:secret@127.0.0.1:1080"})
    assert (status, out) == (2, "") and "secret" not in err
    assert f"{name.upper()}: a proxy of socks5:// is not allowed" in err


def test_readme_drawing_has_the_parts_and_their_states() -> None:
    drawing = readme_block("client                streamproxy")
    for name, words in re.findall(r"\|[^|]{15,17}([A-Z][A-Za-z]+) +([^|\n]*)\|", drawing):
        part, states = getattr(streamproxy, name), re.findall(r"\b[A-Z]{4,}\b", words)
        assert [getattr(part, state) for state in states] == list(range(len(states)))
        assert states == [name for name, value in vars(part).items() if name.isupper() and isinstance(value, int)]


def shell(script: str, folder: Path, **environ: str) -> str:
    """What a script prints in folder."""
    environ = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **environ}
    done = subprocess.run(["sh", "-euc", script], cwd=folder, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_readme_first_lines_show_text() -> None:
    program("curl")
    demo, ask, real = (line.partition("  #")[0] for line in readme_block("python3 streamproxy.py --demo").splitlines())
    assert demo.split()[-1] == "--demo" and real.split()[0] == "OPENAI_API_KEY=sk-..."
    with launched("--demo", code=run_with(DEMO_PAUSE=0.005)) as (process, front):
        assert "You asked: “Hello”" in shell(ask.replace("http://127.0.0.1:8000", front.url), HERE)
        says, tries = process.stdout.readline(), process.stdout.readline()
        guard = "no token is needed on this machine, and no other can connect"
        assert says == f"It asks gpt-6-luna of the built-in API, with a key; {guard}.\n"
        assert tries == f"Try: {ask.strip().replace('http://127.0.0.1:8000', front.url)}\n"


def test_readme_lines_for_tokens_let_their_client_in(provider: Provider, tmp_path: Path) -> None:
    make, start = readme_block("printf 'alice").splitlines()
    shell(make + "\n" + make, tmp_path)  # a second client, or token
    file = shlex.split(start)[-1]
    assert file == "tokens" and (tmp_path / file).stat().st_mode & 0o777 == 0o600
    tokens = [line.split() for line in (tmp_path / file).read_text().splitlines()]
    assert [name for name, _ in tokens] == ["alice"] * 2 and len({token for _, token in tokens}) == 2
    with running(provider, token_file=str(tmp_path / file)) as server:
        for _, token in tokens:
            with Client(server).ask(method="GET", path="/v1/models", Authorization=f"Bearer {token}") as client:
                assert client.head().status == 200


def test_readme_library_lines_run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamproxy, "DEMO_PAUSE", 0.0005)
    lines = readme_block("import streamproxy").replace('api_key="sk-..."', "demo=True")
    assert "demo=True" in lines
    exec(lines, {})  # noqa: S102
    out = capfd.readouterr().out
    assert re.match(r"http://127\.0\.0\.1:\d+\nYou asked: “Say hello”", out)
    assert re.search(r"\nstop \{.*'completion_tokens': [0-9]+.*\}\n$", out)


@pytest.mark.parametrize("how", ["whole", "cut", "cancelled"])
def test_readme_asyncio_lines_let_other_tasks_run_and_end_with_theirs(provider: Provider, how: str) -> None:
    lines: dict[str, Any] = {}
    exec(readme_block("import asyncio"), lines)  # noqa: S102
    settings = streamproxy.Settings(upstream=provider.url)
    got: list[str] = []

    async def read() -> None:
        async for text in lines["stream"]([{"role": "user", "content": "Hi"}], settings):
            got.append(text)

    async def play() -> None:
        reader = asyncio.create_task(read())
        with await asyncio.to_thread(provider.take) as upstream:
            upstream.start(A)
            while got != ["a"]:
                await asyncio.sleep(0)
            if how == "cancelled":
                reader.cancel()
                assert await asyncio.to_thread(upstream.gone)
            elif how == "whole":
                upstream.finish()
        await reader

    failures = {"cut": streamproxy.UpstreamError, "cancelled": asyncio.CancelledError}
    with pytest.raises(failures[how]) if how in failures else contextlib.nullcontext():
        asyncio.run(play())
    assert got == ["a"]


def test_readme_flask_lines_pass_text_on_as_it_comes(provider: Provider, tmp_path: Path) -> None:
    python = sdk_python("flask")
    (tmp_path / "chat.py").write_text(readme_block("# chat.py"))
    command, port = readme_block("# chat.py").splitlines()[0].partition(": ")[2].split(), free_port()
    environ = {"PYTHONPATH": f"{tmp_path}:{HERE}", "OPENAI_BASE_URL": provider.url, "OPENAI_API_KEY": KEY}
    with front_server([python, "-m", *command, "--port", str(port)], port, **environ) as front:

        def ask() -> tuple[Client, UpstreamPeer]:
            client = Client(front).ask({"messages": ASKED["messages"]}, path="/chat", Content_Type="application/json")
            return client, provider.take()

        client, upstream = ask()
        with client, upstream:
            assert json.loads(upstream.body)["messages"] == ASKED["messages"]
            upstream.start(A)
            head = client.head()
            assert (head.status, head.fields["Content-Type"]) == (200, "text/plain; charset=utf-8")
            assert client.chunk() == b"a"
            upstream.event(delta("b"))
            assert client.chunk() == b"b"
            upstream.finish()
            assert client.body() == b""
        client, upstream = ask()
        with client, upstream:  # one that leaves: Flask sees it when it has something to send
            upstream.start(A)
            assert client.head().status == 200 and client.chunk() == b"a"
            client.reset()
            with contextlib.suppress(ConnectionError):
                while True:
                    upstream.event(delta("b"))
        client, upstream = ask()
        with client:
            with upstream:  # and is cut off
                upstream.start(A)
                assert client.head().status == 200 and client.chunk() == b"a"
            assert client.rest() == b""
        client, upstream = ask()
        with client, upstream:
            upstream.send(error_answer(429, b'{"error": {"message": "Slow down."}}'))
            assert client.head().status == 429 and json.loads(client.rest()) == {"error": "Slow down."}


def test_readme_units_are_known_to_systemd_and_closed_enough(tmp_path: Path) -> None:
    unit, edit = tmp_path / "streamproxy@.service", tmp_path / "streamproxy@.service.d"
    unit.write_text(readme_block("[Unit]"))
    (tmp_path / "streamproxy.socket").write_text(readme_block("# streamproxy.socket"))
    command, environ = [program("systemd-analyze")], {**os.environ, "SYSTEMD_UNIT_PATH": f"{tmp_path}:"}

    def verify() -> Any:
        verified = [*command, "verify", str(unit), str(tmp_path / "streamproxy.socket")]
        done = subprocess.run(verified, check=False, capture_output=True, text=True, env=environ)
        return done.returncode, [line for line in done.stderr.splitlines() if str(tmp_path) in line]

    assert verify() == (0, [])
    exposure = [*command, "security", "--offline=true", "--threshold=16", str(unit)]  # of 100
    assert subprocess.run(exposure, check=False, capture_output=True).returncode == 0
    flags, settings = unit_settings(tmp_path, unit.read_text())
    stop = re.findall("^TimeoutStopSec=(.*)$", unit.read_text(), re.MULTILINE)
    assert settings.allow_host == ("chat.example.com",) and "\nType=notify\n" in unit.read_text()
    assert settings.leave_delay + settings.drain_timeout + streamproxy.ABORT_GRACE < int(stop[0])
    edit.mkdir()
    (edit / "override.conf").write_text(readme_block("# streamproxy@.service"))
    assert verify() == (0, [])
    assert flags["bind"] and not unit_settings(tmp_path, (edit / "override.conf").read_text())[0]["bind"]
    (edit / "override.conf").write_text("[Service]\nSockts=x\n")
    assert verify()[1]  # it is read


def unit_settings(folder: Path, unit: str) -> tuple[dict[str, Any], streamproxy.Settings]:
    """The flags of a unit's ExecStart, and the settings that they make."""
    (folder / "key").write_text(KEY)
    start = re.findall("^ExecStart=/usr/bin/python3 (.*)$", unit, re.MULTILINE)[0]
    flags = vars(streamproxy.build_parser().parse_args(shlex.split(start.replace("%i", "1"))[1:]))
    return flags, streamproxy.Settings.load({"OPENAI_API_KEY_FILE": str(folder / "key")}, flags)


def test_readme_lines_that_install_put_the_files_where_the_unit_looks(tmp_path: Path) -> None:
    (tmp_path / "openai-key").write_text(KEY)
    (tmp_path / "tokens").write_text(f"alice {ALICE}\n")
    (tmp_path / "usr/local/lib").mkdir(parents=True)
    shutil.copy(PROGRAM, tmp_path)
    (tmp_path / "systemctl").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/called\n')
    (tmp_path / "systemctl").chmod(0o700)
    blocks = [readme_block("install -D -m"), readme_block("install -m 0640"), readme_block("systemctl restart")]
    lines = "".join(blocks).replace(" /", f" {tmp_path}/").replace("www-data", str(os.getgid()))
    shell(f"PATH={tmp_path}:$PATH\n{lines}", tmp_path)
    unit = readme_block("[Unit]")
    assert (tmp_path / re.findall("LoadCredential=openai-key:/(.*)", unit)[0]).stat().st_mode & 0o777 == 0o600
    assert (tmp_path / re.findall(r"ExecStart=\S+ /(\S+)", unit)[0]).read_bytes() == PROGRAM.read_bytes()
    name, file = (tmp_path / re.findall("EnvironmentFile=-/(.*)", unit)[0]).read_text().strip().split("=/", 1)
    assert name == "STREAMPROXY_TOKEN_FILE" and (tmp_path / file).stat().st_mode & 0o777 == 0o640
    called = (tmp_path / "called").read_text().split("\n")
    assert called == ["enable --now streamproxy@1 streamproxy@2", "restart streamproxy@1", "restart streamproxy@2", ""]


def test_readme_container_has_the_file_the_port_and_the_time_that_it_needs() -> None:
    words = shlex.split(readme_block("docker run").replace("\\\n", ""))
    at = words.index("python:3-slim")
    options = {name: value for name, value in zip(words[:at], words[1:at]) if name[0] == "-"}
    flags = vars(streamproxy.build_parser().parse_args(words[at + 3 :]))
    settings = streamproxy.Settings.load({options["-e"]: KEY}, flags)
    assert words[at + 1 : at + 3] == ["python3", options["-v"].split(":")[1]] and options["-v"].endswith(":ro")
    assert options["-p"] == "127.0.0.1:8000:" + settings.bind.rpartition(":")[2]
    assert settings.leave_delay + settings.drain_timeout + streamproxy.ABORT_GRACE < int(options["--stop-timeout"])


def test_readme_events_are_those_of_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamproxy, "DEMO_PAUSE", 0.0005)
    shown = (readme_block("id: ") + "\n" + readme_block("event: done")).rstrip()
    with running(None, demo=True) as server, Client(server).ask({"prompt": "x"}, **EVENTS) as client:
        client.head()
        first, *_, last = client.body().decode().strip().split("\n\n")
    pattern = re.escape(shown).replace("365dbbef048acfb0", "[0-9a-f]{16}").replace("40", "[0-9]+")
    assert re.fullmatch(pattern.replace(re.escape(", ..."), '(, "[^{}]*)?'), f"{first}\n\n{last}"), (first, last)


def test_readme_scrape_config_is_one_for_prometheus(tmp_path: Path) -> None:
    (tmp_path / "token").write_text(ALICE)
    config = readme_block("scrape_configs:").replace("/etc/prometheus/streamproxy-token", str(tmp_path / "token"))
    (tmp_path / "prometheus.yml").write_text(config)
    check = [program("promtool"), "check", "config", str(tmp_path / "prometheus.yml")]
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and str(tmp_path / "token") in config, done.stdout + done.stderr


def test_readme_lines_for_openai_s_sdk_ask_through_the_proxy(provider: Provider, sdk_scripts: SdkScripts) -> None:
    script = readme_block("from openai import OpenAI") + textwrap.dedent("""
        messages = [{"role": "user", "content": "Hi"}]
        for event in client.chat.completions.create(model="gpt-6-luna", messages=messages, stream=True):
            print(event.choices[0].delta.content or "", end="")
    """)
    with running(provider) as server, concurrent.futures.ThreadPoolExecutor() as pool:
        script = script.replace("http://127.0.0.1:8000/v1", f"{server.url}/v1")
        told = pool.submit(sdk_scripts.run, script)
        with provider.take() as upstream:
            upstream.start(A)
            upstream.finish()
        assert told.result() == "a"


def test_readme_lines_for_a_key_of_the_sdks_ask_upstream_once(provider: Provider, sdk_scripts: SdkScripts) -> None:
    asked = 'model="gpt-6-luna", messages=[{"role": "user", "content": "Hi"}], max_tokens=9'
    lines = readme_block("key = str(uuid").replace("...", asked).replace("(base_url", '(api_key="none", base_url')
    with running(provider, resume=60.0) as server, concurrent.futures.ThreadPoolExecutor() as pool:
        key, *calls = lines.replace("http://127.0.0.1:8000", server.url).splitlines()
        script = "import uuid\nfrom anthropic import Anthropic\nfrom openai import OpenAI\n"
        script += "".join(f"{key}\nprint(len(list({call})) == len(list({call})) > 1)\n" for call in calls)
        told = pool.submit(sdk_scripts.run, script)
        for events in (CHAT_EVENTS, MESSAGE_EVENTS):
            with provider.take() as upstream:
                upstream.send(streamed(*events))
        assert told.result().split() == ["True", "True"]


# ----------------------------------------------------------------------- nginx


def test_readme_lines_for_nginx_put_the_example_there_under_one_s_own_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamproxy, "DEMO_PAUSE", 0.0005)
    write, check, ask = readme_block("sed 's/chat").splitlines()
    shell(write.replace(" /etc/nginx/", f" {tmp_path}/"), HERE)
    name = urllib.parse.urlsplit(shlex.split(ask)[2]).hostname or ""
    with running(None, demo=True, bind=f"unix:{tmp_path}/1.sock", allow_host=(name,)):
        with nginx(tmp_path, (tmp_path / "nginx.conf").read_text()) as front:
            port = urllib.parse.urlsplit(front.url).port
            said = shell(ask.replace("curl ", f"{program('curl')} -sS --connect-to ::127.0.0.1:{port} "), HERE)
    assert "You asked: “Hello”" in said and check.startswith("nginx -t && ")


@pytest.mark.parametrize("status", ["404", "403", "413"])
def test_nginx_passes_the_refusal_of_a_large_body_on(provider: Provider, tmp_path: Path, status: str) -> None:
    with running(provider, bind=f"unix:{tmp_path}/1.sock"), nginx(tmp_path, large_bodies()) as front:
        with Client(front) as client:
            head = NEVER_COMING[status].replace(b"50000000", b"30000000").replace(b"50000\r", b"30000000\r")
            drip(client, head + b"x" * 30_000_000, 1_000_000)
            assert client.head().status == int(status)


def large_bodies() -> str:
    """The example, for bodies larger than ours, which it passes on as they come."""
    text = (HERE / "nginx.conf.example").read_text(encoding="utf-8")
    assert "client_max_body_size" in text
    text = re.sub(r"client_max_body_size [^;]+;", "client_max_body_size 0;", text)
    return text


EXAMPLE = HERE / "nginx.conf.example"
GZIP = "gzip on; gzip_types *; gzip_min_length 0;"
PLAIN_NGINX = """
error_log /var/log/nginx/error.log;
events { }
http { access_log off; server { listen 80; %s
    location / { proxy_http_version 1.1; proxy_pass http://unix:/run/streamproxy/1.sock; } } }
"""


@contextlib.contextmanager
def front_server(command: list[str], port: int, **environ: str) -> Iterator[Front]:
    """What command runs, once it accepts connections at port."""
    front = Front(f"http://127.0.0.1:{port}")
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, **environ}
    )
    try:
        wait_for(lambda: process.poll() is not None or not refused(front))
        assert process.poll() is None, process.communicate()[1]
        yield front
    finally:
        process.terminate()
        process.communicate()


@contextlib.contextmanager
def nginx(folder: Path, config: str) -> Iterator[Front]:
    """nginx with config, its port, logs, sockets and temporary files moved into folder."""
    binary, port = program("nginx"), free_port()
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    for old, new in {
        "user www-data;": "",  # given below: only root's own workers can enter a test's folder
        "http {": "http {" + "".join(f"{kind}_temp_path {folder}/{kind};" for kind in kinds),
        "listen 80": f"listen 127.0.0.1:{port}",
        "server_name chat.example.com;": "server_name chat.example.com localhost 127.0.0.1;",
        "/var/log/nginx/": f"{folder}/",
        "/run/streamproxy/": f"{folder}/",
        "127.0.0.1:9101": f"unix:{folder}/metrics.sock",
    }.items():
        config = config.replace(old, new)
    (folder / "nginx.conf").write_text(config)
    user = "user root;" if os.geteuid() == 0 else ""
    command = [
        binary, "-p", str(folder), "-c", str(folder / "nginx.conf"), "-g",
        f"daemon off; pid {folder}/nginx.pid; {user}",
    ]
    with front_server(command, port) as front:
        yield front


@pytest.mark.parametrize("gzip", ["", GZIP], ids=["plain", "gzip"])
@pytest.mark.parametrize("buffering", ["on", "off"])
@pytest.mark.parametrize("over", ["tcp", "unix"])
@pytest.mark.parametrize("mode", ["text", "events"])
def test_nginx_passes_each_piece_on_at_once(
    provider: Provider, tmp_path: Path, mode: str, over: str, buffering: str, gzip: str
) -> None:
    bind = f"unix:{tmp_path}/1.sock" if over == "unix" else "127.0.0.1:0"
    with running(provider, bind=bind) as server:
        config = PLAIN_NGINX % f"proxy_buffering {buffering}; {gzip}"
        config = config if over == "unix" else config.replace("http://unix:/run/streamproxy/1.sock", server.url)
        fields = {"Accept_Encoding": "gzip", **(EVENTS if mode == "events" else {})}
        with nginx(tmp_path, config) as front, Client(front).ask(PROMPT, **fields) as client:
            with provider.take() as upstream:
                upstream.start(A)
                assert client.head().fields.get("Content-Encoding") == ("gzip" if gzip else None)
                decode = zlib.decompressobj(zlib.MAX_WBITS | 16).decompress if gzip else bytes
                seen = decode(client.chunk())
                for text in ("Hällo", "\n", "x" * 5000, "."):
                    upstream.event(delta(text))
                    awaited = (text if mode == "text" else json.dumps(text, ensure_ascii=False)).encode()
                    while awaited not in seen:
                        seen += decode(client.chunk())
                upstream.finish()
                seen += decode(client.body())
                assert (seen.decode() == "aHällo\n" + "x" * 5000 + ".") == (mode == "text")


def test_nginx_would_hold_text_back_without_our_field(provider: Provider, tmp_path: Path) -> None:
    """What the test above would see if it could fail."""
    config = PLAIN_NGINX % f"proxy_ignore_headers X-Accel-Buffering; {GZIP}"
    with running(provider, bind=f"unix:{tmp_path}/1.sock"), nginx(tmp_path, config) as front:
        with Client(front).ask(PROMPT, Accept_Encoding="gzip") as client, provider.take() as upstream:
            upstream.start(A)
            upstream.event(delta("b"))
            client.sock.settimeout(0.3)
            with pytest.raises(socket.timeout):
                client.head()


@pytest.mark.parametrize("stage", ["before the first text", "mid-stream"])
def test_nginx_client_leaves(provider: Provider, tmp_path: Path, stage: str) -> None:
    with running(provider, bind=f"unix:{tmp_path}/1.sock"), nginx(tmp_path, PLAIN_NGINX % "") as front:
        with Client(front).ask(PROMPT) as client, provider.take() as upstream:
            if stage == "mid-stream":
                upstream.start(A)
                client.head()
            client.sock.close()
            assert upstream.gone()


def test_nginx_leaves_a_cut_answer_unterminated(provider: Provider, tmp_path: Path) -> None:
    with running(provider, bind=f"unix:{tmp_path}/1.sock"), nginx(tmp_path, PLAIN_NGINX % "") as front:
        with Client(front).ask(PROMPT) as client, provider.take() as upstream:
            upstream.start(A)
            assert client.head().status == 200 and client.chunk() == b"a"
            upstream.sock.close()
            assert client.rest() == b""


@pytest.mark.parametrize("how", ["it is killed", "upstream ends it"])
def test_nginx_leaves_a_cut_answer_unterminated_over_http_1_0_too(provider: Provider, tmp_path: Path, how: str) -> None:
    with launched(OPENAI_BASE_URL=provider.url) as (process, server):
        config = PLAIN_NGINX.replace("http://unix:/run/streamproxy/1.sock", server.url)
        config = config.replace("version 1.1", "version 1.0")
        with nginx(tmp_path, config % "") as front, Client(front).ask(PROMPT) as client, provider.take() as upstream:
            upstream.start(A)
            assert client.head().status == 200 and client.chunk() == b"a"
            (process.kill if how == "it is killed" else upstream.sock.close)()
            assert client.rest() == b""


@pytest.mark.skipif(os.geteuid() != 0, reason="nginx -t opens nginx's own log and port, which takes root")
def test_nginx_example_passes_nginx_t() -> None:
    done = subprocess.run([program("nginx"), "-t", "-c", str(EXAMPLE)], check=False, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0 and "[warn]" not in done.stderr, done.stderr


def test_nginx_example_agrees_with_our_defaults() -> None:
    values = dict(re.findall(r"^ *(\w+) +(\d+)[ms];", EXAMPLE.read_text(), re.MULTILINE))
    ours = streamproxy.Settings(api_key=KEY)
    assert int(values["client_max_body_size"]) << 20 == int(values["client_body_buffer_size"]) << 20 == ours.max_body
    assert int(values["proxy_read_timeout"]) > ours.first_byte_timeout > ours.heartbeat
    assert int(values["keepalive_timeout"]) < ours.keep_alive_timeout


def instance_of(folder: Path, name: str) -> dict[str, Any]:
    """The settings of one of the processes that nginx's example leads to."""
    return {
        "bind": f"unix:{folder}/{name}.sock", "resume_bind": f"unix:{folder}/{name}.resume.sock", "instance": name,
        "resume": 60.0,
    }  # fmt: skip


@pytest.mark.parametrize(("method", "path"), [("POST", "/"), ("GET", "/?prompt=secret")])
def test_nginx_example_streams_and_logs_no_prompt(
    provider: Provider, tmp_path: Path, caplog: pytest.LogCaptureFixture, method: str, path: str
) -> None:
    with running(provider, bind=f"unix:{tmp_path}/1.sock"), running(provider, bind=f"unix:{tmp_path}/2.sock"):
        with nginx(tmp_path, EXAMPLE.read_text()) as front, Client(front) as client:
            client.ask(PROMPT if method == "POST" else None, method, path, Accept_Encoding="gzip", **EVENTS)
            with provider.take() as upstream:
                upstream.start(A)
                request_id = client.head().fields["X-Request-Id"]
                assert b'"a"' in client.chunk()
                upstream.event(delta("b"))
                assert b'"b"' in client.chunk()
                upstream.finish()
                client.body()
    log = (tmp_path / "access.log").read_text()
    assert f'{request_id} "{method} /" 200 ' in log and log_entries(caplog, 1)[0]["id"] == request_id
    assert "secret" not in log + (tmp_path / "error.log").read_text()


def test_nginx_example_answers_nobody_under_another_name(provider: Provider, tmp_path: Path) -> None:
    with running(
        provider, bind=f"unix:{tmp_path}/1.sock", allow_host="chat.example.com"
    ), nginx(tmp_path, EXAMPLE.read_text()) as front:
        for host, answered in [
            ("chat.example.com", True), ("CHAT.example.com", True), ("evil.example", False),
            ("chat.example.com.evil.example", False),
        ]:
            with Client(front) as client:
                client.send(f"GET / HTTP/1.1\r\nHost: {host}\r\nOrigin: http://{host}\r\n\r\n".encode())
                assert client.head().status == 200 if answered else client.rest() == b""
    assert provider.nobody_came()


def test_nginx_example_leads_back_to_the_process_that_has_the_answer(provider: Provider, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(running(provider, **instance_of(tmp_path, name))) for name in "12"]
        front = stack.enter_context(nginx(tmp_path, EXAMPLE.read_text()))
        used = set()

        def attached(count: int) -> None:
            wait_for(lambda: sum(kept_events(server, "attached") for server in servers) >= count)

        for number in range(8):
            key = {"Idempotency-Key": f"key-{number}"} if number < 6 else {}
            method, path = ("POST", "/") if key else ("GET", "/?prompt=Hi")
            with Client(front).ask(PROMPT if key else None, method, path, **key, **EVENTS) as client:
                with provider.take() as upstream:
                    upstream.start(A)
                    name = client.head().fields["Stream-Id"]
                    assert f"id: {name}.1\n".encode() in client.chunk()
                    client.sock.close()
                    used.add(name[0])
                    last = {"Last-Event-ID": f"{name}.1"}
                    with Client(front).ask(PROMPT if key else None, method, path, **key, **last, **EVENTS) as again:
                        attached(2 * number + 1)
                        upstream.event(delta("b"))
                        assert again.head().fields["Stream-Id"] == name and b'"b"' in again.chunk()
                        with Client(front).ask(method="GET", path=f"/streams/{name}") as third:
                            attached(2 * number + 2)
                            assert third.head().status == 200 and b'"a"' in third.chunk()
                        stop = ("DELETE", "/streams") if key else ("POST", f"/streams/{name}/stop")
                        with Client(front).ask(None, *stop, **key, Content_Length="0") as stopper:
                            assert stopper.head().status == 204
                        assert upstream.gone()
        assert used == {"1", "2"}
    assert provider.nobody_came()


def impatient(config: str) -> str:
    """nginx's example without its limits, and with a shorter time for idle connections, for which a drain waits."""
    for old, new in {"rate=5r/s": "rate=99999r/s", "burst=50": "burst=9999", "timeout 60s": "timeout 50ms"}.items():
        assert old in config
        config = config.replace(old, new)
    return config


# How a client comes back to an answer: what it asked, and what it asks then.
COMES_BACK: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    "an EventSource": ((None, "GET", "/?prompt=Hi"), (None, "GET", "/?prompt=Hi")),
    "by the ID": ((PROMPT, "POST", "/"), (None, "GET", "/streams/{id}")),
    "by the key and the place": ((PROMPT, "POST", "/"), (PROMPT, "POST", "/")),
    "by the key alone": ((PROMPT, "POST", "/"), (PROMPT, "POST", "/")),
}


def parts_of(client: Client) -> list[str]:
    """The numbers and the data of the events of an answer of ours, which is whole."""
    name = client.head().fields["Stream-Id"]
    events = streamproxy.EventParser().feed(client.body())
    return [event.last_event_id.replace(name, "") + event.data for event in events]


def come_back(front: Any, how: str, key: str, name: str) -> Client:
    again = COMES_BACK[how][1]
    keyed = {"Idempotency-Key": key} if again[1] == "POST" else {}
    last = {"Last-Event-ID": f"{name}.1"} if how != "by the key alone" else {}
    return Client(front).ask(again[0], again[1], again[2].format(id=name), **keyed, **last, **EVENTS)


def test_nginx_example_leads_back_to_a_process_that_drains_until_there_is_nothing_to_come_back_for(
    provider: Provider, tmp_path: Path
) -> None:
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(running(provider, **{**instance_of(tmp_path, "1"), "drain_timeout": 600.0}))
        front = stack.enter_context(nginx(tmp_path, impatient(EXAMPLE.read_text())))
        asked = {}
        for how, (question, _) in COMES_BACK.items():  # the second is not there yet: so all are the first's
            keyed = {"Idempotency-Key": how.replace(" ", "-")} if question[1] == "POST" else {}
            with Client(front).ask(*question, **keyed, **EVENTS) as client:
                upstream = stack.enter_context(provider.take())
                upstream.start(A)
                asked[how] = client.head().fields["Stream-Id"], upstream
                assert b'"a"' in client.chunk()  # and then it is cut off
        second = stack.enter_context(running(provider, **instance_of(tmp_path, "2")))
        stopping = threading.Thread(target=first.stop)
        stopping.start()
        wait_for(lambda: refused(first))
        with Client(Front(f"unix:{tmp_path}/1.resume.sock")) as client:
            assert client.ask(method="GET", path="/readyz").head().status == 503
        with Client(front).ask(PROMPT) as client, provider.take() as upstream:  # what is new is the second's
            upstream.start(A)
            assert client.head().status == 200 and client.chunk() == b"a"
        for number in range(4):
            client = stack.enter_context(Client(front).ask(PROMPT, Idempotency_Key=f"new-{number}"))
            stack.enter_context(provider.take()).start(A)
            with Client(front).ask(PROMPT, Idempotency_Key=f"new-{number}") as again:
                for each in (client, again):
                    assert each.head().fields["Stream-Id"].startswith("2-") and each.chunk() == b"a"
        for ended in (False, True):  # while it goes on, and once it is over
            for how, (name, upstream) in asked.items():
                with come_back(front, how, how.replace(" ", "-"), name) as client:
                    if not ended:
                        upstream.event(delta("b"))
                        upstream.finish()
                    begin = ['.1{"text": "a"}'] if how == "by the key alone" else []
                    said = ['.2{"text": "b"}', '.3{"finish_reason": "stop", "usage": null}']
                    assert parts_of(client) == begin + said, how
        assert stopping.is_alive() and kept_events(first, "attached") == 8 and kept_events(second, "attached") == 4
        elapse(first, 61.0)
        stopping.join(DEADLINE)
        assert not stopping.is_alive() and not (tmp_path / "1.resume.sock").exists()
        for how, status in zip(COMES_BACK, (204, 204, 410)):
            with come_back(front, how, how.replace(" ", "-"), asked[how][0]) as client:
                assert client.head().status == status
    assert provider.nobody_came()


@pytest.mark.parametrize(("method", "path"), [("POST", "/"), ("GET", "/?prompt=secret")])
def test_nginx_example_never_sends_a_prompt_twice(tmp_path: Path, method: str, path: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener:  # a process that dies with the request in its hands
        listener.bind(f"{tmp_path}/1.sock")
        listener.listen(5)
        listener.settimeout(DEADLINE)
        (tmp_path / "2.sock").symlink_to("1.sock")
        with nginx(tmp_path, EXAMPLE.read_text()) as front, Client(front) as client:
            client.ask(PROMPT if method == "POST" else None, method, path, **EVENTS)
            UpstreamPeer(listener.accept()[0]).sock.close()
            assert client.head().status == 502
            listener.setblocking(False)
            with pytest.raises(BlockingIOError):
                listener.accept()
    assert "secret" not in (tmp_path / "error.log").read_text()


@pytest.mark.parametrize("name", ["1", "2"])
@pytest.mark.parametrize(("method", "path"), [("POST", "/"), ("GET", "/?prompt=secret")])
def test_nginx_example_goes_to_another_process_while_one_restarts(
    provider: Provider, tmp_path: Path, method: str, path: str, name: str
) -> None:
    with running(provider, bind=f"unix:{tmp_path}/{name}.sock"), nginx(tmp_path, EXAMPLE.read_text()) as front:
        for _ in range(4):  # least_conn would give each process some
            with Client(front).ask(PROMPT if method == "POST" else None, method, path, **EVENTS) as client:
                with provider.take() as upstream:
                    upstream.start(A)
                    assert client.head().status == 200 and b'"a"' in client.chunk()
    assert "secret" not in (tmp_path / "error.log").read_text()


def test_nginx_example_and_readme_have_prometheus_ask_each_process(provider: Provider, tmp_path: Path) -> None:
    tokens, config = token_file(tmp_path, f"alice {ALICE}\n"), readme_block("scrape_configs:")
    (tmp_path / "token").write_text(ALICE)
    (tmp_path / "prometheus.yml").write_text(config.replace("/etc/prometheus/streamproxy-token", f"{tmp_path}/token"))
    check = [program("promtool"), "check", "config", str(tmp_path / "prometheus.yml")]
    told = subprocess.run(check, capture_output=True, text=True, check=False)
    assert told.returncode == 0 and "is valid" in told.stdout, told.stdout + told.stderr
    paths = re.findall(r'"127\.0\.0\.1:9101"\], labels: \{__metrics_path__: (\S+),', config)
    with contextlib.ExitStack() as stack:
        servers = [
            stack.enter_context(running(provider, bind=f"unix:{tmp_path}/{number}.sock", token_file=tokens))
            for number in (1, 2)
        ]
        stack.enter_context(nginx(tmp_path, EXAMPLE.read_text()))
        wait_for(lambda: not refused(Front(f"unix:{tmp_path}/metrics.sock")))
        for path in ("/", *paths):
            with Client(Front(f"unix:{tmp_path}/metrics.sock")) as client:
                client.ask(method="GET", path=path, Authorization=f"Bearer {ALICE}", Connection="close")
                assert client.head().status == (404 if path == "/" else 200)
                assert (b"\nstreamproxy_connections 1\n" in client.rest()) == (path != "/")
        mark = b'{route="/metrics",status="200",client="alice"} 1\n'
        wait_for(lambda: all(mark in server.hub.metrics.encode() for server in servers))


# ----------------------------------------------------------------------- Other servers in front

APACHE_MODULES = "mpm_event proxy proxy_http deflate filter authz_core"
# What is around README's lines.
FRONTS = {
    "Apache": "ServerLimit 1\nThreadsPerChild 25\nMaxRequestWorkers 25\nPidFile {folder}/pid\n"
              "ErrorLog {folder}/log\nServerName localhost\nListen 127.0.0.1:{port}\n"
              + "".join(f"LoadModule {name}_module {{modules}}/mod_{name}.so\n" for name in APACHE_MODULES.split())
              + "AddOutputFilterByType DEFLATE text/plain text/event-stream\n{lines}",
    "HAProxy": "{lines}",
    "Caddy": "{{\n admin off\n}}\n{lines}",
}  # fmt: skip


@contextlib.contextmanager
def other_front(name: str, folder: Path, server: streamproxy.Server | Provider, idle: int = 60) -> Iterator[Front]:
    """The server of that name, set up as README says, but for how many seconds it keeps idle connections."""
    binary, port, config = program({"Apache": "apache2"}.get(name, name.lower())), free_port(), folder / "config"
    text = readme_block(f"# {name}").replace(
        "127.0.0.1:8000", urllib.parse.urlsplit(server.url).netloc
    ).replace("chat.example.com", f"http://:{port}")
    text = re.sub("(ttl=|keepalive )60", rf"\g<1>{idle}", text)
    text = text.replace("bind :80\n", f"bind 127.0.0.1:{port}\n")
    config.write_text(FRONTS[name].format(folder=folder, port=port, lines=text, modules="/usr/lib/apache2/modules"))
    arguments = {
        "Apache": ["-DFOREGROUND", "-f"], "HAProxy": ["-db", "-f"],
        "Caddy": ["run", "--adapter", "caddyfile", "--config"],
    }
    with front_server([binary, *arguments[name], str(config)], port, HOME=str(folder)) as front:
        yield front


def let_it_read(name: str) -> None:
    """Caddy 2.6 loses an answer that begins before it has seen the end of the request's body: Go's issue 15527."""
    if name == "Caddy":
        time.sleep(0.1)


@pytest.mark.parametrize("mode", ["text", "events"])
@pytest.mark.parametrize("name", FRONTS)
def test_other_front_passes_each_piece_on_at_once(provider: Provider, tmp_path: Path, name: str, mode: str) -> None:
    with running(provider) as server, other_front(name, tmp_path, server) as front:
        fields = {"Accept_Encoding": "gzip", **(EVENTS if mode == "events" else {})}
        with Client(front).ask(PROMPT, **fields) as client, provider.take() as upstream:
            let_it_read(name)
            upstream.start(A)
            compressed = client.head().fields.get("Content-Encoding") == "gzip"  # Apache, although told not to
            decode = zlib.decompressobj(zlib.MAX_WBITS | 16).decompress if compressed else bytes
            seen = decode(client.chunk())
            for text in ("b", "c" * 5000, "d"):
                upstream.event(delta(text))
                while text.encode() not in seen:
                    seen += decode(client.chunk())
            upstream.finish()
            client.body()


@pytest.mark.parametrize("stage", ["before the first text", "mid-stream"])
@pytest.mark.parametrize("name", ["HAProxy", "Caddy"])
def test_other_front_client_leaves(provider: Provider, tmp_path: Path, name: str, stage: str) -> None:
    with running(provider) as server, other_front(name, tmp_path, server) as front:
        with Client(front).ask(PROMPT) as client, provider.take() as upstream:
            if stage == "mid-stream":
                let_it_read(name)
                upstream.start(A)
                client.head()
            client.sock.close()
            assert upstream.gone()


@pytest.mark.parametrize("mode", ["text", "events"])
def test_apache_sees_that_a_client_left_with_the_next_text_or_ping(
    provider: Provider, tmp_path: Path, mode: str
) -> None:
    with running(provider, heartbeat=0.05) as server, other_front("Apache", tmp_path, server) as front:
        with Client(front).ask(PROMPT, **(EVENTS if mode == "events" else {})) as client, provider.take() as upstream:
            if mode == "text":
                upstream.start(A)
                client.head()
            client.sock.close()
            if mode == "text":
                with contextlib.suppress(ConnectionError):
                    wait_for(lambda: upstream.event(delta("b")))  # until that fails
            assert upstream.gone()


@pytest.mark.parametrize("name", FRONTS)
def test_other_front_tells_who_asks_and_under_which_name(provider: Provider, tmp_path: Path, name: str) -> None:
    asked = b"GET / HTTP/1.1\r\nHost: chat.example.com\r\n\r\n"
    with other_front(name, tmp_path, provider) as front, Client(front) as client:
        client.send(asked)
        with provider.take() as seen:
            assert {"host: chat.example.com", "x-forwarded-for: 127.0.0.1"} <= set(seen.head.lower().split("\r\n"))


@pytest.mark.parametrize(("name", "mode"), [
    (name, mode) for name in FRONTS for mode in ("text", "events") if (name, mode) != ("Caddy", "text")
])
def test_other_front_lets_a_cut_answer_be_told(provider: Provider, tmp_path: Path, name: str, mode: str) -> None:
    with running(provider) as server, other_front(name, tmp_path, server) as front:
        with Client(front).ask(PROMPT, **(EVENTS if mode == "events" else {})) as client, provider.take() as upstream:
            let_it_read(name)
            upstream.start(A)
            assert client.head().status == 200 and b"a" in client.chunk()
            upstream.sock.close()
            if mode == "text":
                assert client.rest() == b""
            else:
                assert b"event: error" in client.body()


def test_other_fronts_close_idle_connections_first(provider: Provider, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        clients = []
        for name in ("Apache", "Caddy"):
            seconds = re.search("(?:ttl=|keepalive )([0-9]+)", readme_block(f"# {name}"))
            assert seconds and int(seconds[1]) < streamproxy.Settings(api_key=KEY).keep_alive_timeout
            (tmp_path / name).mkdir()
            front = stack.enter_context(other_front(name, tmp_path / name, provider, idle=1))
            client = stack.enter_context(Client(front).ask(PROMPT))
            upstream = stack.enter_context(provider.take())
            let_it_read(name)
            upstream.send(OK, b"Content-Length: 1\r\n\r\n1")
            assert client.head().status == 200 and client.exactly(1) == b"1"
            clients.append(client)
        time.sleep(1.5)
        for client in clients:
            client.ask(PROMPT)
            with provider.take():  # and not on the same
                pass


# ----------------------------------------------------------------------- Deploys that cut nothing


@pytest.fixture
def talker() -> Iterator[Provider]:
    """An upstream that answers whatever comes, in pieces."""
    provider, stack = Provider(), contextlib.ExitStack()
    provider.listener.settimeout(None)

    def answer(sock: socket.socket) -> None:
        with contextlib.suppress(OSError, AssertionError), UpstreamPeer(sock) as upstream:
            while True:
                upstream.start(*map(delta, "Hel"))
                upstream.event(*map(delta, "lo"))
                upstream.finish()
                upstream.read_request()

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=answer, args=provider.listener.accept()[:1], daemon=True).start()

    thread = threading.Thread(target=serve)
    thread.start()
    with stack:
        yield provider
        provider.listener.shutdown(socket.SHUT_RDWR)  # which ends an accept
        thread.join()
        provider.listener.close()


class Load:
    """Ten clients that ask over and over, half on the connection before, half by GET; what went wrong is kept."""

    def __init__(self, front: Any, kept: float = 0.0) -> None:
        """kept: for so many seconds; then each question has an Idempotency-Key, and is asked twice."""
        self.front, self.kept = front, kept
        self.pause = 0.01  # for others to have the machine, too
        self.answered, self.failures = 0, collections.Counter[str]()
        self.over = threading.Event()
        kinds = itertools.islice(itertools.cycle(itertools.product((False, True), repeat=2)), 10)
        self.threads = [threading.Thread(target=self.ask_on, args=kind) for kind in kinds]

    def __enter__(self) -> Self:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join()

    def ask_on(self, keeps: bool, by_get: bool) -> None:
        asked: tuple[Any, ...] = (None, "GET", "/?prompt=Hi") if by_get else (PROMPT,)
        client, key, name, began = None, "", "", 0.0
        while not self.over.is_set():
            try:
                client = client or Client(self.front)
                fields = {**({} if keeps else {"Connection": "close"}), **(EVENTS if by_get else {})}
                if self.kept and not by_get:
                    key, began = (key, began) if name else (os.urandom(8).hex(), time.monotonic())
                    fields["Idempotency-Key"] = key
                head = client.ask(*asked, **fields).head()
                assert head.status == 200, head.line
                body = client.body()
                assert b"event: done\n" in body if by_get else body == b"Hello"
                if self.kept and not by_get:
                    before, name = name, head.fields["Stream-Id"]
                    assert before in ("", name) or time.monotonic() > began + self.kept, "it was asked for twice"
                    name = "" if before else name
                self.answered += 1
                time.sleep(self.pause)
            except (OSError, AssertionError) as error:
                self.failures[repr(error)] += 1
                head = None
            if client and (not head or head.fields.get("Connection") == "close"):
                client.sock.close()
                Peer.opened.remove(client.sock)
                client = None
        if client:
            client.sock.close()  # else the last server would wait a second for what it may ask

    def goes_on(self) -> None:
        """Wait until as many answers more have come as there are clients."""
        until = self.answered + len(self.threads)
        wait_for(lambda: self.answered >= until or self.failures)


class Manager:
    """What systemd is to an instance: it starts one, and waits until that says that it is ready."""

    def __init__(self, folder: Path, *flags: str, **environ: str) -> None:
        if sys.platform != "linux":
            missing("names of sockets in no folder are Linux's")
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(f"\0{folder}/notify")
        self.sock.settimeout(DEADLINE)
        self.flags = flags
        self.environ = {**os.environ, "OPENAI_API_KEY": KEY, "NOTIFY_SOCKET": f"@{folder}/notify", **environ}
        self.processes: list[Any] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            check_no_key(process.communicate()[1])
        self.sock.close()

    def told(self) -> dict[str, str]:
        """What an instance says next."""
        return dict(line.split("=", 1) for line in self.sock.recv(4096).decode().split("\n"))

    def start(self, *flags: str) -> Any:
        command = [sys.executable, "-c", RUN, *self.flags, *flags]
        process = subprocess.Popen(
            command, env=self.environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=HERE
        )
        self.processes.append(process)
        while "READY" not in self.told():  # of one that ends, and says so until it has
            assert process.poll() is None, process.communicate()[1]
        return process

    def stop(self, process: Any) -> str:
        """What an instance logs until it has ended."""
        process.send_signal(signal.SIGTERM)
        errors = process.communicate(timeout=DEADLINE)[1]
        self.processes.remove(process)
        check_no_key(errors)
        assert process.returncode == 0 and " cut off" in errors, errors
        return str(errors)


@pytest.mark.parametrize("resume", [0.0, 0.5])
def test_nginx_example_instances_restarted_in_turn_under_load_cut_nothing(
    talker: Provider, tmp_path: Path, resume: float
) -> None:
    config = impatient(EXAMPLE.read_text())  # the instances wait for 3 s
    flags = ("--upstream", talker.url, "--keep-alive-timeout", "3", "--resume", f"{resume}")

    def start(name: str) -> Any:
        back = ["--instance", name, "--resume-bind", f"unix:{tmp_path}/{name}.resume.sock"] if resume else []
        return manager.start("--bind", f"unix:{tmp_path}/{name}.sock", *back)

    with Manager(tmp_path, *flags) as manager, contextlib.ExitStack() as stack:
        instances = [start("1"), start("2")]
        load = Load(stack.enter_context(nginx(tmp_path, config)), resume)
        load.pause = 0.002  # the more are on their way, the fewer turns show whether one was cut
        stack.enter_context(load)
        for turn in range(6 if resume else 24):
            load.goes_on()
            errors = manager.stop(instances[turn % 2])
            assert ", 0 cut off" in errors, errors
            instances[turn % 2] = start(f"{turn % 2 + 1}")
        load.goes_on()
    assert not load.failures, (load.failures, load.answered, (tmp_path / "error.log").read_text())


def copied(sock: socket.socket) -> socket.socket:
    """Another descriptor of a socket, as another process has it."""
    return socket.socket(fileno=os.dup(sock.fileno()))  # sock.dup() would have it block


def test_socket_of_systemd_that_somebody_has_block_holds_up_nobody(provider: Provider) -> None:
    with socket.create_server(("127.0.0.1", 0)) as given:
        bind = streamproxy.address_text(given.getsockname())
        settings = streamproxy.Settings(bind=bind, api_key=KEY, upstream=provider.url)
        with streamproxy.Server(settings, copied(given)) as server, Client(server) as client:
            caught_up(server)
            given.setblocking(True)
            client.sock.settimeout(DEADLINE / 4)
            try:
                for _ in range(2):
                    with Client(server):
                        assert ready(client) == (200, None)
            finally:
                given.setblocking(False)
                Client(server).sock.close()  # which a server that is held up waits for


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a connection that is being made may be reset")
@pytest.mark.parametrize("how", ["a socket of systemd's", "--reuse-port"])
def test_servers_that_hand_a_port_over_under_load_refuse_and_reset_nobody(talker: Provider, how: str) -> None:
    shared = how != "--reuse-port"
    with socket.create_server(("127.0.0.1", 0 if shared else free_port())) as given:
        bind = f"127.0.0.1:{given.getsockname()[1]}"
        settings = streamproxy.Settings(bind=bind, api_key=KEY, upstream=talker.url, reuse_port=not shared)
        if not shared:
            given.close()
        servers = []

        def start() -> None:
            servers.append(streamproxy.Server(settings, copied(given) if shared else None))
            servers[-1].start()

        start()
        with Load(Front(f"http://{bind}")) as load:
            load.pause = 0.0
            for _ in range(8):
                start()
                load.goes_on()
                servers.pop(0).stop()
                load.goes_on()
        servers.pop().stop()
        assert not load.failures, (load.failures, load.answered)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a connection that is being made may be reset")
def test_listener_that_is_shut_has_no_connection_begin_and_keeps_those_that_have() -> None:
    bind = f"127.0.0.1:{free_port()}"
    first = streamproxy.Listener(bind, reuse_port=True)
    with socket.create_connection(first.sock.getsockname()), socket.socket() as late:
        first.shut()
        late.setblocking(False)
        assert late.connect_ex(first.sock.getsockname()) == errno.EINPROGRESS
        first.sock.accept()[0].close()
        with pytest.raises(BlockingIOError):
            first.sock.accept()
        second = streamproxy.Listener(bind, reuse_port=True)
        first.close()
        try:
            assert select.select([], [late], [], DEADLINE)[1]
            assert late.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
            second.sock.accept()[0].close()
        finally:
            second.close()


def test_instance_takes_the_socket_of_systemd_and_leaves_it_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "s"
    command = [program("systemd-socket-activate"), "--listen", str(path), sys.executable, str(PROGRAM), "--demo"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        wait_for(lambda: not refused(Front(f"unix:{path}")))  # it is there a moment before it listens
        with Client(Front(f"unix:{path}")).ask(method="GET", path="/healthz") as client:
            assert client.head().status == 200
            assert process.stdout and process.stdout.readline().decode().endswith(f" on unix:{path}\n")
            process.terminate()
        assert process.wait(DEADLINE) == 0 and path.is_socket()
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(("begin", "flags", "words"), [
    ("LISTEN_FDS=2", (), "LISTEN_FDS: '2' sockets are handed over; allowed: 1"),
    ("LISTEN_FDS=1", (), "LISTEN_FDS: descriptor 3 does not listen; allowed: a socket of ListenStream= with Accept=no"),
    (
        "LISTEN_FDS=1 3<&{fd}", ("--port", "8000"),
        "--port and a socket of systemd's (LISTEN_FDS) are both given; allowed: one of them",
    ),
    (
        "LISTEN_FDS=1 3<&{fd}", (),
        (
            "--bind (STREAMPROXY_BIND): '0.0.0.0:{port}' lets others spend your money; allowed: a loopback address, a"
            " unix socket, or any with --token-file or --allow-anonymous"
        ),
    ),
])
def test_socket_of_systemd_that_cannot_be_used_is_one_line(begin: str, flags: tuple[str, ...], words: str) -> None:
    with socket.create_server(("0.0.0.0", 0)) as given:
        names = {"fd": given.fileno(), "port": given.getsockname()[1]}
        variables, _, redirection = begin.format(**names).partition(" ")
        script = f'exec {redirection or "3</dev/null"}; export LISTEN_PID=$$ {variables}; exec "$@"'
        command = ["bash", "-c", script, "bash", sys.executable, "-c", RUN, "--demo", *flags]
        pass_fds = [given.fileno()]
        done = subprocess.run(command, capture_output=True, text=True, check=False, pass_fds=pass_fds, cwd=HERE)
        assert (done.returncode, done.stderr) == (2, f"streamproxy: {words.format(**names)}\n")


def test_socket_of_systemd_that_is_another_process_s_is_not_ours() -> None:
    environ = {"LISTEN_PID": "1", "LISTEN_FDS": "1", "LISTEN_FDNAMES": "x", "A": "b"}
    assert streamproxy.inherited_socket(environ) is None and environ == {"A": "b"}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="names without a folder are Linux's")
def test_socket_of_systemd_is_named_as_bind_has_it(tmp_path: Path) -> None:
    for family, address, text in [
        (socket.AF_UNIX, f"{tmp_path}/s", f"unix:{tmp_path}/s"), (socket.AF_UNIX, f"\0{tmp_path}", f"unix:@{tmp_path}"),
        (socket.AF_INET, ("127.0.0.1", 0), "127.0.0.1:{}"), (socket.AF_INET6, ("::1", 0), "[::1]:{}"),
    ]:
        with socket.socket(family) as sock:
            sock.bind(address)
            assert streamproxy.address_text(sock.getsockname()) == text.format(sock.getsockname()[1])


def test_instance_tells_systemd_what_it_waits_for(talker: Provider, tmp_path: Path) -> None:
    flags = "--upstream", talker.url, "--bind", f"unix:{tmp_path}/s", "--keep-alive-timeout", "3"
    with Manager(tmp_path, *flags) as manager:
        process = manager.start()
        with Client(Front(f"unix:{tmp_path}/s")).ask(method="GET", path="/readyz", Via="1.1 x") as client:
            assert client.head().status == 200 and client.exactly(3) == b"ok\n"
            process.terminate()
            status = "waiting for 0 streams, 1 connection in all"
            assert manager.told() == {"STOPPING": "1", "EXTEND_TIMEOUT_USEC": "15000000", "STATUS": status}


@pytest.mark.parametrize("address", ["", "/none/such", "@none-such", "vsock:2:1"])
def test_notifier_that_nobody_hears_says_nothing(address: str) -> None:
    streamproxy.Notifier(address).ready("")
    streamproxy.Notifier(address).stopping("")


# ----------------------------------------------------------------------- curl


def curl(front: Any, *args: str) -> Any:
    command = [program("curl"), "-sS", "-N", "--max-time", str(DEADLINE), *args, front.url]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_curl_sees_text_arrive_and_the_end(server: streamproxy.Server, provider: Provider) -> None:
    process = curl(server, "-d", json.dumps(PROMPT))
    with provider.take() as upstream:
        upstream.start(A)
        assert process.stdout.read(1) == b"a"
        upstream.event(delta("b"))
        assert process.stdout.read(1) == b"b"
        upstream.finish()
        assert process.communicate() == (b"", b"") and process.returncode == 0


@pytest.mark.parametrize(("flags", "status"), [((), 18), (("--http1.0",), 56)])
def test_curl_fails_where_the_answer_is_cut(
    server: streamproxy.Server, provider: Provider, flags: tuple[str, ...], status: int
) -> None:
    process = curl(server, "-d", json.dumps(PROMPT), *flags)
    with provider.take() as upstream:
        upstream.start(A)
        assert process.stdout.read(1) == b"a"
    assert process.wait(DEADLINE) == status
    process.communicate()


def test_curl_sends_a_large_body_after_100_continue(provider: Provider) -> None:
    with running(provider, max_body=5_000_000) as server:
        command = [program("curl"), "-sS", "-N", "-d", "@-", "-H", "Expect: 100-continue", server.url]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdin and process.stdout
        process.stdin.write(json.dumps({"prompt": "x" * 3_000_000}).encode())
        process.stdin.close()
        with provider.take() as upstream:
            assert len(upstream.body) > 3_000_000
            upstream.start(A)
            upstream.finish()
            assert process.stdout.read() == b"a" and process.wait(DEADLINE) == 0
            process.stdout.close()


# ----------------------------------------------------------------------- Chromium


class WebDriver:
    """A headless Chromium, driven over W3C WebDriver (https://www.w3.org/TR/webdriver2/)."""

    ENTER, SHIFT, ESCAPE = "\ue007", "\ue008", "\ue00c"
    FLAGS = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--no-first-run", "--disable-quic",
             "--disable-background-networking", "--disable-component-update", "--disable-sync",
             "--host-resolver-rules=MAP rebound.example 127.0.0.1")  # fmt: skip

    def __init__(self, folder: Path) -> None:
        chromium, driver = program("chromium", "chromium-browser", "google-chrome"), program("chromedriver")
        found = None
        while not found:  # the port that it chooses for IPv4 may be taken for IPv6
            self.process = subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, text=True)
            assert self.process.stdout
            lines = (re.search(r"started successfully on port (\d+)", line) for line in self.process.stdout)
            found = next(filter(None, lines), None)
        self.port, self.path = int(found[1]), "/session"
        options = {"binary": chromium, "args": [*self.FLAGS, f"--user-data-dir={folder}"]}
        capabilities = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        self.path += "/" + self.call("POST", "", {"capabilities": {"alwaysMatch": capabilities}})["sessionId"]

    def close(self) -> None:
        self.call("DELETE", "")
        self.process.terminate()
        self.process.communicate()

    def call(self, method: str, path: str, parameters: object = None) -> Any:
        """What a command answers; raises RuntimeError for an error."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            connection.request(method, self.path + path, json.dumps(parameters or {}) if method == "POST" else None)
            value = json.load(connection.getresponse())["value"]
        if isinstance(value, dict) and "error" in value:
            raise RuntimeError(f"{value['error']}: {value['message']}")
        return value

    def run(self, script: str, *args: object) -> Any:
        """What a function body returns in the page."""
        return self.call("POST", "/execute/sync", {"script": script, "args": args})

    def wait(self, script: str, *args: object) -> Any:
        """Wait until script returns a true value in the page."""
        return wait_for(lambda: self.run(script, *args))

    def element(self, selector: str, command: str, **parameters: object) -> None:
        """Have one element do a command: click, or value to type text."""
        found = self.call("POST", "/element", {"using": "css selector", "value": selector})
        self.call("POST", f"/element/{next(iter(found.values()))}/{command}", parameters)

    def devtools(self, command: str, **parameters: object) -> Any:
        """What a command of the DevTools protocol answers (https://chromedevtools.github.io/devtools-protocol/)."""
        return self.call("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def media(self, **features: str) -> None:
        """Have media queries find these features; without any, the browser's own."""
        named = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.devtools("Emulation.setEmulatedMedia", features=named)

    def log(self) -> list[dict[str, Any]]:
        """New console entries, violations of the page's policy among them.

        A lost request, or an autofocus that comes after the first click, is the browser's own.
        """
        entries = self.call("POST", "/se/log", {"type": "browser"})
        return [entry for entry in entries if entry["source"] != "network" and entry["level"] != "INFO"]


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebDriver]:
    with contextlib.closing(WebDriver(tmp_path_factory.mktemp("chromium"))) as driver:
        yield driver


@pytest.fixture
def page(browser: WebDriver, server: streamproxy.Server) -> Iterator[WebDriver]:
    browser.call("POST", "/url", {"url": server.url})
    yield browser
    assert browser.log() == []


@pytest.fixture
def asks_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """An EventSource that was cut off asks again after 1 ms, not after Chromium's 3 s: each event tells it so."""
    encode = streamproxy.encode_event
    monkeypatch.setattr(streamproxy, "encode_event", lambda *given: encode(*given)[:-1] + b"retry: 1\n\n")


def say(page: WebDriver, text: str = "Hello") -> None:
    page.element("#prompt", "value", text=text + WebDriver.ENTER)


def answer(page: WebDriver, provider: Provider, *events: bytes) -> None:
    """Have the question that is asked answered so, to the end."""
    with provider.take() as upstream:
        upstream.start(*events)
        upstream.finish()
    page.wait("return document.querySelector('#stop').hidden")


def growing(page: WebDriver, text: str) -> None:
    script = "return $('[aria-busy=true] .turn:last-child .assistant .text')?.textContent === arguments[0]"
    page.wait(script, text)


def conversation(page: WebDriver, *expected: tuple[str, str]) -> None:
    page.wait("return document.querySelector('#stop').hidden")
    script = """return [...document.querySelectorAll('.text, .ending')].map(each =>
        [each.matches('.ending') ? each.className : each.parentNode.className.slice(8),
         each.firstChild?.textContent || ''])"""
    assert page.run(script) == [[role, text] for role, text in expected]


def test_page_text_grows_as_it_arrives(page: WebDriver, provider: Provider) -> None:
    say(page)
    with provider.take() as upstream:
        assert json.loads(upstream.body)["messages"] == [{"role": "user", "content": "Hello"}]
        upstream.start(ROLE, delta("Hällo "))
        growing(page, "Hällo")
        upstream.event(delta("👋"))
        growing(page, "Hällo 👋")
        upstream.finish()
        conversation(page, ("user", "Hello"), ("assistant", "Hällo 👋"))
    say(page, "More")
    with provider.take() as upstream:
        assert [each["content"] for each in json.loads(upstream.body)["messages"]] == ["Hello", "Hällo 👋", "More"]
        upstream.start(A)
        upstream.event(delta("", "length"), DONE)
        page.wait("return document.querySelector('.ending')?.textContent === 'The answer reached the token limit.'")


def test_page_stop_closes_upstream(page: WebDriver, provider: Provider) -> None:
    say(page)
    with provider.take() as upstream:
        upstream.start(delta("partial"))
        growing(page, "partial")
        page.element("#stop", "click")
        assert upstream.gone()
    conversation(page, ("user", "Hello"), ("assistant", "partial"), ("ending", "Stopped."))
    assert page.run("return performance.getEntriesByType('resource').every(each => !each.name.includes('streams'))")
    assert page.run("return document.activeElement.id") == "prompt"


def test_page_escape_stops_an_answer_and_leaves_what_is_edited(page: WebDriver, provider: Provider) -> None:
    def edit(*keys: str) -> object:
        page.element(".user .tools button", "click")
        page.element("#prompt", "value", text="".join(keys))
        return page.run("return [input.value, document.querySelectorAll('.editing').length]")

    say(page)
    with provider.take() as upstream:
        upstream.start(A)
        growing(page, "a")
        page.element("#prompt", "value", text=WebDriver.ESCAPE)
        assert upstream.gone()
    conversation(page, ("user", "Hello"), ("assistant", "a"), ("ending", "Stopped."))
    page.element("#prompt", "value", text="draft")
    assert edit("!") == ["Hello!", 1] and edit() == ["Hello!", 1]
    assert edit(WebDriver.ESCAPE) == ["draft", 0]
    edit("?" + WebDriver.ENTER)
    answer(page, provider, A)
    conversation(page, ("user", "Hello?"), ("assistant", "a"))
    assert page.run("return [input.value, document.querySelectorAll('.editing').length]") == ["draft", 0]
    edit()
    page.element(".assistant .tools button.last", "click")  # Regenerate
    answer(page, provider, A)
    page.element("#prompt", "value", text=WebDriver.ENTER)
    answer(page, provider, A)
    conversation(page, *[("user", "Hello?"), ("assistant", "a"), ("user", "draft"), ("assistant", "a")])


@contextlib.contextmanager
def begun(browser: WebDriver, provider: Provider) -> Iterator[tuple[streamproxy.Server, UpstreamPeer]]:
    """The server and the upstream of an answer that has begun, and would go on without the page; no other is asked."""
    with running(provider, resume=60.0) as server:
        browser.call("POST", "/url", {"url": server.url})
        say(browser)
        with provider.take() as upstream:
            upstream.start(A)
            growing(browser, "a")
            yield server, upstream
        browser.run("sessionStorage.clear(); turns = []")
    assert provider.nobody_came()


def test_page_begins_a_new_chat_while_an_answer_arrives(browser: WebDriver, provider: Provider) -> None:
    with begun(browser, provider) as (_, upstream):
        browser.element("#new", "click")
        conversation(browser)
        say(browser, "Two")
        assert upstream.gone()
        answer(browser, provider, delta("b"))
        conversation(browser, ("user", "Two"), ("assistant", "b"))
    browser.log()


def test_page_leaves_selected_what_is_selected(page: WebDriver, provider: Provider) -> None:
    say(page)
    with provider.take() as upstream:
        upstream.start(delta("one\n\n*two* three"))
        growing(page, "onetwo three")
        page.run("getSelection().selectAllChildren(document.querySelector('.text .part'))")
        upstream.event(delta(" four"))
        growing(page, "onetwo three four")
        upstream.finish()
        conversation(page, ("user", "Hello"), ("assistant", "onetwo three four"))
    assert page.run("return getSelection().toString()") == "one\n\ntwo three four"


@pytest.mark.parametrize("secure", [True, False], ids=["https", "http"])
def test_page_copies_an_answer_as_markdown_and_code_alone(page: WebDriver, provider: Provider, secure: bool) -> None:
    page.run("""document.addEventListener("copy", () => { window.copied = document.activeElement.value; });
        const clipboard = {writeText: async text => { window.copied = text; }};
        Object.defineProperty(navigator, "clipboard", {value: arguments[0] ? clipboard : undefined});""", secure)
    say(page)
    text = "*a*\n\n```py\nf()\n  g()\n```"
    answer(page, provider, delta(text))
    for button, copied in ((".code button", "f()\n  g()\n"), (".assistant .tools button", text)):
        page.element(button, "click")
        page.wait("return window.copied === arguments[0]", copied)
        assert page.run("return document.querySelector(arguments[0]).textContent", button) == "Copied"
        assert page.run("return document.querySelector('#status').textContent") == "Copied."
        assert page.run("return document.activeElement === document.querySelector(arguments[0])", button)
    assert page.run("return document.querySelectorAll('textarea').length") == 1


def test_page_tells_figures_below_an_answer(browser: WebDriver, provider: Provider) -> None:
    usage = event({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 84, "total_tokens": 85}})
    with running(provider, model="some-model") as server:
        browser.call("POST", "/url", {"url": server.url})
        for last, rate in ((STOP, "1 pieces"), (usage, "42 tokens")):
            browser.run("document.querySelector('#new').click(); window.now = 1000; performance.now = () => now")
            say(browser)
            with provider.take() as upstream:
                browser.run("now = 2250")
                upstream.start(delta("a"))
                growing(browser, "a")
                browser.run("now = 4250")
                upstream.event(delta("b"), STOP, last, DONE)
                stats = browser.wait("return document.querySelector('.stats')?.textContent")
            assert stats == f"1.3 s to the first token · {rate} a second · some-model"


def test_page_shows_errors_and_cut_answers(page: WebDriver, provider: Provider) -> None:
    said = [("user", "Hello"), ("assistant", ""), ("ending error", "Slow down")]
    say(page)
    with provider.take() as upstream:
        upstream.send(error_answer(429, b'{"error": "Slow down"}'))
        conversation(page, *said)
    page.element(".error button", "click")  # Try again
    cut = "Upstream closed the connection within its answer."
    said = [("user", "Hello"), ("assistant", "a"), ("ending error", cut)]
    with provider.take() as upstream:
        upstream.start(A)
        growing(page, "a")
    conversation(page, *said)


def test_page_shows_markup_as_text_and_folds_reasoning(page: WebDriver, provider: Provider) -> None:
    markup = "<img src=x onerror=alert(1)><script>alert(2)</script>&amp;"
    say(page, markup)
    with provider.take() as upstream:
        upstream.start(delta(None, reasoning_content=markup), delta(markup))
        upstream.finish()
    conversation(page, ("user", markup), ("assistant", markup))
    assert page.run("return document.querySelector('details div').textContent") == markup
    assert page.run("return document.querySelector('summary').textContent").endswith(f"s: {markup}")
    assert page.run("return document.querySelectorAll('details:not([open]) img, img, main script').length") == 0


def test_page_enter_sends_and_shift_enter_does_not(page: WebDriver, provider: Provider) -> None:
    page.element("#prompt", "value", text="one" + WebDriver.SHIFT + WebDriver.ENTER)
    say(page, "two")
    with provider.take() as upstream:
        assert json.loads(upstream.body)["messages"][0]["content"] == "one\ntwo"
        upstream.start(A)
        upstream.finish()
    conversation(page, ("user", "one\ntwo"), ("assistant", "a"))


def test_page_remembers_regenerates_and_edits(page: WebDriver, provider: Provider) -> None:
    def answered(*asked: str) -> None:
        with provider.take() as upstream:
            assert [each["content"] for each in json.loads(upstream.body)["messages"]] == list(asked)
            upstream.start(delta("**a**"))
            upstream.finish()
            conversation(page, *[("user", asked[-1]), ("assistant", "a")][-2:])

    say(page, "one")
    answered("one")
    page.element(".assistant .tools button.last", "click")
    answered("one")
    page.element(".assistant .tools button.last", "click")
    with provider.take() as upstream:
        upstream.send(error_answer(429, b'{"error": "Slow down"}'))
        conversation(page, ("user", "one"), ("assistant", "a"), ("ending error", "Slow down"))  # the old is not lost
    page.element(".user .tools button", "click")
    say(page, "!")
    answered("one!")
    page.call("POST", "/refresh", {})
    conversation(page, ("user", "one!"), ("assistant", "a"))
    page.element("#new", "click")
    page.call("POST", "/refresh", {})
    conversation(page)
    assert not page.run("return document.querySelector('#greeting').hidden")


def test_page_leaves_the_keyboard_where_it_is_and_takes_it_from_what_goes(page: WebDriver, provider: Provider) -> None:
    focus = "return document.activeElement.ariaLabel || document.activeElement.id || document.activeElement.tagName"
    say(page)
    with provider.take() as upstream:
        upstream.start(delta("```\na\n```\nb"))
        page.wait("return document.querySelector('.code button')")
        page.run("document.querySelector('.code button').focus()")
        upstream.finish()
        page.wait("return document.querySelector('#stop').hidden")
        assert page.run(focus) == "Copy code"
    page.element(".assistant .tools button.last", "value", text=WebDriver.ENTER)  # Regenerate
    with provider.take() as upstream:
        assert page.run(focus) == "Message"
        upstream.start(A)
        upstream.finish()
    page.wait("return document.querySelector('#stop').hidden")
    page.element(".assistant .tools button.last", "click")
    with provider.take():
        assert page.run(focus) == "BODY"  # of a telephone, the keyboard stays away


def test_page_remembers_the_last_turns_that_there_is_room_for(page: WebDriver) -> None:
    kept = page.run("""turns = [..."abcdefgh"].map(question => ({question, answer: "x".repeat(1000)}));
        return arguments[0].map(room => {
            sessionStorage.clear();
            sessionStorage.setItem("full", "x".repeat(5 * 1024 * 1024 - 4 - room));   // 5 MiB are Chromium's limit
            save();
            return JSON.parse(restore(store) || "[]").map(turn => turn.question).join("");
        })""", [100_000, 8000, 6000, 1500, 500])  # fmt: skip
    assert kept == ["abcdefgh", "bcdefgh", "defgh", "h", ""]
    page.run("sessionStorage.clear(); turns = []")


def test_page_follows_the_end_until_the_reader_moves_up(page: WebDriver, provider: Provider) -> None:
    say(page)
    with provider.take() as upstream:
        upstream.start(delta("line\n\n" * 100))
        page.wait("return scrollY > 1000 && document.querySelector('#end').hidden")
        page.run("scrollBy(0, -1)")
        page.wait("return !document.querySelector('#end').hidden")
        at = page.run("return scrollY")
        upstream.event(delta("more\n\n" * 100))
        page.wait("return document.querySelectorAll('.text p').length === 200")
        assert page.run("return scrollY") == at
        page.element("#end", "click")
        page.wait("return document.querySelector('#end').hidden && scrollY > arguments[0]", at)
        upstream.finish()
    page.wait("return document.querySelector('#stop').hidden")


def test_page_box_grows_to_a_third_of_the_window(page: WebDriver) -> None:
    height = "return input.getBoundingClientRect().height / innerHeight"
    one = page.run(height)
    page.element("#prompt", "value", text="a" + f"{WebDriver.SHIFT}{WebDriver.ENTER}{WebDriver.SHIFT}" * 2)
    assert one * 2 < page.run(height) < 0.33
    page.run("fill('line\\n'.repeat(100))")
    assert 0.32 < page.run(height) < 0.34
    page.run("fill('')")
    assert page.run(height) == one


# 1280 CSS pixels at 200 %, and a narrow phone with letters twice as large
@pytest.mark.parametrize(("width", "letters"), [(640, 100), (320, 200)])
def test_page_fits_a_narrow_window(page: WebDriver, provider: Provider, width: int, letters: int) -> None:
    page.devtools("Emulation.setDeviceMetricsOverride", width=width, height=640, deviceScaleFactor=2, mobile=True)
    page.devtools("Emulation.setTouchEmulationEnabled", enabled=True)
    page.run("page.style.fontSize = arguments[0]", f"{letters}%")
    wide = "x" * 200
    page.element("#prompt", "value", text="one" + WebDriver.ENTER + wide)  # which makes a line on a touch screen
    page.element("#send", "click")
    table = f"|{'a|' * 9}\n|{'-|' * 9}\n|{(wide + '|') * 9}\n"
    answer(page, provider, delta(f"{wide}\n\n# {wide}\n\n```\n{wide}\n```\n{table}"))
    assert page.run("return turns[0].question") == "one\n" + wide
    beyond = """const shown = [...document.querySelectorAll("h1, button, textarea, .text > *")];
        return [page.scrollWidth > innerWidth, ...shown.filter(each => each.checkVisibility()
            && each.getBoundingClientRect().right > innerWidth + .5)]"""
    assert page.run(beyond) == [False]
    page.run("access.hidden = false; $('#end').hidden = false")
    assert page.run(beyond) == [False]
    page.devtools("Emulation.setTouchEmulationEnabled", enabled=False)
    page.devtools("Emulation.clearDeviceMetricsOverride")


def test_page_of_a_language_that_is_written_from_right_to_left(page: WebDriver, provider: Provider) -> None:
    hebrew = "שלום עולם"
    say(page, hebrew)
    answer(page, provider, delta(f"{hebrew}\n\n- {hebrew}\n\n> {hebrew}\n\n|{hebrew}|b|\n|-|-|\n|1|2|\n\n- word"))
    page.element("#prompt", "value", text=hebrew)
    at_the_right = """return [...document.querySelectorAll(".text p, li, blockquote, tr")].map(each => {
        const range = document.createRange(), box = each.getBoundingClientRect();
        range.selectNodeContents(each.querySelector("td, th, p") || each);
        const {left, right} = range.getBoundingClientRect();
        return [each.localName, left - box.left > box.right - right];
    })"""
    kinds = ["p", "li", "p", "blockquote", "p", "tr", "tr"]
    assert page.run(at_the_right) == [*([kind, True] for kind in kinds), ["li", False], ["p", False]]


def test_page_heeds_reduced_motion_and_forced_colours(page: WebDriver, provider: Provider) -> None:
    say(page)
    with provider.take() as upstream:
        upstream.start(A)
        growing(page, "a")
        style = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
        for wish, animation in (("no-preference", "fade"), ("reduce", "none")):
            page.media(prefers_reduced_motion=wish)
            assert page.run(style, ".dot", "animationName") == animation
        page.media(forced_colors="active")
        assert page.run(style, ".dot", "backgroundColor") != page.run(style, "body", "backgroundColor")
        assert page.run(style, ".user .text", "borderTopWidth") == "1px"  # its background is gone
        page.media()
        upstream.finish()
    page.wait("return document.querySelector('#stop').hidden")


def test_page_has_nothing_that_axe_finds(page: WebDriver, provider: Provider, npm_folder: Path) -> None:
    axe = (npm_folder / "node_modules/axe-core/axe.min.js").read_text()
    say(page)
    with provider.take() as upstream:
        upstream.start(delta("# a\n\n- *b*\n\n> c `d` <https://e.org>\n\n```py\nf\n```\n\n|g|h|\n|-|-|\n|i|j|\n"))
        upstream.finish()
    page.wait("return document.querySelector('#stop').hidden")
    for theme in ("light", "dark"):
        page.media(prefers_color_scheme=theme)
        script = axe + "; axe.run().then(found => arguments[0](found.violations.map(each => each.id)))"
        assert page.call("POST", "/execute/async", {"script": script, "args": []}) == []


# Of the examples of CommonMark 0.31 (https://spec.commonmark.org/), by John MacFarlane, CC BY-SA 4.0: text and HTML.
COMMONMARK = r"""
["\\\\*emphasis*\n", "<p>\\<em>emphasis</em></p>\n"]
["`` \\[\\` ``\n", "<p><code>\\[\\`</code></p>\n"]
["``` foo\\+bar\nfoo\n```\n", "<pre><code class=\"language-foo+bar\">foo\n</code></pre>\n"]
["***\n---\n___\n", "<hr />\n<hr />\n<hr />\n"]
["===\n", "<p>===</p>\n"]
[" ***\n  ***\n   ***\n", "<hr />\n<hr />\n<hr />\n"]
["_____________________________________\n", "<hr />\n"]
[" **  * ** * ** * **\n", "<hr />\n"]
["- - - -    \n", "<hr />\n"]
[" *-*\n", "<p><em>-</em></p>\n"]
["Foo\n***\nbar\n", "<p>Foo</p>\n<hr />\n<p>bar</p>\n"]
["* Foo\n* * *\n* Bar\n", "<ul>\n<li>Foo</li>\n</ul>\n<hr />\n<ul>\n<li>Bar</li>\n</ul>\n"]
["####### foo\n", "<p>####### foo</p>\n"]
["\\## foo\n", "<p>## foo</p>\n"]
["#                  foo                     \n", "<h1>foo</h1>\n"]
["foo\n    # bar\n", "<p>foo\n# bar</p>\n"]
["# foo ##################################\n##### foo ##\n", "<h1>foo</h1>\n<h5>foo</h5>\n"]
["### foo ### b\n", "<h3>foo ### b</h3>\n"]
["### foo \\###\n## foo #\\##\n# foo \\#\n", "<h3>foo ###</h3>\n<h2>foo ###</h2>\n<h1>foo #</h1>\n"]
["Foo bar\n# baz\nBar foo\n", "<p>Foo bar</p>\n<h1>baz</h1>\n<p>Bar foo</p>\n"]
["Foo *bar*\n=========\n\nFoo *bar*\n---------\n", "<h1>Foo <em>bar</em></h1>\n<h2>Foo <em>bar</em></h2>\n"]
["  Foo *bar\nbaz*\t\n====\n", "<h1>Foo <em>bar\nbaz</em></h1>\n"]
["   Foo\n---\n\n  Foo\n-----\n\n  Foo\n  ===\n", "<h2>Foo</h2>\n<h2>Foo</h2>\n<h1>Foo</h1>\n"]
["Foo\n    ---\n", "<p>Foo\n---</p>\n"]
["Foo  \n-----\n", "<h2>Foo</h2>\n"]
["> Foo\n---\n", "<blockquote>\n<p>Foo</p>\n</blockquote>\n<hr />\n"]
["- Foo\n---\n", "<ul>\n<li>Foo</li>\n</ul>\n<hr />\n"]
["---\nFoo\n---\nBar\n---\nBaz\n", "<hr />\n<h2>Foo</h2>\n<h2>Bar</h2>\n<p>Baz</p>\n"]
["---\n---\n", "<hr />\n<hr />\n"]
["> foo\n-----\n", "<blockquote>\n<p>foo</p>\n</blockquote>\n<hr />\n"]
["Foo\n\nbar\n---\nbaz\n", "<p>Foo</p>\n<h2>bar</h2>\n<p>baz</p>\n"]
["Foo\nbar\n* * *\nbaz\n", "<p>Foo\nbar</p>\n<hr />\n<p>baz</p>\n"]
["```\n<\n >\n```\n", "<pre><code>&lt;\n &gt;\n</code></pre>\n"]
["``\nfoo\n``\n", "<p><code>foo</code></p>\n"]
["~~~\naaa\n```\n~~~\n", "<pre><code>aaa\n```\n</code></pre>\n"]
["~~~~\naaa\n~~~\n~~~~\n", "<pre><code>aaa\n~~~\n</code></pre>\n"]
["`````\n\n```\naaa\n", "<pre><code>\n```\naaa\n</code></pre>\n"]
["```\n\n  \n```\n", "<pre><code>\n  \n</code></pre>\n"]
[" ```\n aaa\naaa\n```\n", "<pre><code>aaa\naaa\n</code></pre>\n"]
["   ```\n   aaa\n    aaa\n  aaa\n   ```\n", "<pre><code>aaa\n aaa\naaa\n</code></pre>\n"]
["   ```\naaa\n  ```\n", "<pre><code>aaa\n</code></pre>\n"]
["``` ```\naaa\n", "<p><code> </code>\naaa</p>\n"]
["foo\n```\nbar\n```\nbaz\n", "<p>foo</p>\n<pre><code>bar\n</code></pre>\n<p>baz</p>\n"]
["````;\n````\n", "<pre><code class=\"language-;\"></code></pre>\n"]
["~~~ aa ``` ~~~\nfoo\n~~~\n", "<pre><code class=\"language-aa\">foo\n</code></pre>\n"]
["aaa\n\nbbb\n", "<p>aaa</p>\n<p>bbb</p>\n"]
["aaa\n\n\nbbb\n", "<p>aaa</p>\n<p>bbb</p>\n"]
["aaa\n             bbb\n                                       ccc\n", "<p>aaa\nbbb\nccc</p>\n"]
["aaa     \nbbb     \n", "<p>aaa<br />\nbbb</p>\n"]
["># Foo\n>bar\n> baz\n", "<blockquote>\n<h1>Foo</h1>\n<p>bar\nbaz</p>\n</blockquote>\n"]
["> # Foo\n> bar\nbaz\n", "<blockquote>\n<h1>Foo</h1>\n<p>bar\nbaz</p>\n</blockquote>\n"]
["> foo\n---\n", "<blockquote>\n<p>foo</p>\n</blockquote>\n<hr />\n"]
["> foo\n    - bar\n", "<blockquote>\n<p>foo\n- bar</p>\n</blockquote>\n"]
[">\n>  \n> \n", "<blockquote>\n</blockquote>\n"]
["> foo\n\n> bar\n", "<blockquote>\n<p>foo</p>\n</blockquote>\n<blockquote>\n<p>bar</p>\n</blockquote>\n"]
["> foo\n>\n> bar\n", "<blockquote>\n<p>foo</p>\n<p>bar</p>\n</blockquote>\n"]
["> bar\nbaz\n", "<blockquote>\n<p>bar\nbaz</p>\n</blockquote>\n"]
["> bar\n>\nbaz\n", "<blockquote>\n<p>bar</p>\n</blockquote>\n<p>baz</p>\n"]
["- one\n\n  two\n", "<ul>\n<li>\n<p>one</p>\n<p>two</p>\n</li>\n</ul>\n"]
["-one\n\n2.two\n", "<p>-one</p>\n<p>2.two</p>\n"]
["123456789. ok\n", "<ol start=\"123456789\">\n<li>ok</li>\n</ol>\n"]
["0. ok\n", "<ol start=\"0\">\n<li>ok</li>\n</ol>\n"]
["-1. not ok\n", "<p>-1. not ok</p>\n"]
["-    foo\n\n  bar\n", "<ul>\n<li>foo</li>\n</ul>\n<p>bar</p>\n"]
["-   \n  foo\n", "<ul>\n<li>foo</li>\n</ul>\n"]
["- foo\n-   \n- bar\n", "<ul>\n<li>foo</li>\n<li></li>\n<li>bar</li>\n</ul>\n"]
["*\n", "<ul>\n<li></li>\n</ul>\n"]
["  1.  A paragraph\n    with two lines.\n", "<ol>\n<li>A paragraph\nwith two lines.</li>\n</ol>\n"]
["10) foo\n    - bar\n", "<ol start=\"10\">\n<li>foo\n<ul>\n<li>bar</li>\n</ul>\n</li>\n</ol>\n"]
["- - foo\n", "<ul>\n<li>\n<ul>\n<li>foo</li>\n</ul>\n</li>\n</ul>\n"]
["- foo\n- bar\n+ baz\n", "<ul>\n<li>foo</li>\n<li>bar</li>\n</ul>\n<ul>\n<li>baz</li>\n</ul>\n"]
["- a\n- b\n\n- c\n", "<ul>\n<li>\n<p>a</p>\n</li>\n<li>\n<p>b</p>\n</li>\n<li>\n<p>c</p>\n</li>\n</ul>\n"]
["* a\n  > b\n  >\n* c\n", "<ul>\n<li>a\n<blockquote>\n<p>b</p>\n</blockquote>\n</li>\n<li>c</li>\n</ul>\n"]
["- a\n  - b\n", "<ul>\n<li>a\n<ul>\n<li>b</li>\n</ul>\n</li>\n</ul>\n"]
["* foo\n  * bar\n\n  baz\n", "<ul>\n<li>\n<p>foo</p>\n<ul>\n<li>bar</li>\n</ul>\n<p>baz</p>\n</li>\n</ul>\n"]
["`foo`\n", "<p><code>foo</code></p>\n"]
["` `` `\n", "<p><code>``</code></p>\n"]
["` a`\n", "<p><code> a</code></p>\n"]
["``\nfoo \n``\n", "<p><code>foo </code></p>\n"]
["`foo\\`bar`\n", "<p><code>foo\\</code>bar`</p>\n"]
["` foo `` bar `\n", "<p><code>foo `` bar</code></p>\n"]
["[not a `link](/foo`)\n", "<p>[not a <code>link](/foo</code>)</p>\n"]
["`<https://foo.bar.`baz>`\n", "<p><code>&lt;https://foo.bar.</code>baz&gt;`</p>\n"]
["`foo\n", "<p>`foo</p>\n"]
["*foo bar*\n", "<p><em>foo bar</em></p>\n"]
["a*\"foo\"*\n", "<p>a*&quot;foo&quot;*</p>\n"]
["5*6*78\n", "<p>5<em>6</em>78</p>\n"]
["_ foo bar_\n", "<p>_ foo bar_</p>\n"]
["foo_bar_\n", "<p>foo_bar_</p>\n"]
["aa_\"bb\"_cc\n", "<p>aa_&quot;bb&quot;_cc</p>\n"]
["_foo*\n", "<p>_foo*</p>\n"]
["*foo bar\n*\n", "<p>*foo bar\n*</p>\n"]
["*(*foo*)*\n", "<p><em>(<em>foo</em>)</em></p>\n"]
["_foo bar _\n", "<p>_foo bar _</p>\n"]
["_(_foo_)_\n", "<p><em>(<em>foo</em>)</em></p>\n"]
["_foo_bar_baz_\n", "<p><em>foo_bar_baz</em></p>\n"]
["**foo bar**\n", "<p><strong>foo bar</strong></p>\n"]
["a**\"foo\"**\n", "<p>a**&quot;foo&quot;**</p>\n"]
["__foo bar__\n", "<p><strong>foo bar</strong></p>\n"]
["__\nfoo bar__\n", "<p>__\nfoo bar__</p>\n"]
["foo__bar__\n", "<p>foo__bar__</p>\n"]
["__foo, __bar__, baz__\n", "<p><strong>foo, <strong>bar</strong>, baz</strong></p>\n"]
["**foo bar **\n", "<p>**foo bar **</p>\n"]
["*(**foo**)*\n", "<p><em>(<strong>foo</strong>)</em></p>\n"]
["**foo**bar\n", "<p><strong>foo</strong>bar</p>\n"]
["__(__foo)\n", "<p>__(__foo)</p>\n"]
["__foo__bar\n", "<p>__foo__bar</p>\n"]
["__(bar)__.\n", "<p><strong>(bar)</strong>.</p>\n"]
["_foo __bar__ baz_\n", "<p><em>foo <strong>bar</strong> baz</em></p>\n"]
["__foo_ bar_\n", "<p><em><em>foo</em> bar</em></p>\n"]
["*foo **bar** baz*\n", "<p><em>foo <strong>bar</strong> baz</em></p>\n"]
["*foo**bar*\n", "<p><em>foo**bar</em></p>\n"]
["*foo **bar***\n", "<p><em>foo <strong>bar</strong></em></p>\n"]
["foo***bar***baz\n", "<p>foo<em><strong>bar</strong></em>baz</p>\n"]
["*foo **bar *baz* bim** bop*\n", "<p><em>foo <strong>bar <em>baz</em> bim</strong> bop</em></p>\n"]
["**** is not an empty strong emphasis\n", "<p>**** is not an empty strong emphasis</p>\n"]
["__foo _bar_ baz__\n", "<p><strong>foo <em>bar</em> baz</strong></p>\n"]
["____foo__ bar__\n", "<p><strong><strong>foo</strong> bar</strong></p>\n"]
["**foo *bar* baz**\n", "<p><strong>foo <em>bar</em> baz</strong></p>\n"]
["***foo* bar**\n", "<p><strong><em>foo</em> bar</strong></p>\n"]
["__ is not an empty emphasis\n", "<p>__ is not an empty emphasis</p>\n"]
["foo ***\n", "<p>foo ***</p>\n"]
["foo *_*\n", "<p>foo <em>_</em></p>\n"]
["foo **\\***\n", "<p>foo <strong>*</strong></p>\n"]
["**foo*\n", "<p>*<em>foo</em></p>\n"]
["***foo**\n", "<p>*<strong>foo</strong></p>\n"]
["**foo***\n", "<p><strong>foo</strong>*</p>\n"]
["foo ___\n", "<p>foo ___</p>\n"]
["foo _*_\n", "<p>foo <em>*</em></p>\n"]
["foo __\\___\n", "<p>foo <strong>_</strong></p>\n"]
["__foo_\n", "<p>_<em>foo</em></p>\n"]
["___foo__\n", "<p>_<strong>foo</strong></p>\n"]
["__foo___\n", "<p><strong>foo</strong>_</p>\n"]
["**foo**\n", "<p><strong>foo</strong></p>\n"]
["__foo__\n", "<p><strong>foo</strong></p>\n"]
["****foo****\n", "<p><strong><strong>foo</strong></strong></p>\n"]
["******foo******\n", "<p><strong><strong><strong>foo</strong></strong></strong></p>\n"]
["_____foo_____\n", "<p><em><strong><strong>foo</strong></strong></em></p>\n"]
["*foo __bar *baz bim__ bam*\n", "<p><em>foo <strong>bar *baz bim</strong> bam</em></p>\n"]
["*foo *bar baz*\n", "<p>*foo <em>bar baz</em></p>\n"]
["_a `_`_\n", "<p><em>a <code>_</code></em></p>\n"]
["__a<https://foo.bar/?q=__>\n", "<p>__a<a href=\"https://foo.bar/?q=__\">https://foo.bar/?q=__</a></p>\n"]
["[link](foo\nbar)\n", "<p>[link](foo\nbar)</p>\n"]
["[link](/url \"title \"and\" title\")\n", "<p>[link](/url &quot;title &quot;and&quot; title&quot;)</p>\n"]
["[link] bar](/uri)\n", "<p>[link] bar](/uri)</p>\n"]
["[foo`](/uri)`\n", "<p>[foo<code>](/uri)</code></p>\n"]
["[foo][ref[bar]]\n\n[ref[bar]]: /uri\n", "<p>[foo][ref[bar]]</p>\n<p>[ref[bar]]: /uri</p>\n"]
["[]\n\n[]: /uri\n", "<p>[]</p>\n<p>[]: /uri</p>\n"]
["<http://foo.bar.baz>\n", "<p><a href=\"http://foo.bar.baz\">http://foo.bar.baz</a></p>\n"]
["<foo\\+@bar.example.com>\n", "<p>&lt;foo+@bar.example.com&gt;</p>\n"]
["<m:abc>\n", "<p>&lt;m:abc&gt;</p>\n"]
["foo@bar.example.com\n", "<p>foo@bar.example.com</p>\n"]
["foo\\\nbaz\n", "<p>foo<br />\nbaz</p>\n"]
["foo  \n     bar\n", "<p>foo<br />\nbar</p>\n"]
["*foo  \nbar*\n", "<p><em>foo<br />\nbar</em></p>\n"]
["`code  \nspan`\n", "<p><code>code   span</code></p>\n"]
["foo\\\n", "<p>foo\\</p>\n"]
["### foo\\\n", "<h3>foo\\</h3>\n"]
["foo\nbaz\n", "<p>foo\nbaz</p>\n"]
["hello $.;'there\n", "<p>hello $.;'there</p>\n"]
"""

# Both as one text: without blanks between blocks, paragraphs in list items, and what the page adds to code.
OUTLINE = r"""
const outline = node => {
  if (node.nodeType === 3) return node.data;
  const tag = node.localName, inside = [...node.childNodes].map(outline).join("");
  if (["div", "body", "span"].includes(tag)) return node.parentNode?.className === "code" ? "" : inside;
  if (tag === "p" && node.parentNode.closest("li, li > .part")) return inside + " ";
  const level = Math.min(6, Number(tag[1]) + (node.ownerDocument === document ? 0 : 2));
  const name = /^h[1-6]$/.test(tag) ? `h${level}` : tag;
  return `<${name} ${tag === "a" ? node.getAttribute("href") : tag === "ol" ? node.start : ""}>${inside}</${name}>`;
};
const flat = node => outline(node).replace(/\s+/g, " ")
  .replace(/ ?(<\/?(?:p|h\d|[uo]l|li|blockquote|pre|hr|br|code)[ \d]*>) ?/g, "$1").trim();
const drawn = (text, step) => {
  const element = document.createElement("div"), growing = growingText(element);
  for (let at = 0; at < text.length; at += step) {
    growing.add(text.slice(at, at + step));
    growing.draw(false);
  }
  while (growing.draw(true));
  return element;
};
"""


def test_page_markdown_is_commonmark_however_it_arrives(page: WebDriver) -> None:
    examples = [json.loads(line) for line in COMMONMARK.strip().split("\n")]
    script = OUTLINE + """return arguments[0].map(([text, html]) => [flat(drawn(text, 1e9)), flat(drawn(text, 1)),
        flat(new DOMParser().parseFromString(html, "text/html").body)])"""
    for (text, _), (whole, grown, expected) in zip(examples, page.run(script, examples)):
        assert whole == grown == expected, text
    examples = [(text.replace("\n", "\r\n"), html) for text, html in examples]
    for (text, _), (whole, grown, expected) in zip(examples, page.run(script, examples)):
        assert whole == grown == expected, text


UNFINISHED = {
    "a **b": "<p >a <strong >b</strong></p>", "a **": "<p >a</p>", "a `b": "<p >a<code >b</code></p>",
    "a [b](http://e": "<p >a b</p>", "```p": "<pre ><code ></code></pre>",
    "```py\na\n``": "<pre ><code >a</code></pre>",
    "> a\n>": "<blockquote ><p >a</p></blockquote>", "- a\n-": "<ul ><li >a</li><li ></li></ul>",
    "| a | b": "<table ><thead ><tr ><th >a</th><th >b</th></tr></thead><tbody ></tbody></table>",
    "a:\n| b |\n|:": "<p >a:</p><table ><thead ><tr ><th >b</th></tr></thead><tbody ></tbody></table>",
    "a\n| b |\nc": "<p >a | b | c</p>", "| a |\nb": "<p >| a | b</p>",
    "| a |\n|-|\n| *b": "<table ><thead ><tr ><th >a</th></tr></thead><tbody ><tr ><td >*b</td></tr></tbody></table>",
}


def test_page_emphasis_of_a_language_without_blanks(page: WebDriver) -> None:
    shown = page.run(OUTLINE + "return flat(drawn(arguments[0], 1))", "これは**「強調」**です")
    assert shown == "<p >これは<strong >「強調」</strong>です</p>"


def test_page_shows_what_is_not_finished(page: WebDriver) -> None:
    script = OUTLINE + """const element = document.createElement("div"), growing = growingText(element);
        for (const sign of arguments[0]) { growing.add(sign); growing.draw(false); }
        return flat(element)"""
    assert {text: page.run(script, text) for text in UNFINISHED} == UNFINISHED


GROWING = {
    "items": ("", "- some *words*\n  - and more\n"), "one item": ("- a\n", "  some *words* and `code`\n"),
    "items in one": ("1. a\n", "   1. some *words*\n"), "a quote": ("", "> some *words*\n>\n"),
    "a table": ("|a|b|\n|-|-|\n", "| some *words* | and more |\n"), "a line": ("", "some *words* and `code` "),
    "lines": ("", "some *words*\n"), "paragraphs": ("", "some *words*\n\n"),
    "sections": ("", "# words\n- some\n\n> more\n"), "code": ("```py\n", "some(code)  # and more\n"),
    "a line of code": ("```\n", "some(code); "), "code in an item": ("- a\n  ```\n", "  some(code)\n"),
    "items in a quote": ("", "> - some *words*\n"),
}  # fmt: skip


@pytest.mark.parametrize("kind", GROWING)
def test_page_draws_what_is_new_and_no_more(page: WebDriver, kind: str) -> None:
    """Counted, since a clock tells little on a busy machine: what is read, drawn, and laid out by the browser."""
    script = """
        const [begin, more, pieces, size] = arguments, [readInline, readLine] = [parseInline, lineAt], costs = [];
        const element = make(log, "div", "text"), growing = growingText(element);
        const watcher = new MutationObserver(String);
        let characters = 0, lines = 0, nodes = 0, most = 0;
        parseInline = (text, open) => { characters += text.length; return readInline(text, open); };
        lineAt = (text, at) => { lines++; return readLine(text, at); };
        watcher.observe(element, {subtree: true, childList: true, characterData: true});
        // What the browser looks at to lay out what is new in a node: all of a table, text by lines, else siblings.
        const laidOut = node => {
            if (node === element) return node.children.length;
            const size = node.matches?.("table:not(.long)") ? node.querySelectorAll("*").length
                : [...node.childNodes].some(each => each.nodeType === 3) ? node.textContent.length / 40
                : node.childNodes.length;
            return size + laidOut(node.parentNode);
        };
        growing.add(begin);
        for (let piece = 0; piece <= 3 * pieces; piece++) {
            if (piece % pieces === 0) costs.push([characters, lines, nodes]);
            growing.add(more.slice(piece * size, (piece + 1) * size));
            growing.draw(false, Infinity);
            const records = watcher.takeRecords().filter(({target}) => element.contains(target));
            for (const record of records) nodes += record.addedNodes.length + record.removedNodes.length;
            most = Math.max(most, ...new Set(records.map(record => laidOut(record.target))));
        }
        return [most, ...costs]"""
    begin, more = GROWING[kind]
    pieces, size = 200, 160  # as much as the longest item or quote, and eight times the longest paragraph
    most, one, two, three, four = page.run(script, begin, more * (3 * pieces * size // len(more) + 9), pieces, size)
    for name, *at in zip(("characters", "lines", "nodes"), one, two, three, four):
        early, late = at[1] - at[0], at[3] - at[2]
        assert late <= early * 1.5 + 100, name
    assert four[2] < 2 * page.run("return document.querySelectorAll('.text *').length") + 20 * 3 * pieces
    assert most < 1000


# What Markdown is made of, and lines that are sure of what they are while they arrive.
BITS = [
    *"a\n\n\t*_`)]<|\\", *("- ", "* ", "1. ", "2) ", "10. ", "> ", "# ", "  ", "\n\n", "\n  ", "\n    - "),
    *("```", "```py\n", "~~~\n", "| x | y |\n", "|a|b|\n|-|-|\n", "---", "===\n", "***", "**", "``", "~~", "  \n"),
    "[a](", "\n   ", "\n> ", "[a](http://e.org)", "https://e.org/x", "<https://e.org>", "word and more words ",
    "a line that is sure of itself",
]


def test_page_markdown_is_the_same_however_it_arrives(page: WebDriver) -> None:
    rng = random.Random(14)
    texts = ["".join(rng.choices(BITS, k=rng.randrange(2, 16))) for _ in range(1500)]
    texts += [begin + more * (20_000 // len(more)) for begin, more in GROWING.values()]
    script = OUTLINE + """return arguments[0].map(text => [text, flat(drawn(text, 1e9)),
        ...(text.length < 1000 ? [1, 2, 3, 5] : [97]).map(step => flat(drawn(text, step)))])"""
    for text, whole, *grown in page.run(script, texts):
        assert {whole} == set(grown), text


HOSTILE = {
    "a long line": "'a '.repeat(5e5)", "one word": "'a'.repeat(1e6)", "quotes in quotes": "'> '.repeat(5e5)",
    "lists in lists": "'- '.repeat(5e5) + 'x'", "openers": "'*a '.repeat(3e5)", "brackets": "'['.repeat(1e6)",
    "half links": "'[a]('.repeat(2e5)", "code": "'```\\n' + 'x'.repeat(1e6)", "blank lines": "'\\n'.repeat(1e6)",
    "backticks": "Array.from({length: 1400}, (_, count) => '`'.repeat(count + 1)).join(' ')",
    "a wide head": "'|a'.repeat(1e5) + '\\n' + '|-'.repeat(1e5) + '\\n' + '|b\\n'.repeat(1000)",
}  # fmt: skip


def test_page_markdown_of_a_hostile_upstream(page: WebDriver) -> None:
    for name, text in HOSTILE.items():
        script = f"const begun = performance.now(); drawn({text}, 1e5); return performance.now() - begun"
        assert page.run(OUTLINE + script) < 10_000, name  # milliseconds
    links = "[a](javascript:alert(1)) [b](data:text/html,x) [c](JaVaScript&colon;x) <javascript:x> [d]( vbscript:x)"
    assert page.run(OUTLINE + "return drawn(arguments[0], 1).querySelectorAll('a').length", links) == 0


def test_page_table_is_as_large_as_its_text(page: WebDriver) -> None:
    script = OUTLINE + """const table = columns => drawn("|a".repeat(columns) + "\\n" + "|-".repeat(columns) + "\\n" +
            "|b\\n".repeat(1000) + "|c".repeat(columns + 1) + "\\n", 1e5);
        const wide = table(100), rows = [...wide.querySelectorAll("tbody tr")];
        return [wide.querySelectorAll("*").length, rows[0].cells.length, rows[0].cells[1].colSpan,
            rows.at(-1).cells.length, table(101).querySelectorAll("table").length]"""
    elements, *cells = page.run(script)
    assert cells == [2, 99, 100, 0] and elements < 4000


def cut_clients(server: streamproxy.Server) -> None:
    """Cut the connections of all clients, as a network does."""
    def cut() -> None:
        for client in list(server.clients):
            client.drop(streamproxy.Aborted("The test cuts it."))
        done.set()

    done = threading.Event()
    server.hub.loop.post(cut)
    assert done.wait(DEADLINE)


def test_page_comes_back_for_what_it_has_not_had(browser: WebDriver, provider: Provider) -> None:
    shown = ""
    with running(provider, resume=60.0) as server:
        browser.call("POST", "/url", {"url": server.url})
        say(browser)
        with provider.take() as upstream:
            cut_clients(server)  # before it knows the answer's ID
            upstream.start(delta(None, reasoning_content="Hm"))
            for count, text in enumerate(f"{each} " for each in range(24)):
                upstream.event(delta(text))
                shown += text
                if count % 3:
                    growing(browser, shown.strip())
                if count % 4 == 0:
                    cut_clients(server)
                elif count % 7 == 0:
                    browser.call("POST", "/refresh", {})
            upstream.finish()
            conversation(browser, ("user", "Hello"), ("assistant", shown.strip()))
            assert browser.run("return [turns[0].reasoning, turns[0].answer]") == ["Hm", shown]
        browser.call("POST", "/refresh", {})
        conversation(browser, ("user", "Hello"), ("assistant", shown.strip()))
        browser.run("sessionStorage.clear(); turns = []")
    assert provider.nobody_came()


@pytest.mark.parametrize("where", ["connected", "cut off", "reloaded"])
def test_page_stops_an_answer_that_would_go_on(browser: WebDriver, provider: Provider, where: str) -> None:
    with begun(browser, provider) as (server, upstream):
        if where == "cut off":
            browser.run("""window.real = fetch;
                const refusal = () => new Response("<html>", {status: 502});   // by a proxy in front
                fetch = async (url, sent) => sent.method === "DELETE" ? real(url, sent) : refusal();""")
            cut_clients(server)
            said = browser.wait("return document.querySelector('#status:not(.label)')?.textContent")
            assert said == "No connection. The answer goes on when it is back."
        if where == "reloaded":
            browser.call("POST", "/refresh", {})
            growing(browser, "a")
        browser.element("#stop", "click")
        assert upstream.gone()
        conversation(browser, ("user", "Hello"), ("assistant", "a"), ("ending", "Stopped."))
        assert browser.run("return document.querySelector('#status').className") == "label"
    browser.log()


def test_page_comes_back_to_a_server_that_was_too_busy_for_it(browser: WebDriver, provider: Provider) -> None:
    with begun(browser, provider) as (server, upstream):
        browser.run("""window.real = fetch;
            const refusal = () => new Response('{"error": "Too many connections."}', {status: 503});
            fetch = (...asked) => { fetch = real; return refusal(); };""")
        cut_clients(server)
        upstream.event(delta("b"))
        upstream.finish()
        conversation(browser, ("user", "Hello"), ("assistant", "ab"))
    browser.log()


def test_page_asks_anew_for_nothing_that_was_paid_for(browser: WebDriver, provider: Provider) -> None:
    """An answer that the server has forgotten, one that may be so, and one of a server that keeps none."""
    lost = {"question": "Hello", "answer": "a", "reasoning": "", "note": "", "key": "k", "asked": 0}
    gone, left = ("ending error", "The rest of the answer is not kept any more."), ("ending", "The answer was left.")
    with running(provider, resume=60.0) as server, running(provider) as other:
        for at, turn, ending in (
            (server, {**lost, "stream": "0" * 32, "place": "0.1"}, gone), (server, lost, left),
            (server, {**lost, "stream": None, "asked": 1e15}, left), (other, {**lost, "stream": "0" * 32}, left),
        ):  # fmt: skip
            browser.call("POST", "/url", {"url": at.url})
            browser.run("turns = [arguments[0]]; save()", turn)
            browser.call("POST", "/refresh", {})
            conversation(browser, ("user", "Hello"), ("assistant", "a"), ending)
            browser.run("sessionStorage.clear(); turns = []")
    assert provider.nobody_came()


def test_page_through_nginx_below_a_path(browser: WebDriver, provider: Provider, tmp_path: Path) -> None:
    config = (PLAIN_NGINX % GZIP).replace("location / {", "location /chat/ {").replace("1.sock;", "1.sock:/;")
    with running(provider, bind=f"unix:{tmp_path}/1.sock"), nginx(tmp_path, config) as front:
        browser.call("POST", "/url", {"url": front.url + "/chat/"})
        say(browser)
        with provider.take() as upstream:
            upstream.start(A)
            growing(browser, "a")
            upstream.event(delta("b"))
            growing(browser, "ab")
            upstream.finish()
        conversation(browser, ("user", "Hello"), ("assistant", "ab"))


@pytest.mark.usefixtures("asks_again_at_once")
def test_eventsource_in_a_browser_comes_back_behind_nginx_until_it_has_its_answer(
    browser: WebDriver, provider: Provider, tmp_path: Path
) -> None:
    with running(provider, **instance_of(tmp_path, "1")) as server, running(
        provider, **instance_of(tmp_path, "2")
    ) as other, nginx(tmp_path, EXAMPLE.read_text()) as front:
        def cut(each: streamproxy.Server) -> None:
            for client in list(each.clients):
                if client.exchange:  # nginx may be about to ask again by one that is idle
                    client.drop(streamproxy.Aborted("The test cuts it."))

        browser.call("POST", "/url", {"url": front.url})
        browser.run("""window.seen = []; window.source = new EventSource('/?prompt=Hi');
            for (const type of ['message', 'done']) source.addEventListener(type, event => seen.push(event.data));""")
        with provider.take() as upstream:
            upstream.start(A)
            for count, text in enumerate("bc", 1):
                browser.wait("return seen.length >= arguments[0]", count)
                for each in (server, other):
                    each.hub.loop.post(functools.partial(cut, each))
                upstream.event(delta(text))
            browser.wait("return seen.length >= 3")
            upstream.finish()
        browser.wait("return source.readyState === EventSource.CLOSED")
        shown = [json.loads(data).get("text") for data in browser.run("return seen")]
        assert shown == ["a", "b", "c", None]
        browser.log()
    assert provider.nobody_came()


def test_fetch_in_a_browser_rejects_a_cut_answer(page: WebDriver, provider: Provider) -> None:
    page.run("""fetch('/', {method: 'POST', body: '{"prompt": "Hi"}'}).then(answer => answer.text())
        .then(text => { window.got = text }, error => { window.got = error.name })""")
    with provider.take() as upstream:
        upstream.start(A)
    assert page.wait("return window.got") == "TypeError"


# What upstream sends, and what README's ask makes of it.
ASKS: dict[str, tuple[bytes, list[str]]] = {
    "whole": (STREAM_HEAD + chunk(delta("", reasoning="Hm")) + chunk(delta("\u2028event: done\n\n: a")) + chunk(STOP)
              + chunk(event({"choices": [], "usage": {"total_tokens": 3}})) + chunk(DONE) + b"0\r\n\r\n",
              ["(Hm)", "\u2028event: done\n\n: a", '{"finish_reason":"stop","usage":{"total_tokens":3}}']),
    "cut": (STREAM_HEAD + chunk(A), ["a", "Error: Upstream closed the connection within its answer."]),
    "refused": (error_answer(400, SAYS), ["Error: Words"]),
}  # fmt: skip
# The same, of what is in front of the server.
FRONT_ASKS: dict[str, tuple[bytes, list[str]]] = {
    "HTML": (error_answer(502, b"<html>", b"Access-Control-Allow-Origin: *\r\n"),
             ["Error: The server answered with status 502."]),
    "cut, as if it were whole": (b"HTTP/1.0 200 OK\r\nAccess-Control-Allow-Origin: *\r\n\r\n" + streamproxy.PING
                                 + b'id: 1\ndata: {"text": "a"}\n\n' + streamproxy.PING + b"\ndata",
                                 ["a", "Error: The answer is not whole."]),
}  # fmt: skip
CALL_ASK = """window.seen = []; window.stopper = new AbortController();
    ask([{role: "user", content: "Hi"}],
        {text: text => seen.push(text), reasoning: text => seen.push(`(${text})`)}, stopper.signal)
        .then(said => seen.push(JSON.stringify(said)), error => seen.push(`${error}`))"""


def test_readme_ask_in_a_browser_from_another_origin(browser: WebDriver, provider: Provider) -> None:
    with running(None) as other, running(provider, allow_origin=(other.url,)) as server:
        browser.call("POST", "/url", {"url": other.url + "/healthz"})
        lines = readme_block("// messages: ")
        for front, asks in ((server, ASKS), (provider, FRONT_ASKS)):
            script = lines.replace("https://chat.example.com/", front.url + "/") + CALL_ASK
            for sent, seen in asks.values():
                browser.run(script)
                with provider.take() as upstream:
                    assert json.loads(upstream.body)["messages"] == [{"role": "user", "content": "Hi"}]
                    upstream.send(sent)
                browser.wait("return seen.length === arguments[0]", len(seen))
                assert browser.run("return seen") == seen
        browser.run(lines.replace("https://chat.example.com/", server.url + "/") + CALL_ASK)
        with provider.take() as upstream:
            upstream.start(A)
            browser.wait("return seen.length === 1")
            browser.run("stopper.abort()")
            assert upstream.gone()
        assert browser.wait("return seen[1]").startswith("AbortError: ")
    browser.log()


@pytest.mark.parametrize("how", ["whole", "reported", "refused", "broken"])
@pytest.mark.usefixtures("asks_again_at_once")
def test_readme_eventsource_in_a_browser(browser: WebDriver, provider: Provider, how: str) -> None:
    with running(provider) as server:
        browser.call("POST", "/url", {"url": server.url + "/healthz"})
        browser.run("window.seen = []; const prompt = 'Hi', show = text => seen.push(text);"
                    + readme_block("const source") + "window.source = source")  # fmt: skip
        with provider.take() as upstream:
            if how == "refused":
                upstream.send(error_answer(400, SAYS))
            else:
                upstream.start(A)
                browser.wait("return seen.length === 1")
            if how == "whole":
                upstream.finish()
            elif how == "reported":
                upstream.event(event({"error": {"message": "It broke."}}))
            elif how == "broken":  # and the browser asks again by itself, to be told 204
                for client in set(server.clients):
                    client.sock.shutdown(socket.SHUT_RDWR)
                assert upstream.gone()
            browser.wait("return source.readyState === EventSource.CLOSED")
        ends = {"whole": ["a"], "reported": ["a", "\nIt broke."], "refused": ["\nThe answer is not whole."],
                "broken": ["a", "\nThe answer is not whole."]}  # fmt: skip
        assert browser.run("return seen") == ends[how]
        assert provider.nobody_came()
    browser.log()


def test_page_asks_for_the_token_and_keeps_it_for_the_tab(
    browser: WebDriver, provider: Provider, tmp_path: Path
) -> None:
    with running(provider, token_file=token_file(tmp_path, f"alice {ALICE}")) as server:
        browser.call("POST", "/url", {"url": server.url})
        assert browser.run("return document.querySelector('#access').hidden")
        say(browser)
        for token, complaint in (("wrong", "This token is not known here."), ("two words", "A token has no spaces")):
            browser.wait("return !document.querySelector('#access').hidden")
            assert browser.run("return [document.activeElement.id, document.querySelector('#prompt').value]") == [
                "token", "Hello"]  # it is offered again, once
            browser.run("document.querySelector('#token').value = ''")
            browser.element("#token", "value", text=token + WebDriver.ENTER)
            browser.wait("return document.querySelector('#access p').textContent.startsWith(arguments[0])", complaint)
        browser.run("document.querySelector('#token').value = ''")
        browser.element("#token", "value", text=ALICE + WebDriver.ENTER)
        for again in (False, True):
            if again:
                browser.call("POST", "/refresh", {})
                say(browser)
            with provider.take() as upstream:
                upstream.start(A)
                upstream.finish()
                browser.wait("return [...document.querySelectorAll('.assistant .text')].at(-1)?.textContent === 'a'")
            conversation(browser, *[("user", "Hello"), ("assistant", "a")] * (1 + again))
    browser.log()


FETCH = """const [url, body] = arguments;
    fetch(url, {method: 'POST', body, headers: {'Content-Type': 'application/json', 'X-Api-Key': 'x'}})
        .then(async answer => {
            window.got = [answer.status, answer.headers.get('X-Request-Id').length, await answer.text()]
        }, error => { window.got = error.name })"""


def test_cors_in_a_browser(browser: WebDriver, provider: Provider) -> None:
    with running(None) as other:
        with running(provider, allow_origin=(other.url,)) as server:
            browser.call("POST", "/url", {"url": other.url + "/healthz"})  # a page of another origin
            browser.run(FETCH, server.url + "/", json.dumps(PROMPT))
            with provider.take() as upstream:
                upstream.start(A)
                upstream.finish()
                assert browser.wait("return window.got") == [200, 16, "a"]
            browser.run("window.got = null; " + FETCH, server.url + "/", "{}")
            assert browser.wait("return window.got")[0] == 400  # errors can be read too
        with running(provider) as server:
            browser.run("window.got = null; " + FETCH, server.url + "/", json.dumps(PROMPT))
            assert browser.wait("return window.got") == "TypeError"
            # A form or a simple request needs no preflight, and must not cost anything either.
            browser.run(
                "window.got = null; fetch(arguments[0], {method: 'POST', mode: 'no-cors', body: "
                "arguments[1]}).then(() => { window.got = 'sent' })",
                server.url + "/", json.dumps(PROMPT),
            )  # fmt: skip
            assert browser.wait("return window.got") == "sent" and provider.nobody_came()
    browser.log()


def test_rebound_name_in_a_browser_is_refused(browser: WebDriver, provider: Provider) -> None:
    with running(provider) as server:
        url = server.url.replace("127.0.0.1", "rebound.example")
        browser.call("POST", "/url", {"url": url + "/healthz"})
        browser.run(
            "fetch(arguments[0], {method: 'POST', body: arguments[1]}).then(answer => { window.got = answer.status })",
            url + "/", json.dumps(PROMPT),
        )
        assert browser.wait("return window.got") == 403 and provider.nobody_came()
    browser.log()


# ----------------------------------------------------------------------- An upstream nobody here wrote

AIMOCK_FIXTURES = [
    {"match": {"userMessage": "hello"}, "response": {"content": "Hello from aimock, piece by piece."}, "chunkSize": 5},
    {"match": {"userMessage": "slow"}, "response": {"content": "A slow answer."}, "chunkSize": 4, "latency": 50},
    {
        "match": {"userMessage": "cut"}, "response": {"content": "This answer is cut."}, "chunkSize": 5, "latency": 20,
        "truncateAfterChunks": 3,
    },
    {
        "match": {"userMessage": "limit"},
        "response": {"error": {"message": "Slow down.", "type": "rate_limit_error"}, "status": 429, "retryAfter": 7},
    },
    {
        "match": {"userMessage": "broken"},
        "response": {"error": {"message": "Server error.", "type": "server_error"}, "status": 500},
    },
    {"match": {"userMessage": "reason"}, "response": {"reasoning": "Let me think.", "content": "Done."}},
    {"match": {"userMessage": "drop"}, "response": {"content": "never"}, "chaos": {"disconnectRate": 1.0}},
    {
        "match": {"userMessage": "weather"},
        "response": {"toolCalls": [{"name": "get_weather", "arguments": {"city": "Paris"}}]},
    },
    {"match": {"inputText": "hello"}, "response": {"embedding": [0.1, 0.2, 0.3]}},
    {"match": {"userMessage": "unicode"}, "response": {"content": "héllo 👋🏽 wörld 👩‍👩‍👧"}, "chunkSize": 1},
]


@pytest.fixture(scope="session")
def npm_folder() -> Path:
    """Where npm has installed aimock, pyright, the SDKs for JavaScript, and esbuild, which makes scripts of them."""
    return Path(
        os.environ.get("TEST_AIMOCK")
        or missing("TEST_AIMOCK names no folder with aimock and the SDKs for JavaScript")
    )


@pytest.fixture(scope="session")
def aimock(npm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The base URL of @copilotkit/aimock."""
    script = npm_folder / "node_modules/@copilotkit/aimock/dist/cli.js"
    fixtures = tmp_path_factory.mktemp("aimock") / "fixtures.json"
    fixtures.write_text(json.dumps({"fixtures": AIMOCK_FIXTURES}))
    command = [program("node"), str(script), "-p", "0", "-f", str(fixtures), "--validate-on-load", "--strict"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    found = (re.search(r"listening on (http://\S+)", line) for line in process.stdout)
    yield next(filter(None, found))[1] + "/v1"
    process.terminate()
    process.communicate()


@pytest.mark.parametrize(("prompt", "status", "text"), [
    ("hello", 200, "Hello from aimock, piece by piece."),
    ("slow", 200, "A slow answer."),
    ("unicode", 200, "héllo 👋🏽 wörld 👩‍👩‍👧"),
    ("reason", 200, "Done."),
    ("cut", 200, None),
    ("limit", 429, "Slow down."),
    ("broken", 502, "Upstream failed with status 500."),
    ("drop", 502, "Upstream closed the connection without an answer."),
    ("nothing matches", 503, "Strict mode: no fixture matched"),
])
def test_aimock(aimock: str, prompt: str, status: int, text: str | None) -> None:
    with running(None, upstream=aimock) as server, Client(server).ask({"prompt": prompt}) as client:
        if status != 200:
            assert client.error() == (status, text)
        else:
            assert client.head().status == 200
            if text:
                assert client.body().decode() == text
            else:
                assert client.chunk() == b"This " and client.rest() == b""


def test_aimock_reasoning_as_events(aimock: str) -> None:
    with running(None, upstream=aimock, model="o3", param={"stream_options": {"include_usage": True}}) as server:
        with Client(server).ask({"prompt": "reason"}, **EVENTS) as client:
            client.head()
            events = streamproxy.EventParser().feed(client.body())
    assert [event.type for event in events] == ["reasoning", "message", "done"]
    assert json.loads(events[0].data) == {"text": "Let me think."}
    assert json.loads(events[-1].data)["usage"]["total_tokens"]


KINDS = ["/chat/completions", "/responses", "/messages", "/embeddings", "/completions"]


def recorded(base: str) -> list[tuple[str, bytes]]:
    """Answers of aimock of every kind, asked for at the same time: content type and body."""
    host, port = base[len("http://") :].removesuffix("/v1").split(":")

    def ask(path: str, prompt: str, stream: bool) -> tuple[int, str, bytes]:
        asked = {
            "model": "gpt-6-luna", "messages": [{"role": "user", "content": prompt}], "input": prompt,
            "prompt": prompt, "stream": stream, "max_tokens": 50, "stream_options": {"include_usage": True},
        }
        with contextlib.closing(http.client.HTTPConnection(host, int(port), timeout=DEADLINE)) as connection:
            fields = {"Content-Type": "application/json", "Authorization": "Bearer x"}
            connection.request("POST", "/v1" + path, json.dumps(asked), fields)
            response = connection.getresponse()
            return response.status, response.headers["Content-Type"], response.read()

    questions = itertools.product(KINDS, ("hello", "unicode", "reason", "slow", "weather"), (False, True))
    with concurrent.futures.ThreadPoolExecutor(100) as pool:
        answers = list(pool.map(lambda question: ask(*question), questions))
    return [(content_type, body) for status, content_type, body in answers if status == 200]


def test_aimock_answers_of_every_kind_pass_byte_for_byte_however_they_are_cut(aimock: str, provider: Provider) -> None:
    answers, rng = recorded(aimock), random.Random(5)
    streams = [body for content_type, body in answers if content_type.startswith("text/event-stream")]
    assert len(answers) >= 25 and len(streams) >= 10
    with running(provider) as server, Client(server) as client:
        for content_type, body in answers * (200 // len(answers) + 1):
            client.ask(ASKED, path="/v1/chat/completions")
            places = sorted(rng.sample(range(1, len(body)), min(len(body) - 1, rng.randrange(30))))
            pieces = [body[a:b] for a, b in zip([0, *places], [*places, len(body)])]
            head = OK + b"Content-Type: " + content_type.encode() + b"\r\n"
            with provider.take() as upstream:
                if rng.random() < 0.5:
                    wire = head + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
                    wire += b"".join(map(chunk, pieces)) + b"0\r\n\r\n"
                else:
                    wire = head + (
                        b"Content-Length: %d\r\nConnection: close\r\n" % len(body) if rng.random() < 0.5 else b""
                    ) + b"\r\n" + body
                at = 0
                while at < len(wire):
                    size = rng.choice([7, 100, 1000, 5000])
                    upstream.send(wire[at : at + size])
                    at += size
            got = client.head()
            assert got.status == 200 and got.fields["Content-Type"] == content_type
            assert (client.exactly(len(body)) if "Content-Length" in got.fields else client.body()) == body


# ----------------------------------------------------------------------- SDKs

# Each of these scripts has OpenAI's and Anthropic's SDK ask what it is told, all at once, and tells what they gave or
# raised.
SDKS_FOR_PYTHON = """
import concurrent.futures, functools, json, sys, urllib.request, anthropic, openai
nowhere = {"base_url": "http://127.0.0.1:9", "api_key": "theirs"}
clients = {"openai": openai.OpenAI(**nowhere), "anthropic": anthropic.Anthropic(**nowhere)}
def plain(given):
    return given.to_dict(mode="json") if hasattr(given, "to_dict") else given
def ask(name, sdk, call, args, params, url, retries, then, final):
    fields, given = {"X-Client-Request-Id": name}, []
    base_url = url if sdk == "openai" else url[:-3]
    client = clients[sdk].with_options(base_url=base_url, max_retries=retries, default_headers=fields)
    try:
        result = functools.reduce(getattr, call.split("."), client)(*args, **params)
        if final:
            with result as stream:
                return plain(getattr(stream, final)())
        if not (params.get("stream") or call.endswith("list")):
            return plain(result) or {}
        for part in result:
            given.append(plain(part))
            if then.startswith("http") and len(given) == 1:
                fields = {"X-Client-Request-Id": "seen: " + name}
                urllib.request.urlopen(urllib.request.Request(then, method="DELETE", headers=fields)).read()
            if then == "leave":
                result.close()
                break
        return given
    except Exception as error:
        body, response = getattr(error, "body", None), getattr(error, "response", None)
        body = body if isinstance(body, dict) else {}
        body = body.get("error") or body
        return {"given": given, "raised": [kind.__name__ for kind in type(error).mro()], "code": body.get("code"),
                "status": getattr(error, "status_code", None), "message": body.get("message") or str(error),
                "request_id": getattr(error, "request_id", None),
                "retry_after": response and response.headers.get("retry-after"),
                "milliseconds": response and response.headers.get("retry-after-ms")}
with concurrent.futures.ThreadPoolExecutor(100) as pool:
    told = {asked["name"]: pool.submit(ask, **asked) for asked in json.load(open(sys.argv[1]))}
    print(json.dumps({name: future.result() for name, future in told.items()}))
"""

SDKS_FOR_JAVASCRIPT = """
import Anthropic from "@anthropic-ai/sdk";
import OpenAI from "openai";
const camel = name => name.replace(/_(.)/g, (_, letter) => letter.toUpperCase());
const kinds = error => {
  const names = [];
  for (let of = error; of; of = Object.getPrototypeOf(of))
    if (Object.hasOwn(of, "constructor")) names.push(of.constructor.name);
  return names;
};
const ask = async ({name, sdk, call, args, params: {extra_headers: headers, ...params}, url, retries, then, final}) => {
  const given = [], defaultHeaders = {"X-Client-Request-Id": name};
  const options = {apiKey: "theirs", maxRetries: retries, dangerouslyAllowBrowser: true, defaultHeaders};
  const client = sdk === "openai" ? new OpenAI({...options, baseURL: url})
    : new Anthropic({...options, baseURL: url.slice(0, -3)});
  try {
    const names = call.split(".").map(camel), method = names.pop();
    const resource = names.reduce((of, name) => of[name], client);
    if (Object.keys(params).length) args.push(params);
    if (headers) args.push({headers});
    if (final) return await resource[method](...args)[camel(final.replace("get_", ""))]();
    const result = await resource[method](...args);
    if (!params.stream && method !== "list") return result;
    for await (const part of result) {
      given.push(part);
      if (then.startsWith("http") && given.length === 1)
        await (await fetch(then, {method: "DELETE", headers: {"X-Client-Request-Id": "seen: " + name}})).text();
      if (then === "leave") break;
    }
    return given;
  } catch (error) {
    const {status, headers, requestID} = error, body = error.error?.error ?? error.error ?? {};
    return {given, raised: kinds(error), status: status ?? null, code: body.code ?? null,
            message: body.message || error.message, request_id: requestID ?? null,
            retry_after: headers?.get("retry-after") ?? null, milliseconds: headers?.get("retry-after-ms") ?? null};
  }
};
const run = async all => JSON.stringify(Object.fromEntries(
  await Promise.all(all.map(async asked => [asked.name, await ask(asked) ?? null]))));
"""


@pytest.fixture(scope="session")
def sdks_for_a_page(npm_folder: Path) -> str:
    """A script that gives a page the function that asks."""
    command = [
        program(str(npm_folder / "node_modules/.bin/esbuild")), "--bundle", "--format=iife", "--platform=browser",
        "--keep-names",
    ]
    script = SDKS_FOR_JAVASCRIPT + "globalThis.run = run;"
    return subprocess.run(
        command, input=script, cwd=npm_folder, capture_output=True, text=True, check=True, encoding="utf-8"
    ).stdout


def tell_in_chromium(fixture: Callable[[str], Any], origin: str, asked: list[dict[str, Any]]) -> str:
    driver: WebDriver = fixture("browser")
    driver.call("POST", "/url", {"url": origin + "/healthz"})
    told = driver.call(
        "POST", "/execute/async",
        {"script": fixture("sdks_for_a_page") + "; run(arguments[0]).then(arguments[1])", "args": [asked]},
    )
    driver.log()
    return str(told)


def tell_in_node(fixture: Callable[[str], Any], file: Path) -> str:
    tail = 'import {readFileSync} from "node:fs"; console.log(await run(JSON.parse(readFileSync(process.argv[2]))));'
    done = subprocess.run(
        [program("node"), "--input-type=module", "-", str(file)], input=SDKS_FOR_JAVASCRIPT + tail,
        env=without_proxies(), capture_output=True, text=True, check=False, timeout=120, encoding="utf-8",
        cwd=fixture("npm_folder"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


class Scripted:
    """An upstream that answers a request by the name in its X-Client-Request-Id, and keeps the heads of all."""

    def __init__(self, answers: dict[str, Any]) -> None:
        """An answer is its bytes, or a function that is given this, the UpstreamPeer and the name."""
        self.provider, self.answers = Provider(), answers
        self.heads: dict[str, list[str]] = collections.defaultdict(list)
        self.done: list[str] = []  # names whose answers went as they should
        self.seen: dict[str, threading.Event] = {}  # once whoever asked has the first event
        self.pings: collections.Counter[str] = collections.Counter()  # that were sent to whoever asked
        self.keeper: streamproxy.Server | None = None  # which keeps answers for who comes back
        self.provider.listener.settimeout(None)
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()

    def serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self.answer, args=self.provider.listener.accept()[:1], daemon=True).start()

    def answer(self, sock: socket.socket) -> None:
        with UpstreamPeer(sock) as upstream:
            name = re.findall("(?i)x-client-request-id: (.+)\r", upstream.head)[0]
            self.heads[name].append(upstream.head)
            if name.startswith("seen: "):
                self.first_seen(name[6:]).set()
            answer = self.answers.get(name, whole({}))
            if isinstance(answer, bytes):
                upstream.send(answer)
            else:
                answer(self, upstream, name)
            self.done.append(name)

    def first_seen(self, name: str) -> threading.Event:
        return self.seen.setdefault(name, threading.Event())

    def noting_pings(self, ping: Any) -> Any:
        """Viewer.ping, but that it counts."""
        def note(viewer: Any, heartbeat: bytes) -> None:
            ping(viewer, heartbeat)
            self.pings[viewer.client.exchange.request.fields.get("x-client-request-id", "")] += bool(heartbeat)
        return note

    def close(self) -> None:
        self.provider.listener.shutdown(socket.SHUT_RDWR)  # which ends an accept
        self.thread.join()
        self.provider.listener.close()


def whole(payload: object, status: int = 200, fields: bytes = b"") -> bytes:
    """A document on a connection that ends with it."""
    return error_answer(status, json.dumps(payload).encode(), JSON + b"Connection: close\r\n" + fields)


def streamed(*events: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    """Likewise a stream."""
    return STREAM_HEAD[:-2] + b"Connection: close\r\n\r\n" + b"".join(map(chunk, events)) + end


def named(type: str, **payload: object) -> bytes:
    return b"event: " + type.encode() + b"\n" + event({"type": type, **payload})


def payloads(*events: bytes) -> list[Any]:
    """What an SDK is to give of events: no pings, and no [DONE]."""
    return [
        payload for payload in map(json.loads, re.findall(rb"data: (\{.*)", b"".join(events)))
        if payload.get("type") != "ping"
    ]


def asks(
    sdk: str, call: str, *args: object, at: str = "", retries: int = 2, then: str = "", final: str = "",
    **params: object,
) -> dict[str, Any]:
    """What an SDK is told to ask.

    at: of which server.  then: what is done after the first event.  final: of a helper, what gives all.
    """
    return {
        "sdk": sdk, "call": call, "args": args, "params": params, "url": at, "retries": retries, "then": then,
        "final": final,
    }


ASKED_CHAT = {"model": "gpt-6-luna", "messages": [{"role": "user", "content": "Hällo"}]}
ASKED_MESSAGE: dict[str, Any] = {**ASKED_CHAT, "max_tokens": 9}
ASKED_RESPONSE = {"model": "gpt-6-luna", "input": "Hällo"}
CHATS, MESSAGES, RESPONSES = (
    "openai", "chat.completions.create",
), ("anthropic", "messages.create"), ("openai", "responses.create")
USAGE = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
COMPLETION = {"id": "c", "object": "chat.completion", "created": 1, "model": "gpt-6-luna", "usage": USAGE,
              "choices": [{
                  "index": 0, "finish_reason": "stop",
                  "message": {"role": "assistant", "content": "Grüße 👋🏽", "reasoning_content": "hm"},
              }]}  # fmt: skip
OUTPUT = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "status": "completed",
    "content": [{"type": "output_text", "text": "Grüße", "annotations": []}],
}
RESPONDED = {
    "id": "resp_1",
    "object": "response",
    "created_at": 1,
    "model": "gpt-6-luna",
    "status": "completed",
    "output": [OUTPUT],
}
SAID = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "gpt-6-luna",
    "stop_reason": "end_turn",
    "stop_sequence": None,
    "usage": {"input_tokens": 1, "output_tokens": 2},
    "content": [{"type": "thinking", "thinking": "hm", "signature": "s"}, {"type": "text", "text": "Grüße 👋🏽"}],
}  # fmt: skip


def chat_event(**more: object) -> bytes:
    """An event of a completion."""
    return event({"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "gpt-6-luna", **more})


def chat_choice(index: int = 0, finish_reason: str | None = None, **delta: object) -> bytes:
    return chat_event(choices=[{"index": index, "delta": delta, "finish_reason": finish_reason}])


def call_of(index: int, **function: str) -> dict[str, Any]:
    return {"tool_calls": [{"index": index, "type": "function", "function": function}]}


RESPONSE_EVENTS = [
    named("response.created", sequence_number=0, response={**RESPONDED, "status": "in_progress", "output": []}),
    named("response.output_item.added", sequence_number=1, output_index=0, item={**OUTPUT, "content": []}),
    named(
        "response.content_part.added", sequence_number=2, output_index=0, content_index=0, item_id="msg_1",
        part={"type": "output_text", "text": "", "annotations": []},
    ),
    named(
        "response.output_text.delta", sequence_number=3, output_index=0, content_index=0, item_id="msg_1",
        delta="Grüße", logprobs=[],
    ),
    named("response.completed", sequence_number=4, response=RESPONDED),
]
MESSAGE_EVENTS = [
    named("message_start", message={**SAID, "content": [], "stop_reason": None}),
    named("content_block_start", index=0, content_block={"type": "thinking", "thinking": "", "signature": ""}),
    named("ping"),
    named("content_block_delta", index=0, delta={"type": "thinking_delta", "thinking": "hm"}),
    named("content_block_delta", index=0, delta={"type": "signature_delta", "signature": "s"}),
    named("content_block_stop", index=0),
    named("content_block_start", index=1, content_block={"type": "text", "text": ""}),
    named("content_block_delta", index=1, delta={"type": "text_delta", "text": "Grüße 👋🏽"}),
    named("content_block_stop", index=1),
    named("message_delta", delta={"stop_reason": "end_turn", "stop_sequence": None}, usage={"output_tokens": 2}),
    named("message_stop"),
]  # fmt: skip
CHAT_EVENTS = [
    chat_choice(role="assistant", content=""),
    chat_choice(content="Grüße "),
    chat_choice(content="👋🏽"),
    chat_choice(finish_reason="stop"),
    DONE,
]
TOOL_EVENTS = [
    chat_choice(**call_of(0, name="weather", arguments="")),
    chat_choice(**call_of(0, arguments='{"in": "Ö')),
    chat_choice(**call_of(0, arguments='"}')),
    chat_choice(finish_reason="tool_calls"),
    DONE,
]

# What is asked, what upstream answers (a document, or the events of a stream), and what the SDK gives, where that is
# not the same.
WHOLE_ANSWERS: dict[str, tuple[Any, ...]] = {
    "chat": (asks(*CHATS, **ASKED_CHAT), COMPLETION),
    "chat stream": (asks(*CHATS, **ASKED_CHAT, stream=True), CHAT_EVENTS),
    "chat stream in one chunk": (asks(*CHATS, **ASKED_CHAT, stream=True), [b"".join(CHAT_EVENTS)]),
    "chat stream with reasoning": (
        asks(*CHATS, **ASKED_CHAT, stream=True), [chat_choice(reasoning_content="hm"), *CHAT_EVENTS],
    ),
    "chat stream with usage": (
        asks(*CHATS, **ASKED_CHAT, stream=True, stream_options={"include_usage": True}),
        [*CHAT_EVENTS[:-1], chat_event(choices=[], usage=USAGE), DONE],
    ),
    "chat stream of two choices": (
        asks(*CHATS, **ASKED_CHAT, stream=True, n=2),
        [chat_choice(1, content="a"), chat_choice(content="b"), chat_choice(1, "stop"), chat_choice(0, "length"), DONE],
    ),
    "chat stream of tool calls": (asks(*CHATS, **ASKED_CHAT, stream=True, tools=[TOOL]), TOOL_EVENTS),
    "chat in a form": (
        asks("openai", "chat.completions.parse", **ASKED_CHAT, response_format={"type": "json_object"}), COMPLETION,
        {"id": "c", "usage": USAGE},
    ),
    "completion": (
        asks("openai", "completions.create", model="gpt-6-luna", prompt="x"),
        {"id": "c", "choices": [{"index": 0, "text": "x", "finish_reason": "stop"}]},
    ),
    "response": (asks(*RESPONSES, **ASKED_RESPONSE), RESPONDED),
    "response stream": (asks(*RESPONSES, **ASKED_RESPONSE, stream=True), RESPONSE_EVENTS),
    "response helper": (
        asks("openai", "responses.stream", **ASKED_RESPONSE, final="get_final_response"), RESPONSE_EVENTS,
        {"id": "resp_1", "status": "completed"},
    ),
    "response of before": (asks("openai", "responses.retrieve", "resp_1"), RESPONDED),
    "response of before as a stream": (
        asks("openai", "responses.retrieve", "resp_1", stream=True, starting_after=2), RESPONSE_EVENTS[3:],
    ),
    "response deleted": (asks("openai", "responses.delete", "resp_1"), {"id": "resp_1", "deleted": True}, {}),
    "response cancelled": (asks("openai", "responses.cancel", "resp_1"), {**RESPONDED, "status": "cancelled"}),
    "response input": (
        asks("openai", "responses.input_items.list", "resp_1", limit=2, order="asc"),
        {"object": "list", "data": [OUTPUT], "has_more": False}, [OUTPUT],
    ),
    "response tokens": (
        asks("openai", "responses.input_tokens.count", **ASKED_RESPONSE),
        {"object": "response.input_tokens", "input_tokens": 3},
    ),
    "embeddings": (
        asks("openai", "embeddings.create", model="gpt-6-luna", input="x", encoding_format="float"),
        {"data": [{"index": 0, "embedding": [0.5]}], "usage": USAGE},
    ),
    "message": (asks(*MESSAGES, **ASKED_MESSAGE), SAID),
    "message stream": (asks(*MESSAGES, **ASKED_MESSAGE, stream=True), MESSAGE_EVENTS),
    "message helper": (
        asks("anthropic", "messages.stream", **ASKED_MESSAGE, final="get_final_message"), MESSAGE_EVENTS,
        {"content": SAID["content"], "stop_reason": "end_turn"},
    ),
    "message of the beta": (asks("anthropic", "beta.messages.create", **ASKED_MESSAGE, betas=["b"]), SAID),
    "message tokens": (asks("anthropic", "messages.count_tokens", **ASKED_CHAT), {"input_tokens": 3}),
    "message tokens, however often": (
        asks("anthropic", "messages.count_tokens", **ASKED_CHAT, at="minute"), {"input_tokens": 3},
    ),
}  # fmt: skip


def until_gone(scripted: Scripted, upstream: UpstreamPeer, name: str) -> None:
    assert upstream.gone()


def start_until_gone(scripted: Scripted, upstream: UpstreamPeer, name: str) -> None:
    upstream.send(streamed(chat_choice(content="a"), MESSAGE_EVENTS[0], end=b""))
    upstream.sock.settimeout(None)  # the server is stopped at last
    assert upstream.gone()


def once_seen(first: bytes, rest: bytes = b"") -> Callable[[Scripted, UpstreamPeer, str], None]:
    """A stream of one event that, once whoever asked has it, goes on, or is cut.

    (Of what is cut Chromium drops what was not read.)
    """
    def answer(scripted: Scripted, upstream: UpstreamPeer, name: str) -> None:
        upstream.send(streamed(first, end=b""))
        assert scripted.first_seen(name).wait(DEADLINE)
        if rest:
            upstream.send(chunk(rest))
            assert upstream.gone()
    return answer


def with_pings(before: bytes, behind: bytes) -> Callable[[Scripted, UpstreamPeer, str], None]:
    """An answer that goes on after two pings at least."""
    def answer(scripted: Scripted, upstream: UpstreamPeer, name: str) -> None:
        upstream.send(before)
        wait_for(lambda: scripted.pings[name] >= 2)
        upstream.send(behind)
    return answer


def readme_raises() -> dict[str, set[str]]:
    """What README.md says that SDKs raise, for each status, and for what happens in mid-stream."""
    text = README.read_text(encoding="utf-8").partition("## OpenAI clients")[2]
    rows = re.findall(r"^\| ([^|]+) \| ([^|]*`[^|]+) \| [^|]* \|$", text.partition("\n## ")[0], re.MULTILINE)
    return {
        status: set(re.findall("`([A-Za-z]+)", names)) for said, names in rows
        for status in re.findall("[0-9]{3}", said) or [said]
    }


PASSED, FAILED = (400, 402, 404, 408, 409, 413, 415, 422, 425, 429, 503, 529), (401, 403, 500, 504)
AGAIN = {408, 409, 429, 503, 529}  # nobody was paid, and SDKs ask again


def api_refusal(sdk: str, status: int, fields: bytes = b"") -> bytes:
    """An error as the API of an SDK has it."""
    error = {"type": "t", "message": f"No {status}"}
    payload = {"error": {**error, "param": None, "code": "c"}} if sdk == "openai" else {"type": "error", "error": error}
    return whole(payload, status, b"x-request-id: req_7\r\nrequest-id: req_7\r\n" + fields)


def raises(row: object, **told: object) -> dict[str, object]:
    """What an SDK tells where it raises what a row of README.md says."""
    return {"row": str(row), **told}


ERROR_EVENT, CUT = "an error in mid-stream", "cut off in mid-stream"
CUTS = {
    "python": ["APIConnectionError: Connection error", "RemoteProtocolError: "],
    "node": ["TypeError: terminated"] * 2,
    "chromium": ["TypeError: network error"] * 2,
}
OVERLOADED = event({"error": {"message": "Overloaded", "type": "t", "param": None, "code": "c"}})
SOON = b"Retry-After: 7\r\nretry-after-ms: 30\r\n"
BAD_GATEWAY: dict[str, Any] = {"status": 502, "code": "bad_gateway"}
NO_MODEL = "The model 'gpt-5' may not be used here (--allow-model)."
SDKS = {"openai": (CHATS, ASKED_CHAT), "anthropic": (MESSAGES, ASKED_MESSAGE)}

# What is asked, what upstream answers, what the SDK tells, and how often upstream is asked.
FAILURES: dict[str, tuple[dict[str, Any], Any, dict[str, Any], int]] = {
    **{
        f"{sdk} {status}": (
            asks(*call, **params, retries=1), api_refusal(sdk, status, SOON),
            raises(
                status, status=status, message=f"No {status}", request_id="req_7", retry_after="7", milliseconds="30"
            ),
            1 + (status in AGAIN),
        )
        for status in PASSED for sdk, (call, params) in SDKS.items()
    },
    **{
        f"{sdk} {status}": (
            asks(*call, **params, retries=1), api_refusal(sdk, status),
            raises(502, status=502, request_id="req_7", retry_after=None), 1 + (status < 500),
        )
        for status in FAILED for sdk, (call, params) in SDKS.items()
    },
    "openai 429 without a word when": (
        asks(*CHATS, **ASKED_CHAT, retries=0), api_refusal("openai", 429), raises(429, retry_after="1"), 1,
    ),
    "openai 429 that is final": (
        asks(*CHATS, **ASKED_CHAT), api_refusal("openai", 429, SOON + b"X-Should-Retry: false\r\n"),
        raises(429, status=429), 1,
    ),
    "anthropic 400 that is not": (
        asks(*MESSAGES, **ASKED_MESSAGE, retries=1), api_refusal("anthropic", 400, SOON + b"X-Should-Retry: true\r\n"),
        raises(400, status=400), 2,
    ),
    "message tokens that nobody counts": (
        asks("anthropic", "messages.count_tokens", **ASKED_CHAT), api_refusal("anthropic", 404),
        raises(404, message="No 404"), 1,
    ),
    "response that is gone": (
        asks("openai", "responses.retrieve", "resp_1"), api_refusal("openai", 404), raises(404, code="c"), 1,
    ),
    "cut document": (asks(*CHATS, **ASKED_CHAT), whole(COMPLETION)[:-1], raises(502, **BAD_GATEWAY), 1),
    "cut chunked document": (
        asks(*RESPONSES, **ASKED_RESPONSE),
        OK + JSON + b"Transfer-Encoding: chunked\r\n\r\n" + chunk(json.dumps(RESPONDED).encode()),
        raises(502, **BAD_GATEWAY), 1,
    ),
    "cut document without a length": (
        asks(*MESSAGES, **ASKED_MESSAGE), OK + JSON + b"\r\n" + json.dumps(SAID)[:-1].encode(), raises(502, status=502),
        1,
    ),
    "no answer": (asks(*CHATS, **ASKED_CHAT), b"", raises(502, **BAD_GATEWAY), 1),
    "no answer that is HTTP": (asks(*MESSAGES, **ASKED_MESSAGE), b"SSH-2.0-x\r\n", raises(502, status=502), 1),
    "no answer in time": (
        asks(*CHATS, **ASKED_CHAT, at="late"), until_gone, raises(504, status=504, code="timeout"), 1,
    ),
    "no message in time": (asks(*MESSAGES, **ASKED_MESSAGE, at="late"), until_gone, raises(504, status=504), 1),
    "cut chat stream": (
        asks(*CHATS, **ASKED_CHAT, stream=True, then="say so"), once_seen(CHAT_EVENTS[1]),
        raises(CUT, given=payloads(CHAT_EVENTS[1])), 1,
    ),
    "cut response stream": (
        asks(*RESPONSES, **ASKED_RESPONSE, stream=True, then="say so"), once_seen(RESPONSE_EVENTS[0]),
        raises(CUT, given=payloads(RESPONSE_EVENTS[0])), 1,
    ),
    "cut message stream": (
        asks(*MESSAGES, **ASKED_MESSAGE, stream=True, then="say so"), once_seen(MESSAGE_EVENTS[0]),
        raises(CUT, given=payloads(MESSAGE_EVENTS[0])), 1,
    ),
    "stream without an end": (asks(*CHATS, **ASKED_CHAT, stream=True), streamed(*CHAT_EVENTS[:2]), raises(CUT), 1),
    "error in a chat stream": (
        asks(*CHATS, **ASKED_CHAT, stream=True, then="say so"), once_seen(CHAT_EVENTS[1], OVERLOADED),
        raises(ERROR_EVENT, message="Overloaded", code="c", given=payloads(CHAT_EVENTS[1])), 1,
    ),
    "error in a response stream": (
        asks(*RESPONSES, **ASKED_RESPONSE, stream=True, then="say so"), once_seen(RESPONSE_EVENTS[0], OVERLOADED),
        raises(ERROR_EVENT, message="Overloaded"), 1,
    ),
    "error in a message stream": (
        asks(*MESSAGES, **ASKED_MESSAGE, stream=True, then="say so"),
        once_seen(MESSAGE_EVENTS[0], named("error", error={"type": "overloaded_error", "message": "Overloaded"})),
        raises(ERROR_EVENT, message="Overloaded", given=payloads(MESSAGE_EVENTS[0])), 1,
    ),
    "failure behind pings": (
        asks(*CHATS, **ASKED_CHAT, stream=True, at="pings"), with_pings(b"", api_refusal("openai", 500)),
        raises(ERROR_EVENT, message="Upstream failed with status 500.", given=[]), 1,
    ),
    "failed message behind pings": (
        asks(*MESSAGES, **ASKED_MESSAGE, stream=True, at="pings"), with_pings(b"", api_refusal("anthropic", 500)),
        raises(ERROR_EVENT, message="Upstream failed with status 500.", given=[]), 1,
    ),
}  # fmt: skip

# What is asked, and what the SDK tells, of which upstream hears nothing.
OURS: dict[str, tuple[dict[str, Any], Any]] = {
    "models": (
        asks("openai", "models.list"),
        [json.loads(streamproxy.models_document("/v1/models/gpt-6-luna", streamproxy.Settings(api_key=KEY)) or b"")],
    ),
    "model": (asks("openai", "models.retrieve", "gpt-6-luna"), {"id": "gpt-6-luna", "object": "model"}),
    "anthropic models": (
        asks("anthropic", "models.list", limit=5),
        [json.loads(streamproxy.models_document("/v1/models/gpt-6-luna", streamproxy.Settings(api_key=KEY)) or b"")],
    ),
    "anthropic model": (asks("anthropic", "models.retrieve", "gpt-6-luna"), {"id": "gpt-6-luna", "type": "model"}),
    "openai without a model": (asks(*CHATS, model=None, messages=[]), raises(400, status=400, code="model_not_found")),
    **{
        f"{sdk} without a token": (asks(*call, **params, at="tokens"), raises(401, status=401, code="invalid_api_key"))
        for sdk, (call, params) in SDKS.items()
    },
    **{
        f"{sdk} with another model": (
            asks(*call, **{**params, "model": "gpt-5"}),
            raises(403, status=403, message=NO_MODEL, code="model_not_found"),
        )
        for sdk, (call, params) in SDKS.items()
    },
    **{
        f"{sdk} with another path": (asks(sdk, call), raises(404, status=404, code="not_found"))
        for sdk, call in (("openai", "files.list"), ("anthropic", "messages.batches.list"))
    },
    **{
        f"{sdk} with a large body": (
            asks(*call, **params, at="small"), raises(413, status=413, code="request_too_large"),
        )
        for sdk, (call, params) in SDKS.items()
    },
    **{
        f"{sdk} too often": (
            asks(*call, **params, at="minute", retries=0), raises(429, status=429, code="rate_limit_exceeded"),
        )
        for sdk, (call, params) in SDKS.items()
    },
    **{
        f"{sdk} too many": (
            asks(*call, **params, at="full", retries=0), raises(503, status=503, code="overloaded", retry_after="1"),
        )
        for sdk, (call, params) in SDKS.items()
    },
    **{
        f"{sdk} without an upstream": (
            asks(*call, **params, at="nowhere", retries=0), raises(502, status=502, code="bad_gateway"),
        )
        for sdk, (call, params) in SDKS.items()
    },
}  # fmt: skip

LEFT: dict[str, tuple[dict[str, Any], Any]] = {
    "openai leaves": (asks(*CHATS, **ASKED_CHAT, stream=True, then="leave"), payloads(chat_choice(content="a"))),
    "anthropic leaves": (asks(*MESSAGES, **ASKED_MESSAGE, stream=True, then="leave"), payloads(MESSAGE_EVENTS[0])),
}

# What is asked, and the events that upstream sends before and behind two pings; None: they come before its head.
PINGED: dict[str, tuple[dict[str, Any], list[bytes] | None, list[bytes]]] = {
    "chat with pings": (asks(*CHATS, **ASKED_CHAT, stream=True, at="pings"), CHAT_EVENTS[:2], CHAT_EVENTS[2:]),
    "chat with pings before its head": (asks(*CHATS, **ASKED_CHAT, stream=True, at="pings"), None, CHAT_EVENTS),
    "chat with pings within an event": (
        asks(*CHATS, **ASKED_CHAT, stream=True, at="pings"), [CHAT_EVENTS[0][:50]],
        [CHAT_EVENTS[0][50:], *CHAT_EVENTS[1:]],
    ),
    "response with pings": (
        asks(*RESPONSES, **ASKED_RESPONSE, stream=True, at="pings"), RESPONSE_EVENTS[:2], RESPONSE_EVENTS[2:],
    ),
    "message with pings": (
        asks(*MESSAGES, **ASKED_MESSAGE, stream=True, at="pings"), MESSAGE_EVENTS[:5], MESSAGE_EVENTS[5:],
    ),
    "message with pings before its head": (
        asks(*MESSAGES, **ASKED_MESSAGE, stream=True, at="pings"), None, MESSAGE_EVENTS,
    ),
    "message helper with pings": (
        asks("anthropic", "messages.stream", **ASKED_MESSAGE, final="get_final_message", at="pings"),
        MESSAGE_EVENTS[:1], MESSAGE_EVENTS[1:],
    ),
}  # fmt: skip


def pinged(before: list[bytes] | None, behind: list[bytes]) -> Any:
    answer, at = streamed(*(before or ()), *behind), len(streamed(*before, end=b"")) if before else 0
    return with_pings(answer[:at], answer[at:])


# What is asked with a key of one's own, cut off before its head, and answered once the SDK has come back.
CUT_EARLY: dict[str, tuple[dict[str, Any], Any]] = {
    name: (asks(*call, **params, extra_headers={"Idempotency-Key": name}, at="kept"), answer)
    for name, call, params, answer in (
        ("cut-chat", CHATS, ASKED_CHAT, COMPLETION),
        ("cut-chat-stream", CHATS, {**ASKED_CHAT, "stream": True}, CHAT_EVENTS),
        ("cut-message", MESSAGES, ASKED_MESSAGE, SAID),
        ("cut-message-stream", MESSAGES, {**ASKED_MESSAGE, "stream": True}, MESSAGE_EVENTS),
    )
}  # fmt: skip


def cut_early(answer: bytes) -> Callable[[Scripted, UpstreamPeer, str], None]:
    def cut(server: streamproxy.Server, name: str) -> None:
        for client in list(server.clients):
            if client.exchange and client.exchange.request.fields.get("idempotency-key") == name:
                client.drop(streamproxy.Aborted("The test cuts it."))

    def send(scripted: Scripted, upstream: UpstreamPeer, name: str) -> None:
        assert scripted.keeper
        kept = scripted.keeper.answers._by_key["127.0.0.1", name]
        scripted.keeper.hub.loop.post(functools.partial(cut, scripted.keeper, name))
        wait_for(lambda: [watch for watch in kept.watches if watch.attached])
        upstream.send(answer)
    return send


HELLO, UNICODE = "Hello from aimock, piece by piece.", "héllo 👋🏽 wörld 👩‍👩‍👧"


def say_to(at: str, text: str, sdk: str = "openai", **more: Any) -> dict[str, Any]:
    call, params = SDKS[sdk]
    return asks(*call, **{**params, "messages": [{"role": "user", "content": text}]}, at=at, **more)


# What is asked of an upstream that nobody here wrote, and of our own; and what is said, or what else the SDK tells.
UNPLAYED: dict[str, tuple[dict[str, Any], Any]] = {
    "aimock chat": (say_to("aimock", "hello"), HELLO),
    "aimock chat stream": (say_to("aimock", "unicode", stream=True), UNICODE),
    "aimock response": (asks("openai", "responses.create", model="gpt-6-luna", input="hello", at="aimock"), HELLO),
    "aimock response stream": (
        asks("openai", "responses.create", model="gpt-6-luna", input="hello", stream=True, at="aimock"), HELLO,
    ),
    "aimock message": (say_to("aimock", "hello", "anthropic"), HELLO),
    "aimock message stream": (say_to("aimock", "unicode", "anthropic", stream=True), UNICODE),
    "aimock limit": (
        say_to("aimock", "limit", retries=0), raises(429, status=429, message="Slow down.", retry_after="7"),
    ),
    "aimock broken": (
        say_to("aimock", "broken", "anthropic"), raises(502, status=502, message="Upstream failed with status 500."),
    ),
    "aimock cut": (say_to("aimock", "cut", stream=True), raises(CUT)),
    "aimock cut message": (say_to("aimock", "cut", "anthropic", stream=True), raises(CUT)),
    "demo chat": (say_to("demo", "Grüße"), None),
    "demo chat stream": (say_to("demo", "Grüße", stream=True), None),
}  # fmt: skip


def said(told: Any) -> str:
    """The text in what an SDK gave: a document or events of any API."""
    if isinstance(told, list):
        return "".join(map(said, told))
    if told.get("type") == "response.output_text.delta":
        return str(told["delta"])
    if "choices" in told:
        return "".join([
            (choice.get("delta") or choice.get("message") or {}).get("content") or "" for choice in told["choices"]
        ])
    parts = told.get("content") or [
        part for item in told.get("output", ()) for part in item["content"]
    ] or [told.get("delta") or {}]
    return "".join([part.get("text", "") for part in parts])


@dataclasses.dataclass
class Told:
    """What the SDKs of one place told, and what upstream heard."""

    where: str
    told: dict[str, Any]
    heads: dict[str, list[str]]
    answered: list[str]

    def check(self, name: str, expected: Any) -> None:
        told = self.told[name]
        if isinstance(expected, dict):
            row, expected = expected.get("row"), {
                member: value for member, value in expected.items() if member != "row"
            }
            assert isinstance(told, dict) and (not row or readme_raises()[row] & set(told["raised"])), told
            told = {member: told.get(member) for member in expected}
        assert told == expected


@pytest.fixture(scope="session", params=["python", "node", "chromium"])
def told(request: pytest.FixtureRequest, aimock: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Told]:
    """All that the SDKs are told to ask is asked at once, through as many servers as it takes."""
    where, folder = request.param, tmp_path_factory.mktemp("sdks")
    answers: dict[str, Any] = {
        name: streamed(*answer) if isinstance(answer, list) else whole(answer)
        for name, (_, answer, *_) in {**WHOLE_ANSWERS, **CUT_EARLY}.items()
    }
    answers.update(
        {name: answer for name, (_, answer, *_) in FAILURES.items()},
        **{name: cut_early(answers[name]) for name in CUT_EARLY},
        **{name: pinged(*events) for name, (_, *events) in PINGED.items()},
    )
    answers.update(dict.fromkeys([*LEFT, "held"], start_until_gone))
    with contextlib.ExitStack() as stack:
        scripted = stack.enter_context(contextlib.closing(Scripted(answers)))
        page = stack.enter_context(running(None))
        servers = {
            at: stack.enter_context(running(scripted.provider, **{"allow_origin": (page.url,), **settings}))
            for at, settings in {
                "": {},
                "seen": {},
                "kept": {"resume": 60.0},
                "pings": {"heartbeat": 0.05},
                "late": {"first_byte_timeout": 0.2},
                "tokens": {"token_file": token_file(folder, f"alice {ALICE}")},
                "small": {"max_body": 10},
                "minute": {"requests_per_minute": 1},
                "full": {"max_streams": 1},
                "nowhere": {"upstream": "http://127.0.0.1:9"},
                "aimock": {"upstream": aimock},
                "demo": {"demo": True, "api_key": ""},
            }.items()
        }  # fmt: skip
        scripted.keeper = servers["kept"]
        held = stack.enter_context(Client(servers["full"])).ask(
            ASKED, path="/v1/chat/completions", X_Client_Request_Id="held"
        )
        used = stack.enter_context(Client(servers["minute"])).ask({}, path="/v1/chat/completions")
        assert (held.head().status, used.head().status) == (200, 400)
        all_asked = {**WHOLE_ANSWERS, **FAILURES, **OURS, **LEFT, **PINGED, **CUT_EARLY, **UNPLAYED}
        asked = [
            {**asked, "name": name, "url": servers[asked["url"]].url + "/v1"} for name, (asked, *_) in all_asked.items()
        ]
        for each in asked:  # at a server of its own: Chromium has six connections to one
            each["then"] = each["then"].replace("say so", servers["seen"].url + "/v1/responses/seen")
        stack.enter_context(
            unittest.mock.patch.object(streamproxy.Viewer, "ping", scripted.noting_pings(streamproxy.Viewer.ping))
        )
        stack.enter_context(unittest.mock.patch.object(streamproxy, "DEMO_PAUSE", 0))
        # of an error event, before the cut
        stack.enter_context(unittest.mock.patch.object(streamproxy, "END_GRACE", DEADLINE))
        if where == "chromium":
            text = tell_in_chromium(request.getfixturevalue, page.url, asked)
        else:
            (folder / "asked.json").write_text(json.dumps(asked))
            if where == "python":
                scripts: SdkScripts = request.getfixturevalue("sdk_scripts")
                text = scripts.run(SDKS_FOR_PYTHON, str(folder / "asked.json"))
            else:
                text = tell_in_node(request.getfixturevalue, folder / "asked.json")
        check_no_key(text)
        with contextlib.suppress(AssertionError):
            wait_for(lambda: {*LEFT} <= {*scripted.done})
        return Told(where, json.loads(text), scripted.heads, list(scripted.done))


@pytest.mark.parametrize("name", WHOLE_ANSWERS)
def test_sdk_gives_what_upstream_sends(told: Told, name: str) -> None:
    _, answer, *given = WHOLE_ANSWERS[name]
    told.check(name, given[0] if given else payloads(*answer) if isinstance(answer, list) else answer)
    assert len(told.heads[name]) == 1


@pytest.mark.parametrize("name", FAILURES)
def test_sdk_raises_and_asks_again_only_where_nobody_was_paid(told: Told, name: str) -> None:
    _, _, expected, times = FAILURES[name]
    told.check(name, expected)
    heads = told.heads[name]
    if told.where == "chromium" and " 408" in name:  # which it asks again itself, on connections that were used before
        heads = list(dict.fromkeys(heads))
    assert len(heads) == times
    assert [head.lower().count("x-stainless-retry-count: 1") for head in heads] == [0, 1][:times]


def test_sdk_raises_this_for_a_cut(told: Told) -> None:
    got = [
        told.told[name]["raised"][0] + ": " + told.told[name]["message"]
        for name in ("cut chat stream", "cut message stream")
    ]
    assert [re.match(expected, words) for expected, words in zip(CUTS[told.where], got)].count(None) == 0, got


def test_readme_says_what_sdks_raise_in_rows_that_are_all_tested() -> None:
    tested = {expected.get("row") for _, _, expected, _ in FAILURES.values()} | {
        expected.get("row") for _, expected in OURS.values() if isinstance(expected, dict)
    }
    assert set(readme_raises()) == tested - {None} and all(readme_raises().values())
    words = [re.sub(".*: ", "", expected) for expected in (*CUTS["node"], *CUTS["chromium"])]
    assert all(f'"{word}"' in README.read_text(encoding="utf-8") for word in words)


@pytest.mark.parametrize("name", OURS)
def test_sdk_is_answered_by_ourselves(told: Told, name: str) -> None:
    told.check(name, OURS[name][1])
    assert name not in told.heads
    if isinstance(told.told[name], dict) and "raised" in told.told[name]:
        assert re.fullmatch("[0-9a-f]{16}", told.told[name]["request_id"])


@pytest.mark.parametrize("name", PINGED)
def test_sdk_takes_no_heed_of_heartbeats(told: Told, name: str) -> None:
    asked, before, behind = PINGED[name]
    told.check(name, {"content": SAID["content"]} if asked["final"] else payloads(*(before or ()), *behind))
    assert len(told.heads[name]) == 1


@pytest.mark.parametrize("name", LEFT)
def test_sdk_that_leaves_has_upstream_closed(told: Told, name: str) -> None:
    told.check(name, LEFT[name][1])
    assert name in told.answered and len(told.heads[name]) == 1


@pytest.mark.parametrize("name", CUT_EARLY)
def test_sdk_that_is_cut_before_the_head_raises_nothing_and_pays_once(told: Told, name: str) -> None:
    _, answer = CUT_EARLY[name]
    told.check(name, payloads(*answer) if isinstance(answer, list) else answer)
    assert name in told.answered and len(told.heads[name]) == 1


@pytest.mark.parametrize("name", UNPLAYED)
def test_sdk_with_servers_that_nobody_here_plays(told: Told, name: str) -> None:
    expected = UNPLAYED[name][1]
    if isinstance(expected, dict):
        told.check(name, expected)
    else:
        text = said(told.told[name]).encode("utf-16", "surrogatepass").decode("utf-16")  # some cut characters in two
        assert text == expected or (expected is None and "Grüße" in text)


# As Codex sends them, but for what is long.
CODEX = {
    "authorization": "Bearer theirs",
    "originator": "codex_exec",
    "Version": "0.169.0",
    "x-codex-turn-metadata": '{"request_kind":"turn"}',
    "x-client-request-id": "01a2157a-509f",
    "session-id": "01a2157a-509f",
    "user-agent": "codex_exec/0.169.0 (Debian 12.0.0; x86_64)",
}  # fmt: skip
HANDSHAKE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "M4JW5S4UBDFzoj8JVYDmdQ==",
    "sec-websocket-extensions": "permessage-deflate; client_max_window_bits",
    "openai-beta": "responses_websockets=2026-02-06",
}  # fmt: skip


def zstd(data: bytes) -> bytes:
    """data as it is, in a frame of zstd (RFC 8878 section 3.1.1)."""
    return b"\x28\xb5\x2f\xfd\xa0" + len(data).to_bytes(4, "little") + (len(data) << 3 | 1).to_bytes(3, "little") + data


@pytest.mark.parametrize(("allowed", "coding", "status"), [
    ("gpt-6-luna", "", 200),
    ("gpt-6-luna", "zstd", 415),
    ("*", "zstd", 200),
])
def test_codex_starts_with_websocket_and_goes_on_with_post(
    provider: Provider, allowed: str, coding: str, status: int
) -> None:
    body = json.dumps({
        **ASKED_RESPONSE, "stream": True, "store": False, "tools": [{"type": "custom", "name": "exec"}],
    }).encode()
    with running(provider, allow_model=allowed) as server:
        with Client(server).ask(method="GET", path="/v1/responses", **CODEX, **HANDSHAKE) as client:
            # whose status is all that it looks at: for 426 alone it asks with POST at once, and from then on
            head = client.head()
            assert (
                head.status, head.fields["Upgrade"], head.fields["Connection"]
            ) == (426, "HTTP/1.1", "Upgrade, close")
            assert json.loads(client.rest())["error"]["message"] == "Ask with POST: WebSocket is not spoken here."
        fields = {
            **CODEX, "accept": "text/event-stream", "content-type": "application/json",
            **({"content-encoding": coding} if coding else {}),
        }
        with Client(server).ask(zstd(body) if coding else body, path="/v1/responses", **fields) as client:
            if status == 415:
                got, message, _ = api_error(client)
                assert got == 415 and "'zstd'" in message and provider.nobody_came()
                return
            with provider.take() as upstream:
                assert upstream.body == (zstd(body) if coding else body)
                assert ("\r\nContent-Encoding: zstd\r\n" in upstream.head) == bool(coding)
                assert "codex_exec" not in re.sub("(?i)user-agent: .*", "", upstream.head)
                assert "X-Client-Request-Id: 01a2157a-509f\r\n" in upstream.head
                upstream.start(*RESPONSE_EVENTS)
                upstream.send(b"0\r\n\r\n")
                assert client.head().status == 200 and client.body() == b"".join(RESPONSE_EVENTS)


# ----------------------------------------------------------------------- Test streams


def get(server: streamproxy.Server | Front, target: str, method: str = "GET", body: bytes = b"") -> tuple[int, bytes]:
    place = urllib.parse.urlsplit(server.url)
    link = http.client.HTTPConnection(place.hostname or "", place.port, timeout=DEADLINE)
    with contextlib.closing(link):
        link.request(method, target, body or None, {"Host": "elsewhere.example"})  # open under any name
        answer = link.getresponse()
        return answer.status, answer.read()


def test_test_stream_tells_its_events_in_each_form() -> None:
    with running(None) as server:
        for query, method in [(query, method) for query in ("", "&sse=1") for method in ("GET", "POST")]:
            body = b"x" if method == "POST" else b""
            status, text = get(server, f"/healthz/stream?events=3&every=1&size=100{query}", method, body)
            events = re.findall(rb"([0-9]+) [0-9]+ 1.1 ([0-9a-f]+);", text)
            assert status == 200 and [number for number, _ in events] == [b"1", b"2", b"3"], query
            assert len({filling for _, filling in events}) == 3 and (b"event: done" in text) is bool(query)
            assert query or len(text) == 300
        with pytest.raises(http.client.IncompleteRead):
            get(server, "/healthz/stream?events=2&every=1&cut=1")
        assert get(server, "/healthz/stream?events=1&every=50&ping=1&sse=1")[1].count(streamproxy.PING) > 1
        wait_for(lambda: not server.hub.tests._streams)  # a client sees the end of its stream before
        assert server.snapshot()["streams"] == 0
        told = server.hub.metrics.encode()
        assert b'requests_total{route="/healthz/stream",status="200"} 6' in told
        for name in (b"time_to_first_token", b"request_duration"):  # which are those of models
            assert not re.search(rb"(?m)^streamproxy_%b_seconds_count.* [1-9]" % name, told)


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("events=0", b"from 1 to 1000"), ("events=1001", b"from 1 to 1000"), ("size=47", b"from 48 to 16384"),
        ("every=0", b"from 1 to 600000"), ("every=-1", b"from 1"), ("sse=2", b"from 0 to 1"), ("ping=", b"from 0 to"),
        ("x=1", b"'x'"), ("id=A", b"32 hexadecimal"), ("events=100&size=16384", b"at most 262144"),
        ("events=100&every=10000", b"at most 660000"),
        ("events=1&every=600000&ping=1&sse=1", b"at least a 1000th"),
    ],
)  # fmt: skip
def test_test_stream_refuses_what_is_out_of_bounds(query: str, words: bytes) -> None:
    with running(None) as server:
        status, text = get(server, f"/healthz/stream?{query}")
        assert status == 400 and words in text


def test_test_stream_ends_with_its_client_is_bounded_in_number_and_ended_by_a_drain() -> None:
    id = "0123456789abcdef" * 2
    with running(None, drain_timeout=600.0) as server, contextlib.ExitStack() as stack:
        links = []
        for _ in range(streamproxy.TEST_STREAMS["max_streams_per_client"]):
            link = http.client.HTTPConnection(*server.server_address[:2], timeout=DEADLINE)
            stack.callback(link.close)
            link.request("GET", f"/healthz/stream?every=9999&id={id}")
            links.append((link, link.getresponse()))
        assert get(server, f"/healthz/stream?count={id}", "POST") == (200, b"%d\n" % len(links))
        assert get(server, "/healthz/stream")[0] == 429
        for ended in links[0]:
            ended.close()
        wait_for(lambda: get(server, f"/healthz/stream?count={id}") == (200, b"%d\n" % (len(links) - 1)))
        stop = threading.Thread(target=server.stop)
        stop.start()
        for _, answer in links[1:]:
            with pytest.raises(http.client.IncompleteRead):
                answer.read()
        stop.join(DEADLINE)
        assert not stop.is_alive()


# ----------------------------------------------------------------------- Check


def reply_of(*pieces: tuple[float, int], ends: float = 1.0, whole: bool = True) -> streamproxy.Reply:
    """What comes of a test stream with an event each 0.1 s: when so many of them came."""
    reply, number = streamproxy.Reply(), 0
    for at, count in pieces:
        events = [b"%d %d 1.1 0a;\n" % (index + 1, 100 * index) for index in range(number, number + count)]
        number += count
        reply.pieces.append((at, b"".join(events)))
    reply.ended_at, reply.whole = ends, whole
    return reply


@pytest.mark.parametrize(("reply", "found"), [
    (reply_of(*[(index / 10, 1) for index in range(10)]), streamproxy.PIECES),
    (reply_of(*[(5 + index / 10, 1) for index in range(10)], ends=6), streamproxy.PIECES),  # the way is long
    (reply_of((0, 1), (0.1, 1), (0.4, 3), *[(index / 10, 1) for index in range(5, 10)]), streamproxy.PIECES),  # a jolt
    (reply_of((1.02, 10), ends=1.02), streamproxy.HELD),
    (reply_of((0, 1), (1, 9)), streamproxy.HELD),  # with the head came the first
    (reply_of(*[(index / 10, 1) for index in range(1, 11)]), streamproxy.BEHIND),
    (reply_of((0.2, 3), (0.5, 3), (0.8, 3), (1, 1)), streamproxy.BURSTS),
    (reply_of((0.1, 2), (0.3, 2), (0.5, 2), (0.7, 2), (0.9, 2)), streamproxy.BURSTS),
    (reply_of((0, 9)), streamproxy.CUT),
    (reply_of(*[(index / 10, 1) for index in range(10)], whole=False), streamproxy.CUT),
])  # fmt: skip
def test_judge_goes_by_intervals(reply: streamproxy.Reply, found: str) -> None:
    assert streamproxy.judge(reply, 10, 0.1) == found


def test_events_are_found_however_they_are_cut() -> None:
    whole, reply = reply_of((0, 3)).body, streamproxy.Reply()
    reply.pieces = [(float(index), whole[index : index + 1]) for index in range(len(whole))]
    assert [(event.left, event.at) for event in streamproxy.events_in(reply)] == [(0, 10), (0.1, 24), (0.2, 38)]


def test_block_size_is_what_comes_at_a_time() -> None:
    reply = streamproxy.Reply()
    reply.pieces = [(at + part / 10000, b"x" * 1024) for at in range(9) for part in range(4)] + [(9.0, b"x" * 90)]
    reply.ended_at = 9.0
    assert streamproxy.block_size(reply, 0.01) == 4096
    reply.pieces = [(4.5, b"x" * 65536), (9.0, b"x" * 65536)]
    assert streamproxy.block_size(reply, 0.01) == 65536
    reply.pieces = [(0.0, b"x" * 1024)] + [(8.5 + at / 100, b"x" * 1024) for at in range(50)]  # read with pauses
    assert streamproxy.block_size(reply, 0.01) == 0


HELD = streamproxy.HELD


@pytest.mark.parametrize(("seen", "found"), [
    (lambda form: "", []),
    (lambda form: HELD, [HELD]),
    (lambda form: HELD * (not form.sse), [streamproxy.TEXT_HELD]),
    (lambda form: HELD * (form.method == "GET" and form.sse), [streamproxy.GET_HELD]),
    (lambda form: HELD * (form.sse and form.method == "POST"), [HELD]),
    (lambda form: HELD * form.packed, [streamproxy.COMPRESSED]),
    (lambda form: streamproxy.BURSTS if form.sse else streamproxy.BEHIND, [streamproxy.BEHIND, streamproxy.BURSTS]),
])  # fmt: skip
def test_found_in_tells_what_forms_have_in_common(seen: Any, found: list[str]) -> None:
    looks = [streamproxy.Look(str(form), "", seen(form), form, "gzip" * form.packed) for form in streamproxy.FORMS]
    assert streamproxy.found_in(looks) == found
    assert streamproxy.found_in([*looks, streamproxy.Look("", "", streamproxy.WHOLE)]) == [*found, streamproxy.WHOLE]


def test_whatever_is_found_has_a_cure_and_each_hop_is_known_by_a_field() -> None:
    kinds = {kind for _, cures in streamproxy.CURES.values() for kind in cures}
    assert kinds == set(streamproxy.CURES[""][1])
    assert set(streamproxy.CURES) == {hop for *_, hop in streamproxy.HOPS} | {""}
    for name, part, hop in streamproxy.HOPS:
        assert streamproxy.hops_in({name: f"1 {part.title()}/2", "date": "x"}) == [hop]
    assert streamproxy.hops_in({"server": "cloudflare", "cf-ray": "1", "via": "1.1 Caddy"}) == ["Cloudflare", "Caddy"]
    assert streamproxy.hops_in({"server": "Kestrel/2 (x)", "via": "1.1 varnish"}) == ["Varnish", "Kestrel"]
    assert streamproxy.hops_in({"server": "\x1b[2J"}) == []
    assert streamproxy.cure_of(["Kestrel"], HELD) == streamproxy.cure_of([], HELD)
    assert streamproxy.cure_of(["Cloudflare", "nginx"], streamproxy.HTTP10).startswith("In nginx")
    assert streamproxy.cure_of(["nginx"], streamproxy.BEHIND) == streamproxy.cure_of(["nginx"], HELD)
    assert "quick tunnel" in streamproxy.cure_of(["Cloudflare", "nginx"], streamproxy.GET_HELD)
    assert "http-no-delay" in streamproxy.cure_of([], streamproxy.BURSTS)


PACE = 0.05


@pytest.fixture
def many_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many test streams as are asked for: all the checks of a test come from one client, at once."""
    for limit in streamproxy.TEST_STREAMS:
        monkeypatch.setitem(streamproxy.TEST_STREAMS, limit, 0)


def checked(
    url: str, found: Sequence[str] = (), paces: Sequence[float] = (PACE, 4 * PACE, 10 * PACE), **settings: Any
) -> streamproxy.Check:
    """A check, at a slower pace if what it finds is not that: on a machine that has other things to do, events jolt."""
    for pace in paces:
        check = streamproxy.Check(streamproxy.Settings(check=url, **settings), pace)
        check.run()
        if check.found == list(found):
            break
    return check


BAD_NGINX = """
error_log /var/log/nginx/error.log;
events { }
http { access_log off; proxy_cache_path /run/streamproxy/cache keys_zone=one:1m;
    server { listen 80; location / { proxy_http_version 1.1; proxy_pass http://unix:/run/streamproxy/1.sock; } }
"""
IGNORED = "proxy_ignore_headers X-Accel-Buffering Cache-Control;"
CACHE = "proxy_cache one; proxy_cache_valid 1m;"
# What nginx is told, what that does, and what is to be changed.
BAD_LINES = [
    (f"proxy_http_version 1.0; {IGNORED}", [HELD, streamproxy.WHOLE], "proxy_buffering off;"),
    (f"proxy_http_version 1.1; {IGNORED} {GZIP}", [streamproxy.COMPRESSED], "gzip off;"),
    ("proxy_http_version 1.0;", [streamproxy.WHOLE], "proxy_http_version 1.1;"),
    (f"proxy_http_version 1.1; {IGNORED} {CACHE}", [streamproxy.CACHED], "proxy_cache off;"),
    (f"proxy_http_version 1.1; {IGNORED} {CACHE} proxy_cache_key x$uri;", [streamproxy.CACHED], "proxy_cache off;"),
    ("proxy_http_version 1.1; proxy_read_timeout 1s;", [streamproxy.IDLE], "proxy_read_timeout 130s;"),
    (f"proxy_http_version 1.1; {GZIP}", [], ""),
]  # fmt: skip


@pytest.mark.usefixtures("many_checks")
def test_check_names_what_nginx_does_and_the_line_to_change(tmp_path: Path) -> None:
    ports = [free_port() for _ in BAD_LINES]
    servers = [
        f"server {{ listen 127.0.0.1:{port}; location / {{ {lines} proxy_pass http://unix:{tmp_path}/1.sock; }} }}"
        for port, (lines, *_) in zip(ports, BAD_LINES)
    ]
    config = BAD_NGINX + "\n".join(servers) + "}"
    with running(None, bind=f"unix:{tmp_path}/1.sock"), nginx(tmp_path, config):
        looks = [
            functools.partial(checked, f"http://127.0.0.1:{port}", found, check_idle=1.5 * ("read_timeout" in lines))
            for port, (lines, found, _) in zip(ports, BAD_LINES)
        ]
        for check, (lines, found, change) in zip(streamproxy.together(looks), BAD_LINES):
            assert (check.hops, check.found) == (["nginx"], found), lines
            assert bool(check.notes) is ("http_version 1.0" in lines)
            assert not found or change in streamproxy.cure_of(check.hops, found[0])
            if lines == BAD_LINES[0][0]:
                shown = readme_block("https://chat.example.com, by way of nginx")
                text = re.sub("of [0-9]+ KiB", "of 4 KiB", check.text())  # which may meet on a busy machine
                assert text.replace(check.url, "https://chat.example.com") + "\n" == shown


OTHER_SERVERS = """
error_log /var/log/nginx/error.log;
events { }
http { access_log off; proxy_http_version 1.1;
    server { listen 80; location / { return 200 hello; } }
    server { listen 127.0.0.1:%d; location / { return 302 /login; } }
    server { listen 127.0.0.1:%d; location /chat/ { if ($http_authorization != "Bearer letmein") { return 401; }
        proxy_pass http://unix:/run/streamproxy/1.sock:/; } 
        location /down/ { proxy_pass http://unix:/run/streamproxy/2.sock:/; }
        location /full/ { return 429; }
        location /basic/ { if ($http_authorization != "Basic bWU6eA==") { return 401; }
            proxy_pass http://unix:/run/streamproxy/1.sock:/; }
        location /old/ { rewrite ^/old/(.*) https://localhost:%d/chat/$1 permanent; } }
    server { listen 127.0.0.1:%d ssl; ssl_certificate %s; ssl_certificate_key %s;
        location /chat/ { proxy_pass http://unix:/run/streamproxy/1.sock:/; } }
}
"""


@pytest.mark.usefixtures("many_checks")
def test_check_says_who_is_there_instead_and_follows_redirects(tmp_path: Path, certificate: Path) -> None:
    login, guard, tls = free_port(), free_port(), free_port()
    config = OTHER_SERVERS % (login, guard, tls, tls, certificate, certificate)
    trusted = str(certificate.parent / "cert.pem")
    with running(None, bind=f"unix:{tmp_path}/1.sock"), nginx(tmp_path, config) as front:
        for url, found, words in (
            (front.url, streamproxy.ABSENT, "is not streamproxy"),
            (f"http://127.0.0.1:{login}", streamproxy.ABSENT, "/login' in place of streamproxy"),
            (f"http://127.0.0.1:{guard}/chat", streamproxy.GUARDED, "answers 401 to whoever has no token"),
            (f"http://127.0.0.1:{guard}/down", streamproxy.UNSERVED, "answers 502"),
            (f"http://127.0.0.1:{guard}/full", streamproxy.REFUSED, "answers 429"),
            (f"https://localhost:{tls}/chat", streamproxy.UNREACHED, "self-signed certificate"),
            (f"http://127.0.0.1:{guard}/old", streamproxy.UNREACHED, "self-signed certificate"),
            (f"http://127.0.0.1:{free_port()}", streamproxy.UNREACHED, "connection refused"),
            ("http://nowhere.invalid", streamproxy.UNREACHED, "its name was not found"),
            ("http://nowhere..invalid", streamproxy.UNREACHED, "its name was not found"),
        ):
            check = checked(url, [found])
            assert check.found == [found] and words in check.looks[0].words.replace("self signed", "self-signed"), url
        basic = {"check_token": "bWU6eA==", "auth_header": "Authorization: Basic {key}"}
        looks = [
            functools.partial(checked, f"http://127.0.0.1:{guard}/old/", ca_file=trusted),
            functools.partial(checked, f"http://127.0.0.1:{guard}/chat", check_token="letmein"),
            functools.partial(checked, f"http://127.0.0.1:{guard}/basic/?key=secret", **basic),
            functools.partial(checked, f"http://127.0.0.1:{guard}/chat", [streamproxy.GUARDED], **basic),
        ]
        check, *others, guarded = streamproxy.together(looks)
        assert (check.found, check.url) == ([], f"https://localhost:{tls}/chat")
        assert "redirects to https://localhost" in check.notes[0]
        assert [other.found for other in others] == [[], []] and "secret" not in others[1].text()
        assert guarded.looks[0].words == "answers 401 to this token"


class Stranger:
    """A server that says the same to all."""

    answer: bytes | None = b""  # None: nothing, and the connection stays

    def __enter__(self) -> Self:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._kept: list[socket.socket] = []
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for sock in (self._listener, *self._kept):
            sock.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock = self._listener.accept()[0]
                if self.answer is None:
                    self._kept.append(sock)
                    continue
                with sock:
                    sock.recv(65536)
                    sock.sendall(self.answer)


@pytest.mark.parametrize(("url", "location", "keeps"), [
    ("http://a.example:8000", "http://a.example:8000/b", True), ("http://a.example", "http://a.example:80/b", True),
    ("http://a.example", "https://a.example/b", True), ("http://a.example:8000", "http://a.example:8001", False),
    ("http://a.example", "http://a.example:443", False), ("http://a.example:8000", "https://a.example:8443", False),
    ("https://a.example", "http://a.example", False), ("http://a.example", "http://b.example", False),
])
def test_check_takes_its_token_to_no_other_host_or_port(url: str, location: str, keeps: bool) -> None:
    check = streamproxy.Check(streamproxy.Settings(check=url, check_token="letmein"))
    with unittest.mock.patch.object(streamproxy, "Visitor") as visitor:
        assert check._follow(302, location + streamproxy.TEST_PATH)
    settings, led_to = visitor.call_args.args
    assert (led_to, settings.check_token) == (location, "letmein" * keeps)


@pytest.mark.parametrize(("status", "words"), [
    (301, ", for on the way a POST becomes a GET."), (308, "."), (307, "."),
])
def test_check_says_of_a_redirect_that_it_changes_the_method_where_it_does(status: int, words: str) -> None:
    check = streamproxy.Check(streamproxy.Settings(check="http://a.example"))
    assert check._follow(status, "https://a.example" + streamproxy.TEST_PATH)
    assert check.notes == [f"It redirects to https://a.example: ask that address{words}"]


def test_check_gives_no_advice_where_a_redirect_leads_in_a_circle() -> None:
    with Stranger() as there:
        there.answer = f"HTTP/1.1 301 No\r\nLocation: {there.url}/healthz/stream\r\nContent-Length: 0\r\n\r\n".encode()
        check = checked(there.url, [streamproxy.ABSENT])
    assert (check.found, check.notes) == ([streamproxy.ABSENT], [])
    assert check.looks[0].words.startswith("answers 301 with ")


@pytest.mark.parametrize(("answer", "words"), [
    (b"", "connection reset by peer"), (b"SSH-2.0-OpenSSH\r\n\r\n", "what it says is not HTTP/1"),
    (None, "it took too long"),
])
def test_check_tells_who_is_there_and_does_not_answer_from_nobody(
    monkeypatch: pytest.MonkeyPatch, answer: bytes | None, words: str
) -> None:
    monkeypatch.setattr(streamproxy, "CHECK_TIMEOUT", 1.0)
    with Stranger() as there:
        there.answer = answer
        check = checked(there.url, [streamproxy.SILENT])
    assert [look.words for look in check.looks] == [f"takes connections, but does not answer: {words}"]
    assert "Something listens there" in check.text()


def test_check_tells_of_the_environment_s_proxy(environment: Callable[..., None]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        proxy = f"127.0.0.1:{listener.getsockname()[1]}"
        environment(HTTPS_PROXY=f"http://user:secret@{proxy}")

        def refuse() -> None:
            with listener.accept()[0] as sock:
                sock.recv(65536)
                sock.sendall(b"HTTP/1.1 407 No\r\nContent-Length: 0\r\n\r\n")

        threading.Thread(target=refuse, daemon=True).start()
        check = streamproxy.Check(streamproxy.Settings(check="https://chat.example.com"))
        check.run()
    assert check.text().startswith(f"https://chat.example.com, by way of the environment's proxy {proxy}\n")
    assert "cannot be reached: the proxy refused with status 407\n" in check.text()


def test_check_command_line(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text("letmein\n")
    seen = []
    with running(None) as server:
        with Hop(server, lambda head: seen.append(head) or (lambda data: data or b"")) as hop:  # type: ignore[arg-type, func-returns-value]
            monkeypatch.setattr(streamproxy, "TELL_INTERVAL", 0.5)
            monkeypatch.setenv("STREAMPROXY_CHECK_TOKEN_FILE", str(tmp_path / "token"))
            assert streamproxy.main(["--check", hop.url, "--log-format", "json"]) == 0
    out, err = capfd.readouterr()
    told = json.loads(out)
    assert (told["url"], told["ok"], told["hops"], told["found"]) == (hop.url, True, [], [])
    assert told["looks"]["POST text"] == "piece by piece" and told["looks"]["pings"] == "pass"
    assert all(b"\r\nAuthorization: Bearer letmein\r\n" in head for head in seen) and len(seen) < 40
    assert "streamproxy: still looking, after 0 s\n" in err or "after 1 s" in err
    status, out, err = run("--check", f"http://127.0.0.1:{free_port()}")
    assert status == 1 and "cannot be reached: connection refused" in out and not err
    for flags in (["--check", "chat.example.com"], ["--check-idle", "601"]):
        status, out, err = run(*flags)
        assert status == 2 and flags[0] in err and not out
    with socket.create_server(("127.0.0.1", 0)) as silent:
        command = [sys.executable, "-c", RUN, "--check", f"http://127.0.0.1:{silent.getsockname()[1]}"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=HERE)
        with silent.accept()[0]:  # and somebody does not wait until it has said all
            process.send_signal(signal.SIGINT)
            assert process.communicate() == (b"", b"") and process.returncode == 130


@pytest.mark.usefixtures("many_checks")
def test_check_passes_the_examples(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        for number in (1, 2):
            stack.enter_context(running(None, bind=f"unix:{tmp_path}/{number}.sock"))
        server = stack.enter_context(running(None))
        fronts = {"": server, "nginx": stack.enter_context(nginx(tmp_path, EXAMPLE.read_text()))}
        for name in FRONTS:
            (tmp_path / name).mkdir()
            fronts[name] = stack.enter_context(other_front(name, tmp_path / name, server))
        expected = {name: [streamproxy.WHOLE] * (name == "Caddy") for name in fronts}  # as README says of it
        looks = [functools.partial(checked, front.url, expected[name], check_idle=1) for name, front in fronts.items()]
        checks = streamproxy.together(looks)
        for name, check in zip(fronts, checks):
            assert check.found == expected[name], name
            words = {look.name: look.words for look in check.looks}
            assert words["a client that leaves"] == "ends its stream" and words["1 s of silence"] == "pass", name
            assert check.hops == [name] * (name in ("nginx", "Apache", "Caddy"))
        assert any("compressed (gzip)" in look.words for look in checks[2].looks)  # Apache's, which holds nothing


def test_check_tells_that_haproxy_waits_for_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = README.read_text(encoding="utf-8").replace("option http-no-delay", "").replace("option abortonclose", "")
    (tmp_path / "README.md").write_text(text)
    monkeypatch.setitem(globals(), "README", tmp_path / "README.md")
    with running(None) as server, other_front("HAProxy", tmp_path, server) as front:
        check = checked(front.url, [streamproxy.BURSTS], paces=[PACE] * 5)  # it waits for up to 0.2 s
        assert check.found == [streamproxy.BURSTS]
        assert "http-no-delay" in streamproxy.cure_of(check.hops, check.found[0])


class Hop:
    """A proxy that changes what comes from the server."""

    def __init__(self, server: streamproxy.Server, change: Callable[[bytes], Callable[[bytes | None], bytes]]) -> None:
        """change takes the head of a request, and returns what takes each read of its answer, and None at its end."""
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self._server, self._change = server, change
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._pass, args=(self.listener.accept()[0],), daemon=True).start()

    def _pass(self, client: socket.socket) -> None:
        with client, socket.create_connection(self._server.server_address[:2]) as upstream:
            with contextlib.suppress(OSError):
                head = client.recv(65536)
                change = self._change(head)
                upstream.sendall(head.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
                for data in iter(functools.partial(upstream.recv, 65536), b""):
                    client.sendall(change(data))
                client.sendall(change(None))


class Holding:
    """What is done to an answer: keep what came until ready(what is kept) says how many of its bytes may go."""

    def __init__(self, ready: Callable[[list[bytes]], int]) -> None:
        self._kept: list[bytes] = []
        self._ready = ready

    def __call__(self, data: bytes | None) -> bytes:
        self._kept += [data] if data else []
        kept = b"".join(self._kept)
        size = len(kept) if data is None else self._ready(self._kept)
        self._kept = [kept[size:]] if data is None or size else self._kept
        return kept[:size]


def one_behind(head: bytes) -> Callable[[bytes | None], bytes]:
    return Holding(lambda kept: len(kept[0]) if len(kept) > 1 else 0)


def in_blocks(head: bytes) -> Callable[[bytes | None], bytes]:
    return Holding(lambda kept: sum(map(len, kept)) // 8192 * 8192)


def until_the_end(head: bytes) -> Callable[[bytes | None], bytes]:
    return Holding(lambda kept: 0)


def text_held(head: bytes) -> Callable[[bytes | None], bytes]:
    return until_the_end(head) if b"sse=1" not in head else lambda data: data or b""


def get_held(head: bytes) -> Callable[[bytes | None], bytes]:
    return until_the_end(head) if head.startswith(b"GET") else lambda data: data or b""


def without_pings(head: bytes) -> Callable[[bytes | None], bytes]:
    return lambda data: re.sub(rb"[0-9a-f]+\r\n: ping\n\r\n", b"", data or b"")


def without_fields(head: bytes) -> Callable[[bytes | None], bytes]:
    return lambda data: re.sub(rb"(Incremental|Cache-Control): [^\r]*\r\n", b"", data or b"")


def refused_post(head: bytes) -> Callable[[bytes | None], bytes]:
    words = b"HTTP/1.1 405 No\r\nContent-Length: 0\r\n\r\n"
    return lambda data: (words if head.startswith(b"POST") else data or b"") if data else b""


TOO_MANY = b"HTTP/1.1 429 No\r\nContent-Length: 2\r\n\r\nno"


def refused_streams(head: bytes) -> Callable[[bytes | None], bytes]:
    return lambda data: (TOO_MANY if b"events=" in head and b"every=" in head else data or b"") if data else b""


def refused_counts(head: bytes) -> Callable[[bytes | None], bytes]:
    return lambda data: (TOO_MANY if b"count=" in head else data or b"") if data else b""


def ended_in_silence(head: bytes) -> Callable[[bytes | None], bytes]:
    end = b"0\r\n\r\n" * (b"events=1&every=2000" in head)
    return lambda data: data + end * (b";\n" in data) if data else b""


# What a hop does to text, what is found, what was seen in one form, what is to be changed or noted.
HOPS_AND_FINDINGS = [
    (one_behind, [streamproxy.BEHIND], "always one behind", "a piece only with the next"),
    (in_blocks, [HELD, streamproxy.STAYS], "in blocks of", "collects the answer"),
    (until_the_end, [HELD, streamproxy.STAYS], "all at the end", "collects the answer"),
    (text_held, [streamproxy.TEXT_HELD, streamproxy.STAYS], "all at the end", "Accept: text/event-stream"),
    (get_held, [streamproxy.GET_HELD], "piece by piece", "ask with POST"),
    (without_pings, [streamproxy.NO_PINGS], "piece by piece", "comments of event streams"),
    (without_fields, [], "piece by piece", "Cache-Control, Incremental"),
    (refused_post, [streamproxy.REFUSED], "refused with status 405", "whose log has this status"),
    (refused_streams, [streamproxy.REFUSED], "refused with status 429", "240 a minute"),
]  # fmt: skip


@pytest.mark.usefixtures("many_checks")
def test_check_tells_what_each_kind_of_hop_does() -> None:
    with running(None) as server, contextlib.ExitStack() as stack:
        hops = [stack.enter_context(Hop(server, change)) for change, *_ in HOPS_AND_FINDINGS]
        looks = [functools.partial(checked, hop.url, found) for hop, (_, found, *_) in zip(hops, HOPS_AND_FINDINGS)]
        checks = streamproxy.together(looks)
        for check, (change, found, seen, words) in zip(checks, HOPS_AND_FINDINGS):
            assert check.found == found, change
            assert any(look.words.startswith(seen) for look in check.looks if look.form), change  # one may have jolted
            assert words in (streamproxy.cure_of(check.hops, found[0]) if found else check.notes[0]), change


@pytest.mark.usefixtures("many_checks")
def test_check_says_what_it_has_not_seen() -> None:
    with running(None) as server, Hop(server, refused_counts) as hop:
        check = checked(hop.url)
    assert {look.name: look.words for look in check.looks}["a client that leaves"] == streamproxy.UNSEEN
    assert check.found == [] and check.text().endswith("\nNothing that was seen holds the text back.")


FURTHER = ["pings", "an answer that is cut", "an answer to GET", "2 s of silence"]
EMPTY = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
BAD_GATEWAY = b"HTTP/1.1 502 No\r\nContent-Length: 0\r\n\r\n"
# What is put in place of answers, to requests whose head has one of these, what is found, and what is seen of what.
SINGLE_FINDINGS: list[tuple[bytes, tuple[bytes, ...], list[str], str, list[str]]] = [
    (TOO_MANY, (b"ping=", b"cut=1", b"events=1&every"), [streamproxy.REFUSED], "refused with status 429", FURTHER),
    (EMPTY, (b"cut=1",), [streamproxy.WHOLE], "looks whole", FURTHER[1:2]),
    (BAD_GATEWAY, (b"cut=1",), [], "can be told", FURTHER[1:2]),
    (b"", (b"GET /healthz/stream?events=10&",), [streamproxy.CUT], "no answer: connection reset by peer", ["GET text"]),
]


@pytest.mark.usefixtures("many_checks")
def test_check_tells_what_a_hop_does_to_some_streams_alone() -> None:
    def putting(answer: bytes, parts: Sequence[bytes]) -> Callable[[bytes], Callable[[bytes | None], bytes]]:
        def change(head: bytes) -> Callable[[bytes | None], bytes]:
            if not any(part in head for part in parts):
                return lambda data: data or b""
            return lambda data: answer if data else b""

        return change

    with running(None) as server, contextlib.ExitStack() as stack:
        hops = [stack.enter_context(Hop(server, putting(answer, parts))) for answer, parts, *_ in SINGLE_FINDINGS]
        expected = [found for _, _, found, *_ in SINGLE_FINDINGS]
        looks = [functools.partial(checked, hop.url, found, check_idle=2) for hop, found in zip(hops, expected)]
        for check, (answer, _, found, words, names) in zip(streamproxy.together(looks), SINGLE_FINDINGS):
            seen = {look.name: look.words for look in check.looks}
            assert check.found == found, answer
            assert [seen[name] for name in names] == [words] * len(names), answer


@pytest.mark.usefixtures("many_checks")
def test_check_recommends_nothing_that_was_refused() -> None:
    def holding(*refused: bytes) -> Callable[[bytes], Callable[[bytes | None], bytes]]:
        def change(head: bytes) -> Callable[[bytes | None], bytes]:
            refuses = all(part in head for part in refused)
            return (lambda data: TOO_MANY if data else b"") if refuses else until_the_end(head)

        return change

    changes = [
        (holding(b"events=10&", b"sse=1"), [HELD, streamproxy.REFUSED, streamproxy.STAYS], "all at the end"),
        (holding(b"events=10&", b"POST"), [streamproxy.REFUSED, HELD, streamproxy.STAYS], "all at the end"),
        (holding(b"size=512"), [HELD, streamproxy.STAYS], "held back"),
    ]
    with running(None) as server, contextlib.ExitStack() as stack:
        hops = [stack.enter_context(Hop(server, change)) for change, *_ in changes]
        looks = [functools.partial(checked, hop.url, found) for hop, (_, found, _) in zip(hops, changes)]
        for check, (_, found, words) in zip(streamproxy.together(looks), changes):
            assert check.found == found
            assert words in {look.words for look in check.looks if look.form}


def test_check_names_the_hop_that_is_outermost_and_a_second_cause_of_bursts() -> None:
    hops = streamproxy.hops_in({"server": "Caddy, nginx/1.22.1"})
    assert hops == ["Caddy", "nginx"] and streamproxy.cure_of(hops, streamproxy.WHOLE).startswith("In the Caddyfile")
    cure = streamproxy.cure_of(["nginx"], streamproxy.BURSTS)
    assert "`proxy_buffering off;`" in cure and "`option http-no-delay`" in cure


@pytest.mark.usefixtures("many_checks")
def test_check_takes_no_end_before_its_time_for_a_silence_that_passes() -> None:
    with running(None) as server, Hop(server, ended_in_silence) as hop:
        check = checked(hop.url, [streamproxy.IDLE], check_idle=2)
    assert check.found == [streamproxy.IDLE] and check.looks[-1].words.startswith("cut off after ")


@pytest.mark.usefixtures("many_checks")
def test_check_tells_of_an_answer_that_never_ends_once_it_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamproxy, "CHECK_TIMEOUT", 3.0)
    over = threading.Event()

    def kept_open(head: bytes) -> Callable[[bytes | None], bytes]:
        def change(data: bytes | None) -> bytes:
            if data is None and b"cut=1" in head:
                over.wait(DEADLINE)
            return data or b""

        return change

    with running(None) as server, Hop(server, kept_open) as hop:
        check = checked(hop.url, [streamproxy.ENDLESS])
        over.set()
    assert check.found == [streamproxy.ENDLESS] and "(Vite, webpack)" in check.text()


def test_check_gives_its_token_to_no_other_host_and_believes_no_other_server() -> None:
    heads: list[bytes] = []
    gzip_begin = bytes.fromhex("1f8b08000000000000ff")
    answers = {
        "elsewhere": b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.2:%d/healthz/stream\r\nContent-Length: 0\r\n\r\n",
        "unreadable": b"HTTP/1.1 302 Found\r\nLocation: http://me:pass@[::1/\xff\r\nContent-Length: 0\r\n\r\n",
        "endless": b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 65536,
        "digits": b"HTTP/1.1 200 OK\r\n\r\n" + b"0" * 300_000,
        "large number": b"HTTP/1.1 200 OK\r\n\r\n1 " + b"9" * 5000 + b" 1.1 ;\n",
        "nothing, packed": b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n" + gzip_begin,
        "no HTTP": b"SSH-2.0-OpenSSH\r\n\r\n",
        "a drain": b'HTTP/1.1 503 No\r\nContent-Length: 42\r\n\r\n{"error": "The server is shutting down."}\n',
        "interim": b"",
    }
    endless = {
        "endless": b"x" * 65536, "nothing, packed": b"\0\0\0\xff\xff" * 9999,
        "interim": b"HTTP/1.1 101 x\r\n\r\n" * 999,
    }  # fmt: skip

    def serve(name: str, listener: socket.socket) -> None:
        answer = answers[name].replace(b"%d", b"%d" % listener.getsockname()[1])
        with contextlib.suppress(OSError):
            while True:
                sock = listener.accept()[0]
                with sock, contextlib.suppress(OSError):
                    heads.append(sock.recv(65536))
                    sock.sendall(answer)
                    while name in endless:
                        sock.sendall(endless[name])

    for name in answers:
        found = "no answer" if name in ("no HTTP", "interim") else "not streamproxy"
        found = "refused" if name == "a drain" else found
        with socket.create_server(("0.0.0.0", 0)) as listener:
            threading.Thread(target=serve, args=(name, listener), daemon=True).start()
            check = checked(f"http://127.0.0.1:{listener.getsockname()[1]}", [found], check_token="letmein")
            assert check.found == [found], name
            assert name != "a drain" or check.looks[0].words == "answers 503: The server is shutting down."
            listener.shutdown(socket.SHUT_RDWR)
    assert b"letmein" in heads[0]
    for head in heads[1:3]:  # nor once it is led on from there
        assert b"Host: 127.0.0.2" in head and b"letmein" not in head
