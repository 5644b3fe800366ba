"""Attention over strided windows of tokens in Triton: launches and gradient.

Key i stands for the tokens ``i stride`` to ``i stride + kernel_size - 1``, and a query
at position p sees it if the last of them is at most p and the first is in p's document
and, if there is a window, later than ``p - window``. Stride and kernel_size 1 make
dense attention; others attention to compressed tokens.

The G query heads of a kv head are rows of one matrix, so that any group fills tiles.
Backward takes two kernels, one by tiles of rows and one by tiles of keys. Where there
are few tiles of keys, each one's rows are split into units of work whose results are
added up in order: nothing is added atomically, and the same input gives the same bits.
What kernels in Mosaic GPU support of backward, they do in the same two steps.

Letters: B batch, T queries, M keys, N query heads, K kv heads, G = N / K, H key width,
V value width, U units of work of one kv head.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import triton

from jattn.pallas import _device, _mosaic, _triton, tuning
from jattn.pallas._softmax import LOG2_E
from jattn.pallas.flash import (
    kernels,
    mosaic,
    mosaic_backward,
    mosaic_key_gradient,
    mosaic_query_gradient,
    unsupported_mosaic_forward,
)
from jattn.pallas.flash.units import Visibility, add_units, split_rows

# Of an H100 or H200.
MULTIPROCESSORS = 132

# A unit of fewer tiles of rows takes too long to write and add up.
MIN_UNIT_TILES = 64


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a kernel is cut up: speed, never results.

    Attributes:
      rows: Rows (queries times heads) of a tile.
      keys: Keys of a tile.
      warps: Warps of a program.
      stages: Tiles in flight.
    """

    rows: int
    keys: int
    warps: int
    stages: int


@dataclasses.dataclass(frozen=True)
class SplitTiling(Tiling):
    """Tiling of the gradients of keys and values.

    Attributes:
      programs: Units of work that rows are split into, or fewer than there are tiles
        of keys to split none.
    """

    programs: int


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    document_starts: jax.Array | None,
    *,
    kernel_size: int,
    stride: int,
    window: int | None,
    length: int,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """Attention over windows of tokens, differentiable in query, key and value.

    Args:
      query: [B, T, N, H], the last T of `length` positions.
      key: [B, M, K, H].
      value: [B, M, K, V].
      document_starts: int [B, T], the position where each query's document starts, or
        None for 0. Documents are contiguous: a later one starts later.
      kernel_size: Tokens that a key stands for.
      stride: Tokens between the first ones of two keys.
      window: Tokens back from the query, itself counted, among which a key's first has
        to be; None for no limit.
      length: Tokens of the sequence.
      scale: Factor of the logits, positive.

    Returns:
      Output [B, T, N, V] and log-sum-exp [B, T, N] in fp32; 0 and -inf for a query that
      sees nothing.
    """
    if document_starts is not None:
        document_starts = document_starts.astype(jnp.int32)
    visibility = Visibility(kernel_size, stride, window, length)
    return _attend(query, key, value, document_starts, visibility, float(scale))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(query, key, value, document_starts, visibility, scale):
    return forward(query, key, value, document_starts, visibility, scale)


def _attend_forward(query, key, value, document_starts, visibility, scale):
    results = forward(query, key, value, document_starts, visibility, scale)
    return results, (query, key, value, document_starts, *results)


def _attend_backward(visibility, scale, residuals, gradients):
    gradients = backward(*residuals, *gradients, visibility=visibility, scale=scale)
    return *gradients, None


_attend.defvjp(_attend_forward, _attend_backward)


def forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    document_starts: jax.Array | None,
    visibility: Visibility,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """The value of attend, with arguments as there."""
    sight = dataclasses.asdict(visibility)
    packed = document_starts is not None
    if unsupported_mosaic_forward(query, key, value, packed=packed, **sight) is None:
        return mosaic.forward(query, key, value, **sight, scale=scale)
    launch = _Launch(query, value, document_starts, visibility, scale)
    tiling = tuning.choose("flash_forward", launch.shape, launch.forward_tiling())
    tiles = launch.row_tiles(tiling)
    out, lse = launch(
        kernels.forward_kernel,
        (query, *launch.key_tiles(key, value, tiling), launch.document_starts),
        (tiles,),
        tiling,
        outputs=[
            jax.ShapeDtypeStruct((*query.shape[:3], value.shape[-1]), value.dtype),
            jax.ShapeDtypeStruct(query.shape[:3], jnp.float32),
        ],
        programs=tiles,
        width=query.shape[-1] + value.shape[-1],
    )
    return out, lse


