"""data.url taken apart: braces expanded, names of environment variables filled in, and nothing secret ever shown.

A password or a signature has no place in a configuration, which is copied into every run folder and checkpoint. So it
stands there as ${NAME}, and only what is written in the configuration is ever shown: the filled-in address is used for
requests alone.

A configuration may come from a stranger (a recipe, a run folder), and so may the server that it names. So it does not
decide which variables are sent: those are that the user has named for this purpose, and none of them says to whom.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from itertools import islice
from urllib.parse import unquote, urlsplit

from braceexpand import braceexpand

from sivae_dist.data.manifest import FILE_NAME
from sivae_dist.errors import UserError

MAX_EXPANDED = 100_000  # places one data.url may name
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://|(pipe):")
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_LONG_RANGE = re.compile(r"\d{7,}\.\.|\.\.-?\d{7,}")  # would fill the memory before it can be counted
PREFIX = "SIVAE_DATA_"  # of variables that may be sent
LISTED = "SIVAE_URL_VARIABLES"  # lists others, with commas between them
_HIDE = f"write ${{{PREFIX}NAME}} there and set that environment variable for every process"


@dataclass(frozen=True)
class Address:
    """A place of shard files. shown: as the user wrote it. base, query: filled in; `base` ends without a slash."""

    scheme: str
    shown: str
    base: str = field(repr=False)
    query: str = field(default="", repr=False)
    user: str = field(default="", repr=False)
    password: str = field(default="", repr=False)
    manifest_name: str = FILE_NAME
    secrets: tuple[tuple[str, str], ...] = field(default=(), repr=False)

    def clean(self, text: str) -> str:
        """A library's message without what was filled in, in one line."""
        for name, value in self.secrets:
            text = text.replace(value, f"${{{name}}}")
        return " ".join(text.split())[:300]


def scheme_of(url: str) -> str:
    """The scheme of a URL, "pipe" among them, or "" for a path."""
    found = _SCHEME.match(url)
    return (found.group(1) or found.group(2)).lower() if found else ""


def fill(text: str, *, sent: bool) -> tuple[str, tuple[tuple[str, str], ...]]:
    """The text with ${NAME} replaced from the environment, and what was filled in.

    sent: whether a server will see it, as it does not see a path of this machine. Raises UserError for names that are
    not set, or that may not be sent.
    """
    used: dict[str, str] = {}
    listed = [name.strip() for name in os.environ.get(LISTED, "").split(",")]

    def value(found: re.Match[str]) -> str:
        name = found.group(1)
        if sent and not name.startswith(PREFIX) and name not in listed:
            raise UserError(
                f"data.url names ${{{name}}}, which would be sent to the server; expected a name that begins with "
                f"{PREFIX}, or one that the environment variable {LISTED} lists",
                f"if that server may have it, set {PREFIX}{name} and write that name there, or set {LISTED}={name}",
            )
        if not os.environ.get(name):
            raise UserError(f"data.url names ${{{name}}}, which is not set", "set that environment variable")
        used[name] = os.environ[name]
        return used[name]

    return _VARIABLE.sub(value, text), tuple(used.items())


def parse(url: str) -> Address:
    """A remote address. Raises UserError for secrets that are written out or would go astray, and for no address."""
    scheme = scheme_of(url)
    shown = url.rstrip("/")
    outside = _VARIABLE.sub("", url)
    place = outside.partition("://")[2].partition("?")[0].partition("/")[0]
    if "@" in place and any(part for part in place.rpartition("@")[0].split(":")):
        name = f"{scheme}://...@{place.rpartition('@')[2]}"
        what = f"data.url {name!r:.120} holds a user name or password, which the run folder would keep"
        raise UserError(what, _HIDE if scheme.startswith("http") else "leave it to the storage's own credentials")
    if any(part.partition("=")[2] or (part and "=" not in part) for part in outside.partition("?")[2].split("&")):
        what = f"data.url {outside.partition('?')[0] + '?...'!r:.120} has a query, which may hold a signature"
        raise UserError(f"{what} and which the run folder would keep", _HIDE)
    written = _place(url)
    if variable := _VARIABLE.search(written):
        raise UserError(
            f"data.url {shown!r:.120} has {variable.group()} where its host or bucket stands, expected one that is "
            "written out",
            "write out to whom requests go; variables may stand for user name, password, path and query",
        )
    filled, secrets = fill(url, sent=True)
    if _place(filled) != written:
        raise UserError(
            f"data.url {shown!r:.120} names another host or bucket when its variables are filled in",
            "percent-encode what they hold: %40 for @, %2F for /, %3F for ?, %23 for #",
        )
    try:
        parts = urlsplit(filled)
        host = parts.hostname
        _ = parts.port
    except ValueError:
        host = None
    if not host:
        raise UserError(f"data.url {shown!r:.120} names no host or bucket", f"write {scheme}://HOST/FOLDER")
    base = filled.partition("?")[0].partition("#")[0].rstrip("/")
    head, _, tail = base.partition("://")
    place, slash, path = tail.partition("/")
    base = f"{head}://{place.rpartition('@')[2]}{slash}{path}"
    manifest_name = FILE_NAME
    if path.endswith(".json"):
        base, _, manifest_name = base.rpartition("/")
        shown = shown.partition("?")[0].rpartition("/")[0]
    return Address(
        scheme, shown.partition("?")[0], base, parts.query, unquote(parts.username or ""),
        unquote(parts.password or ""), manifest_name, secrets,
    )  # fmt: skip


def _place(url: str) -> str:
    """Host and port, or bucket: to whom a request goes."""
    return re.split(r"[/?#]", url.partition("://")[2], maxsplit=1)[0].rpartition("@")[2]


def expand(url: str) -> list[str]:
    """The addresses a brace pattern stands for (`{000000..000009}`, `{a,b}`); [url] without braces. Raises UserError.

    ${NAME} is left as it is.
    """
    if "{" not in _VARIABLE.sub("", url):
        return [url]
    if _LONG_RANGE.search(url):
        raise UserError(f"data.url {url!r:.120} names more than {MAX_EXPANDED} places", "shorten the range")
    try:
        found = list(islice(braceexpand(url, escape=False), MAX_EXPANDED + 1))
    except ValueError:
        raise UserError(
            f"data.url {url!r:.120} has braces that do not match", "see docs/data.md for patterns"
        ) from None
    if len(found) > MAX_EXPANDED:
        raise UserError(f"data.url {url!r:.120} names more than {MAX_EXPANDED} places", "shorten the range")
    return found
