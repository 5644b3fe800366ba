"""From documents to batches: tokens, pieces of one context, packed rows, batches."""

import dataclasses
import itertools
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, SupportsIndex

import grain
import numpy as np
import tokenizers

from jattn.train.config import DataConfig, TrainConfig, UserError, differing
from jattn.train.corpus import (
    Document,
    Entropies,
    entropies,
    read_corpus,
    split_corpus,
)

# The segment of padding; those of documents are greater.
PADDING_SEGMENT = 0


class Batch(NamedTuple):
    """Rows of packed documents.

    Attributes:
      tokens: int32 [B, T].
      segment_ids: int32 [B, T], 1, 2, ... along a row, one for each document in it;
        PADDING_SEGMENT where there is only padding.
      num_bytes: int32 [B, T], how many bytes of text a token stands for; 0 for
        padding.
    """

    tokens: Any
    segment_ids: Any
    num_bytes: Any


class Encoded(NamedTuple):
    """A document's tokens.

    Attributes:
      tokens: int32 [n].
      num_bytes: int32 [n], how many bytes of text each stands for.
    """

    tokens: np.ndarray
    num_bytes: np.ndarray


class Tokenizer(Protocol):
    """What text is made of. Ids past vocab_size are free for special tokens."""

    vocab_size: int

    def encode(self, documents: Sequence[Document]) -> list[Encoded]:
        """What each document consists of."""
        ...

    def decode(self, tokens: Sequence[int]) -> bytes:
        """The text of tokens; special ones stand for nothing."""
        ...


def bos_id(vocab_size: int) -> int:
    """The token before the first one of a document, past those of the tokenizer."""
    return vocab_size


def mask_id(vocab_size: int) -> int:
    """The token that hides another one, past those of the tokenizer."""
    return vocab_size + 1


class ByteTokenizer:
    """Every byte is a token."""

    vocab_size = 256

    def encode(self, documents: Sequence[Document]) -> list[Encoded]:
        """See `Tokenizer`."""
        tokens = [np.frombuffer(x.text, np.uint8).astype(np.int32) for x in documents]
        return [Encoded(x, np.ones_like(x)) for x in tokens]

    def decode(self, tokens: Sequence[int]) -> bytes:
        """See `Tokenizer`."""
        return bytes(token for token in tokens if token < 256)


class FileTokenizer:
    """A tokenizer saved as JSON by the `tokenizers` library.

    Raises:
      UserError: The file does not exist or is not such a tokenizer.
    """

    def __init__(self, path: str | os.PathLike):
        if not Path(path).is_file():
            raise UserError(f"{path} does not exist; a tokenizer file is needed")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more specific
            raise UserError(
                f"{path} is not a tokenizer saved by the tokenizers library: {error}"
            ) from error
        self.vocab_size = self._tokenizer.get_vocab_size()

    def encode(self, documents: Sequence[Document]) -> list[Encoded]:
        """See `Tokenizer`; raises UserError for text that is not UTF-8."""
        encoded = []
        # Documents of one call run side by side; what the library says of all of them
        # takes many times the memory of the text.
        for some in itertools.batched(documents, os.cpu_count() or 1):
            texts = [_utf8(document) for document in some]
            found = self._tokenizer.encode_batch(texts, add_special_tokens=False)
            encoded += [_encoded(*pair) for pair in zip(texts, found, strict=True)]
        return encoded

    def decode(self, tokens: Sequence[int]) -> bytes:
        """See `Tokenizer`."""
        known = [token for token in tokens if token < self.vocab_size]
        return self._tokenizer.decode(known).encode()


def _utf8(document: Document) -> str:
    try:
        return document.text.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{document.name} is not UTF-8 text ({error.reason} at byte "
            f"{error.start}), which a tokenizer needs; without one it can be read "
            "as bytes"
        ) from error


def _encoded(text: str, encoding: tokenizers.Encoding) -> Encoded:
    """What a tokenizer made of a text."""
    tokens = np.asarray(encoding.ids, np.int32)
    # Token i stands for the bytes after token i-1's end up to its own end, so that
    # every byte counts once even where tokens overlap or leave out spaces.
    chars = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    widths = 1 + (chars > 0x7F) + (chars > 0x7FF) + (chars > 0xFFFF)
    byte_ends = np.concatenate([[0], np.cumsum(widths)])
    ends = byte_ends[np.array([end for _, end in encoding.offsets], np.int64)]
    ends = np.maximum.accumulate(ends)
    if len(ends):
        ends[-1] = byte_ends[-1]
    return Encoded(tokens, np.diff(ends, prepend=0).astype(np.int32))


def load_tokenizer(path: str | os.PathLike | None) -> ByteTokenizer | FileTokenizer:
    """The tokenizer of a file, or bytes if there is none."""
    return ByteTokenizer() if path is None else FileTokenizer(path)


