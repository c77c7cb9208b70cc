"""Re-reading a whole shard folder: checksums, tar against index, every sample decoded.

Of the keys 8 bytes each are kept, a hash, to find those that stand in two shards.
"""

from __future__ import annotations

import functools
import hashlib
import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sivae_dist.data.manifest import MAX_MEMBER_BYTES, Manifest, ShardInfo, is_key
from sivae_dist.data.procs import Tick, run_tasks, usable_cores
from sivae_dist.data.shard_read import Index, ShardReader, load_manifest
from sivae_dist.data.shard_write import BLOCK
from sivae_dist.data.store import Access, Store, open_store
from sivae_dist.errors import UserError
from sivae_dist.progress import Bar

_READ_AT_ONCE = 8 << 20
_LISTED_PER_SHARD = 20
_KEYS_AT_ONCE = 1 << 20  # compared together
_ACCESS = Access(cache_gb=0)  # what lies there is checked, not what was kept of it


Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class VerifyReport:
    """problems: one line each, empty when all is well; damaged: names of the shards concerned."""

    manifest: Manifest
    problems: tuple[str, ...]
    damaged: tuple[str, ...]
    decoded: int


@dataclass(frozen=True)
class _ShardReport:
    name: str
    problems: tuple[str, ...]
    decoded: int
    keys: Hashes  # of its keys, sorted, each once


def verify(url: str, *, workers: int | None = None, progress: bool = True) -> VerifyReport:
    """Checks every byte of a shard folder, in `workers` processes (None: one per usable core).

    Raises UserError only when there is no readable manifest; damage is reported.
    """
    store = open_store(url)
    manifest = load_manifest(store)
    store.close()
    problems: list[str] = []
    damaged: set[str] = set()
    keys: dict[str, Hashes] = {}
    decoded = 0
    work = functools.partial(_verify_shard, url=url, manifest=manifest)
    processes = usable_cores() if workers is None else workers
    total = sum(s.count for s in manifest.shards)
    with Bar(total=total, unit="img", desc="verifying", disable=not progress) as bar:
        for report in run_tasks(work, manifest.shards, processes, bar.update):
            decoded += report.decoded
            problems += report.problems
            keys[report.name] = report.keys
            if report.problems:
                damaged.add(report.name)
    names = [shard.name for shard in manifest.shards]
    for name, doubled in zip(names, _in_shards_before([keys[name] for name in names]), strict=True):
        if doubled:
            problems.append(f"{name}: {doubled} keys stand in another shard too")
            damaged.add(name)
    return VerifyReport(manifest, tuple(sorted(problems)), tuple(sorted(damaged)), decoded)


def _verify_shard(shard: ShardInfo, tick: Tick, *, url: str, manifest: Manifest) -> _ShardReport:
    store = open_store(url, _ACCESS)
    reader = ShardReader(store, manifest, (shard,))
    problems: list[str] = []
    keys = np.empty(0, dtype=np.uint64)
    decoded = 0
    try:
        if _sha256(store, f"{shard.name}.tar") != shard.sha256:
            problems.append("the sha256 of the tar differs from the manifest")
        index = reader.index(0)
        keys = _hashes(index.keys)
        problems += _compare(store, shard, manifest, index)
        for number in range(shard.count):
            tick()
            try:
                reader.read(0, number)
                decoded += 1
            except UserError as error:
                problems.append(error.what)
        if len(keys) != shard.count:
            problems.append(f"{shard.count - len(keys)} keys stand in it twice")
    except UserError as error:
        problems.append(error.what)
    finally:
        store.close()
    more = len(problems) - _LISTED_PER_SHARD
    listed = [f"{shard.name}: {p}" for p in problems[:_LISTED_PER_SHARD]]
    return _ShardReport(shard.name, tuple(listed + [f"{shard.name}: and {more} more"] * (more > 0)), decoded, keys)


def _hashes(keys: Sequence[str]) -> Hashes:
    """64-bit hashes of keys, sorted, each once."""
    digests = b"".join(hashlib.sha256(key.encode()).digest()[:8] for key in keys)
    found: Hashes = np.unique(np.frombuffer(digests, dtype=np.uint64))
    return found


