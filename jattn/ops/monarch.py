"""Monarch matrices: products, projection of dense ones, and the causal ones.

A Monarch matrix of order p acts on an index of p digits and mixes one digit at a time,
so that a vector of N = b^p numbers costs p b N products. The Fourier transform is one.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jattn.ops import _common


def monarch_matmul(x: jax.Array, *factors: jax.Array) -> jax.Array:
    """Product of a Monarch matrix with vectors: ``y = M x``.

    Order 2, with input index ``j = j1 J + j0`` and output index ``i = i1 I + i0``::

        M[i, j] = left[i0, i1, j0] right[j0, i0, j1]

    Order 3, with ``j = (j2 K + j1) J + j0`` and ``i = (i2 P + i1) I + i0``::

        M[i, j] = left[i0, i1, i2, j0] middle[j0, i0, i1, j1] right[j0, j1, i0, j2]

    Args:
      x: [..., number of columns], real or complex.
      *factors: left [I, P, J], right [J, I, Q] of an M [P I, Q J], or left
        [I, P, R, J], middle [J, I, P, K], right [J, K, I, Q] of an M [R P I, Q K J].

    Returns:
      [..., number of rows] in the common dtype; sums are fp32 for 16-bit inputs.

    Raises:
      ValueError: There are not two or three factors, or shapes do not fit.
    """
    letters = {2: ("IPJ", "JIQ"), 3: ("IPRJ", "JIPK", "JKIQ")}.get(len(factors))
    if letters is None:
        raise ValueError(
            "monarch_matmul takes two factors (left, right) or three (left, middle, "
            f"right); got {len(factors)}"
        )
    names = ("left", "right") if len(factors) == 2 else ("left", "middle", "right")
    sizes = _common.bind_shapes(*zip(names, factors, letters, strict=True))
    digits = [sizes[letter] for letter in ("QJ" if len(factors) == 2 else "QKJ")]
    if x.ndim < 1 or x.shape[-1] != math.prod(digits):
        raise ValueError(
            f"x must have shape [..., {math.prod(digits)}], the columns of the matrix; "
            f"got {list(x.shape)}"
        )
    dtype = jnp.result_type(x, *factors)
    sums = jnp.result_type(jnp.float32, dtype)
    y = x.astype(dtype).reshape(*x.shape[:-1], *digits)
    equations = {
        2: ("...qj,jiq->...ji", "...ji,ipj->...pi"),
        3: ("...qkj,jkiq->...kji", "...kji,jipk->...pji", "...pji,iprj->...rpi"),
    }[len(factors)]
    for equation, factor in zip(equations, reversed(factors), strict=True):
        factor = factor.astype(dtype)
        y = jnp.einsum(equation, y, factor, preferred_element_type=sums).astype(dtype)
    return y.reshape(*x.shape[:-1], -1)


def monarch_from_dense(
    matrix: jax.Array,
    *,
    row_digits: tuple[int, int] | None = None,
    column_digits: tuple[int, int] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The Monarch matrix of order 2 nearest to a dense one in the Frobenius norm.

    For fixed i0 and j0 the entries of M form an outer product, so that each of those
    slices is replaced by its best approximation of rank 1. A matrix that is Monarch
    comes back exactly, up to rounding.

    Args:
      matrix: [P I, Q J], real or complex.
      row_digits: (P, I), the sizes of i1 and i0; both the square root if None.
      column_digits: (Q, J), the sizes of j1 and j0; both the square root if None.

    Returns:
      left [I, P, J] and right [J, I, Q] as `monarch_matmul` takes them, of equal norm
      in every slice.

    Raises:
      ValueError: matrix is no matrix, or its sizes are not the digits' products.
    """
    if matrix.ndim != 2:
        raise ValueError(f"matrix must have two axes; got shape {list(matrix.shape)}")
    p, i = _digits("row", row_digits, matrix.shape[0])
    q, j = _digits("column", column_digits, matrix.shape[1])
    dtype = jnp.result_type(jnp.float32, matrix)
    slices = matrix.astype(dtype).reshape(p, i, q, j).transpose(1, 3, 0, 2)
    columns, singular, rows = jnp.linalg.svd(slices, full_matrices=False)
    root = jnp.sqrt(singular[..., 0, None])  # [I, J, 1]
    left = (columns[..., 0] * root).transpose(0, 2, 1)
    right = (rows[..., 0, :] * root).transpose(1, 0, 2)
    return left.astype(matrix.dtype), right.astype(matrix.dtype)


def _digits(name: str, digits: tuple[int, int] | None, size: int) -> tuple[int, int]:
    root = math.isqrt(size)
    first, second = digits or (root, root)
    if first * second != size:
        needed = "a square number of" if digits is None else f"{first} x {second}"
        raise ValueError(
            f"matrix must have {needed} {name}s; got {size}; {name}_digits=(first, "
            "second) names two sizes whose product it is"
        )
    return first, second


