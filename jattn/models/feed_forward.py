"""Feed-forward layers: SwiGLU, and a mixture of SwiGLU experts."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import dtypes

from jattn.ops import _common

_EXPERT_INIT = nn.initializers.lecun_normal(batch_axis=(0,))


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))``, without biases.

    Attributes:
      hidden: Width of gate and up.
      dtype: Of the computation; that of the input and parameters if None.
      param_dtype: Of the parameters.
    """

    hidden: int
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [..., features] to the same shape."""

        def dense(width, name):
            return nn.Dense(
                width,
                use_bias=False,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                name=name,
            )

        gate = nn.silu(dense(self.hidden, "gate")(x))
        return dense(x.shape[-1], "down")(gate * dense(self.hidden, "up")(x))


class MixtureOfExperts(nn.Module):
    """Each token goes to its best experts, and to the shared ones in any case.

    ``y = shared(x) + Σ_{e in top-k of s} s_e expert_e(x)`` with ``s = softmax(r x)``
    over all experts (not normalised again over the chosen ones, so that the router
    learns even if there is one of them). No expert has a capacity: no token is
    dropped, and what a token gets does not depend on the others.

    Sows the load-balance loss ("losses", "load_balance") of the Switch Transformer,
    ``E Σ_e f_e P_e``, where f_e is the share of assignments that expert e received
    and P_e its mean probability; it is 1 when both are uniform.

    Attributes:
      num_experts: Routed experts E.
      experts_per_token: How many of them a token goes to.
      hidden: Width of one expert.
      num_shared_experts: Experts that see every token.
      dtype: Of the computation; that of the input and parameters if None. The router
        is computed in fp32 (fp64 for fp64).
      param_dtype: Of the parameters.
    """

    num_experts: int
    experts_per_token: int
    hidden: int
    num_shared_experts: int = 0
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [..., features] to the same shape."""
        _common.check_positive(
            num_experts=self.num_experts, experts_per_token=self.experts_per_token
        )
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token may not exceed num_experts={self.num_experts}; "
                f"got {self.experts_per_token}"
            )
        tokens = x.reshape(-1, x.shape[-1])  # [M, features]
        scores, chosen = self._route(tokens)  # [M, k] each
        out = self._experts(tokens, scores, chosen)
        if self.num_shared_experts:
            # Experts that all see the same token are one expert of their total width.
            out += SwiGLU(
                self.num_shared_experts * self.hidden,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                name="shared",
            )(tokens)
        return out.reshape(x.shape)

    def _route(self, tokens):
        """Scores and indices [M, k] of the experts of each token."""
        dtype = _common.statistics_dtype(tokens)
        kernel = self.param(
            "router",
            nn.initializers.lecun_normal(),
            (tokens.shape[-1], self.num_experts),
            self.param_dtype,
        )
        logits = jnp.matmul(
            tokens.astype(dtype),
            kernel.astype(dtype),
            precision=jax.lax.Precision.HIGHEST,
        )
        probabilities = jax.nn.softmax(logits)
        scores, chosen = jax.lax.top_k(probabilities, self.experts_per_token)
        if not self.is_initializing():
            share = jnp.mean(jax.nn.one_hot(chosen, self.num_experts), axis=(0, 1))
            loss = self.num_experts * jnp.sum(share * jnp.mean(probabilities, axis=0))
            self.sow("losses", "load_balance", loss)
        return scores, chosen

    def _experts(self, tokens, scores, chosen):
        """Sum over each token's experts, weighted by their scores."""
        features, k = tokens.shape[-1], self.experts_per_token

        def kernels(name, *shape):
            shape = (self.num_experts, *shape)
            return self.param(name, _EXPERT_INIT, shape, self.param_dtype)

        gate = kernels("gate", features, self.hidden)
        up = kernels("up", features, self.hidden)
        down = kernels("down", self.hidden, features)
        tokens, gate, up, down = dtypes.promote_dtype(
            tokens, gate, up, down, dtype=self.dtype
        )
        # Assignments sorted by expert; repeating before permuting keeps the gradient
        # of the gather free of colliding, unordered additions.
        order = jnp.argsort(chosen.reshape(-1))
        inverse = jnp.argsort(order)
        sizes = jnp.bincount(chosen.reshape(-1), length=self.num_experts)
        sizes = sizes.astype(jnp.int32)
        grouped = jnp.repeat(tokens, k, axis=0)[order]  # [M k, features]
        hidden = nn.silu(jax.lax.ragged_dot(grouped, gate, sizes))
        hidden *= jax.lax.ragged_dot(grouped, up, sizes)
        out = jax.lax.ragged_dot(hidden, down, sizes)[inverse]
        out = out.reshape(-1, k, features) * scores[..., None].astype(out.dtype)
        return jnp.sum(out, axis=1)
