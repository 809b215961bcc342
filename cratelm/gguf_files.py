"""GGUF files of llama.cpp: converted once into a model directory that every command opens.

    CACHE/gguf/NAME-SHA256/    config.json, model.safetensors, tokenizer.json, chat_template.jinja, ..., gguf.json

`CACHE` is `~/.cache/cratelm`, or `$XDG_CACHE_HOME/cratelm`. transformers reads the file and dequantises the weights.
Files of floating-point numbers keep their type, quantised ones become bfloat16: their rounding is coarser than that of
bfloat16. The directory is named after the content of the file, so a file that changed is converted again, and so is a
directory that is damaged, incomplete or made by another version of the conversion. `gguf.json` records the file, its
checksum, its quantisation and that version.
"""

import contextlib
import importlib
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cratelm.checksums import CHECKSUMS, cache_folder, listed_files, remembered_sha256, verify, write_checksums
from cratelm.errors import CrateError
from cratelm.rundir import atomic_path, check_regular, read_json, write_json
from cratelm.runtime import console, quiet_transformers

GGUF_DESCRIPTION = "gguf.json"
CONVERSION = 1
"""Version of the conversion: to be raised when the same GGUF file gives another model directory."""
FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Tensor type -> dtype. With any other type in the file, the weights become bfloat16."""
LLAMA_3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""The rope scaling of Llama 3.1 and later, whose file stores the resulting factors only."""
UNREAD_ROPE = ("rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors of a rope scaling that transformers does not read from a GGUF file."""


def is_gguf(source: str | Path) -> bool:
    """Whether a model is named by a GGUF file."""
    return str(source).lower().endswith(".gguf")


def model_name(source: str | Path) -> str:
    """The last part of a path, without `.gguf`."""
    name = Path(source).name
    return name[: -len(".gguf")] if is_gguf(name) else name


def model_directory(file: Path) -> Path:
    """The model directory of a GGUF file, made if there is none. Raises `CrateError` for a file that cannot be read."""
    try:
        with open(check_regular(file), "rb") as opened:
            magic = opened.read(4)
    except FileNotFoundError:
        raise CrateError(f"{file} does not exist. Hint: give the path of a GGUF file") from None
    if magic != b"GGUF":
        raise CrateError(f"{file} must be a GGUF file, got a file that begins with {magic!r}. Hint: fetch it again")
    checksum = remembered_sha256(file)
    folder = cache_folder() / "gguf" / f"{model_name(file)}-{checksum[:12]}"
    with _locked(folder.with_name(f".{folder.name}.lock")):
        if not _is_whole(folder):
            _convert(file, checksum, folder)
    return folder


def quantization(folder: Path) -> str | None:
    """The quantisation of the GGUF file that a model directory was made from; None for another directory."""
    value = _described(folder).get("quantization") if (folder / GGUF_DESCRIPTION).is_file() else None
    return None if value is None else str(value)


class _Header(NamedTuple):
    architecture: str
    quantization: str
    """The kind of the file, such as `Q4_K_M`; its most frequent tensor type if the file does not report it."""
    dtype: str
    """Type of the converted weights."""
    adds_bos: bool | None
    """Whether a text begins with the beginning-of-text token; None if the file does not report it."""
    rope_factors: tuple[float, ...]
    """Divisors of the rope frequencies; empty without them."""


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait until no other process converts the same file."""
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        with contextlib.suppress(OSError):  # a file system without locks: two processes may convert at once
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _described(folder: Path) -> dict[str, Any]:
    return read_json(folder / GGUF_DESCRIPTION, hint=f"Remove {folder / GGUF_DESCRIPTION}")


def _is_whole(folder: Path) -> bool:
    """Whether a directory has every file that this version of the conversion writes, unchanged."""
    if not (folder / GGUF_DESCRIPTION).is_file():
        return False
    try:
        names = listed_files(folder)
        if missing := sorted({GGUF_DESCRIPTION, CHECKSUMS, *names} - {file.name for file in folder.iterdir()}):
            raise CrateError(f"{folder} must have the file {missing[0]}, got none")
        for name in names:
            verify(folder / name)
        if (version := _described(folder).get("conversion")) != CONVERSION:
            raise CrateError(f"{folder} must be of version {CONVERSION} of the conversion, got {version}")
    except CrateError as error:
        console.print(f"{error}. The GGUF file is converted again", soft_wrap=True)
        return False
    return True


def _convert(file: Path, checksum: str, folder: Path) -> None:
    header = _read_header(file)
    console.print(
        f"converting {file.name} ({header.architecture}, {header.quantization}) to {header.dtype}, once, into {folder}",
        soft_wrap=True,
    )
    model, tokenizer = _load(file, header)
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        with quiet_transformers():
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
        _complete_settings(temporary, header)
        facts = {
            "file": str(file.absolute()), "sha256": checksum, "quantization": header.quantization,
            "architecture": header.architecture, "dtype": header.dtype, "conversion": CONVERSION,
        }  # fmt: skip
        write_json(temporary / GGUF_DESCRIPTION, facts)
        write_checksums(temporary)


def _read_header(file: Path) -> _Header:
    """Facts of the file. Raises `CrateError` if it is cut off or damaged, or if transformers misreads its rope."""
    try:
        gguf = importlib.import_module("gguf")
    except ImportError:
        raise CrateError(f"{file} is a GGUF file, which needs an extra. Hint: pip install 'cratelm[gguf]'") from None
    try:
        reader = gguf.GGUFReader(file)
        fields = {name: field.contents() for name, field in reader.fields.items() if len(field.data) == 1}
        architecture, number = str(fields["general.architecture"]), fields.get("general.file_type")
        sizes = Counter[str]()
        for tensor in reader.tensors:
            sizes[tensor.tensor_type.name] += int(tensor.n_elements)
        if not sizes:
            raise ValueError("it has no weights")
        kinds = {kind.value: kind.name for kind in gguf.LlamaFileType}
        scaling = str(fields.get(f"{architecture}.rope.scaling.type", "none"))
        factors = {tensor.name: tensor.data for tensor in reader.tensors if tensor.name.startswith("rope_f")}
    except (ValueError, LookupError, TypeError, ArithmeticError, AttributeError, OSError, MemoryError) as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise CrateError(f"{file} is cut off or damaged ({reason}). Hint: fetch it again") from None
    if architecture != "gpt-oss" and (scaling != "none" or set(UNREAD_ROPE) & set(factors)):
        raise CrateError(
            f"{file} has a rope scaling that transformers does not read from GGUF files. Hint: use the model's "
            "directory with config.json, or serve the file with llama.cpp"
        )
    kind = kinds.get(number, "") if isinstance(number, int) else ""
    return _Header(
        architecture=architecture, adds_bos=fields.get("tokenizer.ggml.add_bos_token"),
        quantization=kind.removeprefix("MOSTLY_").removeprefix("ALL_") or sizes.most_common(1)[0][0],
        dtype=next((FLOATS[name] for name in ("BF16", "F16", "F32") if name in sizes), "")
        if set(sizes) <= set(FLOATS) else "bfloat16",
        rope_factors=tuple(map(float, factors.get("rope_freqs.weight", ()))),
    )  # fmt: skip


def _load(file: Path, header: _Header) -> tuple[Any, Any]:
    """Model and tokenizer. Raises `CrateError` for an architecture that transformers does not read."""
    try:
        transformers, torch = importlib.import_module("transformers"), importlib.import_module("torch")
        importlib.import_module("accelerate")
    except ImportError:
        raise CrateError(f"{file} is a GGUF file, which needs an extra. Hint: pip install 'cratelm[gguf]'") from None
    source: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    folder = str(file.absolute().parent)
    # Without dequantize, later versions keep the blocks if they can, and such a model cannot be saved.
    config = getattr(transformers, "GgufConfig", None)
    whole = {"quantization_config": config(dequantize=True)} if config is not None else {}
    with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **source)
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                folder, **source, **whole, dtype=getattr(torch, header.dtype), output_loading_info=True
            )
        except (ValueError, OSError, LookupError, RuntimeError, ImportError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise CrateError(
                f"{file} cannot be converted by transformers {transformers.__version__} ({header.architecture}: "
                f"{reason}). Hint: serve it with llama.cpp and give --llm URL, or use another file"
            ) from None
    if missing := sorted(info["missing_keys"]):
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise CrateError(
            f"{file} lacks weights that transformers needs for the architecture {header.architecture}: {missing[0]}"
            f"{more}. Hint: use another file"
        )
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.config, name, getattr(tokenizer, name))
        setattr(model.generation_config, name, getattr(tokenizer, name))
    return model, tokenizer


def _complete_settings(folder: Path, header: _Header) -> None:
    """Add to the saved files what transformers does not keep: the beginning of a text, and the rope scaling."""
    _change(folder / "config.json", {})
    if header.adds_bos is not None:
        _change(folder / "tokenizer_config.json", {"add_bos_token": bool(header.adds_bos)})
    if header.rope_factors:
        config = json.loads((folder / "config.json").read_text())
        rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", 10000.0)}
        scaling = {**LLAMA_3, "factor": round(max(header.rope_factors), 4)}
        expected = llama_3_factors(rope["rope_theta"], 2 * len(header.rope_factors), scaling)
        if max(abs(a - b) / b for a, b in zip(header.rope_factors, expected, strict=True)) > 1e-3:
            raise CrateError(
                "the rope factors of a GGUF file must be those of Llama 3.1 or later, got others, which transformers "
                "does not read. Hint: use the model's directory with config.json, or serve the file with llama.cpp"
            )
        _change(folder / "config.json", {"rope_parameters": {**rope, **scaling, "rope_type": "llama3"}})


def llama_3_factors(base: float, width: int, scaling: Mapping[str, float]) -> list[float]:
    """The divisors of the rope frequencies of a head of this width: 1 for short waves, `factor` for long ones."""
    low, high, length = (scaling[name] for name in LLAMA_3)
    factors = []
    for place in range(0, width, 2):
        turns = length / (2 * 3.141592653589793 * base ** (place / width))
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return factors


def _change(path: Path, fields: Mapping[str, Any]) -> None:
    settings = json.loads(path.read_text(encoding="utf-8"), parse_float=_as_written)
    path.write_text(json.dumps(settings | dict(fields), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _as_written(number: str) -> float:
    """A number of 32 bits, as GGUF files store them, in its shortest form: 1e-05, not 9.99...e-06."""
    value = float(number)
    return float(str(np.float32(value))) if float(np.float32(value)) == value else value
