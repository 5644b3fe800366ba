"""The selection kernels in Triton's interpreter, against the jnp forms, in fp32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.ops import nsa_selection
from jattn.ops._common import document_starts
from jattn.ops.compressed import compressed_attention, nsa_windows
from jattn.ops.moba import mixture_of_block_attention, moba_select_blocks
from jattn.pallas import _triton, selection
from jattn.pallas.selection import triton as kernel
from tests.support import documents, normal, shard_over_batch, temporary_bytes

SIZES = dict(
    kernel_size=32, stride=16, block_size=64, num_blocks=4, num_initial=1, num_local=2
)

FINE = dict(kernel_size=8, stride=4, block_size=16)

NSA_CASES = {
    "the paper's sizes": dict(t=600, g=3),
    "log-sum-exp computed": dict(t=333, g=3, lse=False),
    "log-sum-exp computed, packed": dict(b=2, t=70, s=333, lse=False, packed=True),
    "one query": dict(t=1, s=200, b=2),
    "one head a list": dict(t=111, g=1),
    "many heads, an odd width": dict(t=200, k=1, g=16, h=24),
    "no overlap": dict(t=257, kernel_size=16, stride=16, block_size=16, num_blocks=7),
    "finer windows": dict(t=257, kernel_size=16, stride=8, block_size=32),
    "windows as long as blocks": dict(t=300, kernel_size=64, stride=16),
    "one window a block": dict(t=300, kernel_size=32, stride=32, block_size=32),
    "three strides a block": dict(t=300, kernel_size=16, stride=8, block_size=24),
    "others forced": dict(t=500, num_blocks=6, num_initial=2, num_local=3),
    "only forced ones": dict(t=300, num_blocks=3),
    "none forced but the own": dict(t=300, num_initial=0, num_local=1),
    "fewer blocks than wanted": dict(t=150, num_blocks=12),
    "packed, queries end the keys": dict(b=2, t=250, s=500, packed=True),
    "in chunks": dict(t=300, chunk=128),
    "in chunks of less than a tile": dict(b=2, t=111, chunk=20, packed=True),
    "long rows": dict(t=150, s=2000, k=1, kernel_size=16, stride=16, block_size=16),
}

MOBA_CASES = {
    "a list for each head": dict(t=300),
    "one query": dict(t=1, s=100),
    "only the own": dict(t=50, top_k=1),
    "every block": dict(t=100, top_k=7),
    "packed, queries end the keys": dict(b=2, t=150, s=300, packed=True),
    "in chunks": dict(t=200, chunk=30, packed=True),
    "several tiles of blocks": dict(t=15, s=1200, block_size=4, top_k=5),
    "wide mean keys": dict(t=100, h=24, round_pooled_keys=False),
}


def nsa_inputs(b=1, t=300, s=None, k=2, g=2, h=16, packed=False, **sizes):
    """Query, compressed keys, and options of nsa_select_blocks."""
    s = s or t
    sizes = SIZES | sizes
    query, key = normal(0, (b, t, k * g, h), (b, s, k, h))
    windows = nsa_windows(key, kernel_size=sizes["kernel_size"], stride=sizes["stride"])
    segment_ids = documents(s // 3, s - s // 3, batch=b) if packed else None
    options = {**sizes, "length": s, "segment_ids": segment_ids}
    return query, windows.mean(axis=2), options


def log_sum_exp(query, key_cmp, options):
    names = ("kernel_size", "stride", "length", "segment_ids")
    options = {name: options[name] for name in names}

    @jax.jit
    def attend(query, key_cmp):
        return compressed_attention(
            query, key_cmp, key_cmp, implementation="xla", return_lse=True, **options
        )[1]

    return attend(query, key_cmp)


def nsa_kernel(query, key_cmp, lse, *, segment_ids, **options):
    starts = None
    if segment_ids is not None:
        starts = document_starts(segment_ids)[
            :, segment_ids.shape[1] - query.shape[1] :
        ]
    scale = query.shape[-1] ** -0.5
    return jax.jit(functools.partial(kernel.nsa_blocks, scale=scale, **options))(
        query, key_cmp, lse, starts
    )


def nsa_xla(query, key_cmp, options):
    select = functools.partial(
        nsa_selection.nsa_select_blocks, implementation="xla", **options
    )
    return jax.jit(select)(query, key_cmp)


@pytest.mark.parametrize("case", NSA_CASES)
def test_nsa_equals_the_jnp_form(monkeypatch, case):
    sizes = dict(NSA_CASES[case])
    chunk, given = sizes.pop("chunk", None), sizes.pop("lse", True)
    query, key_cmp, options = nsa_inputs(**sizes)
    if chunk is not None:
        b, k = query.shape[0], key_cmp.shape[2]
        monkeypatch.setattr(kernel, "SCORE_BYTES", chunk * b * k * 2 * 4 * 32)
    lse = log_sum_exp(query, key_cmp, options) if given else None
    actual = nsa_kernel(query, key_cmp, lse, **options)
    expected = nsa_xla(query, key_cmp, options)
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("case", MOBA_CASES)
def test_moba_equals_the_jnp_form(monkeypatch, case):
    sizes = dict(b=1, h=16, packed=False, block_size=16, top_k=3) | MOBA_CASES[case]
    b, t, h = (sizes.pop(name) for name in ("b", "t", "h"))
    s = sizes.pop("s", t)
    if "chunk" in sizes:
        monkeypatch.setattr(kernel, "SCORE_BYTES", sizes.pop("chunk") * b * 4 * 4 * 128)
    packed = sizes.pop("packed")
    segment_ids = documents(s // 3, s - s // 3, batch=b) if packed else None
    query, key = normal(0, (b, t, 4, h), (b, s, 2, h))

    def select(implementation):
        return jax.jit(
            functools.partial(
                moba_select_blocks,
                segment_ids=segment_ids,
                implementation=implementation,
                **sizes,
            )
        )(query, key)

    expected = select("xla")
    monkeypatch.setattr(_triton, "unavailable", lambda *_: None)
    np.testing.assert_array_equal(select("triton"), expected)


def test_ties_go_to_the_lower_index():
    # All keys are the same: all blocks with as many windows have the same score.
    query, key_cmp, options = nsa_inputs(t=700, k=1, num_blocks=5)
    query, key_cmp = jnp.ones_like(query), jnp.ones_like(key_cmp)
    lse = log_sum_exp(query, key_cmp, options)
    actual = nsa_kernel(query, key_cmp, lse, **options)
    np.testing.assert_array_equal(actual[0, -1, 0], [0, 1, 2, 9, 10])
    np.testing.assert_array_equal(actual, nsa_xla(query, key_cmp, options))


@pytest.mark.parametrize(
    ("sign", "best"), [(1, [100, 101, 102]), (0, [0, 1, 2]), (-1, [0, 1, 2])]
)
def test_ties_among_many_blocks(sign, best):
    query, key = normal(0, (1, 1, 1, 16), (1, 250, 1, 16))
    key = jnp.ones_like(key).at[0, 7].set(2).at[0, 100:110].set(3)
    select = functools.partial(kernel.moba_blocks, length=1000, block_size=4, top_k=4)
    actual = select(sign * jnp.abs(query), key, None)
    np.testing.assert_array_equal(actual[0, 0, 0], [*best, 249])


@pytest.mark.parametrize("length", [100, 2000])
def test_lists_are_valid_whatever_the_scores(length):
    for values in (jnp.nan, jnp.inf):
        query, key_cmp, options = nsa_inputs(t=3, s=length, k=1, **FINE)
        lse = log_sum_exp(query, key_cmp, options)
        query = query.at[0, 1].set(values)
        actual = nsa_kernel(query, key_cmp, lse, **options)[0, 1, 0]
        assert np.all(np.diff(actual) > 0)
        assert actual[0] == 0
        assert actual[-1] == (length - 2) // FINE["block_size"]
        (key,) = normal(1, (1, length // 10, 1, 16))
        select = functools.partial(kernel.moba_blocks, block_size=10, top_k=4)
        actual = select(query, key, None, length=length)[0, 1]
        assert np.all(np.diff(actual) > 0)
        assert np.all(actual >= 0)
        assert np.all(actual[:, -1] == (length - 2) // 10)


def test_zeros_of_both_signs_are_a_tie():
    query, key = normal(0, (1, 60, 1, 16), (1, 6, 1, 16))
    query = jnp.zeros_like(query)
    select = functools.partial(kernel.moba_blocks, length=60, block_size=10, top_k=3)
    actual = select(query, key, None)[0, -1, 0]
    np.testing.assert_array_equal(actual, [0, 1, 5])
    # The product of the third block is +0, those before it are -0.
    key = -jnp.ones_like(key).at[:, 2].set(-1)
    np.testing.assert_array_equal(select(query, key, None)[0, -1, 0], [0, 1, 5])


def test_negative_scores_are_ranked():
    query, key = normal(0, (1, 80, 2, 16), (1, 8, 2, 16))
    query, key = jnp.abs(query), -jnp.abs(key)
    select = functools.partial(kernel.moba_blocks, length=80, block_size=10, top_k=4)
    actual = select(query, key, None)
    scores = np.einsum("tnh,cnh->tnc", query[0], key[0])
    for t in (79, 55, 31):
        for n in range(2):
            own = t // 10
            best = np.argsort(-scores[t, n, :own])[:3]
            np.testing.assert_array_equal(actual[0, t, n], [*np.sort(best), own])


def test_unseen_memory_does_not_matter():
    # Nobody sees a window across two documents; a third of the queries sees no more
    # than the first document.
    query, key_cmp, options = nsa_inputs(t=300, packed=True)
    across = jnp.asarray([100 // 16, 100 // 16 - 1])
    for lse in (log_sum_exp(query, key_cmp, options), None):
        plain = nsa_kernel(query, key_cmp, lse, **options)
        for value in (jnp.nan, jnp.inf):
            changed = key_cmp.at[:, across].set(value)
            actual = nsa_kernel(query, changed, lse, **options)
            np.testing.assert_array_equal(actual, plain)
            changed = key_cmp.at[:, across[1] :].set(value)
            actual = nsa_kernel(query, changed, lse, **options)
            np.testing.assert_array_equal(actual[:, :100], plain[:, :100])


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(kernel, "SCORE_BYTES", 2**18)

    def shape(*sizes):
        return jax.ShapeDtypeStruct(sizes, jnp.float32)

    def select_nsa(query, key_cmp, lse):
        return nsa_kernel(
            query, key_cmp, lse, **SIZES, length=query.shape[1], segment_ids=None
        )

    def select_moba(query, key):
        return kernel.moba_blocks(
            query, key, None, length=2**14, block_size=64, top_k=3
        )

    t, blocks = 2**14, 256
    small = {
        select_nsa: (shape(1, t, 4, 8), shape(1, 1023, 2, 8), shape(1, t, 4)),
        select_moba: (shape(1, t, 2, 8), shape(1, blocks, 2, 8)),
    }
    for select, shapes in small.items():
        used = temporary_bytes(select, *shapes)
        # Beside the scores the lists, once by chunk and once joined, and the lse.
        assert used < 2**18 + 2**21
        assert used < t * 2 * blocks * 4 / 8


# Tiles have 64 queries.
@pytest.mark.parametrize(
    ("most", "rows"), [(1000, 300), (256, 192), (250, 192), (20, 20)]
)
def test_chunks_are_of_about_the_same_length(monkeypatch, most, rows):
    monkeypatch.setattr(kernel, "SCORE_BYTES", most * 4 * 16)
    lengths = []

    def write(step, length, out, after):
        lengths.append(length)
        return jnp.zeros(out.shape, jnp.float32)

    scores = kernel._Scores(1, 16, signed=False, tile_rows=64, write=write)

    def select(query):
        return kernel._best_blocks(
            scores,
            query,
            kernel._document_starts(None),
            lists=1,
            length=300,
            block_size=32,
            num_blocks=4,
            num_initial=1,
            num_local=2,
        )

    jax.eval_shape(select, jax.ShapeDtypeStruct((1, 300, 1, 16), jnp.float32))
    assert lengths == [rows] * -(-300 // rows)


def test_transformations_agree():
    query, key_cmp, options = nsa_inputs(b=2, t=120, k=1)
    del options["segment_ids"]
    select = functools.partial(kernel.nsa_blocks, scale=0.25, **options)

    def run(query, key_cmp):
        return select(query, key_cmp, None, None)

    plain = run(query, key_cmp)
    mapped = jax.vmap(lambda *x: run(*(a[None] for a in x))[0])
    for transformed in (mapped, shard_over_batch(run)):
        np.testing.assert_array_equal(transformed(query, key_cmp), plain)

    def loss(query, key_cmp):
        return jnp.sum(query) + jnp.sum(run(query, key_cmp))

    gradient = jax.grad(loss, argnums=(0, 1))(query, key_cmp)
    np.testing.assert_array_equal(gradient[0], jnp.ones_like(query))
    assert not np.any(gradient[1])


def test_the_operations_run_it_on_request(monkeypatch):
    query, key_cmp, options = nsa_inputs(t=120)
    (key,) = normal(1, (1, 120, 2, 16))

    def select_nsa():
        return nsa_selection.nsa_select_blocks(
            query, key_cmp, implementation="triton", **options
        )

    def select_moba():
        return moba_select_blocks(
            query, key, block_size=16, top_k=3, implementation="triton"
        )

    for select in (select_nsa, select_moba):
        with pytest.raises(NotImplementedError, match="it needs a GPU"):
            select()
    monkeypatch.setattr(_triton, "unavailable", lambda *_: None)
    expected = nsa_xla(query, key_cmp, options)
    np.testing.assert_array_equal(select_nsa(), expected)
    lse = log_sum_exp(query, key_cmp, options)
    actual = nsa_selection.select_blocks_by_lse(
        query, key_cmp, lse, scale=None, implementation=None, **options
    )
    np.testing.assert_array_equal(actual, expected)
    jaxpr = jax.make_jaxpr(
        functools.partial(mixture_of_block_attention, block_size=16, top_k=3)
    )(query, key, key)
    assert "affinities_kernel" in str(jaxpr)
    assert select_moba().shape == (1, 120, 4, 3)


@pytest.mark.parametrize(("dtype", "width"), [(jnp.bfloat16, 192), (jnp.float32, 256)])
def test_compiles_to_matrix_instructions_for_hopper(compile_triton, dtype, width):
    def select(query, key_cmp, key):
        options = {**SIZES, "num_blocks": 16, "length": 4096}
        return (
            kernel.nsa_blocks(query, key_cmp, None, None, scale=0.1, **options),
            kernel.moba_blocks(query, key, None, length=4096, block_size=64, top_k=8),
        )

    shapes = [(1, 4096, 32, width), (1, 255, 2, width), (1, 64, 2, width)]
    kernels = compile_triton(select, *(jax.ShapeDtypeStruct(x, dtype) for x in shapes))
    products = ("block_scores_kernel", "log_sum_exp_kernel", "affinities_kernel")
    assert set(kernels) == {*products, "best_blocks_kernel"}
    for name, (ptx, shared_bytes) in kernels.items():
        assert ("wgmma.mma_async" in ptx) == (name in products)
        assert shared_bytes <= 227 * 1024


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"key_dtype": jnp.float32}, None),
        ({"dtype": jnp.float64}, "must be bf16, fp16 or fp32, not float64"),
        ({"key_dtype": jnp.float16}, "must be bfloat16 or fp32 as query is"),
        ({"query": (2, 9, 4, 300), "key": (2, 9, 2, 300)}, "at most 256 wide, not 300"),
        ({"query": (2, 9, 256, 8)}, "at most 64 query heads may share"),
        ({"cells": 65}, "at most 64 strides long, not 65"),
        ({"blocks": 16385}, "at most 16384 blocks, not 16385"),
        ({"scale": -1.0}, "scale must be positive, not -1.0"),
        ({"key": (2, 0, 2, 8)}, "an array is empty"),
        ({"lists": 2**15}, "65536 rows of programs"),
    ],
)
def test_says_what_it_does_not_support(monkeypatch, changes, reason):
    monkeypatch.setattr(_triton, "unavailable", lambda *_: None)
    sizes = dict(lists=2, blocks=9, cells=4, scale=1.0)
    arrays = [
        jax.ShapeDtypeStruct(
            changes.get("query", (2, 9, 4, 8)), changes.get("dtype", jnp.bfloat16)
        ),
        jax.ShapeDtypeStruct(
            changes.get("key", (2, 9, 2, 8)), changes.get("key_dtype", jnp.bfloat16)
        ),
    ]
    sizes |= {name: changes[name] for name in sizes if name in changes}
    actual = selection.unsupported(*arrays, **sizes)
    assert actual == reason or reason in actual
