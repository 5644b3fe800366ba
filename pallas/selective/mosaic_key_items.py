"""What a thread block of the kernel of key gradients does, and its memory.

See `jattn.pallas.selective.mosaic_key_gradient`.
"""

import dataclasses
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from jattn.pallas import _mosaic
from jattn.pallas.flash.mosaic_backward import CONSUMERS, KEYS
from jattn.pallas.selective import mosaic_fragments as fragments
from jattn.pallas.selective.work import BLOCK

# Rows of a tile in all kv heads, and keys. More would not fit into registers.
ROWS = 64
TILE_KEYS = CONSUMERS * KEYS

# Tokens of one sum of the gradients of a key's logits.
STRIP = BLOCK


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How the kernel is cut up: speed, never results.

    Attributes:
      pack: Query heads of a kv head in a thread block; a power of two, at most 8.
      kv_heads: Kv heads of a thread block, 1 or 2.
      slots: Tiles of rows in flight.
      programs: Thread blocks that the tokens are divided among, at most, unless there
        are more tiles.
      ahead: Whether the first products of some rows are under way before the last ones
        of the rows before, which takes registers.
    """

    pack: int
    kv_heads: int
    slots: int
    programs: int
    ahead: bool

    @property
    def keys(self) -> int:
        """Keys of a tile."""
        return TILE_KEYS

    @property
    def members(self) -> int:
        """Query heads of a thread block, M."""
        return self.pack * self.kv_heads

    @property
    def rows(self) -> int:
        """Rows of a tile in a kv head, R."""
        return ROWS // self.kv_heads


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the kernel knows of its arguments when it is compiled.

    Attributes:
      offset: Position of the first query.
      parts: N / M.
      group: Query heads of a kv head.
      tiles: Tiles of keys of the chunk.
      slices: Thread blocks that share the tokens of a tile.
      width: Of keys and values.
      scale: Factor of the logits.
      tiling: Tile sizes.
    """

    offset: int
    parts: int
    group: int
    tiles: int
    slices: int
    width: int
    scale: float
    tiling: Tiling

    @property
    def rows(self) -> int:
        """Rows of a tile in a kv head, R."""
        return self.tiling.rows

    @property
    def tokens(self) -> int:
        """Tokens of a tile."""
        return ROWS // self.tiling.members

    @property
    def strip_tiles(self) -> int:
        """Tiles of tokens of a strip."""
        return STRIP // self.tokens


@dataclasses.dataclass(frozen=True)
class Memory:
    """References to shared memory and to the barriers that guard it.

    Attributes:
      key: [kv heads, CONSUMERS, KEYS, H].
      value: [kv heads, CONSUMERS, KEYS, H].
      query: [slots, kv heads, R, H].
      out_gradient: [slots, kv heads, R, H].
      bias: fp32 [slots, TILE_KEYS, tokens], in fragments.
      statistics: fp32 [slots, kv heads, 2, R].
      weights: [CONSUMERS, KEYS, R], P and dS in the interpreter, else None.
      keys_full: Keys and values have been loaded.
      full: Of each slot.
      empty: Of each slot.
    """

    key: Any
    value: Any
    query: Any
    out_gradient: Any
    bias: Any
    statistics: Any
    weights: Any
    keys_full: Any
    full: Any
    empty: Any


def memory_types(sizes: Sizes, dtype: Any) -> dict[str, Any]:
    """The types of Memory's attributes."""
    tiling = sizes.tiling
    kv_heads, slots = tiling.kv_heads, tiling.slots

    def matrix(*shape):
        # The rows of a tile have to be whole units of the swizzle.
        swizzle = sizes.rows * jnp.dtype(dtype).itemsize
        tile = plgpu.TilingTransform((8, sizes.rows))  # pyright: ignore
        swizzle = plgpu.SwizzleTransform(swizzle)  # pyright: ignore
        return plgpu.SMEM(shape, dtype, transforms=(tile, swizzle))

    keys = matrix(kv_heads, CONSUMERS, KEYS, sizes.width)
    rows = matrix(slots, kv_heads, sizes.rows, sizes.width)
    bias = (
        slots,
        TILE_KEYS // fragments.ROWS,
        sizes.tokens // fragments.COLUMNS,
        fragments.NUMBERS,
    )
    return {
        "key": keys,
        "value": keys,
        "query": rows,
        "out_gradient": rows,
        "bias": plgpu.SMEM(bias, jnp.float32),
        "statistics": plgpu.SMEM((slots, kv_heads, 2, sizes.rows), jnp.float32),
        "weights": matrix(CONSUMERS, KEYS, sizes.rows)
        if _mosaic.interpretation()
        else None,
        "keys_full": _mosaic.barriers(1, 2 * CONSUMERS * kv_heads),
        "full": _mosaic.barriers(slots, 2 * tiling.members + kv_heads + 1),
        "empty": _mosaic.barriers(slots, CONSUMERS),
    }


@dataclasses.dataclass(frozen=True)
class Unit:
    """What a thread block does.

    Attributes:
      batch: Row of the batch.
      part: Of the query heads.
      slice: Of the tokens.
      tile_key: First key of the tile, in the chunk.
      first_key: The same, of all keys.
      begin: First tile of tokens, where a strip begins.
      end: One past the last; another strip begins there, or no token is left.
    """

    batch: jax.Array
    part: jax.Array
    slice: jax.Array
    tile_key: jax.Array
    first_key: jax.Array
    begin: jax.Array
    end: jax.Array


def unit_of_work(ends, region, sizes: Sizes) -> Unit:
    """The work of this thread block.

    Those of the same tokens are neighbours: they read the same rows, or the same F.
    """
    # Found out where it is needed, rather than kept in registers all along.
    program = lax.optimization_barrier(lax.axis_index("program"))
    program, part = _mosaic.div_rem(program, sizes.parts)
    program, tile = _mosaic.div_rem(program, sizes.tiles)
    batch, index = _mosaic.div_rem(program, sizes.slices)
    first_key = region[1] + tile * TILE_KEYS
    begin = jnp.maximum(first_key - sizes.offset, 0)
    begin = _mosaic.div_rem(begin, STRIP)[0]
    token = ends[batch, _mosaic.div_rem(first_key, TILE_KEYS)[0]]
    size = jnp.maximum(_mosaic.ceil_div(token, STRIP) - begin, 0)
    size = _mosaic.ceil_div(size, sizes.slices)
    begin = (begin + index * size) * sizes.strip_tiles
    size *= sizes.strip_tiles
    end = _mosaic.ceil_div(token, sizes.tokens)
    return Unit(
        batch=batch,
        part=part,
        slice=index,
        tile_key=tile * TILE_KEYS,
        first_key=first_key,
        begin=begin,
        end=jnp.maximum(jnp.minimum(begin + size, end), begin),
    )
