"""Text for training: files, compressed files, folders, or Python's own source.

A corpus is a list of documents in an order that depends on nothing but the files'
names. The same corpus therefore always gives the same training and validation text.
"""

import gzip
import lzma
import os
import sys
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Sequence
from io import BufferedIOBase
from pathlib import Path
from typing import NamedTuple

import numpy as np
import zstandard

from jattn.train.config import UserError

_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
_CHUNK = 1 << 20
_UNPACKING_ERRORS = (
    EOFError,
    gzip.BadGzipFile,
    lzma.LZMAError,
    zlib.error,
    zstandard.ZstdError,
)


class Document(NamedTuple):
    """A run of text that is modelled on its own.

    Attributes:
      name: Where it comes from, for error messages.
      text: Its bytes.
    """

    name: str
    text: bytes


def read_corpus(
    paths: Sequence[str | os.PathLike], max_bytes: int | None = None
) -> list[Document]:
    """Reads the documents of files and folders, in a fixed shuffled order.

    Each file is a document; `.gz`, `.xz` and `.zst` are unpacked. In a folder, which
    is read recursively, hidden files, empty files and files with a NUL byte near
    their beginning are left out. A document longer than a fiftieth of the corpus
    (and than 1 KiB) is cut into documents of about that length, at line ends where
    there are any, so that even one long file can be split into training and
    validation text.

    Args:
      paths: Files and folders; the source of Python's standard library, without its
        tests, if there are none.
      max_bytes: Reading stops after this many bytes; None for no limit.

    Raises:
      UserError: A path does not exist, cannot be read or unpacked, or holds no text.
    """
    limit = sys.maxsize if max_bytes is None else max_bytes
    if paths:
        # No file twice: a copy in the validation text would make it easy.
        files = list(dict.fromkeys(f for path in paths for f in _files(Path(path))))
    else:
        files = list(_standard_library())
    files = [files[i] for i in np.random.default_rng(0).permutation(len(files))]
    explicit = {Path(path) for path in paths}
    documents, size = [], 0
    for file in files:
        if size >= limit:
            break
        text = _read(file, limit - size)
        if file not in explicit and (not text or b"\0" in text[:8192]):
            continue
        if not text:
            raise UserError(f"{file} is empty; training needs a file with text in it")
        documents.append(Document(str(file), text))
        size += len(text)
    if not documents:
        where = ", ".join(str(path) for path in paths)
        raise UserError(f"{where} holds no text files to train on")
    longest = max(size // 50, 1024)
    return [piece for document in documents for piece in _cut(document, longest)]


def split_corpus(
    documents: Sequence[Document], validation_fraction: float
) -> tuple[list[Document], list[Document]]:
    """Training and validation documents, the latter at least that part of the bytes.

    The choice depends on the corpus alone, not on a seed, so that all runs on a
    corpus are measured on the same text.

    Raises:
      UserError: The corpus is a single document.
    """
    if len(documents) < 2:
        raise UserError(
            f"{documents[0].name} is too short to be split into training and "
            f"validation text; it has {len(documents[0].text)} bytes and needs more "
            "than 1024"
        )
    order = np.random.default_rng(1).permutation(len(documents))
    wanted = validation_fraction * sum(len(document.text) for document in documents)
    train, validation, held_out = [], [], 0
    for i in order[:-1]:
        if held_out < wanted:
            validation.append(documents[i])
            held_out += len(documents[i].text)
        else:
            train.append(documents[i])
    train.append(documents[order[-1]])
    return train, validation


class Entropies(NamedTuple):
    """What a model that only counts bytes would reach, in bits per byte.

    Attributes:
      unigram: H(x[t]), knowing how often each byte occurs.
      bigram: H(x[t] | x[t-1]), knowing how often each byte follows each other one.
    """

    unigram: float
    bigram: float


def entropies(documents: Iterable[Document]) -> Entropies:
    """Empirical entropies of the documents' own bytes.

    The frequencies are those of the same text, as if they were known beforehand;
    a model that had to learn them elsewhere could only do worse.
    """
    unigrams, bigrams = np.zeros(256, np.int64), np.zeros(65536, np.int64)
    for document in documents:
        text = np.frombuffer(document.text, np.uint8).astype(np.int64)
        unigrams += np.bincount(text, minlength=256)
        bigrams += np.bincount(text[:-1] * 256 + text[1:], minlength=65536)
    joint = bigrams.reshape(256, 256)
    return Entropies(
        unigram=_entropy(unigrams),
        bigram=_entropy(bigrams) - _entropy(joint.sum(axis=1)),
    )


def _entropy(counts: np.ndarray) -> float:
    frequencies = counts[counts > 0] / max(counts.sum(), 1)
    return float(-(frequencies * np.log2(frequencies)).sum())


def _files(path: Path) -> Iterator[Path]:
    """The file itself, or the files of a folder in order of their names."""
    if not path.exists():
        raise UserError(f"{path} does not exist; a file or folder with text is needed")
    if not path.is_dir():
        yield path
        return
    for folder, subfolders, names in path.walk():
        subfolders[:] = sorted(name for name in subfolders if name[0] != ".")
        for name in sorted(names):
            if name[0] != "." and (folder / name).is_file():
                yield folder / name


def _standard_library() -> Iterator[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    for folder, subfolders, names in root.walk():
        subfolders[:] = sorted(set(subfolders) - _SKIPPED_FOLDERS)
        yield from (folder / name for name in sorted(names) if name.endswith(".py"))


def _read(file: Path, limit: int) -> bytes:
    """The first `limit` bytes of a file, unpacked."""
    try:
        match file.suffix.lower():
            case ".gz":
                with gzip.open(file) as stream:
                    text = _read_stream(stream, limit)
            case ".xz":
                with lzma.open(file) as stream:
                    text = _read_stream(stream, limit)
            case ".zst":
                text = _read_zstd(file, limit)
            case _:
                with file.open("rb") as stream:
                    text = _read_stream(stream, limit)
    except _UNPACKING_ERRORS as error:
        raise UserError(f"{file} cannot be unpacked: {error}") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    return text[: _boundary(text, len(text))] if len(text) == limit else text


def _read_stream(stream: BufferedIOBase, limit: int) -> bytes:
    # In chunks, because read(limit) sets that much memory aside beforehand.
    text = bytearray()
    while chunk := stream.read(min(_CHUNK, limit - len(text))):
        text += chunk
    return bytes(text)


def _read_zstd(file: Path, limit: int) -> bytes:
    # Frame by frame, because zstandard's own reader takes a frame that breaks off
    # for the end of the file.
    decompressor = zstandard.ZstdDecompressor()
    text, frame = bytearray(), None
    with file.open("rb") as stream:
        while len(text) < limit and (chunk := stream.read(_CHUNK)):
            while chunk:
                if frame is None:
                    frame = decompressor.decompressobj()
                text += frame.decompress(chunk)
                chunk = frame.unused_data
                if frame.eof:
                    frame = None
    if len(text) < limit and frame is not None:
        raise EOFError("the compressed data breaks off")
    return bytes(text[:limit])


def _cut(document: Document, longest: int) -> Iterator[Document]:
    name, text = document
    while len(text) > longest:
        line_end = text.rfind(b"\n", longest // 2, longest) + 1
        end = line_end or _boundary(text, longest)
        yield Document(name, text[:end])
        text = text[end:]
    yield Document(name, text)


def _boundary(text: bytes, end: int) -> int:
    """The last position up to `end` that does not split a UTF-8 character."""
    start = end
    # A character is at most four bytes: a lead byte and up to three of 10xxxxxx.
    while start > max(end - 4, 0):
        start -= 1
        if text[start] & 0xC0 != 0x80:
            break
    lead = text[start] if text else 0
    width = 4 if lead >= 0xF0 else 3 if lead >= 0xE0 else 2 if lead >= 0xC0 else 1
    return end if start + width <= end or start == 0 else start
