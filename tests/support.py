"""Random inputs and comparisons every test shares."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec


def normal(seed: int, *shapes: tuple[int, ...], dtype=jnp.float32) -> list[jax.Array]:
    """Arrays of N(0, 1) numbers of the given shapes."""
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def documents(*lengths: int, batch: int = 1) -> jax.Array:
    """Segment ids int32 [batch, sum(lengths)] of documents of these lengths."""
    row = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    return jnp.asarray(np.tile(row, (batch, 1)), jnp.int32)


def relative_rms(actual, expected) -> float:
    """RMS of the difference over RMS of what is expected."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return float(
        np.sqrt(np.mean((actual - expected) ** 2) / np.mean(expected**2).clip(1e-300))
    )


def assert_equal_up_to_rounding(actual, expected, tolerance: float = 1e-5) -> None:
    """Asserts equal shapes, equal infinities, and a small relative RMS difference."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(actual[~finite], expected[~finite])
    if np.any(expected[finite]):
        error = relative_rms(actual[finite], expected[finite])
        assert error <= tolerance, f"relative RMS error {error:.3g} > {tolerance:.3g}"
    else:
        np.testing.assert_array_equal(actual[finite], expected[finite])


def shard_over_batch(function):
    """The function under shard_map, each of two devices taking half of the batch."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("data")
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec))


def temporary_bytes(function, *shapes: jax.ShapeDtypeStruct) -> int:
    """Bytes of temporaries the compiled function holds at most."""
    analysis = jax.jit(function).lower(*shapes).compile().memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes
