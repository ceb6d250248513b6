"""Messages on a pipe: eight bytes of length, then JSON. No pickle, so nothing that arrives is ever run."""

import json
import os
import struct
from collections.abc import Iterator
from typing import Any

HEADER = struct.Struct(">Q")
MAX_FRAME = 1 << 30  # bytes; a length beyond it means that something else was written to the pipe


class BrokenFrameError(Exception):
    """What was read is no message: something wrote to the pipe past the protocol."""


def encode(message: dict[str, Any]) -> bytes:
    """A message as bytes. TypeError or ValueError when it holds what JSON cannot."""
    return encode_bytes(json.dumps(message, separators=(",", ":")).encode("ascii"))


def encode_bytes(body: bytes) -> bytes:
    """The same of a body that is not JSON, for `read_bytes`."""
    return HEADER.pack(len(body)) + body


def write(descriptor: int, frame: bytes) -> None:
    """Write a whole frame to a blocking descriptor."""
    view = memoryview(frame)
    while view:
        view = view[os.write(descriptor, view) :]


def read(descriptor: int) -> dict[str, Any] | None:
    """The next message from a blocking descriptor; None at its end."""
    body = read_bytes(descriptor)
    return None if body is None else json.loads(body)


def read_bytes(descriptor: int) -> bytes | None:
    """The same of a frame that holds other bytes than JSON."""
    header = _read_exactly(descriptor, HEADER.size)
    if header is None:
        return None
    (length,) = HEADER.unpack(header)
    return _read_exactly(descriptor, length)


def _read_exactly(descriptor: int, count: int) -> bytes | None:
    chunks = []
    while count:
        chunk = os.read(descriptor, min(count, 1 << 20))
        if not chunk:
            return None
        chunks.append(chunk)
        count -= len(chunk)
    return b"".join(chunks)


class Inbox:
    """Bytes as they arrive from a descriptor that does not block, taken out as whole messages."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, chunk: bytes) -> None:
        self._bytes += chunk

    def messages(self) -> Iterator[dict[str, Any]]:
        """The messages that are complete. BrokenFrameError when the bytes are none."""
        place = 0
        try:
            while len(self._bytes) - place >= HEADER.size:
                (length,) = HEADER.unpack_from(self._bytes, place)
                if length > MAX_FRAME:
                    raise BrokenFrameError(f"a message of {length} bytes")
                end = place + HEADER.size + length
                if len(self._bytes) < end:
                    return
                body = bytes(self._bytes[place + HEADER.size : end])
                place = end
                try:
                    message = json.loads(body)
                except ValueError as error:
                    raise BrokenFrameError(str(error)) from error
                if not isinstance(message, dict):
                    raise BrokenFrameError("a message that is no object")
                yield message
        finally:
            del self._bytes[:place]
