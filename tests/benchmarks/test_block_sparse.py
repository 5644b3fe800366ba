"""The cases of block-sparse attention, small and on a CPU."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import block_sparse, moba, nsa
from jattn import block_sparse_attention
from tests.support import relative_rms

SMALL = dict(length=70, heads=4, kv_heads=2, block_size=16, num_blocks=3, width=16)


def test_blocks_are_distinct_and_count_as_many_pairs_as_they_hold():
    blocks = block_sparse.random_blocks(70, 2, 16, 3)
    key = jnp.zeros((1, 70, 2, 16))
    # With all logits equal, the log-sum-exp counts what a query sees.
    _, lse = block_sparse_attention(
        key, key, key, blocks, block_size=16, return_lse=True
    )
    seen = np.exp(lse).sum(axis=(0, 1))
    np.testing.assert_allclose(seen, block_sparse.selected_pairs(70, 16, 3), rtol=1e-5)


def test_cases_run():
    for cases in (
        block_sparse.cases(**SMALL, implementation="xla"),
        moba.cases(**SMALL),
    ):
        case = cases["jattn"]
        out = case.function(*case.arrays, *case.constants)
        assert out.shape == (1, 70, 4, 16)
        assert np.all(np.isfinite(out))
        dense = cases["cudnn"]
        assert [x.shape for x in dense.arrays] == [x.shape for x in case.arrays]
        assert 0 < case.flops < dense.flops
        assert case.backward_flops == 2.5 * case.flops


def test_blocks_that_are_given_are_those_that_would_be_chosen():
    sizes = dict(length=100, heads=2, kv_heads=1, width=16)
    case = nsa.cases(**sizes, blocks_given=True)["jattn"]
    (blocks,) = case.constants
    assert blocks.shape == (1, 100, 1, nsa.NUM_BLOCKS)
    run = jax.jit(case.function)
    chosen, given = run(*case.arrays), run(*case.arrays, blocks)
    assert relative_rms(given, chosen) <= 5e-3
    # Others make a difference: it is these that are read.
    others = run(*case.arrays, jnp.zeros_like(blocks))
    assert relative_rms(others, chosen) > 0.1
