"""The file format of a chunk, which the browser reads.

A browser does not fetch files from disk, so a chunk is a script with one JSON text. The text is a string for
`JSON.parse`, not an object literal, in which a key such as `__proto__` would have a special meaning. Arrays of numbers
are little-endian bytes in base64, under a key that names their type.
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
    # So that the file contains no tag, even for a browser that opens it as a page.
    "<": "\\u003c", ">": "\\u003e", "&": "\\u0026",
})  # fmt: skip


def pack(values: np.ndarray, kind: str) -> dict[str, str]:
    """An array of numbers as text: `{"f32": "..."}`."""
    return {kind: base64.b64encode(np.ascontiguousarray(values, dtype=PACKED[kind]).tobytes()).decode()}


def unpack(packed: Mapping[str, str]) -> np.ndarray:
    """The inverse of `pack`."""
    [(kind, text)] = packed.items()
    return np.frombuffer(base64.b64decode(text), dtype=PACKED[kind])


def pack_sparse(values: Float[np.ndarray, " values"]) -> str:
    """Floats of which many are 0: a bit per value (highest bit first) that marks the others, then these as float32."""
    nonzero = values != 0
    return base64.b64encode(np.packbits(nonzero).tobytes() + values[nonzero].astype("<f4").tobytes()).decode()


def pack_ids(values: Integer[np.ndarray, " values"]) -> str:
    """Numbers from 0 to 65535, two bytes each."""
    return base64.b64encode(values.astype("<u2").tobytes()).decode()


def as_json(value: Mapping[str, Any]) -> str:
    """The value as JSON in one line, `format_version` first. All numbers must be finite."""
    return json.dumps(
        {"format_version": FORMAT_VERSION, **value}, ensure_ascii=False, allow_nan=False, separators=(",", ":")
    )


def encoded(value: Mapping[str, Any]) -> bytes:
    """`as_json` as UTF-8; a lone surrogate, which UTF-8 cannot encode, becomes its JSON escape."""
    return as_json(value).encode("utf-8", "backslashreplace")


def as_script(name: str, value: Mapping[str, Any]) -> bytes:
    """A chunk as a script. `name` is the chunk's name: letters, digits, `/` and `-`."""
    assert all(letter.isascii() and (letter.isalnum() or letter in "/-") for letter in name), name
    text = f"{_HEAD}{name}','{as_json(value).translate(_ESCAPES)}{_TAIL}"
    # A lone surrogate, which UTF-8 cannot encode, becomes its escape in a script.
    return text.encode("utf-8", "backslashreplace")


def read_script(path: Path) -> dict[str, Any]:
    """The value of a chunk file."""
    try:
        text = path.read_text(encoding="utf-8")
        literal = text[text.index("','") + 3 : -len(_TAIL)]
        # Apart from quotes, the literal has the notation of a JSON string.
        value: dict[str, Any] = json.loads(json.loads('"' + literal.replace("\\'", "'").replace('"', '\\"') + '"'))
    except (OSError, ValueError) as error:
        raise CrateError(
            f"{path} is not a chunk of a site ({error}). Remove {path.parent} and run the same command"
        ) from None
    check_format_version(path, value["format_version"])
    return value
