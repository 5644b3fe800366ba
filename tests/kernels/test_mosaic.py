"""jattn.pallas._mosaic: one kernel for GPUs and for Pallas' interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jattn.pallas import _device, _mosaic
from tests.support import normal, relative_rms

SIZE = 64
TILES = (plgpu.TilingTransform((8, SIZE)), plgpu.SwizzleTransform(128))


def matmul(x, y, *, commit=True):
    """The product of bf16 matrices [64, 64]; wrong if it does not commit."""

    def body(x_ref, y_ref, out_ref, x_tile, y_tile, out_tile, barriers):
        for ref, tile, i in ((x_ref, x_tile, 0), (y_ref, y_tile, 1)):
            plgpu.copy_gmem_to_smem(ref, tile, barriers.at[i])
            plgpu.barrier_wait(barriers.at[i])

        def multiply(total):
            plgpu.wgmma(total, x_tile, y_tile)
            return total[...]

        total = pl.run_scoped(multiply, plgpu.ACC((SIZE, SIZE), jnp.float32))
        out_tile[...] = total.astype(out_tile.dtype)
        if commit:
            plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_tile, out_ref)
        plgpu.wait_smem_to_gmem(0)

    tile = plgpu.SMEM((SIZE, SIZE), jnp.bfloat16, transforms=TILES)
    return plgpu.kernel(
        body,
        interpret=_mosaic.interpretation(),
        out_type=jax.ShapeDtypeStruct((SIZE, SIZE), jnp.bfloat16),
        scratch_types=[tile, tile, tile, plgpu.Barrier(num_barriers=2)],
    )(x, y)


@pytest.mark.usefixtures("no_races")
def test_interpreter_runs_the_kernel():
    x, y = normal(0, (2, SIZE, SIZE), (2, SIZE, SIZE), dtype=jnp.bfloat16)
    actual = jax.jit(jax.vmap(matmul))(x, y)
    assert relative_rms(actual, jnp.matmul(x, y)) <= 5e-3


def test_interpreter_finds_races(capsys):
    x, y = normal(0, (SIZE, SIZE), (SIZE, SIZE), dtype=jnp.bfloat16)
    try:
        np.asarray(matmul(x, y, commit=False))
        found = capsys.readouterr().out  # JAX 0.11 prints
    except jax.errors.JaxRuntimeError as error:  # JAX 0.12 raises
        found = str(error)
    assert "RACE DETECTED" in found


def test_lowers_for_hopper(lower_for_h100):
    shape = jax.ShapeDtypeStruct((SIZE, SIZE), jnp.bfloat16)
    text = lower_for_h100(matmul, shape, shape)
    assert "mosaic_gpu_v2" in text
    assert "wgmma" in text


def test_says_what_is_missing(monkeypatch, request):
    assert "needs a GPU" in _mosaic.unavailable()
    request.getfixturevalue("beside_a_gpu")
    assert _mosaic.unavailable() is None
    monkeypatch.setattr(_device, "compute_capability", lambda: 100)
    assert "9.0 only, and this GPU (NVIDIA H100 PCIe) has 10.0" in _mosaic.unavailable()


@pytest.mark.usefixtures("beside_a_gpu")
def test_a_default_device_decides_where_kernels_run():
    assert _mosaic.interpretation() is None
    for device in ("cpu", jax.devices("cpu")[1]):
        with jax.default_device(device):
            assert "JAX runs on 'cpu'" in _mosaic.unavailable()
            assert _mosaic.interpretation() is not None
    x, y = normal(0, (SIZE, SIZE), (SIZE, SIZE), dtype=jnp.bfloat16)
    with jax.default_device("cpu"):
        assert relative_rms(jax.jit(matmul)(x, y), x @ y) <= 5e-3
