"""What the gradients in Mosaic GPU of attention over strided windows share.

They are Triton's algorithm (`jattn.pallas.flash.triton`) in two kernels, each with two
consumers (warpgroups that compute) and a producer, which loads rings of tiles into
shared memory. Rows are the queries times the heads of a kv head: row ``t G + g`` is
query head g at query t. Of the probabilities P and the gradient dS of the logits S,

    S = Q K'    P = exp(S - lse)    dP = dO V'    dS = P ∘ (dP - delta)

consumers issue the products for S and dP at once, and their exponentials hide behind
the tensor cores' work.

Letters: B batch, T queries, M keys, N query heads, K kv heads, G = N / K, H width,
R = T G rows of a kv head.
"""

import dataclasses

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
import numpy as np
from jax import lax

from jattn.pallas import _mosaic, _softmax
from jattn.pallas._softmax import LOG2_E

CONSUMERS = 2

# Rows, and keys, of a consumer's tile. More would not fit into registers.
ROWS = 64
KEYS = 64

# Copies into the tiles of matrix instructions begin at every eighth row only.
ALIGNMENT = 8

# Groups of query heads that are copied from where they are.
DIRECT_GROUPS = (8, 16, 32, 64)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What kernels know of their arguments when they are compiled.

    Attributes:
      queries: T.
      keys: M.
      kv_rows: B K.
      kv_heads: K.
      group: G.
      width: H.
      offset: Position of the first query; key 0 stands for the tokens from 0 on.
      kernel_size: Tokens that a key stands for.
      stride: Tokens between the first ones of two keys.
      window: Tokens back from the query, itself counted, among which a key's first has
        to be; None for no limit.
      scale: Factor of the logits, positive.
    """

    queries: int
    keys: int
    kv_rows: int
    kv_heads: int
    group: int
    width: int
    offset: int
    kernel_size: int
    stride: int
    window: int | None
    scale: float

    @property
    def direct(self) -> bool:
        """Whether rows are copied from where they are, a token's heads at a time."""
        return self.group in DIRECT_GROUPS

    @property
    def parts(self) -> int:
        """Stretches of a tile's rows that are adjacent in memory."""
        return ROWS // self.group if self.direct else 1

    @property
    def padded_rows(self) -> int:
        """More rows than any tile reaches, whichever row it begins at."""
        tile = CONSUMERS * ROWS
        return -(-self.queries * self.group // tile) * tile + ROWS

    def rows_of_key(self, key):
        """The first row that sees a key, and one past the last."""
        first = key * self.stride + (self.kernel_size - 1 - self.offset)
        end = self.queries
        if self.window is not None:
            end = key * self.stride + (self.window - self.offset)
            end = jnp.clip(end, 0, self.queries)
        return jnp.clip(first, 0, self.queries) * self.group, end * self.group

    def keys_of_token(self, token):
        """The first key that a query sees, and one past the last."""

        def divided(x):
            # Towards zero; where x is negative the result is at most 0 all the same.
            stride = np.int32(self.stride)
            return lax.div(x, jnp.full_like(x, stride) if x.ndim else stride)

        begin = token * 0
        if self.window is not None:
            begin = divided(token + (self.offset - self.window + self.stride))
            begin = jnp.maximum(begin, 0)
        end = divided(token + (self.offset - self.kernel_size + 1 + self.stride))
        return begin, jnp.clip(end, 0, self.keys)


def statistics(
    out: jax.Array,
    lse: jax.Array,
    out_gradient: jax.Array,
    lse_gradient: jax.Array,
    sizes: Sizes,
) -> jax.Array:
    """Two numbers for each row: shift, such that P = 2 ** (S - shift), and delta.

    Args:
      out: [B, T, N, H].
      lse: fp32 [B, T, N], the log-sum-exp of the logits S.
      out_gradient: [B, T, N, H].
      lse_gradient: fp32 [B, T, N].
      sizes: Those of the arguments.

    Returns:
      fp32 [B, K, 2, > R]; infinity and 0 where there are no rows.
    """
    delta = _softmax.delta(out, out_gradient, lse_gradient)
    # Or XLA fuses the sum with the transposition, and reads slowly.
    delta = lax.optimization_barrier(delta)
    # Infinity gives rows that see nothing probabilities of 0.
    shift = jnp.where(jnp.isneginf(lse), jnp.inf, lse * LOG2_E)

    def by_row(x, filling):
        batch = x.shape[0]
        x = x.reshape(batch, sizes.queries, sizes.kv_heads, sizes.group).swapaxes(1, 2)
        x = x.reshape(batch, sizes.kv_heads, -1)
        return _mosaic.padded(x, 2, sizes.padded_rows, filling)

    return jnp.stack([by_row(shift, jnp.inf), by_row(delta, 0)], axis=2)


def rows(x: jax.Array, sizes: Sizes) -> jax.Array:
    """[B, T, N, H] as [B, T, K, G, H], or as [B, K, > R, H] if not direct."""
    batch, *_, width = x.shape
    x = x.reshape(batch, sizes.queries, sizes.kv_heads, sizes.group, width)
    if sizes.direct:
        return x
    x = x.swapaxes(1, 2).reshape(batch, sizes.kv_heads, -1, width)
    return _mosaic.padded(x, 2, sizes.padded_rows)


def for_parts(batch, kv_head, first_row, sizes: Sizes, function) -> None:
    """Calls a function for each stretch of a tile's rows that is adjacent in memory.

    Args:
      batch: Row of the batch.
      kv_head: The rows'.
      first_row: Of the tile.
      sizes: Those of the arguments.
      function: Gets the index of the stretch in arrays as `rows` gives them, its rows
        in the tile, and whether it exists; if not, the index is another one's.
    """
    if not sizes.direct:
        index = pl.ds(pl.multiple_of(first_row, ALIGNMENT), ROWS)
        function((batch, kv_head, index), pl.ds(0, ROWS), True)
        return
    first_token = _mosaic.div_rem(first_row, sizes.group)[0]

    # Unrolled, it would take more registers than a producer has.
    @pl.loop(np.int32(0), np.int32(sizes.parts))
    def _(i):
        token = first_token + i
        there = jnp.minimum(token, sizes.queries - 1)
        tile_rows = pl.ds(pl.multiple_of(i * sizes.group, sizes.group), sizes.group)
        function((batch, there, kv_head), tile_rows, token < sizes.queries)
