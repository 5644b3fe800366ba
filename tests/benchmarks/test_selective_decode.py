"""What the benchmark of decoding with a pruned cache says of the cache."""

import pytest

from benchmarks import selective_decode


@pytest.mark.parametrize("name", selective_decode.SHAPES)
def test_the_cache_is_an_eighth_of_a_dense_one(name):
    share = selective_decode.cache_share(**selective_decode.SHAPES[name])
    # Beside keys and values, a slot has its position and its number of F.
    assert 1 / 8 < share < 1.01 / 8
