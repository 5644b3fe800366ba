"""What is computed by chunks of keys: gradients of keys, values, F and the selecting.

Letters as in `jattn.pallas.selective.triton`.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import triton

from jattn.pallas import _mosaic, _triton, tuning
from jattn.pallas._softmax import LOG2_E
from jattn.pallas.selective import (
    key_kernels,
    mask,
    mosaic_key_gradient,
    selection,
)
from jattn.pallas.selective import work as shared
from jattn.pallas.selective.cotangents import Cotangents
from jattn.pallas.selective.work import (
    Tiling,
    Work,
    chunks_of,
    firsts,
)

# Programs that a GPU runs at once, about.
PROGRAMS = 264

# Among how many to divide a sum over the queries, of which there are many more than of
# anything else that a matrix product could be divided by.
SUMMANDS = 8

# How the gradients of logits that were kept are cut up, and how many queries a program
# has there; and how the product of these and the selecting head's keys is.
KEPT = Tiling(rows=32, keys=64, warps=4, stages=1, registers=168)
STRIP = 512
SELECTING = Tiling(rows=64, keys=64, warps=4, stages=3)


def key_gradients(work: Work, carries, cotangents: Cotangents, memory_gradient):
    """Gradients of the selecting head's query (by F alone), key, value and mask."""
    mask_tiling = work.tiling("mask_gradient")
    if work.mosaic:
        prepare = _mosaic_key_gradients
        tiling = _mosaic_key_tiling(work)
        parts = work.heads // tiling.members
    else:
        prepare = _triton_key_gradients
        tiling = work.tiling("key_gradient")
        members = math.gcd(work.heads // work.kv_heads, tiling.heads)
        parts = work.heads // members if members >= shared.KEEPING_HEADS else 0
    if parts:
        # What one kernel has left out, the other does not read.
        mask_tiling = dataclasses.replace(mask_tiling, keys=tiling.keys)
    # What was kept with its sums is read once.
    once = work.mosaic and memory_gradient is None
    # Of each key: F, the parts of the gradient of the logits and, unless they are read
    # once, their sum; and the gradient of the selecting head's products.
    narrow = work.query.dtype.itemsize
    size = 4 + parts * (narrow if work.mosaic else 4) + narrow
    if not once:
        size += 4
    size *= work.batch * work.rows
    chunks, chunk = chunks_of(work.columns, size, shared.GRADIENT_BYTES)
    columns = chunks * chunk
    dead_blocks = work.dead_blocks(carries)
    ends = work.ends(carries, tiling.keys, columns)
    attend = prepare(work, ends, cotangents, chunk, columns, tiling)
    if once:
        select = functools.partial(
            _selection_from_kept,
            work,
            ends,
            chunk=chunk,
            columns=columns,
            end_keys=tiling.keys,
        )
    else:
        select = _selection_by_products(
            work,
            work.ends(carries, mask_tiling.keys, columns),
            cotangents.arrays,
            memory_gradient,
            chunk,
            columns,
            mask_tiling,
            parts,
        )

    def step(results, first):
        selecting, *gradients = results
        region = jnp.stack([jnp.zeros_like(first), first])
        bias, _ = work.bias(
            carries, dead_blocks, region, work.rows, chunk, transposed=True
        )
        key_gradient, value_gradient, *kept = attend(bias, region)
        selecting, selected, mask_gradient = select(bias, kept, region, selecting)
        selected += key_gradient[:, :, 0].astype(jnp.float32)
        key_gradient = key_gradient.at[:, :, 0].set(selected.astype(key_gradient.dtype))
        gradients = [
            jax.lax.dynamic_update_slice_in_dim(x, y.astype(x.dtype), first, axis=1)
            for x, y in zip(gradients, (key_gradient, value_gradient), strict=True)
        ]
        return (selecting, *gradients), mask_gradient

    start = [jnp.zeros((work.batch, work.rows, work.key_width), jnp.float32)]
    for x in (work.key, work.value):
        start.append(jax.lax.empty((work.batch, columns, *x.shape[2:]), x.dtype))
    (selecting, *gradients), mask_gradient = jax.lax.scan(
        step, tuple(work.vary(start)), firsts(chunks, chunk)
    )
    gradients = [x[:, : work.keys] for x in gradients]
    mask_gradient = work.joined(mask_gradient, work.keys)
    return selecting[:, : work.queries], *gradients, mask_gradient


def _triton_key_gradients(work: Work, ends, cotangents, chunk, columns, tiling):
    """How to get gradients from F and the region of a chunk of keys.

    Those of key and value for a given F, [B, CHUNK, K, ..] in fp32; and if they are
    to be kept that of the logits, in parts of the heads.
    """
    members = math.gcd(work.heads // work.kv_heads, tiling.heads)
    keep = members >= shared.KEEPING_HEADS
    parts = work.heads // members
    tiles = parts * (chunk // tiling.keys)
    slices = triton.cdiv(PROGRAMS, work.batch * tiles)
    slices = min(slices, work.rows // work.block)
    shape = slices, work.batch, chunk, parts
    arrays = cotangents.arrays
    kept = (parts, work.batch, chunk, work.rows) if keep else (1, 1, 1, 1)

    def attend(bias, region):
        key_gradient, value_gradient, parts_gradient = _triton.call(
            key_kernels.key_gradient_kernel,
            work.query,
            work.key,
            work.value,
            bias,
            work.starts,
            ends,
            region,
            *arrays,
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
        gradients = _added(work, work.scale * key_gradient, value_gradient)
        return *gradients, parts_gradient

    return attend


def _mosaic_key_tiling(work: Work):
    return tuning.choose(
        "selective_key_gradient_mosaic",
        work.shape | {"heads": work.heads},
        mosaic_key_gradient.tiling(
            work.key_width, work.heads, work.heads // work.kv_heads
        ),
    )


def _mosaic_key_gradients(work: Work, ends, cotangents, _, columns, tiling):
    """What _triton_key_gradients gives, and the sums of what is kept."""
    query, out_gradient = (
        _mosaic.padded(x, 1, work.rows) for x in (work.query, cotangents.out_gradient)
    )
    key, value = (_mosaic.padded(x, 1, columns) for x in (work.key, work.value))
    per_row = cotangents.statistics(tiling.pack, tiling.rows, work.rows)

    def attend(bias, region):
        key_gradient, value_gradient, *kept = mosaic_key_gradient.key_gradients(
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
            tiling=tiling,
        )
        return *_added(work, key_gradient, value_gradient), *kept

    return attend


def _added(work: Work, *partial_sums):
    """Arrays [B, CHUNK, K, ..] from partial sums [SLICES, B, CHUNK, PARTS, ..]."""
    return [
        jnp.sum(x.reshape(*x.shape[:3], work.kv_heads, -1, x.shape[-1]), axis=(0, 4))
        for x in partial_sums
    ]


def _selection_by_products(
    work: Work, ends, arrays, memory_gradient, chunk, columns, tiling, parts
):
    """Returns what has the result of _selection_from_kept, where less was kept.

    With two kernels, so that sums over queries are known in the second, and matrix
    products.
    """
    selecting_query = _mosaic.padded(work.query[:, :, 0], 1, work.rows)
    summands = math.gcd(work.blocks, SUMMANDS)
    selecting_key = _mosaic.padded(work.key[:, :, 0], 1, columns)
    product = functools.partial(
        jnp.einsum,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )

    def select(bias, kept, region, selecting):
        parts_gradient = kept[0] if kept else jnp.zeros((1, 1, 1, 1), jnp.float32)
        operands = work.query, work.key, work.value, bias, work.starts
        gradient, mask_gradient = _selection_gradient(
            work,
            (*operands, ends, region, *arrays, parts_gradient),
            chunk,
            columns,
            tiling,
            parts,
            memory_gradient,
        )
        keys = jax.lax.dynamic_slice_in_dim(selecting_key, region[1], chunk, axis=1)
        selecting += product("bts,bsh->bth", gradient, keys)
        selected = [
            x.reshape(work.batch, summands, -1, x.shape[-1])
            for x in (gradient, selecting_query)
        ]
        selected = jnp.sum(product("bzts,bzth->bzsh", *selected), axis=1)
        return selecting, selected, mask_gradient

    return select


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
        key_kernels.mask_gradient_kernel,
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


def _selection_from_kept(
    work: Work, ends, _, kept, region, selecting, *, chunk, columns, end_keys
):
    """Gradients through F from that of the logits, which was kept with its sums.

    Returns that of the selecting head's query, [B, rows, H] in fp32, added to what the
    other chunks give; that of its key, [B, chunk, H] in fp32; and that of the initial
    mask, [B, chunk].
    """
    parts, sums = kept
    tokens = mosaic_key_gradient.STRIP
    # Those that were written, [B, rows / tokens, tiles of keys].
    first_key = region[1] + jnp.arange(0, chunk, end_keys)
    token = jnp.arange(0, work.rows, tokens)[:, None]
    last = jax.lax.dynamic_slice_in_dim(
        ends, region[1] // end_keys, chunk // end_keys, axis=1
    )
    written = (first_key - work.offset < token + tokens) & (token < last[:, None])
    sums = jnp.where(jnp.repeat(written, end_keys, axis=2), sums, 0)
    strips = triton.cdiv(work.rows, STRIP)
    padding = [(0, 0)] * 4
    padding[2] = (0, strips * STRIP // tokens - token.size)
    sums = jnp.pad(sums, padding)
    sums = sums.reshape(*sums.shape[:2], strips, -1, chunk).sum(axis=(0, 3))
    until = jnp.cumsum(sums[:, ::-1], axis=1)[:, ::-1]
    later = jnp.pad(until[:, 1:], [(0, 0), (0, 1), (0, 0)])
    sizes: dict[str, Any] = dict(
        KV_HEADS=work.kv_heads,
        CHUNK=chunk,
        END_KEYS=end_keys,
        H=work.key_width,
        H_PAD=shared.padded(work.key_width),
    )
    gradient, key_gradient = _triton.call(
        selection.selection_kernel,
        work.query,
        work.key,
        work.starts,
        ends,
        parts,
        later,
        region,
        float(work.scale),
        work.queries,
        work.keys,
        work.rows,
        columns,
        outputs=[
            work.array(work.batch, chunk, work.rows, dtype=work.query.dtype),
            work.array(strips, work.batch, chunk, work.key_width),
        ],
        grid=(chunk // KEPT.keys, strips, work.batch),
        num_warps=KEPT.warps,
        num_stages=KEPT.stages,
        max_registers=KEPT.registers,
        ROWS=KEPT.rows,
        KEYS=KEPT.keys,
        HEADS=work.heads,
        PARTS=parts.shape[0],
        STRIP=STRIP,
        PACKED=work.packed,
        **sizes,
    )
    [selecting] = _triton.call(
        selection.selecting_kernel,
        work.key,
        ends,
        gradient,
        region,
        selecting,
        work.queries,
        work.keys,
        work.rows,
        columns,
        outputs=[],
        updated=[4],
        grid=(work.rows // SELECTING.rows, work.batch),
        num_warps=SELECTING.warps,
        num_stages=SELECTING.stages,
        ROWS=SELECTING.rows,
        KEYS=SELECTING.keys,
        SKIP=work.sparse,
        **sizes,
    )
    return selecting, jnp.sum(key_gradient, axis=0), -until[:, 0]
