"""The selection kernels on a GPU: the blocks they choose, and what only a GPU shows.

Lists have to be those of the jnp form in fp32, but that blocks may be swapped whose
scores are equal up to rounding.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.ops import _common, nsa_selection
from jattn.ops.compressed import (
    compressed_attention,
    nsa_windows,
    num_windows,
    query_range,
    visible_windows,
)
from jattn.ops.moba import moba_select_blocks
from jattn.pallas import selection
from jattn.pallas.selection import triton as kernel
from tests.gpu.gate import calls_kernel
from tests.support import documents, normal, temporary_bytes

DTYPES = {"bf16": jnp.bfloat16, "fp16": jnp.float16, "fp32": jnp.float32}
SIZES = dict(
    kernel_size=32, stride=16, block_size=64, num_blocks=8, num_initial=1, num_local=2
)

# Sizes by name: dtype, B, T, S, K, G, H, those of the scheme, and what is special.
NSA_CASES = {
    **{f"T = {t}": dict(t=t, b=2) for t in (63, 111, 257, 1000)},
    **{f"group {g}": dict(t=1000, g=g) for g in (1, 3, 4, 16)},
    **{
        f"width {h}, {dtype}": dict(t=1000, h=h, dtype=dtype)
        for dtype in DTYPES
        for h in (64, 80, 128, 192, 256)
    },
    "one query": dict(t=1, s=1000),
    "8192 tokens": dict(t=8192, g=16, num_blocks=16),
    "8192 tokens in chunks": dict(t=8192, g=16, num_blocks=16, score_bytes=2**21),
    "no overlap": dict(t=1000, kernel_size=16, stride=16, block_size=16),
    "finer windows": dict(t=1000, kernel_size=16, stride=8, block_size=32),
    "one window a block": dict(t=1000, kernel_size=32, stride=32, block_size=64),
    "three strides a block": dict(t=1000, kernel_size=16, stride=16, block_size=48),
    "64 strides a block": dict(t=4000, kernel_size=32, stride=16, block_size=1024),
    "16384 blocks": dict(
        t=300, s=131072, k=1, kernel_size=8, stride=8, block_size=8, num_blocks=64
    ),
    "packed": dict(t=1000, b=2, packed=True),
    "queries end the keys": dict(t=100, s=3000, b=2, packed=True),
    "fewer blocks than wanted": dict(t=1000, num_blocks=40),
    # By the Mosaic kernel, however few tokens there are.
    **{
        f"{name}, Mosaic": case | {"mosaic": True}
        for name, case in {
            "group 3": dict(t=5001, g=3),
            "width 64, fp16": dict(t=5000, h=64, dtype="fp16"),
            "8192 tokens": dict(t=8192, g=16, num_blocks=16),
            "in chunks": dict(t=8000, g=16, num_blocks=16, score_bytes=2**21),
            "queries end the keys": dict(t=2500, s=7000, b=2, g=1),
            "no overlap": dict(
                t=4500, kernel_size=16, stride=16, block_size=16, num_blocks=16
            ),
            "16 strides a block": dict(t=4500, kernel_size=16, stride=4),
        }.items()
    },
}

MOBA_CASES = {
    **{f"T = {t}": dict(t=t, s=max(t, 200)) for t in (1, 63, 111, 257, 1000)},
    **{f"{dtype}": dict(t=1000, b=2, dtype=dtype) for dtype in DTYPES},
    "width 192": dict(t=1000, h=192),
    "mean keys in fp32": dict(t=1000, round_pooled_keys=False),
    "8192 tokens": dict(t=8192, n=16, block_size=16, top_k=8),
    "8192 tokens in chunks": dict(t=8192, block_size=16, top_k=8, score_bytes=2**21),
    "packed": dict(t=1000, b=2, packed=True),
    "queries end the keys": dict(t=100, s=3000, b=2, packed=True),
}


def inputs(b=1, t=1000, s=None, k=2, g=2, h=128, dtype="bf16"):
    """Query and key."""
    s = s or t
    return normal(0, (b, t, k * g, h), (b, s, k, h), dtype=DTYPES[dtype])


def options(arrays, packed):
    """segment_ids for a query and a key."""
    b, s = arrays[1].shape[:2]
    return documents(s // 3, s - s // 3, batch=b) if packed else None


def nsa_scores(query, key_cmp, positions, starts, count, sizes):
    """Scores fp32 [B, T, K, count] of blocks, as the jnp form has them."""
    b, t, n, h = query.shape
    m, k = key_cmp.shape[1:3]
    logits = h**-0.5 * jnp.einsum(
        "btkgh,bmkh->bkgtm",
        query.reshape(b, t, k, n // k, h).astype(jnp.float32),
        key_cmp.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    kernel_size, stride = sizes["kernel_size"], sizes["stride"]
    visible = visible_windows(positions, starts, m, kernel_size, stride)
    weights, _ = _common.masked_softmax(logits, visible[:, None, None])
    scores = nsa_selection._block_scores(
        jnp.sum(weights, axis=2), count, kernel_size, stride, sizes["block_size"]
    )
    return jnp.moveaxis(scores, 1, 2)


def moba_scores(query, key, block_size, round_pooled_keys):
    """Scores fp32 [B, T, N, count] of blocks that lie in one document."""
    b, t, n, h = query.shape
    s, k = key.shape[1:3]
    count = s // block_size
    mean = key[:, : count * block_size].astype(jnp.float32)
    mean = mean.reshape(b, count, block_size, k, h).mean(axis=2)
    if round_pooled_keys:
        mean = mean.astype(key.dtype).astype(jnp.float32)
    return jnp.einsum(
        "btkgh,bckh->btkgc",
        query.reshape(b, t, k, n // k, h).astype(jnp.float32),
        mean,
        precision=jax.lax.Precision.HIGHEST,
    ).reshape(b, t, n, count)


def assert_same_but_for_ties(actual, expected, scores):
    """Asserts equal lists [..., n], but that blocks of equal scores may be swapped.

    Equal means within 1e-5 of the larger one, or of a thousandth of the row's largest
    score where rounding is that of larger terms.

    Args:
      actual: Ascending lists, -1 last.
      expected: The same.
      scores: [..., count], finite.
    """
    actual, expected = (
        np.asarray(x).reshape(-1, x.shape[-1]) for x in (actual, expected)
    )
    scores = np.asarray(scores, np.float64).reshape(actual.shape[0], -1)
    differing = np.flatnonzero(np.any(actual != expected, axis=1))
    print(f"{differing.size} of {actual.shape[0]} lists differ")
    assert differing.size <= 1 + actual.shape[0] / 1000
    for row in differing:
        blocks = actual[row][actual[row] >= 0]
        np.testing.assert_array_equal(blocks, np.unique(blocks))
        np.testing.assert_array_equal(actual[row][: blocks.size], blocks)
        wanted = expected[row][expected[row] >= 0]
        assert blocks.size == wanted.size
        gained = scores[row, np.setdiff1d(blocks, wanted)]
        lost = scores[row, np.setdiff1d(wanted, blocks)]
        size = max(np.abs(lost).max(), 1e-3 * np.abs(scores[row]).max())
        assert lost.max() - gained.min() <= 1e-5 * size, row


@pytest.mark.parametrize("name", NSA_CASES)
def test_nsa_blocks(monkeypatch, name):
    case = dict(NSA_CASES[name])
    sizes = {x: case.pop(x, value) for x, value in SIZES.items()}
    packed = case.pop("packed", False)
    if case.pop("mosaic", False):
        monkeypatch.setattr(selection, "MIN_TILES", 0)
    if "score_bytes" in case:
        monkeypatch.setattr(kernel, "SCORE_BYTES", case.pop("score_bytes"))
    query, key = inputs(**case)
    segment_ids = options((query, key), packed)
    length = key.shape[1]
    count = -(-length // sizes["block_size"])
    windows = {x: sizes[x] for x in ("kernel_size", "stride")}
    # Not the mean of 32 keys but as large as one key, for scores that differ.
    shape = nsa_windows(key, **windows).shape
    (key_cmp,) = normal(1, (*shape[:2], *shape[3:]), dtype=key.dtype)
    wide = [x.astype(jnp.float32) for x in (query, key_cmp)]

    @functools.partial(jax.jit, static_argnames="implementation")
    def select(query, key_cmp, lse=None, *, implementation):
        return nsa_selection.select_blocks_by_lse(
            query,
            key_cmp,
            lse,
            length=length,
            scale=None,
            segment_ids=segment_ids,
            implementation=implementation,
            **sizes,
        )

    with jax.default_matmul_precision("highest"):
        expected = select(*wide, implementation="xla")
        _, lse = compressed_attention(
            wide[0],
            wide[1],
            wide[1],
            length=length,
            segment_ids=segment_ids,
            implementation="xla",
            return_lse=True,
            **windows,
        )
    positions, starts = query_range(query, length, segment_ids)
    scores = nsa_scores(query, key_cmp, positions, starts, count, sizes)
    for given in (lse, None):
        actual = select(query, key_cmp, given, implementation="triton")
        assert_same_but_for_ties(actual, expected, scores)
        again = select(query, key_cmp, given, implementation="triton")
        np.testing.assert_array_equal(actual, again)


@pytest.mark.parametrize("name", MOBA_CASES)
def test_moba_blocks(monkeypatch, name):
    case = dict(block_size=32, top_k=4) | MOBA_CASES[name]
    block_size, top_k = case.pop("block_size"), case.pop("top_k")
    rounded = case.pop("round_pooled_keys", True)
    packed = case.pop("packed", False)
    n = case.pop("n", 4)
    if "score_bytes" in case:
        monkeypatch.setattr(kernel, "SCORE_BYTES", case.pop("score_bytes"))
    query, key = inputs(k=n // 2, g=2, **case)
    segment_ids = options((query, key), packed)

    @functools.partial(jax.jit, static_argnames="implementation")
    def select(query, key, implementation):
        return moba_select_blocks(
            query,
            key,
            block_size=block_size,
            top_k=top_k,
            segment_ids=segment_ids,
            round_pooled_keys=rounded,
            implementation=implementation,
        )

    expected = select(query, key, "xla")
    actual = select(query, key, "triton")
    scores = moba_scores(query, key, block_size, rounded)
    # The last block may be ragged: it is nobody's but its own queries'.
    missing = -(-key.shape[1] // block_size) - scores.shape[-1]
    scores = jnp.pad(scores, [(0, 0)] * 3 + [(0, missing)])
    assert_same_but_for_ties(actual, expected, scores)
    np.testing.assert_array_equal(actual, select(query, key, "triton"))


def test_ties_go_to_the_lower_index():
    query = jnp.ones((1, 5000, 4, 64), jnp.bfloat16)
    key_cmp = jnp.ones((1, num_windows(5000, 32, 16), 1, 64), jnp.bfloat16)
    select = functools.partial(nsa_selection.nsa_select_blocks, query, key_cmp, **SIZES)
    blocks = select(implementation="triton")
    np.testing.assert_array_equal(blocks[0, -1, 0], [0, 1, 2, 3, 4, 5, 77, 78])
    np.testing.assert_array_equal(blocks[0, 4000, 0], [0, 1, 2, 3, 4, 5, 61, 62])
    key = jnp.ones((1, 5000, 1, 64), jnp.bfloat16)
    for sign in (-1, 0, 1):
        blocks = moba_select_blocks(
            sign * query, key, block_size=64, top_k=4, implementation="triton"
        )
        np.testing.assert_array_equal(blocks[0, -1, 0], [0, 1, 2, 78])


def test_automatic_choice_is_the_kernel():
    query, key = inputs(t=1000)
    (key_cmp,) = normal(1, (1, 61, 2, 128), dtype=jnp.bfloat16)
    nsa_select = functools.partial(nsa_selection.nsa_select_blocks, num_blocks=4)
    moba_select = functools.partial(moba_select_blocks, block_size=64, top_k=4)
    for select, arrays in ((nsa_select, (query, key_cmp)), (moba_select, (query, key))):
        assert calls_kernel(select, *arrays)
        xla = functools.partial(select, implementation="xla")
        assert not calls_kernel(xla, *arrays)


def test_unseen_memory_does_not_matter():
    query, _ = inputs(t=3000, g=4)
    (key_cmp,) = normal(1, (1, num_windows(3000, 32, 16), 2, 128))
    key_cmp = key_cmp.astype(jnp.bfloat16)
    select = functools.partial(
        nsa_selection.nsa_select_blocks,
        segment_ids=documents(1000, 2000),
        implementation="triton",
        **SIZES,
    )
    plain = select(query, key_cmp)
    # Window 61 and 62 have tokens of both documents; the first one ends before them.
    for value in (jnp.nan, jnp.inf, -jnp.inf):
        across = key_cmp.at[:, 61:63].set(value)
        np.testing.assert_array_equal(select(query, across), plain)
        later = key_cmp.at[:, 61:].set(value)
        np.testing.assert_array_equal(select(query, later)[:, :1000], plain[:, :1000])


def test_memory_is_bounded():
    def shape(*sizes):
        return jax.ShapeDtypeStruct(sizes, jnp.bfloat16)

    t = 65536
    query = shape(1, t, 64, 128)
    key_cmp = shape(1, num_windows(t, 32, 16), 4, 128)
    select = functools.partial(nsa_selection.nsa_select_blocks, implementation="triton")
    # Beside the scores of a chunk there are the log-sum-exp and the lists.
    allowed = kernel.SCORE_BYTES + 3 * 4 * t * 64
    assert temporary_bytes(select, query, key_cmp) <= allowed
    select = functools.partial(
        moba_select_blocks, block_size=128, top_k=8, implementation="triton"
    )
    used = temporary_bytes(select, shape(1, t, 16, 128), shape(1, t, 16, 128))
    # The mean is that of keys in fp32, which XLA may or may not write down.
    assert used <= kernel.SCORE_BYTES + 2 * 4 * t * 16 * 128 + 3 * 4 * t * 16 * 8


def test_more_than_2_to_the_31_elements():
    t, last = 140_000, 64
    keys = jax.random.split(jax.random.key(0), 2)
    query = jax.random.normal(keys[0], (1, t, 64, 256), jnp.bfloat16)
    assert query.size > 2**31
    shape = (1, num_windows(t, 32, 16), 4, 256)
    key_cmp = jax.random.normal(keys[1], shape, jnp.bfloat16)
    select = functools.partial(nsa_selection.nsa_select_blocks, length=t, **SIZES)
    actual = jax.jit(functools.partial(select, implementation="triton"))(query, key_cmp)
    # Queries may be the last of the keys: only those are compared.
    query = query[:, -last:]
    expected = jax.jit(functools.partial(select, implementation="xla"))(query, key_cmp)
    positions, starts = query_range(query, t, None)
    count = -(-t // SIZES["block_size"])
    scores = nsa_scores(query, key_cmp, positions, starts, count, SIZES)
    assert_same_but_for_ties(actual[:, -last:], expected, scores)
