"""jattn.models.Megabyte against its equations in numpy float64, byte by byte."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn.models import BlockStack, Megabyte, strided_score
from tests.models import slow
from tests.support import assert_equal_up_to_rounding, documents

VOCAB, BOS, SIZE, MAX, LENGTH = 256, 256, 4, 40, 21
GLOBAL, LOCAL = 6, 8  # widths of a byte

# Each flag once, together with others that it could disturb.
FLAGS = {
    "equations": {"layers": 2},
    "ids": {
        "pads": "id",
        "order": "shift_then_embed",
        "bos_id": 0,
        "tie_embeddings": False,
        "local_positions": True,
    },
    "rope": {
        "positions": "rope",
        "max_length": None,
        "pads": "id",
        "global_to_local": False,
        "local_width": GLOBAL,
    },
    "cross-patch": {"cross_patch": 2, "layers": 2, "conv_kernels": [3, 2]},
    "whole patch crossed": {
        "cross_patch": SIZE,
        "local_positions": True,
        "order": "shift_then_embed",
        "conv_kernels": [3],
    },
}

# float64 throughout, so that whatever is compared has to agree to rounding.
pytestmark = pytest.mark.usefixtures("x64")


def make(
    *,
    size=SIZE,
    local_width=LOCAL,
    layers=1,
    global_blocks=(),
    local_blocks=(),
    **flags,
):
    """A model; *_blocks are further fields of a stage."""

    def stage(features, options):
        sizes = {"num_layers": layers, "num_heads": 2, "head_dim": 4, "hidden": 10}
        fields = {"features": features, "param_dtype": jnp.float64} | sizes
        return BlockStack(**fields | dict(options))

    defaults = {"bos_id": BOS, "patch_size": size, "max_length": MAX}
    return Megabyte(
        global_stage=stage(size * GLOBAL, global_blocks),
        local_stage=stage(local_width, local_blocks),
        **defaults | flags,
    )


def rows(batch=2, length=LENGTH, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, VOCAB, (batch, length), np.int32)


def fed(tokens, bos_id=BOS):
    return np.pad(tokens[:, :-1], [(0, 0), (1, 0)], constant_values=bos_id)


def packed(*ends, batch=2):
    return documents(*np.diff([0, *ends, LENGTH]), batch=batch)


@functools.cache
def init(model):
    return slow.random_params(model, rows())


@functools.partial(jax.jit, static_argnums=0)
def score(model, params, tokens, segment_ids=None):
    return model.apply(params, tokens, segment_ids, method="score")


@functools.partial(jax.jit, static_argnums=0)
def step(model, params, tokens, cache, lengths=None):
    return model.apply(params, tokens, cache=cache, lengths=lengths)


def start(model, batch=2, dtype=jnp.float64):
    return model.init_cache(batch, LENGTH, dtype)


def slow_megabyte(model, params, document, phase=0):
    """Logits [T, V] of one document that begins at slot `phase` of a patch."""
    params = slow.float64(params["params"])
    size, length = model.patch_size, len(document)
    absolute = model.positions == "absolute"
    shifted = size if model.order == "shift_then_embed" else 0

    def position(t):  # of the byte at place t, or of the pad where t < 0
        exists = absolute and (t >= 0 or shifted)
        return params["global_positions"][t + shifted] if exists else 0

    if model.pads == "trainable":
        global_pad, local_pad = params["global_pad"], params["local_pad"]
    else:
        global_pad = np.tile(params["global_embedding"][model.bos_id], (size, 1))
        local_pad = params["local_embedding"][model.bos_id]

    # (1)
    h = np.array(
        [params["global_embedding"][x] + position(t) for t, x in enumerate(document)]
    )
    for index in range(len(model.conv_kernels)):
        kernel, before = params[f"conv_{index}"], h.copy()
        for t in range(length):
            taps = [before[t - lag] @ w for lag, w in enumerate(kernel) if lag <= t]
            h[t] = before[t] + np.maximum(sum(taps), 0)

    # (2), (3). Patches begin at places -phase + k P; the first whole one starts a
    # global row of its own, and a part of one before it another.
    def global_input(start):
        places = range(start - size, start)
        return np.concatenate(
            [
                h[t] if t >= 0 else global_pad[t - places[0]] + position(t)
                for t in places
            ]
        )

    run = functools.partial(
        slow.block_stack,
        params["global_blocks"],
        rope_base=None if absolute else 10_000.0,
    )
    starts = list(range(-phase, length, size))
    pads_only = np.concatenate(
        [global_pad[p] + position(p - size) for p in range(size)]
    )
    whole = [global_input(start) for start in starts if start >= 0]
    out = list(run(np.array(whole))) if whole else []
    if phase:
        out = [run(pads_only[None])[0], *out]

    # (4), with one row for all patches; (5) as visibility inside it
    local = []
    for t in range(length):
        k, p = divmod(t + phase, size)
        x = out[k].reshape(size, -1)[p]
        if model.global_to_local:
            x = x @ params["global_to_local"]["kernel"]
        x = x + (params["local_embedding"][document[t - 1]] if t and p else local_pad)
        if model.local_positions:
            x = x + params["local_positions"][p]
        local.append(x)

    def visible(t, s):
        k, same = (t + phase) // size, (s + phase) // size
        return same == k or s + phase >= k * size - model.cross_patch

    rotary = not absolute or model.cross_patch
    lout = slow.block_stack(
        params["local_blocks"],
        np.array(local),
        rope_base=10_000.0 if rotary else None,
        visible=visible,
    )
    # (6)
    if model.tie_embeddings:
        return lout @ params["local_embedding"][:VOCAB].T
    return lout @ params["head"]


@pytest.mark.parametrize("flags", FLAGS)
def test_equals_the_equations(flags):
    """Also for packed documents, wherever they begin."""
    model = make(**FLAGS[flags])
    params, tokens = init(model), rows()
    whole = score(model, params, tokens)
    assert np.std(whole) > 0.05
    expected = slow_megabyte(model, params, tokens[1])
    assert_equal_up_to_rounding(whole[1], expected, 1e-12)
    ends = [4, 5, 7, 16]
    together = score(model, params, tokens, packed(*ends))[1]
    for begin, end in itertools.pairwise([0, *ends, LENGTH]):
        alone = slow_megabyte(model, params, tokens[1, begin:end], begin % SIZE)
        assert_equal_up_to_rounding(together[begin:end], alone, 1e-12)


@pytest.mark.parametrize("flags", FLAGS)
def test_decode_equals_parallel(flags):
    """In any split of prefill and steps, and with rows of different length."""
    model = make(**FLAGS[flags])
    params, tokens = init(model), rows()
    expected = score(model, params, tokens)
    inputs = fed(tokens, model.bos_id)
    cache = start(model)
    held = np.zeros(2, np.int32)
    for count, lengths in [
        *[(9, (9, 2)), (9, (0, 9)), (9, (5, 1))],
        *[(1, (1, 1)), (1, (1, 0)), (1, (1, 1)), (1, (1, 1)), (1, (1, 1))],
    ]:
        index = np.minimum(held[:, None] + np.arange(count), LENGTH - 1)
        part = np.take_along_axis(inputs, index, axis=1)
        logits, cache = step(model, params, part, cache, np.array(lengths, np.int32))
        for row, new in enumerate(lengths):
            begin, end = held[row], held[row] + new
            assert_equal_up_to_rounding(
                logits[row, :new], expected[row, begin:end], 1e-12
            )
        held = held + lengths
    np.testing.assert_array_equal(cache.length, held)
    assert jax.tree.map(jnp.shape, cache) == jax.tree.map(jnp.shape, start(model))


@pytest.mark.parametrize("size", [1, 5])
def test_decode_goes_on_after_any_prompt(size):
    """One prompt length a row, so that rows stand everywhere in their patches."""
    model = make(size=size, conv_kernels=[2])
    params, tokens = init(model), np.tile(rows(1), (8, 1))
    expected = score(model, params, rows())[:1]
    prompts = np.arange(8, dtype=np.int32)
    inputs = fed(tokens)
    logits, cache = step(model, params, inputs[:, :7], start(model, 8), prompts)
    for row, prompt in enumerate(prompts):
        assert_equal_up_to_rounding(logits[row, :prompt], expected[0, :prompt], 1e-12)
    for more in range(8):
        held = prompts + more
        token = inputs[np.arange(8), held][:, None]
        logits, cache = step(model, params, token, cache)
        assert_equal_up_to_rounding(logits[:, 0], expected[0, held], 1e-12)


@pytest.mark.parametrize("part", [0, 1])
def test_stages_take_any_mixer(part):
    """Cached and parallel agree, and documents do not see each other."""
    options = {
        "moba": {"block_size": 2, "top_k": 2},
        "nsa": {
            "kernel_size": 2,
            "stride": 1,
            "block_size": 2,
            "num_blocks": 3,
            "window_size": 2,
        },
        "simplicial": {"windows": (3, 2)},
    }

    def blocks(names):
        chosen = {name: options[name] for name in names if name in options}
        fields = {"num_layers": len(names), "mixer_options": chosen}
        return fields | {"mixers": tuple(names)}

    names = sorted(set(jattn.nn.MIXERS) - {"dense"})
    model = make(
        global_blocks=blocks(names[part::2]), local_blocks=blocks(names[1 - part :: 2])
    )
    params, cache, outputs = init(model), start(model), []
    for part in np.split(fed(rows()), 3, axis=1):
        logits, cache = step(model, params, part, cache)
        outputs.append(logits)
    whole = score(model, params, rows(), packed(LENGTH))
    assert_equal_up_to_rounding(np.concatenate(outputs, axis=1), whole, 1e-12)
    check_documents_apart(model)


def check_documents_apart(model):
    params, tokens, other = init(model), rows(), rows()
    other[:, 6:13] = rows(length=7, seed=1)
    before = np.asarray(score(model, params, tokens, packed(6, 13)))
    after = np.asarray(score(model, params, other, packed(6, 13)))
    np.testing.assert_array_equal(before[:, :6], after[:, :6])
    np.testing.assert_array_equal(before[:, 13:], after[:, 13:])
    assert np.any(before[:, 7:13] != after[:, 7:13])


@pytest.mark.parametrize("flags", FLAGS)
def test_documents_never_see_each_other(flags):
    check_documents_apart(make(**FLAGS[flags]))


@pytest.mark.parametrize("flags", FLAGS)
def test_a_byte_changes_later_logits_only(flags):
    model = make(**FLAGS[flags])
    params = init(model)
    before = np.asarray(score(model, params, rows()))
    for place in (0, 3, 4, 6):
        changed = rows()
        changed[:, place] = (changed[:, place] + 1) % VOCAB
        after = np.asarray(score(model, params, changed))
        differs = np.any(before != after, axis=-1)
        assert not np.any(differs[:, : place + 1])
        # The next byte sees it, in the same patch or in the next.
        assert np.all(differs[:, place + 1 :])


def test_documents_that_begin_with_a_patch_are_as_if_alone():
    model = make(**FLAGS["equations"])
    params = init(model)
    together = score(model, params, rows(), packed(8))
    # The same bytes after the document are the future, which changes nothing.
    late = np.roll(rows(), -8, axis=1)
    alone = np.concatenate(
        [score(model, params, rows())[:, :8], score(model, params, late)[:, :13]],
        axis=1,
    )
    assert_equal_up_to_rounding(together, alone, 1e-12)


def test_both_orders_are_one_model():
    """Positions and pads of one order turn into those of the other."""
    model = make(layers=2)
    shifted = make(layers=2, pads="id", order="shift_then_embed", bos_id=0)
    params = init(shifted)["params"]
    table = params["global_positions"]
    same = {
        "global_positions": np.roll(table, -SIZE, axis=0),
        "global_pad": params["global_embedding"][0] + table[:SIZE],
        "local_pad": params["local_embedding"][0],
    }
    assert_equal_up_to_rounding(
        score(model, {"params": params | same}, rows()),
        score(shifted, {"params": params}, rows()),
        1e-12,
    )


def test_strided_scores_take_the_first_half_of_each_patch():
    model = make(size=5, conv_kernels=[2])
    params, tokens, segments = init(model), rows(), packed(8)
    strided = jax.jit(strided_score, static_argnums=0)(model, params, tokens, segments)
    first = np.asarray(score(model, params, tokens, segments))
    # Two more bytes at the end keep the shape and are the future of all others.
    later = np.roll(tokens, -2, axis=1), np.roll(segments, -2, axis=1)
    second = np.asarray(score(model, params, *later))
    for t in range(LENGTH):
        expected = first[:, t] if t % 5 < 2 else second[:, t - 2]
        assert_equal_up_to_rounding(strided[:, t], expected, 1e-12)


def test_a_step_runs_the_global_stage_only_where_a_patch_begins():
    model = make()
    params = init(model)
    apply = functools.partial(step.__wrapped__, model)
    jaxpr = jax.make_jaxpr(apply)(params, rows(length=1), start(model))
    assert [e.primitive.name for e in jaxpr.eqns].count("cond") == 1
    products = [e for e in jaxpr.eqns if e.primitive.name == "dot_general"]
    shapes = {v.aval.shape for e in products for v in e.invars}
    # What remains outside is local: nothing is as wide as the global stage.
    assert shapes
    assert not any(SIZE * GLOBAL in shape for shape in shapes)
    cache = start(model)
    for t in range(9):
        _, cache = step(model, params, rows(length=1), cache)
        assert int(cache.global_blocks[0].length[0]) == t // SIZE + 1


def test_the_cache_holds_patches_globally_and_one_patch_locally():
    kv = 2 * 2 * 4 * 2  # keys and values, heads, width, bytes
    lengths = 3 * 4
    cache = make(layers=2).init_cache(3, 38, jnp.bfloat16)
    assert jattn.nn.cache_bytes(cache.global_blocks) == 2 * (3 * 10 * kv + lengths)
    assert jattn.nn.cache_bytes(cache.local_blocks) == 2 * (3 * SIZE * kv + lengths)
    crossed = make(cross_patch=2).init_cache(3, 38, jnp.bfloat16)
    held = 2 + SIZE - 1
    assert jattn.nn.cache_bytes(crossed.local_blocks) == 3 * held * kv + lengths


@pytest.mark.parametrize("flags", ["ids", "cross-patch"])
def test_gradients_reach_every_parameter(flags):
    model = make(**FLAGS[flags])

    @jax.jit
    @jax.grad
    def grads(params):
        return jnp.sum(jnp.sin(score(model, params, rows(), packed(6))))

    for path, grad in jax.tree_util.tree_leaves_with_path(grads(init(model))):
        assert np.all(np.isfinite(grad)), path
        assert np.any(grad != 0), path


def test_logits_are_fp32_under_bf16():
    fields = {"dtype": jnp.bfloat16, "param_dtype": jnp.float32}
    model = make(global_blocks=fields, local_blocks=fields, conv_kernels=[2])
    exact = make(conv_kernels=[2])
    params = init(model)
    logits = score(model, params, rows())
    assert logits.dtype == jnp.float32
    assert_equal_up_to_rounding(logits, score(exact, params, rows()), 2e-2)
    cached, _ = step(model, params, fed(rows()), start(model, dtype=jnp.bfloat16))
    assert_equal_up_to_rounding(cached, logits, 2e-2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"patch_size": 5}, "must be a multiple of patch_size=5; got 24"),
        ({"patch_size": 0}, "patch_size must be a positive integer; got 0"),
        ({"max_length": None}, "positions='absolute' needs max_length"),
        ({"positions": "rope"}, "positions='rope' has none; .* max_length=40"),
        ({"positions": "learned"}, "must be 'absolute' or 'rope'; got 'learned'"),
        ({"pads": "zero"}, "pads must be 'trainable' or 'id'; got 'zero'"),
        ({"order": "embed"}, "order must be 'embed_then_shift' or .*; got 'embed'"),
        ({"global_to_local": False}, "must equal the local width; got 6 and 8"),
        ({"cross_patch": 5}, "cross_patch must be between 0 and patch_size=4; got 5"),
        (
            {"cross_patch": 1, "local_blocks": {"mixers": "selective"}},
            "needs local_stage.mixers='dense'; got 'selective'",
        ),
        (
            {
                "cross_patch": 1,
                "local_blocks": {"mixer_options": {"dense": {"window": 2}}},
            },
            "unknown .'window'",
        ),
        ({"conv_kernels": [3, 0]}, "conv_kernels must be a positive integer; got 0"),
        ({"bos_id": -1}, "bos_id must be a token id"),
        ({"vocab_size": 0}, "vocab_size must be a positive integer; got 0"),
    ],
)
def test_wrong_fields_are_named(flags, message):
    with pytest.raises(ValueError, match=message):
        make(**flags)


def test_rows_longer_than_the_table_are_refused():
    with pytest.raises(ValueError, match="max_length=40; got 41 tokens"):
        make().init_cache(1, 41)
    tokens = jnp.zeros((1, 41), jnp.int32)
    with pytest.raises(ValueError, match="max_length=40; got 41 tokens"):
        jax.eval_shape(lambda: make().init(jax.random.key(0), tokens))


def test_a_cache_excludes_segments():
    model = make()
    with pytest.raises(ValueError, match="cannot be combined"):
        model.apply(
            init(model),
            rows(),
            segment_ids=packed(5),
            cache=start(model),
        )
