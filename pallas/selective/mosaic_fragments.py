"""Tiles in the order of fragments, between memory and the registers of Mosaic GPU.

`jattn.pallas.selective.mask` describes a fragment: what one warp holds of 16 rows and 8
columns of an accumulator, each thread's 4 numbers next to each other. An array of
[.., rows, columns] in this order is one of [.., rows / 16, columns / 8, NUMBERS] here.
"""

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from jattn.pallas import _mosaic

# Rows and columns of a fragment, and its numbers: 4 of each thread of a warp.
ROWS, COLUMNS, NUMBERS = 16, 8, 128

# Of a warpgroup's matrix, whose warps have a fragment each in a column of fragments.
MATRIX_ROWS = 64


def load(ref: Any, columns: int) -> jax.Array:
    """A matrix [64, columns] of copies of a tile in shared memory.

    Args:
      ref: fp32 [r, c, NUMBERS], where r divides 4 and c divides columns / 8.
      columns: Those of the matrix.
    """
    shape = MATRIX_ROWS, columns
    if _mosaic.interpretation() is not None:
        high, wide, _ = ref.shape
        tile = ref[...].reshape(high, wide, 8, 4, 2, 2).transpose(0, 4, 2, 1, 3, 5)
        tile = tile.reshape(high * ROWS, wide * COLUMNS)
        tile = jnp.concatenate([tile] * (MATRIX_ROWS // tile.shape[0]), axis=0)
        return jnp.concatenate([tile] * (columns // tile.shape[1]), axis=1)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),),
        return_type=plgpu.ShapeDtypeStruct(
            shape, jnp.float32, layout=plgpu.Layout.WGMMA
        ),
    )
    def read(_, tile):
        layout = mgpu.WGMMA_LAYOUT
        registers = np.empty(layout.registers_shape(shape), dtype=object)
        pairs = registers.reshape(columns // COLUMNS, 2)
        high, wide, _ = ir.MemRefType(tile.type).shape
        place = _place(tile, high)
        for i in range(wide):
            numbers = llvm.load(_vector(4), _pointer(tile, place, i))
            for half in range(2):
                pairs[i::wide, half] = mgpu.utils.vector_slice(
                    numbers, slice(2 * half, 2 * half + 2)
                )
        return mgpu.FragmentedArray(
            _registers=registers, _layout=layout, _is_signed=None
        )

    # The type of inline_mgpu's result is that of what it decorates.
    return read(ref)  # pyright: ignore[reportCallIssue]


def store(ref: Any, tile: jax.Array) -> None:
    """Writes a matrix to global memory.

    Args:
      ref: [4, c, NUMBERS].
      tile: [64, 8 c] of the same dtype, fp32, bf16 or fp16, shared by the threads of a
        warpgroup like an accumulator.
    """
    if _mosaic.interpretation() is not None:
        rows, columns = (
            x // y for x, y in zip(tile.shape, (ROWS, COLUMNS), strict=True)
        )
        tile = tile.reshape(rows, 2, 8, columns, 4, 2).transpose(0, 3, 2, 4, 1, 5)
        ref[...] = tile.reshape(rows, columns, NUMBERS)
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA))
    def write(_, target, tile):
        place = _place(target, MATRIX_ROWS // ROWS)
        for i, pairs in enumerate(tile.registers.reshape(-1, 2)):
            numbers = mgpu.utils.vector_concat(list(pairs))
            llvm.store(numbers, _pointer(target, place, i))

    write(ref, tile)  # pyright: ignore[reportCallIssue]


def _vector(length):
    return ir.VectorType.get((length,), ir.F32Type.get())


def _place(ref, high):
    """Where a thread's numbers in the first fragment of its warp are, int32."""
    i32 = ir.IntegerType.get_signless(32)
    strides, _ = ir.MemRefType(ref.type).get_strides_and_offset()
    thread = mgpu.utils.thread_idx()
    lane = arith.remui(thread, mgpu.c(32, i32))
    warp = arith.remui(arith.divui(thread, mgpu.c(32, i32)), mgpu.c(high, i32))
    place = arith.muli(warp, mgpu.c(strides[0], i32))
    return arith.addi(place, arith.muli(lane, mgpu.c(4, i32)))


def _pointer(ref, place, fragment):
    """The address of what is at that place, so many fragments to the right."""
    i32 = ir.IntegerType.get_signless(32)
    place = arith.addi(place, mgpu.c(fragment * NUMBERS, i32))
    pointer = mgpu.utils.memref_ptr(ref)
    dtype = ir.MemRefType(ref.type).element_type
    return mgpu.utils.getelementptr(pointer, [place], dtype)
