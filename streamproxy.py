#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
# SPDX-FileCopyrightText: 2026 the streamproxy authors
"""A streaming proxy between web pages and an OpenAI-compatible API, in one file.

A page must never hold the API key.  This server holds it: it takes POST {"prompt": "..."},
asks the API with "stream": true, and hands each piece of text on the moment it arrives.

    OPENAI_API_KEY=sk-... python3 streamproxy.py    serve on http://127.0.0.1:8000
    python3 streamproxy.py --demo                   the same with a built-in API: no key, no network
    python3 streamproxy.py --help                   every setting

    import streamproxy                              # does nothing by itself
    settings = streamproxy.Settings(api_key="sk-...", bind="127.0.0.1:0")
    with streamproxy.Server(settings) as server:    # serves until the block ends
        print(server.url)
    for text in streamproxy.stream_text("Say hello", settings):   # no server at all
        print(text, end="", flush=True)

It terminates no TLS, stores nothing and knows no users: nginx in front does the first.

Life of a request, and the section of this file for each step:

    the relay accepts; Inbox takes the request in                        9, 11
      a thread is given the connection; Handler checks the request       12
        Access and Limits let it pass                                    8
        Upstream.open sends the request, on a new or a warm connection   10
      the thread turns to other work; the relay moves what arrives:      9
        BodyDecoder         upstream's framing to the bytes of the body  5
        EventParser         bytes to events                              3
        Answer              events to what the client asked for          4
        Stream              one chunk, one send                          11
      a thread answers with an error if nothing was sent, logs the request

There are a few threads for what is short or blocks; and one, the relay, for what is long: it owns
every clock and waits for nothing but its selector.

Sources: RFC 9110 and 9112 (HTTP), WHATWG HTML section 9.2 (server-sent events).
"""

from __future__ import annotations

import argparse
import base64
import codecs
import collections
import contextlib
import email.utils
import errno
import functools
import hashlib
import heapq
import hmac
import http.client
import http.server
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
import struct
import sys
import threading
import time
import urllib.parse
import urllib.request
import zlib

TYPE_CHECKING = False  # typing costs time and memory, and is not needed at run time
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from typing import Any, ClassVar, NoReturn, Self

__version__ = "0.1.0"
__all__ = ["Event", "EventParser", "ProxyError", "Server", "Settings", "SettingsError", "stream_text"]

log = logging.getLogger("streamproxy")


# 1 ------------------------------------------------------------------- Limits

# Bytes.
READ_SIZE = 64 * 1024  # asked of a socket at a time; it leaves at once, so this bounds what waits for a slow client
MAX_HEAD_SIZE = 64 * 1024  # of a head, of a request or an answer
MAX_SKIMMED = 256 * 1024  # of a JSON document that is parsed only for the log's sake: it would hold up the rest
MAX_EVENT_SIZE = 16 * 1024 * 1024  # of an event or a JSON document, held until it is whole: images make several MB
MAX_ERROR_SIZE = 64 * 1024  # of a document that says why upstream refuses; longer ones are quoted, not passed on
MAX_CHUNK_LINE = 4 * 1024  # of a chunk's size line; RFC 9112 section 7.1.1 asks for a limit
MAX_TRAILER_SIZE = 16 * 1024
MAX_DISCARDED = 64 * 1024  # of a refused request's body, read for the sake of the connection
# Of the next request while an answer is on its way: unless they are read, the end behind them is not seen.
MAX_PIPELINED = 64 * 1024
# Of what a refused client still sends: to close with bytes unread would reset the connection, and the client
# would never see why it was refused.
MAX_LINGER_SIZE = 1024 * 1024

# Seconds.
LINGER_TIMEOUT = 1.0  # for reading that
END_GRACE = 1.0  # for usage and [DONE] to follow a finish_reason
ABORT_GRACE = 5.0  # for aborted streams to end truthfully once the drain is over
KEEP_ALIVE_TIMEOUT = 60.0  # for a connection to upstream between two requests
STALE_WINDOW = 0.5  # for upstream to say that it had closed a connection before it was used again
IDLE_THREAD_TIMEOUT = 0.1  # for a thread that has done its work to be given more
SHORTAGE_PAUSE = 0.1  # before what failed for want of a descriptor or a thread is tried again
FOREVER = 86400.0  # where a wait needs a number and there is no limit

# Counts.
MAX_FIELDS = 100  # of a head; 40 are seen in practice
MAX_INTERIM = 10  # answers (100, 103) before the one that counts
MAX_IDLE_CONNECTIONS = 128  # to upstream, between two requests
MAX_QUIET_CLIENTS = 10_000  # remembered for their limits although they have no stream
SPARE_CONNECTIONS = 256  # beyond two a stream: those between two requests, and those slow to send one
BACKLOG = 1024  # of connections that wait to be accepted (socketserver: 5)
# Threads that work at a time; those that wait do not count.  More of them starve the relay of the interpreter
# when a thousand requests arrive at once.
MAX_WORKING = 4

# Upstream statuses that are about the request or about load, so that the client may see them with their
# message.  Any other failure is between upstream and us: 502.
PASSED_STATUSES = (400, 402, 404, 408, 409, 413, 415, 422, 425, 429, 503, 529)


# 2 ------------------------------------------------------------------- Errors


class ProxyError(Exception):
    """Why a request failed: a sentence for the client, a status, and the log's word for the ending.

    ProxyError
    +-- RequestError           the client asked for what cannot be done
    +-- UpstreamError          upstream is unreachable, unwilling, too slow or cut off
    |   +-- Garbled            it sent what its protocol does not have
    +-- Aborted                we cut the stream: drain, stalled client
    +-- Disconnected           the client left
    """

    status = 500
    ending = "error"

    def __init__(
        self, message: str, status: int = 0, ending: str = "", fields: Mapping[str, str] | None = None, code: str = ""
    ) -> None:
        """fields are header fields that the answer must have; code is the API's word for the error."""
        super().__init__(message)
        self.message = message
        self.logged = message  # differs where message quotes upstream, which may quote the prompt
        self.status = status or self.status
        self.ending = ending or self.ending
        self.fields = dict(fields or {})
        self.code = code
        self.document = b""  # what upstream said, whole


class RequestError(ProxyError):
    status = 400


class UpstreamError(ProxyError):
    status = 502


class Garbled(UpstreamError):
    pass


class Aborted(ProxyError):
    status = 503
    ending = "aborted"


class Disconnected(ProxyError):
    status = 499  # as nginx logs it
    ending = "disconnect"


class SettingsError(ValueError):
    """A setting that cannot be used; the text is one line that says what is allowed."""


def place_of(error: BaseException) -> str:
    """Type and place of an unexpected exception; its text could hold what nobody may read."""
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    return f"{type(error).__name__} in line {trace.tb_lineno if trace else '?'}"


