"""What is computed by chunks of keys: gradients of keys, values, F and the selecting.

Letters as in `jattn.pallas.selective.triton`.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import triton

from jattn.pallas import _triton, tuning
from jattn.pallas.selective import attention, mask, mosaic_key_gradient
from jattn.pallas.selective import work as shared
from jattn.pallas.selective.work import (
    LOG2_E,
    Work,
    chunks_of,
    firsts,
    lengthened,
)

# Programs that a GPU runs at once, about.
PROGRAMS = 264

# Among how many to divide a sum over the queries, of which there are many more than of
# anything else that a matrix product could be divided by.
SUMMANDS = 8


def key_gradients(work: Work, carries, cotangents, memory_gradient):
    """Gradients of the selecting head's query (by F alone), key, value and mask."""
    mask_tiling = work.tiling("mask_gradient")
    if work.mosaic:
        prepare = _mosaic_key_gradients
        tiling = _mosaic_key_tiling(work)
        members, keeping = tiling.members, shared.MOSAIC_KEEPING_HEADS
    else:
        prepare = _triton_key_gradients
        tiling = work.tiling("key_gradient")
        members = math.gcd(work.heads // work.kv_heads, tiling.heads)
        keeping = shared.KEEPING_HEADS
    parts = work.heads // members if members >= keeping else 0
    if parts:
        # What one kernel has left out, the other does not read.
        mask_tiling = dataclasses.replace(mask_tiling, keys=tiling.keys)
    # Of each key: F, the parts of the gradient of the logits and their sum, and the
    # gradient of the selecting head's products.
    size = work.batch * work.rows * (4 * (2 + parts) + work.query.dtype.itemsize)
    chunks, chunk = chunks_of(work.columns, size, shared.GRADIENT_BYTES)
    columns = chunks * chunk
    selecting_query = lengthened(work.query[:, :, 0], work.rows)
    summands = math.gcd(work.blocks, SUMMANDS)
    selecting_key = lengthened(work.key[:, :, 0], columns)
    product = functools.partial(
        jnp.einsum,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    dead_blocks = work.dead_blocks(carries)
    ends, mask_ends = (
        work.ends(carries, x.keys, columns) for x in (tiling, mask_tiling)
    )
    attend = prepare(work, ends, cotangents, chunk, columns, tiling, parts > 0)

    def step(selecting, first):
        region = jnp.stack([jnp.zeros_like(first), first])
        bias, _ = work.bias(
            carries, dead_blocks, region, work.rows, chunk, transposed=True
        )
        key_gradient, value_gradient, parts_gradient = attend(bias, region)
        operands = work.query, work.key, work.value, bias, work.starts
        gradient, mask_gradient = _selection_gradient(
            work,
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
            x.reshape(work.batch, summands, -1, x.shape[-1])
            for x in (gradient, selecting_query)
        ]
        selected = jnp.sum(product("bzts,bzth->bzsh", *selected), axis=1)
        key_gradient = key_gradient.at[:, :, 0].add(selected)
        return selecting, (
            key_gradient.astype(work.key.dtype),
            value_gradient.astype(work.value.dtype),
            mask_gradient,
        )

    [start] = work.vary([jnp.zeros(selecting_query.shape, jnp.float32)])
    selecting, gradients = jax.lax.scan(step, start, firsts(chunks, chunk))
    gradients = [work.joined(x, work.keys) for x in gradients]
    return selecting[:, : work.queries], *gradients


def _triton_key_gradients(work: Work, ends, cotangents, chunk, columns, tiling, keep):
    """How to get gradients from F and the region of a chunk of keys.

    Those of key and value for a given F, [B, CHUNK, K, ..] in fp32; and if they are
    to be kept that of the logits, in parts of the heads.
    """
    members = math.gcd(work.heads // work.kv_heads, tiling.heads)
    parts = work.heads // members
    tiles = parts * (chunk // tiling.keys)
    slices = triton.cdiv(PROGRAMS, work.batch * tiles)
    slices = min(slices, work.rows // work.block)
    shape = slices, work.batch, chunk, parts
    kept = (parts, work.batch, chunk, work.rows) if keep else (1, 1, 1, 1)

    def attend(bias, region):
        key_gradient, value_gradient, parts_gradient = _triton.call(
            attention.key_gradient_kernel,
            work.query,
            work.key,
            work.value,
            bias,
            work.starts,
            ends,
            region,
            *cotangents,
            float(work.scale) * LOG2_E,
            work.queries,
            work.keys,
            work.rows,
            columns,
            outputs=[
                work.array(*shape, work.key_width),
                work.array(*shape, work.value_width),
                work.array(*kept),
            ],
            grid=(tiles, slices, work.batch),
            num_warps=tiling.warps,
            num_stages=tiling.stages,
            max_registers=tiling.registers,
            flops=work.flops(4) * chunk // work.columns,
            CHUNK=chunk,
            ROWS=tiling.rows,
            KEYS=tiling.keys,
            MEMBERS=members,
            SLICES=slices,
            AHEAD=tiling.ahead,
            KEEP=keep,
            **work.sizes,
        )
        return *_added(work, key_gradient, value_gradient), parts_gradient

    return attend


def _mosaic_key_tiling(work: Work):
    return tuning.choose(
        "selective_key_gradient_mosaic",
        work.shape | {"heads": work.heads},
        mosaic_key_gradient.tiling(
            work.key_width, work.heads, work.heads // work.kv_heads
        ),
    )


def _mosaic_key_gradients(work: Work, ends, cotangents, _, columns, tiling, keep):
    """What _triton_key_gradients gives."""
    out_gradient, shift, delta = cotangents
    query, out_gradient = (lengthened(x, work.rows) for x in (work.query, out_gradient))
    key, value = (lengthened(x, columns) for x in (work.key, work.value))
    per_row = mosaic_key_gradient.statistics(shift, delta, tiling.members, work.rows)

    def attend(bias, region):
        key_gradient, value_gradient, parts = mosaic_key_gradient.key_gradients(
            query,
            key,
            value,
            bias.reshape(work.batch, -1, work.rows),
            per_row,
            out_gradient,
            ends,
            region,
            queries=work.queries,
            offset=work.offset,
            scale=work.scale,
            keep=keep,
            tiling=tiling,
        )
        if parts is None:
            parts = jnp.zeros((1, 1, 1, 1), jnp.float32)
        return *_added(work, key_gradient, value_gradient), parts

    return attend


def _added(work: Work, *partial_sums):
    """Gradients of key and value [B, CHUNK, K, ..] from partial sums.

    Each is [SLICES, B, CHUNK, PARTS, ..], the first one without the factor scale.
    """

    def total(x):
        x = x.reshape(*x.shape[:3], work.kv_heads, -1, x.shape[-1])
        return jnp.sum(x, axis=(0, 4))

    key_gradient, value_gradient = map(total, partial_sums)
    return work.scale * key_gradient, value_gradient


def _selection_gradient(
    work: Work, operands, chunk, columns, tiling, parts, memory_gradient
):
    """The gradient of the selecting head's products by F alone, [B, rows, chunk].

    And that of the initial mask, [B, chunk].
    """
    tiles = work.rows // tiling.rows
    grid = (chunk // tiling.keys, tiles, work.batch)
    if memory_gradient is None:
        memory_gradient = jnp.zeros((1, 1), jnp.float32)
    else:
        memory_gradient = memory_gradient / work.memory_tau
    gradient, sums = _triton.call(
        attention.mask_gradient_kernel,
        *operands,
        memory_gradient,
        float(work.scale) * LOG2_E,
        work.limit(),
        work.queries,
        work.keys,
        work.rows,
        columns,
        outputs=[
            work.array(work.batch, work.rows, chunk),
            work.array(work.batch, tiles, chunk),
        ],
        grid=grid,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
        max_registers=tiling.registers,
        flops=0 if parts else work.flops(2) * chunk // work.columns,
        CHUNK=chunk,
        ROWS=tiling.rows,
        KEYS=tiling.keys,
        AHEAD=tiling.ahead,
        PARTS=parts,
        MEMORY=work.memory_tau is not None,
        **work.sizes,
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
        float(work.scale),
        work.queries,
        work.keys,
        columns,
        outputs=[work.array(work.batch, work.rows, chunk, dtype=query.dtype)],
        grid=grid,
        num_warps=tiling.warps,
        num_stages=1,
        HEADS=work.heads,
        CHUNK=chunk,
        ROWS=tiling.rows,
        KEYS=tiling.keys,
        PACKED=work.packed,
        **work.key_sizes,
    )
    return gradient, -until[:, 0]
