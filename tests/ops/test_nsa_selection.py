"""The blocks that native sparse attention selects, in cases worked out by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from tests.support import normal

SIZES = {"kernel_size": 4, "stride": 2, "block_size": 4, "num_blocks": 4}


@pytest.mark.parametrize(
    ("sizes", "weights"),
    [((32, 16, 64), [1, 2, 2, 2, 1]), ((16, 16, 16), [1]), ((16, 8, 16), [1, 2, 1])],
)
def test_a_block_is_scored_by_its_overlap_with_windows(sizes, weights):
    """One window far above the others makes its blocks win by overlap alone."""
    kernel_size, stride, block_size = sizes
    length = 9 * block_size
    m = (length - kernel_size) // stride + 1
    query = jnp.ones((1, 1, 1, 1))
    for i in range(m - 1):
        key = jnp.zeros((1, m, 1, 1)).at[0, i].set(100.0)
        blocks = jattn.nsa_select_blocks(
            query,
            key,
            kernel_size=kernel_size,
            stride=stride,
            block_size=block_size,
            num_blocks=2,
            num_initial=0,
            num_local=1,
            length=length,
        )
        # Weights of window i in block j, for j's windows from the first that overlaps.
        first = [j * block_size // stride - kernel_size // stride + 1 for j in range(9)]
        shares = [weights[i - f] if 0 <= i - f < len(weights) else 0 for f in first]
        expected = int(np.argmax(shares[:8])) if any(shares[:8]) else 0
        np.testing.assert_array_equal(blocks[0, 0, 0], [expected, 8])


def test_forced_blocks_are_there_and_counted_once():
    query, key = normal(0, (1, 64, 2, 8), (1, 31, 1, 8))
    blocks = np.asarray(jattn.nsa_select_blocks(query, key, **SIZES))
    for t in range(64):
        (mine,) = blocks[0, t]
        valid = mine[mine >= 0]
        own = t // SIZES["block_size"]
        assert len(valid) == min(4, own + 1)
        assert np.all(np.diff(valid) > 0)
        assert set(valid) >= {0, own, max(0, own - 1)}
        assert valid[-1] == own
        np.testing.assert_array_equal(mine[len(valid) :], -1)


def test_ties_go_to_the_lower_index():
    query, key = jnp.ones((1, 64, 2, 8)), jnp.zeros((1, 16, 1, 8))
    blocks = jattn.nsa_select_blocks(
        query, key, kernel_size=4, stride=4, block_size=4, num_blocks=5
    )
    np.testing.assert_array_equal(blocks[0, 63, 0], [0, 1, 2, 14, 15])


def test_visible_blocks_of_score_zero_come_before_invisible_ones():
    """One window takes all probability; the others underflow to 0."""
    query = jnp.ones((1, 40, 1, 1))
    key = jnp.zeros((1, 10, 1, 1)).at[0, 6].set(1e4)
    blocks = jattn.nsa_select_blocks(
        query, key, kernel_size=4, stride=4, block_size=4, num_blocks=8
    )
    np.testing.assert_array_equal(blocks[0, 39, 0], [0, 1, 2, 3, 4, 6, 8, 9])
    np.testing.assert_array_equal(blocks[0, 27, 0], [0, 1, 2, 3, 4, 5, 6, -1])