def reason_of(error: BaseException) -> str:
    """Why a system call or a handshake failed, in words that hold no address, path or secret."""
    for kind, words in (
        (ssl.SSLCertVerificationError, "its certificate is not trusted"),
        (ssl.SSLError, "the TLS handshake failed"),
        (socket.gaierror, "its name was not found"),
        (socket.timeout, "it took too long"),
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


# 3 ------------------------------------------------------------------- Event streams


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
        event of that type, and lines that are no field at all, as of bare JSON, are one of type "".
        """
        self.idle = 0  # comments and blank lines since somebody looked: no event, but signs of life
        self._max_event_size = max_event_size
        self._strict = strict
        self._line: list[bytes] = []  # the unfinished line, in the pieces it came in
        self._data: list[bytes] = []  # the data lines of the unfinished event
        self._strays: list[bytes] = []  # its lines that are no field
        self._held = 0  # bytes in all three, with a line end for each line
        self._type = ""
        self._last_event_id = ""
        self._after_cr = False  # a CR ends its line at once; an LF after it is skipped when it comes
        self._at_start = True

    def feed(self, data: bytes) -> list[Event]:
        """Return the events that data completes, oldest first.

        data may be cut anywhere: in a UTF-8 sequence, between CR and LF, in a field name.  An
        event is returned by the call that brings its blank line, never one call later.

        Raises Garbled past max_event_size bytes of one event.
        """
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
        held, strays = self._data, self._strays
        for line in lines:
            if line[:5] == b"data:" or line == b"data":
                held.append(line[6:] if line[5:6] == b" " else line[5:])
                self._held += len(line)
            elif line:
                self._take_field(line)
            else:
                if strays:  # before what follows: they may say that it counts no more
                    events.append(Event("", b"\n".join(strays).decode("utf-8", "replace"), self._last_event_id))
                    strays.clear()
                if held:
                    data = (held[0] if len(held) == 1 else b"\n".join(held)).decode("utf-8", "replace")
                    events.append(Event(self._type or "message", data, self._last_event_id))
                    held.clear()
                elif self._type == "error" and not self._strict:
                    events.append(Event("error", "", self._last_event_id))
                else:
                    self.idle += 1
                self._held = 0
                self._type = ""

    def _take_field(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        value = value[1:] if value.startswith(b" ") else value
        if name == b"event":
            self._type = value.decode("utf-8", "replace")
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


class EventCutter:
    """The events of a stream in the bytes they came in, as they become whole."""

    # What passes of an event that is not whole: it says nothing yet.
    _QUIET = re.compile(rb"(?:(?:event|id|retry)?:[^\r\n]*(?:\r?\n|\Z))*[^\r\n]{0,8}")

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
        return events

    def pass_on(self, passed: int) -> bytes:
        """Return what may pass of the event that is not whole, of which passed bytes did."""
        size, data = len(self.rest), b""
        if size > MAX_EVENT_SIZE or (size < 256 and self._QUIET.fullmatch(self.rest)):
            data, passed = bytes(self.rest[passed:]), size
        if size > MAX_EVENT_SIZE:
            del self.rest[1024:-4]  # its type, which comes first, is all that is looked at then
            passed = len(self.rest)
        self.passed = passed
        return data


def encode_event(data: str, type: str = "", last_event_id: str = "") -> bytes:
    """Return one event.  Line ends in data become data lines of their own (WHATWG HTML 9.2.6)."""
    head = (f"id: {last_event_id}\n" if last_event_id else "") + (f"event: {type}\n" if type else "")
    return (head + "".join(f"data: {line}\n" for line in re.split("\r\n|\r|\n", data)) + "\n").encode("utf-8", "replace")


# A comment has one line end: with a blank line behind it, SDKs in wide use see an empty event.
PING = b": ping\n"


# 4 ------------------------------------------------------------------- Answers


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


load_json = functools.partial(
    json.loads, parse_constant=_refuse_constant, parse_int=_parse_number, parse_float=_parse_number,
    object_pairs_hook=_unique_members,
)

# What servers send beside JSON, such as NaN, is null.  For what is as short as an event, a decoder that leaves
# integers to the interpreter is twice as fast.
_SHORT_JSON = 4096
_parse_short_json = json.JSONDecoder(parse_constant=lambda name: None).raw_decode
_parse_long_json = json.JSONDecoder(
    parse_constant=lambda name: None, parse_int=lambda text: int(text) if len(text) < 400 else None
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
        or has_bad_code(payload) or said.get("success") is False or said.get("ok") is False
        or re.fullmatch("[45][0-9][0-9]", status) or (_FAILED.search(status) and "object" not in said)
    ):  # fmt: skip
        return True
    about = said.keys() & {"code", "status", "success", "ok", "usage", "model", "role", "content", "delta"}
    words = said.get("detail"), *(said.get(name) for name in ("message", "msg") if not about)
    return not named and any(map(sentence_of, words))


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
        words = next(filter(None, (sentence_of(said.get(name), depth - 1) for name in _SENTENCES)), "")
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


def parse_event(event: Event) -> dict[str, Any]:
    """Return the JSON object in an event; {} where it says nothing.

    Raises Garbled, and UpstreamError for an error that upstream sent this way.
    """
    data = event.data
    if event.type == "message" and len(data) < _SHORT_JSON and '"error' not in data:  # mostly
        try:
            payload, end = _parse_short_json(data)
            if end == len(data) and payload.get("choices"):
                return payload  # type: ignore[no-any-return]
        except (ValueError, AttributeError, RecursionError):
            pass
    return check_payload(load_event(event), event.type)


def load_event(event: Event) -> Any:
    """Return the JSON in an event; {} where it says nothing.  Raises as parse_event."""
    try:
        return {} if event.type == "ping" else load_payload(event.data)
    except Garbled:
        named = event.type not in ("message", "")
        if _ERROR_NAME.search(event.type) if named else _ERROR_WORDS.match(event.data):
            raise quoting("Upstream reported an error.", 502, event.data) from None
        if event.type != "message":
            return {}  # somebody's own event
        raise


def check_payload(payload: object, type: str = "message") -> dict[str, Any]:
    """Return payload, if it is a JSON object that tells of no error.  Raises Garbled, and UpstreamError."""
    error = find_error(payload, type)
    if error is not None:
        status = next((int(kind) for kind in kinds_of(error) if kind.isdigit() and int(kind) in PASSED_STATUSES), 502)
        raise quoting("Upstream reported an error.", status, error)
    if isinstance(payload, dict):
        return payload
    if type != "message":
        return {}
    raise Garbled("Upstream sent JSON that is not an object.")


def conceal(text: str, redact: Callable[[str], str]) -> str:
    r"""Return text without secrets, also where JSON escapes them as \u0073k-...; unchanged where it has none."""
    plain = _ESCAPED.sub(lambda match: (match[2] or chr(int(match[1], 16))) if match[1] or match[2] else match[0], text)
    hidden = redact(plain)
    return text if hidden == plain else hidden


# JSON's escapes of visible ASCII, but for the quote and the backslash, which it must escape.
_ESCAPED = re.compile(r"\\(?:u00(2[013-9a-f]|[346][0-9a-f]|5[0-9abd-f]|7[0-9a-e])|(/)|.)", re.IGNORECASE | re.DOTALL)


def conceal_bytes(data: bytes, redact: Callable[[str], str]) -> bytes:
    return conceal(data.decode("utf-8", "surrogateescape"), redact).encode("utf-8", "surrogateescape")


# Refusals: answers whose status is no success.

_COMPRESSION = re.compile("(?:x-)?(?:gzip|compress|deflate|bzip2)|br|zstd|dcb|dcz|lz4|snappy|exi", re.IGNORECASE)
_WAIT = re.compile("[0-9]{1,9}|[A-Z][a-z]{2}, [0-9A-Za-z :]{20,26}")  # RFC 9110 section 10.2.3


def compression_of(fields: Mapping[str, str]) -> str:
    """Return the Content-Encoding of an answer, if it is one: servers also send none, utf-8 and identity."""
    codings = [coding.strip() for coding in fields.get("content-encoding", "").split(",")]
    return ", ".join(filter(_COMPRESSION.fullmatch, codings)).lower()


def inflate(data: bytes, coding: str) -> bytes:
    """Return what coding has packed, little more than MAX_ERROR_SIZE at most; b"" where it cannot be read."""
    if not coding:
        return data
    if "gzip" in coding or "deflate" in coding:
        for wbits in (47, -15):  # the formats of gzip and zlib, and what RFC 9110 section 8.4.1.2 warns of
            with contextlib.suppress(zlib.error):
                return zlib.decompressobj(wbits).decompress(data, MAX_ERROR_SIZE + 1)
    return b""


def refusal(status: int, document: bytes, retry_after: str) -> UpstreamError:
    """Return the failure for an upstream answer whose status is no success."""
    text = document.decode("utf-8", "replace")
    try:
        said = load_payload(text)
    except Garbled:
        said = text
        if text.lstrip()[:1] in ("{", "["):  # cut off, perhaps for its length: the first sentence in it
            said = json.loads(next(iter(_TOLD.findall(text)), '"') + '"', strict=False)
    words = f"Upstream failed with status {status}."
    if status == 401:
        words = "Upstream refused our API key with status 401."
    elif 300 <= status < 400:
        words = f"Upstream redirects with status {status}, which is not followed."
    elif 400 <= status < 500 or status in PASSED_STATUSES:
        words = f"Upstream refused the request with status {status}."
    passes = status in PASSED_STATUSES
    failure = quoting(words, status if passes else 502, said)
    if not passes:
        failure.message = failure.logged
    if status in (429, 503, 529):
        failure.fields["Retry-After"] = retry_after if _WAIT.fullmatch(retry_after) else "1"
    return failure


_TOLD = re.compile(r'"(?:message|msg|detail|error)"\s*:\s*("(?:[^"\\]|\\u[0-9a-fA-F]{4}|\\["\\/bfnrt]){1,1000})')


# Text.

_TEXT_PARTS = ("", "text", "output_text", "refusal")
_REASONING = ("reasoning_content", "reasoning", "reasoning_text", "reasoning_details", "thinking", "thinking_blocks")
_BESIDE_CONTENT = frozenset((*_REASONING, "refusal"))


def words_in(part: object, depth: int = 4) -> str:
    """Return the text of a part of a message: a string, parts within it, or an object that has either."""
    if isinstance(part, str):
        return part
    if isinstance(part, list) and depth:
        return "".join([words_in(item, depth - 1) for item in part])
    if isinstance(part, dict) and depth:
        names = ("text", "value", "thinking", "reasoning", "summary", "refusal", "content")
        return next(filter(None, (words_in(part.get(name), depth - 1) for name in names)), "")
    return ""


def parse_part(part: dict[str, Any]) -> tuple[str, str]:
    """Return (text, reasoning) of a delta or a message.  Raises AttributeError and TypeError for what is none."""
    text, reasoning = part.get("content") or "", ""
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


def join_halves(joiner: codecs.IncrementalDecoder, text: str) -> str:
    """Return text with the surrogate pairs whole that upstream split over two events.

    A tokeniser may cut an emoji in two, and JSON then carries each half as an escape of its own.
    joiner, for UTF-16, keeps the first half until the second comes, and makes U+FFFD of one left alone.
    """
    if text.isascii() and not joiner.getstate()[0]:  # mostly
        return text
    return joiner.decode(text.encode("utf-16-le", "surrogatepass"))


# What a body is.  Its first bytes tell: labels are wrong too often.
_UNTOLD, _EVENTS, _DOCUMENT, _OTHER = range(4)
_FIELD = re.compile(rb"(?:data|event|id|retry|error) ?:|:")
_FIELD_STARTS = (b"data:", b"event:", b"id:", b"retry:", b"error:")
_FIELD_IN_DOCUMENT = re.compile(rb"[\r\n](?:data|event|id|retry|error) ?:")  # no JSON has a line that begins so
_AS_IT_COMES = re.compile("(?:audio|image|video|multipart)/|.*(?:ndjson|jsonl|json-seq)")


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


class Answer:
    """What the client is sent, made from the body that upstream sends.

    failure: it can no longer become complete; what feed returned before, and returns with it, still
    counts.  Where the state is ENDING then, what comes within the moment still passes, too.
    """

    # SETTLED: complete however the body ends now.  ENDING: all but a word or two has come, and the body should
    # end in a moment; when that is over, close(None).  DONE: nothing more is waited for.
    OPEN, SETTLED, ENDING, DONE = range(4)

    content_type = ""
    eager = False  # the head leaves as soon as upstream's has come, not with the first text
    pings = False  # heartbeats make sense
    passes = False  # upstream's own documents and fields are for the client
    choices = 1  # that were asked for
    status = 200

    def __init__(self, redact: Callable[[str], str] = str) -> None:
        """redact takes secrets out of what upstream says of its errors, and of its fields."""
        self.state = self.OPEN
        self.failure: UpstreamError | None = None
        self.fields: dict[str, str] = {}  # of upstream's head, those that the client is to see
        self.request_id: str | None = None  # upstream's
        self.model: str | None = None
        self.usage: dict[str, Any] | None = None
        self.finish_reason: str | None = None
        self.life = 0  # grows with all that says that upstream is alive and not about to end
        self.events = self.pieces = self.size = 0  # pieces and size: of what was passed on, in bytes
        self._redact = redact
        self._label = self._form = _UNTOLD
        self._held = bytearray()  # what has come, until it is told what it is, or of a document, until it is whole

    def start(self, status: int, fields: Mapping[str, str]) -> Answer:
        """Take upstream's head, which says how the body is to be read; return what takes the body."""
        fields = dict(zip(fields, self._redact("\n".join(fields.values())).split("\n")))
        self.request_id = (fields.get("x-request-id") or fields.get("request-id") or "")[:200] or None
        if self.passes:
            self.fields = {name.title(): value for name, value in fields.items() if passes_back(name)}
        if not (status in (200, 201, 202) or (self.passes and 200 <= status < 300)):
            return Refusal(self, status, fields)
        if compression_of(fields):
            self.failure = Garbled("Upstream compressed its answer, although asked not to.")
        label = fields.get("content-type", "").partition(",")[0].partition(";")[0].strip().lower()
        self._label = _EVENTS if label == "text/event-stream" else _DOCUMENT if label.endswith("json") else _OTHER
        self._form = _OTHER if self.passes and _AS_IT_COMES.match(label) else _UNTOLD
        self._start(status, fields, label)
        return self

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

    def end(self) -> bytes:
        """Return what follows the last text of a complete answer."""
        return b""

    def ping(self) -> bytes:
        """Return a heartbeat; b"" where none may stand now."""
        return b""

    def encode(self, type: str, **payload: Any) -> bytes:
        """Return what the client is to see of an event: message, reasoning, done, or the error that ends it.

        b"" for an error: nothing tells of it but a body that does not end.
        """
        return b""

    def _take_bytes(self, body: bytes, out: list[bytes]) -> None:
        """Take what is no event stream, or not yet known to be one."""
        before = len(self._held)
        self.life += 1
        self.events += self._label != _EVENTS and (self._form or self._label) != _UNTOLD
        if self._form == _OTHER:
            self._take_other(body, out)
            return
        self._held += body
        if self._form == _UNTOLD or _FIELD_IN_DOCUMENT.search(self._held, max(0, before - 8)):
            self._form = form_of(bytes(self._held), self._label)
            self._on_form()
        if self._form == _EVENTS:
            body, self._held = bytes(self._held), bytearray()
            self._take_events(body, out)
        elif self._form == _OTHER or len(self._held) > MAX_EVENT_SIZE:
            self._form, body, self._held = _OTHER, bytes(self._held), bytearray()
            self._take_other(body, out)

    def _note(self, payload: dict[str, Any]) -> None:
        """Keep what the log tells of an answer, wherever in payload it stands."""
        for holder in [payload, *dicts_in(payload), *dicts_in(payload.get("choices"))]:
            model, usage = holder.get("model"), holder.get("usage")
            if self.model is None and model and isinstance(model, str):
                self.model = self._redact(model[:100])
            if usage and isinstance(usage, dict):
                with contextlib.suppress(RecursionError, ValueError):
                    told = conceal(json.dumps(usage, allow_nan=False), self._redact)  # to the log and the client
                    self.usage = {**(self.usage or {}), **json.loads(told)}

    def _fail(self, error: UpstreamError) -> None:
        if isinstance(error, Garbled) and self.state >= self.SETTLED:
            self.state = self.DONE  # it was complete before
            return
        if error.status == 529 and not self.passes:
            error.status = 503  # which more than some APIs know
        error.message, error.logged = conceal(error.message, self._redact), conceal(error.logged, self._redact)
        error.document = conceal_bytes(error.document, self._redact)
        self.failure, self.state = error, self.OPEN

    # What the kinds of answers differ in; what the client is to have of it goes to out.

    def _start(self, status: int, fields: Mapping[str, str], label: str) -> None:
        pass

    def _on_form(self) -> None:
        """Take note of what the body is."""

    def _take_events(self, body: bytes, out: list[bytes]) -> None:
        raise NotImplementedError

    def _take_other(self, body: bytes, out: list[bytes]) -> None:
        raise NotImplementedError

    def _finish(self, cut: UpstreamError | None, out: list[bytes]) -> None:
        raise NotImplementedError


class Refusal(Answer):
    """An answer whose status is no success: a failure, told once its document is whole or too large."""

    def __init__(self, asked: Answer, status: int, fields: Mapping[str, str]) -> None:
        """asked: what the client waits for, and may have the start of already."""
        super().__init__(asked._redact)
        self.content_type, self.pings, self.fields = asked.content_type, asked.pings, asked.fields
        self.request_id, self.passes = asked.request_id, asked.passes
        self._asked = asked
        self._refused = status
        self._coding = compression_of(fields)
        self._retry_after = fields.get("retry-after", "")

    def ping(self) -> bytes:
        return self._asked.ping()

    def encode(self, type: str, **payload: Any) -> bytes:
        return self._asked.encode(type, **payload)

    def _take_bytes(self, body: bytes, out: list[bytes]) -> None:
        self.life += 1
        self.events += 1
        self._held += body
        if len(self._held) > MAX_ERROR_SIZE:
            self._finish(None, out)

    def _finish(self, cut: UpstreamError | None, out: list[bytes]) -> None:
        document = inflate(bytes(self._held), self._coding)
        failure = refusal(self._refused, document, self._retry_after)
        if self.passes and failure.status != 502 and document.strip() and len(document) <= MAX_ERROR_SIZE:
            failure.document = document
            if document.lstrip()[:1] not in (b"{", b"[", b'"'):
                failure.fields["Content-Type"] = "text/plain; charset=utf-8"
        failure.fields = {**self.fields, **failure.fields}
        raise failure


class TextAnswer(Answer):
    """The answer to one prompt as bare text."""

    content_type = "text/plain; charset=utf-8"

    def __init__(self, redact: Callable[[str], str] = str) -> None:
        super().__init__(redact)
        self._parser = EventParser(strict=False)
        joiner = codecs.getincrementaldecoder("utf-16-le")
        self._joiners = {"reasoning": joiner("replace"), "message": joiner("replace")}
        self._messages: str | None = ""  # what messages have told; None: deltas tell, and a message would repeat it

    def encode(self, type: str, **payload: Any) -> bytes:
        return payload["text"].encode() if type == "message" else b""

    def end(self) -> bytes:
        halves = [(type, joiner.decode(b"", True)) for type, joiner in self._joiners.items()]
        rest = [self.encode(type, text=half) for type, half in halves if half]
        return b"".join(rest) + self.encode("done", finish_reason=self.finish_reason, usage=self.usage)

    def _take_events(self, body: bytes, out: list[bytes]) -> None:
        parser = self._parser
        for event in parser.feed(body):
            if self._take_event(event, out):
                break
        if parser.idle and self.state < self.ENDING:
            self.life += parser.idle
            parser.idle = 0

    def _take_other(self, body: bytes, out: list[bytes]) -> None:
        raise Garbled("Upstream sent neither an event stream nor JSON.")

    def _finish(self, cut: UpstreamError | None, out: list[bytes]) -> None:
        try:
            if self._form == _DOCUMENT:
                data = self._held.decode("utf-8", "replace")
                payload = check_payload(load_payload(data))
                if not payload.get("choices"):
                    raise Garbled("Upstream sent JSON that is not a chat completion.")
                self._take_payload(payload, data, out)
                self.state = max(self.state, self.SETTLED)
            for event in self._parser.close():
                self._take_event(event, out)
        except Garbled as garbled:  # also an event that the end cut in two
            if self._form == _DOCUMENT:
                raise cut or garbled from None

    def _take_event(self, event: Event, out: list[bytes]) -> bool:
        """Take event; tell whether it is the last."""
        self.events += 1
        self.life += 1
        if event.data.strip() == "[DONE]":
            self.state = self.DONE
            return True
        self._take_payload(parse_event(event), event.data, out)
        return False

    def _take_payload(self, payload: dict[str, Any], data: str, out: list[bytes]) -> None:
        usage = '"usage"' in data and (payload.get("usage", payload) or data.count('"usage"') > 1)  # mostly null
        if usage or (self.model is None and payload.get("model")):
            self._note(payload)
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
            reasoning = join_halves(self._joiners["reasoning"], reasoning)
            if reasoning:
                out.append(self.encode("reasoning", text=reasoning))
        text = text and join_halves(self._joiners["message"], text)
        if text:
            self.pieces += 1
            self.size += len(text.encode())
            out.append(self.encode("message", text=text))
        reason = choice.get("finish_reason") and parse_reason(choice)
        if reason:
            self.finish_reason = self._redact(reason)
            # Beside a role or reasoning, before any text, it came early: then nothing is hurried.
            early = not self.pieces and any(part[name] for name in part if name != "content")
            self.state = self.SETTLED if early else self.ENDING


class EventAnswer(TextAnswer):
    """The answer as server-sent events of our own, the first with an id."""

    content_type = "text/event-stream"
    pings = True

    def __init__(self, request_id: str, redact: Callable[[str], str] = str, reconnects: bool = False) -> None:
        """reconnects: the client is an EventSource, which asks again when it is cut off."""
        super().__init__(redact)
        self._id = request_id
        self._tell_id = reconnects

    def ping(self) -> bytes:
        # One that is cut off after a ping must know an id already, or it would pay again.  A block
        # of id alone sets it and is no event (WHATWG HTML section 9.2.6).
        tell, self._tell_id = self._tell_id, False
        return b"id: %b\n\n" % self._id.encode() + PING if tell else PING

    def encode(self, type: str, **payload: Any) -> bytes:
        last_event_id, self._id, self._tell_id = self._id, "", False
        return encode_event(_encode_json(payload), "" if type == "message" else type, last_event_id)


_encode_json = json.JSONEncoder(ensure_ascii=False).encode


def goes_on(block: bytes) -> int:
    """Return how many events block has, if each is one line in which a completion just goes on; 0: nothing is told.

    Blank lines end block and each event.  Each has a choice, and what it has of finish_reasons is null.
    """
    find, count = block.find, block.count  # "in" takes longer
    if find(b"\n") == len(block) - 2:  # mostly
        return (
            block[0] == 100  # of data
            and find(b'"choices":[{') > 0
            and find(b'"finish_reason":null') > 0
            and count(b'"finish_reason"') == 1
            and find(b"error") < 0
        )
    going = count(b'"finish_reason"') == count(b'"finish_reason":null') and find(b"error") < 0 and find(b"\r") < 0
    events = count(b'"choices":[{')
    return events if going and count(b"\n\n") == events and _DATA_LINES.fullmatch(block) else 0


_DATA_LINES = re.compile(rb"(?:data: ?\{[^\n]*\n\n)+")


def is_dull(event: bytes) -> bool:
    """Tell the same of one event, also where its JSON has blanks or its lines end otherwise, and of a typed delta."""
    match = _DULL_EVENT.fullmatch(event)
    if not match or match[1] is None or event.count(b"\r") != event.count(b"\r\n"):
        return bool(match and match[1] is None)
    return not (b'"error' in event or _REASON.search(event) or (b'"usage"' in event and b'"usage":null' not in event))


_REASON = re.compile(rb'"finish_reason"\s*:\s*[^n\s]')
_DULL_TYPE = rb"[a-z_.]*(?:(?<!message)[._]delta|partial_image)"
_DULL_EVENT = re.compile(
    rb'(?:(data: ?\{[^\n]*"choices": ?\[ ?\{)|event: ?%b\r?\ndata:|data: ?\{ ?"type": ?"%b")[^\n]*\n\r?\n'
    % (_DULL_TYPE, _DULL_TYPE)
)


class PassedAnswer(Answer):
    """The answer to an OpenAI client, passed on byte for byte: a stream event by event, a JSON document whole.

    Streams are only looked through for what ends them, so that one that was cut is not taken for whole.
    """

    passes = True

    # What ends a stream, beside [DONE]: Anthropic's messages, OpenAI's responses.
    _LAST_TYPES = ("message_stop", *(f"response.{end}" for end in ("completed", "incomplete", "failed", "cancelled")))
    _EVENT = re.compile(rb"(?:[^\n]+\n)*?\r?\n|(?:[^\r]+\r)*\r|.+", re.DOTALL)  # lines and a blank one, or the rest
    _WHOLE_AT_CLOSE = re.compile("(?:audio|image|video)/|application/octet-stream")
    _SKIMMED = re.compile(rb'"(model|usage)"\s*:\s*("[^"\\]*"|\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\})')

    def __init__(
        self, redact: Callable[[str], str] = str, choices: int = 1, messages: bool = False, stream: bool = False
    ) -> None:
        """choices: how many finish_reasons a whole answer has.  messages: the API is Anthropic's.

        stream: one was asked for, so that there may be heartbeats before upstream's head has come.
        """
        super().__init__(redact)
        self.choices = choices
        self.pings = stream
        self.content_type = "text/event-stream" if stream else ""
        self._api = "/v1/messages" if messages else "/v1/"
        self._stream = stream
        self._parser = EventParser(sys.maxsize, strict=False)  # of the events that are looked at
        self._finished: set[str] = set()  # indexes of choices
        self._cutter = EventCutter()
        self._length: str | None = None  # as upstream's head says
        self._framed = True  # the body ends where HTTP says, or where the connection does, as well
        self._is_open = False  # the client has a head of ours for a stream, and nothing of upstream's

    def ping(self) -> bytes:
        if self._cutter.passed:
            return b""
        self._is_open = self._is_open or self._label == self._form == _UNTOLD
        return encode_event('{"type": "ping"}', "ping") if self._api == "/v1/messages" else PING

    def encode(self, type: str, **payload: Any) -> bytes:
        if type != "error" or not self._is_open or self._form == _EVENTS:
            return b""
        data = encode_error(UpstreamError(payload["error"]), self._api).decode().strip()
        return encode_event(data, "error" if self._api == "/v1/messages" else "")

    def _start(self, status: int, fields: Mapping[str, str], label: str) -> None:
        self.status = status
        self.content_type = fields.get("content-type", "")
        self.eager = self._label == _EVENTS or self._form == _OTHER
        self._length = fields.get("content-length")
        self._framed = bool(self._length or "transfer-encoding" in fields or self._WHOLE_AT_CLOSE.match(label))
        self._on_form()

    def _on_form(self) -> None:
        self.pings = (self._form or self._label) == _EVENTS
        if self._form == _OTHER and self._length is not None:
            self.fields["Content-Length"] = self._length

    def _pass(self, data: bytes, out: list[bytes]) -> None:
        if data:
            self.pieces += 1
            self.size += len(data)
            out.append(data)

    def _take_other(self, body: bytes, out: list[bytes]) -> None:
        self._pass(body, out)

    def _take_events(self, body: bytes, out: list[bytes]) -> None:
        cutter = self._cutter
        if body[-2:] == b"\n\n" and not cutter.rest:  # mostly, whole events come, and nothing is held
            data = body if self._just_goes_on(body) else self._look_through(body, 0)
        else:
            passed, block = cutter.passed, cutter.feed(body)
            data = block[passed:] if self._just_goes_on(block) else self._look_through(block, passed)
            data += cutter.pass_on(0 if block else passed)
        if data:
            self.pieces += 1
            self.size += len(data)
            out.append(data)

    def _just_goes_on(self, block: bytes) -> int:
        looked = self.events and 0 < len(block) < MAX_SKIMMED and self.state < Answer.ENDING
        count = goes_on(block) if looked else 0
        self.events += count
        self.life += count
        return count

    def _look_through(self, block: bytes, passed: int) -> bytes:
        """Take whole events; return what the client is to have, which has the first bytes of them already."""
        out = []
        for event in self._EVENT.findall(block):
            out.append(self._take_piece(event, passed))
            passed = 0
        return b"".join(out)

    def _take_piece(self, piece: bytes, passed: int) -> bytes:
        """Take one event; return what the client is to have of it."""
        counts = self.state < self.ENDING
        if self.events and counts and len(piece) < MAX_SKIMMED and is_dull(piece):
            self.events += 1
            self.life += 1
            return piece[passed:]
        events = self._parser.feed(piece)
        self.life += counts and len(events) + self._parser.idle
        self._parser.idle = 0
        secret = False in [self._is_harmless(event) for event in events]
        return conceal_bytes(piece[passed:], self._redact) if secret else piece[passed:]

    def _is_harmless(self, event: Event) -> bool:
        """Take event; False: it is an error, and may have secrets."""
        self.events += 1
        try:
            self._take_event(event)
        except UpstreamError as error:
            if self.state < self.ENDING:
                self._fail(error)
                self.state = self.ENDING
            return False
        return True

    def _take_event(self, event: Event) -> None:
        payload: Any = {}
        ends = event.data.strip() == "[DONE]" or event.type in self._LAST_TYPES
        with contextlib.suppress(Garbled):  # what is not as it should be is for the client to see
            payload = load_event(event)
            ends = ends or (isinstance(payload, dict) and payload.get("type") in self._LAST_TYPES)
            payload = payload if ends else check_payload(payload, event.type)
        if ends and self.failure is None:
            self.state = self.ENDING
        self._take_payload(payload)

    def _take_payload(self, payload: object) -> None:
        if not isinstance(payload, dict):
            return
        self._note(payload)
        for holder in [payload, *dicts_in(payload), *dicts_in(payload.get("choices"))]:
            reason = holder.get("stop_reason") or holder.get("finish_reason")
            if holder.get("object") == "response":
                details = holder.get("incomplete_details")
                reason = details.get("reason") if isinstance(details, dict) else holder.get("status")
            if isinstance(reason, str) and reason not in ("", "null"):
                self.finish_reason = self._redact(reason[:80])
        for choice in dicts_in(payload.get("choices")):
            if parse_reason(choice):
                self._finished.add(str(choice.get("index")))
        if self.state == self.OPEN and len(self._finished) >= self.choices and self.failure is None:
            self.state = self.SETTLED

    def _finish(self, cut: UpstreamError | None, out: list[bytes]) -> None:
        if self._form == _EVENTS:
            self._finish_events(out)
        elif self._form == _UNTOLD and self._label == _EVENTS:
            self._pass(bytes(self._held), out)
        elif cut:
            raise cut
        elif self._form == _DOCUMENT or self._framed:
            document = self._take_document(bytes(self._held), out) if self._form == _DOCUMENT else bytes(self._held)
            if self._form != _OTHER:
                self.fields["Content-Length"] = str(len(document))
            self._pass(document, out)
            self.state = self.SETTLED

    def _finish_events(self, out: list[bytes]) -> None:
        """Take the event that the body ended in: it counts if it is whole, though no blank line came."""
        rest = bytes(self._cutter.rest)
        for event in self._parser.feed(rest) + self._parser.close():
            with contextlib.suppress(Garbled):
                if event.type not in self._LAST_TYPES or load_payload(event.data):
                    self._is_harmless(event)
        self._pass(conceal_bytes(rest[self._cutter.passed :], self._redact), out)

    def _take_document(self, document: bytes, out: list[bytes]) -> bytes:
        """Return a JSON document as the client is to have it.

        Raises UpstreamError where it is cut, or an error although a stream was asked for.
        """
        if len(document) > MAX_SKIMMED and self._framed and document.find(b'"error', 0, 2048) < 0:
            ends = self._SKIMMED.findall(document[:2048] + document[-2048:])
            self._note({name.decode(): load_payload(value.decode("utf-8", "replace")) for name, value in ends})
            return document
        try:
            payload = load_payload(document.decode("utf-8", "replace"))
        except Garbled:
            if self._framed:
                return document
            raise UpstreamError("Upstream ended before the end of its answer.", ending="truncated") from None
        with contextlib.suppress(UpstreamError):  # which the document tells
            self._take_payload(payload)
        try:
            check_payload(payload)
        except Garbled:
            pass
        except UpstreamError as error:
            document = conceal_bytes(document, self._redact)
            if self._label == _EVENTS:  # its head has left
                self._pass(document, out)
            elif self._stream:
                error.document = document
            else:
                return document
            raise
        if self._is_open:
            raise UpstreamError("Upstream sent a document where a stream was asked for.")
        return document


class ModelList(PassedAnswer):
    """The API's list of models, with those left out that a client may not use."""

    def __init__(self, models: Iterable[str], redact: Callable[[str], str] = str) -> None:
        super().__init__(redact)
        self._models = frozenset(models)

    def _finish(self, cut: UpstreamError | None, out: list[bytes]) -> None:
        payload = check_payload(load_payload(self._held.decode("utf-8", "replace")))
        try:
            payload["data"] = [model for model in payload["data"] if model["id"] in self._models]
        except (LookupError, TypeError):
            raise Garbled("Upstream sent JSON that is not a list of models.") from None
        self._pass(json.dumps(payload).encode(), out)
        self.state = self.SETTLED


# Fields of upstream's head that are for the client to see, their names in lower case.
_BACK = frozenset(("retry-after", "retry-after-ms", "x-should-retry", "x-request-id", "request-id", "openai-processing-ms"))


def passes_back(name: str) -> bool:
    return name in _BACK or name == "openai-version" or name.startswith(("x-ratelimit-", "anthropic-ratelimit-"))


# 5 ------------------------------------------------------------------- HTTP framing

_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # RFC 9110 section 5.6.2
_QUOTED = r'"(?:[\t \x21\x23-\x5b\x5d-\x7e\x80-\xff]|\\[\t \x21-\x7e\x80-\xff])*"'  # section 5.6.4
_VALUE = r"[\t \x21-\x7e\x80-\xff]*"  # section 5.5: no CR, LF or NUL
_VALUES = re.compile(_VALUE)

# Lines of RFC 9112, matched whole: int() would also take "+5", "0x5" and "1_0".
_FIELD_LINE = re.compile(f"({_TOKEN}):({_VALUE})")  # section 5: no space before the colon, no folding
_STATUS_LINE = re.compile(f"HTTP/1\\.([01]) ([1-5][0-9][0-9])(?: {_VALUE})?")  # section 4
_CHUNK_LINE = re.compile(  # section 7.1
    f"([0-9A-Fa-f]{{1,15}})(?:[ \t]*;[ \t]*{_TOKEN}(?:[ \t]*=[ \t]*(?:{_TOKEN}|{_QUOTED}))?)*".encode("latin-1")
)
_TRAILER_LINE = re.compile(_FIELD_LINE.pattern.encode("latin-1"))
_BLANK_BEFORE_COLON = re.compile(f"^({_TOKEN})[ \t]+:")  # harmless in an answer; section 5.1 has it dropped

LAST_CHUNK = b"0\r\n\r\n"


def encode_chunk(data: bytes) -> bytes:
    """Return data as a chunk; nothing for no data, since a chunk of size 0 ends the body."""
    return b"%x\r\n%b\r\n" % (len(data), data) if data else b""


def encode_head(line: str, fields: Mapping[str, str]) -> bytes:
    """Return a head.  Raises ValueError for a value that would forge a line."""
    if not _VALUES.fullmatch("".join(fields.values())):
        raise ValueError("a bad value in a header field")
    lines = [line, *[f"{name}: {value}" for name, value in fields.items()]]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def parse_head(head: bytes, lenient: bool = False) -> tuple[str, dict[str, str]]:
    """Return the first line of a head, and its fields by name in lower case.

    lenient: it is upstream's, where blanks before a field's colon do no harm.

    Fields of one name are joined with ", " (RFC 9110 section 5.3).  Raises ValueError for what
    is not in the grammar of RFC 9112 section 5, or too much.
    """
    first, *lines = head.decode("latin-1").split("\r\n")
    if len(lines) > MAX_FIELDS:
        raise ValueError("too many header fields")
    fields: dict[str, str] = {}
    for line in lines:
        match = _FIELD_LINE.fullmatch(_BLANK_BEFORE_COLON.sub(r"\1:", line) if lenient else line)
        if not match:
            raise ValueError("a header field is not in HTTP's grammar")
        name, value = match[1].lower(), match[2].strip(" \t")
        fields[name] = f"{fields[name]}, {value}" if name in fields else value
    return first, fields


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
        line, fields = parse_head(head, lenient=True)
        match = _STATUS_LINE.fullmatch(line)
        if not match:
            break
        if match[1] == "0":
            fields["connection"] = "close"  # as good as said
        if match[2] == "101" or match[2] >= "200":
            return int(match[2]), fields, rest
        data = rest
    raise ValueError("not an answer")


class BodyDecoder:
    """The data of a body of left bytes (RFC 9112 section 6.2); None: of one that its connection's end ends.

    complete: the body has ended; rest is what came behind it.  broken: its framing is not HTTP's.
    """

    broken = False
    rest = b""

    def __init__(self, left: int | None = None) -> None:
        self.left = left
        self.complete = left == 0

    def feed(self, data: bytes) -> bytes:
        """Return the body's part of data.  What came before the framing broke still counts."""
        if self.left is None:
            return data
        body, self.rest = data[: self.left], data[self.left :]
        self.left -= len(body)
        self.complete = self.left == 0
        return body

    def close(self) -> None:
        """Take the end of the connection: where that ends the body, only its text can tell if it is whole."""
        self.complete = self.complete or self.left is None


@functools.lru_cache(maxsize=1024)
def parse_chunk_line(line: bytes) -> int:
    """Return the size in a chunk's first line, its extensions ignored; -1 if it is none."""
    match = _CHUNK_LINE.fullmatch(line)
    return int(match[1], 16) if match else -1


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
        elif not self._chunk_left and data[-2:] == b"\r\n":  # mostly, one chunk comes at a time
            line, _, rest = data.partition(b"\r\n")
            if len(line) < 16 and len(rest) - 2 == parse_chunk_line(line) > 0 and not self._in_trailer:
                return rest[:-2]
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
        return out[0] if len(out) == 1 else b"".join(out)

    def _take_line(self, line: bytes) -> None:
        if self._lenient:
            line = self._tidied(line)
        if self._in_trailer:
            self.complete = not line
            self._trailer_room -= len(line)
            self.broken = self._trailer_room < 0 or not (self.complete or _TRAILER_LINE.fullmatch(line))
        else:
            size = -1 if self._chunk_left or len(line) > MAX_CHUNK_LINE else parse_chunk_line(line)
            self._chunk_left = size + 2 if size else 0
            self._in_trailer = size == 0
            self.broken = size < 0

    def _tidied(self, line: bytes) -> bytes:
        if self._in_trailer:
            name, colon, value = line.partition(b":")
            return name.rstrip(b" \t") + colon + value
        return line.rstrip(b" \t").lstrip(b"0") or line[:1]

    def _hold(self, line: bytes) -> None:
        """Keep the start of a line, if it can become one."""
        self._line = line
        misplaced = self._chunk_left == 2 and line not in (b"", b"\r")
        self.broken = misplaced or len(line) > MAX_CHUNK_LINE or b"\n" in line


def body_decoder(fields: Mapping[str, str], default: BodyDecoder, lenient: bool = False) -> BodyDecoder:
    """Return the decoder for the body behind a head; default where the head says nothing of it.

    lenient: see ChunkedDecoder.

    Source: RFC 9112 section 6.3, read strictly: a length beside a coding, or two lengths, are how
    one message hides in another.  Raises ValueError.
    """
    coding, length = fields.get("transfer-encoding"), fields.get("content-length")
    if coding is not None:
        if coding.lower() != "chunked":
            raise ValueError("a transfer coding that is not chunked")
        if length is not None:
            raise ValueError("Content-Length beside Transfer-Encoding")
        return ChunkedDecoder(lenient)
    if length is None:
        return default
    if not (length.isascii() and length.isdigit() and len(length) < 16):
        raise ValueError("a Content-Length that is not one number")
    return BodyDecoder(int(length))


# 6 ------------------------------------------------------------------- Settings


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


# Readers turn a setting's text, or the texts of a repeated one, into its value; their ValueError
# says what is allowed.


def _matching(pattern: str, allowed: str, convert: Callable[[str], Any] = str) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            if re.fullmatch(pattern, text):
                return convert(text)
        except ValueError:
            pass
        raise ValueError(allowed)

    return read


_read_seconds = _matching(r"[0-9]{1,9}(\.[0-9]{1,9})?", "a number of seconds, 0 or more", float)
_read_count = _matching("[0-9]{1,15}", "a whole number, 0 or more", int)
_read_size = _matching("[1-9][0-9]{0,14}", "a whole number of bytes, 1 or more", int)
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
_read_origins = _listing(r"https?://[^/\s,]+", "SCHEME://HOST or SCHEME://HOST:PORT")
_read_hosts = _listing(r"[A-Za-z0-9._:\[\]-]+", "a host name, without a port")
_read_networks = _listing(r"[0-9A-Fa-f.:]+(/[0-9]{1,3})?", "an address or a network", ipaddress.ip_network)


def _read_bind(text: str) -> str:
    parse_address(text)
    return text


def _read_url(text: str) -> str:
    with contextlib.suppress(ValueError):
        url = urllib.parse.urlsplit(text)
        good = url.scheme in ("http", "https") and url.hostname and url.port != 0
        if good and "@" not in url.netloc and not url.fragment and re.fullmatch("[!-~]+", text):
            return text
    raise ValueError("an http:// or https:// address without user, password or fragment")


def _read_params(texts: Sequence[str]) -> dict[str, Any]:
    """The defaults, changed by each text in turn; null removes."""
    params = dict(DEFAULT_PARAMS)
    for text in texts:
        name, _, value = text.partition("=")
        try:
            changes = load_json(text) if text.startswith("{") else {name: load_json(value or "null")}
        except (ValueError, RecursionError):
            changes = {"": None}
        if ("=" not in text and not text.startswith("{")) or not changes.keys().isdisjoint(("", *OWN_PARAMS)):
            raise ValueError(f"NAME=JSON, or a JSON object, with names other than {', '.join(OWN_PARAMS)}")
        params.update(changes)
    return {name: value for name, value in params.items() if value is not None}


# Members of the upstream request that --param does not set.
OWN_PARAMS = ("model", "messages", "stream")

# What the script that this program replaces asked for.
DEFAULT_PARAMS = {"max_tokens": 400, "temperature": 0.5, "frequency_penalty": 0, "presence_penalty": 0}


class Setting:
    """A row of the settings table; where the default is a tuple or a mapping, the flag may be repeated."""

    def __init__(
        self, default: Any, read: Callable[..., Any], metavar: str, help: str,
        variable: str = "", shown: str = "", secret: bool = False,
    ) -> None:  # fmt: skip
        """shown: the default in words."""
        self.default, self.metavar, self.help, self.variable, self.secret = default, metavar, help, variable, secret
        self.shown = shown or ("none" if default in ("", ()) else "off" if default is False else str(default))
        self.repeat = isinstance(default, (tuple, dict))
        self._read = read

    def __set_name__(self, owner: type[Settings], name: str) -> None:
        self.name = name
        self.flag = "" if self.secret else "--" + name.replace("_", "-")
        self.variable = self.variable or "STREAMPROXY_" + name.upper()
        owner.TABLE.append(self)

    def parse(self, text: Any) -> Any:
        """Return the value of a text, or of the texts of a repeated flag.  Raises SettingsError."""
        try:
            return self._read([text] if self.repeat and isinstance(text, str) else text)
        except ValueError as error:
            name = f"{self.flag} ({self.variable})" if self.flag else self.variable
            shown = "this value" if self.secret else ascii(text)
            raise SettingsError(f"{name}: {shown} is not allowed; allowed: {error}") from None


_row: Any = Setting


class Settings:
    """Every setting, declared here once: --help, the variables and README's table follow.

    A value given as text is read as on the command line.  Raises SettingsError.
    """

    TABLE: ClassVar[list[Setting]] = []

    bind: str = _row(
        "127.0.0.1:8000", _read_bind, "ADDRESS",
        "listen at HOST:PORT, [IPv6]:PORT or unix:PATH; port 0 takes a free one")
    upstream: str = _row(
        "https://api.openai.com/v1", _read_url, "URL", "base URL of the API; a query part is kept", "OPENAI_BASE_URL")
    api_key: str = _row(
        "", _read_key, "", "the API's key, or `OPENAI_API_KEY_FILE`; none is fine for a loopback upstream",
        "OPENAI_API_KEY", secret=True)
    auth_header: str = _row(
        "Authorization: Bearer {key}", _read_auth_header, "TEMPLATE", "header field that carries the key")
    model: str = _row("gpt-4.1-mini", _read_text, "NAME", "model to ask")
    param: Mapping[str, Any] = _row(
        DEFAULT_PARAMS, _read_params, "NAME=JSON",
        "member of the upstream request, repeatable; NAME= removes one; the variable is a JSON object",
        shown=" ".join(f"{name}={value}" for name, value in DEFAULT_PARAMS.items()))
    system: str = _row("", _matching(r"[^\0]*", "text"), "TEXT", "system message put before every conversation")
    client_param: tuple[str, ...] = _row((), _read_members, "NAME", "member a client may set itself, repeatable")
    connect_timeout: float = _row(10.0, _read_seconds, "SECONDS", "to connect to upstream, TLS included; 0: no limit")
    first_byte_timeout: float = _row(120.0, _read_seconds, "SECONDS", "from then to the first event; 0: no limit")
    idle_timeout: float = _row(60.0, _read_seconds, "SECONDS", "between two events of upstream; 0: no limit")
    total_timeout: float = _row(3600.0, _read_seconds, "SECONDS", "for a whole answer; 0: no limit")
    client_timeout: float = _row(
        30.0, _read_seconds, "SECONDS", "for a client to send its request, and for each stalled write; 0: no limit")
    heartbeat: float = _row(15.0, _read_seconds, "SECONDS", "of silence before a comment, in SSE mode; 0: never")
    max_body: int = _row(1024 * 1024, _read_size, "BYTES", "largest request body")
    max_streams: int = _row(1024, _read_count, "COUNT", "streams at a time; 0: no limit")
    max_streams_per_client: int = _row(0, _read_count, "COUNT", "streams at a time of one client; 0: no limit")
    requests_per_minute: int = _row(0, _read_count, "COUNT", "requests a minute of one client; 0: no limit")
    token_file: str = _row("", _read_text, "FILE", "lines NAME TOKEN: only clients with such a token may ask")
    allow_model: tuple[str, ...] = _row(
        (), _read_models, "NAME", "model a client of /v1 may ask besides --model, repeatable; * for any")
    allow_origin: tuple[str, ...] = _row(
        (), _read_origins, "ORIGIN", "origin whose pages may ask, besides our own, repeatable")
    allow_host: tuple[str, ...] = _row(
        (), _read_hosts, "NAME", "name that a server without tokens answers to, besides its own, repeatable")
    trusted_proxy: tuple[Any, ...] = _row(
        (), _read_networks, "NETWORK", "proxy whose X-Forwarded-For counts, besides this machine's, repeatable")
    allow_anonymous: bool = _row(False, _read_switch, "", "serve anybody, on an address that other machines reach")
    ca_file: str = _row("", _read_text, "FILE", "certificates (PEM) to trust upstream by", shown="the system's")
    drain_timeout: float = _row(600.0, _read_seconds, "SECONDS", "for open streams to end after SIGTERM")
    log_format: str = _row("text", _matching("text|json", "text or json"), "FORMAT", "log lines as text or json")
    demo: bool = _row(False, _read_switch, "", "answer from a built-in API: no key, no network")

    def __init__(self, **values: Any) -> None:
        unknown = values.keys() - {setting.name for setting in self.TABLE}
        if unknown:
            raise TypeError(f"no such setting: {', '.join(sorted(unknown))}")
        for setting in self.TABLE:
            value = values.get(setting.name, setting.default)
            texts = value if isinstance(value, (list, tuple)) else [value]
            if value and all(isinstance(text, str) for text in texts):
                value = setting.parse(value)
            vars(self)[setting.name] = dict(value) if isinstance(value, dict) else value
        path, host, _ = parse_address(self.bind)
        if not (path or is_loopback(host) or self.token_file or self.allow_anonymous):
            raise SettingsError(
                f"--bind (STREAMPROXY_BIND): {self.bind!r} lets others spend your money; allowed: a loopback"
                " address, a unix socket, or any with --token-file or --allow-anonymous"
            )
        if not (self.api_key or self.demo or is_loopback(urllib.parse.urlsplit(self.upstream).hostname or "")):
            raise SettingsError("no API key: set OPENAI_API_KEY or OPENAI_API_KEY_FILE, or try --demo")

    @classmethod
    def load(cls, environ: Mapping[str, str], flags: Mapping[str, Any] | None = None) -> Settings:
        """Return the settings of flags (texts by field name, None: not given), else environ, else the defaults.

        Raises SettingsError.
        """
        values: dict[str, Any] = {}
        for setting in cls.TABLE:
            text = (flags or {}).get(setting.name)
            if text is None:
                text = environ.get(setting.variable) or None
            if text is not None:
                values[setting.name] = setting.parse(text)
        path = environ.get("OPENAI_API_KEY_FILE")
        if path and "api_key" in values:
            raise SettingsError("OPENAI_API_KEY and OPENAI_API_KEY_FILE are both set; allowed: one of them")
        if path:
            try:
                with open(path, encoding="ascii", errors="replace") as file:
                    values["api_key"] = file.read(MAX_HEAD_SIZE)
            except OSError as error:
                raise SettingsError(f"OPENAI_API_KEY_FILE: cannot read {path!r}: {reason_of(error)}") from None
        return cls(**values)

    def replace(self, **values: Any) -> Settings:
        """Return these settings with other values for some."""
        return Settings(**{**vars(self), **values})

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("settings do not change: see replace")

    def __repr__(self) -> str:
        shown = {setting.name: "***" if setting.secret else getattr(self, setting.name) for setting in self.TABLE}
        return f"Settings({', '.join(f'{name}={value!r}' for name, value in shown.items())})"


def redactor(key: str) -> Callable[[str], str]:
    """Return what takes key, its parts of 6 characters or more and masked keys out of a text."""
    size = min(6, len(key))
    parts = {key[at : at + size] for at in range(len(key) - size + 1)} if key else set()

    def redact(text: str) -> str:
        if "***" in text:
            text = re.sub(r'[^\s"\\]+', lambda word: "[redacted]" if "***" in word[0] else word[0], text)
        hidden = {i for at in range(len(text)) if text[at : at + size] in parts for i in range(at, at + size)}
        runs = itertools.groupby(range(len(text)), hidden.__contains__)
        return "".join("[redacted]" if secret else "".join(text[i] for i in run) for secret, run in runs)

    return redact


# 7 ------------------------------------------------------------------- Requests

# Fields of a request that upstream is to see: what the call needs, and nothing that says who calls.
PASSED_FIELDS = ("content-type", "accept", "anthropic-version", "anthropic-beta", "openai-beta", "idempotency-key")


def encode_request(asked: dict[str, Any], settings: Settings) -> bytes:
    """Return the chat-completion request for what a client asked.  Raises RequestError."""
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
    request = {"model": settings.model, **settings.param}
    request.update((name, asked[name]) for name in settings.client_param if name in asked)
    try:
        return json.dumps({**request, "messages": messages, "stream": True}, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise RequestError("The text holds half of a surrogate pair.") from None
    except RecursionError:
        raise RequestError("The JSON is nested too deeply.") from None


def check_model(body: bytes, settings: Settings) -> dict[str, Any]:
    """Return what a request of the API asks, if its model may be asked.  Raises RequestError.

    Where any model may be, that need not be JSON: {} then.
    """
    if "*" in settings.allow_model:
        with contextlib.suppress(RequestError):
            return parse_request(body)
        return {}
    asked = parse_request(body)
    names = [name for name in asked if name.lower() == "model"]  # servers in Go take "Model" too
    if names != ["model"] or not isinstance(asked["model"], str):
        raise RequestError('The body must have one "model", a string.', code="model_not_found")
    if asked["model"] not in (settings.model, *settings.allow_model):
        raise unknown_model(asked["model"])
    return asked


def count_choices(asked: Mapping[str, Any]) -> int:
    """Return how many choices a completion has: n for each prompt."""
    n, prompt = asked.get("n"), asked.get("prompt")
    prompts = len(prompt) if isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)) else 1
    return prompts * (n if isinstance(n, int) and n > 0 else 1)


