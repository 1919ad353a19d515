# SPDX-License-Identifier: MIT
"""Tests of streamproxy: raw bytes in, raw bytes out.

A test plays upstream and client itself, mostly in one thread: what upstream sends after a piece
was read cannot have carried it, so order needs no clock.  A deadline only turns what never comes
into a failure.  Programs that a test needs beyond Python skip it where they are missing, or, with
STREAMPROXY_TEST_REQUIRE_ALL=1, fail it.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import errno
import functools
import gc
import http.client
import json
import logging
import os
import random
import re
import shlex
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import urllib.parse
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

import streamproxy

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Self

HERE = Path(__file__).resolve().parent
PROGRAM = HERE / "streamproxy.py"
README = HERE / "README.md"
DEADLINE = 20.0  # seconds until what should have happened is called missing
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
    (pytest.fail if os.environ.get("STREAMPROXY_TEST_REQUIRE_ALL") else pytest.skip)(reason)


@pytest.fixture(autouse=True)
def no_key_anywhere(caplog: Any, capfd: Any) -> Iterator[None]:
    """No part of the key of 6 characters is in what the test logged or printed (nor in what Client reads)."""
    caplog.set_level(logging.DEBUG, logger="streamproxy")
    yield
    while Peer.opened:
        Peer.opened.pop().close()
    check_no_key(caplog.text + "".join(capfd.readouterr()))


def check_no_key(text: str) -> None:
    assert not [KEY[at : at + 6] for at in range(len(KEY) - 5) if KEY[at : at + 6] in text]


# ---------------------------------------------------------------- upstream and client, played by hand


class Peer:
    """One end of a connection, closed after the test if not before."""

    opened: ClassVar[list[socket.socket]] = []

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.opened.append(sock)
        self.sock.settimeout(DEADLINE)
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
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


@dataclasses.dataclass
class Head:
    line: bytes
    fields: dict[str, str]

    @property
    def status(self) -> int:
        return int(self.line.split()[1])


class Client(Peer):
    """Whoever asks the proxy."""

    def __init__(self, server: Any) -> None:
        sock: socket.socket
        if server.url.startswith("unix:"):
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(server.url[5:])
        else:
            url = urllib.parse.urlsplit(server.url)
            sock = socket.create_connection((url.hostname, url.port), DEADLINE)
        super().__init__(sock)

    def more(self) -> bool:
        more = super().more()
        check_no_key(self.seen.decode("latin-1"))
        return more

    def ask(self, body: object = None, method: str = "POST", path: str = "/", version: str = "1.1", **fields: str) -> Client:
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
    given = {"bind": "127.0.0.1:0", "api_key": KEY, "drain_timeout": 0.0, "upstream": "http://127.0.0.1:9", **settings}
    if provider and "upstream" not in settings:
        given["upstream"] = provider.url
    server = streamproxy.Server(streamproxy.Settings(**given))
    server.start()
    try:
        yield server
    finally:
        if not server.draining:
            server.stop()


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


def log_entries(caplog: Any, count: int) -> list[streamproxy.LogEntry]:
    """The lines that requests left in the log, once there are count of them."""
    return wait_for(lambda: [r.msg for r in caplog.records if isinstance(r.msg, streamproxy.LogEntry)],
                    lambda entries: len(entries) >= count)


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


# ---------------------------------------------------------------- event streams: WHATWG HTML section 9.2


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
    "other line separators are text": ("data: a\x0b\x0c\x1c\x85\u2028b\n\n".encode(), [message("a\x0b\x0c\x1c\x85\u2028b")]),
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
    assert cutter.feed(rest) == b"" and cutter.pass_on(0) == (rest if passes else b"")
    assert cutter.passed == (len(rest) if passes else 0)
    if passes:
        assert cutter.feed(b"\n\n" if rest.startswith(b"d") else b"z\n\n") and cutter.pass_on(0) == b""


@pytest.mark.parametrize("data", ["", "a", "a\nb", "a\r\nb", "a\rb", "\n", "data: x\n\nevent: y", " a", "ä👋"])
def test_encoded_event_parses_back(data: str) -> None:
    encoded = streamproxy.encode_event(data, "kind", "7")
    expected = data.replace("\r\n", "\n").replace("\r", "\n")
    assert streamproxy.EventParser().feed(encoded) == [message(expected, "kind", "7")]


# ---------------------------------------------------------------- chunked coding: RFC 9112 section 7.1

CHUNKED = {
    "one chunk": (b"5\r\nhello\r\n0\r\n\r\n", b"hello"),
    "several": (b"1\r\na\r\n2\r\nbc\r\n0\r\n\r\n", b"abc"),
    "data that looks like framing": (b"7\r\n\r\n0\r\n\r\n\r\n0\r\n\r\n", b"\r\n0\r\n\r\n"),
    "hexadecimal, either case, leading zeros": (b"00A\r\n0123456789\r\n00b\r\n0123456789a\r\n000\r\n\r\n", b"01234567890123456789a"),
    "extensions": (b'1;a\r\nx\r\n1 ; b = c ;d="e;\\"f"\r\ny\r\n0;z\r\n\r\n', b"xy"),
    "trailers": (b"1\r\nx\r\n0\r\nA: b\r\nC:\r\n\r\n", b"x"),
    "empty": (b"0\r\n\r\n", b""),
}
BROKEN_CHUNKED = {
    "plus": b"+5\r\nhello\r\n", "minus": b"-5\r\nhello\r\n", "0x": b"0x5\r\nhello\r\n", "underscore": b"1_0\r\n0123456789abcdef\r\n",
    "space before": b" 5\r\nhello\r\n", "space after": b"5 \r\nhello\r\n", "not hexadecimal": b"g\r\n", "no size": b"\r\nhello\r\n",
    "LF alone": b"5\nhello\n", "size too long": b"1" + b"0" * 15 + b"\r\n", "data too long": b"5\r\nhello!\r\n0\r\n\r\n",
    "data too short": b"5\r\nhell\r\n0\r\n\r\n", "CR without LF": b"5\r\nhello\r0\r\n\r\n", "bad extension": b"5;=x\r\nhello\r\n",
    "NUL in extension": b'5;a="\0"\r\nhello\r\n', "endless extension": b"5;" + b"a" * 9000, "bad trailer": b"0\r\nno colon\r\n\r\n",
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


def test_head_of_upstream_may_have_blanks_before_a_colon() -> None:
    data = b"HTTP/1.1 200 OK\r\nContent-Type : a\r\nX\t: b:c\r\n\r\nrest"
    assert streamproxy.parse_answer_head(data) == (200, {"content-type": "a", "x": "b:c"}, b"rest")
    for bad in (b" A: b", b"A b: c", b" : c"):
        with pytest.raises(ValueError, match="grammar"):
            streamproxy.parse_answer_head(b"HTTP/1.1 200 OK\r\n%b\r\n\r\n" % bad)
    with pytest.raises(ValueError, match="grammar"):
        streamproxy.parse_head(b"GET / HTTP/1.1\r\nHost : a")


def test_chunk_of_no_data_is_nothing_since_it_would_end_the_body() -> None:
    assert streamproxy.encode_chunk(b"") == b""
    assert streamproxy.encode_chunk(b"x" * 26) == b"1a\r\n" + b"x" * 26 + b"\r\n"


@pytest.mark.parametrize("value", ["a\r\nSet-Cookie: b", "a\nb", "a\0b", "a\x7fb"])
def test_head_cannot_be_forged_by_a_value(value: str) -> None:
    with pytest.raises(ValueError, match="header field"):
        streamproxy.encode_head("HTTP/1.1 200 OK", {"X-Name": value})


# ---------------------------------------------------------------- answers: payload in, text out


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
    "data: in text": ({"choices": [{"delta": {"content": "data: x\n\ndata: [DONE]\n\n"}}]}, b"data: x\n\ndata: [DONE]\n\n"),
}


@pytest.mark.parametrize("name", PAYLOADS)
def test_answer_takes_what_servers_in_wide_use_send(name: str) -> None:
    payload, text = PAYLOADS[name]
    answer, out = answer_to(delta("<"), event(payload), delta(">"), STOP, DONE)
    assert (out, answer.failure, answer.state) == (b"<" + text + b">", None, answer.DONE)


GARBAGE = [b"{", b"not json", b"[]", b"3", b'"text"', b'{"choices": 1}', b'{"choices": [1]}', b'{"choices": [{"delta": 1}]}',
           b'{"choices": [{"delta": {"content": 1}}]}', b"[" * 100000]


@pytest.mark.parametrize("data", GARBAGE, ids=lambda data: data[:40].decode())
def test_answer_garbage_is_a_failure_and_what_came_before_counts(data: bytes) -> None:
    answer, out = answer_to(delta("a") + event(data) + delta("b") + DONE)
    assert out == b"a"
    assert isinstance(answer.failure, streamproxy.Garbled) and answer.state != answer.DONE


@pytest.mark.parametrize("last", [STOP, DONE, STOP + DONE, event(b"[DONE] "), STOP + event(b"oops"), STOP + event(b"oops") + DONE, delta("", "length"), DONE[:-1], DONE[:-2], STOP[:-2]])
def test_answer_complete_after_done_or_finish_reason_blank_line_or_not(last: bytes) -> None:
    for parts in cuts(delta("a") + last):
        answer, out = answer_to(*parts)
        assert (out, answer.state, answer.failure) == (b"a", answer.DONE, None)


@pytest.mark.parametrize("events", [b"", delta("a"), delta("a") + STOP[:-4], b": ping\n\n", ROLE, event({"choices": []})])
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
    assert (answer.pieces, answer.size) == (2, 4)


def passed_to(*parts: bytes, label: str = "text/event-stream", status: int = 200, **options: Any) -> tuple[Any, bytes]:
    """A PassedAnswer after parts and the end of the body, and all that the client has of it."""
    fields = {"content-type": label, "transfer-encoding": "chunked", **options.pop("fields", {})}
    answer = streamproxy.PassedAnswer(**options).start(status, {name: value for name, value in fields.items() if value})
    out = b"".join(map(answer.feed, parts))
    return answer, out + answer.close(None)


def stray(payload: object) -> bytes:
    return json.dumps(payload).encode() + b"\n\n"


def choice(index: int = 0, **members: object) -> bytes:
    return event({"choices": [{"index": index, **members}]})


def part(type: str, text: object) -> dict[str, object]:
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
    "status alone": event({"status": 503, "path": "/x"}),
    "status in words": event({"status": "failed", "reason": "Sorry"}),
    "ok is false": event({"ok": False, "description": "Sorry"}),
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
    "within the choice": choice(delta={}, error={"code": 502, "message": "Sorry"}, finish_reason="error"),
    "within the choice that goes on": choice(delta={}, finish_reason=None, error={"message": "Sorry"}),
    "within the delta": choice(delta={"content": "", "error": "Sorry"}, finish_reason=None),
    "Groq": event({"choices": [EMPTY], "x_groq": {"id": "r", "error": "Sorry"}}),
    "vendor's member alone": event({"data": {"error": {"message": "Sorry"}}}),
    "Tencent": event({"Response": {"Error": {"Code": "AuthFailure", "Message": "Sorry"}, "RequestId": "x"}}),
    "true": event({"error": True, "message": "Sorry"}),
    "number": event({"error": 500, "message": "Sorry"}),
    "text in data": b"data: Error: Sorry\n\n",
    "in brackets": b"data: [ERROR] Sorry\n\n",
    "type of a class": b"data: InternalServerError: Sorry\n\n",
}  # fmt: skip
WORDLESS = ("event: error of nothing", "status alone")


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
    "Azure's filter was down": choice(delta={"content": "x"}, content_filter_results=FILTER_DOWN),
    "Azure's filter of the prompt": event({"choices": [], "prompt_filter_results": FILTER_DOWN}),
    "errors are none": event({"choices": [], "success": True, "errors": [], "messages": ["fine"], "usage": None}),
    "status": event({"status": "processing", "message": "Your request is queued", "progress": 3}),
    "null detail": event({"choices": [GOOD], "detail": None}),
    "logprobs": choice(delta={"content": "x"}, logprobs={"content": [{"token": "error", "logprob": -0.1}]}),
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
    "tool call": choice(delta={"tool_calls": [{"function": {"arguments": '{"error": {"message": "no"}}'}}]}),
    "tool call named error": choice(delta={"tool_calls": [{"index": 0, "id": "error", "function": {"name": "error"}}]}),
    "annotations": choice(delta={"content": "x", "annotations": [{"type": "error", "error": "no"}]}),
    "role": choice(delta={"role": "error", "content": None}),
    "queue": event({"object": "queue", "message": "2 before you"}),
    "news of another type": b'event: status\ndata: {"message": "Searching", "detail": "the web"}\n\n',
    "text of another type": b"event: log\ndata: Error: cache miss\n\n",
    "news, typed": event({"type": "progress", "message": "Searching", "detail": "the web"}),
    "tool that failed": event({"type": "response.output_item.done", "item": {"status": "failed", "error": "no"}}),
    "code that ran": event({"type": "response.code_interpreter_call_code.done", "code": "print(1)"}),
    "tool result": event({"type": "content_block_start", "content_block": {"content": {"error_code": "unavailable"}}}),
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
    for payload in (delta(text), delta(None, reasoning=text), choice(message={"content": text}), event(compact)):
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
        assert answer.state == answer.DONE and answer.finish_reason in (None, "stop")


@pytest.mark.parametrize(
    "reason",
    ["stop", "length", "content_filter", "tool_calls", "eos", "end_turn", "SAFETY", "sensitive", "x", "repetition"],
)
def test_finish_reason_may_be_any_other_and_is_told(reason: str) -> None:
    answer, out = answer_to(delta("a"), delta("", reason), answer=streamproxy.EventAnswer("id"))
    assert json.loads(out.split(b"event: done\ndata: ")[1]) == {"finish_reason": reason, "usage": None}
    assert (answer.state, answer.finish_reason) == (answer.DONE, reason)
    assert passed_to(ROLE, delta("a", reason))[0].finish_reason == reason


def test_finish_reason_may_come_early_or_in_every_chunk_and_what_follows_counts() -> None:
    answer = streamproxy.TextAnswer()
    for first in ({"role": "assistant", "content": ""}, {"reasoning_content": "hm"}):
        assert answer.feed(choice(delta=first, finish_reason="stop")) == b""
        assert answer.state == answer.SETTLED  # it is not in a hurry
    assert answer.feed(delta("a", "stop")) == b"a" and answer.state == answer.ENDING
    life = answer.life
    assert answer.feed(b": ping\n\n") == b"" and answer.life == life  # only an event starts the moment anew
    assert answer.feed(delta("b", "stop")) == b"b" and answer.life > life
    empty = streamproxy.TextAnswer()
    assert empty.feed(ROLE + STOP) == b"" and empty.state == empty.ENDING  # an answer may have no text
    assert answer.close(None) == b"" and answer.state == answer.DONE


DETAIL = part("reasoning.text", "r")
# Where servers put text and reasoning: events, what is told.
TEXT_ELSEWHERE = {
    "other indexes": ([delta(None, reasoning="r"), *(choice(1, delta={"content": x}) for x in "ab")], "ab", "r"),
    "several indexes": ([choice(index, delta={"content": "ab"[index]}) for index in (0, 1)], "ab", ""),
    "index -1": ([choice(-1, delta={"content": "a"}, finish_reason="stop")], "a", ""),
    "two in one": ([event({"choices": [{"index": x, "delta": {"content": "ab"[x]}} for x in (0, 1)]})], "ab", ""),
    "refusal": ([delta(None, refusal="I cannot"), delta(None, refusal=" help.")], "I cannot help.", ""),
    "message in an event": ([choice(message={"role": "assistant", "content": "a"}, finish_reason="stop")], "a", ""),
    "message with reasoning": ([choice(message={"content": "a", "reasoning_content": "r"})], "a", "r"),
    "message behind deltas": ([delta("a"), delta("b"), choice(delta={}, message={"content": "ab"})], "ab", ""),
    "message beside deltas": ([choice(delta={"content": x}, message={"content": "ab"}) for x in "ab"], "ab", ""),
    "messages in pieces": ([choice(message={"content": x}) for x in "ab"], "ab", ""),
    "messages that grow": ([choice(message={"content": x}) for x in ("a", "ab", "ab")], "ab", ""),
    "message of bare text": ([choice(message="a", finish_reason="stop")], "a", ""),
    "completion": ([choice(text="a", finish_reason=None), choice(text="a", finish_reason="stop")], "aa", ""),
    "output_text": ([delta([{"type": "output_text", "text": "a"}])], "a", ""),
    "one part": ([delta(part("text", "a"))], "a", ""),
    "parts of text": ([delta(["a", {"text": "b"}])], "ab", ""),
    "part of a refusal": ([delta([part("refusal", "a")])], "a", ""),
    "other parts": ([delta([part("image_url", {"url": "data:"}), part("text", "a")])], "a", ""),
    "Mistral's thinking": ([delta([part("thinking", [part("text", "r")]), part("text", "a")])], "a", "r"),
    "Anthropic's thinking": ([delta([{**part("thinking", "r"), "signature": "s"}]), delta("a")], "a", "r"),
    "redacted thinking": ([delta([{"type": "redacted_thinking", "data": "x"}]), delta("a")], "a", ""),
    "reasoning": ([delta("", reasoning="r"), delta("a")], "a", "r"),
    "reasoning_content": ([delta(None, reasoning_content="r"), delta("a")], "a", "r"),
    "reasoning_text": ([delta(None, reasoning_text="r"), delta("a")], "a", "r"),
    "details": ([delta("", reasoning_details=[DETAIL, part("reasoning.encrypted", "x")]), delta("a")], "a", "r"),
    "reasoning twice": ([delta("", reasoning="r", reasoning_details=[DETAIL]), delta("a")], "a", "r"),
    "summary": ([delta("", reasoning_details=[part("reasoning.summary", "r")]), delta("a")], "a", "r"),
    "blocks": ([delta("", reasoning_content="r", thinking_blocks=[part("thinking", "r")]), delta("a")], "a", "r"),
    "thinking": ([delta("", thinking="r"), delta("a")], "a", "r"),
    "bare JSON": ([stray({"choices": [{"delta": {"content": "a"}, "finish_reason": "stop"}]}), DONE], "a", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", TEXT_ELSEWHERE)
def test_answer_finds_text_and_reasoning_wherever_they_are(name: str) -> None:
    events, text, reasoning = TEXT_ELSEWHERE[name]
    for answer in (streamproxy.TextAnswer(), streamproxy.EventAnswer("id")):
        answer, out = answer_to(ROLE, *events, STOP, answer=answer)
        assert answer.state == answer.DONE and answer.finish_reason in ("stop", None)
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
        assert answer.usage == {"total_tokens": 3} and answer.state == answer.DONE


def typed(type: str, **members: object) -> bytes:
    return event({"type": type, **members})


RESPONSE = {
    "id": "r",
    "object": "response",
    "model": "m",
    "status": "completed",
    "error": None,
    "usage": {"total_tokens": 3},
}
TYPED_ENDS = {
    "response.completed": typed("response.completed", response=RESPONSE),
    "response.cancelled": typed("response.cancelled", response={"status": "cancelled"}),
    "response.incomplete": typed("response.incomplete", response={**RESPONSE, "incomplete_details": {"reason": "x"}}),
    "response.failed": typed("response.failed", response={**RESPONSE, "error": {"code": "x", "message": "x"}}),
    "message_stop": typed("message_stop"), "type last": event({"response": RESPONSE, "type": "response.completed"}),
}  # fmt: skip


@pytest.mark.parametrize("name", TYPED_ENDS)
@pytest.mark.parametrize("done", [b"", DONE])
@pytest.mark.parametrize("named", [b"", b"event: %b\n"])
def test_typed_streams_are_whole_after_their_end_whether_the_type_is_in_the_json_alone(
    name: str, done: bytes, named: bytes
) -> None:
    last = (named and named % name.encode()) + TYPED_ENDS[name]
    begin = typed("response.created", response={**RESPONSE, "status": "in_progress", "usage": None})
    begin += typed("response.output_text.delta", delta="error") + typed(
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
    assert answer.model == "m" and (answer.usage == {"total_tokens": 3}) == (
        "cancelled" not in name and "message" not in name
    )
    answer, _ = passed_to(begin, last[: len(last) // 2], done)
    assert answer.failure or done


@pytest.mark.parametrize(
    "wrong",
    [
        typed("error", code="server_error", message="x"),
        b"event: error\n" + typed("error", error={"type": "overloaded_error"}),
    ],
)
def test_typed_streams_are_cut_after_an_error(wrong: bytes) -> None:
    for after in (b"", DONE):
        answer, out = passed_to(typed("response.created"), wrong, after)
        assert answer.failure and out == typed("response.created") + wrong + after


def test_messages_tell_model_usage_and_stop_reason() -> None:
    answer, _ = passed_to(
        b"event: message_start\n" + typed("message_start", message={"model": "claude", "usage": {"input_tokens": 3}}),
        b"event: content_block_delta\n" + typed("content_block_delta", delta={"type": "text_delta", "text": "a"}),
        typed("message_delta", delta={"stop_reason": "max_tokens"}, usage={"output_tokens": 9}),
        b"event: message_stop\n" + typed("message_stop"), messages=True)  # fmt: skip
    assert (answer.model, answer.finish_reason, answer.usage) == (
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
            assert (out, answer.state, answer.finish_reason) == (body, answer.DONE, "stop")
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
    assert not answer.eager and not answer.pings and answer.feed(b' {"a"') == b"" and answer.events and answer.life
    answer.close(streamproxy.UpstreamError("cut"))
    assert answer.failure and answer.failure.message == "cut"
    answer, out = passed_to(b' {"a"', b": 1}", label="application/json", fields={"content-length": "9"})
    assert out == b' {"a": 1}' and answer.fields["Content-Length"] == "9" and answer.pieces == 1
    answer = streamproxy.PassedAnswer()
    answer.start(200, {"content-type": "audio/mpeg", "content-length": "4"})
    assert (
        answer.eager
        and answer.fields["Content-Length"] == "4"
        and [answer.feed(b"ab"), answer.feed(b"cd")] == [b"ab", b"cd"]
    )
    large = b"[" + b"0," * 9_000_000
    answer = streamproxy.PassedAnswer()
    answer.start(200, {"content-type": "application/json", "content-length": "18000003"})
    assert [answer.feed(large[:100]), answer.feed(large[100:]), answer.feed(b"0]")] == [b"", large, b"0]"]  # too large
    assert answer.close(None) == b"" and answer.state == answer.DONE and "Content-Length" not in answer.fields


def test_large_json_document_is_only_skimmed() -> None:
    document = {"model": "m", "data": [0] * 200_000, "usage": {"total_tokens": 3, "details": {"x": 1}}}
    answer, _ = passed_to(json.dumps(document).encode(), label="application/json")
    assert (answer.model, answer.usage) == ("m", {"total_tokens": 3, "details": {"x": 1}})


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
    assert answer.failure and answer.encode("message", text="x") == asked.encode("message", text="x")
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
        assert (failure.status, failure.message, failure.logged, failure.document) == (502, message, message, b"")


@pytest.mark.parametrize(
    ("status", "told", "passed"),
    [
        (429, "7", "7"),
        (503, "9", "9"),
        (529, "", "1"),
        (503, "soon", "1"),
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
            check_no_key(repr(told) + repr(answer.request_id))
            assert name == "content-type" or name.title() in told
    answer = streamproxy.PassedAnswer()
    answer.start(200, {name: "x" for name in [*passing, "set-cookie", "openai-organization", "server", "x-hop"]})
    assert {name.lower() for name in answer.fields} == set(passing)
    assert streamproxy.TextAnswer().start(200, {"x-request-id": "r"}).fields == {}
    assert streamproxy.TextAnswer().start(500, {"request-id": "r" * 300}).request_id == "r" * 200
    assert streamproxy.TextAnswer().start(200, {"x-request-id": "r", "request-id": "s"}).request_id == "r"
    assert streamproxy.TextAnswer().start(200, {}).request_id is None


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
        assert len(set(lives)) == len(lives) - isinstance(answer, streamproxy.PassedAnswer) and answer.events == 2
    answer.feed(b"data: {")
    assert answer.life == lives[-1]  # an event that drips in is none yet
    answer = streamproxy.PassedAnswer()
    answer.start(200, {"content-type": "application/json"})
    assert [(answer.feed(b"\n"), answer.life, answer.events) for _ in range(2)] == [(b"", 1, 1), (b"", 2, 2)]


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
        assert asked.pings and asked.content_type == "text/event-stream" and asked.encode("error", error="x") == b""
        assert asked.ping()
        answer = asked.start(429, {"retry-after": "7"})
        answer.feed(b'{"error": {"message": "Slow down"}}')
        answer.close(None)
        assert answer.failure
        told = streamproxy.EventParser().feed(answer.encode("error", error=answer.failure.message))
        assert [event.type for event in told] == ["error" if messages else "message"]
        assert json.loads(told[0].data)["error"]["message"] == "Slow down"
        asked = streamproxy.PassedAnswer(stream=True)
        asked.ping()
        asked.start(200, {"content-type": "text/event-stream"})
        asked.feed(ROLE)
        assert asked.encode("error", error="x") == b""  # upstream's events have begun: a cut tells
    for document, words in ((JSON_ANSWER, "document"), (b'{"error": "Sorry"}', "Sorry")):
        asked = streamproxy.PassedAnswer(stream=True)
        asked.ping()
        asked.start(200, {"content-type": "application/json"})
        assert asked.feed(document) + asked.close(None) == b"" and asked.failure and words in asked.failure.message
        assert asked.encode("error", error=asked.failure.message)


def compact(text: str = "a", reason: str | None = None, **more: object) -> bytes:
    payload = {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": reason}], **more}
    return event(json.dumps(payload, separators=(",", ":")).encode())


C = compact()


@pytest.mark.parametrize(("block", "count"), [
    (C, 1), (C * 3, 3), (C + compact("", "stop"), 0), (compact("", "stop"), 0), (compact("error"), 0),
    (C + compact("error"), 0),
    (C + event({"detail": "x"}), 0), (event({"detail": "x"}), 0), (C + DONE, 0), (DONE, 0), (C + b"event: x\n" + C, 0),
    (b"event: x\n" + C, 0),
    (b": " + C[6:], 0), (C + b": x\n\n", 0), (C + b"\n", 0), (C + C.replace(b"\n\n", b"\r\rdata: x\n\n"), 0),
    (delta("a"), 0), (b"\n\n", 0),
    (event(b'{"choices":[{"finish_reason":null},{"finish_reason":"stop"}]}'), 0),
    (event(b'{"choices":[],"finish_reason":null}'), 0),
    (C.replace(b"data: ", b"data:") * 2, 2), (C + event(b'{"choices":[{"delta":{}}]}'), 2),
])  # fmt: skip
def test_events_in_which_a_completion_just_goes_on(block: bytes, count: int) -> None:
    assert streamproxy.goes_on(block) == count


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
    (delta("a").replace(b"\n\n", b"\rdata: [DONE]\n\n"), False), (b": x\n\n", False),
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


@pytest.mark.parametrize("depth", [10, 300, 900, 5000])
@pytest.mark.parametrize("level", [
    '{"error":%s}', '{"detail":[%s]}', '{"usage":{"x":%s}}', "[%s]", '{"choices":[{"delta":{"content":%s}}]}',
])  # fmt: skip
def test_answers_never_raise_however_deep_json_is(level: str, depth: int) -> None:
    begin, end = level.split("%s")
    data = (begin * depth + '"x"' + end * depth).encode()
    for asked in (streamproxy.TextAnswer(), streamproxy.EventAnswer("id"), streamproxy.PassedAnswer()):
        for status, body in ((200, event(data)), (400, data), (200, data)):
            answer = asked.start(status, {"content-type": "text/event-stream" if body != data else "application/json"})
            answer.feed(body)
            answer.close(None)
            asked = type(asked)("id") if isinstance(asked, streamproxy.EventAnswer) else type(asked)()
            assert json.dumps(answer.usage) and (answer.state == answer.DONE) != bool(answer.failure)


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
                    answer.events,
                    repr(answer.usage),
                    answer.finish_reason,
                    text.state,
                    text.failure and text.failure.message,
                    told,
                    repr(text.usage),
                    text.finish_reason,
                )
            )
        assert len(results) == 1, stream


def test_redactor_takes_out_the_key_its_parts_and_masked_keys() -> None:
    redact = streamproxy.redactor(KEY)
    for secret in (KEY, KEY[:6], KEY[-6:], KEY[3:12], "sk-Qk***********Xb2e"):
        assert redact(f"Wrong key {secret}, see our page.").rstrip("., seourpag") != secret
        check_no_key(redact(f"Wrong key {secret}, see our page."))
        assert redact(f"Wrong key {secret} here") == "Wrong key [redacted] here"
    assert redact("The model `sk-1` does not exist") == "The model `sk-1` does not exist"
    assert streamproxy.redactor("")("nothing to hide") == "nothing to hide"


# ---------------------------------------------------------------- settings

GOOD_SETTINGS = [
    ("bind", "[::1]:0", "[::1]:0"), ("bind", "unix:/run/x y.sock", "unix:/run/x y.sock"), ("bind", "localhost:65535", "localhost:65535"),
    ("upstream", "http://h:1/v1?api-version=3", "http://h:1/v1?api-version=3"), ("auth_header", "api-key: {key}", "api-key: {key}"),
    ("param", "temperature=1", {"max_tokens": 400, "temperature": 1, "frequency_penalty": 0, "presence_penalty": 0}),
    ("param", '{"max_tokens": null, "stop": ["x"]}', {"temperature": 0.5, "frequency_penalty": 0, "presence_penalty": 0, "stop": ["x"]}),
    ("client_param", "model, temperature", ("model", "temperature")), ("idle_timeout", "0", 0.0), ("heartbeat", "0.25", 0.25),
    ("max_body", "1", 1), ("max_streams", "0", 0), ("demo", "TRUE", True), ("allow_anonymous", "off", False), ("log_format", "json", "json"),
]  # fmt: skip
BAD_SETTINGS = [
    ("bind", "8000"), ("bind", ":8000"), ("bind", "h:65536"), ("bind", "h:+1"), ("bind", "::1:8000"), ("bind", "unix:"),
    ("upstream", "ftp://h/"), ("upstream", "file:///etc/passwd"), ("upstream", "h/v1"), ("upstream", "http://u:p@h/"), ("upstream", "http://h:x/"),
    ("upstream", "http:///v1"), ("upstream", "http://h/v 1"), ("upstream", "http://h/#x"), ("auth_header", "Authorization"), ("auth_header", "A: b"),
    ("auth_header", "A b: {key}"), ("auth_header", "A: {key}\r\nB: c"), ("auth_header", "A: {key}{key}"), ("param", "temperature"), ("param", "x={"),
    ("param", "stream=false"), ("param", "messages=[]"), ("param", '{"model": "x"}'), ("param", "[1]"), ("param", "=1"), ("client_param", "messages"),
    ("client_param", "a b"), ("idle_timeout", "-1"), ("idle_timeout", "1e3"), ("idle_timeout", "nan"), ("idle_timeout", "1_0"), ("idle_timeout", "x"),
    ("param", "temperature=NaN"), ("max_body", "0"), ("max_body", "1.5"), ("max_streams", "-1"), ("demo", "maybe"), ("log_format", "xml"),
]  # fmt: skip


def variables(name: str, value: str) -> dict[str, str]:
    return {"OPENAI_API_KEY": KEY, {setting.name: setting.variable for setting in streamproxy.Settings.TABLE}[name]: value}


@pytest.mark.parametrize(("name", "text", "value"), GOOD_SETTINGS)
def test_setting_from_variable_flag_or_text(name: str, text: str, value: object) -> None:
    load = streamproxy.Settings.load
    assert getattr(load(variables(name, text)), name) == value
    repeated = name in ("param", "client_param")
    assert getattr(load({"OPENAI_API_KEY": KEY}, {name: [text] if repeated else text}), name) == value
    assert repeated or getattr(streamproxy.Settings(api_key=KEY, **{name: text}), name) == value  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "text"), BAD_SETTINGS)
def test_bad_setting_is_one_line_that_says_what_is_allowed(name: str, text: str) -> None:
    with pytest.raises(streamproxy.SettingsError) as caught:
        streamproxy.Settings.load(variables(name, text))
    line = str(caught.value)
    assert "\n" not in line and "allowed: " in line and ascii(text) in line
    assert "--" + name.replace("_", "-") in line


def test_settings_flag_over_variable_over_default() -> None:
    environ = {"OPENAI_API_KEY": KEY, "STREAMPROXY_MODEL": "from-variable", "STREAMPROXY_PARAM": '{"temperature": 1}'}
    assert streamproxy.Settings.load({"OPENAI_API_KEY": KEY}).model == "gpt-4.1-mini"
    assert streamproxy.Settings.load(environ).model == "from-variable"
    settings = streamproxy.Settings.load(environ, {"model": "from-flag", "param": ["max_tokens=", "top_p=0.5"]})
    assert settings.model == "from-flag"
    assert settings.param == {"temperature": 0.5, "frequency_penalty": 0, "presence_penalty": 0, "top_p": 0.5}
    assert streamproxy.Settings.load({**environ, "STREAMPROXY_MODEL": ""}).model == "gpt-4.1-mini"


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


@pytest.mark.parametrize("bind", ["0.0.0.0:0", "[::]:0", "192.0.2.1:80", "example.com:80"])
def test_settings_others_are_let_in_only_where_that_is_said(bind: str) -> None:
    with pytest.raises(streamproxy.SettingsError, match="--allow-anonymous"):
        streamproxy.Settings(api_key=KEY, bind=bind)
    assert streamproxy.Settings(api_key=KEY, bind=bind, allow_anonymous=True).bind == bind


def test_redactor_is_linear_and_keeps_json_whole() -> None:
    redact = streamproxy.redactor(KEY)
    assert redact("x" * 1_000_000) == "x" * 1_000_000  # and the test ends
    assert redact('{"error":{"message":"Unknown***model","k":"' + KEY + '"}}') == '{"error":{"message":"[redacted]","k":"[redacted]"}}'


def test_settings_show_no_key() -> None:
    check_no_key(repr(streamproxy.Settings(api_key=KEY)))


# ---------------------------------------------------------------- the relay, with a clock of the test's own


class Stage:
    """A stream between two socket pairs, moved turn by turn; the test is client, upstream and clock."""

    def __init__(self, answer: Any = None, head: bytes = STREAM_HEAD, **settings: Any) -> None:
        self.now = 1000.0
        self.relay = streamproxy.Relay(lambda: self.now)
        near, far = socket.socketpair()
        self.client = Peer(far)
        near.setblocking(False)
        self.near = near
        self.ended = False
        self.news = 0
        self.pool = streamproxy.Pool(self.relay)
        self.call = streamproxy.Call("/", b"")
        self.stream = streamproxy.Stream(
            self.relay, near, answer or streamproxy.TextAnswer(), self.call, streamproxy.Settings(api_key=KEY, **settings),
            lambda: (b"HEAD ", True), self.on_news)  # fmt: skip
        self.stream.begin()
        self.head = head

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.drop(streamproxy.Aborted("The test is over."))
        self.relay.close()
        self.pool.close_all()
        self.near.close()
        self.client.sock.close()
        if hasattr(self, "upstream"):
            self.upstream.sock.close()

    def on_news(self) -> None:
        self.news += 1
        self.ended = self.stream.ended

    def connected(self) -> None:
        self.call.connected_at = self.now

    def carry(self) -> None:
        """Upstream's head has come."""
        near, far = socket.socketpair()
        near.setblocking(False)
        self.upstream = Peer(far)
        self.upstream.send(self.head)
        self.connected()
        self.stream.carry(streamproxy.Connection(near, "upstream", self.pool))
        self.turn()

    def turn(self) -> None:
        self.relay.turn(0)

    def block(self) -> None:
        """Send until the client, which does not read, takes no more."""
        while not self.stream._blocked:
            self.upstream.send(chunk(delta("x" * 30000)))
            self.turn()

    def unblock(self) -> None:
        """Read until it does."""
        while self.stream._blocked:
            self.client.more()
            self.turn()

    def at(self, seconds: float) -> bytes:
        """Turn with the clock at seconds; what the client then has."""
        self.now = 1000.0 + seconds
        self.turn()
        self.client.sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            self.client.more()
        self.client.sock.settimeout(DEADLINE)
        taken, self.client.seen = self.client.seen, b""
        return taken


