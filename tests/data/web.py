"""A real HTTP server on loopback that serves a folder, and misbehaves as it is told."""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Asked:
    """A request. nth: how many came before it for the same file."""

    name: str
    begin: int | None
    end: int | None
    nth: int
    headers: dict[str, str]
    target: str


@dataclass
class How:
    """How one request is answered. status 0: as it should be."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    cut_after: int | None = None  # bytes of the body, then the connection is reset
    trickle_s: float = 0.0  # between pieces of 100 bytes
    ignore_range: bool = False
    flip: bool = False  # one bit of the body's middle
    shift: int = 0  # announces and sends a range that begins so many bytes later
    unsized: bool = False  # without Content-Length: the end of the connection is the end


class Server:
    """Serves `folder`. `how` decides about each request; `asked` lists them."""

    def __init__(self, folder: Path, tls: ssl.SSLContext | None = None) -> None:
        self.folder = folder
        self.asked: list[Asked] = []
        self.how: Callable[[Asked], How] = lambda _: How()
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # else every answer waits 40 ms

            def do_GET(self) -> None:
                with contextlib.suppress(ConnectionError, BrokenPipeError):
                    outer.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        class Threads(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, *_: object) -> None:
                pass  # connections that the reader or we ourselves have cut

        self._server = Threads(("127.0.0.1", 0), Handler)
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def names(self) -> list[str]:
        return [a.name for a in self.asked]

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers.get("Range", ""))
        begin, end = (int(found[1]), int(found[2]) + 1) if found else (None, None)
        name = handler.path.partition("?")[0].lstrip("/")
        with self._lock:
            asked = Asked(
                name,
                begin,
                end,
                self.names().count(name),
                {k.lower(): v for k, v in handler.headers.items()},
                handler.path,
            )
            self.asked.append(asked)
        how = self.how(asked)
        time.sleep(how.delay_s)
        path = self.folder / name
        if how.status or not path.is_file():
            handler.send_response(how.status or 404)
            for key, value in {"Content-Length": "0", **how.headers}.items():
                handler.send_header(key, value)
            handler.end_headers()
            return
        data = path.read_bytes()
        if begin is not None and begin >= len(data):
            handler.send_response(416)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        body = data
        if begin is None or how.ignore_range:
            handler.send_response(200)
        else:
            begin += how.shift
            body = data[begin:end]
            handler.send_response(206)
            handler.send_header("Content-Range", f"bytes {begin}-{begin + len(body) - 1}/{len(data)}")
        if how.unsized:
            handler.close_connection = True
        else:
            handler.send_header("Content-Length", str(len(body)))
        for key, value in how.headers.items():
            handler.send_header(key, value)
        handler.end_headers()
        if how.flip:
            body = bytearray(body)
            body[len(body) // 2] ^= 4
        if how.cut_after is not None:
            handler.wfile.write(body[: how.cut_after])
            handler.wfile.flush()
            handler.connection.shutdown(socket.SHUT_RDWR)
            handler.close_connection = True
        elif how.trickle_s:
            for place in range(0, len(body), 100):
                handler.wfile.write(body[place : place + 100])
                handler.wfile.flush()
                time.sleep(how.trickle_s)
        else:
            handler.wfile.write(body)


@contextlib.contextmanager
def serving(folder: Path, tls: ssl.SSLContext | None = None) -> Iterator[Server]:
    server = Server(folder, tls)
    try:
        yield server
    finally:
        server.close()