class Dataset:
    """The training and validation text of a configuration.

    A document is cut into pieces of at most one context, each of which is modelled
    on its own; short pieces share a row.

    Attributes:
      tokenizer: What the tokens mean.
      vocab_size: Tokens of the tokenizer.
      entropies: Of the validation text's bytes.
      train_bytes: Bytes of training text.
      validation_bytes: Bytes of validation text.
      fingerprint: Changes whenever a training token does.
    """

    def __init__(self, config: DataConfig, *, seed: int = 0, align: int = 1):
        """Reads the corpus.

        Args:
          config: What to read and how to batch it.
          seed: Of the order in which training pieces are drawn.
          align: Documents start at multiples of this in their rows.

        Raises:
          UserError: The text cannot be read, or there is too little of it.
        """
        self._config, self._seed, self._align = config, seed, align
        self.tokenizer = load_tokenizer(config.tokenizer)
        self.vocab_size = self.tokenizer.vocab_size
        train, validation = split_corpus(
            read_corpus(config.paths, config.max_bytes), config.validation_fraction
        )
        self.entropies: Entropies = entropies(validation)
        self.train_bytes = sum(len(document.text) for document in train)
        self.validation_bytes = sum(len(document.text) for document in validation)
        self._train = _Pieces(train, self.tokenizer, config.context_length)
        self._validation = _Pieces(validation, self.tokenizer, config.context_length)
        for pieces, what in ((self._train, "training"), (self._validation, "held-out")):
            if pieces.num_tokens < config.context_length:
                raise UserError(
                    f"there is too little text: {pieces.num_tokens} {what} tokens do "
                    f"not fill one context of {config.context_length}; give more text "
                    "or a smaller context length"
                )
        self.fingerprint = self._train.fingerprint

    @classmethod
    def of(cls, config: TrainConfig, data: "Dataset | None" = None) -> "Dataset":
        """The text of a run.

        Args:
          config: Of the run.
          data: That text if it has been read, which may take long; read now if None.

        Raises:
          UserError: As of `Dataset`; or data is not what this run reads.
        """
        if data is None:
            return cls(config.data, seed=config.seed, align=config.align)
        there, here = (
            dataclasses.asdict(text) | {"seed": seed, "align": align}
            for text, seed, align in (
                (data._config, data._seed, data._align),
                (config.data, config.seed, config.align),
            )
        )
        if different := differing(there, here):
            raise UserError(f"data was read for another run: {'; '.join(different)}")
        return data

    def train_iterator(self) -> grain.DatasetIterator:
        """Endless batches, in an order drawn anew from the seed in every epoch.

        The iterator's get_state() can be written as JSON; set_state() continues
        with exactly the batch that came next.
        """
        rows = (
            grain.MapDataset.source(self._train)
            .seed(self._seed)
            .shuffle()
            .repeat()
            .to_iter_dataset(_READ_OPTIONS)
        )
        return iter(self._batches(rows, seed=self._seed))

    def validation_batches(self, count: int) -> list[Batch]:
        """The first `count` batches of the shuffled validation text.

        Always the same ones, of the same size; fewer if there is not so much text,
        the last of them filled up with padding.
        """
        pieces = grain.MapDataset.source(self._validation).seed(0).shuffle()
        rows = self._batches(pieces.to_iter_dataset(_READ_OPTIONS), seed=0)
        batches = [batch for batch, _ in zip(rows, range(count), strict=False)]
        missing = self._config.batch_size - len(batches[-1].tokens)
        batches[-1] = Batch(*(np.pad(x, [(0, missing), (0, 0)]) for x in batches[-1]))
        return batches

    def _batches(self, pieces: grain.IterDataset, *, seed: int) -> grain.IterDataset:
        lengths = dict.fromkeys(("tokens", "num_bytes"), self._config.context_length)
        return (
            grain.experimental.FirstFitPackIterDataset(
                pieces,
                length_struct=lengths,
                pack_alignment_struct=dict.fromkeys(lengths, self._align),
                num_packing_bins=_PACKED_ROWS,
                seed=seed,
            )
            .batch(self._config.batch_size)
            .map(_to_batch)
        )


# A piece is a slice of an array: threads that read ahead cost more than they save.
# The host packs batches while the device works on the steps before.
_READ_OPTIONS = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


# Rows filled side by side: with more of them a short piece finds a row it fits into.
_PACKED_ROWS = 64


def _to_batch(packed: dict[str, np.ndarray]) -> Batch:
    return Batch(
        tokens=packed["tokens"],
        segment_ids=packed["tokens_segment_ids"],
        num_bytes=packed["num_bytes"],
    )


class _Pieces:
    """Random access to the pieces of tokenised documents."""

    def __init__(
        self, documents: Sequence[Document], tokenizer: Tokenizer, context_length: int
    ):
        encoded = tokenizer.encode(documents)
        self._tokens = np.concatenate([x.tokens for x in encoded])
        self._num_bytes = np.concatenate([x.num_bytes for x in encoded])
        self._bounds = list(
            _piece_bounds([len(x.tokens) for x in encoded], context_length)
        )
        self.num_tokens = len(self._tokens)
        self.fingerprint = zlib.crc32(self._tokens.tobytes())

    def __len__(self) -> int:
        return len(self._bounds)

    def __getitem__(self, index: SupportsIndex) -> dict[str, np.ndarray]:
        start, stop = self._bounds[index]
        return {
            "tokens": self._tokens[start:stop],
            "num_bytes": self._num_bytes[start:stop],
        }


def _piece_bounds(
    lengths: Sequence[int], context_length: int
) -> Iterator[tuple[int, int]]:
    start = 0
    for length in lengths:
        stop = start + length
        for piece in range(start, stop, context_length):
            yield piece, min(piece + context_length, stop)
        start = stop