def unknown_model(name: str) -> RequestError:
    return RequestError(f"The model {name[:100]!a} may not be used here (--allow-model).", 403, code="model_not_found")


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


# 8 ------------------------------------------------------------------- Access


class Tokens:
    """The client tokens in a file, which is read again when it changes."""

    def __init__(self, path: str) -> None:
        """Raises SettingsError where the file cannot be used."""
        self._path = path
        self._tokens: list[tuple[bytes, str]] = []  # digest and name
        self._seen: object = None  # the version that was read or refused, or why none could be
        try:
            self._refresh()
        except ValueError as fault:
            raise SettingsError(f"--token-file (STREAMPROXY_TOKEN_FILE): cannot use {path!r}: {fault}") from None

    def name_of(self, token: str) -> str | None:
        """Return the name of the client whose token this is, in a time that says nothing of the others."""
        try:
            self._refresh()
        except ValueError as fault:
            log.error("the token file was not taken, its last version counts: %s", fault)
        digest = hashlib.sha256(token.encode("latin-1")).digest()
        names = [name for known, name in self._tokens if hmac.compare_digest(known, digest)]
        return names[-1] if names else None

    def _refresh(self) -> None:
        """Take the file where it changed.  Raises ValueError that says, once, what is wrong with it."""
        before = self._seen
        try:
            status = os.stat(self._path)
            self._seen = status.st_mtime_ns, status.st_size, status.st_ino, status.st_mode
            if self._seen == before:
                return
            if status.st_mode & 0o007 and os.name == "posix":
                raise ValueError("others may read it; allowed: chmod o-rwx")
            with open(self._path, encoding="utf-8") as file:
                lines = [line.split() for line in file if line.strip() and not line.startswith("#")]
        except OSError as error:
            self._seen = reason_of(error)
            if self._seen == before:
                return
            raise ValueError(self._seen) from None
        except UnicodeError:
            raise ValueError("it is not UTF-8") from None
        for number, line in enumerate(lines, 1):
            if len(line) != 2 or not re.fullmatch(r"[\w.@-]{1,64}", line[0]) or not re.fullmatch("[!-~]+", line[1]):
                raise ValueError(f"entry {number} is not NAME TOKEN")
        if not lines:
            raise ValueError("it names no client")
        self._tokens = [(hashlib.sha256(token.encode()).digest(), name) for name, token in lines]


