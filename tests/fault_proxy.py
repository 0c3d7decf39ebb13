"""A small proxy between a client and a real S3 server that breaks requests on purpose, by a seeded draw for each."""

from __future__ import annotations

import contextlib
import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAULTS = (
    "drop before", "drop after", "delay", "truncate answer", "truncate upload", "corrupt answer", "corrupt upload",
    "503 SlowDown", "500", "expired credentials",
)  # fmt: skip
_ERROR = "<?xml version='1.0'?><Error><Code>{}</Code><Message>of the proxy</Message></Error>"
_SHORT = 2.0


class FaultProxy:
    """Forwards to `server` (host:port); a request meets a fault with probability `rate`, drawn from `faults`.

    `seen` counts what was done. `expired` lets every request fail as one with old credentials does.
    """

    def __init__(self, server: str, *, rate: float, faults: tuple[str, ...] = FAULTS, seed: int = 0) -> None:
        self.server, self.rate, self.faults = server, rate, faults
        self.draws, self.lock = random.Random(seed), threading.Lock()
        self.seen: Counter[str] = Counter()

    def draw(self) -> tuple[str, float]:
        """Return the fault of the next request, "" for none, and a number in [0, 1) that says where."""
        with self.lock:
            fault = self.draws.choice(self.faults) if self.draws.random() < self.rate else ""
            self.seen[fault or "none"] += 1
            return fault, self.draws.random()


@contextmanager
def running(proxy: FaultProxy) -> Iterator[str]:
    """Serve the proxy on a free port of this machine and yield its endpoint."""
    handler = type("Bound", (_Handler,), {"proxy": proxy})
    server = _Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hung up is no news here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FaultProxy

    def do_any(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        fault, where = self.proxy.draw()
        if fault == "drop before":
            return self._drop()
        if fault == "delay":
            time.sleep(0.05 + 0.3 * where)
        if fault in ("503 SlowDown", "500", "expired credentials"):
            return self._refuse(fault)
        if fault == "truncate upload" and body:
            return self._cut_upload(body, where)
        if fault == "corrupt upload" and body:
            body = _flipped(body, where)
        try:
            status, headers, answer = self._forward(body)
        except (OSError, http.client.HTTPException):
            return self._drop()
        if fault == "drop after":
            return self._drop()
        if fault == "corrupt answer" and answer:
            answer = _flipped(answer, where)
        cut = int(len(answer) * where) if fault == "truncate answer" else None
        self._answer(status, headers, answer, cut)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = do_any

    def log_message(self, format: str, *args: object) -> None:
        """Stay silent."""

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(self.proxy.server, timeout=30)
        try:
            # the host header is part of the signature: it goes on as it came
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                connection.putheader(name, value)
            connection.endheaders(body or None)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def _cut_upload(self, body: bytes, where: float) -> None:
        """Send the server a part of the body, and hang up on both."""
        host, _, port = self.proxy.server.partition(":")
        head = f"{self.command} {self.path} HTTP/1.1\r\n" + "".join(f"{n}: {v}\r\n" for n, v in self.headers.items())
        with socket.create_connection((host, int(port)), timeout=_SHORT) as connection:
            connection.sendall(head.encode("latin-1") + b"\r\n" + body[: int(len(body) * where)])
            connection.shutdown(socket.SHUT_WR)
            with contextlib.suppress(TimeoutError):  # what the server does with it comes before the next try
                while connection.recv(4096):
                    pass
        self._drop()

    def _refuse(self, fault: str) -> None:
        status, code = {"503 SlowDown": (503, "SlowDown"), "500": (500, "InternalError")}.get(
            fault, (403, "ExpiredToken")
        )
        text = b"" if self.command == "HEAD" else _ERROR.format(code).encode()
        self._answer(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(text)))], text, None)

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, cut: int | None) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        length = next((value for name, value in headers if name.lower() == "content-length"), str(len(body)))
        self.send_header("Content-Length", length if self.command == "HEAD" else str(len(body)))
        self.end_headers()
        self.wfile.write(body if cut is None else body[:cut])
        if cut is not None and self.command != "HEAD":
            self._drop()

    def _drop(self) -> None:
        """Hang up by a reset, as a broken connection does."""
        self.wfile.flush()
        self.close_connection = True
        # with a linger of zero the close sends RST
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _flipped(body: bytes, where: float) -> bytes:
    changed = bytearray(body)
    changed[int(len(body) * where)] ^= 1 << int(where * 8 * len(body)) % 8
    return bytes(changed)
