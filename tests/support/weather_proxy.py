"""A small HTTP proxy on loopback that stands between boto3 and an S3 server and makes bad weather.

Each request asks `plan` what is to happen to it; `faults` counts what was done. The Host header is passed on
unchanged, so signatures made for the proxy's address hold at the server.
"""

from __future__ import annotations

import http.client
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Plan = Callable[[str, str], str | None]
"""(method, path) of one request → the fault to make, or None for fair weather."""

SLOW_S = 0.15
HANG_S = 1.2
"""Longer than the read time-out that the weather tests give their store."""

_ERRORS = {
    "slow_down": (503, "SlowDown"),
    "internal_error": (500, "InternalError"),
    "conflict": (409, "ConditionalRequestConflict"),
    "expired": (400, "ExpiredToken"),
    "denied": (403, "AccessDenied"),
    "skewed": (403, "RequestTimeTooSkewed"),
    "other_region": (301, "PermanentRedirect"),
    "other_region_unnamed": (301, "PermanentRedirect"),
    "bare_404": (404, None),
    "not_implemented": (501, "NotImplemented"),
}

FAULTS = (
    "slow_down",
    "internal_error",
    "conflict",
    "reset_before",
    "reset_during_upload",
    "reset_after_commit",
    "hang_before",
    "hang_after_commit",
    "slow",
    "cut_answer",
    "damaged_answer",
)
"""What work must survive. Every other name in this module is an answer that must fail at once."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, target: tuple[str, int], plan: Plan) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target, self.plan = target, plan
        self.faults: Counter[str] = Counter()
        self.counting = threading.Lock()

    def handle_error(self, request: object, client_address: object) -> None:
        """The client hanging up is part of the weather."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: object) -> None:
        """Quiet: access logs say nothing a test needs."""

    def _serve(self) -> None:
        with self.server.counting:
            fault = self.server.plan(self.command, self.path)
            if fault == "damaged_answer" and self.command != "GET":
                fault = "slow"
            if fault:
                self.server.faults[fault] += 1
        if fault == "reset_during_upload":
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            return self._reset()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if fault in _ERRORS:
            region = [("x-amz-bucket-region", "eu-west-1")] if fault == "other_region" else []
            return self._answer_error(*_ERRORS[fault], region)
        if fault == "reset_before":
            return self._reset()
        if fault == "hang_before":
            time.sleep(HANG_S)
            return self._reset()
        status, headers, answer = self._forward(body)
        if fault == "reset_after_commit":
            return self._reset()
        if fault == "hang_after_commit":
            time.sleep(HANG_S)
            return self._reset()
        if fault == "slow":
            time.sleep(SLOW_S)
        if fault == "damaged_answer" and answer:
            answer = bytes([answer[0] ^ 1]) + answer[1:]
        self._answer(status, headers, answer, cut=fault == "cut_answer")

    do_GET = do_PUT = do_DELETE = do_HEAD = do_POST = _serve

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(*self.server.target, timeout=30)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("expect", "connection"):
                    connection.putheader(name, value)
            connection.endheaders(body)
            response = connection.getresponse()
            return response.status, response.getheaders(), response.read()
        except OSError:
            self._reset()
            raise
        finally:
            connection.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, cut: bool = False) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return None
        if cut:
            self.wfile.write(body[: len(body) // 2])
            return self._reset()
        self.wfile.write(body)
        return None

    def _answer_error(self, status: int, code: str | None, headers: list[tuple[str, str]]) -> None:
        text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>planned</Message></Error>" if code else "no"
        self._answer(status, [("Content-Type", "application/xml"), *headers], text.encode())

    def _reset(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        # A zero linger makes the close a TCP reset, as a dying server or a load balancer would send.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()


@contextmanager
def bad_weather(target_port: int, plan: Plan) -> Iterator[_Server]:
    """A running proxy before loopback's `target_port`; `.server_address` is where to connect."""
    server = _Server(("127.0.0.1", target_port), plan)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
