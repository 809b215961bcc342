"""Open the tokens that a command reads, and check that they fit the model."""

from pathlib import Path
from typing import TYPE_CHECKING

from cratelm.errors import CrateError
from cratelm.workflows.opening import OpenModel
from cratelm.workflows.options.counts import whole_number

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from cratelm.activations.subject import Corpus
    from cratelm.data.tokens import TokenDirectory


def read_count(text: str) -> int | None:
    """`8.2M` -> 8200000, `all` -> None."""
    if text == "all":
        return None
    try:
        count = whole_number(text)
    except ValueError:
        count = 0
    if count < 1:
        raise CrateError(f"--tokens must be all or a number such as 200000, 200k, 8.2M or 1G, got {text!r}")
    return count


def open_tokens(opened: OpenModel, folder: Path, tokenizer: str | None = None) -> "TokenDirectory":
    """Open a token directory and check that its tokenizer is the model's and that the model has all its tokens.

    `tokenizer` names the tokenizer of a nanoGPT directory, which has no tokens.json.
    """
    data = _open_checked(opened, folder, tokenizer)
    if data.vocab_size > (rows := opened.causal.vocabulary_rows):
        raise CrateError(
            f"the vocabulary of {folder} must have at most the {rows} tokens of the model of {opened.source}, got "
            f"{data.vocab_size}. Hint: tokenize with the model's tokenizer"
        )
    return data


def open_corpus(
    opened: OpenModel, folder: Path, split: str, tokenizer: str | None = None
) -> "tuple[Corpus, Tokenizer]":  # fmt: skip
    """A split for a model to read, and the tokenizer that made it: the model's own, or the named one if it has none.

    Only the token ids that occur must be in the model's vocabulary.
    """
    from cratelm.activations.subject import Corpus
    from cratelm.data.tokenizer import load_tokenizer

    if opened.known_tokenizer is None and tokenizer is None:
        raise CrateError(
            f"the model of {opened.source} has no tokenizer.json to compare with the tokenizer of the tokens. Hint: "
            "add it, or give the model's tokenizer with --tokenizer"
        )
    known = opened.known_tokenizer or load_tokenizer(str(tokenizer))
    data = _open_checked(opened, folder, tokenizer, known)
    tokens, rows = data.tokens(split), opened.causal.vocabulary_rows
    if data.vocab_size > rows and (largest := int(tokens.max())) >= rows:
        raise CrateError(
            f"the tokens of {data.path / split}.bin must be at most {rows - 1}, the model's vocabulary, got {largest}. "
            "Hint: tokenize with the model's tokenizer"
        )
    identity = {"split": split, "tokenizer_hash": data.tokenizer_hash, "data_hash": data.splits[split].sha256}
    corpus = Corpus(
        tokens=tokens, documents=data.documents(split), end_of_text=data.end_of_text, identity=identity,
        begin_of_text=data.begin_of_text,
    )  # fmt: skip
    return corpus, known


def row_beginning(opened: "OpenModel", corpus: "Corpus | TokenDirectory") -> tuple[int, ...] | None:
    """Tokens before every row over a corpus: what --begin-token named when tokenizing, else the model's own.

    A model of this package reads prompts as it was trained or imported, so other rows are a CrateError.
    """
    known, named = opened.causal.row_beginning, corpus.begin_of_text
    if named is None or named == known:
        return known
    if opened.foreign is None:
        texts = ["".join(opened.strings[token] for token in tokens) for tokens in (known or (), named)]
        raise CrateError(
            f"the tokens must begin rows as the model of {opened.source} does ({texts[0] or 'no --begin-token'}), got "
            f"--begin-token {texts[1]}. Hint: tokenize {f'with --begin-token {texts[0]}' if known else 'without it'}"
        )
    return named


def _open_checked(
    opened: OpenModel, folder: Path, named: str | None, tokenizer: "Tokenizer | None" = None
) -> "TokenDirectory":  # fmt: skip
    from cratelm.data.tokenizer import tokenizer_hash
    from cratelm.data.tokens import TokenDirectory

    data, known = TokenDirectory.open(folder, tokenizer=named), tokenizer or opened.known_tokenizer
    if known is not None and tokenizer_hash(known) != data.tokenizer_hash:
        inside = opened.source / "model" / "tokenizer.json"
        raise CrateError(
            f"the tokens of {folder} come from another tokenizer than the model of {opened.source}. "
            f"Hint: cratelm tokenize SOURCE --tokenizer {inside if inside.exists() else opened.source} --out DIR"
        )
    return data
