"""Text from a trained model, piece by piece as it is sampled."""

import codecs
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jattn.models import Sampling, decode, prefill
from jattn.train.config import UserError
from jattn.train.data import Document, Tokenizer

# Tokens between two pieces of text: few enough to look like a stream, enough to keep
# the host out of the loop.
PIECE = 16

# What a tokenizer shows for part of a character. At the end of a piece its bytes are
# held back: the next token may complete the character.
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}".encode()


def stream_text(
    model: Any,
    params: Any,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int = 0,
) -> Iterator[str]:
    """Yields the continuation of a prompt in pieces.

    Bytes that are no UTF-8 come out as the replacement character; a character that
    is cut by the end of a piece comes out with the next one.

    Args:
      model: A language model, not a masked one.
      params: Its parameters.
      tokenizer: What its tokens mean.
      prompt: Text to continue; may be empty.
      max_new_tokens: Tokens to generate.
      sampling: How to draw them.
      seed: Of the random draws.

    Raises:
      UserError: An option is out of its range, or the model cannot generate.
    """
    if not hasattr(model, "init_cache"):
        raise UserError(
            "a masked language model fills in text and cannot continue it; generate "
            "with a run of another scheme"
        )
    if not 0 <= seed < 2**63:
        raise UserError(f"seed must be from 0 to 2**63 - 1; got {seed}")
    tokens = encode_prompt(tokenizer, prompt).tolist()
    # What tokens say may depend on those before them, as spaces between words do.
    shown = len(tokenizer.decode(tokens))
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    try:
        state = prefill(
            model,
            {"params": params},
            jnp.asarray([tokens], jnp.int32),
            max_new_tokens=max_new_tokens,
            rng=jax.random.key(seed) if sampling.temperature > 0 else None,
        )
        for first in range(0, max_new_tokens, PIECE):
            new, state = decode(
                model,
                {"params": params},
                state,
                num_tokens=min(PIECE, max_new_tokens - first),
                sampling=sampling,
            )
            tokens.extend(np.asarray(new)[0].tolist())
            written = tokenizer.decode(tokens)[shown:].rstrip(_REPLACEMENT)
            shown += len(written)
            yield decoder.decode(written)
    except ValueError as error:
        raise UserError(f"text cannot be generated: {error}") from error
    yield decoder.decode(tokenizer.decode(tokens)[shown:], final=True)


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> np.ndarray:
    """The tokens of a prompt, int32 [n].

    Raises:
      UserError: The prompt is not Unicode text, as a terminal's bytes may not be.
    """
    try:
        text = prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"the prompt is not UTF-8 text ({error.reason} at character {error.start})"
        ) from error
    return tokenizer.encode([Document("the prompt", text)])[0].tokens
