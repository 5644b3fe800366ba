"""What backward is given, and what its kernels make of it.

Letters as in `jattn.pallas.selective.triton`.
"""

# A type checker does not see what a constexpr stands for.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false

import functools

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from jattn.pallas import _softmax, _triton
from jattn.pallas._softmax import LOG2_E
from jattn.pallas._tiles import _load_rows
from jattn.pallas.selective.work import padded

# Tokens of a program.
TOKENS = 64


class Cotangents:
    """The cotangents of the outputs, in the forms in which kernels read them.

    Two numbers stand for the softmax of a query: shift, such that P = 2 ** (S - shift)
    for the scaled logits S in base 2, and delta, such that dS = P ∘ (dP - delta).

    Attributes:
      out_gradient: [B, T, N, V].
    """

    def __init__(
        self,
        out: jax.Array,
        lse: jax.Array,
        out_gradient: jax.Array,
        lse_gradient: jax.Array,
    ):
        self.out_gradient = out_gradient
        self._others = out, lse, lse_gradient
        self._statistics: dict[tuple[int, int, int], jax.Array] = {}

    @functools.cached_property
    def arrays(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """out_gradient, shift and delta, both fp32 [B, T, N]."""
        out, lse, lse_gradient = self._others
        delta = _softmax.delta(out, self.out_gradient, lse_gradient)
        return self.out_gradient, lse * LOG2_E, delta

    def statistics(self, pack: int, tile: int, rows: int) -> jax.Array:
        """Shift and -delta, row by row.

        Args:
          pack: Query heads that are the rows of a tile, with its tokens; heads first.
          tile: Rows of a tile.
          rows: Tokens of whole tiles, at least T.

        Returns:
          fp32 [B, N / pack, 2, rows pack]; infinity and 0 where there are no tokens.
        """
        # Tiles of one head are all alike.
        arguments = pack, tile if pack > 1 else 1, rows
        if arguments not in self._statistics:
            self._statistics[arguments] = self._make_statistics(*arguments)
        return self._statistics[arguments]

    def _make_statistics(self, pack, tile, rows):
        out, lse, lse_gradient = self._others
        batch, queries, heads, width = out.shape
        shape = batch, heads // pack, 2, rows * pack
        [statistics] = _triton.call(
            statistics_kernel,
            out,
            self.out_gradient,
            lse,
            lse_gradient,
            queries,
            rows,
            outputs=[jax.ShapeDtypeStruct(shape, jnp.float32)],
            grid=(triton.cdiv(rows, TOKENS), heads, batch),
            HEADS=heads,
            V=width,
            V_PAD=padded(width),
            TOKENS=TOKENS,
            PACK=pack,
            PER_TILE=max(tile // pack, 1),
            LOG2_E=LOG2_E,
        )
        return statistics


@triton.jit
def statistics_kernel(
    out_ptr,  # [B, T, N, V]
    out_gradient_ptr,  # [B, T, N, V]
    lse_ptr,  # [B, T, N]
    lse_gradient_ptr,  # [B, T, N]
    queries,
    rows,
    statistics_ptr,  # [B, N / PACK, 2, rows PACK]
    HEADS: tl.constexpr,
    V: tl.constexpr,
    V_PAD: tl.constexpr,
    TOKENS: tl.constexpr,
    PACK: tl.constexpr,
    PER_TILE: tl.constexpr,
    LOG2_E: tl.constexpr,
):
    """Shift and -delta of some tokens in one head; a tile has PER_TILE tokens."""
    batch, head = tl.program_id(2).to(tl.int64), tl.program_id(1)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    live = token < queries
    source = (batch * queries + token) * HEADS + head
    out = _load_rows(out_ptr, source, live, V, V_PAD).to(tl.float32)
    out_gradient = _load_rows(out_gradient_ptr, source, live, V, V_PAD)
    delta = tl.sum(out * out_gradient.to(tl.float32), axis=1)
    delta -= tl.load(lse_gradient_ptr + source, mask=live, other=0.0)
    lse = tl.load(lse_ptr + source, mask=live, other=float("inf"))
    place = token // PER_TILE * PACK + head % PACK
    place = place * PER_TILE + token % PER_TILE
    statistics_ptr += (batch * (HEADS // PACK) + head // PACK) * (2 * rows * PACK)
    tl.store(statistics_ptr + place, lse * LOG2_E, mask=token < rows)
    tl.store(statistics_ptr + rows * PACK + place, -delta, mask=token < rows)
