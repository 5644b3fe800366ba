"""jattn.long_conv against loops in float64, and its contract."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.test_util import check_grads

import jattn
from jattn.ops.long_conv import long_conv_step
from tests.support import (
    assert_equal_up_to_rounding,
    documents,
    normal,
    relative_rms,
    shard_over_batch,
    temporary_bytes,
)

# Directly summed blocks, Toeplitz halves, and halves transformed by Fourier: lengths
# on both sides of each, and of block sizes that are no power of two.
LENGTHS = [1, 7, 8, 9, 63, 111, 130, 257]

long_conv = jax.jit(jattn.long_conv, static_argnames="implementation")


def slow_conv(
    u,
    kernel,
    kernel_reverse=None,
    skip=None,
    gate_in=None,
    gate_out=None,
    segment_ids=None,
):
    """One pair of tokens at a time; a tap that is not there is 0."""
    b, length, _ = u.shape
    u, kernel = np.asarray(u, np.float64), np.asarray(kernel, np.float64)
    z = u if gate_in is None else u * np.asarray(gate_in, np.float64)
    y = np.zeros_like(z) if skip is None else np.asarray(skip, np.float64) * z
    for row, t, j in np.ndindex(b, length, length):
        if segment_ids is not None and segment_ids[row, t] != segment_ids[row, j]:
            continue
        if j <= t and t - j < len(kernel):
            y[row, t] += kernel[t - j] * z[row, j]
        if kernel_reverse is not None and 0 <= j - t - 1 < len(kernel_reverse):
            y[row, t] += np.asarray(kernel_reverse, np.float64)[j - t - 1] * z[row, j]
    return y if gate_out is None else y * np.asarray(gate_out, np.float64)


def inputs(seed=0, b=2, length=20, d=3, taps=None, dtype=jnp.float32):
    """u, kernel and every option."""
    taps = taps or length
    names = ("u", "kernel", "kernel_reverse", "skip", "gate_in", "gate_out")
    row, kernel = (b, length, d), (taps, d)
    arrays = normal(seed, row, kernel, kernel, (d,), row, row, dtype=dtype)
    return dict(zip(names, arrays, strict=True))


@pytest.mark.parametrize("length", LENGTHS)
def test_equals_the_loop_for_any_length(length):
    arguments = inputs(b=1, length=length, d=2)
    y = long_conv(**arguments)
    assert y.dtype == jnp.float32
    assert_equal_up_to_rounding(y, slow_conv(**arguments), 1e-6)
    u, kernel = arguments["u"], arguments["kernel"]
    y = long_conv(u, kernel)
    assert_equal_up_to_rounding(y, slow_conv(u, kernel), 1e-6)


@given(
    b=st.integers(1, 2),
    length=st.sampled_from([1, 5, 11, 40]),
    d=st.integers(1, 3),
    taps=st.sampled_from([1, 3, 60]),
    options=st.sets(st.sampled_from(["kernel_reverse", "skip", "gate_in", "gate_out"])),
    packed=st.booleans(),
)
def test_equals_the_loop_for_any_options(b, length, d, taps, options, packed):
    arguments = inputs(b=b, length=length, d=d, taps=taps)
    arguments = {k: v for k, v in arguments.items() if k in options | {"u", "kernel"}}
    if packed:
        first = length // 3
        arguments["segment_ids"] = documents(first, length - first, batch=b)
    y = long_conv(**arguments)
    assert_equal_up_to_rounding(y, slow_conv(**arguments), 1e-6)


@pytest.mark.parametrize("length", [20, 300])
def test_fp64_stays_fp64(x64, length):
    arguments = inputs(b=1, length=length, dtype=jnp.float64)
    y = long_conv(**arguments)
    assert y.dtype == jnp.float64
    assert_equal_up_to_rounding(y, slow_conv(**arguments), 1e-14)


def test_bf16_is_summed_in_fp32():
    arguments = inputs(length=300, d=2, b=1, dtype=jnp.bfloat16)
    y = long_conv(**arguments)
    assert y.dtype == jnp.bfloat16
    # One rounding to bf16 alone gives 1.7e-3.
    assert_equal_up_to_rounding(y, slow_conv(**arguments), 2e-3)


def test_extreme_decay_keeps_its_accuracy(x64):
    u, kernel = normal(0, (1, 300, 2), (300, 2), dtype=jnp.float64)
    kernel = kernel * jnp.exp(-0.5 * jnp.arange(300.0))[:, None]
    y = long_conv(u, kernel)
    assert_equal_up_to_rounding(y, slow_conv(u, kernel), 1e-14)


@pytest.mark.parametrize("length", [9, 150])
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_equal_finite_differences(x64, length, packed):
    arguments = inputs(b=1, length=length, d=1, dtype=jnp.float64)
    segments = documents(4, length - 4) if packed else None

    def loss(arguments):
        return jnp.mean(jnp.sin(long_conv(**arguments, segment_ids=segments)))

    check_grads(jax.jit(loss), (arguments,), order=1, modes=["rev"])


@pytest.mark.parametrize("taps", [3, 25])
def test_gradients_of_taps_that_are_not_used_are_zero(taps):
    (u,) = normal(0, (1, 10, 2))
    (kernel,) = normal(1, (taps, 2))
    grad = jax.grad(lambda k: jnp.sum(jnp.sin(long_conv(u, k))))(kernel)
    assert np.all(np.any(grad[:10] != 0, axis=1))
    assert not np.any(grad[10:])


@pytest.mark.parametrize("cut", [1, 64, 150, 299])
def test_the_future_changes_nothing_bit_for_bit(cut):
    options = inputs(length=300, b=1)
    del options["kernel_reverse"]
    (noise,) = normal(1, (1, 300, 3))
    changed = options | {
        name: jnp.concatenate([options[name][:, :cut], 1e3 * noise[:, cut:]], axis=1)
        for name in ("u", "gate_in", "gate_out")
    }
    before, after = long_conv(**options), long_conv(**changed)
    np.testing.assert_array_equal(before[:, :cut], after[:, :cut])
    assert np.all(before[:, cut:] != after[:, cut:])


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_documents_never_see_each_other_bit_for_bit(changed):
    options = inputs(length=300, b=1)
    segments = documents(70, 101, 129)
    (noise,) = normal(1, (1, 300, 3))
    inside = (segments == changed + 1)[..., None]
    other = options | {"u": jnp.where(inside, noise, options["u"])}
    before, after = (long_conv(**x, segment_ids=segments) for x in (options, other))
    same = np.asarray(before == after)
    assert np.all(same[np.broadcast_to(~inside, same.shape)])
    assert not np.any(same[np.broadcast_to(inside, same.shape)])


def test_packed_documents_equal_documents_alone():
    options = inputs(b=1, length=200)
    packed = long_conv(**options, segment_ids=documents(70, 1, 129))
    alone = []
    for a, b in [(0, 70), (70, 71), (71, 200)]:
        part = {
            name: x[:, a:b] if name in ("u", "gate_in", "gate_out") else x
            for name, x in options.items()
        }
        alone.append(long_conv(**part))
    assert_equal_up_to_rounding(packed, jnp.concatenate(alone, axis=1), 1e-6)


@pytest.mark.parametrize("packed", [False, True])
def test_long_sequences_do_not_build_a_square(packed):
    b, length, d = 1, 8192, 64
    f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    shapes = [f32((b, length, d)), f32((length, d))]
    segments = jnp.ones((b, length), jnp.int32) if packed else None

    def conv(u, kernel):
        return jattn.long_conv(u, kernel, segment_ids=segments)

    # u itself is 2 MB; the Toeplitz matrices of all channels would be 17 GB.
    assert temporary_bytes(conv, *shapes) < 100 * 2**20


def test_transformations_agree():
    u, kernel = normal(0, (2, 140, 3), (140, 3))
    plain = jattn.long_conv(u, kernel)
    jitted = long_conv(u, kernel)
    mapped = jax.vmap(lambda u: jattn.long_conv(u[None], kernel)[0])(u)
    sharded = shard_over_batch(lambda u: jattn.long_conv(u, kernel))(u)
    _, scanned = jax.lax.scan(
        lambda carry, u: (carry, jattn.long_conv(u[None], kernel)[0]), None, u
    )
    remat = jax.checkpoint(jattn.long_conv)(u, kernel)
    chex.assert_trees_all_close(
        plain, jitted, mapped, sharded, scanned, remat, rtol=1e-5, atol=1e-4
    )


def test_the_same_input_gives_the_same_bits():
    arguments = inputs(length=300)
    conv = jax.jit(jax.grad(lambda a: jnp.sum(jnp.sin(long_conv(**a)))))
    chex.assert_trees_all_equal(conv(arguments), conv(arguments))


def test_a_step_equals_the_convolution():
    u, kernel = normal(0, (3, 30, 2), (20, 2))
    positions = jnp.asarray([0, 7, 29])
    expected = long_conv(u, kernel)[jnp.arange(3), positions]
    assert_equal_up_to_rounding(long_conv_step(u, kernel, positions), expected, 1e-6)
    # Slots after the position may hold anything.
    garbage = u.at[1, 8:].set(1e6)
    np.testing.assert_array_equal(
        long_conv_step(garbage, kernel, positions),
        long_conv_step(u, kernel, positions),
    )


def test_the_error_of_fp32_is_that_of_fp32(x64):
    u, kernel = normal(0, (1, 2000, 2), (2000, 2), dtype=jnp.float64)
    exact = long_conv(u, kernel)
    rounded = long_conv(u.astype(jnp.float32), kernel.astype(jnp.float32))
    expected = [np.convolve(u[0, :, c], kernel[:, c])[:2000] for c in range(2)]
    assert_equal_up_to_rounding(exact[0], np.stack(expected, axis=-1), 1e-14)
    assert 0 < relative_rms(rounded, exact) < 5e-7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"u": (2, 20)}, r"u must have shape \[B, L, D\]"),
        ({"kernel": (20, 4)}, r"kernel must have shape \[K, D=3\]"),
        ({"kernel": (0, 3)}, "K must be a positive integer; got 0"),
        ({"kernel_reverse": (0, 3)}, "R must be a positive integer; got 0"),
        ({"kernel_reverse": (20,)}, r"kernel_reverse must have shape \[R, D=3\]"),
        ({"skip": (4,)}, r"skip must have shape \[D=3\]"),
        ({"gate_in": (2, 19, 3)}, r"gate_in must have shape \[B=2, L=20, D=3\]"),
        ({"gate_out": (1, 20, 3)}, r"gate_out must have shape \[B=2, L=20, D=3\]"),
    ],
)
def test_wrong_shapes_are_named(changes, message):
    arguments = inputs() | {name: jnp.zeros(s) for name, s in changes.items()}
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(jattn.long_conv, **arguments)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"implementation": "cuda"}, ValueError, "implementation must be"),
        ({"implementation": "triton"}, NotImplementedError, "no such kernel"),
        ({"segment_ids": jnp.zeros((2, 3), jnp.int32)}, ValueError, "segment_ids"),
        ({"skip": jnp.zeros(3, jnp.int32)}, ValueError, "skip must have a floating"),
    ],
)
def test_wrong_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        jattn.long_conv(**inputs() | options)
