"""Lines of a file that may be compressed, and its encoding by its byte order mark."""

import codecs
import itertools
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import zstandard

from cratelm import runtime

_CHUNK = 1 << 16
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
"""Byte order marks and their encodings; the mark of UTF-32 begins with that of UTF-16."""


def encoding_by_mark(data: bytes) -> str:
    """`utf-16` or `utf-32` for bytes that begin with its mark, `utf-8` for others."""
    return next((name for mark, name in _MARKS.items() if data.startswith(mark)), "utf-8")


def read_lines(path: Path, on_bytes: Callable[[int], None]) -> Iterator[bytes]:
    """Lines of a file, without their ends; `on_bytes` is called with the number of bytes read.

    A damaged file raises EOFError, UnicodeDecodeError, zlib.error or zstandard.ZstdError after its last whole line.
    The time is linear in the length of a line, however the chunks cut it.
    """
    begun: list[bytes] = []
    for chunk in _chunks(path, on_bytes):
        first, *rest = chunk.split(b"\n")
        begun.append(first)
        if rest:
            yield b"".join(begun)
            yield from rest[:-1]
            begun = [rest[-1]]
    if any(begun):
        yield b"".join(begun)


def _chunks(path: Path, on_bytes: Callable[[int], None]) -> Iterator[bytes]:
    """The content of a file, decompressed by its suffix; UTF-16 and UTF-32 with a byte order mark as UTF-8."""
    data = _raw_chunks(path, on_bytes)
    if path.suffix.lower() == ".gz":
        data = _decompress(data, lambda: zlib.decompressobj(wbits=31), path, b"\x1f\x8b")
    elif path.suffix.lower() == ".zst":
        data = _decompress(data, zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj, path)
    first = next((chunk for chunk in data if chunk), b"")
    chunks, encoding = itertools.chain([first], data), encoding_by_mark(first)
    return chunks if encoding == "utf-8" else (text.encode() for text in codecs.iterdecode(chunks, encoding))


def _raw_chunks(path: Path, on_bytes: Callable[[int], None]) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk
            on_bytes(len(chunk))


def _decompress(raw: Iterator[bytes], start: Callable[[], Any], path: Path, magic: bytes = b"") -> Iterator[bytes]:
    """Decompress frame after frame; a last frame without its end raises, where zstandard's reader would keep silent.

    What follows the last frame and does not begin with `magic` is ignored, as `gzip -d` ignores it.
    """
    frame = start()
    for chunk in raw:
        while chunk:
            if frame.eof:
                if not chunk.startswith(magic[: len(chunk)]):
                    if chunk.strip(b"\0"):
                        runtime.console.print(f"{path}: bytes after the end of the gzip data are ignored", markup=False)
                    for _ in raw:  # read on for the progress
                        pass
                    return
                frame = start()
            yield frame.decompress(chunk)
            chunk = frame.unused_data if frame.eof else b""
    if not frame.eof:
        raise EOFError("the end is missing")
