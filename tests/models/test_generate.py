"""jattn.generate against re-running the whole model for every token."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn.models import BlockStack, DecoderLM, Megabyte, Sampling, decode, prefill
from jattn.models.generate import sample
from tests.models import slow
from tests.support import normal

VOCAB = 7
STACK = {"num_heads": 2, "head_dim": 4, "hidden": 8}
MODELS = {
    "decoder": DecoderLM(vocab_size=VOCAB, bos_id=0, features=8, num_layers=1, **STACK),
    "megabyte": Megabyte(
        vocab_size=VOCAB,
        bos_id=VOCAB,
        patch_size=3,
        positions="rope",
        global_stage=BlockStack(features=12, num_layers=1, **STACK),
        local_stage=BlockStack(features=8, num_layers=1, **STACK),
    ),
}
PROMPT = np.array([[3, 1, 6, 2, 5], [4, 4, 0, 0, 0]])
LENGTHS = [5, 2]
KEY = jax.random.key(7)


@functools.cache
def init(name):
    return slow.random_params(MODELS[name], PROMPT)


def generate(name="decoder", prompt=PROMPT, **options):
    options = {"max_new_tokens": 6} | options
    return np.asarray(jattn.generate(MODELS[name], init(name), prompt, **options))


@pytest.mark.parametrize("name", MODELS)
def test_greedy_equals_rerunning_the_model(name):
    model, params = MODELS[name], init(name)
    score = jax.jit(lambda tokens: model.apply(params, tokens, method="score"))
    lengths = [5, 2, 0]
    prompt = np.concatenate([PROMPT, PROMPT[:1]])
    out = generate(name, prompt, prompt_lengths=lengths, temperature=0)
    assert out.dtype == np.int32
    for row, length in enumerate(lengths):
        tokens = np.zeros((1, 12), np.int32)
        tokens[0, :length] = prompt[row, :length]
        for t in range(length, length + 6):
            tokens[0, t] = np.argmax(score(tokens)[0, t])
        np.testing.assert_array_equal(out[row], tokens[0, length : length + 6])
    assert len(np.unique(out)) > 2


def test_prompts_may_be_empty():
    empty = np.zeros((2, 0), np.int32)
    out = generate(prompt=empty, temperature=0)
    padded = generate(prompt_lengths=[0, 0], temperature=0)
    np.testing.assert_array_equal(out, padded)


@pytest.mark.parametrize("name", MODELS)
def test_streaming_gives_what_one_call_gives(name):
    model, params = MODELS[name], init(name)
    sampling = Sampling(temperature=1.5, top_k=5, top_p=0.9)
    whole = generate(
        name, rng=KEY, prompt_lengths=LENGTHS, temperature=1.5, top_k=5, top_p=0.9
    )
    state = prefill(
        model, params, PROMPT, max_new_tokens=6, rng=KEY, prompt_lengths=LENGTHS
    )
    parts = []
    for count in (1, 1, 4):
        part, state = decode(model, params, state, num_tokens=count, sampling=sampling)
        parts.append(part)
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


def test_decode_donates_its_state_and_nothing_of_the_caller():
    model, params = MODELS["decoder"], init("decoder")
    state = prefill(model, params, PROMPT, max_new_tokens=6, rng=KEY)
    decode(model, params, state, num_tokens=2, sampling=Sampling())
    assert all(x.is_deleted() for x in jax.tree.leaves(state.cache))
    assert not KEY.is_deleted()


def test_after_eos_come_eos_only_and_nothing_is_computed():
    model, params = MODELS["decoder"], init("decoder")
    free = generate(temperature=0)
    eos = int(free[0, 2])
    first = [int(np.argmax(row == eos)) if eos in row else 6 for row in free]
    out = generate(temperature=0, eos_id=eos)
    for row, end in enumerate(first):
        np.testing.assert_array_equal(out[row, : end + 1], free[row, : end + 1])
        assert np.all(out[row, end:] == eos)
    state = prefill(model, params, PROMPT[:1], max_new_tokens=6)
    _, state = decode(
        model,
        params,
        state,
        num_tokens=6,
        sampling=Sampling(temperature=0, eos_id=eos),
    )
    assert bool(state.finished[0])
    # bos_id, the prompt, and each new token up to the one before eos.
    assert int(state.cache[0].length[0]) == 1 + 5 + first[0]


def test_same_key_same_tokens_other_key_others():
    first, again = generate(rng=KEY), generate(rng=KEY)
    np.testing.assert_array_equal(first, again)
    assert np.any(first != generate(rng=jax.random.key(8)))


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(), [0, 1, 2, 3, 4]),
        (Sampling(temperature=2.0), [0, 1, 2, 3, 4]),
        (Sampling(top_k=2), [1, 3]),
        (Sampling(top_p=0.59), [1, 3]),
        (Sampling(top_p=0.61), [1, 3, 4]),
        (Sampling(top_p=1e-9), [3]),
        (Sampling(top_p=1.0), [0, 1, 2, 3, 4]),
        # top_k leaves two tokens, of which the first has two thirds.
        (Sampling(top_k=2, top_p=0.66), [3]),
        (Sampling(top_k=2, top_p=0.67), [1, 3]),
    ],
)
def test_tokens_are_drawn_with_their_probabilities(sampling, kept):
    # Of tokens 1 and 4, equally likely, the lower one is kept first.
    probabilities = np.array([0.1, 0.2, 0.1, 0.4, 0.2])
    count = 20_000
    logits = jnp.tile(jnp.log(probabilities) + 3, (count, 1))
    drawn = np.asarray(sample(logits, KEY, sampling))
    expected = np.zeros(5)
    expected[kept] = probabilities[kept] ** (1 / sampling.temperature)
    expected /= expected.sum()
    frequencies = np.bincount(drawn, minlength=5) / count
    assert np.all(frequencies[expected == 0] == 0)
    np.testing.assert_allclose(frequencies, expected, atol=5 * 0.5 / count**0.5)


def test_greedy_takes_the_lower_of_equal_tokens():
    logits = jnp.array([[1.0, 3.0, 3.0], [2.0, 2.0, 0.0]])
    np.testing.assert_array_equal(sample(logits, None, Sampling(temperature=0)), [1, 0])


def test_one_of_the_most_likely_token_is_greedy():
    (logits,) = normal(0, (50, 9))
    greedy = sample(logits, None, Sampling(temperature=0))
    np.testing.assert_array_equal(sample(logits, KEY, Sampling(top_k=1)), greedy)


def test_a_prompt_may_be_traced_and_compiles_once():
    params = init("decoder")

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(prompt):
        return jattn.generate(
            MODELS["decoder"], params, prompt, max_new_tokens=6, temperature=0
        )

    np.testing.assert_array_equal(run(PROMPT), generate(temperature=0))
    run(PROMPT + 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be a positive integer; got 0"),
        ({"temperature": -1.0}, "temperature must be 0 .greedy. or positive; got -1"),
        ({"temperature": float("nan")}, "temperature must be 0 .* got nan"),
        ({"top_k": 0}, "top_k must be a positive integer; got 0"),
        ({"top_k": 8}, "top_k may not exceed the vocabulary of 7 tokens; got 8"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]; got 0.0"),
        ({"top_p": 1.1}, r"top_p must be in \(0, 1\]; got 1.1"),
        ({"eos_id": 7}, "eos_id must be one of the 7 tokens .* got 7"),
        ({"eos_id": -1}, "eos_id must be a token; got -1"),
        ({"rng": None}, "draws tokens at random and needs rng"),
        ({"prompt": PROMPT + 2}, "prompt must be between 0 and 6; got 2 to 8"),
        ({"prompt": PROMPT - 1}, "prompt must be between 0 and 6; got -1 to 5"),
        ({"prompt": PROMPT[0]}, r"prompt must be integers of shape \[B, L\]"),
        ({"prompt": PROMPT / 2}, "prompt must be integers .* float32"),
        ({"prompt_lengths": [5]}, r"prompt_lengths must be integers .*\[B=2\]"),
        ({"prompt_lengths": [5.0, 2.0]}, "prompt_lengths must be integers .* float32"),
        ({"prompt_lengths": [6, 2]}, "prompt_lengths must be between 0 and 5; got 2"),
    ],
)
def test_errors_say_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        generate(**{"rng": KEY} | options)


def test_decode_checks_its_own_arguments():
    model, params = MODELS["decoder"], init("decoder")
    state = prefill(model, params, PROMPT, max_new_tokens=6)
    with pytest.raises(ValueError, match="num_tokens must be a positive integer"):
        decode(model, params, state, num_tokens=0, sampling=Sampling(temperature=0))
    with pytest.raises(ValueError, match="needs rng"):
        decode(model, params, state, num_tokens=1, sampling=Sampling())
