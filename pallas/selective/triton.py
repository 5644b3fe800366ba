"""Selective Attention in Triton, with F in memory for a chunk at a time.

F is the same for all heads. Column sums of what each block of queries selects, and
their running sums over the blocks (the carries, T S / BLOCK numbers), let any region of
F be computed by itself. A scan over chunks of queries writes the chunk's F and attends
with it in all heads; F and the gradients below take bounded memory.

Backward goes twice through F: by chunks of queries for the query's gradient, and by
chunks of keys for those of key and value. The gradient of F[i, j] is that of the logits
summed over heads; one of q_t·k_j of the selecting head is the sum of those over i > t.
With all queries of a chunk of keys at hand, these sums need nothing from other chunks.
The gradient of the logits is a by-product of those of key and value: it is kept where
few programs share a tile, and else computed once more, by a program that has all heads.
The memory term adds to it where F is below tau.

What attends with F, forward and backward, is Mosaic GPU's if that supports the call.

Nothing is added atomically: same input, same bits.

Letters: B batch, T queries, S keys, N query heads, K kv heads, H key width, V value
width; `rows` and `columns` are T and S rounded up to whole blocks, `blocks` are those
of queries.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import triton

from jattn.ops._common import document_starts
from jattn.pallas import _softmax, _triton, tuning
from jattn.pallas.selective import (
    attention,
    mask,
    mosaic,
    mosaic_key_gradient,
    mosaic_query_gradient,
    unsupported_mosaic_forward,
)

LOG2_E = math.log2(math.e)

# Queries of one carry. Tiles of queries divide it, and so do tiles of keys.
BLOCK = 128

# What one chunk of F takes at most (but at least that of BLOCK queries or keys), or up
# to four times as much where few chunks are better, and all that backward has of a
# chunk of keys.
CHUNK_BYTES = 64 * 2**20
GRADIENT_BYTES = 704 * 2**20

# Tiles of the same chunk differ in length, and so much that the last ones leave much of
# the GPU idle, if there are no more chunks than these. Then they are twice as long.
FEW_CHUNKS = 4

# Programs that a GPU runs at once, about.
PROGRAMS = 264

# Among how many to divide a sum over the queries, of which there are many more than of
# anything else that a matrix product could be divided by.
SUMMANDS = 8

# If as many heads share a program for the gradients of keys, it keeps the gradient of
# their logits, to be added up for that of F. With fewer it is computed a second time.
KEEPING_HEADS = 4
MOSAIC_KEEPING_HEADS = 2


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    initial_mask: jax.Array,
    starts: jax.Array | None,
    scale: float,
    skip_error: float = 0.0,
    memory_tau: float | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Selective attention, differentiable in all but starts.

    Args:
      query: [B, T, N, H].
      key: [B, S, K, H].
      value: [B, S, K, V].
      initial_mask: fp32 [B, S], row F of the first query.
      starts: int32 [B, S], position of the first token of each token's document; None
        if a row is one document.
      scale: Factor of the logits, positive.
      skip_error: Weight of a query's softmax that may be left out.
      memory_tau: Tau of the memory term, or None to leave it out. It is exact: with
        it only keys whose F has reached tau are skipped, which count nothing.

    Returns:
      Output [B, T, N, V], log-sum-exp [B, T, N] and memory term [B, T] or None, both in
      fp32.
    """
    work = _Work(query, key, value, starts, scale, skip_error, memory_tau)
    return work.forward(work.carries(initial_mask))


def _attend_forward(
    query, key, value, initial_mask, starts, scale, skip_error, memory_tau
):
    work = _Work(query, key, value, starts, scale, skip_error, memory_tau)
    carries = work.carries(initial_mask)
    out, lse, memory = work.forward(carries)
    return (out, lse, memory), (query, key, value, starts, carries, out, lse)


def _attend_backward(scale, skip_error, memory_tau, residuals, gradients):
    query, key, value, starts, carries, out, lse = residuals
    work = _Work(query, key, value, starts, scale, skip_error, memory_tau)
    return *work.backward(carries, out, lse, *gradients), None


