"""jattn.train.corpus and jattn.train.data: from files to batches."""

import collections
import gzip
import itertools
import json
import lzma
import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tokenizers
import zstandard

from jattn.train import DataConfig, Dataset, UserError, load_tokenizer
from jattn.train.corpus import Document, entropies, read_corpus, split_corpus
from tests.train.runs import text, write_text

PACKERS = {
    ".txt": lambda data: data,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    # Two frames, as concatenated files have.
    ".zst": lambda data: (
        zstandard.compress(data[:999]) + zstandard.compress(data[999:])
    ),
}


@pytest.mark.parametrize("suffix", PACKERS)
def test_packed_files_read_as_the_text_in_them(tmp_path, suffix):
    path = tmp_path / f"file{suffix}"
    path.write_bytes(PACKERS[suffix](text(20_000)))
    documents = read_corpus([path])
    assert b"".join(document.text for document in documents) == text(20_000)
    limited = read_corpus([path], max_bytes=5_000)
    assert b"".join(document.text for document in limited) == text(5_000)


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("damage", ["breaks off", "is something else"])
def test_damaged_files_are_named(tmp_path, suffix, damage):
    path = tmp_path / f"file{suffix}"
    packed = PACKERS[suffix](text(20_000))
    path.write_bytes(packed[:-20] if damage == "breaks off" else text(100))
    with pytest.raises(UserError, match=f"file{suffix} cannot be unpacked"):
        read_corpus([path])


def test_a_folder_is_read_recursively(tmp_path):
    (tmp_path / "sub" / ".git").mkdir(parents=True)
    (tmp_path / "b.py").write_text("b")
    (tmp_path / "sub" / "a.txt.gz").write_bytes(gzip.compress(b"a"))
    (tmp_path / "sub" / "empty.txt").touch()
    (tmp_path / "sub" / "image").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "sub" / ".git" / "config").write_text("hidden")
    documents = read_corpus([tmp_path, tmp_path / "b.py"])
    assert sorted(document.text for document in documents) == [b"a", b"b"]
    # A file that is named is read whatever is in it.
    (binary,) = read_corpus([tmp_path / "sub" / "image"])
    assert binary.text == b"\x89PNG\0\0"


def test_the_default_corpus_is_the_standard_library():
    documents = read_corpus([], max_bytes=300_000)
    assert sum(len(document.text) for document in documents) == 300_000
    assert documents == read_corpus([], max_bytes=300_000)
    assert all(document.name.endswith(".py") for document in documents)
    assert not any("/test/" in document.name for document in documents)
    assert len({document.name for document in documents}) > 3


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "does not exist"), (b"", "is empty"), (b"short", "too short")],
)
def test_errors_name_the_file(tmp_path, content, message):
    path = tmp_path / "corpus.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=rf"corpus.txt .*{message}"):
        split_corpus(read_corpus([path]), 0.1)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no text"):
        read_corpus([tmp_path])


