"""Shards from a web server that delays, cuts, throttles, refuses, lies: the same bytes, or a clear error in time."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from fsspec.asyn import get_loop
from web import How, Server, serving

from sivae_dist.data.faults import DataError, StorageError
from sivae_dist.data.loader import ShardsConfig
from sivae_dist.data.shard_read import ShardReader, load_manifest
from sivae_dist.data.store import Access, FolderStore, open_store
from sivae_dist.data.stores import cache, objects, remote
from sivae_dist.data.stores.address import expand, parse
from sivae_dist.data.stores.base import expected_files
from sivae_dist.errors import UserError


@pytest.fixture(autouse=True)
def quick_pauses(monkeypatch):
    monkeypatch.setattr(remote, "_FIRST_PAUSE_S", 0.01)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def web(packed):
    with serving(packed) as server:
        yield server


@pytest.fixture
def access(tmp_path):
    return Access(cache_dir=str(tmp_path / "cache"), cache_gb=0.01, read_timeout_s=5, limit_s=20, retries=3)


def without_cache(**changes) -> Access:
    return Access(**{"cache_gb": 0, "read_timeout_s": 5, "limit_s": 20, "retries": 3, **changes})


def everything(store) -> list:
    manifest = load_manifest(store)
    reader = ShardReader(store, manifest, manifest.shards)
    return [reader.encoded(s, n) for s, info in enumerate(manifest.shards) for n in range(info.count)]


def opened(url, access):
    """A store that knows what to expect, and the name of a tar."""
    store = open_store(url, access)
    manifest = load_manifest(store)
    store.expect(expected_files(manifest))
    return store, f"{manifest.shards[0].name}.tar"


@pytest.mark.parametrize("cached", [False, True])
def test_the_same_bytes_as_from_the_folder(web, packed, access, cached):
    store = open_store(web.url, access if cached else without_cache())
    assert everything(store) == everything(FolderStore(packed))
    counts = store.events.take().counts
    assert counts["fetched_bytes"] > 0
    assert counts["retries"] == 0
    before = len(web.asked)
    again = open_store(web.url, access)  # as another process would
    everything(again)
    asked = web.names()[before:]
    if cached:
        assert asked == ["manifest.json"], "the blocks and indices are kept"


def test_a_manifest_is_an_address_too(web, packed, access):
    assert everything(open_store(f"{web.url}/manifest.json", access)) == everything(FolderStore(packed))
    assert len(everything(open_store(str(packed / "manifest.json")))) == 41


def test_connections_are_kept(packed, monkeypatch):
    made = []
    with serving(packed) as server:
        accept = server._server.get_request
        monkeypatch.setattr(server._server, "get_request", lambda: made.append(1) or accept())
        everything(open_store(server.url, without_cache()))
        assert len(server.asked) > 41
        assert len(made) == 1


FAULTS = {
    "busy": lambda a: How(503) if a.nth == 0 else How(),
    "broken": lambda a: How(500) if a.nth < 2 else How(),
    "too many": lambda a: How(429, {"Retry-After": "0"}) if a.nth == 0 else How(),
    "cut": lambda a: How(cut_after=100) if a.nth % 2 == 0 else How(),
    "cut at once": lambda a: How(cut_after=0) if a.nth == 0 else How(),
    "slow": lambda a: How(delay_s=0.5) if a.nth == 0 and a.name == "shard-000001.tar" else How(),
    "damaged on the way": lambda a: How(flip=True) if a.nth == 0 else How(),
    "moved": lambda a: How(302, {"Location": f"/{a.name}?again"}) if "again" not in a.target else How(),
}


@pytest.mark.parametrize("cached", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("fault", FAULTS)
def test_passing_faults_are_not_seen(web, packed, access, fault, cached):
    web.how = FAULTS[fault]
    access = access if cached else without_cache()
    if fault == "slow":
        access = Access(**{**vars(access), "read_timeout_s": 0.2})
    store = open_store(web.url, access)
    assert everything(store) == everything(FolderStore(packed))
    counts = store.events.take().counts
    if fault == "damaged on the way":
        assert counts["reread"] > 0
    elif fault != "moved":
        assert counts["retries"] > 0


def test_a_cut_answer_is_continued_where_it_ended(web, packed, access):
    store, name = opened(web.url, access)
    web.how = lambda a: How(cut_after=1000)
    size = (packed / name).stat().st_size
    assert store.read(name, 0, size) == (packed / name).read_bytes(), "more attempts than data.retries, each further"
    begins = [a.begin for a in web.asked if a.name == name]
    assert begins == list(range(0, size, 1000))


LASTING = {
    "dead": (lambda a: How(500), StorageError, "the server answers 500"),
    "forbidden": (lambda a: How(403), StorageError, "is refused: the server answers 403"),
    "gone": (lambda a: How(404), DataError, "is missing: the server answers 404"),
    "odd": (lambda a: How(204), StorageError, "answers 204, expected 200 or 206"),
    "silent": (lambda a: How(delay_s=2), StorageError, "no answer in time"),
    "drips": (lambda a: How(trickle_s=0.1), StorageError, "too slow"),
    "waits": (lambda a: How(503, {"Retry-After": "3600"}), StorageError, "asks to wait 3600 s"),
    "elsewhere": (lambda a: How(shift=3), StorageError, "the server announces others"),
    "round and round": (lambda a: How(302, {"Location": f"/{a.name}"}), StorageError, "redirects"),
    "compressed": (lambda a: How(headers={"Content-Encoding": "gzip"}), StorageError, "Content-Encoding 'gzip'"),
}


@pytest.mark.parametrize("fault", LASTING)
def test_lasting_faults_are_told_in_time(web, fault):
    how, kind, says = LASTING[fault]
    access = without_cache(read_timeout_s=0.2, limit_s=1.5, retries=2)
    store, name = opened(web.url, access)
    web.how = how
    begun = time.monotonic()
    with pytest.raises(kind, match=says) as error:
        store.read(name, 512, 2000)
    assert f"{web.url}/{name}" in error.value.what
    assert error.value.fix
    assert time.monotonic() - begun < 30  # a bound against hanging, far above limit_s


def test_a_server_that_is_not_there():
    with pytest.raises(StorageError, match=r"no connection; .* given up after .* 3 attempts in vain"):
        load_manifest(open_store("http://127.0.0.1:9/data", without_cache(retries=2)))


def test_attempts_and_pauses_are_bounded(web, monkeypatch):
    pauses: list[float] = []
    monkeypatch.setattr(remote, "_FIRST_PAUSE_S", 0.5)
    monkeypatch.setattr(remote, "time", SimpleNamespace(monotonic=time.monotonic, sleep=pauses.append))
    store, name = opened(web.url, without_cache(retries=5, limit_s=1000))
    web.how = lambda a: How(503, {"Retry-After": "7"} if a.nth == 1 else {})
    with pytest.raises(StorageError):
        store.read(name, 0, 10)
    assert len([a for a in web.asked if a.name == name]) == 6
    doubling = [0.5, 1, 2, 4, 8]
    assert pauses[1] == 7, "as long as the server asks for"
    assert all(d / 2 <= p <= d for i, (p, d) in enumerate(zip(pauses, doubling, strict=True)) if i != 1)


def test_a_file_of_another_size(web, packed, tmp_path, access):
    store, name = opened(web.url, access)
    (tmp_path / "data").mkdir()
    web.folder = tmp_path / "data"
    (web.folder / name).write_bytes((packed / name).read_bytes()[:-1024])
    with pytest.raises(DataError, match=r"is truncated: \d+ bytes, the manifest says") as error:
        store.read(name, 0, 100)
    assert error.value.reason == "truncated"
    (web.folder / name).write_bytes((packed / name).read_bytes() + bytes(512))
    with pytest.raises(DataError, match="is longer than packed"):
        store.read(name, 0, 100)


def test_a_shard_replaced_in_the_middle_of_a_run(web, packed, tmp_path):
    """Same size, other pictures: the manifest that the run began with does not fit them."""
    store = open_store(web.url, without_cache())
    manifest = load_manifest(store)
    reader = ShardReader(store, manifest, manifest.shards)
    reader.encoded(0, 0)
    name = f"{manifest.shards[0].name}.tar"
    (tmp_path / "data").mkdir()
    web.folder = tmp_path / "data"
    (web.folder / name).write_bytes(bytes(reversed((packed / name).read_bytes())))
    with pytest.raises(DataError, match="checksum differs") as error:
        reader.encoded(0, 1)
    assert error.value.reason == "crc"


def test_a_server_that_ignores_range(web, packed, access, monkeypatch):
    monkeypatch.setattr(cache, "BLOCK", 1024)
    web.how = lambda a: How(ignore_range=True)
    store = open_store(web.url, access)
    assert everything(store) == everything(FolderStore(packed))
    events = store.events.take()
    assert [n for n in events.notes if "ignores Range" in n]
    tars = [n for n in web.names() if n.endswith(".tar")]
    assert len(tars) == len(set(tars)) + 1, "each shard once, and the request that found it out"
    small = Access(**{**vars(access), "cache_dir": access.cache_dir + "2", "cache_gb": 1e-5})
    for other in (without_cache(), small):
        with pytest.raises(StorageError, match="ignores Range and sends whole files"):
            everything(open_store(web.url, other))


def test_answers_without_a_length(web, packed, access):
    web.how = lambda a: How(unsized=True)
    assert everything(open_store(web.url, access)) == everything(FolderStore(packed))


def test_more_than_was_announced_does_not_fill_the_memory(web, packed, tmp_path, monkeypatch):
    monkeypatch.setattr("sivae_dist.data.stores.base.MAX_MANIFEST_BYTES", 100)
    with pytest.raises(DataError, match="has more than 100 bytes"):
        load_manifest(open_store(web.url, without_cache()))


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_of_an_object_no_more_is_asked_for_than_is_allowed(monkeypatch, scheme):
    """The libraries hold the whole answer before anybody can count its bytes."""
    monkeypatch.setattr(objects.google, "load", lambda: None)
    monkeypatch.setattr(objects.importlib, "import_module", lambda _: None)
    asked = []

    class Files:
        loop = get_loop()

        async def _cat_file(self, path, start=None, end=None, **others):
            asked.append((path, start, end, others))
            return bytes(100 if end is None else min(end, 100) - start)

    store = open_store(f"{scheme}://bucket/data", without_cache())
    store.transport._files = Files()
    others = {"concurrency": 1} if scheme == "gs" else {}
    assert store.whole("manifest.json", 100) == bytes(100)
    with pytest.raises(DataError, match=r"bucket/data/manifest\.json has more than 40 bytes"):
        store.whole("manifest.json", 40)
    path = "bucket/data/manifest.json"
    assert [(p.removeprefix(f"{scheme}://"), *rest) for p, *rest in asked] == [
        (path, 0, 101, others),
        (path, 0, 41, others),
    ]


def test_secrets_are_used_and_never_shown(web, packed, monkeypatch, tmp_path):
    monkeypatch.setenv("SIVAE_URL_VARIABLES", "OTHER, WEB_SIGNATURE")
    monkeypatch.setenv("WEB_SIGNATURE", "sig=abcdef")
    monkeypatch.setenv("SIVAE_DATA_USER", "anna")
    monkeypatch.setenv("SIVAE_DATA_PASS", "s3cr%40t%2F%25")
    host = web.url.removeprefix("http://")
    url = f"http://${{SIVAE_DATA_USER}}:${{SIVAE_DATA_PASS}}@{host}?${{WEB_SIGNATURE}}"
    store = open_store(url, without_cache(retries=0))
    everything(store)
    assert {a.headers["authorization"] for a in web.asked} == {"Basic YW5uYTpzM2NyQHQvJQ=="}
    assert {a.target.partition("?")[2] for a in web.asked} == {"sig=abcdef"}
    assert "${SIVAE_DATA_PASS}" in store.url
    web.how = lambda a: How(302, {"Location": f"http://127.0.0.1:9/{a.name}?token=abcdef"})
    for how in (web.how, lambda a: How(403), lambda a: How(500), lambda a: How(404), lambda a: How(302)):
        web.how = how
        with pytest.raises(UserError) as error:
            load_manifest(open_store(url, without_cache(retries=0)))
        for secret in ("anna", "s3cr", "abcdef"):
            assert secret not in str(error.value) + repr(error.value) + repr(open_store(url).transport.address)


def test_written_secrets_are_refused(monkeypatch):
    monkeypatch.delenv("SIVAE_DATA_NOT_SET", raising=False)
    for url, says in (
        ("https://anna:geheim@host/data", "holds a user name or password"),
        ("s3://KEY:geheim@bucket/data", "holds a user name or password"),
        ("https://host/data?sig=geheim", "has a query, which may hold a signature"),
        ("https://host/data?geheim", "has a query, which may hold a signature"),
        ("https://host/${SIVAE_DATA_NOT_SET}", r"names \$\{SIVAE_DATA_NOT_SET\}, which is not set"),
    ):
        with pytest.raises(UserError, match=says) as error:
            open_store(url)
        assert "geheim" not in str(error.value)
        assert error.value.fix


@pytest.mark.parametrize("scheme", ["https", "s3"])
def test_a_configuration_sends_no_variable_that_was_not_released(monkeypatch, scheme):
    """It may come from a stranger, as may the server that it names."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "geheim")
    monkeypatch.setenv("MINE", "geheim")
    monkeypatch.setenv("SIVAE_DATA_KEY", "geheim")
    monkeypatch.setenv("SIVAE_DATA_WORD", "12/geheim")  # not percent-encoded, it would end the host before its @
    unreleased = r"names \$\{(AWS_SECRET_ACCESS_KEY|MINE)\}, which would be sent to the server; expected .* SIVAE_DATA_"
    host = r"has \$\{SIVAE_DATA_KEY\} where its host or bucket stands"
    cases = [
        ("evil/${AWS_SECRET_ACCESS_KEY}/d", unreleased),
        ("evil/d?${MINE}", unreleased),
        ("${MINE}@evil/d", unreleased),
        ("evil/${{MINE,AWS_SECRET_ACCESS_KEY}}/d", unreleased),
        ("${SIVAE_DATA_KEY}.evil/d", host),
        ("evil:${SIVAE_DATA_KEY}/d", host),
        ("me@${SIVAE_DATA_KEY}?x", "user name or password"),
        ("${SIVAE_DATA_KEY}@${SIVAE_DATA_KEY}.evil/d", host),
        ("${SIVAE_DATA_KEY}:${SIVAE_DATA_WORD}@evil/d", "names another host or bucket when its variables"),
    ]
    for place, says in cases:
        with pytest.raises(UserError, match=says) as error:
            parse(expand(f"{scheme}://{place}")[0])
        assert "geheim" not in f"{error.value} {error.value.what} {error.value.fix}"
        assert error.value.fix
    with pytest.raises(UserError, match=unreleased):
        open_store("https://evil/${AWS_SECRET_ACCESS_KEY}/{a,b}")
    monkeypatch.setenv("SIVAE_URL_VARIABLES", "X,MINE")
    assert parse(f"{scheme}://evil/${{MINE}}/${{SIVAE_DATA_KEY}}").base == f"{scheme}://evil/geheim/geheim"


