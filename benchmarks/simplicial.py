"""2-simplicial attention beside dense causal attention by cuDNN.

Tensor-core FLOPs are counted: two matrix products of the query's width forward, and
six more that gradients need. Dense attention is at the same length, where it sees
other pairs: what compares is the FLOPs per second.
"""

import functools

import jattn
from benchmarks.dense import cudnn, normal
from benchmarks.measure import Case
from benchmarks.ops import Tuning
from jattn.pallas.simplicial import ROWS, backward, mosaic
from jattn.pallas.simplicial import triton as forward

WINDOWS = (512, 32)

SHAPES = {
    f"{heads}/{kv_heads}, {length}k": dict(
        batch=4, length=1024 * length, heads=heads, kv_heads=kv_heads
    )
    for heads, kv_heads, length in (
        (64, 1, 4),
        (64, 1, 8),
        (128, 1, 8),
        (16, 4, 8),
        (16, 16, 8),
    )
}


def cases(
    *,
    batch: int,
    length: int,
    heads: int,
    kv_heads: int,
    width: int = 128,
    windows: tuple[int, int] = WINDOWS,
) -> dict[str, Case]:
    """The operation in Triton and, where that supports it, Mosaic; dense by cuDNN.

    Args:
      batch: Sequences.
      length: Of each.
      heads: Query heads.
      kv_heads: Key-value heads.
      width: That of the heads.
      windows: Keys a query sees of either set.
    """
    arrays = normal(
        (batch, length, heads, width), *[(batch, length, kv_heads, width)] * 4
    )
    pairs = sum(min(t + 1, windows[0]) * min(t + 1, windows[1]) for t in range(length))
    product = 2 * batch * heads * width * pairs
    flops = {"flops": 2 * product, "backward_flops": 6 * product}
    operation = functools.partial(jattn.two_simplicial_attention, windows=windows)
    forms = {"mosaic": "pallas", "triton": "triton"}
    group = heads // kv_heads
    if group > 1 and group % ROWS:
        del forms["mosaic"]
    found = {
        name: Case(
            functools.partial(operation, implementation=implementation), arrays, **flops
        )
        for name, implementation in forms.items()
    }
    # Not by its usual name: it sees other pairs, so that times do not compare.
    return found | {"dense": cudnn(*arrays[:3])}


TUNING = {
    "simplicial_forward": Tuning(
        [
            forward.Tiling(64, tokens=1, chains=1, block=64, warps=4, stages=2),
            forward.Tiling(64, tokens=1, chains=1, block=64, warps=4, stages=3),
            forward.Tiling(64, tokens=1, chains=2, block=32, warps=4, stages=3),
            forward.Tiling(64, tokens=1, chains=2, block=64, warps=4, stages=2),
            forward.Tiling(64, tokens=1, chains=2, block=64, warps=4, stages=3),
            forward.Tiling(64, tokens=2, chains=1, block=64, warps=4, stages=3),
            forward.Tiling(64, tokens=4, chains=2, block=64, warps=4, stages=2),
            forward.Tiling(128, tokens=1, chains=1, block=64, warps=8, stages=3),
            forward.Tiling(128, tokens=1, chains=1, block=64, warps=8, stages=4),
            forward.Tiling(128, tokens=1, chains=1, block=128, warps=8, stages=2),
            forward.Tiling(128, tokens=1, chains=1, block=128, warps=8, stages=3),
            forward.Tiling(128, tokens=8, chains=1, block=64, warps=8, stages=3),
        ],
        case="triton",
        direction="forward",
    ),
    "simplicial_forward_mosaic": Tuning(
        [
            mosaic.Tiling(128, blocks=2, slots=4, few=16, programs=132, turns=False),
            mosaic.Tiling(128, blocks=2, slots=4, few=32, programs=132),
            mosaic.Tiling(128, blocks=2, slots=5, few=8, programs=132),
            mosaic.Tiling(64, blocks=4, slots=10, few=8, programs=132),
            mosaic.Tiling(256, blocks=1, slots=2, few=16, programs=132),
            mosaic.Tiling(64, blocks=3, slots=10, few=8, programs=132),
            mosaic.Tiling(128, blocks=1, slots=4, few=16, programs=132),
            mosaic.Tiling(128, blocks=1, slots=4, few=16, programs=132, turns=False),
        ],
        case="mosaic",
        direction="forward",
        shapes=[name for name in SHAPES if name.startswith(("64/1,", "128/1,"))],
    ),
    "simplicial_backward_query": Tuning(
        [
            backward.Tiling(64, tokens=1, block=32, warps=4, stages=2),
            backward.Tiling(64, tokens=1, block=32, warps=4, stages=3),
            backward.Tiling(64, tokens=1, block=32, warps=4, stages=4),
            backward.Tiling(64, tokens=1, block=64, warps=4, stages=2),
            backward.Tiling(64, tokens=4, block=32, warps=4, stages=3),
            backward.Tiling(128, tokens=1, block=32, warps=8, stages=3),
        ],
        case="triton",
        direction="backward",
    ),
    "simplicial_backward_key": Tuning(
        [
            backward.Tiling(32, tokens=1, block=64, warps=4, stages=1),
            backward.Tiling(32, tokens=1, block=64, warps=4, stages=2),
            backward.Tiling(32, tokens=1, block=128, warps=8, stages=1),
            backward.Tiling(64, tokens=1, block=64, warps=4, stages=1),
            backward.Tiling(64, tokens=1, block=64, warps=4, stages=2),
            backward.Tiling(64, tokens=1, block=128, warps=8, stages=1),
        ],
        case="triton",
        direction="backward",
    ),
}
