"""The decoding kernels on a GPU: the numerical gate, and what only a GPU can show.

Blocks of nearly equal score may swap in another program. So outputs are compared for
the blocks that the kernels chose, and these with those that the jnp form chooses.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.nn import NativeSparseAttention
from jattn.ops import nsa, nsa_selection
from jattn.ops.block_sparse import attend_block_positions
from jattn.ops.compressed import attend_windows
from jattn.ops.dense import attend_positions
from tests.kernels.test_nsa_decode import arrays_of, compiled, make, run, unread
from tests.support import normal, relative_rms

DTYPES = {"bf16": jnp.bfloat16, "fp16": jnp.float16, "fp32": jnp.float32}
LENGTHS = (1, 31, 32, 33, 700, 1000)
PAPER = {
    "h": 128,
    "v": 128,
    "block_size": 64,
    "num_blocks": 6,
    "window_size": 128,
    "dtype": "bf16",
}

CASES = {
    **{f"group of {g}": dict(k=2, g=g) for g in (1, 2, 3, 4, 6, 8, 16, 32, 64)},
    **{
        f"widths {h}, {v}, {dtype}": dict(g=4, h=h, v=v, dtype=dtype)
        for dtype in DTYPES
        for h, v in ((64, 64), (80, 80), (96, 128), (128, 128), (192, 128), (192, 256))
    },
    **{f"{t} queries, {dtype}": dict(t=t, g=4, dtype=dtype)
       for t in (2, 8) for dtype in DTYPES},
    "a batch of 40": dict(lengths=tuple(range(5, 1005, 25)), k=4, g=16),
    "one row of 64k": dict(
        lengths=(65536,), k=4, g=16, num_blocks=16, window_size=512
    ),
    "a row of 1M": dict(lengths=(2**20,), g=16, num_blocks=16, window_size=512),
    "disjoint windows": dict(kernel_size=32, stride=32, block_size=96, g=4),
    "windows of blocks": dict(kernel_size=64, stride=8, block_size=64, g=4),
    "blocks of 512": dict(block_size=512, num_blocks=2, num_initial=0, num_local=1),
    "past the end of the cache": dict(lengths=(5000, 700, 1003, 1500), capacity=999),
    "blocks of 16": dict(kernel_size=16, stride=8, block_size=16, num_blocks=64),
}  # fmt: skip


def arguments_of(case):
    sizes = PAPER | {"lengths": LENGTHS, "g": 2} | case
    return make(**sizes | {"dtype": DTYPES[sizes["dtype"]]})


@functools.partial(jax.jit, static_argnames="sizes")
def reference(arrays, blocks, sizes):
    """The gated sum in the jnp form for given blocks, and the blocks it chooses."""
    sizes = dict(sizes)
    positions, end = arrays["positions"], arrays["window_end"][:, None]
    scale = sizes["scale"]
    held = jnp.minimum(positions, arrays["selected"][0].shape[1] - 1)
    sight = {
        "query_positions": held,
        "document_starts": jnp.zeros_like(positions),
        "kernel_size": sizes["kernel_size"],
        "stride": sizes["stride"],
        "scale": scale,
    }
    slots = jnp.arange(arrays["window"][0].shape[1])
    if sizes["ring"]:
        in_window = {"key_positions": jnp.where(slots < end, 0, -1)}
    else:
        in_window = {
            "key_positions": end - slots.size + slots,
            "window": sizes["window_size"],
        }
    outputs = (
        attend_windows(arrays["query"], *arrays["compressed"], **sight)[0],
        attend_block_positions(
            arrays["query"],
            *arrays["selected"],
            blocks,
            block_size=sizes["block_size"],
            scale=scale,
            query_positions=held,
        )[0],
        attend_positions(
            arrays["query"],
            *arrays["window"],
            query_positions=positions,
            scale=scale,
            **in_window,
        )[0],
    )
    chosen = nsa_selection.select_blocks(
        arrays["query"],
        arrays["compressed"][0],
        length=arrays["selected"][0].shape[1],
        **sight,
        **{
            x: sizes[x]
            for x in ("block_size", "num_blocks", "num_initial", "num_local")
        },
    )
    return nsa.gated_sum(outputs, arrays["gates"]), chosen


def assert_passes_gate(arguments, actual, blocks):
    """Asserts small errors of an output for blocks, and that these are right."""
    arrays = arrays_of(arguments)
    sizes = tuple((x, arguments[x]) for x in arguments if x not in arrays)
    plain, _ = reference(arrays, blocks, sizes)
    with jax.default_matmul_precision("highest"):
        wide = jax.tree.map(
            lambda x: x.astype(jnp.float32) if x.dtype != jnp.int32 else x, arrays
        )
        expected, chosen = reference(wide, blocks, sizes)
    real = np.asarray(arguments["positions"] >= 0)
    assert np.mean(np.asarray(blocks != chosen)[real]) <= 0.01
    error = relative_rms(actual[real], expected[real])
    allowed = 2 * relative_rms(plain[real], expected[real])
    print(f"{error:.1e}, allowed {allowed:.1e}")
    assert error <= max(allowed, 2e-6)
    assert error <= 5e-3


@pytest.mark.parametrize("name", CASES)
def test_numerical_gate(name):
    arguments = arguments_of(CASES[name])
    call = compiled(arguments, "triton")
    actual, blocks = call(arrays_of(unread(arguments)))
    for x, y in zip((actual, blocks), call(arrays_of(arguments)), strict=True):
        np.testing.assert_array_equal(x, y)
    assert not np.any(actual[np.asarray(arguments["positions"] < 0)])
    assert_passes_gate(arguments, actual, blocks)


def kernels_called(function, *arguments, **options):
    """How many Triton kernels are in the program of a call."""
    jaxpr = jax.make_jaxpr(function)(*arguments, **options)
    return str(jaxpr).count("triton_kernel_call[")


def test_automatic_choice_is_the_kernel():
    def count(implementation, **case):
        arguments = arguments_of(case)
        return kernels_called(compiled(arguments, implementation), arrays_of(arguments))

    assert count(None) == count("triton") == 4
    assert count("xla") == 0
    # What the kernel does not support goes to the jnp form without a word.
    assert count(None, h=300) == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_chunk_of_a_prompt(dtype):
    arguments = arguments_of(
        {"lengths": (1000, 700, 333, 20), "t": 300, "k": 2, "g": 8, "dtype": dtype}
    )
    call = compiled(arguments, None)
    assert kernels_called(call, arrays_of(arguments)) > 4
    assert_passes_gate(arguments, *call(arrays_of(arguments)))


@pytest.mark.parametrize("compression", ["mlp", "mean"])
def test_prefill_and_decode_equal_the_parallel_form(compression):
    (x,) = normal(0, (2, 500, 96))

    def mixer(implementation):
        return NativeSparseAttention(
            num_heads=8,
            num_kv_heads=2,
            head_dim=32,
            num_blocks=4,
            window_size=64,
            compression=compression,
            implementation=implementation,
        )

    with jax.default_matmul_precision("highest"):
        params = jax.jit(mixer(None).init)(jax.random.key(0), x[:, :1])
        expected = jax.jit(mixer("xla").apply)(params, x)
        step = jax.jit(mixer(None).apply)
        state = mixer(None).init_cache(2, 600)
        outputs = []
        for part in jnp.split(x, [200, 201, 205, 305, *range(306, 400), 404], axis=1):
            assert kernels_called(step, params, part, cache=state)
            out, state = step(params, part, cache=state)
            outputs.append(out)
    assert relative_rms(jnp.concatenate(outputs, axis=1), expected) <= 1e-5


def test_more_than_2_to_the_31_elements():
    arguments = arguments_of({"lengths": (65536, 65536), "k": 4, "g": 16})
    last = jax.tree.map(lambda x: x[1:], arrays_of(arguments))
    rows = jnp.asarray([0] * 65 + [1])
    many = jax.tree.map(lambda x: x[rows], arrays_of(arguments))
    assert many["selected"][0].size > 2**31
    actual, blocks = run(arguments | many, "triton")
    assert_passes_gate(arguments | last, actual[-1:], blocks[-1:])