def test_relay_moves_an_answer_piece_by_piece() -> None:
    with Stage() as stage:
        stage.carry()
        stage.upstream.send(chunk(ROLE))
        assert stage.at(0) == b""  # nothing leaves before there is text
        stage.upstream.send(chunk(delta("a")))
        assert stage.at(0) == b"HEAD 1\r\na\r\n"
        stage.upstream.send(chunk(delta("b")), chunk(delta("cd")))
        assert stage.at(0) == b"3\r\nbcd\r\n"  # what arrived together leaves together
        stage.upstream.send(chunk(STOP), chunk(DONE))
        assert stage.at(0) == b"0\r\n\r\n"
        assert stage.ended and stage.stream.intact and not stage.stream.failure


def test_relay_all_that_came_with_the_head_is_taken() -> None:
    texts = [f"{n:05} " for n in range(1200)]
    with Stage(head=STREAM_HEAD + b"".join(chunk(delta(text)) for text in texts)) as stage:
        stage.carry()  # 100 KB: more than one read, and less than the buffer the head is read through in 3.14
        got = b"".join(stage.at(0) for _ in range(20))
        assert streamproxy.ChunkedDecoder().feed(got[len("HEAD ") :]).decode() == "".join(texts)


@pytest.mark.parametrize(("limits", "due", "status"), [
    ({}, 10, 504), ({"connect_timeout": 3.0}, 3, 504), ({"connect_timeout": 0.0, "total_timeout": 50.0}, 50, 504),
    ({"connect_timeout": 0.0, "total_timeout": 0.0, "first_byte_timeout": 7.0}, None, 0),
])
def test_relay_connecting_has_a_clock_of_its_own(limits: dict[str, float], due: float | None, status: int) -> None:
    with Stage(**limits) as stage:
        assert stage.at((due or 100000) - 0.1) == b"" and not stage.ended
        stage.at(due or 200000)
        assert stage.ended == bool(due)
        assert not due or (stage.stream.failure and stage.stream.failure.status == status)


@pytest.mark.parametrize("head_at", [None, 8])
def test_relay_first_event_clock_starts_when_connected_and_anew_with_comments(head_at: float | None) -> None:
    with Stage(first_byte_timeout=20.0) as stage:
        stage.at(5)
        stage.connected()
        if head_at:
            stage.at(head_at)
            stage.carry()
            stage.call.connected_at = 1005.0
            for second in range(9, 61):
                stage.upstream.send(chunk(b": ping\n\n"))
                assert stage.at(second) == b""
        late = 80.0 if head_at else 25.0
        assert stage.at(late - 0.1) == b"" and not stage.ended
        stage.at(late)
        assert stage.stream.failure and stage.stream.failure.status == 504
        assert not head_at or stage.upstream.gone()


def test_relay_idle_clock_starts_anew_with_every_event_and_comment() -> None:
    with Stage(idle_timeout=5.0) as stage:
        stage.carry()
        for second in range(0, 40, 4):
            stage.upstream.send(chunk(delta("x")))
            assert stage.at(second).endswith(b"1\r\nx\r\n")
        stage.upstream.send(chunk(b": ping\n\n"))
        stage.at(40.9)
        stage.at(45.8)
        assert not stage.ended
        stage.at(45.9)
        assert stage.stream.failure and stage.stream.failure.status == 504 and not stage.stream.intact
        assert stage.upstream.gone()


def test_relay_total_clock() -> None:
    with Stage(total_timeout=100.0) as stage:
        stage.carry()
        for second in range(0, 100, 20):
            stage.upstream.send(chunk(delta("x")))
            stage.at(second)
        stage.at(99.9)
        assert not stage.ended
        stage.at(100)
        assert stage.ended and stage.stream.failure


def test_relay_no_limits_means_none() -> None:
    limits = dict.fromkeys(["connect_timeout", "first_byte_timeout", "idle_timeout", "total_timeout", "client_timeout", "heartbeat"], 0.0)
    with Stage(streamproxy.EventAnswer("id"), **limits) as stage:
        stage.carry()
        stage.upstream.send(chunk(delta("x")))
        assert stage.at(0)
        assert stage.at(1e7) == b"" and not stage.ended


@pytest.mark.parametrize("late", ["total time-out", "abort"])
def test_relay_a_settled_answer_is_complete_whatever_comes_then(late: str) -> None:
    with Stage(total_timeout=50.0) as stage:
        stage.carry()
        stage.upstream.send(chunk(delta("x")))
        stage.at(49.5)
        stage.upstream.send(chunk(STOP))
        stage.at(49.6)
        if late == "abort":
            stage.stream.fail(streamproxy.Aborted("The server is shutting down."))
        assert stage.at(50.0).endswith(b"0\r\n\r\n")
        assert stage.ended and stage.stream.intact and not stage.stream.failure


def test_relay_aborts_also_what_begins_after_it_aborted_the_rest() -> None:
    with Stage() as stage:
        stage.relay.aborted = streamproxy.Aborted("The server is shutting down.")
        stage.relay.streams.clear()  # as if this one began now
        stage.carry()
        assert stage.ended and stage.stream.failure is stage.relay.aborted and stage.upstream.gone()
        news: list[object] = []
        inbox = streamproxy.Inbox(stage.relay, stage.near, "peer", 5.0)
        inbox.wait(lambda data, seen: False, news.append)
        assert news == [inbox] and inbox.failure is stage.relay.aborted and not stage.relay.inboxes


def give_back(stage: Stage) -> None:
    """Have the relay find that a warm connection was closed."""
    near, far = socket.socketpair()
    near.setblocking(False)
    connection = streamproxy.Connection(near, "upstream", stage.pool)
    connection.reused = True
    stage.connected()
    stage.stream.carry(connection)
    far.close()
    stage.turn()
    assert stage.news == 1 and stage.call.fresh and not stage.ended and not stage.relay.streams


def test_relay_connect_clock_starts_anew_where_a_stream_is_opened_afresh() -> None:
    class Upstream:
        def open(self, call: streamproxy.Call) -> None:
            call.on_wait()
            stage.turn()
            assert stage.relay.streams == {stage.stream} and not stage.ended
            raise streamproxy.UpstreamError("Seen.")

    with Stage(connect_timeout=10.0) as stage:
        give_back(stage)
        stage.now += 11  # for a thread
        stage.stream.open(Upstream())
        stage.turn()
        assert stage.ended and stage.stream.failure.message == "Seen."


def test_relay_aborts_what_it_gave_back_to_be_opened_afresh() -> None:
    with Stage() as stage:
        give_back(stage)
        stage.relay.aborted = streamproxy.Aborted("The server is shutting down.")
        stage.stream.open(None)  # which is not asked
        stage.turn()
        assert stage.news == 2 and stage.ended and stage.stream.failure is stage.relay.aborted


def test_relay_idle_clock_does_not_count_time_in_which_we_did_not_listen() -> None:
    with Stage(idle_timeout=5.0, client_timeout=0.0) as stage:
        stage.carry()
        stage.block()
        stage.now += 100
        stage.unblock()
        stage.now += 4.9
        stage.turn()
        assert not stage.ended


def test_relay_head_leaves_after_one_heartbeat_in_sse_mode_and_errors_come_as_events() -> None:
    with Stage(streamproxy.EventAnswer("id"), heartbeat=5.0, connect_timeout=60.0) as stage:
        assert stage.at(4.9) == b""
        assert stage.at(5) == b"HEAD 7\r\n: ping\n\r\n"  # before upstream has said a word
        assert stage.at(9.9) == b""
        assert stage.at(10) == b"7\r\n: ping\n\r\n"
        stage.stream.fail(streamproxy.UpstreamError("Upstream cannot be reached: it is a test."))
        sent = stage.at(10)
        assert sent.endswith(b'event: error\ndata: {"error": "Upstream cannot be reached: it is a test."}\n\n\r\n0\r\n\r\n')
        assert stage.ended and stage.stream.intact and stage.stream.failure


def test_relay_pings_only_in_silence() -> None:
    with Stage(streamproxy.EventAnswer(""), heartbeat=5.0) as stage:
        stage.carry()
        for second in (3, 6, 9):
            stage.upstream.send(chunk(delta("x")))
            assert b"ping" not in stage.at(second)
        assert stage.at(13.9) == b""
        assert stage.at(14) == b"7\r\n: ping\n\r\n"


def test_relay_an_eventsource_knows_its_id_before_the_first_ping() -> None:
    with Stage(streamproxy.EventAnswer("id7", reconnects=True), heartbeat=5.0, connect_timeout=60.0) as stage:
        assert stage.at(5) == b"HEAD 10\r\nid: id7\n\n: ping\n\r\n"
        assert stage.at(10) == b"7\r\n: ping\n\r\n"
        stage.carry()
        stage.upstream.send(chunk(delta("x")))
        assert b'id: id7\ndata: {"text": "x"}\n\n' in stage.at(10)


@pytest.mark.parametrize("later", [(), (delta("", usage=1), event({"choices": [], "usage": {"total_tokens": 3}}))])
def test_relay_after_finish_reason_usage_is_awaited_for_a_moment_only(later: tuple[bytes, ...]) -> None:
    with Stage() as stage:
        stage.carry()
        stage.upstream.send(chunk(delta("x", "stop")))
        stage.at(0)
        stage.upstream.send(*map(chunk, later))
        assert stage.at(0.9) == b"" and not stage.ended
        late = 1.9 if later else 1.0  # the moment starts anew with each event
        assert stage.at(late - 0.1) == b"" and not stage.ended
        assert stage.at(late) == b"0\r\n\r\n"
        assert stage.ended and stage.stream.intact and not stage.stream.failure
        assert stage.stream.answer.usage == ({"total_tokens": 3} if later else None)


def test_relay_a_client_that_does_not_read_stops_upstream_being_read_and_nothing_is_lost() -> None:
    with Stage() as stage:
        stage.carry()
        stage.upstream.sock.setblocking(False)
        texts = [f"{n:06} " for n in range(50000)]
        wire, sent = b"".join(chunk(delta(text)) for text in texts) + chunk(DONE), 0
        for _ in range(500):  # until nobody takes any more
            with contextlib.suppress(BlockingIOError):
                sent += stage.upstream.sock.send(wire[sent : sent + 100000])
            stage.turn()
        assert sent < len(wire)
        assert 0 < len(stage.stream._pending) < streamproxy.READ_SIZE
        got = b""
        while not stage.ended:
            with contextlib.suppress(BlockingIOError):
                sent += stage.upstream.sock.send(wire[sent : sent + 100000])
            got += stage.at(0)
        stage.near.close()
        decoder = streamproxy.ChunkedDecoder()
        assert decoder.feed((got + stage.client.rest())[len("HEAD ") :]).decode() == "".join(texts)
        assert decoder.complete


def test_relay_a_client_that_stops_reading_is_cut_after_client_timeout_of_no_progress() -> None:
    with Stage(client_timeout=30.0, idle_timeout=5.0) as stage:
        stage.carry()
        stage.block()
        stage.now += 29
        stage.turn()
        assert not stage.ended
        stage.unblock()  # progress, and the clock starts anew
        stage.block()
        stage.now += 29.9
        stage.turn()
        assert not stage.ended
        stage.now += 0.1
        stage.turn()
        assert isinstance(stage.stream.failure, streamproxy.Aborted) and not stage.stream.intact
        assert stage.upstream.gone()


def test_relay_truncated_after_back_pressure_still_gives_all_text_that_came() -> None:
    with Stage() as stage:
        stage.carry()
        total = 0
        while not stage.stream._blocked:
            stage.upstream.send(chunk(delta("x" * 30000)))
            total += 30000
            stage.turn()
        stage.upstream.sock.close()
        got = b""
        while not stage.ended:
            stage.client.more()
            stage.turn()
        stage.near.close()
        got = stage.client.rest()
        assert got.count(b"x") == total and not got.endswith(b"0\r\n\r\n")
        assert stage.stream.failure and stage.stream.failure.ending == "truncated"