attend.defvjp(_attend_forward, _attend_backward)


def skipped_tiles(
    query: jax.Array,
    key: jax.Array,
    segment_ids: jax.Array | None,
    scale: float,
    skip_error: float,
    keys: int,
) -> tuple[jax.Array, jax.Array]:
    """How many tiles of BLOCK queries and so many keys are skipped, and of how many.

    Args:
      query: [B, T, N, H], of all keys.
      key: [B, T, K, H].
      segment_ids: int [B, T] or None. Tiles of other documents do not count as skipped.
      scale: Factor of the logits.
      skip_error: As in attend.
      keys: Those of a tile.

    Returns:
      Two int32 numbers, the second of all tiles that are visible in part.
    """
    starts = None if segment_ids is None else document_starts(segment_ids)
    work = _Work(query, key, key, starts, scale, skip_error, None)
    carries = work.carries(jnp.zeros(key.shape[:2], jnp.float32))
    first = jnp.arange(work.blocks) * BLOCK
    tile = jnp.arange(0, work.columns, keys)
    visible = tile < jnp.minimum(first + BLOCK, work.queries)[:, None]
    if starts is not None:
        visible &= tile + keys > starts[:, first, None]
    visible = jnp.broadcast_to(visible, (work.batch, *visible.shape[-2:]))
    return jnp.sum(visible & work.dead(carries, keys)), jnp.sum(visible)