def test_paths_of_this_machine_are_filled_from_any_variable_and_shown_as_written(packed, monkeypatch):
    monkeypatch.setenv("MINE", str(packed))
    assert load_manifest(open_store("${MINE}")) == load_manifest(open_store("file://${MINE}"))
    monkeypatch.setenv("MINE", "geheim")
    with pytest.raises(UserError, match=r"'/\$\{MINE\}' is no folder") as error:
        open_store("/${MINE}")
    assert "geheim" not in str(error.value)


def test_a_proxy_of_the_environment_is_used(packed, monkeypatch, web: Server):
    monkeypatch.setenv("http_proxy", web.url.replace("//", "//me:word@"))
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.delenv("NO_PROXY", raising=False)
    web.how = lambda a: How(407)
    with pytest.raises(StorageError, match="is refused: the server answers 407") as error:
        load_manifest(open_store("http://data.invalid/x", without_cache()))
    assert web.asked[0].target == "http://data.invalid/x/manifest.json"
    assert web.asked[0].headers["proxy-authorization"] == "Basic bWU6d29yZA=="
    assert "word" not in str(error.value)


def test_pipes_need_the_environment(packed, tmp_path, monkeypatch):
    url = f"pipe:cat {packed}/{{name}}"
    access = Access(cache_dir=str(tmp_path / "cache"), cache_gb=0.01, limit_s=20, retries=1)
    monkeypatch.delenv("SIVAE_ALLOW_PIPE", raising=False)
    with pytest.raises(UserError, match="would run a shell command, which is refused"):
        open_store(url, access)
    monkeypatch.setenv("SIVAE_ALLOW_PIPE", "1")
    assert everything(open_store(url, access)) == everything(FolderStore(packed))
    with pytest.raises(UserError, match=r"has no \{name\}"):
        open_store("pipe:cat manifest.json", access)
    with pytest.raises(StorageError, match="the command ends with status 1") as error:
        load_manifest(open_store("pipe:exit 1 || curl -u me:word {name}", access))
    assert "word" not in str(error.value)
    with pytest.raises(StorageError, match="no more bytes in time"):
        load_manifest(open_store("pipe:sleep 60; echo {name}", Access(**{**vars(access), "read_timeout_s": 0.1})))


