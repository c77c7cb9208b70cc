"""The shards of `bench data` from a web server on this machine, through the block cache.

The server is a process of its own whose CPU time is not counted; it answers ranges with `sendfile` and adds no latency.
So what is measured is what the way over HTTP costs the reader. `python -m sivae_dist.apps.bench.served FOLDER` is it.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from sivae_dist.errors import UserError


@contextmanager
def serving(url: str) -> Iterator[str]:
    """The address under which another process serves a local folder. Raises UserError for one that is not local."""
    from sivae_dist.data.stores.address import scheme_of  # noqa: PLC0415 (the server itself starts without torch)

    if scheme_of(url) not in ("", "file"):
        raise UserError(f"--served serves a folder of this machine, --url is {url}", "leave out --served")
    folder = url.removeprefix("file://")
    command = [sys.executable, "-m", "sivae_dist.apps.bench.served", folder]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            port = process.stdout.readline().strip()
            if not port:
                raise UserError(f"the server of {folder} did not start", "see the message above")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.stdin.close()  # its end is the server's


class _Answers(BaseHTTPRequestHandler):
    """GET of a file in `folder`, whole or one range."""

    folder = Path()
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else small answers wait for an acknowledgement

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].lstrip("/")
        try:
            if not re.fullmatch(r"[\w.-]+", name):
                raise FileNotFoundError
            file = (self.folder / name).open("rb")
        except OSError:
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        with file, contextlib.suppress(ConnectionError):
            size = os.fstat(file.fileno()).st_size
            begin, end = 0, size
            if wanted := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
                begin, end = int(wanted[1]), min(int(wanted[2]) + 1, size)
            self.send_response(206 if wanted else 200)
            if wanted:
                self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{size}")
            self.send_header("Content-Length", str(max(0, end - begin)))
            self.end_headers()
            self.wfile.flush()
            while begin < end and (sent := os.sendfile(self.connection.fileno(), file.fileno(), begin, end - begin)):
                begin += sent

    def handle(self) -> None:
        """One connection. A reader that ends may reset it between two requests: no fault, so no traceback."""
        with contextlib.suppress(ConnectionError):
            super().handle()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a line a request would be timed, too."""


def _serve(folder: Path) -> None:
    """Until standard input ends, as it does when the parent ends."""
    _Answers.folder = folder
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Answers)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_address[1], flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