def causal_monarch_factors(
    left_coefficients: jax.Array, right_coefficients: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A Monarch matrix M that makes ``M⁻¹((M k) · (M u))`` causal in u and k.

    Column j1 J + j0 of M holds the values of the polynomial
    ``q(Z) = l_j0(Z) r_j0,j1(Z^J)`` at the N = J Q roots of unity. The product is
    causal for inputs that fill the first N/2 places if every q has no power below j,
    and those of the first half none from N/2 on; coefficients that would break this
    are not used. Ones in ``left[j, j]`` and ``right[:, j, j]`` and 0 elsewhere give the
    Fourier transform.

    Args:
      left_coefficients: [J, J]; [j0, a] is l_j0's coefficient of Z^a, used if a >= j0.
      right_coefficients: [J, Q, Q] with even Q; [j0, j1, a] is r_j0,j1's coefficient
        of Z^a, used if a >= j1 and not both a >= Q/2 and j1 < Q/2. M has an inverse
        if no coefficient with a = j0 or a = j1 is 0.

    Returns:
      Complex left [Q, J, J] and right [J, Q, Q] as `monarch_matmul` takes them.

    Raises:
      ValueError: Shapes do not fit, Q is odd, or a dtype is not floating-point.
    """
    sizes = _common.bind_shapes(
        ("left_coefficients", left_coefficients, "JJ"),
        ("right_coefficients", right_coefficients, "JQQ"),
    )
    _common.check_floating(
        left_coefficients=left_coefficients, right_coefficients=right_coefficients
    )
    j, q = sizes["J"], sizes["Q"]
    if q % 2:
        raise ValueError(
            f"right_coefficients must have an even Q, as half of the places are "
            f"padding; got Q={q}"
        )
    dtype = jnp.result_type(left_coefficients, right_coefficients, jnp.complex64)

    def powers(points, degrees, order):  # w_order^(point * degree)
        turns = np.multiply.outer(points, degrees) % order / order
        return jnp.asarray(np.exp(-2j * np.pi * turns), dtype)

    power = np.arange(q)
    used = (power >= power[:, None]) & ~((power >= q // 2) & (power[:, None] < q // 2))
    # Output i1 Q + i0 is the value at w_N^(i1 Q + i0), whose J-th power is w_Q^i0.
    points = np.arange(q)[:, None] + q * np.arange(j)  # [i0, i1]
    left = jnp.einsum(
        "ipa,ja->ipj",
        powers(points, np.arange(j), j * q),
        jnp.triu(left_coefficients).astype(dtype),
        precision=jax.lax.Precision.HIGHEST,
    )
    right = jnp.einsum(
        "ia,jqa->jiq",
        powers(power, power, q),
        jnp.where(used, right_coefficients, 0).astype(dtype),
        precision=jax.lax.Precision.HIGHEST,
    )
    return left, right


def causal_monarch_conv(
    u: jax.Array,
    kernel: jax.Array,
    left_coefficients: jax.Array,
    right_coefficients: jax.Array,
) -> jax.Array:
    """Causal mixing by a learned Monarch matrix: ``y = M⁻¹((M kernel) · (M u))``.

    M is `causal_monarch_factors` of the coefficients; where it is the Fourier transform
    this is `long_conv`. Causality holds up to the rounding of fp32 (fp64), times the
    condition number of M.

    Args:
      u: [B, L, D] with L at most N/2 = J Q / 2; the rest is padding.
      kernel: [K, D]; past the last one 0, from L on unused.
      left_coefficients: [J, J].
      right_coefficients: [J, Q, Q] with even Q.

    Returns:
      [B, L, D] in u's dtype.

    Raises:
      ValueError: Shapes or dtypes do not fit, or u is too long.
    """
    sizes = _common.bind_shapes(("u", u, "BLD"), ("kernel", kernel, "KD"))
    _common.check_floating(u=u, kernel=kernel)
    left, right = causal_monarch_factors(left_coefficients, right_coefficients)
    length, size = sizes["L"], left.shape[1] * left.shape[0]
    if 2 * length > size:
        raise ValueError(
            f"u may have at most N/2={size // 2} positions for coefficients of "
            f"N={size}; got L={length}"
        )

    def transform(x):  # [..., L, D] -> [..., D, N]
        x = jnp.moveaxis(x, -2, -1)[..., :length].astype(left.real.dtype)
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])])
        with jax.default_matmul_precision("highest"):
            return monarch_matmul(x, left, right)

    y = _monarch_solve(transform(kernel) * transform(u), left, right)
    return jnp.moveaxis(y.real[..., :length], -1, -2).astype(u.dtype)


def _monarch_solve(y, left, right):
    """The x of ``M x = y`` [..., N] for a square M of square blocks."""
    q, j = left.shape[:2]
    columns = y.reshape(-1, j, q)  # [batch, i1, i0]
    inner = jnp.linalg.solve(left, columns.transpose(2, 1, 0))  # [i0, j0, batch]
    x = jnp.linalg.solve(right, inner.transpose(1, 0, 2))  # [j0, j1, batch]
    return x.transpose(2, 1, 0).reshape(y.shape)