def test_patterns_are_one_folder(packed, tmp_path, web, access):
    names = [s.name for s in load_manifest(FolderStore(packed)).of("train")]
    first = open_store(f"{web.url}/shard-{{000000..000001}}.tar", access)
    manifest = load_manifest(first)
    assert [s.name for s in manifest.shards] == ["shard-000000", "shard-000001"]
    whole = {key: data for key, data, _ in everything(FolderStore(packed))}
    assert all(whole[key] == data for key, data, _ in everything(first))
    os.symlink(packed, tmp_path / "a")
    os.symlink(packed, tmp_path / "b")
    both = open_store(f"{tmp_path}/{{a,b}}")
    assert [data for _, data, _ in everything(both)] == [data for _, data, _ in everything(FolderStore(packed))] * 2
    assert len(names) * 2 == len(load_manifest(both).of("train"))
    one = open_store(f"{packed}/{names[1]}.tar")
    assert [s.name for s in load_manifest(one).shards] == [names[1]]
    with pytest.raises(UserError, match=r"has no shard 'shard-000098'.*2 named"):
        open_store(f"{packed}/shard-{{000098..000099}}.tar")
    for url, says in (("{1..9999999999}", "more than 100000"), ("{1..999}{1..999}", "more than"), ("{a", "match")):
        with pytest.raises(UserError, match=says):
            open_store(f"http://host/{url}")
    Path(tmp_path / "{a,b}x").mkdir()
    with pytest.raises(UserError, match="holds no manifest"):
        open_store(str(tmp_path / "{a,b}x"))


