"""The client behind gs://: gcsfs's plain one (ranged requests over HTTPS), with a login that takes bounded time.

gcsfs's own default would first ask a second service over gRPC what kind of bucket it is, whose client does not live
through a fork; and it would go on without credentials where it finds none, which a server then refuses in other words.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import queue
import threading
from collections.abc import Callable
from typing import Any

from sivae_dist.data.faults import DataError, RefusedError, StorageError
from sivae_dist.data.stores.transport import Patience, TransientError

_LOGIN_S = 30.0  # Google's library asks an address that only its own machines have, again and again
_AGAIN = frozenset((408, 425, 429, 500, 502, 503, 504))
_LOGIN_FIX = (
    "run `gcloud auth application-default login` or set GOOGLE_APPLICATION_CREDENTIALS; for public buckets set "
    "FSSPEC_GS_TOKEN=anon"
)


def load() -> None:
    """Imports gcsfs without its gRPC part, unless the environment asks for that. Raises ImportError."""
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    importlib.import_module("gcsfs")


def connect(url: str, patience: Patience) -> Any:
    """A client for the buckets that this process may read. url: for messages. Raises StorageError.

    Credentials are those that Google's tools find; STORAGE_EMULATOR_HOST needs none; FSSPEC_GS_TOKEN says which.
    """
    import aiohttp  # noqa: PLC0415
    from fsspec.config import conf  # noqa: PLC0415
    from gcsfs.core import GCSFileSystem  # noqa: PLC0415

    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs tracebacks of what is handled here
    waits = aiohttp.ClientTimeout(total=None, sock_connect=patience.connect_s, sock_read=patience.read_s)
    options: dict[str, Any] = {"requests_timeout": waits, "session_kwargs": {"trust_env": True}}
    if not any("token" in conf.get(name, {}) for name in GCSFileSystem.protocol):
        options["token"] = "anon" if os.environ.get("STORAGE_EMULATOR_HOST") else "google_default"
    make = functools.partial(GCSFileSystem, skip_instance_cache=True, use_listings_cache=False, **options)
    seconds = min(_LOGIN_S, patience.left())
    try:
        files = _within(seconds, make)
    except TimeoutError:
        what = f"{url}: no credentials were found within {seconds:.0f} s"
        raise StorageError(what, f"{_LOGIN_FIX}; NO_GCE_CHECK=true outside of Google's cloud") from None
    except Exception as error:  # of Google's library, of the file with the credentials, of what is in it
        text = " ".join(str(error).split())[:200] or type(error).__name__
        raise StorageError(f"{url}: no credentials: {text}", _LOGIN_FIX) from None
    # Attempts are counted in one place for all kinds of storage: a request is made once.
    once = getattr(type(files)._request, "__wrapped__", None)
    if once is not None:
        files._request = functools.partial(once, files)
    return files


def meaning(error: Exception, where: str, offset: int, clean: Callable[[str], str]) -> Exception:
    """What a failure of the library means for us, other than a missing object."""
    code = str(getattr(error, "code", "") or "")
    text = clean(str(error))
    if code in ("401", "403") or text.startswith("Forbidden"):
        return RefusedError(f"{where} is refused: {text}", _LOGIN_FIX)
    if code == "416":
        return DataError("truncated", f"{where} has no byte {offset}: it is shorter than packed", "upload it again")
    if isinstance(error, ValueError) or (code.isdecimal() and int(code) not in _AGAIN):
        return StorageError(f"{where} cannot be read: {text}", "check data.url")
    return TransientError(f"{type(error).__name__}{f' {code}' if code else ''}: {text}")


def _within(seconds: float, make: Callable[[], Any]) -> Any:
    """What `make` returns or raises; TimeoutError when that takes longer. It is then left to itself."""
    answer: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            answer.put((make(), None))
        except Exception as error:
            answer.put((None, error))

    threading.Thread(target=run, daemon=True, name="login").start()
    try:
        made, error = answer.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError from None
    if error is not None:
        raise error
    return made
