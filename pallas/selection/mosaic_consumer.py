"""What a consumer of the kernel of block scores in Mosaic does.

See `jattn.pallas.selection.mosaic`.
"""

import dataclasses
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax

from jattn.pallas import _mosaic
from jattn.pallas._mosaic import COLUMN, MATRIX
from jattn.pallas.selection import ROWS
from jattn.pallas.selection.mosaic_items import Memory, Sizes, Tiling, for_items


@dataclasses.dataclass(frozen=True)
class Consumer:
    """Scores the blocks of its columns.

    Attributes:
      me: Which of the thread block's consumers.
      lse: [B, N, T].
      scores: [B, K, L, P, W].
      memory: Shared memory and barriers.
      sizes: Those of the arguments.
      tiling: Tile sizes.
    """

    me: jax.Array
    lse: Any
    scores: Any
    memory: Memory
    sizes: Sizes
    tiling: Tiling

    def run(self, step):
        """Writes the scores of all items."""
        memory, tiling = self.memory, self.tiling
        for slot in range(tiling.slots):
            plgpu.barrier_arrive(memory.query_empty.at[slot])
        for slot in range(tiling.key_slots):
            key_slot = slot * tiling.consumers + self.me
            plgpu.barrier_arrive(memory.key_empty.at[key_slot])

        # As if it had had a product before.
        @pl.when(self.me > 0)
        def _():
            self._end_product(1)

        def score_item(item, carry):
            slot, turn, key_slot = carry
            mine = key_slot * tiling.consumers + self.me
            first_block = item.first_block + self.me * self.sizes.blocks
            unreached = item.unreached(first_block, self.sizes)
            is_reached = unreached < item.tiles
            heads = unreached * self.sizes.group
            carry = lax.fori_loop(0, heads, self._skip_head, (slot, turn))

            @pl.when(is_reached)
            def _():
                plgpu.barrier_wait(memory.key_full.at[mine])

            def score_tile(i, carry):
                return self._score_tile(
                    item, item.first_tile + i, first_block, mine, carry
                )

            carry = lax.fori_loop(unreached, item.tiles, score_tile, carry)

            @pl.when(is_reached)
            def _():
                plgpu.barrier_arrive(memory.key_empty.at[mine])

            return *carry, _mosaic.following(key_slot, tiling.key_slots)

        carry = (jnp.int32(0),) * 3
        _, turn, _ = for_items(step, self.sizes, tiling, score_item, carry)

        @pl.when(self.me < tiling.consumers - 1)
        def _():
            self._begin_product(turn)

    def _begin_product(self, turn):
        """Waits until another consumer has its product.

        That is the following consumer's last one, or for the last consumer the first
        one's, of the same turn. Turns are numbered 0 and 1 by turns.
        """
        if self.tiling.turns:
            is_last = self.me == self.tiling.consumers - 1
            turn = jnp.where(is_last, turn, 1 - turn)
            consumer = jnp.where(is_last, 0, self.me + 1)
            index = turn * self.tiling.consumers + consumer
            plgpu.barrier_wait(self.memory.product_done.at[index])

    def _end_product(self, turn):
        if self.tiling.turns:
            index = turn * self.tiling.consumers + self.me
            plgpu.barrier_arrive(self.memory.product_done.at[index])

    def _skip_head(self, _, carry):
        """Releases the queries of a head."""
        slot, turn = carry
        plgpu.barrier_wait(self.memory.query_full.at[slot])
        self._begin_product(turn)
        self._end_product(turn)
        plgpu.barrier_arrive(self.memory.query_empty.at[slot])
        return _mosaic.following(slot, self.tiling.slots), 1 - turn

    def _score_tile(self, item, tile, first_block, key_slot, carry):
        """Writes the scores of a tile of queries."""
        memory, sizes = self.memory, self.sizes
        key = memory.key.at[key_slot].transpose((1, 0))
        tokens = item.tokens(tile, sizes)
        columns = sizes.columns
        first_head = item.kv_head * sizes.group

        def add_head(head, carry):
            total, slot, turn = carry
            # On its way while the product is.
            base = plgpu.load(
                self.lse.at[item.batch, first_head + head, tokens],
                layout=COLUMN,
                optimized=False,
            )
            plgpu.barrier_wait(memory.query_full.at[slot])
            self._begin_product(turn)

            def multiply(logits):
                plgpu.wgmma(logits, memory.query.at[slot], key)
                return logits[...]

            accumulator = plgpu.WGMMAAccumulatorRef((ROWS, columns), jnp.float32)
            logits = pl.run_scoped(multiply, accumulator)
            self._end_product(turn)
            plgpu.barrier_arrive(memory.query_empty.at[slot])
            base = lax.broadcast_in_dim(base, logits.shape, [0])
            weights = jnp.exp2(logits * sizes.scale_log2 - base)
            total = weights if sizes.group == 1 else total + weights
            return total, _mosaic.following(slot, self.tiling.slots), 1 - turn

        if sizes.group == 1:
            total, *carry = add_head(0, (None, *carry))
        else:
            total = _mosaic.zeros((ROWS, columns))
            total, *carry = lax.fori_loop(0, sizes.group, add_head, (total, *carry))
        self._write(item, tile, first_block, total)
        return tuple(carry)

    def _write(self, item, tile, first_block, weights):
        """Writes a tile's scores, given the sums over heads of its weights."""
        sizes, blocks = self.sizes, self.sizes.blocks
        first_position = item.first_position + tile * ROWS
        is_whole = self._windows_seen(first_position) >= (first_block + blocks) * (
            sizes.cells
        )
        if sizes.before:
            is_whole &= first_block > 0
        rows = pl.ds(tile * ROWS, ROWS)
        columns = pl.ds(first_block, blocks)

        def write(visible):
            for plane, x in enumerate(self._planes(weights, visible)):
                target = self.scores.at[item.batch, item.kv_head, rows, plane, columns]
                _mosaic.store(target, x)

        # Most tiles need no mask, which takes about as long as the sums.
        pl.when(is_whole)(lambda: write(None))

        @pl.when(~is_whole)
        def _():
            row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=COLUMN)
            seen = self._windows_seen(row + first_position)
            seen -= first_block * sizes.cells
            block = plgpu.broadcasted_iota(jnp.int32, (ROWS, blocks), 1, layout=MATRIX)

            def visible(cell):
                last = lax.broadcast_in_dim(seen - cell, block.shape, [0])
                visible = block * sizes.cells < last
                return visible & (block + first_block > 0) if cell < 0 else visible

            write(visible)

    def _windows_seen(self, position):
        """How many windows have ended at a position."""
        sizes = self.sizes
        begun = jnp.maximum(position + (sizes.stride - sizes.kernel_size + 1), 0)
        stride = np.int32(sizes.stride)
        if begun.ndim:
            stride = jnp.full_like(begun, stride)
        return jnp.minimum(lax.div(begun, stride), sizes.windows)

    def _planes(self, weights, visible):
        """Sums of weights over the windows of each block, [ROWS, blocks] of each plane.

        Args:
          weights: [ROWS, columns].
          visible: Gives which blocks' windows of a cell are seen, bool [ROWS, blocks];
            None if all are.
        """
        sizes, blocks = self.sizes, self.sizes.blocks
        shared = sizes.kernel_size // sizes.stride
        planes = [None] * self.scores.shape[3]
        for column in range(sizes.cells + sizes.before):
            # The last columns are of windows that start before their block.
            is_before = column >= sizes.cells
            cell = column - sizes.cells - sizes.before if is_before else column
            part = weights[:, column * blocks : (column + 1) * blocks]
            if visible is not None:
                # What is out of sight may have become anything, NaN included.
                part = jnp.where(visible(cell), part, jnp.zeros_like(part))
            # Strides that a window shares with its block, and with the next one.
            inside = shared + cell if is_before else min(sizes.cells - cell, shared)
            for plane, factor in enumerate((inside, shared - inside)[: len(planes)]):
                if factor:
                    term = part * np.float32(factor)
                    before = planes[plane]
                    planes[plane] = term if before is None else before + term
        return planes
