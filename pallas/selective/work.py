"""What the kernels of one call share: its sizes, F, and what is skipped of it.

Letters as in `jattn.pallas.selective.triton`.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import triton

from jattn.pallas import _mosaic, _sharding, _triton, tuning
from jattn.pallas.selective import mask

# Queries of one carry. Tiles of queries divide it, and so do tiles of keys.
BLOCK = 128

# What one chunk of F takes at most (but at least that of BLOCK queries or keys), or up
# to four times as much where few chunks are better, and all that backward has of a
# chunk of keys.
CHUNK_BYTES = 64 * 2**20
GRADIENT_BYTES = 704 * 2**20

# If as many heads share a program for the gradients of keys in Triton, it keeps the
# gradient of their logits, to be added up for that of F. With fewer it is computed a
# second time. The kernel in Mosaic always keeps it.
KEEPING_HEADS = 4


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a kernel is cut up: speed, never results.

    Attributes:
      rows: Queries of a tile, at most BLOCK.
      keys: Keys of a tile, at most BLOCK.
      warps: Warps of a program.
      stages: Tiles in flight.
      heads: Query heads of a program, where it has several.
      ahead: Whether F is loaded a tile before it is needed, and kept in registers for
        all heads of the program.
      registers: What a thread may use at most, or None for no limit.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    heads: int = 1
    ahead: bool = True
    registers: int | None = None


def tilings(query: jax.Array, value: jax.Array) -> dict[str, Tiling]:
    """The tilings of the kernels by name."""
    width = max(query.shape[-1], value.shape[-1])
    group = query.shape[2] // value.shape[2]
    if query.dtype.itemsize > 2 or width > 128:
        rows, keys = 64, 32 if query.dtype.itemsize > 2 else 64
        if query.dtype.itemsize > 2 and width > 128:
            # Larger ones are more than shared memory holds.
            rows, keys = 32, 16
        return {
            "mask": Tiling(rows=BLOCK, keys=64, warps=8, stages=1),
            "forward": Tiling(rows=64, keys=keys, warps=4, stages=1),
            "query_gradient": Tiling(rows=rows, keys=keys, warps=8, stages=1),
            "key_gradient": Tiling(
                rows=keys, keys=rows, warps=8, stages=1, heads=group
            ),
            "mask_gradient": Tiling(rows=rows, keys=keys, warps=4, stages=1),
        }
    if width > 64:
        return {
            "mask": Tiling(rows=BLOCK, keys=64, warps=4, stages=1),
            "forward": Tiling(rows=64, keys=64, warps=4, stages=3, heads=2),
            "query_gradient": Tiling(rows=64, keys=64, warps=4, stages=2),
            "key_gradient": Tiling(32, keys=128, warps=8, stages=2, heads=group)
            if group % KEEPING_HEADS == 0
            else Tiling(rows=64, keys=64, warps=4, stages=2, heads=group),
            "mask_gradient": Tiling(rows=64, keys=64, warps=4, stages=2),
        }
    return {
        "mask": Tiling(rows=BLOCK, keys=64, warps=4, stages=1),
        # Three programs fit on a multiprocessor.
        "forward": Tiling(rows=64, keys=64, warps=4, stages=2, registers=168),
        "query_gradient": Tiling(rows=64, keys=64, warps=4, stages=2),
        "key_gradient": Tiling(rows=64, keys=64, warps=4, stages=3, heads=group),
        "mask_gradient": Tiling(rows=64, keys=64, warps=4, stages=3),
    }


class Work:
    """One call's arrays and sizes, F of its regions, and what of it is skipped.

    Attributes:
      least: fp32 [B], from which F on a key is forgotten; None if none is. Computed if
        it is not given and something may be skipped.
      expiry: int32 [B, columns], the first query that does not hold a key; None if all
        do.
    """

    def __init__(
        self,
        query,
        key,
        value,
        starts,
        scale,
        skip_error,
        memory_tau,
        least=None,
        expiry=None,
    ):
        self.query, self.key, self.value = query, key, value
        self.scale = scale
        self.skip_error = skip_error
        self.skip = skip_error > 0
        self.memory_tau = memory_tau
        self.batch, self.queries, self.heads, self.key_width = query.shape
        self.keys, self.kv_heads, self.value_width = value.shape[1:]
        self.offset = self.keys - self.queries
        self.rows = triton.cdiv(self.queries, BLOCK) * BLOCK
        self.columns = triton.cdiv(self.keys, BLOCK) * BLOCK
        self.block = BLOCK
        self.blocks = self.rows // BLOCK
        self.packed = starts is not None
        self.starts = jnp.zeros((1, 1), jnp.int32) if starts is None else starts
        self.tilings = tilings(query, value)
        # No length, so that what was measured at one serves all.
        self.shape: dict[str, int | str] = dict(
            group=self.heads // self.kv_heads,
            key_width=self.key_width,
            value_width=self.value_width,
            dtype=str(query.dtype),
        )
        self.key_sizes: dict[str, Any] = dict(
            KV_HEADS=self.kv_heads, H=self.key_width, H_PAD=padded(self.key_width)
        )
        self.sizes: dict[str, Any] = self.key_sizes | dict(
            GROUP=self.heads // self.kv_heads,
            V=self.value_width,
            V_PAD=padded(self.value_width),
            PACKED=self.packed,
        )
        # The kernels in Mosaic know documents by F alone.
        self.mosaic = _mosaic.unsupported(query, value, packed=False) is None
        self.separate = self.mosaic and self.packed
        # Tiles may be left out, forgotten or of other documents.
        self.sparse = self.skip or self.separate
        self.vary = functools.partial(_sharding.vary_like, arrays=(query, key, value))
        self.least = self.forgotten() if self.skip and least is None else least
        self.expiry: jax.Array | None = expiry

    def tiling(self, name):
        """That of a kernel in Triton, the measured one if there is one."""
        return tuning.choose(f"selective_{name}", self.shape, self.tilings[name])

    def carries(self, initial_mask):
        """``F / scale`` of each block's first query, [B, blocks, columns].

        And that of the query after the last, [B, columns].
        """
        tiling = self.tiling("mask")
        [sums] = _triton.call(
            mask.sums_kernel,
            self.query,
            self.key,
            self.starts,
            self.queries,
            self.keys,
            self.columns,
            outputs=[self.array(self.batch, self.blocks, self.columns)],
            grid=(self.columns // tiling.keys, self.blocks, self.batch),
            num_warps=tiling.warps,
            num_stages=tiling.stages,
            flops=self.flops(1) // self.heads,
            HEADS=self.heads,
            ROWS=BLOCK,
            KEYS=tiling.keys,
            PACKED=self.packed,
            **self.key_sizes,
        )
        padding = [(0, 0), (0, self.columns - self.keys)]
        first = jnp.pad(initial_mask / self.scale, padding)
        carries = jnp.concatenate([first[:, None], sums[:, :-1]], axis=1)
        carries = jnp.cumsum(carries, axis=1)
        return carries, carries[:, -1] + sums[:, -1]

    def forgotten(self):
        """From which F on a key is forgotten, fp32 [B].

        A query's own key is never forgotten, so that its weight is at least exp(-U),
        where U bounds all logits. The weights of S keys with a larger F than the one
        here sum to less than S exp(U - F), which is the part `skip_error` of that. The
        memory term needs all keys with an F below tau.
        """
        square = [
            jnp.max(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1), axis=1)
            for x in (self.query, self.key)
        ]
        square_key = jnp.repeat(square[1], self.heads // self.kv_heads, axis=-1)
        bound = self.scale * jnp.sqrt(jnp.max(square[0] * square_key, axis=-1))  # [B]
        least = 2 * bound + math.log(self.keys / self.skip_error)
        if self.memory_tau is not None:
            least = jnp.maximum(least, self.memory_tau)
        return least

    def dead(self, carries, keys):
        """Which tiles of so many keys a block of queries skips.

        All their keys are forgotten, or of documents that have ended. F never
        decreases: what a block's first query skips, no later one needs.

        Returns bool [B, blocks, tiles].
        """
        first = self.offset + jnp.arange(self.blocks) * BLOCK  # positions
        end = jnp.arange(keys, self.columns + 1, keys)
        dead = jnp.zeros((self.batch, self.blocks, end.size), bool)
        if self.skip:
            tiles = carries.reshape(*carries.shape[:2], -1, keys)
            least = self.least / self.scale
            dead = jnp.min(tiles, axis=-1) > least[:, None, None]
            dead &= end <= first[:, None]
        if self.packed:
            dead |= end <= self.starts[:, first, None]
        return dead

    def dead_blocks(self, carries):
        """Which blocks of keys nobody in a block of queries needs, int32, or None."""
        if not self.sparse:
            return None
        return self.dead(carries, BLOCK).astype(jnp.int32)

    def live_tiles(self, carries, keys):
        """The list of tiles of each block of queries, and how many are not skipped.

        Both int32, [B, blocks, tiles] and [B, blocks]; those skipped are at the end.
        """
        if not self.sparse:
            return jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32)
        dead = self.dead(carries, keys)
        tiles = jnp.argsort(dead, axis=-1, stable=True).astype(jnp.int32)
        return tiles, jnp.sum(~dead, axis=-1, dtype=jnp.int32)

    def ends(self, carries, keys, columns):
        """One past the last query that needs each tile of keys, int32 [B, tiles].

        Of so many columns, where nobody needs those past the keys' last block.
        """
        last = jnp.arange(keys - 1, self.columns, keys)
        ends = jnp.full((self.batch, last.size), self.queries, jnp.int32)
        if self.packed:
            position = jnp.arange(self.keys, dtype=jnp.int32)
            start = jnp.where(self.starts == position, position, self.keys)
            padding = [(0, 0), (0, 1)]
            following = jnp.pad(start[:, 1:], padding, constant_values=self.keys)
            following = jax.lax.cummin(following, axis=1, reverse=True)
            last = jnp.minimum(last, self.keys - 1)
            ends = jnp.maximum(following[:, last] - self.offset, 0)
        if self.skip:
            live = jnp.sum(~self.dead(carries, keys), axis=1, dtype=jnp.int32)
            ends = jnp.minimum(ends, live * BLOCK)
        return jnp.pad(ends, [(0, 0), (0, columns // keys - ends.shape[1])])

    def bias(
        self,
        carries,
        dead_blocks,
        region,
        rows,
        columns,
        *,
        transposed=False,
        memory=False,
    ):
        """``-F / scale`` of a region of queries and keys, [B, rows, columns].

        In the order of `mask._store_fragments`; transposed, [B, columns, rows]. Beside
        it, None or with memory what bias_kernel counts as kept, [B, tiles, rows].
        Without dead_blocks no block is skipped.
        """
        tiling = self.tiling("mask")
        tiles = columns // tiling.keys
        kept = (self.batch, tiles, rows) if memory else (1, 1, 1)
        nothing = jnp.zeros(1, jnp.int32)
        bias, kept = _triton.call(
            mask.bias_kernel,
            self.query,
            self.key,
            self.starts,
            carries,
            nothing if dead_blocks is None else dead_blocks,
            nothing if self.expiry is None else self.expiry,
            region,
            self.limit(),
            self.queries,
            self.keys,
            self.blocks,
            self.columns,
            outputs=[self.array(self.batch, rows, columns), self.array(*kept)],
            grid=(tiles, rows // BLOCK, self.batch),
            num_warps=tiling.warps,
            num_stages=tiling.stages,
            max_registers=tiling.registers,
            HEADS=self.heads,
            ROWS=BLOCK,
            KEYS=tiling.keys,
            PACKED=self.packed,
            SKIP=self.sparse and dead_blocks is not None,
            TRANSPOSED=transposed,
            MEMORY=memory,
            SEPARATE=self.separate,
            HELD=self.expiry is not None,
            **self.key_sizes,
        )
        return bias, kept if memory else None

    def limit(self):
        """``tau / scale``, from which a key counts as forgotten; 0.0 if unused."""
        return 0.0 if self.memory_tau is None else self.memory_tau / self.scale

    def joined(self, x, length):
        """[B, length, ..] from that of chunks, [chunks, B, CHUNK, ..]."""
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(self.batch, -1, *x.shape[3:])[:, :length]

    def array(self, *shape, dtype=jnp.float32):
        """What an output of a kernel is."""
        return jax.ShapeDtypeStruct(shape, dtype)

    def flops(self, products):
        """Of so many matrix products in all heads and of all queries."""
        width = (self.key_width + self.value_width) // 2
        pairs = self.queries * (self.keys + self.offset) // 2
        return 2 * products * self.batch * self.heads * pairs * width


def padded(width):
    """The width of tiles of heads so wide."""
    return max(16, triton.next_power_of_2(width))


def chunks_of(length, size, limit):
    """Into how many chunks of which length to cut `length`, a multiple of BLOCK.

    What takes `size` bytes for each may take `limit` for a chunk.
    """
    most = max(limit // size // BLOCK, 1)
    blocks = length // BLOCK
    chunks = triton.cdiv(blocks, most)
    return chunks, triton.cdiv(blocks, chunks) * BLOCK


def firsts(chunks, chunk):
    """What chunks begin with, int32 [chunks]."""
    return jnp.arange(chunks, dtype=jnp.int32) * chunk
