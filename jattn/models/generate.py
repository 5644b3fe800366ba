"""Sampling from a language model.

`generate` does everything inside one jit. `prefill` and `decode` are its two halves,
for callers that show tokens as they come. A model here is a Flax module with the fields
vocab_size, bos_id, dtype and param_dtype, ``init_cache(batch_size, max_length, dtype)``
and ``__call__(tokens, *, cache, lengths) -> (logits, cache)``, as `DecoderLM` and
`Megabyte` are.
"""

import dataclasses
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from flax import struct

from jattn.ops import _common


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from its logits.

    Attributes:
      temperature: Divides the logits; 0 takes the most likely token.
      top_k: Draw from the k most likely tokens only; from all if None.
      top_p: Draw from the fewest most likely tokens (of those top_k leaves) whose
        probabilities sum to at least p; from all if None.
      eos_id: Token that ends a row; rows never end if None.

    Raises:
      ValueError: temperature is negative, top_k not positive, top_p not in (0, 1], or
        eos_id negative.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    eos_id: int | None = None

    def __post_init__(self):
        if not self.temperature >= 0:
            raise ValueError(
                f"temperature must be 0 (greedy) or positive; got {self.temperature}"
            )
        _common.check_positive(top_k=self.top_k)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1]; got {self.top_p}")
        if self.eos_id is not None and self.eos_id < 0:
            raise ValueError(f"eos_id must be a token; got {self.eos_id}")


class GenerationState(struct.PyTreeNode):
    """What generation goes on from.

    Attributes:
      cache: The model's, of all tokens but the last of each row.
      token: int32 [B], the last token of each row, which the cache lacks as yet.
      finished: bool [B], rows that have produced eos_id.
      rng: Key of the tokens to come; None if they are not drawn at random.
    """

    cache: Any
    token: jax.Array
    finished: jax.Array
    rng: jax.Array | None


def generate(
    model: Any,
    params: Any,
    prompt: jax.Array,
    *,
    max_new_tokens: int,
    rng: jax.Array | None = None,
    prompt_lengths: jax.Array | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_id: int | None = None,
) -> jax.Array:
    """Continues prompts, inside one jit that stops when every row has ended.

    Args:
      model: `DecoderLM`, `Megabyte` or another module of the same protocol.
      params: What ``model.init`` returned or training made of it.
      prompt: int [B, L], without bos_id, which is fed first. L may be 0.
      max_new_tokens: Tokens to generate.
      rng: Key to draw with; needed unless temperature is 0.
      prompt_lengths: int [B], real tokens of each prompt, the rest being padding on
        the right; all L if None.
      temperature: Divides the logits; 0 takes the most likely token.
      top_k: Draw from the k most likely tokens only.
      top_p: Draw from the fewest most likely tokens (of those top_k leaves) whose
        probabilities sum to at least p.
      eos_id: Token that ends a row; all tokens after it are eos_id as well.

    Returns:
      int32 [B, max_new_tokens].

    Raises:
      ValueError: An option is out of its range, tokens are drawn without rng, or a
        prompt holds what is no token of the vocabulary (seen where the prompt is a
        concrete array).
    """
    sampling = Sampling(temperature, top_k, top_p, eos_id)
    _check_sampling(model, sampling, rng)
    prompt, prompt_lengths = _check_prompt(
        model, prompt, prompt_lengths, max_new_tokens
    )
    return _generate(
        model, params, prompt, prompt_lengths, rng, max_new_tokens, sampling
    )


def prefill(
    model: Any,
    params: Any,
    prompt: jax.Array,
    *,
    max_new_tokens: int,
    rng: jax.Array | None = None,
    prompt_lengths: jax.Array | None = None,
) -> GenerationState:
    """Reads prompts into a cache with room for max_new_tokens more.

    Takes the arguments of `generate` of the same names, raises the same errors, and
    returns the state `decode` goes on from.
    """
    prompt, prompt_lengths = _check_prompt(
        model, prompt, prompt_lengths, max_new_tokens
    )
    return _prefill(model, params, prompt, prompt_lengths, rng, max_new_tokens)


def decode(
    model: Any,
    params: Any,
    state: GenerationState,
    *,
    num_tokens: int,
    sampling: Sampling,
) -> tuple[jax.Array, GenerationState]:
    """Generates the next tokens.

    Any split into calls gives the tokens one call would give. ``state.finished`` tells
    which rows have ended.

    Args:
      model: As for `prefill`.
      params: As for `prefill`.
      state: From `prefill` or an earlier call. Its arrays are donated: it cannot be
        used again.
      num_tokens: How many tokens to generate. All calls together may generate the
        max_new_tokens of `prefill`.
      sampling: How to draw them.

    Returns:
      int32 [B, num_tokens], and the state after them.

    Raises:
      ValueError: num_tokens is not positive, top_k exceeds the vocabulary, or tokens
        are drawn and `prefill` got no rng.
    """
    _common.check_positive(num_tokens=num_tokens)
    _check_sampling(model, sampling, state.rng)
    return _decode_donating(model, params, state, num_tokens, sampling)


