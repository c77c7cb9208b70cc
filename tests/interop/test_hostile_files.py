"""Files that try to run something, or to make us allocate or loop, are refused by name, without a traceback."""

from __future__ import annotations

import builtins
import os
import pickle
import struct
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from published_files import PROTOCOL, Calls, in_another_process, save, state_dict, with_pickle

from sivae_dist.cli import main
from sivae_dist.errors import UserError
from sivae_dist.interop import inert_pickle, published
from sivae_dist.interop.torch_file import TorchFile
from sivae_dist.models.residual import ResidualConfig

ROOT = Path(__file__).resolve().parents[2]


def touch(canary: Path) -> Calls:
    return Calls(os.system, f"touch {canary}")


def nested(canary: Path) -> Any:
    state = OrderedDict(state_dict("residual_3"))
    state["encoder.zz"] = OrderedDict(a=[{"b": (1, touch(canary))}])  # type: ignore[assignment]
    return {"epoch": 1, "model": state}


def evaluated(canary: Path) -> Calls:
    return Calls(builtins.eval, f"__import__('os').system('touch {canary}')")


def by_attribute(canary: Path) -> Calls:
    """The way round a list of modules: a harmless class, then its attributes."""
    return Calls(getattr, OrderedDict, "__reduce__")


ATTACKS = {"posix.system": nested, "builtins.eval": evaluated, "builtins.getattr": by_attribute}


