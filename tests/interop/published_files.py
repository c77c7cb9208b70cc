"""Files of the published layouts, made from the fixtures' weights as the public training code would write them."""

from __future__ import annotations

import io
import pickle
import struct
import subprocess
import sys
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
PROTOCOL = 2  # torch's


def fixture(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as arrays:
        return {key: arrays[key] for key in arrays.files}


def state_dict(name: str, prefix: str = "sd/") -> OrderedDict[str, Tensor]:
    """A fixture's published state dict."""
    found = {key.removeprefix(prefix): value for key, value in fixture(name).items() if key.startswith(prefix)}
    return OrderedDict((key, torch.from_numpy(np.array(value))) for key, value in found.items())


def save(content: Any, path: Path, *, legacy: bool = False) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def in_another_process(code: str, path: Path) -> Path:
    """Runs code of this module in a process whose modules (`networks`, `tracker`, ...) the caller must never see."""
    here = Path(__file__).resolve().parent
    script = f"import sys; sys.path.insert(0, {str(here)!r})\nfrom pathlib import Path\nfrom published_files import *\n"
    command = [sys.executable, "-c", f"{script}{code}", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    return path


# ---- a pickled IntroVAE module ---------------------------------------------------------------------------------------


def foreign(module: str, *names: str, base: type = object) -> list[type]:
    """Classes that claim to live in an importable module of that name."""
    home = sys.modules.setdefault(module, types.ModuleType(module))
    made = [type(name, (base,), {"__module__": module, "__qualname__": name}) for name in names]
    for cls in made:
        setattr(home, cls.__name__, cls)
    return made


def introvae_module(state: dict[str, Tensor]) -> nn.Module:
    """A module tree with the published classes, names and weights; parameterless layers stand among the others."""
    whole, encoder, decoder, block = foreign(
        "networks", "IntroVAE", "Encoder", "Decoder", "_Residual_Block", base=nn.Module
    )
    root = whole()
    root.hdim = 12
    root.encoder, root.decoder = encoder(), decoder()
    root.encoder.main, root.decoder.main = nn.Sequential(), nn.Sequential()
    root.decoder.fc = nn.Sequential()
    for prefix in dict.fromkeys(key.rpartition(".")[0] for key in state):
        shape = state[f"{prefix}.weight"].shape
        layer: nn.Module = (
            nn.Linear(shape[1], shape[0])
            if len(shape) == 2
            else nn.BatchNorm2d(shape[0])
            if len(shape) == 1
            else nn.Conv2d(shape[1], shape[0], shape[2], bias=f"{prefix}.bias" in state)
        )
        *parents, leaf = prefix.split(".")
        home: nn.Module = root
        for part in parents:
            if part.startswith("res_in_") and part not in home._modules:
                home.add_module(part, block())
                home._modules[part].conv_expand = None
                home._modules[part].relu1 = nn.LeakyReLU(0.2, inplace=True)
            home = home._modules[part]
        if leaf == "conv_expand":
            del home.conv_expand
        home.add_module(leaf, layer)
    root.encoder.main.add_module("pool", nn.AvgPool2d(2))
    root.decoder.main.add_module("up", nn.Upsample(scale_factor=2, mode="nearest"))
    root.decoder.fc.add_module("1", nn.ReLU(True))
    missing = root.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys and all(k.endswith("num_batches_tracked") for k in missing.missing_keys)
    return root


class _OldPickler(pickle._Pickler):  # type: ignore[name-defined]
    """What Python 2.7 with torch 0.3 wrote: byte strings, parameters called with their data, module sources."""

    dispatch: ClassVar[dict[type, Any]] = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def __init__(self, file: Any) -> None:
        super().__init__(file, PROTOCOL)
        self.storages: dict[str, Tensor] = {}
        self.known: set[type] = set()
        self.parameters: set[int] = set()

    def save_str(self, text: str) -> None:
        data = text.encode("latin-1")
        self.write(b"U" + bytes([len(data)]) + data if len(data) < 256 else b"T" + struct.pack("<i", len(data)) + data)
        self.memoize(text)

    dispatch[str] = save_str

    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, type) and issubclass(value, nn.Module) and value not in self.known:
            self.known.add(value)
            return ("module", value, "networks.py", "import os\n" * 40)
        if isinstance(value, _OldStorage):
            key = str(94000000000000 + len(self.storages))
            self.storages[key] = value.tensor
            return ("storage", torch.FloatStorage, key, "cuda:0", value.tensor.numel(), None)
        return None

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            rebuild = (_OldStorage(value.detach()), 0, tuple(value.shape), value.stride())
            plain = _Reduced((torch._utils._rebuild_tensor, rebuild))
            if isinstance(value, nn.Parameter):
                return (nn.Parameter, (plain,), (True, False, OrderedDict()))
            return plain.how
        return value.how if isinstance(value, _Reduced) else NotImplemented


class _OldStorage:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class _Reduced:
    def __init__(self, how: Any) -> None:
        self.how = how


def save_as_torch_03(content: Any, path: Path) -> None:
    """The layout before zip archives, with the contents of 2018."""
    backend = _Reduced((foreign_function("torch.nn.backends.thnn", "_get_thnn_function_backend"), ()))
    for module in list(content["model"].modules()):
        for name in [n for n in vars(module) if n.startswith("_") and n not in ("_parameters", "_buffers", "_modules")]:
            del module.__dict__[name]
        module._buffers.pop("num_batches_tracked", None)
        module._backend = backend
    with open(path, "wb") as file:
        sizes = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
        for head in (0x1950A86A20F9469CFC6C, 1001, sizes):
            pickle.dump(head, file, PROTOCOL)
        pickler = _OldPickler(file)
        pickler.dump(content)
        pickle.dump(sorted(pickler.storages), file, PROTOCOL)
        for key in sorted(pickler.storages):
            tensor = pickler.storages[key].contiguous()
            file.write(struct.pack("<q", tensor.numel()) + tensor.numpy().tobytes())


def foreign_function(module: str, name: str) -> Any:
    home = sys.modules.setdefault(module, types.ModuleType(module))

    def function() -> None:
        raise AssertionError("only its name may be used")

    function.__module__, function.__qualname__ = module, name
    setattr(home, name, function)
    return function


# ---- a style checkpoint with the objects it pickles ------------------------------------------------------------------

PARTS = {"discriminator": "encoder.", "generator": "decoder.", "mapping_tl": "mapping_tl.", "mapping_fl": "mapping_fl."}


def style_content(averaged: dict[str, Tensor]) -> dict[str, Any]:
    """The published layout. averaged: the networks *_s; the trained ones differ from them."""
    (mean,) = foreign("tracker", "RunningMeanTorch")

    def part(prefix: str, shift: float) -> OrderedDict[str, Tensor]:
        return OrderedDict((k.removeprefix(prefix), v + shift) for k, v in averaged.items() if k.startswith(prefix))

    track = mean()
    track.values = [torch.tensor([1.0]), torch.tensor([2.0])]
    optimizer = {"state": {0: {"step": 3, "exp_avg_sq": torch.ones(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    models = {name: part(prefix, 1.0) for name, prefix in PARTS.items()}
    models["dlatent_avg"] = part("dlatent_avg.", 0.0)
    models |= {f"{name}_s": part(prefix, 0.0) for name, prefix in PARTS.items()}
    return {
        "models": models,
        "auxiliary": {
            "encoder_optimizer": optimizer,
            "decoder_optimizer": optimizer,
            "scheduler": {"encoder_optimizer": {"last_epoch": 270}, "decoder_optimizer": {"last_epoch": 270}},
            "tracker": {"tracks": OrderedDict(loss_e=track), "epochs": [0.5], "means_over_epochs": OrderedDict()},
        },
    }


# ---- hostile files ---------------------------------------------------------------------------------------------------


class Calls:
    """Pickles as a call of `function` with `args`."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


def with_pickle(path: Path, replace: bytes) -> Path:
    """A small torch.save archive whose object is the given pickle."""
    import zipfile

    whole = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, whole)
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, replace if name.endswith("/data.pkl") else old.read(name))
    return path