def backward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    document_starts: jax.Array | None,
    out: jax.Array,
    lse: jax.Array,
    out_gradient: jax.Array,
    lse_gradient: jax.Array,
    *,
    visibility: Visibility,
    scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of forward's output and log-sum-exp for query, key and value."""
    launch = _Launch(query, value, document_starts, visibility, scale)
    arrays = query, key, value, out, lse, out_gradient, lse_gradient
    if _mosaic.unsupported(query, value, packed=launch.packed) is None:
        return _mosaic_gradients(launch, *arrays)
    return _triton_gradients(launch, *arrays)


def _mosaic_gradients(launch, query, key, value, out, lse, out_gradient, lse_gradient):
    """The results of backward, by the kernels in Mosaic GPU."""
    sizes = launch.mosaic_sizes()
    per_row = mosaic_backward.statistics(out, lse, out_gradient, lse_gradient, sizes)
    arrays = query, key, value, per_row, out_gradient
    heuristic = launch.mosaic_query_gradient_tiling()
    tiling = tuning.choose("flash_query_gradient_mosaic", launch.shape, heuristic)
    query_gradient = mosaic_query_gradient.query_gradient(
        *arrays, sizes=sizes, tiling=tiling
    )
    heuristic = launch.mosaic_key_gradient_tiling()
    tiling = tuning.choose("flash_key_gradient_mosaic", launch.shape, heuristic)
    units = launch.units(tiling, mosaic_backward.ALIGNMENT)
    gradients = mosaic_key_gradient.key_gradients(
        *arrays, units, sizes=sizes, tiling=tiling
    )
    key_gradient, value_gradient = add_units(gradients, units, tiling.keys, key, value)
    return query_gradient, key_gradient, value_gradient


def _triton_gradients(launch, query, key, value, out, lse, out_gradient, lse_gradient):
    """The results of backward, by the kernels in Triton."""
    heuristic = launch.query_gradient_tiling()
    tiling = tuning.choose("flash_query_gradient", launch.shape, heuristic)
    tiles = launch.row_tiles(tiling)
    h, v = query.shape[-1], value.shape[-1]
    query_gradient, shift, delta = launch(
        kernels.query_gradient_kernel,
        (
            query,
            *launch.key_tiles(key, value, tiling),
            launch.document_starts,
            out,
            lse,
            out_gradient,
            lse_gradient,
        ),
        (tiles,),
        tiling,
        outputs=[
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            jax.ShapeDtypeStruct(lse.shape, jnp.float32),
            jax.ShapeDtypeStruct(lse.shape, jnp.float32),
        ],
        programs=tiles,
        width=2 * h + v,
    )

    heuristic = launch.key_gradient_tiling()
    tiling = tuning.choose("flash_key_gradient", launch.shape, heuristic)
    units = launch.units(tiling)
    split = len(units) > triton.cdiv(launch.keys, tiling.keys)
    partials = (launch.kv_rows, len(units), tiling.keys)
    boxes = tiling.rows % launch.group == 0 and launch.group.bit_count() == 1
    if boxes:
        query_tiles = [
            launch.row_boxes(query, x, tiling) for x in (launch.main, launch.side)
        ]
        gradient_tiles = launch.row_boxes(out_gradient, launch.value_piece, tiling)
    else:
        query_tiles = query, query
        gradient_tiles = out_gradient
    gradients = launch(
        kernels.key_gradient_kernel,
        (
            *query_tiles,
            query,
            key,
            value,
            launch.end_tokens(),
            shift,
            delta,
            gradient_tiles,
            out_gradient,
            jnp.asarray(units),
        ),
        (len(units),),
        tiling,
        outputs=[
            jax.ShapeDtypeStruct((*partials, x.shape[-1]), jnp.float32)
            if split
            else jax.ShapeDtypeStruct(x.shape, x.dtype)
            for x in (key, value)
        ],
        programs=len(units),
        width=2 * h + 2 * v,
        SPLIT=split,
        BOXES=boxes,
    )
    key_gradient, value_gradient = add_units(gradients, units, tiling.keys, key, value)
    return query_gradient, key_gradient, value_gradient


