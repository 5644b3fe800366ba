"""Gradients of 2-simplicial attention in Triton, by two kernels.

For the rows of a position (see tiles) dO' is the gradient of the output times the key's
value, as q' is the query times the key. With S = q' K'^T, P = exp(S - lse) and
dS = P ∘ (dO' V'^T - delta):

- one kernel goes through positions. dS K' is the gradient of q', and P V' that of dO':
  they give the query's gradient whole, and parts of the gradients of the keys and
  values with the smaller window, one for each position that sees them, which a third
  kernel adds up in order;
- one kernel goes through blocks of the keys with the larger window, whose gradients
  dS^T q' and P^T dO' stay in registers while all rows that see them go by.

Nothing is added atomically: same input, same bits.

Letters: B batch, T queries, F and M keys of the set with the smaller and the larger
window, N query heads, K kv heads, H key width, V value width; L positions in a chunk,
W the smaller window, R tiles of query heads of a kv head, P parts of the positions.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import triton

from jattn.pallas import _sharding, _softmax, _triton, tuning
from jattn.pallas._softmax import LOG2_E
from jattn.pallas.simplicial import gradient_kernels
from jattn.pallas.simplicial.tiles import (
    constants,
    tuning_shape,
)

# Bound on the partial gradients of one chunk of positions.
PARTIAL_BYTES = 2**30

# Programs that keep a GPU busy, and parts that positions are split into at most.
PROGRAMS, MAX_PARTS = 264, 16

# Keys that a program adds up partial gradients for.
SUM_ROWS = 16


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a gradient kernel is cut up: speed, never results.

    Attributes:
      rows: Rows of a tile.
      tokens: Positions of a tile of rows, at least.
      block: Keys of the larger window in a tile.
      warps: Warps of a program.
      stages: Tiles in flight.
    """

    rows: int
    tokens: int
    block: int
    warps: int
    stages: int


# Those with which two programs fit on a multiprocessor. Matrices that do not fit in
# registers beside the sums would come from memory for every block.
QUERY_TILING = Tiling(rows=64, tokens=1, block=32, warps=4, stages=3)
KEY_TILING = Tiling(rows=32, tokens=1, block=64, warps=4, stages=1)


