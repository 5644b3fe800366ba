"""Units of work of the gradients of keys and values.

Letters as in `jattn.pallas.flash.triton`.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import triton

from jattn.pallas import _triton
from jattn.pallas.flash import kernels

# Numbers that a program adds up, and units it loads at once.
SUM_STEP, SUM_DEPTH = 512, 8


@dataclasses.dataclass(frozen=True)
class Visibility:
    """Which keys a query sees.

    Attributes:
      kernel_size: Tokens a key stands for.
      stride: Tokens between the first ones of two keys.
      window: Tokens back from the query, itself counted, among which a key's first has
        to be; None for no limit.
      length: Tokens there are, of which the queries are the last.
    """

    kernel_size: int
    stride: int
    window: int | None
    length: int

    def pairs(self, queries: int, keys: int) -> int:
        """Pairs of a query and a key it sees, documents aside."""
        position = np.arange(self.length - queries, self.length)
        end = (position - self.kernel_size + 1) // self.stride + 1
        first = np.zeros_like(position)
        if self.window is not None:
            first = np.maximum((position - self.window) // self.stride + 1, 0)
        return int(np.maximum(np.clip(end, 0, keys) - first, 0).sum())


def split_rows(
    visibility: Visibility,
    *,
    queries: int,
    keys: int,
    group: int,
    kv_rows: int,
    rows: int,
    tile_keys: int,
    programs: int,
    alignment: int = 1,
) -> np.ndarray:
    """Splits the rows that see each tile of keys into units of work.

    Units of equal length begin at about the same rows in all tiles, and those with the
    same rows come one after the other: then they run at the same time, and rows come
    from the L2 cache.

    Args:
      visibility: Which keys a query sees, documents aside.
      queries: T.
      keys: M.
      group: G.
      kv_rows: B K.
      rows: Rows of a tile.
      tile_keys: Keys of a tile.
      programs: Units that rows are split into, or fewer than there are tiles of keys to
        split none.
      alignment: What the first rows of units are multiples of, a divisor of the rows of
        a tile.

    Returns:
      int32 [U, 4], the longest units first: tile of keys, first row, one past the last,
      and the unit's place in order of tiles. Every tile has at least one unit.
    """
    first_key = np.arange(0, keys, tile_keys)
    last_key = np.minimum(first_key + tile_keys, keys) - 1
    offset = visibility.length - queries
    first = first_key * visibility.stride + visibility.kernel_size - 1 - offset
    first = np.clip(first, 0, queries)
    end = np.full_like(first, queries)
    if visibility.window is not None:
        end = last_key * visibility.stride + visibility.window - offset
        end = np.clip(end, first, queries)
    first, end = first * group // alignment * alignment, end * group
    row_tiles = -(-(end - first) // rows)
    unit = max(1, round(kv_rows * row_tiles.sum() / programs))  # in tiles
    units = []
    for tile, (begin, stop, length) in enumerate(
        zip(first, end, row_tiles, strict=True)
    ):
        cuts = np.empty(0, int)
        if length > 1.5 * unit:
            # The first one has between half a unit and one and a half.
            step = unit * rows
            start = begin // step * step + begin % rows
            cuts = np.arange(start, stop, step)
            cuts = cuts[(cuts - begin >= step / 2) & (stop - cuts >= step / 2)]
        bounds = np.concatenate([[begin], cuts, [stop]])
        units.extend((tile, *x) for x in itertools.pairwise(bounds))
    tile, begin, stop = np.array(units).T
    units = np.stack([tile, begin, stop, np.arange(tile.size)], axis=1)
    order = np.lexsort((tile, stop, begin - stop))
    return units[order].astype(np.int32)


def add_units(
    gradients: Sequence[jax.Array],
    units: np.ndarray,
    tile_keys: int,
    key: jax.Array,
    value: jax.Array,
) -> Sequence[jax.Array]:
    """The gradients of key and value, from those of units if these are more.

    Args:
      gradients: Of keys and of values, [B, M, K, W] in the dtypes of key and value, or,
        if there are more units than tiles, fp32 [B K, U, tile_keys, W].
      units: See `split_rows`.
      tile_keys: Keys of a tile.
      key: [B, M, K, H].
      value: [B, M, K, V].
    """
    tiles = triton.cdiv(key.shape[1], tile_keys)
    if len(units) == tiles:
        return gradients
    starts = np.searchsorted(np.sort(units[:, 0]), np.arange(tiles + 1))
    like = zip(gradients, (key, value), strict=True)
    return [_add_partials(x, starts, y) for x, y in like]


def _add_partials(partials, starts, like):
    """Adds each tile's units of partials [B K, U, keys, W] to an array like `like`."""
    units, tile_keys, width = partials.shape[1:]
    b, keys, kv_heads, _ = like.shape
    [sums] = _triton.call(
        kernels.add_units_kernel,
        partials,
        jnp.asarray(starts, jnp.int32),
        keys,
        units,
        outputs=[jax.ShapeDtypeStruct(like.shape, like.dtype)],
        grid=(triton.cdiv(tile_keys * width, SUM_STEP), len(starts) - 1, b * kv_heads),
        num_warps=4,
        KV_HEADS=kv_heads,
        WIDTH=width,
        KEYS=tile_keys,
        STEP=SUM_STEP,
        DEPTH=SUM_DEPTH,
    )
    return sums
