"""What the launches of attention to chosen blocks share, and their tile sizes.

Letters as in `jattn.pallas.block_sparse.triton`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import triton

from jattn.pallas import _device, _mosaic, _steps, _triton, tuning
from jattn.pallas._softmax import LOG2_E
from jattn.pallas.block_sparse import (
    kernels,
    mosaic,
    mosaic_backward,
    mosaic_chunk,
)
from jattn.pallas.block_sparse.pairs import (
    Units,
    kernel_block,
    portions,
    sort_pairs,
    split_units,
)

# Blocks that a tile of queries may share: its own, the one before, and the first.
SHARED = 3


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a kernel is cut up: speed, never results.

    Attributes:
      rows: Rows of a matrix tile.
      tiles: Tiles in a unit of work.
      warps: Warps of a program.
      stages: Tiles in flight.
      registers: What a thread may use at most, or None for no limit.
    """

    rows: int
    tiles: int
    warps: int
    stages: int
    registers: int | None = None


@dataclasses.dataclass(frozen=True)
class RowTiling:
    """How the kernels that add partial results are cut up: speed, never results.

    Attributes:
      rows: Rows of a tile, at most.
      warps: Warps of a program.
      stages: Shared blocks in flight; partial results where there are no such blocks.
      registers: What a thread may use at most, or None for no limit.
      ahead: Partial results in flight and at work where there are shared blocks too.
    """

    rows: int
    warps: int
    stages: int
    registers: int | None = None
    ahead: int = 1


def forward_tiling(
    query: jax.Array, value: jax.Array, block: int, group: int
) -> Tiling:
    """The tiling of the kernel that makes partial outputs.

    Args:
      query: [B, T, N, H].
      value: [B, S, K, V].
      block: Keys in a block of the kernels.
      group: Query heads that share a list.
    """
    if query.dtype.itemsize > 2:
        heuristic = Tiling(rows=32, tiles=32, warps=4, stages=1)
    elif max(query.shape[-1], value.shape[-1]) > 128:
        heuristic = Tiling(rows=64, tiles=16, warps=4, stages=1)
    else:
        # In smaller groups the rows of a thread are of more queries.
        registers = 128 if group > 8 else 168
        heuristic = Tiling(64, tiles=16, warps=4, stages=1, registers=registers)
    shape = _tuning_shape(query, value, block, group)
    return tuning.choose("block_sparse_forward", shape, heuristic)


def backward_tiling(
    query: jax.Array, value: jax.Array, block: int, group: int
) -> Tiling:
    """The tiling of the kernel that makes partial gradients; see `forward_tiling`."""
    if query.dtype.itemsize > 2:
        heuristic = Tiling(rows=32, tiles=32, warps=8, stages=1)
    elif max(query.shape[-1], value.shape[-1]) > 128:
        heuristic = Tiling(rows=64, tiles=64, warps=8, stages=1)
    else:
        heuristic = Tiling(rows=64, tiles=64, warps=4, stages=2)
    shape = _tuning_shape(query, value, block, group)
    return tuning.choose("block_sparse_backward", shape, heuristic)


def combine_tiling(
    query: jax.Array, value: jax.Array, block: int, group: int
) -> RowTiling:
    """The tiling of the kernel that adds partial outputs; see `forward_tiling`."""
    narrow = RowTiling(rows=64, warps=4, stages=1, registers=168, ahead=3)
    return _sums_tiling("block_sparse_combine", query, value, block, group, narrow)


def query_sums_tiling(
    query: jax.Array, value: jax.Array, block: int, group: int
) -> RowTiling:
    """The tiling of the kernel that adds partial gradients; see `forward_tiling`."""
    narrow = RowTiling(rows=128, warps=8, stages=1, registers=128)
    return _sums_tiling("block_sparse_query_sums", query, value, block, group, narrow)


def _sums_tiling(name, query, value, block, group, narrow):
    """That of a kernel that adds in Triton, given the heuristic for narrow 16 bits."""
    heuristic = narrow
    if query.dtype.itemsize > 2:
        heuristic = RowTiling(rows=32, warps=8, stages=1)
    elif max(query.shape[-1], value.shape[-1]) > 128:
        heuristic = RowTiling(rows=64, warps=8, stages=1)
    return tuning.choose(name, _tuning_shape(query, value, block, group), heuristic)


