"""What is told of the block cache when a run begins: refused, not writable, too little room for it."""

from __future__ import annotations

import math

import pytest
from web import serving

from sivae_dist.apps.checks import storage
from sivae_dist.data.loader import ShardsConfig
from sivae_dist.data.store import Access
from sivae_dist.data.stores import room
from sivae_dist.data.stores.base import Events
from sivae_dist.data.stores.cache import BlockCache
from sivae_dist.errors import UserError

URL = "https://host/data"


def told(folder, *, url=URL, size=math.inf, **changes) -> list[str]:
    return [str(r) for r in room.remarks(url, Access(**{"cache_dir": str(folder), "cache_gb": 1.0, **changes}), size)]


@pytest.fixture
def free(monkeypatch):
    """Sets the free bytes of every disk."""
    real = room.shutil.disk_usage

    def set_(size: float) -> None:
        monkeypatch.setattr(room.shutil, "disk_usage", lambda place: real(place)._replace(free=int(size)))

    set_(1e12)
    return set_


def test_with_room_there_is_nothing_to_tell(tmp_path, free):
    assert told(tmp_path / "a" / "b") == []
    assert list(tmp_path.iterdir()) == [], "looking makes nothing"


@pytest.mark.parametrize("place", ["file", "file/below/it"])
def test_a_folder_that_cannot_be_made(tmp_path, free, place):
    (tmp_path / "file").write_text("")
    (text,) = told(tmp_path / place)
    assert f"the data cache {tmp_path / place} cannot be written" in text
    assert "Not a directory" in text
    assert "Set data.cache_dir to a folder that can be written" in text


def test_too_little_room(tmp_path, free):
    free(0.5e9)
    (text,) = told(tmp_path / "cache")
    assert "has room for 0.5 GB (0.5 GB free, 0.0 MB in use) of the 1.0 GB it may take" in text
    assert "set data.cache_gb to 0.45, or set data.cache_dir" in text
    free(1e6)
    (text,) = told(tmp_path / "cache")
    assert "has room for 1.0 MB" in text
    assert "Make room, or set data.cache_dir" in text


def test_data_that_fit_need_no_more(tmp_path, free):
    free(1e6)
    assert told(tmp_path, size=1e6) == []
    assert len(told(tmp_path, size=1e6 + 1)) == 1


def test_what_the_cache_holds_is_room_for_it(tmp_path, free):
    BlockCache(tmp_path, 1 << 30, Events()).put("ab-0", bytes(3000))
    free(7000)
    assert told(tmp_path, size=10_000) == []
    assert len(told(tmp_path, size=10_100)) == 1


@pytest.mark.parametrize("changes", [{"url": "/data"}, {"url": "file:///data"}, {"cache_gb": 0.0}])
def test_where_there_is_no_cache_nothing_is_looked_at(tmp_path, free, changes):
    (tmp_path / "file").write_text("")
    tmp_path.chmod(0o777)
    free(0)
    assert told(tmp_path / "file", **changes) == []
    ShardsConfig(url=changes.get("url", URL), cache_dir=str(tmp_path), cache_gb=changes.get("cache_gb", 1.0)).check()


def test_a_refused_one_is_told_before_anything_else(tmp_path):
    tmp_path.chmod(0o777)
    for url in (URL, "s3://bucket/data", "gs://bucket/data", "pipe:cat {name}", "https://host/{a,b}"):
        with pytest.raises(UserError, match="everybody may write to the data cache"):
            ShardsConfig(url=url, cache_dir=str(tmp_path)).check()


def test_one_rank_of_a_machine_tells_it(packed, tmp_path, free, capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    (tmp_path / "file").write_text("")
    with serving(packed) as web:
        for rank, times in ((0, 1), (1, 0), (2, 1)):
            config = ShardsConfig(url=web.url, cache_dir=str(tmp_path / "file"))
            config.build(seed=0, salt=0, rank=rank, ranks=4).close()
            assert capsys.readouterr().err.count("cannot be written") == times


def test_the_doctor_looks_at_it(packed, tmp_path, free):
    def looked(folder):
        return [(check.status, check.found) for check in storage.data_cache(web.url, str(folder), 1.0)]

    with serving(packed) as web:
        ((status, text),) = looked(tmp_path / "new")
        assert (status, text) == ("ok", f"{tmp_path / 'new'}: 0.0 MB in use of 1 GB")
        free(1000)
        ((status, text),) = looked(tmp_path / "new")
        assert (status, "has room for 0.0 MB" in text) == ("warning", True)
        tmp_path.chmod(0o777)
        with pytest.raises(UserError, match="everybody may write"):
            looked(tmp_path)
    assert storage.data_cache(str(packed), str(tmp_path), 1.0) == []
