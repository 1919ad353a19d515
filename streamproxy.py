#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
# SPDX-FileCopyrightText: 2026 the streamproxy authors
"""A streaming proxy between web pages and an OpenAI-compatible API, in one file.

A page must never hold the API key.  This server holds it: it takes POST {"prompt": "..."},
asks the API with "stream": true, and hands each piece of text on the moment it arrives.

    OPENAI_API_KEY=sk-... python3 streamproxy.py    serve on http://127.0.0.1:8000
    python3 streamproxy.py --demo                   the same with a built-in API: no key, no network
    python3 streamproxy.py --check URL              say what on the way to one holds text back
    python3 streamproxy.py --help                   every setting

    import streamproxy                              # does nothing by itself
    settings = streamproxy.Settings(api_key="sk-...", bind="127.0.0.1:0")
    with streamproxy.Server(settings) as server:    # serves until the block ends
        print(server.url)
    for text in streamproxy.stream_text("Say hello", settings):   # no server at all
        print(text, end="", flush=True)

It terminates no TLS, writes nothing to disk and knows no users: nginx in front does the first.

Life of a request.  The numbers are sections of this file; what is pure knows no socket, thread or clock:

    27  Door      accepts a client's connection
    13  Loop      tells that its socket can be read
    16  Client    takes the request in                                                       (pure: 8)
    17  Exchange  checks it, and lets it in                                             (11 says who may ask)
    18  Resource  what there is at its path: an answer at once, or what upstream is asked    (pure: 9 and 10)
    21  Upstream  opens a connection, in a thread of 14, unless the Pool has one that is warm  (19: from a name to
                  a socket; 20: TLS, and a proxy's tunnel)
    22  Source    sends the request, and reads the answer
                    BodyDecoder  upstream's framing to the bytes of the body                 (pure: 8)
                    EventParser  bytes to events                                             (pure: 4)
                    Answer       events to what the client asked for                         (pure: 3, 5 to 7)
    23  Viewer    sends what was made of it: one chunk, one send; what the client does not take yet waits in the Record
    24  Stream    ends it, or has another try; then Exchange queues a line for 15, the log, and Client reads on
    25  KeptAnswer  stands between a Stream and the Viewers of its clients, where the answer is to outlive them
                    Metrics      what is counted on the way, for /metrics                    (pure: 12)

One thread, the loop's, owns all of this and its clocks, and waits for nothing but its selector.  Others have
only what may block, or takes long:

    a Job           until the loop is told that it is done: a worker.  It dials, and the loop can cut its lifeline, or
                    works something out: a body that is large, what the system tells of this process
    a look-up       a thread of its own: nothing ends it, but whoever waits for what it finds can be cut
    a Connection    the worker that dials it; from then on the loop's, in Source and Pool
    a WatchedFile   the worker that looks at it; the loop goes by the last version, which is replaced whole
    a line of log   the log's thread, once it is queued

A client that leaves is closed, and costs upstream nothing more, but for a KeptAnswer, which goes on for a while.
Where it waits for an answer, a line of log says so, with the status that it was told, or 499:

    Client IDLE, LINGERING       nothing is under way: it has not asked, or was answered
    Client HEAD, BODY            upstream was not asked
    Client ANSWERING             nor here, while its token is judged; then a Source and a Viewer are at work:
    Source DIALING               the lifeline is cut, and the connection is closed when the worker hands it over
    Source SENDING to ENDING     the connection to upstream is closed at once
    Source OVER, Viewer LAST     upstream is done with; what the client did not take is dropped

Sources: RFC 9110 and 9112 (HTTP), WHATWG HTML section 9.2 (server-sent events).
"""

from __future__ import annotations

import argparse
import array
import base64
import bisect
import codecs
import collections
import contextlib
import email.utils
import errno
import functools
import gc
import hashlib
import heapq
import hmac
import html
import http.client
import http.server
import io
import ipaddress
import itertools
import json
import logging
import math
import os
import queue
import random
import re
import select
import selectors
import signal
import socket
import socketserver
import ssl
import stat
import string
import struct
import sys
import threading
import time
import urllib.parse
import urllib.request
import weakref
import zlib

if sys.version_info < (3, 9):  # noqa: UP036  (an old system's python3 should say so, not fail somewhere below)
    raise (SystemExit if __name__ == "__main__" else ImportError)("streamproxy needs Python 3.9 or later")

TYPE_CHECKING = False  # typing costs time and memory, and is not needed at run time
if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Iterator, Mapping, MutableMapping, Sequence
    from typing import Any, ClassVar, NoReturn, Protocol, Self, TextIO, dataclass_transform

    Step = Callable[["Exchange"], None]  # of a request, on its way to an answer

    class Taker(Protocol):
        """Whoever a stream is sent to."""

        loop: Loop
        lost: bool

        @property
        def pending(self) -> object: ...
        def send(self, data: bytes) -> None: ...

    class Asker(Protocol):
        """Whoever asks for a stream."""

        @property
        def client(self) -> Taker: ...
        def begin_stream(self) -> tuple[bytes, bool]: ...
        def tell(self, step: str, **facts: object) -> None: ...
        def on_stream_over(self) -> None: ...
        def on_fault(self, error: Exception) -> None: ...

    class ParamRow:
        """A setting that takes any mapping, and is Params."""

        def __get__(self, settings: Settings, owner: type[Settings]) -> Params: ...
        def __set__(self, settings: Settings, value: Mapping[str, object] | str) -> None: ...

else:

    def dataclass_transform(**_: object) -> Callable[[type], type]:
        return lambda cls: cls


__version__ = "0.2.3"
__all__ = ["Event", "EventParser", "ProxyError", "Server", "Settings", "SettingsError", "TextStream", "stream_text"]

log = logging.getLogger("streamproxy")


# 1 ------------------------------------------------------------------- Limits

# Bytes.
READ_SIZE = 64 * 1024  # asked of a socket at a time; it leaves at once, so this bounds what waits for a slow client
MAX_UNSENT = 128 * 1024  # that the system holds for a client: with megabytes, one that reads slowly looks like one that
# does not read, for minutes; what is under way to it, or in its own buffer, is more
TAKE_SIZE = 16 * 1024  # the same of a client: of a body in chunks of one byte, as much holds up the rest for 3 ms
MAX_HEAD_SIZE = 64 * 1024  # of a head, of a request or an answer
MAX_PARSED = 32 * 1024  # of a request's body that the loop looks at by itself: in the worst case, that takes 2 ms
MAX_SKIMMED = 256 * 1024  # of a JSON document that is parsed only for the log's sake: it would hold up the rest
MAX_EVENT_SIZE = 16 * 1024 * 1024  # of an event or a JSON document, held until it is whole: images make several MB
MAX_ERROR_SIZE = 64 * 1024  # of a document that says why upstream refuses; longer ones are quoted, not passed on
MAX_CHUNK_LINE = 4 * 1024  # of a chunk's size line; RFC 9112 section 7.1.1 asks for a limit
MAX_TRAILER_SIZE = 16 * 1024
MAX_TOKEN_FILE_SIZE = 4 * 1024 * 1024
MAX_PAGE_SIZE = 1024 * 1024
MAX_RECORD_SIZE = 5 + 16 * 1024 + 2048  # of TLS, as sent; RFC 5246 section 6.2.3, RFC 8446 section 5.2
MAX_KEPT_SIZE = 4 * 1024 * 1024  # of an answer that outlives its client: what came before may be forgotten
MAX_LOOSE_SIZE = 512  # of a piece of it that may wait to be put behind the others, and counted
RECORD_COST = 12 * 1024  # of such an answer, beside its bytes
MAX_DISCARDED = 64 * 1024  # of a refused request's body, read for the sake of the connection
# Of the next request while an answer is on its way: unless they are read, the end behind them is not seen.
MAX_PIPELINED = 64 * 1024
MAX_MEMO_KEY = 400  # of what is longer, no Memo keeps anything; in characters

# Seconds.
LINGER_TIMEOUT = 30.0  # for what a client still sends that was refused: nginx's lingering_time
END_GRACE = 1.0  # for usage and [DONE] to follow a finish_reason
IDLE_GRACE = 1.0  # for a request that is on its way to a process that drains, of whoever comes by no proxy
HANDSHAKE_PAUSE = 0.2  # for a connection that is being made to be there, before its listening socket is closed
TELL_INTERVAL = 5.0  # before it is told again what a process that ends waits for
NOTIFY_TIMEOUT = 1.0  # for systemd to take what it is told
STOP_TIMEOUT = 60.0  # for a request to come whose stop has overtaken it
ABORT_GRACE = 5.0  # for aborted streams to end truthfully once the drain is over
KEEP_ALIVE_TIMEOUT = 60.0  # for a connection to upstream between two requests
STALE_WINDOW = 0.5  # for upstream to say that it had closed a connection before it was used again
MAX_CONNECTION_AGE = 300.0  # of a connection to upstream: later ones may lead to servers that are new there
SWITCH_INTERVAL = 0.001  # for the loop to get the interpreter from another thread (Python's own: 0.005)
MAX_NOTED = 256  # pauses between pieces of text that are counted together
LAG_INTERVAL = 1.0  # between two looks at how late the loop is, while text comes
LOOK_TIMEOUT = 1.0  # for the token file to be looked at, before its last version counts
LOG_PAUSE = 0.05  # for lines of log that come together to be written together
CLOSE_TIMEOUT = 1.0  # for threads to end with the server
SHORTAGE_PAUSE = 0.1  # before what failed for lack of descriptors or threads is tried again
TRIM_DELAY = 0.1  # for the script's last line to have run, before what it took is given back
ATTEMPT_DELAY = 0.25  # before the next address of a name is tried, too; RFC 8305 section 5
DIAL_GRACE = 0.2  # over connect_timeout: the loop's clock cuts first, and has its own words for it
PROBES = {"TCP_KEEPIDLE": 60, "TCP_KEEPALIVE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}  # the second: macOS's first
COMPLAINT_INTERVAL = 60.0  # before a fault that lasts is complained of again
FOREVER = 86400.0  # where a wait needs a number and there is no limit

# Counts.
MAX_FIELDS = 100  # of a request's head; 40 are seen in practice
MAX_ANSWER_FIELDS = 400  # of the head of upstream's answer: LiteLLM adds to its own those of each server behind it
MAX_FIELD_LINES = 1024  # that are remembered as they were read; of other things, their Memo says how many
MAX_INTERIM = 10  # answers (100, 103) before the one that counts
MAX_IDLE_CONNECTIONS = 128  # to upstream, between two requests
MAX_MODELS = 1000  # of which it is remembered which defaults upstream refuses
MAX_QUIET_CLIENTS = 10_000  # remembered for their limits although they have no stream
SPARE_CONNECTIONS = 256  # beyond two a stream: those between two requests, and those slow to send one
BACKLOG = 1024  # of connections that wait to be accepted (socketserver: 5)
MAX_SURPLUS = 256  # connections beyond those, which are answered that there are too many
MAX_WORKERS = 4  # threads that can run, or are parked; more of them starve the loop of the interpreter
MAX_BEGINNINGS = 8  # new connections, requests, and clients that leave, of a turn of the loop
MAX_ALARMS = 64  # that go off in a turn
MAX_READY = 1024  # sockets seen to in a turn
MAX_LOOSE = 16  # such pieces
MAX_HOPS = 32  # in X-Forwarded-For that are looked at
MAX_ITEMS = 100  # of a list in another field
MAX_UNNAMED = 8  # events of a stream that are looked through for the model
MAX_STOPS = 1000  # that are remembered for requests that they have overtaken
MAX_LOG_LINES = 4000  # that wait to be written
MAX_NAMED_CLIENTS = 100  # whose names are labels of metrics; the rest are "other"
MAX_USAGE = 1 << 40  # tokens of an answer; more is nonsense, and would spoil a sum

# Upstream statuses that are about the request or about load, so that the client may see them with their
# message.  Any other failure is between upstream and us: 502.
PASSED_STATUSES = (400, 402, 404, 408, 409, 413, 415, 422, 425, 429, 503, 529)


class Memo(dict["Any", "Any"]):
    """What work makes of each key, kept from its first look-up on; where there are size of them, all are forgotten.

    For what is asked for many times a request: functools.lru_cache takes more than twice as long to answer.
    """

    def __init__(self, work: Callable[[Any], Any], size: int) -> None:
        super().__init__()
        self._work, self._size = work, size

    def __missing__(self, key: Any) -> Any:
        value = self._work(key)
        if self._keeps(key, value):
            if len(self) >= self._size:
                self.clear()
            self[key] = value
        return value

    def _keeps(self, key: Any, value: Any) -> bool:
        return isinstance(key, int) or len(key) <= MAX_MEMO_KEY


# 2 ------------------------------------------------------------------- Errors


# How requests, answers and clients end, by methods of these names.  refuse: with an error for an answer.  abort and
# fail: so that the client can tell.  drop: at once, and mostly nobody is told.  cut: without the end of a whole one.


class ProxyError(Exception):
    """Why a request failed: a sentence for the client, a status, and the log's word for the ending.

    ProxyError
    +-- RequestError           the client asked for what cannot be done
    +-- UpstreamError          upstream is unreachable, unwilling, too slow or cut off
    |   +-- Garbled            it sent what its protocol does not have
    +-- Aborted                we cut the stream: drain, stalled client
    |   +-- Stopped            as its owner asked
    +-- Disconnected           the client left
    """

    status = 500
    ending = "error"
    reason = ""

    def __init__(
        self, message: str, status: int = 0, ending: str = "", fields: Mapping[str, str] | None = None,
        code: str = "", reason: str = "",
    ) -> None:  # fmt: skip
        """fields are header fields that the answer must have; code is the API's word for the error, reason that of
        /metrics: see FAILURES and REFUSING.
        """
        super().__init__(message)
        self.message = message
        self.logged = message  # differs where message quotes upstream, which may quote the prompt
        self.status = status or self.status
        self.ending = ending or self.ending
        self.fields = dict(fields or {})
        self.code = code
        self.reason = reason or ending or self.reason
        self.document = b""  # what upstream said, whole

    def __str__(self) -> str:
        return self.message

    def bare(self) -> Self:
        """Return this, to be kept: without its origin, whose frames hold who keeps it, and the body of the request."""
        self.__traceback__ = self.__context__ = None
        return self


class RequestError(ProxyError):
    status = 400


class UpstreamError(ProxyError):
    status = 502
    reason = "reported"


class Garbled(UpstreamError):
    reason = "garbled"


class Aborted(ProxyError):
    status = 503
    ending = "aborted"


class Stopped(Aborted):
    status = 410


class Disconnected(ProxyError):
    status = 499  # as nginx logs it
    ending = "disconnect"


class SettingsError(ValueError):
    """A setting that cannot be used; the text is one line that says what is allowed."""


class NoTunnel(OSError):
    """The proxy on the way to upstream opened no tunnel; the text says why."""


def place_of(error: BaseException) -> str:
    """Type and place of an unexpected exception; its text could hold what nobody may read."""
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    reason = f" ({reason_of(error)})" if isinstance(error, OSError) else ""  # as of a lack of descriptors
    return f"{type(error).__name__} in line {trace.tb_lineno if trace else '?'}{reason}"


def internal_error(error: BaseException) -> ProxyError:
    """Return what a request fails with for a fault of ours."""
    failure = ProxyError("Internal error.")
    failure.logged = f"Internal error: {place_of(error)}"
    return failure


def shutting_down() -> Aborted:
    """Return what a request fails with that is under way, or comes, as the server ends."""
    return Aborted("The server is shutting down.")


_NO_NAME = (socket.gaierror, UnicodeError)  # the latter: for a name that cannot be one


def reason_of(error: BaseException) -> str:
    """Why a system call or a handshake failed, in words that hold no address, path or secret."""
    for kind, words in (
        (NoTunnel, str(error)),
        (ssl.SSLCertVerificationError, "its certificate is not trusted"),
        (ssl.SSLError, "the TLS handshake failed"),
        (_NO_NAME, "its name was not found"),
        (socket.timeout, "it took too long"),
        (BlockingIOError, "whoever has it takes no connections"),
    ):
        if isinstance(error, kind):
            return words
    return os.strerror(error.errno).lower() if isinstance(error, OSError) and error.errno else "it failed"


def encode_error(error: ProxyError, path: str) -> bytes:
    """Return the body of an error answer: {"error": sentence}, or on the paths of the API its own shape."""
    payload: dict[str, Any] = {"error": error.message}
    if path.startswith("/v1/"):
        if error.document:
            return error.document
        other = ("invalid_request_error" if error.status < 500 else "api_error", None)
        type, code = _API_ERRORS.get(error.status, other)
        payload = {"error": {"message": error.message, "type": type, "param": None, "code": error.code or code}}
        if path.startswith("/v1/messages"):  # Anthropic's
            payload["type"] = "error"
    return json.dumps(payload).encode() + b"\n"


_API_ERRORS: dict[int, tuple[str, str | None]] = {
    401: ("authentication_error", "invalid_api_key"),
    403: ("permission_error", "forbidden"),
    404: ("not_found_error", "not_found"),
    408: ("timeout_error", "timeout"),
    413: ("invalid_request_error", "request_too_large"),
    429: ("rate_limit_error", "rate_limit_exceeded"),
    502: ("api_error", "bad_gateway"),
    503: ("overloaded_error", "overloaded"),
    504: ("timeout_error", "timeout"),
    529: ("overloaded_error", "overloaded"),
}


# 3 ------------------------------------------------------------------- Secrets

# Characters.  Shorter parts of a key are in many a word, and a shorter key is nobody's secret: "x", "none".
_PART_SIZE = 8

HIDDEN = "[redacted]"
_MASK = re.compile(r'\*{3}[^\s"\\]{0,1000}')
# What stands before a mask, read backwards: as far as a blank, a quote, or an escape of JSON's.
_WORD = re.compile(r'[^\s"\\]{0,1000}?(?=(?:[0-9a-f]{4}u|[^\s"\\])\\|[\s"\\]|\Z)', re.IGNORECASE)

# JSON's escapes of what need not be escaped: visible ASCII but the quote and the backslash.  An escaped backslash
# before u0041 makes no escape of it.
_ESCAPED = re.compile(r"\\u00(2[013-9A-Fa-f]|[346][0-9A-Fa-f]|5[0-9ABDEFabdef]|7[0-9A-Ea-e])(?<!\\\\u00..)")

# What is searched at a time, and the places in a text that are looked at one by one.  A text with more of them, which
# nobody sends but to hold us up, is hidden whole.
_BLOCK_SIZE = 16 * 1024
_MAX_PLACES = 20_000
_FEW_PLACES = 80

_ANY_BIT = b"\0" + b"\1" * 255


class _KeyParts:
    """The parts of a key, and where they begin in a text: told in a time that does not depend on what the text is.

    Bit n of a character's byte says that the key has it at a place that is n modulo 8.  A part may begin where the
    bytes of 8 characters, each turned by one bit more than the one before, have a bit in common: Shift-And, for all
    places of a block at once.
    """

    def __init__(self, key: bytes) -> None:
        self._parts = {key[at : at + _PART_SIZE] for at in range(len(key) - _PART_SIZE + 1)}
        self._tables = []
        for begin in range(0, len(key) - _PART_SIZE + 1, 160):  # of a longer key, most bytes would have all bits
            table = bytearray(256)
            for at, character in enumerate(key[begin : begin + 159 + _PART_SIZE]):
                table[character] |= 1 << at % 8
            self._tables.append(bytes(table))
        self._turns = []  # by how many characters and bits; masks of the bits that stay in their byte, or come round
        for step in (1, 2, 4):
            stay = int.from_bytes(bytes([0xFF >> step]) * (_BLOCK_SIZE + _PART_SIZE), "little")
            around = int.from_bytes(bytes([0xFF ^ 0xFF >> step]) * (_BLOCK_SIZE + _PART_SIZE), "little")
            self._turns.append((step, stay, around))

    def find(self, data: bytes) -> list[int] | None:
        """Return where parts begin; None: in too many places."""
        if len(data) < _FEW_PLACES:  # of an answer's ID, and the like: as many steps as it has places are fewer
            places = range(len(data) - _PART_SIZE + 1)
            return [place for place in places if data[place : place + _PART_SIZE] in self._parts]
        found, looked_at = [], 0
        for at in range(0, len(data), _BLOCK_SIZE):
            block = data[at : at + _BLOCK_SIZE + _PART_SIZE - 1]
            likely = {at + place for table in self._tables for place in self._places(block.translate(table))}
            looked_at += len(likely)
            if looked_at > _MAX_PLACES:
                return None
            found += [place for place in sorted(likely) if data[place : place + _PART_SIZE] in self._parts]
        return found

    def _places(self, block: bytes) -> Iterator[int]:
        bits = int.from_bytes(block, "little")
        for step, stay, around in self._turns:
            bits &= (bits >> 9 * step & stay) | (bits >> 9 * step - 8 & around)
        marks = bits.to_bytes(len(block), "little").translate(_ANY_BIT) if bits else b""
        place = marks.find(1)
        while place >= 0:
            yield place
            place = marks.find(1, place + 1)


def redactor(key: str) -> Callable[[str], str]:
    """Return what takes key, its parts of 8 characters or more and masked keys (sk-...***...) out of a text.

    A key of fewer characters is not looked for.  The text may be JSON, or have it in it, whose escapes hide
    nothing, and it is so still.  A text without secrets is returned as it is.
    """
    parts = _KeyParts(key.encode())

    def redact(text: str) -> str:
        if len(text) < _PART_SIZE and "***" not in text:
            return text
        return known[text] if len(text) <= MAX_MEMO_KEY else search(text)

    def search(text: str) -> str:
        plain = _unescaped(text)
        shown = hide(_hide_masked(plain) if "***" in plain else plain)
        return text if shown == plain else shown

    def hide(text: str) -> str:
        data = text.encode("utf-8", "surrogatepass")
        places = parts.find(data)
        if not places:
            return HIDDEN if places is None else text
        out: list[bytes] = []
        at = 0  # up to which data was shown or hidden
        for place in places:
            if place > at or not out:
                out += [data[at:place], HIDDEN.encode()]
            at = place + _PART_SIZE
        return b"".join([*out, data[at:]]).decode("utf-8", "surrogatepass")

    known: dict[str, str] = Memo(search, 64)  # names of models and in usage, and the like
    return redact


def redact_bytes(data: bytes, redact: Callable[[str], str]) -> bytes:
    return redact(data.decode("utf-8", "surrogateescape")).encode("utf-8", "surrogateescape")


def _unescaped(text: str) -> str:
    """Return what says the same as text, as JSON, with fewer escapes; and as UTF-8, if it was ASCII in UTF-16."""
    text = text.replace("\0", "")
    if "\\" not in text:
        return text
    parts = _ESCAPED.split(text.replace("\\/", "/"))
    parts[1::2] = bytes.fromhex("".join(parts[1::2])).decode()
    return "".join(parts)


def _hide_masked(text: str) -> str:
    out: list[str] = []
    at = 0
    for mask in _MASK.finditer(text):
        if len(out) > _MAX_PLACES // 10:
            return HIDDEN
        begin = _WORD.match(text[max(at, mask.start() - 1000) : mask.start()][::-1])
        out += [text[at : mask.start() - (begin.end() if begin else 0)], HIDDEN]
        at = mask.end()
    return "".join([*out, text[at:]])


# 4 ------------------------------------------------------------------- Event streams


class Event:
    """One server-sent event.  Source: WHATWG HTML section 9.2.6."""

    __slots__ = ("data", "last_event_id", "type")

    def __init__(self, type: str, data: str, last_event_id: str = "") -> None:
        self.type, self.data, self.last_event_id = type, data, last_event_id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Event) and repr(self) == repr(other)

    def __repr__(self) -> str:
        return f"Event({self.type!r}, {self.data!r}, {self.last_event_id!r})"


class EventParser:
    """Server-sent events from bytes.  Source: WHATWG HTML sections 9.2.5 and 9.2.6."""

    def __init__(self, max_event_size: int = MAX_EVENT_SIZE, strict: bool = True) -> None:
        """strict: what is no field of the standard's is nothing.  Otherwise a field named error is an
        event of that type, lines that are no field at all, as of bare JSON, are one of type "", and an event of JSON
        ends where another begins, though no blank line came.
        """
        self.idle = 0  # comments and blank lines since somebody looked: no event, but signs of life
        self._max_event_size = max_event_size
        self._strict = strict
        self._line: list[bytes] = []  # the unfinished line, in the pieces it came in
        self._data: list[bytes] = []  # the data lines of the unfinished event
        self._strays: list[bytes] = []  # its lines that are no field
        self._held = 0  # bytes in all three, with a line end for each line
        self._type = self._late_type = ""  # the latter came behind data, so that it may be that of another event
        self._last_event_id = ""
        self._after_cr = False  # a CR ends its line at once; an LF after it is skipped when it comes
        self._at_start = True

    def feed(self, data: bytes) -> list[Event]:
        """Return the events that data completes, oldest first.

        data may be cut anywhere: in a UTF-8 sequence, between CR and LF, in a field name.  An
        event is returned by the call that brings its blank line, never one call later.

        Raises Garbled past max_event_size bytes of one event.
        """
        if data[:6] == b"data: " and data[-2:] == b"\n\n" and not (self._held or self._type):
            text = data[6:-2].decode("utf-8", "replace")
            if "\n" not in text and "\r" not in text:  # mostly, it is one line
                self._at_start = self._after_cr = False
                return [Event("message", text, self._last_event_id)]
        if self._after_cr and data:
            self._after_cr = False
            if data.startswith(b"\n"):
                data = data[1:]
        events: list[Event] = []
        if b"\n" in data or b"\r" in data:
            lines = data.splitlines()  # of bytes: at LF, CR and CRLF, nothing else
            if self._line:
                self._held -= sum(map(len, self._line))
                lines[0] = b"".join(self._line) + lines[0]
                self._line.clear()
            self._after_cr = data.endswith(b"\r")
            data = b"" if data.endswith((b"\n", b"\r")) else lines.pop()
            self._take_lines(lines, events)
        if data:
            self._line.append(data)
            self._held += len(data)
        if self._held > self._max_event_size and not events:  # with events, the next call says it
            raise Garbled(f"Upstream sent an event of over {self._max_event_size} bytes.")
        return events

    @property
    def holds(self) -> bool:
        """Whether an event has begun, and not ended."""
        return bool(self._held or self._type)

    def close(self) -> list[Event]:
        """Return the event, if any, that the stream ended in: its blank line never came.

        The standard drops it.  Servers in wide use leave the last blank line out, so it is for
        the caller to say whether its data is whole.
        """
        events: list[Event] = []
        line, self._line = b"".join(self._line), []
        self._take_lines([line, b""] if line else [b""], events)
        return events

    def _take_lines(self, lines: list[bytes], events: list[Event]) -> None:
        if self._at_start and lines:
            self._at_start = False
            if lines[0].startswith(codecs.BOM_UTF8):
                lines[0] = lines[0][3:]
        held = self._data
        for line in lines:
            if line[:5] == b"data:" or line == b"data":
                value = line[6:] if line[5:6] == b" " else line[5:]
                if held and not self._strict and held[-1][-1:] in (b"}", b"]") and value[:1] in (b"{", b"["):
                    self._dispatch(events)  # no JSON goes on so: the blank line is missing
                    self._type, self._late_type = self._late_type, ""
                held.append(value)
                self._held += len(line)
            elif line:
                self._take_field(line)
            else:
                if self._late_type:
                    self._type, self._late_type = self._late_type, ""
                is_empty = not held
                self._dispatch(events)
                if is_empty and self._type == "error" and not self._strict:
                    events.append(Event("error", "", self._last_event_id))
                elif is_empty:
                    self.idle += 1
                self._type = ""

    def _dispatch(self, events: list[Event]) -> None:
        """Add the event that is held to events, if there is one."""
        held, strays = self._data, self._strays
        if strays:  # before what follows: they may say that it counts no more
            events.append(Event("", b"\n".join(strays).decode("utf-8", "replace"), self._last_event_id))
            strays.clear()
        if held:
            data = (held[0] if len(held) == 1 else b"\n".join(held)).decode("utf-8", "replace")
            events.append(Event(self._type or "message", data, self._last_event_id))
            held.clear()
        self._held = 0

    def _take_field(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        value = value[1:] if value.startswith(b" ") else value
        if name == b"event":
            type = value.decode("utf-8", "replace")
            if self._data and not self._strict:
                self._late_type = type
            else:
                self._type = type
        elif name == b"id":
            if b"\0" not in value:
                self._last_event_id = value.decode("utf-8", "replace")
        elif not name:
            self.idle += 1
        elif not self._strict and name == b"error":
            self._type = "error"
            self._data.append(value)
            self._held += len(line)
        elif not self._strict and name != b"retry":
            self._strays.append(line)
            self._held += len(line) + 50  # as in memory: nobody sends many


def encode_event(data: str, type: str = "", last_event_id: str = "") -> bytes:
    """Return one event.  Line ends in data become data lines of their own (WHATWG HTML 9.2.6)."""
    id = f"id: {last_event_id}\n" if last_event_id else ""
    type = f"event: {type}\n" if type else ""
    if "\n" in data or "\r" in data:
        data = "\ndata: ".join(re.split("\r\n|\r|\n", data))
    return f"{id}{type}data: {data}\n\n".encode("utf-8", "replace")


# A comment has one line end: with a blank line behind it, SDKs in wide use see an empty event.
PING = b": ping\n"


# 5 ------------------------------------------------------------------- Payloads


# What servers send beside JSON: NaN and the like are null, and control characters in strings are what they are.  For
# what is as short as an event, a decoder that leaves integers to the interpreter is twice as fast.
_SHORT_JSON = 4096
_parse_short_json = json.JSONDecoder(parse_constant=lambda name: None, strict=False).raw_decode
_parse_long_json = json.JSONDecoder(
    parse_constant=lambda name: None, parse_int=lambda text: int(text) if len(text) < 400 else None, strict=False
).raw_decode


def load_payload(data: str) -> Any:
    """Return the JSON in an event or a document of upstream's; {} where data is blank.  Raises Garbled."""
    data = data.strip(" \t\r\n\ufeff")
    if not data:
        return {}
    try:
        payload, end = (_parse_short_json if len(data) < _SHORT_JSON else _parse_long_json)(data)
        if end != len(data):
            raise ValueError("more than one value")
    except (ValueError, RecursionError):
        raise Garbled("Upstream sent what is not JSON.") from None
    return payload


def dicts_in(values: object) -> list[dict[str, Any]]:
    """Return the JSON objects in an array or among the members of an object."""
    values = values.values() if isinstance(values, dict) else values if isinstance(values, list) else ()
    return [value for value in values if isinstance(value, dict)]


def holders_in(payload: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the JSON objects in which an answer tells of itself: payload, its members, and its choices."""
    return [payload, *dicts_in(payload), *dicts_in(payload.get("choices"))]


# Errors: every server has clothes of its own for them.

_WELL = frozenset(("", "0", "200", "null", "none", "nil", "undefined", "false", "ok", "success", "succeeded"))
_ERROR_NAME = re.compile("(?:error|exception)s?$", re.IGNORECASE)  # error, overloaded_error, ThrottlingException
_EVENT_NAME = re.compile(  # of an event that may have news of its own to tell
    "(?!message$)(?!.*(?:bad|invalid|fail|denied|forbid|unauth|limit|exceed|missing|unsupported|found|unavail))"
    "[a-z]+(?:[._][a-z]+)*"
)
_ERROR_WORDS = re.compile(r"\W*\w*(?:error|exception)\b", re.IGNORECASE)  # of a text that is not JSON
_FAILED = re.compile(
    "error|abort|fail|cancel|insufficient|time.?d?.?out|interrupt|exception|unavailable|overload|disconnect|malformed"
    "|unexpected|network|crash|quota|rate.?limit", re.IGNORECASE,
)  # fmt: skip


def is_nothing(value: object, depth: int = 6) -> bool:
    """Tell whether value, where an error could be told, says nothing or that all is well: null, "", {"code": 0}."""
    if isinstance(value, (dict, list)):
        inner = value.values() if isinstance(value, dict) else value
        return not value or (depth > 0 and all(is_nothing(item, depth - 1) for item in inner))
    return not value or (isinstance(value, str) and value.strip().lower() in _WELL) or value == 200


def fold(members: dict[str, Any]) -> dict[str, Any]:
    """Return members by the one spelling of errorMessage, error_message and ErrorMessage."""
    return {name.lower().replace("_", "").replace("-", ""): value for name, value in members.items()}


def find_error(payload: object, type: str = "message") -> object:
    """Return what payload, of an event of type, says of an error, in whichever clothes; None: it tells of none."""
    if _ERROR_NAME.search(type):
        return payload if payload is not None else {}
    if isinstance(payload, list):
        return next(filter(None, map(find_error, dicts_in(payload))), None)
    if not isinstance(payload, dict):
        return None
    names = [name for name in (type, *map(payload.get, ("type", "object", "event"))) if isinstance(name, str)]
    if any(map(_ERROR_NAME.search, names)) or not is_nothing(payload.get("error")):
        return payload
    choices = dicts_in(payload.get("choices"))
    parts = [part for choice in choices for part in (choice.get("delta"), choice.get("message"))]
    # A vendor's members, but not in an event of a typed protocol: there items have errors that end nothing.  Azure's
    # filters have some, too.
    typed = isinstance(payload.get("type"), str)
    members = {} if typed else {name: payload[name] for name in payload if "filter" not in name}
    for holder in [*choices, *map(fold, dicts_in(parts) + dicts_in(members))]:
        error = holder.get("error")
        if not is_nothing(error):
            return error if isinstance(error, (str, dict, list)) else holder
    if choices:
        return None
    if is_bad_news(payload, named=any(map(_EVENT_NAME.fullmatch, names))):
        return payload
    return next(filter(has_bad_code, dicts_in(members)), None)


def is_bad_news(payload: dict[str, Any], named: bool) -> bool:
    """Tell of a payload without choices whether it is itself an error: error_code, detail, success, message, ...

    named: it is an event of some type, which may have a message or a detail that is none.
    """
    said = fold(payload)
    for code in ("errorcode", "errcode"):
        if code in said:
            return not is_nothing(said[code])
    status = str(said.get("status") or said.get("statuscode") or said.get("httpstatus") or "")
    if (
        not all(is_nothing(said.get(name)) for name in ("errormessage", "errormsg", "errmsg", "errors", "fault"))
        or any(is_told_in(name, value) for name, value in said.items())
        or has_bad_code(payload) or said.get("success") is False or said.get("ok") is False
        or re.fullmatch("[45][0-9][0-9]", status) or (_FAILED.search(status) and "object" not in said)
    ):  # fmt: skip
        return True
    about = said.keys() & {"code", "status", "success", "ok", "usage", "model", "role", "content", "delta"}
    words = said.get("detail"), *(said.get(name) for name in ("message", "msg") if not about)
    return not named and any(map(sentence_of, words))


def is_told_in(name: str, value: object) -> bool:
    """Tell of internalServerException and the like whether they are errors; a filter's error ends nothing."""
    told = isinstance(value, dict) or name == "exception"
    return told and "filter" not in name and bool(_ERROR_NAME.search(name)) and not is_nothing(value)


def has_bad_code(members: dict[str, Any]) -> bool:
    """Tell whether a code and a sentence stand together, and the code does not say that all is well."""
    said = fold(members)
    code = next((said[name] for name in ("code", "statuscode", "retcode") if said.get(name) is not None), None)
    words = any(sentence_of(said.get(name)) for name in ("message", "msg", "statusmsg", "retmsg"))
    return words and not is_nothing(code) and not re.fullmatch("2[0-9][0-9]", str(code))


# Where an error has its sentence, the most telling first.
_SENTENCES = (
    "message", "msg", "errormessage", "errormsg", "errmsg", "statusmsg", "detail", "errordescription", "error",
    "errors", "description", "reason", "title", "faultstring", "fault", "exception", "response", "text",
)  # fmt: skip
_KINDS = ("type", "code", "errortype", "errorcode", "errcode", "status", "statuscode")
_KIND = re.compile(r"[A-Za-z0-9_.:#-]{1,80}")
_PAGE_WORDS = re.compile("<(?:title|message)>([^<]*)<", re.IGNORECASE)  # of HTML, or of XML


def sentence_of(error: object, depth: int = 6) -> str:
    """Return what an error says, in one line of up to 1,000 characters; "" where there are no words."""
    words = ""
    if isinstance(error, str):
        text: str = error if error.lstrip()[:1] != "<" else next(iter(_PAGE_WORDS.findall(error)), "")
        words = "" if text.strip().lower() in _WELL else " ".join(text[:4000].split())
    elif isinstance(error, list) and depth:
        words = "; ".join(filter(None, [sentence_of(item, depth - 1) for item in error[:10]]))
    elif isinstance(error, dict) and depth:
        said = fold(error)
        if isinstance(said.get("errors"), dict):  # by the member that is wrong
            said["errors"] = list(said["errors"].values())
        others = (name for name in said if name not in _SENTENCES and _ERROR_NAME.search(name))
        names = (*_SENTENCES, *itertools.islice(others, 10))
        words = next(filter(None, (sentence_of(said.get(name), depth - 1) for name in names)), "")
        if words and isinstance(said.get("loc"), list):  # FastAPI's way to say the same
            words = f"{'.'.join(map(str, said['loc'][:10]))}: {words}"
    return words[:1000]


def kinds_of(error: object, depth: int = 3) -> list[str]:
    """Return the type and the code of an error: words of the API's own, never of the prompt."""
    if isinstance(error, str):
        return ["a page of HTML"] if error.lstrip()[:1] == "<" else []
    if isinstance(error, list):
        return kinds_of(error[0], depth - 1) if error and depth else []
    if not isinstance(error, dict):
        return []
    said = fold(error)
    kinds = [str(said[name]) for name in _KINDS if isinstance(said.get(name), (str, int))]
    kinds = [kind for kind in kinds if _KIND.fullmatch(kind) and kind.lower() not in ("error", "true", "false")]
    if depth:
        for name in ("error", "errors", "detail", "message", "fault"):
            if isinstance(said.get(name), (dict, list)):
                kinds += kinds_of(said[name], depth - 1)
    return list(dict.fromkeys(kinds))[:5]


def quoting(words: str, status: int, error: object) -> UpstreamError:
    """Return a failure that tells the client what upstream says in error, and the log only of what kind that is."""
    failure = UpstreamError(words, status)
    kinds = ", ".join(kinds_of(error))
    failure.logged = f"{words[:-1]} ({kinds})." if kinds else words
    failure.message = sentence_of(error) or failure.logged
    return failure


_BEAT = re.compile(r"\s*:(?!\s*[\[{])|\W*(?:ping|keep[ _-]?alive|heart[ _-]?beat)\W*\Z", re.IGNORECASE)


def load_event(event: Event) -> Any:
    """Return the JSON in an event; {} where it says nothing.

    Raises Garbled, and UpstreamError for what can only be an error.
    """
    try:
        return {} if event.type == "ping" else load_payload(event.data)
    except Garbled:
        named = event.type not in ("message", "")
        if _ERROR_NAME.search(event.type) if named else _ERROR_WORDS.match(event.data):
            raise quoting("Upstream reported an error.", 502, event.data) from None
        if event.type != "message" or _BEAT.match(event.data):
            return {}  # somebody's own event, or a sign of life that should have been a comment
        raise


def check_payload(payload: Any, data: str, type: str = "message") -> dict[str, Any]:
    """Return payload, which data is, of an event of type, if it is a JSON object that tells of no error.

    Raises Garbled, and UpstreamError for an error that upstream sent this way.
    """
    if (
        type == "message" and '"error' not in data and isinstance(payload, dict)
        and (payload.get("choices") or (payload.get("usage") and "choices" in payload))
    ):  # fmt: skip
        return payload  # mostly
    error = find_error(payload, type)
    if error is not None:
        status = next((int(kind) for kind in kinds_of(error) if kind.isdigit() and int(kind) in PASSED_STATUSES), 502)
        raise quoting("Upstream reported an error.", status, error)
    if isinstance(payload, dict):
        return payload
    if type != "message" or payload is None:
        return {}
    raise Garbled("Upstream sent JSON that is not an object.")


# Refusals: answers whose status is no success.

_FRACTION = re.compile(r"[0-9]{1,9}\.[0-9]{1,20}")
_WAIT = re.compile("[0-9]{1,9}|[A-Z][a-z]{2}, [0-9A-Za-z :]{20,26}")  # RFC 9110 section 10.2.3


def refusal(status: int, document: bytes, retry_after: str) -> UpstreamError:
    """Return the failure for an upstream answer whose status is no success."""
    said = said_in(document)
    if isinstance(said, str) and said.lstrip()[:1] in ("{", "["):  # cut off, perhaps for its length
        said = json.loads(next(iter(_TOLD.findall(said)), '"') + '"', strict=False)  # the first sentence in it
    words = f"Upstream failed with status {status}."
    if status == 401:
        words = "Upstream refused our API key with status 401."
    elif 300 <= status < 400:
        words = f"Upstream redirects with status {status}, which is not followed."
    elif 400 <= status < 500 or status in PASSED_STATUSES:
        words = f"Upstream refused the request with status {status}."
    passes = status in PASSED_STATUSES
    failure = quoting(words, status if passes else 502, said)
    by_class = {3: "redirect", 4: "refused"}
    failure.reason = _REFUSED.get(status) or by_class.get(status // 100, "failed")
    if not passes:
        failure.message = failure.logged if status == 403 else words
    if status in (429, 503, 529):
        told = str(math.ceil(float(retry_after))) if _FRACTION.fullmatch(retry_after) else retry_after
        failure.fields["Retry-After"] = told if _WAIT.fullmatch(told) else "1"
    return failure


def said_in(document: bytes) -> Any:
    """Return what the document of an error says: its JSON, that of the first of its events that has some, or its text.

    Who asks for an event stream may be refused with one: DashScope and LiteLLM do.
    """
    text, parser = document.decode("utf-8", "replace"), EventParser(sys.maxsize, strict=False)
    with contextlib.suppress(Garbled):
        return load_payload(text)
    for event in [*parser.feed(document), *parser.close()][:10]:
        with contextlib.suppress(Garbled):
            return load_payload(event.data)
    return text


_REFUSED = {401: "api_key", 403: "api_key", 429: "rate_limit"}  # the reason, where another status has another

_TOLD = re.compile(r'"(?:message|msg|detail|error)"\s*:\s*("(?:[^"\\]|\\u[0-9a-fA-F]{4}|\\["\\/bfnrt]){1,1000})')


# Text.

_TEXT_PARTS = ("", "text", "output_text", "refusal")
_REASONING = ("reasoning_content", "reasoning", "reasoning_text", "reasoning_details", "thinking", "thinking_blocks")
_BESIDE_CONTENT = frozenset((*_REASONING, "refusal"))


def words_in(part: object, depth: int = 4) -> str:
    """Return the text of a part of a message: a string, parts within it, or an object that has either."""
    if isinstance(part, str):
        return part
    if type(part) in (int, float):  # Workers AI sends digits so
        return json.dumps(part)
    if isinstance(part, list) and depth:
        return "".join([words_in(item, depth - 1) for item in part])
    if isinstance(part, dict) and depth:
        names = ("text", "value", "thinking", "reasoning", "summary", "refusal", "content")
        return next(filter(None, (words_in(part.get(name), depth - 1) for name in names)), "")
    return ""


def parse_part(part: dict[str, Any]) -> tuple[str, str]:
    """Return (text, reasoning) of a delta or a message.  Raises AttributeError and TypeError for what is none."""
    text, reasoning = part.get("content"), ""
    if not text or type(text) in (int, float):
        text = words_in(text)
    if not isinstance(text, str):  # typed parts: [{"type": "text", "text": "..."}, ...]
        parts = [text] if isinstance(text, dict) else text
        items = [item if isinstance(item, dict) else {"text": item} for item in parts]
        kinds = [(str(item.get("type", "")), item) for item in items]
        text = "".join([words_in(item) for kind, item in kinds if kind in _TEXT_PARTS])
        reasoning = "".join([words_in(item) for kind, item in kinds if "thinking" in kind or "reasoning" in kind])
    if not _BESIDE_CONTENT.isdisjoint(part):
        text += words_in(part.get("refusal"))
        reasoning = reasoning or next(filter(None, (words_in(part.get(name)) for name in _REASONING)), "")
    return text, reasoning


def parse_reason(choice: dict[str, Any]) -> str:
    """Return the finish_reason of a choice; "" where it says nothing.

    Raises UpstreamError for one that says that the answer failed: error, abort, ...
    """
    reason = choice.get("finish_reason")
    reason = reason.get("type") if isinstance(reason, dict) else reason
    if not reason or str(reason).lower() in ("null", "none", "nil", "undefined", "finish_reason_unspecified"):
        return ""
    reason = str(reason)[:80]
    if _FAILED.search(reason):
        told = reason if _KIND.fullmatch(reason) else "unknown"
        raise UpstreamError(f"Upstream says that its answer failed (finish_reason {told}).")
    return reason


def split_delta(data: str) -> tuple[str, tuple[str, ...]]:
    """Return the text of a completion's event, found without parsing it, and all that stands around it.

    Where an event with the same around was parsed and told nothing but its text, this one tells nothing but text: to
    parse it would cost more than all else that is done for it.  "": it has to be parsed, for there is no text, or an
    escape, or what JSON may not hold unescaped.  OpenAI's obfuscation, random for each event, counts neither way.
    """
    begin, _, rest = data.partition('"delta":{"content":"')
    text, _, end = rest.partition('"')
    end, _, rest = end.partition('"obfuscation":"')
    noise, _, last = rest.partition('"')
    literal = text + noise
    return text if "\\" not in literal and literal.isprintable() else "", (begin, end, last)


def is_only_text(payload: dict[str, Any], text: str) -> bool:
    """Tell whether payload, which has told one piece of text, has one choice, of which this text is all."""
    choices = payload["choices"]
    return len(choices) == 1 and choices[0].get("delta") == {"content": text} and not choices[0].get("finish_reason")


# 6 ------------------------------------------------------------------- Answers

# What a body is.  Its first bytes tell: labels are wrong too often.
_UNTOLD, _EVENTS, _DOCUMENT, _OTHER = range(4)
_FIELD = re.compile(rb"(?:data|event|id|retry|error) ?:|:")
_FIELD_STARTS = (b"data:", b"event:", b"id:", b"retry:", b"error:")
_FIELD_IN_DOCUMENT = re.compile(rb"[\r\n](?:data|event|id|retry|error) ?:")  # no JSON has a line that begins so


def form_of(begin: bytes, label: int) -> int:
    """Return what a body is, of which begin has come and which label says what; _UNTOLD: more has to come."""
    text = begin.removeprefix(codecs.BOM_UTF8).lstrip(b" \t\r\n")
    if not text or codecs.BOM_UTF8.startswith(text):
        return _UNTOLD if len(begin) < READ_SIZE else label
    if text[:1] in (b"{", b"["):
        return _EVENTS if _FIELD_IN_DOCUMENT.search(text) else _DOCUMENT
    if label == _EVENTS or _FIELD.match(text):
        return _EVENTS
    return _UNTOLD if any(start.startswith(text) for start in _FIELD_STARTS) else label


_COMPRESSION = re.compile("(?:x-)?(?:gzip|compress|deflate|bzip2)|br|zstd|dcb|dcz|lz4|snappy|exi", re.IGNORECASE)
_AS_IT_COMES = re.compile("(?:audio|image|video|multipart)/|.*(?:ndjson|jsonl|json-seq)")
_WHOLE_AT_CLOSE = re.compile("(?:audio|image|video)/|application/octet-stream")

# Fields of upstream's head that are for the client to see, their names in lower case.
_BACK = frozenset((
    "retry-after", "retry-after-ms", "x-should-retry", "x-request-id", "request-id", "openai-processing-ms",
    "openai-version",
))  # fmt: skip


def name_back(name: str) -> str:
    """Return the name under which the client is to see a field of upstream's; "": it is not."""
    passes = name in _BACK or name.startswith(("x-ratelimit-", "anthropic-ratelimit-"))
    return name.title() if passes else ""


_NAMES_BACK: dict[str, str] = Memo(name_back, 128)


def parse_media(content_type: str) -> tuple[str, int]:
    """Return the media type in a Content-Type, and what a body of that type is."""
    media = content_type.partition(",")[0].partition(";")[0].strip().lower()
    return media, _EVENTS if media == "text/event-stream" else _DOCUMENT if media.endswith("json") else _OTHER


_MEDIA: dict[str, tuple[str, int]] = Memo(parse_media, 128)


class Head:
    """What the head of an answer of upstream's says."""

    def __init__(self, status: int, fields: Mapping[str, str]) -> None:
        self.status, self.fields = status, fields
        self.content_type = fields.get("content-type", "")
        self.media, self.label = _MEDIA[self.content_type[:200]]  # the label: what the body is, it says

    @property
    def compression(self) -> str:
        """The Content-Encoding, if it is one: servers also send none, utf-8 and identity."""
        codings = self.fields.get("content-encoding", "")
        return codings and ", ".join(filter(_COMPRESSION.fullmatch, map(str.strip, codings.split(",")))).lower()

    @property
    def framed(self) -> bool:
        """Whether the body ends where HTTP says, or where the connection does, as well."""
        told = self.status == 204 or self.fields.get("content-length") or "transfer-encoding" in self.fields
        return bool(told or _WHOLE_AT_CLOSE.match(self.media))


_NO_HEAD = Head(200, {})  # before upstream's has come
_STREAM_HEAD = Head(200, {"content-type": "text/event-stream"})  # the same, where a stream was asked for


def names_of_counts(usage: dict[str, Any]) -> list[str]:
    """Return the names in usage, at any depth.  Raises TypeError for what is no whole number, null or object."""
    names: list[str] = []
    rest = [usage]
    for counts in rest:  # which grows meanwhile
        names += counts
        for value in counts.values():
            if type(value) is dict:
                rest.append(value)
            elif type(value) is not int and value is not None:
                raise TypeError("no count")
    return names


class Notes:
    """What the log tells of an answer, and which of its choices have ended."""

    def __init__(self, redact: Callable[[str], str]) -> None:
        self.request_id: str | None = None  # upstream's
        self.model: str | None = None
        self.usage: dict[str, Any] | None = None
        self.finish_reason: str | None = None
        self.finished: set[str] = set()  # indexes of choices
        self.events = self.pieces = self.size = 0  # pieces and size: of what was passed on, in bytes
        self._redact = redact

    def take(self, payload: dict[str, Any], has_usage: bool = True) -> None:
        """Note the model and the usage, wherever in payload they stand.  has_usage: it may be there."""
        on_top = (self.model or payload.get("model")) and (payload.get("usage") or not has_usage)  # mostly
        for holder in (payload,) if on_top else holders_in(payload):
            model, usage = holder.get("model"), holder.get("usage")
            if self.model is None and model and isinstance(model, str):
                self.name_model(model)
            if usage and isinstance(usage, dict):
                try:
                    self.usage = {**(self.usage or {}), **self._harmless(usage)}
                except (RecursionError, ValueError):
                    pass

    def name_model(self, model: str) -> None:
        self.model = self._redact(model[:100])

    def _harmless(self, usage: dict[str, Any]) -> dict[str, Any]:
        """Return usage as the log and the client may see it.  Raises ValueError for a number that JSON has not."""
        try:
            names = "\n".join(names_of_counts(usage))  # mostly as in the answer before
            if "\\" not in names and self._redact(names) == names:
                return usage
        except TypeError:
            pass
        told: dict[str, Any] = json.loads(self._redact(json.dumps(usage, allow_nan=False)))
        return told

    def take_end(self, payload: dict[str, Any]) -> None:
        """Note why the answer ended, as any of the APIs says it.  Raises UpstreamError: it failed."""
        choices = dicts_in(payload.get("choices"))
        for holder in choices or holders_in(payload):
            # In a choice, vLLM has a stop_reason, too: the words of the request that it stopped at.
            reason = holder.get("finish_reason") or (not choices and holder.get("stop_reason"))
            if holder.get("object") == "response":
                details = holder.get("incomplete_details")
                reason = details.get("reason") if isinstance(details, dict) else holder.get("status")
            if reason and isinstance(reason, str) and reason != "null":
                self.finish_reason = self._redact(reason[:80])
        for choice in choices:
            if parse_reason(choice):
                self.finished.add(str(choice.get("index")))


class Answer:
    """What the client is sent, made from the body that upstream sends.

    failure: it can no longer become complete; what feed returned before, and returns with it, still
    counts.  Where the state is ENDING then, what comes within the moment still passes, too.
    """

    # SETTLED: complete however the body ends now.  ENDING: all but a word or two has come, and the body should
    # end in a moment; when that is over, close(None).  DONE: nothing more is waited for.
    OPEN, SETTLED, ENDING, DONE = range(4)

    passes = False  # upstream's own documents and fields are for the client
    choices = 1  # that were asked for

    def __init__(self, redact: Callable[[str], str] = str) -> None:
        """redact takes secrets out of what upstream says of its errors, and of its fields."""
        self.state = self.OPEN
        self.failure: UpstreamError | None = None
        self.fields: dict[str, str] = {}  # of upstream's head, those that the client is to see
        self.head = _NO_HEAD
        self.notes = Notes(redact)
        self.life = 0  # grows with all that says that upstream is alive and not about to end
        self._redact = redact
        self._form = _UNTOLD
        self._held = bytearray()  # what has come, until it is told what it is, or of a document, until it is whole

    def start(self, status: int, fields: Mapping[str, str]) -> Answer:
        """Take upstream's head, which says how the body is to be read; return what takes the body."""
        told = "\n".join(fields.values())
        shown = self._redact(told)
        if shown != told:
            fields = dict(zip(fields, shown.split("\n")))
        head = Head(status, fields)
        self.notes.request_id = (fields.get("x-request-id") or fields.get("request-id") or "")[:200] or None
        if self.passes:
            self.fields = {back: value for name, value in fields.items() if (back := _NAMES_BACK[name])}
        if not (status in (200, 201, 202) or (self.passes and 200 <= status < 300)):
            return Refusal(self, head)
        if head.compression:
            self.failure = Garbled("Upstream compressed its answer, although asked not to.")
        self.head = head
        self._form = _OTHER if self.passes and _AS_IT_COMES.match(head.media) else _UNTOLD
        self._on_form()
        return self

    @property
    def status(self) -> int:
        """The status of the client's answer."""
        return self.head.status

    @property
    def content_type(self) -> str:
        """What the client's answer is; "": it is not said."""
        return self.head.content_type

    def client_head(self) -> tuple[int, dict[str, str]]:
        """Return the status and the fields of the client's answer, which begins."""
        type = {"Content-Type": self.content_type} if self.content_type else {}
        return self.status, {**self.fields, **type}

    @property
    def pings(self) -> bool:
        """Whether heartbeats make sense."""
        return (self._form or self.head.label) == _EVENTS

    @property
    def eager(self) -> bool:
        """Whether the head leaves as soon as upstream's has come, not with the first text."""
        return self.pings or self._form == _OTHER

    def feed(self, body: bytes) -> bytes:
        """Return what body adds to the answer, for the client."""
        out: list[bytes] = []
        if self.state < self.DONE and (self.failure is None or self.state == self.ENDING):
            try:
                if self._form == _EVENTS:
                    self._take_events(body, out)
                elif body:
                    self._take_bytes(body, out)
            except UpstreamError as error:
                self._fail(error)
        return b"".join(out)

    def close(self, cut: UpstreamError | None) -> bytes:
        """Take the end of the body, and what was wrong with its framing; sets DONE or failure."""
        out: list[bytes] = []
        try:
            if self.state < self.DONE and (self.failure is None or self.state == self.ENDING):
                self._finish(cut, out)
        except UpstreamError as error:
            self._fail(error)
        if self.failure:
            self.state = self.OPEN
        elif self.state >= self.SETTLED:
            self.state = self.DONE
        else:
            self.failure = cut or UpstreamError("Upstream ended before the end of its answer.", ending="truncated")
        return b"".join(out)

    def skim(self, body: bytes) -> bool:
        """Take body if it is whole events with which a stream just goes on, and tell so: then it passes as it is."""
        return False

    def end(self) -> bytes:
        """Return what follows the last text of a complete answer."""
        return b""

    def ping(self) -> bytes:
        """Return a heartbeat; b"" where none may stand now."""
        return b""

    def encode(self, type: str, **payload: Any) -> bytes:
        """Return what the client is to see of an event: message, reasoning, done, or the error that ends it."""
        return b""

    def encode_failure(self, failure: ProxyError) -> bytes:
        """Return the event that ends the answer; b"": nothing tells of a failure but a body that does not end."""
        return self.encode("error", error=failure.message)

    def _take_bytes(self, body: bytes, out: list[bytes]) -> None:
        """Take what is no event stream, or not yet known to be one."""
        self.life += 1
        self.notes.events += self.head.label != _EVENTS
        if body[:6] == b"data: " and not self._held and self._form == _UNTOLD:  # mostly
            self._form = _EVENTS
            self._on_form()
            self._take_events(body, out)
            return
        begin = max(0, len(self._held) - 8)
        self._held += body
        if self._form == _UNTOLD or (self._form == _DOCUMENT and _FIELD_IN_DOCUMENT.search(self._held, begin)):
            self._form = form_of(bytes(self._held), self.head.label)
        if self._form == _DOCUMENT and len(self._held) > MAX_EVENT_SIZE:
            self._form = _OTHER
        self._on_form()
        if self._form in (_EVENTS, _OTHER):
            body, self._held = bytes(self._held), bytearray()
            (self._take_events if self._form == _EVENTS else self._take_other)(body, out)

    def _fail(self, error: UpstreamError) -> None:
        if isinstance(error, Garbled) and self.state >= self.SETTLED:
            self.state = self.DONE  # it was complete before
            return
        if error.status == 529 and not self.passes:
            error.status = 503  # which more than some APIs know
        error.message, error.logged = self._redact(error.message), self._redact(error.logged)
        error.document = redact_bytes(error.document, self._redact)
        self.failure, self.state = error.bare(), self.OPEN

    # What the kinds of answers differ in; what the client is to have of it goes to out.

    def _on_form(self) -> None:
        """Take note of what the body is, as far as that is known."""

    def _take_events(self, body: bytes, out: list[bytes]) -> None:
        raise NotImplementedError

    def _take_other(self, body: bytes, out: list[bytes]) -> None:
        raise NotImplementedError

    def _finish(self, cut: UpstreamError | None, out: list[bytes]) -> None:
        raise NotImplementedError


def inflate(data: bytes, coding: str) -> bytes:
    """Return what coding has packed, little more than MAX_ERROR_SIZE at most; b"" where it cannot be read."""
    if not coding:
        return data
    if "gzip" in coding or "deflate" in coding:
        for wbits in (47, -15):  # the formats of gzip and zlib, and what RFC 9110 section 8.4.1.2 warns of
            with contextlib.suppress(zlib.error):
                return zlib.decompressobj(wbits).decompress(data, MAX_ERROR_SIZE + 1)
    return b""


class Refusal(Answer):
    """An answer whose status is no success: a failure, told once its document is whole or too large."""

    eager = False

    def __init__(self, asked: Answer, head: Head) -> None:
        """asked: what the client waits for, and may have the start of already."""
        super().__init__(asked._redact)
        self.passes, self.fields, self.notes.request_id = asked.passes, asked.fields, asked.notes.request_id
        self.asked, self.head, self.refused = asked, head, head.status
        self.document = b""  # once it is whole

    def client_head(self) -> tuple[int, dict[str, str]]:
        return self.asked.client_head()

    @property
    def pings(self) -> bool:
        return self.asked.pings

    def ping(self) -> bytes:
        return self.asked.ping()

    def encode_failure(self, failure: ProxyError) -> bytes:
        return self.asked.encode_failure(failure)

    def _take_bytes(self, body: bytes, out: list[bytes]) -> None:
        self.life += 1
        self.notes.events += 1
        self._held += body
        if len(self._held) > MAX_ERROR_SIZE:
            self._finish(None, out)
        elif self._is_whole():
            self.state = self.ENDING

    def _is_whole(self) -> bool:
        """Tell whether what has come is JSON, though the body may not end: some leave the connection open."""
        if not self._held.rstrip().endswith((b"}", b"]")):
            return False
        with contextlib.suppress(Garbled):
            return bool(load_payload(self._held.decode("utf-8", "replace")))
        return False

    def _finish(self, cut: UpstreamError | None, out: list[bytes]) -> None:
        self.document = document = inflate(bytes(self._held), self.head.compression)
        failure = refusal(self.refused, document, self.head.fields.get("retry-after", ""))
        is_cut = cut and document.lstrip()[:1] in (b"{", b"[") and not self._is_whole()
        is_told = document.strip() and len(document) <= MAX_ERROR_SIZE and not is_cut
        if self.passes and failure.status != 502 and is_told:
            failure.document = document
            if document.lstrip()[:1] not in (b"{", b"[", b'"'):
                failure.fields["Content-Type"] = "text/plain; charset=utf-8"
        failure.fields = {**self.fields, **failure.fields}
        raise failure


_Joiner = codecs.getincrementaldecoder("utf-16-le")  # which imports a module: later there may be no descriptor for it


class TextAnswer(Answer):
    """The answer to one prompt as bare text."""

    status = 200
    content_type = "text/plain; charset=utf-8"
    pings = eager = False

    def __init__(self, redact: Callable[[str], str] = str) -> None:
        super().__init__(redact)
        self._parser = EventParser(strict=False)
        self._joiners: dict[str, codecs.IncrementalDecoder] = {}
        # What stood around the text of the last event that was parsed, if that told nothing else.
        self._around: tuple[str, ...] = ()
        self._spoke_on = False  # text came behind a finish_reason, so that the next one need not be the last either
        self._messages: str | None = ""  # what messages have told; None: deltas tell, and a message would repeat it

    def encode(self, type: str, **payload: Any) -> bytes:
        return payload["text"].encode() if type == "message" else b""

    def end(self) -> bytes:
        halves = [(type, joiner.decode(b"", True)) for type, joiner in self._joiners.items()]
        rest = [self.encode(type, text=half) for type, half in halves if half]
        return b"".join(rest) + self.encode("done", finish_reason=self.notes.finish_reason, usage=self.notes.usage)

    def _take_events(self, body: bytes, out: list[bytes]) -> None:
        parser = self._parser
        for event in parser.feed(body):
            self._take_event(event, out)
        if parser.idle and self.state < self.ENDING:
            self.life += parser.idle
            parser.idle = 0

    def _take_other(self, body: bytes, out: list[bytes]) -> None:
        raise Garbled("Upstream sent neither an event stream nor JSON.")

    def _finish(self, cut: UpstreamError | None, out: list[bytes]) -> None:
        try:
            if self._form == _DOCUMENT:
                data = self._held.decode("utf-8", "replace")
                payload = check_payload(load_payload(data), data)
                if not payload.get("choices"):
                    raise Garbled("Upstream sent JSON that is not a chat completion.")
                self._take_payload(payload, data, out)
                self.state = max(self.state, self.SETTLED)
            for event in self._parser.close():
                self._take_event(event, out)
        except Garbled as garbled:  # also an event that the end cut in two
            if self._form == _DOCUMENT:
                raise cut or garbled from None

    def _take_event(self, event: Event, out: list[bytes]) -> None:
        if self.state == self.DONE:
            return
        self.notes.events += 1
        self.life += 1
        data, pieces = event.data, self.notes.pieces
        text, around = split_delta(data) if len(data) < _SHORT_JSON else ("", ())
        if text and around == self._around and event.type == "message":
            self._take_text(text, out)
        elif data.strip() == "[DONE]":
            self.state = self.DONE
        else:
            payload = check_payload(load_event(event), data, event.type)
            self._take_payload(payload, data, out)
            if around != self._around:  # forgotten even if it might come again: usage in it counts where it came last
                once = text and self.notes.pieces == pieces + 1 and data.count('"delta"') == 1
                self._around = around if once and is_only_text(payload, text) else ()

    def _take_payload(self, payload: dict[str, Any], data: str, out: list[bytes]) -> None:
        usage = '"usage"' in data and (payload.get("usage", payload) or data.count('"usage"') > 1)  # mostly null
        if usage or (self.notes.model is None and payload.get("model")):
            self.notes.take(payload)
        try:
            for choice in payload.get("choices") or ():
                if self.choices == 1 or not choice.get("index"):
                    self._take_choice(choice, out)
        except (AttributeError, LookupError, TypeError):
            raise Garbled("Upstream sent JSON that is not a chat completion's.") from None

    def _take_choice(self, choice: dict[str, Any], out: list[bytes]) -> None:
        part = choice.get("delta") or {"content": choice.get("text")}
        text, reasoning = part.get("content"), ""
        if len(part) > 1 or type(text) is not str:  # or else, mostly, it is all there is
            text, reasoning = parse_part(part)
        if text:
            self._messages = None
        elif self._messages is not None and choice.get("message"):
            message = choice["message"]
            message, reasoning = parse_part({"content": message} if isinstance(message, str) else message)
            text = message.removeprefix(self._messages)  # some are all the text so far
            self._messages += text
        if reasoning:
            reasoning = self._joined("reasoning", reasoning)
            if reasoning:
                out.append(self.encode("reasoning", text=reasoning))
        self._take_text(text, out)
        reason = choice.get("finish_reason") and parse_reason(choice)
        if reason:
            self.notes.finish_reason = self._redact(reason)
            # Beside a role or reasoning, before any text, it came early: then nothing is hurried.
            early = not self.notes.pieces and any(part[name] for name in part if name != "content")
            # A gateway that runs tools by itself goes on when they have run.
            hurried = not (early or self._spoke_on or reason in ("tool_calls", "function_call"))
            self.state = self.ENDING if hurried else self.SETTLED

    def _take_text(self, text: str, out: list[bytes]) -> None:
        text = text and self._joined("message", text)
        if text:
            self.notes.pieces += 1
            self.notes.size += len(text.encode())
            out.append(self.encode("message", text=text))
            if self.state > self.SETTLED:  # a finish_reason before it came early
                self.state, self._spoke_on = self.SETTLED, True

    def _joined(self, type: str, text: str) -> str:
        """Return text with the surrogate pairs whole that upstream split over two events.

        A tokeniser may cut an emoji in two, and JSON then carries each half as an escape of its own.  A joiner, for
        UTF-16, keeps the first half until the second comes, and makes U+FFFD of one left alone.
        """
        joiner = self._joiners.get(type)
        if text.isascii() and not (joiner and joiner.getstate()[0]):  # mostly
            return text
        if not joiner:
            joiner = self._joiners[type] = _Joiner("replace")
        return joiner.decode(text.encode("utf-16-le", "surrogatepass"))


class EventAnswer(TextAnswer):
    """The answer as server-sent events of our own, the first with an id."""

    content_type = "text/event-stream"
    pings = True

    def __init__(self, request_id: str, redact: Callable[[str], str] = str, reconnects: bool = False) -> None:
        """reconnects: the client is an EventSource, which asks again when it is cut off."""
        super().__init__(redact)
        self._id = request_id
        self._tell_id = reconnects
        self._count = -1  # of events so far, where each has its number

    def number(self, id: str) -> None:
        """Give each event an id of its own, ID.N, with N from 1 on, so that a client can come back to any."""
        self._id, self._tell_id, self._count = id, True, 0

    def ping(self) -> bytes:
        # One that is cut off after a ping must know an id already, or it would pay again.  A block
        # of id alone sets it and is no event (WHATWG HTML section 9.2.6).
        tell, self._tell_id = self._tell_id, False
        id = f"{self._id}.0" if self._count == 0 else self._id
        return b"id: %b\n\n" % id.encode() + PING if tell else PING

    def encode(self, type: str, **payload: Any) -> bytes:
        last_event_id, self._tell_id = self._id, False
        if self._count < 0:
            self._id = ""
        else:
            self._count += 1
            last_event_id = f"{self._id}.{self._count}"
        return encode_event(_encode_json(payload), "" if type == "message" else type, last_event_id)


_encode_json = json.JSONEncoder(ensure_ascii=False).encode


# 7 ------------------------------------------------------------------- Passed answers


_LINE_END = r"(?:\r\n|\n|\r(?!\n))"
_ANY_EVENT = re.compile(  # lines and a blank one, or the rest
    rf"(?:[^\r\n]+{_LINE_END})*{_LINE_END}|.+".encode(), re.DOTALL
)


def split_events(block: bytes) -> list[bytes]:
    """Return the bytes of each event in a block of whole ones; a line end more than they need is by itself."""
    # To ask with "in" would raise an error within, and drop it.
    if block[:1] == b"\n" or block.find(b"\n\n\n") >= 0 or block.find(b"\r") >= 0:
        return _ANY_EVENT.findall(block)
    return [event + b"\n\n" for event in block.split(b"\n\n")[:-1]]


class EventCutter:
    """The events of a stream in the bytes they came in, as they become whole."""

    # What passes of an event that is not whole: it says nothing yet.
    _QUIET = re.compile(rb"(?:(?:event|id|retry)?:[^\r\n]*(?:\r?\n|\Z))*[^\r\n]{0,8}")
    _COMMENTS = re.compile(rb"(?::[^\r\n]*\r?\n)+")

    def __init__(self) -> None:
        self.rest = bytearray()  # what came behind the last blank line
        self.passed = 0  # bytes of it that were passed on

    def feed(self, body: bytes) -> bytes:
        """Return the events that body completes, with what was passed on of the first."""
        begin = max(0, len(self.rest) - 2)
        self.rest += body
        blanks = (b"\n\n", b"\n\r\n", b"\r\r")
        end = max((at + len(blank) for blank in blanks if (at := self.rest.rfind(blank, begin)) >= 0), default=0)
        events = bytes(self.rest[:end])
        del self.rest[:end]
        if events:
            self.passed = 0
        return events

    def take_comments(self, body: bytes) -> bytes | None:
        """Return the comments that stand before all else, but for what was passed on of them.

        body: what was fed.  None: it ends none.
        """
        match = self._COMMENTS.match(self.rest) if b"\n" in body else None
        if not match:
            return None
        end = match.end()
        data = bytes(self.rest[self.passed : end])
        del self.rest[:end]
        self.passed = max(0, self.passed - end)
        return data

    def pass_on(self) -> bytes:
        """Return what may pass of the event that is not whole, and did not yet."""
        size, passed, data = len(self.rest), self.passed, b""
        if size > MAX_EVENT_SIZE or (size < 256 and self._QUIET.fullmatch(self.rest)):
            data, passed = bytes(self.rest[passed:]), size
        if size > MAX_EVENT_SIZE:
            del self.rest[1024:-4]  # its type, which comes first, is all that is looked at then
            passed = len(self.rest)
        self.passed = passed
        return data


def goes_on(text: str) -> int:
    """Return how many events text has, if each is one line in which a completion just goes on; 0: nothing is told.

    Blank lines end text and each event.  Each has a choice, no usage, and what it has of finish_reasons is null.
    """
    if "error" in text or '"usage":{' in text or "\r" in text:
        return 0
    if "\n" not in text[:-2]:  # mostly
        told, null, rest = text.partition('"finish_reason":null')
        going = null and '"choices":[{' in told and '"finish_reason"' not in told and '"finish_reason"' not in rest
        return bool(going and text[:5] == "data:")
    events = text.count('"choices":[{')
    going = text.count("\n\n") == events and text.count('"finish_reason"') == text.count('"finish_reason":null')
    return events if going and _DATA_LINES.fullmatch(text) else 0


_DATA_LINES = re.compile(r"(?:data: ?\{[^\n]*\n\n)+")


def is_dull(event: bytes) -> bool:
    """Tell whether one event just goes on with an answer, and has no usage: also one that is typed, or has blanks."""
    text = event.decode("latin-1")
    has_usage = '"usage"' in text and text.count('"usage"') > text.count('"usage":null')
    if has_usage or '"finish_reason":"' in text:  # mostly, where it is not
        return False
    if text[:5] == "data:" and text[-2:] == "\n\n" and goes_on(text):  # mostly, where it is
        return True
    match = _DULL_EVENT.fullmatch(text)
    if not match or match[1] is None:
        return match is not None and '"error":' not in text  # it has a type that tells
    return not ('"error' in text or _REASON.search(text) or text.count("\r") != text.count("\r\n"))


_WORDS = re.compile("text/|application/xhtml|$")  # the media types of a page, or of words
_DONE_EVENT = b"data: [DONE]\n\n"  # as mostly sent
_MODEL = re.compile(  # no string has such quotes in it, and no other object stands before the choices
    rb'data: ?\{[^{}\\]{0,400}"model":"([^"\\]{1,400})"[^{}\\]{0,400}"choices":\['
)
# What begins one that [DONE] does not end: gateways send that behind an answer that was cut, too.
_FIRST_TYPES = ("message_start", "response.created")
# What else ends a stream: Anthropic's messages, OpenAI's responses.
_LAST_TYPES = ("message_stop", *(f"response.{end}" for end in ("completed", "incomplete", "failed", "cancelled")))
# What is whole with this, though more may come: images, OpenAI's, of which there may be several, and speech.
_WHOLE_TYPES = (
    "image_generation.completed", "image_edit.completed", "speech.audio.done", "transcript.text.done",
)  # fmt: skip
_REASON = re.compile(r'"finish_reason"[ \t\r\n]*:[ \t\r\n]*[^n \t\r\n]')
_DULL_TYPE = r"[a-z_.]*(?:(?<!message)[._]delta|partial_image)"
_DULL_EVENT = re.compile(
    rf'(?:(data: ?\{{[^\n]*"choices": ?\[ ?\{{)|event: ?{_DULL_TYPE}\r?\ndata:|data: ?\{{ ?"type": ?"{_DULL_TYPE}")'
    r"[^\n]*\n\r?\n"
)


class PassedAnswer(Answer):
    """The answer to an OpenAI client, passed on byte for byte: a stream event by event, a JSON document whole.

    Streams are only looked through for what ends them, so that one that was cut is not taken for whole.
    """

    passes = True

    _SKIMMED = re.compile(rb'"(model|usage)"\s*:\s*("[^"\\]*"|\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\})')

    def __init__(
        self, redact: Callable[[str], str] = str, choices: int = 1, messages: bool = False, stream: bool = False
    ) -> None:
        """choices: how many finish_reasons a whole answer has.  messages: the API is Anthropic's.

        stream: one was asked for, so that there may be heartbeats before upstream's head has come.
        """
        super().__init__(redact)
        self.choices = choices
        self.head = _STREAM_HEAD if stream else _NO_HEAD
        self._api = "/v1/messages" if messages else "/v1/"
        self._stream = stream
        self._parser = EventParser(sys.maxsize, strict=False)  # of the events that are looked at
        self._cutter = EventCutter()
        self._begun_with: Head | None = None  # the head with which the client's answer began
        self._is_under_way = False  # a stream whose model is known, or is not told
        self._is_typed = False  # a stream that an event of a type of its own ends, and [DONE] does not

    def client_head(self) -> tuple[int, dict[str, str]]:
        self._begun_with = self.head
        return super().client_head()

    @property
    def _is_promised(self) -> bool:
        """Whether the client's answer began as a stream before upstream's head had come."""
        return self._begun_with is _STREAM_HEAD

    def ping(self) -> bytes:
        if self._cutter.passed:
            return b""
        return encode_event('{"type": "ping"}', "ping") if self._api == "/v1/messages" else PING

    def encode_failure(self, failure: ProxyError) -> bytes:
        if not self._is_promised or self._form == _EVENTS:
            return b""
        said = said_in(failure.document)
        if not (isinstance(said, dict) and isinstance(said.get("error"), dict)):  # which SDKs read; else ours of a kind
            said = json.loads(encode_error(ProxyError(failure.message, failure.status, code=failure.code), self._api))
        return encode_event(json.dumps(said), "error" if self._api == "/v1/messages" else "")

    def _on_form(self) -> None:
        if self._form == _OTHER and "content-length" in self.head.fields:
            self.fields["Content-Length"] = self.head.fields["content-length"]

    def _pass(self, data: bytes, out: list[bytes]) -> None:
        if data:
            notes = self.notes
            notes.pieces += 1
            notes.size += len(data)
            out.append(data)

    def _take_other(self, body: bytes, out: list[bytes]) -> None:
        self._check_form()
        self._pass(body, out)

    def _check_form(self) -> None:
        """Raise UpstreamError where a stream was promised, and this is none; or asked for, and this is a page, words or
        nothing: to whoever asks for a stream, speech may come instead.
        """
        is_answer = self._form == _DOCUMENT or (self._form == _OTHER and not _WORDS.match(self.head.media))
        if self._is_promised or (self._stream and not is_answer):
            what = "nothing" if self._form == _UNTOLD and not self._held.strip() else "a document"
            raise UpstreamError(f"Upstream sent {what} where a stream was asked for.")

    def skim(self, body: bytes) -> bool:
        if body[-2:] != b"\n\n" or self._cutter.rest or not self._goes_on(body):
            return False
        notes = self.notes
        notes.pieces += 1
        notes.size += len(body)
        return True

    def _goes_on(self, block: bytes) -> bool:
        """Take whole events with which the stream just goes on; False: they are others, or none, and not taken."""
        notes = self.notes
        if not self._is_under_way or self.state >= self.ENDING:
            return False
        count = goes_on(block.decode("latin-1"))  # a str is searched in a fraction of the time
        notes.events += count
        self.life += count
        return count > 0

    def _take_events(self, body: bytes, out: list[bytes]) -> None:
        cutter = self._cutter
        if self._is_promised and not (self.notes.events or cutter.rest):
            body = body.removeprefix(codecs.BOM_UTF8)  # which stands at the begin of a stream alone
        if body[-2:] == b"\n\n" and not cutter.rest:  # mostly, whole events come, which skim has seen
            self._pass(self._look_through(body, 0), out)
            return
        passed, block = cutter.passed, cutter.feed(body)
        comments = cutter.take_comments(body)
        self.life += comments is not None and self.state < self.ENDING  # servers keep an idle connection alive so
        rest = (comments or b"") + cutter.pass_on()
        data = block[passed:] if self._goes_on(block) else self._look_through(block, passed)
        self._pass(data + rest, out)

    def _look_through(self, block: bytes, passed: int) -> bytes:
        """Take whole events; return what the client is to have, which has the first bytes of them already."""
        pieces = split_events(block)
        good = [*map(self._take_piece, pieces)]
        if all(good):
            return block[passed:]
        pieces[0] = pieces[0][passed:]
        return b"".join([piece if ok else redact_bytes(piece, self._redact) for piece, ok in zip(pieces, good)])

    def _take_piece(self, piece: bytes) -> bool:
        """Take an event as it came; False: it is an error, and may have secrets."""
        notes, parser, counts = self.notes, self._parser, self.state < self.ENDING
        done = piece == _DONE_EVENT and not self._is_typed
        if counts and (done or (len(piece) < MAX_SKIMMED and is_dull(piece) and self._names_model(piece))):
            notes.events += 1
            self.life += 1
            self.state = self.ENDING if done else self.state
            return True
        events = parser.feed(piece)
        self.life += counts and len(events) + parser.idle
        parser.idle = 0
        return all([*map(self._take_event, events)])  # each, whatever the one before is

    def _names_model(self, piece: bytes) -> bool:
        """Tell whether the model is known, or is not told, by now; take it from an event where it can only be that."""
        match = None if self._is_under_way else _MODEL.match(piece)
        if match:
            self.notes.name_model(match[1].decode("utf-8", "replace"))
            self._is_under_way = True
        return self._is_under_way

    def _take_event(self, event: Event) -> bool:
        """Take event; False: it is an error, and may have secrets."""
        self.notes.events += 1
        data, payload = event.data, None
        done = data.strip() == "[DONE]"
        types: tuple[object, ...] = (event.type,)
        ends = (done and not self._is_typed) or event.type in _LAST_TYPES
        try:
            try:
                payload = None if done else load_event(event)
                types = (event.type, payload.get("type") if isinstance(payload, dict) else None)
                ends = ends or types[1] in _LAST_TYPES
                payload = payload if ends else check_payload(payload, data, event.type)
            except Garbled:  # what is not as it should be is for the client to see
                pass
            self._is_typed = self._is_typed or types[-1] in _FIRST_TYPES
            if ends and self.failure is None:
                self.state = self.ENDING
            elif types[0] in _WHOLE_TYPES or types[-1] in _WHOLE_TYPES:
                self.notes.finished.add(str(self.notes.events))
            self._take_payload(payload, data)
            self._is_under_way = bool(self.notes.model) or self.notes.events >= MAX_UNNAMED
        except UpstreamError as error:
            if self.state < self.ENDING:
                self._fail(error)
                self.state = self.ENDING
            return False
        return True

    def _take_payload(self, payload: object, data: str) -> None:
        """Take note of what payload, which data is, says of the answer and of its end."""
        if not isinstance(payload, dict):
            return
        has_usage = '"usage"' in data
        if has_usage or self.notes.model is None:
            self.notes.take(payload, has_usage)
        if data.count('_reason"') > data.count('_reason":null') or '"response"' in data:
            self.notes.take_end(payload)
        if self.state == self.OPEN and len(self.notes.finished) >= self.choices and self.failure is None:
            self.state = self.SETTLED

    def _finish(self, cut: UpstreamError | None, out: list[bytes]) -> None:
        if self._form == _EVENTS:
            self._finish_events(out)
        elif self._form == _UNTOLD and self.head.label == _EVENTS:
            if not self._is_promised:  # else an event says what is wrong, which has to begin a line
                self._pass(bytes(self._held), out)
        elif cut:
            raise cut
        elif self._form == _DOCUMENT or self.head.framed:
            document = bytes(self._held)
            if self._form == _DOCUMENT:
                document = self._take_document(document, out)
            self._check_form()
            if self._form != _OTHER and self.status != 204:  # RFC 9110 section 8.6
                self.fields["Content-Length"] = str(len(document))
            self._pass(document, out)
            self.state = self.SETTLED

    def _finish_events(self, out: list[bytes]) -> None:
        """Take the event that the body ended in: it counts if it is whole, though no blank line came."""
        rest = bytes(self._cutter.rest)
        events = self._parser.feed(rest) + self._parser.close() if rest or self._parser.holds else ()
        good = bool(events)
        for event in events:
            whole = event.data.strip() == "[DONE]"
            with contextlib.suppress(Garbled):
                whole = whole or bool(load_payload(event.data))
            taken = (whole or event.type not in (*_LAST_TYPES, *_WHOLE_TYPES)) and self._take_event(event)
            good = good and whole and taken
        rest = rest[self._cutter.passed :]
        self._pass(rest if good else redact_bytes(rest, self._redact), out)

    def _take_document(self, document: bytes, out: list[bytes]) -> bytes:
        """Return a JSON document as the client is to have it.

        Raises UpstreamError where it is cut, or an error although a stream was asked for.
        """
        if len(document) > MAX_SKIMMED and self.head.framed and document.find(b'"error', 0, 2048) < 0:
            for name, value in [*self._SKIMMED.findall(document[:2048]), *self._SKIMMED.findall(document[-2048:])]:
                with contextlib.suppress(Garbled):
                    self.notes.take({name.decode(): load_payload(value.decode("utf-8", "replace"))})
            return document
        text = document.decode("utf-8", "replace")
        try:
            payload = load_payload(text)
        except Garbled:
            if self.head.framed and not self._stream:
                return document
            raise UpstreamError("Upstream ended before the end of its answer.", ending="truncated") from None
        if self._stream and not isinstance(payload, (dict, list)):
            raise UpstreamError("Upstream sent nothing where a stream was asked for.")
        with contextlib.suppress(UpstreamError):  # which the document tells
            self._take_payload(payload, text)
        try:
            check_payload(payload, text)
        except Garbled:
            pass
        except UpstreamError as error:
            document = redact_bytes(document, self._redact)
            if self.head.label == _EVENTS and self._begun_with not in (None, _STREAM_HEAD):
                self._pass(document, out)
            elif self._stream:
                error.document = document
            else:
                return document
            raise
        return document


# 8 ------------------------------------------------------------------- HTTP framing

_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # RFC 9110 section 5.6.2
_QUOTED = r'"(?:[\t \x21\x23-\x5b\x5d-\x7e\x80-\xff]|\\[\t \x21-\x7e\x80-\xff])*"'  # section 5.6.4
_VALUE = r"[\t \x21-\x7e\x80-\xff]*"  # section 5.5: no CR, LF or NUL
_FIELD_NAME, _FIELD_VALUE = re.compile(_TOKEN), re.compile(_VALUE)

# Lines of RFC 9112, matched whole: int() would also take "+5", "0x5" and "1_0".
_STATUS_LINE = re.compile(f"HTTP/1\\.([01]) ([1-5][0-9][0-9])(?: {_VALUE})?")  # section 4
_CHUNK_LINE = re.compile(  # section 7.1
    f"([0-9A-Fa-f]{{1,15}})(?:[ \t]*;[ \t]*{_TOKEN}(?:[ \t]*=[ \t]*(?:{_TOKEN}|{_QUOTED}))?)*".encode("latin-1")
)
_TRAILER_LINE = re.compile(f"{_TOKEN}:{_VALUE}".encode("latin-1"))  # section 5: no space before the colon, no folding

LAST_CHUNK = b"0\r\n\r\n"


def is_field_value(text: str) -> bool:
    """Tell whether text can be the value of a field (RFC 9110 section 5.5)."""
    return (text.isascii() and text.isprintable()) or bool(_FIELD_VALUE.fullmatch(text))  # mostly, the first


def encode_chunk(data: bytes) -> bytes:
    """Return data as a chunk; nothing for no data, since a chunk of size 0 ends the body."""
    return b"%x\r\n%b\r\n" % (len(data), data) if data else b""


def encode_head(line: str, fields: Mapping[str, str]) -> bytes:
    """Return a head.  Raises ValueError for a value that would forge a line, or that HTTP cannot carry."""
    if not is_field_value("".join(fields.values())):
        raise ValueError("a bad value in a header field")
    return "\r\n".join((line, *map(": ".join, fields.items()), "\r\n")).encode("latin-1")


def parse_field_line(line: str, blanks: str = "") -> tuple[str, str]:
    """Return the name, in lower case, and the value in a field line.  Raises ValueError.

    blanks: which of them do no harm before the colon.
    """
    name, colon, value = line.partition(":")
    name = _FIELD_NAMES[name.rstrip(blanks)]
    if not (name and colon and is_field_value(value)):
        raise ValueError("a header field is not in HTTP's grammar")
    return name, value.strip(" \t")


class FieldLines(Memo):
    """What parse_field_line makes of each line.

    Of heads, most lines are those of the one before: they are remembered, but for what is long, or a secret.
    """

    def _keeps(self, key: str, value: tuple[str, str]) -> bool:
        return len(key) < 100 and not _HAS_SECRETS[value[0]]


# Found in their names.  In Sec-WebSocket-Protocol, pages send OpenAI's realtime API a key; "tokens" are counted.
_SECRET_FIELD = re.compile("auth|cookie|credential|jwt|key|pass|protocol|secret|session|signature|token(?!s)")
_HAS_SECRETS: dict[str, bool] = Memo(lambda name: bool(_SECRET_FIELD.search(name)), 256)
# By a name as it was sent: in lower case; "" if it is none.
_FIELD_NAMES: dict[str, str] = Memo(lambda name: name.lower() if _FIELD_NAME.fullmatch(name) else "", 256)
_STRICT_LINES = FieldLines(parse_field_line, MAX_FIELD_LINES)
# In an answer, blanks before the colon do no harm.
_LENIENT_LINES = FieldLines(functools.partial(parse_field_line, blanks=" \t"), MAX_FIELD_LINES)


def parse_fields(lines: Sequence[str], known: FieldLines = _STRICT_LINES) -> dict[str, str]:
    """Return the fields of a head by name in lower case.

    Those of one name are joined with ", " (RFC 9110 section 5.3).  Raises ValueError for what is not in the grammar
    of RFC 9112 section 5.
    """
    parsed = list(map(known.__getitem__, lines))
    fields = dict(parsed)
    if len(fields) < len(parsed):
        fields.clear()
        for name, value in parsed:
            fields[name] = f"{fields[name]}, {value}" if name in fields else value
    return fields


def parse_status_line(line: str) -> tuple[str, int] | None:
    """Return the minor version and the status in the first line of an answer; None if it is none."""
    match = _STATUS_LINE.fullmatch(line)
    return (match[1], int(match[2])) if match else None


_STATUS_LINES: dict[str, tuple[str, int] | None] = Memo(parse_status_line, 64)


def parse_answer_head(data: bytes) -> tuple[int, dict[str, str], bytes] | None:
    """Return (status, fields, what follows the head) of an answer; None while the head is not whole.

    Interim answers are skipped (RFC 9110 section 15.2).  Raises ValueError.
    """
    for _ in range(MAX_INTERIM):
        head, end, rest = data.partition(b"\r\n\r\n")
        if len(head) > MAX_HEAD_SIZE or head[:7] != b"HTTP/1."[: len(head)]:
            break
        if not end:
            return None
        line, *lines = head.decode("latin-1").split("\r\n")
        status_line = _STATUS_LINES[line]
        if not status_line:
            break
        if len(lines) > MAX_ANSWER_FIELDS:
            raise ValueError("too many header fields")
        fields = parse_fields(lines, _LENIENT_LINES)
        minor, status = status_line
        if minor == "0":
            fields["connection"] = "close"  # as good as said
        coding = fields.get("transfer-encoding", "")
        if "content-length" in fields and (coding or "," in fields["content-length"]) or "," in coding:
            _unify_framing(fields)
        if status >= 200 or status == 101:
            return status, fields, rest
        data = rest
    raise ValueError("not an answer")


def _unify_framing(fields: dict[str, str]) -> None:
    """Let count once what an answer's head says twice, and a coding over a length (RFC 9112 section 6.3).

    Nobody hides a request behind an answer; but whoever sends that may not know where it ends, so it is the last.
    """
    for name in ("transfer-encoding", "content-length"):
        values = {value.strip().lower() for value in fields.get(name, "").split(",")}
        if name in fields and len(values) == 1:
            fields[name] = values.pop()
    if "transfer-encoding" in fields:
        fields.pop("content-length", None)
    fields["connection"] = "close"


class BodyDecoder:
    """The data of a body of left bytes (RFC 9112 section 6.2); None: of one that its connection's end ends.

    complete: the body has ended; rest is what came behind it.  broken: its framing is not HTTP's.
    """

    def __init__(self, left: int | None = None) -> None:
        self.left = left
        self.complete = left == 0
        self.broken = False
        self.rest = b""

    def feed(self, data: bytes) -> bytes:
        """Return the body's part of data.  What came before the framing broke still counts."""
        if self.left is not None:
            self.left -= len(data)
            self.complete = self.left <= 0
            if self.left < 0:
                data, self.rest, self.left = data[: self.left], data[self.left :], 0
        return data

    def close(self) -> None:
        """Take the end of the connection: where that ends the body, only its text can tell if it is whole."""
        self.complete = self.complete or self.left is None


def parse_chunk_line(line: bytes) -> int:
    """Return the size in a chunk's first line, its extensions ignored; -1 if it is none."""
    match = _CHUNK_LINE.fullmatch(line)
    return int(match[1], 16) if match else -1


_CHUNK_SIZES: dict[bytes, int] = Memo(parse_chunk_line, 1024)


class ChunkedDecoder(BodyDecoder):
    """The data of a chunked body, read strictly; trailers are dropped.  Source: RFC 9112 section 7.1."""

    def __init__(self, lenient: bool = False) -> None:
        """lenient: it is upstream's, where zeros before a chunk's size and blanks behind it do no harm."""
        super().__init__(sys.maxsize)  # who knows, before the last chunk
        self._lenient = lenient
        self._chunk_left = 0  # bytes of the chunk still to come, with the line end behind its data
        self._line = b""  # the start of a line
        self._trailer_room = MAX_TRAILER_SIZE
        self._in_trailer = False

    def feed(self, data: bytes) -> bytes:
        if self._line:
            data, self._line = self._line + data, b""
        if data[-2:] == b"\r\n" and not (self._chunk_left or self._in_trailer or self.broken):
            line, _, rest = data.partition(b"\r\n")  # mostly, one chunk comes at a time
            if len(line) < 16 and len(rest) - 2 == _CHUNK_SIZES[line] > 0:
                return rest[:-2]
            parts = data.split(b"\r\n")  # or several that are whole, and hold no such line end
            lines, pieces = parts[:-1:2], parts[1::2]
            whole = len(parts) % 2 and max(map(len, lines)) < 16 and b"" not in pieces[:-1]
            if whole and [*map(len, pieces)] == [*map(_CHUNK_SIZES.__getitem__, lines)]:
                self.complete = self._in_trailer = not pieces[-1]
                return b"".join(pieces)
        at, end, out = 0, len(data), []
        while at < end and not (self.complete or self.broken):
            if self._chunk_left > 2:
                piece = data[at : at + self._chunk_left - 2]
                out.append(piece)
                at += len(piece)
                self._chunk_left -= len(piece)
            line_end = data.find(b"\r\n", at)
            if line_end == at and self._chunk_left == 2:
                self._chunk_left = 0
            elif line_end >= 0:
                self._take_line(data[at:line_end])
            else:
                self._hold(data[at:])
                break
            at = line_end + 2
        self.rest = data[at:] if self.complete else b""
        return b"".join(out)

    def _take_line(self, line: bytes) -> None:
        if self._lenient and (self._in_trailer or line[:1] == b"0" or line[-1:] in (b" ", b"\t")):
            line = self._tidied(line)
        if self._in_trailer:
            self.complete = not line
            self._trailer_room -= len(line)
            self.broken = self._trailer_room < 0 or not (self.complete or _TRAILER_LINE.fullmatch(line))
        else:
            size = -1 if self._chunk_left or len(line) > MAX_CHUNK_LINE else _CHUNK_SIZES[line]
            self._chunk_left = size + 2 if size else 0
            self._in_trailer = size == 0
            self.broken = size < 0

    def _tidied(self, line: bytes) -> bytes:
        if self._in_trailer:
            name, colon, value = line.partition(b":")
            return name.rstrip(b" \t") + colon + value
        line = line.rstrip(b" \t")
        size = line.lstrip(b"0")
        return size if size[:1].isalnum() else line[: len(line) - len(size)][:1] + size

    def _hold(self, line: bytes) -> None:
        """Keep the start of a line, if it can become one."""
        self._line = line
        misplaced = self._chunk_left == 2 and line not in (b"", b"\r")
        self.broken = misplaced or len(line) > MAX_CHUNK_LINE or b"\n" in line


def body_decoder(fields: Mapping[str, str], left: int | None, lenient: bool = False) -> BodyDecoder:
    """Return the decoder for the body behind a head; left: that of a BodyDecoder where the head says nothing of it.

    lenient: see ChunkedDecoder.

    Source: RFC 9112 section 6.3, read strictly: a length beside a coding, or two lengths, are how
    one message hides in another.  Raises ValueError.
    """
    length = fields.get("content-length")
    if "transfer-encoding" in fields:
        if fields["transfer-encoding"].lower() != "chunked":
            raise ValueError("a transfer coding that is not chunked")
        if length is not None:
            raise ValueError("Content-Length beside Transfer-Encoding")
        return ChunkedDecoder(lenient)
    if length is not None:
        if not _LENGTH.fullmatch(length):
            raise ValueError("a Content-Length that is not one number")
        left = int(length)
    return BodyDecoder(left)


_LENGTH = re.compile("[0-9]{1,15}")
_LINE_START = re.compile(f"{_TOKEN[:-1]}|\r?\\Z".encode())  # or what can become one
_REQUEST_LINE = re.compile(f"({_TOKEN}) ([!-~\x80-\xff]+) HTTP/([0-9])\\.([0-9])")  # RFC 9112 section 3
_BAD_LINE = "The request line is not in HTTP's grammar."
_TOO_MANY_FIELDS = "The request has too many header fields."
_HOST = re.compile(r"([A-Za-z0-9._~-]{1,255}|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?")  # RFC 9110 section 7.2
_CLOSE = re.compile("(?i)(?:^|,)[ \t]*close[ \t]*(?:,|$)")  # RFC 9112 section 9.6


class Request:
    """The head of a request; "-" for what of it cannot be read."""

    keeps_alive = False
    body: BodyDecoder

    def __init__(self, method: str = "-", target: str = "-", http11: bool = True) -> None:
        self.method, self.http11 = method, http11
        self.path, _, self.query = target.partition("?")
        self.fields: dict[str, str] = {}

    def take_fields(self, lines: Sequence[str]) -> None:
        """Take the fields, and from them the framing of the body.  Raises RequestError."""
        if len(lines) > MAX_FIELDS:
            raise RequestError(_TOO_MANY_FIELDS, 431)
        try:
            fields = parse_fields(lines)
            if not self.http11 and "transfer-encoding" in fields:
                raise ValueError("a transfer coding in HTTP/1.0")
            body = body_decoder(fields, 0)
        except ValueError as error:
            raise RequestError(f"The request cannot be read: {error}.") from None
        host = fields.get("host", "" if self.http11 else "localhost")
        if not _HOST.fullmatch(host):
            raise RequestError("The request needs one Host field.")
        if self.path[:1] != "/":  # absolute form, RFC 9112 section 3.2.2
            scheme, _, rest = self.path.partition("://")
            if scheme.lower() in ("http", "https") and rest.partition("/")[0].lower() == host.lower():
                self.path = "/" + rest.partition("/")[2]
        self.fields, self.body = fields, body
        self.keeps_alive = self.http11 and not ("connection" in fields and _CLOSE.search(fields["connection"]))


def parse_request_line(line: str) -> Request:
    """Return what the first line of a head says.  Raises RequestError."""
    match = _REQUEST_LINE.fullmatch(line)
    if not match:
        raise RequestError(_BAD_LINE)
    method, target, major, minor = match.groups()
    if major != "1":
        raise RequestError("This server speaks HTTP/1.1 and HTTP/1.0.", 505)
    return Request(method, target, minor != "0")


def parse_request_head(data: bytes) -> tuple[Request, bytes] | None:
    """Return the head of a request and what follows it; None while it is not whole.

    Raises RequestError, at once also where it cannot become one: HTTP/0.9, TLS, a line that ends in a bare LF.
    """
    head, end, rest = data.removeprefix(b"\r\n").partition(b"\r\n\r\n")  # RFC 9112 section 2.2
    if not end or len(head) > MAX_HEAD_SIZE:
        _check_start(head)
        return None
    line, *lines = head.decode("latin-1").split("\r\n")
    request = parse_request_line(line)
    request.take_fields(lines)
    return request, rest


def _check_start(head: bytes) -> None:
    """Raise RequestError for what is no start of a head that may come."""
    if not _LINE_START.match(head):
        raise RequestError(_BAD_LINE)
    line, line_ends, _ = head.partition(b"\n")
    if len(head) > MAX_HEAD_SIZE:
        raise RequestError("The head of the request is too large.", 431 if len(line) < MAX_HEAD_SIZE else 414)
    if line_ends:
        parse_request_line(line.decode("latin-1").removesuffix("\r"))
    lines = head.count(b"\r\n")
    if head.count(b"\n") > lines:
        raise RequestError("A line of the request ends in a bare LF.")
    if lines > MAX_FIELDS + 1:
        raise RequestError(_TOO_MANY_FIELDS, 431)


def readable_line(data: bytes) -> Request:
    """Return what can be said of a request whose head cannot be read, to answer and to log it."""
    line, line_ends, _ = data.removeprefix(b"\r\n").partition(b"\r\n")
    request = Request()
    with contextlib.suppress(RequestError):
        if line_ends:
            request = parse_request_line(line.decode("latin-1"))
    request.body = BodyDecoder()  # which is not complete: who knows what comes
    return request


# 9 ------------------------------------------------------------------- Settings


def is_loopback(host: str) -> bool:
    """Tell, without a look-up, whether host is this machine."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def parse_address(text: str) -> tuple[str, str, int]:
    """Return (path of a unix socket, host, port).  Raises ValueError that says what is allowed."""
    match = re.fullmatch(r"unix:(.+)|(?:\[([0-9A-Fa-f:.]+)\]|([^\s:/\[\]]+)):([0-9]{1,5})", text)
    if not match or int(match[4] or 0) > 65535:
        raise ValueError("HOST:PORT, [IPv6]:PORT or unix:PATH")
    return match[1] or "", match[2] or match[3] or "", int(match[4] or 0)


def join_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def address_text(address: Any) -> str:
    """Return a socket's address as --bind has it; unix:@NAME for one that is in no folder."""
    if isinstance(address, tuple):
        return join_address(address[0].partition("%")[0], address[1])
    return f"unix:{address}" if isinstance(address, str) else f"unix:@{address[1:].decode('utf-8', 'replace')}"


# JSON of the operator's and of clients, read strictly: what is not in the grammar, upstream could take for something
# else.


def _refuse_constant(name: str) -> NoReturn:
    raise json.JSONDecodeError("not JSON", name, 0)


def _parse_number(text: str) -> float:
    number = float(text) if len(text) < 400 else float("inf")  # int() takes quadratic time in Python 3.9
    if not -1e308 < number < 1e308:
        raise ValueError("a number is too large")
    return int(text) if text.lstrip("-").isdigit() else number


def _unique_members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise ValueError("a member is named twice")  # and upstream may take the other one
    return members


load_json = json.JSONDecoder(
    parse_constant=_refuse_constant, parse_int=_parse_number, parse_float=_parse_number,
    object_pairs_hook=_unique_members,
).decode  # fmt: skip


class Params(dict[str, object]):
    """Members of the upstream request; given: the names of those that the operator has set, or removed."""

    def __init__(self, values: Mapping[str, object], given: Iterable[str] | None = None) -> None:
        """given: None for all, or, where values are Params, for theirs."""
        super().__init__((name, value) for name, value in values.items() if value is not None)
        self.given = frozenset(getattr(values, "given", values) if given is None else given)


# Members of the upstream request that --param does not set.
OWN_PARAMS = ("model", "messages", "stream")

# What the script that this program replaces asked for; and the default model takes a temperature only if it does not
# reason.
DEFAULT_PARAMS = Params({
    "max_tokens": 400, "temperature": 0.5, "frequency_penalty": 0, "presence_penalty": 0, "reasoning_effort": "none",
}, given=())  # fmt: skip
DEFAULT_MODEL = "gpt-6-luna"


# Readers turn a setting's text, or the texts of a repeated one, into its value; their ValueError
# says what is allowed.


def _matching(pattern: str, allowed: str, convert: Callable[[str], Any] = str) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        with contextlib.suppress(ValueError):
            if re.fullmatch(pattern, text):
                return convert(text)
        raise ValueError(allowed)

    return read


_read_seconds = _matching(r"[0-9]{1,9}(\.[0-9]{1,9})?", "a number of seconds, 0 or more", float)
_read_count = _matching("[0-9]{1,15}", "a whole number, 0 or more", int)
_read_size = _matching("[1-9][0-9]{0,14}", "a whole number of bytes, 1 or more", int)
_read_idle = _matching(r"[0-5]?[0-9]{1,2}|600", "a number of seconds from 0 to 600", float)
_read_text = _matching(r"[^\0]+", "some text")
_read_key = _matching(r"\s*[!-~]+\s*", "one word of visible ASCII characters", str.strip)
_read_auth_header = _matching(
    _TOKEN + r":(?!.*\{key\}.*\{key\})[ -~]*\{key\}[ -~]*", "NAME: VALUE, with {key} once in the value"
)
_read_switch = _matching(
    "(?i:1|true|on|yes|0|false|off|no)", "1, true, on, yes, 0, false, off or no",
    lambda text: text.lower() in ("1", "true", "on", "yes"),
)


def _listing(pattern: str, allowed: str, convert: Callable[[str], Any] = str) -> Callable[[Sequence[str]], Any]:
    read = _matching(pattern, allowed, convert)
    return lambda texts: tuple(read(name.strip()) for text in texts for name in text.split(","))


_read_members = _listing(r"(?!(?:prompt|messages|stream)$)\w+", "NAME, other than prompt, messages and stream")
_read_models = _listing(".+", "NAME, or * for any")
_read_paths = _listing(r"/v1(/(?!\.+(/|$))[A-Za-z0-9._~-]+)+", "a path such as /v1/images/generations")
# As browsers send them: in lower case, and without the port that their scheme has anyway; those of apps have others.
_read_origins = _listing(
    r"[A-Za-z][A-Za-z0-9+.-]*://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?",
    "SCHEME://HOST or SCHEME://HOST:PORT",
    lambda text: re.sub("^(http://.*):80$|^(https://.*):443$", r"\1\2", text.lower()),
)
_read_hosts = _listing(
    r"[A-Za-z0-9._-]+|\[?([0-9A-Fa-f]*:){2,}[0-9A-Fa-f.]*\]?", "a host name, without a port",
    lambda text: text.strip("[]").lower(),
)
_read_networks = _listing(
    r"[0-9A-Fa-f.:]+(/[0-9]{1,3})?", "an address, or a network such as 10.0.0.0/8", ipaddress.ip_network
)


def _read_bind(text: str) -> str:
    """An address; :PORT is at every IPv4 address, as in nginx, and PORT at this machine's own."""
    if re.fullmatch(":?[0-9]+", text):
        text = ("0.0.0.0" if text[0] == ":" else "127.0.0.1:") + text
    try:
        parse_address(text)
    except ValueError as error:
        raise ValueError(f"PORT, :PORT, {error}") from None
    return text


_read_host = _matching(
    r"[^\s:/\[\]]+|\[?([0-9A-Fa-f]*:){2,}[0-9A-Fa-f.]*\]?", "a name or an address, without a port",
    lambda text: text.strip("[]"),
)
_read_port = _matching("[0-9]{1,5}", "0 to 65535", lambda text: range(65536).index(int(text)))


def _read_url(text: str) -> str:
    with contextlib.suppress(ValueError):
        url = urllib.parse.urlsplit(text)
        good = url.scheme in ("http", "https") and url.hostname and url.port != 0
        if good and "@" not in url.netloc and not url.fragment and re.fullmatch("[!-~]+", text):
            return text
    raise ValueError("an http:// or https:// address without user, password or fragment")


def _read_params(texts: Sequence[str]) -> Params:
    """The defaults, changed by each text in turn; null removes."""
    given: dict[str, Any] = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            changes = load_json(text) if text.startswith("{") else {name: load_json(value or "null")}
        except (ValueError, RecursionError):
            changes = {"": None}
        if ("=" not in text and not text.startswith("{")) or not changes.keys().isdisjoint(("", *OWN_PARAMS)):
            raise ValueError(f"NAME=JSON, or a JSON object, with names other than {', '.join(OWN_PARAMS)}")
        given.update(changes)
    return Params({**DEFAULT_PARAMS, **given}, given)


class Setting:
    """A row of the settings table; where the default is a tuple or a mapping, the flag may be repeated."""

    def __init__(
        self, default: Any, read: Callable[..., Any], metavar: str, help: str,
        variable: str = "", shown: str = "", secret: bool = False, hidden: str = "",
    ) -> None:  # fmt: skip
        """shown: the default in words.  hidden: a pattern, for what of a value is for nobody to read."""
        self.default, self.metavar, self.help, self.variable, self.secret = default, metavar, help, variable, secret
        self.repeat = isinstance(default, (tuple, dict))
        self._read, self._hidden = read, "(?s).+" if secret else hidden
        self._shown = shown

    def __set_name__(self, owner: type[Settings], name: str) -> None:
        self.name = name
        self.flag = "" if self.secret else "--" + name.replace("_", "-")
        self.variable = self.variable or "STREAMPROXY_" + name.upper()
        owner.TABLE.append(self)

    @property
    def called(self) -> str:
        """What to change, in a message: the flag and the variable."""
        return f"{self.flag} ({self.variable})" if self.flag else self.variable

    @property
    def shown(self) -> str:
        """The default in words."""
        return self.show(self.default)

    def show(self, value: Any) -> str:
        """Return a value in words, on one line, without what is for nobody to read."""
        if value == self.default and self._shown:
            return self._shown
        if value in ("", (), None):
            return "none"
        if isinstance(value, bool):
            return "on" if value else "off"
        if isinstance(value, dict):
            return " ".join(f"{name}={json.dumps(item)}" for name, item in value.items()) or "none"
        text = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        text = str(self.mask(text))
        return text if text.isprintable() else ascii(text)

    def mask(self, value: Any) -> Any:
        """Return a value without what is for nobody to read."""
        return re.sub(self._hidden, "***", value) if self._hidden and isinstance(value, str) else value

    @property
    def file_variable(self) -> str:
        """That which names a file in which a secret is."""
        return f"{self.variable}_FILE"

    def read_file(self, path: str) -> str:
        """Return the text of the file.  Raises SettingsError."""
        try:
            with open(path, encoding="ascii", errors="replace") as file:
                return file.read(MAX_HEAD_SIZE)
        except OSError as error:
            raise SettingsError(f"{self.file_variable}: cannot read {path!r}: {reason_of(error)}") from None

    def parse(self, text: Any) -> Any:
        """Return the value of a text, or of the texts of a repeated flag.  Raises SettingsError."""
        try:
            return self._read([text] if self.repeat and isinstance(text, str) else text)
        except ValueError as error:
            shown = "this value" if self.secret else ascii(self.mask(text))
            raise SettingsError(f"{self.called}: {shown} is not allowed; allowed: {error}") from None


_row: Any = Setting  # for type checkers, to which a row below is a value of its setting's type

# A password, with a slash or a question mark in it, too, and what may hold a key.
_IN_URL = r"(?s)(?:(?<=//)|\A(?![\w+.-]+://))(?:[^?]+(?=@)|.*\?.*@.*)|(?<=\?).+"

# What Kubernetes has in the environment of each container for a Service that is named streamproxy, or streamproxy-web.
_KUBERNETES = re.compile(r"STREAMPROXY_(\w+_)?(SERVICE_HOST=|SERVICE_PORT\w*=|PORT_[0-9]+_\w+=|PORT=\w+://)")


def own_variables(environ: Mapping[str, str], known: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that are for this program.

    known: their names, by what one would look for behind STREAMPROXY_.  Raises SettingsError for one that is not there.
    """
    own = {name: text for name, text in environ.items() if not _KUBERNETES.match(f"{name}={text}")}
    for name in sorted(own):
        if name.startswith("STREAMPROXY_") and name not in known.values():
            near = nearest(name[len("STREAMPROXY_") :], known)
            raise SettingsError(f"{name}: there is no such variable; {near}--help lists them all")
    return own


def nearest(name: str, known: Mapping[str, str]) -> str:
    """Return words for what is known under the nearest name; "" where none is near."""
    import difflib  # which takes memory

    near = difflib.get_close_matches(name, known, 1)
    return f"{known[near[0]]} is the nearest, and " if near else ""


@dataclass_transform(kw_only_default=True, frozen_default=True)
class _Rows:
    """Has type checkers know the arguments of Settings(...) by its rows (PEP 681): its own __init__ would hide them."""

    def __init__(self, **values: Any) -> None:
        self._take(values)

    def _take(self, values: Mapping[str, Any]) -> None:
        raise NotImplementedError


class Settings(_Rows):
    """Every setting, declared here once: --help, the variables, README's table and type checkers follow.

    A value given as text is read as on the command line.  Raises SettingsError.
    """

    TABLE: ClassVar[list[Setting]] = []

    bind: str = _row(
        "127.0.0.1:8000", _read_bind, "ADDRESS",
        "listen at HOST:PORT, [IPv6]:PORT, unix:PATH, PORT (of 127.0.0.1) or :PORT (of 0.0.0.0);"
        " port 0 takes a free one")
    host: str = _row("", _read_host, "HOST", "in place of --bind: where to listen", shown="127.0.0.1")
    port: int | None = _row(None, _read_port, "PORT", "in place of --bind: the port to listen at", shown="8000")
    reuse_port: bool = _row(
        False, _read_switch, "", "listen beside others that do so at the same port (SO_REUSEPORT), which share it")
    upstream: str = _row(
        "https://api.openai.com/v1", _read_url, "URL", "base URL of the API; a query part is kept", "OPENAI_BASE_URL",
        hidden=_IN_URL)
    api_key: str = _row(
        "", _read_key, "", "the API's key, or `OPENAI_API_KEY_FILE`; none is fine for a loopback upstream",
        "OPENAI_API_KEY", secret=True)
    auth_header: str = _row(
        "Authorization: Bearer {key}", _read_auth_header, "TEMPLATE", "header field that carries the key",
        hidden=r"(?s)\A(?!.*\{key\}).+")  # the key itself, by mistake
    model: str = _row(DEFAULT_MODEL, _read_text, "NAME", "model to ask")
    param: ParamRow = _row(
        DEFAULT_PARAMS, _read_params, "NAME=JSON",
        "member of the upstream request, repeatable; NAME= removes one; the variable is a JSON object")
    title: str = _row("streamproxy", _read_text, "TEXT", "name of the chat page")
    page: str = _row("", _read_text, "FILE", "HTML of a page of your own at /, in place of the chat page")
    system: str = _row("", _matching(r"[^\0]*", "text"), "TEXT", "system message put before every conversation")
    client_param: Sequence[str] = _row((), _read_members, "NAME", "member a client may set itself, repeatable")
    connect_timeout: float = _row(
        10.0, _read_seconds, "SECONDS", "to connect to upstream, look-up and TLS included; 0: no limit")
    first_byte_timeout: float = _row(
        120.0, _read_seconds, "SECONDS", "from then, or the last comment, to the first event; 0: no limit")
    idle_timeout: float = _row(
        60.0, _read_seconds, "SECONDS", "between two events or comments of upstream; 0: no limit")
    total_timeout: float = _row(3600.0, _read_seconds, "SECONDS", "for a whole answer; 0: no limit")
    client_timeout: float = _row(
        30.0, _read_seconds, "SECONDS", "for a client to send its request, and for each stalled write; 0: no limit")
    keep_alive_timeout: float = _row(
        75.0, _read_seconds, "SECONDS", "for a client's idle connection, between two requests; 0: no limit")
    resume: float = _row(
        0.0, _read_seconds, "SECONDS",
        "of an answer without a client, and that it is kept after its end, for clients that come back; 0: never")
    resume_memory: int = _row(64 * 1024 * 1024, _read_size, "BYTES", "for all answers that are kept so")
    resume_bind: str = _row(
        "", _read_bind, "ADDRESS",
        "listen here, too, for clients that come back: no answer begins there, and a drain leaves it open for them")
    instance: str = _row(
        "", _matching("[0-9A-Za-z_]{0,32}", "up to 32 letters, digits and _"), "NAME",
        "put before the Stream-Id, for a proxy to find the process that has the answer")
    heartbeat: float = _row(15.0, _read_seconds, "SECONDS", "of silence before a ping, in event streams; 0: never")
    max_body: int = _row(1024 * 1024, _read_size, "BYTES", "largest request body")
    max_streams: int = _row(1024, _read_count, "COUNT", "streams at a time; 0: no limit")
    max_streams_per_client: int = _row(0, _read_count, "COUNT", "streams at a time of one client; 0: no limit")
    requests_per_minute: int = _row(0, _read_count, "COUNT", "requests a minute of one client; 0: no limit")
    token_file: str = _row("", _read_text, "FILE", "lines NAME TOKEN: only clients with such a token may ask")
    allow_model: Sequence[str] = _row(
        (), _read_models, "NAME", "model a client of /v1 may ask besides --model, repeatable; * for any")
    allow_path: Sequence[str] = _row(
        (), _read_paths, "PATH", "further path below /v1 to pass on, repeatable; for POST alone")
    allow_origin: Sequence[str] = _row(
        (), _read_origins, "ORIGIN", "origin whose pages may ask, besides our own, repeatable")
    allow_host: Sequence[str] = _row(
        (), _read_hosts, "NAME", "name that a server without tokens answers to, besides its own, repeatable")
    trusted_proxy: Sequence[Any] = _row(
        (), _read_networks, "NETWORK", "proxy whose X-Forwarded-For counts, besides this machine's, repeatable")
    allow_anonymous: bool = _row(False, _read_switch, "", "serve anybody, on an address that other machines reach")
    ca_file: str = _row("", _read_text, "FILE", "certificates (PEM) to trust upstream by", shown="the system's")
    drain_timeout: float = _row(600.0, _read_seconds, "SECONDS", "for open streams to end after SIGTERM")
    leave_delay: float = _row(
        0.0, _read_seconds, "SECONDS", "before that, of taking connections while /readyz says 503")
    log_level: str = _row(
        "info", _matching("debug|info|warning|error", "debug, info, warning or error"), "LEVEL",
        "least level of what is logged: debug has each step of a request; info, warning, error")
    access_log: str = _row(
        "on", _matching("on|off|all", "on, off or all"), "WHICH",
        "which requests are logged: on, but for health checks that went well; all; or off")
    log_format: str = _row("text", _matching("text|json", "text or json"), "FORMAT", "log lines as text or json")
    demo: bool = _row(False, _read_switch, "", "answer from a built-in API: no key, no network")
    check: str = _row(
        "", _read_url, "URL",
        "serve nobody, but say what on the way to this address holds text back, and what to change", hidden=_IN_URL)
    check_idle: float = _row(0.0, _read_idle, "SECONDS", "of silence that --check tries; 0: none")
    check_token: str = _row(
        "", _read_key, "", "token that --check sends, or `STREAMPROXY_CHECK_TOKEN_FILE`", secret=True)

    def _take(self, values: Mapping[str, Any]) -> None:
        unknown = values.keys() - {setting.name for setting in self.TABLE}
        if unknown:
            raise TypeError(f"no such setting: {', '.join(sorted(unknown))}")
        for setting in self.TABLE:
            value = values.get(setting.name, setting.default)
            texts = value if isinstance(value, (list, tuple)) else [value]
            if value and all(isinstance(text, str) for text in texts):
                value = setting.parse(value)
            vars(self)[setting.name] = Params(value) if isinstance(value, dict) else value
        if self.host or self.port is not None:  # they are parts of it
            _, host, port = parse_address(self.bind)
            bind = join_address(self.host or host or "127.0.0.1", port if self.port is None else self.port)
            vars(self).update(bind=bind, host="", port=None)
        for name, address in self.addresses.items():
            path, host, _ = parse_address(address)
            if path and not hasattr(socket, "AF_UNIX"):
                raise SettingsError(f"{name}: this system has no unix sockets; allowed: HOST:PORT")
            if not (path or is_loopback(host) or self.token_file or self.allow_anonymous or self.check):
                raise SettingsError(
                    f"{name}: {address!r} lets others spend your money; allowed: a loopback address, a unix socket, or"
                    " any with --token-file or --allow-anonymous"
                )
        local = is_loopback(urllib.parse.urlsplit(self.upstream).hostname or "")
        if not (self.api_key or self.demo or self.check or local):
            raise SettingsError("no API key: set OPENAI_API_KEY or OPENAI_API_KEY_FILE, or try --demo")

    @classmethod
    def called(cls, name: str) -> str:
        """Return the flag and the variable of a setting, for a message that says what to change."""
        return next(setting.called for setting in cls.TABLE if setting.name == name)

    @property
    def addresses(self) -> dict[str, str]:
        """Where to listen, by the flag and variable that say so: for all, and for those who come back."""
        told = {"bind": self.bind, "resume_bind": self.resume_bind}
        return {self.called(name): address for name, address in told.items() if address}

    @classmethod
    def load(cls, environ: Mapping[str, str], flags: Mapping[str, Any] | None = None) -> Settings:
        """Return the settings of flags (texts by field name, None: not given), else environ, else the defaults.

        Raises SettingsError.
        """
        return cls.of(cls.find(environ, flags))

    @classmethod
    def of(cls, found: Mapping[str, tuple[Any, str]]) -> Settings:
        """Return the settings of what find has found.  Raises SettingsError."""
        values = {setting.name: setting.parse(found[setting.name][0]) for setting in cls.TABLE if setting.name in found}
        return cls(**values)

    @classmethod
    def find(cls, environ: Mapping[str, str], flags: Mapping[str, Any] | None = None) -> dict[str, tuple[Any, str]]:
        """Return what is given, by field name: its text, or texts, and the flag or variable that it is from.

        Raises SettingsError for a variable that is none of ours, and what cannot be given together.
        """
        known = {setting.name.upper(): setting.variable for setting in cls.TABLE}
        files = {f"{setting.name.upper()}_FILE": setting.file_variable for setting in cls.TABLE if setting.secret}
        environ = own_variables(environ, {**known, **files})
        found: dict[str, tuple[Any, str]] = {}
        for setting in cls.TABLE:
            flag, variable = (flags or {}).get(setting.name), environ.get(setting.variable)
            if flag is not None:
                found[setting.name] = flag, setting.flag
            elif variable:
                found[setting.name] = variable, setting.variable
            if setting.secret and environ.get(setting.file_variable):
                if variable:
                    both = f"{setting.variable} and {setting.file_variable} are both set"
                    raise SettingsError(f"{both}; allowed: one of them")
                found[setting.name] = setting.read_file(environ[setting.file_variable]), setting.file_variable
        places = cls.sources(found, "bind")
        if "bind" in found and len(places) > 1:
            raise SettingsError(f"{places[0]} and {places[1]} are both given; allowed: one of them")
        return found

    @staticmethod
    def sources(found: Mapping[str, tuple[Any, str]], name: str) -> list[str]:
        """Return which flags and variables of those that find has found give a setting."""
        names = ("bind", "host", "port") if name == "bind" else (name,)
        return [found[part][1] for part in names if part in found]

    def replace(self, **values: Any) -> Settings:
        """Return these settings with other values for some."""
        return Settings(**{**vars(self), **values})

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("settings do not change: see replace")

    def __repr__(self) -> str:
        shown = {setting.name: setting.mask(getattr(self, setting.name)) for setting in self.TABLE}
        return f"Settings({', '.join(f'{name}={value!r}' for name, value in shown.items())})"


# 10 ------------------------------------------------------------------ Requests

USER_AGENT = f"streamproxy/{__version__}"


def parse_request(body: bytes) -> dict[str, Any]:
    """Return the JSON object that a client sent.  Raises RequestError."""
    try:
        asked = load_json(body.decode())
    except RecursionError:
        raise RequestError("The JSON is nested too deeply.") from None
    except ValueError as error:
        why = "" if isinstance(error, (json.JSONDecodeError, UnicodeError)) else f": {error}."
        raise RequestError("Invalid JSON data" + why) from None  # the words of the script that this replaces
    if not isinstance(asked, dict):
        raise RequestError("The body must be a JSON object.")
    return asked


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message


def encode_request(asked: Mapping[str, Any], settings: Settings, refused: Container[str] = ()) -> bytes:
    """Return the chat-completion request for what a client asked.  Raises RequestError.

    refused: names of defaults that upstream does not take.
    """
    if ("prompt" in asked) == ("messages" in asked):
        raise RequestError('The body must be a JSON object with either "prompt" or "messages".')
    prompt, messages = asked.get("prompt"), asked.get("messages")
    if "prompt" in asked:
        if not isinstance(prompt, str) or not prompt:
            raise RequestError('"prompt" must be a non-empty string.')
        messages = [{"role": "user", "content": prompt}]
    elif not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise RequestError('"messages" must be a non-empty array of {"role": ..., "content": ...}.')
    if settings.system:
        messages = [{"role": "system", "content": settings.system}, *messages]
    request = {**_chosen(asked, settings), "messages": messages, "stream": True}
    request.update(default_params(request, settings, refused))
    try:
        return _encode_json(request).encode()
    except UnicodeEncodeError:
        raise RequestError("The text holds half of a surrogate pair.") from None
    except RecursionError:
        raise RequestError("The JSON is nested too deeply.") from None


def _chosen(asked: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """Return the members that the operator has set, or a client may set."""
    fixed = settings.param.given.union(settings.client_param)
    members = {name: value for name, value in settings.param.items() if name in fixed}
    members.update((name, asked[name]) for name in settings.client_param if name in asked)
    return {"model": settings.model, **members}


# Names of one thing, for those that have several: the second is OpenAI's newer one, the first is known to most servers.
_NAMES = {"max_tokens": ("max_tokens", "max_completion_tokens")}
_ASK_FOR_USAGE = ("stream_options", {"include_usage": True})


def default_params(request: Mapping[str, Any], settings: Settings, refused: Container[str]) -> dict[str, Any]:
    """Return the members that nobody has set, under the first of their names that upstream has not refused."""
    defaults: dict[str, Any] = {}
    for name, value in (*settings.param.items(), _ASK_FOR_USAGE):
        names = _NAMES.get(name) or (name,)
        if request.keys().isdisjoint(names):
            for known in names:
                if known not in refused and known not in settings.param.given:
                    defaults[known] = value
                    break
    return defaults


class Call:
    """A request to upstream.  It does not change."""

    def __init__(
        self, path: str, body: bytes, fields: Mapping[str, str] | None = None, method: str = "POST", query: str = "",
        adapted: Adapted | None = None,
    ) -> None:  # fmt: skip
        """path: below the base URL.  adapted: what body was made from, and can be made from anew."""
        self.path, self.body, self.fields = path, body, fields or {}
        self.method, self.query, self.adapted = method, query, adapted


class Refusals:
    """The defaults that upstream has refused by name, for each model."""

    def __init__(self) -> None:
        self._names: dict[str, frozenset[str]] = {}

    def of(self, model: str) -> frozenset[str]:
        return self._names.get(model, frozenset())

    def keep(self, model: str, names: frozenset[str]) -> None:
        self._names.pop(model, None)
        self._names[model] = names
        if len(self._names) > MAX_MODELS:  # clients may name models of their own
            del self._names[next(iter(self._names))]


class Adapted:
    """What a client asked, as a request that upstream takes: without the defaults that it refuses by name.

    What the operator has set, or a client may set, stands, and so does the refusal of it.
    """

    def __init__(self, asked: Mapping[str, Any], settings: Settings, refusals: Refusals) -> None:
        self._asked, self._settings, self._refusals = asked, settings, refusals
        chosen = _chosen(asked, settings)
        self.choices = count_choices(chosen)
        self._model = str(chosen["model"])[:200]
        self._refused = refusals.of(self._model)
        self._told: frozenset[str] = frozenset()  # refused to this request, and not only remembered

    @property
    def refused(self) -> list[str]:
        """The defaults that upstream is known to refuse: they are left out, or sent by another name."""
        return sorted(self._refused)

    def encode(self) -> bytes:
        """Return the request as it stands now.  Raises RequestError."""
        return encode_request(self._asked, self._settings, self._refused)

    def take_refusal(self, status: int, document: bytes) -> bool:
        """Tell whether to send the request again, without what an error of upstream's refuses: each name once."""
        sent = default_params(_chosen(self._asked, self._settings), self._settings, self._refused)
        name = refused_parameter(document, sent) if status in (400, 422) else None
        if name is None or name in self._told:
            return False
        self._told |= {name}
        alike = next((set(names) for names in _NAMES.values() if name in names), {name})
        self._refused = (self._refused - alike) | self._told  # what is only remembered of them may be over
        return True

    def keep(self) -> None:
        """Remember what was refused.  For when upstream has taken the request: else a client could make refusals."""
        if self._told:
            self._refusals.keep(self._model, self._refused)


_PROMPT_FIELDS = {
    "Content-Type": "application/json", "Accept": "text/event-stream, application/json", "User-Agent": USER_AGENT,
}  # fmt: skip


def prompt_call(adapted: Adapted) -> Call:
    """Return the request to upstream for what a client of ours asked.  Raises RequestError."""
    return Call("/chat/completions", adapted.encode(), _PROMPT_FIELDS, adapted=adapted)


def refused_parameter(document: bytes, names: Iterable[str]) -> str | None:
    """Return the one of names that an error of upstream's refuses: whatever its value is, or a value never taken.

    The error may be OpenAI's, FastAPI's, or a sentence, in JSON or alone.  What it quotes of the request is not read,
    since a client may have written it.
    """
    said, names = list(itertools.islice(_statements(said_in(document)), 100)), list(names)
    refused = (name for name in names if any(_refuses(name, *statement) for statement in said))
    named = (name for name in names if name in _NAMED and any(_names(name, *statement) for statement in said))
    return next(itertools.chain(refused, named), None)


_NOWHERE = ("None", "null", "validation_error")  # what LiteLLM and Cerebras say of no parameter


def _statements(payload: object, depth: int = 0) -> Iterator[tuple[str, str, str]]:
    """Yield what an error says: (the parameter's name or "", codes, words)."""
    if isinstance(payload, str):
        yield "", "", payload
    elif isinstance(payload, list) and depth < 10:
        for item in payload:
            yield from _statements(item, depth + 1)
    elif isinstance(payload, dict) and depth < 10:
        names = ("param", "loc", "parameter", "field", "path")
        named = next((payload[name] for name in names if payload.get(name)), "")
        place = ".".join(map(str, named)) if isinstance(named, list) else str(named)
        place = "" if place in _NOWHERE else place
        said = [payload.get(name) for name in ("message", "msg", "detail", "error")]
        words = " ".join(text for text in said if isinstance(text, str))
        yield place, f"{payload.get('code')} {payload.get('type')}", words
        for inner in (*said, payload.get("errors")):
            if not isinstance(inner, str):
                yield from _statements(inner, depth + 1)


# A parameter is refused in these words before its name, or behind it.  That a number is too large is no refusal: in
# another request it may not be.
_REFUSED_BEFORE = (
    r"(?:un(?:supported|known|recogni[sz]ed|expected)|extra|additional|literal_error|not one of"
    r"|invalid (?:parameter|argument|field|property|option)|n[o']t (?:support|permitted|allowed|recogni[sz]ed))"
    r"(?:(?!expected|supported values|instead|\buse\b|than\b|most\b|exceed)[^.;]){0,60}?(?<!\w){name}"
    r"""(?!["'`]* (?:must|should|is too|exceed))"""
)
_REFUSED_BEHIND = (
    r"""(?<!\w){name}(?:\.\w+)?[\]"'`)\\]*(?: (?:parameter|argument|field|property|option|value))?:?\s*"""
    r"(?:(?:is|are|was|were|has been) )?(?:currently |no longer )?"
    r"(?:not (?:yet )?(?:enabled|support|permitted|allowed(?! to)|recogni|available|accepted|a )"
    r"|un(?:support|known|recogni|expected)|does(?: not|n't) (?:support|accept|exist)|cannot be (?:used|set|disabled)"
    r"|extra inputs|deprecated|removed|forbidden|only (?:supports|\S+ (?:is|are) (?:allowed|supported))"
    r"""|must be one of|input should be ["']|may only be set)"""
)
# The same where the error has a member for the name.
_REFUSED_CODES = re.compile("unsupported|unknown|unrecogni|unexpected|extra|additional|literal|enum|not_supported")
_REFUSED_WORDS = re.compile(
    "(?i)unsupported|unknown|unrecogni|extra inputs|not (?:one of|supported|permitted|allowed(?! to))"
    "|supported values|deprecated|must be one of"
)
_QUOTED_INPUT = re.compile(r"""input_value|["']?input["']?\s*[:=]""")


def _refuses(name: str, place: str, codes: str, words: str) -> bool:
    words = _unquoted(words)
    at_start, before, behind = _refusal_patterns(name)
    if place:
        return bool(at_start.match(place) and (_REFUSED_CODES.search(codes) or _REFUSED_WORDS.search(words)))
    return bool(before.search(words) or behind.search(words))


# Those whose value is a word of ours, and so never too large: where nothing else is refused, it is enough that an error
# speaks of them.  Gemini and OpenRouter have words of their own for it.
_NAMED = {
    "reasoning_effort": re.compile(
        r"(?<!\w)reasoning[_ .-]?effort(?!\w)|reasoning is mandatory|budget 0 is|thinking_budget to 0", re.IGNORECASE
    ),
}


def _names(name: str, place: str, codes: str, words: str) -> bool:
    return bool(_refusal_patterns(name)[0].match(place) if place else _NAMED[name].search(_unquoted(words)))


def _unquoted(words: str) -> str:
    """Return words, but for the request that they quote."""
    return _QUOTED_INPUT.split(words[:500], maxsplit=1)[0]


# What else some are called in words, by Gemini.
_PENALTY = r"""(?<![\w`'"][ -])penalty(?= is not enabled)"""
_CALLED = {"frequency_penalty": _PENALTY, "presence_penalty": _PENALTY}


@functools.lru_cache(maxsize=64)
def _refusal_patterns(name: str) -> list[re.Pattern[str]]:
    """Return what finds name at the start of a place, and what finds it refused; "presencePenalty" is one, too."""
    spelt = "[_ .-]?".join(map(re.escape, name.split("_"))) + r"(?!\w)"
    spelt = f"(?:{spelt}|{_CALLED[name]})" if name in _CALLED else spelt
    texts = (r"\W*(?:body\W+)?{name}", _REFUSED_BEFORE, _REFUSED_BEHIND)
    return [re.compile(text.replace("{name}", spelt), re.IGNORECASE) for text in texts]


# What names no compression; each is sent by somebody.
_NO_CODINGS = ("", "identity", "none", "utf-8")


def check_coding(fields: Mapping[str, str]) -> None:
    """Check that a body is not compressed (RFC 9110 section 15.5.16).  Raises RequestError."""
    if "content-encoding" not in fields:
        return
    codings = [coding.strip() for coding in fields["content-encoding"].split(",")]
    bad = [coding for coding in codings if coding.lower() not in _NO_CODINGS]
    if bad:
        words = f"A body in the content coding {bad[0][:100]!a} cannot be read here: send it as it is."
        raise RequestError(words, 415, fields={"Accept-Encoding": "identity"})


def check_media(fields: Mapping[str, str], settings: Settings) -> None:
    """Check, before it is read, that a body of the API's is one whose model can be seen.  Raises RequestError."""
    if "*" in settings.allow_model:
        return
    check_coding(fields)
    kind = _NO_TEXT.match(fields.get("content-type", ""))
    if kind:
        words = f"The model cannot be seen in a body of the type {kind[0][:100]!a}: that takes --allow-model '*'."
        raise RequestError(words, 415)


_NO_TEXT = re.compile("(?i)(?:multipart|audio|image|video)/[^; \t]*")


def check_model(body: bytes, settings: Settings, needed: bool = True) -> dict[str, Any]:
    """Return what a request of the API asks, if all models in it may be asked.  Raises RequestError.

    Where any model may be, that need not be JSON: {} then.  needed: one must be there.
    """
    if "*" in settings.allow_model:
        with contextlib.suppress(RequestError):
            return parse_request(body)
        return {}
    asked = parse_request(body) if body or needed else {}
    count = [*map(str.casefold, asked)].count("model")  # servers in Go take "Model" too
    if count < needed or count != ("model" in asked) or not isinstance(asked.get("model", ""), str):
        raise RequestError('The body must have one "model", a string.', code="model_not_found")
    for member, model in _named_models(asked):
        if model != settings.model and model not in settings.allow_model:
            raise unknown_model(model, "" if member == "model" else member)
    return asked


# Names of members that may hold models: LiteLLM takes "fallbacks", "context_window_fallbacks", "model_list" and
# "deployment_id", OpenRouter "models" and "plugins" with models of their own, OpenAI and Anthropic tools with a model.
_MODEL_NAMES = re.compile("model|fallback|^engine$|^deployment|^preset$|^user_config$")
# And of those that hold what is said, or the form of it, whatever names are in there.
_CONTENT = frozenset((
    "messages", "input", "prompt", "system", "instructions", "metadata", "content", "arguments", "parameters",
    "input_schema", "schema", "json_schema", "function", "functions", "documents", "text",
))  # fmt: skip

_HOLDING = frozenset((str, list, dict))  # the types of what may name a model


def _named_models(asked: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (member of asked, name) for all that may be the name of a model."""
    rest: list[tuple[str, object, bool]] = [("", asked, False)]
    for top, value, named in rest:  # which grows meanwhile
        if isinstance(value, list):
            rest += [(top, item, named) for item in value]
        elif isinstance(value, dict):
            named = named and "model" not in value  # {"a model": ["its fallback"]}, not {"model": ..., "messages": ...}
            for member, inner in value.items():
                if named:
                    yield top, member
                if type(inner) in _HOLDING:
                    folded = member.casefold()  # as servers in Go do
                    if named or folded not in _CONTENT:
                        rest.append((top or member, inner, named or bool(_MODEL_NAMES.search(folded))))
        elif named and isinstance(value, str):
            yield top, value


def count_choices(asked: Mapping[str, Any]) -> int:
    """Return how many choices a completion has: n for each prompt."""
    n = max(1, _whole(asked.get("n")), _whole(asked.get("N")))  # servers in Go take either
    prompts = 1
    for name, value in asked.items():
        if isinstance(value, list) and value and isinstance(value[0], (str, list)) and name.casefold() == "prompt":
            prompts = max(prompts, len(value))
    return n * prompts


def _whole(value: object) -> int:
    """A number as lenient servers take it: 2, 2.0 or "2"; 0 if it is none."""
    try:
        return int(float(value)) if isinstance(value, (int, float, str)) else 0
    except (ValueError, OverflowError):
        return 0


def unknown_model(name: str, member: str = "") -> RequestError:
    within = f", in {member[:100]!a}," if member else ""
    words = f"The model {name[:100]!a}{within} may not be used here (--allow-model)."
    return RequestError(words, 403, code="model_not_found", reason="allow_model")


# What a query may hold besides "beta", which is Anthropic's, where something is read: how it is listed, or streamed.
_READING = frozenset(("limit", "after", "before", "order", "include", "include[]", "stream", "starting_after"))
_HARMLESS_VALUE = re.compile(r"[A-Za-z0-9._~%:,+/@!*=-]*")  # without ";", at which some servers split


def harmless_query(query: str, method: str) -> str:
    """Return what upstream may see of a client's query: LiteLLM, for one, takes a "model" in it before the body's."""
    kept = []
    for parameter in query.split("&"):
        name, _, value = parameter.partition("=")
        plain = urllib.parse.unquote(name)
        if (plain == "beta" or (method == "GET" and plain in _READING)) and _HARMLESS_VALUE.fullmatch(value):
            kept.append(parameter)
    return "&".join(kept)


# Fields of a request that upstream is to see, and how they are spelt there: what the call needs, and nothing that says
# who calls.
PASSED_FIELDS = {name: name.title() for name in (
    "content-type", "accept", "anthropic-version", "anthropic-beta", "openai-beta", "idempotency-key", "traceparent",
    "tracestate", "x-client-request-id", "x-stainless-retry-count",
)}  # fmt: skip


def passed_fields(fields: Mapping[str, str], settings: Settings, has_body: bool) -> dict[str, str]:
    """Return the fields of a request of the API that upstream sees.  User-Agent says who connects, and for whom."""
    agent = fields.get("user-agent")
    passed = {"User-Agent": f"{USER_AGENT} {agent}" if agent else USER_AGENT}
    for name in filter(fields.__contains__, PASSED_FIELDS):
        passed[PASSED_FIELDS[name]] = fields[name]
    if has_body and "*" not in settings.allow_model:
        passed["Content-Type"] = "application/json"  # as check_model has read it
    elif has_body and "content-encoding" in fields:
        passed["Content-Encoding"] = fields["content-encoding"]
    return passed


# A request of the API that is passed on.  has_model: its body must name one; counts: among the requests of a minute;
# name: that of all its paths in metrics, else each has its own.
Route = collections.namedtuple("Route", "methods path has_model counts name", defaults=(True, True, ""))

_ID = "(?!input_tokens(?:/|$))[A-Za-z0-9_:=~-][A-Za-z0-9._:=~-]{0,511}"

# No route lists what others have made: who knows an ID was told it.
ROUTES = (
    Route("POST", "/v1/(?:chat/completions|completions|responses|embeddings|messages)"),
    Route("POST", "/v1/messages/count_tokens", counts=False),  # costs nothing, and editors ask 50 times at their start
    Route("POST", "/v1/responses/input_tokens"),
    Route("GET DELETE", f"/v1/responses/{_ID}", has_model=False, name="/v1/responses/{id}"),
    Route("POST", f"/v1/responses/{_ID}/cancel", has_model=False, name="/v1/responses/{id}/cancel"),
    Route("GET", f"/v1/responses/{_ID}/input_items", has_model=False, name="/v1/responses/{id}/input_items"),
    Route("GET", "/v1/models", has_model=False),
    Route("GET", "/v1/models/.+", has_model=False, name="/v1/models/{model}"),
)


def api_routes(path: str, is_allowed: bool) -> dict[str, Route]:
    """Return the Route of each method that the API has at path; {}: there is nothing.

    is_allowed: --allow-path names it.
    """
    routes = [route for route in ROUTES if re.fullmatch(route.path, path)] + [Route("POST", path)] * is_allowed
    return {method: route for route in reversed(routes) for method in route.methods.split()}


# What is put before the path that is meant, or instead of /v1; Azure's deployments are among it.
_OTHER_BASE = re.compile(r"(?i)(?:/(?:v[0-9]\w*|api|openai(?:/deployments/[^/]+)?|anthropic|proxy))*(?=/)")


def meant_path(path: str, settings: Settings) -> str | None:
    """Return the path of ours that path nearly is: with another base, number of slashes, case or ending."""
    plain = "/" + "/".join(filter(None, path.split("/")))
    base = _OTHER_BASE.match(plain)
    rest = plain[base.end() if base else 0 :]
    for meant in (plain, plain.lower(), f"/v1{rest}", f"/v1{rest.lower()}", f"/v1{rest.lower()}s"):
        known = meant in ("/", "/healthz", "/readyz", "/metrics") or api_routes(meant, meant in settings.allow_path)
        if known and meant != path:
            return meant
    return None


def models_document(path: str, settings: Settings) -> bytes | None:
    """Return the models that may be asked, or the one at path; None: any may be, and upstream knows them.

    OpenAI's members and Anthropic's stand beside each other.  Raises RequestError.
    """
    name = urllib.parse.unquote(path[len("/v1/models/") :])
    if name and any(not part.strip(".") for part in name.split("/")):
        raise RequestError("There is nothing at this path.", 404)  # nor at one that it leads to
    if "*" in settings.allow_model:
        return None
    names = list(dict.fromkeys((settings.model, *settings.allow_model)))
    if name and name not in names:
        raise unknown_model(name)
    models = [
        {"id": model, "object": "model", "created": 0, "owned_by": "streamproxy",
         "type": "model", "display_name": model, "created_at": "1970-01-01T00:00:00Z"}
        for model in names
    ]  # fmt: skip
    listed = {"object": "list", "data": models, "has_more": False, "first_id": names[0], "last_id": names[-1]}
    return json.dumps(models[names.index(name)] if name else listed).encode() + b"\n"


# 11 ------------------------------------------------------------------ Access


class WatchedFile:
    """A file that counts as it was when it was last good.

    One thread looks at it, as long as its file system takes; all others go by what was seen last.
    """

    def __init__(self, path: str, setting: str, max_size: int, clock: Callable[[], float] = time.monotonic) -> None:
        """setting: that names the file."""
        self.name = setting.replace("_", " ")
        self._path, self._setting, self._max_size, self._clock = path, setting, max_size, clock
        self._lock = threading.Lock()
        self._fault, self._complained_at = "", -math.inf

    def begin(self) -> None:
        """Take the file for the first time.  Raises SettingsError where it cannot be used."""
        try:
            self._begin(self._read()[1])
        except (OSError, ValueError) as error:
            words = f"cannot use {self._path!r}: {self._why(error)}"
            raise SettingsError(f"{Settings.called(self._setting)}: {words}") from None

    def look(self) -> list[str]:
        """Take the file where it has changed; return what the log must say of it.  Blocks as long as the file does."""
        with self._lock:  # else an older look could end after a newer one
            said, fault = [], ""
            try:
                mode, data = self._read_again()
                said += self._take(data)
                fault = self._fault_of(mode)
            except (OSError, ValueError) as error:
                fault = f"the {self.name} was not taken, its last version counts: {self._why(error)}"
            if fault and (fault != self._fault or self._clock() >= self._complained_at + COMPLAINT_INTERVAL):
                said.append(fault)
                self._complained_at = self._clock()
            self._fault = fault
            return said

    def _begin(self, data: bytes) -> None:
        """Let data count, at first.  Raises ValueError."""
        raise NotImplementedError

    def _take(self, data: bytes) -> list[str]:
        """Let data count; return what the log must say.  Raises ValueError."""
        raise NotImplementedError

    def _fault_of(self, mode: int) -> str:
        """What is wrong with a file of this mode, though it counts."""
        return ""

    def _read(self) -> tuple[int, bytes]:
        """Return the file's mode and what is in it.  Raises OSError, and ValueError that says what is wrong with it."""
        def open_at_once(path: str, flags: int) -> int:  # a FIFO would keep us until somebody writes to it
            return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))

        with open(self._path, "rb", opener=open_at_once) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ValueError("it is not a regular file")
            data = file.read(self._max_size + 1)
        if len(data) > self._max_size:
            raise ValueError(f"it is larger than {self._max_size} bytes")
        return status.st_mode, data

    def _read_again(self) -> tuple[int, bytes]:
        """As _read, for a look at what has counted."""
        return self._read()

    @staticmethod
    def _why(error: Exception) -> str:
        return reason_of(error) if isinstance(error, OSError) else str(error)


class Tokens(WatchedFile):
    """The client tokens in a file."""

    def __init__(self, path: str, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises SettingsError where the file cannot be used, or names no client."""
        super().__init__(path, "token_file", MAX_TOKEN_FILE_SIZE, clock)
        self._tokens: list[tuple[bytes, str]] = []  # digest and name
        self._text, self._since, self._settled = "", clock(), True  # as seen last, since when, and if all of it counts
        self.begin()

    def name_of(self, token: str) -> str | None:
        """Return the name of the client whose token this is, in a time that says nothing of the others."""
        digest = hashlib.sha256(token.encode("latin-1")).digest()
        names = [name for known, name in self._tokens if hmac.compare_digest(known, digest)]
        return names[-1] if names else None

    @property
    def verdict(self) -> str:
        """What came of the last look, in words."""
        names = len({name for _, name in self._tokens})
        return self._fault or f"the token file names {names} client{'s' * (names != 1)}"

    def _begin(self, data: bytes) -> None:
        self._text = _text_of(data)
        self._tokens = _parse_tokens(self._text)
        if not self._tokens:
            raise ValueError("it names no client")

    def _take(self, data: bytes) -> list[str]:
        emptied = self._take_text(_text_of(data))
        return ["the token file names no client any more: nobody is let in"] if emptied else []

    def _read_again(self) -> tuple[int, bytes]:
        try:
            return self._read()
        except FileNotFoundError:  # as if it were emptied: who deletes it wants nobody let in by it
            return 0, b""

    def _fault_of(self, mode: int) -> str:
        exposed = mode & 0o007 and os.name == "posix"
        return "the token file can be read by others; allowed: chmod o-rwx" if exposed else ""

    def _take_text(self, text: str) -> bool:
        """Let text count; tell whether, only now, it names no client.  Raises ValueError.

        A last line without its end may be half of one: it counts for a look a second later that sees the same.
        """
        if text != self._text:
            self._text, self._since, self._settled = text, self._clock(), False
        if self._settled:
            return False
        lines, _, last = text.rpartition("\n")
        whole = not last.strip() or last.lstrip().startswith("#") or self._clock() >= self._since + 1
        tokens = _parse_tokens(text if whole else lines)
        if not whole:  # what has counted before may go on
            with contextlib.suppress(ValueError):
                tokens += [known for known in _parse_tokens(last) if known in self._tokens]
        self._tokens, self._settled = tokens, whole
        return whole and not tokens


def _text_of(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeError:
        raise ValueError("it is not UTF-8") from None


def _parse_tokens(text: str) -> list[tuple[bytes, str]]:
    """Return (digest, name) of each token.  Raises ValueError."""
    tokens = []
    for number, line in enumerate(text.split("\n"), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) != 2 or not re.fullmatch(r"[\w.@-]{1,64}", words[0]) or not re.fullmatch("[!-~]+", words[1]):
            raise ValueError(f"line {number} is not NAME TOKEN")
        tokens.append((hashlib.sha256(words[1].encode()).digest(), words[0]))
    return tokens


class Share:
    """What one client has of the limits."""

    __slots__ = ("as_of", "left", "streams")

    def __init__(self, left: float, as_of: float) -> None:
        """left: how many requests of a minute, as_of when."""
        self.streams = 0
        self.left, self.as_of = left, as_of


class Limits:
    """How much a client may ask: streams at a time, its own and of all, and requests a minute."""

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._clock = clock
        self.total = 0
        self._shares = bool(settings.max_streams_per_client or settings.requests_per_minute)  # each client has one
        self._clients: dict[str, Share] = {}
        self._many = MAX_QUIET_CLIENTS  # so many are looked through for those that can be forgotten

    def enter(self, client: str, counts: bool = True) -> None:
        """Take a place among the streams, until leave.  Raises RequestError, with a Retry-After, where there is none.

        counts: among the requests of a minute.
        """
        limits = self._settings
        if limits.max_streams and self.total >= limits.max_streams:
            raise RequestError("Too many answers are on their way.", 503, fields=_SOON, reason="max_streams")
        if self._shares:
            self._take_share(client, counts)
        self.total += 1

    def leave(self, client: str) -> None:
        """Give back the place that enter took."""
        self.total -= 1
        if self._shares:
            self._clients[client].streams -= 1
        if len(self._clients) > self._many:
            old = self._clock() - 60  # a minute's silence leaves nothing to know of a client
            self._clients = {name: share for name, share in self._clients.items() if share.streams or share.as_of > old}
            self._many = max(MAX_QUIET_CLIENTS, 2 * len(self._clients))

    def _take_share(self, client: str, counts: bool) -> None:
        limits, now = self._settings, self._clock()
        share = self._clients.setdefault(client, Share(limits.requests_per_minute, now))
        if limits.max_streams_per_client and share.streams >= limits.max_streams_per_client:
            words = "Too many of your answers are on their way."
            raise RequestError(words, 429, fields=_SOON, reason="max_streams_per_client")
        if limits.requests_per_minute and counts:  # a token bucket that holds those of a minute
            rate = limits.requests_per_minute / 60
            left = min(limits.requests_per_minute, share.left + (now - share.as_of) * rate)
            if left < 1:
                wait = {"Retry-After": str(math.ceil((1 - left) / rate))}
                raise RequestError("Too many requests in a minute.", 429, fields=wait, reason="requests_per_minute")
            share.left, share.as_of = left - 1, now
        share.streams += 1


_SOON = {"Retry-After": "1"}

_PORT = re.compile(":[0-9]*$")
# By a Host field: the name in it, without port and brackets.
_HOST_NAMES: dict[str, str] = Memo(lambda host: _PORT.sub("", host).strip("[]").lower(), 64)
# An element of X-Forwarded-For: Azure adds ports, and some write IPv6 as RFC 7239 section 6 has it, in quotes.
_FORWARDED = re.compile(r'"?(?:\[([0-9A-Fa-f:.%\w]+)\]|([0-9.]+)(?=[:"]|$))(?::[0-9]{1,5})?"?')

# Fields of answers that pages of an allowed origin may read.  "*" would do for most browsers, not for all.
_EXPOSED = ", ".join((
    "X-Request-Id", "Request-Id", "Stream-Id", "Retry-After", "Retry-After-Ms", "X-Should-Retry",
    "OpenAI-Processing-Ms", "OpenAI-Version",
    *(f"X-RateLimit-{what}-{of}" for what in ("Limit", "Remaining", "Reset") for of in ("Requests", "Tokens")),
    *(f"Anthropic-RateLimit-{of}-{what}" for of in ("Requests", "Tokens", "Input-Tokens", "Output-Tokens")
      for what in ("Limit", "Remaining", "Reset")),
))  # fmt: skip


class Access:
    """Who may ask: tokens, the pages of which origins, and under which names."""

    def __init__(self, settings: Settings) -> None:
        """Raises SettingsError for a token file that cannot be used."""
        self._settings = settings
        self._tokens = Tokens(settings.token_file) if settings.token_file else None
        # A unix socket has "", and no name by itself: a proxy in front of it passes on those that it is asked under.
        hosts = [parse_address(address)[1] for address in settings.addresses.values()]
        self._names = {*map(str.lower, hosts), *settings.allow_host}

    @property
    def file(self) -> WatchedFile | None:
        """The token file, if there is one."""
        return self._tokens

    @property
    def verdict(self) -> str:
        """What came of the last look, in words."""
        return self._tokens.verdict if self._tokens else "there is no token file (--token-file)"

    def address_of(self, peer: str, forwarded: str) -> str:
        """Return the client's address: peer, or what trusted proxies say of it; "unix" for a unix socket."""
        hops = forwarded.rsplit(",", MAX_HOPS)[-MAX_HOPS:]  # the nearest: nobody has so many proxies
        while hops and self._trusts(peer):
            try:
                hop = hops.pop().strip()
                match = _FORWARDED.fullmatch(hop)
                peer = plain_address((match[1] or match[2]) if match else hop.strip('"'))
            except ValueError:
                break
        return peer

    def check_host(self, host: str, own_address: Callable[[], str]) -> None:
        """Check that a server without tokens is asked under a name of its own: DNS may lead any name here.

        own_address returns the address that was connected to.  Raises RequestError.
        """
        if self._tokens:
            return
        name = _HOST_NAMES[host]
        if not (name in self._names or is_loopback(name) or name == own_address()):
            words = f"This server does not answer to the name {name[:100]!a} (--allow-host)."
            raise RequestError(words, 403, reason="allow_host")

    def cors_fields(self, fields: Mapping[str, str]) -> dict[str, str]:
        """Return what lets a page of an allowed origin read the answer (WHATWG Fetch section 3.2)."""
        if fields.get("origin") not in self._settings.allow_origin:
            return {}
        return {
            "Access-Control-Allow-Origin": fields["origin"],
            "Access-Control-Expose-Headers": _EXPOSED,
            "Vary": "Origin",
        }

    def preflight_fields(self, fields: Mapping[str, str], methods: str) -> dict[str, str]:
        """Return what tells a page of an allowed origin that it may send what it asks to send, in one of methods.

        What is not passed on does no harm.  Source: WHATWG Fetch section 3.2.2.  Raises RequestError.
        """
        if "origin" not in fields:
            return {}
        self.check_origin(fields)
        names = [name.strip() for name in fields.get("access-control-request-headers", "").split(",", MAX_ITEMS)]
        return {
            "Access-Control-Allow-Methods": methods,
            "Access-Control-Allow-Headers": ", ".join(name for name in names if re.fullmatch(_TOKEN, name)),
            "Access-Control-Max-Age": "600",
        }

    def check_origin(self, fields: Mapping[str, str]) -> None:
        """Check that no page asks but our own, or one of an allowed origin.  Raises RequestError."""
        if "origin" not in fields and "sec-fetch-site" not in fields:  # no browser
            return
        origin, site = fields.get("origin", ""), fields.get("sec-fetch-site", "")
        host = fields.get("host", "").lower()
        own = site == "same-origin" or origin.lower() in (f"http://{host}", f"https://{host}")
        is_hidden = site in ("cross-site", "same-site") and not origin
        if is_hidden or (origin and not own and origin not in self._settings.allow_origin):
            words = f"Pages of {origin[:100] or 'another site'} may not ask (--allow-origin)."
            raise RequestError(words, 403, reason="allow_origin")

    def identify(self, fields: Mapping[str, str]) -> str:
        """Return the name of the client whose token was sent; "" where none is needed.  Raises RequestError."""
        if not self._tokens:
            return ""
        scheme, _, token = fields.get("authorization", "").partition(" ")
        token = token.strip() if scheme.lower() == "bearer" else fields.get("x-api-key") or fields.get("api-key") or ""
        name = self._tokens.name_of(token)
        if not name:
            needed = "A client token is needed: Authorization: Bearer TOKEN."
            words = "This client token is not known." if token else needed
            raise RequestError(words, 401, fields={"WWW-Authenticate": "Bearer"})
        return name

    def _trusts(self, address: str) -> bool:
        if address == "unix" or is_loopback(address):
            return True
        return any(ipaddress.ip_address(address) in network for network in self._settings.trusted_proxy)


def plain_address(address: str) -> str:
    """Return an address without its scope, and one of IPv4 as such where a socket for both has mapped it."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    return str(getattr(ip, "ipv4_mapped", None) or ip)


def network_of(address: str) -> str:
    """Return what limits count as one client: an IPv6 host has a /64 of its own."""
    if ":" not in address:
        return address
    return str(ipaddress.ip_network((address, 64), strict=False))


# 12 ------------------------------------------------------------------ Metrics

# Seconds.  The first are OpenTelemetry's for GenAI servers, and what comes beyond; the second are its for requests.
_FIRST_TOKEN = (.001, .005, .01, .02, .04, .06, .08, .1, .25, .5, .75, 1, 2.5, 5, 7.5, 10, 30, 60, 120)  # fmt: skip
_DURATION = (
    .01, .02, .04, .08, .16, .32, .64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92, 163, 327, 655, 1310, 3600,
)  # fmt: skip
_BETWEEN = (.001, .0025, .005, .01, .025, .05, .075, .1, .15, .2, .3, .5, .75, 1, 2.5, 5, 10, 30, 60)  # fmt: skip
_OWN = (.0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5)  # fmt: skip

ENDINGS = ("complete", "disconnect", "truncated", "aborted", "error")

# Why we refuse a request, where the failure does not say so itself: by its status.
REASONS = {
    400: "bad_request", 401: "token", 404: "not_found", 405: "method", 408: "client_timeout",
    411: "no_length", 413: "max_body", 414: "head_size", 415: "media_type", 426: "websocket", 431: "head_size",
    501: "method", 505: "http_version",
}  # fmt: skip
REFUSING = (
    *dict.fromkeys(REASONS.values()), "allow_host", "allow_origin", "allow_model", "connections", "max_streams",
    "max_streams_per_client", "requests_per_minute", "other",
)  # fmt: skip

# Why upstream's answer, or one try of it, came to nothing: ProxyError.reason.
FAILURES = (
    "dns", "tls", "connect", "connect_timeout", "first_byte_timeout", "idle_timeout", "total_timeout", "stale",
    "closed", "garbled", "truncated", "api_key", "rate_limit", "refused", "redirect", "failed", "reported",
)  # fmt: skip

# known: the values of the only label, which count from 0.  Of a histogram, buckets: the upper bounds.
Family = collections.namedtuple("Family", "type name help labels known buckets", defaults=((), (), ()))

# All there is.  A new one is a line here, one in README's table, and what adds to Metrics.values where it happens.  The
# label client is there only where tokens name clients.
METRICS = (
    Family("counter", "streamproxy_requests_total", "Requests that ended, by route and status.",
           ("route", "status", "client")),
    Family("counter", "streamproxy_endings_total", "Requests that ended, by how.", ("ending",), ENDINGS),
    Family("gauge", "streamproxy_streams", "Answers on their way."),
    Family("gauge", "streamproxy_connections", "Connections of clients."),
    Family("gauge", "streamproxy_kept_answers", "Answers that outlive their clients, by what they are: watched, "
           "without a client, ended.", ("state",)),
    Family("gauge", "streamproxy_kept_bytes", "What they take of --resume-memory."),
    Family("counter", "streamproxy_kept_events_total", "Clients that came back to such an answer; answers to "
           "which none did, and that were stopped.", ("event",), ("attached", "abandoned", "stopped")),
    Family("gauge", "streamproxy_threads", "Threads that may block."),
    Family("gauge", "streamproxy_warm_connections", "Connections to upstream that wait for a request."),
    Family("histogram", "streamproxy_time_to_first_token_seconds", "From a request to its first text.",
           buckets=_FIRST_TOKEN),
    Family("histogram", "streamproxy_request_duration_seconds", "From a request to the end of its answer.",
           buckets=_DURATION),
    Family("histogram", "streamproxy_time_between_pieces_seconds", "Between two reads that brought text.",
           buckets=_BETWEEN),
    Family("histogram", "streamproxy_overhead_seconds", "Our own share of the time to the first token.", buckets=_OWN),
    Family("counter", "streamproxy_text_bytes_total", "Text that was passed on, in /v1 bytes of body.", ("client",)),
    Family("counter", "streamproxy_tokens_total", "Tokens, where upstream told their number.", ("type", "client")),
    Family("counter", "streamproxy_upstream_connections_total", "Requests sent to upstream, by whether their "
           "connection had carried one before.", ("reused",), ("true", "false")),
    Family("counter", "streamproxy_upstream_failures_total", "Failures of upstream, those tried again too.",
           ("reason",), FAILURES),
    Family("counter", "streamproxy_refusals_total", "Requests and connections that were refused here.",
           ("reason",), REFUSING),
    Family("counter", "streamproxy_heartbeats_total", "Heartbeats that were sent."),
    Family("histogram", "streamproxy_loop_lag_seconds", "By how much the loop was late for an alarm.", buckets=_OWN),
    Family("counter", "streamproxy_log_lines_dropped_total", "Lines of log that were lost."),
    Family("gauge", "streamproxy_build_info", "1, with the version of the program and of Python.",
           ("version", "python")),
    Family("counter", "process_cpu_seconds_total", "CPU time, in seconds."),
    Family("gauge", "process_resident_memory_bytes", "Resident memory."),
    Family("gauge", "process_virtual_memory_bytes", "Virtual memory."),
    Family("gauge", "process_open_fds", "Open file descriptors."),
    Family("gauge", "process_max_fds", "Most file descriptors that may be open."),
    Family("gauge", "process_start_time_seconds", "Start of the process, in seconds since 1970."),
)  # fmt: skip

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Histogram:
    """How many values were at most as large as each of some bounds."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)  # in each bucket by itself
        self.sum = 0.0
        self.noted: list[float] = []  # values that are yet to be observed, all at once, which costs each of them less

    def observe(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.sum += value

    def observe_noted(self) -> None:
        """Take what was noted.  Whoever notes has this done before there is much of it."""
        bounds, counts = self.bounds, self.counts
        for value in self.noted:
            counts[bisect.bisect_left(bounds, value)] += 1
        self.sum += sum(self.noted)
        self.noted.clear()

    def lines(self, name: str) -> Iterator[str]:
        """Yield it as Prometheus' text format has it."""
        self.observe_noted()
        total = 0
        for bound, count in zip((*self.bounds, "+Inf"), self.counts):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}\n'
        yield f"{name}_sum {self.sum!r}\n{name}_count {total}\n"


class Metrics:
    """The numbers that /metrics tells, since the start.  The loop's thread owns them."""

    def __init__(self, names_clients: bool = False) -> None:
        """names_clients: there are tokens, and the label client tells whose was sent."""
        self._clients: set[str] | None = set() if names_clients else None  # those that have a value of their own
        # By a metric's name without streamproxy_, then by its labels: counters, and gauges as they are told.
        self.values: dict[str, collections.defaultdict[tuple[str, ...], float]] = {}
        self.histograms: dict[str, Histogram] = {}
        for family in METRICS:
            if family.type == "histogram":
                self.histograms[_short(family.name)] = Histogram(family.buckets)
            else:
                zeros: list[tuple[str, ...]] = [(known,) for known in family.known]
                if family.type == "counter" and not family.labels:
                    zeros = [()]
                self.values[_short(family.name)] = collections.defaultdict(int, dict.fromkeys(zeros, 0))
        self.between_pieces = self.histograms["time_between_pieces_seconds"]
        self.values["build_info"][__version__, sys.version.split()[0]] = 1

    def client(self, name: str) -> tuple[str, ...]:
        """Return the value of the label client; (): there is no such label.

        The first MAX_NAMED_CLIENTS have one of their own, for a token file may be long, and changes for years.
        """
        if self._clients is None:
            return ()
        if name and len(self._clients) < MAX_NAMED_CLIENTS:
            self._clients.add(name)
        return (name if not name or name in self._clients else "other",)

    def refused(self, failure: RequestError) -> None:
        """Count a request that was refused: by the setting that did, where one did."""
        self.values["refusals_total"][failure.reason or REASONS.get(failure.status, "other"),] += 1

    def take_notes(self, notes: Notes, client: tuple[str, ...]) -> None:
        """Count what an answer held: see Notes."""
        self.values["text_bytes_total"][client] += notes.size
        if notes.usage:
            tokens = self.values["tokens_total"]
            for kind, number in tokens_in(notes.usage).items():
                tokens[(kind, *client)] += number

    def encode(self) -> bytes:
        """Return all of it as Prometheus' text format 0.0.4 has it."""
        lines: list[str] = []
        for family in METRICS:
            values = self.values.get(_short(family.name))
            if values != {}:  # of a system that does not tell
                lines.append(f"# HELP {family.name} {family.help}\n# TYPE {family.name} {family.type}\n")
            if values is None:
                lines += self.histograms[_short(family.name)].lines(family.name)
                continue
            for labels, value in list(values.items()):
                pairs = ",".join([f'{name}="{_escape(label)}"' for name, label in zip(family.labels, labels)])
                lines.append(f"{family.name}{{{pairs}}} {value!r}\n" if pairs else f"{family.name} {value!r}\n")
        return "".join(lines).encode()


def _short(name: str) -> str:
    return name.replace("streamproxy_", "")


def _escape(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


@functools.lru_cache(maxsize=1)  # or it would be another at each look
def booted_at() -> float:
    """When the system was started, by its clock.  /proc/stat has it, too, but systemd's ProcSubset hides that."""
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)


def process_figures() -> dict[str, float]:
    """Return what the system tells of this process, by the names that Prometheus' own clients have.

    Less where it tells less.  Lists all descriptors, which takes a while where there are many.
    """
    figures: dict[str, float] = {"process_cpu_seconds_total": time.process_time()}
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource  # which Windows has not

        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if limit != resource.RLIM_INFINITY:
            figures["process_max_fds"] = limit
    with contextlib.suppress(AttributeError, OSError, ValueError):
        with open("/proc/self/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()  # proc(5), from the third on
        figures["process_start_time_seconds"] = booted_at() + int(fields[19]) / os.sysconf("SC_CLK_TCK")
        figures["process_virtual_memory_bytes"] = int(fields[20])
        figures["process_resident_memory_bytes"] = int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
        figures["process_open_fds"] = len(os.listdir("/proc/self/fd")) - 1  # that of the list itself
    return figures


# Where usage tells the number of tokens of a kind: in a member, or in one of a member's.  Of two that tell the same
# kind, the first here counts.
_USAGE = (
    ("input", "prompt_tokens", ""),
    ("input", "input_tokens", ""),
    ("output", "completion_tokens", ""),
    ("output", "output_tokens", ""),
    ("cached", "prompt_tokens_details", "cached_tokens"),
    ("cached", "input_tokens_details", "cached_tokens"),
    ("cached", "cache_read_input_tokens", ""),
    ("reasoning", "completion_tokens_details", "reasoning_tokens"),
    ("reasoning", "output_tokens_details", "reasoning_tokens"),
)


def tokens_in(usage: Mapping[str, Any]) -> dict[str, int]:
    """Return the tokens of each kind that usage tells, in the words of any of the APIs.

    cached are among the input for OpenAI, not for Anthropic; reasoning is among the output.
    """
    found: dict[str, int] = {}
    for kind, name, inner in _USAGE:
        if name in usage:
            told = usage[name]
            if inner:
                told = told.get(inner) if type(told) is dict else None
            if type(told) is int and 0 < told < MAX_USAGE:
                found.setdefault(kind, told)
    return found


# 13 ------------------------------------------------------------------ Loop

READ, WRITE = 1, 4  # as in poll(2); a hang-up or an error is told by other bits, and by the next read


class _Selector:
    """What the loop uses of select.epoll, where the system has none."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self.close, self.unregister = self._selector.close, self._selector.unregister

    def register(self, fd: int, events: int) -> None:
        self._selector.register(fd, events & READ | events // WRITE * selectors.EVENT_WRITE)

    def modify(self, fd: int, events: int) -> None:
        self._selector.modify(fd, events & READ | events // WRITE * selectors.EVENT_WRITE)

    def poll(self, timeout: float | None, most: int) -> list[tuple[int, int]]:
        ready = self._selector.select(timeout)  # all of them: which are the first is always the same
        return [(key.fd, events & READ | events // selectors.EVENT_WRITE * WRITE) for key, events in ready]


class Stateful:
    """What is in one state at a time: one of those that its class names in capitals."""

    state: int

    def __repr__(self) -> str:
        names = (name for name in dir(self) if name.isupper() and getattr(self, name) == self.state)
        return f"<{type(self).__name__} {next(names)}>"


class Alarm:
    """Makes a call when its time has come, at the latest; whoever is called looks what is due, and sets it anew.

    So a time that moves back, as of a time-out that starts again with each piece of text, costs nothing.
    """

    __slots__ = ("_loop", "at", "call")

    def __init__(self, loop: Loop, call: Callable[[], object] | None = None) -> None:
        self._loop, self.call = loop, call
        self.at = math.inf

    def by(self, when: float) -> None:
        """Go off at when, by the loop's clock, if not before."""
        if when < self.at:
            self._loop.arm(self, when)

    def __lt__(self, other: object) -> bool:
        return False  # a heap asks, of two with one time

    def close(self) -> None:
        self.call = None  # the loop may hold an alarm for long, but not what it would call
        if self.at != math.inf:
            self.at = math.inf
            self._loop.stale += 1


class Loop:
    """One thread that moves bytes, keeps every clock and waits for nothing but its selector.

    It knows nobody's class: a fault in what it calls is told to on_fault(error) of the object whose method
    that is.  All but post, start and stop belong to its thread, and to any while that does not run, as in a test,
    which calls turn() instead.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, report: Callable[[str], object] = log.error
    ) -> None:
        """report takes the words for a fault."""
        self.clock = clock
        self.now = clock()  # when what is seen to came; for alarms, up to when all that came was seen to
        # epoll itself: the way through selectors costs a fifth of what a piece of text costs in all.
        self._epoll: Any = getattr(select, "epoll", _Selector)()
        self._watched: dict[int, tuple[int, Callable[[int], object]]] = {}  # by descriptor
        self._posts: collections.deque[Callable[[], object]] = collections.deque()
        self._begun: collections.deque[Callable[[], object]] = collections.deque()
        self._full = 0  # turns in which not all could be seen to, since an alarm is due
        # A heap; an entry counts if its alarm has that time.  One that never goes off keeps it from being empty.
        self._alarms: list[tuple[float, Alarm]] = [(math.inf, Alarm(self))]
        self.stale = 0  # of those, how many do not count, about
        self._bell, self._rope = socket.socketpair()  # pulling the rope rings the bell, which wakes the selector
        self._bell.setblocking(False)
        self._asleep = False
        self._report = report
        self._owner: int | None = None  # the thread that runs this
        self._thread = threading.Thread(target=self._run, name="loop", daemon=True)
        self.watch(self._bell, READ, self._on_bell)

    @property
    def started(self) -> bool:
        return self._thread.ident is not None

    def start(self) -> None:
        self._thread.start()

    @property
    def is_this_thread(self) -> bool:
        return self._owner == threading.get_ident()

    def stop(self) -> None:
        """End the thread, after all that was posted."""
        self.post(self._stop)
        if self.started:
            self._thread.join()

    def close(self) -> None:
        """Do what was posted, or had to wait, since then, and be of no more use."""
        for calls in (self._posts, self._begun):
            while calls:
                self._call(calls.popleft())
        for resource in (self._epoll, self._bell, self._rope):
            resource.close()

    def post(self, call: Callable[[], object]) -> None:
        """Have the loop's thread make a call.  For any thread."""
        self._posts.append(call)  # first: whoever sleeps has said so before it looked for posts
        if self._asleep:
            self._asleep = False
            self._rope.send(b"!")

    def begin(self, call: Callable[[], object], urgent: bool = False) -> None:
        """Make a call that takes its time, of which a turn makes a few: pieces of text come first.

        urgent: it ends something that costs, and goes before those that begin something.
        """
        assert self._owner in (None, threading.get_ident())
        (self._begun.appendleft if urgent else self._begun.append)(call)

    def watch(self, sock: socket.socket, events: int, call: Callable[[int], object]) -> None:
        """Call when sock is ready for events: READ, WRITE or both.  Undone by unwatch, before sock is closed."""
        assert self._owner in (None, threading.get_ident())
        fd = sock.fileno()
        before = self._watched.get(fd)
        if not before:
            self._epoll.register(fd, events)
        elif before[0] != events:
            self._epoll.modify(fd, events)
        self._watched[fd] = events, call

    def unwatch(self, sock: socket.socket) -> None:
        assert self._owner in (None, threading.get_ident())
        if self._watched.pop(sock.fileno(), None):
            self._epoll.unregister(sock.fileno())

    def arm(self, alarm: Alarm, when: float) -> None:
        """Have an alarm go off at when, and no longer when it would have: see Alarm.by."""
        assert self._owner in (None, threading.get_ident())
        if alarm.at != math.inf:
            self.stale += 1
        alarm.at = when
        heapq.heappush(self._alarms, (when, alarm))
        if self.stale > 1000 and self.stale > len(self._alarms) // 2:  # they would stay until their time
            self._alarms = [entry for entry in self._alarms if entry[1].at == entry[0]]
            heapq.heapify(self._alarms)
            self.stale = 0

    def turn(self, timeout: float = FOREVER) -> None:
        """Wait for at most timeout seconds, or until an alarm, then do all there is to do."""
        # What has come by now, this turn sees to, and then alarms that are due by now: a process that was stopped for
        # a while, wherever in a turn, goes on with what came meanwhile, or streams that are well would be too late.
        asked_at = self.clock()
        due = self._alarms[0][0] - asked_at
        self._asleep = True  # from here on, a post rings the bell; those before are seen here
        waits = due > 0 and not (self._posts or self._begun)
        ready: list[tuple[int, int]] = self._epoll.poll(min(due, timeout) if waits else 0, MAX_READY)
        self._asleep = False
        for fd, events in ready:
            self.now = self.clock()  # for each, since the process may be stopped between two of them, too
            watched = self._watched.get(fd)
            if watched:  # or what came before has ended it
                try:
                    watched[1](events)
                except Exception as error:  # noqa: BLE001
                    self._on_fault(watched[1], error)
        if self._posts or self._begun or self._alarms[0][0] <= asked_at:
            self._see_to_others(len(ready), asked_at)

    def _see_to_others(self, ready: int, asked_at: float) -> None:
        """Do what was posted, what is to begin and what alarms are for; so many sockets had their turn."""
        self.now = self.clock()
        for _ in range(len(self._posts)):  # what these post is for the next turn: other streams come first
            self._call(self._posts.popleft())
        for _ in range(min(len(self._begun), MAX_BEGINNINGS)):
            self._call(self._begun.popleft())
        if self._alarms[0][0] <= asked_at:
            self.now = asked_at
            self._full += 1
            if ready < MAX_READY or self._full > len(self._watched) // MAX_READY:  # all had their turn
                self._ring()

    def _ring(self) -> None:
        """Have alarms go off whose time has come: a few, and the others in the next turns."""
        self._full = 0
        for _ in range(MAX_ALARMS):
            if self._alarms[0][0] > self.now:
                break
            when, alarm = heapq.heappop(self._alarms)
            if alarm.at != when:
                self.stale -= 1
                continue
            alarm.at = math.inf
            if alarm.call:
                self._call(alarm.call)

    def _run(self) -> None:
        self._owner = threading.get_ident()
        while self._owner:
            try:
                self.turn()
            except Exception as error:  # noqa: BLE001  (no memory for what select found)
                self._on_fault(self.turn, error)

    def _on_bell(self, events: int) -> None:
        self._bell.recv(READ_SIZE)

    def _stop(self) -> None:
        self._owner = None

    def _call(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001
            self._on_fault(call, error)

    def _on_fault(self, call: Callable[..., object], error: Exception) -> None:
        """Tell the owner: a fault in one stream ends that stream and touches no other."""
        with contextlib.suppress(Exception):
            self._report(f"fault in the loop: {place_of(error)}")
        on_fault = getattr(getattr(call, "__self__", None), "on_fault", None)
        if on_fault:
            with contextlib.suppress(Exception):
                on_fault(error)


# 14 ------------------------------------------------------------------ Threads


class Job:
    """What a thread is given to do, and what came of it, of which the loop is told."""

    def __init__(self, loop: Loop, work: Callable[[], Any], on_done: Callable[[], object]) -> None:
        self.result: Any = None
        self.failure: ProxyError | None = None
        self._loop, self._work, self._on_done = loop, work, on_done

    def run(self) -> None:
        """In a thread that may wait."""
        try:
            self.result = self._work()
        except ProxyError as error:
            self.failure = error.bare()
        except Exception as error:  # noqa: BLE001
            self.failure = internal_error(error)
        self._loop.post(self._on_done)


NO_THREAD = "no thread can be started: the system's limit is reached"


_of_thread = threading.local()  # workers: those that the thread belongs to


def held_up() -> contextlib.AbstractContextManager[None]:
    """While this is entered, the thread waits for somebody; its Workers, if it has some, have another in its place."""
    workers: Workers | None = getattr(_of_thread, "workers", None)
    return workers.replaced() if workers else contextlib.nullcontext()


class Workers:
    """Threads for what may block, or take its time: a few that can run, and one more for each that is held up.

    run belongs to the loop's thread, and close to whoever has ended that.
    """

    def __init__(
        self, loop: Loop, report: Callable[[str], object], start: Callable[[Callable[[], None]], None]
    ) -> None:
        """start has a new thread make a call.  report takes the words where none can be started."""
        self._start, self._report = start, report
        self._jobs: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # guards _threads and the counts
        self._threads: set[threading.Thread] = set()
        self._starting = 0  # threads that were started and are not yet among those
        self._parked = 0  # threads that wait for a job, or have got one and not taken it yet
        self._held_up = 0  # threads
        self._waiting = 0  # jobs that were not taken yet
        self._is_closed = False
        self._alarm = Alarm(loop, self._fill)
        self._loop = loop

    def run(self, job: Callable[[], object]) -> None:
        """Have a thread do a job, which says by itself what came of it."""
        with self._lock:
            self._waiting += 1
        self._jobs.put(job)
        self._fill()

    def __len__(self) -> int:
        return len(self._threads) + self._starting

    @property
    def has_this_thread(self) -> bool:
        return threading.current_thread() in self._threads

    @contextlib.contextmanager
    def replaced(self) -> Iterator[None]:
        """In a thread of these: see held_up."""
        with self._lock:
            self._held_up += 1
        try:
            self._fill()
            yield
        finally:
            with self._lock:
                self._held_up -= 1

    def close(self, timeout: float) -> None:
        """End the threads; wait up to timeout seconds for those that are held up."""
        self._alarm.close()
        deadline = time.monotonic() + timeout
        with self._lock:
            self._is_closed = True
            threads = list(self._threads)
        for _ in range(len(self)):
            self._jobs.put(None)
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _fill(self) -> None:
        """Start threads for jobs that nobody is about to take, while few can run.  For any thread."""
        while self._lacks_one():
            try:
                self._start(self._work)
            except BaseException as error:
                with self._lock:
                    self._starting -= 1
                if not isinstance(error, RuntimeError):
                    raise
                self._report(NO_THREAD)
                self._loop.post(self._try_again)
                break

    def _lacks_one(self) -> bool:
        """Tell whether a thread is to be started, and count it then."""
        with self._lock:
            lacks, few = self._waiting > self._parked + self._starting, len(self) - self._held_up < MAX_WORKERS
            starts = lacks and few and not self._is_closed
            self._starting += starts
            return starts

    def _try_again(self) -> None:
        self._alarm.by(self._loop.now + SHORTAGE_PAUSE)

    def _work(self) -> None:
        _of_thread.workers = self
        thread = threading.current_thread()
        with self._lock:
            self._starting -= 1
            self._threads.add(thread)
        while self._park():
            job = self._jobs.get()
            with self._lock:
                self._parked -= 1
                self._waiting -= job is not None
            if not job:
                break
            try:
                job()
            except Exception as error:  # noqa: BLE001
                self._report(f"fault in a thread: {place_of(error)}")
            job = None  # or it would live on, with all that it holds, while this thread is parked
        with self._lock:
            self._threads.discard(thread)

    def _park(self) -> bool:
        """Count a thread among those that wait for a job, unless there are enough."""
        with self._lock:
            few = self._parked < MAX_WORKERS or self._waiting > self._parked
            self._parked += few
            return few


def start_thread(work: Callable[[], None]) -> None:
    """Have a new thread do work.  Raises RuntimeError where the system has none left."""
    threading.Thread(target=work, name="worker", daemon=True).start()


# 15 ------------------------------------------------------------------ Log


class LogWriter:
    """Writes the log in a thread of its own, so that a reader that is stuck, or a handler of somebody's that
    blocks or raises, costs lines of log and nothing else.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._lines: queue.SimpleQueue[tuple[int, float, object]] = queue.SimpleQueue()
        self.lost = 0  # lines that found no room, or whose handler raised.  For any thread to read
        self._told = 0  # so many of them the log tells of
        self._said_at: dict[str, float] = {}  # by words of errors
        self._unsaid: collections.Counter[str] = collections.Counter()  # how often each was since then
        self.output: Output | None = None  # the command's; who embeds this has handlers of logging's
        self._clock = clock
        self._closing = threading.Event()
        self._lock = threading.Lock()  # guards _said_at, _unsaid, and the start
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Have the thread now, while one can be started; else the first line that can will start it."""
        with self._lock, contextlib.suppress(RuntimeError):
            if not self._thread:
                thread = threading.Thread(target=self._run, name="log", daemon=True)
                thread.start()
                self._thread = thread

    def debug(self, line: object) -> None:
        """As info, of what only who looks for a fault wants to know."""
        self._put(logging.DEBUG, line)

    def info(self, line: object) -> None:
        """Have a line written soon.  For any thread; it never waits, and never raises."""
        self._put(logging.INFO, line)

    def error(self, words: str) -> None:
        """Say what is wrong: at once, and then once a second with how often it was since.  For any thread."""
        with self._lock:
            now = self._clock()
            self._unsaid[words] += 1
            if now < self._said_at.get(words, -math.inf) + 1:
                return
            self._said_at[words], times = now, self._unsaid.pop(words)
        self._put(logging.ERROR, f"{words} ({times} times)" if times > 1 else words)

    def close(self, timeout: float) -> None:
        """Write what waits; give up after timeout seconds."""
        self._closing.set()
        self._lines.put((logging.NOTSET, 0.0, None))  # wakes the thread
        if self._thread and self._thread is not threading.current_thread():  # in which a server may be collected
            self._thread.join(timeout)

    def _put(self, level: int, line: object) -> None:
        if self._lines.qsize() >= MAX_LOG_LINES:
            self.lost += 1
            return
        self._lines.put((level, time.time(), line))
        if not self._thread:
            self.start()

    def _run(self) -> None:
        while self._lines.qsize() or not self._closing.is_set():
            self._write(self._lines.qsize() or 1)
            self._closing.wait(LOG_PAUSE)  # each time this thread runs, it takes the interpreter from the loop

    def _write(self, count: int) -> None:
        """Write so many lines, once they are there."""
        first = self._lines.get()
        # Asked once for all that come together; not before the first has come, which may take hours.
        to_handlers = not self.output or log.hasHandlers()
        rest = (self._lines.get() for _ in range(count - 1))  # one by one: what waits here has to count as waiting
        for line in itertools.chain([first], rest):
            self._guard(1, self._emit, to_handlers, *line)
        lost = self.lost
        news = lost - self._told
        words = f"{news} lines of log were lost"
        told = news and self._guard(0, self._emit, to_handlers, logging.ERROR, time.time(), words)
        flushed = [self._guard(count, keeper.flush) for keeper in (self.output, *log.handlers) if keeper is not None]
        if told and all(flushed):
            self._told = lost

    def _emit(self, to_handlers: bool, level: int, at: float, line: object) -> None:
        if not (level and log.isEnabledFor(level)):
            return
        if isinstance(line, LogEntry):
            line["time"] = log_time(at)
        if self.output:
            self.output.add(level, at, line)
        if to_handlers:
            # log.log would look for the line of code, too.
            log.handle(log.makeRecord(log.name, level, "streamproxy.py", 0, line, (), None))

    def _guard(self, lines: int, call: Callable[..., object], *args: object) -> bool:
        """Make a call of somebody's handlers and filters; so many lines are lost if it raises."""
        try:
            call(*args)
        except BaseException:  # noqa: BLE001  (SystemExit, too, would end this thread, and the log with it)
            self.lost += lines
            return False
        return True


_LOG_SECONDS: dict[int, str] = Memo(lambda seconds: time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)), 1)


def log_time(seconds: float) -> str:
    """A time of the system's clock as the log has it (RFC 3339), to the millisecond."""
    return f"{_LOG_SECONDS[int(seconds)]}.{int(seconds % 1 * 1000):03}Z"


class LogEntry(dict[str, object]):
    """What the log says of one request, or of a step of it.  As text: name=value, nothing from the wire unescaped."""

    def __str__(self) -> str:
        return " ".join([f"{name}={_SHOW[type(value)](value)}" for name, value in self.items() if value is not None])


_PLAIN = re.compile("[!#-<>-~]+")  # no space, quote or =
_encode_compact = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode
_TEXTS: dict[str, str] = Memo(lambda text: text if _PLAIN.fullmatch(text) else _encode_compact(text), 256)

# How a value is written, by its type; one of another type is JSON.
_SHOW: collections.defaultdict[type, Callable[[Any], str]]
_SHOW = collections.defaultdict(lambda: _encode_compact, {str: _TEXTS.__getitem__, int: str, float: str})


def write_all(fd: int, text: str) -> None:
    """Write without a buffer, whose lock would keep the process from ending while a reader is stuck."""
    data = text.encode("utf-8", "backslashreplace")
    while data:
        try:
            data = data[os.write(fd, data) :]
        except BlockingIOError:  # somebody else that has this pipe wants it so
            time.sleep(LOG_PAUSE)


class Output:
    """Writes lines to a stream's descriptor, those that come together at once; a failure is the log writer's."""

    def __init__(self, stream: TextIO, style: str) -> None:
        """style: text or json."""
        self._fd, self._encode = stream.fileno(), json.dumps if style == "json" else str
        self._lines: list[str] = []

    def add(self, level: int, at: float, line: object) -> None:
        """Take a line for the next flush."""
        if not isinstance(line, LogEntry):
            line = LogEntry(time=log_time(at), level=logging.getLevelName(level).lower(), message=str(line))
        self._lines.append(self._encode(line) + "\n")

    def flush(self) -> None:
        lines, self._lines = self._lines, []
        write_all(self._fd, "".join(lines))


# 16 ------------------------------------------------------------------ Clients


def hang_up(sock: socket.socket) -> None:
    """Close a connection so that the other side sees it, although a process forked meanwhile has a copy of sock."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()


def too_large(limit: int) -> RequestError:
    return RequestError(f"The body is larger than {limit} bytes.", 413)


class Peer:
    """A client's socket, which the loop reads from and writes to without waiting."""

    resets = False  # when it is closed, or the process dies, the client sees an error
    listens = True  # what comes is read

    def __init__(self, sock: socket.socket, loop: Loop) -> None:
        """sock must not block."""
        self.sock, self.loop = sock, loop
        self.pending: bytes | memoryview = b""  # what the socket did not take
        self.lost = False  # the client is gone, and what is sent goes nowhere
        self._watch()

    def _watch(self) -> None:
        events = (READ if self.listens else 0) | (WRITE if self.pending else 0)
        if events:
            self.loop.watch(self.sock, events, self.on_ready)
        else:
            self.loop.unwatch(self.sock)

    def on_ready(self, events: int) -> None:
        if events & WRITE:
            self._flush()
        if events & ~WRITE and not self.lost:
            try:
                data = self.sock.recv(TAKE_SIZE)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if data:
                self.on_data(data)
            else:
                self._lose()

    def listen(self, wanted: bool) -> None:
        """Read what comes, or leave it where it is, and its end behind it."""
        if wanted != self.listens and not self.lost:
            self.listens = wanted
            self._watch()

    def send(self, data: bytes) -> None:
        """Send data, or keep what the socket does not take: then on_drained is called once it has."""
        if self.lost:
            return
        if self.pending:
            self.pending = b"".join((self.pending, data))
            return
        try:
            sent = self.sock.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._lose()
            return
        if sent < len(data):
            self.pending = memoryview(data)[sent:]  # of a large answer, what is left is not copied again and again
            self._watch()
            self.on_blocked()

    def close(self) -> None:
        self.lost, self.pending = True, b""
        self.loop.unwatch(self.sock)
        if self.resets:
            self.sock.close()  # to shut it down would look like an end
        else:
            hang_up(self.sock)

    def _flush(self) -> None:
        try:
            sent = self.sock.send(self.pending)
        except BlockingIOError:
            return
        except OSError:
            self._lose()
            return
        self.pending = self.pending[sent:] or b""
        if self.pending:
            self.on_blocked()
        else:
            self._watch()
            self.on_drained()

    def _lose(self) -> None:
        """Take note that the client is gone, and end as soon as a turn has time: many may leave at once."""
        self.lost, self.pending = True, b""
        self.loop.unwatch(self.sock)
        self.loop.begin(self._end_lost, urgent=True)

    def _end_lost(self) -> None:
        if self.sock.fileno() >= 0:  # it was not closed meanwhile
            self.on_lost()

    def on_data(self, data: bytes) -> None:
        """Take what the client sent."""

    def on_blocked(self) -> None:
        """Wait for a client that does not read, or go on waiting for one that took a part."""

    def on_drained(self) -> None:
        """Go on: the client has taken all that was sent."""

    def on_lost(self) -> None:
        """End: the client is gone."""


class Client(Peer, Stateful):
    """A connection of HTTP/1.1: its requests, one after the other.

    IDLE -> HEAD -> ANSWERING -> IDLE, and from any of them CLOSED.  HEAD: a part of it has come, and no more yet.
    ANSWERING: the whole head has, or it cannot be read; it goes to BODY and back where the request is let in and has
    one.  It goes by LINGERING where it was answered before the body was there: the rest is dropped, for to close with
    bytes unread would reset the connection, and the client would never see why it was refused.
    """

    IDLE, HEAD, BODY, ANSWERING, LINGERING, CLOSED = range(6)

    _rest: BodyDecoder  # of the body that is dropped, where this is LINGERING

    def __init__(self, sock: socket.socket, address: Any, door: Door) -> None:
        super().__init__(sock, door.server.hub.loop)
        self.door, self.server = door, door.server
        self.address = "unix" if door.listener.path else plain_address(address[0])
        self.surplus = len(self.server.clients) >= self.server.max_clients  # it is told so
        self.data = b""  # came, and was not taken
        self.body = bytearray()  # of the request, as far as it was read
        self.exchange: Exchange | None = None
        self.state = self.IDLE
        self.since = self.loop.now  # in this state; of HEAD and BODY together; of the last progress of what is sent
        self.keeps_alive = False  # after the answer; as yet there was none
        self.proxied = False  # a request has come by a proxy
        self._alarm = Alarm(self.loop, self._on_alarm)
        self._set_alarm()
        self.server.clients.add(self)
        self.on_ready(READ)  # mostly, its request is there

    def on_data(self, data: bytes) -> None:
        if self.state == self.LINGERING:
            self._linger(data)
            return
        self._keep(self.data + data if self.data else data)
        if self.state == self.BODY:
            if self._read_body() and self.exchange:
                self.loop.begin(self.exchange.on_whole_body)
            return
        if self.state == self.IDLE or (self.state == self.HEAD and (b"\n" in data or len(self.data) > MAX_HEAD_SIZE)):
            self.loop.begin(self.begin)
        if not self.listens and self.exchange and self.exchange.request.body.complete:
            self.exchange.drop(Aborted("The client sent too much while its answer was on its way."))

    def begin(self) -> None:
        """Begin with the request that is there, if one is."""
        if self.state > self.HEAD or self.lost:
            return
        try:
            parsed = parse_request_head(self.data)
        except RequestError as error:
            self._refuse(error)
            return
        if parsed:
            if self.state == self.IDLE:
                self.since = self.loop.now
            request, rest = parsed
            self._keep(rest)
            exchange = self._exchange_for(request)
            exchange.step(Exchange.dispatch)
        elif self.state == self.IDLE and self.data.strip(b"\r\n"):  # empty lines are none of a request
            self.state, self.since = self.HEAD, self.loop.now
            self._set_alarm()

    def expect_body(self) -> bool:
        """Read the body of the request; tell if it is there, whole and good.  Else its exchange is told once it is."""
        self.state = self.BODY
        return self._read_body()

    def on_answered(self, cut: bool) -> None:
        """The answer has left: read on, or close; at once where it was cut, or it would look complete."""
        exchange, self.exchange = self.exchange, None
        self.since = self.loop.now
        self.body.clear()  # if nobody has taken it
        if not exchange or self.lost or cut:
            self.close()
        elif not exchange.request.body.complete or (self.data and not self.keeps_alive):
            self.state, self._rest = self.LINGERING, exchange.request.body
            if not self.keeps_alive:
                with contextlib.suppress(OSError):
                    self.sock.shutdown(socket.SHUT_WR)
            data = self.data
            self._keep(b"")
            self._set_alarm()
            self._linger(data)
        elif self.keeps_alive and (self.data or self.server.state < self.server.ABORTING):
            self._expect_head()
        else:
            self.close()

    def on_drained(self) -> None:
        if self.exchange:
            self.exchange.on_drained()

    def on_blocked(self) -> None:
        self.since = self.loop.now
        self._set_alarm()

    def on_lost(self) -> None:
        self.drop(Disconnected("The client left."))

    def on_fault(self, error: Exception) -> None:
        failure = internal_error(error)
        with contextlib.suppress(Exception):  # it may be in that
            self.abort(failure)
        if self.exchange and not self.pending:  # nothing came of it
            self.drop(failure)

    def drop(self, failure: ProxyError) -> None:
        """End at once: nobody is told anything more."""
        self.lost = True
        if self.state == self.HEAD:
            self._exchange_for(readable_line(self.data))
        if self.exchange:
            self.exchange.drop(failure)
        else:
            self.close()

    def drain(self) -> None:
        """Wait for less long, now: see _due.  What has come is heard before."""
        if self.state == self.IDLE:
            self.on_ready(READ)
            if not self.proxied:
                self.since = self.loop.now  # a request may be on its way
        self._set_alarm()

    def abort(self, failure: ProxyError) -> None:
        """End what is under way, truthfully."""
        if self.exchange:
            self.exchange.abort(failure)
        elif self.state == self.HEAD or self.data:
            self._refuse(failure)
        else:
            self.close()

    def close(self) -> None:
        if self.state != self.CLOSED:
            self.state = self.CLOSED
            self._alarm.close()
            super().close()
            self.server.on_closed(self)

    def reset(self, wanted: bool) -> None:
        """Have the client see an error when this is closed (SO_LINGER of 0 s), not the end of a body.

        Of a unix socket it sees the end all the same.
        """
        self.resets = wanted
        with contextlib.suppress(OSError):
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", wanted, 0))

    def _keep(self, data: bytes) -> None:
        """Keep what came and is not taken; while that is much, no more is read, nor is the client's end seen."""
        self.data = data
        self.listen(len(data) <= MAX_PIPELINED)

    def _exchange_for(self, request: Request) -> Exchange:
        self.state, self.keeps_alive = self.ANSWERING, request.keeps_alive
        self.proxied = self.proxied or not _PROXY_FIELDS.isdisjoint(request.fields)
        self.exchange = Exchange(self, request)
        return self.exchange

    def _refuse(self, failure: ProxyError) -> None:
        if self.exchange:
            self.exchange.refuse(failure)
        elif self.data.strip(b"\r\n"):
            self._exchange_for(readable_line(self.data)).refuse(failure)
        else:
            self.close()

    def _expect_head(self) -> None:
        self.state = self.IDLE
        if self.data:
            self.loop.begin(self.begin)
        self._set_alarm()

    def _read_body(self) -> bool:
        """Take what has come of the body; tell if it is whole, and good."""
        exchange, limit = self.exchange, self.server.settings.max_body
        assert exchange
        body = exchange.request.body
        self.body += body.feed(self.data)
        self._keep(body.rest)
        if body.complete:
            self.state = self.ANSWERING
        else:
            self._set_alarm()
        if body.broken:
            exchange.refuse(RequestError("The chunked coding of the body is broken."))
        elif len(self.body) > limit:
            exchange.refuse(too_large(limit))
        else:
            return body.complete
        return False

    def _linger(self, data: bytes) -> None:
        """Drop what is left of a request: a little for the sake of the connection, else until the client closes."""
        self._rest.feed(data)
        if self.keeps_alive and self._rest.complete:
            self.data, self.since = self._rest.rest, self.loop.now
            self._expect_head()
        elif self._rest.broken:
            self.keeps_alive = False

    def _due(self) -> float:
        """When this state has lasted too long."""
        limits, drains = self.server.settings, self.server.state >= self.server.DRAINING
        limit = limits.client_timeout
        if self.state == self.IDLE:
            if self.data.strip(b"\r\n"):
                return math.inf  # it is about to begin
            limit = limits.keep_alive_timeout if self.keeps_alive else limit
            if drains and not self.proxied:
                limit = min(IDLE_GRACE, limit or IDLE_GRACE)
        elif self.state == self.ANSWERING and not self.pending:
            limit = 0.0
        elif self.state == self.LINGERING:
            most = END_GRACE if drains else LINGER_TIMEOUT
            limit = min(most, limit or most)
        return self.since + limit if limit else math.inf

    def _set_alarm(self) -> None:
        self._alarm.by(self._due())

    def _on_alarm(self) -> None:
        if self._due() > self.loop.now:
            self._set_alarm()
        elif self.state in (self.HEAD, self.BODY):
            self._refuse(RequestError("The request did not arrive in time.", 408))
            if self.pending:  # it was blocked before, so that no clock runs for what it is told now
                self.on_blocked()
        else:
            self.drop(Aborted("The client stopped reading."))


# What proxies say of themselves.  In a drain, one may send a request on a connection as long as that is open; if we
# close it just then, the proxy answers 502, since it cannot know whether to repeat what it has sent (RFC 9110 section
# 9.2.2).  So these are closed by the proxy, or when they are older than it keeps them.  Whoever comes by none asks
# again by itself, as browsers and the SDKs do; and who ends a server at a terminal does not wait for an open page.
_PROXY_FIELDS = frozenset(("x-forwarded-for", "forwarded", "via"))


# 17 ------------------------------------------------------------------ Exchanges

_REQUEST_ID = re.compile("[0-9A-Za-z._-]{1,64}")


class Exchange:
    """One request, its answer, and its one line in the log."""

    name = ""  # that of its token
    place = ""  # under which name it counts in the limits; "": it does not
    claim: Claim | None = None  # where answers outlive their clients
    status = 0  # as told to the client
    failure: ProxyError | None = None
    _then: Step | None = None  # once what it waits for is there: the body, a look, ...

    def __init__(self, client: Client, request: Request) -> None:
        self.client, self.request, self.server = client, request, client.server
        settings, path = self.server.settings, request.path
        self.resource = resource_at(path, path in settings.allow_path, settings.resume > 0)
        given = request.fields.get("x-request-id", "")
        self.id = given if given and _REQUEST_ID.fullmatch(given) else f"{random.getrandbits(64):016x}"
        self.began_at = client.loop.now
        self.who = client.address  # as the log names the client
        # The seconds that we take until upstream is asked, but for the wait for the body: ends, less beginnings.
        self.lead = -self.began_at
        self.stream: Stream | Watch | TestStream | None = None

    # Who asks: dispatch calls what the path has for the method.  Mostly that has the request let in, by admit, look at
    # the token file, _enter and _expect_body.  It waits for one thing at a time, and _then goes on.

    def step(self, step: Step) -> None:
        """Make a step; where it fails, the client is told."""
        try:
            step(self)
        except ProxyError as failure:
            self.refuse(failure)

    def dispatch(self) -> None:
        """Check what every request must have, and call the function of its path and method."""
        request, resource, hub, access = self.request, self.resource, self.server.hub, self.server.access
        fields = request.fields
        if "x-forwarded-for" in fields:
            self.who = access.address_of(self.client.address, fields["x-forwarded-for"])
        hub.tells = log.isEnabledFor(logging.DEBUG)
        if hub.tells:
            self.tell("request", client=self.who, method=request.method[:20], path=request.path[:200])
        if "upgrade" in fields and request.path.startswith("/v1/") and "websocket" in fields["upgrade"].lower():
            raise RequestError("Ask with POST: WebSocket is not spoken here.", 426, fields=_UPGRADE)
        run = resource.methods.get(request.method) or self._without_method()
        if request.method != "POST" and not request.body.complete:
            raise RequestError("Only POST takes a body.")
        if resource.name not in _OPEN_PATHS:
            self.check_surplus()
            access.check_host(fields.get("host", "localhost"), self._own_address)
        run(self)

    def check_surplus(self) -> None:
        """Raises RequestError where there are too many connections."""
        if self.client.surplus:
            raise RequestError("Too many connections.", 503, reason="connections")

    def _without_method(self) -> Step:
        """Return what answers a method that the path does not have.  Raises RequestError, mostly."""
        method, settings = self.request.method, self.server.settings
        if not self.resource.methods:
            if method == "OPTIONS" and self.request.fields.get("origin") in settings.allow_origin:
                return answer_preflight  # a page is to read that there is nothing
            meant = meant_path(self.request.path, settings)
            raise RequestError("There is nothing at this path" + (f": {meant} is meant." if meant else "."), 404)
        known = method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "TRACE", "CONNECT")
        allowed = ", ".join(self.resource.methods)
        raise RequestError(f"This path takes {allowed} only.", 405 if known else 501, fields={"Allow": allowed})

    def _own_address(self) -> str:
        return "" if self.client.door.listener.path else plain_address(self.client.sock.getsockname()[0])

    def admit(self, then: Step, counts: bool = True) -> None:
        """Let in whoever may ask, count an answer that begins as long as it lasts, and go on once the body is there.

        counts: among the requests of a minute.
        """
        server = self.server
        server.access.check_origin(self.request.fields)
        if server.state == server.ABORTING:  # it came behind one that was
            raise shutting_down()
        self.look(server.lookout, lambda exchange: exchange._enter(then, counts))

    def look(self, lookout: Lookout, then: Step) -> None:
        """Go on once a file was looked at, if there is one."""
        if lookout.file:
            self._then = then
            lookout.look(self.go_on)
        else:
            then(self)

    def _waits(self) -> bool:
        """Tell whether there is still somebody who was neither answered nor refused."""
        return self.client.exchange is self and not (self.client.lost or self.status)

    def identify(self) -> None:
        self.name = self.server.access.identify(self.request.fields)
        self.who = self.name or self.who

    def _enter(self, then: Step, counts: bool) -> None:
        if self.server.lookout.file:  # of tokens
            self.identify()
        request, answers, claim = self.request, self.server.answers, None
        place = self.name or network_of(self.who)
        if answers.on:
            self.claim = claim = Claim(request, place, self.name, self.wants_events(), counts)
        if not claim or (claim.begins and not answers.find(claim)):
            self._take_place(place, counts)
        if self.server.hub.tells:
            self.tell("let in", client=self.who)
        if request.method == "POST" and not (claim and claim.id):
            self._expect_body(then)
        else:
            then(self)

    def _expect_body(self, then: Step) -> None:
        client, request, limit = self.client, self.request, self.server.settings.max_body
        fields = request.fields
        if "content-length" in fields:
            if int(fields["content-length"]) > limit:
                raise too_large(limit)
        elif "transfer-encoding" not in fields:
            raise RequestError("A body needs a Content-Length.", 411)
        expected = "expect" in fields and fields["expect"].lower() == "100-continue" and request.http11
        if expected and not (client.data or request.body.complete):
            client.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        if client.expect_body():
            then(self)
        elif self._waits():
            self._then = then
            self.lead += client.loop.clock()

    def _take_place(self, name: str, counts: bool) -> None:
        """Count an answer that is about to begin.  Raises RequestError: there are too many, or none begins here."""
        self.check_begins()
        self.server.limits.enter(name, counts)
        self.place = name

    def check_begins(self) -> None:
        """Check that who came in here may begin something, for RFC 9110 section 15.5.20 to have it asked elsewhere."""
        if not self.client.door.begins:
            words = "There is no such answer here, where none is begun (--resume-bind)."
            raise RequestError(words, 421, ending="complete")

    @property
    def _goes_elsewhere(self) -> bool:
        """Whether _check_begins has refused it: no failure to whoever led it here, and leads it on."""
        return self.status == 421

    def on_whole_body(self) -> None:
        """Go on: the rest of the body has come."""
        self.lead -= self.client.loop.clock()
        self.go_on()

    def go_on(self) -> None:
        """Do what waited for the body, or for a thread."""
        then, self._then = self._then, None
        if then and self._waits():
            self.step(then)

    def run(self, work: Callable[[], Any], then: Callable[[Exchange, Any], None]) -> None:
        """Go on with what work returns, once a thread has done it."""
        hub = self.server.hub
        job = Job(hub.loop, work, self.go_on)

        def finish(exchange: Exchange) -> None:
            if job.failure:
                raise job.failure
            then(exchange, job.result)

        self._then = finish
        hub.workers.run(job.run)

    # Whom it asks: upstream, or an answer that is kept.

    def wants_events(self) -> bool:
        """Tell whether the client takes server-sent events, for it says so."""
        accept = self.request.fields.get("accept", "")
        ranges = [part.partition(";")[0].strip().lower() for part in accept.split(",", MAX_ITEMS)]
        return "text/event-stream" in ranges and self.request.method != "HEAD"

    def ask_by(self, make: Callable[[Exchange, bytes], tuple[Call, Answer]]) -> None:
        """Ask upstream what make makes of the body: in a thread, where that takes its time."""
        body, self.client.body = self.client.body, bytearray()
        if len(body) <= MAX_PARSED:
            self.ask(*self._prepare(make, body))
        else:
            self.run(lambda: self._prepare(make, body), lambda exchange, made: exchange.ask(*made))

    def _prepare(self, make: Callable[[Exchange, bytes], tuple[Call, Answer]], body: bytearray) -> tuple[Call, Answer]:
        """Return what make makes of body, once the claim, if there is one, knows it.  For any thread."""
        if self.claim and self.claim.key:
            self.claim.take_body(body)
        return make(self, bytes(body))

    def ask(self, call: Call, answer: Answer) -> None:
        """Ask upstream, unless an answer to the same is kept."""
        if not (self.claim and self._resume(self.claim, call, answer)):
            self.stream = self.server.hub.stream(call, answer, self)
            self.stream.ask()
        self.lead += self.client.loop.clock()

    def _resume(self, claim: Claim, call: Call, answer: Answer) -> bool:
        """Go on with an answer that outlives its clients, or begin it; False: it is to be one that does not."""
        answers = self.server.answers
        if not claim.begins or answers.find(claim):
            self.attach()
            return True
        if not self.place:  # the answer that was there when this was let in has gone
            self._take_place(claim.owner, claim.counts)
        kept = answers.keep(claim, call, answer, self._told()) if claim.keeps else None
        if kept:
            self.place = ""  # which is the answer's now
            self.stream = kept.watch(self, claim, attached=False)
            kept.stream.ask()
        return bool(kept)

    def attach(self) -> None:
        """Send the rest of an answer, live in the end; 204 tells an EventSource to stop (WHATWG HTML section 9.2.3)."""
        claim, answers = self.claim, self.server.answers
        assert claim
        kept = answers.find(claim)
        if not kept and not claim.reconnects:
            raise RequestError("There is no such answer (any more).", 410 if claim.key else 404)
        if not kept or (claim.reconnects and claim.place and not kept.has_more(claim)):
            self.answer_with(204, b"", {})
            return
        if claim.key and claim.asked != kept.claim.asked:
            raise RequestError("This Idempotency-Key was used for another request.", 422)
        self.server.hub.metrics.values["kept_events_total"]["attached",] += 1
        self.stream = kept.watch(self, claim, attached=True)
        self._leave_place()  # it had one where the answer was not there yet when this was let in
        self.stream.advance()

    # How it is answered.

    def refuse(self, failure: ProxyError) -> None:
        """Tell the client that its request failed."""
        self.failure = failure.bare()
        if failure.status in (408, 426) or isinstance(failure, Aborted):
            self.client.keeps_alive = False
        self.keep_if_small()
        fields = {"Content-Type": "application/json", **failure.fields}
        if self.request.path.startswith("/v1/messages"):
            fields.setdefault("Request-Id", self.id)  # where Anthropic's SDKs look for it
        if self.stream and self.stream.paid and (failure.status >= 500 or failure.status == 408):
            if isinstance(failure, Aborted) or not {"Retry-After", "X-Should-Retry"} & fields.keys():
                fields["X-Should-Retry"] = "false"  # SDKs heed it: who asks again may pay again
        elif failure.status in (429, 503):
            fields.setdefault("Retry-After", "1")
        self.answer_with(failure.status, encode_error(failure, self.request.path), fields)

    def keep_if_small(self) -> None:
        """Keep the connection, behind an answer that came before the body, only where little of that is left."""
        body = self.request.body
        small = body.left is not None and body.left <= MAX_DISCARDED and "expect" not in self.request.fields
        self.client.keeps_alive = self.client.keeps_alive and (body.complete or small)

    def drop(self, failure: ProxyError) -> None:
        """End at once: nobody is there, or able, to take what is left of the answer."""
        if self.stream and not self.stream.over:
            self.stream.drop(failure)
        else:
            self.failure = self.failure or failure
            self.status = self.status or failure.status
            self._end(cut=True)

    def abort(self, failure: ProxyError) -> None:
        """End so that the client can tell that the answer is not complete."""
        if self.stream and not self.stream.over:
            self.stream.fail(failure)
        elif not self.status:
            self.refuse(failure)

    def tell(self, step: str, **facts: object) -> None:
        """Log a step, for who looks for a fault: what was done, never what is said in it."""
        self.server.hub.tell(self.id, step, facts)

    def on_fault(self, error: Exception) -> None:
        self.client.on_fault(error)

    def on_drained(self) -> None:
        """Go on: the client has taken all that was sent."""
        if self.stream and not self.stream.over:
            self.stream.on_drained()
        elif self.status:
            self._end()

    def on_stream_over(self) -> None:
        """Take the end of the stream: tell why there is no answer, or end with it."""
        stream, client = self.stream, self.client
        assert stream
        failure, intact = stream.failure, stream.viewer.intact
        self.failure = failure
        self._leave_place()  # before the next request is begun: a client that saw the end may ask again
        if failure:
            if not (self.status or client.lost):
                self.refuse(failure)
                return
            self.status = self.status or failure.status
        if intact and client.resets:
            client.reset(False)
        self._end(cut=not intact)

    def _begin_answer(self, status: int, fields: Mapping[str, str]) -> bytes:
        """Return a head with the fields that every answer has, and Connection where it is the last."""
        client, server, asked = self.client, self.server, self.request.fields
        if client.surplus or server.state != server.SERVING:
            client.keeps_alive = False
        own = {"Date": _DATES[int(time.time())], "X-Request-Id": self.id, "X-Content-Type-Options": "nosniff"}
        if not client.keeps_alive:
            own["Connection"] = "close"
        elif server.settings.keep_alive_timeout:  # for whoever would send the next request just then
            own["Keep-Alive"] = f"timeout={server.settings.keep_alive_timeout:.0f}"
        if "origin" in asked:
            own.update(server.access.cors_fields(asked))
        head = encode_head(f"HTTP/1.1 {status} {http.client.responses.get(status, '')}", {**own, **fields})
        self.status = status
        return head

    def begin_stream(self) -> tuple[bytes, bool]:
        """Return the head of the stream's answer, and whether its body is chunked."""
        assert self.stream
        status, more = self.stream.head()
        fields = {**STREAM_FIELDS, **more}
        chunked = self.request.http11 and "Content-Length" not in fields and status not in (204, 304)
        if chunked:
            fields["Transfer-Encoding"] = "chunked"
        if not self.request.http11:  # its body ends where the connection does, be it that we are killed
            self.client.reset(True)
        return self._begin_answer(status, fields), chunked

    def answer_with(self, status: int, body: bytes, fields: Mapping[str, str]) -> None:
        length = {"Content-Length": str(len(body))} if body else {}
        head = self._begin_answer(status, {"Cache-Control": "no-store", **length, **fields})
        self.client.state = self.client.ANSWERING
        self.client.send(head if self.request.method == "HEAD" else head + body)
        if not self.client.pending:
            self._end()

    def answer_words(self, status: int, words: str) -> None:
        self.answer_with(status, f"{words}\n".encode(), {"Content-Type": "text/plain; charset=utf-8"})

    def _leave_place(self) -> None:
        if self.place:
            self.server.on_stream_over(self.place, isinstance(self.failure, Aborted))
            self.place = ""

    def _end(self, cut: bool = False) -> None:
        if self.client.exchange is self:
            self._leave_place()
            now = self.client.loop.clock()
            self._count(now)
            self._log(now)
            self.stream = self._then = None  # they have this, too
            self.client.on_answered(cut)

    def _count(self, now: float) -> None:
        metrics, failure, stream = self.server.hub.metrics, self.failure, self.stream
        values, client, resource = metrics.values, metrics.client(self.name), self.resource.name
        values["requests_total"][(resource, str(self.status), *client)] += 1
        values["endings_total"][failure.ending if failure else "complete",] += 1
        if resource not in _OPEN_PATHS and not self._goes_elsewhere:  # for those nobody waits
            metrics.histograms["request_duration_seconds"].observe(now - self.began_at)
        if failure and isinstance(failure, RequestError) and not self._goes_elsewhere:
            metrics.refused(failure)
        if isinstance(stream, Stream):  # what is kept is counted once, when it ends
            metrics.take_notes(stream.answer.notes, client)
        elif not isinstance(stream, Watch):
            return
        first = stream.first_text_at
        if first is not None and not stream.attached:
            metrics.histograms["time_to_first_token_seconds"].observe(first - self.began_at)
            own = max(0.0, self.lead) + (stream.first_sent_at or now) - first
            metrics.histograms["overhead_seconds"].observe(own)

    def _told(self) -> dict[str, object]:
        """What the log says of the request itself."""
        return {
            "time": "",  # which the log's thread fills in
            "id": self.id,
            "client": self.who,
            "method": self.request.method[:20],
            "path": self.request.path[:200],  # the query may hold a prompt
        }

    def _log(self, now: float) -> None:
        wanted, failure, stream = self.server.settings.access_log, self.failure, self.stream
        is_health = self.resource.name in _OPEN_PATHS and self.status == 200 and not failure
        if wanted == "off" or (wanted == "on" and (is_health or self._goes_elsewhere)):
            return
        entry = LogEntry(self._told())
        entry["status"] = self.status
        entry["ending"] = failure.ending if failure else "complete"
        entry["error"] = failure.logged if failure else None
        entry["seconds"] = round(now - self.began_at, 3)
        if isinstance(stream, (Stream, Watch)):
            first = stream.first_text_at
            entry["upstream"] = self.server.hub.upstream.target.address
            entry["ttft"] = None if first is None else round(first - self.began_at, 3)
            entry.update(notes_of(stream))
            if isinstance(stream, Watch):
                entry.update({"stream": stream.kept.id, "from": stream.start if stream.attached else None})
        self.server.hub.log.info(entry)


def notes_of(stream: Stream | Watch) -> dict[str, object]:
    """What the log says of an answer."""
    notes = stream.answer.notes
    return {
        "model": notes.model, "finish_reason": notes.finish_reason, "pieces": notes.pieces, "bytes": notes.size,
        "usage": notes.usage, "upstream_id": notes.request_id,
    }  # fmt: skip


# RFC 9110 section 15.5.22: what is spoken instead.
_UPGRADE = {"Upgrade": "HTTP/1.1", "Connection": "Upgrade, close"}

# What keeps nginx, proxies that compress, and whoever knows RFC 10036 from holding text back.
STREAM_FIELDS = {"X-Accel-Buffering": "no", "Cache-Control": "no-cache, no-transform", "Incremental": "?1"}


def http_date(seconds: int) -> str:
    """A time of the system's clock as RFC 9110 section 5.6.7 has it."""
    return email.utils.formatdate(seconds, usegmt=True)


_DATES: dict[int, str] = Memo(http_date, 1)


# 18 ------------------------------------------------------------------ Paths


class Resource(collections.namedtuple("Resource", "name methods")):
    """What there is at a path: its name in metrics, of which there is a bounded number, and a step for each method."""

    __slots__ = ()


def answer_preflight(exchange: Exchange) -> None:
    """Tell a page of an allowed origin what it may send (WHATWG Fetch section 3.2.2)."""
    methods = ", ".join(exchange.resource.methods or ("OPTIONS",))
    fields = exchange.server.access.preflight_fields(exchange.request.fields, methods)
    exchange.answer_with(204, b"", fields or {"Allow": methods})


def get_health(exchange: Exchange) -> None:
    """Say that the process is alive."""
    exchange.answer_words(200, "ok")


def get_ready(exchange: Exchange) -> None:
    """Say whether new requests are welcome."""
    exchange.answer_words(*((503, "draining") if exchange.server.draining else (200, "ok")))


def get_metrics(exchange: Exchange) -> None:
    """Answer with what Prometheus is to know, to whoever may ask."""
    exchange.server.access.check_origin(exchange.request.fields)
    exchange.look(exchange.server.lookout, _look_at_process)


def _look_at_process(exchange: Exchange) -> None:
    exchange.identify()
    exchange.run(process_figures, _answer_metrics)


def _answer_metrics(exchange: Exchange, figures: Mapping[str, float]) -> None:
    hub, counts = exchange.server.hub, exchange.server.snapshot()
    exchange.server.answers.count_into(hub.metrics)
    for name, value in {**counts, **figures, "log_lines_dropped_total": hub.log.lost}.items():
        hub.metrics.values[name.replace(" ", "_")][()] = value
    exchange.answer_with(200, hub.metrics.encode(), {"Content-Type": METRICS_TYPE})


def get_test(exchange: Exchange) -> None:
    """Answer with a test stream, or, for ?count=ID, how many of an id are on their way.

    A body says nothing: its end is not waited for.
    """
    tests, query = exchange.server.hub.tests, exchange.request.query
    exchange.keep_if_small()
    if query.startswith("count="):
        exchange.answer_words(200, str(tests.count(query[len("count=") :])))
        return
    exchange.check_surplus()
    if exchange.server.state >= exchange.server.DRAINING:
        raise shutting_down()
    exchange.stream = stream = tests.enter(network_of(exchange.who), parse_test(query), exchange)
    stream.begin()


def get_root(exchange: Exchange) -> None:
    """Answer with the chat page, or an EventSource with the stream for ?prompt=."""
    if not exchange.wants_events():
        exchange.look(exchange.server.front.lookout, _answer_page)
    elif "last-event-id" in exchange.request.fields and not exchange.server.answers.on:
        exchange.answer_with(204, b"", {})  # it had its answer; 204 stops it (WHATWG HTML section 9.2.3)
    else:
        exchange.admit(_ask_query)


def _answer_page(exchange: Exchange) -> None:
    exchange.answer_with(200, *exchange.server.front.shown)


def _ask_query(exchange: Exchange) -> None:
    if exchange.claim and not exchange.claim.begins:
        exchange.attach()
        return
    try:
        # curl sends bytes that should be escaped as they are.
        query = urllib.parse.quote(exchange.request.query, safe=string.printable, encoding="latin-1")
        prompts = urllib.parse.parse_qs(query, errors="strict").get("prompt", [])
    except ValueError:
        raise RequestError("The query is not UTF-8.") from None
    asked = {"prompt": prompts[0] if len(prompts) == 1 else None}
    answer = EventAnswer(exchange.id, exchange.server.hub.redact, reconnects=True)
    exchange.ask(*_adapted(exchange, asked, answer))


def post_prompt(exchange: Exchange) -> None:
    """Answer a JSON body with a stream."""
    check_coding(exchange.request.fields)
    exchange.admit(_ask_prompt)


def _ask_prompt(exchange: Exchange) -> None:
    key = exchange.claim and exchange.claim.key
    if exchange.wants_events() and "last-event-id" in exchange.request.fields and not key:  # see get_root
        exchange.answer_with(204, b"", {})
    else:
        _check_new(exchange)
        exchange.ask_by(_prompted)


def _check_new(exchange: Exchange) -> None:
    """Raises RequestError for who comes back for the rest of an answer, where none is kept: it would be paid again."""
    claim = exchange.claim
    if exchange.request.fields.get("last-event-id") and not (claim and claim.key):
        raise RequestError("What follows this Last-Event-ID is not there (any more).", 410)


def _prompted(exchange: Exchange, body: bytes) -> tuple[Call, Answer]:
    redact = exchange.server.hub.redact
    answer = EventAnswer(exchange.id, redact) if exchange.wants_events() else TextAnswer(redact)
    return _adapted(exchange, parse_request(body), answer)


def _adapted(exchange: Exchange, asked: Mapping[str, Any], answer: Answer) -> tuple[Call, Answer]:
    adapted = Adapted(asked, exchange.server.settings, exchange.server.hub.refusals)
    answer.choices = adapted.choices
    return prompt_call(adapted), answer


def pass_on(exchange: Exchange, route: Route) -> None:
    """Pass a request of the API on, and its answer back."""
    if exchange.request.method == "POST":
        check_media(exchange.request.fields, exchange.server.settings)
    exchange.admit(functools.partial(Exchange.ask_by, make=functools.partial(_passed, route=route)), route.counts)


def _passed(exchange: Exchange, body: bytes, route: Route) -> tuple[Call, Answer]:
    request, asked = exchange.request, {}
    if request.method == "POST":
        _check_new(exchange)
        asked = check_model(body, exchange.server.settings, route.has_model)
    messages, streamed = request.path == "/v1/messages", asked.get("stream") is True
    answer = PassedAnswer(exchange.server.hub.redact, count_choices(asked), messages, streamed)
    return _passed_call(exchange, body), answer


def _passed_call(exchange: Exchange, body: bytes = b"") -> Call:
    request, settings = exchange.request, exchange.server.settings
    fields = passed_fields(request.fields, settings, bool(body))
    query = request.query
    if query and "*" not in settings.allow_model:
        query = harmless_query(query, request.method)
    return Call(request.path[len("/v1") :], body, fields, request.method, query)


def get_models(exchange: Exchange) -> None:
    """Answer with the models that may be used, or with one of them."""
    exchange.admit(_answer_models)


def _answer_models(exchange: Exchange) -> None:
    document = models_document(exchange.request.path, exchange.server.settings)
    if document is None:
        exchange.ask(_passed_call(exchange), PassedAnswer(exchange.server.hub.redact))
    else:
        exchange.answer_with(200, document, {"Content-Type": "application/json"})


def get_answer(exchange: Exchange) -> None:
    """Go on with an answer, by its ID."""
    exchange.admit(Exchange.attach)


def stop_answer(exchange: Exchange) -> None:
    """Stop an answer by its ID or its key, or one that is yet to be asked for by its key."""
    exchange.admit(_stop)


def _stop(exchange: Exchange) -> None:
    assert exchange.claim
    if not (exchange.claim.id or exchange.claim.key):
        raise RequestError("DELETE /streams needs an Idempotency-Key.")
    exchange.keep_if_small()
    if not (exchange.claim.id or exchange.server.answers.find(exchange.claim)):
        exchange.check_begins()  # that there is one: its stop is remembered where it would be
    exchange.server.answers.stop(exchange.claim)
    exchange.answer_with(204, b"", {})


_PREFLIGHT = {"OPTIONS": answer_preflight}


def _get(function: Step) -> dict[str, Step]:
    return {"GET": function, "HEAD": function, **_PREFLIGHT}  # HEAD: the same without the body


TEST_PATH = "/healthz/stream"
_OPEN_PATHS = ("/healthz", TEST_PATH, "/readyz")  # those that answer under any name

# What there is of our own, beside the API's: by its name in metrics, then by method.
_OWN_PATHS: dict[str, dict[str, Step]] = {
    "/": {**_get(get_root), "POST": post_prompt},
    "/healthz": _get(get_health),
    TEST_PATH: {"GET": get_test, "POST": get_test, **_PREFLIGHT},
    "/readyz": _get(get_ready),
    "/metrics": _get(get_metrics),
    # Where answers are kept:
    "/streams": {"DELETE": stop_answer, **_PREFLIGHT},
    "/streams/{id}": {"GET": get_answer, "DELETE": stop_answer, **_PREFLIGHT},
    "/streams/{id}/stop": {"POST": stop_answer, **_PREFLIGHT},
}


@functools.lru_cache(maxsize=64)
def resource_at(path: str, is_allowed: bool, resumes: bool) -> Resource:
    """Return what there is at path; where that is nothing, it has no methods.

    is_allowed: --allow-path names it; resumes: answers outlive their clients.
    """
    routes = api_routes(path, is_allowed)
    if routes:
        methods: dict[str, Step] = {name: functools.partial(pass_on, route=route) for name, route in routes.items()}
        if path.startswith("/v1/models") and "GET" in methods:
            methods["GET"] = get_models
        return Resource(next(iter(routes.values())).name or path, {**methods, **_PREFLIGHT})
    name = re.sub("^/streams/[^/]+", "/streams/{id}", path)
    if name not in _OWN_PATHS or (name.startswith("/streams") and not resumes):
        return Resource("other", {})
    return Resource(name, _OWN_PATHS[name])


# 19 ------------------------------------------------------------------ Addresses


class Lifeline:
    """Lets the loop's thread cut what another thread waits for while it opens a connection."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[object, Callable[[], object]] = {}
        self._cut = False

    def hold(self, waited: object, wake: Callable[[], object]) -> None:
        """Have cut() call wake, until waited is dropped.  Raises OSError after cut()."""
        with self._lock:
            self.check()
            self._held[waited] = wake

    def drop(self, waited: object) -> None:
        """Hold waited no more: before it is closed, since its descriptor may soon be another's."""
        with self._lock:
            self._held.pop(waited, None)

    def release(self) -> None:
        """Hold nothing more.  Raises OSError after cut()."""
        with self._lock:
            self._held.clear()
            self.check()

    def cut(self) -> None:
        """End what is waited for; nothing can be opened any more.  For any thread."""
        with self._lock:
            self._cut = True
            for wake in self._held.values():
                with contextlib.suppress(OSError):
                    wake()

    def check(self) -> None:
        """Raises OSError after cut()."""
        if self._cut:
            raise ConnectionAbortedError(errno.ECONNABORTED, "cut")


class Deadline:
    """When the opening of a connection has to be over: after a time, or once its lifeline is cut."""

    def __init__(self, lifeline: Lifeline, timeout: float) -> None:
        self.lifeline = lifeline
        self._ends_at = time.monotonic() + timeout

    def left(self) -> float:
        """Seconds.  Raises socket.timeout where none are left."""
        left = self._ends_at - time.monotonic()
        if left <= 0:
            raise socket.timeout("timed out")
        return left

    def wait(self, socks: Iterable[socket.socket], events: int, timeout: float = FOREVER) -> list[socket.socket]:
        """Return which of socks are ready for events, of selectors; none after timeout seconds.

        Raises socket.timeout.
        """
        # poll(2) has no descriptor of its own, and no largest one.
        with getattr(selectors, "PollSelector", selectors.SelectSelector)() as selector:
            for sock in socks:
                selector.register(sock, events, sock)
            ready = selector.select(0)
            if not ready:
                with held_up():
                    ready = selector.select(min(self.left(), timeout))
            return [key.data for key, _ in ready]


class Resolver:
    """Looks names up.  Nothing ends a look-up that hangs: each has a thread of its own, and there is one a name.

    Who asks for a name that is being looked up waits for that.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[tuple[str, int], set[queue.SimpleQueue[Any]]] = {}  # for each look-up under way

    def find(self, host: str, port: int, deadline: Deadline) -> list[Any]:
        """Return what socket.getaddrinfo does, and raise what it raises; OSError at the deadline."""
        try:
            ipaddress.ip_address(host)
        except ValueError:
            with held_up():
                return self._wait((host, port), deadline)
        return socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM, 0, socket.AI_NUMERICHOST)

    def _wait(self, address: tuple[str, int], deadline: Deadline) -> list[Any]:
        deadline.lifeline.check()  # nothing is begun for who has gone, as while this waited for a thread
        box: queue.SimpleQueue[Any] = queue.SimpleQueue()
        with self._lock:
            is_first = address not in self._waiting
            self._waiting.setdefault(address, set()).add(box)
        try:
            if is_first:
                self._start(address)
            cut = ConnectionAbortedError, (errno.ECONNABORTED, "cut")
            deadline.lifeline.hold(box, functools.partial(box.put, cut))
            found = box.get(timeout=deadline.left())
        except queue.Empty:
            raise socket.timeout("timed out") from None
        finally:
            deadline.lifeline.drop(box)
            with self._lock:
                self._waiting.get(address, set()).discard(box)
        if isinstance(found, tuple):
            raise found[0](*found[1])
        return found  # type: ignore[no-any-return]

    def _start(self, address: tuple[str, int]) -> None:
        try:
            threading.Thread(target=self._look_up, args=(address,), name="look-up", daemon=True).start()
        except RuntimeError:  # no thread is left
            self._look_up(address)

    def _look_up(self, address: tuple[str, int]) -> None:
        found: Any
        try:
            found = socket.getaddrinfo(*address, 0, socket.SOCK_STREAM)
        except Exception as error:  # noqa: BLE001
            found = type(error), error.args  # for each to raise its own: an exception holds on to frames
        with self._lock:
            waiting = self._waiting.pop(address)
        for box in waiting:
            box.put(found)


def interleave(addresses: Iterable[Any]) -> list[Any]:
    """Return what getaddrinfo found with the families in turn, beginning with the first's.  RFC 8305 section 4."""
    families: dict[int, list[Any]] = {}
    for address in addresses:
        families.setdefault(address[0], []).append(address)
    return [address for row in itertools.zip_longest(*families.values()) for address in row if address]


def tune(sock: socket.socket) -> None:
    """Have small pieces sent at once, and a silent connection kept known to what lies between.

    A balancer or NAT forgets one after 60 to 350 s, and then neither end hears of the other again.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in PROBES.items():
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class Race:
    """Attempts to connect to addresses of one name: the first that gets there wins.  Source: RFC 8305 section 5."""

    def __init__(self, addresses: Iterable[Any], deadline: Deadline) -> None:
        self._waiting = collections.deque(interleave(addresses))
        self._deadline = deadline
        self._trying: list[socket.socket] = []
        self._failures: list[int] = []

    def run(self) -> socket.socket:
        """Return the socket that is connected; the lifeline holds it.  Raises OSError, of the most telling attempt."""
        next_at = 0.0
        try:
            while self._waiting or self._trying:
                now = time.monotonic()
                if self._waiting and (now >= next_at or not self._trying):
                    next_at = now + ATTEMPT_DELAY if self._try(*self._waiting.popleft()) else now
                pause = next_at - now if self._waiting and self._trying else FOREVER
                for sock in self._deadline.wait(self._trying, selectors.EVENT_WRITE, pause) if self._trying else ():
                    code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                    if not code:
                        self._trying.remove(sock)
                        return sock
                    self._fail(sock, code)
                    next_at = now
        except socket.timeout:
            self._failures.append(errno.ETIMEDOUT)
        finally:
            for sock in self._trying[:]:
                self._fail(sock, errno.ETIMEDOUT)
        code = min(self._failures, key=lambda code: _TELLING.get(code, 3), default=errno.EADDRNOTAVAIL)
        raise socket.timeout("timed out") if code == errno.ETIMEDOUT else OSError(code, os.strerror(code))

    def _try(self, family: int, kind: int, protocol: int, _name: str, address: Any) -> bool:
        """Begin an attempt; False where it has failed."""
        try:
            sock = socket.socket(family, kind, protocol)
        except OSError as error:
            self._failures.append(error.errno or 0)
            return False
        self._trying.append(sock)
        hold = functools.partial(self._deadline.lifeline.hold, sock, functools.partial(sock.shutdown, socket.SHUT_RDWR))
        hold()
        sock.setblocking(False)
        tune(sock)
        code = sock.connect_ex(address)
        if code in (0, errno.EINPROGRESS, errno.EWOULDBLOCK):
            hold()  # once more: a cut that came before it began to connect has not ended it
            return True
        self._fail(sock, code)
        return False

    def _fail(self, sock: socket.socket, code: int) -> None:
        self._failures.append(code)
        self._trying.remove(sock)
        self._deadline.lifeline.drop(sock)
        sock.close()


# How much the failure of an attempt tells of why there is no connection: what we lack; that somebody answered; that
# nobody did; (the rest); that there is no way; that the system has no such addresses.
_TELLING = {
    **dict.fromkeys((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM), 0),
    **dict.fromkeys((errno.ECONNREFUSED, errno.ECONNRESET), 1),
    errno.ETIMEDOUT: 2,
    **dict.fromkeys((errno.EHOSTUNREACH, errno.ENETUNREACH), 4),
    **dict.fromkeys((errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT), 5),
}


# 20 ------------------------------------------------------------------ Connections


class Connection:
    """A connection to upstream, whose socket does not block.  One thread uses it at a time."""

    def __init__(self, sock: socket.socket, key: object) -> None:
        self.sock = sock
        self.key = key  # what it leads to
        self.reused = False
        self.broken = False  # its end came without a word: no close, no TLS closure (RFC 9112 section 9.8)
        self.opened_at = 0.0
        self.peer = ""  # whom it leads to: the address of upstream, or of a proxy
        self._unsent: list[bytes | memoryview] = []

    def on_open(self, now: float) -> None:
        self.opened_at = now
        with contextlib.suppress(OSError):  # it is closed again
            self.peer = address_text(self.sock.getpeername())

    def read(self, size: int = READ_SIZE) -> bytes | None:
        """Return what has come, at most size bytes; b"" at the end of the connection, None where nothing came."""
        try:
            return self.sock.recv(size)
        except BlockingIOError:
            return None
        except OSError:
            self.broken = True
            return b""

    def write(self, data: bytes, body: bytes = b"") -> bool:
        """Send data and body, behind what was not sent yet, as far as the socket takes it; tell if that was all.

        Raises OSError where nothing can be sent any more; what came before can still be read.
        """
        pieces = (data + body,) if len(body) <= READ_SIZE else (data, body)  # a large one is not copied
        self._unsent += filter(None, pieces)  # nothing is an error to OpenSSL 1.1
        return self.flush()

    def flush(self) -> bool:
        """Go on with write, but not for long: whoever reads as fast would hold up the rest."""
        while self._unsent:
            piece = self._unsent[0]
            try:
                sent = self.sock.send(piece)
            except BlockingIOError:
                return False
            if sent < len(piece):
                self._unsent[0] = memoryview(piece)[sent:]  # nor is what is left of it copied again and again
                return False
            del self._unsent[0]
        return True

    def close(self) -> None:
        hang_up(self.sock)


class Trust:
    """Whom to trust over TLS, and what was agreed with whom, to be resumed on the next connection."""

    def __init__(self, ca_file: str) -> None:
        """Raises SettingsError for certificates that cannot be read."""
        try:
            self.context = ssl.create_default_context(cafile=ca_file or None)
        except OSError:
            raise SettingsError(f"{Settings.called('ca_file')}: cannot use {ca_file!r}") from None
        self.context.set_alpn_protocols(["http/1.1"])
        # Set by Python 3.11.2, for one: it takes a connection that is cut for one that is closed (CPython gh-95494).
        self.context.options &= ~getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
        # As in Go: while keys are negotiated anew, to write would have to wait for what is to be read.
        self.context.options |= getattr(ssl, "OP_NO_RENEGOTIATION", 0)
        self.sessions: dict[str, ssl.SSLSession | None] = {}  # by host; None: it gives none that can be resumed


class TlsConnection(Connection):
    """TLS over another connection, which may be one of TLS, to a proxy.

    One read of the socket brings all that came, where ssl.SSLSocket makes two for each record; and the loop
    learns nothing from a socket of what was taken from it, so that all of it is decrypted at once.
    """

    def __init__(self, inner: Connection, trust: Trust, host: str) -> None:
        """Raises ValueError for a name that cannot be one."""
        super().__init__(inner.sock, inner.key)
        self._inner = inner
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._trust, self._host = trust, host
        self._offered = trust.sessions.get(host)
        self._tls = trust.context.wrap_bio(
            self._incoming, self._outgoing, server_hostname=host, session=self._offered
        )
        self._is_new = True

    def handshake(self, deadline: Deadline, data: bytes = b"") -> None:
        """Blocks until it is done.  data: what has come.  Raises OSError."""
        self._incoming.write(data)
        while True:
            is_done = False
            try:
                self._tls.do_handshake()
                is_done = True
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError:
                with contextlib.suppress(OSError):
                    self._push()  # an alert, which says why
                raise
            while not self._push():
                deadline.wait([self.sock], selectors.EVENT_WRITE)
            if is_done:
                return
            self._take(receive(self._inner, deadline))

    def read(self, size: int = READ_SIZE) -> bytes | None:
        data = self._inner.read(size - MAX_RECORD_SIZE)  # as much may have come before, of a record
        if data is not None:
            self._take(data)
        elif not self._incoming.pending:  # what came with the end of the handshake
            return None
        plain = self._decrypt()
        if plain:
            if self._incoming.pending:
                plain = self._read_on(plain)
            if self._is_new:
                self._keep_session()
        if self._outgoing.pending:  # an alert
            with contextlib.suppress(OSError):
                self._push()
        return plain

    def flush(self) -> bool:
        while self._push():
            if not self._unsent:
                return True
            piece = self._unsent[0]
            sent = self._tls.write(piece[:READ_SIZE])
            if sent < len(piece):
                self._unsent[0] = memoryview(piece)[sent:]
                self._push()
                return False
            del self._unsent[0]
        return False

    def close(self) -> None:
        """Say so first (RFC 8446 section 6.1); what was sent of a request tells what that is worth."""
        with contextlib.suppress(OSError):
            self._tls.unwrap()  # raises: the other's closure is not waited for
        with contextlib.suppress(OSError):
            self._push()
        self._inner.close()

    @property
    def issuer(self) -> str:
        """Who says whose certificate it is."""
        issuer = (self._tls.getpeercert() or {}).get("issuer", ())
        return " ".join(str(value) for pairs in issuer for _, value in pairs)  # type: ignore[str-unpack]

    def _take(self, data: bytes) -> None:
        if data:
            self._incoming.write(data)
        else:
            self._incoming.write_eof()

    def _push(self) -> bool:
        return self._inner.write(self._outgoing.read())

    def _decrypt(self) -> bytes | None:
        try:
            plain = self._tls.read(READ_SIZE)
        except ssl.SSLWantReadError:
            return None
        except OSError:
            self.broken = True
            plain = b""
        if not plain:  # TLS has ended, maybe not what is below: a selector sees this end behind the last text, too
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_RD)
        return plain

    def _read_on(self, plain: bytes) -> bytes:
        """Decrypt the records behind the first."""
        pieces = [plain]
        while self._incoming.pending and pieces[-1]:
            pieces.append(self._decrypt() or b"")
        return b"".join(pieces)

    def _keep_session(self) -> None:
        """Keep the session for others, unless it was theirs, or one of them was quicker.

        With the first data: in TLS 1.3 it comes after the handshake.  Its copy costs as much as a request, so one
        is taken for many, though RFC 8446 appendix C.4 would have a new one for each.
        """
        self._is_new = False
        sessions, offered = self._trust.sessions, self._offered
        if self._host not in sessions or (offered and sessions[self._host] is offered and not self._tls.session_reused):
            session = self._tls.session
            sessions[self._host] = session if session and session.id else None


def receive(connection: Connection, deadline: Deadline) -> bytes:
    """Return what comes next on a connection; b"" at its end.  Blocks.  Raises OSError."""
    deadline.left()  # who sends without a pause is not waited for, but is as late
    data = connection.read()
    while data is None:
        deadline.wait([connection.sock], selectors.EVENT_READ)
        data = connection.read()
    if connection.broken:
        raise ConnectionResetError(errno.ECONNRESET, "reset")
    return data


def open_tunnel(connection: Connection, address: str, fields: Mapping[str, str], deadline: Deadline) -> bytes:
    """Have the proxy that connection leads to connect it with address (RFC 9110 section 9.3.6).

    fields: what else it is told.  Returns what came behind its answer.  Blocks.  Raises OSError.
    """
    is_sent = connection.write(encode_head(f"CONNECT {address} HTTP/1.1", {"Host": address, **fields}))
    while not is_sent:
        deadline.wait([connection.sock], selectors.EVENT_WRITE)
        is_sent = connection.flush()
    data, parsed = b"", None
    while not parsed:
        more = receive(connection, deadline)
        if not more:
            raise NoTunnel("the proxy closed the connection without an answer")
        data += more
        try:
            parsed = parse_answer_head(data)
        except ValueError:
            raise NoTunnel("the proxy's answer cannot be read") from None
    status, _, rest = parsed
    if not 200 <= status < 300:
        raise NoTunnel(f"the proxy refused with status {status}")
    return rest


# 21 ------------------------------------------------------------------ Upstream

_PORTS = {"http": 80, "https": 443}


class Proxy:
    """A proxy of the environment."""

    def __init__(self, text: str) -> None:
        """text: [SCHEME://][USER[:PASSWORD]@]HOST[:PORT][/], http without a scheme, as curl reads it.

        Raises ValueError, which may quote text.
        """
        url = urllib.parse.urlsplit(text if "://" in text else f"http://{text}")
        self.scheme = url.scheme
        if self.scheme not in _PORTS or not url.hostname:
            raise ValueError("not a proxy")
        self.host = urllib.parse.unquote(url.hostname)
        self.address = join_address(self.host, url.port or _PORTS[self.scheme])
        self.fields: dict[str, str] = {}  # that it is told of who asks.  Source: RFC 7617
        if url.username is not None:
            user = urllib.parse.unquote(f"{url.username}:{url.password or ''}").encode()
            self.fields["Proxy-Authorization"] = f"Basic {base64.b64encode(user).decode()}"


def find_proxy(url: str, proxies: Mapping[str, str]) -> Proxy | None:
    """Return the proxy to reach url through, if any.

    proxies: what urllib found, by scheme; all: for schemes without one; no: where none is used.
    Loopback needs none, as in Go, whatever the environment says.

    Raises SettingsError for one that cannot be used.
    """
    base = urllib.parse.urlsplit(url)
    host, name = base.hostname or "", base.scheme if proxies.get(base.scheme) else "all"
    text = proxies.get(name, "").strip()
    if not text or is_loopback(host) or _needs_no_proxy(host, base.port or _PORTS[base.scheme], proxies.get("no", "")):
        return None
    try:
        return Proxy(text)
    except ValueError:  # its text may hold a password
        scheme = re.match(r"[A-Za-z0-9+.-]+(?=://)", text)
        shown = f"a proxy of {scheme[0].lower()}://" if scheme else "this value"
    raise SettingsError(
        f"{name.upper()}_PROXY: {shown} is not allowed; allowed: http:// or https://, and NO_PROXY for what needs none"
    )


def _needs_no_proxy(host: str, port: int, rules: str) -> bool:
    """Tell if host is named by NO_PROXY: names with all below them, addresses, networks, each with a port or not; *."""
    host = host.rstrip(".").lower()
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        address = None
    for rule in re.split(r"[\s,]+", rules.lower()):
        match = re.fullmatch(r"(\[[^\]]*\]|[^:]*)(?::([0-9]+))?", rule)
        name = (match[1] if match else rule).strip("[]").rstrip(".")  # ::1 has colons of its own
        if not name or (match and match[2] and int(match[2]) != port):
            continue
        if name == "*" or (not address and f".{host}".endswith("." + re.sub(r"^\*?\.", "", name))):
            return True
        with contextlib.suppress(ValueError):
            if address and address in ipaddress.ip_network(name, strict=False):
                return True
    return False


class Target:
    """One upstream and key, and the proxy on the way to it."""

    def __init__(self, settings: Settings, proxy: Proxy | None = None, coding: str = "identity") -> None:
        """coding: how an answer may be compressed."""
        base = urllib.parse.urlsplit(settings.upstream)
        self.url, self.scheme, self.host = settings.upstream, base.scheme, base.hostname or ""
        self.address = join_address(self.host, base.port or _PORTS[base.scheme])
        self.proxy = proxy
        self.key = (base.scheme, self.address, proxy and (proxy.scheme, proxy.address))  # of a connection to it
        fields = {"Host": base.netloc, "Accept-Encoding": coding}
        if settings.api_key:
            name, _, template = settings.auth_header.partition(":")
            fields[name] = template.strip().replace("{key}", settings.api_key)
        self._path, self._query = base.path.rstrip("/"), base.query
        if proxy and base.scheme == "http":  # absolute form, RFC 9112 section 3.2.2
            self._path = f"http://{base.netloc}{self._path}"
            fields.update(proxy.fields)
        self._fields = fields

    def encode_head(self, call: Call) -> bytes:
        """Return the head of the request.  Raises ValueError for a value that would forge a line."""
        path = self._path + call.path
        if call.query or self._query:
            path += "?" + "&".join(filter(None, (self._query, call.query)))
        if not _PATH.fullmatch(path):
            raise ValueError("a bad value in a path")
        fields = {**self._fields, **call.fields}
        if call.body or call.method == "POST":  # RFC 9110 section 8.6
            fields["Content-Length"] = str(len(call.body))
        return encode_head(f"{call.method} {path} HTTP/1.1", fields)


_PATH = re.compile("[!-~\x80-\xff]+")


class ProxyHandler(urllib.request.ProxyHandler):
    """urllib's, for a proxy that is known to be needed: its own rules know no networks."""

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy

    def add_parent(self, parent: object) -> None:
        """The parent holds this: no cycle."""

    def http_open(self, request: urllib.request.Request) -> None:
        request.set_proxy(self._proxy.address, request.type)

    https_open = http_open


class DialHandler(urllib.request.BaseHandler):
    """Connects where urllib has found that a request goes: over TLS, and through a proxy, where they are needed."""

    def __init__(self, target: Target, ca_file: str) -> None:
        """Raises SettingsError for certificates that cannot be read."""
        self._target = target
        self._resolver = Resolver()
        # Made only where it is needed: reading the system's certificates takes time and memory.
        needs_trust = "https" in (target.scheme, target.proxy and target.proxy.scheme)
        self._trust = Trust(ca_file) if needs_trust else None

    def add_parent(self, parent: object) -> None:
        """The parent holds this: no cycle."""

    def http_open(self, request: Any) -> Connection:
        """What urllib calls, once it has set the proxy.  Raises OSError."""
        target, deadline = self._target, request.deadline
        peer = urllib.parse.urlsplit(f"//{request.host}")
        addresses = self._resolver.find(peer.hostname or "", peer.port or _PORTS[request.type], deadline)
        connection = Connection(Race(addresses, deadline).run(), target.key)
        rest = b""
        try:
            if target.proxy and target.proxy.scheme == "https":
                connection = self._secure(connection, target.proxy.host, deadline)
            if target.proxy and request._tunnel_host:
                rest = open_tunnel(connection, target.address, target.proxy.fields, deadline)
            if request.type == "https":
                connection = self._secure(connection, target.host, deadline, rest)
            deadline.lifeline.release()
        except BaseException:
            deadline.lifeline.drop(connection.sock)
            connection.close()
            raise
        return connection

    https_open = http_open

    def _secure(self, inner: Connection, host: str, deadline: Deadline, data: bytes = b"") -> TlsConnection:
        assert self._trust
        connection = TlsConnection(inner, self._trust, host)
        connection.handshake(deadline, data)
        return connection


class Upstream:
    """The API, whose connections are opened by urllib, so that the proxies of the environment count."""

    def __init__(self, settings: Settings, coding: str = "identity") -> None:
        """coding: see Target.  Raises SettingsError for certificates that cannot be read, or a proxy of no use."""
        proxies, proxy = urllib.request.getproxies(), None
        # Other systems than those of variables have rules of their own.
        if proxies and not urllib.request.proxy_bypass(urllib.parse.urlsplit(settings.upstream).netloc):
            proxy = find_proxy(settings.upstream, proxies)
        self.target = Target(settings, proxy, coding)
        self._timeout = settings.connect_timeout + DIAL_GRACE if settings.connect_timeout else FOREVER
        # Neither redirects nor file: addresses: handlers that are not there.
        self._opener = urllib.request.OpenerDirector()
        if proxy:
            self._opener.add_handler(ProxyHandler(proxy))
        self._opener.add_handler(DialHandler(self.target, settings.ca_file))

    def dial(self, lifeline: Lifeline) -> Connection:
        """Return a new connection to the target, on which nothing was sent.

        Blocks until it is there, its time is over, or lifeline is cut.  Raises UpstreamError.
        """
        try:
            return self.open(Deadline(lifeline, self._timeout))
        except (OSError, ValueError) as error:  # the last for a name like a..b
            reason = reason_of(error)
            status = 504 if isinstance(error, socket.timeout) else 502
            kinds = ((_NO_NAME, "dns"), (ssl.SSLError, "tls"), (socket.timeout, "connect_timeout"))
            kind = next((kind for type, kind in kinds if isinstance(error, type)), "connect")
        # Raised here, it keeps no frames of error's.
        raise UpstreamError(f"Upstream cannot be reached: {reason}.", status, reason=kind)

    def open(self, deadline: Deadline) -> Connection:
        """Return a new connection.  Blocks.  Raises OSError, and ValueError for a name that cannot be one."""
        request = urllib.request.Request(self.target.url)
        request.deadline = deadline  # type: ignore[attr-defined]
        return self._opener.open(request)  # type: ignore[no-any-return]


class Spare:
    """A connection to upstream between two requests: the rest of an answer comes, then nothing should."""

    def __init__(self, pool: Pool, connection: Connection, body: BodyDecoder) -> None:
        self.pool, self.connection, self.body = pool, connection, body
        self.since = pool.loop.now

    def on_ready(self, events: int) -> None:
        """Read on; close what upstream closed, or says what nobody asked for on."""
        data = self.connection.read()
        if data and not self.body.complete:
            self.body.feed(data)
            self.pool.sort(self)
        elif data is not None:
            self.pool.drop(self)

    def on_fault(self, error: Exception) -> None:
        self.pool.drop(self)


class Pool:
    """Connections to upstream that are warm: the next request on them pays no handshake."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self._settling: dict[Spare, None] = {}  # both in order: the oldest is the first to go
        self._idle: dict[object, list[Spare]] = {}  # by what they lead to
        self._alarm = Alarm(loop, self._on_alarm)

    def __len__(self) -> int:
        return sum(map(len, self._idle.values()))

    def take(self, key: object) -> Connection | None:
        """Return the connection that was used last, if one is alive."""
        idle = self._idle.get(key)
        while idle:
            spare = idle.pop()
            if spare.connection.read() is None:
                spare.connection.reused = True
                return spare.connection  # which is watched still: whoever takes it does so at once
            self._close(spare)
        return None

    def settle(self, connection: Connection, body: BodyDecoder) -> None:
        """Keep a connection whose answer nobody waits for any more, once body, the rest of it, has ended."""
        spare = Spare(self, connection, body)
        self.loop.watch(connection.sock, READ, spare.on_ready)
        self.sort(spare)

    def sort(self, spare: Spare) -> None:
        """Put a connection where it belongs by what has come of its body."""
        body, connection = spare.body, spare.connection
        if not (body.complete or body.broken):
            self._settling[spare] = None
            self._alarm.by(spare.since + END_GRACE)
            return
        self._settling.pop(spare, None)
        if body.broken or body.rest or self.loop.now > connection.opened_at + MAX_CONNECTION_AGE:
            self._close(spare)
            return
        idle = self._idle.setdefault(connection.key, [])
        idle.append(spare)
        spare.since = self.loop.now
        self._alarm.by(spare.since + KEEP_ALIVE_TIMEOUT)
        if len(idle) > MAX_IDLE_CONNECTIONS:
            self._close(idle.pop(0))

    def drop(self, spare: Spare) -> None:
        if spare in self._settling:
            del self._settling[spare]
        else:
            self._idle[spare.connection.key].remove(spare)
        self._close(spare)

    def close(self) -> None:
        self._alarm.close()
        for spare in itertools.chain(list(self._settling), *map(list, self._idle.values())):
            self.drop(spare)

    def _close(self, spare: Spare) -> None:
        self.loop.unwatch(spare.connection.sock)
        spare.connection.close()

    def _on_alarm(self) -> None:
        """Close what is too old."""
        groups = [(list(self._settling), END_GRACE)]
        groups += [(idle[:], KEEP_ALIVE_TIMEOUT) for idle in self._idle.values()]
        for spares, limit in groups:
            for spare in spares:
                if spare.since + limit > self.loop.now:
                    self._alarm.by(spare.since + limit)
                    break
                self.drop(spare)


# 22 ------------------------------------------------------------------ Sources


def _no_answer() -> UpstreamError:
    return UpstreamError("Upstream closed the connection without an answer.", reason="closed")


class Source(Stateful):
    """One try of a call: the request out, the answer in.

    DIALING -> SENDING -> AWAITING -> FLOWING -> ENDING, and from any of them OVER.  SENDING: upstream is listened to
    meanwhile, for it may answer what it has not read, and so be FLOWING or ENDING next.  AWAITING: the first event.
    ENDING: all but a word or two has come; if more does, it is FLOWING again.
    """

    DIALING, SENDING, AWAITING, FLOWING, ENDING, OVER = range(6)

    # How long a state may last, by which setting, and what is said then.
    _CLOCKS = (
        ("connect_timeout", "to connect"),
        ("first_byte_timeout", "to start its answer"),
        ("first_byte_timeout", "to start its answer"),
        ("idle_timeout", "to go on with its answer"),
    )

    connection: Connection  # from SENDING on
    _asked_at = 0.0
    _dial: Job | None = None
    _lifeline: Lifeline | None = None  # by which that can be ended
    _head = b""  # what came of the answer's head, until it is whole
    _body: BodyDecoder | None = None  # once it is
    _keeps_alive = False
    _pieces = 0  # of text, that came
    _text_at = 0.0  # when the last did

    def __init__(self, stream: Stream) -> None:
        self.stream, self.hub = stream, stream.hub
        self.answer = stream.answer
        self.state = self.DIALING
        self.since = self.hub.loop.now  # in this state, or since it was last seen that upstream is alive
        self._between = self.hub.metrics.between_pieces

    def open(self, fresh: bool) -> None:
        """Ask, on a connection that is warm or, where it has to be a fresh one, on that."""
        warm = None if fresh else self.hub.pool.take(self.hub.upstream.target.key)
        if warm:
            self._ask(warm)
        else:
            target = self.hub.upstream.target
            self.stream.tell("dial", upstream=target.address, proxy=target.proxy and target.proxy.address)
            self._lifeline = Lifeline()
            self._dial = Job(self.hub.loop, functools.partial(self.hub.dial, self._lifeline), self._on_dialed)
            self.hub.workers.run(self._dial.run)
            self.stream.set_alarm()

    def close(self, keep: bool = False) -> None:
        """End: nobody pays for what would come from now on.  keep: what comes is a few bytes that were paid for."""
        state, self.state = self.state, self.OVER
        body = self._body
        if state == self.DIALING:
            if self._lifeline:
                self._lifeline.cut()
        elif state != self.SENDING and body and self._keeps_alive and (keep or body.complete):
            self.hub.pool.settle(self.connection, body)
        else:
            self.hub.loop.unwatch(self.connection.sock)
            self.connection.close()

    def due(self) -> float:
        """When this state has lasted too long."""
        if self.state == self.ENDING:
            return self.since + END_GRACE
        limit: float = getattr(self.hub.settings, self._limit[0])
        return self.since + limit if limit else math.inf

    @property
    def _limit(self) -> tuple[str, str]:
        begun = self.state == self.SENDING and self.answer.notes.events  # the answer has, before the request was sent
        return self._CLOCKS[self.FLOWING if begun else self.state]

    def conclude(self) -> None:
        """Wait no longer for what follows the last event: the answer is what it is."""
        self._take(BodyDecoder(0), b"")  # as if the body had ended

    def late(self) -> UpstreamError:
        """Return the failure for a state that has lasted too long."""
        setting, words = self._limit
        return UpstreamError(f"Upstream took too long {words}.", 504, "aborted", reason=setting)

    def watch(self) -> None:
        """Listen to upstream unless the client has to read first (back-pressure), and send while there is more to.

        Called where either may have changed.
        """
        if self.state in (self.DIALING, self.OVER):
            return
        events, call = (WRITE, self.on_sending) if self.state == self.SENDING else (0, self.on_ready)
        events |= 0 if self.stream.viewer.blocked else READ
        if events:
            self.hub.loop.watch(self.connection.sock, events, call)
        else:
            self.hub.loop.unwatch(self.connection.sock)

    def on_sending(self, events: int) -> None:
        """Send on, and hear what upstream says meanwhile."""
        self._send()
        if not self.stream.viewer.blocked:
            self.on_ready(events)

    def on_ready(self, events: int) -> None:
        """Hear what upstream says."""
        data = self.connection.read()
        if data is None:
            return
        body = self._body
        if body is None:
            self._take_head(data)
        elif data:
            self._take(body, data)
        else:
            if not self.connection.broken:
                body.close()
            self._take(body, b"", closed=True)

    def on_fault(self, error: Exception) -> None:
        self.stream.on_fault(error)

    def _on_dialed(self) -> None:
        dial, self._dial, self._lifeline = self._dial, None, None
        assert dial
        if self.state == self.OVER or self.stream.viewer.client.lost:
            if dial.result:
                dial.result.close()
        elif dial.failure:
            self.stream.fail(dial.failure)
        else:
            dial.result.on_open(self.hub.loop.now)
            self.stream.tell("connected", peer=dial.result.peer, seconds=round(self.hub.loop.now - self.since, 3))
            self._ask(dial.result)

    def _ask(self, connection: Connection) -> None:
        self.connection, self.stream.asked = connection, True
        self.hub.metrics.values["upstream_connections_total"]["true" if connection.reused else "false",] += 1
        self.state, self.since = self.SENDING, self.hub.loop.now
        self._asked_at = self.since
        call = self.stream.call
        if self.hub.tells:
            self.stream.tell(
                "ask", peer=connection.peer, warm=connection.reused, method=call.method, path=call.path,
                bytes=len(call.body), adapted=call.adapted and call.adapted.refused or None,
            )  # fmt: skip
        self._send(self.hub.upstream.target.encode_head(call), call.body)
        self.watch()
        self.stream.set_alarm()

    def _send(self, head: bytes = b"", body: bytes = b"") -> None:
        try:
            done = self.connection.write(head, body) if head else self.connection.flush()
        except OSError:  # it may have answered without reading all
            done = True
        if done:
            self.state = self.FLOWING if self.answer.notes.events else self.AWAITING
            if not head:
                self.watch()
                self.stream.set_alarm()

    @property
    def _crosses(self) -> bool:
        """Whether what comes now may have been sent before the request came, as the connection had been idle."""
        return self.connection.reused and self.hub.loop.now < self._asked_at + STALE_WINDOW

    def _take_head(self, data: bytes) -> None:
        """Read on in the head of the answer; b"" is the end of the connection."""
        if not data:
            self.stream.fail(_no_answer(), stale=self._crosses and not self._head)
            return
        self._head += data
        try:
            parsed = parse_answer_head(self._head)
            if not parsed:
                return
            status, fields, rest = parsed
            body = BodyDecoder(0) if status in (204, 304) else body_decoder(fields, None, lenient=True)
        except ValueError as error:
            self.stream.fail(Garbled(f"Upstream's answer cannot be read: {error}."))
            return
        if status == 408 and self._crosses:  # it was about to be closed; later, a 408 may be the model's, and paid
            self.stream.fail(_no_answer(), stale=True)
            return
        self._head, self._body = b"", body
        # What comes before all was sent, or refuses a large request, may be all that comes: nobody reads on, and
        # certainly no second request behind it.  Behind a 101 another protocol is spoken.
        large = len(self.stream.call.body) > MAX_DISCARDED
        last = self.state == self.SENDING or (large and status >= 400) or status == 101
        self._keeps_alive = not last and body.left is not None and "close" not in fields.get("connection", "").lower()
        self.answer = self.stream.answer = self.answer.start(status, fields)
        self.stream.on_head()
        if self.hub.tells:
            media = self.hub.redact(fields.get("content-type", "")[:100])
            self.stream.tell("head", status=status, type=media or None, upstream_id=self.answer.notes.request_id)
        self._take(body, rest)
        if self.answer.eager and self.state != self.OVER:
            self.stream.viewer.open()
            self.stream.set_alarm()  # for heartbeats

    def _take(self, body: BodyDecoder, data: bytes, closed: bool = False) -> None:
        """Pass on what data adds to the answer; closed: it is the last of the connection."""
        answer, stream, now = self.answer, self.stream, self.hub.loop.now
        data = body.feed(data)
        ends = closed or body.complete or body.broken
        if self.state == self.FLOWING and not ends and answer.skim(data):  # mostly, and never the first of the answer
            self.since = now
            self._note_text(now)
            if stream.viewer.take(data):
                self.watch()
            return
        life = answer.life
        out = answer.feed(data)
        if ends:
            out += answer.close(self._cut(body))
        is_first = answer.notes.pieces != self._pieces and self._note_text(now)
        if answer.state == answer.DONE or answer.failure:
            self._conclude(answer, out)
        elif out and stream.viewer.take(out):
            self.watch()
        if is_first:
            stream.first_sent_at = self.hub.loop.clock()
        if answer.life != life and self.state != self.OVER:
            self.since = now
            if self.state != self.FLOWING or answer.state == answer.ENDING:
                self._flow(answer)

    def _note_text(self, now: float) -> bool:
        """Take note of text that came with this read; tell whether it is the first."""
        noted, stream = self._between.noted, self.stream
        is_first = not self._pieces
        if is_first:
            stream.first_text_at = now
            if self.hub.tells:
                stream.tell("first text")
        else:
            noted.append(now - self._text_at)
            if len(noted) > MAX_NOTED:
                self._between.observe_noted()
        self._pieces, self._text_at = self.answer.notes.pieces, now
        return is_first

    @staticmethod
    def _cut(body: BodyDecoder) -> UpstreamError | None:
        """What is wrong with the end of a body."""
        if body.complete:
            return None
        if body.broken:
            return Garbled("Upstream broke the chunked coding of its answer.")
        return UpstreamError("Upstream closed the connection within its answer.", ending="truncated")

    def _conclude(self, answer: Answer, out: bytes) -> None:
        """End the stream with an answer that is done, or that failed; out is the last of it, but for what comes within
        the moment.
        """
        stream = self.stream
        stream.record.append(out)
        if answer.state == Answer.DONE:
            stream.complete()
            return
        stream.viewer.more()
        if answer.failure and answer.state != Answer.ENDING:
            stream.fail(answer.failure)
        elif stream.viewer.blocked:
            self.watch()

    def _flow(self, answer: Answer) -> None:
        if answer.state == answer.ENDING:
            was, self.state = self.state, self.ENDING
            if was == self.SENDING:  # nobody needs the rest of the request
                self.watch()
        elif answer.notes.events and self.state != self.SENDING:
            self.state = self.FLOWING
        self.stream.set_alarm()


# 23 ------------------------------------------------------------------ Viewers


class Record:
    """The bytes made of an answer that somebody may still want: those that its viewer has not taken."""

    def __init__(self) -> None:
        self.fresh = b""

    def append(self, data: bytes) -> None:
        self.fresh = self.fresh + data if self.fresh else data

    def take(self) -> bytes:
        """Return what was not taken before."""
        data, self.fresh = self.fresh, b""
        return data


class Viewer(Stateful):
    """Sends an answer to one client: SILENT -> OPEN (the head leaves) -> LAST (the end is queued) -> OVER."""

    SILENT, OPEN, LAST, OVER = range(4)

    def __init__(self, record: Record, client: Taker, begin: Callable[[], tuple[bytes, bool]]) -> None:
        """begin tells, when the first bytes leave, the head that goes before them, and whether the body is chunked."""
        self.record, self.client = record, client
        self.state = self.SILENT
        self.since = client.loop.now  # when something was last sent, or the client had taken what was
        self.intact = False  # the body ends as it should
        self._begin = begin
        self._head = self._tail = b""  # what goes before what leaves next, and behind it
        self.chunked = False  # the body is

    @property
    def blocked(self) -> bool:
        """Whether the client has to read first."""
        return bool(self.client.pending)

    def open(self) -> None:
        """Have the head leave, if it has not."""
        if self.state == self.SILENT:
            self._open()
            self.more()

    def ping(self, heartbeat: bytes) -> None:
        """Send a heartbeat, or, where none can stand now, wait as long again."""
        self.since = self.client.loop.now
        self.record.append(heartbeat)
        self.more()

    def take(self, data: bytes) -> bool:
        """Send data, which is not empty, behind what the record has; tell whether the client has to read first."""
        client = self.client
        if self.state == self.OPEN and not client.pending:  # then all that was recorded has been sent
            self.since = client.loop.now
            client.send(b"%x\r\n%b\r\n" % (len(data), data) if self.chunked else data)
        else:
            self.record.append(data)
            self.more()
        return bool(client.pending)

    def more(self) -> None:
        """Send what the record has, as one chunk, unless the client has not taken what was sent before."""
        client = self.client
        if client.pending or client.lost:
            return
        data = self.record.take()
        if self.state == self.SILENT:
            if not data:
                return
            self._open()
        if self.chunked:
            data = encode_chunk(data)
        if self._head or self._tail:
            data, self._head, self._tail = self._head + data + self._tail, b"", b""
        if data:
            self.since = client.loop.now
            client.send(data)
        if self.state == self.LAST and not (client.pending or client.lost):
            self.state = self.OVER

    def last(self, intact: bool) -> None:
        """Send what the record has left, and the end: that of a whole body, or none, by which a client sees a cut."""
        if self.state == self.SILENT:
            self._open()
        self.state, self.intact = self.LAST, intact
        self._tail = LAST_CHUNK if intact and self.chunked else b""
        self.more()

    def cut(self) -> None:
        """End at once."""
        self.state, self.intact = self.OVER, False

    def _open(self) -> None:
        self._head, self.chunked = self._begin()
        self.state = self.OPEN


# 24 ------------------------------------------------------------------ Streams


class Stream:
    """One answer on its way: its source, its record, its viewer; and whether a failure is tried again."""

    attached = False  # see Watch
    failure: ProxyError | None = None  # why the answer is not complete
    asked = False  # upstream has begun to get the request, and may have been paid
    first_text_at: float | None = None
    first_sent_at: float | None = None  # None: with its end
    _source: Source | None = None

    def __init__(self, hub: Hub, call: Call, answer: Answer, exchange: Asker, viewer: Viewer | None = None) -> None:
        """exchange is told, by on_stream_over, when all has been sent, or nothing more can be."""
        self.hub, self.call, self.answer = hub, call, answer
        self.viewer = viewer or Viewer(Record(), exchange.client, exchange.begin_stream)
        self.record = self.viewer.record
        self.began_at = hub.loop.now
        self._exchange = exchange
        self.tell = exchange.tell
        self._alarm = Alarm(hub.loop, self._on_alarm)

    @property
    def over(self) -> bool:
        return self.viewer.state == Viewer.OVER

    def ask(self, fresh: bool = False) -> None:
        """Ask upstream; fresh: not on a warm connection."""
        self.asked = False
        if self.viewer.client.lost:  # which this is about to be told
            return
        self._source = Source(self)
        self._source.open(fresh)

    def fail(self, failure: ProxyError, stale: bool = False) -> None:
        """Try again, or end so that the client can tell that the answer is not complete.

        stale: the request went to a warm connection that had been closed already.
        """
        if self.viewer.state >= Viewer.LAST:
            return
        ours = not isinstance(failure, (UpstreamError, Aborted))  # a fault, and text may be lost
        if self.answer.state >= Answer.SETTLED and not (self.answer.failure or ours):
            self.complete()  # the answer was, and only usage and [DONE] were waited for
            return
        self._close_source()
        retries = self.viewer.state == Viewer.SILENT and (stale or self._adapt())
        failure = self.answer.failure or failure
        if isinstance(failure, UpstreamError):
            self.hub.metrics.values["upstream_failures_total"]["stale" if stale else failure.reason,] += 1
        self.tell("failure", error=failure.logged, again=retries)
        if retries:
            self.ask(fresh=stale)
            return
        self.failure = failure
        if self.viewer.state == Viewer.SILENT:
            self._cut()  # the exchange says why
            return
        told = self.answer.encode_failure(self.failure)
        self.record.append(told)
        self._finish(intact=bool(told))

    def _adapt(self) -> bool:
        """Tell whether upstream refused nothing but a default of ours, and may take the request without it."""
        refusal, adapted = self.answer, self.call.adapted
        if not (adapted and isinstance(refusal, Refusal) and adapted.take_refusal(refusal.refused, refusal.document)):
            return False
        self.call, self.answer = prompt_call(adapted), refusal.asked
        return True

    @property
    def paid(self) -> bool:
        """Whether what was asked may have been paid for: not where upstream refused it, or had no room for it."""
        refusal = self.answer
        status = refusal.refused if isinstance(refusal, Refusal) else 408  # which may be the model's own time-out
        return self.asked and (status == 408 or (status >= 500 and status not in PASSED_STATUSES))

    def head(self) -> tuple[int, dict[str, str]]:
        """Return the status and the fields of the client's answer."""
        return self.answer.client_head()

    def on_head(self) -> None:
        """Upstream has taken the request, or refused it."""
        if self.call.adapted and not isinstance(self.answer, Refusal):
            self.call.adapted.keep()

    def complete(self) -> None:
        """End with what follows the last text."""
        self._close_source(keep=True)
        self.record.append(self.answer.end())
        self._finish(intact=True)

    def drop(self, failure: ProxyError) -> None:
        """End at once: nobody is there, or able, to take what is left."""
        if not self.over:
            self.failure = failure
            self._close_source()
            self._cut()

    def on_fault(self, error: Exception) -> None:
        self._exchange.on_fault(error)

    def on_drained(self) -> None:
        """The client has taken all that was sent: go on."""
        self.viewer.more()
        if self.over:
            self._end()
        elif self._source and not self.viewer.blocked:
            self._source.since = self.viewer.since = self.hub.loop.now  # upstream was not silent: we did not listen
            self._source.watch()
            self.set_alarm()

    def set_alarm(self) -> None:
        """Look at the clocks when the next is due, at the latest.  Called where one may have come nearer.

        While the client has to read, upstream's are not looked at, and start anew once it has; and none counts once
        upstream is done with.
        """
        if not self._source:
            return
        due = self._total_due()
        if not self.viewer.blocked:
            due = min(due, self._source.due(), self._ping_due())
        self._alarm.by(due)

    def _total_due(self) -> float:
        return self.began_at + (self.hub.settings.total_timeout or math.inf)

    def _ping_due(self) -> float:
        return self.viewer.since + (self.answer.pings and self.hub.settings.heartbeat or math.inf)

    def _on_alarm(self) -> None:
        """Do what is due, then wait for what comes next."""
        now, source = self.hub.loop.now, self._source
        if source and self._total_due() <= now:
            words = "Upstream took too long to end its answer."
            self.fail(UpstreamError(words, 504, "aborted", reason="total_timeout"))
        elif source and not self.viewer.blocked:
            if source.due() <= now and (source.state == Source.ENDING or isinstance(self.answer, Refusal)):
                source.conclude()  # of a refusal, its status tells enough
            elif source.due() <= now:
                self.fail(source.late())
            elif self._ping_due() <= now:
                heartbeat = self.answer.ping()
                self.hub.metrics.values["heartbeats_total"][()] += bool(heartbeat)
                self.viewer.ping(heartbeat)
        self.set_alarm()

    def _finish(self, intact: bool) -> None:
        self.viewer.last(intact)
        if self.over:
            self._end()

    def _cut(self) -> None:
        self.viewer.cut()
        self._end()

    def _close_source(self, keep: bool = False) -> None:
        source, self._source = self._source, None
        if source:
            source.close(keep)

    def _end(self) -> None:
        self._alarm.close()
        self._exchange.on_stream_over()


class TestAsked:
    """What is asked of a test stream, in the query of /healthz/stream."""

    def __init__(self, id: str, events: int, size: int, every: int, ping: int, sse: int, cut: int) -> None:
        """id: under which its client asks whether it goes on; "": none.  size: bytes of an event's text.  every, ping:
        milliseconds between two events, and of silence before a ping; 0: none.  sse: 1: server-sent events, 0: text.
        cut: 1: it ends as an answer that is cut off.
        """
        self.id, self.events, self.size, self.every = id, events, size, every
        self.ping, self.sse, self.cut = ping, sse, cut


# What each may be, and is where it is not given.
_TEST_LIMITS = {
    "events": (1, 1000, 10), "size": (48, 16384, 64), "every": (1, 600_000, 100), "ping": (0, 60_000, 0),
    "sse": (0, 1, 0), "cut": (0, 1, 0),
}  # fmt: skip
_TEST_ID = re.compile("[0-9a-f]{32}")
MAX_TEST_SIZE = 256 * 1024  # of the text of one, in bytes
MAX_TEST_TIME = 660.0  # of one, in seconds: for a look at ten minutes of silence
MAX_TEST_PINGS = 1000  # of one
TEST_STREAMS = {"max_streams": 64, "max_streams_per_client": 48, "requests_per_minute": 240}


def parse_test(query: str) -> TestAsked:
    """Return what a query asks of a test stream.  Raises RequestError."""
    given = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
    id = given.pop("id", "")
    if id and not _TEST_ID.fullmatch(id):
        raise RequestError('"id" must be 32 hexadecimal digits, lower case.')
    unknown = given.keys() - _TEST_LIMITS.keys()
    if unknown:
        raise RequestError(f"There is no {min(unknown)[:50]!a}; there are id, {', '.join(_TEST_LIMITS)}.")
    values = {}
    for name, (low, high, default) in _TEST_LIMITS.items():
        text = given.get(name, str(default))
        if not (re.fullmatch("[0-9]{1,6}", text) and low <= int(text) <= high):
            raise RequestError(f'"{name}" must be a number from {low} to {high}.')
        values[name] = int(text)
    asked = TestAsked(id, **values)
    if asked.events * asked.size > MAX_TEST_SIZE:
        raise RequestError(f'"events" times "size" must be at most {MAX_TEST_SIZE}.')
    if asked.events * asked.every > MAX_TEST_TIME * 1000:
        raise RequestError(f'"events" times "every" must be at most {MAX_TEST_TIME * 1000:.0f}.')
    if asked.ping and asked.events * asked.every > MAX_TEST_PINGS * asked.ping:
        raise RequestError(f'"ping" must be at least a {MAX_TEST_PINGS}th of "events" times "every".')
    return asked


class TestStream:
    """An answer of numbered events that costs nothing, for whoever looks what the way to here does to streams.

    To its exchange it is a Stream; its text comes from a clock.  An event says its number, the milliseconds after which
    it has left, and which HTTP the request came in; what fills it up cannot be compressed, nor guessed by a cache.
    """

    paid = False

    def __init__(self, tests: TestStreams, place: str, asked: TestAsked, exchange: Exchange) -> None:
        """place: as the limits know the client."""
        self.asked, self.place = asked, place
        self.failure: ProxyError | None = None
        self.answer = EventAnswer(exchange.id) if asked.sse else TextAnswer()
        self.viewer = Viewer(Record(), exchange.client, exchange.begin_stream)
        self._sent = 0  # events
        self._tests, self._exchange, self._loop = tests, exchange, exchange.client.loop
        self._began_at = self._loop.now
        self._alarm = Alarm(self._loop, self._on_alarm)

    @property
    def over(self) -> bool:
        return self.viewer.state == Viewer.OVER

    def head(self) -> tuple[int, dict[str, str]]:
        """Return the status and the fields of the client's answer."""
        return self.answer.client_head()

    def begin(self) -> None:
        """Have the head leave, and the first event."""
        self.viewer.open()
        self._on_alarm()

    def fail(self, failure: ProxyError) -> None:
        """End so that the client can tell that the answer is not complete."""
        if self.viewer.state < Viewer.LAST:
            self.failure = failure
            self._finish(self.answer.encode_failure(failure))

    def drop(self, failure: ProxyError) -> None:
        """End at once: nobody is there, or able, to take what is left."""
        if not self.over:
            self.failure = failure
            self.viewer.cut()
            self._end()

    def on_drained(self) -> None:
        """The client has taken all that was sent: go on."""
        self.viewer.more()
        if self.over:
            self._end()

    def on_fault(self, error: Exception) -> None:
        self._exchange.on_fault(error)

    def _next_due(self) -> float:
        return self._began_at + self._sent * self.asked.every / 1000

    def _ping_due(self) -> float:
        return self.viewer.since + self.asked.ping / 1000 if self.asked.ping and self.asked.sse else math.inf

    def _on_alarm(self) -> None:
        """Do what is due, then wait for what comes next."""
        now = self._loop.now
        if self.viewer.state >= Viewer.LAST:
            return
        if self._next_due() > now:
            if self._ping_due() <= now:
                self.viewer.ping(PING)
        elif self._sent < self.asked.events:
            self._send_event(now)
        else:
            self._finish(b"" if self.asked.cut else self.answer.end(), intact=not self.asked.cut)
        if self.viewer.state < Viewer.LAST:
            self._alarm.by(min(self._next_due(), self._ping_due()))

    def _send_event(self, now: float) -> None:
        self._sent += 1
        http = "1.1" if self._exchange.request.http11 else "1.0"
        head = f"{self._sent} {1000 * (now - self._began_at):.0f} {http} "
        text = (head + os.urandom(self.asked.size // 2).hex())[: self.asked.size - 2] + ";\n"
        self.viewer.record.append(self.answer.encode("message", text=text))
        self.viewer.more()

    def _finish(self, last: bytes, intact: bool = False) -> None:
        """End with last: that of a whole body, or of one that says what went wrong, else of one that is cut."""
        self.viewer.record.append(last)
        self.viewer.last(intact or bool(last))
        if self.over:
            self._end()

    def _end(self) -> None:
        self._alarm.close()
        self._tests.leave(self)
        self._exchange.on_stream_over()


class TestStreams:
    """The test streams that are on their way, and how many there may be."""

    def __init__(self, settings: Settings) -> None:
        self._limits = Limits(settings.replace(**TEST_STREAMS))
        self._streams: set[TestStream] = set()

    def enter(self, place: str, asked: TestAsked, exchange: Exchange) -> TestStream:
        """Return a new one.  Raises RequestError where there is no place."""
        self._limits.enter(place)
        stream = TestStream(self, place, asked, exchange)
        self._streams.add(stream)
        return stream

    def leave(self, stream: TestStream) -> None:
        self._limits.leave(stream.place)
        self._streams.remove(stream)

    def count(self, id: str) -> int:
        """Return how many of this id are on their way."""
        return sum(stream.asked.id == id for stream in self._streams)

    def abort(self) -> None:
        """End all: a drain waits for none."""
        for stream in list(self._streams):
            stream.fail(shutting_down())


class Hub:
    """What all streams share: the loop, threads, warm connections and settings."""

    def __init__(self, settings: Settings, start: Callable[[Callable[[], None]], None] = start_thread) -> None:
        """start has a new thread make a call.  Raises SettingsError for certificates that cannot be read."""
        self.settings = settings
        self.redact = redactor(settings.api_key)
        self.refusals = Refusals()
        self.upstream = Upstream(settings)
        self.log = LogWriter()
        # Whether anybody wants to know of steps, as it was when a request began last.  Who tells of a step that each
        # request takes looks here before its facts are put together.
        self.tells = log.isEnabledFor(logging.DEBUG)
        self.loop = Loop(report=self.log.error)
        self.workers = Workers(self.loop, self.log.error, start)
        self.pool = Pool(self.loop)
        self.tests = TestStreams(settings)
        self.metrics = Metrics(names_clients=bool(settings.token_file))
        self._probe = Alarm(self.loop, self._on_probe)  # goes off late, where the loop is
        self._probe_at, self._probed = 0.0, 0.0

    def dial(self, lifeline: Lifeline) -> Connection:
        """Return a new connection to upstream.  Blocks.  Raises UpstreamError."""
        return self.upstream.dial(lifeline)

    def tell(self, id: str, step: str, facts: Mapping[str, object]) -> None:
        """Log a step of the request that has this id, if anybody wants to know, be it since a moment ago."""
        if log.isEnabledFor(logging.DEBUG):
            self.log.debug(LogEntry(time="", level="debug", id=id, step=step, **facts))

    def stream(self, call: Call, answer: Answer, exchange: Asker, viewer: Viewer | None = None) -> Stream:
        if self._probe.at == math.inf:
            self._set_probe()
        return Stream(self, call, answer, exchange, viewer)

    def _set_probe(self) -> None:
        self._probe_at = self.loop.clock() + LAG_INTERVAL
        self._probe.by(self._probe_at)

    def _on_probe(self) -> None:
        """See how late the loop is, and look again while text comes: a process with nothing to do sleeps."""
        self.metrics.histograms["loop_lag_seconds"].observe(max(0.0, self.loop.clock() - self._probe_at))
        self.metrics.between_pieces.observe_noted()
        came, self._probed = self._probed, self.metrics.between_pieces.sum
        if came != self._probed:
            self._set_probe()

    @property
    def has_this_thread(self) -> bool:
        return self.loop.is_this_thread or self.workers.has_this_thread

    def close(self) -> None:
        """End the loop's thread, after all that was posted, and all others."""
        self.loop.post(self._probe.close)
        self.loop.post(self.pool.close)
        self.loop.stop()
        self.workers.close(CLOSE_TIMEOUT)
        self.loop.close()
        self.log.close(CLOSE_TIMEOUT)


# 25 ------------------------------------------------------------------ Kept answers


class Claim:
    """Which answer a request means: one that there is, to go on with, or a new one that shall outlive its client."""

    _KEY = re.compile("[!-~]{1,255}")
    _PLACE = re.compile(r"([^.]+)\.([0-9]{1,15})")

    def __init__(self, request: Request, owner: str, name: str, events: bool, counts: bool) -> None:
        """owner, counts: see Limits.  name: of the client's token.  events: they are wanted.  Raises RequestError."""
        fields, path = request.fields, request.path
        named = path.startswith("/streams")  # an answer is, or shall be, by whoever asks
        ours = not path.startswith("/v1/")
        key = fields.get("idempotency-key", "")
        if "idempotency-key" in fields and not self._KEY.fullmatch(key):
            raise RequestError("An Idempotency-Key is one value of 1 to 255 visible characters.")
        self.owner, self.name, self.counts = owner, name, counts
        self.place = fields.get("last-event-id", "")  # the last that has come
        self.reconnects = events and ours and request.method == "GET"  # as an EventSource does
        self.counts_events = events and ours  # in its places, not bytes
        self.id = path.split("/")[2] if path.startswith("/streams/") else self.position()[0] if self.reconnects else ""
        self.key = key if not self.id and (request.method == "POST" or named) else ""
        self.keeps = bool(self.key) or self.reconnects
        self.begins = not named and not (self.keeps and self.place)  # a new answer, where there is none
        self.asked = b""  # a digest of the request
        self._head = f"{request.method} {path}?{request.query} {events}".encode()

    def take_body(self, body: bytes | bytearray) -> None:
        """Know the request from another."""
        self.asked = hashlib.sha256(self._head + b"\n" + body).digest()

    def position(self) -> tuple[str, int]:
        """Return the ID of the answer that was begun, and how much of it has come; "" for none that can be read."""
        match = self._PLACE.fullmatch(self.place)
        return (match[1], int(match[2])) if match else ("", 0)


class KeptRecord(Record):
    """What was made of a kept answer: all of it, but for what had to be forgotten from its begin on.

    It is in blocks, each of whole pieces, for bytes in a row that grow would be copied again and again.
    """

    _BLOCK_SIZE = 4096  # at least, but of the last

    def __init__(self) -> None:
        super().__init__()
        self.begin = 0  # the place in the answer of the first byte that is kept
        self.loose: list[bytes] = []  # the last few pieces as they came: to put each behind the others costs more
        self._blocks: list[bytes] = []
        self._places: list[int] = []  # where they begin
        self._size = 0  # of all of them

    def __len__(self) -> int:
        """How many bytes are kept, but for those that are loose."""
        return self._size

    def settle(self) -> int:
        """Have nothing loose; return how many bytes were."""
        data = b"".join(self.loose)
        self.loose.clear()
        if self._blocks and len(self._blocks[-1]) < self._BLOCK_SIZE:
            self._blocks[-1] += data
        elif data:
            self._places.append(self.begin + self._size)
            self._blocks.append(data)
        self._size += len(data)
        return len(data)

    @property
    def end(self) -> int:
        """How many bytes were made, as yet."""
        return self.begin + self._size + sum(map(len, self.loose))

    def read(self, at: int) -> bytes:
        """Return what there is, and is not loose, from byte at on: READ_SIZE bytes, if there are so many."""
        first = bisect.bisect_right(self._places, at) - 1
        if first < 0:
            return b""
        begin = at - self._places[first]
        data = self._blocks[first][begin : begin + READ_SIZE]
        if len(data) < READ_SIZE:
            data = b"".join([data, *self._blocks[first + 1 : first + 1 + READ_SIZE // self._BLOCK_SIZE]])[:READ_SIZE]
        return data

    def place_behind(self, line: bytes) -> int:
        """Return the place behind the event that has this line; -1: there is none, or not any more."""
        for place, block in zip(self._places, self._blocks):
            mark = block.find(line)
            if mark >= 0:
                return place + block.find(b"\n\n", mark) + 2
        return -1

    def forget(self, size: int) -> None:
        self.begin += size
        self._size -= size
        gone = bisect.bisect_right(self._places, self.begin) - 1
        if gone >= 0:
            del self._blocks[:gone], self._places[:gone]
            self._blocks[0] = self._blocks[0][self.begin - self._places[0] :]
            self._places[0] = self.begin


class Cursor(Record):
    """What of a kept answer one client has not been sent: a record that is shared, from a place in it on."""

    def __init__(self, record: KeptRecord, at: int) -> None:
        self.record, self.at = record, at

    def take(self) -> bytes:
        data = self.record.read(self.at)
        self.at += len(data)
        return data


class Recorder(Viewer):
    """Has what is made of an answer kept, and sent on to those who watch it.

    Mostly these keep up, and what comes next need not be looked for: it is what has come.
    """

    record: KeptRecord
    client: KeptAnswer

    def take(self, data: bytes) -> bool:
        record, kept = self.record, self.client
        self.since = kept.loop.now
        loose, viewers = record.loose, kept.keeping_up
        loose.append(data)
        if len(data) >= READ_SIZE or not viewers:
            self.open()
            kept.send(data)
            viewers = ()
        for viewer in viewers:
            client = viewer.client
            if client.pending or client.lost:
                kept.leave_behind(viewer, len(data))
            else:
                client.send(encode_chunk(data) if viewer.chunked else data)
        if len(data) > MAX_LOOSE_SIZE or len(loose) >= MAX_LOOSE:
            kept.settle()
        return kept.pending

    def more(self) -> None:
        data = self.record.take()
        if data:
            self.take(data)
        if self.state == self.LAST:
            self.state = self.OVER


class Watch:
    """One client's sight of a kept answer, which is to its Exchange what a Stream is to one that has its own."""

    def __init__(self, kept: KeptAnswer, exchange: Asker, start: int, attached: bool) -> None:
        """attached: the answer was there before."""
        self.kept, self.start, self.attached = kept, start, attached
        self.stream = kept.stream
        self.cursor = Cursor(kept.record, start)
        self.viewer: Viewer = Viewer(self.cursor, exchange.client, exchange.begin_stream)
        self.failure: ProxyError | None = None
        self._exchange = exchange
        self._began_at = kept.loop.now

    @property
    def over(self) -> bool:
        return self.viewer.state == Viewer.OVER

    @property
    def answer(self) -> Answer:
        return self.stream.answer

    @property
    def paid(self) -> bool:
        return self.stream.paid

    @property
    def first_text_at(self) -> float | None:
        """When the first text came; None: it has not, or before this client."""
        first = self.stream.first_text_at
        return first if first is not None and first >= self._began_at else None

    @property
    def first_sent_at(self) -> float | None:
        return self.stream.first_sent_at

    def head(self) -> tuple[int, dict[str, str]]:
        """Return the status and the fields of the answer, as those of Stream; its length is that of what is left."""
        status, fields = self.kept.head or self.stream.head()
        if "Content-Length" in fields:
            fields = {**fields, "Content-Length": str(int(fields["Content-Length"]) - self.start)}
        return status, {**fields, "Stream-Id": self.kept.id}

    def advance(self) -> None:
        """Send what there is, as long as the client takes it."""
        kept, viewer, client = self.kept, self.viewer, self.viewer.client
        kept.leave_behind(viewer)
        kept.settle()
        if kept.head and viewer.state == Viewer.SILENT:
            viewer.open()
        while viewer.state == Viewer.OPEN and not (client.pending or client.lost):
            left = kept.record.end - self.cursor.at
            if kept.over and left <= READ_SIZE:
                viewer.last(self.stream.viewer.intact)
            elif left:
                viewer.more()
            else:
                break
        if self.over or (kept.over and viewer.state == Viewer.SILENT):
            self._leave(self.stream.failure)
            return
        if viewer.state == Viewer.OPEN and not (client.pending or client.lost):
            kept.keeping_up = (*kept.keeping_up, viewer)
        kept.make_room()  # it may have waited for this client to come, or to read

    def on_drained(self) -> None:
        self.kept.leave_behind(self.viewer)
        self.kept.settle()
        self.viewer.more()
        self.advance()

    def fail(self, failure: ProxyError) -> None:
        """End for this client alone, so that it can tell that there is more; what is left of an ended answer leaves."""
        if self.stream.viewer.state < Viewer.LAST:
            self.drop(failure)

    def drop(self, failure: ProxyError) -> None:
        """End at once, for this client alone."""
        if not self.over:
            self._leave(failure)

    def on_fault(self, error: Exception) -> None:
        self._exchange.on_fault(error)

    def _leave(self, failure: ProxyError | None) -> None:
        self.failure = failure
        if not self.over:
            self.viewer.cut()
        self.kept.leave(self)
        self._exchange.on_stream_over()


class KeptAnswer:
    """An answer that outlives its clients: the one client of its stream, from whose record they are served.

    The slowest of those who watch may be as far behind as the record is long; then upstream has to wait (back-
    pressure), as it has to where nobody watches.  What all who watch have had is forgotten only to make room, and
    the older half of the record before the other.  Heartbeats are recorded: each client is sent the same bytes.
    """

    def __init__(self, answers: KeptAnswers, id: str, claim: Claim, told: dict[str, object]) -> None:
        """told: what the log says of the request that began it."""
        self.answers, self.id, self.claim, self.told = answers, id, claim, told
        self.loop = answers.hub.loop
        self.over = False
        self.pending = False  # as of a Peer: its stream has to wait
        self.head: tuple[int, dict[str, str]] | None = None  # once it is known
        self.record = KeptRecord()
        self.watches: tuple[Watch, ...] = ()  # which is another when one comes or leaves
        self.keeping_up: tuple[Viewer, ...] = ()  # those of them who have been sent all there is
        self._due = math.inf  # when it has been without a client for too long
        self._alarm = Alarm(self.loop, self._on_alarm)

    stream: Stream
    lost = False

    # To its stream, it is an Asker, and its client.

    @property
    def client(self) -> Taker:
        return self

    def begin_stream(self) -> tuple[bytes, bool]:
        self.head = self.stream.head()
        self.loop.begin(self._advance)  # with the first bytes, mostly; else without
        return b"", False

    def send(self, data: bytes) -> None:
        """Have those who watch look for data, which was recorded last."""
        for viewer in self.keeping_up:
            self.leave_behind(viewer, len(data))
        self.settle()
        self._advance()

    def leave_behind(self, viewer: Viewer, size: int = 0) -> None:
        """Have one who keeps up look for what follows; the last so many bytes it was not sent."""
        if viewer in self.keeping_up:
            self.keeping_up = tuple(other for other in self.keeping_up if other is not viewer)
            assert isinstance(viewer.record, Cursor)
            viewer.record.at = self.record.end - size

    def settle(self) -> None:
        """Count what was recorded last, and see whether there is room for more."""
        self.answers.used += self.record.settle()
        if self._is_full:
            self.make_room(full=True)

    def tell(self, step: str, **facts: object) -> None:
        self.answers.hub.tell(str(self.told["id"]), step, facts)

    def on_fault(self, error: Exception) -> None:
        self.stream.fail(internal_error(error))

    def on_stream_over(self) -> None:
        self.over, self.pending = True, False
        del self.stream.call  # whose body may be larger than the answer
        self.settle()
        self.answers.on_over(self)
        metrics = self.answers.hub.metrics
        metrics.take_notes(self.stream.answer.notes, metrics.client(self.claim.name))
        if not self.watches:
            self._log()
        self._advance()
        if self.head or self.stream.paid or self.stopped:
            self._set_alarm()
        else:
            self.answers.forget(self)  # it has cost nothing, and whoever asks again may have more luck

    # To those who watch.

    @property
    def stopped(self) -> bool:
        return isinstance(self.stream.failure, Stopped)

    @property
    def size(self) -> int:
        """What it takes of the memory for all."""
        return RECORD_COST + len(self.record)

    def watch(self, exchange: Asker, claim: Claim, attached: bool) -> Watch:
        """Have a client be sent what follows the place that it has reached.  Raises RequestError."""
        if self.stopped:
            raise RequestError("This answer was stopped.", 410)
        watch = Watch(self, exchange, self._find(claim), attached)
        self.watches = (*self.watches, watch)
        self._due = math.inf
        self.answers.ended.pop(self.id, None)
        return watch

    def leave(self, watch: Watch) -> None:
        self.leave_behind(watch.viewer)
        self.watches = tuple(other for other in self.watches if other is not watch)
        if not self.watches:
            self._set_alarm()
        self.make_room()

    def has_more(self, claim: Claim) -> bool:
        """Tell whether anything is left for an EventSource, which would ask for ever, and its place is not lost."""
        try:
            at = self._find(claim)
        except RequestError:
            return False
        return not self.over or at < self.record.end

    def stop(self) -> None:
        """End it, as its owner wants: nothing more is paid for."""
        if not self.over:
            self.stream.fail(Stopped("The answer was stopped."))

    def make_room(self, full: bool = False) -> None:
        """Let the stream go on, or wait, as there is room; full: there may be none."""
        if self.over or not (full or self.pending):
            return
        answers = self.answers
        answers.evict(1)
        size = len(self.record)
        if self._is_full and self.watches:
            behind = [watch.cursor.at for watch in self.watches if watch.viewer not in self.keeping_up]
            taken = min(behind, default=self.record.end) - self.record.begin
            excess = max(size - answers.most, answers.used - answers.memory) + 1
            gone = min(taken, max(size // 2, excess))
            self.record.forget(gone)
            size -= gone
            if gone:  # or those that wait for room would all look for it again and again
                answers.release(gone)
        # Who has had all of it is not held up by what others have.
        waited, self.pending = self.pending, self._is_full and bool(size or not self.watches)
        if self.pending and size < answers.most:
            answers.waiting.add(self)
        elif waited and not self.pending:
            answers.waiting.discard(self)
            if self.stream.viewer.state < Viewer.LAST:  # or who is about to end it would end it twice
                self.stream.on_drained()

    @property
    def _is_full(self) -> bool:
        return len(self.record) >= self.answers.most or self.answers.used >= self.answers.memory

    def _advance(self) -> None:
        for watch in self.watches:
            watch.advance()

    def _find(self, claim: Claim) -> int:
        """Return the byte that follows the place which a client has reached."""
        id, count = claim.position() if claim.place else (self.id, 0)
        self.settle()
        at, record = count, self.record
        if self.claim.counts_events and count:
            at = record.place_behind(b"id: %b.%d\n" % (self.id.encode(), count))
        if id != self.id or not record.begin <= at <= record.end:
            raise RequestError("What follows this Last-Event-ID is not there (any more).", 410)
        return at

    def _set_alarm(self) -> None:
        if not self.watches:
            self._due = self.loop.now + self.answers.hub.settings.resume
            self._alarm.by(self._due)
            if self.over:
                self.answers.ended[self.id] = self
                self.answers.release(0)

    def _on_alarm(self) -> None:
        if self.loop.now < self._due:
            if not self.watches:
                self._alarm.by(self._due)
        elif not self.over:
            self.answers.hub.metrics.values["kept_events_total"]["abandoned",] += 1
            self.stream.drop(Aborted("No client came back for the answer.", ending="abandoned"))
        else:
            self.answers.forget(self)

    def close(self) -> None:
        """Be of no more use."""
        self._alarm.close()
        self.answers.waiting.discard(self)
        del self.stream  # which has this, too

    def _log(self) -> None:
        """Say how it ended, where no client's line does."""
        failure = self.stream.failure
        entry = LogEntry(self.told, status=self.head[0] if self.head else 0)
        entry.update(
            ending=failure.ending if failure else "complete", error=failure.logged if failure else None,
            seconds=round(self.loop.clock() - self.stream.began_at, 3),
            upstream=self.answers.hub.upstream.target.address, stream=self.id, **notes_of(self.stream),
        )  # fmt: skip
        self.answers.hub.log.info(entry)


class KeptAnswers:
    """The answers that outlive their clients, by ID, and by owner and key; and the memory that they share."""

    def __init__(self, hub: Hub, on_over: Callable[[str, bool], object], on_gone: Callable[[], object]) -> None:
        """on_over is told of each end, with the owner and whether it was cut: the place in the limits is free.  on_gone
        is told when one is kept no longer.
        """
        self.hub, self.memory = hub, hub.settings.resume_memory
        self.on = hub.settings.resume > 0
        self.most = min(MAX_KEPT_SIZE, self.memory)  # bytes of one
        self.used = 0  # bytes of all
        self.running = 0  # that upstream works for
        self.ended: dict[str, KeptAnswer] = {}  # that nobody watches, the oldest first
        self.waiting: set[KeptAnswer] = set()  # for room
        self._by_id: dict[str, KeptAnswer] = {}
        self._by_key: dict[tuple[str, str], KeptAnswer] = {}
        self._stops: dict[tuple[str, str], float] = {}  # that came before what they stop, and until when they count
        self._on_over, self._on_gone = on_over, on_gone

    def __len__(self) -> int:
        return len(self._by_id)

    def count_into(self, metrics: Metrics) -> None:
        """Say what there is now."""
        for kept in tuple(self._by_id.values()):  # it may make room
            kept.settle()
        alone = sum(not (kept.over or kept.watches) for kept in self._by_id.values())
        states = {"watched": self.running - alone, "alone": alone, "ended": len(self) - self.running}
        for state, number in states.items():
            metrics.values["kept_answers"][state,] = number
        metrics.values["kept_bytes"][()] = self.used

    def find(self, claim: Claim) -> KeptAnswer | None:
        """Return the answer that is claimed; None as well where it is another's."""
        if claim.key:
            return self._by_key.get((claim.owner, claim.key))
        kept = self._by_id.get(claim.id)
        return kept if kept and kept.claim.owner == claim.owner else None

    def keep(self, claim: Claim, call: Call, answer: Answer, told: dict[str, object]) -> KeptAnswer | None:
        """Return a new answer that outlives its clients; None where there is no room.

        Raises RequestError where its stop was here first.
        """
        if self._stops.get((claim.owner, claim.key), 0.0) > self.hub.loop.now:  # and so is each that is sent again
            raise RequestError("This answer was stopped.", 410)
        if not self.evict(RECORD_COST + READ_SIZE):
            return None
        prefix = f"{self.hub.settings.instance}-" if self.hub.settings.instance else ""
        kept = KeptAnswer(self, prefix + os.urandom(16).hex(), claim, told)
        if isinstance(answer, EventAnswer):
            answer.number(kept.id)
        kept.stream = self.hub.stream(call, answer, kept, Recorder(kept.record, kept, kept.begin_stream))
        self._by_id[kept.id] = kept
        if claim.key:
            self._by_key[claim.owner, claim.key] = kept
        self.used += kept.size
        self.running += 1
        return kept

    def stop(self, claim: Claim) -> None:
        """Stop the answer that is claimed; one that is not there, but has a key, may be about to be asked for."""
        kept = self.find(claim)
        if kept and not kept.over:
            self.hub.metrics.values["kept_events_total"]["stopped",] += 1
            kept.stop()
        elif not kept and claim.key:
            self._stops.pop((claim.owner, claim.key), None)
            self._stops[claim.owner, claim.key] = self.hub.loop.now + STOP_TIMEOUT
            if len(self._stops) > MAX_STOPS:
                del self._stops[next(iter(self._stops))]

    def evict(self, size: int) -> bool:
        """Forget ended answers that nobody watches, the oldest first, until size bytes more have room, if they can."""
        while self.used + size > self.memory and self.ended:
            self.forget(next(iter(self.ended.values())))
        return self.used + size <= self.memory

    def forget(self, kept: KeptAnswer) -> None:
        if self._by_id.pop(kept.id, None):
            self.ended.pop(kept.id, None)
            if kept.claim.key:
                del self._by_key[kept.claim.owner, kept.claim.key]
            kept.close()
            self.release(kept.size)
            self._on_gone()

    def release(self, size: int) -> None:
        """Give back so many bytes, or what can be forgotten now, to those that wait for room."""
        self.used -= size
        waiting, self.waiting = self.waiting, set()  # where those come back that still have none
        for kept in waiting:
            self.hub.loop.begin(kept.make_room)

    def on_over(self, kept: KeptAnswer) -> None:
        self.running -= 1
        self._on_over(kept.claim.owner, isinstance(kept.stream.failure, Aborted))
        self.waiting.discard(kept)

    def abort(self, failure: ProxyError) -> None:
        """End all that are under way, truthfully."""
        for kept in tuple(self._by_id.values()):
            if not kept.over:
                kept.stream.fail(failure)

    def close(self) -> None:
        for kept in tuple(self._by_id.values()):
            kept.stream.drop(shutting_down())
            self.forget(kept)


# 26 ------------------------------------------------------------------ Demo upstream

DEMO_PAUSE = 0.05  # seconds between two words: a human pace
DEMO_ANSWER = (
    "You asked: \u201c{prompt}\u201d\n\nNo model has read it. This is streamproxy\u2019s built-in upstream,"
    " which sends your words back over real HTTP, one event a word: Gr\u00fc\u00dfe, \u4f60\u597d,"
    " \u0928\u092e\u0938\u094d\u0924\u0947, \U0001f44b\U0001f3fd. Set OPENAI_API_KEY and leave out --demo"
    " to ask a real one.\n"
)


class DemoHandler(http.server.BaseHTTPRequestHandler):
    """A chat-completions API that echoes what it was asked, word by word."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        models = [{"id": DEFAULT_MODEL, "object": "model", "created": 0, "owned_by": "streamproxy"}]
        self._answer({"object": "list", "data": models})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.path.endswith("/chat/completions"):
            self._refuse(404, "The built-in API has chat completions alone.")
            return
        try:
            prompt = words_in(asked["messages"][-1]["content"])
        except (LookupError, TypeError):
            self._refuse(400, "The last of the messages has no content.")
            return
        words = re.findall(r"\s*\S+\s*", DEMO_ANSWER.replace("{prompt}", prompt))
        usage = {"prompt_tokens": len(prompt.split()), "completion_tokens": len(words)}
        usage["total_tokens"] = sum(usage.values())
        if not asked.get("stream"):
            message = {"role": "assistant", "content": "".join(words)}
            choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
            self._answer({"id": "chatcmpl-demo", "object": "chat.completion", "choices": choices, "usage": usage})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        with contextlib.suppress(OSError):  # the proxy leaves when its client does
            self._send([{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
            for word in words:
                time.sleep(DEMO_PAUSE)
                self._send([{"index": 0, "delta": {"content": word}, "finish_reason": None}])
            self._send([{"index": 0, "delta": {}, "finish_reason": "stop"}])
            self._send([], usage=usage)
            self.wfile.write(encode_chunk(encode_event("[DONE]")) + LAST_CHUNK)

    def _send(self, choices: Sequence[object], **more: object) -> None:
        payload = {"id": "chatcmpl-demo", "object": "chat.completion.chunk", "choices": choices, **more}
        self.wfile.write(encode_chunk(encode_event(json.dumps(payload))))

    def _refuse(self, status: int, words: str) -> None:
        self._answer(json.loads(encode_error(RequestError(words, status), "/v1/")), status)

    def _answer(self, payload: object, status: int = 200) -> None:
        body = json.dumps(payload).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


class _DemoServer(socketserver.ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = BACKLOG


@contextlib.contextmanager
def demo_upstream(settings: Settings) -> Iterator[Settings]:
    """Run the built-in upstream where settings ask for it; give the settings that lead there."""
    if not settings.demo:
        yield settings
        return
    with _DemoServer(("127.0.0.1", 0), DemoHandler) as server:
        threading.Thread(target=server.serve_forever, args=(0.1,), name="demo", daemon=True).start()
        try:
            yield settings.replace(upstream=f"http://127.0.0.1:{server.server_address[1]}/v1")
        finally:
            server.shutdown()


# 27 ------------------------------------------------------------------ Server


class Lookout(Stateful):
    """Has a thread look at a file, if there is one, before what it says counts, so that a change counts at once.

    Where the look hangs, as on a network's file system, the last version counts, and nobody waits.
    """

    IDLE, LOOKING, HANGING = range(3)

    def __init__(self, file: WatchedFile | None, hub: Hub) -> None:
        self.state = self.IDLE
        self.file, self._hub = file, hub
        self._waiting: list[Callable[[], object]] = []  # for a look that begins after they asked
        self._looking: list[Callable[[], object]] = []  # for the one that is under way
        self._since = 0.0  # when the look under way began
        self._alarm = Alarm(hub.loop, self._on_alarm)

    @property
    def trouble(self) -> str:
        """Why the file cannot be looked at now; "" where it can."""
        if self.state != self.HANGING or not self.file:
            return ""
        return f"the {self.file.name} cannot be looked at, its last version counts: it takes too long"

    def look(self, then: Callable[[], object]) -> None:
        """Call then once the file was looked at."""
        if self.state == self.HANGING or not self.file:
            then()
            return
        self._waiting.append(then)
        if self.state == self.IDLE:
            self._begin()

    def close(self) -> None:
        self._waiting.clear()  # or the look under way would begin another
        self._alarm.close()

    def _begin(self) -> None:
        self._looking, self._waiting = self._waiting, []
        self.state, self._since = self.LOOKING, self._hub.loop.now
        self._alarm.by(self._since + LOOK_TIMEOUT)
        self._hub.workers.run(self._look)

    def _look(self) -> None:
        """In a thread that may wait."""
        assert self.file
        try:
            with held_up():
                complaints = self.file.look()
            for complaint in complaints:
                self._hub.log.error(complaint)
        finally:
            self._hub.loop.post(self._on_looked)

    def _on_looked(self) -> None:
        self.state = self.IDLE
        self._release(self._looking)
        if self._waiting:
            self._begin()

    def _release(self, asked: list[Callable[[], object]]) -> None:
        for then in asked:
            self._hub.loop.begin(then)  # each on its own: a fault in one is none in another
        asked.clear()

    def _on_alarm(self) -> None:
        if self.state != self.LOOKING:
            return
        if self._since + LOOK_TIMEOUT > self._hub.loop.now:
            self._alarm.by(self._since + LOOK_TIMEOUT)
            return
        self.state = self.HANGING
        self._hub.log.error(self.trouble)
        self._release(self._looking)
        self._release(self._waiting)


class OwnPage(WatchedFile):
    """A page of the operator's own, in a file.  What it may load it says itself: it gets no policy."""

    def __init__(self, path: str) -> None:
        """Raises SettingsError where the file cannot be used."""
        super().__init__(path, "page", MAX_PAGE_SIZE)
        self.html = b""
        self.begin()

    def _begin(self, data: bytes) -> None:
        if not data.strip():
            raise ValueError("it is empty")  # as while an editor writes it anew
        self.html = data

    def _take(self, data: bytes) -> list[str]:
        self._begin(data)
        return []


class FrontPage:
    """What a browser gets at /: the chat page, or one of the operator's own."""

    def __init__(self, settings: Settings, hub: Hub) -> None:
        """Raises SettingsError for a page of one's own that cannot be used."""
        self._own = OwnPage(settings.page) if settings.page else None
        self._chat = b"" if self._own else chat_page(settings)
        self.lookout = Lookout(self._own, hub)
        self.close = self.lookout.close

    @property
    def shown(self) -> tuple[bytes, Mapping[str, str]]:
        """The page and its fields, as of the last look of lookout."""
        if self._own:
            return self._own.html, {"Content-Type": "text/html; charset=utf-8"}
        return self._chat, PAGE_FIELDS


class Listener:
    """The socket that clients connect to: bound here, or handed over by who goes on to hold it, as systemd does.

    A connection is made by the system, and waits to be accepted: one that waits when its listening socket is closed is
    reset, which a proxy cannot tell from a request that was read.  So none is made any more before that.
    """

    def __init__(self, address: str, reuse_port: bool = False, given: socket.socket | None = None) -> None:
        """given listens, at address.  Raises SettingsError, and OSError where that, its filename, cannot be bound."""
        self.path, self._host, port = parse_address(address)
        self.is_ours = not given
        self._file = (0, 0)  # device and inode of the path that was bound
        self.is_open = True
        if reuse_port and (self.path or not hasattr(socket, "SO_REUSEPORT")):
            raise SettingsError(f"{Settings.called('reuse_port')}: it is for HOST:PORT, on Linux, BSD and macOS")
        with contextlib.ExitStack() as stack:
            try:
                self.sock = given or self._open(port)
                stack.callback(self.sock.close)
                if not self.path:  # what it accepts inherits these
                    tune(self.sock)
                    if hasattr(socket, "TCP_NOTSENT_LOWAT"):
                        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, MAX_UNSENT)
                if self.is_ours:
                    self._bind(port, reuse_port)
            except OSError as error:
                error.filename = address
                raise
            self.sock.setblocking(False)
            stack.pop_all()

    def _open(self, port: int) -> socket.socket:
        if self.path:
            return socket.socket(socket.AF_UNIX)
        return socket.socket(socket.getaddrinfo(self._host, port, 0, socket.SOCK_STREAM)[0][0])

    def _bind(self, port: int, reuse_port: bool) -> None:
        if self.path:
            _remove_stale_socket(self.path)
            try:
                self.sock.bind(self.path)
            except OSError as error:
                if error.errno:
                    raise
                raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG)) from None  # Python's has no number
            self._file = _file_at(self.path)
            os.chmod(self.path, 0o666)  # as open as a loopback port; the folder's mode can say otherwise
        else:
            # On Windows, SO_REUSEADDR would let anybody have the port as well.
            name = "SO_REUSEADDR" if os.name == "posix" else "SO_EXCLUSIVEADDRUSE"
            for option in (name, *(["SO_REUSEPORT"] if reuse_port else [])):
                if hasattr(socket, option):
                    self.sock.setsockopt(socket.SOL_SOCKET, getattr(socket, option), 1)
            self.sock.bind(socket.getaddrinfo(self._host, port, self.sock.family, socket.SOCK_STREAM)[0][4])
        self.sock.listen(BACKLOG)

    def accept(self) -> tuple[socket.socket, Any]:
        """Return a connection that waits, and whose it is.  Raises BlockingIOError where none does, and OSError."""
        if not self.is_ours:  # whoever has it, too, may have it block: systemd does with each process that it starts
            self.sock.setblocking(False)
        sock, address = self.sock.accept()
        sock.setblocking(False)
        return sock, address

    def shut(self) -> float:
        """Have no connection begin any more; return for how many seconds those that did may still come to be there.

        Whoever connects meanwhile is refused by a unix socket, and goes to another; at a port, Linux does not answer,
        so that it tries once more a second later, when this is closed.
        """
        if not self.is_ours:
            return 0.0  # they are for who has it, too
        with contextlib.suppress(OSError):
            if self.path:
                self.sock.shutdown(socket.SHUT_RD)
            elif sys.platform == "linux":
                code = array.array("Q", _NO_SYN)
                program = struct.pack("HP", len(code), code.buffer_info()[0])
                self.sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)
        return 0.0 if self.path or is_loopback(self._host) else HANDSHAKE_PAUSE

    def close(self) -> None:
        """Listen no more, and remove the path, unless it is a successor's by now."""
        if self.is_open and self.is_ours:
            if self.path and _file_at(self.path) == self._file:
                with contextlib.suppress(OSError):
                    os.unlink(self.path)
            hang_up(self.sock)
        self.sock.close()
        self.is_open = False


# Of asm-generic/socket.h; and a filter of packets (linux/filter.h) that takes all but those that begin a connection: it
# loads TCP's flags, and drops what has SYN without ACK.
_SO_ATTACH_FILTER = 26
_NO_SYN = tuple(
    struct.unpack("Q", struct.pack("HBBI", *step))[0]
    for step in ((0x30, 0, 0, 13), (0x54, 0, 0, 0x12), (0x15, 0, 1, 0x02), (0x06, 0, 0, 0), (0x06, 0, 0, 0xFFFFFFFF))
)


def _file_at(path: str) -> tuple[int, int]:
    """Return device and inode; zeros where there is nothing."""
    try:
        status = os.stat(path)
    except OSError:
        return 0, 0
    return status.st_dev, status.st_ino


def _remove_stale_socket(path: str) -> None:
    """Remove the socket of a process that is gone: nobody answers there.

    Raises BlockingIOError where one has it that does not accept: as many as may wait do.
    """
    with contextlib.suppress(FileNotFoundError), socket.socket(socket.AF_UNIX) as probe:
        if stat.S_ISSOCK(os.stat(path).st_mode):
            probe.setblocking(False)
            code = probe.connect_ex(path)
            if code == errno.ECONNREFUSED:
                os.unlink(path)
            elif code == errno.EAGAIN:
                raise BlockingIOError(code, os.strerror(code))


class Door:
    """Where clients come in: accepts what connects to a listener, until it is shut."""

    def __init__(self, server: Server, listener: Listener, begins: bool) -> None:
        """begins: who comes in here may have answers begun, not only go on with what there is."""
        self.server, self.listener, self.begins = server, listener, begins
        self._loop = server.hub.loop
        self._is_shut = False
        self._again = Alarm(self._loop, self.open)  # once there may be descriptors
        self._end = Alarm(self._loop, self._close)

    def open(self) -> None:
        if self.listener.is_open:
            self._loop.watch(self.listener.sock, READ, self._on_connections)

    def shut(self) -> None:
        """Have no connection begin any more, and close when those that have are there."""
        if self._is_shut:
            return
        self._is_shut = True
        self._again.close()
        self._loop.unwatch(self.listener.sock)
        pause = self.listener.shut()
        if pause:
            self._accept_rest()
            self._end.by(self._loop.now + pause)
        else:
            self._close()

    def _close(self) -> None:
        self._accept_rest()
        self.listener.close()
        self.server.on_left()

    def _accept_rest(self) -> None:
        if self.listener.is_ours:  # else others accept who waits
            for _ in range(BACKLOG):
                if not self._accept():
                    break

    def _on_connections(self, events: int) -> None:
        for _ in range(MAX_BEGINNINGS):
            if not self._accept():
                break

    def _accept(self) -> bool:
        """Accept a connection, if one is there."""
        server = self.server
        try:
            sock, address = self.listener.accept()
        except BlockingIOError:
            return False
        except OSError as error:
            if not self._is_shut:  # no descriptor is left
                server.hub.log.error(f"a connection was not accepted: {reason_of(error)}")
                self._loop.unwatch(self.listener.sock)
                self._again.by(self._loop.now + SHORTAGE_PAUSE)
            return False
        if len(server.clients) < server.max_clients + MAX_SURPLUS:
            Client(sock, address, self)
        else:
            server.hub.log.error("a connection was closed: there are too many")
            server.hub.metrics.values["refusals_total"]["connections",] += 1
            sock.close()
        return True


class Shutdown:
    """What stop() waits for, in its own thread, while the loop's thread and whoever gives signals tell what is new."""

    def __init__(self, is_over: Callable[[], bool]) -> None:
        self.ended = self.cut = 0  # streams, since it began
        self._is_over = is_over
        self._hurried = False
        self._changed = threading.Condition()

    def wait(self, timeout: float, tell: Callable[[], object]) -> bool:
        """Wait up to timeout seconds for what is_over says, unless hurried; return that.

        tell is called now, and every TELL_INTERVAL seconds.
        """
        ends_at = time.monotonic() + timeout
        while True:
            left = ends_at - time.monotonic()
            if left > 0:
                tell()
            with self._changed:
                pause = min(left, TELL_INTERVAL)
                if self._changed.wait_for(lambda: self._hurried or self._is_over(), pause) or left <= 0:
                    return self._is_over()

    def notify(self) -> None:
        """Have it seen whether it is over.  For any thread."""
        with self._changed:
            self._changed.notify_all()

    def hurry(self, hurried: bool = True) -> None:
        """Wait no longer, or again.  For any thread."""
        self._hurried = hurried
        self.notify()

    def count(self, cut: bool) -> None:
        """Take the end of a stream."""
        self.cut += cut
        self.ended += not cut
        self.notify()

    def __str__(self) -> str:
        return f"shut down: {self.ended} stream{'s' * (self.ended != 1)} ended, {self.cut} cut off"


class Server(http.server.ThreadingHTTPServer):
    """The proxy: bound once made, serving from start() to stop(), or within a with block.

    Its requests are taken by the loop; its threads are the workers.  SERVING -> LEAVING (goes on, but says that it
    does not) -> DRAINING (takes no connections, but requests on those that there are; and who comes back, at a
    door of their own, as long as there is an answer to come back for) -> ABORTING -> STOPPED.
    """

    daemon_threads = True

    SERVING, LEAVING, DRAINING, ABORTING, STOPPED = range(5)

    def __init__(self, settings: Settings, given: socket.socket | None = None) -> None:
        """given: a socket that listens at settings.bind, and stays as it is.

        Raises SettingsError, and OSError where the address cannot be bound.
        """
        super().__init__(("", 0), Client, bind_and_activate=False)  # type: ignore[arg-type]
        self.socket.close()  # which listens nowhere
        self.state = self.SERVING
        self.clients: set[Client] = set()
        self.limits = Limits(settings)
        self._shutdown = Shutdown(self._is_empty)
        with contextlib.ExitStack() as stack:
            self.settings = stack.enter_context(demo_upstream(settings))
            self.access = Access(settings)
            self.hub = Hub(self.settings, self._start_thread)
            stack.callback(self.hub.close)
            self.answers = KeptAnswers(self.hub, self.on_stream_over, self.on_left)
            self.lookout = Lookout(self.access.file, self.hub)
            self.front = FrontPage(self.settings, self.hub)
            self.doors: list[Door] = []  # the last is the one for who comes back, if there is one
            if settings.resume_bind:  # first: whatever is begun can be come back for
                self.doors.append(Door(self, Listener(settings.resume_bind), begins=False))
                stack.callback(self.doors[0].listener.close)
            self.listener = Listener(settings.bind, settings.reuse_port, given)
            self.doors.insert(0, Door(self, self.listener, begins=True))
            self.socket, self.server_address = self.listener.sock, self.listener.sock.getsockname()
            self._resources = stack.pop_all()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """Where the server can be reached, with the port that was bound; unix:PATH for a socket."""
        if self.listener.path:
            return f"unix:{self.listener.path}"
        return f"http://{join_address(parse_address(self.settings.bind)[1], self.server_address[1])}"

    @property
    def max_clients(self) -> int:
        """How many connections are answered at a time; beyond these, some are told that there are too many."""
        streams = self.settings.max_streams
        return 2 * streams + SPARE_CONNECTIONS if streams else sys.maxsize

    @property
    def draining(self) -> bool:
        """Whether requests are not welcome any more."""
        return self.state != self.SERVING

    def snapshot(self) -> dict[str, int]:
        """Return how much there is of what a server should not have too much of.  For any thread."""
        return {
            "connections": len(self.clients),
            "streams": self.limits.total,
            "threads": len(self.hub.workers),
            "warm connections": len(self.hub.pool),
        }

    def start(self) -> None:
        """Serve, in threads of its own.  Raises RuntimeError for one that was stopped."""
        if self.draining:
            raise RuntimeError("a server that was stopped does not serve again")
        for door in self.doors:
            door.open()
        self.hub.log.start()
        self.hub.loop.start()

    def stop(self, tell: Callable[[str], object] = lambda words: None) -> None:
        """Take connections for leave_delay seconds more, and then none; let what is open end for up to drain_timeout
        seconds, abort the rest, close.

        tell takes words for what is waited for, every few seconds.  A second call does nothing.
        """
        if self.draining:
            return
        self.state = self.LEAVING
        loop = self.hub.loop
        if not loop.started:
            self.server_close()
            return
        loop.post(self._say_goodbye)
        wait = functools.partial(self._shutdown.wait, tell=lambda: tell(self._waited_for()))
        try:
            wait(self.settings.leave_delay)
            self.state = self.DRAINING
            loop.post(self._drain)
            if not wait(self.settings.drain_timeout):
                self._shutdown.hurry(False)
                loop.post(self._abort)
                wait(ABORT_GRACE)
        except BaseException:  # as of Ctrl-C, in a program that goes on: this is not called twice
            loop.post(self._abort)
            raise
        finally:
            for last in (self._close_clients, self.lookout.close, self.front.close, self._say_what_ended):
                loop.post(last)
            self.server_close()

    def abort(self) -> None:
        """Have stop() wait no longer.  For any thread."""
        self._shutdown.hurry()

    def reload(self) -> None:
        """Have the token file looked at, and said what came of it.  For any thread."""
        self.hub.loop.post(functools.partial(self.lookout.look, self._say_tokens))

    def _is_empty(self) -> bool:
        """Tell whether nobody is connected or can connect any more, and no answer goes on without its client."""
        return not (self.clients or self.answers.running or any(door.listener.is_open for door in self.doors))

    def _waited_for(self) -> str:
        streams, others, kept = self.limits.total, len(self.clients), len(self.answers) - self.answers.running
        words = f"waiting for {streams} stream{'s' * (streams != 1)}, {others} connection{'s' * (others != 1)} in all"
        return words + f", {kept} kept answer{'s' * (kept != 1)}" * (kept > 0 and self.doors[-1].listener.is_open)

    # The rest is called by the loop, or of socketserver.

    def on_stream_over(self, place: str, cut: bool) -> None:
        """Take the end of a stream, which gives its place back."""
        self.limits.leave(place)
        if self.draining:
            self._shutdown.count(cut)

    def on_closed(self, client: Client) -> None:
        """Take the end of a connection."""
        self.clients.discard(client)
        self.on_left()

    def on_left(self) -> None:
        """See what is there still, when a client, a kept answer or a door has gone."""
        if not self.draining:
            return
        begins = self.listener.is_open or any(client.door.begins for client in self.clients)
        if self.state >= self.DRAINING and not (begins or len(self.answers)):
            self.doors[-1].shut()  # there is nothing to come back for, and will be nothing
        self._shutdown.notify()

    def _say_goodbye(self) -> None:
        delay = self.settings.leave_delay
        soon = f" in {delay:g} s (--leave-delay)" if delay else ""
        self.hub.log.info(f"shutting down{soon}: {self._waited_for()}; a second signal ends them at once")

    def _say_what_ended(self) -> None:
        self.hub.log.info(str(self._shutdown))

    def _say_tokens(self) -> None:
        self.hub.log.info(f"looked again, as asked: {self.lookout.trouble or self.access.verdict}")

    def _drain(self) -> None:
        self.doors[0].shut()
        self.hub.tests.abort()
        for client in list(self.clients):
            client.drain()

    def _abort(self) -> None:
        self.state = self.ABORTING
        for door in self.doors:
            door.shut()
        self.answers.abort(shutting_down())
        for client in list(self.clients):
            client.abort(shutting_down())

    def _close_clients(self) -> None:
        for client in list(self.clients):
            client.drop(shutting_down())
        self.answers.close()

    def _start_thread(self, work: Callable[[], None]) -> None:
        self.process_request(work, None)  # type: ignore[arg-type]

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        request()  # see _start_thread

    def server_close(self) -> None:
        for door in self.doors:
            door.listener.close()
        super().server_close()
        self._resources.close()
        self.state = self.STOPPED


# 28 ------------------------------------------------------------------ Library


class _ForLoop(Peer):
    """The loop of a for statement, as a client like any other, but for HTTP."""

    def __init__(self, sock: socket.socket, hub: Hub, call: Call) -> None:
        super().__init__(sock, hub.loop)
        self.client = self
        self.stream = hub.stream(call, TextAnswer(hub.redact), self)

    def begin_stream(self) -> tuple[bytes, bool]:
        return b"", False

    def tell(self, step: str, **facts: object) -> None:
        self.stream.hub.tell("", step, facts)

    def on_stream_over(self) -> None:
        self.close()

    def on_drained(self) -> None:
        self.stream.on_drained()

    def on_lost(self) -> None:
        self.stream.drop(Disconnected("The answer was left before its end."))

    def on_fault(self, error: Exception) -> None:
        self.stream.drop(internal_error(error))


class TextStream:
    """The text of an answer, piece by piece as it arrives: what stream_text returns.

    Once the loop has ended, finish_reason and usage are what upstream said of the answer; None where it did not.
    """

    def __init__(self, asked: Mapping[str, Any], settings: Settings) -> None:
        """Ask for it.  Raises RequestError."""
        self.finish_reason: str | None = None
        self.usage: dict[str, Any] | None = None
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._reading = threading.RLock()
        with contextlib.ExitStack() as stack:
            settings = stack.enter_context(demo_upstream(settings))
            call = prompt_call(Adapted(asked, settings, Refusals()))
            hub = Hub(settings)
            self._reader, sock = socket.socketpair()
            stack.callback(_close_unread, self._reader, self._reading)
            stack.callback(hub.close)
            sock.setblocking(False)
            client = _ForLoop(sock, hub, call)
            stack.callback(hub.loop.post, client.on_lost)
            hub.loop.post(client.stream.ask)
            hub.loop.start()
            self._stream: Stream | None = client.stream
            self._close = weakref.finalize(self, _close_apart, hub, stack.pop_all().close)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        with self._reading, contextlib.suppress(OSError):  # it was closed meanwhile
            for data in iter(functools.partial(self._reader.recv, READ_SIZE), b""):
                text = self._decoder.decode(data)
                if text:  # and not only a part of a character
                    return text
        self.close()
        stream, self._stream = self._stream, None
        if stream:
            self.finish_reason, self.usage = stream.answer.notes.finish_reason, stream.answer.notes.usage
            if stream.failure:
                raise stream.failure
        raise StopIteration

    def close(self) -> None:
        """Close the connection to upstream, and end a loop that waits for text with ProxyError.  For any thread."""
        self._close()


def _close_apart(hub: Hub, close: Callable[[], None]) -> None:
    """Close; but where a thread of hub's own collects a cycle, have another do so: none can wait for its own end."""
    if hub.has_this_thread:
        start_thread(close)
    else:
        close()


def _close_unread(reader: socket.socket, reading: threading.RLock) -> None:
    """Close reader, once nobody waits for it any more: its descriptor may be another's then."""
    with reading:
        reader.close()


def stream_text(asked: str | Iterable[Mapping[str, Any]], settings: Settings) -> TextStream:
    """Return the text of the answer to a prompt, or to messages ({"role": ..., "content": ...}), with no server.

    It is asked for at once.  Leaving the loop closes the connection to upstream, as close does.  Raises RequestError
    here for what cannot be asked, and ProxyError in the loop, after the text that came, where the answer is not
    complete: str(error) is a sentence, error.status the status that a server of ours would answer with.
    """
    return TextStream({"prompt": asked} if isinstance(asked, str) else {"messages": list(asked)}, settings)


# 29 ------------------------------------------------------------------ Check

TEST_EVENTS, TEST_PACE = 10, 0.1  # of the streams by which the forms are judged: how many, and how many seconds apart
CHECK_TIMEOUT = 20.0  # of a test stream, in seconds, beyond what it should take
COUNT_TIMEOUT = 5.0  # in seconds, of the question how many there are
BLOCK_EVENTS, BLOCK_SIZE = 256, 512  # of the one that measures in which blocks text comes: 128 KiB
MAX_REDIRECTS = 5
MAX_TEST_REPLY = 2 * MAX_TEST_SIZE  # in bytes, of the body that comes of one, with what frames its events
LEAVE_LOOKS = 10  # at most, whether a stream goes on, before its client leaves, and then

# Fields by which hops can be told: what they leave, a part of its value, and who leaves that; the outermost first.
HOPS = (
    ("cf-ray", "", "Cloudflare"), ("server", "cloudflare", "Cloudflare"), ("server", "cloudfront", "CloudFront"),
    ("x-amz-cf-id", "", "CloudFront"), ("x-azure-ref", "", "Azure Front Door"),
    ("x-served-by", "cache-", "Fastly"), ("via", "1.1 google", "Google Cloud"), ("server", "awselb", "AWS ALB"),
    ("apigw-requestid", "", "API Gateway"), ("x-amz-apigw-id", "", "API Gateway"),
    ("server", "microsoft-azure-application-gateway", "Azure Application Gateway"),
    ("request-context", "appid=", "Azure API Management"), ("x-varnish", "", "Varnish"), ("via", "varnish", "Varnish"),
    ("via", "squid", "Squid"), ("server", "envoy", "Envoy"), ("x-envoy-upstream-service-time", "", "Envoy"),
    ("x-powered-by", "next.js", "Next.js"), ("x-powered-by", "express", "Express"), ("x-powered-by", "arr", "IIS"),
    ("server", "caddy", "Caddy"),  # which adds its own; nginx, behind it then, would have left none
    ("server", "microsoft-iis", "IIS"), ("server", "nginx", "nginx"), ("server", "openresty", "nginx"),
    ("server", "apache", "Apache"), ("via", "caddy", "Caddy"),
    ("server", "lighttpd", "lighttpd"),
    ("issuer", "kaspersky", "antivirus"), ("issuer", "avast", "antivirus"), ("issuer", "eset ssl", "antivirus"),
    ("issuer", "bitdefender", "antivirus"), ("issuer", "zscaler", "antivirus"),
)  # fmt: skip

# What can be found.
PIECES, BEHIND, BURSTS, HELD, CUT = "piece by piece", "always one behind", "in bursts", "held back", "cut off"
TEXT_HELD, GET_HELD, COMPRESSED, CACHED = "text held", "GET held", "compressed", "cached"
NO_PINGS, IDLE, WHOLE, ENDLESS, STAYS = "no pings", "silence", "cut as whole", "never ends", "goes on"
REFUSED, GUARDED, ABSENT, UNREACHED = "refused", "guarded", "not streamproxy", "not reached"
UNSERVED, SILENT, HTTP10 = "out of reach", "no answer", "HTTP/1.0"
UNSEEN = "not seen: what was asked for did not come"

# What to change, by who was met and what was found: where, and what.  "" is whoever leaves no trace.
CURES = {
    "Cloudflare": ("In Cloudflare", {
        TEXT_HELD: "a tunnel passes only event streams at once: ask with Accept: text/event-stream.",
        GET_HELD: "a quick tunnel holds what is asked for by GET: ask with POST, or give the tunnel a name.",
        HELD: "turn off what rewrites answers of this address (Rocket Loader, Email Obfuscation), and caching.",
        CACHED: "set a cache rule that bypasses the cache for this address.",
        IDLE: "silence may last for 100 to 125 s: ask with Accept: text/event-stream, which has pings.",
    }),
    "CloudFront": ("In CloudFront's behavior of this path", {
        CACHED: "set the cache policy CachingDisabled.",
        COMPRESSED: "turn `Compress objects automatically` off.",
        IDLE: "raise the origin's response timeout (30 s), or ask for event streams, which have pings.",
    }),
    "Azure Front Door": ("In Front Door's route", {COMPRESSED: "turn compression off.", CACHED: "turn caching off."}),
    "Fastly": ("In Fastly's VCL", {
        HELD: "`set beresp.do_stream = true;` in vcl_fetch, and `return (pass);` in vcl_recv.",
        CACHED: "`return (pass);` in vcl_recv.",
    }),
    "Google Cloud": ("In the balancer's backend service", {
        COMPRESSED: "set compressionMode to DISABLED.",
        CACHED: "turn Cloud CDN off.",
        IDLE: "raise timeoutSec (30 s), which bounds a whole answer.",
    }),
    "AWS ALB": ("In the balancer's attributes", {IDLE: "raise idle_timeout.timeout_seconds (60 s)."}),
    "API Gateway": ("In API Gateway's integration", {
        HELD: "set the response transfer mode to STREAM; a gateway that has none holds every answer: go around it.",
        IDLE: "raise its timeout (29 s), or go around it.",
    }),
    "Azure Application Gateway": ("In its global configuration", {HELD: "set enableResponseBuffering to false."}),
    "Azure API Management": ("In its policy", {HELD: '`<forward-request buffer-response="false" />`; log no bodies.'}),
    "Varnish": ("In Varnish' VCL", {
        HELD: "`return (pipe);` in vcl_recv for this path, or `set beresp.do_stream = true;` in vcl_backend_response.",
        CACHED: "`return (pass);` in vcl_recv.",
        IDLE: "raise between_bytes_timeout (60 s).",
    }),
    "Squid": ("In squid.conf", {
        HELD: "no adaptation (ICAP, eCAP) of what comes from this address.",
        CACHED: "`cache deny all`.",
    }),
    "Envoy": ("In Envoy's route", {
        HELD: "take the buffer and compressor filters off.",
        IDLE: "`timeout: 0s`, and stream_idle_timeout (300 s) above the longest silence of the model.",
    }),
    "Next.js": ("In next.config.js", {
        HELD: "`compress: false`; where rewrites still hold text, let the page ask streamproxy itself.",
    }),
    "Express": ("In webpack's devServer, or the compression middleware", {
        HELD: "`compress: false`, or a filter.",
        STAYS: "nothing helps: let the page ask streamproxy itself, with --allow-origin.",
    }),
    "IIS": ("In IIS' ARR", {
        HELD: "set the response buffer threshold (responseBufferLimit) to 0, and turn dynamic compression off.",
        IDLE: "raise the proxy's time-out (120 s).",
    }),
    "nginx": ("In nginx' location", {
        HELD: "`proxy_buffering off;`, or take X-Accel-Buffering out of proxy_ignore_headers.",
        COMPRESSED: "`gzip off;`, and `proxy_buffering off;`.",
        CACHED: "`proxy_cache off;`, or take Cache-Control out of proxy_ignore_headers.",
        WHOLE: "`proxy_http_version 1.1;`: in HTTP/1.0 an answer that is cut can look whole. If it is there,"
               " somebody behind nginx ends it so, as Caddy does: ask from there.",
        HTTP10: "`proxy_http_version 1.1;`, and `proxy_set_header Connection \"\";`.",
        IDLE: "`proxy_read_timeout 130s;`: more than the longest silence of the model.",
        STAYS: "`proxy_ignore_client_abort off;`, and `proxy_buffering off;`.",
    }),
    "Apache": ("In Apache's VirtualHost", {
        HELD: "flushpackets=on in ProxyPass (mod_proxy_fcgi: in `<Proxy>`), and `SetEnv no-gzip 1`.",
        COMPRESSED: "`SetEnv no-gzip 1`, for mod_deflate.",
        CACHED: "`CacheDisable /`.",
        IDLE: "`ProxyTimeout 130`.",
    }),
    "Caddy": ("In the Caddyfile", {
        HELD: "`flush_interval -1` in reverse_proxy, and no response_buffers (once buffer_responses).",
        COMPRESSED: "take `encode` off this path.",
        WHOLE: "nothing helps: ask for event streams, whose `event: error` tells of a cut.",
    }),
    "lighttpd": ("In lighttpd.conf", {
        kind: "`server.stream-response-body = 2`: by itself it collects an answer, and passes it on as whole."
        for kind in (HELD, WHOLE, STAYS)
    }),
    "antivirus": ("In the antivirus or gateway that opens TLS", {HELD: "exempt this address."}),
    "": ("", {
        HELD: "Somebody collects the answer who leaves no trace, like a development proxy (Vite), a Lambda behind a"
              " balancer, a scanner of TLS: ask from nearer to the server, until it passes.",
        BEHIND: "Somebody sends a piece only with the next, as what reads one ahead: ask from nearer to the server.",
        BURSTS: "Somebody waits for more before it sends (in HAProxy's defaults: `option http-no-delay`), or the"
                " network is slow or uneven: ask from elsewhere, too.",
        TEXT_HELD: "Only event streams pass at once: ask with Accept: text/event-stream.",
        GET_HELD: "What is asked for by GET is held: ask with POST.",
        COMPRESSED: "Somebody compresses, and holds text back for that: turn it off for this address.",
        CACHED: "Somebody answers from a cache: turn it off for this address.",
        CUT: "Somebody ends answers early: see whose log tells of this request, and its time-outs.",
        REFUSED: "Somebody refuses test streams: see whose log has this status, and its limits; streamproxy's own are"
                 f" {TEST_STREAMS['requests_per_minute']} a minute, {TEST_STREAMS['max_streams_per_client']} at a"
                 " time.",
        GUARDED: "Give a token in STREAMPROXY_CHECK_TOKEN, or a file of it in STREAMPROXY_CHECK_TOKEN_FILE, and say in"
                 " --auth-header how it is sent, if not as `Authorization: Bearer {key}`.",
        ABSENT: "Give the address below which streamproxy is, and have /healthz/stream passed on to it.",
        UNSERVED: "Whoever answers does not reach streamproxy: does it run, and may they write to its socket? Their log"
                  " says why.",
        UNREACHED: "See that name, port and certificate (--ca-file) are right, and that something listens.",
        SILENT: "Something listens there: see that it is streamproxy or a proxy before it, that it does not hang, and"
                " whether it is http:// or https://.",
        NO_PINGS: "Somebody drops the comments of event streams: a silence looks dead then (see --check-idle).",
        IDLE: "Somebody ends silent answers: after 30 s Google's balancer, 60 s AWS' or nginx (`proxy_read_timeout"
              " 130s;`), else maybe HAProxy (`timeout server 130s`).",
        WHOLE: "Somebody ends an answer as whole that was cut: have it speak HTTP/1.1 to streamproxy, unbuffered.",
        ENDLESS: "Somebody goes on waiting where an answer broke off, as development proxies do (Vite, webpack): ask"
                 " with Accept: text/event-stream, whose `event: error` tells of it.",
        STAYS: "Somebody reads on when the client has left, and the model is paid for: turn buffering off there.",
        HTTP10: "Somebody asks in HTTP/1.0, each time on a new connection: have it speak HTTP/1.1.",
    }),
}  # fmt: skip


def hops_in(fields: Mapping[str, str]) -> list[str]:
    """Return who is met on the way, as fields of an answer's head tell it, the outermost first."""
    met = [(name, hop) for name, part, hop in HOPS if name in fields and part in fields[name].lower()]
    other = re.match("[A-Za-z0-9._-]{1,40}", fields.get("server", ""))
    if other and "server" not in dict(met):
        met.append(("server", other[0]))
    return list(dict.fromkeys(hop for _, hop in met))


def cure_of(hops: Sequence[str], found: str) -> str:
    """Return what to change where: at the outermost hop of which that is known."""
    kinds = (found, HELD) if found in (BEHIND, BURSTS, TEXT_HELD, GET_HELD, COMPRESSED) else (found,)
    known = [(hop, kind) for hop in hops for kind in kinds if hop in CURES and kind in CURES[hop][1]]
    hop, kind = known[0] if known else ("", found)
    place, cures = CURES[hop]
    cure = f"{place}, {cures[kind]}" if place else cures[kind]
    return f"{cure} If it is so already: {CURES[''][1][BURSTS]}" if found == BURSTS and hop else cure


class Reply:
    """What came of a test stream."""

    def __init__(self) -> None:
        self.status = 0
        self.fields: dict[str, str] = {}
        self.pieces: list[tuple[float, bytes]] = []  # of the body, and when each came: seconds since it was asked for
        self.ended_at = 0.0
        self.whole = False  # it ended as a body does that is whole
        self.error = ""  # why it did not
        self.reached = False  # somebody has taken the connection

    @property
    def body(self) -> bytes:
        return b"".join([piece for _, piece in self.pieces])


_TEST_EVENT = re.compile(rb"[0-9]{1,4} ([0-9]{1,7}) (1\.[01]) [0-9a-f]{0,16384};")  # bounded: others may answer

_OUR_ERROR = re.compile(rb'\{"error": "([ !#-\[\]-~]{1,200})"\}\n')


class TestEvent:
    """An event of a test stream: after how many seconds it left, and came."""

    def __init__(self, match: re.Match[bytes], at: float) -> None:
        self.left, self.http, self.at = int(match[1]) / 1000, match[2].decode(), at


def events_in(reply: Reply) -> list[TestEvent]:
    """Return the events that came whole."""
    seen = b""
    events: list[TestEvent] = []
    for at, piece in reply.pieces:
        seen += piece
        matches = list(_TEST_EVENT.finditer(seen))
        events += [TestEvent(match, at) for match in matches]
        seen = seen[matches[-1].end() :] if matches else seen[-2 * _TEST_LIMITS["size"][1] :]
    return events


def judge(reply: Reply, count: int, pace: float) -> str:
    """Return what became on the way of a stream of so many events, so many seconds apart.

    Clocks differ, and so does the distance: what counts is by how much later than the quickest an event came, of which
    the end is one, since nobody can hold that back.
    """
    events = events_in(reply)
    if len(events) < count or not reply.whole:
        return CUT
    lags = [event.at - event.left for event in events]
    quickest = min(*lags, reply.ended_at - count * pace)
    late = [lag - quickest for lag in lags if lag - quickest > pace / 2]
    if len(late) < 0.4 * count:
        return PIECES
    if sum(reply.ended_at - event.at < pace / 2 for event in events) >= 0.8 * count:
        return HELD
    return BEHIND if sum(lag < 1.5 * pace for lag in late) >= 0.7 * count else BURSTS


def block_size(reply: Reply, pace: float) -> int:
    """Return how many bytes came at a time, but for the rest; 0: all of them.  Some may have met on the way."""
    sizes, last_at = [0], -math.inf
    for at, piece in reply.pieces:
        if at - last_at > pace / 2 and sizes[-1]:
            sizes.append(0)
        sizes[-1] += len(piece)
        last_at = at
    last = sum(len(piece) for at, piece in reply.pieces if at > 0.9 * reply.ended_at)
    return sorted(sizes[:-1])[len(sizes) // 4] if len(sizes) > 1 and last < 0.8 * len(reply.body) else 0


class Form:
    """A way to ask for a test stream."""

    def __init__(self, method: str, sse: bool = False, packed: bool = False) -> None:
        """packed: as browsers do, it allows to compress."""
        self.method, self.sse, self.packed = method, sse, packed

    def __str__(self) -> str:
        return f"{self.method} {'events' if self.sse else 'text'}{', gzip allowed' if self.packed else ''}"


PLAIN = Form("POST")
FORMS = [Form(method, sse, packed) for method in ("POST", "GET") for sse in (False, True) for packed in (False, True)]


class Look:
    """What was seen of one thing."""

    def __init__(self, name: str, words: str, found: str = "", form: Form | None = None, coding: str = "") -> None:
        """found: what is wrong, of CURES.  form: by which it was asked, where it is one of FORMS."""
        self.name, self.words, self.found, self.form, self.coding = name, words, found, form, coding


def found_in(looks: Iterable[Look]) -> list[str]:
    """Return what is wrong, each once: of the forms, what they have in common; then the rest."""
    others = [look.found for look in looks if look.found and not look.form]
    forms = [look for look in looks if look.form and not (CACHED in others and look.form.method == "GET")]
    good = {(form.method, form.sse) for form in (look.form for look in forms if not look.found) if form}
    found: dict[str, None] = {}
    for kind in dict.fromkeys(look.found for look in forms if look.found):
        of_kind = [(look.form, look.coding) for look in forms if look.form and look.found == kind]
        if all(coding and (form.method, form.sse) in good for form, coding in of_kind):
            kind = COMPRESSED  # since the same passes that is not
        elif kind == HELD and not any(form.sse for form, _ in of_kind) and any(sse for _, sse in good):
            kind = TEXT_HELD
        elif kind == HELD and all(form.method == "GET" for form, _ in of_kind) and "POST" in dict(good):
            kind = GET_HELD
        found[kind] = None
    return list(dict.fromkeys([*found, *others]))


def unseen(name: str, *replies: Reply) -> Look:
    """Return the look of what did not come: somebody has refused it, or who knows."""
    status = next((reply.status for reply in replies if reply.status not in (0, 200)), 0)
    return Look(name, f"refused with status {status}", REFUSED) if status else Look(name, UNSEEN)


class Visitor:
    """Asks for test streams at an address, each on a connection of its own, and waits for none longer than it says."""

    def __init__(self, settings: Settings, url: str) -> None:
        """Raises SettingsError."""
        given = settings.replace(upstream=url, api_key=settings.check_token)
        self._ways = [Upstream(given, coding) for coding in ("identity", "gzip, deflate")]
        self.url, self.has_token = url, bool(settings.check_token)

    @property
    def proxies(self) -> list[str]:
        """Who is on the way because the environment says so."""
        proxy = self._ways[0].target.proxy
        return [f"the environment's proxy {proxy.address}"] if proxy else []

    def ask(self, query: str, form: Form, timeout: float, lifeline: Lifeline | None = None) -> Reply:
        """Return what comes of it within so many seconds, in all, and until lifeline is cut."""
        lifeline = lifeline or Lifeline()
        reply, way, connection = Reply(), self._ways[form.packed], None
        accept = {"Accept": "text/event-stream" if form.sse else "*/*", "User-Agent": USER_AGENT}
        call = Call(TEST_PATH, b"", accept, form.method, query + "&sse=1" * form.sse)
        began_at = time.monotonic()
        try:
            deadline = Deadline(lifeline, timeout)
            connection = way.open(deadline)
            reply.reached = True
            lifeline.hold(connection, functools.partial(connection.sock.shutdown, socket.SHUT_RDWR))
            if isinstance(connection, TlsConnection):
                reply.fields["issuer"] = connection.issuer
            began_at = time.monotonic()
            connection.write(way.target.encode_head(call))
            room = MAX_TEST_REPLY
            for data in self._read(connection, deadline, reply):
                reply.pieces.append((time.monotonic() - began_at, data))
                room -= len(data)
                if room < 0:
                    break  # it is none
        except (OSError, ValueError, zlib.error) as error:
            reply.error = getattr(error, "verify_message", "") or reason_of(error)
            if reply.reached and isinstance(error, ValueError):
                reply.error = "what it says is not HTTP/1"
        finally:
            reply.ended_at = time.monotonic() - began_at
            if connection:
                lifeline.drop(connection)
                connection.close()
        return reply

    @staticmethod
    def _read(connection: Connection, deadline: Deadline, reply: Reply) -> Iterator[bytes]:
        """Take the head, and yield what comes of the body, not compressed any more."""
        data, parsed, room = b"", None, 2 * MAX_TEST_REPLY

        def more() -> bytes:
            nonlocal room
            came = receive(connection, deadline)
            room -= len(came)
            if room < 0:
                raise ValueError("more than a test stream has")
            return came

        while not parsed or parsed[0] < 200:  # 100 to 199 come before the answer
            data = parsed[2] if parsed else data
            parsed = parse_answer_head(data)
            if not parsed:
                came = more()
                if not came:
                    raise ConnectionResetError(errno.ECONNRESET, "closed")
                data += came
        reply.status, fields, data = parsed
        reply.fields.update(fields)
        body = body_decoder(fields, None, lenient=True)
        packed = fields.get("content-encoding", "").lower() in ("gzip", "deflate")
        unzip = zlib.decompressobj(zlib.MAX_WBITS | 32).decompress
        while not (body.complete or body.broken):
            if data:
                data = body.feed(data)
                yield unzip(data, MAX_TEST_REPLY + 1) if packed else data
            if not body.complete:
                data = more()
            if not data:
                body.close()
                break
        reply.whole = body.complete


def together(jobs: Sequence[Callable[[], Any]], tell: Callable[[float], object] = lambda seconds: None) -> list[Any]:
    """Return what each of jobs returns; each has a thread.  tell takes the seconds for which they have been waited for.

    Raises what one raises.
    """
    box: queue.SimpleQueue[Any] = queue.SimpleQueue()
    results: dict[int, Any] = {}

    def work(index: int) -> None:
        try:
            box.put((index, jobs[index](), None))
        except Exception as error:  # noqa: BLE001
            box.put((index, None, error))

    began_at = told_at = time.monotonic()
    for index in range(len(jobs)):
        threading.Thread(target=work, args=(index,), daemon=True).start()
    while len(results) < len(jobs):
        if time.monotonic() - told_at >= TELL_INTERVAL:
            told_at = time.monotonic()
            tell(told_at - began_at)
        with contextlib.suppress(queue.Empty):
            index, results[index], error = box.get(timeout=TELL_INTERVAL)
            if error:
                raise error
    return [results[index] for index in range(len(jobs))]


class Check:
    """Looks what becomes of streams on their way from a streamproxy to here, and tells what to change."""

    def __init__(self, settings: Settings, pace: float = TEST_PACE) -> None:
        """pace: seconds between two events of a test stream.  Raises SettingsError."""
        self.settings, self.pace = settings, pace
        self.url = settings.check.partition("?")[0].rstrip("/")  # as of a page, whose query is no test stream's
        self.looks: list[Look] = []
        self.found: list[str] = []
        self.hops: list[str] = []
        self.notes: list[str] = []
        self._visitor = Visitor(settings, self.url)

    def run(self, tell: Callable[[float], object] = lambda seconds: None) -> None:
        """Fill looks, found, hops and notes.  Blocks, but for no longer than its time-outs."""
        reply = self._enter()
        if not reply:
            return
        looks = [self._look_at_pings, self._look_at_cut, self._look_at_leaving, self._look_at_cache]
        if self.settings.check_idle:
            looks.append(self._look_at_silence)
        self.looks = together([*(functools.partial(self._look_at, form) for form in FORMS), *looks], tell)
        self.found = found_in(self.looks)
        if events_in(reply)[0].http == "1.0":
            self.notes.append(f"{HTTP10}: {cure_of(self.hops, HTTP10)}")
        lost = [name for name, value in STREAM_FIELDS.items() if value not in reply.fields.get(name.lower(), "")]
        if "nginx" in self.hops and "X-Accel-Buffering" in lost:
            lost.remove("X-Accel-Buffering")  # it is nginx who reads it
        if lost:
            self.notes.append(f"Lost on the way, so that hops before here do not see them: {', '.join(lost)}.")

    def document(self) -> dict[str, Any]:
        """Return what was seen, as JSON has it."""
        return {
            "url": self.url, "ok": not self.found, "hops": self.hops, "notes": self.notes,
            "looks": {look.name: look.words for look in self.looks},
            "found": [{"what": found, "change": cure_of(self.hops, found)} for found in self.found],
        }  # fmt: skip

    def text(self) -> str:
        """Return the same for a person."""
        lines = [f"{self.url}, by way of {', then '.join(self.hops) or 'nobody who leaves a trace'}", ""]
        lines += [f"  {look.name:28}{look.words}" for look in self.looks]
        lines += ["", *self.notes] if self.notes else []
        lines += ["", *(f"{found[:1].upper()}{found[1:]}: {cure_of(self.hops, found)}" for found in self.found)]
        seen = "" if all(look.words != UNSEEN for look in self.looks) else " that was seen"
        return "\n".join(lines if self.found else [*lines, f"Nothing{seen} holds the text back."])

    def _enter(self) -> Reply | None:
        """Find the server, and who is on the way to it; None where it is not there."""
        for _ in range(MAX_REDIRECTS):
            reply = self._visitor.ask("events=1", FORMS[-1], CHECK_TIMEOUT)
            self.hops = self._visitor.proxies + hops_in(reply.fields)
            if reply.status == 200 and events_in(reply):
                return reply
            if not (300 <= reply.status < 400 and self._follow(reply.status, reply.fields.get("location", ""))):
                break
        else:
            self.notes.clear()  # it leads in a circle
        self.looks = [self._look_at_stranger(reply)]
        self.found = [self.looks[0].found]
        return None

    def _look_at_stranger(self, reply: Reply) -> Look:
        """Tell who answers where streamproxy should, and with no event."""
        status, found, words = reply.status, ABSENT, "is not streamproxy, or one that is too old to be checked"
        if not status:
            found, words = UNREACHED, f"cannot be reached: {reply.error}"
            if reply.reached:
                found, words = SILENT, f"takes connections, but does not answer: {reply.error}"
        elif status in (401, 403):
            whose = "this" if self._visitor.has_token else "whoever has no"
            found, words = GUARDED, f"answers {status} to {whose} token"
        elif status != 200:
            said = _OUR_ERROR.fullmatch(reply.body)
            found = UNSERVED if status > 501 else ABSENT  # 502 to 504, and 521 to 530 of Cloudflare's
            found = REFUSED if status == 429 or (said and status > 501) else found
            where = f" with {reply.fields['location'][:200]!a}" if "location" in reply.fields else ""
            words = f": {said[1].decode()}" if said else f"{where} in place of streamproxy"
            words = f"answers {status}{words}"
        return Look("the address", words, found)

    def _follow(self, status: int, location: str) -> bool:
        """Go to where a redirect leads, if a streamproxy can be there; the token goes to no other host or port."""
        try:
            place = urllib.parse.urljoin(self.url + TEST_PATH, location).partition("?")[0]
            url, is_ours = place[: -len(TEST_PATH)], place.endswith(TEST_PATH)
            old, new = urllib.parse.urlsplit(self.settings.check), urllib.parse.urlsplit(url)  # however far it led
            ports = [address.port or _PORTS[address.scheme] for address in (old, new)]
            is_same = new.scheme == old.scheme and ports[0] == ports[1]
            is_secured = new.scheme == "https" and ports == [_PORTS["http"], _PORTS["https"]]
            is_safe = old.hostname == new.hostname and (is_same or is_secured)
            self._visitor = Visitor(self.settings if is_safe else self.settings.replace(check_token=""), url)
        except (ValueError, KeyError):  # it is none
            return False
        if is_ours:
            self.url = url
            why = "" if status in (307, 308) else ", for on the way a POST becomes a GET"  # RFC 9110 section 15.4
            self.notes.append(f"It redirects to {url}: ask that address{why}.")
        return is_ours

    def _ask(self, form: Form, events: int = TEST_EVENTS, pace: float = 0, size: int = 64, more: str = "") -> Reply:
        pace = pace or self.pace
        query = f"events={events}&every={1000 * pace:.0f}&size={size}{more}"
        return self._visitor.ask(query, form, events * pace + CHECK_TIMEOUT)

    def _look_at(self, form: Form) -> Look:
        """Judge a form; what is bad is asked once more, for it may have been the moment."""
        for _ in range(2):
            reply = self._ask(form)
            coding = Head(reply.status, reply.fields).compression
            words = found = judge(reply, TEST_EVENTS, self.pace)
            if reply.status not in (0, 200):
                found, words = REFUSED, f"refused with status {reply.status}"
            if found == PIECES:
                break
        if found == HELD:
            reply = self._ask(form, BLOCK_EVENTS, self.pace / 10, BLOCK_SIZE)
            if reply.whole and len(events_in(reply)) == BLOCK_EVENTS:  # else it was refused
                size = block_size(reply, self.pace / 10)
                words = f"in blocks of {size / 1024:.0f} KiB" if size else "all at the end"
        elif found == CUT:
            words = "another answer than was asked for" if reply.whole else f"cut off after {reply.ended_at:.1f} s"
            words = words if reply.status else f"no answer: {reply.error}"
        words += f", compressed ({coding})" if coding else ""
        return Look(str(form), words, "" if found == PIECES else found, form, coding)

    def _look_at_pings(self) -> Look:
        reply = self._ask(Form("POST", sse=True), 2, 5 * self.pace, more=f"&ping={1500 * self.pace:.0f}")
        if len(events_in(reply)) < 2:
            return unseen("pings", reply)
        lost = PING not in reply.body
        return Look("pings", "lost" if lost else "pass", NO_PINGS if lost else "")

    def _look_at_cut(self) -> Look:
        reply, name = self._ask(PLAIN, 3, more="&cut=1"), "an answer that is cut"
        if reply.status in (502, 504):  # as of who collects an answer, and sees that it breaks off
            return Look(name, "can be told")
        is_empty = reply.status == 200 and reply.whole and not reply.body  # all was dropped, and with it the cut
        if not (events_in(reply) or is_empty):
            return unseen(name, reply)
        if not reply.whole and reply.ended_at > CHECK_TIMEOUT / 2:
            return Look(name, "never ends", ENDLESS)
        return Look(name, *(("looks whole", WHOLE) if reply.whole else ("can be told",)))

    def _look_at_cache(self) -> Look:
        name, replies = "an answer to GET", [self._ask(Form("GET"), 1) for _ in range(2)]
        if not all(map(events_in, replies)):
            return unseen(name, *replies)
        cached = replies[0].body == replies[1].body
        return Look(name, *(("comes from a cache", CACHED) if cached else ("is always new",)))

    def _look_at_leaving(self) -> Look:
        """Leave, and ask the server if it goes on; of several processes, some other may have been asked."""
        name, id = "a client that leaves", os.urandom(16).hex()
        query = f"id={id}&events=200&every={1000 * self.pace:.0f}"
        lifelines = [Lifeline() for _ in range(4)]  # so that each of a few processes has one

        def look() -> bool | None:
            goes_on = self._goes_on(id, len(lifelines), wanted=True)
            for lifeline in lifelines:
                lifeline.cut()
            return goes_on

        leave = [functools.partial(self._visitor.ask, query, PLAIN, CHECK_TIMEOUT, lifeline) for lifeline in lifelines]
        *replies, goes_on = together([*leave, look])
        if goes_on is None or not (goes_on or any(map(events_in, replies))):
            return unseen(name, *replies)
        if not goes_on:
            return Look(name, "not seen: another process answers")
        words = {False: "ends its stream", True: "does not end its stream", None: UNSEEN}
        goes_on = self._goes_on(id, 4, wanted=False)
        return Look(name, words[goes_on], STAYS if goes_on else "")

    def _goes_on(self, id: str, times: int, wanted: bool) -> bool | None:
        """Tell whether a stream of this id goes on, as so many say that are asked at once: each process, with luck.

        They are asked until it is so or not, as wanted, or for too long.  None: nobody says.
        """
        for _ in range(LEAVE_LOOKS):
            time.sleep(2 * self.pace)
            replies = together([functools.partial(self._visitor.ask, f"count={id}", PLAIN, COUNT_TIMEOUT)] * times)
            counts = [reply.body.strip() for reply in replies if reply.status == 200 and reply.whole]
            goes_on = any(count != b"0" for count in counts) if counts else None
            if bool(goes_on) is wanted:
                break
        return goes_on

    def _look_at_silence(self) -> Look:
        seconds = self.settings.check_idle
        reply, name = self._ask(PLAIN, 1, seconds), f"{seconds:g} s of silence"
        if reply.status == 200 and reply.whole and reply.ended_at > 0.95 * seconds:  # an early end may look whole, too
            return Look(name, "pass")
        is_refused = reply.status in (429, 503) or reply.ended_at < min(1, seconds / 2)
        if is_refused and not events_in(reply):  # it has not begun
            return unseen(name, reply)
        return Look(name, f"cut off after {reply.ended_at:.1f} s", IDLE)


# 30 ------------------------------------------------------------------ Command line


class _ArgumentParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"streamproxy: {message}\n")  # one line, without the usage

    def _print_message(self, message: str, file: Any = None) -> None:
        """Write it for whoever may read it: neither a pipe that is closed nor a full disk changes the exit status."""
        file = file or sys.stderr
        try:
            write_all(file.fileno(), message)
        except io.UnsupportedOperation:  # of a program that has put something else there
            file.write(message)
        except OSError:
            pass


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line, made from the settings table."""
    parser = _ArgumentParser(
        prog="streamproxy.py",
        description="A streaming proxy between web pages and an OpenAI-compatible API.",
        epilog="The API key comes from OPENAI_API_KEY, or from a file that OPENAI_API_KEY_FILE names; so does the token"
        " that --check sends from STREAMPROXY_CHECK_TOKEN or STREAMPROXY_CHECK_TOKEN_FILE."
        f" Example: OPENAI_API_KEY=sk-... python3 streamproxy.py --model {DEFAULT_MODEL}",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"streamproxy {__version__}")
    words = "say which settings are in force, and where each is from, and exit"
    parser.add_argument("--print-settings", action="store_true", help=words)
    for setting in Settings.TABLE:
        options: dict[str, Any] = {"metavar": setting.metavar, "action": "append" if setting.repeat else "store"}
        if not setting.metavar:
            options = {"action": "store_const", "const": "true"}
        if setting.flag:
            text = f"{setting.help} (default: {setting.shown}) [{setting.variable}]"
            parser.add_argument(setting.flag, dest=setting.name, help=text.replace("%", "%%"), **options)
    return parser


def parse_flags(argv: Sequence[str] | None) -> dict[str, Any]:
    """Return the texts of the flags by field name; None for what is not given.  Exits where one is not there."""
    parser = build_parser()
    flags, rest = parser.parse_known_args(argv)
    if rest:
        name = re.split(r"[=\s]", rest[0])[0]  # its value may be a secret, and so may what has no name
        secrets = {"--" + setting.name.replace("_", "-"): setting for setting in Settings.TABLE if setting.secret}
        if name in secrets:
            instead = f"{secrets[name].variable} or {secrets[name].file_variable}"
            parser.error(f"{name}: a secret has no flag, which others could read; allowed: {instead}")
        elif name.startswith("--"):
            near = nearest(name, {setting.flag: setting.flag for setting in Settings.TABLE if setting.flag})
            parser.error(f"{name}: there is no such flag; {near}--help lists them all")
        parser.error("an argument belongs to no flag; --help lists them all")
    return vars(flags)


def inherited_socket(environ: MutableMapping[str, str]) -> socket.socket | None:
    """Return the socket that systemd has handed over (sd_listen_fds(3)), if it has; nobody else takes it for theirs.

    Raises SettingsError where it is none that connections can be accepted of.
    """
    given = {name: environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")}
    if given["LISTEN_PID"] != str(os.getpid()):
        return None
    if given["LISTEN_FDS"] != "1":
        raise SettingsError(f"LISTEN_FDS: {given['LISTEN_FDS'][:10]!r} sockets are handed over; allowed: 1")
    try:
        sock = socket.socket(fileno=3)
        sock.set_inheritable(False)
        if sock.type == socket.SOCK_STREAM and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return sock
    except OSError:
        pass
    raise SettingsError("LISTEN_FDS: descriptor 3 does not listen; allowed: a socket of ListenStream= with Accept=no")


def find_settings(
    environ: Mapping[str, str], flags: Mapping[str, Any], given: socket.socket | None
) -> dict[str, tuple[Any, str]]:
    """Return what is given, as Settings.find does; and by a socket of systemd's, if there is one.

    Raises SettingsError.
    """
    found = Settings.find(environ, flags)
    if given:
        places = Settings.sources(found, "bind")
        if places:
            words = f"{places[0]} and a socket of systemd's (LISTEN_FDS) are both given"
            raise SettingsError(f"{words}; allowed: one of them")
        found["bind"] = address_text(given.getsockname()), "LISTEN_FDS"
    return found


def setting_lines(settings: Settings, found: Mapping[str, tuple[Any, str]]) -> Iterator[str]:
    """Yield a line for each setting: its flag or variable, where it is from, and what it is."""
    for setting in settings.TABLE:
        if setting.name not in ("host", "port"):  # they are in bind
            source = ", ".join(settings.sources(found, setting.name)) or "default"
            yield f"{setting.flag or setting.variable:27}{source:36}{setting.show(getattr(settings, setting.name))}\n"


def _say(text: str) -> None:
    """Write text to stdout, for whoever may read it."""
    with contextlib.suppress(OSError, AttributeError):  # the latter: it was closed
        write_all(sys.stdout.fileno(), text)


def _complain(words: str) -> None:
    """Write a line to stderr, of what is wrong or takes its time, for whoever can still read it."""
    with contextlib.suppress(OSError):
        write_all(sys.stderr.fileno(), f"streamproxy: {words}\n")


def _open_nothing() -> TextIO:
    """Take the place of a standard stream that is closed, whose descriptor would soon be a socket's."""
    return os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")


def check(settings: Settings) -> int:
    """Check an address, and say what was seen; return the exit status: 1 where something is held back or lost."""
    checked = Check(settings)
    checked.run(lambda seconds: _complain(f"still looking, after {seconds:.0f} s"))
    told = json.dumps(checked.document()) if settings.log_format == "json" else checked.text()
    _say(f"{told}\n")
    return 1 if checked.found else 0


# The third: Ctrl-Break on Windows, which can be sent there to another process, as SIGTERM cannot.
_ENDING_SIGNALS = ("SIGTERM", "SIGINT", "SIGBREAK")


class Signals:
    """Heeds the signals that come to this process, in a thread: they count whatever the others wait for."""

    def __init__(self) -> None:
        self.server: Server | None = None  # once it is there
        self.asked = threading.Event()  # to end
        # A byte comes for each signal, whichever thread the system gives it to.
        self._bytes, self._teller = socket.socketpair()
        self._teller.setblocking(False)

    def start(self) -> None:
        """For the main thread.  Raises RuntimeError where no thread can be started."""
        threading.Thread(target=self._heed, name="signals", daemon=True).start()
        signal.set_wakeup_fd(self._teller.fileno())
        for name in (*_ENDING_SIGNALS, "SIGHUP"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), lambda *_: None)

    def close(self) -> None:
        if threading.current_thread() is threading.main_thread():  # else it is over
            signal.set_wakeup_fd(-1)
        self._teller.close()
        self._bytes.close()

    def _heed(self) -> None:
        with contextlib.suppress(OSError):  # it is closed
            for number in iter(functools.partial(self._bytes.recv, 1), b""):
                self._on_signal(number[0])

    def _on_signal(self, number: int) -> None:
        reloads = number == getattr(signal, "SIGHUP", None)
        if not self.server:
            if not reloads:
                _complain("ended by a signal before it served")
                os._exit(0)
        elif reloads:
            self.server.reload()
        elif self.asked.is_set():
            self.server.abort()
        else:
            self.asked.set()


class Notifier:
    """Tells systemd how the process is (sd_notify(3)), if that has asked for it."""

    def __init__(self, address: str) -> None:
        """address: NOTIFY_SOCKET; @ is for the null byte that begins a name which is in no folder."""
        self._address = "\0" + address[1:] if address[:1] == "@" else address
        self._is_there = address[:1] in ("/", "@") and hasattr(socket, "AF_UNIX")

    def ready(self, words: str) -> None:
        self._tell("READY=1", f"STATUS={words}")

    def stopping(self, words: str) -> None:
        """Ask for more time, too: until it should have been told again, twice."""
        self._tell("STOPPING=1", f"EXTEND_TIMEOUT_USEC={3 * TELL_INTERVAL * 1e6:.0f}", f"STATUS={words}")

    def _tell(self, *lines: str) -> None:
        if self._is_there:
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.settimeout(NOTIFY_TIMEOUT)
                sock.sendto("\n".join(lines).encode(), self._address)


def describe(settings: Settings) -> str:
    """Return what is asked of whom, and what protects the port, in one line."""
    path, host, _ = parse_address(settings.bind)
    upstream = "the built-in API" if settings.demo else settings.upstream.partition("?")[0]
    if settings.token_file:
        guard = "clients need a token"
    elif path:
        guard = "no token is needed by whoever reaches the socket"
    elif is_loopback(host):
        guard = "no token is needed on this machine, and no other can connect"
    else:
        guard = "anybody may ask (--allow-anonymous)"
    return f"It asks {settings.model} of {upstream}, {'with a' if settings.api_key else 'without a'} key; {guard}."


def _announce(server: Server) -> None:
    """Say where the server is.  In a thread of its own, for whoever should read it may not."""
    lines = [f"streamproxy {__version__} on {server.url}", describe(server.settings)]
    if server.settings.demo:
        path = server.listener.path
        to = f"--unix-socket {path} http://localhost" if path else server.url
        lines.append(f"""Try: curl -N {to} -d '{{"prompt": "Hello"}}'""")
    _say("".join(f"{line}\n" for line in lines))


def _trim_memory() -> None:
    """Give back what is free once the script is over (see run_script): the C library keeps it for what may come."""
    time.sleep(TRIM_DELAY)
    with contextlib.suppress(Exception):  # not on every system
        import ctypes

        ctypes.CDLL(None).malloc_trim(0)


def _tune_process() -> None:
    """Set what is the process's, and so not for a server to set that another program has made."""
    sys.setswitchinterval(SWITCH_INTERVAL)
    # What is over is gone by its count of references.  To look through all that 10,000 streams hold takes 0.2 s.
    with contextlib.suppress(AttributeError):  # PyPy has another collector
        gc.set_threshold(*gc.get_threshold()[:2], 1_000_000)
    # A stream takes two descriptors; the usual limit of 1024 is for the sake of select().
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource  # not on every system

        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _serve(server: Server, signals: Signals) -> int:
    """Serve until a signal begins the drain; any further one ends that.  Return the exit status."""
    notifier = Notifier(os.environ.get("NOTIFY_SOCKET", ""))
    try:
        # As the first thread ends, older C libraries open a file, or abort the process where no descriptor is left.
        first = threading.Thread(target=int)
        first.start()
        first.join()
        server.start()
        # Now, and not with the first signal: by then, the system may have no thread left.
        for work in (_trim_memory, functools.partial(_announce, server)):
            threading.Thread(target=work, daemon=True).start()
        notifier.ready(f"serving at {server.url}")
        signals.asked.wait()
    except RuntimeError:
        _complain(NO_THREAD)
        return 1
    finally:
        server.stop(notifier.stopping)
        signals.close()
    return 0


def prepare(argv: Sequence[str] | None = None) -> tuple[int, Callable[[], int] | None]:
    """Return the exit status, or what serves until a signal ends it, in any thread.  For the main thread."""
    sys.stdout, sys.stderr = sys.stdout or _open_nothing(), sys.stderr or _open_nothing()
    flags = parse_flags(argv)
    try:
        given = inherited_socket(os.environ)
        found = find_settings(os.environ, flags, given)
        settings = Settings.of(found)
        if flags["print_settings"]:
            _say("".join(setting_lines(settings, found)))
            return 0, None
        if settings.check:
            return check(settings), None
        with contextlib.ExitStack() as stack:
            signals = Signals()
            stack.callback(signals.close)
            signals.start()
            server = signals.server = Server(settings, given)
            stack.pop_all()
    except SettingsError as error:
        _complain(str(error))
        return 2, None
    except (OSError, UnicodeError) as error:  # the last for a name like a..b
        _complain(f"cannot listen at {getattr(error, 'filename', None) or settings.bind}: {reason_of(error)}")
        return 1, None
    except RuntimeError:
        _complain(NO_THREAD)
        return 1, None
    except KeyboardInterrupt:  # of who has seen enough of a check
        return 130, None
    server.hub.log.output = Output(sys.stderr, settings.log_format)
    log.setLevel(settings.log_level.upper())
    _tune_process()
    return 0, functools.partial(_serve, server, signals)


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until a signal ends it; return the exit status."""
    status, serve = prepare(argv)
    return serve() if serve else status


def run_script() -> None:
    """Serve; with CPython in a thread that goes on after the last line of the script.

    Until then, CPython keeps the script's syntax tree: half of the memory that this program takes at rest.
    """
    if sys.implementation.name != "cpython":
        sys.exit(main())
    status, serve = prepare()
    if not serve:
        sys.exit(status)

    def go_on() -> None:
        try:
            status = serve()
        except BaseException:  # noqa: BLE001
            sys.excepthook(*sys.exc_info())
            status = 1
        if status:
            os._exit(status)

    try:
        threading.Thread(target=go_on, name="main").start()
    except RuntimeError:  # there is none: to serve says so
        sys.exit(serve())


# 31 ------------------------------------------------------------------ Chat page

_PAGE = r"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, viewport-fit=cover, interactive-widget=resizes-content">
<meta name="color-scheme" content="light dark">
<title>{{title}}</title>
<link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark; --text: light-dark(#1b1c1f, #e9e9e6); --quiet: light-dark(#5f636b, #a2a6ad);
  --paper: light-dark(#fdfdfb, #191a1c); --soft: light-dark(#f1f1ec, #26282b); --line: light-dark(#dddcd5, #3a3d42);
  --accent: light-dark(#1f5a4b, #8fd0bd); --wrong: light-dark(#9d2c1f, #ff9d8f); scrollbar-gutter: stable; }
* { box-sizing: border-box; margin: 0; font: inherit; color: inherit; }
[hidden] { display: none !important; }
body { display: flex; flex-direction: column; min-height: 100dvh; background: var(--paper); color: var(--text);
  font: 1rem/1.65 system-ui, sans-serif; overflow-wrap: anywhere; }
header, main, footer { width: 100%; max-width: 46rem; margin: 0 auto; padding-inline:
  max(1.25rem, env(safe-area-inset-left)) max(1.25rem, env(safe-area-inset-right)); }
header { display: flex; align-items: center; gap: .25rem .75rem; min-height: 4rem; font-size: .9rem; }
h1 { font-weight: 600; }
#model { flex: 1; color: var(--quiet); }
main { flex: 1; padding-bottom: 1rem; }
footer { position: sticky; bottom: 0; background: var(--paper);
  padding-bottom: max(1rem, env(safe-area-inset-bottom)); }
.label { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
button { padding: .35rem .75rem; border: 1px solid var(--line); border-radius: .6rem; background: none; cursor: pointer;
  font-size: .875rem; white-space: nowrap; }
button:hover { background: var(--soft); }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
#greeting { padding-top: 22vh; text-align: center; }
#greeting h2 { margin-bottom: 1.5rem; font-size: 1.6rem; line-height: 1.3; font-weight: 500; }
#greeting button { margin: .25rem; padding: .5rem 1rem; border-radius: 2rem; color: var(--quiet); white-space: normal; }
.message { margin-top: 1.75rem; }
.turn:last-child .assistant { margin-top: .5rem; }
.user .text { width: fit-content; max-width: 85%; margin-inline-start: auto; padding: .6rem 1rem; border-radius: 1.1rem;
  background: var(--soft); white-space: pre-wrap; unicode-bidi: plaintext; }
.user .tools { justify-content: end; }
.editing { opacity: .5; }
.turn:not(:last-child) .last { display: none; }
[aria-busy=true] .last { visibility: hidden; }
.part { contain: content; margin-inline: -.5rem; padding-inline: .5rem; }
.part > *, li > * + *, blockquote > * + * { margin-top: .85rem; }
.part > :is(h3, h4) { margin-top: 1.6rem; font-size: 1.2rem; }
.part:first-child > :first-child, :is(p.more, li > .part, blockquote > .part) { margin-top: 0; }
.part :is(p, h3, h4, h5, h6, li, td, th, blockquote) { unicode-bidi: plaintext; text-align: start; }
.part table:dir(rtl) :is(td, th) { text-align: right; }   /* numbers have no direction */
.part p { white-space: pre-line; }
.part :is(h3, h4, h5, h6) { font-weight: 650; line-height: 1.35; }
ul { padding-inline-start: 1.6rem; }
ol { padding-inline-start: max(1.6rem, 1rem + 1ch * var(--digits)); }
li + li { margin-top: .3rem; }
li > :is(ul, ol), :is(ul, ol).more { margin-top: .3rem; }
strong { font-weight: 650; }
em { font-style: italic; }
a { color: var(--accent); text-underline-offset: .15em; }
a[data-host]::after { content: "(" attr(data-host) ")"; display: inline-block; margin-inline-start: .3em;
  font-size: .8em; color: var(--quiet); }
blockquote { padding-inline-start: 1rem; border-inline-start: 3px solid var(--line); color: var(--quiet); }
hr { border: 0; border-top: 1px solid var(--line); margin-block: 1.5rem; }
code, pre { font: .875em/1.6 ui-monospace, "Cascadia Mono", Menlo, Consolas, monospace; }
:not(pre) > code { padding: .1em .35em; border-radius: .35em; background: var(--soft); white-space: break-spaces; }
.code, .wide { border: 1px solid var(--line); border-radius: .75rem; overflow: hidden; }
.code > div { display: flex; justify-content: space-between; align-items: center; padding: .15rem .4rem .15rem 1rem;
  background: var(--soft); font-size: .8rem; color: var(--quiet); }
.code button, .tools button { border: 0; padding: .2rem .5rem; font-size: .8rem; color: var(--quiet); }
pre { direction: ltr; text-align: left; padding: .75rem 1rem; overflow-x: auto; overflow-wrap: normal; }
pre code { display: block; font: inherit; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; min-width: 100%; overflow-wrap: normal; font-size: .925rem; }
th, td { padding: .45rem .9rem; max-width: 24rem; vertical-align: top; }
th { font-weight: 600; background: var(--soft); }
tr + tr td, tbody td { border-top: 1px solid var(--line); }
.long, .long :is(thead, tbody) { display: block; }
.long tbody { contain: content; }
.long tr { display: grid; grid-template-columns: var(--columns); }
.long td { max-width: none; overflow-wrap: anywhere; }
details { margin-bottom: 1rem; font-size: .9rem; color: var(--quiet); }
summary { cursor: pointer; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
details > div { margin-top: .5rem; padding-inline-start: 1rem; border-inline-start: 2px solid var(--line); }
.dot { width: .6rem; height: .6rem; margin: .65rem .5rem; border-radius: 50%; background: var(--accent); }
@media (prefers-reduced-motion: no-preference) { .dot { animation: fade 1s ease-in-out infinite alternate; } }
@keyframes fade { to { opacity: .2; } }
.ending { display: flex; flex-wrap: wrap; align-items: center; gap: .5rem .75rem; margin-top: .75rem;
  color: var(--quiet); font-size: .9rem; }
.error { color: var(--wrong); }
#status { padding: .5rem .6rem; font-size: .9rem; color: var(--quiet); }
.tools { display: flex; flex-wrap: wrap; align-items: center; min-height: 1.9rem; margin: .35rem -.5rem 0; }
.tools .stats { padding-inline: .5rem; font-size: .8rem; color: var(--quiet); }
#end { position: absolute; inset: -3rem 0 auto 0; width: fit-content; margin: auto; background: var(--paper); }
form { display: flex; align-items: end; gap: .5rem; padding: .5rem; border: 1px solid var(--line);
  border-radius: 1.4rem; background: var(--paper); }
form:focus-within { border-color: var(--accent); }
textarea, input { flex: 1; min-width: 0; padding: .4rem .6rem; border: 0; resize: none; background: none; }
textarea { max-height: 33dvh; unicode-bidi: plaintext; }
:is(textarea, input):focus-visible { outline: none; }
::placeholder { color: var(--quiet); opacity: 1; }
form button { padding: .4rem .9rem; border-radius: 1rem; border-color: transparent; line-height: 1.65; }
#send, #access button { background: var(--accent); color: var(--paper); }
#stop { background: var(--soft); }
#access { flex-wrap: wrap; margin-bottom: .75rem; }
#access :is(label, .error) { flex-basis: 100%; padding: 0 .6rem; font-size: .9rem; }
#access .error:empty { display: none; }
@media (forced-colors: active) { form:focus-within { outline: 2px solid; } .dot { background: CanvasText; }
  .user .text { border: 1px solid; } }
</style>
<header>
  <h1>{{title}}</h1>
  <span id="model">{{model}}</span>
  <button id="new" hidden>New chat</button>
</header>
<main data-resume="{{resume}}">
  <section id="greeting">
    <h2>What would you like to know?</h2>
    <button>Explain in five sentences how a fridge cools</button>
    <button>Write a short, polite letter that says no</button>
    <button>Compare tea and coffee in a table</button>
  </section>
  <div id="log" role="log" aria-label="Conversation"></div>
</main>
<footer>
  <p id="status" class="label" role="status"></p>
  <button id="end" hidden>↓ To the end</button>
  <form id="access" hidden>
    <label for="token">This server asks for an access token</label>
    <input id="token" type="password" autocomplete="off" placeholder="Token">
    <button>Continue</button>
    <p class="error" role="alert"></p>
  </form>
  <form id="ask">
    <textarea id="prompt" rows="1" aria-label="Message" placeholder="Write a message" autofocus></textarea>
    <button id="send">Send</button>
    <button id="stop" type="button" hidden>Stop</button>
  </form>
</footer>
<script>
"use strict";

// Markdown: from text to blocks, as of CommonMark and GFM's tables.  Nothing here knows the page.  HTML, math,
// entities, indented code and reference links stay text.  A long block is cut, and the next one goes on with it (more):
// so each is read and drawn at once, and none is read again that is whole.

// Characters of a block, and of a line; levels of quotes and items; rows of a table, or as many items or elements.
const CUT = 4000, LONGEST = 8 * CUT, DEEPEST = 8, MANY = 100;
const HEADING = /^ {0,3}(#{1,6})(?=[ \t]|$)(.{0,500})$/, UNDERLINE = /^ {0,3}(=+|-+)[ \t]*$/;
const RULE = /^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/, QUOTE = /^ {0,3}> ?/;
const FENCE = /^( {0,3})(`{3,}(?=[^`]*$)|~{3,})[ \t]*([^\s`]*)/, ITEM = /^ {0,3}([-+*]|\d{1,9}[.)])(?:([ \t]+)|$)/;
const COLUMNS = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;

// A line without its end, which comes or not; a longer one is cut.
function lineAt(text, at) {
  const line = text.slice(at, at + LONGEST), size = line.indexOf("\n");
  return size < 0 ? {line, end: at + line.length, whole: line.length === LONGEST}
    : {line: line.slice(0, size), end: at + size + 1, whole: true};
}

const isBlank = line => !line.trim();
// Whether it is sure what a line is: a part of one may become something else.
const isSure = ({line, whole}) => whole || line.length > 20 && !/^(?:[\s=*_-]*$| {0,3}```)/.test(line);

const cells = line => line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "").split(/(?<!\\)\|/)
  .map(cell => cell.trim().replace(/\\\|/g, "|"));

const interrupts = line => HEADING.test(line) || FENCE.test(line) || QUOTE.test(line) || RULE.test(line)
  || /^ {0,3}(?:[-+*]|1[.)])[ \t]+\S/.test(line);

// The block that begins at a place, where it ends, and whether it is whole.  before: the one above, which may be cut.
function blockAt(text, at, before, depth) {
  if (before?.cut) return before.read(text, at, before);
  const {line, end, whole} = lineAt(text, at);
  let found;
  if (isBlank(line)) return {type: "blank", end, whole};
  if (found = FENCE.exec(line)) {
    const [, indent, fence, language] = found;
    return readCode(text, end, {indent: indent.length, fence, language});
  }
  if (found = HEADING.exec(line))
    return {type: "heading", level: found[1].length, text: found[2].replace(/[ \t]#+[ \t]*$/, "").trim(), end, whole};
  if (RULE.test(line)) return {type: "rule", end, whole};
  if (depth < DEEPEST && QUOTE.test(line)) return readQuote(text, at, {last: ""});
  if (depth < DEEPEST && (found = ITEM.exec(line))) {
    const [mark, marker, space = ""] = found;
    const bare = space.length > 4 || isBlank(line.slice(mark.length));
    const offset = bare ? mark.length - space.length + 1 : mark.length;
    return readItem(text, at, {list: marker.at(-1), number: parseInt(marker), offset, last: null});
  }
  const table = tableHead(text, {line, end, whole});
  return table ? readTable(text, table.end, table) : readParagraph(text, at, {});
}

// The head of a table that begins with a line, surely or as it seems; null where none does.
function tableHead(text, {line, end, whole}) {
  if (!line.includes("|")) return null;
  const head = cells(line), next = lineAt(text, end), columns = cells(next.line), sure = whole && next.whole;
  const seems = /^ {0,3}\|/.test(line) && /^[\s|:-]*$/.test(next.line);
  const fits = COLUMNS.test(next.line) && columns.length === head.length;
  const sides = columns.map(cell => ["", "left", "right", "center"][/^:/.test(cell) + 2 * /:$/.test(cell)]);
  if (head.length > MANY || !(sure ? fits : seems)) return null;
  return {head, align: head.map((_, index) => sides[index] || ""), end: next.end, sure};
}

// The lines from a place on, as long as inner(line as read) says what of one is in the block, not null.
function readLines(text, start, inner, most = Infinity) {
  let inside = "";
  for (let at = start, count = 1; at < text.length; count++) {
    const read = lineAt(text, at), line = inner(read);
    if (line === null) return {text: inside, end: at, whole: isSure(read)};
    inside += line + (text[read.end - 1] === "\n" ? "\n" : "");
    at = read.end;
    if (read.whole && (at - start > CUT || count === most)) return {text: inside, end: at, whole: true, cut: true};
  }
  return {text: inside, end: text.length, whole: false};
}

function readCode(text, start, {indent, fence, language, cut: more}) {
  const closing = new RegExp(`^ {0,3}${fence[0]}{${fence.length},}[ \\t]*$`), dedent = new RegExp(`^ {0,${indent}}`);
  let last = {};
  const lines = readLines(text, start, ({line, end, whole}) => {
    const begins = !whole && !isBlank(line) && !line.trim().replaceAll(fence[0], "");   // as it seems, the end does
    if (!begins && !closing.test(line)) return line.replace(dedent, "");
    last = {end, whole};
    return null;
  });
  return {type: "code", read: readCode, indent, fence, language, more, ...lines, ...last};
}

function readTable(text, start, {head, align, cut: more}) {
  const lines = readLines(text, start, ({line}) => isBlank(line) || interrupts(line) ? null : line, MANY);
  const rows = lines.text.trimEnd().split("\n").filter(Boolean).map(line => cells(line).slice(0, head.length));
  return {type: "table", read: readTable, head, align, more, rows, ...lines};
}

function readParagraph(text, start, {cut: more}) {
  const paragraph = (end, whole, cut) => ({type: "paragraph", read: readParagraph, more, end, whole, cut,
    text: trimLines(text.slice(start, end))});
  for (let at = start; at < text.length;) {
    const read = lineAt(text, at), {line, end, whole} = read, underline = at > start && !more && UNDERLINE.exec(line);
    if (underline && whole)
      return {...paragraph(at, whole), type: "heading", level: underline[1][0] === "=" ? 1 : 2, end};
    if (isBlank(line) || (at > start && interrupts(line))) return paragraph(at, isSure(read));
    const table = at > start && tableHead(text, read);
    if (table) return paragraph(at, table.sure);
    if (end - start > CUT && isSure(read)) {
      const room = start + CUT, space = text.lastIndexOf(" ", room), pair = /[\udc00-\udfff]/.test(text[room]);
      return paragraph(space > start ? space + 1 : room - pair, true, true);
    }
    at = end;
  }
  return paragraph(text.length, false);
}

const trimLines = text => text.replace(/^[ \t]+/gm, "").trimEnd();

// Whether a line goes on with the paragraph at the end of a quote or an item, though it has no mark of it.
const isLazy = (last, line) =>
  ![last, line].some(isBlank) && !FENCE.test(last) && !interrupts(line) && !ITEM.test(line);

function readQuote(text, start, {last, cut: more}) {
  const lines = readLines(text, start, ({line}) => {
    const quoted = QUOTE.exec(line);
    return quoted || isLazy(last, line) ? last = line.slice(quoted?.[0].length) : null;
  });
  return {type: "quote", read: readQuote, last, more, ...lines};
}

// offset: of what is in the item; last: the line before, null where there is none.
function readItem(text, start, {list, number, offset, last, cut: more}) {
  const lines = readLines(text, start, read => {
    const line = read.line.replace(/^\t+/, tabs => "    ".repeat(tabs.length));
    const indent = isBlank(line) || last === null ? offset : line.search(/\S/);
    return indent >= offset || isLazy(last, line) ? last = line.slice(Math.min(offset, indent)) : null;
  });
  return {type: "item", read: readItem, list, number, offset, last, more, ...lines};
}

// Inline: strings and {type, children}.  The delimiter stack is CommonMark's, so that it is linear.  open: more may
// come, so what has begun counts as if it were closed.

const SPECIAL = /[\\`*_~[\]<\n]|!\[|https?:\/\//g, ADDRESS = /https?:\/\/[^\s<>`"\])]+/y;
const TARGET = /\(\s*(<[^<>\n]*>|[^\s()<>]*(?:\([^\s()]*\)[^\s()]*)*)(?:\s+(?:"[^"]*"|'[^']*'))?\s*\)/y;
const POINTED = /<((?:https?:|mailto:)[^\s<>]*)>/y, ESCAPED = /\\([!-/:-@[-`{-~])/g;
// Punctuation, but for that of Chinese and Japanese, which write no blanks around it.
const MARK = /(?![\u3000-\u303f\uff00-\uffef])[\p{P}\p{S}]/u;

function parseInline(text, open) {
  if (open) text = text.replace(/(?:\*\*|~~|`+)$/, "").replace(/\[([^[\]]{1,200})\]\([^\s()]{0,500}$/, "$1");
  const tokens = [], brackets = [], ticks = new Map();
  const take = (pattern, at) => { pattern.lastIndex = at; return pattern.exec(text); };
  for (const run of text.matchAll(/`+/g)) ticks.set(run[0].length, run.index);   // where the last of each length is
  for (let at = 0; at < text.length;) {
    const found = take(SPECIAL, at);
    if (found?.index !== at) tokens.push(text.slice(at, at = found ? found.index : text.length));
    if (found) at = special(found[0], at);
  }
  return build(pair(tokens, open));

  function special(sign, at) {
    let found;
    if (sign === "\\") {
      const next = text[at + 1] || "";
      if (next === "\n") tokens.push({type: "break"});
      else tokens.push(/[!-/:-@[-`{-~]/.test(next) ? next : "\\" + next);
      return at + 2;
    }
    if (sign === "\n") return newline(at);
    if (sign === "`") return codeSpan(at, take(/`+/y, at)[0]);
    if ("*_~".includes(sign)) return delimiters(sign, at);
    if (sign === "[" || sign === "![") { brackets.push(tokens.push(sign) - 1); return at + sign.length; }
    if (sign === "]") return closeBracket(at);
    if (sign === "<" && (found = take(POINTED, at))) {
      tokens.push(link(found[1], [found[1]]));
      return at + found[0].length;
    }
    if (sign[0] === "h" && !/\w/.test(text[at - 1] || "") && (found = take(ADDRESS, at))) {
      const address = found[0].replace(/[.,:;!?'*_~]{1,20}$/, "");
      tokens.push(link(address, [address]));
      return at + address.length;
    }
    tokens.push(sign);
    return at + sign.length;
  }

  function newline(at) {
    const last = tokens.at(-1), hard = typeof last === "string" && last.endsWith("  ");
    if (typeof last === "string") tokens[tokens.length - 1] = last.trimEnd();
    tokens.push(hard ? {type: "break"} : "\n");
    return at + 1;
  }

  function codeSpan(at, run) {
    const start = at + run.length;
    let end = start;
    if (ticks.get(run.length) > at) for (const next of text.slice(start).matchAll(/`+/g))
      if (next[0].length === run.length) { end = start + next.index; break; }
    if (end === start && !open) { tokens.push(run); return start; }
    const inside = text.slice(start, end > start ? end : undefined).replace(/\n/g, " ");
    const padded = /^ .* $/.test(inside) && inside.trim();
    tokens.push({type: "code", children: [padded ? inside.slice(1, -1) : inside]});
    return end > start ? end + run.length : text.length;
  }

  function delimiters(sign, at) {
    let end = at;
    while (text[end] === sign) end++;
    const before = text[at - 1] || " ", after = text[end] || " ", word = sign === "_";
    const left = /\S/.test(after) && (!MARK.test(after) || /\s/.test(before) || MARK.test(before));
    const right = /\S/.test(before) && (!MARK.test(before) || /\s/.test(after) || MARK.test(after));
    tokens.push({sign, count: end - at, size: end - at, opens: [], closes: 0,
      canOpen: left && (!word || !right || MARK.test(before)),
      canClose: right && (!word || !left || MARK.test(after))});
    return end;
  }

  function closeBracket(at) {
    const start = brackets.pop(), target = start === undefined ? null : take(TARGET, at + 1);
    if (!target) { tokens.push("]"); return at + 1; }
    const children = build(pair(tokens.splice(start).slice(1), false));
    tokens.push(link(target[1].replace(/^<|>$/g, "").replace(ESCAPED, "$1"), children));
    brackets.length = 0;   // no link within a link
    return at + 1 + target[0].length;
  }
}

// Only what a reader expects behind a link; else its text is all there is.
const link = (address, children) =>
  ({type: /^(?:https?|mailto):[^\s\0-\x1f]*$/i.test(address) ? "link" : "text", address, children});

// Pair the delimiters among tokens (CommonMark's "process emphasis").
function pair(tokens, open) {
  const openers = [], bottom = {};
  tokens.forEach((closer, index) => {
    if (!closer.sign) return;
    closer.index = index;
    while (closer.canClose && closer.count) {
      const key = closer.sign + closer.canOpen + closer.size % 3;
      let top = openers.length - 1;
      while (top >= 0 && openers[top].index >= (bottom[key] ?? -1) && !fits(openers[top], closer)) top--;
      if (top < 0 || openers[top].index < (bottom[key] ?? -1)) { bottom[key] = index; break; }
      openers.length = top + 1;
      match(openers[top], closer);
      if (!openers[top].count) openers.pop();
    }
    if (closer.canOpen && closer.count) openers.push(closer);
  });
  const end = {sign: "", count: 0, closes: 0, opens: []};
  for (const opener of open ? openers.reverse() : []) if (opener.count === 2) {
    end.count = 2;
    match(opener, end);
  }
  return [...tokens, end];
}

const fits = (opener, closer) => opener.sign === closer.sign && (opener.sign === "~" ? opener.count === closer.count
  && opener.count <= 2 : !((opener.canClose || closer.canOpen) && (opener.size + closer.size) % 3 === 0
  && (opener.size % 3 || closer.size % 3)));

function match(opener, closer) {
  const count = opener.sign === "~" ? opener.count : Math.min(2, opener.count, closer.count);
  opener.opens.unshift(opener.sign === "~" ? "strike" : count === 2 ? "strong" : "emphasis");
  closer.closes++;
  opener.count -= count;
  closer.count -= count;
}

function build(tokens) {
  const stack = [{children: []}];
  const put = node => {
    const into = stack.at(-1).children;
    if (typeof node === "string" && typeof into.at(-1) === "string") into[into.length - 1] += node;
    else if (node !== "") into.push(node);
  };
  for (const token of tokens) {
    if (typeof token === "string" || token.type) { put(token); continue; }
    for (let left = token.closes; left && stack.length > 1; left--) { const node = stack.pop(); put(node); }
    put(token.sign.repeat(token.count));
    for (const type of token.opens) stack.push({type, children: []});
  }
  return stack[0].children;
}

// Drawing: each element is made here, and text enters as text: nothing that arrives is ever read as HTML.

const $ = selector => document.querySelector(selector);
const [page, log, form, input, access, token] = ["html", "#log", "#ask", "#prompt", "#access", "#token"].map($);

function make(parent, tag, className = "", text = "") {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text) element.append(text);
  parent?.append(element);
  return element;
}

function button(parent, text, act, className = "") {
  const element = make(parent, "button", className, text);
  element.type = "button";
  element.addEventListener("click", () => act(element));
  return element;
}

const TAGS = {emphasis: "em", strong: "strong", strike: "del", code: "code", break: "br", link: "a", text: "span"};

function drawInline(parent, nodes, depth = 0) {
  for (const node of nodes) {
    if (typeof node === "string") parent.append(node);
    else if (depth > 100) drawInline(parent, node.children || [], depth);   // else the browser's stack overflows
    else {
      const element = make(parent, TAGS[node.type]);
      if (node.type === "link") aim(element, node);
      drawInline(element, node.children || [], depth + 1);
    }
  }
}

function aim(element, {address, children}) {
  Object.assign(element, {href: address, rel: "noopener noreferrer", target: "_blank", title: address});
  if (children.join("") !== address) element.dataset.host = element.host || element.pathname;
}

// How each type of block is drawn: in a parent, below what is above it, or in that, where it goes on with it.  Returns
// the element of the two, what was added (if not that), and a function that draws the block there, and again as it has
// grown meanwhile; it says whether it could.  open: more of it may come.
const DRAW = {
  heading: (parent, {level}) => drawText(make(parent, `h${Math.min(6, level + 2)}`)),
  paragraph: (parent, {more}) => drawText(make(parent, "p", more ? "more" : "")),
  code: drawCode, table: drawTable, quote: drawQuote, item: drawItem,
  rule: parent => ({element: make(parent, "hr"), grow: () => true}),
  blank: (parent, block, above) => ({...above, added: null, grow: () => true}),
};

function drawText(element) {
  let drawn = [];
  return {element, grow({text}, open) {
    const nodes = parseInline(text, open), differs = drawn.findIndex((node, index) => !isAlike(node, nodes[index]));
    let kept = differs < 0 ? drawn.length : differs;
    const was = drawn[kept], is = nodes[kept];
    if (typeof was === "string" && typeof is === "string" && is.startsWith(was))   // it stays selected, if it is
      element.childNodes[kept++].appendData(is.slice(was.length));
    while (element.childNodes.length > kept) element.lastChild.remove();
    drawInline(element, nodes.slice(kept));
    drawn = nodes;
    return true;
  }};
}

const isAlike = (one, other) => one === other || Boolean(one.type) && one.type === other?.type
  && one.address === other.address && one.children?.length === other.children?.length
  && (one.children || []).every((child, index) => isAlike(child, other.children[index]));

function drawQuote(parent, {more}, above, depth) {
  if (more) return drawNested(above.element, null, above.inner);
  const element = make(parent, "blockquote");
  element.dir = "auto";
  return drawNested(element, element, growingText(element, depth + 1));
}

function drawItem(parent, {list, number, more}, above, depth) {
  if (more) return drawNested(above.element, null, above.inner);
  const goesOn = above?.element?.dataset.list === list, fits = goesOn && above.element.childElementCount < MANY;
  const element = fits ? above.element : make(parent, isNaN(number) ? "ul" : "ol", goesOn ? "more" : "");
  if (!fits) {
    element.dataset.list = list;
    element.dir = "auto";   // of its marks and indents; each paragraph has its own
    if (number >= 0) element.start = goesOn ? above.element.start + above.element.childElementCount : number;
  }
  const item = make(element, "li");
  element.style.setProperty("--digits", String(element.start + element.childElementCount).length);
  return drawNested(element, fits ? item : element, growingText(item, depth + 1));
}

// inner: the text in a quote or an item, to which what a block brings is added.
function drawNested(element, added, inner) {
  const from = inner.length;
  return {element, added, inner, grow({text, cut}, open) {
    inner.add(text, from);
    inner.draw(!open && !cut, Infinity);
    return true;
  }};
}

function scrollable(parent, tag, className, label) {   // sideways, and so reached by keyboard
  return Object.assign(make(parent, tag, className), {tabIndex: 0, role: "region", ariaLabel: label});
}

function drawCode(parent, {language, more}, above) {
  const element = more ? above.element : make(parent, "div", "code");
  if (!more) {
    const bar = make(element, "div"), pre = scrollable(element, "pre", "", "Code");
    make(bar, "span", "", language || "text");
    button(bar, "Copy", self => copy(self, pre.textContent)).ariaLabel = "Copy code";
  }
  const code = make(element.lastChild, "code"), shown = code.appendChild(new Text());
  return {element, added: more ? code : element, grow({text}) {
    if (!text.startsWith(shown.data)) return false;
    shown.appendData(text.slice(shown.length));
    return true;
  }};
}

function drawTable(parent, {head, align, more}, above) {
  const element = more ? above.element : scrollable(parent, "div", "wide", "Table");
  const table = more ? element.firstChild : make(element, "table");
  if (more) fixColumns(table);
  else {
    table.dir = "auto";
    drawRow(make(table, "thead"), "th", head, align, false);
  }
  const body = make(table, "tbody");
  let count = 0, last = null;
  return {element, added: more ? body : element, grow({rows, ...now}, open) {
    if (rows.length < count || String([now.head, now.align]) !== String([head, align])) return false;
    last?.remove();   // it may have grown
    for (const row of rows.slice(Math.max(0, count - 1)))
      last = drawRow(body, "td", row, align, open && row === rows.at(-1));
    count = rows.length;
    return true;
  }};
}

// Leave a long table's columns about as wide as they are, so that each row is laid out alone.
function fixColumns(table) {
  if (table.className) return;
  const widths = Array.from(table.rows[0].cells, cell => cell.offsetWidth);
  // A narrow one is of numbers, which get longer.
  table.style.setProperty("--columns", widths.map(width => `minmax(0, ${width + 32}fr)`).join(" "));
  table.style.minWidth = `max(100%, ${widths.reduce((sum, width) => sum + width)}px)`;
  table.className = "long";
}

function drawRow(parent, tag, row, align, open) {
  const element = make(parent, "tr");
  row.slice(0, align.length).forEach((text, index) => {
    const cell = make(element, tag);
    cell.style.textAlign = align[index];
    drawInline(cell, parseInline(text, open));
  });
  const missing = align.length - row.length;
  if (missing > 0) {   // one for all, or a little text would be many elements
    const cell = make(element, tag);
    cell.colSpan = missing;
    cell.style.gridColumn = `span ${missing}`;
  }
  return element;
}

const SLICE = 8;   // milliseconds of work before the browser may draw
const pause = () => new Promise(resolve => setTimeout(resolve));

// Whether a block is another only in its text: what is drawn of the one can become the other.
const KIND = ["type", "more", "level", "language", "list", "number"];
const isSame = (one, other) => KIND.every(name => Object.is(one[name], other[name]));

// A text that grows in an element.  What is whole is drawn once; of the rest, the tail, what cannot grow is drawn anew.
// Parts bound what the browser lays out with what is new.
function growingText(element, depth = 0) {
  let text = "", at = 0, before = null, above = null, tail = [], part = depth ? element : make(element, "div", "part");
  const takeBack = count => tail.splice(count).forEach(({added}) => added?.remove());
  // Draw until some time, at least a block; tell if there is more.  ended: nothing will be added.
  function draw(ended, until = performance.now() + SLICE) {
    let count = 0, next = at, last = before, shown = above;
    while (next < text.length || last?.cut && tail[count]) {   // even if nothing is left of what went on with that one
      const block = blockAt(text, next, last, depth), open = count > 0 || !(block.whole || ended), drawn = tail[count];
      if (!drawn || !isSame(drawn.block, block) || !drawn.grow(block, open)) {
        takeBack(count);
        const made = DRAW[block.type](part, block, shown, depth);
        tail.push({added: made.element, ...made, block});
        tail[count].grow(block, open);
      }
      [next, last, shown] = [block.end, block, tail[count]];
      if (open) { count++; continue; }
      tail.shift();
      [at, before, above] = [next, last, shown];
      if (part.getElementsByTagName("*").length > MANY) part = make(element, "div", "part");
      if (at < text.length && performance.now() > until) return true;
    }
    takeBack(count);
    return false;
  }
  // from: where the text is another from now on; nothing behind that is whole.
  const add = (piece, from = text.length) => { text = text.slice(0, from) + piece.replaceAll("\r", ""); };   // of CRLF
  return {get length() { return text.length; }, add, draw};
}

// The conversation: turns of a question and its answer, kept for this tab.

const store = `streamproxy ${location.pathname}`, model = $("#model").textContent;
// stop ends the answer that is arriving; draft is what stood in the box in which the last question is edited.
let turns = [], stop = null, draft = null;

// What is said of answers that did not end by themselves.
const ENDINGS = {length: "The answer reached the token limit.", content_filter: "A content filter ended the answer.",
  refusal: "The model refused to answer."};

function restore(name) {
  try { return sessionStorage.getItem(name); } catch { return null; }   // a browser may forbid it
}

// Keep as many of the last turns as there is room for.
function save() {
  for (let first = 0; first < turns.length; first = 2 * first + 1)
    try { return sessionStorage.setItem(store, JSON.stringify(turns.slice(first))); } catch {}
  try { sessionStorage.removeItem(store); } catch {}
}

function drawTurn(turn) {
  const element = make(log, "div", "turn");
  const user = make(element, "section", "message user"), assistant = make(element, "section", "message assistant");
  make(user, "h2", "label", "You");
  make(user, "div", "text", turn.question);
  button(make(user, "div", "tools last"), "Edit", edit);
  make(assistant, "h2", "label", "Assistant");
  const details = make(assistant, "details"), summary = make(details, "summary");
  details.hidden = true;
  const reasoning = growingText(make(details, "div")), answer = growingText(make(assistant, "div", "text"));
  return {element, details, summary, reasoning, answer, tools: make(assistant, "div", "tools")};
}

// Draw what there is of a turn's texts, for a while; tell if there is more.
function drawTexts(turn, view, ended) {
  const more = view.reasoning.draw(ended) || view.answer.draw(ended);
  view.details.hidden = !turn.reasoning;
  const thought = turn.thought === undefined ? "Thinking" : `Thought for ${Math.max(1, Math.round(turn.thought))} s`;
  const begin = view.details.querySelector(".part > *")?.textContent ?? "";
  setText(view.summary, `${thought}: ${begin.trimStart().split("\n")[0]}`);
  return more;
}

function drawEnd(turn, view) {
  const note = turn.error || turn.note || (turn.ended ? "" : "The answer was left.");
  view.tools.replaceChildren();
  if (note) {
    const ending = make(null, "p", turn.error ? "ending error" : "ending", note);
    view.tools.before(ending);
    if (turn.error) button(ending, "Try again", again, "last");
  }
  if (turn.answer) button(view.tools, "Copy", self => copy(self, turn.answer)).ariaLabel = "Copy answer";
  if (!turn.error) button(view.tools, "Regenerate", again, "last");
  if (turn.stats) make(view.tools, "span", "stats", turn.stats);
  view.element.normalize();
}

function statsOf({began, first, pieces, usage}) {
  if (!first || !began) return "";
  const count = usage?.completion_tokens || pieces, seconds = (performance.now() - first) / 1000;
  const unit = usage?.completion_tokens ? "tokens" : "pieces";
  const rate = seconds > .05 && count > 1 ? `${Math.round(count / seconds)} ${unit} a second` : "";
  return [`${((first - began) / 1000).toFixed(1)} s to the first token`, rate, model].filter(Boolean).join(" · ");
}

// Answers.  With --resume, one goes on without us for so many milliseconds, and is kept for as long, so that we can
// come back for the rest.  A turn has a key, sent with the question; a stream, the server's name for the answer (null:
// it is not kept); and a place, the last event that has come.

const resume = 1000 * $("main").dataset.resume, base = location.origin + location.pathname.replace(/[^/]*$/, "");
const newKey = () => Array.from(crypto.getRandomValues(new Uint32Array(4)), each => each.toString(16)).join("-");
const credentials = () => token.value && {"Authorization": `Bearer ${token.value}`};
// Once nothing has come of it, a question that is asked again after that time would be paid for again.
const isKept = (turn, since) => resume && turn.stream !== null && Date.now() - since < resume;

// The events of an event stream, wherever its bytes were cut on the way.
async function* readEvents(body) {
  const reader = body.getReader(), decoder = new TextDecoder();
  let rest = "", begun = performance.now();
  // On a new network, what began on another may be silent for ever.
  if (resume) addEventListener("online", () => reader.cancel(), {once: true});
  for (;;) {
    const {value, done} = await reader.read();
    if (done) return;
    const events = (rest + decoder.decode(value, {stream: true})).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const fields = event.split("\n").map(line => line.split(/: (.*)/s));
      const {id, event: type = "message", data} = Object.fromEntries(fields);
      yield {id, type, data: JSON.parse(data || "{}")};
      if (performance.now() - begun > SLICE) {
        await pause();
        begun = performance.now();
      }
    }
  }
}

function request(turn, signal) {
  const headers = {"Accept": "text/event-stream", ...credentials()};
  if (turn.place) headers["Last-Event-ID"] = turn.place;
  if (turn.stream) return fetch(`${base}streams/${turn.stream}`, {signal, headers});
  const answered = turns.slice(0, turns.indexOf(turn)).filter(each => each.answer);
  const messages = answered.flatMap(({question, answer}) =>
    [{role: "user", content: question}, {role: "assistant", content: answer}]);
  messages.push({role: "user", content: turn.question});
  if (resume) headers["Idempotency-Key"] = turn.key;
  headers["Content-Type"] = "application/json";
  const body = JSON.stringify({messages});
  return fetch(location.origin + location.pathname, {method: "POST", signal, headers, body});
}

// An answer that is left goes on; one that is stopped must not.
function tellStop({key}) {
  const headers = {"Idempotency-Key": key, ...credentials()};
  if (resume) fetch(`${base}streams`, {method: "DELETE", keepalive: true, headers}).catch(() => {});
}

// Take what one connection brings.  Returns the status of the answer; raises where it was lost.
async function receivePart(turn, measured, take) {
  turn.error = "The server could not be reached.";
  const response = await request(turn, measured.signal), {status, ok} = response;
  turn.error = status === 204 ? "The rest of the answer is not kept any more."
    : ok ? "The answer was cut off." : `The server answered with status ${status}.`;
  if (status === 204) return status;
  if (!ok) {
    const told = await response.json().catch(() => null);   // null: by something in front of the server
    turn.error = told?.error?.message || told?.error || turn.error;
    const later = turn.stream && status === 503;   // it is kept all the same
    if (!later && (told || status < 500)) return status;
    throw Error(turn.error);
  }
  measured.arrived = true;
  turn.stream = response.headers.get("Stream-Id");
  tell("Answering");
  for await (const {id, type, data} of readEvents(response.body)) {
    turn.place = id || turn.place;
    if (type === "message" && data.text || type === "reasoning") {
      measured.first ||= performance.now();
      measured.pieces++;
      take(type, data.text);
    }
    measured.usage = data.usage || measured.usage;
    turn.note = ENDINGS[data.finish_reason] || turn.note;
    if (type !== "error" && type !== "done") continue;
    turn.error = data.error || "";
    measured.settled = true;
  }
  if (!measured.settled) throw Error(turn.error);
  return status;
}

// Take what arrives into the turn, and come back for what a lost connection has left; take: called after each piece.
// Returns the status of the answer, 0 where its connection was lost at last.
async function receive(turn, measured, take) {
  let since = turn.stream ? Date.now() : turn.asked;
  for (let tries = 0;; tries++) {
    measured.arrived = false;
    try { return await receivePart(turn, measured, take); } catch {}
    if (measured.arrived) [tries, since] = [0, Date.now()];
    if (measured.settled || measured.signal.aborted || !isKept(turn, since)) return 0;
    tell("No connection. The answer goes on when it is back.", true);
    await new Promise(goOn => {
      setTimeout(goOn, Math.min(10000, 250 * 2 ** tries));
      addEventListener("online", goOn, {once: true});
      measured.signal.addEventListener("abort", goOn);
    });
  }
}

// was: the turn in whose place this comes, if there is one.
function ask(question, was) {
  const turn = {question, answer: "", reasoning: "", note: "", key: newKey(), asked: Date.now()};
  turns.push(turn);
  save();
  fillIn(turn, drawTurn(turn), performance.now(), was);
}

// Have a turn's answer come.  began: when it was asked; 0: on a page that was left since.
async function fillIn(turn, view, began, was) {
  setRunning(true);
  const {signal} = stop, measured = {signal, began, first: 0, pieces: 0, usage: null, arrived: false, settled: false};
  let frame = 0;
  make(view.tools, "span", "dot");
  signal.addEventListener("abort", () => tellStop(turn));
  const draw = () => {
    frame = 0;
    if (drawTexts(turn, view, false)) frame = requestAnimationFrame(draw);
    follow();
  };
  const endThought = () => { if (turn.reasoning) turn.thought ??= (performance.now() - measured.first) / 1000; };
  const status = await receive(turn, measured, (type, text) => {
    const kind = type === "message" ? "answer" : "reasoning";
    if (kind === "answer") endThought();
    view[kind].add(text);
    turn[kind] += text;
    frame ||= requestAnimationFrame(draw);   // pieces are drawn together
  });
  cancelAnimationFrame(frame);
  endThought();
  if (was && !measured.first && (turn.error || signal.aborted))   // nothing has come in its place
    for (const kind of ["reasoning", "answer"]) view[kind].add(turn[kind] = was[kind]);
  while (drawTexts(turn, view, true)) await pause();
  if (!turns.includes(turn)) return;   // there is a new chat
  if (signal.aborted) [turn.error, turn.note] = ["", "Stopped."];
  if (status === 401) { takeBack(turn, view); return; }
  Object.assign(turn, {ended: true, stats: statsOf(measured)});
  drawEnd(turn, view);
  save();
  setRunning(false);
  tell(turn.error || turn.note || "The answer is whole.");
}

// No token, or not one that is known: nothing was asked, so the question goes back to its box.
function takeBack(turn, view) {
  view.element.remove();
  turns.splice(turns.indexOf(turn), 1);
  input.value = turn.question;
  setRunning(false);
  tell("");
  access.querySelector("p").textContent = token.value ? "This token is not known here." : "";
  access.hidden = false;
  token.focus();
}

function dropLast() {
  turns.pop();
  log.lastElementChild.remove();
}

function again(self) {
  if (stop) return;
  leaveEditing();
  const was = turns.at(-1), byKey = self.matches(":focus-visible");
  dropLast();
  if (byKey) input.focus();   // for the button has gone; whoever has touched it wants no keyboard
  ask(was.question, was);
}

function edit() {
  if (stop || draft !== null) return;
  draft = input.value;
  fill(turns.at(-1).question);
  log.lastElementChild.classList.add("editing");
  tell("Editing the last question. Escape leaves it as it was.");
}

function leaveEditing() {
  if (draft === null) return;
  fill(draft);
  draft = null;
  log.lastElementChild.classList.remove("editing");
  tell("");
}

function clear() {
  stop?.abort();
  leaveEditing();
  turns = [];
  save();
  log.replaceChildren();
  setRunning(false);
  tell("");
  input.focus();
}

async function copy(self, text) {
  try { await navigator.clipboard.writeText(text); } catch {   // which is for https and this machine alone
    const area = make(document.body, "textarea", "label");
    area.value = text;
    area.select();
    document.execCommand("copy");
    area.remove();
    self.focus();
  }
  tell("Copied.");
  self.textContent = "Copied";
  setTimeout(() => { self.textContent = "Copy"; }, 1500);
}

function setText(element, text) {   // only once, or it is read out and laid out again
  if (element.textContent !== text) element.textContent = text;
}

function tell(text, shown = false) {   // to screen readers, where others see it anyway
  $("#status").className = shown ? "" : "label";
  setText($("#status"), text);
}

// The window: scrolling, the box, keys.

let following = true, topWas = 0;   // the end is followed until the reader moves up

function follow() {
  if (following) {
    page.scrollTop = page.scrollHeight;
    topWas = page.scrollTop;   // or a move up before the scroll event of this would not be seen
  }
  $("#end").hidden = following;
}

addEventListener("scroll", () => {
  const rest = page.scrollHeight - page.clientHeight - page.scrollTop;
  if (rest < 1) following = true;
  else if (page.scrollTop < topWas) following = false;
  topWas = page.scrollTop;
  $("#end").hidden = following;
}, {passive: true});

function fit() {   // the box to its text, at most a third of the window
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
}

function fill(text) {
  input.value = text;
  fit();
  input.focus();
}

function setRunning(running) {
  stop = running ? new AbortController() : null;
  if (document.activeElement.matches("#send, #stop")) input.focus();   // the button is about to go
  $("#send").hidden = running;
  $("#stop").hidden = !running;
  $("#greeting").hidden = turns.length > 0;
  $("#new").hidden = !turns.length;
  log.ariaBusy = running;   // an answer is read out when it is whole
  if (running) tell("Answering");
  following ||= running;
  fit();
  follow();
}

form.addEventListener("submit", event => {
  event.preventDefault();
  const question = input.value;
  if (stop || !question.trim()) return;
  input.value = "";
  if (draft !== null) { leaveEditing(); dropLast(); }
  ask(question);
});
input.addEventListener("input", fit);
input.addEventListener("keydown", event => {
  const line = event.shiftKey || matchMedia("(pointer: coarse)").matches;   // a touch screen has a button that sends
  if (event.key !== "Enter" || line || event.keyCode === 229) return;   // 229: input method
  event.preventDefault();
  form.requestSubmit();
});
addEventListener("keydown", event => {
  if (event.key !== "Escape" || event.isComposing) return;
  if (draft === null) stop?.abort();
  else leaveEditing();
});
access.addEventListener("submit", event => {
  event.preventDefault();
  token.value = token.value.trim();
  const wrong = /[^!-~]/.test(token.value) && "A token has no spaces and only letters, digits and signs of ASCII.";
  access.querySelector("p").textContent = wrong || "";
  if (wrong || !token.value) return;
  try { sessionStorage.setItem("token", token.value); } catch {}
  access.hidden = true;
  input.focus();
  form.requestSubmit();
});
$("#stop").addEventListener("click", () => stop?.abort());
$("#new").addEventListener("click", clear);
$("#end").addEventListener("click", () => { following = true; follow(); input.focus(); });
for (const example of document.querySelectorAll("#greeting button"))
  example.addEventListener("click", () => fill(example.textContent));
document.addEventListener("visibilitychange", save);   // the last that a page is told of before it may be gone
addEventListener("resize", follow);

token.value = restore("token") || "";   // kept for this tab
turns = JSON.parse(restore(store) || "[]");
for (const turn of turns) {
  const view = drawTurn(turn);
  const goesOn = !turn.ended && isKept(turn, turn.stream ? Date.now() : turn.asked);
  view.reasoning.add(turn.reasoning);
  view.answer.add(turn.answer);
  while (drawTexts(turn, view, !goesOn));
  if (goesOn) fillIn(turn, view, 0);
  else drawEnd(turn, view);
}
if (!stop) setRunning(false);
</script>
"""


def _policy_of(page: str) -> str:
    """The page's Content-Security-Policy: its own style and script, by hash, and its own server."""
    hashes = {}
    for tag in ("script", "style"):
        text = page.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        hashes[tag] = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{hashes['script']}'; style-src 'sha256-{hashes['style']}';"
        " connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


PAGE_FIELDS = {"Content-Type": "text/html; charset=utf-8", "Content-Security-Policy": _policy_of(_PAGE)}


def chat_page(settings: Settings) -> bytes:
    """Return the chat page with its title, the model's name and --resume, none of them in its script or style."""
    page = re.sub("{{(title|model|resume)}}", lambda found: html.escape(str(getattr(settings, found[1]))), _PAGE)
    return page.encode("utf-8", "replace")


if __name__ == "__main__":
    run_script()
