"""Files of weights, safetensors or of `torch.save`: read without running code in them, names without wrappers."""

import pickle
import re
import struct
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cratelm.checksums import verify
from cratelm.errors import CrateError
from cratelm.rundir import check_regular, read_json

_WRAPPERS = frozenset({"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""What `torch.compile`, DDP, FSDP and activation checkpointing insert into the names of weights, at any depth."""


def plain_name(name: str) -> str:
    """`_orig_mod.blocks.0._orig_mod.norm.weight` -> `blocks.0.norm.weight`."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


_DAMAGE = (
    RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError, struct.error,
    MemoryError, NotImplementedError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
"""What torch's reader of plain values raises on bytes that are not a checkpoint."""


def read_pickled(path: Path) -> dict[str, Any]:
    """The dictionary in a file of `torch.save`: tensors and plain values, mapped, not read before use."""
    if not path.is_file():
        raise CrateError(f"{path} is not a file. Name a checkpoint (.pt), or a folder with a config.json")
    try:
        _check_sums(path)
        with warnings.catch_warnings(action="ignore"):  # about the pickle protocol, which does not matter here
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code is None:
            raise CrateError(f"{path} is not a checkpoint that torch can read. Fetch it again") from None
        raise CrateError(
            f"{path} holds pickled code ({code[1]}) and is refused: only tensors and plain values are read. "
            "Ask for a file of weights alone"
        ) from None
    except _DAMAGE as error:
        reason = str(error).strip().splitlines()
        raise CrateError(
            f"{path} is damaged or not a checkpoint ({reason[0][:120] if reason else type(error).__name__})"
        ) from None
    if not isinstance(checkpoint, dict):
        raise CrateError(f"{path} holds a {type(checkpoint).__name__}, not the dictionary of a checkpoint")
    return checkpoint


def _check_sums(path: Path) -> None:
    """Compare the parts of a zipped checkpoint with their CRC-32, which torch does not; ValueError if one differs.

    `torch.save` can omit them; then all are 0.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        if any(part.CRC for part in archive.infolist()) and (damaged := archive.testzip()):
            raise ValueError(f"its part {damaged} was changed after it was written")


def read_fields(path: Path) -> dict[str, Any]:
    """The fields of a config.json or of an index of weights."""
    return read_json(path, hint=put_back(path))


def put_back(path: Path) -> str:
    """The hint for a file that does not fit the weights."""
    return f"Restore the {path.name} that belongs to the weights, or fetch or make the model again"


def read_state(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model directory under their plain names."""
    state: dict[str, Tensor] = {}
    for name in _weight_files(folder):
        path = folder / name
        verify(path)
        try:
            check_regular(path)
            tensors = load_file(path) if path.suffix == ".safetensors" else read_pickled(path)
            state |= {plain_name(full): tensor for full, tensor in tensors.items()}
        except FileNotFoundError:
            raise CrateError(
                f"{folder} has a config.json but no {name}. Hint: put the file there, or fetch the model again"
            ) from None
        except (SafetensorError, OSError) as error:
            raise CrateError(f"{folder / name} is damaged ({error}). Make it again") from None
    return state


def _weight_files(folder: Path) -> list[str]:
    """Safetensors where the folder has them, else what `torch.save` wrote; each may be cut into several files."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (index := folder / f"{name}.index.json").exists():
            files = sorted(set(read_fields(index)["weight_map"].values()))
            if outside := [file for file in files if Path(file).name != file]:
                raise CrateError(f"{index} must name files of its folder, got {outside[0]!r}. {put_back(index)}")
            return files
        if (folder / name).exists():
            return [name]
    return ["model.safetensors"]
