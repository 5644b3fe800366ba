"""What the tests of the block-sparse kernels in Mosaic share."""

import contextlib

import jax
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from jattn.pallas import tuning


def random_blocks(t, s, k, n, seed):
    """Blocks of 64 keys in [1, t, k, n], some of them none or repeated."""
    rng = np.random.default_rng(seed)
    return rng.integers(-1, -(-s // 64), (1, t, k, n))


@contextlib.contextmanager
def chosen(monkeypatch, module, **tilings):
    """Makes a module use Mosaic, interpreted, with these tilings, or fails."""
    monkeypatch.setattr(module, "unsupported_mosaic", lambda *_: None)
    with contextlib.ExitStack() as stack:
        forced = [
            stack.enter_context(tuning.force(name, tiling))
            for name, tiling in tilings.items()
        ]
        yield
    assert all(forced), "another kernel was used"


def lowered_on_shards(function, *shapes):
    """A program for two H100, each of which maps a function and calls it once more."""
    device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")
    mesh = jax.sharding.AbstractMesh(
        (2,), ("data",), (AxisType.Auto,), abstract_device=device
    )
    spec = PartitionSpec("data")

    def on_shard(*arrays):
        once = [x[None] for x in function(*(x[0] for x in arrays))]
        return once, jax.vmap(function)(*arrays)

    sharded = jax.shard_map(on_shard, mesh=mesh, in_specs=spec, out_specs=spec)
    shapes = [jax.ShapeDtypeStruct((4, *x.shape), x.dtype) for x in shapes]
    with jax.sharding.use_abstract_mesh(mesh):
        lowered = jax.jit(sharded).trace(*shapes).lower(lowering_platforms=("cuda",))
    return lowered.as_text()
