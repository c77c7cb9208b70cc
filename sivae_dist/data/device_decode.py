"""JPEGs decoded on the GPU that trains (`data.decode gpu`), by nvJPEG as torchvision offers it.

Workers check and deliver bytes; the training process decodes a batch at a time. nvJPEG does not give libjpeg's pixels
bit for bit: differences of a few of 255 are its right. Not run on a GPU yet. What nvJPEG refuses is decoded on the CPU,
so that faults, replacements and their records are those of `data.decode cpu`.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sivae_dist.data import jpeg
from sivae_dist.data.decode import decode_into
from sivae_dist.data.faults import Report
from sivae_dist.data.parts import Reads
from sivae_dist.data.pictures import Arrivals, Decoded, Failure, Pictures, Unopened
from sivae_dist.devices import cpu_asked, cuda_used
from sivae_dist.errors import UserError

# Bytes of B JPEGs, each (n,) uint8 on the host -> pixels (B, C, H, W) uint8 on a device. All have the size that their
# headers were checked for. Raises RuntimeError when one of them cannot be decoded, without partial results.
Decode = Callable[[Sequence[Tensor]], Tensor]

MEAN_DIFFERENCE = 1.0  # of 255, on probes with full colour resolution: more is another picture, not another rounding
_REMEDY = "pip install 'sivae-dist[nvjpeg]' with a CUDA build of torch, or set data.decode to cpu"


def on_cpu(channels: int, side: int) -> Decode:
    """The reference: libjpeg-turbo, as workers decode."""
    turbo = jpeg.unusable() is None

    def decode(jpegs: Sequence[Tensor]) -> Tensor:
        out = np.empty((len(jpegs), side, side, channels), dtype=np.uint8)
        for one, pixels in zip(jpegs, out, strict=True):
            data = one.numpy().tobytes()
            if not (turbo and jpeg.decode_into(data, pixels)):
                try:
                    decode_into(data, pixels, image_format="jpg")
                except UserError as error:
                    raise RuntimeError(error.what) from None
        return torch.from_numpy(out).permute(0, 3, 1, 2)

    return decode


def nvjpeg(channels: int, device: torch.device) -> Decode:
    """nvJPEG by torchvision on a CUDA device. Raises ImportError where it is missing."""
    from torchvision.io import ImageReadMode, decode_jpeg  # noqa: PLC0415 (an optional package)

    mode = ImageReadMode.RGB if channels == 3 else ImageReadMode.GRAY
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def decode(jpegs: Sequence[Tensor]) -> Tensor:
        # nvJPEG's hardware engine and torchvision's decoder write without waiting for what is queued (pull requests
        # 9606 of torchvision and 1634 of torchcodec). On a stream of our own that has nothing left to do, there is
        # nothing that they could overwrite too soon.
        with torch.cuda.device(device), torch.cuda.stream(stream):
            stream.synchronize()
            pixels = torch.stack(decode_jpeg(list(jpegs), mode=mode, device=device))
            stream.synchronize()  # the bytes lie in memory that workers use again
        pixels.record_stream(torch.cuda.current_stream(device))
        return pixels

    return decode


def choose(image_format: str, channels: int, reduce: int) -> Decode:
    """What data.decode gpu means for pictures of this kind in this process. Raises UserError where it cannot be had."""
    if image_format != "jpg":
        what = f"data.decode is 'gpu', which reads JPEG only, but the pictures are {image_format}"
        raise UserError(what, "set data.decode to cpu")
    if reduce != 1:
        what = f"data.decode is 'gpu' and data.reduce {reduce}, but nvJPEG decodes at full size only"
        raise UserError(what, "set data.reduce to 1, or data.decode to cpu")
    if problem := unusable():
        raise UserError(f"data.decode is 'gpu', but {problem}", _REMEDY)
    return nvjpeg(channels, torch.device("cuda", torch.cuda.current_device()))


def unusable() -> str:
    """What keeps nvJPEG from being used by this process, "" if nothing does."""
    if not cuda_used():
        return "ACCELERATE_USE_CPU is set" if cpu_asked() else "torch finds no CUDA device"
    return _unusable_on(torch.cuda.current_device())


@functools.cache
def _unusable_on(number: int) -> str:
    device = torch.device("cuda", number)
    try:
        for data, channels in probes():
            with Image.open(io.BytesIO(data)) as image:
                expected = np.atleast_3d(np.asarray(image)).astype(np.float32)
            found = nvjpeg(channels, device)([torch.frombuffer(bytearray(data), dtype=torch.uint8)])[0]
            found_there = found.permute(1, 2, 0).cpu().numpy().astype(np.float32)
            if found_there.shape != expected.shape or np.abs(found_there - expected).mean() > MEAN_DIFFERENCE:
                return "it decodes other pictures than Pillow does"
    except ImportError as error:
        return f"torchvision's decoder cannot be imported: {error}"
    except RuntimeError as error:  # torchvision without nvJPEG, a driver that does not know it
        return f"it does not work here: {str(error).splitlines()[0][:200]}"
    return ""


def probes() -> list[tuple[bytes, int]]:
    """Small JPEGs as the packer makes them, and their channels."""
    slopes = np.add.outer(np.arange(48) * 4, np.arange(48) * 1)[..., None] // np.array([1, 2, 3]) % 256
    picture = Image.fromarray(slopes.astype(np.uint8))
    found = []
    for mode in ("RGB", "L"):
        file = io.BytesIO()
        picture.convert(mode).save(file, "JPEG", quality=95, subsampling=0)
        found.append((file.getvalue(), len(mode) if mode == "RGB" else 1))
    return found


class DeviceDecoding:
    """Makes pictures of batches that came unopened. cpu: reads and decodes in this process what `decode` refuses."""

    def __init__(self, decode: Decode, cpu: Pictures) -> None:
        self._decode, self._cpu = decode, cpu

    def __call__(self, batch: Unopened, reads: Reads) -> Decoded | Failure:
        """Pixels are on the device."""
        label = None if batch.label is None else torch.from_numpy(batch.label)
        if not len(reads):
            none = torch.empty(self._cpu.settings.shape(0), dtype=torch.uint8)
            return Decoded(none.permute(0, 3, 1, 2), label, batch.report)
        jpegs = batch.jpegs()
        try:
            pixels = self._decode(jpegs)
        except RuntimeError:
            return self._one_by_one(jpegs, label, batch.report or Report(), reads)
        return Decoded(pixels, label, batch.report)

    def close(self) -> None:
        """Closes files."""
        self._cpu.close()

    def _one_by_one(self, jpegs: list[Tensor], label: Tensor | None, report: Report, reads: Reads) -> Decoded | Failure:
        found: dict[int, Tensor] = {}
        for place, one in enumerate(jpegs):
            try:
                found[place] = self._decode([one])[0]
            except RuntimeError:
                continue
        rest = [i for i, place in enumerate(reads.place) if place not in found]
        columns = ([column[i] for i in rest] for column in (reads.position, reads.shard, reads.number))
        made = self._cpu.make(Reads(list(range(len(rest))), *columns))
        if isinstance(made, Failure):
            return made
        assert not isinstance(made, Unopened)
        done = Arrivals(self._cpu.settings, None)(made)
        assert isinstance(done, Decoded)
        for row, i in enumerate(rest):
            place = reads.place[i]
            found[place] = done.pixels[row]
            if label is not None and done.label is not None:
                label[place] = done.label[row]
        if done.report:
            report.faults += done.report.faults
            report.counts += done.report.counts
            report.notes += done.report.notes
        device = next((pixels.device for pixels in found.values() if pixels.device.type != "cpu"), torch.device("cpu"))
        pixels = torch.stack([found[place].to(device) for place in range(len(reads))])
        return Decoded(pixels, label, report if report else None)