def refused(path: Path, canary: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Imports by the command's own entry point; returns what it said."""
    with pytest.raises(SystemExit) as left:
        main(["import", str(path), "--out", str(path.parent / "run")])
    said = capsys.readouterr().err
    assert left.value.code == 2 and "Traceback" not in said and said.startswith("error: ")
    assert not canary.exists() and not (path.parent / "run").exists()
    return said


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", ATTACKS)
def test_calls_are_refused_by_name(name: str, legacy: bool, tmp_path: Path, capsys: Any) -> None:
    canary = tmp_path / "canary"
    path = save(ATTACKS[name](canary), tmp_path / "evil.pth", legacy=legacy)
    said = refused(path, canary, capsys)
    assert f"'{name.replace('builtins', '__builtin__')}'" in said or f"'{name}'" in said
    assert "nothing was imported or run" in said


def test_the_canary_sings(tmp_path: Path) -> None:
    """The same file does run code where it is unpickled: the tests above could fail."""
    canary = tmp_path / "canary"
    path = save(nested(canary), tmp_path / "evil.pth")
    code = "torch.load(sys.argv[1], weights_only=False)"
    in_another_process(code, path)
    assert canary.exists()


def test_in_a_process_of_its_own(tmp_path: Path) -> None:
    """The whole command, as a user runs it, on a bare pickle and on a module from a folder at hand."""
    canary = tmp_path / "canary"
    (tmp_path / "networks.py").write_text(f"open({str(canary)!r}, 'w')\nclass IntroVAE: pass\n")
    bare = tmp_path / "bare.pth"
    bare.write_bytes(pickle.dumps(touch(canary), PROTOCOL))
    known = with_pickle(tmp_path / "known.pth", b"\x80\x02cnetworks\nIntroVAE\n)\x81q\x00.")
    for path, says in ((bare, "posix.system"), (known, "holds no published network")):
        done = subprocess.run(
            [sys.executable, "-m", "sivae_dist", "import", str(path), "--out", str(tmp_path / "run")],
            env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}", "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, check=False, timeout=240, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr
    assert not canary.exists()


def _call(module: str, name: str, argument: str = "x") -> bytes:
    text = argument.encode()
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"X" + struct.pack("<I", len(text)) + text + b"\x85R."


ODD_PICKLES = {
    "'networks2.IntroVAE'": _call("networks2", "IntroVAE"),
    "'os.IntroVAE'": _call("os", "IntroVAE"),
    "'networks.IntroVAE.__init__'": _call("networks", "IntroVAE.__init__"),
    "'tracker.os.system'": _call("tracker", "os.system"),
    "'torch.load'": _call("torch", "load"),
    "'torch.serialization.load'": _call("torch.serialization", "load"),
    "'torch.nn.modules.conv.os'": _call("torch.nn.modules.conv", "os"),
    "'x\\x1b[31m.y'": _call("x\x1b[31m", "y"),  # an escape sequence must not reach the terminal
    "'\\udcff.a'": b"\x80\x04\x8c\x03\xed\xb3\xbf\x8c\x01a\x93.",  # a lone surrogate, which cannot be printed
    "instruction INST": b"\x80\x02(X\x01\x00\x00\x00xios\nsystem\n.",
    "instruction EXT1": b"\x80\x02\x82\x01.",
    "instruction DUP": b"\x80\x02]2.",
    "an item is longer": b"\x80\x02\x8d" + struct.pack("<Q", 2**40) + b"x.",
    "a key that is a tuple": b"\x80\x02})" + b"\x85" * 60 + b"K\x01s.",
    "REDUCE without a name": b"\x80\x02K\x01)R.",
    "too little on the stack": b"\x80\x02R.",
    "a mark is missing": b"\x80\x02K\x01t.",
    "KeyError": b"\x80\x02h\x05.",
    "pickle exhausted": b"\x80\x02K\x01",
    "a storage of no known class": b"\x80\x04(\x8c\x07storageK\x01\x8c\x010\x8c\x03cpuK\x02tQ.",
}


@pytest.mark.parametrize("says", ODD_PICKLES)
def test_odd_pickles(says: str, tmp_path: Path, capsys: Any) -> None:
    path = with_pickle(tmp_path / "odd.pth", ODD_PICKLES[says])
    said = refused(path, tmp_path / "canary", capsys)
    assert says in said, said


class _InStorage(pickle.Pickler):
    """Puts a call into the identifier of a storage."""

    def __init__(self, file: Any, canary: Path) -> None:
        super().__init__(file, PROTOCOL)
        self.canary = canary

    def persistent_id(self, value: Any) -> Any:
        return ("storage", touch(self.canary), "0", "cpu", 1) if isinstance(value, complex) else None


def test_call_within_a_storage(tmp_path: Path, capsys: Any) -> None:
    import io

    buffer = io.BytesIO()
    _InStorage(buffer, tmp_path / "canary").dump({"model": OrderedDict(a=1j)})
    path = with_pickle(tmp_path / "evil.pth", buffer.getvalue())
    assert "'posix.system'" in refused(path, tmp_path / "canary", capsys)


@pytest.mark.parametrize("place", [0, 1, 2, 4])
def test_call_in_any_pickle_of_the_legacy_layout(place: int, tmp_path: Path, capsys: Any) -> None:
    parts = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, {"a": 1}, []]
    parts[place] = touch(tmp_path / "canary")
    path = tmp_path / "evil.pth"
    path.write_bytes(b"".join(pickle.dumps(part, PROTOCOL) for part in parts))
    assert "'posix.system'" in refused(path, tmp_path / "canary", capsys)


# ---- sizes -----------------------------------------------------------------------------------------------------------


def _tensor_pickle(shape: tuple[int, ...], stride: tuple[int, ...], numel: int, times: int = 1) -> bytes:
    """A dict of tensors on the archive's storage 0, as torch writes it, with sizes of our choice."""

    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", numel) if isinstance(value, Storage) else None

    import io

    buffer, rebuild = io.BytesIO(), torch._utils._rebuild_tensor_v2
    tensors = {f"a{i}": Calls(rebuild, Storage(), 0, shape, stride, False, OrderedDict()) for i in range(times)}
    Pickler(buffer, PROTOCOL).dump(tensors)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("shape", "stride", "numel"),
    [((10**12,), (0,), 2), ((3,), (1,), 2), ((2,), (5,), 2), ((2, -1), (1, 1), 2), ((1,) * 9, (1,) * 9, 2)],
)
def test_tensors_beyond_their_storage(shape: Any, stride: Any, numel: int, tmp_path: Path) -> None:
    path = with_pickle(tmp_path / "a.pth", _tensor_pickle(shape, stride, numel))
    with pytest.raises(UserError, match="a tensor"):
        TorchFile(path, {})


