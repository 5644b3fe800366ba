"""The block-sparse kernel on a GPU: the numerical gate, and what only a GPU can show.

The error of the kernel against the fp32 reference may be at most twice that of the jnp
form in the kernel's own dtype, for the output and every gradient.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.nn import MixtureOfBlockAttention, NativeSparseAttention
from jattn.ops.block_sparse import block_sparse_attention
from jattn.ops.compressed import num_windows
from jattn.ops.moba import mixture_of_block_attention, moba_select_blocks
from jattn.ops.nsa import native_sparse_attention
from jattn.ops.nsa_selection import nsa_select_blocks
from jattn.pallas.block_sparse import pairs
from tests.gpu.gate import assert_passes_gate, calls_kernel
from tests.support import documents, normal, relative_rms

DTYPES = {"bf16": jnp.bfloat16, "fp16": jnp.float16, "fp32": jnp.float32}

# Sizes by name: dtype, T, K, G, H, V, block size, n, and what is special.
CASES = {
    **{f"group {g}": dict(t=257, k=2, g=g, n=3) for g in (1, 2, 3, 4, 6, 8, 16, 32)},
    **{
        f"widths {h}, {v}, {dtype}": dict(t=111, k=2, g=4, h=h, v=v, dtype=dtype)
        for dtype in DTYPES
        for h, v in ((64, 64), (80, 80), (96, 128), (128, 128), (192, 128), (192, 256))
    },
    **{f"T = {t}": dict(t=t, b=2) for t in (1, 63, 111, 1000)},
    **{f"blocks of {x}": dict(t=1000, block_size=x) for x in (16, 48, 128, 512)},
    "fp16": dict(t=1000, g=16, dtype="fp16"),
    "fp32": dict(t=1000, g=16, dtype="fp32"),
    "packed": dict(t=1000, g=16, b=2, packed=True),
    "queries end the keys": dict(t=100, s=1000, g=3),
    "a list for each head": dict(t=257, g=4, per_head=True),
    "neighbours share blocks": dict(t=1000, g=16, n=6, shared=True),
    "shared by some": dict(t=700, s=1001, g=6, n=6, shared=True, packed=True),
    "several chunks": dict(t=1000, g=4, partial_bytes=2**18),
    "several portions": dict(t=1000, g=4, k=8, partial_bytes=2**22),
    "several chunks, group 16": dict(t=1000, g=16, partial_bytes=2**21),
    "several portions, group 16": dict(t=900, b=2, g=16, k=4, partial_bytes=2**25),
    "shared by some, group 16": dict(t=700, s=1001, g=16, n=6, shared=True),
    "blocks of 128, group 16": dict(t=1000, g=16, block_size=128),
}


def inputs(case, seed=0):
    """Query, key, value, indices, options and cotangents of a case."""
    sizes = dict(b=1, k=2, g=2, h=128, v=128, block_size=64, n=4, dtype="bf16") | case
    b, t, k, g, h, v = (sizes[x] for x in ("b", "t", "k", "g", "h", "v"))
    s = sizes.get("s", t)
    arrays = normal(
        seed, (b, t, k * g, h), (b, s, k, h), (b, s, k, v), dtype=DTYPES[sizes["dtype"]]
    )
    # The query's own block, then any, some of them none, repeated or in the future.
    rng = np.random.default_rng(seed)
    block_size = sizes["block_size"]
    lists = k * g if sizes.get("per_head") else k
    indices = rng.integers(-1, -(-s // block_size), (b, t, lists, sizes["n"]))
    own = (np.arange(s - t, s) // block_size)[:, None]
    indices[..., 0] = own
    if sizes.get("shared"):
        indices[..., 1] = own - 1
        indices[..., 2] = 0
    segment_ids = (
        documents(s // 3, s - s // 3, batch=b) if sizes.get("packed") else None
    )
    options = {"block_size": block_size, "segment_ids": segment_ids}
    cotangents = normal(seed + 1, (b, t, k * g, v), (b, t, k * g))
    return arrays, jnp.asarray(indices, jnp.int32), options, cotangents


@functools.partial(jax.jit, static_argnames=("implementation", "block_size"))
def value_and_gradients(arrays, indices, cotangents, *, implementation, **options):
    """Output, log-sum-exp, and gradients of query, key and value."""

    def attend(*arrays):
        return block_sparse_attention(
            *arrays,
            indices,
            implementation=implementation,
            return_lse=True,
            **options,
        )

    (out, lse), pullback = jax.vjp(attend, *arrays)
    cotangents = cotangents[0].astype(out.dtype), cotangents[1]
    return out, lse, *pullback(cotangents)


@pytest.mark.parametrize("name", CASES)
def test_numerical_gate(monkeypatch, name):
    case = dict(CASES[name])
    if "partial_bytes" in case:
        monkeypatch.setattr(pairs, "PARTIAL_BYTES", case.pop("partial_bytes"))
    arrays, indices, options, cotangents = inputs(case)

    def run(arrays, implementation):
        return value_and_gradients(
            arrays, indices, cotangents, implementation=implementation, **options
        )

    with jax.default_matmul_precision("highest"):
        reference = run([x.astype(jnp.float32) for x in arrays], "xla")
    actual = run(arrays, "triton")
    assert_passes_gate(actual, run(arrays, "xla"), reference)
    for x, y in zip(actual, run(arrays, "triton"), strict=True):
        np.testing.assert_array_equal(x, y)


def test_automatic_choice_is_the_kernel():
    arrays, indices, options, cotangents = inputs({"t": 257})

    def run(implementation):
        return functools.partial(
            value_and_gradients, implementation=implementation, **options
        )

    assert calls_kernel(run(None), arrays, indices, cotangents)
    assert not calls_kernel(run("xla"), arrays, indices, cotangents)
    chosen = run(None)(arrays, indices, cotangents)
    for x, y in zip(chosen, run("triton")(arrays, indices, cotangents), strict=True):
        np.testing.assert_array_equal(x, y)
    # What the kernel does not support goes to the jnp form without a word.
    options["block_size"] = 24
    assert not calls_kernel(run(None), arrays, indices, cotangents)


def moba_op(query, key, value, *, blocks, implementation):
    return mixture_of_block_attention(
        query,
        key,
        value,
        block_size=128,
        top_k=3,
        block_indices=blocks,
        implementation=implementation,
    )


def moba_blocks(query, key, _):
    return moba_select_blocks(query, key, block_size=128, top_k=3)


def nsa_op(query, *arrays, blocks, implementation, **options):
    return native_sparse_attention(
        query,
        arrays[:2],
        arrays[2:4],
        arrays[4:6],
        jax.nn.sigmoid(arrays[6]),
        num_blocks=6,
        window_size=128,
        block_indices=blocks,
        implementation=implementation,
        **options,
    )


def nsa_blocks(query, key_cmp, *_):
    return nsa_select_blocks(query, key_cmp, num_blocks=6)


OPERATIONS = {
    "moba": (moba_op, moba_blocks, [(2, 1000, 8, 128)] * 3),
    "nsa": (
        nsa_op,
        nsa_blocks,
        [
            (2, 1000, 32, 128),
            *[(2, 61, 2, 128)] * 2,
            *[(2, 1000, 2, 128)] * 4,
            (2, 1000, 32, 3),
        ],
    ),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_automatic_choice_in_operations(name):
    operation, select, shapes = OPERATIONS[name]
    arrays = normal(0, *shapes, dtype=jnp.bfloat16)
    (cotangent,) = normal(1, shapes[0])

    @functools.partial(jax.jit, static_argnames="implementation")
    def run(arrays, blocks, implementation=None):
        function = functools.partial(
            operation, blocks=blocks, implementation=implementation
        )
        out, pullback = jax.vjp(function, *arrays)
        return out, *pullback(cotangent.astype(out.dtype))

    assert calls_kernel(run, arrays, None)
    # In fp32 or another program, blocks of nearly equal scores might swap.
    blocks = jax.jit(select)(*arrays)
    with jax.default_matmul_precision("highest"):
        wide = [x.astype(jnp.float32) for x in arrays]
        reference = run(wide, blocks, implementation="xla")
    plain = run(arrays, blocks, implementation="xla")
    assert_passes_gate(run(arrays, blocks), plain, reference)
    assert_passes_gate(run(arrays, None), plain, reference)


# Sizes by name: T, G, H, V, dtype, and what is special.
NSA_CASES = {
    **{f"group {g}": dict(g=g) for g in (1, 3, 8, 32)},
    "fp16": dict(dtype="fp16"),
    "fp32": dict(dtype="fp32"),
    "widths 192, 128": dict(h=192),
    "packed": dict(packed=True),
    "sizes 16, 8, 32": dict(kernel_size=16, stride=8, block_size=32),
    **{f"T = {t}": dict(t=t) for t in (20, 63)},
}


def nsa_inputs(case):
    """Arrays, cotangents and options of a case of the whole operation."""
    defaults = dict(t=1000, g=16, h=128, v=128, dtype="bf16", packed=False)
    windows = dict(kernel_size=32, stride=16)
    sizes = defaults | windows | dict(block_size=64) | case
    t, h, v = (sizes[x] for x in "thv")
    b, k, n = 2, 2, 2 * sizes["g"]
    dtype = DTYPES[sizes["dtype"]]
    windows = {x: sizes[x] for x in windows}
    arrays = normal(
        0,
        (b, t, n, h),
        *[(b, s, k, x) for s in (num_windows(t, **windows), t, t) for x in (h, v)],
        (b, t, n, 3),
        dtype=dtype,
    )
    out_cotangent, lse_cotangent = normal(1, (b, t, n, v), (b, t, n, 3))
    packed = documents(t // 3, t - t // 3, batch=b) if sizes["packed"] else None
    options = windows | {"block_size": sizes["block_size"], "segment_ids": packed}
    return arrays, (out_cotangent.astype(dtype), lse_cotangent), options


@functools.partial(
    jax.jit,
    static_argnames=("implementation", "kernel_size", "stride", "block_size"),
)
def nsa_results(arrays, blocks, cotangents, *, implementation=None, **options):
    """Output, log-sum-exps and every gradient; besides the blocks that were read."""

    def attend(*arrays):
        *results, read = nsa_op(
            *arrays,
            blocks=blocks,
            implementation=implementation,
            return_lse=True,
            return_block_indices=True,
            **options,
        )
        return results, read

    results, pullback, read = jax.vjp(attend, *arrays, has_aux=True)
    cotangents = [x.astype(y.dtype) for x, y in zip(cotangents, results, strict=True)]
    return (*results, *pullback(cotangents)), read


@pytest.mark.parametrize("name", NSA_CASES)
def test_native_sparse_attention(name):
    arrays, cotangents, options = nsa_inputs(NSA_CASES[name])
    run = functools.partial(nsa_results, cotangents=cotangents, **options)
    chosen, blocks = run(arrays, None)
    assert calls_kernel(run, arrays, blocks)
    given, _ = run(arrays, blocks)
    with jax.default_matmul_precision("highest"):
        wide = [x.astype(jnp.float32) for x in arrays]
        reference, _ = run(wide, blocks, implementation="xla")
    plain, _ = run(arrays, blocks, implementation="xla")
    for actual in (chosen, given):
        assert_passes_gate(actual, plain, reference)
    again = run(arrays, None)
    for x, y in zip((*again[0], again[1]), (*chosen, blocks), strict=True):
        np.testing.assert_array_equal(x, y)


MODULES = {
    "moba": (MixtureOfBlockAttention, dict(block_size=64, top_k=3)),
    "nsa": (NativeSparseAttention, dict(num_blocks=4, window_size=64)),
}


@pytest.mark.parametrize("name", MODULES)
def test_automatic_choice_in_modules(name):
    module, fields = MODULES[name]
    x, cotangent = normal(0, (2, 500, 96), (2, 500, 96))
    segment_ids = documents(150, 350, batch=2)

    def run(implementation):
        mixer = module(
            num_heads=4,
            num_kv_heads=2,
            head_dim=32,
            implementation=implementation,
            **fields,
        )

        @jax.jit
        def value_and_gradients(x):
            params = mixer.init(jax.random.key(0), x)

            def attend(params, x):
                return mixer.apply(params, x, segment_ids=segment_ids)

            out, pullback = jax.vjp(attend, params, x)
            return out, pullback(cotangent)

        assert calls_kernel(value_and_gradients, x) == (implementation is None)
        return jax.tree.leaves(value_and_gradients(x))

    with jax.default_matmul_precision("highest"):
        for actual, expected in zip(run(None), run("xla"), strict=True):
            assert relative_rms(actual, expected) <= 1e-5


def test_unseen_memory_does_not_matter():
    arrays, indices, options, cotangents = inputs({"t": 1000, "g": 16})
    indices = jnp.where(indices == 5, 4, indices)
    indices = indices.at[:, 320:384].set(-1)  # nobody chooses block 5
    query, *key_value = arrays
    poisoned = [query, *(x.at[:, 320:384].set(jnp.nan) for x in key_value)]
    run = functools.partial(value_and_gradients, implementation="triton", **options)
    plain = run(arrays, indices, cotangents)
    changed = run(poisoned, indices, cotangents)
    for x, y in zip(changed, plain, strict=True):
        np.testing.assert_array_equal(x, y)
    out, lse, *gradients = plain
    assert np.all(np.isneginf(lse[:, 320:384]))
    assert not np.any(out[:, 320:384])
    assert all(np.all(np.isfinite(x)) for x in gradients)


def test_more_than_2_to_the_31_elements():
    t, last = 140_000, 64
    shapes = (1, t, 64, 256), (1, t, 4, 256), (1, t, 4, 64)
    keys = jax.random.split(jax.random.key(0), 4)
    arrays = [
        jax.random.normal(key, shape, jnp.bfloat16)
        for key, shape in zip(keys[:3], shapes, strict=True)
    ]
    assert arrays[0].size > 2**31
    own = jnp.arange(t)[:, None, None] // 64
    other = jax.random.randint(keys[3], (t, 4, 3), 0, own + 1)
    indices = jnp.concatenate([jnp.broadcast_to(own, (t, 4, 1)), other], -1)[None]

    def attend(query, indices, implementation):
        def total(query):
            out = block_sparse_attention(
                query,
                *arrays[1:],
                indices,
                block_size=64,
                implementation=implementation,
            )
            return jnp.sum(out[:, -last:].astype(jnp.float32) ** 2), out[:, -last:]

        gradient, out = jax.grad(total, has_aux=True)(query)
        return out, gradient[:, -last:]

    attend = jax.jit(attend, static_argnames="implementation")
    actual = attend(arrays[0], indices, implementation="triton")
    # Queries may be the last of the keys: only those are compared.
    expected = attend(arrays[0][:, -last:], indices[:, -last:], implementation="xla")
    for x, y in zip(actual, expected, strict=True):
        assert relative_rms(x, y) <= 5e-3
