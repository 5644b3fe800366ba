"""What is computed by chunks of queries for a given F: output, and query's gradient.

Letters as in `jattn.pallas.selective.triton`.
"""

import math

import jax
import jax.numpy as jnp

from jattn.pallas import _mosaic, _triton, tuning
from jattn.pallas._softmax import LOG2_E
from jattn.pallas.selective import (
    mosaic,
    mosaic_query_gradient,
    query_kernels,
)
from jattn.pallas.selective import work as shared
from jattn.pallas.selective.cotangents import Cotangents
from jattn.pallas.selective.work import (
    Work,
    chunks_of,
    firsts,
)

# Tiles of the same chunk differ in length, and so much that the last ones leave much of
# the GPU idle, if there are no more chunks than these. Then they are twice as long.
FEW_CHUNKS = 4


def forward(work: Work, carries):
    """Output, log-sum-exp and memory term."""
    if work.mosaic:
        return _mosaic_forward(work, carries)
    chunks, chunk = _query_chunks(work)
    shape = (*work.query.shape[:3], work.value_width)
    start = (
        jax.lax.empty(shape, work.value.dtype),
        jax.lax.empty(shape[:3], jnp.float32),
    )
    launch = _by_queries(work, "forward", carries, chunk, (), 2)
    (out, lse), kept = jax.lax.scan(launch, work.vary(start), firsts(chunks, chunk))
    if kept is None:
        return out, lse, None
    kept = jnp.sum(kept, axis=2)  # [chunks, B, chunk]
    return out, lse, work.joined(kept, work.queries)