def test_relay_settled_while_blocked_still_ends_a_moment_after_the_client_reads() -> None:
    with Stage() as stage:
        stage.carry()
        stage.upstream.send(chunk(delta("x" * 30000)) * 5, chunk(delta("x", "stop")))
        while stage.stream._ending_at is None:
            stage.turn()
            if stage.stream._blocked:
                stage.unblock()
        stage.stream._block()
        stage.now += 5.0
        stage.turn()
        stage.stream._unblock()
        stage.now += 1.0
        stage.turn()
        assert stage.ended and stage.stream.intact


def test_relay_a_fault_in_one_stream_ends_that_stream_alone(caplog: Any) -> None:
    with Stage() as stage:
        stage.carry()
        stage.stream.answer.feed = None  # type: ignore[assignment,method-assign]
        stage.upstream.send(chunk(delta("x")))
        stage.turn()
        assert stage.ended and stage.stream.failure and stage.stream.failure.status == 500
        stage.relay.post(lambda: caplog.records.clear())
        stage.turn()  # and the relay goes on


def test_relay_without_epoll_reads_and_writes_as_well(provider: Provider, monkeypatch: Any) -> None:
    monkeypatch.delattr(streamproxy.select, "epoll", raising=False)  # type: ignore[attr-defined]
    text = "x" * 3_000_000
    with running(provider) as server, Client(server).ask(PROMPT) as client, provider.take() as upstream:
        sender = threading.Thread(target=lambda: (upstream.start(*[delta(text)] * 12), upstream.finish()))
        sender.start()
        assert client.head().status == 200
        wait_for(lambda: [stream for stream in server.relay.streams if stream._blocked])
        got = bytearray(client.seen)
        while not got.endswith(b"0\r\n\r\n"):
            got += client.sock.recv(1_000_000)
        assert streamproxy.ChunkedDecoder().feed(bytes(got)).decode() == text * 12  # more than sockets hold
        sender.join()
        assert isinstance(server.relay._epoll, streamproxy._Selector)


def test_relay_posts_from_many_threads_all_run_in_order() -> None:
    relay, seen = streamproxy.Relay(), []
    relay.start()
    threads = [threading.Thread(target=lambda n=n: [relay.post(lambda i=i: seen.append((n, i))) for i in range(200)]) for n in range(8)]  # type: ignore[misc]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    relay.stop()
    assert len(seen) == 1600
    assert all([i for n, i in seen if n == number] == list(range(200)) for number in range(8))


# ---------------------------------------------------------------- POST /


def test_post_text_leaves_piece_by_piece_as_it_arrives(server: Any, provider: Provider) -> None:
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


def test_post_asks_upstream_as_the_script_did(server: Any, provider: Provider) -> None:
    with Client(server).ask({"prompt": "ä", "temperature": 9, "model": "x"}), provider.take() as upstream:
        assert upstream.head.startswith("POST /v1/chat/completions HTTP/1.1\r\n")
        assert f"\r\nAuthorization: Bearer {KEY}\r\n" in upstream.head
        assert "\r\nContent-Type: application/json\r\n" in upstream.head
        assert "\r\nAccept-Encoding: identity\r\n" in upstream.head
        assert json.loads(upstream.body) == {
            "model": "gpt-4.1-mini", "messages": [{"role": "user", "content": "ä"}], "stream": True,
            "max_tokens": 400, "temperature": 0.5, "frequency_penalty": 0, "presence_penalty": 0,
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
                "model": "n", "messages": [{"role": "system", "content": "Be kind."}, *messages], "stream": True, "top_p": 1, "seed": 7,
            }  # fmt: skip


def test_post_with_no_key_sends_no_auth_header(provider: Provider) -> None:
    with running(provider, api_key="") as server, Client(server).ask(PROMPT), provider.take() as upstream:
        assert "authorization" not in upstream.head.lower()


def test_post_as_events(server: Any, provider: Provider) -> None:
    with Client(server).ask(PROMPT, Accept="text/html, text/event-stream;q=0.9", X_Request_Id="id-7") as client, provider.take() as upstream:
        upstream.start(delta("a"))
        head = client.head()
        assert (head.fields["Content-Type"], head.fields["X-Request-Id"]) == ("text/event-stream", "id-7")
        assert client.chunk() == b'id: id-7\ndata: {"text": "a"}\n\n'
        upstream.event(delta(None, reasoning="hm"))
        assert client.chunk() == b'event: reasoning\ndata: {"text": "hm"}\n\n'
        upstream.finish()
        assert client.body() == b'event: done\ndata: {"finish_reason": "stop", "usage": null}\n\n'


