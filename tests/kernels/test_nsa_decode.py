"""The decoding kernels in Triton's interpreter, against the jnp form, in fp32."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.nn import NativeSparseAttention, cache
from jattn.ops.compressed import num_windows
from jattn.ops.nsa_decode import cached_attention
from jattn.pallas import _triton, nsa_decode, tuning
from jattn.pallas.nsa_decode import triton as kernel
from tests.support import assert_equal_up_to_rounding, normal, shard_over_batch

ARRAYS = (
    *("query", "compressed", "selected", "window", "gates"),
    *("positions", "window_end"),
)

# Sizes by name; `lengths` are those of the rows, the new tokens counted.
CASES = {
    "rows of any length": dict(lengths=(1, 31, 32, 33, 200)),
    "no window is complete": dict(lengths=(5, 31)),
    "a length of 0": dict(lengths=(0, 70)),
    "no group": dict(lengths=(130,), k=2, g=1),
    "group of 3": dict(lengths=(90, 40), g=3, h=24, v=40),
    "group of 16": dict(lengths=(130,), g=16),
    "several queries": dict(lengths=(150, 41, 4), t=4, window_size=20),
    "disjoint windows": dict(
        lengths=(97, 64), kernel_size=8, stride=8, block_size=24, num_blocks=4
    ),
    "windows of blocks": dict(
        lengths=(99,), kernel_size=32, stride=4, block_size=32, num_initial=0
    ),
    "blocks longer than a tile": dict(
        lengths=(300, 129), kernel_size=8, stride=4, block_size=128, num_blocks=2,
        num_initial=0,
    ),
    "fewer blocks than a query may read": dict(lengths=(70, 40), num_blocks=9),
    "a cache shorter than the window": dict(lengths=(40, 7), capacity=41),
    "past the end of the cache": dict(lengths=(400, 71, 40, 90), capacity=70, h=24),
    "several queries past the end": dict(
        lengths=(69, 72, 300), capacity=70, t=4, num_blocks=3, num_local=1
    ),
}  # fmt: skip

SIZES = {
    "kernel_size": 32,
    "stride": 16,
    "block_size": 32,
    "num_blocks": 4,
    "num_initial": 1,
    "num_local": 2,
    "window_size": 48,
}


def make(lengths, t=1, k=1, g=2, h=16, v=16, capacity=None, dtype=jnp.float32, **sizes):
    """Arguments of cached_attention by name, as the module makes them."""
    sizes = SIZES | sizes
    b, capacity = len(lengths), capacity or max(lengths) + 9
    ring = t == 1
    slots = min(capacity, sizes["window_size"]) + (0 if ring else t)
    windows = num_windows(capacity, sizes["kernel_size"], sizes["stride"])
    query, gates, *arrays = normal(
        0,
        (b, t, k * g, h),
        (b, t, k * g, 3),
        *((b, s, k, width) for s in (windows, capacity, slots) for width in (h, v)),
        dtype=dtype,
    )
    lengths = jnp.asarray(lengths, jnp.int32)
    # Rows shorter than the new tokens end in padding.
    before = jnp.maximum(lengths - t, 0)
    return sizes | {
        "query": query,
        "compressed": tuple(arrays[:2]),
        "selected": tuple(arrays[2:4]),
        "window": tuple(arrays[4:]),
        "gates": jax.nn.sigmoid(gates),
        "positions": cache.new_positions(before, lengths - before, t),
        "window_end": lengths if ring else before + t,
        "ring": ring,
        "scale": h**-0.5,
    }


def compiled(arguments, implementation):
    """cached_attention as a compiled function of its arrays, by name."""
    options = {x: arguments[x] for x in arguments if x not in ARRAYS}

    @jax.jit
    def call(arrays):
        return cached_attention(**arrays, **options, implementation=implementation)

    return call


def arrays_of(arguments):
    return {x: arguments[x] for x in ARRAYS}


def run(arguments, implementation="xla"):
    return compiled(arguments, implementation)(arrays_of(arguments))


def unread(arguments):
    """The same with NaN wherever no query may look."""
    positions = jnp.max(arguments["positions"], axis=1, keepdims=True)  # [B, 1]
    windows = num_windows(positions + 1, arguments["kernel_size"], arguments["stride"])
    end = arguments["window_end"][:, None]

    def poison(pair, seen):
        return jax.tree.map(
            lambda x: jnp.where(
                seen(jnp.arange(x.shape[1]))[..., None, None], x, jnp.nan
            ),
            pair,
        )

    def in_window(slot):
        if arguments["ring"]:
            return slot < end
        position = end - arguments["window"][0].shape[1] + slot
        return (position >= 0) & (position <= positions)

    return arguments | {
        "compressed": poison(arguments["compressed"], lambda i: i < windows),
        "selected": poison(arguments["selected"], lambda i: i <= positions),
        "window": poison(arguments["window"], in_window),
    }


@pytest.fixture
def on_gpu(monkeypatch):
    """Lets an operation choose kernels, which then run in the interpreter."""
    monkeypatch.setattr(_triton, "unavailable", lambda *_: None)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("on_gpu")
def test_equals_the_jnp_form(name):
    arguments = make(**CASES[name])
    expected, expected_blocks = run(arguments)
    actual, blocks = run(unread(arguments), "triton")
    real = np.asarray(arguments["positions"] >= 0)
    assert_equal_up_to_rounding(actual[real], expected[real])
    np.testing.assert_array_equal(blocks[real], expected_blocks[real])
    assert not np.any(actual[~real])
    assert np.all(blocks[~real] == -1)


@pytest.mark.usefixtures("on_gpu")
def test_tilings_do_not_change_the_result():
    arguments = make((180, 33))
    expected, expected_blocks = run(arguments)
    for keys, programs in ((16, 1), (16, 5), (16, 1000), (64, 5)):
        tiling = kernel.Tiling(keys=keys, programs=programs, warps=4, stages=2)
        with (
            tuning.force("nsa_decode_compressed", tiling) as compressed,
            tuning.force("nsa_decode_local", tiling) as local,
        ):
            actual, blocks = run(arguments, "triton")
        assert len(compressed) == len(local) == 1
        assert_equal_up_to_rounding(actual, expected)
        np.testing.assert_array_equal(blocks, expected_blocks)


@pytest.mark.usefixtures("on_gpu")
def test_of_equal_scores_the_first_blocks_are_chosen():
    arguments = make((330,), h=16)
    key, value = arguments["compressed"]
    # Far below the others: their weights are 0 exactly.
    low = jnp.arange(key.shape[1])[:, None, None] < 16
    query = jnp.abs(arguments["query"])
    key = jnp.where(low, jnp.abs(key), -1000.0)
    arguments |= {"query": query, "compressed": (key, value), "num_blocks": 10}
    _, expected = run(arguments)
    _, blocks = run(arguments, "triton")
    np.testing.assert_array_equal(blocks, expected)
    # Two in each four of the last forced, 16 windows in the first nine, then a tie.
    np.testing.assert_array_equal(blocks[0, 0, 0], [0, 1, 2, 3, 4, 5, 6, 7, 9, 10])


@pytest.mark.usefixtures("on_gpu")
def test_gradients_are_those_of_the_jnp_form():
    arguments = make((70, 40))
    (cotangent,) = normal(1, arguments["query"].shape)

    def gradients(implementation):
        def loss(arrays):
            out, _ = run(arguments | arrays, implementation)
            return jnp.sum(cotangent * out)

        names = ("query", "compressed", "selected", "window", "gates")
        return jax.grad(loss)({x: arguments[x] for x in names})

    jax.tree.map(assert_equal_up_to_rounding, gradients("triton"), gradients("xla"))


@pytest.mark.usefixtures("on_gpu")
def test_gradients_do_not_need_the_kernels_of_the_branches():
    sizes = {"kernel_size": 8, "stride": 8, "block_size": 24, "v": 18}
    arguments = make((70, 45), t=4, **sizes)

    def loss(query):
        return jnp.sum(run(arguments | {"query": query}, "triton")[0])

    jax.eval_shape(jax.grad(loss), arguments["query"])


@pytest.mark.usefixtures("on_gpu")
def test_transformations_agree():
    arguments = make((90, 40))
    arrays = arrays_of(arguments)

    def attend(arrays):
        return run(arguments | arrays, "triton")

    plain = attend(arrays)
    one = jax.vmap(lambda x: attend(jax.tree.map(lambda y: y[None], x)))(arrays)
    jax.tree.map(np.testing.assert_array_equal, [x[:, 0] for x in one], list(plain))
    sharded = shard_over_batch(attend)(arrays)
    jax.tree.map(np.testing.assert_array_equal, sharded, plain)


@pytest.mark.parametrize("implementation", ["triton", "pallas"])
@pytest.mark.usefixtures("on_gpu")
def test_what_is_asked_for_is_used_or_refused(implementation):
    """A long chunk whose blocks no kernel supports, though the other branches do."""
    sizes = {"kernel_size": 8, "stride": 8, "block_size": 24}
    arguments = make((70, 45), t=12, k=2, g=1, **sizes)
    with pytest.raises(NotImplementedError, match=f"implementation='{implementation}'"):
        jax.eval_shape(functools.partial(run, arguments, implementation))


@pytest.mark.parametrize(
    ("capacity", "changes", "message"),
    [
        (11, {}, "T=12 queries .* S=11 slots"),
        (79, {"stride": 8}, "M=6 windows of S=79 slots; got 3"),
        (79, {"num_blocks": 2}, "num_blocks counts"),
    ],
)
def test_arrays_must_fit_each_other(capacity, changes, message):
    arguments = make((70, 45), t=12, capacity=capacity) | changes
    with pytest.raises(ValueError, match=message):
        run(arguments)


@pytest.mark.parametrize(
    "sizes",
    [
        {"lengths": (70, 45, 12), "k": 2},
        # Too short a cache for a compressed token.
        {"lengths": (20, 12), "capacity": 27},
    ],
)
@pytest.mark.usefixtures("on_gpu")
def test_a_long_chunk_goes_through_the_kernels_of_the_branches(sizes):
    arguments = make(t=12, g=1, **sizes)
    expected, expected_blocks = run(arguments)
    actual, blocks = run(arguments, "triton")
    assert_equal_up_to_rounding(actual, expected)
    np.testing.assert_array_equal(blocks, expected_blocks)


def module(**fields):
    return NativeSparseAttention(
        num_heads=2,
        num_kv_heads=2,
        head_dim=16,
        block_size=32,
        num_blocks=3,
        window_size=48,
        compression="mean",
        **fields,
    )


def test_a_module_decodes_by_it(monkeypatch):
    """Prefill in the jnp form, then steps of one token and of several by kernels."""
    (x,) = normal(0, (2, 102, 8))
    mixer = module()
    params = jax.jit(mixer.init)(jax.random.key(0), x[:, :1])
    expected = jax.jit(mixer.apply)(params, x)
    state = mixer.init_cache(2, 102)
    _, state = jax.jit(mixer.apply)(params, x[:, :95], cache=state)
    monkeypatch.setattr(_triton, "unavailable", lambda *_: None)
    step = jax.jit(lambda params, x, cache: mixer.apply(params, x, cache=cache))
    for first, last in ((95, 96), (96, 97), (97, 101), (101, 102)):
        new = x[:, first:last]
        assert "pure_callback" in str(step.trace(params, new, state).jaxpr)
        out, state = step(params, new, state)
        assert_equal_up_to_rounding(out, expected[:, first:last])


def shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype)


def test_compiles_for_hopper(compile_triton):
    b, s, k = 2, 1000, 2
    arrays = (
        shape(b, 1, 32, 128),
        *((shape(b, m, k, 128), shape(b, m, k, 128)) for m in (61, s, 512)),
        shape(b, 1, 32, 3),
        shape(b, 1, dtype=jnp.int32),
        shape(b, dtype=jnp.int32),
    )
    options = SIZES | {"ring": True, "scale": 0.1}
    kernels = compile_triton(functools.partial(kernel.attend, **options), *arrays)
    for name in ("compressed_kernel", "local_kernel"):
        ptx, shared_bytes = kernels[name]
        assert "mma.sync" in ptx
        # Two programs on a multiprocessor.
        assert shared_bytes <= 113 * 1024
    assert {"select_kernel", "merge_kernel"} <= set(kernels)


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.usefixtures("on_gpu")
def test_a_step_copies_no_cache(tokens):
    """With its cache donated, a step writes it in place and reads it where it is."""
    mixer = module()
    x = shape(2, tokens, 8, dtype=jnp.float32)
    params = jax.eval_shape(mixer.init, jax.random.key(0), x)
    state = jax.eval_shape(lambda: mixer.init_cache(2, 4096))

    def step(params, x, state):
        return mixer.apply(params, x, cache=state)

    compiled = jax.jit(step, donate_argnums=2).lower(params, x, state).compile()
    cached = {tuple(x.shape) for x in jax.tree.leaves(state) if x.ndim > 1}
    copies = re.findall(r"f32\[([\d,]*)\]\S* copy\(", compiled.as_text())
    assert not cached & {tuple(map(int, x.split(","))) for x in copies if x}
    analysis = compiled.memory_analysis()
    assert analysis.alias_size_in_bytes == cache.cache_bytes(state)
    assert analysis.temp_size_in_bytes < cache.cache_bytes(state.selected) / 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"t": 8}, None),
        ({"t": 9}, "at most 8 queries a row are decoded at once, not 9"),
        ({"h": 300}, "at most 256 wide, not 300"),
        ({"g": 65}, "at most 64 query heads may share a kv head, not 65"),
        ({"dtype": jnp.float8_e4m3fn}, "must be bf16, fp16 or fp32, not float8_e4m3fn"),
        ({"capacity": 31}, "an array is empty"),
        ({"block_size": 4096}, "at most 128 strides long, not 256"),
    ],
)
@pytest.mark.usefixtures("on_gpu")
def test_says_what_it_does_not_support(changes, reason):
    arguments = jax.eval_shape(lambda: make((40,), **changes))
    block_size = changes.get("block_size", 64)
    actual = nsa_decode.unsupported(
        *(arguments[x] for x in ("query", "compressed", "selected", "window")),
        block_size=block_size,
        stride=16,
        num_blocks=4,
    )
    assert actual == reason if reason is None else reason in actual