def test_missing_blocks_are_fetched_together(web, packed, access, monkeypatch):
    monkeypatch.setattr(cache, "BLOCK", 1024)
    most, now, lock = [0], [0], threading.Lock()

    def how(asked):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.05)
        with lock:
            now[0] -= 1
        return How()

    store = open_store(web.url, access)
    manifest = load_manifest(store)
    reader = ShardReader(store, manifest, manifest.shards)
    truth = ShardReader(FolderStore(packed), manifest, manifest.shards)
    web.how = how
    shards, numbers = list(range(6)), [0, 3, 1, 5, 2, 4]
    reader.prepare(shards, numbers)
    assert most[0] > 2
    before = len(web.asked)
    for shard, number in zip(shards, numbers, strict=True):
        assert reader.encoded(shard, number) == truth.encoded(shard, number)
    assert len(web.asked) == before, "everything was there"
    assert len({(a.name, a.begin) for a in web.asked}) == len(web.asked), "nothing was asked for twice"


def test_what_cannot_be_prepared_fails_where_it_is_read(web, packed, access, monkeypatch):
    monkeypatch.setattr(cache, "BLOCK", 1024)
    store = open_store(web.url, Access(**{**vars(access), "retries": 0}))
    manifest = load_manifest(store)
    reader = ShardReader(store, manifest, manifest.shards)
    web.how = lambda a: How(404) if a.name in ("shard-000001.tar", "shard-000002.index") else How()
    reader.prepare(range(6), [0] * 6)
    for shard in (1, 2):
        with pytest.raises(DataError, match="is missing"):
            reader.encoded(shard, 0)
    reader.encoded(3, 0)
    web.how = lambda a: How(500)
    with pytest.raises(StorageError, match="the server answers 500"):
        reader.prepare([3, 4, 5], [4, 4, 4])