class Limits:
    """How much a client may ask: streams at a time, its own and of all, and requests a minute."""

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._clock = clock
        self._lock = threading.Lock()
        self._total = 0
        self._clients: dict[str, list[float]] = {}  # streams, requests left, and as of when
        self._many = MAX_QUIET_CLIENTS  # so many are looked through for those that can be forgotten

    @contextlib.contextmanager
    def place(self, client: str) -> Iterator[None]:
        """Hold a place for a stream.  Raises RequestError, with a Retry-After, where there is none."""
        with self._lock:
            self._enter(client)
        try:
            yield
        finally:
            with self._lock:
                self._total -= 1
                self._clients[client][0] -= 1
                if len(self._clients) > self._many:
                    old = self._clock() - 60  # a minute's silence leaves nothing to know of a client
                    self._clients = {name: state for name, state in self._clients.items() if state[0] or state[2] > old}
                    self._many = max(MAX_QUIET_CLIENTS, 2 * len(self._clients))

    def _enter(self, client: str) -> None:
        limits, now = self._settings, self._clock()
        if limits.max_streams and self._total >= limits.max_streams:
            raise RequestError("Too many answers are on their way.", 503, fields={"Retry-After": "1"})
        state = self._clients.setdefault(client, [0, limits.requests_per_minute, now])
        if limits.max_streams_per_client and state[0] >= limits.max_streams_per_client:
            raise RequestError("Too many of your answers are on their way.", 429, fields={"Retry-After": "1"})
        if limits.requests_per_minute:  # a token bucket that holds those of a minute
            rate = limits.requests_per_minute / 60
            left = min(limits.requests_per_minute, state[1] + (now - state[2]) * rate)
            if left < 1:
                wait = {"Retry-After": str(math.ceil((1 - left) / rate))}
                raise RequestError("Too many requests in a minute.", 429, fields=wait)
            state[1:] = [left - 1, now]
        state[0] += 1
        self._total += 1


_PORT = re.compile(":[0-9]*$")


class Access:
    """Who may ask: tokens, the pages of which origins, and under which names."""

    def __init__(self, settings: Settings) -> None:
        """Raises SettingsError for a token file that cannot be used."""
        self._settings = settings
        self._tokens = Tokens(settings.token_file) if settings.token_file else None
        path, host, _ = parse_address(settings.bind)
        self._names = {host.lower(), *(name.lower().strip("[]") for name in settings.allow_host)}
        self._any_name = bool(path or self._tokens)  # no browser reaches a unix socket

    def address_of(self, peer: str, forwarded: str) -> str:
        """Return the client's address: peer, or what trusted proxies say of it; "unix" for a unix socket."""
        hops = forwarded.split(",") if forwarded else []
        while hops and self._trusts(peer):
            try:
                peer = plain_address(hops.pop().strip())
            except ValueError:
                break
        return peer

    def check_host(self, host: str, own_address: Callable[[], str]) -> None:
        """Check that a server without tokens is asked under a name of its own: DNS may lead any name here.

        own_address returns the address that was connected to.  Raises RequestError.
        """
        name = _PORT.sub("", host).strip("[]").lower()
        if not (self._any_name or name in self._names or is_loopback(name) or name == own_address()):
            raise RequestError(f"This server does not answer to the name {name[:100]!a} (--allow-host).", 403)

    def cors_fields(self, fields: Mapping[str, str]) -> dict[str, str]:
        """Return what lets a page of an allowed origin read the answer (WHATWG Fetch section 3.2)."""
        if fields.get("origin") not in self._settings.allow_origin:
            return {}
        return {
            "Access-Control-Allow-Origin": fields["origin"],
            "Access-Control-Expose-Headers": "X-Request-Id, Retry-After",
            "Vary": "Origin",
        }

    def check_origin(self, fields: Mapping[str, str]) -> None:
        """Check that no page asks but our own, or one of an allowed origin.  Raises RequestError."""
        origin, site = fields.get("origin", ""), fields.get("sec-fetch-site", "")
        host = fields.get("host", "").lower()
        own = site == "same-origin" or origin.lower() in (f"http://{host}", f"https://{host}")
        if (origin and not own and origin not in self._settings.allow_origin) or (site in ("cross-site", "same-site") and not origin):
            raise RequestError(f"Pages of {origin[:100] or 'another site'} may not ask (--allow-origin).", 403)

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


# 9 ------------------------------------------------------------------- Relay

READ, WRITE = 1, 4  # as in poll(2); a hang-up or an error is told by other bits, and by the next read