def pieces(width: int) -> tuple[int, int]:
    """Powers of two, at least 16 or 0, that together are at least a key width."""
    main = max(16, 1 << (width.bit_length() - 1))
    tail = max(16, triton.next_power_of_2(width - main)) if width > main else 0
    return main, tail


class _Launch:
    """What the launches for one call share."""

    def __init__(self, query, value, document_starts, visibility, scale):
        self.batch, self.queries, heads, self.key_width = query.shape
        _, self.keys, self.kv_heads, self.value_width = value.shape
        self.group = heads // self.kv_heads
        self.kv_rows = self.batch * self.kv_heads
        self.main, self.tail = pieces(self.key_width)
        # A kernel has a descriptor of tails even where it loads none.
        self.side = self.tail or self.main
        self.value_piece = max(16, triton.next_power_of_2(self.value_width))
        self.widest = max(self.key_width, self.value_width)
        self.itemsize = query.dtype.itemsize
        self.visibility = visibility
        self.scale = scale
        self.pairs = visibility.pairs(self.queries, self.keys)
        self.packed = document_starts is not None
        if document_starts is None:
            document_starts = jnp.zeros((1, 1), jnp.int32)
        self.document_starts = document_starts
        # No length, so that what was measured at one serves all.
        self.shape: dict[str, int | str] = {
            "group": self.group,
            "key_width": self.key_width,
            "value_width": self.value_width,
            "stride": visibility.stride,
            "window": visibility.window or 0,
            "dtype": str(query.dtype),
        }

    # These fit into registers without spilling, but for heads of 256, and of more than
    # 128 in fp32, which spill a little backward.

    def forward_tiling(self) -> Tiling:
        """The heuristic one."""
        if self.itemsize > 2 and self.widest > 128:
            return Tiling(rows=16, keys=32, warps=4, stages=1)
        if self.itemsize > 2:
            return Tiling(rows=64, keys=32, warps=8, stages=1)
        if self.key_width + self.value_width > 320:
            return Tiling(rows=128, keys=64, warps=8, stages=2)
        if self.widest > 128:
            return Tiling(rows=128, keys=128, warps=8, stages=2)
        # Two programs on a multiprocessor: one multiplies while the other does not.
        return Tiling(rows=128, keys=64, warps=4, stages=2)

    def query_gradient_tiling(self) -> Tiling:
        """The heuristic one."""
        if self.itemsize > 2 and self.widest > 128:
            return Tiling(rows=16, keys=16, warps=8, stages=1)
        if self.itemsize > 2:
            return Tiling(rows=32, keys=16, warps=8, stages=1)
        if self.key_width + self.value_width > 320:
            return Tiling(rows=64, keys=64, warps=4, stages=2)
        if self.widest > 128:
            return Tiling(rows=128, keys=64, warps=8, stages=2)
        return Tiling(rows=64, keys=64, warps=4, stages=2)

    def key_gradient_tiling(self) -> SplitTiling:
        """The heuristic one, with two to eight waves of units of work.

        There are fewer where units would become so short that adding them up shows.
        """
        if self.itemsize > 2:
            rows, keys, stages = 32, 16, 1
        elif self.key_width + self.value_width > 320:
            rows, keys, stages = 32, 64, 2
        elif self.widest > 128:
            rows, keys, stages = 32, 128, 2
        else:
            rows, keys, stages = 64, 128, 3
        tiles = self.pairs * self.group * self.kv_rows // (rows * keys)
        waves = min(max(tiles // (MIN_UNIT_TILES * MULTIPROCESSORS), 2), 8)
        return SplitTiling(
            rows=rows,
            keys=keys,
            warps=8,
            stages=stages,
            programs=waves * MULTIPROCESSORS,
        )

    def mosaic_key_gradient_tiling(self) -> mosaic_key_gradient.Tiling:
        """The heuristic one, with units as in key_gradient_tiling."""
        return mosaic_key_gradient.Tiling(
            slots=4 if self.key_width > 64 else 6,
            programs=self.key_gradient_tiling().programs,
        )

    def mosaic_query_gradient_tiling(self) -> mosaic_query_gradient.Tiling:
        """The heuristic one."""
        return mosaic_query_gradient.Tiling(
            slots=3 if self.key_width > 64 else 6, programs=_device.multiprocessors()
        )

    def mosaic_sizes(self) -> mosaic_backward.Sizes:
        """What Mosaic's kernels know of the call."""
        return mosaic_backward.Sizes(
            queries=self.queries,
            keys=self.keys,
            kv_rows=self.kv_rows,
            kv_heads=self.kv_heads,
            group=self.group,
            width=self.key_width,
            offset=self.visibility.length - self.queries,
            kernel_size=self.visibility.kernel_size,
            stride=self.visibility.stride,
            window=self.visibility.window,
            scale=self.scale,
        )

    def units(self, tiling, alignment: int = 1) -> np.ndarray:
        """Units of work of the gradients of keys and values."""
        return split_rows(
            self.visibility,
            queries=self.queries,
            keys=self.keys,
            group=self.group,
            kv_rows=self.kv_rows,
            rows=tiling.rows,
            tile_keys=tiling.keys,
            programs=tiling.programs,
            alignment=alignment,
        )

    def row_tiles(self, tiling: Tiling) -> int:
        """Tiles of rows of a kv head."""
        return triton.cdiv(self.queries * self.group, tiling.rows)

    def key_tiles(self, key, value, tiling: Tiling) -> list[_triton.Descriptor]:
        """Tiles of key, of its tail, and of value, to load in kernels."""
        columns = (key, self.main), (key, self.side), (value, self.value_piece)
        return [
            _triton.Descriptor(array, (1, tiling.keys, 1, piece))
            for array, piece in columns
        ]

    def row_boxes(self, array, piece: int, tiling: Tiling) -> _triton.Descriptor:
        """Tiles of rows of an array [B, T, N, ..], if they are whole queries."""
        shape = self.batch, self.queries, self.kv_heads, self.group, array.shape[-1]
        tile = 1, tiling.rows // self.group, 1, self.group, piece
        return _triton.Descriptor(array.reshape(shape), tile)

    def end_tokens(self) -> jax.Array:
        """One past the last query whose document started at each key or before.

        int32 [B, M]; without documents nobody reads it.
        """
        if not self.packed:
            return self.document_starts
        first_token = jnp.arange(self.keys, dtype=jnp.int32) * self.visibility.stride
        search = functools.partial(jnp.searchsorted, side="right")
        search = jax.vmap(search, in_axes=(0, None))
        return search(self.document_starts, first_token).astype(jnp.int32)

    def __call__(
        self, kernel, arrays, numbers, tiling, *, outputs, programs, width, **constants
    ) -> Any:
        """Launches a kernel.

        Args:
          kernel: One of jattn.pallas.flash.kernels.
          arrays: What it reads.
          numbers: Its scalars after those that all kernels have.
          tiling: How it is cut up.
          outputs: Shapes and dtypes of what it writes.
          programs: How many of each kv head.
          width: That of its matrix products, all together.
          **constants: What it has beside the constants of all kernels.
        """
        return _triton.call(
            kernel,
            *arrays,
            self.scale * LOG2_E,
            self.queries,
            self.keys,
            self.visibility.length - self.queries,
            *numbers,
            outputs=outputs,
            grid=(programs * self.kv_rows, 1),
            num_warps=tiling.warps,
            num_stages=tiling.stages,
            flops=2 * self.pairs * self.kv_rows * self.group * width,
            KV_HEADS=self.kv_heads,
            GROUP=self.group,
            H=self.key_width,
            V=self.value_width,
            H_MAIN=self.main,
            H_TAIL=self.tail,
            V_PAD=self.value_piece,
            KERNEL_SIZE=self.visibility.kernel_size,
            STRIDE=self.visibility.stride,
            WINDOW=self.visibility.window or 0,
            PACKED=self.packed,
            ROWS=tiling.rows,
            KEYS=tiling.keys,
            **constants,
        )
