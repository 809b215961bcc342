"""Read torch's distributed checkpoints, whose metadata is a pickle, without running code that a file names."""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

from cratelm.rundir import check_regular

_ALLOWED = {
    "torch": {"Size"}, "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "pathlib": {"PosixPath"}, "pathlib._local": {"PosixPath"}, "collections": {"OrderedDict"},
}  # fmt: skip


class _Unpickler(pickle.Unpickler):
    """Builds the classes of torch's metadata and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and name not in _ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"its metadata names {module}.{name}, which training does not write")
        return super().find_class(module, name)


class _Reader(dcp.FileSystemReader):
    """Torch's reader of a folder, with the metadata read by a restricted unpickler."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The metadata. Raises UnpicklingError if it names anything but torch's own classes."""
        rank = args[0] if args else kwargs.get("rank")
        with self.fs.create_stream(self._get_metadata_path(rank), "rb") as file:
            metadata = _Unpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Planner(dcp.DefaultLoadPlanner):
    """Torch's planner, which accepts plain values and tensors only."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Set a value; one that is pickled with other classes raises UnpicklingError."""
        torch.load(value, weights_only=True)
        value.seek(0)
        super().load_bytes(read_item, value)


def load_state(state: dict[str, Any], folder: Path, *, alone: bool = False) -> None:
    """Fill a state with the values of a checkpoint; `alone` in one process."""
    for file in folder.iterdir():
        check_regular(file)
    dcp.load(state, storage_reader=_Reader(folder), planner=_Planner(), no_dist=alone)