class _Selector:
    """What the relay uses of select.epoll, where the system has none."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self.close, self.unregister = self._selector.close, self._selector.unregister

    def register(self, fd: int, events: int) -> None:
        self._selector.register(fd, events & READ | events // WRITE * selectors.EVENT_WRITE)

    def modify(self, fd: int, events: int) -> None:
        self._selector.modify(fd, events & READ | events // WRITE * selectors.EVENT_WRITE)

    def poll(self, timeout: float | None) -> list[tuple[int, int]]:
        ready = self._selector.select(timeout)
        return [(key.fd, events & READ | events // selectors.EVENT_WRITE * WRITE) for key, events in ready]


def wait_for(sock: socket.socket, events: int, timeout: float) -> bool:
    """Wait until sock is ready for READ or WRITE; False after timeout seconds."""
    with getattr(selectors, "PollSelector", selectors.SelectSelector)() as selector:  # no descriptor of its own
        selector.register(sock, selectors.EVENT_READ if events == READ else selectors.EVENT_WRITE)
        return bool(selector.select(min(timeout, FOREVER)))


class Relay:
    """One thread that moves the bytes of every stream and owns every clock.

    All but post, start and stop belong to that thread.  A test calls turn() instead.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.streams: set[Any] = set()  # those under way
        self.inboxes: set[Any] = set()  # those that wait
        self.draining = False
        self.aborted: ProxyError | None = None  # why all streams and inboxes end, those that begin now, too
        self.clock = clock
        self.now = clock()  # when this turn's events came
        # epoll itself: the way through selectors costs a fifth of what a piece of text costs in all.
        self._epoll: Any = getattr(select, "epoll", _Selector)()
        self._watched: dict[int, tuple[int, Callable[[int], object]]] = {}  # by descriptor
        self._posts: collections.deque[Callable[[], object]] = collections.deque()
        self._alarms: list[list[Any]] = []  # a heap of [when, order, callback, or None if cancelled]
        self._cancelled = 0  # of those, about
        self._order = itertools.count()  # so that the heap never compares callbacks
        self._bell, self._rope = socket.socketpair()  # pulling the rope rings the bell, which wakes the selector
        self._bell.setblocking(False)
        self._asleep = False
        self.watch(self._bell, READ, self._on_bell)
        self._running = True
        self._thread = threading.Thread(target=self._run, name="relay", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread, after all that was posted, and with whatever streams are left."""
        self.post(self._stop)
        self._thread.join()
        self.close()

    def close(self) -> None:
        for resource in (self._epoll, self._bell, self._rope):
            resource.close()

    def post(self, call: Callable[[], object]) -> None:
        """Have the relay's thread make a call.  For any thread."""
        self._posts.append(call)  # first: whoever sleeps has said so before it looked for posts
        if self._asleep:
            self._asleep = False
            self._rope.send(b"!")

    def watch(self, sock: socket.socket, events: int, callback: Callable[[int], object]) -> None:
        """Call back when sock is ready for events: READ, WRITE or both.  Undone by unwatch, before sock is closed."""
        fd = sock.fileno()
        before = self._watched.get(fd)
        if not before:
            self._epoll.register(fd, events)
        elif before[0] != events:
            self._epoll.modify(fd, events)
        self._watched[fd] = events, callback

    def unwatch(self, sock: socket.socket) -> None:
        if self._watched.pop(sock.fileno(), None):
            self._epoll.unregister(sock.fileno())

    def set_alarm(self, when: float, callback: Callable[[], object]) -> list[Any]:
        """Call back at when, by clock, unless cancel is given what is returned."""
        alarm = [when, next(self._order), callback]
        heapq.heappush(self._alarms, alarm)
        return alarm

    def cancel(self, alarm: list[Any]) -> None:
        """Keep an alarm from going off."""
        self._cancelled += alarm[2] is not None
        alarm[2] = None
        if self._cancelled > 1000 + len(self._alarms) // 2:  # they would stay until their time
            self._alarms = [alarm for alarm in self._alarms if alarm[2]]
            heapq.heapify(self._alarms)
            self._cancelled = 0

    def turn(self, timeout: float | None = None) -> None:
        """Wait for at most timeout seconds (None: until an alarm), then do all there is to do."""
        if timeout is None:
            timeout = max(0.0, self._alarms[0][0] - self.clock()) if self._alarms else FOREVER
        self._asleep = True  # from here on, a post rings the bell; those before are seen here
        ready = self._epoll.poll(0 if self._posts else min(timeout, FOREVER))
        self._asleep = False
        self.now = self.clock()
        for fd, events in ready:
            watched = self._watched.get(fd)
            if watched:  # or what came before has ended it
                self._call(watched[1], events)
        for _ in range(len(self._posts)):  # what these post is for the next turn: other streams come first
            self._call(self._posts.popleft())
        while self._alarms and (self._alarms[0][0] <= self.now or not self._alarms[0][2]):
            alarm = heapq.heappop(self._alarms)
            if alarm[2]:
                self._call(alarm[2])

    def _run(self) -> None:
        while self._running:
            self.turn()

    def _on_bell(self, events: int) -> None:
        self._bell.recv(READ_SIZE)

    def _stop(self) -> None:
        self._running = False

    def _call(self, callback: Callable[..., object], *events: int) -> None:
        """Make a call.  A fault in one stream ends that stream and touches no other."""
        try:
            callback(*events)
        except Exception as error:  # noqa: BLE001
            log.error("fault in the relay: %s", place_of(error))
            owner: Any = getattr(getattr(callback, "func", callback), "__self__", None)
            with contextlib.suppress(Exception):
                if owner in self.streams:
                    owner.drop(ProxyError("Internal error."))
                elif owner in self.inboxes:
                    owner.wake(ProxyError("Internal error."))


# 10 ------------------------------------------------------------------ Upstream


class Gate:
    """Lets MAX_WORKING threads work at a time; what may wait for others stands in `with gate.outside():`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._places = MAX_WORKING  # that are free
        self._waiting: collections.deque[Callable[[], object]] = collections.deque()

    def enter(self, begin: Callable[[], object]) -> None:
        """Call begin once there is a place for it: now, or by the thread that leaves one."""
        with self._lock:
            if not self._places:
                self._waiting.append(begin)
                return
            self._places -= 1
        begin()

    def leave(self) -> None:
        with self._lock:
            if not self._waiting:
                self._places += 1
                return
            begin = self._waiting.popleft()
        begin()

    @contextlib.contextmanager
    def outside(self) -> Iterator[None]:
        """Give the place away meanwhile."""
        self.leave()
        try:
            yield
        finally:
            news: queue.SimpleQueue[None] = queue.SimpleQueue()
            self.enter(functools.partial(news.put, None))
            news.get()


class Lifeline:
    """Lets the relay cut a connection that a thread is still opening.

    It holds a copy of the descriptor, since TLS takes the one of the socket that it wraps, and shuts that
    down, which wakes a thread that is blocked on the socket; to close it would not.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._copy: socket.socket | None = None
        self._cut = False

    def hold(self, sock: socket.socket | None) -> None:
        """Hold the connection that a thread waits on; None: let go.  Raises OSError after cut()."""
        with self._lock:
            if self._copy:
                self._copy.close()
            self._copy = socket.fromfd(sock.fileno(), sock.family, sock.type) if sock else None
            if self._cut and sock:
                raise ConnectionAbortedError(errno.ECONNABORTED, "cut")

    def cut(self) -> None:
        with self._lock, contextlib.suppress(OSError):
            self._cut = True
            if self._copy:
                self._copy.shutdown(socket.SHUT_RDWR)

    def dial(self, address: tuple[str, int], timeout: float | None, *_: object) -> socket.socket:
        """Connect as socket.create_connection does, with each attempt on the lifeline."""
        failure = OSError(errno.EADDRNOTAVAIL, "no address")
        for family, kind, protocol, _name, target in socket.getaddrinfo(*address, 0, socket.SOCK_STREAM):
            sock = socket.socket(family, kind, protocol)
            try:
                self.hold(sock)
                sock.settimeout(timeout)
                sock.connect(target)
                return sock
            except OSError as error:
                failure = error
                sock.close()
        raise failure


class Call:
    """A request to upstream."""

    def __init__(
        self, path: str, body: bytes, fields: Mapping[str, str] | None = None, method: str = "POST", query: str = ""
    ) -> None:
        """path: below the base URL."""
        self.path, self.body, self.fields, self.method, self.query = path, body, fields or {}, method, query
        self.connected_at: float | None = None  # when it could be sent, by the relay's clock
        self.fresh = False  # on a new connection, since a warm one turned out closed
        self.lifeline = Lifeline()
        self.on_wait: Callable[[], None] = lambda: None  # called before the thread that asks may have to wait


USER_AGENT = f"streamproxy/{__version__}"


def prompt_call(asked: dict[str, Any], settings: Settings) -> Call:
    """Return the request to upstream for what a client of ours asked.  Raises RequestError."""
    accept = {"Content-Type": "application/json", "Accept": "text/event-stream, application/json"}
    return Call("/chat/completions", encode_request(asked, settings), {**accept, "User-Agent": USER_AGENT})


WOULD_BLOCK = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class Connection:
    """A connection to upstream, whose socket does not block but while a request is sent."""

    def __init__(self, sock: socket.socket, key: object, pool: Pool) -> None:
        self.sock = sock
        self.key = key  # what it leads to
        self.pool = pool
        self.reused = False
        self.broken = False  # its end came without a word: no close, no TLS closure (RFC 9112 section 9.8)
        if isinstance(sock, ssl.SSLSocket):
            sock.suppress_ragged_eofs = False  # type: ignore[attr-defined]
        self.alarm: list[Any] = [0.0, 0, None]

    def read(self) -> bytes | None:
        """Return what has come; b"" at the end of the connection, None where nothing came.

        Of TLS that is a whole record, which READ_SIZE is larger than: nothing decrypted is left
        where a selector does not see it.
        """
        try:
            return self.sock.recv(READ_SIZE)
        except WOULD_BLOCK:
            return None
        except OSError:
            self.broken = True
            return b""


class Pool:
    """Connections to upstream between two requests.  All but take belongs to the relay's thread."""

    def __init__(self, relay: Relay) -> None:
        self.relay = relay
        self._lock = threading.Lock()  # guards _idle, and the sockets in it
        self._idle: dict[object, list[Connection]] = collections.defaultdict(list)
        self._settling: set[Connection] = set()

    def take(self, key: object) -> Connection | None:
        """Return the connection that was used last, if one is alive.  For any thread."""
        with self._lock:
            while self._idle[key]:
                connection = self._idle[key].pop()
                if connection.read() is None:
                    connection.reused = True
                    return connection
                self.relay.post(functools.partial(self.close, connection))
        return None

    def settle(self, connection: Connection, body: BodyDecoder) -> None:
        """Keep a connection whose answer nobody waits for any more, once body, the rest of it, has ended."""
        self._settling.add(connection)
        if not body.complete:
            self.relay.watch(connection.sock, READ, functools.partial(self._on_rest, connection, body))
            late = functools.partial(self.close, connection)
            connection.alarm = self.relay.set_alarm(self.relay.now + END_GRACE, late)
        self._on_rest(connection, body)

    def close(self, connection: Connection) -> None:
        self.relay.cancel(connection.alarm)
        self.relay.unwatch(connection.sock)
        self._settling.discard(connection)
        connection.sock.close()

    def close_all(self) -> None:
        for connection in itertools.chain(self._settling, *self._idle.values()):
            connection.sock.close()

    def _on_rest(self, connection: Connection, body: BodyDecoder, events: int = 0) -> None:
        data = b"" if body.complete else connection.read()
        if data:
            body.feed(data)
        if body.complete and not body.rest:
            self._keep(connection)
        elif data is not None and (not data or body.complete or body.broken):
            self.close(connection)

    def _keep(self, connection: Connection) -> None:
        self.relay.cancel(connection.alarm)
        on_idle = functools.partial(self._on_idle, connection)
        connection.alarm = self.relay.set_alarm(self.relay.now + KEEP_ALIVE_TIMEOUT, on_idle)
        self.relay.watch(connection.sock, READ, on_idle)
        self._settling.discard(connection)
        with self._lock:
            idle = self._idle[connection.key]
            idle.append(connection)
            oldest = idle.pop(0) if len(idle) > MAX_IDLE_CONNECTIONS else None
        if oldest:
            self.close(oldest)

    def _on_idle(self, connection: Connection, events: int = 0) -> None:
        """Close what upstream closed, or says what nobody asked for on; or, without events, what is too old."""
        with self._lock:
            idle = self._idle[connection.key]
            if connection not in idle:  # a thread has just taken it
                self.relay.unwatch(connection.sock)
                return
            if events and connection.read() is None:  # it was TLS's own affair
                return
            idle.remove(connection)
        self.close(connection)


class Upstream(urllib.request.BaseHandler):
    """The API, asked from any thread: a handler of urllib's, so that the proxies of the environment count."""

    def __init__(self, settings: Settings, gate: Gate, relay: Relay) -> None:
        """Raises SettingsError for certificates that cannot be read."""
        self.redact = redactor(settings.api_key)
        self.pool = Pool(relay)
        self._gate = gate
        self._base = urllib.parse.urlsplit(settings.upstream)
        # The relay's clock cuts first; this is for systems where that does not wake connect().
        self._timeout = settings.connect_timeout + 1 if settings.connect_timeout else None
        self._fields = {"Host": self._base.netloc, "Accept-Encoding": "identity"}
        if settings.api_key:
            name, _, template = settings.auth_header.partition(":")
            self._fields[name] = template.strip().replace("{key}", settings.api_key)
        self._ca_file = settings.ca_file
        if self._base.scheme == "https":
            try:
                _ = self._context  # now, for its fault to be seen at the start
            except OSError:
                raise SettingsError(f"--ca-file (STREAMPROXY_CA_FILE): cannot use {settings.ca_file!r}") from None
        # Neither redirects nor file: addresses: handlers that are not there.  The built-in upstream is
        # on this machine, whatever proxy the environment names.
        self._opener = urllib.request.OpenerDirector()
        self._opener.add_handler(urllib.request.ProxyHandler({} if settings.demo else None))
        self._opener.add_handler(self)

    @functools.cached_property
    def _context(self) -> ssl.SSLContext:
        """Made only where it is needed: reading the system's certificates takes time and memory."""
        context = ssl.create_default_context(cafile=self._ca_file or None)
        # Set by Python 3.11.2, for one: it takes a connection that is cut for one that is closed (CPython gh-95494).
        context.options &= ~getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
        return context

    def open(self, call: Call) -> Connection:
        """Send a request, and return the connection on which its answer will come.

        Blocks until it is sent or the call's lifeline is cut.  Raises UpstreamError.
        """
        query = "&".join(filter(None, (self._base.query, call.query)))
        url = self._base._replace(path=self._base.path.rstrip("/") + call.path, query=query).geturl()
        request = urllib.request.Request(url, method=call.method)
        request.call = call  # type: ignore[attr-defined]
        try:
            return self._opener.open(request)  # type: ignore[no-any-return]
        except (OSError, http.client.HTTPException, UnicodeError) as error:  # the last for a name like a..b
            status = 504 if isinstance(error, socket.timeout) else 502
            raise UpstreamError(f"Upstream cannot be reached: {reason_of(error)}.", status) from None
        finally:
            call.lifeline.hold(None)

    def http_open(self, request: Any) -> Connection:
        """What urllib calls, once it has set the proxy."""
        call, key = request.call, (request.type, request.host, request._tunnel_host)
        proxy_fields = {} if request._tunnel_host else request.headers
        fields = {**self._fields, **proxy_fields, **call.fields}
        if call.method == "POST":
            fields["Content-Length"] = str(len(call.body))
        data = encode_head(f"{call.method} {request.selector} HTTP/1.1", fields) + call.body
        connection = None if call.fresh else self.pool.take(key)
        if connection:
            try:
                return self._send(connection, call, data)
            except OSError:  # it was closed just now
                call.connected_at = None
                self.pool.relay.post(functools.partial(self.pool.close, connection))
        connection = Connection(self._connect(request), key, self.pool)
        try:
            return self._send(connection, call, data)
        except (BrokenPipeError, ConnectionResetError, ssl.SSLEOFError):  # it may have answered without reading all
            connection.sock.setblocking(False)
            return connection
        except BaseException:
            connection.sock.close()
            raise

    https_open = http_open

    def _send(self, connection: Connection, call: Call, data: bytes) -> Connection:
        call.connected_at = self.pool.relay.clock()  # from here on the relay's clocks count
        try:
            data = data[connection.sock.send(data) :]
        except WOULD_BLOCK:
            pass
        if data:
            call.lifeline.hold(connection.sock)
            connection.sock.setblocking(True)
            with self._waiting(call):
                connection.sock.sendall(data)
            connection.sock.setblocking(False)
        return connection

    def _connect(self, request: Any) -> socket.socket:
        """Connect, through TLS and a proxy's tunnel where they are needed."""
        kind: Any = http.client.HTTPConnection
        if request.type == "https":
            kind = functools.partial(http.client.HTTPSConnection, context=self._context)
        connection = kind(request.host, timeout=self._timeout)
        connection._create_connection = request.call.lifeline.dial
        if request._tunnel_host:
            connection.set_tunnel(request._tunnel_host, headers=request.headers)
        with self._waiting(request.call):
            connection.connect()
        connection.sock.setblocking(False)
        return connection.sock  # type: ignore[no-any-return]

    @contextlib.contextmanager
    def _waiting(self, call: Call) -> Iterator[None]:
        call.on_wait()
        with self._gate.outside():
            yield


# 11 ------------------------------------------------------------------ Streams


class Inbox:
    """A client's connection, and what it sent that no thread has taken yet.

    The relay reads what comes, until it is enough: a connection holds no thread before a request is
    there, and a body that drips in wakes its thread once, not for each byte.
    """

    def __init__(self, relay: Relay, client: socket.socket, address: Any, timeout: float) -> None:
        """timeout: seconds for a request to arrive in all, and for a connection to idle before it; 0: no limit."""
        self.client, self.address = client, address
        self.data = bytearray()
        self.failure: ProxyError | None = None  # why no more is to come
        self.late_at: float | None = None  # when the request must have arrived; None: none has begun
        self.handler: Handler | None = None  # once it has asked
        self._relay = relay
        self._timeout = timeout or FOREVER
        self._enough: Callable[[bytearray, int], bool]
        self._on_news: Callable[[Inbox], None]
        self._alarm: list[Any] = [0.0, 0, None]

    def expect(self) -> None:
        """Begin with the next request, which may be there in part."""
        self.late_at = self._relay.clock() + self._timeout if self.data.strip(b"\r\n") else None

    def read(self, enough: Callable[[bytearray, int], bool], gate: Gate) -> None:
        """Read what there is of a request that has begun, or sleep until enough(data, how much of it was not).

        Raises Disconnected at the end of the connection, RequestError where the request takes longer
        than timeout, and Aborted.
        """
        if not self.take(enough):
            news: queue.SimpleQueue[Inbox] = queue.SimpleQueue()
            self._relay.post(functools.partial(self.wait, enough, news.put))
            with gate.outside():
                news.get()
        if self.failure:
            raise self.failure

    def take(self, enough: Callable[[bytearray, int], bool], seen: int = 0) -> bool:
        """Take what has come; tell whether that is enough, or nothing more will come.  Of seen bytes it was not."""
        if self.failure or (len(self.data) > seen and enough(self.data, seen)):
            return True
        seen = len(self.data)
        try:
            data = self.client.recv(READ_SIZE)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        self.data += data
        if not data:
            self.failure = Disconnected("The client left.")
        elif self.late_at is None and self.data.strip(b"\r\n"):  # empty lines are none of a request
            self.late_at = self._relay.clock() + self._timeout
        return self.failure is not None or enough(self.data, seen)

    # The rest is called by the relay.

    def wait(self, enough: Callable[[bytearray, int], bool], on_news: Callable[[Inbox], None]) -> None:
        """Call on_news once enough(data, how much of it was not), or for a failure."""
        self._enough, self._on_news = enough, on_news
        if self.take(enough):  # mostly so for a new connection
            self.wake()
            return
        self._relay.inboxes.add(self)
        self._relay.watch(self.client, READ, self.on_client)
        self._alarm = self._relay.set_alarm(self.late_at or self._relay.now + self._timeout, self.on_alarm)
        if self._relay.aborted:
            self.wake(self._relay.aborted)
        elif self._relay.draining:
            self.drain()

    def on_client(self, events: int = 0) -> None:
        if self.take(self._enough, len(self.data)):
            self.wake()

    def on_alarm(self) -> None:
        if self.late_at is None:
            self.wake(Disconnected("The client asked nothing."))
        elif self.late_at > self._relay.now:  # it has begun since
            self._alarm = self._relay.set_alarm(self.late_at, self.on_alarm)
        else:
            self.wake(RequestError("The request did not arrive in time.", 408))

    def drain(self) -> None:
        """End the wait for a request that has not begun."""
        self.on_client()
        if self.late_at is None and self in self._relay.inboxes:
            self.wake(Disconnected("The server is shutting down."))

    def wake(self, failure: ProxyError | None = None) -> None:
        self.failure = self.failure or failure
        self._relay.cancel(self._alarm)
        self._relay.unwatch(self.client)
        self._relay.inboxes.discard(self)
        self._on_news(self)


class Stream:
    """One answer on its way: from upstream's socket, through the decoders, to the client's socket.

    The thread that asks makes it and calls open.  All else happens in the relay's thread, as soon as
    the other may have to wait: the client may leave, a clock may run out and, in SSE mode, the head
    may have to go, before upstream has said a word.
    """

    def __init__(
        self, relay: Relay, client: socket.socket, answer: Answer, call: Call, settings: Settings,
        encode_head: Callable[[], tuple[bytes, bool]], on_news: Callable[[], None],
    ) -> None:
        """client must not block; encode_head is asked, with the first bytes of the body, what leaves before
        them, and whether the body is chunked.

        on_news is called in the relay: at the end, or where the request got nowhere, over a connection
        that turned out closed, and is to be opened afresh.
        """
        self.answer = answer
        self.failure: ProxyError | None = None  # why the answer is not complete
        self.ended = False
        self.started = False  # the client was sent something
        self.intact = False  # the client was sent a body that ends as it should
        self.first_text_at: float | None = None  # by the relay's clock
        self.early = bytearray()  # what the client sent meanwhile: its next request
        self._relay = relay
        self._client = client
        self.call = call
        self._settings = settings
        self._encode_head = encode_head
        self._on_news = on_news
        self._connection: Connection | None = None
        self._head = b""  # what came of upstream's head, until it is whole
        self._body: BodyDecoder | None = None  # once it is
        self._keeps_alive = False
        self._chunked = False
        self._pending = b""  # what the client's socket did not take
        self._blocked = False  # pending waits for the client, and upstream is not read
        self._closing = False  # nothing comes after pending
        self._alarm: list[Any] = [0.0, 0, None]
        self._began_at = self._opened_at = self._event_at = self._write_at = relay.clock()
        self._ending_at: float | None = None  # when all but a word or two had come

    def open(self, upstream: Upstream) -> None:
        """Ask upstream, and leave the rest to the relay.  Blocks until the request is sent."""
        self._opened_at = self._relay.clock()
        self.call.on_wait = functools.partial(self._relay.post, self.begin)
        news: Callable[[], None]
        try:
            failure = self._relay.aborted or self._listen()  # nobody pays for one that left while this waited
            if failure:
                raise failure
            news = functools.partial(self.carry, upstream.open(self.call))
        except ProxyError as error:
            news = functools.partial(self.fail, error)
        except Exception as error:  # noqa: BLE001
            log.error("fault in asking upstream: %s", place_of(error))
            news = functools.partial(self.fail, ProxyError("Internal error."))
        self._relay.post(news)

    # The rest is called by the relay.

    def begin(self) -> None:
        """Watch the client and the clocks, unless that has begun."""
        if self not in self._relay.streams and not self.ended:
            self._relay.streams.add(self)
            self._relay.watch(self._client, READ, self.on_client)
            self._set_alarm()
            if self._relay.aborted:
                self.fail(self._relay.aborted)

    def carry(self, connection: Connection) -> None:
        """Move what comes over connection from now on."""
        self._relay.cancel(connection.alarm)
        self.begin()
        if self.ended or self._closing:
            connection.pool.close(connection)
            return
        self._connection = connection
        if not self._blocked:
            self._relay.watch(connection.sock, READ, self.on_upstream)

    def on_upstream(self, events: int) -> None:
        """Read what has arrived and pass it on."""
        connection = self._connection
        if not connection or self._blocked:
            return
        data = connection.read()
        if data is None:
            return
        body = self._body
        if not body:
            self._take_head(data)
        elif data:
            self._take(body, data)
        else:
            if not connection.broken:
                body.close()
            self._take(body, b"", closed=True)

    def on_client(self, events: int) -> None:
        """Send what waits, and take what the client sends: mostly, that it leaves."""
        if events & WRITE:
            self._flush()
        failure = self._listen() if events & ~WRITE and not self.ended else None
        if failure:
            self.drop(failure)

    def on_alarm(self) -> None:
        """Do what is due, then wait for what comes next."""
        self._relay.cancel(self._alarm)
        for due, act in self._clocks():
            if due <= self._relay.now:
                act()
                break
        self._set_alarm()

    def fail(self, failure: ProxyError) -> None:
        """End the stream so that the client can tell that the answer is not complete."""
        if self.ended or self._closing:
            return
        if self.answer.state >= Answer.SETTLED and not self.answer.failure:
            self._complete()  # the answer was, and only usage and [DONE] were waited for
            return
        self.failure = failure = self.answer.failure or failure
        self._close_upstream()
        told = self.answer.encode("error", error=failure.message) if self.started else b""
        if told:
            self._write(told, last=True)
        elif self._pending:
            self._closing = True
        else:
            self._end()

    def drop(self, failure: ProxyError) -> None:
        """End the stream at once: nobody is there, or able, to take what is left of it."""
        if not self.ended:
            self.failure = failure
            self.intact = False
            self._end()

    def _listen(self) -> ProxyError | None:
        """Take what the client sends; return why that ends the stream, if it does."""
        try:
            data = self._client.recv(READ_SIZE)
        except BlockingIOError:
            return None
        except OSError:
            data = b""
        self.early += data
        if not data:
            return Disconnected("The client left.")
        if len(self.early) > MAX_PIPELINED:
            return Aborted("The client sent too much while its answer was on its way.")
        return None

    def _take_head(self, data: bytes) -> None:
        """Read on in upstream's head; b"" is the end of its connection."""
        assert self._connection
        sent_at = self.call.connected_at or 0.0
        if not (data or self._head or self.started) and self._connection.reused and self._relay.now < sent_at + STALE_WINDOW:
            self.call.connected_at, self.call.fresh = None, True
            self._leave(cut=False)
            return
        if not data:
            self.fail(UpstreamError("Upstream closed the connection without an answer."))
            return
        self._head += data
        try:
            parsed = parse_answer_head(self._head)
            if not parsed:
                return
            status, fields, rest = parsed
            self._body = BodyDecoder(0) if status in (204, 304) else body_decoder(fields, BodyDecoder(), lenient=True)
        except ValueError as error:
            self.fail(Garbled(f"Upstream's answer cannot be read: {error}."))
            return
        self._keeps_alive = self._body.left is not None and "close" not in fields.get("connection", "").lower()
        self.answer = self.answer.start(status, fields)
        if self.answer.eager and not self.answer.failure:
            self._write(b"")
        self._take(self._body, rest)

    def _take(self, body: BodyDecoder, data: bytes, closed: bool = False) -> None:
        """Pass on what data adds to the answer; closed: it is the last of upstream's connection."""
        answer, before = self.answer, self.answer.life
        out = answer.feed(body.feed(data))
        if body.complete:
            out += answer.close(None)
        elif body.broken:
            out += answer.close(Garbled("Upstream broke the chunked coding of its answer."))
        elif closed:
            out += answer.close(UpstreamError("Upstream closed the connection within its answer.", ending="truncated"))
        if answer.state == Answer.DONE:
            self._complete(out)
            return
        if out:
            self._write(out)
        if answer.failure and answer.state != Answer.ENDING:
            self.fail(answer.failure)
        elif answer.state == Answer.ENDING:
            if self._ending_at is None or answer.life != before:
                self._ending_at = self._event_at = self._relay.now
                self._set_alarm(END_GRACE)
        elif answer.life != before:
            self._event_at = self._relay.now

    def _end_moment(self) -> None:
        """Take what has come for all, since what could follow did not."""
        out = self.answer.close(None)
        if self.answer.failure:
            if out:
                self._write(out)
            self.fail(self.answer.failure)
        else:
            self._complete(out)

    def _complete(self, out: bytes = b"") -> None:
        self._close_upstream(keep=True)
        self._write(out + self.answer.end(), last=True)

    def _write(self, body: bytes, last: bool = False) -> None:
        """Send body as one chunk, with the head before the first and the last chunk behind the last."""
        if not self.started:
            self.started = True
            self._pending, self._chunked = self._encode_head()
        data = encode_chunk(body) if self._chunked else body
        if last:
            self._closing = self.intact = True
            data += LAST_CHUNK if self._chunked else b""
        self._write_at = self._relay.now
        if self.first_text_at is None and self.answer.pieces:
            self.first_text_at = self._write_at
        self._pending = self._pending + data if self._pending else data
        if not self._blocked:
            self._flush()

    def _flush(self) -> None:
        try:
            sent = self._client.send(self._pending)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.drop(Disconnected("The client left."))
            return
        if sent == len(self._pending):
            self._pending = b""
            if self._closing:
                self._end()
            elif self._blocked:
                self._unblock()
        else:
            self._pending = self._pending[sent:]
            if not self._blocked:
                self._block()
            elif sent:
                self._write_at = self._relay.now

    def _block(self) -> None:
        """Back-pressure: while the client does not read, neither do we."""
        self._blocked = True
        self._relay.watch(self._client, READ | WRITE, self.on_client)
        if self._connection:
            self._relay.unwatch(self._connection.sock)

    def _unblock(self) -> None:
        self._blocked = False
        self._event_at = self._write_at = self._relay.now  # upstream was not silent: we did not listen
        self._relay.watch(self._client, READ, self.on_client)
        if self._connection:
            self._relay.watch(self._connection.sock, READ, self.on_upstream)
        if self._ending_at is not None:
            self._ending_at = self._relay.now
            self._set_alarm()  # END_GRACE did not run meanwhile, and is shorter than the other clocks

    def _close_upstream(self, keep: bool = False, cut: bool = True) -> None:
        """Nobody pays for what would come from now on.  keep: what comes is a few bytes that were paid for."""
        if cut:
            self.call.lifeline.cut()
        connection, self._connection = self._connection, None
        if connection and self._body and self._keeps_alive and (keep or self._body.complete):
            connection.pool.settle(connection, self._body)
        elif connection:
            connection.pool.close(connection)

    def _end(self) -> None:
        self.ended = True
        self._leave()

    def _leave(self, cut: bool = True) -> None:
        """Leave the relay: it is a thread's turn."""
        self._relay.cancel(self._alarm)
        self._close_upstream(cut=cut)
        self._relay.unwatch(self._client)
        self._relay.streams.discard(self)
        self._on_news()

    def _set_alarm(self, within: float = FOREVER) -> None:
        """Look at the clocks again when the next is due, in within seconds at most.

        A clock that starts later runs for one of limits at least: looking that often misses none.
        """
        if not self.ended:
            limits = self._settings
            timeouts = (limits.connect_timeout, limits.first_byte_timeout, limits.idle_timeout, limits.client_timeout,
                        limits.heartbeat if self.answer.pings else 0)
            soon = self._relay.now + min([within, *filter(None, timeouts)])
            self._relay.cancel(self._alarm)
            self._alarm = self._relay.set_alarm(min([soon, *(due for due, _ in self._clocks())]), self.on_alarm)

    def _clocks(self) -> Iterator[tuple[float, Callable[[], None]]]:
        """What is due when, as things stand."""
        limits, connected_at = self._settings, self.call.connected_at
        if limits.total_timeout and not self._closing:
            yield self._began_at + limits.total_timeout, self._late("to end its answer")
        if self._blocked:
            if limits.client_timeout:
                yield self._write_at + limits.client_timeout, lambda: self.drop(Aborted("The client stopped reading."))
            return
        if self._ending_at is not None:
            yield self._ending_at + END_GRACE, self._end_moment
        elif self.answer.events:
            if limits.idle_timeout:
                yield self._event_at + limits.idle_timeout, self._late("to go on with its answer")
        elif connected_at is not None:
            if limits.first_byte_timeout:
                yield max(connected_at, self._event_at) + limits.first_byte_timeout, self._late("to start its answer")
        elif limits.connect_timeout:
            yield self._opened_at + limits.connect_timeout, self._late("to connect")
        if limits.heartbeat and self.answer.pings:
            yield self._write_at + limits.heartbeat, lambda: self._write(self.answer.ping())

    def _late(self, what: str) -> Callable[[], None]:
        return lambda: self.fail(UpstreamError(f"Upstream took too long {what}.", 504, "aborted"))


# 12 ------------------------------------------------------------------ Server

_LINE_START = re.compile(f"{_TOKEN[:-1]}|\r?\\Z".encode())  # or what can become one
_REQUEST_LINE = re.compile(f"({_TOKEN}) ([!-~\x80-\xff]+) HTTP/([0-9])\\.([0-9])")  # RFC 9112 section 3
_BAD_LINE = "The request line is not in HTTP's grammar."
_MODEL_PATH = re.compile("^/v1/models/.+")
_REQUEST_ID = re.compile("[0-9A-Za-z._-]{1,64}")
_HOST = re.compile(r"([A-Za-z0-9._~-]{1,255}|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?")  # RFC 9110 section 7.2


def has_head(data: bytearray, seen: int = 0) -> bool:
    """Tell whether a request's head is there, or cannot come any more: HTTP/0.9 and TLS are told at once.

    seen: of so many bytes it was False.
    """
    begin = 2 if data.startswith(b"\r\n") else 0  # RFC 9112 section 2.2
    if len(data) - begin > MAX_HEAD_SIZE or not _LINE_START.match(data, begin):
        return True
    line_end = data.find(b"\n", begin)
    if line_end >= seen:
        line = _REQUEST_LINE.fullmatch(data[begin : line_end + 1].decode("latin-1").removesuffix("\r\n"))
        if not line or line[3] != "1":
            return True
    return line_end >= 0 and data.find(b"\r\n\r\n", max(begin, seen - 3)) >= 0


@functools.lru_cache(maxsize=1)
def http_date(seconds: int) -> str:
    """A time of the system's clock as RFC 9110 section 5.6.7 has it."""
    return email.utils.formatdate(seconds, usegmt=True)


class LogEntry(dict[str, object]):
    """What the log says of one request.  As text: name=value, nothing from the wire unescaped."""

    def __str__(self) -> str:
        return " ".join([f"{name}={self._text(value)}" for name, value in self.items() if value is not None])

    @staticmethod
    def _text(value: object) -> str:
        plain = _PLAIN.fullmatch(value) if isinstance(value, str) else isinstance(value, (int, float))
        return str(value) if plain else _COMPACT_JSON.encode(value)


_PLAIN = re.compile("[!#-<>-~]+")  # no space, quote or =
_COMPACT_JSON = json.JSONEncoder(separators=(",", ":"))


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection: reads requests, answers them, and leaves streams to the relay.

    http.server's own reading of requests is not used: it lets one hide in another.
    """

    server: Server

    def setup(self) -> None:
        self.inbox: Inbox = self.request
        self.inbox.handler = self
        self.connection = self.inbox.client
        self.peer = "unix" if self.server.path else plain_address(self.client_address[0])
        self.close_connection = False
        self.stream: Stream | None = None

    def finish(self) -> None:
        pass

    def handle(self) -> None:
        """Do what there is to do until it is the relay's turn.  Called again when it is a thread's."""
        if self.stream and self.stream.ended:
            self._attempt(self._take_end)
        while not (self.stream or self.close_connection) and self.inbox.take(has_head):
            self.handle_one_request()
        if self.stream:
            self.stream.open(self.server.upstream)  # from here on, another thread may have this connection
        elif self.close_connection:
            self.server.shutdown_request(self.inbox)
        else:
            self.server.relay.post(functools.partial(self.inbox.wait, has_head, self.server.on_request))

    def handle_one_request(self) -> None:
        """Read a request, and answer it or prepare the stream that will."""
        self.close_connection = True
        if self.inbox.late_at is None:  # nothing was asked, and nothing will be
            return
        self.method = self.path = "-"
        self.query = ""
        self.http11 = True
        self.fields: dict[str, str] = {}
        self.cors: dict[str, str] = {}
        self.client = self.peer
        self.body: BodyDecoder = BodyDecoder()  # which is not complete: who knows what comes
        self.request_id, self.status, self.began_at = f"{random.getrandbits(64):016x}", 0, time.monotonic()
        self.place = contextlib.ExitStack()  # among the streams of the limits
        self.failure: ProxyError | None = None
        self._attempt(self._take_request)

    def _attempt(self, step: Callable[[], None]) -> None:
        """Take a step of a request; if it is the last, see to its end, whatever happens, with one line in the log."""
        failure: ProxyError | None = None
        try:
            step()
            if self.stream and not self.stream.ended:
                return
        except ProxyError as error:
            failure = error
        except OSError:
            failure = Disconnected("The client left.")
        except Exception as error:  # noqa: BLE001
            log.error("fault in request %s: %s", self.request_id, place_of(error))
            failure = ProxyError("Internal error.")
        self.place.close()
        if failure:
            self._refuse(failure)
        self._log()
        self.stream = None
        self.inbox.expect()

    def _take_request(self) -> None:
        self._read_head()
        self._dispatch()

    # What is asked.

    def _read_head(self) -> None:
        """Take the next request's head.  Raises ProxyError."""
        inbox = self.inbox
        try:
            if inbox.failure and not has_head(inbox.data):
                raise inbox.failure
        finally:  # also of a head that does not come, the first line says how to answer and what to log
            line, line_ends, _ = inbox.data.removeprefix(b"\r\n").partition(b"\r\n")
            if line_ends:
                self._take_request_line(line.decode("latin-1"))
        head, head_ends, inbox.data = inbox.data.removeprefix(b"\r\n").partition(b"\r\n\r\n")
        if len(head) > MAX_HEAD_SIZE:
            raise RequestError("The head of the request is too large.", 431 if len(line) < MAX_HEAD_SIZE else 414)
        if not head_ends:
            raise RequestError(_BAD_LINE)
        self._take_fields(bytes(head))

    def _take_request_line(self, line: str) -> None:
        match = _REQUEST_LINE.fullmatch(line)
        if not match:
            raise RequestError(_BAD_LINE)
        if match[3] != "1":
            raise RequestError("This server speaks HTTP/1.1 and HTTP/1.0.", 505)
        self.method, self.http11 = match[1], match[4] != "0"
        self.path, _, self.query = match[2].partition("?")

    def _take_fields(self, head: bytes) -> None:
        """Take the fields, and from them the framing of the body.  Raises RequestError."""
        self.began_at = time.monotonic()
        if head.count(b"\r\n") > MAX_FIELDS:
            raise RequestError("The request has too many header fields.", 431)
        try:
            self.fields = parse_head(head)[1]
            if "transfer-encoding" in self.fields and not self.http11:
                raise ValueError("a transfer coding in HTTP/1.0")
            body = body_decoder(self.fields, BodyDecoder(0))
        except ValueError as error:
            raise RequestError(f"The request cannot be read: {error}.") from None
        host = self.fields.get("host", "" if self.http11 else "localhost")
        if not _HOST.fullmatch(host):
            raise RequestError("The request needs one Host field.")
        scheme, _, rest = self.path.partition("://")
        if scheme.lower() in ("http", "https") and rest.partition("/")[0].lower() == host.lower():
            self.path = "/" + rest.partition("/")[2]  # absolute form, RFC 9112 section 3.2.2
        self.body = body
        if _REQUEST_ID.fullmatch(self.fields.get("x-request-id", "")):
            self.request_id = self.fields["x-request-id"]
        tokens = [token.strip() for token in self.fields.get("connection", "").lower().split(",")]
        self.close_connection = not self.http11 or "close" in tokens

    def _dispatch(self) -> None:
        """Check what every request must have, and call the function of its path and method."""
        access = self.server.access
        self.client = access.address_of(self.peer, self.fields.get("x-forwarded-for", ""))
        self.cors = access.cors_fields(self.fields)
        methods = _ROUTES.get(_MODEL_PATH.sub("/v1/models", self.path))
        if not methods:
            raise RequestError("There is nothing at this path.", 404)
        self.allowed = allowed = ", ".join(methods)
        if self.method not in methods:
            known = self.method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "TRACE", "CONNECT")
            raise RequestError(f"This path takes {allowed} only.", 405 if known else 501, fields={"Allow": allowed})
        if self.method != "POST" and not self.body.complete:
            raise RequestError("Only POST takes a body.")
        if self.path not in _OPEN_PATHS:
            access.check_host(self.fields.get("host", "localhost"), self._own_address)
        methods[self.method](self)

    def _own_address(self) -> str:
        return "" if self.server.path else plain_address(self.connection.getsockname()[0])

    def answer_preflight(self) -> None:
        """Tell a page of an allowed origin what it may send (WHATWG Fetch section 3.2.2)."""
        fields = {"Allow": self.allowed}
        if "origin" in self.fields:
            self.server.access.check_origin(self.fields)
            asked = [name.strip().lower() for name in self.fields.get("access-control-request-headers", "").split(",")]
            allowed = [name for name in asked if name in _CORS_FIELDS or name.startswith("x-stainless-")]
            fields = {"Access-Control-Allow-Methods": self.allowed, "Access-Control-Allow-Headers": ", ".join(allowed),
                      "Access-Control-Max-Age": "600"}  # fmt: skip
        self._answer(204, b"", fields)

    def _admit(self) -> None:
        """Let in a request that costs money, and count it as long as it lasts.  Raises RequestError."""
        self.server.access.check_origin(self.fields)
        key = network_of(self.client) if self.client != "unix" else "unix"
        name = self.server.access.identify(self.fields)
        self.client = name or self.client
        self.place.enter_context(self.server.limits.place(name or key))

    def post_prompt(self) -> None:
        """Answer a JSON body with a stream."""
        redact = self.server.upstream.redact
        answer = EventAnswer(self.request_id, redact) if self._wants_events() else TextAnswer(redact)
        self._admit()
        asked = parse_request(self._read_body())
        if "last-event-id" in self.fields and answer.pings:  # see get_root
            self._answer(204, b"", {})
        else:
            self._ask(answer, asked)

    def get_root(self) -> None:
        """Answer with the chat page, or an EventSource with the stream for ?prompt=."""
        if not self._wants_events():
            self._answer(200, PAGE, PAGE_FIELDS)
        elif "last-event-id" in self.fields:  # it had its answer; 204 stops it (WHATWG HTML section 9.2.3)
            self._answer(204, b"", {})
        else:
            try:
                query = re.sub("[\x80-\xff]", lambda byte: f"%{ord(byte[0]):02X}", self.query)  # curl sends them raw
                prompts = urllib.parse.parse_qs(query, errors="strict").get("prompt", [])
            except ValueError:
                raise RequestError("The query is not UTF-8.") from None
            answer = EventAnswer(self.request_id, self.server.upstream.redact, reconnects=True)
            self._admit()
            self._ask(answer, {"prompt": prompts[0] if len(prompts) == 1 else None})

    def get_health(self) -> None:
        """Say that the process is alive."""
        self._answer(200, b"ok\n", {"Content-Type": "text/plain; charset=utf-8"})

    def get_ready(self) -> None:
        """Say whether new requests are welcome."""
        status, words = (503, b"draining\n") if self.server.draining else (200, b"ok\n")
        self._answer(status, words, {"Content-Type": "text/plain; charset=utf-8"})

    def post_api(self) -> None:
        """Pass a request of the API on, and its answer back."""
        self._admit()
        body = self._read_body()
        asked = check_model(body, self.server.settings)
        stream, messages = asked.get("stream") is True, self.path == "/v1/messages"
        self._pass(PassedAnswer(self.server.upstream.redact, count_choices(asked), messages, stream), body)

    def get_models(self) -> None:
        """Answer with the models that may be used, or with one of them."""
        settings, redact = self.server.settings, self.server.upstream.redact
        name = urllib.parse.unquote(self.path[len("/v1/models/") :])
        models = (settings.model, *settings.allow_model)
        if any(not part.strip(".") for part in name.split("/")) and name:
            raise RequestError("There is nothing at this path.", 404)  # nor at one that it leads to
        self._admit()
        if name and not {name, "*"}.intersection(models):
            raise unknown_model(name)
        self._pass(PassedAnswer(redact) if name or "*" in models else ModelList(models, redact))

    def _wants_events(self) -> bool:
        ranges = [part.partition(";")[0].strip().lower() for part in self.fields.get("accept", "").split(",")]
        return "text/event-stream" in ranges and self.method != "HEAD"

    def _read_body(self) -> bytes:
        limit, length = self.server.settings.max_body, self.fields.get("content-length", "0")
        if "transfer-encoding" not in self.fields and "content-length" not in self.fields:
            raise RequestError("A body needs a Content-Length.", 411)
        if int(length) > limit:
            raise RequestError(f"The body is larger than {limit} bytes.", 413)
        if self.fields.get("expect", "").lower() == "100-continue" and self.http11 and not self.inbox.data:
            self._send(b"HTTP/1.1 100 Continue\r\n\r\n")
        return self._read_on(limit)

    def _read_on(self, limit: int) -> bytes:
        """Return the rest of the request's body.  Raises RequestError, and Disconnected."""
        inbox, body = self.inbox, bytearray()

        def is_enough(data: bytearray, seen: int) -> bool:
            chunked = "transfer-encoding" in self.fields  # of which each line, and so the last, may be the end
            return len(data) >= min(self.body.left or 1, READ_SIZE) or (chunked and b"\n" in data)

        while not self.body.complete:
            if not inbox.data:
                inbox.read(is_enough, self.server.gate)
            body += self.body.feed(bytes(inbox.data))
            inbox.data = bytearray(self.body.rest)
            if self.body.broken:
                raise RequestError("The chunked coding of the body is broken.")
            if len(body) > limit:
                raise RequestError(f"The body is larger than {limit} bytes.", 413)
        return bytes(body)

    # How it is answered.

    def _ask(self, answer: Answer, asked: dict[str, Any]) -> None:
        call = prompt_call(asked, self.server.settings)
        answer.choices = count_choices(json.loads(call.body))
        self._stream(answer, call)

    def _pass(self, answer: Answer, body: bytes = b"") -> None:
        """Answer a request of the API.  User-Agent says who connects, and behind it for whom."""
        fields = {name.title(): self.fields[name] for name in PASSED_FIELDS if name in self.fields}
        if "*" not in self.server.settings.allow_model and body:
            fields["Content-Type"] = "application/json"  # as check_model has read it
        fields["User-Agent"] = f"{USER_AGENT} {self.fields.get('user-agent', '')}".strip()
        self._stream(answer, Call(self.path[len("/v1") :], body, fields, self.method, self.query))

    def _stream(self, answer: Answer, call: Call) -> None:
        """Prepare the stream of upstream's answer."""
        server = self.server

        def encode_head() -> tuple[bytes, bool]:
            fields = {**STREAM_FIELDS, **answer.fields}
            if answer.content_type:
                fields["Content-Type"] = answer.content_type
            chunked = self.http11 and "Content-Length" not in fields
            if chunked:
                fields["Transfer-Encoding"] = "chunked"
            return self._encode_head(answer.status, fields), chunked

        def on_news() -> None:
            if self.stream and self.stream.ended:
                self.place.close()  # before the relay takes another request: a client that saw the end may ask again
            server.process_request(self.inbox, self.client_address)

        self.stream = Stream(server.relay, self.connection, answer, call, server.settings, encode_head, on_news)

    def _take_end(self) -> None:
        """Take what a stream that has ended leaves.  Raises ProxyError."""
        stream = self.stream
        assert stream
        self.inbox.data += stream.early
        self.status = stream.answer.status if stream.started else 0
        if stream.failure:
            raise stream.failure

    def _refuse(self, failure: ProxyError) -> None:
        """Tell the client that its request failed, as far as that can still be told."""
        self.failure, self.status = failure, self.status or failure.status
        if isinstance(failure, Disconnected):
            self.close_connection = True
        elif self.stream and self.stream.started:
            self.close_connection |= not self.stream.intact
            if not self.stream.intact and not self.http11:
                self._reset()  # its body ends where the connection does
        else:
            unread, over = not self.body.complete, failure.status == 408 or isinstance(failure, Aborted)
            left = MAX_DISCARDED + 1 if over or self.body.left is None else self.body.left
            small = left <= MAX_DISCARDED and "expect" not in self.fields
            self.close_connection |= over or (unread and not small)
            fields = {"Content-Type": "application/json", **failure.fields}
            if failure.status in (429, 503):
                fields.setdefault("Retry-After", "1")
            paid = self.stream and self.stream.call.connected_at is not None and failure.status >= 500
            if paid and not {"Retry-After", "X-Should-Retry"} & fields.keys():
                fields["X-Should-Retry"] = "false"  # SDKs heed it: what was asked may have been paid for
            try:
                self._answer(failure.status, encode_error(failure, self.path), fields)
                if unread and small:
                    self._read_on(MAX_DISCARDED)
                elif unread:
                    self._linger()
            except (OSError, ProxyError):  # the answer was given, or nobody is there
                self.close_connection = True

    def _answer(self, status: int, body: bytes, fields: Mapping[str, str]) -> None:
        self.status = status
        length = {"Content-Length": str(len(body))} if body else {}
        head = self._encode_head(status, {"Cache-Control": "no-store", **length, **fields})
        self._send(head if self.method == "HEAD" else head + body)

    def _encode_head(self, status: int, fields: Mapping[str, str]) -> bytes:
        """Return a head with the fields that every answer has, and Connection where it is the last."""
        self.close_connection |= self.server.draining
        common = {
            "Date": http_date(int(time.time())),
            "X-Request-Id": self.request_id,
            "X-Content-Type-Options": "nosniff",
        }
        if self.close_connection:
            common["Connection"] = "close"
        line = f"HTTP/1.1 {status} {http.client.responses.get(status, '')}"
        return encode_head(line, {**common, **self.cors, **fields})

    def _send(self, data: bytes) -> None:
        with self.server.gate.outside():
            while data:
                try:
                    data = data[self.connection.send(data) :]
                except BlockingIOError:
                    if not wait_for(self.connection, WRITE, self.server.settings.client_timeout or FOREVER):
                        raise

    def _linger(self) -> None:
        """Read what the client still sends: closing now would reset the connection under our answer."""
        deadline, room = time.monotonic() + LINGER_TIMEOUT, MAX_LINGER_SIZE
        with self.server.gate.outside():
            self.connection.shutdown(socket.SHUT_WR)
            while room > 0 and wait_for(self.connection, READ, deadline - time.monotonic()):
                room -= len(self.connection.recv(READ_SIZE)) or room

    def _reset(self) -> None:
        """Close so that the client sees an error (SO_LINGER of 0 s), not the end of a body."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def _log(self) -> None:
        now, stream = time.time(), self.stream
        entry = LogEntry(
            time=time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03}Z",
            id=self.request_id,
            client=self.client,
            method=self.method,
            path=self.path[:200],  # the query may hold a prompt
            status=self.status,
            ending=self.failure.ending if self.failure else "complete",
            error=self.failure.logged if self.failure else None,
            seconds=round(time.monotonic() - self.began_at, 3),
        )
        if stream:
            ttft = None if stream.first_text_at is None else round(stream.first_text_at - self.began_at, 3)
            answer = stream.answer
            entry.update(
                ttft=ttft, pieces=answer.pieces, bytes=answer.size, model=answer.model,
                finish_reason=answer.finish_reason, usage=answer.usage, upstream_id=answer.request_id,
            )  # fmt: skip
        log.info(entry)


def _get(function: Callable[[Handler], None]) -> dict[str, Callable[[Handler], None]]:
    return {"GET": function, "HEAD": function, "OPTIONS": Handler.answer_preflight}  # HEAD: the same without the body


# Path, then method.
_ROUTES: dict[str, dict[str, Callable[[Handler], None]]] = {
    "/": {**_get(Handler.get_root), "POST": Handler.post_prompt},
    "/healthz": _get(Handler.get_health),
    "/readyz": _get(Handler.get_ready),
    "/v1/models": {"GET": Handler.get_models, "OPTIONS": Handler.answer_preflight},
    **{
        f"/v1/{name}": {"POST": Handler.post_api, "OPTIONS": Handler.answer_preflight}
        for name in ("chat/completions", "completions", "responses", "embeddings", "messages")
    },
}

_OPEN_PATHS = ("/healthz", "/readyz")  # those that answer under any name

# What a page of another origin may send.
_CORS_FIELDS = ("accept", "api-key", "authorization", "last-event-id", "x-api-key", "x-request-id", *PASSED_FIELDS)

# What keeps nginx, proxies that compress, and whoever knows RFC 10036 from holding text back.
STREAM_FIELDS = {"X-Accel-Buffering": "no", "Cache-Control": "no-cache, no-transform", "Incremental": "?1"}


class Server(http.server.ThreadingHTTPServer):
    """The proxy: bound once made, serving from start() to stop(), or within a with block."""

    daemon_threads = True
    request_queue_size = BACKLOG

    def __init__(self, settings: Settings) -> None:
        """Raises SettingsError, and OSError where the address cannot be bound."""
        self.path, host, port = parse_address(settings.bind)
        address: Any = self.path
        self.address_family = socket.AF_UNIX
        if not self.path:
            self.address_family, *_, address = socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM)[0]
        super().__init__(address, Handler, bind_and_activate=False)
        self.gate = Gate()
        self.relay = Relay()
        self.draining = False
        self.limits = Limits(settings)
        self._max_connections = 2 * settings.max_streams + SPARE_CONNECTIONS if settings.max_streams else sys.maxsize
        self._connections: set[socket.socket] = set()
        # Where each waits for a task, or () to end.  What is done to the list, append, pop and remove, needs no lock.
        self._idle_threads: list[queue.SimpleQueue[tuple[Any, ...]]] = []
        self._short_until = 0.0  # a lack of threads is known, by the relay's clock
        self._changed = threading.Condition()  # guards _connections, _listening and _hurried
        self._hurried = self._listening = self._started = False
        self._resources = contextlib.ExitStack()
        self._resources.callback(self.relay.close)
        try:
            self.settings = self._resources.enter_context(demo_upstream(settings))
            self.access = Access(settings)
            self.upstream = Upstream(self.settings, self.gate, self.relay)
            self._resources.callback(self.upstream.pool.close_all)
            self.server_bind()
            self.server_activate()
        except BaseException:
            self.server_close()
            raise

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """Where the server can be reached, with the port that was bound; unix:PATH for a socket."""
        host = parse_address(self.settings.bind)[1]
        host = f"[{host}]" if ":" in host else host
        return f"unix:{self.path}" if self.path else f"http://{host}:{self.server_address[1]}"

    def start(self) -> None:
        """Serve, in threads of its own."""
        self._listen()
        self.relay.start()
        self._started = True

    def stop(self) -> None:
        """Stop accepting, let what is open end for up to drain_timeout seconds, abort the rest, close.

        A second call does nothing.
        """
        if self.draining:
            return
        self.draining = True
        if self._started:
            self.relay.post(self._drain)
            if not self._wait_for_connections(self.settings.drain_timeout):
                self.relay.post(self._abort_streams)
                self._hurried = False
                if not self._wait_for_connections(ABORT_GRACE):
                    self.relay.post(self._drop_streams)
                    self._wait_for_connections(LINGER_TIMEOUT)
                for connection in list(self._connections):
                    with contextlib.suppress(OSError):
                        connection.shutdown(socket.SHUT_RDWR)
            self.relay.stop()
        self.server_close()

    def abort(self) -> None:
        """Have stop() wait no longer.  For any thread."""
        with self._changed:
            self._hurried = True
            self._changed.notify_all()

    def _wait_for_connections(self, timeout: float) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._hurried or not (self._connections or self._listening), timeout)
            return not (self._connections or self._listening)

    def _drain(self) -> None:
        self.relay.unwatch(self.socket)
        for _ in range(BACKLOG):  # those who connected before
            if not self._on_connection():
                break
        self.relay.draining = True
        self._stop_listening()
        for inbox in list(self.relay.inboxes):
            inbox.drain()

    def _abort_streams(self) -> None:
        self.relay.aborted = Aborted("The server is shutting down.", fields={"Retry-After": "1"})
        for stream in list(self.relay.streams):
            stream.fail(self.relay.aborted)
        for inbox in list(self.relay.inboxes):
            inbox.wake(self.relay.aborted)

    def _drop_streams(self) -> None:
        for stream in list(self.relay.streams):
            stream.drop(Aborted("The server is shutting down."))

    # What socketserver calls, or is called of it.

    def server_bind(self) -> None:
        if self.path:
            _remove_stale_socket(self.path)
        socketserver.TCPServer.server_bind(self)  # http.server's looks its own name up, which may take long
        self.socket.setblocking(False)
        self._listening = True
        if self.path:
            os.chmod(self.path, 0o666)  # as open as a loopback port; the folder's mode can say otherwise

    def server_close(self) -> None:
        self._stop_listening()
        super().server_close()
        self._resources.close()
        with contextlib.suppress(IndexError):
            while True:
                self._idle_threads.pop().put(())

    def _stop_listening(self) -> None:
        if self._listening:
            if self.path:  # removed now: a successor may bind it while we drain
                with contextlib.suppress(OSError):
                    os.unlink(self.path)
            self.socket.close()
            with self._changed:
                self._listening = False
                self._changed.notify_all()

    def _on_connection(self, events: int = 0) -> bool:
        """Accept a connection, if one is there, and have the relay wait for its first request."""
        try:
            inbox, _ = self.get_request()
        except BlockingIOError:
            return False
        except OSError as error:  # no descriptor is left
            log.error("a connection was not accepted: %s", place_of(error))
            self.relay.unwatch(self.socket)
            self.relay.set_alarm(self.relay.now + SHORTAGE_PAUSE, self._listen)
            return False
        with self._changed:
            self._connections.add(inbox.client)
        if len(self._connections) > self._max_connections:
            self._turn_away(inbox)
        else:
            inbox.wait(has_head, self.on_request)
        return True

    def _listen(self) -> None:
        if self._listening and not self.draining:
            self.relay.watch(self.socket, READ, self._on_connection)

    def on_request(self, inbox: Inbox) -> None:
        """Have a thread handle the request that is there, or close a connection that ended without one."""
        if inbox.late_at is None:
            self.shutdown_request(inbox)
        else:
            self.process_request(inbox, inbox.address)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Have a thread do what there is to do for a connection, as soon as there is room for its work."""
        self.gate.enter(functools.partial(self._give, request, client_address))

    def _give(self, *task: Any) -> None:
        """Give a task to the thread that was idle last, or to a new one."""
        with contextlib.suppress(IndexError):
            self._idle_threads.pop().put(task)
            return
        try:
            super().process_request(*task)
        except RuntimeError as error:
            now, again = self.relay.clock(), functools.partial(self.process_request, *task)
            if now >= self._short_until:
                log.error("no thread was started: %s", place_of(error))
                self._short_until = now + SHORTAGE_PAUSE
            self.relay.post(functools.partial(self.relay.set_alarm, now + SHORTAGE_PAUSE, again))
            self.relay.post(self.gate.leave)  # for those that have a thread; not from here, for many may fail

    def process_request_thread(self, *task: Any) -> None:
        """Do one task after the other."""
        tasks: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()  # its own: one for all wakes others in vain
        while task:
            try:
                self.finish_request(*task)
            except Exception:  # noqa: BLE001
                self.handle_error(*task)
                self.shutdown_request(task[0])
            self._idle_threads.append(tasks)
            self.gate.leave()  # which may give it the next at once
            try:
                task = tasks.get(timeout=IDLE_THREAD_TIMEOUT)
            except queue.Empty:
                try:
                    self._idle_threads.remove(tasks)
                    return
                except ValueError:  # a task is on its way
                    task = tasks.get()

    def finish_request(self, request: Any, client_address: Any) -> None:
        if request.handler:
            request.handler.handle()
        else:
            super().finish_request(request, client_address)

    def get_request(self) -> tuple[Any, Any]:
        client, address = self.socket.accept()
        client.setblocking(False)
        if not self.path:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return Inbox(self.relay, client, address, self.settings.client_timeout), address

    def _turn_away(self, inbox: Inbox) -> None:
        with contextlib.suppress(OSError):
            inbox.client.send(_TOO_MANY)
            inbox.client.recv(READ_SIZE)  # what is unread would reset the connection, and the answer with it
        self.shutdown_request(inbox)

    def shutdown_request(self, request: Any) -> None:
        request.handler = None  # each has the other
        request.client.close()
        with self._changed:
            self._connections.discard(request.client)
            self._changed.notify_all()

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if error and not isinstance(error, OSError):  # a client that vanishes is a normal ending
            log.error("fault in a connection: %s", place_of(error))