class _Work:
    """One call's arrays and sizes, and its launches."""

    def __init__(self, query, key, value, starts, scale, skip_error, memory_tau):
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
            KV_HEADS=self.kv_heads, H=self.key_width, H_PAD=_padded(self.key_width)
        )
        self.sizes: dict[str, Any] = self.key_sizes | dict(
            GROUP=self.heads // self.kv_heads,
            V=self.value_width,
            V_PAD=_padded(self.value_width),
            PACKED=self.packed,
        )
        reason = unsupported_mosaic_forward(query, value, packed=self.packed)
        self.mosaic = reason is None
        self.vary = functools.partial(_triton.vary_like, arrays=(query, key, value))

    def _tiling(self, name):
        return tuning.choose(f"selective_{name}", self.shape, self.tilings[name])

    def carries(self, initial_mask):
        """``F / scale`` of each block's first query, [B, blocks, columns]."""
        tiling = self._tiling("mask")
        [sums] = _triton.call(
            mask.sums_kernel,
            self.query,
            self.key,
            self.starts,
            self.queries,
            self.keys,
            self.columns,
            outputs=[self._array(self.batch, self.blocks, self.columns)],
            grid=(self.columns // tiling.keys, self.blocks, self.batch),
            num_warps=tiling.warps,
            num_stages=tiling.stages,
            flops=self._flops(1) // self.heads,
            HEADS=self.heads,
            ROWS=BLOCK,
            KEYS=tiling.keys,
            PACKED=self.packed,
            **self.key_sizes,
        )
        padding = [(0, 0), (0, self.columns - self.keys)]
        first = jnp.pad(initial_mask / self.scale, padding)
        sums = jnp.concatenate([first[:, None], sums[:, :-1]], axis=1)
        return jnp.cumsum(sums, axis=1)

    def dead(self, carries, keys):
        """Which tiles of so many keys a block of queries skips.

        A query's own key is never forgotten, so that its weight is at least exp(-U),
        where U bounds all logits. The weights of S keys with a larger F than the one
        below sum to less than S exp(U - F), which is the part `skip_error` of that. F
        never decreases: what a block's first query skips, no later one needs. The
        memory term needs all keys with an F below tau.

        Returns bool [B, blocks, tiles].
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
        tiles = carries.reshape(*carries.shape[:2], -1, keys)
        dead = jnp.min(tiles, axis=-1) > (least / self.scale)[:, None, None]
        first = self.offset + jnp.arange(self.blocks) * BLOCK  # positions
        end = jnp.arange(keys, self.columns + 1, keys)
        dead &= end <= first[:, None]
        if self.packed:
            dead |= end <= self.starts[:, first, None]
        return dead

    def forward(self, carries):
        """Output, log-sum-exp and memory term."""
        if self.mosaic:
            return self._mosaic_forward(carries)
        chunks, chunk = self._query_chunks()
        shape = (*self.query.shape[:3], self.value_width)
        start = (
            jax.lax.empty(shape, self.value.dtype),
            jax.lax.empty(shape[:3], jnp.float32),
        )
        launch = self._by_queries("forward", carries, chunk, (), 2)
        (out, lse), kept = jax.lax.scan(
            launch, self.vary(start), _firsts(chunks, chunk)
        )
        if kept is None:
            return out, lse, None
        kept = jnp.sum(kept, axis=2)  # [chunks, B, chunk]
        return out, lse, self._joined(kept, self.queries)

    def _mosaic_forward(self, carries):
        """Output, log-sum-exp and memory term."""
        heuristic = mosaic.tiling(
            self.key_width, self.heads, self.heads // self.kv_heads
        )
        shape = self.shape | {"heads": self.heads}
        tiling = tuning.choose("selective_forward_mosaic", shape, heuristic)
        # The output of a single chunk is not copied.
        size = 4 * self.batch * self.columns
        chunks, chunk = _chunks(self.rows, size, 4 * CHUNK_BYTES)
        if chunks > 1:
            chunks, chunk = _chunks(self.rows, size, 2 * CHUNK_BYTES)
        dead_blocks = self._dead_blocks(carries)
        live = self._live_tiles(carries, tiling.keys) if self.skip else None
        query = _lengthened(self.query, self.rows)
        key, value = (_lengthened(x, self.columns) for x in (self.key, self.value))
        rows = chunks * chunk
        shape = self.batch, rows, self.heads, self.value_width
        start = (
            jax.lax.empty(shape, value.dtype),
            jax.lax.empty((self.batch, self.heads, rows), jnp.float32),
        )

        def step(results, first):
            region = jnp.stack([first, jnp.zeros_like(first)])
            bias, kept = self._bias(
                carries,
                dead_blocks,
                region,
                chunk,
                self.columns,
                memory=self.memory_tau is not None,
            )
            parts = mosaic.forward(
                query,
                key,
                value,
                bias,
                region,
                live,
                queries=self.queries,
                offset=self.offset,
                scale=self.scale,
                tiling=tiling,
            )
            results = [
                jax.lax.dynamic_update_slice_in_dim(x, y, first, axis=axis)
                for x, y, axis in zip(results, parts, (1, 2), strict=True)
            ]
            return results, None if kept is None else jnp.sum(kept, axis=1)

        results, kept = jax.lax.scan(step, self.vary(start), _firsts(chunks, chunk))
        out, lse = results[0], jnp.swapaxes(results[1], 1, 2)
        out, lse = (x[:, : self.queries] for x in (out, lse))
        return out, lse, None if kept is None else self._joined(kept, self.queries)

    def _joined(self, x, length):
        """[B, length, ..] from that of chunks, [chunks, B, CHUNK, ..]."""
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(self.batch, -1, *x.shape[3:])[:, :length]

    def backward(self, carries, out, lse, *gradients):
        """Gradients of query, key, value and initial_mask.

        From those of output, log-sum-exp and memory term.
        """
        out_gradient, lse_gradient, memory_gradient = gradients
        delta = _softmax.delta(out, out_gradient, lse_gradient)
        cotangents = out_gradient, lse * LOG2_E, delta
        query_gradient = self._query_gradient(carries, cotangents)
        selecting, key_gradient, value_gradient, mask_gradient = self._key_gradients(
            carries, cotangents, memory_gradient
        )
        selecting += query_gradient[:, :, 0].astype(jnp.float32)
        query_gradient = query_gradient.at[:, :, 0].set(
            selecting.astype(query_gradient.dtype)
        )
        return query_gradient, key_gradient, value_gradient, mask_gradient

    def _query_gradient(self, carries, cotangents):
        """The gradient of query for a given F."""
        if self.mosaic:
            return self._mosaic_query_gradient(carries, *cotangents)
        chunks, chunk = self._query_chunks()
        start = [jax.lax.empty(self.query.shape, self.query.dtype)]
        launch = self._by_queries("query_gradient", carries, chunk, cotangents, 3)
        return jax.lax.scan(launch, self.vary(start), _firsts(chunks, chunk))[0][0]

    def _mosaic_query_gradient(self, carries, out_gradient, shift, delta):
        """The gradient of query for a given F."""
        tiling = tuning.choose(
            "selective_query_gradient_mosaic",
            self.shape | {"heads": self.heads},
            mosaic_query_gradient.tiling(
                self.key_width, self.heads, self.heads // self.kv_heads
            ),
        )
        # The gradients of keys need more memory than these larger chunks.
        size = 4 * self.batch * self.columns
        chunks, chunk = _chunks(self.rows, size, 4 * CHUNK_BYTES)
        rows = chunks * chunk
        query, out_gradient = (_lengthened(x, rows) for x in (self.query, out_gradient))
        key, value = (_lengthened(x, self.columns) for x in (self.key, self.value))
        per_row = mosaic_key_gradient.statistics(shift, delta, tiling.pack, rows)
        dead_blocks = self._dead_blocks(carries)
        live = self._live_tiles(carries, mosaic_query_gradient.KEYS)

        def step(_, first):
            region = jnp.stack([first, jnp.zeros_like(first)])
            bias, _ = self._bias(carries, dead_blocks, region, chunk, self.columns)
            gradient = mosaic_query_gradient.query_gradient(
                query,
                key,
                value,
                bias,
                per_row,
                out_gradient,
                live if self.skip else None,
                region,
                queries=self.queries,
                offset=self.offset,
                block=BLOCK,
                scale=self.scale,
                tiling=tiling,
            )
            return None, gradient

        _, gradient = jax.lax.scan(step, None, _firsts(chunks, chunk))
        return self._joined(gradient, self.queries)

    def _query_chunks(self):
        """Into how many chunks of which length to cut the queries."""
        size = 4 * self.batch * self.columns
        chunks, chunk = _chunks(self.rows, size, CHUNK_BYTES)
        if chunks <= FEW_CHUNKS:
            chunks, chunk = _chunks(self.rows, size, 2 * CHUNK_BYTES)
        return chunks, chunk

    def _by_queries(self, name, carries, chunk, cotangents, products):
        """A step of a scan over chunks of queries, which launches a kernel on each.

        Takes the results, which the kernel updates, and the first query; returns them
        and, of the forward kernel with a memory term, what bias_kernel counts as kept.
        """
        tiling = self._tiling(name)
        group = self.heads // self.kv_heads
        pack = math.gcd(group, tiling.heads, tiling.rows // 16)
        streams = math.gcd(self.heads // pack, max(tiling.heads // pack, 1))
        tokens = tiling.rows // pack
        dead_blocks = self._dead_blocks(carries)
        live_tiles = self._live_tiles(carries, tiling.keys)

        def launch(results, first):
            region = jnp.stack([first, jnp.zeros_like(first)])
            bias, kept = self._bias(
                carries,
                dead_blocks,
                region,
                chunk,
                self.columns,
                memory=name == "forward" and self.memory_tau is not None,
            )
            operands = (
                self.query,
                self.key,
                self.value,
                bias,
                self.starts,
                *live_tiles,
                region,
                *cotangents,
            )
            results = _triton.call(
                getattr(attention, f"{name}_kernel"),
                *operands,
                *results,
                float(self.scale) * LOG2_E,
                self.queries,
                self.keys,
                self.blocks,
                self.columns,
                outputs=[],
                updated=range(len(operands), len(operands) + len(results)),
                grid=(self.heads // (pack * streams) * (chunk // tokens), self.batch),
                num_warps=tiling.warps,
                num_stages=tiling.stages,
                max_registers=tiling.registers,
                flops=self._flops(products) * chunk // self.rows,
                CHUNK=chunk,
                BLOCK=BLOCK,
                ROWS=tiling.rows,
                KEYS=tiling.keys,
                PACK=pack,
                STREAMS=streams,
                AHEAD=tiling.ahead,
                SKIP=self.skip,
                TILES=self.columns // tiling.keys,
                **self.sizes,
            )
            return results, kept

        return launch

    def _key_gradients(self, carries, cotangents, memory_gradient):
        """Gradients of the selecting head's query (by F alone), key, value and mask."""
        mask_tiling = self._tiling("mask_gradient")
        if self.mosaic:
            prepare = self._mosaic_key_gradients
            tiling = self._mosaic_key_tiling()
            members, keeping = tiling.members, MOSAIC_KEEPING_HEADS
        else:
            prepare = self._triton_key_gradients
            tiling = self._tiling("key_gradient")
            members = math.gcd(self.heads // self.kv_heads, tiling.heads)
            keeping = KEEPING_HEADS
        parts = self.heads // members if members >= keeping else 0
        if parts:
            # What one kernel has left out, the other does not read.
            mask_tiling = dataclasses.replace(mask_tiling, keys=tiling.keys)
        # Of each key: F, the parts of the gradient of the logits and their sum, and the
        # gradient of the selecting head's products.
        size = self.batch * self.rows * (4 * (2 + parts) + self.query.dtype.itemsize)
        chunks, chunk = _chunks(self.columns, size, GRADIENT_BYTES)
        columns = chunks * chunk
        selecting_query = _lengthened(self.query[:, :, 0], self.rows)
        summands = math.gcd(self.blocks, SUMMANDS)
        selecting_key = _lengthened(self.key[:, :, 0], columns)
        product = functools.partial(
            jnp.einsum,
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
        dead_blocks = self._dead_blocks(carries)
        ends, mask_ends = (
            self._ends(carries, x.keys, columns) for x in (tiling, mask_tiling)
        )
        attend = prepare(ends, cotangents, chunk, columns, tiling, parts > 0)

        def step(selecting, first):
            region = jnp.stack([jnp.zeros_like(first), first])
            bias, _ = self._bias(
                carries, dead_blocks, region, self.rows, chunk, transposed=True
            )
            key_gradient, value_gradient, parts_gradient = attend(bias, region)
            operands = self.query, self.key, self.value, bias, self.starts
            gradient, mask_gradient = self._selection_gradient(
                (*operands, mask_ends, region, *cotangents, parts_gradient),
                chunk,
                columns,
                mask_tiling,
                parts,
                memory_gradient,
            )
            keys = jax.lax.dynamic_slice_in_dim(selecting_key, first, chunk, axis=1)
            selecting += product("bts,bsh->bth", gradient, keys)
            selected = [
                x.reshape(self.batch, summands, -1, x.shape[-1])
                for x in (gradient, selecting_query)
            ]
            selected = jnp.sum(product("bzts,bzth->bzsh", *selected), axis=1)
            key_gradient = key_gradient.at[:, :, 0].add(selected)
            return selecting, (
                key_gradient.astype(self.key.dtype),
                value_gradient.astype(self.value.dtype),
                mask_gradient,
            )

        [start] = self.vary([jnp.zeros(selecting_query.shape, jnp.float32)])
        selecting, gradients = jax.lax.scan(step, start, _firsts(chunks, chunk))
        gradients = [self._joined(x, self.keys) for x in gradients]
        return selecting[:, : self.queries], *gradients

    def _bias(
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
        """
        tiling = self._tiling("mask")
        tiles = columns // tiling.keys
        kept = (self.batch, tiles, rows) if memory else (1, 1, 1)
        bias, kept = _triton.call(
            mask.bias_kernel,
            self.query,
            self.key,
            self.starts,
            carries,
            dead_blocks,
            region,
            self._limit(),
            self.queries,
            self.keys,
            self.blocks,
            self.columns,
            outputs=[self._array(self.batch, rows, columns), self._array(*kept)],
            grid=(tiles, rows // BLOCK, self.batch),
            num_warps=tiling.warps,
            num_stages=tiling.stages,
            max_registers=tiling.registers,
            HEADS=self.heads,
            ROWS=BLOCK,
            KEYS=tiling.keys,
            PACKED=self.packed,
            SKIP=self.skip,
            TRANSPOSED=transposed,
            MEMORY=memory,
            **self.key_sizes,
        )
        return bias, kept if memory else None

    def _limit(self):
        """``tau / scale``, from which a key counts as forgotten; 0.0 if unused."""
        return 0.0 if self.memory_tau is None else self.memory_tau / self.scale

    def _dead_blocks(self, carries):
        """Which blocks of keys nobody in a block of queries needs, int32."""
        if not self.skip:
            return jnp.zeros(1, jnp.int32)
        return self.dead(carries, BLOCK).astype(jnp.int32)

    def _live_tiles(self, carries, keys):
        """The list of tiles of each block of queries, and how many are not skipped.

        Both int32, [B, blocks, tiles] and [B, blocks]; those skipped are at the end.
        """
        if not self.skip:
            return jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32)
        dead = self.dead(carries, keys)
        tiles = jnp.argsort(dead, axis=-1, stable=True).astype(jnp.int32)
        return tiles, jnp.sum(~dead, axis=-1, dtype=jnp.int32)

    def _triton_key_gradients(self, ends, cotangents, chunk, columns, tiling, keep):
        """How to get gradients from F and the region of a chunk of keys.

        Those of key and value for a given F, [B, CHUNK, K, ..] in fp32; and if they are
        to be kept that of the logits, in parts of the heads.
        """
        members = math.gcd(self.heads // self.kv_heads, tiling.heads)
        parts = self.heads // members
        tiles = parts * (chunk // tiling.keys)
        slices = triton.cdiv(PROGRAMS, self.batch * tiles)
        slices = min(slices, self.rows // BLOCK)
        shape = slices, self.batch, chunk, parts
        kept = (parts, self.batch, chunk, self.rows) if keep else (1, 1, 1, 1)

        def attend(bias, region):
            key_gradient, value_gradient, parts_gradient = _triton.call(
                attention.key_gradient_kernel,
                self.query,
                self.key,
                self.value,
                bias,
                self.starts,
                ends,
                region,
                *cotangents,
                float(self.scale) * LOG2_E,
                self.queries,
                self.keys,
                self.rows,
                columns,
                outputs=[
                    self._array(*shape, self.key_width),
                    self._array(*shape, self.value_width),
                    self._array(*kept),
                ],
                grid=(tiles, slices, self.batch),
                num_warps=tiling.warps,
                num_stages=tiling.stages,
                max_registers=tiling.registers,
                flops=self._flops(4) * chunk // self.columns,
                CHUNK=chunk,
                ROWS=tiling.rows,
                KEYS=tiling.keys,
                MEMBERS=members,
                SLICES=slices,
                AHEAD=tiling.ahead,
                KEEP=keep,
                **self.sizes,
            )
            return *self._added(key_gradient, value_gradient), parts_gradient

        return attend

    def _mosaic_key_tiling(self):
        return tuning.choose(
            "selective_key_gradient_mosaic",
            self.shape | {"heads": self.heads},
            mosaic_key_gradient.tiling(
                self.key_width, self.heads, self.heads // self.kv_heads
            ),
        )

    def _mosaic_key_gradients(self, ends, cotangents, _, columns, tiling, keep):
        """What _triton_key_gradients gives."""
        out_gradient, shift, delta = cotangents
        query, out_gradient = (
            _lengthened(x, self.rows) for x in (self.query, out_gradient)
        )
        key, value = (_lengthened(x, columns) for x in (self.key, self.value))
        per_row = mosaic_key_gradient.statistics(
            shift, delta, tiling.members, self.rows
        )

        def attend(bias, region):
            key_gradient, value_gradient, parts = mosaic_key_gradient.key_gradients(
                query,
                key,
                value,
                bias.reshape(self.batch, -1, self.rows),
                per_row,
                out_gradient,
                ends,
                region,
                queries=self.queries,
                offset=self.offset,
                scale=self.scale,
                keep=keep,
                tiling=tiling,
            )
            if parts is None:
                parts = jnp.zeros((1, 1, 1, 1), jnp.float32)
            return *self._added(key_gradient, value_gradient), parts

        return attend

    def _added(self, *partial_sums):
        """Gradients of key and value [B, CHUNK, K, ..] from partial sums.

        Each is [SLICES, B, CHUNK, PARTS, ..], the first one without the factor scale.
        """

        def total(x):
            x = x.reshape(*x.shape[:3], self.kv_heads, -1, x.shape[-1])
            return jnp.sum(x, axis=(0, 4))

        key_gradient, value_gradient = map(total, partial_sums)
        return self.scale * key_gradient, value_gradient

    def _selection_gradient(
        self, operands, chunk, columns, tiling, parts, memory_gradient
    ):
        """The gradient of the selecting head's products by F alone, [B, rows, chunk].

        And that of the initial mask, [B, chunk].
        """
        tiles = self.rows // tiling.rows
        grid = (chunk // tiling.keys, tiles, self.batch)
        if memory_gradient is None:
            memory_gradient = jnp.zeros((1, 1), jnp.float32)
        else:
            memory_gradient = memory_gradient / self.memory_tau
        gradient, sums = _triton.call(
            attention.mask_gradient_kernel,
            *operands,
            memory_gradient,
            float(self.scale) * LOG2_E,
            self._limit(),
            self.queries,
            self.keys,
            self.rows,
            columns,
            outputs=[
                self._array(self.batch, self.rows, chunk),
                self._array(self.batch, tiles, chunk),
            ],
            grid=grid,
            num_warps=tiling.warps,
            num_stages=tiling.stages,
            max_registers=tiling.registers,
            flops=0 if parts else self._flops(2) * chunk // self.columns,
            CHUNK=chunk,
            ROWS=tiling.rows,
            KEYS=tiling.keys,
            AHEAD=tiling.ahead,
            PARTS=parts,
            MEMORY=self.memory_tau is not None,
            **self.sizes,
        )
        until = jnp.cumsum(sums[:, ::-1], axis=1)[:, ::-1]
        later = jnp.pad(until[:, 1:], [(0, 0), (0, 1), (0, 0)])
        query, key, _, _, starts, ends, region, *_ = operands
        [gradient] = _triton.call(
            mask.selection_gradient_kernel,
            query,
            key,
            starts,
            ends,
            gradient,
            later,
            region,
            float(self.scale),
            self.queries,
            self.keys,
            columns,
            outputs=[self._array(self.batch, self.rows, chunk, dtype=query.dtype)],
            grid=grid,
            num_warps=tiling.warps,
            num_stages=1,
            HEADS=self.heads,
            CHUNK=chunk,
            ROWS=tiling.rows,
            KEYS=tiling.keys,
            PACKED=self.packed,
            **self.key_sizes,
        )
        return gradient, -until[:, 0]

    def _ends(self, carries, keys, columns):
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

    def _array(self, *shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    def _flops(self, products):
        """Of so many matrix products in all heads and of all queries."""
        width = (self.key_width + self.value_width) // 2
        pairs = self.queries * (self.keys + self.offset) // 2
        return 2 * products * self.batch * self.heads * pairs * width


def _lengthened(x, length):
    """[B, length, ..] of an array [B, T, ..], with zeros at the end."""
    padding = [(0, 0)] * x.ndim
    padding[1] = (0, length - x.shape[1])
    return jnp.pad(x, padding)


def _padded(width):
    return max(16, triton.next_power_of_2(width))


def _chunks(length, size, limit):
    """Into how many chunks of which length to cut `length`, a multiple of BLOCK.

    What takes `size` bytes for each may take `limit` for a chunk.
    """
    most = max(limit // size // BLOCK, 1)
    blocks = length // BLOCK
    chunks = triton.cdiv(blocks, most)
    return chunks, triton.cdiv(blocks, chunks) * BLOCK


def _firsts(chunks, chunk):
    return jnp.arange(chunks, dtype=jnp.int32) * chunk
