"""What every mixer promises, written once and called by each mixer's tests."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tests.support import assert_equal_up_to_rounding, normal, shard_over_batch


def start(mixer, x, **options):
    """Initial parameters, and the compiled function of parameters and x."""
    init, apply = _compiled(mixer, "init"), _compiled(mixer, "apply", **options)
    return init(jax.random.key(0), x), apply


@functools.cache
def _compiled(mixer, method, **options):
    """A method that equal mixers share, so that each shape compiles once."""
    return jax.jit(functools.partial(getattr(mixer, method), **options))


def check_decode_equals_parallel(
    mixer, *, features=16, length=13, splits=((13,), (1,) * 13, (5, 1, 4, 3)), **options
):
    """Prefill and decode, in any split, give what one parallel call gives."""
    (x,) = normal(0, (2, length, features))
    params, apply = start(mixer, x, **options)
    expected = apply(params, x)
    for split in splits:
        cache = mixer.init_cache(2, length, jnp.float32)
        shapes = jax.tree.map(jnp.shape, cache)
        outputs = []
        for part in jnp.split(x, np.cumsum(split)[:-1], axis=1):
            out, cache = apply(params, part, cache=cache)
            outputs.append(out)
        assert jax.tree.map(jnp.shape, cache) == shapes
        assert_equal_up_to_rounding(jnp.concatenate(outputs, axis=1), expected)


def check_ragged_decode(mixer, *, features=16, length=14, lengths=(9, 4), **options):
    """Rows of different length decode as each would alone."""
    (x,) = normal(1, (2, length, features))
    params, apply = start(mixer, x, **options)
    expected = apply(params, x)
    cache = mixer.init_cache(2, length, jnp.float32)
    prompt = x[:, : max(lengths)]
    held = jnp.asarray(lengths, jnp.int32)
    out, cache = apply(params, prompt, cache=cache, lengths=held)
    for row, count in enumerate(lengths):
        assert_equal_up_to_rounding(out[row, :count], expected[row, :count])
    for _ in range(length - max(lengths)):
        token = x[jnp.arange(2), held][:, None]
        out, cache = apply(params, token, cache=cache)
        assert_equal_up_to_rounding(out[:, 0], expected[jnp.arange(2), held])
        held = held + 1


def check_padding_may_hold_anything(mixer, *, features=16, length=13):
    """What pads a prompt, or tokens after it, reaches no output and no cache."""
    (x,) = normal(4, (2, length, features))
    params, apply = start(mixer, x)
    cache = mixer.init_cache(2, 2 * length, jnp.float32)
    lengths = jnp.array([length, 5])
    poisoned = x.at[1, 5:].set(jnp.nan)
    for _ in range(2):
        expected = apply(params, x, cache=cache, lengths=lengths)
        actual = apply(params, poisoned, cache=cache, lengths=lengths)
        jax.tree.map(np.testing.assert_array_equal, actual, expected)
        np.testing.assert_array_equal(actual[0][1, 5:], 0)
        cache = actual[1]


def check_cached_calls_map_and_shard(mixer, *, features=16, length=13):
    """A prompt, and tokens after it, under vmap and under shard_map."""
    (x,) = normal(5, (2, length, features))
    params, apply = start(mixer, x)

    def run(x, cache):
        return apply(params, x, cache=cache)

    def run_row(*row):
        results = run(*jax.tree.map(lambda x: x[None], row))
        return jax.tree.map(lambda x: x[0], results)

    mapped, sharded = jax.jit(jax.vmap(run_row)), shard_over_batch(run)
    cache = mixer.init_cache(2, 2 * length, jnp.float32)
    for _ in range(2):
        expected = run(x, cache)
        for transformed in mapped, sharded:
            actual = transformed(x, cache)
            jax.tree.map(assert_equal_up_to_rounding, actual, expected)
        cache = expected[1]


def check_causality(mixer, *, features=16, length=17, cut=9, **options):
    """Changing the future leaves every earlier output as it was, bit for bit."""
    x, y = normal(2, (2, length, features), (2, length, features))
    params, apply = start(mixer, x, **options)
    changed = jnp.concatenate([x[:, :cut], y[:, cut:]], axis=1)
    before, after = apply(params, x), apply(params, changed)
    np.testing.assert_array_equal(before[:, :cut], after[:, :cut])
    assert np.any(before[:, cut:] != after[:, cut:])


def check_gradients_reach_every_parameter(mixer, *, features=16, length=13, **options):
    """No parameter is left out of the output, and no gradient is NaN."""
    (x,) = normal(3, (2, length, features))
    params, apply = start(mixer, x, **options)

    def loss(params):
        return jnp.sum(jnp.sin(apply(params, x)))

    grads = jax.jit(jax.grad(loss))(params)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        name = jax.tree_util.keystr(path)
        assert np.all(np.isfinite(grad)), f"gradient of {name} is not finite"
        assert np.any(grad != 0), f"{name} has no influence"
