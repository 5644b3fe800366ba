"""The Selective Attention kernels in Triton's interpreter, against the jnp form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.ops import selective
from jattn.ops._common import document_starts
from jattn.ops.selective import (
    selection_mask,
    selective_attention,
    selective_eviction,
    selective_skipped,
)
from jattn.pallas import _triton
from jattn.pallas.selective import (
    MAX_BUDGET_KEYS,
    by_keys,
    eviction,
    unsupported,
    work,
)
from jattn.pallas.selective import triton as kernel
from tests.support import (
    assert_equal_up_to_rounding,
    documents,
    normal,
    shard_over_batch,
)

CASES = {
    "one query": dict(t=1),
    "no multiple of anything": dict(b=2, t=63, n=3, k=1, h=24, v=8),
    "a kv head for each": dict(t=50, n=2, k=2),
    "an odd number of heads": dict(t=40, n=3, k=3),
    "queries end the keys": dict(b=2, t=20, s=63),
    "packed": dict(b=2, t=40, packed=True),
    "packed, queries end the keys": dict(t=40, s=60, packed=True),
    "in chunks": dict(t=70, n=4, k=2, chunk_bytes=1),
    "in chunks, packed": dict(t=50, s=70, packed=True, chunk_bytes=1),
}


@pytest.fixture
def small_tiles(monkeypatch):
    """Blocks of 32 tokens, because the interpreter is slow."""
    tiles = {
        "mask": work.Tiling(32, 32, 1, 1),
        "forward": work.Tiling(32, 32, 1, 1, heads=2),
        "query_gradient": work.Tiling(32, 16, 1, 1, heads=2),
        "key_gradient": work.Tiling(16, 32, 1, 1, heads=2),
        "mask_gradient": work.Tiling(32, 32, 1, 1),
    }
    monkeypatch.setattr(work, "BLOCK", 32)
    monkeypatch.setattr(work, "tilings", lambda *_: tiles)


def inputs(b=1, t=33, s=None, n=2, k=1, h=16, v=16, packed=False):
    """Query, key, value and first row of F; the documents."""
    s = s or t
    arrays = normal(0, (b, t, n, h), (b, s, k, h), (b, s, k, v), (b, s))
    first_row = jnp.where(jnp.arange(s) < s - t, jnp.abs(arrays.pop()), 0)
    segment_ids = documents(s // 3, s - s // 3, batch=b) if packed else None
    return (*arrays, first_row), segment_ids


def value_and_gradients(attend, *arrays):
    """What attend returns, and the gradients of a function of all of it."""

    def loss(*arrays):
        outputs = [x for x in attend(*arrays) if x is not None]
        return sum(jnp.sum(jnp.sin(3 * x)) for x in outputs), outputs

    gradients, outputs = jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(*arrays)
    return *outputs, *gradients


def kernel_form(
    segment_ids=None, skip_error=0.0, scale=0.25, memory_tau=None, budget=None
):
    starts = None if segment_ids is None else document_starts(segment_ids)
    budget = None if budget is None else jnp.int32(budget)

    def attend(*arrays):
        options = dict(scale=scale, skip_error=skip_error, memory_tau=memory_tau)
        return kernel.attend(*arrays, starts, budget, **options)

    return jax.jit(functools.partial(value_and_gradients, attend))


def xla_form(segment_ids=None, scale=0.25, memory_tau=None, budget=None):
    def attend(*arrays):
        return selective_attention(
            *arrays[:3],
            initial_mask=arrays[3],
            segment_ids=segment_ids,
            scale=scale,
            memory_tau=memory_tau,
            budget=budget,
            implementation="xla",
            return_lse=True,
        )

    return jax.jit(functools.partial(value_and_gradients, attend))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("case", CASES)
def test_equals_the_jnp_form(monkeypatch, case):
    sizes = dict(CASES[case])
    chunk_bytes = sizes.pop("chunk_bytes", work.CHUNK_BYTES)
    monkeypatch.setattr(work, "CHUNK_BYTES", chunk_bytes)
    arrays, segment_ids = inputs(**sizes)
    actual = kernel_form(segment_ids)(*arrays)
    expected = xla_form(segment_ids)(*arrays)
    jax.tree.map(assert_equal_up_to_rounding, actual, expected)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("case", ["no multiple of anything", "packed", "in chunks"])
def test_memory_term_equals_the_jnp_forms(monkeypatch, case):
    sizes = dict(CASES[case])
    monkeypatch.setattr(work, "CHUNK_BYTES", sizes.pop("chunk_bytes", 2**20))
    arrays, segment_ids = inputs(**sizes)
    actual = kernel_form(segment_ids, memory_tau=0.7)(*arrays)
    expected = xla_form(segment_ids, memory_tau=0.7)(*arrays)
    assert len(actual) == 7
    jax.tree.map(assert_equal_up_to_rounding, actual, expected)


BUDGETS = {
    "a budget": dict(b=2, t=63, n=3, k=1, h=24, v=8),
    "two keys": dict(t=50, budget=2),
    "more than there are": dict(t=40, budget=40),
    "packed": dict(b=2, t=70, packed=True, budget=10),
    "in chunks": dict(t=70, n=4, k=2, chunk_bytes=1),
    "in chunks, packed": dict(t=70, packed=True, budget=15, chunk_bytes=1),
    "with a memory term": dict(t=50, memory_tau=0.7),
}


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("case", BUDGETS)
def test_budgets_equal_the_jnp_forms(monkeypatch, case):
    sizes = {"budget": 7} | BUDGETS[case]
    monkeypatch.setattr(work, "CHUNK_BYTES", sizes.pop("chunk_bytes", 2**20))
    options = {name: sizes.pop(name, None) for name in ("budget", "memory_tau")}
    arrays, segment_ids = inputs(**sizes)
    actual = kernel_form(segment_ids, **options)(*arrays)
    expected = xla_form(segment_ids, **options)(*arrays)
    jax.tree.map(assert_equal_up_to_rounding, actual, expected)
    if options["budget"] < 40:
        plain = kernel_form(segment_ids, memory_tau=options["memory_tau"])(*arrays)
        assert np.any(plain[0] != actual[0])


@pytest.mark.usefixtures("small_tiles")
def test_array_budgets_below_2_are_the_jnp_forms(monkeypatch):
    monkeypatch.setattr(_triton, "unavailable", lambda *_: None)
    (*arrays, _), segment_ids = inputs(t=40, packed=True)

    @functools.partial(jax.jit, static_argnames="implementation")
    def attend(budget, implementation):
        return selective_attention(
            *arrays,
            budget=budget,
            segment_ids=segment_ids,
            implementation=implementation,
        )

    expected = attend(jnp.int32(2), "xla")
    for budget in (1, 0, -1):
        actual = attend(jnp.int32(budget), "triton")
        assert_equal_up_to_rounding(actual, expected)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("packed", [False, True])
def test_evicts_what_the_jnp_form_does_with_ties(monkeypatch, packed):
    monkeypatch.setattr(work, "CHUNK_BYTES", 1)
    monkeypatch.setattr(eviction, "KEYS_PER_WARP", 16)
    monkeypatch.setattr(eviction, "MAX_WARPS", 2)
    # Integers: many keys have the same F.
    (query, key, value, first_row), segment_ids = inputs(b=2, t=90, packed=packed)
    query, key = jnp.round(query), jnp.round(key)
    starts = document_starts(segment_ids) if packed else None
    shared = work.Work(query, key, value, starts, 1.0, 0.0, None)
    carries, _ = shared.carries(first_row)
    actual = eviction.expiry(shared, carries, jnp.int32(9))[:, :90]
    mask = selection_mask(query, key, segment_ids=segment_ids, scale=1.0)
    ended = 90 if not packed else np.where(np.arange(90) < 30, 30, 90)
    expected = selective_eviction(mask, budget=9, segment_ids=segment_ids)
    np.testing.assert_array_equal(np.minimum(actual, ended), expected)
    assert len(np.unique(actual)) > 30


@pytest.mark.usefixtures("small_tiles")
def test_memory_term_where_the_mask_is_tau():
    # Integers: F is exactly 1 for many keys, and exactly tau for some.
    query, key, value = (jnp.round(x) for x in inputs(t=40)[0][:3])
    arrays = query, key, value, jnp.zeros((1, 40))
    mask = selection_mask(query, key, scale=0.25)
    assert 10 < jnp.sum(jnp.tril(mask[0] == 1.0)) < 300
    actual = kernel_form(memory_tau=1.0)(*arrays)
    expected = xla_form(memory_tau=1.0)(*arrays)
    jax.tree.map(assert_equal_up_to_rounding, actual, expected)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("heads", [4, 8])
def test_gradients_of_logits_are_kept_for_many_heads(monkeypatch, heads):
    tiles = dict(work.tilings(None, None))
    tiles["key_gradient"] = work.Tiling(16, 16, 1, 1, heads=4)
    monkeypatch.setattr(work, "tilings", lambda *_: tiles)
    arrays, segment_ids = inputs(t=40, s=50, n=heads, k=1, packed=True)
    expected = xla_form(segment_ids, memory_tau=0.7)(*arrays)
    names = []
    call = _triton.call

    def spy(launched, *operands, **options):
        names.append((launched.fn.__name__, options.get("PARTS")))
        return call(launched, *operands, **options)

    monkeypatch.setattr(_triton, "call", spy)
    actual = kernel_form(segment_ids, memory_tau=0.7)(*arrays)
    assert ("mask_gradient_kernel", heads // 4) in names
    jax.tree.map(assert_equal_up_to_rounding, actual, expected)


def test_the_tilings_for_a_gpu_agree():
    arrays, _ = inputs(t=130)
    actual = kernel_form()(*arrays)
    jax.tree.map(assert_equal_up_to_rounding, actual, xla_form()(*arrays))


@pytest.mark.usefixtures("small_tiles")
def test_key_tiles_are_divided_among_programs(monkeypatch):
    arrays, _ = inputs(t=64)
    plain = kernel_form()(*arrays)
    monkeypatch.setattr(by_keys, "PROGRAMS", 1)
    whole = kernel_form()(*arrays)
    jax.tree.map(assert_equal_up_to_rounding, whole, plain)
    assert any(np.any(x != y) for x, y in zip(whole, plain, strict=True))


def selecting(t):
    """Every query of the selecting head selects all keys by about 1."""
    (query, key, value, first_row), _ = inputs(t=t)
    query = 0.1 * query.at[:, :, 0].add(10)
    return query, 0.1 * key + 1, value, first_row


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("packed", [False, True])
def test_skipping_stays_within_its_error(monkeypatch, packed):
    t, error = 96, 1e-2
    monkeypatch.setattr(work, "BLOCK", 16)
    tiles = dict.fromkeys(work.tilings(None, None), work.Tiling(16, 16, 1, 1))
    monkeypatch.setattr(work, "tilings", lambda *_: tiles)
    segment_ids = documents(80, 16) if packed else None
    arrays = query, key, value, _ = selecting(t)
    skipped, causal = kernel.skipped_tiles(query, key, segment_ids, 0.25, error, 16)
    assert 0.1 < skipped / causal < 0.9
    plain = kernel_form(segment_ids)(*arrays)
    skipping = kernel_form(segment_ids, error)(*arrays)
    assert np.max(np.abs(skipping[0] - plain[0])) < 2 * error * np.max(np.abs(value))
    assert np.all(skipping[1] <= plain[1] + 1e-5)
    assert np.all(skipping[1] >= plain[1] + np.log1p(-error))
    for x, y in zip(skipping, plain, strict=True):
        assert_equal_up_to_rounding(x, y, 5 * error)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("packed", [False, True])
def test_the_part_of_tiles_skipped(monkeypatch, packed):
    t, keys, error = 110, 16, 1e-2  # blocks of 32 queries
    monkeypatch.setattr(_triton, "unavailable", lambda *_: None)
    monkeypatch.setattr(selective, "SKIPPED_KEYS", keys)
    query, key, *_ = selecting(t)
    segment_ids = documents(80, 30) if packed else None
    arguments = dict(skip_error=error, scale=0.25, segment_ids=segment_ids)
    found = selective_skipped(query, key, **arguments)

    [mask] = np.asarray(
        selection_mask(
            query, key, scale=0.25, segment_ids=segment_ids, implementation="xla"
        )
    )
    longest = [np.max(np.linalg.norm(np.asarray(x), axis=-1)) for x in (query, key)]
    least = 2 * 0.25 * np.prod(longest) + np.log(t / error)
    skipped = visible = 0
    for i in range(0, t, 32):
        for j in range(0, min(i + 32, t), keys):
            ended = packed and i >= 80 and j + keys <= 80
            visible += not ended
            skipped += (
                not ended and j + keys <= i and np.all(mask[i, j:][:keys] > least)
            )
    assert 0.1 < skipped / visible < 0.9
    assert found == pytest.approx(skipped / visible)
    assert selective_skipped(query, key, **arguments | {"skip_error": 0.0}) == 0
    assert selective_skipped(query, key, **arguments, implementation="xla") == 0
    with pytest.raises(ValueError, match="got T=109, S=110"):
        selective_skipped(query[:, 1:], key, skip_error=error)
    with pytest.raises(ValueError, match="skip_error must be at least 0 and below 1"):
        selective_skipped(query, key, skip_error=1.0)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("tau", [1.0, 30.0])
def test_memory_term_is_exact_with_skipping(tau):
    arrays = query, key, _, _ = selecting(128)
    skipped, _ = kernel.skipped_tiles(query, key, None, 0.25, 1e-3, 32)
    assert skipped > 0
    run = functools.partial(kernel_form, memory_tau=tau)
    plain, skipping = run()(*arrays), run(skip_error=1e-3)(*arrays)
    assert np.max(plain[2]) < 100
    assert_equal_up_to_rounding(skipping[2], plain[2])


@pytest.mark.usefixtures("small_tiles")
def test_skipped_values_are_not_read():
    query, key, value, first_row = selecting(128)
    plain = kernel_form(None, 1e-3)(query, key, value, first_row)
    poisoned = value.at[:, 32:64].set(jnp.nan)
    changed = kernel_form(None, 1e-3)(query, key, poisoned, first_row)
    np.testing.assert_array_equal(changed[0][:, 96:], plain[0][:, 96:])
    assert np.all(np.isnan(changed[0][:, 32:64]))


@pytest.mark.usefixtures("small_tiles")
def test_nothing_is_skipped_that_matters():
    # F is 0 all along: nothing may be skipped, whatever the error.
    (query, key, value, first_row), _ = inputs(t=64)
    query = query.at[:, :, 0].set(-jnp.abs(query[:, :, 0]))
    key = jnp.abs(key)
    skipped, causal = kernel.skipped_tiles(query, key, None, 0.25, 0.5, 32)
    assert skipped == 0 < causal
    plain = kernel_form()(query, key, value, first_row)
    skipping = kernel_form(None, 0.5)(query, key, value, first_row)
    jax.tree.map(np.testing.assert_array_equal, skipping, plain)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered")  # the interpreter's
@pytest.mark.parametrize("other", [slice(64), slice(64, None)])
def test_other_documents_may_hold_anything(other):
    arrays, _ = inputs(t=128)
    starts = document_starts(documents(64, 64))
    plain = kernel.attend(*arrays, starts, None, scale=0.25, memory_tau=1.0)
    poisoned = [x.at[:, other].set(jnp.nan) for x in arrays[:3]]
    changed = kernel.attend(
        *poisoned, arrays[3], starts, None, scale=0.25, memory_tau=1.0
    )
    for x, y in zip(changed, plain, strict=True):
        x, y = (np.delete(z, other, axis=1) for z in (x, y))
        np.testing.assert_array_equal(x, y)


@pytest.mark.usefixtures("small_tiles")
def test_the_kernels_mask_is_exact_where_nothing_is_forgotten():
    # A value of its own for each key shows its weight; logits of all others are equal.
    t = 40
    (query, key, _, first_row), _ = inputs(t=t, n=2, k=1)
    query = query.at[:, :, 1].set(0)
    value = jnp.eye(t)[None, :, None]
    out, *_ = kernel.attend(query, key, value, first_row, None, None, scale=1.0)
    weights = np.asarray(out)[0, :, 1]
    mask = np.asarray(selection_mask(query, key, scale=1.0))[0]
    visible = np.tril(np.ones((t, t)))
    expected = visible * np.exp(-mask)
    expected /= expected.sum(axis=1, keepdims=True)
    assert_equal_up_to_rounding(weights, expected)
    i = np.arange(1, t)
    np.testing.assert_array_equal(weights[i, i], weights[i, 0])
    np.testing.assert_array_equal(weights[i, i], weights[i, i - 1])


@pytest.mark.usefixtures("small_tiles")
def test_transformations_agree():
    (*arrays, first_row), _ = inputs(b=2, t=18)

    def gradients(*arrays):
        return kernel_form()(*arrays, first_row[: arrays[0].shape[0]])

    plain = gradients(*arrays)
    mapped = jax.vmap(lambda *x: [y[0] for y in gradients(*(a[None] for a in x))])
    sharded = shard_over_batch(kernel_form())
    for actual in (mapped(*arrays), sharded(*arrays, first_row)):
        for x, y in zip(actual, plain, strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.usefixtures("small_tiles")
def test_budgets_map_and_shard():
    arrays, _ = inputs(b=2, t=18)

    @jax.jit
    def gradients(budget, *arrays):
        return kernel_form(budget=budget)(*arrays)

    budgets = [18, 5, 2]
    expected = [gradients(jnp.int32(budget), *arrays) for budget in budgets]
    # What the interpreter runs must not be traced meanwhile.
    jax.block_until_ready(expected)
    assert np.any(expected[0][0] != expected[1][0])
    mapped = jax.vmap(gradients, in_axes=(0, *[None] * 4))(jnp.array(budgets), *arrays)
    for i, plain in enumerate(expected):
        for x, y in zip(mapped, plain, strict=True):
            assert_equal_up_to_rounding(x[i], y)
    sharded = shard_over_batch(lambda *arrays: gradients(jnp.int32(5), *arrays))
    jax.tree.map(assert_equal_up_to_rounding, sharded(*arrays), expected[1])


@pytest.mark.usefixtures("small_tiles")
def test_the_operation_runs_it_on_request(monkeypatch):
    (*arrays, _), segment_ids = inputs(t=18, packed=True)
    attend = functools.partial(selective_attention, *arrays, segment_ids=segment_ids)
    with pytest.raises(NotImplementedError, match="it needs a GPU"):
        attend(implementation="triton")
    monkeypatch.setattr(_triton, "unavailable", lambda *_: None)
    starts = document_starts(segment_ids)
    first_row = jnp.zeros(segment_ids.shape)
    expected = kernel.attend(
        *arrays, first_row, starts, None, scale=0.25, memory_tau=0.7
    )
    actual = attend(implementation="triton", return_lse=True, memory_tau=0.7)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 4, 64), (8, 2, 128)])
def test_compiles_to_matrix_instructions_for_hopper(
    compile_triton, heads, kv_heads, width
):
    def shape(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype)

    kernels = compile_triton(
        kernel_form(),
        shape(1, 1000, heads, width),
        shape(1, 1000, kv_heads, width),
        shape(1, 1000, kv_heads, width),
        shape(1, 1000, dtype=jnp.float32),
    )
    names = ["forward", "query_gradient", "key_gradient"]
    # That of four heads is kept by the gradient of keys, and only added up.
    names += ["mask_gradient"] if heads == kv_heads else []
    for name in names:
        ptx, shared_bytes = kernels[f"{name}_kernel"]
        assert "wgmma.mma_async" in ptx
        assert shared_bytes <= 227 * 1024


@pytest.mark.parametrize("length", [2**15, MAX_BUDGET_KEYS])
def test_evictions_compile_for_hopper(compile_triton, length):
    def evict(query, key, carries):
        shared = work.Work(query, key, key, None, 1.0, 0.0, None)
        return eviction.expiry(shared, carries, jnp.int32(512))

    keys = jax.ShapeDtypeStruct((1, length, 2, 64), jnp.bfloat16)
    carries = jax.ShapeDtypeStruct((1, length // 128, length), jnp.float32)
    assert "eviction_kernel" in compile_triton(evict, keys, keys, carries)


def test_wide_keys_in_fp32_fit_into_shared_memory(compile_triton):
    def shape(*sizes):
        return jax.ShapeDtypeStruct(sizes, jnp.float32)

    arrays = shape(1, 150, 3, 192), shape(1, 150, 3, 192), shape(1, 150, 3, 128)
    kernels = compile_triton(kernel_form(), *arrays, shape(1, 150))
    assert len(kernels) == 7
    assert max(shared_bytes for _, shared_bytes in kernels.values()) <= 227 * 1024


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"query": (2, 9, 4, 300), "key": (2, 9, 2, 300)}, "at most 256 wide, not 300"),
        ({"dtype": jnp.float64}, "must all be bf16, fp16 or fp32, not float64"),
        ({"key": (2, 0, 2, 8)}, "an array is empty"),
        ({"scale": -1.0}, "scale must be positive, not -1.0"),
        ({"budget": 8}, None),
        (
            {"budget": 8, "key": (2, 2**17 + 1, 2, 8)},
            "with a budget it takes 131072 keys, not 131073",
        ),
    ],
)
def test_says_what_it_does_not_support(monkeypatch, changes, reason):
    monkeypatch.setattr(_triton, "unavailable", lambda *_: None)
    shapes = {"query": (2, 9, 4, 8), "key": (2, 9, 2, 8), "value": (2, 9, 2, 8)}
    dtype = changes.get("dtype", jnp.bfloat16)
    arrays = [
        jax.ShapeDtypeStruct(changes.get(name, shape), dtype)
        for name, shape in shapes.items()
    ]
    options = {"scale": 1.0, "budget": None}
    options |= {name: changes[name] for name in options if name in changes}
    actual = unsupported(*arrays, **options)
    assert actual == reason or reason in actual
