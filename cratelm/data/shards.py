"""Writing shards: documents -> encoded on all cores, in bounded memory -> `train.bin`, `val.bin`, `test.bin`.

Documents are cut into pieces, pieces gathered into batches, batches encoded on threads and written in order.
"""

import collections
import contextlib
import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt
from tokenizers import Tokenizer

from cratelm.data.text import Document
from cratelm.data.tokenizer import vocabulary_size
from cratelm.errors import CrateError

SPLIT_NAMES = ("train", "val", "test")

_BATCH_CHARACTERS = 1 << 18  # of text encoded together, also the longest piece of a long document
_CUT_WITHIN = 1 << 12  # characters searched backwards for a place to cut


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """Counts and hash of one shard. Of a nanoGPT folder only `tokens` is known; the others are None."""

    tokens: int
    """Ids in the file, end-of-text included."""
    documents: int | None
    text_bytes: int | None
    """UTF-8 bytes of the text, end-of-text not counted."""
    sha256: str | None
    """Of the file's bytes."""


def split_of(text: str, *, seed: int, shares: Mapping[str, float]) -> str:
    """The split of a document by a hash of its text and the seed; `shares` are those of val and test."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, salt=(seed % 2**64).to_bytes(8, "little")).digest()
    position = int.from_bytes(digest, "little") / 2**64
    for name, share in shares.items():
        if position < share:
            return name
        position -= share
    return "train"


def little_endian(dtype: str) -> np.dtype[Any]:
    """The numpy type of ids on disk, whatever the machine's own byte order."""
    return np.dtype(dtype).newbyteorder("<")


def dtype_for(vocab_size: int) -> str:
    """The narrowest of nanoGPT's two types that holds every id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def write_shards(
    documents: Iterator[Document],
    folder: Path,
    tokenizer: Tokenizer,
    seed: int,
    shares: Mapping[str, float],
    workers: int,
    end: int,
) -> tuple[dict[str, Split], str]:
    """Encode and write all documents; return the contents of the shards and the sha256 of the stream of documents.

    `end` is the id that follows every document.
    """
    stream = hashlib.sha256()

    def pieces() -> Iterator[_Piece]:
        for document in documents:
            data = document.text.encode()
            stream.update(len(data).to_bytes(8, "little") + data)
            yield from _cut(document, split_of(document.text, seed=seed, shares=shares))

    encode = _encoder(tokenizer, little_endian(dtype_for(vocabulary_size(tokenizer))), end)
    with contextlib.ExitStack() as opened:
        shards = {name: _Shard(folder, name, opened) for name in SPLIT_NAMES if name == "train" or name in shares}
        for batch in _in_order(encode, _batches(pieces()), workers):
            for piece, tokens in batch:
                shards[piece.split].add(piece, tokens)
    splits = {name: shard.split() for name, shard in shards.items()}
    _refuse_empty(splits, shares)
    return splits, stream.hexdigest()


def _refuse_empty(splits: Mapping[str, Split], shares: Mapping[str, float]) -> None:
    for name, split in splits.items():
        if not split.documents:
            total = sum(other.documents or 0 for other in splits.values())
            asked = ", ".join(f"{share:g} for {other}" for other, share in shares.items())
            raise CrateError(
                f"split {name} is empty: {total} documents, shares {asked}. "
                "Give more documents, other shares (--held-out, --test) or another --seed"
            )


@dataclass(frozen=True, slots=True)
class _Piece:
    """A document, or a part of a long one."""

    text: str
    split: str
    origin: str
    ends: bool


class _Shard:
    """One `.bin` file while it is written."""

    def __init__(self, folder: Path, name: str, opened: contextlib.ExitStack) -> None:
        self._file = opened.enter_context((folder / f"{name}.bin").open("wb"))
        self._sha256 = hashlib.sha256()
        self.tokens = self.documents = self.text_bytes = 0

    def add(self, piece: _Piece, tokens: UInt[np.ndarray, " tokens"]) -> None:
        data = tokens.tobytes()
        self._file.write(data)
        self._sha256.update(data)
        self.tokens += len(tokens)
        self.documents += piece.ends
        self.text_bytes += len(piece.text.encode())

    def split(self) -> Split:
        return Split(
            tokens=self.tokens, documents=self.documents, text_bytes=self.text_bytes, sha256=self._sha256.hexdigest()
        )


def _cut(document: Document, split: str) -> Iterator[_Piece]:
    """Cut a long document before a space between letters, where a byte-level BPE always starts a word."""
    text, start = document.text, 0
    while len(text) - start > _BATCH_CHARACTERS:
        stop = start + _BATCH_CHARACTERS
        stop = next((at for at in range(stop, stop - _CUT_WITHIN, -1) if _between_words(text, at)), stop)
        yield _Piece(text[start:stop], split, document.origin, ends=False)
        start = stop
    yield _Piece(text[start:] if start else text, split, document.origin, ends=True)


def _between_words(text: str, at: int) -> bool:
    return text[at] == " " and text[at - 1].isalpha() and text[at + 1 : at + 2].isalpha()


def _batches(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    batch: list[_Piece] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text) + 64
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


_Encoded = list[tuple[_Piece, UInt[np.ndarray, " tokens"]]]


def _encoder(tokenizer: Tokenizer, dtype: np.dtype[Any], end: int) -> Callable[[list[_Piece]], _Encoded]:
    """Encode a batch as ordinary text: `<|endoftext|>` in a document is encoded by its letters."""
    serialised, of_thread = tokenizer.to_str(), threading.local()

    def thread_tokenizer() -> Tokenizer:
        # A tokenizer holds a lock, so threads that share one run one at a time.
        if not hasattr(of_thread, "tokenizer"):
            of_thread.tokenizer = Tokenizer.from_str(serialised)
            of_thread.tokenizer.encode_special_tokens = True
            of_thread.tokenizer.no_truncation()
            of_thread.tokenizer.no_padding()
        return of_thread.tokenizer

    def encode(batch: list[_Piece]) -> _Encoded:
        encoded = []
        encodings = thread_tokenizer().encode_batch_fast([piece.text for piece in batch], add_special_tokens=False)
        for piece, encoding in zip(batch, encodings, strict=True):
            ids = encoding.ids
            tokens = np.array([*ids, end] if piece.ends else ids, dtype=dtype)
            if np.count_nonzero(tokens == end) > piece.ends:
                raise CrateError(
                    f"{piece.origin}: this tokenizer gives {tokenizer.id_to_token(end)!r}, the end of a document, for "
                    "ordinary text. Hint: name another token with --end-token, or use another tokenizer"
                )
            encoded.append((piece, tokens))
        return encoded

    return encode


def _in_order(
    encode: Callable[[list[_Piece]], _Encoded], batches: Iterator[list[_Piece]], workers: int
) -> Iterator[_Encoded]:
    """Encode on `workers` threads, the results in order, with at most two batches a thread in flight."""
    waiting: collections.deque[Future[_Encoded]] = collections.deque()
    with _one_thread_per_call(), ThreadPoolExecutor(workers) as pool:
        for batch in batches:
            waiting.append(pool.submit(encode, batch))
            if len(waiting) >= 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@contextlib.contextmanager
def _one_thread_per_call() -> Iterator[None]:
    """Disable the library's thread pool: the threads here are faster, respect `workers`, and are safe before a fork."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