def test_post_a_json_completion_is_an_answer_in_one_piece(server: Any, provider: Provider) -> None:
    document = json.dumps({"choices": [{"message": {"content": "Hällo"}, "finish_reason": "stop"}], "usage": {"total_tokens": 3}}).encode()
    for framing, body in [(b"Content-Length: %d" % len(document), document), (b"Transfer-Encoding: chunked", chunk(document) + b"0\r\n\r\n")]:
        with Client(server).ask(PROMPT) as client, provider.take() as upstream:
            upstream.send(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n", framing, b"\r\n\r\n", body[:20])
            upstream.send(body[20:])
            assert (client.head().status, client.body().decode()) == (200, "Hällo")


@pytest.mark.parametrize(("body", "sentence"), [
    (b"", "Invalid JSON data"), (b"prompt=x", "Invalid JSON data"), (b'{"prompt": "x"', "Invalid JSON data"),
    (b'{"prompt": NaN}', "Invalid JSON data"), (b'{"prompt": "\xff"}', "Invalid JSON data"), (b"[" * 200000, "nested too deeply"),
    (b'{"prompt": "a", "prompt": "b"}', "named twice"), (b'{"prompt": "a", "x": {"y": 1, "y": 1}}', "named twice"),
    (b'{"prompt": "a", "n": 1' + b"0" * 5000 + b"}", "too large"), (b'{"prompt": "a", "n": 1e999}', "too large"),
    (b'{"prompt": "a\\ud83d"}', "surrogate"), (b'\xef\xbb\xbf{"prompt": "a"}', "Invalid JSON data"), ('{"prompt": "a"}'.encode("utf-16"), "Invalid JSON data"),
    (b"[]", "object"), (b'"x"', "object"), (b"null", "object"), (b"{}", "object"), (b'{"prompt": "x", "messages": []}', "either"),
    (b'{"prompt": ""}', '"prompt"'), (b'{"prompt": 1}', '"prompt"'), (b'{"prompt": null}', '"prompt"'), (b'{"messages": []}', '"messages"'),
    (b'{"messages": "x"}', '"messages"'), (b'{"messages": [1]}', '"messages"'), (b'{"messages": [{"role": "user"}]}', '"messages"'),
    (b'{"messages": [{"role": 1, "content": "x"}]}', '"messages"'),
])
def test_post_bad_body_is_400_and_upstream_is_not_asked(server: Any, provider: Provider, body: bytes, sentence: str) -> None:
    with Client(server) as client:
        status, error = client.ask(body).error()
        assert status == 400 and sentence in error
        assert client.ask(method="GET", path="/healthz").head().status == 200  # on the same connection
    assert provider.nobody_came()


REFUSED = [
    (b"GET /nothing HTTP/1.1\r\nHost: localhost\r\n\r\n", 404, {}), (b"GET /healthz/ HTTP/1.1\r\nHost: localhost\r\n\r\n", 404, {}),
    (b"PUT / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n\r\nx", 405, {"Allow": "GET, HEAD, OPTIONS, POST"}), (b"DELETE /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n", 405, {"Allow": "GET, HEAD, OPTIONS"}),
    (b"POST / HTTP/1.1\r\nHost: localhost\r\n\r\n", 411, {}), (b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip\r\n\r\n0\r\n\r\n", 400, {}),
    (b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999\r\n\r\n", 413, {}), (b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n", 400, {}),
    (b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: +1\r\n\r\nx", 400, {}), (b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nx", 400, {}),
    (b"GET / HTTP/2.0\r\n\r\n", 505, {}), (b"GET / HTTP/1.1 x\r\n\r\n", 400, {}), (b"GET\r\n\r\n", 400, {}), (b"GET /\r\n", 400, {}),
    (b"GET /" + b"x" * 70000 + b" HTTP/1.1\r\n\r\n", 414, {}), (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n", 431, {}),
    (b"GET / HTTP/1.1\r\nA: " + b"x" * 70000 + b"\r\n\r\n", 431, {}),
    (b"GET /?prompt= HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n\r\n", 400, {}), (b"GET /?prompt=a&prompt=b HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n\r\n", 400, {}),
    (b"GET /?prompt=%ff HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n\r\n", 400, {}),
]  # fmt: skip


@pytest.mark.parametrize(("request_bytes", "status", "fields"), REFUSED, ids=lambda value: str(value)[:50])
def test_refused_request_gets_a_status_and_a_sentence(server: Any, provider: Provider, request_bytes: bytes, status: int, fields: dict[str, str]) -> None:
    with Client(server) as client:
        client.send(request_bytes)
        head = client.head()
        assert head.status == status and fields.items() <= head.fields.items()
        assert list(json.loads(client.exactly(int(head.fields["Content-Length"])))) == ["error"]
    assert provider.nobody_came()


H = b"Host: localhost\r\n"
SMUGGLED = b"GET /smuggled HTTP/1.1\r\n" + H + b"\r\n"

# Requests that are refused, or taken, with SMUGGLED behind or within them; its path must never be asked for.  {n} is its length.
HIDING = {
    # RFC 9112 section 6.1: a coding beside a length, an unknown coding, a coding in HTTP/1.0
    "6.1 chunked and a length": (b"POST / HTTP/1.1\r\n" + H + b"Content-Length: {n}\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "6.1 a length and chunked": (b"POST / HTTP/1.1\r\n" + H + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n", 400),
    "6.1 gzip, chunked": (b"POST / HTTP/1.1\r\n" + H + b"Transfer-Encoding: gzip, chunked\r\n\r\n", 400),
    "6.1 chunked, identity": (b"POST / HTTP/1.1\r\n" + H + b"Transfer-Encoding: chunked, identity\r\n\r\n", 400),
    "6.1 chunked twice": (b"POST / HTTP/1.1\r\n" + H + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
    "6.1 xchunked": (b"POST / HTTP/1.1\r\n" + H + b"Transfer-Encoding: xchunked\r\n\r\n", 400),
    "6.1 chunked with a vertical tab": (b"POST / HTTP/1.1\r\n" + H + b"Transfer-Encoding: \x0bchunked\r\n\r\n", 400),
    "6.1 empty coding": (b"POST / HTTP/1.1\r\n" + H + b"Transfer-Encoding:\r\n\r\n", 400),
    "6.1 HTTP/1.0 chunked": (b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "6.1 chunked for a GET": (b"GET / HTTP/1.1\r\n" + H + b"Transfer-Encoding: chunked\r\n\r\n", 400),
    # section 6.2 and 6.3: one length of digits
    **{f"6.3 length {value!r}": (b"POST / HTTP/1.1\r\n" + H + b"Content-Length: " + value + b"\r\n\r\n", 400)
       for value in (b"+1", b"-1", b"0x5", b"1_0", b"1.0", b"1e1", b"5,5", b"5, 5", b"0,{n}", b"1 0", b"", b"\xb2", b"9" * 16, b"\x0b1", b'"1"')},
    "6.3 two lengths": (b"POST / HTTP/1.1\r\n" + H + b"Content-Length: 0\r\nContent-Length: {n}\r\n\r\n", 400),
    "6.3 the same length twice": (b"POST / HTTP/1.1\r\n" + H + b"Content-Length: {n}\r\nContent-Length: {n}\r\n\r\n", 400),
    "6.3 two lengths for a GET": (b"GET /healthz HTTP/1.1\r\n" + H + b"Content-Length: 0\r\nContent-Length: {n}\r\n\r\n", 400),
    "6.3 a GET's body": (b"GET /healthz HTTP/1.1\r\n" + H + b"Content-Length: {n}\r\n\r\n", 400),
    "6.3 a body for a method not there": (b"POST /healthz HTTP/1.1\r\n" + H + b"Content-Length: {n}\r\n\r\n", 405),
    "6.3 a body for a path not there": (b"POST /nothing HTTP/1.1\r\n" + H + b"Content-Length: {n}\r\n\r\n", 404),
    "6.3 a body for an unknown method": (b"BREW / HTTP/1.1\r\n" + H + b"Content-Length: {n}\r\n\r\n", 501),
    # section 5.1: no space before the colon; 5.2: no folding; 2.2: CR and LF
    "5.1 space before the colon": (b"GET /healthz HTTP/1.1\r\n" + H + b"Content-Length : {n}\r\n\r\n", 400),
    "5.1 tab before the colon": (b"GET /healthz HTTP/1.1\r\n" + H + b"Content-Length\t: {n}\r\n\r\n", 400),
    "5.1 space before the coding's colon": (b"POST / HTTP/1.1\r\n" + H + b"Transfer-Encoding : chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n", 400),
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
    "3 two spaces": (b"GET  /healthz HTTP/1.1\r\n" + H + b"\r\n", 400), "3 a tab": (b"GET\t/healthz HTTP/1.1\r\n" + H + b"\r\n", 400),
    "3 space in the target": (b"GET /a /healthz HTTP/1.1\r\n" + H + b"\r\n", 400), "3 no version": (b"GET /healthz\r\n" + H + b"\r\n", 400),
    "3 lower-case version": (b"GET /healthz http/1.1\r\n" + H + b"\r\n", 400), "3 HTTP/1.10": (b"GET /healthz HTTP/1.10\r\n" + H + b"\r\n", 400),
    "3 HTTP/0.9": (b"GET /healthz\r\n", 400), "3 HTTP/2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505), "3 TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    "3 control character in the target": (b"GET /\x1b HTTP/1.1\r\n" + H + b"\r\n", 400), "3 space before the method": (b" GET /healthz HTTP/1.1\r\n" + H + b"\r\n", 400),
    # section 3.2: one Host, and what the target may be
    "3.2 no Host": (b"GET /healthz HTTP/1.1\r\n\r\n", 400), "3.2 two Hosts": (b"GET /healthz HTTP/1.1\r\n" + H + H + b"\r\n", 400),
    "3.2 Host with a space": (b"GET /healthz HTTP/1.1\r\nHost: local host\r\n\r\n", 400), "3.2 empty Host": (b"GET /healthz HTTP/1.1\r\nHost:\r\n\r\n", 400),
    "3.2 Host with a path": (b"GET /healthz HTTP/1.1\r\nHost: localhost/x\r\n\r\n", 400), "3.2 Host with a user": (b"GET /healthz HTTP/1.1\r\nHost: a@localhost\r\n\r\n", 400),
    "3.2.2 absolute form of another": (b"GET http://other/healthz HTTP/1.1\r\n" + H + b"\r\n", 404), "3.2.2 absolute form of ours": (b"GET http://LOCALHOST/healthz HTTP/1.1\r\n" + H + b"\r\n", 200),
    "3.2.3 authority form": (b"CONNECT localhost:80 HTTP/1.1\r\n" + H + b"\r\n", 404), "3.2.4 asterisk form": (b"OPTIONS * HTTP/1.1\r\n" + H + b"\r\n", 404),
    "3.2 not normalised": (b"GET /x/../healthz HTTP/1.1\r\n" + H + b"\r\n", 404), "3.2 percent": (b"GET /%68ealthz HTTP/1.1\r\n" + H + b"\r\n", 404),
    # section 7.1
    "7.1 size with a sign": (b"POST / HTTP/1.1\r\n" + H + b"Transfer-Encoding: chunked\r\n\r\n+{n}\r\n", 400),
    "7.1 LF behind a size": (b"POST / HTTP/1.1\r\n" + H + b"Transfer-Encoding: chunked\r\n\r\n0\n\r\n", 400),
    "7.1 chunk too short": (b"POST / HTTP/1.1\r\n" + H + b"Transfer-Encoding: chunked\r\n\r\n3\r\nab\r\n0\r\n\r\n", 400),
    "7.1 whole, and not JSON": (b"POST / HTTP/1.1\r\n" + H + b"Transfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n", 400),
    "sizes: fields": (b"GET /healthz HTTP/1.1\r\n" + H + b"A: b\r\n" * 100 + b"\r\n", 431), "sizes: head": (b"GET /healthz HTTP/1.1\r\n" + H + b"A: " + b"b" * 66000 + b"\r\n\r\n", 431),
    "sizes: request line": (b"GET /" + b"b" * 70000 + b" HTTP/1.1\r\n" + H + b"\r\n", 414),
}  # fmt: skip
# Those whose framing is clear, so that the connection goes on, with what follows.
KEPT = {"6.3 a GET's body", "6.3 a body for a method not there", "6.3 a body for a path not there", "6.3 a body for an unknown method", "3.2.2 absolute form of another",
        "3.2.2 absolute form of ours", "3.2.3 authority form", "3.2.4 asterisk form", "3.2 not normalised", "3.2 percent", "7.1 whole, and not JSON"}  # fmt: skip


@pytest.mark.parametrize("name", HIDING)
def test_no_request_hides_in_another(server: Any, provider: Provider, caplog: Any, name: str) -> None:
    data, status = HIDING[name]
    kept, body = name in KEPT, b"{n}" in HIDING[name][0]
    with Client(server) as client:
        with contextlib.suppress(ConnectionError):
            client.send(data.replace(b"{n}", b"%d" % len(SMUGGLED)), SMUGGLED if body or not kept else b"", b"GET /healthz HTTP/1.1\r\n" + H + b"Connection: close\r\n\r\n")
        got = client.rest()
    assert [int(code) for code in re.findall(rb"HTTP/1\.1 (\d{3}) ", got)] == ([status, 200] if kept else [status])
    assert kept or b"\r\nConnection: close\r\n" in got
    assert not [entry for entry in log_entries(caplog, 1) if "smuggled" in entry["path"]] and provider.nobody_came()


@pytest.mark.parametrize(("version", "chunked"), [("1.2", True), ("1.0", False)])
def test_other_minor_versions_are_framed_as_the_one_they_are_like(server: Any, provider: Provider, version: str, chunked: bool) -> None:
    with Client(server).ask(PROMPT, version=version) as client, provider.take() as upstream:
        upstream.start(A)
        assert ("Transfer-Encoding" in client.head().fields) == chunked
        upstream.finish()
        assert client.exactly(1 if not chunked else 4) == (b"1\r\na" if chunked else b"a")


def test_no_limits_in_a_real_server(provider: Provider) -> None:
    names = ["connect_timeout", "first_byte_timeout", "idle_timeout", "total_timeout", "client_timeout", "heartbeat"]
    for value in (0.0, 999999999.0):
        with running(provider, **dict.fromkeys(names, value)) as server, Client(server).ask(PROMPT) as client:
            with provider.take() as upstream:
                upstream.start(A)
                upstream.finish()
                assert client.head().status == 200 and client.body() == b"a"


def test_gate_lets_in_as_many_as_it_has_places_and_the_others_in_their_order() -> None:
    gate, begun = streamproxy.Gate(), []
    count = streamproxy.MAX_WORKING + 3
    for number in range(count):
        gate.enter(functools.partial(begun.append, number))
    assert begun == list(range(count - 3))
    gate.leave()
    assert begun == list(range(count - 2))
    with gate.outside():  # by one of those, whose place the next takes
        assert begun == list(range(count - 1))
        gate.leave()
        gate.leave()
    assert begun == list(range(count))
    for _ in range(streamproxy.MAX_WORKING):
        gate.leave()
    gate.enter(functools.partial(begun.append, count))
    assert begun[-1] == count


def test_upstream_heads_that_stall_half_way_hold_up_nobody_else(server: Any, provider: Provider) -> None:
    for _ in range(streamproxy.MAX_WORKING + 4):
        Client(server).ask(PROMPT)
        provider.take().send(b"HTTP/1.1 200 OK\r\nContent-T")
    with Client(server).ask(method="GET", path="/healthz") as client:
        assert client.head().status == 200


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


def test_kept_connection_takes_one_request_after_another_even_sent_at_once(server: Any, provider: Provider) -> None:
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


def test_http_1_0_is_delimited_by_close(server: Any, provider: Provider) -> None:
    with Client(server).ask(PROMPT, version="1.0", Connection="keep-alive") as client, provider.take() as upstream:
        upstream.start(delta("Hello"))
        head = client.head()
        assert "Transfer-Encoding" not in head.fields and head.fields["Connection"] == "close"
        assert client.exactly(5) == b"Hello"
        upstream.finish()
        assert client.rest() == b""


def test_http_1_0_cut_answer_is_a_reset(server: Any, provider: Provider) -> None:
    with Client(server).ask(PROMPT, version="1.0") as client, provider.take() as upstream:
        upstream.start(delta("Hello"))
        assert client.head().status == 200 and client.exactly(5) == b"Hello"
        upstream.sock.close()
        with pytest.raises(ConnectionResetError):
            client.rest()


def test_max_streams_more_get_503_at_once(provider: Provider) -> None:
    with running(provider, max_streams=1) as server:
        with Client(server).ask(PROMPT), provider.take() as upstream:
            with Client(server).ask(PROMPT) as second:
                head = second.head()
                assert (head.status, head.fields["Retry-After"]) == (503, "1")
            upstream.start(STOP)
            upstream.gone()
        assert wait_for(lambda: not server.limits._total)  # type: ignore[attr-defined]
        with Client(server).ask(PROMPT) as third, provider.take() as upstream:
            upstream.start(delta("x"))
            assert third.head().status == 200


# ---------------------------------------------------------------- access


def token_file(folder: Path, text: str, mode: int = 0o640) -> str:
    path = folder / "tokens"
    path.write_text(text)
    path.chmod(mode)
    return str(path)


ALICE, BOB = "alice-5f1c9e7a", "bob-0c4d8b21"


@pytest.mark.parametrize("path", ["/", "/?prompt=x", "/v1/chat/completions", "/v1/models"])
def test_token_is_needed_where_it_costs_money(provider: Provider, tmp_path: Path, caplog: Any, path: str) -> None:
    tokens = token_file(tmp_path, f"# people\nalice {ALICE}\n\nbob {BOB}\n")
    how: dict[str, Any] = {"path": path, "method": "POST" if path in ("/", "/v1/chat/completions") else "GET"}
    body = None if how["method"] == "GET" else {**ASKED, "prompt": "x"} if path != "/" else PROMPT
    accept = EVENTS if path == "/?prompt=x" else {}
    with running(provider, token_file=tokens) as server, Client(server) as client:
        for fields in ({}, {"Authorization": "Bearer x"}, {"Authorization": f"Basic {ALICE}"}, {"x-api-key": ALICE + "x"}, {"api-key": "\xff"}):
            client.ask(body, **how, **accept, **fields)
            head = client.head()
            assert (head.status, head.fields["WWW-Authenticate"]) == (401, "Bearer")
            client.exactly(int(head.fields["Content-Length"]))
        for name, fields in [("alice", {"Authorization": f"bearer {ALICE}"}), ("bob", {"x-api-key": BOB}), ("alice", {"api-key": ALICE}), ("alice", {"Authorization": "Basic x", "api-key": ALICE})]:
            with Client(server).ask(body, **how, **accept, **fields) as other, provider.take() as upstream:
                assert ALICE not in upstream.head and BOB not in upstream.head
                upstream.send(error_answer(404))
                assert other.head().status == 404
            wait_for(lambda name=name: [record for record in caplog.records if getattr(record.msg, "get", {}.get)("client") == name])
    assert ALICE not in caplog.text and BOB not in caplog.text


def test_token_is_not_needed_for_the_page_and_health(tmp_path: Path) -> None:
    with running(None, token_file=token_file(tmp_path, f"a {ALICE}")) as server, Client(server) as client:
        for path in ("/", "/healthz", "/readyz"):
            client.send(f"HEAD {path} HTTP/1.1\r\nHost: any.example\r\n\r\n".encode())
            assert client.head().status == 200


def test_token_file_is_read_again_and_a_broken_one_is_not_taken(provider: Provider, tmp_path: Path, caplog: Any) -> None:
    path = Path(token_file(tmp_path, f"alice {ALICE}"))
    with running(provider, token_file=str(path)) as server, Client(server) as client:
        def status(token: str) -> int:
            client.ask(method="GET", path="/v1/models/x", Authorization=f"Bearer {token}")
            head = client.head()
            client.exactly(int(head.fields["Content-Length"]))
            return head.status
        assert (status(ALICE), status(BOB)) == (403, 401)
        path.write_text(f"alice {ALICE}\nbob {BOB}\n")
        assert (status(ALICE), status(BOB)) == (403, 403)
        for text, mode, words in [("alice\n", 0o640, "entry 1"), (f"bob {BOB} x\n", 0o640, "entry 1"), (f"a/b {BOB}", 0o640, "entry 1"), ("\udcff", 0o640, "UTF-8"), (f"bob {BOB}", 0o644, "others")]:
            path.write_bytes(text.encode(errors="surrogateescape"))
            path.chmod(mode)
            caplog.clear()
            assert (status(ALICE), status(BOB), status("x")) == (403, 403, 401)
            assert caplog.text.count("the token file was not taken") == 1 and words in caplog.text and BOB not in caplog.text
        path.unlink()
        assert status(ALICE) == 403
        path.write_text(f"bob {BOB}\n")
        path.chmod(0o600)
        assert (status(ALICE), status(BOB)) == (401, 403)


@pytest.mark.parametrize(("text", "mode"), [("", 0o644), ("x", 0o600), ("a b c", 0o600), (None, 0)])
def test_token_file_that_cannot_be_used_is_a_bad_setting(tmp_path: Path, text: str | None, mode: int) -> None:
    path = token_file(tmp_path, text, mode) if text is not None else str(tmp_path / "none")
    assert run("--demo", "--token-file", path)[::2][0] == 2
    with pytest.raises(streamproxy.SettingsError, match="--token-file"):
        streamproxy.Access(streamproxy.Settings(demo=True, token_file=path))


def test_tokens_let_other_addresses_be_bound(tmp_path: Path) -> None:
    assert streamproxy.Settings(api_key=KEY, bind="0.0.0.0:0", token_file=token_file(tmp_path, f"a {ALICE}")).bind == "0.0.0.0:0"


@pytest.mark.parametrize(("host", "settings", "status"), [
    ("localhost", {}, 411), ("LOCALHOST:1", {}, 411), ("127.0.0.1:9", {}, 411), ("127.9.9.9", {}, 411), ("[::1]:9", {}, 411), ("evil.example", {}, 403),
    ("localhost.evil.example", {}, 403), ("192.0.2.1", {}, 403), ("chat.example", {"allow_host": ("chat.example",)}, 411), ("CHAT.example:443", {"allow_host": ("chat.example",)}, 411),
    ("x.chat.example", {"allow_host": ("chat.example",)}, 403), ("chat.example.", {"allow_host": ("chat.example",)}, 403), ("0.0.0.0", {}, 403),
])
def test_host_of_a_server_without_tokens(host: str, settings: dict[str, Any], status: int) -> None:
    with running(None, **settings) as server, Client(server) as client:
        client.send(f"POST / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        got, message = client.error()
        assert got == status and (status != 403 or "--allow-host" in message)


def test_host_does_not_matter_with_tokens_or_over_a_unix_socket(tmp_path: Path) -> None:
    for settings in ({"token_file": token_file(tmp_path, f"a {ALICE}")}, {"bind": f"unix:{tmp_path}/s"}):
        with running(None, **settings) as server, Client(server) as client:
            client.send(b"GET / HTTP/1.1\r\nHost: any.example\r\n\r\n")
            assert client.head().status == 200


ORIGIN = "https://app.example"


@pytest.mark.parametrize(("fields", "ok"), [
    ({}, True), ({"Origin": "http://localhost"}, True), ({"Origin": "https://LOCALHOST"}, True), ({"Origin": ORIGIN}, True), ({"Origin": "https://evil.example"}, False),
    ({"Origin": "null"}, False), ({"Origin": ORIGIN + ".evil.example"}, False), ({"Origin": ORIGIN + ":444"}, False), ({"Origin": "http://app.example"}, False),
    ({"Origin": "http://localhost:81"}, False), ({"Origin": "file://"}, False), ({"Sec-Fetch-Site": "cross-site"}, False), ({"Sec-Fetch-Site": "same-origin", "Origin": "http://x"}, True),
    ({"Sec-Fetch-Site": "cross-site", "Origin": ORIGIN}, True), ({"Sec-Fetch-Site": "none"}, True), ({"Sec-Fetch-Site": "same-site"}, False), ({"Sec-Fetch-Site": "same-site", "Origin": "http://x.localhost"}, False),
])
@pytest.mark.parametrize("path", ["/", "/?prompt=x", "/v1/chat/completions"])
def test_origin_of_a_page(provider: Provider, fields: dict[str, str], ok: bool, path: str) -> None:
    with running(provider, allow_origin=(ORIGIN,)) as server, Client(server) as client:
        how: dict[str, Any] = {"method": "GET", **EVENTS} if "?" in path else {"body": {**ASKED, "prompt": "x"} if path != "/" else PROMPT, "Content-Type": "text/plain"}
        client.ask(path=path, **how, **fields)
        if ok:
            provider.take().send(error_answer(404))
        else:
            assert provider.nobody_came()
        head = client.head()
        assert head.status == (404 if ok else 403)
        assert head.fields.get("Access-Control-Allow-Origin") == (ORIGIN if fields.get("Origin") == ORIGIN else None)


def test_cors_preflight_says_exactly_what_is_allowed(tmp_path: Path) -> None:
    wanted = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os,x-evil,cookie"}
    with running(None, allow_origin=(ORIGIN,), token_file=token_file(tmp_path, f"a {ALICE}")) as server, Client(server) as client:
        client.ask(method="OPTIONS", path="/v1/chat/completions", Origin=ORIGIN, **wanted)
        fields = client.head()
        assert fields.status == 204 and {name: value for name, value in fields.fields.items() if name.startswith("Access") or name == "Vary"} == {
            "Access-Control-Allow-Origin": ORIGIN, "Access-Control-Expose-Headers": "X-Request-Id, Retry-After", "Access-Control-Allow-Methods": "POST, OPTIONS",
            "Access-Control-Allow-Headers": "authorization, content-type, x-stainless-os", "Access-Control-Max-Age": "600", "Vary": "Origin"}  # fmt: skip
        client.ask(method="OPTIONS", path="/", Origin="https://evil.example", **wanted)
        status, message = client.error()
        assert status == 403 and "--allow-origin" in message
        client.ask(method="OPTIONS", path="/")
        assert client.head().fields["Allow"] == "GET, HEAD, OPTIONS, POST"
        client.ask(PROMPT, Origin=ORIGIN)
        head = client.head()
        assert (head.status, head.fields["Access-Control-Allow-Origin"]) == (401, ORIGIN)  # the page can read why


@pytest.mark.parametrize(("forwarded", "trusted", "client"), [
    ("", (), "127.0.0.1"), ("192.0.2.7", (), "192.0.2.7"), ("192.0.2.7, 198.51.100.1", (), "198.51.100.1"), ("192.0.2.7, 198.51.100.1", ("198.51.100.0/24",), "192.0.2.7"),
    ("198.51.100.2, 198.51.100.1", ("198.51.100.0/24",), "198.51.100.2"), ("192.0.2.7, nonsense", (), "127.0.0.1"), ("nonsense, 192.0.2.7", ("192.0.2.7",), "192.0.2.7"),
    ("2001:db8::7", (), "2001:db8::7"), ("192.0.2.7, ", (), "127.0.0.1"), ("192.0.2.7\t", (), "192.0.2.7"), ("127.0.0.1", (), "127.0.0.1"),
])
def test_forwarded_address_counts_from_trusted_proxies_alone(caplog: Any, forwarded: str, trusted: tuple[str, ...], client: str) -> None:
    settings = streamproxy.Settings.load({"OPENAI_API_KEY": KEY, "STREAMPROXY_TRUSTED_PROXY": ",".join(trusted)})
    access = streamproxy.Access(settings)
    assert access.address_of("127.0.0.1", forwarded) == client
    assert access.address_of("203.0.113.9", forwarded) == "203.0.113.9"
    assert access.address_of("unix", forwarded) == (client if client != "127.0.0.1" or forwarded == "127.0.0.1" else "unix")


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
            upstream.start(STOP)
            upstream.gone()
        wait_for(lambda: not server.limits._total)
        with ask("2001:db8::2") as second, provider.take() as upstream:
            upstream.start(A)
            assert second.head().status == 200


def test_limits_of_requests_a_minute_say_truly_when_to_come_again() -> None:
    now = 100.0
    limits = streamproxy.Limits(streamproxy.Settings(api_key=KEY, requests_per_minute=6), lambda: now)
    def ask(client: str) -> int:
        try:
            with limits.place(client):
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


def test_limits_forget_quiet_clients() -> None:
    now = 100.0
    limits = streamproxy.Limits(streamproxy.Settings(api_key=KEY, requests_per_minute=6), lambda: now)
    for number in range(streamproxy.MAX_QUIET_CLIENTS + 100):
        now += 0.02
        with limits.place(str(number)):
            pass
    assert len(limits._clients) < streamproxy.MAX_QUIET_CLIENTS


def test_limits_look_seldom_for_whom_to_forget_where_nobody_is_quiet() -> None:
    looks = []
    limits = streamproxy.Limits(streamproxy.Settings(api_key=KEY), lambda: looks.append(1) or 100.0)
    count = 2 * streamproxy.MAX_QUIET_CLIENTS
    for number in range(count):
        with limits.place(str(number)):
            pass
    assert len(limits._clients) == count and len(looks) == count + 1  # to enter, and once to forget


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


# ---------------------------------------------------------------- hostile input


def test_more_connections_than_are_allowed_are_told_so(provider: Provider) -> None:
    with running(provider, max_streams=1) as server:
        most = 2 + streamproxy.SPARE_CONNECTIONS
        clients = [Client(server) for _ in range(most)]
        wait_for(lambda: len(server._connections) == most)
        with Client(server) as extra:
            head = extra.head()
            assert (head.status, head.fields["Retry-After"]) == (503, "1") and extra.exactly(int(head.fields["Content-Length"])) and extra.rest() == b""
        clients.pop().sock.close()
        wait_for(lambda: len(server._connections) < most)
        with Client(server).ask(method="GET", path="/healthz") as client:
            assert client.head().status == 200
        for client in clients:
            client.sock.close()


@pytest.mark.parametrize("start", [b"", b"\r\n"])
def test_head_is_there_at_its_end_and_not_before_wherever_it_is_cut(start: bytes) -> None:
    head = start + b"POST /?a=b HTTP/1.1\r\nHost: localhost\r\nA: \xe9\r\nContent-Length: 5\r\n\r\n"
    for size in range(len(head)):
        assert streamproxy.has_head(bytearray(head), size) and streamproxy.has_head(bytearray(head + b"GET"), size)
        for seen in range(size + 1):
            assert not streamproxy.has_head(bytearray(head[:size]), seen)


@pytest.mark.parametrize("data", [
    b"\x16", b"\r\n\x16", b" ", b"GET\n", b"GET /\r\n", b"\r\nGET /\r\n", b"GET / HTTP/1.1\n", b"GET / HTTP/2.0\r\n", b"\r\n\r\n", b"\n", b"\rG",
    b"x" * 65537, b"\r\n" + b"x" * 65537, b"GET / HTTP/1.1\r\nA: " + b"x" * 65536,
], ids=lambda data: str(data[:20]))  # fmt: skip
def test_head_that_cannot_come_any_more_is_told_at_once(data: bytes) -> None:
    assert streamproxy.has_head(bytearray(data)) and streamproxy.has_head(bytearray(data), len(data) - 1)


def test_request_behind_an_empty_line_is_not_acted_on_before_its_end(server: Any, provider: Provider, caplog: Any) -> None:
    with Client(server) as client:
        client.send(b"\r\nPOST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5")
        wait_for(lambda: any(inbox.data for inbox in server.relay.inboxes))
        hidden = b"GET /readyz HTTP/1.1\r\nHost: localhost\r\n\r\n"
        client.send(b"5\r\n\r\n" + hidden.ljust(55, b" "))
        assert client.error()[0] == 400
        client.sock.shutdown(socket.SHUT_WR)
        assert client.rest() == b""
    assert len(log_entries(caplog, 1)) == 1 and provider.nobody_came()


def test_empty_line_behind_a_body_is_no_request(provider: Provider, caplog: Any) -> None:
    with running(provider, client_timeout=0.3) as server, Client(server) as client:
        client.send(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n\r\n")
        head = client.head()
        assert head.status == 200 and client.exactly(3) == b"ok\n" and client.rest() == b""
    assert len(log_entries(caplog, 1)) == 1


def test_stop_answers_who_connected_while_the_relay_was_busy(provider: Provider) -> None:
    with running(provider, drain_timeout=0.0) as server:
        busy, go = threading.Event(), threading.Event()
        server.relay.post(lambda: (busy.set(), go.wait(DEADLINE)))
        busy.wait(DEADLINE)
        with Client(server).ask(PROMPT) as client:
            stopping = threading.Thread(target=server.stop)
            stopping.start()
            wait_for(lambda: server.draining)
            go.set()
            stopping.join(DEADLINE)
            assert client.rest().startswith(b"HTTP/1.1 503 ") and not stopping.is_alive() and not server._connections


def test_request_that_a_warm_connection_did_not_take_does_not_count_as_sent(provider: Provider, monkeypatch: Any) -> None:
    with Stage() as stage:
        upstream = streamproxy.Upstream(streamproxy.Settings(upstream=provider.url), streamproxy.Gate(), stage.relay)
        stage.client.sock.close()  # of the connection that the pool holds for warm
        monkeypatch.setattr(upstream.pool, "take", lambda key: streamproxy.Connection(stage.near, key, upstream.pool))
        sent_at = []

        def connect(request: Any) -> Any:
            sent_at.append(stage.call.connected_at)
            raise OSError(errno.ECONNREFUSED, "refused")

        monkeypatch.setattr(upstream, "_connect", connect)
        with pytest.raises(streamproxy.ProxyError, match="connection refused"):
            upstream.open(stage.call)
        assert sent_at == [None]


def test_head_and_body_must_arrive_within_one_timeout(server: Any) -> None:
    with Client(server) as client:
        client.send(b"P")
        inbox = wait_for(lambda: [inbox for inbox in server.relay.inboxes if inbox.data])[0]
        late_at = inbox.late_at
        client.send(b"OST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 20\r\n\r\n{")
        wait_for(lambda: not inbox.data and inbox in server.relay.inboxes)
        assert inbox.late_at == late_at


def test_connection_without_a_request_holds_no_thread(server: Any) -> None:
    before = threading.active_count()
    clients = [Client(server) for _ in range(100)]
    for client in clients[::2]:
        client.send(b"POST / HTTP/1.1\r\nHost: a\r\n")
    wait_for(lambda: len(server._connections) == 100 and sum(bool(inbox.data) for inbox in server.relay.inboxes) == 50)
    assert threading.active_count() == before
    for client in clients:
        client.sock.close()


def test_streams_and_kept_connections_hold_no_thread(server: Any, provider: Provider) -> None:
    before = threading.active_count()  # none has come to this server
    clients = [Client(server) for _ in range(60)]
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
    assert wait_for(threading.active_count, lambda now: now == before) and len(server._connections) == 60
    for number, upstream in upstreams.items():
        if number % 3 == 2:
            upstream.start(A)
        upstream.finish()
        if number % 3 == 2:
            assert clients[number].head().status == 200
        assert clients[number].body() == (b"a" if number % 3 == 2 else b"")
    for client in clients:
        assert client.ask(method="GET", path="/healthz").head().status == 200


def test_thread_whose_connection_ended_takes_the_next(server: Any, monkeypatch: Any, caplog: Any) -> None:
    monkeypatch.setattr(streamproxy, "IDLE_THREAD_TIMEOUT", DEADLINE)
    for _ in range(3):
        with Client(server).ask(method="GET", path="/healthz") as client:
            client.head()
        wait_for(lambda: len(server._idle_threads) == 1)
    assert len(log_entries(caplog, 3)) == 3 and len({record.thread for record in caplog.records}) == 1


def test_idle_thread_leaves(server: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(streamproxy, "IDLE_THREAD_TIMEOUT", 0.01)
    before = threading.active_count()  # none has come to this server
    for _ in range(20):
        with Client(server).ask(method="GET", path="/healthz") as client:
            client.head()
        wait_for(lambda: (threading.active_count(), server._idle_threads), lambda now: now == (before, []))


def test_connection_for_which_no_thread_is_left_waits_for_one(server: Any, monkeypatch: Any, caplog: Any) -> None:
    start, failed = threading.Thread.start, []

    def fail(self: threading.Thread) -> None:
        failed.append(self)
        if len(failed) <= 2 * streamproxy.MAX_WORKING:
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", fail)
    clients = [Client(server).ask(method="GET", path="/healthz") for _ in range(2 * streamproxy.MAX_WORKING)]
    for client in clients:
        assert client.head().status == 200
    assert "no thread was started" in caplog.text


def test_threads_that_wait_for_a_client_go_on_while_no_other_can_be_started(server: Any, monkeypatch: Any, caplog: Any) -> None:
    slow = [Client(server) for _ in range(streamproxy.MAX_WORKING + 2)]
    for client in slow:
        client.send(b"POST / HTTP/1.1\r\n" + H + b"Content-Length: 9\r\n\r\n{")
    wait_for(lambda: len(server.relay.inboxes) == len(slow) and server.gate._places == streamproxy.MAX_WORKING)
    wait_for(lambda: not server._idle_threads)

    def fail(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        others = [Client(server).ask(method="GET", path="/healthz") for _ in range(2 * streamproxy.MAX_WORKING)]
        wait_for(lambda: "no thread was started" in caplog.text)
        for client in slow:
            client.send(b"        ")
            assert client.error()[0] == 400
        for client in others:  # by those threads, when they have done their own
            assert client.head().status == 200
    wait_for(lambda: server.gate._places == streamproxy.MAX_WORKING)


def test_stream_for_whose_end_no_thread_is_left_is_seen_to_later(server: Any, provider: Provider, monkeypatch: Any, caplog: Any) -> None:
    with Client(server).ask(PROMPT) as client, provider.take() as upstream:
        upstream.start(A)
        client.head()
        wait_for(lambda: not server._idle_threads)
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", lambda self: (_ for _ in ()).throw(RuntimeError("can't start new thread")))
            upstream.finish()
            assert client.body() == b"a"
            wait_for(lambda: "no thread was started" in caplog.text)
        assert client.ask(method="GET", path="/healthz").head().status == 200  # the connection was kept
    assert [entry["ending"] for entry in log_entries(caplog, 2)] == ["complete", "complete"]


@pytest.mark.parametrize("how", ["close", "reset"])
def test_client_that_leaves_while_its_request_waits_for_a_thread_costs_nothing(
    server: Any, provider: Provider, caplog: Any, how: str
) -> None:
    with Client(server).ask(PROMPT) as other, provider.take() as upstream:
        upstream.start(A)
        upstream.finish()
        assert other.head().status == 200 and other.body() == b"a"
        log_entries(caplog, 1)
        wait_for(lambda: idle(server) == 1 and server.gate._places == streamproxy.MAX_WORKING)
        for _ in range(streamproxy.MAX_WORKING):
            server.gate.enter(lambda: None)
        client = Client(server).ask({"prompt": "of one that left"})
        wait_for(lambda: server.gate._waiting)
        leave(client, how)
        for _ in range(streamproxy.MAX_WORKING):
            server.gate.leave()
        assert log_entries(caplog, 2)[1]["ending"] == "disconnect"
        other.ask({"prompt": "of one that stayed"})
        upstream.read_request()  # on the same connection, and the first that comes
        assert b"of one that stayed" in upstream.body
    wait_for(lambda: not server._connections)
    assert server.gate._places == streamproxy.MAX_WORKING


def test_connection_for_which_no_descriptor_is_left_is_accepted_later(server: Any, monkeypatch: Any, caplog: Any) -> None:
    accept = server.get_request

    def get_request() -> Any:
        if not caplog.records:
            raise OSError(errno.EMFILE, "Too many open files")
        return accept()

    monkeypatch.setattr(server, "get_request", get_request)
    with Client(server).ask(method="GET", path="/healthz") as client:
        assert client.head().status == 200
    assert "a connection was not accepted" in caplog.text


def test_2000_connections_opened_and_dropped_leave_nothing_behind(server: Any, provider: Provider) -> None:
    def good() -> None:
        with Client(server).ask(method="GET", path="/healthz") as client:
            assert client.head().status == 200
        wait_for(lambda: not server._connections and not server._idle_threads)
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


@pytest.mark.parametrize("kind", [("-H",), ("-B", "-s", "8192"), ("-X", "-k", "1")], ids=["slow heads", "slow bodies", "slow readers"])
def test_500_slow_connections_leave_a_good_client_undisturbed(provider: Provider, tmp_path: Path, kind: tuple[str, ...]) -> None:
    with running(provider, client_timeout=2.0) as server:
        command = [program("slowhttptest"), "-c", "500", "-r", "250", "-i", "1", "-l", "3", "-p", "1", "-u", server.url + "/", *kind]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as attack:
            wait_for(lambda: len(server._connections) > 300)
            while attack.poll() is None:
                with Client(server).ask(PROMPT) as client, provider.take() as upstream:
                    upstream.start(A)
                    assert client.head().status == 200 and client.chunk() == b"a"
                    upstream.event(delta("b"))
                    assert client.chunk() == b"b"
                    upstream.finish()
                    assert client.chunk() == b""
                Peer.opened.clear()
        wait_for(lambda: not server._connections)


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
            out[at:at] = rng.choice([b"\r", b"\n", b"\r\n", b"\0", b" ", b":", b"\xff", b'"', b"{", b"0", b"-1", b"[" * 50, b"\r\n\r\n", b"\\ud800", b"chunked", b",", b"9" * 20])
    return bytes(out)


def test_fuzzed_heads_and_bodies_never_stop_the_server(provider: Provider, caplog: Any) -> None:
    rng = random.Random(11)
    bodies = [json.dumps(PROMPT).encode(), json.dumps({**ASKED, "x": [1.5, None, {"y": "\u00e4"}]}).encode()]
    seeds = [b"GET /?prompt=a HTTP/1.1\r\n" + H + b"Accept: text/event-stream\r\n\r\n", b"OPTIONS / HTTP/1.1\r\n" + H + b"Origin: http://localhost\r\n\r\n"]
    for body in bodies:
        seeds.append(b"POST / HTTP/1.1\r\n" + H + b"Content-Length: %d\r\nX-Forwarded-For: 192.0.2.1\r\n\r\n" % len(body) + body)
        seeds.append(b"POST /v1/chat/completions HTTP/1.1\r\n" + H + b"Transfer-Encoding: chunked\r\nAuthorization: Bearer x\r\n\r\n" + chunk(body) + b"0\r\n\r\n")
    with running(provider, upstream="http://127.0.0.1:9/v1", client_timeout=5.0) as server:
        for number in range(2000):
            with Client(server) as client:
                with contextlib.suppress(ConnectionError):
                    client.send(mutated(rng, rng.choice(seeds)))
                    client.sock.shutdown(socket.SHUT_WR)
                    for answer in re.findall(rb"HTTP/1\.1 (\d\d\d) ", client.rest()):
                        assert answer in (b"200", b"204", b"400", b"403", b"404", b"405", b"411", b"413", b"415", b"431", b"501", b"502", b"505", b"100"), answer
            Peer.opened.clear()
            if number % 100 == 0:
                with Client(server).ask(method="GET", path="/healthz") as client:
                    assert client.head().status == 200
    assert "fault" not in caplog.text and "Traceback" not in caplog.text


def test_fuzzed_answers_of_upstream_never_stop_the_server(provider: Provider, caplog: Any) -> None:
    rng = random.Random(12)
    body = ROLE + A + delta("b", reasoning="c") + event({"choices": [], "usage": {"total_tokens": 1}}) + STOP + DONE
    document = json.dumps({"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}]}).encode()
    seeds = [STREAM_HEAD + chunk(body) + b"0\r\n\r\n", CLOSE_HEAD + body, OK + JSON + b"Content-Length: %d\r\n\r\n" % len(document) + document,
             error_answer(429, b'{"error": {"message": "x"}}', b"Retry-After: 1\r\n"), b"HTTP/1.1 103 X\r\n\r\n" + STREAM_HEAD + chunk(body)]
    with running(provider) as server:
        for number in range(2000):
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


# ---------------------------------------------------------------- GET /


def test_query_of_raw_utf_8_is_read_as_such(server: Any, provider: Provider) -> None:
    with Client(server) as client:
        client.send("GET /?prompt=Grüße HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n\r\n".encode())
        with provider.take() as upstream:
            assert json.loads(upstream.body)["messages"][0]["content"] == "Grüße"


def test_post_that_reconnects_is_not_a_new_prompt(server: Any, provider: Provider) -> None:
    with Client(server).ask(PROMPT, Last_Event_ID="1", **EVENTS) as client:
        assert client.head().status == 204
    assert provider.nobody_came()


def test_surrogate_halves_in_what_upstream_says_are_replaced(server: Any, provider: Provider) -> None:
    for bad, expected in [(b'{"error": {"message": "bad \\ud83d"}}', b"event: error"), (b'{"choices": [{"finish_reason": "\\ud83d"}]}', b"event: done")]:
        with Client(server).ask(PROMPT, **EVENTS) as client, provider.take() as upstream:
            upstream.start(A, event(bad), DONE)
            client.head()
            assert expected in client.body()


def test_eventsource_gets_its_answer_once(server: Any, provider: Provider) -> None:
    with Client(server).ask(method="GET", path="/?prompt=Gr%C3%BC%C3%9Fe+%26", **EVENTS) as client, provider.take() as upstream:
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


def test_page_has_a_policy_that_lets_in_its_own_script_and_style_only(server: Any) -> None:
    with Client(server).ask(method="GET", path="/?x") as client:
        head = client.head()
        page = client.exactly(int(head.fields["Content-Length"])).decode()
        policy = head.fields["Content-Security-Policy"]
    assert head.fields["Content-Type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in policy and "unsafe" not in policy and policy.count("'sha256-") == 2
    assert not re.search(r"""(?i)https?://|src=|@import|url\(|\son\w+=|\sstyle=|innerHTML""", page)
    with Client(server).ask(method="HEAD") as client:
        assert client.head().fields["Content-Length"] == str(len(page.encode()))


def test_health(server: Any) -> None:
    with Client(server).ask(method="GET", path="/healthz?x") as client:
        assert client.head().status == 200 and client.exactly(3) == b"ok\n"


# ---------------------------------------------------------------- upstreams that misbehave

OK = b"HTTP/1.1 200 OK\r\n"
SSE = b"Content-Type: text/event-stream\r\n"
JSON = b"Content-Type: application/json\r\n"
A = delta("a")


def error_answer(status: int, body: bytes = b"", fields: bytes = b"") -> bytes:
    return b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n%b\r\n" % (status, len(body), fields) + body


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
    "422 with the key in it": (error_answer(422, b'{"detail": "' + KEY.encode() + b" " + KEY[:9].encode() + b'"}'), 422, "error"),
    "422 endless": (b"HTTP/1.1 422 X\r\n\r\n" + b"x" * 999 + b"." * 100000, 422, "error"),
    "429": (error_answer(429, b'{"error": {"message": "Slow down"}}', b"Retry-After: 7\r\n"), 429, "error"),
    "500": (error_answer(500, b'{"error": {"message": "secret trace"}}'), 502, "error"),
    "500 cut": (b"HTTP/1.1 500 X\r\nContent-Length: 99\r\n\r\nx", 502, "error"),
    "503": (error_answer(503, fields=b"Retry-After: 9\r\n"), 503, "error"),
    "529": (error_answer(529, b'{"error": {"message": "Sorry"}}'), 503, "error"),
}


@pytest.mark.parametrize("name", BEFORE_THE_FIRST_TEXT)
@pytest.mark.parametrize("mode", ["text", "events"])
def test_failure_before_the_first_text_still_has_its_status(server: Any, provider: Provider, caplog: Any, name: str, mode: str) -> None:
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


def test_upstream_message_reaches_the_client_where_it_is_about_the_request(server: Any, provider: Provider) -> None:
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


@pytest.mark.parametrize(("told", "passed"), [(b"7", "7"), (b"Sun, 22 Nov 2026 10:00:00 GMT", "Sun, 22 Nov 2026 10:00:00 GMT"), (b"soon", "1")])
def test_retry_after_of_429_passes_if_it_is_one(server: Any, provider: Provider, told: bytes, passed: str) -> None:
    with Client(server).ask(PROMPT) as client, provider.take() as upstream:
        upstream.send(error_answer(429, fields=b"Retry-After: " + told + b"\r\n"))
        assert client.head().fields["Retry-After"] == passed


# What upstream sends after the first text, before it closes (or resets).
AFTER_THE_FIRST_TEXT = {
    "closes": b"", "ends its body with no end event": b"0\r\n\r\n", "closes within an event": chunk(delta("b")[:-9]), "closes within a chunk": b"ff\r\ndata",
    "breaks the chunked coding": b"0x5\r\nhello\r\n", "sends garbage": chunk(event(b"oops")), "sends an error": chunk(event({"error": "Sorry"})),
    "sends an error and [DONE]": chunk(event({"error": {"message": "Sorry"}})) + chunk(STOP) + chunk(DONE) + b"0\r\n\r\n",
    "sends an error event": chunk(b'event: error\ndata: {"message": "Sorry"}\n\n'),
}  # fmt: skip


@pytest.mark.parametrize("name", AFTER_THE_FIRST_TEXT)
@pytest.mark.parametrize("reset", [False, True])
def test_failure_after_the_first_text_leaves_the_body_unterminated(server: Any, provider: Provider, caplog: Any, name: str, reset: bool) -> None:
    with Client(server).ask(PROMPT) as client, provider.take() as upstream:
        upstream.start(A)
        assert client.head().status == 200 and client.chunk() == b"a"
        upstream.send(AFTER_THE_FIRST_TEXT[name])
        (upstream.reset if reset else upstream.sock.close)()
        assert client.rest() == b""  # neither a last chunk nor a second answer
    assert log_entries(caplog, 1)[0]["ending"] == ("truncated" if "closes" in name or "ends" in name and "sends" not in name else "error") or reset


@pytest.mark.parametrize("name", AFTER_THE_FIRST_TEXT)
def test_failure_after_the_first_text_is_an_event_in_sse_mode(server: Any, provider: Provider, name: str) -> None:
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
    "[DONE] and the last chunk": chunk(STOP) + chunk(DONE) + b"0\r\n\r\n", "[DONE] alone, and nothing after it is waited for": chunk(DONE),
    "finish_reason, body ends": chunk(STOP) + b"0\r\n\r\n", "[DONE] with no blank line": chunk(b"data: [DONE]") + b"0\r\n\r\n",
    "finish_reason beside text": chunk(delta("", "stop")) + b"0\r\n\r\n", "trailers": chunk(DONE) + b"0\r\nA: b\r\n\r\n",
}  # fmt: skip


@pytest.mark.parametrize("name", COMPLETE)
def test_complete_answer_ends_while_upstream_is_still_open(server: Any, provider: Provider, caplog: Any, name: str) -> None:
    with Client(server).ask(PROMPT) as client, provider.take() as upstream:
        upstream.start(A)
        upstream.send(COMPLETE[name])
        assert client.head().status == 200 and client.body() == b"a"
        assert "alone" not in name or upstream.gone()
    assert log_entries(caplog, 1)[0]["ending"] == "complete"


@pytest.mark.parametrize("end", [STOP, DONE, STOP + DONE])
def test_complete_answer_delimited_by_close_or_length(server: Any, provider: Provider, end: bytes) -> None:
    for head in (CLOSE_HEAD, OK + SSE + b"Content-Length: %d\r\n\r\n" % len(A + end), b"HTTP/1.0 200 OK\r\n" + SSE + b"\r\n"):
        with Client(server).ask(PROMPT) as client:
            with provider.take() as upstream:
                upstream.send(head + A + end)
            assert client.head().status == 200 and client.body() == b"a"


def test_cut_answer_delimited_by_close_or_length(server: Any, provider: Provider) -> None:
    for head in (CLOSE_HEAD, OK + SSE + b"Content-Length: 9999\r\n\r\n", b"HTTP/1.0 200 OK\r\n" + SSE + b"\r\n"):
        with Client(server).ask(PROMPT) as client:
            with provider.take() as upstream:
                upstream.send(head + A)
            assert client.head().status == 200 and client.chunk() == b"a" and client.rest() == b""


@pytest.mark.parametrize("interim", [b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n", b"HTTP/1.1 102 X\r\n\r\nHTTP/1.1 103 X\r\n\r\n"])
def test_interim_answers_are_not_the_answer(server: Any, provider: Provider, interim: bytes) -> None:
    with Client(server).ask(PROMPT) as client, provider.take() as upstream:
        upstream.send(interim)
        upstream.start(A)
        assert client.head().status == 200 and client.chunk() == b"a"


def test_events_cut_and_joined_anywhere_lose_nothing(server: Any, provider: Provider) -> None:
    rng = random.Random(3)
    texts = [rng.choice(["Hello", " wörld", "\n", "data: ", "👋", "\r\n\r\n", "[DONE]", '"', "\\", "\u2028", "0\r\n\r\n"]) + str(n) for n in range(60)]
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


def test_an_event_of_a_megabyte_passes(server: Any, provider: Provider) -> None:
    text = "ä" * 500000
    with Client(server).ask(PROMPT) as client, provider.take() as upstream:
        sender = threading.Thread(target=lambda: (upstream.start(delta(text)), upstream.finish()))
        sender.start()
        assert client.head().status == 200 and client.body().decode() == text
        sender.join()


def test_upstream_unreachable_is_502_without_its_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    for upstream, reason in [(url, "connection refused"), ("http://no-such-host.invalid/v1", "its name was not found")]:
        with running(None, upstream=upstream) as server, Client(server).ask(PROMPT) as client:
            assert client.error() == (502, f"Upstream cannot be reached: {reason}.")


@pytest.mark.parametrize(("limit", "answer"), [("first_byte_timeout", b""), ("first_byte_timeout", STREAM_HEAD), ("idle_timeout", STREAM_HEAD + chunk(ROLE))])
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
        server = stack.enter_context(running(None, upstream=f"http://127.0.0.1:{full.getsockname()[1]}", connect_timeout=0.3))
        client = stack.enter_context(Client(server).ask(PROMPT))
        assert client.error() == (504, "Upstream took too long to connect.")
        wait_for(lambda: not server.relay.streams)


def test_silence_before_the_head_is_filled_with_pings_and_ended_by_an_event(provider: Provider) -> None:
    with running(provider, heartbeat=0.1) as server, Client(server).ask(PROMPT, **EVENTS) as client, provider.take() as upstream:
        assert client.head().status == 200
        assert client.chunk() == client.chunk() == b": ping\n"
        upstream.send(error_answer(429, b'{"error": "Slow down"}'))
        assert client.body().replace(b": ping\n", b"") .endswith(b'event: error\ndata: {"error": "Slow down"}\n\n')


# ---------------------------------------------------------------- /v1: bodies that pass through

ASKED = {"model": "gpt-4.1-mini", "messages": [{"role": "user", "content": "Say hello"}], "stream": True}
API_PATHS = ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings", "/v1/messages"]


def api_error(client: Client) -> tuple[int, str, str]:
    """The status, message and code of an error answer of the API's shape."""
    head = client.head()
    payload = json.loads(client.exactly(int(head.fields["Content-Length"])))
    assert set(payload) - {"type"} == {"error"} and list(payload["error"]) == ["message", "type", "param", "code"]
    return head.status, payload["error"]["message"], payload["error"]["code"]


@pytest.mark.parametrize("path", API_PATHS)
def test_api_bodies_pass_unchanged_and_as_they_arrive(server: Any, provider: Provider, path: str) -> None:
    asked = b' { "model":"gpt-4.1-mini" , "stream":true, "x": "\xc3\xa4\\u00e4" }'
    with Client(server).ask(asked, path=path, Accept="application/json") as client, provider.take() as upstream:
        assert upstream.head.startswith(f"POST {path} HTTP/1.1\r\n") and upstream.body == asked
        upstream.send(STREAM_HEAD)
        head = client.head()  # before any event
        assert head.status == 200 and head.fields["Content-Type"] == "text/event-stream" and head.fields["X-Accel-Buffering"] == "no"
        for data in (b": ping\n\n", b"event: x\ndata: {\"a\": 1}\n\n", b"data: {", b"}\n\n", b"data: [DONE]\n\n"):
            upstream.event(data)
            assert client.chunk() == data
        upstream.send(b"0\r\n\r\n")
        assert client.chunk() == b""


def test_api_json_answer_keeps_its_length(server: Any, provider: Provider) -> None:
    with Client(server).ask(ASKED, path="/v1/chat/completions") as client, provider.take() as upstream:
        upstream.send(OK + JSON + b"Content-Length: 10\r\n\r\n{\"a\":", b" 123}")
        head = client.head()
        assert head.fields["Content-Length"] == "10" and "Transfer-Encoding" not in head.fields
        assert client.exactly(10) == b'{"a": 123}'
        client.ask(method="GET", path="/healthz")
        assert client.head().status == 200


def test_api_fields_that_pass_and_those_that_do_not(provider: Provider) -> None:
    with running(provider, auth_header="api-key: {key}", upstream=provider.url + "?api-version=7") as server, Client(server) as client:
        sent = {"Authorization": "Bearer theirs", "x-api-key": "theirs", "api-key": "theirs", "Cookie": "a=b", "OpenAI-Organization": "org",
                "Connection": "keep-alive, x-hop", "x-hop": "1", "Accept-Encoding": "gzip", "Content-Type": "application/json; x=y", "Accept": "application/json",
                "anthropic-version": "2023-06-01", "anthropic-beta": "b", "OpenAI-Beta": "c", "Idempotency-Key": "d", "User-Agent": "OpenAI/Python 9"}
        client.ask(ASKED, path="/v1/chat/completions?beta=true", **sent)
        with provider.take() as upstream:
            line, *lines = upstream.head.strip().split("\r\n")
            assert line == "POST /v1/chat/completions?api-version=7&beta=true HTTP/1.1"
            assert {name.lower(): value for name, value in (field.split(": ", 1) for field in lines)} == {
                "host": provider.url[7:-3], "accept-encoding": "identity", "api-key": KEY, "content-type": "application/json", "accept": "application/json",
                "anthropic-version": "2023-06-01", "anthropic-beta": "b", "openai-beta": "c", "idempotency-key": "d",
                "user-agent": f"streamproxy/{streamproxy.__version__} OpenAI/Python 9", "content-length": str(len(json.dumps(ASKED)))}
            upstream.send(OK, b"Content-Type: application/json\r\nContent-Length: 2\r\nx-request-id: req_7\r\nRetry-After: 3\r\nx-ratelimit-limit-requests: 9\r\n"
                          b"anthropic-ratelimit-tokens-limit: 8\r\nSet-Cookie: a=b\r\nopenai-organization: org\r\nopenai-project: p\r\nServer: x\r\n"
                          b"llm_provider-transfer-encoding: chunked\r\nKeep-Alive: timeout=5\r\nConnection: x-hop\r\nx-hop: 1\r\n", b"X-Many: y\r\n" * 30, b"\r\n{}")
        fields = {name.lower(): value for name, value in client.head().fields.items()}
        assert client.exactly(2) == b"{}"
        expected = {"content-type": "application/json", "content-length": "2", "x-request-id": "req_7", "retry-after": "3", "x-ratelimit-limit-requests": "9",
                    "anthropic-ratelimit-tokens-limit": "8"}
        assert expected.items() <= fields.items()
        assert set(fields) - set(expected) == {"date", "x-content-type-options", "x-accel-buffering", "cache-control", "incremental"}


@pytest.mark.parametrize(("body", "status", "words"), [
    (b'{"model": "gpt-5"}', 403, "'gpt-5'"), (b"{}", 400, "one"), (b'{"model": "gpt-4.1-mini", "model": "gpt-5"}', 400, "twice"),
    (b'{"model": "gpt-4.1-mini", "Model": "gpt-5"}', 400, "one"), (b'{"MODEL": "gpt-4.1-mini"}', 400, "one"), (b'{"model": 1}', 400, "string"),
    (b'{"model": ["gpt-4.1-mini"]}', 400, "string"), (b'[{"model": "gpt-4.1-mini"}]', 400, "object"), (b"x", 400, "JSON"),
    (b'{"model": "gpt-4.1-mini"} {"model": "gpt-5"}', 400, "JSON"), (b'{"model": "gpt-4.1-mini", "x": NaN}', 400, "JSON"),
    ('{"model": "gpt-5"}'.encode("utf-16-le"), 400, "JSON"), (b'{"model": "gpt-4.1-mini\\u0000"}', 403, "x00"),
])
def test_api_model_that_may_not_be_used_is_refused(server: Any, provider: Provider, body: bytes, status: int, words: str) -> None:
    with Client(server).ask(body, path="/v1/chat/completions") as client:
        got, message, _ = api_error(client)
        assert got == status and words in message
    assert provider.nobody_came()


def test_api_models_that_may_be_used(provider: Provider) -> None:
    for allowed, body in [(("a", "b"), b'{"model": "b"}'), (("*",), b'{"model": "any", "Model": "thing"}'), (("*",), b"no JSON at all")]:
        with running(provider, allow_model=allowed) as server, Client(server).ask(body, path="/v1/completions"), provider.take() as upstream:
            assert upstream.body == body


MODELS = json.dumps({"object": "list", "data": [{"id": name, "object": "model"} for name in ("gpt-4.1-mini", "gpt-5", "a/b")]}).encode()


def test_api_models_shows_what_may_be_used(provider: Provider) -> None:
    for allowed, expected in [((), ["gpt-4.1-mini"]), (("a/b",), ["gpt-4.1-mini", "a/b"]), (("*",), None)]:
        with running(provider, allow_model=allowed) as server, Client(server).ask(method="GET", path="/v1/models?limit=9") as client:
            with provider.take() as upstream:
                assert upstream.head.startswith("GET /v1/models?limit=9 HTTP/1.1\r\n") and "ontent-" not in upstream.head
                upstream.send(OK + JSON + b"Content-Length: %d\r\n\r\n" % len(MODELS) + MODELS)
            head = client.head()
            got = client.body() if "Transfer-Encoding" in head.fields else client.exactly(len(MODELS))
            assert got == MODELS if expected is None else [model["id"] for model in json.loads(got)["data"]] == expected


@pytest.mark.parametrize(("path", "status"), [
    ("/v1/models/gpt-4.1-mini", 200), ("/v1/models/a/b", 200), ("/v1/models/a%2Fb", 200), ("/v1/models/gpt-5", 403), ("/v1/models/../files", 404),
    ("/v1/models/a/%2e%2e/files", 404), ("/v1/models/", 404), ("/v1/files", 404), ("/v1/chat/completions/", 404), ("/v1/MODELS", 404), ("/v1//models", 404),
])
@pytest.mark.parametrize("allowed", ["a/b", "*"])
def test_api_paths_are_matched_exactly(provider: Provider, path: str, status: int, allowed: str) -> None:
    with running(provider, allow_model=(allowed,)) as server, Client(server).ask(method="GET", path=path) as client:
        if status == 200 or (status == 403 and allowed == "*"):
            with provider.take() as upstream:
                assert upstream.head.startswith(f"GET {path} HTTP/1.1\r\n")
        else:
            assert api_error(client)[0] == status
            assert provider.nobody_came()


@pytest.mark.parametrize(("answer", "status", "code"), [
    (error_answer(401, b'{"error": {"message": "Wrong key"}}'), 502, "bad_gateway"), (error_answer(500), 502, "bad_gateway"), (error_answer(404), 404, "not_found"),
    (error_answer(302), 502, "bad_gateway"), (b"", 502, "bad_gateway"), (OK + b"Content-Encoding: gzip\r\n\r\n", 502, "bad_gateway"),
    (error_answer(413), 413, "request_too_large"), (error_answer(429), 429, "rate_limit_exceeded"), (b"HTTP/1.1 204 X\r\n\r\n", 502, "bad_gateway"),
])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_api_errors_have_its_shape(server: Any, provider: Provider, path: str, answer: bytes, status: int, code: str) -> None:
    with Client(server).ask(ASKED, path=path) as client:
        with provider.take() as upstream:
            upstream.send(answer)
        assert api_error(client)[::2] == (status, code)


def test_api_error_of_upstream_about_the_request_passes_whole_but_for_the_key(server: Any, provider: Provider) -> None:
    document = b'{"error": {"message": "Bad model", "type": "t", "param": "model", "code": "c", "more": "%b"}}'
    with Client(server).ask(ASKED, path="/v1/chat/completions") as client, provider.take() as upstream:
        upstream.send(error_answer(429, document % KEY.encode(), b"Retry-After: 7\r\n"))
        head = client.head()
        assert (head.status, head.fields["Retry-After"]) == (429, "7") and "X-Should-Retry" not in head.fields
        assert client.exactly(int(head.fields["Content-Length"])) == document % b"[redacted]"


def test_api_sdks_are_told_not_to_try_again_what_may_have_been_paid_for(provider: Provider) -> None:
    with running(provider, first_byte_timeout=0.2) as server, Client(server).ask(ASKED, path="/v1/chat/completions") as client, provider.take():
        head = client.head()
        assert (head.status, head.fields["X-Should-Retry"]) == (504, "false")
    with running(None) as server, Client(server).ask(ASKED, path="/v1/chat/completions") as client:
        head = client.head()
        assert head.status == 502 and "X-Should-Retry" not in head.fields


def passed(server: Any, provider: Provider, head: bytes, wire: bytes, http10: bool = False) -> tuple[bytes, bool]:
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


def test_api_a_cut_anywhere_is_a_cut(server: Any, provider: Provider) -> None:
    wire = chunk(delta("a")) + chunk(delta("data: [DONE]\n\n")) + chunk(delta("b", "stop")) + chunk(DONE) + b"0\r\n\r\n"
    finished = wire.index(b'"stop"}]}') + len(b'"stop"}]}')  # the event that says so is whole
    for size in range(len(STREAM_HEAD + wire)):
        at = size - len(STREAM_HEAD)
        _, whole = passed(server, provider, (STREAM_HEAD + wire)[:size], b"")
        assert whole == (at >= finished), size
    assert passed(server, provider, STREAM_HEAD, wire)[1]


ENDS = {
    "[DONE]": (DONE, True), "finish_reason": (STOP, True), "neither": (delta("a"), False), "no event": (b"", False), "comments": (b": x\n\n", False),
    "message_stop": (b'event: message_stop\ndata: {"type":"message_stop"}\n\n', True), "[DONE] in text": (delta("\ndata: [DONE]\n\n"), False),
    "response.completed": (b'event: response.completed\ndata: {"x": "' + b"y" * 200000 + b'"}\n\n', True), "error": (event({"error": {"message": "x"}}) + DONE, False),
    "response.created": (b"event: response.created\ndata: {}\n\n", False), "error event": (b'event: error\ndata: {"type": "error"}\n\n' + DONE, False),
    "null error": (event({"error": None, "choices": []}) + DONE, True), "empty finish_reason": (delta("a", ""), False),
    "finish_reason elsewhere": (event({"native": {"finish_reason": "x"}, "choices": [{"index": 0, "finish_reason": None}]}), False),
    "error beside choices": (event({"id": "x", "error": {"message": "x"}, "choices": [{"finish_reason": "error"}]}) + DONE, False),
    "typed error": (event({"type": "error", "error": {"type": "x"}}) + DONE, False), "spaced error": (event(b'{ "error": "x" }') + DONE, False),
    "error that is no JSON": (b"event: error\ndata: overloaded\n\n" + DONE, False), "error with a space": (event(b'{"error" : ["x"]}') + DONE, False),
    "number for an error": (event(b'{"error":500}') + DONE, False), "finish_reason with a space": (event(b'{"choices" : [{"finish_reason" : "stop"}]}'), True),
    "two spaces": (b"data:  [DONE]\n\n", True), "mixed line ends": (b": ping\n\ndata: [DONE]\r\n\r\n", True),
    "cut within the last event": (b'event: response.completed\ndata: {"type": "response.completed", "half', False),
    "cut behind its type": (b"event: message_stop\nda", False), "no blank line": (b'event: message_stop\ndata: {"type":"message_stop"}', True),
    "one of two choices, spaced": (event(b'{"choices":[{"index":0,"finish_reason":null},{"index":1,"finish_reason": "stop"}]}'), True),
    "one of two choices": (event(b'{"choices":[{"index":0,"finish_reason":null},{"index":1,"finish_reason":"stop"}]}'), True),
    "choice goes on beside an error": (event(b'{"error":"x","choices":[{"finish_reason":null}]}') + DONE, False),
    "choice goes on in an error event": (b'data: {"choices":[{"finish_reason":null}]}\nevent: error\n\n' + DONE, False),
    "CR line ends": (b"data: {}\r\rdata: [DONE]\r\r", True), "BOM": (b"\xef\xbb\xbfdata: [DONE]\n\n", True), "finish_reason in text": (delta('"finish_reason":"stop"'), False), "CRLF": (b"data: [DONE]\r\n\r\n", True),
}


@pytest.mark.parametrize("name", ENDS)
def test_api_stream_is_whole_only_with_its_end_event(server: Any, provider: Provider, name: str) -> None:
    body, expected = ENDS[name]
    body = body if name == "BOM" else ROLE + body
    for head, wire in [(STREAM_HEAD, chunk(body) + b"0\r\n\r\n"), (CLOSE_HEAD, body), (OK + SSE + b"Content-Length: %d\r\n\r\n" % len(body), body)]:
        got, whole = passed(server, provider, head, wire)
        assert (body.startswith(got), whole) == (True, expected) and (got == body or not expected)
    for http10 in (False, True):
        assert passed(server, provider, STREAM_HEAD, b"".join(chunk(body[at : at + 1]) for at in range(min(len(body), 2000))) + (chunk(body[2000:]) if body[2000:] else b"")
                      + b"0\r\n\r\n", http10)[1] == expected  # fmt: skip


@pytest.mark.parametrize("name", ENDS)
def test_api_stream_whose_events_come_one_by_one_ends_with_the_same(name: str) -> None:
    body, expected = ENDS[name]
    answer = streamproxy.PassedAnswer()
    answer.start(200, {"content-type": "text/event-stream"})
    out = b"".join(map(answer.feed, re.split(b"(?<=\n\n)", body)))
    assert out + answer.close(None) == body
    assert (answer.state == answer.DONE) == expected


def test_api_event_that_seems_to_go_on_is_looked_at_in_the_state_it_arrives_in() -> None:
    goes_on = b'{"choices":[{"finish_reason":null}]}\n'
    answer = streamproxy.PassedAnswer()
    answer.start(200, {"content-type": "text/event-stream"})
    answer.feed(b": " + goes_on + b"\n")
    assert answer.events == 0  # a comment is none
    answer.feed(b"data: " + goes_on + b"e")
    answer.feed(b"vent: error\n\n")
    assert answer.failure and answer.events == 1


def test_api_several_choices_need_as_many_finish_reasons(server: Any, provider: Provider) -> None:
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
    assert [ended(A, STOP), ended(A, STOP, STOP), ended(A, STOP, second), ended(A, STOP, DONE)] == [False, False, True, True]
    assert [ended(A, STOP, prompt=["a", "b"]), ended(A, STOP, second, prompt=["a", "b"]), ended(A, STOP, metadata={"n": 3})] == [False, True, True]


def test_api_a_slow_last_event_is_waited_for_and_what_follows_done_is_not(server: Any, provider: Provider) -> None:
    with Client(server).ask(ASKED, path="/v1/responses") as client, provider.take() as upstream:
        upstream.start(ROLE, b"event: response.completed\n")
        client.head()
        client.until(b"event: response.completed\n\r\n")
        time.sleep(1.2)  # longer than END_GRACE
        upstream.event(b'data: {"type": "response.completed"}\n\n')
        assert client.chunk() == b'data: {"type": "response.completed"}\n\n'
        upstream.event(DONE)
        assert client.chunk() == DONE and client.chunk() == b""  # while upstream's body has not ended


@pytest.mark.parametrize("tls", [False, True])
def test_api_document_that_a_reset_ends_is_cut(provider: Provider, certificate: Path, monkeypatch: Any, tls: bool) -> None:
    if hasattr(ssl, "OP_IGNORE_UNEXPECTED_EOF"):  # which some versions of Python set of themselves
        context = ssl.create_default_context(cafile=str(certificate))
        context.options |= ssl.OP_IGNORE_UNEXPECTED_EOF
        monkeypatch.setattr(ssl, "create_default_context", lambda **_: context)
    with running(provider, upstream=tls_url(provider) if tls else provider.url, ca_file=str(certificate)) as server, Client(server) as client:
        client.ask(ASKED, path="/v1/chat/completions")
        with take_tls(provider, certificate) if tls else provider.take() as upstream:
            upstream.send(OK + JSON + b'\r\n{"choices":[{"mess')
            if tls:
                socket.socket.shutdown(upstream.sock, socket.SHUT_RDWR)  # with no close_notify
            else:
                upstream.reset()
            head = client.head()
            assert (head.status, head.fields["X-Should-Retry"]) == (502, "false")


def test_api_errors_keep_fields_and_the_connection(server: Any, provider: Provider) -> None:
    with Client(server) as client:
        client.ask(ASKED, path="/v1/chat/completions")
        with provider.take() as upstream:
            for _ in range(3):
                upstream.send(error_answer(429, b'{"error": {"message": "x***y \\ud83d"}}', b"x-request-id: r\r\nx-ratelimit-remaining: 0\r\nRetry-After: 7\r\n"))
                head = client.head()
                fields = {name.lower(): value for name, value in head.fields.items()}
                assert (head.status, fields["x-request-id"], fields["x-ratelimit-remaining"], fields["retry-after"]) == (429, "r", "0", "7")
                assert json.loads(client.exactly(int(fields["content-length"])))["error"]["message"].startswith("[redacted]")
                client.ask(ASKED, path="/v1/chat/completions")
                upstream.read_request()


def test_api_form_cannot_carry_another_model(server: Any, provider: Provider) -> None:
    with Client(server).ask(ASKED, path="/v1/completions", Content_Type="application/x-www-form-urlencoded"), provider.take() as upstream:
        assert "\r\nContent-Type: application/json\r\n" in upstream.head and "form" not in upstream.head


def test_api_idle_clock_counts_events_behind_comments(provider: Provider) -> None:
    with running(provider, idle_timeout=0.5, first_byte_timeout=0.5) as server, Client(server).ask(ASKED, path="/v1/chat/completions") as client:
        with provider.take() as upstream:
            upstream.send(STREAM_HEAD)
            for _ in range(8):
                time.sleep(0.15)
                upstream.event(b": keep\n\n" + ROLE)
            upstream.finish()
            assert client.head().status == 200 and client.body().endswith(DONE)


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


def test_api_document_is_whole_by_its_framing(server: Any, provider: Provider) -> None:
    for head, wire, expected in [
        (OK + JSON + b"Content-Length: 5\r\n\r\n", b"[123]", True), (OK + JSON + b"Content-Length: 5\r\n\r\n", b"[123", False),
        (OK + JSON + b"Transfer-Encoding: chunked\r\n\r\n", chunk(b"[12") + chunk(b"3]") + b"0\r\n\r\n", True),
        (OK + JSON + b"Transfer-Encoding: chunked\r\n\r\n", chunk(b"[12") + chunk(b"3]"), False), (OK + JSON + b"\r\n", b"[123]", True),
    ]:
        assert passed(server, provider, head, wire) == ((b"[123]", True) if expected else (b"", False))


def test_api_idle_clock_starts_anew_with_comments(provider: Provider) -> None:
    with running(provider, idle_timeout=0.4) as server, Client(server).ask(ASKED, path="/v1/chat/completions") as client:
        with provider.take() as upstream:
            upstream.start(A)
            for _ in range(8):
                time.sleep(0.1)
                upstream.event(b": keep-alive\n\n")
            upstream.finish()
            assert client.head().status == 200 and client.body().endswith(b": keep-alive\n\n" + STOP + DONE)


def test_api_client_leaves(server: Any, provider: Provider) -> None:
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
        client.send(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(asked))
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


def test_request_with_a_chunked_body_cut_anywhere_is_read_at_once(server: Any, provider: Provider) -> None:
    body = chunk(b"[") + chunk(b"]") + b"0\r\nX: y\r\n\r\n"
    with Client(server) as client:
        for parts in cuts(body):
            client.send(b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
            for part in parts:
                client.send(part)
                time.sleep(0.002)  # so that they arrive one by one
            assert client.error() == (400, "The body must be a JSON object.")


@pytest.mark.parametrize("body", [b"<html>", b"", b'{"object": "list"}', b'{"data": ["m"]}', b'{"data": 1}', b'{"error": "x"}'])
def test_api_models_that_upstream_garbles_are_502(server: Any, provider: Provider, body: bytes) -> None:
    with Client(server).ask(method="GET", path="/v1/models") as client, provider.take() as upstream:
        upstream.send(OK + JSON + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert api_error(client)[0] == 502


def test_request_with_a_chunked_body_is_decoded(server: Any, provider: Provider) -> None:
    body = json.dumps(PROMPT).encode()
    with Client(server) as client:
        client.send(b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n", chunk(body[:5]), chunk(body[5:]), b"0\r\nX: y\r\n\r\n")
        client.ask(method="GET", path="/healthz")
        with provider.take() as upstream:
            assert json.loads(upstream.body)["messages"] == [{"role": "user", "content": "Say hello"}]
            upstream.start(A)
            upstream.finish()
        assert client.head().status == 200 and client.body() == b"a" and client.head().status == 200


# ---------------------------------------------------------------- connections to upstream that stay warm


def idle(server: Any) -> int:
    return sum(map(len, server.upstream.pool._idle.values()))


def one_answer(server: Any, upstream: UpstreamPeer, text: str = "a") -> None:
    """An answer over upstream's connection, of which the request was read; the connection is idle afterwards."""
    upstream.start(delta(text))
    upstream.finish()


def ask_again(server: Any, client: Client, upstream: UpstreamPeer) -> None:
    """Have one answer, and a second request sent over the connection that it left warm."""
    one_answer(server, upstream)
    assert client.head().status == 200 and client.body() == b"a"
    wait_for(lambda: idle(server) == 1)
    client.ask(PROMPT)
    upstream.read_request()


@pytest.mark.parametrize("last", [b"0\r\n\r\n", b"0\r\nA: b\r\n\r\n", b""])
def test_connection_is_used_again_once_its_answer_has_ended(server: Any, provider: Provider, last: bytes) -> None:
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
def test_connection_is_not_kept_where_its_end_is_in_doubt(server: Any, provider: Provider, name: str) -> None:
    head, last = NOT_KEPT[name]
    with Client(server).ask(PROMPT) as client, provider.take() as upstream:
        upstream.send(head, chunk(A), chunk(DONE), last)
        assert client.head().status == 200 and client.body() == b"a" and upstream.gone()


def test_idle_connection_that_says_something_or_closes_is_dropped(server: Any, provider: Provider) -> None:
    for last in (b"HTTP/1.1 408 Request Timeout\r\n\r\n", b""):
        with Client(server).ask(PROMPT) as client, provider.take() as upstream:
            one_answer(server, upstream)
            assert client.head().status == 200 and client.body() == b"a"
            wait_for(lambda: idle(server) == 1)
            upstream.send(last)
            if not last:
                upstream.sock.shutdown(socket.SHUT_WR)
            assert upstream.gone() and idle(server) == 0


def test_idle_connections_are_bounded_and_end_after_a_while() -> None:
    with Stage() as stage:
        pool, ends = stage.pool, []
        for number in range(streamproxy.MAX_IDLE_CONNECTIONS + 1):
            near, far = socket.socketpair()
            near.setblocking(False)
            ends.append(Peer(far))
            stage.now = 1000.0 + number / 1000
            stage.turn()
            pool.settle(streamproxy.Connection(near, "upstream", pool), streamproxy.BodyDecoder(0))
        assert ends[0].gone() and len(pool._idle["upstream"]) == streamproxy.MAX_IDLE_CONNECTIONS
        taken = pool.take("upstream")
        assert taken and taken.reused
        assert taken.sock.send(b"x") and ends[-1].exactly(1) == b"x"  # the one that was used last
        stage.at(streamproxy.KEEP_ALIVE_TIMEOUT + 1)
        assert not pool._idle["upstream"] and ends[1].gone() and taken.sock.send(b"y")
        pool.close(taken)


@pytest.mark.parametrize("how", ["close", "reset"])
def test_reused_connection_that_was_closed_already_is_tried_once_more_on_a_new_one(server: Any, provider: Provider, how: str) -> None:
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


def test_reused_connection_that_ends_after_a_byte_of_the_answer_is_not_tried_again(server: Any, provider: Provider) -> None:
    with Client(server).ask(PROMPT) as client, provider.take() as upstream:
        ask_again(server, client, upstream)
        upstream.send(b"H")
        upstream.sock.close()
        assert client.error()[0] == 502
    assert provider.nobody_came()


def test_reused_connection_that_ends_late_is_not_tried_again(provider: Provider, monkeypatch: Any) -> None:
    monkeypatch.setattr(streamproxy, "STALE_WINDOW", 0.1)
    with running(provider, heartbeat=0.2) as server, Client(server) as client:
        for fields, answer in (({}, b'{"error": "Upstream closed the connection without an answer."}\n'), (EVENTS, b"event: error")):
            with Client(server).ask(PROMPT) as first, provider.take() as upstream:
                one_answer(server, upstream)
                assert first.head().status == 200 and first.body() == b"a"
                wait_for(lambda: idle(server) == 1)
                client.ask(PROMPT, **fields)
                upstream.read_request()
                time.sleep(0.3)  # it works on the prompt, and dies of it
            head = client.head()
            got = client.exactly(int(head.fields["Content-Length"])) if "Content-Length" in head.fields else client.body()
            assert answer in got
    assert provider.nobody_came()


def test_client_leaves_while_a_dead_connection_is_replaced(server: Any, provider: Provider) -> None:
    with Client(server).ask(PROMPT) as client, provider.take() as upstream:
        ask_again(server, client, upstream)
        upstream.sock.close()
        with provider.take() as second:
            client.sock.close()
            assert second.gone()
    wait_for(lambda: not server._connections)


def test_tls_connection_is_used_again(provider: Provider, certificate: Path) -> None:
    with running(provider, upstream=tls_url(provider), ca_file=str(certificate)) as server, Client(server).ask(PROMPT) as client:
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


# ---------------------------------------------------------------- clients that leave


def leave(client: Client, how: str) -> None:
    if how == "half":
        client.sock.shutdown(socket.SHUT_WR)
    else:
        (client.reset if how == "reset" else client.sock.close)()


@pytest.mark.parametrize("how", ["close", "reset", "half"])
@pytest.mark.parametrize("stage", ["before the head", "before the first event", "after the role", "mid-stream"])
@pytest.mark.parametrize("mode", ["text", "events"])
def test_client_leaves_and_upstream_is_closed(server: Any, provider: Provider, caplog: Any, mode: str, stage: str, how: str) -> None:
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
        wait_for(lambda: not server._connections)


def test_client_leaves_behind_a_request_sent_ahead(server: Any, provider: Provider) -> None:
    client = Client(server).ask(PROMPT)
    with provider.take() as upstream:
        client.ask(PROMPT)
        client.sock.close()
        assert upstream.gone()


def test_client_that_sends_without_end_while_its_answer_is_on_its_way_is_cut(server: Any, provider: Provider, caplog: Any) -> None:
    with Client(server).ask(PROMPT) as client, provider.take() as upstream:
        with contextlib.suppress(ConnectionError):
            for _ in range(100):
                client.send(b"x" * 10000)
        assert upstream.gone()
    assert log_entries(caplog, 1)[0]["ending"] == "aborted"


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


def test_200_clients_leave_at_once_and_no_thread_or_descriptor_is_left(server: Any, provider: Provider) -> None:
    with Client(server).ask(method="GET", path="/healthz") as client:
        client.head()
    wait_for(lambda: not server._connections and not server._idle_threads)
    before = threading.active_count(), descriptors()
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
    wait_for(lambda: not server._connections and not server.relay.streams)
    assert wait_for(lambda: (threading.active_count(), descriptors()), lambda now: now == before) == before


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


# ---------------------------------------------------------------- upstream through TLS and proxies


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: Any) -> Path:
    return make_certificate(tmp_path_factory.mktemp("tls"), "DNS:localhost,IP:127.0.0.1")


def make_certificate(folder: Path, names: str) -> Path:
    """A key and a certificate for names in one file."""
    command = [program("openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=test"]
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


def test_tls_pieces_arrive_one_by_one_and_all_of_those_that_share_a_record(provider: Provider, certificate: Path) -> None:
    with running(provider, upstream=tls_url(provider), ca_file=str(certificate)) as server, Client(server).ask(PROMPT) as client:
        with take_tls(provider, certificate) as upstream:
            upstream.start(ROLE, A)
            assert client.head().status == 200 and client.chunk() == b"a"
            upstream.event(delta("b"))
            assert client.chunk() == b"b"
            text = "x" * 10
            upstream.send(b"".join(chunk(delta(text)) for _ in range(3000)), chunk(DONE))
            assert client.body().decode() == text * 3000


def test_tls_records_that_arrive_together_are_all_read(provider: Provider, certificate: Path) -> None:
    with running(provider, upstream=tls_url(provider), ca_file=str(certificate)) as server, Client(server).ask(PROMPT) as client:
        with take_tls(provider, certificate) as upstream:
            upstream.start(ROLE)
            for size in range(1, 300):
                upstream.event(delta("x" * size))
            client.head()
            left = sum(range(1, 300))
            while left:  # nothing more comes that could push on what was left behind
                left -= len(client.chunk())


def test_tls_text_that_shares_a_record_with_the_head_is_not_held_back(provider: Provider, certificate: Path) -> None:
    with running(provider, upstream=tls_url(provider), ca_file=str(certificate)) as server, Client(server).ask(PROMPT) as client:
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
        wait_for(lambda: not server._connections)


@pytest.mark.parametrize("fault", ["nobody vouches for it", "it is another's"])
def test_tls_certificate_is_verified(provider: Provider, certificate: Path, tmp_path: Path, fault: str) -> None:
    other = fault == "it is another's"
    shown = make_certificate(tmp_path, "DNS:elsewhere.example") if other else certificate
    with running(provider, upstream=tls_url(provider), ca_file=str(shown) if other else "") as server, Client(server).ask(PROMPT) as client:
        with pytest.raises((OSError, AssertionError)):
            take_tls(provider, shown)
        assert client.error() == (502, "Upstream cannot be reached: its certificate is not trusted.")


def test_tls_upstream_that_does_not_speak_it(provider: Provider) -> None:
    with running(provider, upstream=tls_url(provider)) as server, Client(server).ask(PROMPT) as client:
        with Peer(provider.listener.accept()[0]) as upstream:
            upstream.more()
            upstream.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            assert client.error() == (502, "Upstream cannot be reached: the TLS handshake failed.")


@pytest.fixture
def proxy_variables(monkeypatch: Any) -> Any:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "REQUEST_METHOD"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return monkeypatch.setenv


def test_proxy_of_the_environment_is_used(provider: Provider, proxy_variables: Any) -> None:
    proxy_variables("http_proxy", provider.url)
    with running(None, upstream="http://api.example/v1") as server, Client(server).ask(PROMPT) as client, provider.take() as proxy:
        assert proxy.head.startswith("POST http://api.example/v1/chat/completions HTTP/1.1\r\n")
        proxy.start(A)
        assert client.head().status == 200 and client.chunk() == b"a"


def test_proxy_that_is_itself_spoken_to_over_tls(provider: Provider, certificate: Path, proxy_variables: Any) -> None:
    proxy_variables("http_proxy", tls_url(provider))
    with running(None, upstream="http://api.example/v1", ca_file=str(certificate)) as server, Client(server).ask(PROMPT) as client:
        with take_tls(provider, certificate) as proxy:
            assert proxy.head.startswith("POST http://api.example/v1/chat/completions HTTP/1.1\r\n")
            proxy.start(A)
            assert client.head().status == 200 and client.chunk() == b"a"


def test_proxy_connect_for_tls(provider: Provider, certificate: Path, proxy_variables: Any) -> None:
    proxy_variables("HTTPS_PROXY", provider.url)
    with running(None, upstream="https://localhost/v1", ca_file=str(certificate)) as server, Client(server).ask(PROMPT) as client:
        proxy = provider.take()
        assert proxy.head.startswith("CONNECT localhost:443 HTTP/1.") and "uthorization" not in proxy.head
        proxy.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(str(certificate))
        with UpstreamPeer(context.wrap_socket(proxy.sock, server_side=True)) as upstream:
            upstream.start(A)
            assert client.head().status == 200 and client.chunk() == b"a"


def test_proxy_connect_refused(provider: Provider, proxy_variables: Any) -> None:
    proxy_variables("HTTPS_PROXY", provider.url)
    with running(None, upstream="https://api.example/v1") as server, Client(server).ask(PROMPT) as client, provider.take() as proxy:
        proxy.send(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
        assert client.error()[0] == 502


def test_proxy_is_not_used_for_no_proxy_and_the_demo(provider: Provider, proxy_variables: Any) -> None:
    proxy_variables("http_proxy", "http://127.0.0.1:9/")
    proxy_variables("no_proxy", "127.0.0.1")
    with running(provider) as server, Client(server).ask(PROMPT), provider.take():
        pass
    proxy_variables("no_proxy", "")
    with running(None, demo=True, api_key="") as server, Client(server).ask(PROMPT) as client:
        assert client.head().status == 200 and b"Say " in client.chunk() + client.chunk() + client.chunk() + client.chunk() + client.chunk()


def test_redirect_is_not_followed_with_the_key(server: Any, provider: Provider) -> None:
    other = Provider()
    with Client(server).ask(PROMPT) as client, provider.take() as upstream:
        upstream.send(error_answer(307, fields=f"Location: {other.url}\r\n".encode()))
        assert client.error()[0] == 502
    assert other.nobody_came()
    other.listener.close()


# ---------------------------------------------------------------- time, the log, the end


def test_slow_request_is_408_and_idle_connection_closed(provider: Provider) -> None:
    with running(provider, client_timeout=0.2) as server:
        for start in (b"POST", b"POST / HTTP/1.1\r\nHost: localhost\r\nA:", b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{"):
            with Client(server) as client:
                client.send(start)
                assert client.error() == (408, "The request did not arrive in time.")
                assert client.rest() == b""
        with Client(server) as client:
            assert client.rest() == b""  # a connection nobody uses ends without a word


def test_slow_request_is_cut_in_total_not_per_byte(provider: Provider) -> None:
    with running(provider, client_timeout=0.3) as server, Client(server) as client:
        with pytest.raises((AssertionError, ConnectionError)):
            for _ in range(2000):
                client.send(b"x")
                client.sock.settimeout(0.01)
                with contextlib.suppress(socket.timeout):
                    assert client.more() and b"408" not in client.seen


def test_client_that_vanishes_leaves_no_traceback(server: Any, caplog: Any) -> None:
    for data in (b"", b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{", b"GET / HTTP/1.1\r\n"):
        client = Client(server)
        client.send(data)
        client.reset()
    wait_for(lambda: not server._connections)
    assert "Traceback" not in caplog.text and "fault" not in caplog.text


def test_fault_in_a_handler_is_500_with_its_place_in_the_log(server: Any, caplog: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(streamproxy, "encode_request", lambda asked, settings: 1 / 0)
    with Client(server).ask(PROMPT) as client:
        assert client.error() == (500, "Internal error.")
        assert client.ask(method="GET", path="/healthz").head().status == 200
    assert re.search(r"fault in request [0-9a-f]{16}: ZeroDivisionError in line \d+", caplog.text)
    assert "Traceback" not in caplog.text


def test_log_line_of_a_stream(server: Any, provider: Provider, caplog: Any) -> None:
    with Client(server).ask({"prompt": "my secret"}, X_Request_Id="id-7") as client, provider.take() as upstream:
        upstream.start(ROLE, delta("ä"), delta("b"), event({"choices": [], "usage": {"total_tokens": 3}}))
        upstream.finish()
        client.head()
        client.body()
    entry = log_entries(caplog, 1)[0]
    assert list(entry) == [
        "time", "id", "client", "method", "path", "status", "ending", "error", "seconds", "ttft", "pieces", "bytes",
        "model", "finish_reason", "usage", "upstream_id",
    ]  # fmt: skip
    fixed = {name: entry[name] for name in ("id", "client", "method", "path", "status", "ending", "error", "pieces", "bytes", "usage")}
    assert fixed == {"id": "id-7", "client": "127.0.0.1", "method": "POST", "path": "/", "status": 200, "ending": "complete",
                     "error": None, "pieces": 2, "bytes": 3, "usage": {"total_tokens": 3}}  # fmt: skip
    assert 0 <= entry["ttft"] <= entry["seconds"] < DEADLINE
    assert re.match(r"time=\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z id=id-7 client=127.0.0.1 method=POST path=/ status=200 ending=complete seconds=", str(entry))
    assert str(entry).endswith(' pieces=2 bytes=3 finish_reason=stop usage={"total_tokens":3}')
    assert "secret" not in caplog.text


def test_log_holds_no_query_and_cannot_be_forged(server: Any, provider: Provider, caplog: Any) -> None:
    with Client(server) as client:
        client.send(b"GET /a[2Jb=c\xff\"?prompt=secret HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: a b\r\n\r\n")
        assert client.head().status == 404
    entry = log_entries(caplog, 1)[0]
    assert re.search(r' path="/a\[2Jb=c\\u00ff\\"" status=404 ', str(entry)), str(entry)
    assert "secret" not in caplog.text and re.fullmatch("[0-9a-f]{16}", entry["id"])


def test_log_does_not_quote_a_request_line_that_it_cannot_read(server: Any, caplog: Any) -> None:
    with Client(server) as client:
        client.send(b"GET /?prompt=my secret words HTTP/1.1\r\n\r\n")
        assert client.error() == (400, "The request line is not in HTTP's grammar.")
    assert " status=400 " in str(log_entries(caplog, 1)[0]) and "secret" not in caplog.text


def test_upstream_message_is_not_logged_since_it_may_quote_the_prompt(server: Any, provider: Provider, caplog: Any) -> None:
    with Client(server).ask(PROMPT) as client, provider.take() as upstream:
        upstream.send(error_answer(400, b'{"error": {"message": "I dislike: my secret"}}'))
        assert client.error() == (400, "I dislike: my secret")
    assert log_entries(caplog, 1)[0]["error"] == "Upstream refused the request with status 400."


def test_drain_lets_streams_end_and_takes_nobody_new(provider: Provider) -> None:
    with running(provider, drain_timeout=DEADLINE) as server:
        idle = Client(server)
        with Client(server).ask(PROMPT) as client, provider.take() as upstream:
            upstream.start(A)
            client.head()
            stopping = threading.Thread(target=server.stop)
            stopping.start()
            assert idle.rest() == b""  # a connection between two requests is closed at once
            wait_for(lambda: refused(server))
            upstream.event(delta("b"))
            upstream.finish()
            assert client.body() == b"ab" and client.rest() == b""
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
    streamproxy.Server(settings).stop()


def test_drain_says_that_a_connection_ends_with_its_answer(provider: Provider) -> None:
    with running(provider, drain_timeout=DEADLINE) as server, Client(server) as client:
        client.send(b"GET /healthz HTTP/1.1\r\n")
        wait_for(lambda: server._connections)
        time.sleep(0.05)  # so that the request has begun, and is not a connection between two
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        wait_for(lambda: refused(server))
        client.send(b"\r\n")
        assert client.head().fields["Connection"] == "close"
        stopping.join(DEADLINE)


def test_drain_serves_who_connected_before_it(provider: Provider) -> None:
    with running(provider, drain_timeout=DEADLINE) as server:
        clients = [Client(server) for _ in range(20)]
        for client in clients:
            client.ask(method="GET", path="/healthz")
        server.stop()
        for client in clients:
            head = client.head()
            assert head.status == 200 and head.fields.get("Connection") in ("close", None)


@pytest.mark.parametrize("mode", ["text", "events", "nothing sent"])
def test_drain_aborts_truthfully_at_its_end_or_when_hurried(provider: Provider, caplog: Any, mode: str) -> None:
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
            stopping.join(DEADLINE)
            assert not stopping.is_alive()
    assert log_entries(caplog, 1)[0]["ending"] == "aborted"


def test_drain_ends_half_sent_requests_and_stalled_http_1_0_clients_truthfully(provider: Provider, monkeypatch: Any) -> None:
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


def test_drain_that_is_hurried_answers_half_sent_bodies_at_once(provider: Provider, caplog: Any) -> None:
    with running(provider, drain_timeout=0.0) as server, Client(server) as client:
        client.send(b"POST / HTTP/1.1\r\n" + H + b"Content-Length: 9\r\n\r\n{")
        wait_for(lambda: server.relay.inboxes)
        began = time.monotonic()
        server.stop()
        assert time.monotonic() < began + streamproxy.ABORT_GRACE / 2  # nobody waited for the rest
        assert client.error() == (503, "The server is shutting down.") and client.rest() == b""
    assert log_entries(caplog, 1)[0]["ending"] == "aborted"


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


def test_unix_socket_clients_may_have_bound_their_own(provider: Provider, tmp_path: Path) -> None:
    with running(provider, bind=f"unix:{tmp_path}/s"), socket.socket(socket.AF_UNIX) as sock:
        sock.bind(f"{tmp_path}/c")
        sock.connect(f"{tmp_path}/s")
        sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert sock.recv(100).startswith(b"HTTP/1.1 200 OK\r\n")


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6")
def test_ipv4_client_of_a_socket_for_both_has_its_own_address(provider: Provider, caplog: Any) -> None:
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


# ---------------------------------------------------------------- the command line


@contextlib.contextmanager
def launched(*flags: str, **environ: str) -> Iterator[tuple[Any, streamproxy.Server]]:
    """The program in a process of its own, and something with its url."""
    process = subprocess.Popen(
        [sys.executable, "-W", "error", str(PROGRAM), "--bind", "127.0.0.1:0", *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "OPENAI_API_KEY": KEY, **environ}, text=True)  # fmt: skip
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


def run(*flags: str, **environ: str) -> tuple[int, str, str]:
    """Exit status, output and errors of the program."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OPENAI_", "STREAMPROXY_"))}
    done = subprocess.run([sys.executable, "-W", "error", str(PROGRAM), *flags], capture_output=True,
                          env={**clean, **environ}, text=True, check=False, timeout=DEADLINE)  # fmt: skip
    check_no_key(done.stdout + done.stderr)
    return done.returncode, done.stdout, done.stderr


def test_command_line_demo_end_to_end_and_drain_on_sigterm() -> None:
    with launched("--demo") as (process, front), Client(front).ask({"prompt": "Grüße 👋"}) as client:
        assert client.head().status == 200
        first = client.chunk()
        process.send_signal(signal.SIGTERM)
        assert "Grüße 👋" in (first + client.body()).decode()
        assert process.wait(DEADLINE) == 0
        assert process.stderr and " ending=complete " in process.stderr.read()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_command_line_second_signal_aborts_at_once(provider: Provider, number: signal.Signals) -> None:
    with launched(OPENAI_BASE_URL=provider.url) as (process, front), Client(front).ask(PROMPT) as client, provider.take() as upstream:
        upstream.start(A)
        client.head()
        client.chunk()
        process.send_signal(number)
        wait_for(lambda: refused(front))
        process.send_signal(number)
        assert client.rest() == b"" and upstream.gone()
        assert process.wait(DEADLINE) == 0
        assert process.stderr and " ending=aborted " in process.stderr.read()


def refused(front: Any) -> bool:
    try:
        Client(front).sock.close()
    except OSError:
        return True
    return False


def test_command_line_json_log(provider: Provider) -> None:
    with launched("--log-format", "json", OPENAI_BASE_URL=provider.url) as (process, front):
        with Client(front).ask(PROMPT) as client, provider.take() as upstream:
            upstream.start(A)
            upstream.finish()
            client.head()
            client.body()
        process.send_signal(signal.SIGTERM)
        entry = json.loads(process.stderr.readline())
        assert (entry["ending"], entry["pieces"], entry["usage"]) == ("complete", 1, None)


def test_command_line_no_key() -> None:
    assert run() == (2, "", "streamproxy: no API key: set OPENAI_API_KEY or OPENAI_API_KEY_FILE, or try --demo\n")


@pytest.mark.parametrize("flags", [("--idle-timeout", "x"), ("--bind", "0.0.0.0:80"), ("--ca-file", "/no/such/file"), ("--nonsense",), ("--mod", "x"), ("extra",), ("--model",)])
def test_command_line_bad_value_is_one_line_and_status_2(flags: tuple[str, ...]) -> None:
    status, out, err = run(*flags, OPENAI_API_KEY=KEY)
    assert (status, out) == (2, "") and err.count("\n") == 1 and err.startswith("streamproxy: ")


def test_command_line_address_taken_is_one_line_and_status_1() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        bind = f"127.0.0.1:{taken.getsockname()[1]}"
        assert run("--demo", "--bind", bind) == (1, "", f"streamproxy: cannot listen at {bind}: address already in use\n")


def test_command_line_help_lists_every_setting() -> None:
    status, out, _ = run("--help", COLUMNS="300")
    assert status == 0
    for setting in streamproxy.Settings.TABLE:
        assert setting.variable in out and setting.flag in out
    assert f"streamproxy {streamproxy.__version__}" in run("--version")[1]


# ---------------------------------------------------------------- the library


def test_import_does_nothing() -> None:
    code = (
        "import logging, os, sys, threading; before = set(os.environ), os.listdir('/proc/self/fd') if os.path.isdir('/proc/self/fd') else 0\n"
        "import streamproxy\n"
        "assert threading.active_count() == 1 and not logging.getLogger('streamproxy').handlers and not logging.root.handlers\n"
        "assert before == (set(os.environ), os.listdir('/proc/self/fd') if os.path.isdir('/proc/self/fd') else 0)\n"
    )
    done = subprocess.run([sys.executable, "-I", "-W", "error", "-c", f"import sys; sys.path.insert(0, {str(HERE)!r})\n{code}"],
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.skipif(sys.version_info < (3, 10), reason="sys.stdlib_module_names came with 3.10")
def test_module_imports_the_standard_library_alone() -> None:
    nodes = list(ast.walk(ast.parse(PROGRAM.read_text(encoding="utf-8"))))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} <= sys.stdlib_module_names


def test_library_text_of_a_prompt(provider: Provider) -> None:
    text = streamproxy.stream_text("Say hello", streamproxy.Settings(upstream=provider.url, api_key=KEY))
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.extend(text))
    reader.start()
    with provider.take() as upstream:
        upstream.start(ROLE, delta("Hä"), delta("👋"))
        wait_for(lambda: "".join(got) == "Hä👋")  # before the end
        upstream.finish()
        reader.join(DEADLINE)
    assert "".join(got) == "Hä👋"


def test_library_failure_is_raised_after_the_text_that_came(provider: Provider) -> None:
    before = threading.active_count(), descriptors()
    text = streamproxy.stream_text("x", streamproxy.Settings(upstream=provider.url))
    got: list[str] = []

    def play() -> None:
        with provider.take() as upstream:
            upstream.start(A)

    thread = threading.Thread(target=play)
    thread.start()
    with pytest.raises(streamproxy.ProxyError, match="within its answer"):
        got.extend(text)
    thread.join()
    assert got == ["a"]
    assert wait_for(lambda: (threading.active_count(), descriptors()), lambda now: now == before)


def test_library_bad_prompt_leaves_nothing_open(provider: Provider) -> None:
    before = threading.active_count(), descriptors()
    with pytest.raises(streamproxy.ProxyError, match="non-empty"):
        next(iter(streamproxy.stream_text("", streamproxy.Settings(upstream=provider.url))))
    assert (threading.active_count(), descriptors()) == before


def test_settings_given_as_texts_in_a_tuple_are_read() -> None:
    settings = streamproxy.Settings(demo=True, trusted_proxy=("192.0.2.0/24",))
    assert streamproxy.Access(settings).address_of("192.0.2.1", "198.51.100.1") == "198.51.100.1"
    with pytest.raises(streamproxy.SettingsError, match="an address or a network"):
        streamproxy.Settings(demo=True, trusted_proxy=("192.0.2.1/24",))
    with pytest.raises(TypeError, match="no such setting: modle"):
        streamproxy.Settings(demo=True, modle="x")
    with pytest.raises(AttributeError):
        settings.model = "x"


def test_relay_cancelled_alarms_do_not_pile_up() -> None:
    with Stage() as stage:
        stage.relay.set_alarm(stage.now + 1, lambda: None)
        for number in range(10_000):
            stage.relay.cancel(stage.relay.set_alarm(stage.now + 2 + number, lambda: None))
        assert len(stage.relay._alarms) < 2500


def test_library_leaving_the_loop_closes_upstream(provider: Provider) -> None:
    text = streamproxy.stream_text("x", streamproxy.Settings(upstream=provider.url))
    upstreams: list[UpstreamPeer] = []

    def play() -> None:
        upstreams.append(provider.take())
        upstreams[0].start(A)

    thread = threading.Thread(target=play)
    thread.start()
    assert next(text) == "a"
    text.close()  # type: ignore[attr-defined]
    thread.join()
    assert upstreams[0].gone()


def test_library_demo_needs_nothing() -> None:
    assert "You asked: “Hi”" in "".join(streamproxy.stream_text("Hi", streamproxy.Settings(demo=True)))


# ---------------------------------------------------------------- the documents


def test_readme_settings_table_is_the_code_s() -> None:
    rows = [line for line in README.read_text(encoding="utf-8").splitlines() if re.match(r"\| (`--|–)", line)]
    expected = []
    for setting in streamproxy.Settings.TABLE:
        shown = f"`{setting.flag} {setting.metavar}`".replace(" `", "`") if setting.flag else "–"
        cells = [shown, f"`{setting.variable}`", setting.shown, setting.help]
        expected.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    assert rows == expected


def test_documents_name_no_flag_or_variable_that_does_not_exist() -> None:
    text = README.read_text(encoding="utf-8").partition("## Not yet")[0] + (HERE / "nginx.conf.example").read_text()
    ours = re.findall(r"streamproxy\.py[^`\n]*", text) + re.findall(r"`(--[a-z-]+)", text)
    flags = {flag for command in ours for flag in re.findall(r"--[a-z][a-z-]+", command)}
    assert flags - {setting.flag for setting in streamproxy.Settings.TABLE} <= {"--help", "--version"}
    names = {setting.variable for setting in streamproxy.Settings.TABLE} | {"OPENAI_API_KEY_FILE"}
    assert set(re.findall(r"\b(?:STREAMPROXY|OPENAI)_[A-Z_]+", text)) - names <= {"STREAMPROXY_TEST_REQUIRE_ALL", "STREAMPROXY_TEST_AIMOCK", "STREAMPROXY_TEST_SDKS"}


def readme_commands() -> list[tuple[dict[str, str], list[str]]]:
    """The variables and flags of each command line in README.md that starts the program."""
    text = README.read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"(?:^    |`)((?:\w+=\S+ )?python3 /?streamproxy\.py[^`\n#]*)", text, re.MULTILINE)
    split = [[word for word in shlex.split(command)] for command in commands]
    return [(dict(word.split("=", 1) for word in words[: words.index("python3")]), words[words.index("python3") + 2 :]) for words in split]


def test_readme_commands_are_taken(tmp_path: Path, monkeypatch: Any) -> None:
    commands = readme_commands()
    assert len(commands) >= 9
    for environ, flags in commands:
        if "--version" not in flags:
            streamproxy.Settings.load(environ, vars(streamproxy.build_parser().parse_args(flags)))


UPSTREAMS = {
    "Azure": ("POST /openai/deployments/DEPLOYMENT/chat/completions?api-version=2024-10-21 HTTP/1.1", "api-key: "), "Anthropic": ("POST /v1/messages HTTP/1.1", "x-api-key: "),
    "Ollama": ("POST /v1/chat/completions HTTP/1.1", ""), "vLLM": ("POST /v1/chat/completions HTTP/1.1", ""), "llama.cpp": ("POST /v1/chat/completions HTTP/1.1", ""),
    "another streamproxy": ("POST /v1/chat/completions HTTP/1.1", "Authorization: Bearer "),
}  # fmt: skip


@pytest.mark.parametrize("name", UPSTREAMS)
def test_readme_line_for_each_upstream_asks_it_rightly(provider: Provider, name: str) -> None:
    line, field = UPSTREAMS[name]
    row = re.search(rf"^\| {re.escape(name)} \| `(.+)` \|$", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert row
    words = shlex.split(row[1])
    settings = streamproxy.Settings.load({"OPENAI_API_KEY": KEY} if field else {}, vars(streamproxy.build_parser().parse_args(words[words.index("python3") + 2 :])))
    there = urllib.parse.urlsplit(settings.upstream)
    upstream_url = there._replace(scheme="http", netloc=urllib.parse.urlsplit(provider.url).netloc).geturl()
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(running(None, upstream=upstream_url, auth_header=settings.auth_header, model=settings.model, api_key=settings.api_key))
        path = "/v1/messages" if name == "Anthropic" else "/v1/chat/completions"
        stack.enter_context(Client(server).ask({**ASKED, "model": settings.model}, path=path))
        upstream = stack.enter_context(provider.take())
        assert upstream.head.startswith(line + "\r\n") and (f"\r\n{field}{KEY}\r\n" in upstream.head if field else KEY not in upstream.head)


def test_readme_another_streamproxy_as_upstream(provider: Provider, tmp_path: Path) -> None:
    with running(provider, token_file=token_file(tmp_path, f"proxy {ALICE}")) as far, running(None, upstream=far.url + "/v1", api_key=ALICE) as near:
        for path, body in (("/", PROMPT), ("/v1/chat/completions", ASKED)):
            with Client(near).ask(body, path=path) as client, provider.take() as upstream:
                upstream.start(A)
                assert client.head().status == 200 and b"a" in client.chunk()
                upstream.finish()
                client.body()


def test_module_says_its_licence_and_runs_by_itself() -> None:
    lines = PROGRAM.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "#!/usr/bin/env python3" and lines[1] == "# SPDX-License-Identifier: MIT"
    assert os.access(PROGRAM, os.X_OK)


# ---------------------------------------------------------------- nginx

EXAMPLE = HERE / "nginx.conf.example"
GZIP = "gzip on; gzip_types *; gzip_min_length 0;"
PLAIN_NGINX = """
error_log /var/log/nginx/error.log;
events { }
http { access_log off; server { listen 80; %s
    location / { proxy_http_version 1.1; proxy_pass http://unix:/run/streamproxy/1.sock; } } }
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def front_server(command: list[str], port: int, **environ: str) -> Iterator[Front]:
    """What command runs, once it accepts connections at port."""
    front = Front(f"http://127.0.0.1:{port}")
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, **environ})
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
        "listen 80;": f"listen 127.0.0.1:{port};",
        "/var/log/nginx/": f"{folder}/",
        "/run/streamproxy/": f"{folder}/",
    }.items():
        config = config.replace(old, new)
    (folder / "nginx.conf").write_text(config)
    user = "user root;" if os.geteuid() == 0 else ""
    command = [binary, "-p", str(folder), "-c", str(folder / "nginx.conf"), "-g", f"daemon off; pid {folder}/nginx.pid; {user}"]
    with front_server(command, port) as front:
        yield front


@pytest.mark.parametrize("gzip", ["", GZIP], ids=["plain", "gzip"])
@pytest.mark.parametrize("buffering", ["on", "off"])
@pytest.mark.parametrize("over", ["tcp", "unix"])
@pytest.mark.parametrize("mode", ["text", "events"])
def test_nginx_passes_each_piece_on_at_once(provider: Provider, tmp_path: Path, mode: str, over: str, buffering: str, gzip: str) -> None:
    bind = f"unix:{tmp_path}/1.sock" if over == "unix" else "127.0.0.1:0"
    with running(provider, bind=bind) as server:
        config = PLAIN_NGINX % f"proxy_buffering {buffering}; {gzip}"
        config = config if over == "unix" else config.replace("http://unix:/run/streamproxy/1.sock", server.url)
        fields = {"Accept_Encoding": "gzip", **(EVENTS if mode == "events" else {})}
        with nginx(tmp_path, config) as front, Client(front).ask(PROMPT, **fields) as client, provider.take() as upstream:
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
            client.sock.settimeout(0.5)
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


@pytest.mark.skipif(os.geteuid() != 0, reason="nginx -t opens nginx's own log and port, which takes root")
def test_nginx_example_passes_nginx_t() -> None:
    done = subprocess.run([program("nginx"), "-t", "-c", str(EXAMPLE)], check=False, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0 and "[warn]" not in done.stderr, done.stderr


def test_nginx_example_agrees_with_our_defaults() -> None:
    values = dict(re.findall(r"^ *(\w+) +(\d+)[ms];", EXAMPLE.read_text(), re.MULTILINE))
    ours = streamproxy.Settings(api_key=KEY)
    assert int(values["client_max_body_size"]) << 20 == int(values["client_body_buffer_size"]) << 20 == ours.max_body
    assert int(values["proxy_read_timeout"]) > ours.first_byte_timeout > ours.heartbeat
    assert int(values["keepalive_timeout"]) < ours.client_timeout


@pytest.mark.parametrize(("method", "path"), [("POST", "/"), ("GET", "/?prompt=secret")])
def test_nginx_example_streams_and_logs_no_prompt(provider: Provider, tmp_path: Path, caplog: Any, method: str, path: str) -> None:
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


def test_nginx_example_goes_to_another_process_while_one_restarts(provider: Provider, tmp_path: Path) -> None:
    with running(provider, bind=f"unix:{tmp_path}/1.sock"), nginx(tmp_path, EXAMPLE.read_text()) as front:
        for _ in range(2):  # least_conn would give each process one
            with Client(front).ask(PROMPT) as client, provider.take() as upstream:
                upstream.start(A)
                assert client.head().status == 200 and client.chunk() == b"a"


# ---------------------------------------------------------------- other servers in front

APACHE_MODULES = "mpm_event proxy proxy_http deflate filter authz_core"
# What is around README's lines.
OTHERS = {
    "Apache": "PidFile {folder}/pid\nErrorLog {folder}/log\nServerName localhost\nListen 127.0.0.1:{port}\n"
              + "".join(f"LoadModule {name}_module {{modules}}/mod_{name}.so\n" for name in APACHE_MODULES.split())
              + "AddOutputFilterByType DEFLATE text/plain text/event-stream\n{lines}",
    "HAProxy": "{lines}\nfrontend all\n bind 127.0.0.1:{port}\n default_backend streamproxy\n",
    "Caddy": "{{\n admin off\n}}\n{lines}",
}  # fmt: skip


@contextlib.contextmanager
def other_front(name: str, folder: Path, server: Any) -> Iterator[Front]:
    """The server of that name, set up as README says."""
    lines = re.search(rf"^```\n# {name}\b.*\n([^`]*)```", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert lines
    binary, port, config = program({"Apache": "apache2"}.get(name, name.lower())), free_port(), folder / "config"
    text = lines[1].replace("127.0.0.1:8000", urllib.parse.urlsplit(server.url).netloc).replace("chat.example.com", f"http://:{port}")
    config.write_text(OTHERS[name].format(folder=folder, port=port, lines=text, modules="/usr/lib/apache2/modules"))
    arguments = {"Apache": ["-DFOREGROUND", "-f"], "HAProxy": ["-db", "-f"], "Caddy": ["run", "--adapter", "caddyfile", "--config"]}
    with front_server([binary, *arguments[name], str(config)], port, HOME=str(folder)) as front:
        yield front


@pytest.mark.parametrize("mode", ["text", "events"])
@pytest.mark.parametrize("name", OTHERS)
def test_other_front_passes_each_piece_on_at_once(provider: Provider, tmp_path: Path, name: str, mode: str) -> None:
    with running(provider) as server, other_front(name, tmp_path, server) as front:
        fields = {"Accept_Encoding": "gzip", **(EVENTS if mode == "events" else {})}
        with Client(front).ask(PROMPT, **fields) as client, provider.take() as upstream:
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
                upstream.start(A)
                client.head()
            client.sock.close()
            assert upstream.gone()


@pytest.mark.parametrize("mode", ["text", "events"])
def test_apache_sees_that_a_client_left_with_the_next_text_or_ping(provider: Provider, tmp_path: Path, mode: str) -> None:
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


@pytest.mark.parametrize("name", OTHERS)
def test_other_front_tells_who_asks_and_under_which_name(provider: Provider, tmp_path: Path, name: str) -> None:
    asked = b"GET / HTTP/1.1\r\nHost: chat.example.com\r\n\r\n"
    with other_front(name, tmp_path, provider) as front, Client(front) as client:
        client.send(asked)
        with provider.take() as seen:
            assert {"host: chat.example.com", "x-forwarded-for: 127.0.0.1"} <= set(seen.head.lower().split("\r\n"))


@pytest.mark.parametrize(("name", "mode"), [(name, mode) for name in OTHERS for mode in ("text", "events") if (name, mode) != ("Caddy", "text")])
def test_other_front_lets_a_cut_answer_be_told(provider: Provider, tmp_path: Path, name: str, mode: str) -> None:
    with running(provider) as server, other_front(name, tmp_path, server) as front:
        with Client(front).ask(PROMPT, **(EVENTS if mode == "events" else {})) as client, provider.take() as upstream:
            upstream.start(A)
            assert client.head().status == 200 and b"a" in client.chunk()
            upstream.sock.close()
            if mode == "text":
                assert client.rest() == b""
            else:
                assert b"event: error" in client.body()


# ---------------------------------------------------------------- curl


def curl(front: Any, *args: str) -> Any:
    command = [program("curl"), "-sS", "-N", "--max-time", str(DEADLINE), *args, front.url]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_curl_sees_text_arrive_and_the_end(server: Any, provider: Provider) -> None:
    process = curl(server, "-d", json.dumps(PROMPT))
    with provider.take() as upstream:
        upstream.start(A)
        assert process.stdout.read(1) == b"a"
        upstream.event(delta("b"))
        assert process.stdout.read(1) == b"b"
        upstream.finish()
        assert process.communicate() == (b"", b"") and process.returncode == 0


@pytest.mark.parametrize(("flags", "status"), [((), 18), (("--http1.0",), 56)])
def test_curl_fails_where_the_answer_is_cut(server: Any, provider: Provider, flags: tuple[str, ...], status: int) -> None:
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


# ---------------------------------------------------------------- Chromium


class WebDriver:
    """A headless Chromium, driven over W3C WebDriver (https://www.w3.org/TR/webdriver2/)."""

    ENTER, SHIFT = "\ue007", "\ue008"
    FLAGS = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--no-first-run", "--disable-quic",
             "--disable-background-networking", "--disable-component-update", "--disable-sync",
             "--host-resolver-rules=MAP rebound.example 127.0.0.1")  # fmt: skip

    def __init__(self, folder: Path) -> None:
        chromium, driver = program("chromium", "chromium-browser", "google-chrome"), program("chromedriver")
        self.process = subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout
        ports = (re.search(r"started successfully on port (\d+)", line) for line in self.process.stdout)
        self.port, self.path = int(next(filter(None, ports))[1]), "/session"
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

    def log(self) -> list[dict[str, Any]]:
        """New console entries, violations of the page's policy among them; a lost request is the browser's own entry."""
        return [entry for entry in self.call("POST", "/se/log", {"type": "browser"}) if entry["source"] != "network"]


@pytest.fixture(scope="session")
def browser(tmp_path_factory: Any) -> Iterator[WebDriver]:
    with contextlib.closing(WebDriver(tmp_path_factory.mktemp("chromium"))) as driver:
        yield driver


@pytest.fixture
def page(browser: WebDriver, server: Any) -> Iterator[WebDriver]:
    browser.call("POST", "/url", {"url": server.url})
    yield browser
    assert browser.log() == []


def say(page: WebDriver, text: str = "Hello") -> None:
    page.element("#prompt", "value", text=text + WebDriver.ENTER)


def growing(page: WebDriver, text: str) -> None:
    page.wait("return document.querySelector('.assistant.streaming')?.textContent === arguments[0]", text)


def conversation(page: WebDriver, *expected: tuple[str, str]) -> None:
    page.wait("return document.querySelector('#stop').hidden")
    script = "return [...document.querySelectorAll('.message')].map(element => [element.className, element.textContent])"
    assert page.run(script) == [[f"message {role}", text] for role, text in expected]


def test_page_text_grows_as_it_arrives(page: WebDriver, provider: Provider) -> None:
    say(page)
    with provider.take() as upstream:
        assert json.loads(upstream.body)["messages"] == [{"role": "user", "content": "Hello"}]
        upstream.start(ROLE, delta("Hällo "))
        growing(page, "Hällo ")
        upstream.event(delta("👋"))
        growing(page, "Hällo 👋")
        upstream.finish()
        conversation(page, ("user", "Hello"), ("assistant", "Hällo 👋"))
    say(page, "More")
    with provider.take() as upstream:
        assert [message["content"] for message in json.loads(upstream.body)["messages"]] == ["Hello", "Hällo 👋", "More"]
        upstream.start(A)
        upstream.event(delta("", "length"), DONE)
        page.wait("return document.querySelector('.note')?.textContent === 'The answer reached the token limit.'")


def test_page_stop_closes_upstream(page: WebDriver, provider: Provider) -> None:
    say(page)
    with provider.take() as upstream:
        upstream.start(delta("partial"))
        growing(page, "partial")
        page.element("#stop", "click")
        assert upstream.gone()
    conversation(page, ("user", "Hello"), ("assistant", "partialStopped."))
    assert page.run("return document.activeElement.id") == "prompt"


def test_page_shows_errors_and_cut_answers(page: WebDriver, provider: Provider) -> None:
    said = [("user", "Hello"), ("assistant", ""), ("error", "Slow down")]
    say(page)
    with provider.take() as upstream:
        upstream.send(error_answer(429, b'{"error": "Slow down"}'))
        conversation(page, *said)
    say(page, "")  # the question is back in the form
    said += [("user", "Hello"), ("assistant", "a"), ("error", "Upstream closed the connection within its answer.")]
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
    conversation(page, ("user", markup), ("assistant", "Reasoning" + markup * 2))
    assert page.run("return document.querySelectorAll('details:not([open]) img, img, main script').length") == 0


def test_page_enter_sends_and_shift_enter_does_not(page: WebDriver, provider: Provider) -> None:
    page.element("#prompt", "value", text="one" + WebDriver.SHIFT + WebDriver.ENTER)
    say(page, "two")
    with provider.take() as upstream:
        assert json.loads(upstream.body)["messages"][0]["content"] == "one\ntwo"
        upstream.start(A)
        upstream.finish()
    conversation(page, ("user", "one\ntwo"), ("assistant", "a"))


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


def test_eventsource_in_a_browser_stops_after_its_answer(page: WebDriver, provider: Provider) -> None:
    page.run("""window.seen = []; const source = new EventSource('/?prompt=Hi');
        for (const type of ['message', 'done']) source.addEventListener(type, event => seen.push(event.data));
        source.onerror = () => seen.push(source.readyState)""")
    with provider.take() as upstream:
        upstream.start(A)
        page.wait("return seen.length === 1")
        upstream.finish()
    page.wait("return seen.includes(EventSource.CLOSED)")  # it asked again by itself and got 204
    assert page.run("return seen") == ['{"text": "a"}', '{"finish_reason": "stop", "usage": null}', 0, 2]
    assert provider.nobody_came()


def test_fetch_in_a_browser_rejects_a_cut_answer(page: WebDriver, provider: Provider) -> None:
    page.run("""fetch('/', {method: 'POST', body: '{"prompt": "Hi"}'}).then(answer => answer.text())
        .then(text => { window.got = text }, error => { window.got = error.name })""")
    with provider.take() as upstream:
        upstream.start(A)
    assert page.wait("return window.got") == "TypeError"


def test_page_asks_for_the_token_and_keeps_it_for_the_tab(browser: WebDriver, provider: Provider, tmp_path: Path) -> None:
    with running(provider, token_file=token_file(tmp_path, f"alice {ALICE}")) as server:
        browser.call("POST", "/url", {"url": server.url})
        assert browser.run("return document.querySelector('#token').hidden")
        say(browser)
        conversation(browser, ("user", "Hello"), ("assistant", ""), ("error", "A client token is needed: Authorization: Bearer TOKEN."))
        assert not browser.run("return document.querySelector('#token').hidden")
        assert browser.run("return document.querySelector('#prompt').value") == "Hello"  # it is offered again
        browser.element("#token", "value", text=ALICE)
        for again in (False, True):
            if again:
                browser.call("POST", "/refresh", {})
                say(browser)
            else:
                browser.element("#send", "click")
            with provider.take() as upstream:
                upstream.start(A)
                upstream.finish()
                browser.wait("return document.querySelector('.assistant:last-child')?.textContent === 'a'")
            browser.wait("return document.querySelector('#stop').hidden && document.querySelector('#token').hidden")
    browser.log()


FETCH = """const [url, body] = arguments;
    fetch(url, {method: 'POST', body, headers: {'Content-Type': 'application/json', 'X-Api-Key': 'x'}})
        .then(async answer => { window.got = [answer.status, answer.headers.get('X-Request-Id').length, await answer.text()] }, error => { window.got = error.name })"""


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
            browser.run("window.got = null; fetch(arguments[0], {method: 'POST', mode: 'no-cors', body: arguments[1]}).then(() => { window.got = 'sent' })",
                        server.url + "/", json.dumps(PROMPT))  # fmt: skip
            assert browser.wait("return window.got") == "sent" and provider.nobody_came()
    browser.log()


def test_rebound_name_in_a_browser_is_refused(browser: WebDriver, provider: Provider) -> None:
    with running(provider) as server:
        url = server.url.replace("127.0.0.1", "rebound.example")
        browser.call("POST", "/url", {"url": url + "/healthz"})
        browser.run("fetch(arguments[0], {method: 'POST', body: arguments[1]}).then(answer => { window.got = answer.status })", url + "/", json.dumps(PROMPT))
        assert browser.wait("return window.got") == 403 and provider.nobody_came()
    browser.log()


# ---------------------------------------------------------------- an upstream nobody here wrote

AIMOCK_FIXTURES = [
    {"match": {"userMessage": "hello"}, "response": {"content": "Hello from aimock, piece by piece."}, "chunkSize": 5},
    {"match": {"userMessage": "slow"}, "response": {"content": "A slow answer."}, "chunkSize": 4, "latency": 50},
    {"match": {"userMessage": "cut"}, "response": {"content": "This answer is cut."}, "chunkSize": 5, "latency": 20, "truncateAfterChunks": 3},
    {"match": {"userMessage": "limit"}, "response": {"error": {"message": "Slow down.", "type": "rate_limit_error"}, "status": 429, "retryAfter": 7}},
    {"match": {"userMessage": "broken"}, "response": {"error": {"message": "Server error.", "type": "server_error"}, "status": 500}},
    {"match": {"userMessage": "reason"}, "response": {"reasoning": "Let me think.", "content": "Done."}},
    {"match": {"userMessage": "drop"}, "response": {"content": "never"}, "chaos": {"disconnectRate": 1.0}},
    {"match": {"userMessage": "weather"}, "response": {"toolCalls": [{"name": "get_weather", "arguments": {"city": "Paris"}}]}},
    {"match": {"inputText": "hello"}, "response": {"embedding": [0.1, 0.2, 0.3]}},
    {"match": {"userMessage": "unicode"}, "response": {"content": "héllo 👋🏽 wörld 👩‍👩‍👧"}, "chunkSize": 1},
]


@pytest.fixture(scope="session")
def aimock(tmp_path_factory: Any) -> Iterator[str]:
    """The base URL of @copilotkit/aimock, installed below STREAMPROXY_TEST_AIMOCK."""
    folder = os.environ.get("STREAMPROXY_TEST_AIMOCK") or missing("STREAMPROXY_TEST_AIMOCK names no folder with aimock")
    script = Path(folder) / "node_modules/@copilotkit/aimock/dist/cli.js"
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
    ("hello", 200, "Hello from aimock, piece by piece."), ("slow", 200, "A slow answer."), ("unicode", 200, "héllo 👋🏽 wörld 👩‍👩‍👧"), ("reason", 200, "Done."),
    ("cut", 200, None), ("limit", 429, "Slow down."), ("broken", 502, "Upstream failed with status 500."),
    ("drop", 502, "Upstream closed the connection without an answer."),
    ("nothing matches", 502, "Upstream failed with status 503."),
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
    assert json.loads(events[0].data) == {"text": "Let me think."} and json.loads(events[-1].data)["usage"]["total_tokens"]


KINDS = ["/chat/completions", "/responses", "/messages", "/embeddings", "/completions"]


def recorded(base: str) -> Iterator[tuple[str, bytes]]:
    """Answers of aimock of every kind: content type and body."""
    host, port = base[len("http://") :].removesuffix("/v1").split(":")
    for path in KINDS:
        for prompt in ("hello", "unicode", "reason", "slow", "weather"):
            for stream in (False, True):
                asked = {"model": "gpt-4.1-mini", "messages": [{"role": "user", "content": prompt}], "input": prompt, "prompt": prompt,
                         "stream": stream, "max_tokens": 50, "stream_options": {"include_usage": True}}
                connection = http.client.HTTPConnection(host, int(port), timeout=DEADLINE)
                connection.request("POST", "/v1" + path, json.dumps(asked), {"Content-Type": "application/json", "Authorization": "Bearer x"})
                response = connection.getresponse()
                if response.status == 200:
                    yield response.headers["Content-Type"], response.read()
                connection.close()


def test_aimock_answers_of_every_kind_pass_byte_for_byte_however_they_are_cut(aimock: str, provider: Provider) -> None:
    answers, rng = list(recorded(aimock)), random.Random(5)
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
                    wire = head + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n" + b"".join(map(chunk, pieces)) + b"0\r\n\r\n"
                else:
                    wire = head + (b"Content-Length: %d\r\nConnection: close\r\n" % len(body) if rng.random() < 0.5 else b"") + b"\r\n" + body
                at = 0
                while at < len(wire):
                    size = rng.choice([7, 100, 1000, 5000])
                    upstream.send(wire[at : at + size])
                    at += size
            got = client.head()
            assert got.status == 200 and got.fields["Content-Type"] == content_type
            assert (client.exactly(len(body)) if "Content-Length" in got.fields else client.body()) == body


# ---------------------------------------------------------------- SDKs

OPENAI_PYTHON = """
import json, sys, openai
url, told = sys.argv[1], {}
client = openai.OpenAI(base_url=url, api_key="theirs", max_retries=0)
say = lambda text: [{"role": "user", "content": text}]
def name(call):
    try:
        return call()
    except Exception as error:
        return [type(error).__name__, (getattr(error, "body", None) or {}).get("message"), getattr(error, "code", None)]
def chat(text, **more):
    return client.chat.completions.create(model="gpt-4.1-mini", messages=say(text), **more)
def streamed(text):
    got = ""
    try:
        for part in chat(text, stream=True):
            got += (part.choices and part.choices[0].delta.content) or ""
    except Exception as error:
        return [got, type(error).__name__]
    return got
def tools():
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}}
    calls = [call for part in chat("weather", tools=[tool], stream=True) for call in (part.choices and part.choices[0].delta.tool_calls) or []]
    return [calls[0].function.name, json.loads("".join(call.function.arguments or "" for call in calls))]
def usage():
    return [part.usage.total_tokens > 0 for part in chat("hello", stream=True, stream_options={"include_usage": True}) if part.usage]
def responses():
    return "".join(event.delta for event in client.responses.create(model="gpt-4.1-mini", input="hello", stream=True) if event.type == "response.output_text.delta")
told["chat"] = name(lambda: chat("hello").choices[0].message.content)
told["stream"] = name(lambda: streamed("unicode"))
told["tools"] = name(tools)
told["usage"] = name(usage)
told["responses"] = name(responses)
told["response"] = name(lambda: client.responses.create(model="gpt-4.1-mini", input="hello").output_text)
told["embeddings"] = name(lambda: len(client.embeddings.create(model="gpt-4.1-mini", input="hello").data))
told["models"] = name(lambda: [model.id for model in client.models.list()])
told["limit"] = name(lambda: chat("limit", stream=True))
told["broken"] = name(lambda: chat("broken"))
told["cut"] = name(lambda: streamed("cut"))
told["wrong model"] = name(lambda: client.chat.completions.create(model="gpt-5", messages=say("hello")))
told["no model"] = name(lambda: client.post("/chat/completions", cast_to=object, body={}))
told["no path"] = name(lambda: client.post("/nothing", cast_to=object, body={}))
print(json.dumps(told))
"""

ANTHROPIC_PYTHON = """
import json, sys, anthropic
url, told = sys.argv[1].removesuffix("/v1"), {}
client = anthropic.Anthropic(base_url=url, api_key="theirs", max_retries=0)
def ask(text, model="gpt-4.1-mini"):
    return dict(model=model, max_tokens=50, messages=[{"role": "user", "content": text}])
def name(call):
    try:
        return call()
    except Exception as error:
        return [type(error).__name__, ((getattr(error, "body", None) or {}).get("error") or {}).get("message")]
def streamed(text):
    got = ""
    try:
        with client.messages.stream(**ask(text)) as stream:
            for piece in stream.text_stream:
                got += piece
    except Exception as error:
        return [got, type(error).__name__]
    return got
told["message"] = name(lambda: client.messages.create(**ask("hello")).content[0].text)
told["stream"] = name(lambda: streamed("unicode"))
told["limit"] = name(lambda: client.messages.create(**ask("limit")))
told["broken"] = name(lambda: client.messages.create(**ask("broken")))
told["cut"] = name(lambda: streamed("cut"))
told["wrong model"] = name(lambda: client.messages.create(**ask("hello", "gpt-5")))
print(json.dumps(told))
"""

OPENAI_NODE = """
import OpenAI from "openai";
const client = new OpenAI({baseURL: process.argv[2], apiKey: "theirs", maxRetries: 0}), told = {};
const name = async call => { try { return await call(); } catch (error) { return [error.constructor.name, error.message]; } };
const chat = (text, more = {}) => client.chat.completions.create({model: "gpt-4.1-mini", messages: [{role: "user", content: text}], ...more});
const streamed = async text => {
  let got = "";
  try { for await (const part of await chat(text, {stream: true})) got += part.choices[0]?.delta?.content ?? ""; }
  catch (error) { return [got, "error"]; }
  return got;
};
told["chat"] = await name(async () => (await chat("hello")).choices[0].message.content);
told["stream"] = await name(() => streamed("unicode"));
told["responses"] = await name(async () => {
  let got = "";
  for await (const event of await client.responses.create({model: "gpt-4.1-mini", input: "hello", stream: true}))
    if (event.type === "response.output_text.delta") got += event.delta;
  return got;
});
told["models"] = await name(async () => (await client.models.list()).data.map(model => model.id));
told["limit"] = await name(() => chat("limit"));
told["broken"] = await name(() => chat("broken"));
told["cut"] = await name(() => streamed("cut"));
told["wrong model"] = await name(() => client.chat.completions.create({model: "gpt-5", messages: [{role: "user", content: "hello"}]}));
console.log(JSON.stringify(told));
"""

HELLO, UNICODE = "Hello from aimock, piece by piece.", "héllo 👋🏽 wörld 👩‍👩‍👧"
NO_MODEL = "The model 'gpt-5' may not be used here (--allow-model)."


@pytest.fixture
def python_sdks() -> list[str]:
    python = os.environ.get("STREAMPROXY_TEST_SDKS") or missing("STREAMPROXY_TEST_SDKS names no Python that has openai and anthropic")
    return [python, "-"]


@pytest.fixture
def node_sdk() -> list[str]:
    folder = os.environ.get("STREAMPROXY_TEST_AIMOCK") or missing("STREAMPROXY_TEST_AIMOCK names no folder with the SDK for Node")
    return ["env", "-C", folder, program("node"), "--input-type=module", "-"]


def run_script(command: list[str], script: str, url: str) -> Any:
    """What a script that uses an SDK tells, as JSON."""
    environ = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    done = subprocess.run([*command, url], input=script, env=environ, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    check_no_key(done.stdout + done.stderr)
    return json.loads(done.stdout)


def test_openai_for_python(aimock: str, python_sdks: list[str]) -> None:
    with running(None, upstream=aimock) as server:
        assert run_script(python_sdks, OPENAI_PYTHON, server.url + "/v1") == {
            "chat": HELLO, "stream": UNICODE, "tools": ["get_weather", {"city": "Paris"}], "usage": [True], "responses": HELLO, "response": HELLO,
            "embeddings": 1, "models": [], "cut": ["This ", "APIConnectionError"],
            "limit": ["RateLimitError", "Slow down.", None],
            "broken": ["InternalServerError", "Upstream failed with status 500.", "bad_gateway"],
            "wrong model": ["PermissionDeniedError", NO_MODEL, "model_not_found"],
            "no model": ["BadRequestError", 'The body must have one "model", a string.', "model_not_found"], "no path": ["NotFoundError", "There is nothing at this path.", "not_found"],
        }  # fmt: skip


def test_anthropic_for_python(aimock: str, python_sdks: list[str]) -> None:
    with running(None, upstream=aimock) as server:
        assert run_script(python_sdks, ANTHROPIC_PYTHON, server.url + "/v1") == {
            "message": HELLO, "stream": UNICODE, "limit": ["RateLimitError", "Slow down."], "broken": ["InternalServerError", "Upstream failed with status 500."],
            "cut": ["", "RemoteProtocolError"], "wrong model": ["PermissionDeniedError", NO_MODEL],
        }  # fmt: skip


def test_openai_for_node(aimock: str, node_sdk: list[str]) -> None:
    with running(None, upstream=aimock) as server:
        assert run_script(node_sdk, OPENAI_NODE, server.url + "/v1") == {
            "chat": HELLO, "stream": UNICODE, "responses": HELLO, "models": [], "limit": ["RateLimitError", "429 Slow down."],
            "broken": ["InternalServerError", "502 Upstream failed with status 500."], "cut": ["This ", "error"],
            "wrong model": ["PermissionDeniedError", f"403 {NO_MODEL}"],
        }  # fmt: skip


OPENAI_CANCELS = """
import json, sys, openai
stream = openai.OpenAI(base_url=sys.argv[1], api_key="theirs", max_retries=0).chat.completions.create(
    model="gpt-4.1-mini", messages=[{"role": "user", "content": "x"}], stream=True)
got = next(iter(stream)).choices[0].delta.content
stream.close()
print(json.dumps(got))
"""


def test_openai_for_python_cancels_and_upstream_is_closed(server: Any, provider: Provider, python_sdks: list[str]) -> None:
    got: list[Any] = []
    script = threading.Thread(target=lambda: got.append(run_script(python_sdks, OPENAI_CANCELS, server.url + "/v1")))
    script.start()
    with provider.take() as upstream:
        upstream.start(A)
        assert upstream.gone()
    script.join(DEADLINE)
    assert got == ["a"]


OPENAI_ASKS_THE_DEMO = """
import json, sys, openai
client = openai.OpenAI(base_url=sys.argv[1], api_key="theirs", max_retries=0)
ask = dict(model="gpt-4.1-mini", messages=[{"role": "user", "content": "Gr\u00fc\u00dfe"}])
parts = list(client.chat.completions.create(stream=True, **ask))
print(json.dumps(["".join(part.choices[0].delta.content or "" for part in parts if part.choices),
                  client.chat.completions.create(**ask).choices[0].message.content, [model.id for model in client.models.list()]]))
"""


def test_openai_for_python_with_the_demo(python_sdks: list[str]) -> None:
    with running(None, demo=True, api_key="") as server:
        streamed, whole, models = run_script(python_sdks, OPENAI_ASKS_THE_DEMO, server.url + "/v1")
    assert streamed == whole and "Grüße" in whole and models == ["gpt-4.1-mini"]
