"""http:// and https://: ranged requests over kept connections (urllib3)."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from sivae_dist.data.faults import DataError, RefusedError, StorageError
from sivae_dist.data.stores.address import Address
from sivae_dist.data.stores.transport import Patience, TransientError

if TYPE_CHECKING:
    import urllib3

_CHUNK = 1 << 18
_REDIRECTS = 5
_AGAIN = frozenset((408, 425, 429, 500, 502, 503, 504))
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


class HttpTransport:
    """A folder of a web server. Connections are made in the process that first asks."""

    def __init__(self, address: Address) -> None:
        self.address, self.url, self.manifest_name = address, address.shown, address.manifest_name
        self._pool: urllib3.PoolManager | None = None
        self._lock = threading.Lock()

    def open(self, name: str, offset: int, length: int | None, patience: Patience, *, most: int | None = None) -> _Body:
        """Asks for a range of a file. Raises TransientError, DataError or StorageError."""
        import urllib3  # noqa: PLC0415 (40 ms that local data do not need)

        headers = {"Accept-Encoding": "identity", "User-Agent": "sivae-dist"}
        if self.address.user or self.address.password:
            headers |= urllib3.make_headers(basic_auth=f"{self.address.user}:{self.address.password}")
        if length is not None:
            headers["Range"] = f"bytes={offset}-{offset + length - 1}"
        target = f"{self.address.base}/{quote(name)}" + (f"?{self.address.query}" if self.address.query else "")
        waits = urllib3.Timeout(
            connect=min(patience.connect_s, patience.left()), read=min(patience.read_s, patience.left())
        )
        # Attempts are counted in one place for all kinds of storage; only redirects are followed here.
        once = urllib3.Retry(
            total=None, connect=0, read=0, status=0, other=0, redirect=_REDIRECTS, respect_retry_after_header=False
        )
        try:
            answer = self._connections().request(
                "GET", target, headers=headers, preload_content=False, decode_content=False, timeout=waits, retries=once
            )
        except urllib3.exceptions.HTTPError as error:
            raise self._unanswered(error, f"{self.url}/{name}") from None
        try:
            return self._checked(answer, name, offset, length, patience)
        except BaseException:
            answer.close()
            raise

    def size(self, name: str, patience: Patience) -> int | None:
        """Bytes of a file, from the answer to a request for its first one."""
        body = self.open(name, 0, 1, patience)
        body.close()
        return body.total

    def close(self) -> None:
        """Ends all connections; the next request makes new ones."""
        if self._pool is not None:
            self._pool.clear()
            self._pool = None

    def _connections(self) -> urllib3.PoolManager:
        with self._lock:
            return self._pool or self._connect()

    def _connect(self) -> urllib3.PoolManager:
        import urllib3  # noqa: PLC0415

        if self._pool is None:
            a = self.address
            # Its messages quote addresses, signatures included.
            logging.getLogger("urllib3").setLevel(logging.CRITICAL)
            options: dict[str, Any] = {"num_pools": 8, "maxsize": 16}
            host = urlsplit(a.base).hostname or ""
            proxy = None if proxy_bypass(host) else getproxies().get(a.scheme)
            if proxy:
                parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
                login = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}"
                login_headers = urllib3.make_headers(proxy_basic_auth=login) if parts.username else None
                place = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
                self._pool = urllib3.ProxyManager(place, proxy_headers=login_headers, **options)
            else:
                self._pool = urllib3.PoolManager(**options)
        return self._pool

    def _checked(
        self, answer: urllib3.BaseHTTPResponse, name: str, offset: int, length: int | None, patience: Patience
    ) -> _Body:
        status, where = answer.status, f"{self.url}/{name}"
        if status in _AGAIN:
            raise TransientError(f"the server answers {status}", _retry_after(answer.headers.get("Retry-After")))
        if status in (404, 410):
            raise DataError("missing", f"{where} is missing: the server answers {status}", "upload it again")
        if status in (401, 403, 407):
            fix = "check the credentials, the proxy and what the server allows"
            raise RefusedError(f"{where} is refused: the server answers {status}", fix)
        if status == 416:
            raise DataError("truncated", f"{where} has no byte {offset}: it is shorter than packed", "upload it again")
        if status not in (200, 206):
            raise StorageError(f"{where}: the server answers {status}, expected 200 or 206", "check data.url")
        if answer.headers.get("Content-Encoding", "identity") != "identity":
            encoding = answer.headers["Content-Encoding"]
            raise StorageError(f"{where} is sent with Content-Encoding {encoding!r:.40}", "switch that off there")
        if status == 200:
            size = answer.headers.get("Content-Length", "")
            return _Body(answer, length is None, int(size) if size.isdecimal() else None, patience)
        found = _RANGE.fullmatch(answer.headers.get("Content-Range", ""))
        if not found or int(found[1]) != offset or (length is not None and int(found[2]) >= offset + length):
            what = f"{where}: asked for bytes from {offset} on, the server announces others"
            raise StorageError(what, "check the server or the proxy before it")
        return _Body(answer, True, None if found[3] == "*" else int(found[3]), patience)

    def _unanswered(self, error: urllib3.exceptions.HTTPError, where: str) -> Exception:
        """What went wrong before an answer came, in words of our own: the library's quote the whole address."""
        from urllib3 import exceptions as e  # noqa: PLC0415

        reason: object = error.reason if isinstance(error, e.MaxRetryError) and error.reason else error
        if isinstance(reason, e.ProxyError):
            reason = getattr(reason, "original_error", reason)
        if isinstance(reason, e.SSLError) and "CERTIFICATE_VERIFY" in str(reason):
            return StorageError(f"{where}: the server's certificate is not valid", "check the address")
        if isinstance(reason, e.ResponseError):
            return StorageError(f"{where}: more than {_REDIRECTS} redirects", "give the final address")
        if isinstance(reason, e.LocationValueError):
            return StorageError(f"{where}: the address, or one it redirects to, is not valid", "check data.url")
        words = {
            e.NameResolutionError: "the server's name is not known",
            e.NewConnectionError: "no connection",
            e.ConnectTimeoutError: "no connection in time",
            e.ReadTimeoutError: "no answer in time",
            e.ProtocolError: "the connection was cut",
            e.SSLError: "no encrypted connection",
        }
        return TransientError(next((text for kind, text in words.items() if isinstance(reason, kind)), "no answer"))


class _Body:
    """The bytes of one answer."""

    settled: bool = False

    def __init__(self, answer: urllib3.BaseHTTPResponse, ranged: bool, total: int | None, patience: Patience) -> None:
        self._answer, self.ranged, self.total, self._patience = answer, ranged, total, patience
        self._done = False

    def chunks(self) -> Iterator[bytes]:
        """The bytes as they come. Raises TransientError when they end early or come too slowly."""
        import urllib3  # noqa: PLC0415

        try:
            while data := self._answer.read1(_CHUNK):
                yield data
                self._patience.spend()
            self._done = True
        except urllib3.exceptions.ReadTimeoutError:
            raise TransientError("no more bytes in time") from None
        except urllib3.exceptions.HTTPError:
            raise TransientError("the connection was cut") from None

    def close(self) -> None:
        """Keeps the connection when all was read."""
        if self._done:
            self._answer.release_conn()
        else:
            self._answer.close()


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header (a number or a date), None when absent or unreadable."""
    import urllib3  # noqa: PLC0415

    try:
        return None if not value else max(0.0, urllib3.Retry().parse_retry_after(value))
    except urllib3.exceptions.HTTPError:
        return None