@hypothesis.given(st.text("aé世🙂\n", min_size=600, max_size=900), st.booleans())
def test_long_documents_are_cut_between_characters(tmp_path_factory, content, lines):
    content = (content + "\n" * lines) * 5
    path = tmp_path_factory.mktemp("corpus") / "long.txt"
    path.write_bytes(content.encode())
    documents = read_corpus([path])
    assert "".join(document.text.decode() for document in documents) == content
    longest = max(len(content.encode()) // 50, 1024)
    assert all(0 < len(document.text) <= longest for document in documents)


def test_documents_end_with_lines(tmp_path):
    for document in read_corpus([write_text(tmp_path, 100_000)])[:-1]:
        assert document.text.endswith(b"\n")
        assert len(document.text) > 1900


def test_the_split_holds_out_whole_documents(tmp_path):
    documents = read_corpus([write_text(tmp_path, 100_000)])
    train, validation = split_corpus(documents, 0.1)
    assert sorted(train + validation) == sorted(documents)
    assert 10_000 <= sum(len(document.text) for document in validation) <= 12_000
    assert (train, validation) == split_corpus(documents, 0.1)
    assert documents.index(validation[0]) != 0  # not simply the beginning


def test_entropies_against_counting():
    documents = [Document("a", b"abracadabra"), Document("b", b"banana")]
    unigrams = collections.Counter(b"abracadabra" + b"banana")
    pairs = collections.Counter()
    for _, string in documents:
        pairs.update(itertools.pairwise(string))
    firsts = collections.Counter()
    for (first, _), count in pairs.items():
        firsts[first] += count
    bigram = -sum(
        count / pairs.total() * math.log2(count / firsts[first])
        for (first, _), count in pairs.items()
    )
    unigram = -sum(
        count / unigrams.total() * math.log2(count / unigrams.total())
        for count in unigrams.values()
    )
    found = entropies(documents)
    assert found.unigram == pytest.approx(unigram, rel=1e-12)
    assert found.bigram == pytest.approx(bigram, rel=1e-12)


def dataset(path, seed=0, align=1, **fields):
    values = dict(context_length=64, batch_size=4, validation_fraction=0.2) | fields
    return Dataset(DataConfig(paths=(path,), **values), seed=seed, align=align)


def documents_of(batch):
    """The documents of a batch as bytes, after checking how they are packed."""
    for tokens, segments, num_bytes in zip(*batch, strict=True):
        np.testing.assert_array_equal(num_bytes, segments > 0)
        for segment in range(1, segments.max() + 1):
            where = np.flatnonzero(segments == segment)
            np.testing.assert_array_equal(np.diff(where), 1)
            yield int(where[0]), bytes(tokens[where].tolist())


@pytest.mark.parametrize("align", [1, 8])
def test_an_epoch_holds_every_piece_once(tmp_path, align):
    path = write_text(tmp_path, 20_000)
    train, _ = split_corpus(read_corpus([path]), 0.2)
    expected = collections.Counter(
        document.text[start : start + 64]
        for document in train
        for start in range(0, len(document.text), 64)
    )
    data = dataset(path, align=align)
    assert data.train_bytes == sum(len(document.text) for document in train)
    batches = data.train_iterator()
    found, tokens, shared = collections.Counter(), 0, False
    while not expected <= found:
        batch = next(batches)
        assert batch.tokens.shape == (4, 64)
        assert batch.tokens.dtype == np.int32
        tokens += int((batch.segment_ids > 0).sum())
        for start, piece in documents_of(batch):
            assert start % align == 0
            shared |= start > 0
            found[piece] += 1
        # Rows are packed 64 at a time, so an epoch may end that much later.
        assert tokens < data.train_bytes + 2 * 64 * 64
    assert set(found) == set(expected)
    assert shared


def test_the_order_is_the_seed_s_and_changes_between_epochs(tmp_path):
    path = write_text(tmp_path, 6_000)

    def rows(seed, count=60):
        batches = dataset(path, seed).train_iterator()
        return [next(batches).tokens.tobytes() for _ in range(count)]

    one = rows(0)
    assert one == rows(0)
    assert one != rows(1)
    assert len(set(one)) > 50  # an epoch is about 20 batches


def test_the_iterator_continues_where_its_state_says(tmp_path):
    path = write_text(tmp_path)
    batches = dataset(path, align=8).train_iterator()
    for skipped in (0, 1, 6, 50):
        for _ in range(skipped):
            next(batches)
        state = json.loads(json.dumps(batches.get_state()))
        expected = [next(batches) for _ in range(7)]
        restored = dataset(path, align=8).train_iterator()
        restored.set_state(state)
        np.testing.assert_array_equal([next(restored) for _ in range(7)], expected)


def test_validation_batches_are_always_the_same(tmp_path):
    path = write_text(tmp_path)
    batches = dataset(path).validation_batches(3)
    np.testing.assert_array_equal(batches, dataset(path, 1).validation_batches(3))
    _, validation = split_corpus(read_corpus([path]), 0.2)
    held_out = b"".join(document.text for document in validation)
    everything = dataset(path).validation_batches(10_000)
    assert {batch.tokens.shape for batch in everything} == {(4, 64)}
    pieces = [piece for batch in everything for _, piece in documents_of(batch)]
    assert sum(map(len, pieces)) == len(held_out)
    assert all(piece in held_out for piece in pieces)


def test_the_fingerprint_follows_the_training_text(tmp_path):
    path = write_text(tmp_path)
    one = dataset(path).fingerprint
    assert one == dataset(path, seed=1).fingerprint
    write_text(tmp_path, 19_999)
    assert one != dataset(path).fingerprint


def test_too_little_text_for_a_context(tmp_path):
    with pytest.raises(UserError, match="held-out tokens do not fill one context"):
        dataset(write_text(tmp_path, 5_000), context_length=2048)


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    """A byte-pair tokenizer that knows the words of the text."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text(5_000).decode()], trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return str(path)


@hypothesis.given(content=st.text("aé世🙂 \n\u0301", max_size=30))
def test_a_tokenizer_s_tokens_share_out_all_bytes(tokenizer_file, content):
    tokenizer = load_tokenizer(tokenizer_file)
    document = Document("d", f"the cat {content} sat".encode())
    ((tokens, num_bytes),) = tokenizer.encode([document])
    assert tokens.shape == num_bytes.shape
    assert num_bytes.sum() == len(document.text)
    assert num_bytes.min() >= 0
    assert tokenizer.decode(tokens.tolist()).strip() == document.text.strip()


def test_words_are_tokens_of_their_bytes(tokenizer_file):
    tokenizer = load_tokenizer(tokenizer_file)
    ((_, num_bytes),) = tokenizer.encode([Document("d", b" the cat")])
    assert num_bytes.tolist() == [4, 4]


def test_a_dataset_of_a_tokenizer(tmp_path, tokenizer_file):
    data = dataset(write_text(tmp_path), tokenizer=tokenizer_file)
    assert data.vocab_size == load_tokenizer(tokenizer_file).vocab_size > 256
    batches = data.validation_batches(10_000)
    assert sum(batch.num_bytes.sum() for batch in batches) == data.validation_bytes
    assert sum((batch.segment_ids > 0).sum() for batch in batches) < (
        data.validation_bytes / 2
    )


def test_tokenizer_errors(tmp_path, tokenizer_file):
    with pytest.raises(UserError, match=r"nothing.json does not exist"):
        load_tokenizer(tmp_path / "nothing.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(UserError, match=r"bad.json is not a tokenizer"):
        load_tokenizer(tmp_path / "bad.json")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n" * 1000)
    with pytest.raises(UserError, match=r"latin.txt is not UTF-8 .* at byte 3"):
        dataset(str(tmp_path / "latin.txt"), tokenizer=tokenizer_file)


def test_the_byte_tokenizer_leaves_out_special_tokens():
    tokenizer = load_tokenizer(None)
    ((tokens, num_bytes),) = tokenizer.encode([Document("d", b"a\xff")])
    assert tokens.tolist() == [97, 255]
    assert num_bytes.tolist() == [1, 1]
    assert tokenizer.decode([256, 97, 257, 255]) == b"a\xff"