def _mosaic_forward(work: Work, carries):
    """Output, log-sum-exp and memory term."""
    heuristic = mosaic.tiling(work.key_width, work.heads, work.heads // work.kv_heads)
    shape = work.shape | {"heads": work.heads}
    tiling = tuning.choose("selective_forward_mosaic", shape, heuristic)
    # The output of a single chunk is not copied.
    size = 4 * work.batch * work.columns
    chunks, chunk = chunks_of(work.rows, size, 4 * shared.CHUNK_BYTES)
    if chunks > 1:
        chunks, chunk = chunks_of(work.rows, size, 2 * shared.CHUNK_BYTES)
    dead_blocks = work.dead_blocks(carries)
    live = work.live_tiles(carries, tiling.keys) if work.sparse else None
    query = _mosaic.padded(work.query, 1, work.rows)
    key, value = (_mosaic.padded(x, 1, work.columns) for x in (work.key, work.value))
    rows = chunks * chunk
    shape = work.batch, rows, work.heads, work.value_width
    start = (
        jax.lax.empty(shape, value.dtype),
        jax.lax.empty((work.batch, work.heads, rows), jnp.float32),
    )

    def step(results, first):
        region = jnp.stack([first, jnp.zeros_like(first)])
        bias, kept = work.bias(
            carries,
            dead_blocks,
            region,
            chunk,
            work.columns,
            memory=work.memory_tau is not None,
        )
        parts = mosaic.forward(
            query,
            key,
            value,
            bias,
            region,
            live,
            queries=work.queries,
            offset=work.offset,
            scale=work.scale,
            tiling=tiling,
        )
        results = [
            jax.lax.dynamic_update_slice_in_dim(x, y, first, axis=axis)
            for x, y, axis in zip(results, parts, (1, 2), strict=True)
        ]
        return results, None if kept is None else jnp.sum(kept, axis=1)

    results, kept = jax.lax.scan(step, work.vary(start), firsts(chunks, chunk))
    out, lse = results[0], jnp.swapaxes(results[1], 1, 2)
    out, lse = (x[:, : work.queries] for x in (out, lse))
    return out, lse, None if kept is None else work.joined(kept, work.queries)


def query_gradient(work: Work, carries, cotangents: Cotangents):
    """The gradient of query for a given F."""
    if work.mosaic:
        return _mosaic_query_gradient(work, carries, cotangents)
    chunks, chunk = _query_chunks(work)
    start = [jax.lax.empty(work.query.shape, work.query.dtype)]
    arrays = cotangents.arrays
    launch = _by_queries(work, "query_gradient", carries, chunk, arrays, 3)
    return jax.lax.scan(launch, work.vary(start), firsts(chunks, chunk))[0][0]


def _mosaic_query_gradient(work: Work, carries, cotangents: Cotangents):
    """The gradient of query for a given F."""
    tiling = tuning.choose(
        "selective_query_gradient_mosaic",
        work.shape | {"heads": work.heads},
        mosaic_query_gradient.tiling(
            work.key_width, work.heads, work.heads // work.kv_heads
        ),
    )
    # The gradients of keys need more memory than these larger chunks.
    size = 4 * work.batch * work.columns
    chunks, chunk = chunks_of(work.rows, size, 4 * shared.CHUNK_BYTES)
    rows = chunks * chunk
    query, out_gradient = (
        _mosaic.padded(x, 1, rows) for x in (work.query, cotangents.out_gradient)
    )
    key, value = (_mosaic.padded(x, 1, work.columns) for x in (work.key, work.value))
    per_row = cotangents.statistics(tiling.pack, mosaic_query_gradient.ROWS, rows)
    dead_blocks = work.dead_blocks(carries)
    live = work.live_tiles(carries, mosaic_query_gradient.KEYS)

    def step(_, first):
        region = jnp.stack([first, jnp.zeros_like(first)])
        bias, _ = work.bias(carries, dead_blocks, region, chunk, work.columns)
        gradient = mosaic_query_gradient.query_gradient(
            query,
            key,
            value,
            bias,
            per_row,
            out_gradient,
            live if work.sparse else None,
            region,
            queries=work.queries,
            offset=work.offset,
            block=work.block,
            scale=work.scale,
            tiling=tiling,
        )
        return None, gradient

    _, gradient = jax.lax.scan(step, None, firsts(chunks, chunk))
    return work.joined(gradient, work.queries)


def _query_chunks(work: Work):
    """Into how many chunks of which length to cut the queries."""
    size = 4 * work.batch * work.columns
    chunks, chunk = chunks_of(work.rows, size, shared.CHUNK_BYTES)
    if chunks <= FEW_CHUNKS:
        chunks, chunk = chunks_of(work.rows, size, 2 * shared.CHUNK_BYTES)
    return chunks, chunk


def _by_queries(work: Work, name, carries, chunk, cotangents, products):
    """A step of a scan over chunks of queries, which launches a kernel on each.

    Takes the results, which the kernel updates, and the first query; returns them
    and, of the forward kernel with a memory term, what bias_kernel counts as kept.
    """
    tiling = work.tiling(name)
    group = work.heads // work.kv_heads
    pack = math.gcd(group, tiling.heads, tiling.rows // 16)
    streams = math.gcd(work.heads // pack, max(tiling.heads // pack, 1))
    tokens = tiling.rows // pack
    dead_blocks = work.dead_blocks(carries)
    live_tiles = work.live_tiles(carries, tiling.keys)

    def launch(results, first):
        region = jnp.stack([first, jnp.zeros_like(first)])
        bias, kept = work.bias(
            carries,
            dead_blocks,
            region,
            chunk,
            work.columns,
            memory=name == "forward" and work.memory_tau is not None,
        )
        operands = (
            work.query,
            work.key,
            work.value,
            bias,
            work.starts,
            *live_tiles,
            region,
            *cotangents,
        )
        results = _triton.call(
            getattr(query_kernels, f"{name}_kernel"),
            *operands,
            *results,
            float(work.scale) * LOG2_E,
            work.queries,
            work.keys,
            work.blocks,
            work.columns,
            outputs=[],
            updated=range(len(operands), len(operands) + len(results)),
            grid=(work.heads // (pack * streams) * (chunk // tokens), work.batch),
            num_warps=tiling.warps,
            num_stages=tiling.stages,
            max_registers=tiling.registers,
            flops=work.flops(products) * chunk // work.rows,
            CHUNK=chunk,
            BLOCK=work.block,
            ROWS=tiling.rows,
            KEYS=tiling.keys,
            PACK=pack,
            STREAMS=streams,
            AHEAD=tiling.ahead,
            SKIP=work.skip,
            TILES=work.columns // tiling.keys,
            **work.sizes,
        )
        return results, kept

    return launch
