"""What the browser reads, and how a value becomes a file of its own: the outer form of a chunk.

A browser refuses to fetch files from disk, so a chunk is a script that hands over one JSON text. It is given as a
string and parsed by `JSON.parse`, never as an object of the language: a key such as `__proto__` is then a key like any
other.
Arrays of numbers are little-endian bytes in base64, under a key that says their type.
"""

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Integer

from cratelm.errors import CrateError
from cratelm.rundir import FORMAT_VERSION, check_format_version

PACKED = {"f32": "<f4", "u32": "<u4", "u16": "<u2", "u8": "<u1"}
"""Key of a packed array -> type of its numbers."""
_HEAD, _TAIL = "cratelmChunk('", "');\n"
_ESCAPES = str.maketrans({
    "\\": "\\\\", "'": "\\'", "\u2028": "\\u2028", "\u2029": "\\u2029",
    # No reader of this file, be it a browser that was handed it as a page, finds a tag in it.
    "<": "\\u003c", ">": "\\u003e", "&": "\\u0026",
})  # fmt: skip


def pack(values: np.ndarray, kind: str) -> dict[str, str]:
    """An array of numbers as text: `{"f32": "..."}`."""
    return {kind: base64.b64encode(np.ascontiguousarray(values, dtype=PACKED[kind]).tobytes()).decode()}


def unpack(packed: Mapping[str, str]) -> np.ndarray:
    """The array that `pack` made this of."""
    [(kind, text)] = packed.items()
    return np.frombuffer(base64.b64decode(text), dtype=PACKED[kind])


def pack_sparse(values: Float[np.ndarray, " values"]) -> str:
    """Floats of which many are 0: one bit each, first bit highest, that says which are not, then those as float32."""
    there = values != 0
    return base64.b64encode(np.packbits(there).tobytes() + values[there].astype("<f4").tobytes()).decode()


def pack_ids(values: Integer[np.ndarray, " values"]) -> str:
    """Numbers from 0 to 65535, two bytes each."""
    return base64.b64encode(values.astype("<u2").tobytes()).decode()


def as_json(value: Mapping[str, Any]) -> str:
    """The value as JSON in one line, `format_version` first. A number that is not finite is a programmer's mistake."""
    return json.dumps(
        {"format_version": FORMAT_VERSION, **value}, ensure_ascii=False, allow_nan=False, separators=(",", ":")
    )


def as_script(name: str, value: Mapping[str, Any]) -> bytes:
    """A chunk as a script. `name` is made of our own words and numbers, and says which chunk it is."""
    assert all(letter.isascii() and (letter.isalnum() or letter in "/-") for letter in name), name
    text = f"{_HEAD}{name}','{as_json(value).translate(_ESCAPES)}{_TAIL}"
    # Half a surrogate pair, which no file of text can hold, becomes the escape that stands for it in a script.
    return text.encode("utf-8", "backslashreplace")


def read_script(path: Path) -> dict[str, Any]:
    """The value of a chunk that was written before."""
    try:
        text = path.read_text(encoding="utf-8")
        literal = text[text.index("','") + 3 : -len(_TAIL)]
        # The text between the quotes is JSON's own notation for a string but for the quotes themselves.
        value: dict[str, Any] = json.loads(json.loads('"' + literal.replace("\\'", "'").replace('"', '\\"') + '"'))
    except (OSError, ValueError) as error:
        raise CrateError(
            f"{path} is no chunk of a site ({error}). Remove {path.parent} and run the same again"
        ) from None
    check_format_version(path, value["format_version"])
    return value