def merge_tiling(
    query: jax.Array, value: jax.Array, block: int, group: int
) -> RowTiling:
    """The tiling of the kernel that adds those of Mosaic's; see `forward_tiling`."""
    heuristic = RowTiling(rows=max(16, group), warps=1, stages=2)
    shape = _tuning_shape(query, value, block, group)
    return tuning.choose("block_sparse_merge", shape, heuristic)


def mosaic_tiling(
    query: jax.Array, value: jax.Array, block: int, group: int
) -> mosaic.Tiling:
    """The tiling of Mosaic's kernel for partial outputs; see `forward_tiling`."""
    heuristic = mosaic.Tiling(consumers=3, slots=2, programs=_device.multiprocessors())
    shape = _tuning_shape(query, value, block, group)
    return tuning.choose("block_sparse_forward_mosaic", shape, heuristic)


def mosaic_backward_tiling(
    query: jax.Array, value: jax.Array, block: int, group: int
) -> mosaic_backward.Tiling:
    """The tiling of Mosaic's kernel for partial gradients; see `forward_tiling`."""
    heuristic = mosaic_backward.Tiling(programs=_device.multiprocessors())
    shape = _tuning_shape(query, value, block, group)
    return tuning.choose("block_sparse_backward_mosaic", shape, heuristic)


def _tuning_shape(query, value, block, group) -> dict[str, int | str]:
    return {
        "group": group,
        "block": block,
        "key_width": query.shape[-1],
        "value_width": value.shape[-1],
        "dtype": str(query.dtype),
    }