def test_a_refusal_ahead_is_told_while_other_requests_wait(web, tmp_path):
    store = open_store(web.url, Access(cache_dir=str(tmp_path), cache_gb=0.01))
    manifest = load_manifest(store)
    reader = ShardReader(store, manifest, manifest.shards)
    release, held, answered = threading.Event(), threading.Event(), []

    def how(asked):
        if not asked.name.endswith(".tar"):
            return How()
        if asked.name == "shard-000003.tar":
            held.wait(20)
            return How(403)
        held.set()
        release.wait(20)
        answered.append(asked.name)
        return How()

    web.how = how
    try:
        with pytest.raises(StorageError, match=r"shard-000003\.tar is refused"):
            reader.prepare(range(6), [0] * 6)
        assert held.is_set()
        assert answered == [], "it did not wait for the others"
        waiting = [thread for thread in threading.enumerate() if thread.name == "fetch"]
        assert waiting and all(thread.daemon for thread in waiting), "nor does the end of the process"
    finally:
        release.set()


def test_a_cache_that_is_too_small_for_the_lanes_is_told(web, tmp_path, capsys):
    def built(**settings):
        ShardsConfig(url=web.url, cache_dir=str(tmp_path), **settings).build(seed=0, salt=0, rank=0, ranks=1)
        return capsys.readouterr().err

    assert "data.cache_gb is 1e-05, but the lanes of this machine read" in built(cache_gb=1e-5)
    assert built(cache_gb=1) == ""