def backward(
    query: jax.Array,
    few_key: jax.Array,
    few_value: jax.Array,
    many_key: jax.Array,
    many_value: jax.Array,
    visible: jax.Array | None,
    out: jax.Array,
    lse: jax.Array,
    out_gradient: jax.Array,
    lse_gradient: jax.Array,
    *,
    few_window: int,
    many_window: int,
    scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Gradients for query and the keys and values of both sets.

    Args:
      query: [B, T, N, H].
      few_key: [B, F, K, H], the keys with the smaller window, in the queries' dtype or
        in fp32; the last T of them stand at the positions of the queries.
      few_value: [B, F, K, V], as few_key.
      many_key: [B, M, K, H], as few_key.
      many_value: [B, M, K, V].
      visible: int32 [B, T], how many keys before and at its own position a query may
        see at most, or None for no such limit.
      out: [B, T, N, V], what forward gave, best in fp32.
      lse: [B, T, N] in fp32 (natural log), what forward gave.
      out_gradient: [B, T, N, V].
      lse_gradient: [B, T, N].
      few_window: Keys that a query sees of the one set, itself included.
      many_window: Of the other.
      scale: Factor of the logits, positive.
    """
    # A query that sees nothing gets probabilities exp2(-inf - inf) = 0.
    lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse * LOG2_E)
    delta = _softmax.delta(out, out_gradient, lse_gradient)
    launch = _Launch(
        (query, few_key, few_value, many_key, many_value),
        visible,
        (out_gradient, lse, delta),
        (few_window, many_window),
        scale,
    )
    query_gradient, few_key_gradient, few_value_gradient = launch.query_and_few()
    many_key_gradient, many_value_gradient = launch.many()
    return (
        query_gradient,
        few_key_gradient,
        few_value_gradient,
        many_key_gradient,
        many_value_gradient,
    )


class _Launch:
    """The arrays of one backward pass, and what its launches have in common."""

    def __init__(self, arrays, visible, gradients, windows, scale):
        self.arrays = arrays
        self.query, self.few_key, self.few_value, self.many_key, self.many_value = (
            arrays
        )
        self.gradients = gradients
        self.limited = visible is not None
        self.visible = jnp.zeros((1, 1), jnp.int32) if visible is None else visible
        self.few_window, self.many_window = windows
        self.scale = scale
        self.batch, self.queries, self.heads, self.key_width = self.query.shape
        self.kv_heads, self.value_width = self.few_value.shape[2:]
        self.lengths = (self.queries, self.few_key.shape[1], self.many_key.shape[1])

    def tiling(self, kernel, usual):
        """The tiling of the kernel of that name, and its constants.

        Args:
          kernel: Its name in the tables.
          usual: The tiling where none was measured, for usual widths and dtypes.
        """
        shape = tuning_shape(
            self.query, self.few_value, self.few_window, self.many_window
        )
        width = max(self.key_width, self.value_width)
        tiling = tuning.choose(
            kernel, shape, _heuristic(width, self.query.dtype.itemsize, usual)
        )
        return tiling, {
            **constants(
                self.query, self.few_value, self.few_window, tiling.rows, tiling.tokens
            ),
            "BLOCK": tiling.block,
            "LIMITED": self.limited,
        }

    def call(self, kernel, chunk, tiling, *, outputs, grid, positions, **constants):
        """Launches one of the two kernels, for `positions` positions of each row."""
        pairs = positions * self.few_window * self.many_window
        width = self.key_width + self.value_width
        return _triton.call(
            kernel,
            *self.arrays,
            self.visible,
            *self.gradients,
            *chunk,
            float(self.scale) * LOG2_E,
            *self.lengths,
            self.few_window,
            self.many_window,
            outputs=outputs,
            grid=grid,
            num_warps=tiling.warps,
            num_stages=tiling.stages,
            flops=4 * pairs * self.batch * self.heads * width,
            **constants,
        )

    def query_and_few(self):
        """Gradients of query, and of the keys and values with the smaller window."""
        tiling, constants = self.tiling("simplicial_backward_query", QUERY_TILING)
        tokens = constants["TOKENS"]
        head_tiles = triton.cdiv(constants["GROUP"], constants["HEADS"])
        rows = (self.kv_heads, head_tiles, self.few_window)
        row_bytes = (self.key_width + self.value_width) * 4
        nbytes = self.batch * self.queries * math.prod(rows) * row_bytes
        length = triton.cdiv(self.queries, triton.cdiv(nbytes, PARTIAL_BYTES))
        tiles = triton.cdiv(length, tokens)
        length = tiles * tokens
        chunks = triton.cdiv(self.queries, length)
        heads = self.query.shape[2:]
        of_chunk = [
            jax.ShapeDtypeStruct((self.batch, length, *shape), dtype)
            for shape, dtype in (
                (heads, self.query.dtype),
                ((*rows, self.key_width), jnp.float32),
                ((*rows, self.value_width), jnp.float32),
            )
        ]

        key_tiles = [
            _triton.Descriptor(x, (1, tiling.block, 1, constants[padded]))
            for x, padded in ((self.many_key, "H_PAD"), (self.many_value, "V_PAD"))
        ]

        def chunk(sums, first):
            query_gradient, *partials = self.call(
                gradient_kernels.query_gradient_kernel,
                (first, *key_tiles),
                tiling,
                outputs=of_chunk,
                grid=(tiles, self.batch * self.kv_heads * head_tiles),
                positions=length,
                TAIL=min(tiling.block, 32),
                **constants,
            )
            sums = [
                self.add(x, partial, first)
                for x, partial in zip(sums, partials, strict=True)
            ]
            return sums, query_gradient

        zeros = [
            jnp.zeros(x.shape, jnp.float32) for x in (self.few_key, self.few_value)
        ]
        zeros = _sharding.vary_like(zeros, (*self.arrays, *self.gradients))
        firsts = length * jnp.arange(chunks, dtype=jnp.int32)[:, None]
        (key_sum, value_sum), query_gradient = jax.lax.scan(chunk, zeros, firsts)
        query_gradient = jnp.moveaxis(query_gradient, 0, 1)
        query_gradient = query_gradient.reshape(self.batch, chunks * length, *heads)
        return (
            query_gradient[:, : self.queries],
            (self.scale * key_sum).astype(self.few_key.dtype),
            value_sum.astype(self.few_value.dtype),
        )

    def add(self, sums, partials, first):
        """Adds the partial gradients [B, L, K, R, W, *] of a chunk to the sums."""
        length, width = partials.shape[1], sums.shape[-1]
        [total] = _triton.call(
            gradient_kernels.sum_kernel,
            sums,
            partials,
            self.visible,
            first,
            length,
            *self.lengths[:2],
            self.few_window,
            outputs=[jax.ShapeDtypeStruct(sums.shape, sums.dtype)],
            grid=(triton.cdiv(sums.shape[1], SUM_ROWS), self.batch * self.kv_heads),
            num_warps=4,
            KV_HEADS=self.kv_heads,
            HEAD_TILES=partials.shape[3],
            WIDTH=width,
            PADDED=triton.next_power_of_2(width),
            ROWS=SUM_ROWS,
            LIMITED=self.limited,
        )
        return total

    def many(self):
        """Gradients of the keys and values with the larger window."""
        tiling, constants = self.tiling("simplicial_backward_key", KEY_TILING)
        blocks = triton.cdiv(self.many_key.shape[1], tiling.block)
        # Where there are few blocks, several programs share the positions of each.
        programs = blocks * self.batch * self.kv_heads
        parts = min(MAX_PARTS, max(1, PROGRAMS // programs))
        partials = self.call(
            gradient_kernels.key_gradient_kernel,
            (),
            tiling,
            outputs=[
                jax.ShapeDtypeStruct(
                    (parts, *x.shape), x.dtype if parts == 1 else jnp.float32
                )
                for x in (self.many_key, self.many_value)
            ],
            grid=(blocks, self.batch * self.kv_heads, parts),
            positions=self.queries,
            **constants,
        )
        return [jnp.sum(x, axis=0).astype(self.query.dtype) for x in partials]


def _heuristic(width, itemsize, usual):
    """The tiling where none was measured, by bytes of a number."""
    if itemsize > 2:
        size = 32 if width <= 128 else 16
        return Tiling(rows=size, tokens=1, block=size, warps=4, stages=1)
    if width > 128:
        return Tiling(rows=64, tokens=1, block=64, warps=8, stages=1)
    return usual