_TOO_MANY = (
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\nContent-Type: application/json\r\n"
    b'Content-Length: 35\r\n\r\n{"error": "Too many connections."}\n'
)


def _remove_stale_socket(path: str) -> None:
    """Remove the socket of a process that is gone: nobody answers there."""
    with contextlib.suppress(FileNotFoundError), socket.socket(socket.AF_UNIX) as probe:
        if stat.S_ISSOCK(os.stat(path).st_mode) and probe.connect_ex(path) == errno.ECONNREFUSED:
            os.unlink(path)


def stream_text(prompt: str, settings: Settings) -> Iterator[str]:
    """Yield the text of the answer to prompt as it arrives, with no server.

    Leaving the loop closes the connection to upstream.  Raises ProxyError, after the text that
    came, where the answer is not complete.
    """
    gate = Gate()
    decoder = codecs.getincrementaldecoder("utf-8")()
    with contextlib.ExitStack() as stack:
        settings = stack.enter_context(demo_upstream(settings))
        call = prompt_call({"prompt": prompt}, settings)
        relay = Relay()
        stack.callback(relay.close)
        upstream = Upstream(settings, gate, relay)
        stack.callback(upstream.pool.close_all)
        reader, client = map(stack.enter_context, socket.socketpair())
        client.setblocking(False)  # the loop is a client like any other, but for HTTP
        answer = TextAnswer(upstream.redact)
        stream = Stream(relay, client, answer, call, settings, lambda: (b"", False), client.close)
        relay.start()
        stack.callback(relay.stop)
        stack.callback(relay.post, functools.partial(stream.drop, Disconnected("The loop was left.")))
        gate.enter(functools.partial(stream.open, upstream))
        for data in iter(functools.partial(reader.recv, READ_SIZE), b""):
            yield decoder.decode(data)
        if stream.failure:
            raise stream.failure


