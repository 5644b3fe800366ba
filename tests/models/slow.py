"""The networks once more in numpy float64, one row and one token at a time."""

import jax
import jax.numpy as jnp
import numpy as np


def random_params(model, *inputs):
    """Parameters drawn here: compiling ``model.init`` takes longer than the rest.

    They are large enough for every part of a network to matter.
    """
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)

    def draw(path, leaf):
        noise = rng.standard_normal(leaf.shape)
        is_scale = "scale" in jax.tree_util.keystr(path)
        return jnp.asarray(1 + 0.1 * noise if is_scale else 0.4 * noise, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def float64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def silu(x):
    return x / (1 + np.exp(-x))


def softmax(x):
    weights = np.exp(x - np.max(x))
    return weights / weights.sum()


def rms_norm(params, x):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * params["scale"]


def rotate(x, position, base):
    """Rotary embedding of one head [H]: pairs are complex numbers."""
    half = x.shape[-1] // 2
    pairs = x[:half] + 1j * x[half:]
    pairs = pairs * np.exp(1j * position * base ** (-np.arange(half) / half))
    return np.concatenate([pairs.real, pairs.imag])


def attention(params, x, *, rope_base, visible):
    """Dense attention of x [T, features]; visible(t, s) says what t sees."""
    query, key, value = (
        np.einsum("tf,fnh->tnh", x, params[name]["kernel"])
        for name in ("query", "key", "value")
    )
    length, heads, width = query.shape
    group = heads // key.shape[1]
    out = np.zeros_like(query)
    for t, n in np.ndindex(length, heads):
        seen = [s for s in range(t + 1) if visible(t, s)]
        q, keys = query[t, n], key[seen, n // group]
        if rope_base is not None:
            q = rotate(q, t, rope_base)
            keys = [rotate(k, s, rope_base) for k, s in zip(keys, seen, strict=True)]
        weights = softmax(np.array([q @ k for k in keys]) / np.sqrt(width))
        out[t, n] = weights @ value[seen, n // group]
    return np.einsum("tnh,nhf->tf", out, params["out"]["kernel"])


def swiglu(params, x):
    gate, up, down = (params[name]["kernel"] for name in ("gate", "up", "down"))
    return (silu(x @ gate) * (x @ up)) @ down


def block_stack(params, x, *, rope_base=10_000.0, visible=lambda t, s: True):
    """Pre-norm blocks of dense attention and SwiGLU, and the final norm."""
    for layer in range(len(params) - 1):
        block = params[f"layer_{layer}"]
        x = x + attention(
            block["mixer"],
            rms_norm(block["mixer_norm"], x),
            rope_base=rope_base,
            visible=visible,
        )
        x = x + swiglu(block["feed_forward"], rms_norm(block["feed_forward_norm"], x))
    return rms_norm(params["final_norm"], x)
