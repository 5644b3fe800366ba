"""Reading and writing the rows of arrays as tiles, for Triton kernels."""

import triton
import triton.language as tl


@triton.jit
def _load_rows(
    pointer,
    row,
    live,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    FIRST: tl.constexpr = 0,  # pyright: ignore[reportArgumentType]
):
    """Rows of an array [.., WIDTH]: a tile [rows, PADDED], 0 where there is nothing.

    The tile starts at column FIRST.
    """
    column = FIRST + tl.arange(0, PADDED)
    return tl.load(
        pointer + row[:, None] * WIDTH + column[None, :],
        mask=live[:, None] & (column < WIDTH)[None, :],
        other=0.0,
    )


@triton.jit
def _store_rows(
    pointer,
    row,
    live,
    tile,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    FIRST: tl.constexpr = 0,  # pyright: ignore[reportArgumentType]
):
    """Writes what _load_rows reads, in the array's dtype."""
    column = FIRST + tl.arange(0, PADDED)
    tl.store(
        pointer + row[:, None] * WIDTH + column[None, :],
        tile.to(pointer.dtype.element_ty),
        mask=live[:, None] & (column < WIDTH)[None, :],
    )