def _in_shards_before(shards: Sequence[Hashes]) -> list[int]:
    """For each shard how many of its keys (sorted, each once) stand in a shard before it, too.

    The range of hashes is gone through part by part, so that little memory is needed besides the hashes.
    """
    counts = np.zeros(len(shards), dtype=np.int64)
    parts = -(-sum(map(len, shards)) // _KEYS_AT_ONCE)
    edges = np.array([(part << 64) // parts for part in range(1, parts)], dtype=np.uint64)
    cuts = [[0, *np.searchsorted(keys, edges).tolist(), len(keys)] for keys in shards]
    for part in range(parts):
        pieces = [keys[cut[part] : cut[part + 1]] for keys, cut in zip(shards, cuts, strict=True)]
        together = np.concatenate(pieces)
        owner = np.repeat(np.arange(len(shards), dtype=np.int32), [len(piece) for piece in pieces])
        order = np.argsort(together, kind="stable")  # so equal keys stay in the order of their shards
        again = together[order][1:] == together[order][:-1]
        counts += np.bincount(owner[order][1:][again], minlength=len(shards))
    return counts.tolist()


def _sha256(store: Store, name: str) -> str:
    digest, offset = hashlib.sha256(), 0
    while data := store.read(name, offset, _READ_AT_ONCE):
        digest.update(data)
        offset += len(data)
    return digest.hexdigest()


def _compare(store: Store, shard: ShardInfo, manifest: Manifest, index: Index) -> list[str]:
    """Walks the tar and holds it against the index: same pictures at the same places, labels that agree."""
    rows = zip(index.keys, index.rows(), strict=True)
    expected = {key: (offset, size, label) for key, (offset, size, _, label) in rows}
    found: set[str] = set()
    problems = []
    try:
        for member, offset, size in _members(store, f"{shard.name}.tar"):
            key, _, extension = member.partition(".")
            if not is_key(key) or extension not in (manifest.image_format, "json", "cls"):
                problems.append(f"has a member {member!r:.120}, which is not allowed")
            elif key not in expected:
                problems.append(f"has a member {member!r} that the index does not list")
            elif extension == manifest.image_format:
                found.add(key)
                if (offset, size) != expected[key][:2]:
                    problems.append(f"has {member!r} at {offset} with {size} bytes, the index says otherwise")
            elif problem := _side_member(store.read(f"{shard.name}.tar", offset, size), extension, expected[key][2]):
                problems.append(f"{member!r}: {problem}")
    except UserError as error:
        problems.append(error.what)
    missing = [key for key in index.keys if key not in found]
    if missing:
        problems.append(f"lacks {len(missing)} pictures that the index lists, the first {missing[0]!r}")
    return problems


def _side_member(data: bytes, extension: str, label: int) -> str:
    """What is wrong with a KEY.cls or KEY.json, or ""."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return "is not valid"
    if extension == "json":
        if not isinstance(value, dict):
            return "is no JSON object"
        value = value.get("label", -1)
    return "" if value == label else f"has label {value!r:.40}, the index has {label}"


def _members(store: Store, name: str) -> Iterator[tuple[str, int, int]]:
    """(member name, offset of its data, size) of a tar of regular files. Raises UserError for anything else."""
    offset, total = 0, store.size(name)
    while offset < total:
        header = store.read(name, offset, BLOCK)
        if not any(header):
            return
        try:
            info = tarfile.TarInfo.frombuf(header, "ascii", "strict")
        except (tarfile.HeaderError, UnicodeDecodeError) as error:
            raise UserError(f"is no tar from byte {offset} on: {error}") from None
        if not info.isreg() or not 0 <= info.size <= MAX_MEMBER_BYTES:
            raise UserError(f"has a member {info.name!r:.120} that is no plain file of allowed size")
        yield info.name, offset + BLOCK, info.size
        offset += BLOCK + -(-info.size // BLOCK) * BLOCK
    raise UserError("ends without the mark of a complete tar")
