"""Messages between a process and a worker that it forked: whole, in order, over two sockets that nobody else uses.

As multiprocessing's connections, with what a stream of batches needs: bytes travel as they are, without a pickle; large
arrays travel beside the pickle and are received where they stay; `offer` never waits; one call of the kernel takes all
that is there. Objects are pickled as multiprocessing does it; both ends are this program.
"""

from __future__ import annotations

import contextlib
import io
import socket
import struct
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np

_HEAD = struct.Struct("<qq")  # bytes of the message; how many arrays follow it, below 0: it is bytes, not an object
_PLAIN = -1
_AT_ONCE = 1 << 13  # bytes asked for at once: room for them is made each time
_BESIDE = 1 << 14  # bytes from which an array travels beside the pickle


class Channel:
    """One of the two ends. Not for two threads at the same end, but for one that sends and one that receives."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._here = b""  # received, not taken
        self._unsent: list[memoryview] = []

    def fileno(self) -> int:
        """For select and poll; -1 when closed."""
        return self._socket.fileno()

    def send(self, message: Any) -> None:
        """Waits until all is on its way. Raises OSError when nobody takes it any more."""
        for piece in _pieces(message):
            self._socket.sendall(piece)

    def offer(self, message: Any) -> bool:
        """As `send`, without waiting; False when something is left for `flush`."""
        pieces = _pieces(message)
        if not self._unsent and len(pieces) == 1:
            with contextlib.suppress(BlockingIOError):
                sent = self._socket.send(pieces[0], socket.MSG_DONTWAIT)
                if sent == len(pieces[0]):
                    return True
                pieces = (memoryview(pieces[0])[sent:],)
        self._unsent += [memoryview(piece) for piece in pieces]
        return self.flush()

    def flush(self) -> bool:
        """Sends what can be sent of what was offered, without waiting; whether it was all. Raises OSError."""
        while self._unsent:
            try:
                sent = self._socket.send(self._unsent[0], socket.MSG_DONTWAIT)
            except BlockingIOError:
                return False
            if sent < len(self._unsent[0]):
                self._unsent[0] = self._unsent[0][sent:]
            else:
                del self._unsent[0]
        return True

    def receive(self) -> Any:
        """The next message. Raises EOFError or OSError when the other end has gone, TimeoutError after `patience`."""
        data = self._here or self._more()
        while len(data) < _HEAD.size:
            data += self._more()
        size, beside = _HEAD.unpack_from(data)
        if beside == _PLAIN and len(data) == _HEAD.size + size:  # nearly all are such
            self._here = b""
            return data[_HEAD.size :]
        begin = _HEAD.size + 8 * max(beside, 0)
        end = begin + size
        while len(data) < end:
            data += self._more()
        whole = data[begin:end]
        if beside <= 0:
            self._here = data[end:]
            return whole if beside == _PLAIN else ForkingPickler.loads(whole)
        arrays, rest = [], memoryview(data)[end:]
        for length in struct.unpack_from(f"<{beside}q", data, _HEAD.size):
            arrays.append(np.empty(length, dtype=np.uint8).data)
            here = min(length, len(rest))
            arrays[-1][:here], rest = rest[:here], rest[here:]
            self._fill(arrays[-1][here:])
        self._here = bytes(rest)
        return ForkingPickler.loads(whole, buffers=arrays)

    def waiting(self) -> bool:
        """Whether something was received that is not taken yet; there may be more on its way."""
        return bool(self._here)

    def patience(self, seconds: float) -> None:
        """How long `receive` waits for the rest of a message."""
        self._socket.setsockopt(
            socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6))
        )

    def hang_up(self) -> None:
        """Ends it for both sides at once, whoever else has inherited an end. May be called by any thread."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Closes this end."""
        self._socket.close()

    def _more(self) -> bytes:
        try:
            data = self._socket.recv(_AT_ONCE)
        except BlockingIOError:
            raise TimeoutError from None
        if not data:
            raise EOFError
        return data

    def _fill(self, memory: memoryview) -> None:
        while len(memory):
            try:
                count = self._socket.recv_into(memory)
            except BlockingIOError:
                raise TimeoutError from None
            if not count:
                raise EOFError
            memory = memory[count:]


def pair() -> tuple[Channel, Channel]:
    """Two ends."""
    one, other = socket.socketpair()
    return Channel(one), Channel(other)


def _pieces(message: Any) -> tuple[bytes | memoryview, ...]:
    """What goes through the socket, at least one piece."""
    if isinstance(message, bytes):
        return (_HEAD.pack(len(message), _PLAIN) + message,)
    arrays: list[memoryview] = []

    def inside(buffer: Any) -> bool:
        try:
            raw = buffer.raw()
        except BufferError:  # not contiguous
            return True
        if raw.nbytes >= _BESIDE:
            arrays.append(raw)
            return False
        return True

    file = io.BytesIO()
    ForkingPickler(file, 5, True, inside).dump(message)
    head = _HEAD.pack(file.tell(), len(arrays)) + struct.pack(f"<{len(arrays)}q", *(a.nbytes for a in arrays))
    return (head + file.getvalue(), *arrays)
