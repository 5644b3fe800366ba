"""What the tests of the block-sparse kernels in Mosaic share."""

import contextlib

import numpy as np

from jattn.pallas import tuning


def random_blocks(t, s, k, n, seed):
    """Blocks of 64 keys in [1, t, k, n], some of them none or repeated."""
    rng = np.random.default_rng(seed)
    return rng.integers(-1, -(-s // 64), (1, t, k, n))


@contextlib.contextmanager
def chosen(monkeypatch, module, **tilings):
    """Makes a module use Mosaic, interpreted, with these tilings, or fails."""
    monkeypatch.setattr(module, "unsupported_mosaic", lambda *_: None)
    with contextlib.ExitStack() as stack:
        forced = [
            stack.enter_context(tuning.force(name, tiling))
            for name, tiling in tilings.items()
        ]
        yield
    assert all(forced), "another kernel was used"
