"""jattn.models.M2Bert: its size, its wiring, its padding and its documents."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn.models import M2Bert
from tests.support import assert_equal_up_to_rounding, documents, normal


def make(**options):
    sizes = {"vocab_size": 30, "max_length": 10, "num_layers": 2, "features": 8}
    return M2Bert(**sizes | {"hidden": 12, "filter_order": 6} | options)


def some_tokens(seed=0, shape=(2, 8)):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 30, shape))


def some_params(model):
    """Parameters of N(0, 0.3²) numbers, biases too."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), some_tokens())
    leaves, tree = jax.tree.flatten(shapes)
    noise = normal(5, *(leaf.shape for leaf in leaves), dtype=model.param_dtype)
    return jax.tree.unflatten(tree, [0.3 * leaf for leaf in noise])


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, tokens, **arguments):
    return model.apply(params, tokens, **arguments)


@pytest.mark.parametrize(
    ("features", "hidden", "count"),
    [
        (768, 3072, 80_267_328),
        (960, 3840, 115_583_616),
        (1536, 6144, 259_133_760),
        (1792, 7168, 341_038_144),
    ],
)
def test_the_released_sizes(features, hidden, count):
    model = M2Bert(features=features, hidden=hidden)
    params = jax.eval_shape(
        model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 128), jnp.int32)
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count


def norm(x, params):
    centred = x - x.mean(-1, keepdims=True)
    scale = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12)
    return centred / scale * params["scale"] + params["bias"]


@pytest.mark.parametrize("input_norm", [False, True])
def test_layers_are_wired_as_released(x64, input_norm):
    model = make(param_dtype=jnp.float64, input_norm=input_norm)
    tokens, types = some_tokens(), some_tokens(1) % 2
    params = some_params(model)
    p = jax.tree.map(np.asarray, params["params"])
    h = p["token_embedding"]["embedding"][tokens]
    h = h + p["token_type_embedding"]["embedding"][types]
    h = h + p["position_embedding"]["embedding"][:8]
    h = norm(h, p["embedding_norm"])
    mixer = jattn.nn.MonarchMixer(
        8, 10, 6, bidirectional=True, input_norm=input_norm, param_dtype=jnp.float64
    )
    mlp = jattn.nn.BlockDiagonalMLP(12, param_dtype=jnp.float64)
    for i in range(2):
        # No residual around the mixer, one around the feed-forward.
        h = mixer.apply({"params": p[f"mixer_{i}"]}, jnp.asarray(h))
        h = norm(h + mlp.apply({"params": p[f"mlp_{i}"]}, h), p[f"norm_{i}"])
    h = jax.nn.gelu(h @ p["head"]["kernel"] + p["head"]["bias"], approximate=False)
    h = norm(np.asarray(h), p["head_norm"])
    expected = h @ p["token_embedding"]["embedding"].T + p["head_bias"]
    logits = apply(model, params, tokens, token_type_ids=types)
    assert logits.shape == (2, 8, 30)
    assert_equal_up_to_rounding(logits, expected, 1e-13)


def test_every_token_sees_both_sides():
    model, tokens = make(), some_tokens()
    params = some_params(model)
    changed = tokens.at[:, 4].set((tokens[:, 4] + 1) % 30)
    before, after = apply(model, params, tokens), apply(model, params, changed)
    assert np.all(np.any(before != after, axis=-1))


def test_gradients_reach_every_parameter():
    model, tokens = make(input_norm=True, max_length=8), some_tokens()
    params = some_params(model)
    types = jnp.arange(8)[None] % 2 + jnp.zeros((2, 1), int)
    grads = jax.jit(
        jax.grad(
            lambda params: jnp.sum(
                jnp.sin(apply(model, params, tokens, token_type_ids=types))
            )
        )
    )(params)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        name = jax.tree_util.keystr(path)
        assert np.all(np.isfinite(grad)), f"gradient of {name} is not finite"
        assert np.any(grad != 0), f"{name} has no influence"


def test_masked_padding_changes_nothing():
    model, tokens = make(), some_tokens()
    params = some_params(model)
    mask = jnp.arange(8) < 5
    mask = jnp.stack([mask, mask]).astype(jnp.int32)
    other = jnp.where(mask == 1, tokens, 3)
    padded, changed = (
        apply(model, params, x, attention_mask=mask) for x in (tokens, other)
    )
    np.testing.assert_array_equal(padded[:, :5], changed[:, :5])
    assert_equal_up_to_rounding(padded[:, :5], apply(model, params, tokens[:, :5]))


def test_padding_changes_the_text_as_released():
    model, tokens = make(mask_padding=False), some_tokens()
    params = some_params(model)
    mask = jnp.stack([jnp.arange(8) < 5] * 2)
    masked = apply(model, params, tokens, attention_mask=mask)
    np.testing.assert_array_equal(masked, apply(model, params, tokens))
    alone = apply(model, params, tokens[:, :5])
    assert np.max(np.abs(masked[:, :5] - alone)) > 1e-3


def test_packed_documents_equal_documents_alone():
    model, tokens = make(), some_tokens()
    params = some_params(model)
    segments = documents(3, 5, batch=2)
    packed = apply(model, params, tokens, segment_ids=segments)
    alone = [apply(model, params, tokens[:, a:b]) for a, b in [(0, 3), (3, 8)]]
    assert_equal_up_to_rounding(packed, jnp.concatenate(alone, axis=1))
    changed = apply(model, params, tokens.at[:, 3:].set(1), segment_ids=segments)
    np.testing.assert_array_equal(packed[:, :3], changed[:, :3])


def test_dropout_needs_to_be_asked_for():
    model, tokens = make(dropout_rate=0.5), some_tokens()
    params = some_params(make())
    first, second = (
        model.apply(
            params, tokens, deterministic=False, rngs={"dropout": jax.random.key(i)}
        )
        for i in range(2)
    )
    assert np.any(first != second)
    np.testing.assert_array_equal(
        apply(model, params, tokens), apply(make(), params, tokens)
    )


def test_bf16_gives_fp32_logits():
    tokens = some_tokens()
    params = some_params(make())
    logits = apply(make(dtype=jnp.bfloat16), params, tokens)
    assert logits.dtype == jnp.float32
    assert_equal_up_to_rounding(logits, apply(make(), params, tokens), 5e-3)


@pytest.mark.parametrize(
    ("shape", "arguments", "message"),
    [
        ((2, 11), {}, "L=11 positions and the model max_length=10"),
        ((5,), {}, r"tokens must be integers of shape \[B, T\]"),
        ((2, 5), {"attention_mask": (2, 4)}, "attention_mask must have shape"),
        ((2, 5), {"token_type_ids": (1, 5)}, "token_type_ids must have shape"),
        ((2, 5), {"segment_ids": (2, 4)}, "segment_ids must be integers"),
    ],
)
def test_errors_say_what_is_wrong(shape, arguments, message):
    arguments = {name: jnp.zeros(s, jnp.int32) for name, s in arguments.items()}
    tokens = jnp.zeros(shape, jnp.int32)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: make().init(jax.random.key(0), tokens, **arguments))
