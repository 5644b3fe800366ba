"""The numerical gate at the shapes that are measured, on shorter sequences.

Where keys are selected by scores, all forms get the same selection: where two scores
are close, another rounding makes another choice.
"""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import nsa, ops
from jattn.ops import _common
from tests.gpu.gate import assert_passes_gate
from tests.support import temporary_bytes

# With what their cases are given besides.
OPERATIONS = {
    "block_sparse": {},
    "flash": {},
    "nsa": {"blocks_given": True},
    "selective": {},
    "simplicial": {},
}
KERNELS = ("jattn", "triton", "mosaic")

# Longer than every window and list of blocks, short enough for the fp32 reference.
SHORT = {"batch": 1, "length": 2048}


def measured_shapes():
    """Names of shapes that differ even if they are short, with module and sizes."""
    found = {}
    for operation, others in OPERATIONS.items():
        module = ops.modules()[operation]
        for name, sizes in module.SHAPES.items():
            short = sizes | {x: SHORT[x] for x in SHORT if x in sizes} | others
            if (module, short) not in found.values():
                found[f"{operation}, {name}"] = module, short
    return found


SHAPES = measured_shapes()


def results(case, arrays, cotangent):
    """The output of a case, and the gradients of its arrays."""

    def function(*arrays):
        return case.function(*arrays, *case.constants)

    # A new function each time: which form is traced depends on more than arguments.
    out, pullback = jax.jit(lambda *x: jax.vjp(function, *x))(*arrays)
    return out, *jax.jit(lambda f, x: f(x))(pullback, cotangent.astype(out.dtype))


@pytest.mark.parametrize("name", SHAPES)
def test_numerical_gate(monkeypatch, name):
    module, sizes = SHAPES[name]
    cases = {x: case for x, case in module.cases(**sizes).items() if x in KERNELS}
    first = next(iter(cases.values()))
    out = jax.eval_shape(first.function, *first.arrays, *first.constants)
    # Drawn in 16 bits it would have 128 values with a mean of -0.012: products with
    # one number are then rounded in the same direction more often than not, and sums
    # over many heads add that up.
    cotangent = jax.random.normal(jax.random.key(9), out.shape).astype(out.dtype)
    actual = {x: results(case, case.arrays, cotangent) for x, case in cases.items()}
    monkeypatch.setattr(_common, "choose_implementation", lambda *_: "xla")
    plain = results(first, first.arrays, cotangent)
    with jax.default_matmul_precision("highest"):
        exact = [x.astype(jnp.float32) for x in first.arrays]
        reference = results(first, exact, cotangent)
    for case, found in actual.items():
        print(case)
        assert_passes_gate(found, plain, reference)


def test_memory_of_native_sparse_attention():
    sizes = nsa.SHAPES["64/4, 64k"]
    arrays = jax.eval_shape(lambda: nsa.cases(**sizes)["jattn"].arrays)
    # The queries are 1 GiB, as is the output of every branch.
    assert temporary_bytes(nsa.native_sparse, *arrays) < 2e9