def sample(logits: jax.Array, rng: jax.Array | None, sampling: Sampling) -> jax.Array:
    """Draws one token a row.

    Args:
      logits: [B, V].
      rng: Key, not needed if the temperature is 0.
      sampling: How to draw; top_k may not exceed V.

    Returns:
      int32 [B].
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    assert rng is not None
    logits = logits / sampling.temperature
    if sampling.top_k is None and sampling.top_p is None:
        return jax.random.categorical(rng, logits).astype(jnp.int32)
    # Most likely first, so that both options keep a prefix.
    logits, tokens = jax.lax.top_k(logits, sampling.top_k or logits.shape[-1])
    if sampling.top_p is not None:
        probabilities = jax.nn.softmax(logits)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        # The first token stays whatever rounding makes of the sum.
        kept = (before < sampling.top_p).at[:, 0].set(True)
        logits = jnp.where(kept, logits, -jnp.inf)
    choice = jax.random.categorical(rng, logits)
    return jnp.take_along_axis(tokens, choice[:, None], axis=1)[:, 0].astype(jnp.int32)


def _prefill_state(model, params, prompt, prompt_lengths, rng, max_new_tokens):
    batch, length = prompt.shape
    dtype = model.param_dtype if model.dtype is None else model.dtype
    # bos_id and the prompt go in, and every new token but the last.
    cache = model.init_cache(batch, length + max_new_tokens, dtype)
    fed = jnp.pad(prompt, [(0, 0), (1, 0)], constant_values=model.bos_id)
    if length:
        _, cache = model.apply(params, fed[:, :-1], cache=cache, lengths=prompt_lengths)
    return GenerationState(
        cache=cache,
        token=jnp.take_along_axis(fed, prompt_lengths[:, None], axis=1)[:, 0],
        finished=jnp.zeros(batch, bool),
        rng=rng,
    )


def _decode_state(model, params, state, num_tokens, sampling):
    eos_id = sampling.eos_id
    # Rows that ended read eos from here, whether or not the loop reaches them.
    out = jnp.full((state.token.shape[0], num_tokens), eos_id or 0, jnp.int32)

    def unfinished(carry):
        index, _, state = carry
        return (index < num_tokens) & ~jnp.all(state.finished)

    def step(carry):
        index, out, state = carry
        rng, key = (None, None) if state.rng is None else jax.random.split(state.rng)
        logits, cache = model.apply(params, state.token[:, None], cache=state.cache)
        token = sample(logits[:, 0], key, sampling)
        finished = state.finished
        if eos_id is not None:
            token = jnp.where(finished, eos_id, token)
            finished = finished | (token == eos_id)
        state = GenerationState(cache=cache, token=token, finished=finished, rng=rng)
        return index + 1, out.at[:, index].set(token), state

    _, out, state = jax.lax.while_loop(unfinished, step, (0, out, state))
    return out, state


def _generate_tokens(
    model, params, prompt, prompt_lengths, rng, max_new_tokens, sampling
):
    state = _prefill_state(model, params, prompt, prompt_lengths, rng, max_new_tokens)
    return _decode_state(model, params, state, max_new_tokens, sampling)[0]


_prefill = jax.jit(_prefill_state, static_argnames=("model", "max_new_tokens"))
_decode_donating = jax.jit(
    _decode_state,
    static_argnames=("model", "num_tokens", "sampling"),
    donate_argnames="state",
)
_generate = jax.jit(
    _generate_tokens, static_argnames=("model", "max_new_tokens", "sampling")
)


def _check_sampling(model, sampling, rng):
    if sampling.top_k is not None and sampling.top_k > model.vocab_size:
        raise ValueError(
            f"top_k may not exceed the vocabulary of {model.vocab_size} tokens; got "
            f"{sampling.top_k}"
        )
    if sampling.eos_id is not None and sampling.eos_id >= model.vocab_size:
        raise ValueError(
            f"eos_id must be one of the {model.vocab_size} tokens of the vocabulary; "
            f"got {sampling.eos_id}"
        )
    if sampling.temperature > 0 and rng is None:
        raise ValueError(
            f"temperature={sampling.temperature} draws tokens at random and needs rng; "
            "temperature=0 is greedy and does not"
        )


def _check_prompt(model, prompt, prompt_lengths, max_new_tokens):
    """Prompt and lengths as int32 arrays, checked as far as they are concrete."""
    _common.check_positive(max_new_tokens=max_new_tokens)
    prompt = jnp.asarray(prompt)
    # An empty list has no integer dtype of its own.
    if prompt.ndim != 2 or (
        prompt.size and not jnp.issubdtype(prompt.dtype, jnp.integer)
    ):
        raise ValueError(
            f"prompt must be integers of shape [B, L]; got {prompt.dtype} "
            f"{list(prompt.shape)}"
        )
    batch, length = prompt.shape
    if prompt_lengths is None:
        prompt_lengths = jnp.full(batch, length, jnp.int32)
    prompt_lengths = jnp.asarray(prompt_lengths)
    if prompt_lengths.shape != (batch,) or not jnp.issubdtype(
        prompt_lengths.dtype, jnp.integer
    ):
        raise ValueError(
            f"prompt_lengths must be integers of shape [B={batch}]; got "
            f"{prompt_lengths.dtype} {list(prompt_lengths.shape)}"
        )
    _check_range("prompt", prompt, model.vocab_size - 1)
    _check_range("prompt_lengths", prompt_lengths, length)
    return prompt.astype(jnp.int32), prompt_lengths.astype(jnp.int32)


def _check_range(name, array, largest):
    """Raises ValueError if a concrete array holds less than 0 or more than largest."""
    if isinstance(array, jax.core.Tracer) or not array.size:
        return
    values = np.asarray(array)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > largest:
        raise ValueError(f"{name} must be between 0 and {largest}; got {low} to {high}")
