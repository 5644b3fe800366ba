"""The numerical gate of the kernels, and what tests on a GPU share besides.

The error of a kernel against the fp32 reference may be at most twice that of the jnp
form in the kernel's own dtype, for the output and every gradient.
"""

import jax
import numpy as np

from tests.support import relative_rms

# No error may be larger, whatever that of the jnp form is.
LARGEST_ERROR = 5e-3

# That of numbers which are right but for rounding in fp32.
ROUNDING = 2e-6


def assert_passes_gate(actual, plain, reference):
    """Asserts small errors in lists of results, of which plain is the jnp form's."""
    for i, expected in enumerate(reference):
        finite = np.isfinite(expected)
        np.testing.assert_array_equal(actual[i][~finite], expected[~finite])
        x, y, z = (
            np.asarray(a, np.float32)[finite] for a in (actual[i], plain[i], expected)
        )
        if not np.any(z):
            # A gradient that is zero but for rounding has no relative error.
            assert np.max(np.abs(x), initial=0) <= 2 * np.max(np.abs(y), initial=0), i
            continue
        error, allowed = relative_rms(x, z), 2 * relative_rms(y, z)
        print(f"result {i}: {error:.1e}, allowed {allowed:.1e}")
        assert error <= max(allowed, ROUNDING), i
        assert error <= LARGEST_ERROR, i


def rounded(function, *arguments):
    """The value of function(*arguments), where XLA rounds whatever has few bits.

    Otherwise it may compute in fp32 what is only rounded to 16 bits in between, and a
    jnp form without any error is no measure of one in 16 bits.
    """
    program = jax.jit(function).lower(*arguments)
    options = {"xla_allow_excess_precision": False}
    return program.compile(compiler_options=options)(*arguments)


def calls_kernel(function, *arguments):
    """Whether a Triton kernel is in the program of function(*arguments)."""
    return "triton_kernel_call" in str(jax.make_jaxpr(function)(*arguments))