def test_storages_larger_than_the_file_are_not_allocated(tmp_path: Path) -> None:
    path = with_pickle(tmp_path / "a.pth", _tensor_pickle((2**40,), (1,), 2**40))
    with TorchFile(path, {}) as file, pytest.raises(UserError, match="has 8 bytes, expected 4398046511104"):
        file.tensor(file.tree["a0"])


def test_many_tensors_on_one_storage_end(tmp_path: Path) -> None:
    path = with_pickle(tmp_path / "a.pth", _tensor_pickle((2,), (1,), 2, times=4))
    with TorchFile(path, {}) as file:
        good = [file.tensor(file.tree[key]) for key in file.tree]
        assert all(tensor.shape == (2,) for tensor in good)
        with pytest.raises(UserError, match="share storages so often"):
            for _ in range(10_000):
                file.tensor(file.tree["a0"])


def test_instructions_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inert_pickle, "MOST_INSTRUCTIONS", 1000)
    path = with_pickle(tmp_path / "a.pth", b"\x80\x02" + b"K\x010" * 1000 + b"N.")
    with pytest.raises(UserError, match="more than 1000 instructions"):
        TorchFile(path, {})


def test_a_module_that_contains_itself_ends(tmp_path: Path) -> None:
    module = (
        b"cnetworks\nIntroVAE\n)\x81q\x00}(X\x08\x00\x00\x00_modules}(X\x01\x00\x00\x00ah\x00X\x01\x00\x00\x00bh\x00uub"
    )
    path = with_pickle(tmp_path / "a.pth", b"\x80\x02" + module + b".")
    with pytest.raises(UserError, match="more than 10000 modules"):
        published.read(path)


# ---- damage ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["zip", "legacy"])
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small published file."""
    from test_import_published import _as_published

    state = _as_published(
        ResidualConfig(image_size=8, channels=(2, 3), zdim=2).build().state_dict(), image_size=8, widths=2
    )
    path = tmp_path_factory.mktemp("small") / "a.pth"
    return save({"epoch": 1, "model": OrderedDict(state)}, path, legacy=request.param == "legacy").read_bytes()


def test_truncated_files(small: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    for length in [*range(0, len(small), max(1, len(small) // 60)), len(small) - 1]:
        path.write_bytes(small[:length])
        with pytest.raises(UserError, match="is no complete file"):
            published.read(path)


def test_flipped_bits_never_raise_anything_else(small: bytes, tmp_path: Path) -> None:
    path, told = tmp_path / "a.pth", 0
    generator = torch.Generator().manual_seed(3)
    for _ in range(400):
        place = int(torch.randint(len(small), (), generator=generator))
        bit = int(torch.randint(8, (), generator=generator))
        damaged = bytearray(small)
        damaged[place] ^= 1 << bit
        path.write_bytes(damaged)
        try:
            published.read(path)
        except UserError:
            told += 1
    assert told > 50


@pytest.mark.parametrize("content", [b"", b"hello", b"\x00" * 5000, b"PK\x03\x04" + b"\x07" * 900, b"\x80\x02"])
def test_garbage(content: bytes, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(content)
    assert "is no complete file of torch.save" in refused(path, tmp_path / "canary", capsys)


def test_no_file(tmp_path: Path, capsys: Any) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path, says in (
        (tmp_path, "is no file"),
        (tmp_path / "absent", "No such file"),
        (tmp_path / "fifo", "is no file"),
    ):
        with pytest.raises(SystemExit):
            main(["import", str(path), "--out", str(tmp_path / "run")])
        assert says in capsys.readouterr().err
