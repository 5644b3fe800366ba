"""Streamed text: the same as all at once, and whole characters only."""

import jax
import jax.numpy as jnp
import pytest
import tokenizers

import jattn
from jattn.models import Sampling
from jattn.train import UserError, build_model, generate, load_tokenizer
from jattn.train.generate import PIECE, encode_prompt, stream_text
from jattn.train.step import init_params
from tests.train import runs

BYTES = load_tokenizer(None)


@pytest.fixture(scope="module")
def dense():
    config = runs.config("", context_length=64)
    model = build_model(config, 256)
    return model, jax.jit(lambda: init_params(model, config))()


def stream(model, params, prompt, count, tokenizer=BYTES, seed=0, **sampling):
    return list(
        stream_text(
            *(model, params, tokenizer, prompt),
            max_new_tokens=count,
            sampling=Sampling(**sampling),
            seed=seed,
        )
    )


@pytest.mark.parametrize(
    ("prompt", "count", "sampling"),
    [
        ("the c\u00e4t", 2 * PIECE + 5, {"temperature": 1.0, "top_p": 0.9}),
        ("", 2 * PIECE, {"temperature": 0.0}),
        ("the cat", 3, {"temperature": 0.5, "top_k": 5}),
    ],
)
def test_a_stream_is_what_one_call_generates(dense, prompt, count, sampling):
    pieces = stream(*dense, prompt, count, seed=3, **sampling)
    assert len(pieces) == -(-count // PIECE) + 1
    model, params = dense
    tokens = jattn.generate(
        model,
        {"params": params},
        jnp.asarray([list(prompt.encode())], jnp.int32),
        max_new_tokens=count,
        rng=jax.random.key(3),
        **sampling,
    )
    # Tokens past the bytes, such as the one a document begins with, stand for nothing.
    text = bytes(token for token in tokens[0].tolist() if token < 256)
    assert "".join(pieces) == text.decode(errors="replace")


def test_the_seed_makes_the_text(dense):
    one, same, other = (stream(*dense, "a", PIECE, seed=s) for s in (1, 1, 2))
    assert one == same != other


class Scripted:
    """A stand-in for a model whose continuation is known."""

    def init_cache(self):
        raise NotImplementedError


def scripted(monkeypatch, tokens, prompt, tokenizer):
    def prefill(model, params, prompt, **kwargs):
        return 0

    def decode(model, params, position, *, num_tokens, sampling):
        end = position + num_tokens
        return jnp.asarray([tokens[position:end]]), end

    monkeypatch.setattr(generate, "prefill", prefill)
    monkeypatch.setattr(generate, "decode", decode)
    return stream(Scripted(), {}, prompt, len(tokens), tokenizer)


# Every character of more than one byte falls on the end of some piece.
TEXTS = [
    "-" * shift + "".join(f"{'.' * (PIECE - 3)}\u00e9\u20ac\U0001f600" for _ in "abcd")
    for shift in range(8)
]


@pytest.mark.parametrize("text", TEXTS)
def test_characters_come_whole(monkeypatch, text):
    pieces = scripted(monkeypatch, list(text.encode()), "\u00fc", BYTES)
    assert "".join(pieces) == text


def test_bytes_that_are_no_text(monkeypatch):
    text = b"ab\xff" + b"." * (PIECE - 4) + b"\xe2\x82" + b"c\xf0\x9f"
    pieces = scripted(monkeypatch, list(text), "", BYTES)
    assert "".join(pieces) == text.decode(errors="replace")
    assert "".join(pieces).endswith("c\N{REPLACEMENT CHARACTER}")


def save(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    return load_tokenizer(path)


@pytest.mark.parametrize("text", TEXTS[:3])
def test_characters_of_several_tokens_come_whole(monkeypatch, tmp_path, text):
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, [])
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = save(tokenizer, tmp_path)
    tokens = encode_prompt(tokenizer, text).tolist()
    assert len(tokens) == len(text.encode())
    assert "".join(scripted(monkeypatch, tokens, "a\u00fc", tokenizer)) == text


def test_spaces_between_words_stay(monkeypatch, tmp_path):
    words = {f"\u2581{word}": i for i, word in enumerate(runs.WORDS)}
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(words, unk_token="\u2581the")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    tokenizer = save(tokenizer, tmp_path)
    tokens = [i % len(words) for i in range(2 * PIECE + 3)]
    written = "".join(scripted(monkeypatch, tokens, "the cat", tokenizer))
    assert written == "".join(f" {runs.WORDS[token]}" for token in tokens)


def test_what_cannot_be_generated_is_said(dense):
    for options, message in (
        (dict(count=0), "max_new_tokens must be a positive integer; got 0"),
        (dict(count=4, seed=-1), "seed must be from 0"),
        (dict(count=4, seed=2**63), "seed must be from 0"),
        (dict(count=4, top_k=300), "top_k may not exceed the vocabulary of 256"),
        (dict(count=4, prompt="\udc80"), "the prompt is not UTF-8 text"),
    ):
        with pytest.raises(UserError, match=message):
            stream(*dense, **{"prompt": "a", **options})


def test_a_masked_model_cannot_continue():
    model = build_model(runs.config("", scheme="m2bert"), 256)
    with pytest.raises(UserError, match="fills in text and cannot continue it"):
        stream(model, {}, "a", 4)


def test_filters_end_with_the_context():
    config = runs.config("", scheme="monarch")
    model = build_model(config, 256)
    params = jax.jit(lambda: init_params(model, config))()
    with pytest.raises(UserError, match=r"cannot be generated: .*32"):
        stream(model, params, "a" * 20, 13)
    assert len(stream(model, params, "a" * 20, 12)) == 2
