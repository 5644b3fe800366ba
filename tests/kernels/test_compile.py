"""Every Triton kernel compiles for an H100, at sizes that ask much of it."""

import functools
import importlib
import pkgutil
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
import triton

import jattn.pallas
from jattn.ops.block_sparse import block_sparse_attention
from jattn.ops.dense import dense_attention
from jattn.ops.moba import moba_select_blocks
from jattn.ops.nsa_decode import cached_attention
from jattn.ops.nsa_selection import nsa_select_blocks
from jattn.ops.selective import selective_attention
from jattn.ops.selective_decode import cached_selective_attention
from jattn.ops.simplicial import two_simplicial_attention
from jattn.pallas import _triton


class Program(NamedTuple):
    """What is compiled.

    Attributes:
      kernels: All that compile, as module and name.
      function: Runs them.
      shapes: Of its arguments.
      mosaic: Whether Mosaic kernels do what they can, so that only those that work
        beside them compile.
    """

    kernels: set[str]
    function: Callable[..., Any]
    shapes: Sequence[Any]
    mosaic: bool = False


def shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype)


def attention(group, key_width, value_width, dtype=jnp.bfloat16):
    """Query, key and value with two kv heads."""
    return (
        shape(1, 1000, 2 * group, key_width, dtype=dtype),
        shape(1, 1000, 2, key_width, dtype=dtype),
        shape(1, 1000, 2, value_width, dtype=dtype),
    )


def names(module, *kernels):
    return {f"{module}.{kernel}_kernel" for kernel in kernels}


def gradients(operation, count=3, **options):
    """A function of arrays: the operation's outputs and gradients of the first ones."""
    operation = functools.partial(operation, implementation="triton", **options)

    def run(*arrays):
        def attend(*differentiated):
            return operation(*differentiated, *arrays[count:])

        outputs, pullback = jax.vjp(attend, *arrays[:count])
        return outputs, pullback(outputs)

    return run


# Keys and values of different widths, and the widest ones with the largest groups.
WIDE = {
    "fp32, no group": attention(1, 192, 256, jnp.float32),
    "fp32, groups of 4": attention(4, 192, 256, jnp.float32),
    "bf16, groups of 32": attention(32, 256, 256),
}

FLASH = names("flash.kernels", "forward", "query_gradient", "key_gradient", "add_units")
BLOCK_SPARSE = names("block_sparse.kernels", "plan", "forward", "combine")
BLOCK_SPARSE |= names(
    "block_sparse.gradient_kernels", "backward", "add_units", "add_queries"
)

block_sparse = gradients(block_sparse_attention, block_size=64)


def block_lists(query, key, value):
    return query, key, value, shape(*key.shape[:3], 16, dtype=jnp.int32)


def select(query, compressed_key, key):
    return (
        nsa_select_blocks(query, compressed_key, implementation="triton"),
        moba_select_blocks(query, key, block_size=64, top_k=8, implementation="triton"),
    )


def decode(*arrays):
    *arrays, positions, window_end = arrays
    return cached_attention(
        *arrays,
        positions=positions,
        window_end=window_end,
        ring=True,
        kernel_size=32,
        stride=16,
        block_size=64,
        num_blocks=16,
        num_initial=1,
        num_local=2,
        window_size=512,
        scale=0.1,
        implementation="triton",
    )


def decode_selective(*arrays):
    *arrays, query_positions, key_positions = arrays
    return cached_selective_attention(
        *arrays,
        query_positions=query_positions,
        key_positions=key_positions,
        scale=0.1,
        implementation="triton",
    )


PROGRAMS = {
    **{
        f"flash, {name}": Program(FLASH, gradients(dense_attention), arrays)
        for name, arrays in WIDE.items()
    },
    **{
        f"block-sparse, {name}": Program(
            BLOCK_SPARSE, block_sparse, block_lists(*arrays)
        )
        for name, arrays in WIDE.items()
    },
    "block-sparse beside Mosaic": Program(
        names("block_sparse.kernels", "plan", "merge")
        | names("block_sparse.gradient_kernels", "add_units", "add_queries"),
        block_sparse,
        block_lists(*attention(16, 128, 128)),
        mosaic=True,
    ),
    "selective with a budget": Program(
        names("selective.mask", "sums", "bias", "selection_gradient")
        | names("selective.query_kernels", "forward", "query_gradient")
        | names("selective.key_kernels", "key_gradient", "mask_gradient")
        | names("selective.eviction", "eviction"),
        gradients(selective_attention, budget=512),
        attention(1, 64, 64, jnp.float16),
    ),
    "selective beside Mosaic": Program(
        names("selective.mask", "sums", "bias")
        | names("selective.selection", "selection", "selecting")
        | names("selective.cotangents", "statistics"),
        gradients(selective_attention),
        attention(1, 64, 64),
        mosaic=True,
    ),
    "selective, decoding": Program(
        names("selective.decode", "decode"),
        decode_selective,
        (
            shape(2, 1, 32, 128),
            shape(2, 1000, 2, 128),
            shape(2, 1000, 2, 128),
            shape(2, 1000, dtype=jnp.float32),
            shape(2, 1, dtype=jnp.int32),
            shape(2, 1000, dtype=jnp.int32),
        ),
    ),
    "selection": Program(
        names(
            "selection.kernels",
            *("block_scores", "affinities", "best_blocks", "log_sum_exp"),
        ),
        select,
        (shape(1, 1024, 32, 128), shape(1, 63, 2, 128), shape(1, 1024, 2, 128)),
    ),
    "2-simplicial": Program(
        names("simplicial.kernels", "forward")
        | names("simplicial.gradient_kernels", "query_gradient", "key_gradient", "sum"),
        gradients(two_simplicial_attention, count=5),
        (shape(1, 1000, 8, 128), *[shape(1, 1000, 2, 128)] * 4),
    ),
    "NSA, decoding": Program(
        names("nsa_decode.kernels", "compressed", "select", "local", "merge"),
        decode,
        (
            shape(2, 1, 32, 192),
            *((shape(2, m, 2, 192), shape(2, m, 2, 128)) for m in (61, 1000, 512)),
            shape(2, 1, 32, 3),
            shape(2, 1, dtype=jnp.int32),
            shape(2, dtype=jnp.int32),
        ),
    ),
}


def name_of(kernel):
    module = kernel.fn.__module__.removeprefix("jattn.pallas.")
    return f"{module}.{kernel.fn.__name__}"


@pytest.mark.parametrize("name", PROGRAMS)
def test_compiles_for_hopper(
    request, monkeypatch, compile_triton, compiled_triton, name
):
    program = PROGRAMS[name]
    monkeypatch.setattr(_triton, "unavailable", lambda *_: None)
    if program.mosaic:
        request.getfixturevalue("without_mosaic_kernels")
    kernels = compile_triton(program.function, *program.shapes)
    assert {name_of(kernel) for kernel in compiled_triton} == program.kernels
    assert len(kernels) == len(program.kernels)
    for _, shared_bytes in kernels.values():
        assert shared_bytes <= 227 * 1024


def test_every_kernel_is_in_a_program():
    modules = pkgutil.walk_packages(jattn.pallas.__path__, "jattn.pallas.")
    found = {
        name_of(member)
        for module in modules
        for member in vars(importlib.import_module(module.name)).values()
        if isinstance(member, triton.JITFunction)
    }
    kernels = {name for name in found if name.endswith("_kernel")}
    assert kernels == set[str]().union(*(x.kernels for x in PROGRAMS.values()))