class Launch:
    """What the launches of one direction share: some for each chunk of each portion."""

    def __init__(
        self,
        query,
        key,
        value,
        lists,
        segment_ids,
        block_size,
        scale,
        tiling=None,
        sharers=None,
        times=1,
    ):
        """Takes attend's arguments.

        Args:
          query: [B, T, N, H].
          key: [B, S, K, H].
          value: [B, S, K, V].
          lists: int [B, T, K R, n].
          segment_ids: int [B, S] or None.
          block_size: Keys in a block.
          scale: Factor of the logits.
          tiling: That of `by_tiles`; None for combine_tiling.
          sharers: Queries that may share blocks; None for those of a tile.
          times: See `portions`.
        """
        self.queries, heads, key_width = query.shape[1:]
        self.keys, self.kv_heads, value_width = value.shape[1:]
        self.block = kernel_block(query, value, block_size)
        self.blocks = triton.cdiv(self.keys, self.block)
        self.split = block_size // self.block
        self.members = lists.shape[2] // self.kv_heads
        self.group = heads // lists.shape[2]
        self.slots = lists.shape[3] * self.split
        if lists.dtype.itemsize > 4:
            lists = jnp.minimum(lists, 2**31 - 1)
        self.lists = lists.astype(jnp.int32)
        self.packed = segment_ids is not None
        if segment_ids is None:
            segment_ids = jnp.zeros((1, 1), jnp.int32)
        self.segment_ids = segment_ids.astype(jnp.int32)
        self.scale_log2 = float(scale) * LOG2_E
        self.tiling = tiling or combine_tiling(query, value, self.block, self.group)
        # Queries in a tile: all those of a tile may be in one block, and the kernel
        # that compares their lists holds these at once.
        most = min(self.block, self.tiling.rows // self.group, 8192 // self.slots)
        self.tokens = 1 << max(1, most).bit_length() - 1
        self.sharers = sharers or self.tokens
        width = max(key_width, value_width)
        self.portions = portions(
            query, self.kv_heads, self.slots, width, self.sharers, times
        )
        self.constants: dict[str, Any] = {
            "KV_HEADS": self.kv_heads,
            "LISTS": self.members,
            "SLOTS": self.slots,
            "GROUP": self.group,
            "BLOCK": self.block,
        }
        self.key_constants: dict[str, Any] = {
            "H": key_width,
            "H_PAD": max(16, triton.next_power_of_2(key_width)),
        }
        self.value_constants: dict[str, Any] = {
            "V": value_width,
            "V_PAD": max(16, triton.next_power_of_2(value_width)),
            "PACKED": self.packed,
        }

    def plan(self, *, share: bool) -> tuple[jax.Array, jax.Array]:
        """Blocks int32 [D, C, M, L, R, n] of pairs, as many as there are for none.

        Returns:
          These, and with share int32 [B K, C L / sharers, R, 1 + SHARED]: how many of
          the blocks so many queries all have, and which; they make no pairs.
        """
        rows, count, length, chunks = self.portions
        shape = count, chunks, rows, length, self.members, self.slots
        tiles = chunks * length // self.sharers
        shared = (count * rows, tiles, self.members, 1 + SHARED) if share else (1,)
        blocks, shared = _triton.call(
            kernels.plan_kernel,
            self.lists,
            self.queries,
            self.keys,
            length,
            chunks,
            outputs=[
                jax.ShapeDtypeStruct(shape, jnp.int32),
                jax.ShapeDtypeStruct(shared, jnp.int32),
            ],
            grid=(tiles * self.members, count * rows),
            num_warps=4,
            KV_HEADS=self.kv_heads,
            LISTS=self.members,
            SLOTS=self.slots,
            SLOTS_PAD=triton.next_power_of_2(self.slots),
            SPLIT=self.split,
            BLOCK=self.block,
            TOKENS=self.sharers,
            PORTION=rows,
            SHARE=share,
        )
        return blocks, shared

    def units(self, blocks: jax.Array, tiling: Tiling) -> tuple[jax.Array, Units]:
        """Pairs sorted by block, and their units of work."""
        pairs, starts = sort_pairs(blocks, self.blocks)
        length = tiling.tiles * (tiling.rows // self.group)
        return pairs, split_units(starts, pairs.shape[-1], length)

    def by_units(self, kernel, operands, tiling, pairs, units, *, results, width):
        """Launches a kernel in one step, a program for each unit of each kv head.

        Args:
          kernel: The one of the partial results of one direction.
          operands: Its arrays.
          tiling: That of the kernel.
          pairs: P.
          units: U.
          results: What it writes.
          width: That of its matrix products, all together.
        """
        rows, _, length, chunks = self.portions
        return _steps.write(
            kernel,
            *operands,
            self.scale_log2,
            self.queries,
            self.keys,
            length,
            chunks,
            pairs,
            units,
            results=results,
            grid=(units, rows),
            num_warps=tiling.warps,
            num_stages=tiling.stages,
            max_registers=tiling.registers,
            flops=2 * rows * pairs * self.group * self.block * width,
            ROWS=tiling.rows,
            **self.constants,
            **self.key_constants,
            **self.value_constants,
        )

    def by_tiles(self, kernel, *operands, results, **options):
        """Launches a kernel in one step, a program for each tile of queries and list.

        Args:
          kernel: The one that adds the partial results of one direction.
          *operands: What it reads, but for numbers that it shares with others.
          results: What it writes.
          **options: Others of `_steps.write`, and constants of the kernel's own.
        """
        rows, _, length, chunks = self.portions
        return _steps.write(
            kernel,
            *operands,
            self.queries,
            self.keys,
            length,
            chunks,
            results=results,
            grid=(length // self.tokens * self.members, rows),
            num_warps=self.tiling.warps,
            num_stages=self.tiling.stages,
            max_registers=self.tiling.registers,
            TOKENS=self.tokens,
            ROWS=max(16, triton.next_power_of_2(self.tokens * self.group)),
            **self.constants,
            **options,
        )

    def mosaic_sizes(self) -> mosaic_chunk.Sizes:
        """What Mosaic's kernels know of the arguments."""
        rows, _, length, chunks = self.portions
        return mosaic_chunk.Sizes(
            queries=self.queries,
            kv_heads=self.kv_heads,
            slots=self.slots,
            group=self.group,
            width=self.key_constants["H"],
            offset=self.keys - self.queries,
            length=length,
            chunks=chunks,
            rows=rows,
            scale_log2=self.scale_log2,
        )

    def whole_blocks(self, x: jax.Array) -> jax.Array:
        """Keys or values [B, S, K, W], filled up to the end of the last block."""
        return _mosaic.padded(x, 1, self.blocks * self.block)
