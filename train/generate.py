"""Text from a trained model, piece by piece as it is sampled."""

import codecs
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jattn.models import Sampling, decode, prefill
from jattn.train.config import UserError
from jattn.train.data import Document, Tokenizer

# Tokens between two pieces of text: few enough to look like a stream, enough to keep
# the host out of the loop.
PIECE = 16


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
    tokens, _ = tokenizer.encode(Document("the prompt", prompt.encode()))
    rng = jax.random.key(seed) if sampling.temperature > 0 else None
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    # Whole pieces only, so that one compiled function serves all of them.
    pieces = -(-max_new_tokens // PIECE)
    try:
        state = prefill(
            model,
            {"params": params},
            jnp.asarray(tokens)[None],
            max_new_tokens=max(pieces, 1) * PIECE if max_new_tokens > 0 else 0,
            rng=rng,
        )
        for piece in range(pieces):
            new, state = decode(
                model, {"params": params}, state, num_tokens=PIECE, sampling=sampling
            )
            wanted = min(PIECE, max_new_tokens - piece * PIECE)
            yield decoder.decode(tokenizer.decode(new[0, :wanted].tolist()))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"text cannot be generated: {error}") from error
    yield decoder.decode(b"", final=True)