# 13 ------------------------------------------------------------------ Demo upstream

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
        models = [{"id": "gpt-4.1-mini", "object": "model", "created": 0, "owned_by": "streamproxy"}]
        self._answer({"object": "list", "data": models})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = str(asked["messages"][-1]["content"])
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

    def _answer(self, payload: object) -> None:
        body = json.dumps(payload).encode()
        self.send_response(200)
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


# 14 ------------------------------------------------------------------ Chat page

_PAGE = r"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, interactive-widget=resizes-content">
<title>streamproxy</title>
<link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark; scrollbar-gutter: stable; }
* { box-sizing: border-box; margin: 0; font: inherit; unicode-bidi: plaintext; }
body { display: flex; flex-direction: column; min-height: 100dvh; max-width: 46rem;
  margin: auto; padding: 0 1rem; font: 1rem/1.6 system-ui, sans-serif; }
main { flex: 1; white-space: pre-wrap; overflow-wrap: anywhere; }
.message { margin: 1.5rem 0; }
.user { width: fit-content; max-width: 85%; margin-left: auto; padding: .5rem 1rem;
  border-radius: .75rem; background: light-dark(#eef0f3, #2b2f36); }
.error { padding-left: 1rem; border-left: 3px solid; color: light-dark(#a3201a, #ffa198); }
.note, details { margin: .5rem 0; font-size: .875rem; color: light-dark(#5c636d, #9ba2ac); }
.streaming::after { content: "\25cf"; animation: fade 1s infinite alternate; }
@keyframes fade { to { opacity: .2; } }
form { position: sticky; bottom: 0; display: flex; align-items: end; gap: .5rem;
  padding: .5rem 0 1rem; background: Canvas; }
textarea, button, input { padding: .5rem 1rem; border-radius: .75rem; }
textarea, input { flex: 1; min-width: 0; resize: none; background: Canvas; }
button { border: 0; background: light-dark(#1d57b0, #8fb6f5); color: Canvas; }
</style>
<main id="log" role="log" aria-label="Conversation"></main>
<form>
  <input id="token" type="password" aria-label="Client token" placeholder="Token" autocomplete="off" hidden>
  <textarea id="prompt" rows="3" aria-label="Message" placeholder="Message" autofocus></textarea>
  <button id="send">Send</button>
  <button id="stop" type="button" hidden>Stop</button>
</form>
<script>
const [page, log, form, token, input, sendButton, stopButton] =
  ["html", "#log", "form", "#token", "#prompt", "#send", "#stop"].map(name => document.querySelector(name));
const messages = [];     // the conversation so far
let controller = null;   // stops the answer that is arriving; null when none is
token.value = sessionStorage.getItem("token") || "";   // kept for this tab

// All text enters the page here, as text: nothing that arrives is ever read as markup.
function grow(element, text) {
  const atEnd = page.scrollHeight - page.scrollTop - page.clientHeight < 80;
  element.append(text);
  if (atEnd) page.scrollTop = page.scrollHeight;
}

function add(parent, tag, className, text) {
  const element = parent.appendChild(document.createElement(tag));
  element.className = className;
  grow(element, text);
  return element;
}

function addReasoning(message) {
  const details = add(message, "details", "reasoning", "");
  add(details, "summary", "label", "Reasoning");
  return add(details, "p", "text", "");
}

// What is said of answers that did not end by themselves.
const ENDINGS = {length: "The answer reached the token limit.", content_filter: "A content filter ended the answer."};

// The events of an event stream, wherever its bytes were cut on the way.
async function* readEvents(body) {
  const reader = body.getReader(), decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    const {value, done} = await reader.read();
    if (done) return;
    const events = (rest + decoder.decode(value, {stream: true})).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const [, type = "message", data] = /(?:event: (\w+)\n)?data: (.*)/s.exec(event) || [];
      if (data) yield [type, JSON.parse(data)];
    }
  }
}

async function ask(question) {
  const turn = {role: "user", content: question};
  add(log, "h2", "message user", question);
  const message = add(log, "div", "message assistant streaming", "");
  page.scrollTop = page.scrollHeight;
  let reasoning = null, answer = null, note = "", error = "The server could not be reached.";
  try {
    const response = await fetch(location.origin + location.pathname, {
      method: "POST", body: JSON.stringify({messages: [...messages, turn]}), signal: controller.signal,
      headers: {"Content-Type": "application/json", "Accept": "text/event-stream",
        ...token.value && {"Authorization": `Bearer ${token.value}`}}});
    token.hidden = response.status !== 401;
    if (token.hidden) sessionStorage.setItem("token", token.value);
    error = response.ok ? "The answer was cut off." : `The server answered with status ${response.status}.`;
    if (!response.ok) error = (await response.json()).error || error;
    else for await (const [type, data] of readEvents(response.body)) {
      if (type === "message") grow(answer ||= add(message, "p", "text", ""), data.text);
      if (type === "reasoning") grow(reasoning ||= addReasoning(message), data.text);
      if (type === "error") error = data.error;
      if (type === "done") error = "";
      note = ENDINGS[data.finish_reason] || note;
    }
  } catch {}   // a lost connection or a body that is not JSON: error already says it
  if (controller.signal.aborted) [error, note] = ["", "Stopped."];
  message.classList.remove("streaming");
  if (answer) messages.push(turn, {role: "assistant", content: answer.textContent});
  else input.value ||= question;   // nothing was said: offer the question again
  if (!token.hidden) token.focus();
  if (note) add(message, "p", "note", note);
  if (error) add(log, "p", "message error", error);
}

function setRunning(running) {
  controller = running ? new AbortController() : null;
  if (document.activeElement.matches("button")) input.focus();   // the button is about to go
  sendButton.hidden = running;
  stopButton.hidden = !running;
  log.ariaBusy = running;   // an answer is read out when it is whole
}

form.addEventListener("submit", async event => {
  event.preventDefault();
  const question = input.value;
  if (controller || !question.trim()) return;
  input.value = "";
  setRunning(true);
  await ask(question);
  setRunning(false);
});
input.addEventListener("keydown", event => {
  if (event.key !== "Enter" || event.shiftKey || event.keyCode === 229) return;   // 229: input method
  event.preventDefault();
  form.requestSubmit();
});
stopButton.addEventListener("click", () => controller.abort());
</script>
"""


def _page_policy(page: str) -> str:
    """The page's Content-Security-Policy: its own style and script, by hash, and its own server."""
    hashes = {}
    for tag in ("script", "style"):
        text = page.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        hashes[tag] = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{hashes['script']}'; style-src 'sha256-{hashes['style']}';"
        " connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


PAGE = _PAGE.encode()
PAGE_FIELDS = {"Content-Type": "text/html; charset=utf-8", "Content-Security-Policy": _page_policy(_PAGE)}


# 15 ------------------------------------------------------------------ Command line


class _ArgumentParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"streamproxy: {message}\n")  # one line, without the usage


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line, made from the settings table."""
    parser = _ArgumentParser(
        prog="streamproxy.py",
        description="A streaming proxy between web pages and an OpenAI-compatible API.",
        epilog="The API key comes from OPENAI_API_KEY, or from a file that OPENAI_API_KEY_FILE names."
        " Example: OPENAI_API_KEY=sk-... python3 streamproxy.py --model gpt-4.1-mini",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"streamproxy {__version__}")
    for setting in Settings.TABLE:
        options: dict[str, Any] = {"metavar": setting.metavar, "action": "append" if setting.repeat else "store"}
        if not setting.metavar:
            options = {"action": "store_const", "const": "true"}
        if setting.flag:
            text = f"{setting.help} (default: {setting.shown}) [{setting.variable}]"
            parser.add_argument(setting.flag, dest=setting.name, help=text.replace("%", "%%"), **options)
    return parser


class _LogFormatter(logging.Formatter):
    """A line a record, as text or JSON."""

    def __init__(self, style: str) -> None:
        super().__init__()
        self._json = style == "json"

    def format(self, record: logging.LogRecord) -> str:
        entry = record.msg
        if not isinstance(entry, LogEntry):
            entry = LogEntry(level=record.levelname.lower(), message=record.getMessage())
        return json.dumps(entry) if self._json else str(entry)


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until a signal ends it; return the exit status."""
    flags = vars(build_parser().parse_args(argv))
    try:
        settings = Settings.load(os.environ, flags)
        server = Server(settings)
    except SettingsError as error:
        print(f"streamproxy: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"streamproxy: cannot listen at {settings.bind}: {reason_of(error)}", file=sys.stderr)
        return 1
    output = logging.StreamHandler()
    output.setFormatter(_LogFormatter(settings.log_format))
    log.addHandler(output)
    log.setLevel(logging.INFO)
    _raise_descriptor_limit()
    # A byte comes for each signal, whichever thread the system gives it to.
    news, teller = socket.socketpair()
    teller.setblocking(False)
    signal.set_wakeup_fd(teller.fileno())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)

    def hurry(events: int) -> None:
        news.recv(1)
        server.abort()

    server.start()
    print(f"streamproxy {__version__} on {server.url}", flush=True)
    if settings.demo:
        to = f"--unix-socket {server.url[5:]} http://localhost" if server.path else server.url
        print(f"""Try: curl -N {to} -d '{{"prompt": "Hello"}}'""", flush=True)
    news.recv(1)  # the first begins the drain, and any further one ends it
    server.relay.post(functools.partial(server.relay.watch, news, READ, hurry))
    server.stop()
    signal.set_wakeup_fd(-1)
    news.close()
    teller.close()
    return 0


def _raise_descriptor_limit() -> None:
    """A stream takes two descriptors; the usual limit of 1024 is for the sake of select()."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource  # not on every system

        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    sys.exit(main())
