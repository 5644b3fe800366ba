"""What each scheme computes: pure functions of arrays, without parameters."""

from jattn.ops.block_sparse import block_sparse_attention
from jattn.ops.compressed import (
    compressed_attention,
    nsa_window_means,
    nsa_windows,
)
from jattn.ops.dense import dense_attention
from jattn.ops.long_conv import long_conv
from jattn.ops.moba import (
    key_convolution,
    mixture_of_block_attention,
    moba_select_blocks,
)
from jattn.ops.monarch import (
    causal_monarch_conv,
    causal_monarch_factors,
    monarch_from_dense,
    monarch_matmul,
)
from jattn.ops.nsa import native_sparse_attention
from jattn.ops.nsa_selection import nsa_select_blocks
from jattn.ops.selective import (
    selection_mask,
    selective_attention,
    selective_eviction,
    selective_memory,
    selective_skipped,
)
from jattn.ops.selective_sharded import (
    selective_attention_over_heads,
    selective_attention_over_sequence,
)
from jattn.ops.simplicial import two_simplicial_attention

__all__ = [
    "block_sparse_attention",
    "causal_monarch_conv",
    "causal_monarch_factors",
    "compressed_attention",
    "dense_attention",
    "key_convolution",
    "long_conv",
    "mixture_of_block_attention",
    "moba_select_blocks",
    "monarch_from_dense",
    "monarch_matmul",
    "native_sparse_attention",
    "nsa_select_blocks",
    "nsa_window_means",
    "nsa_windows",
    "selection_mask",
    "selective_attention",
    "selective_attention_over_heads",
    "selective_attention_over_sequence",
    "selective_eviction",
    "selective_memory",
    "selective_skipped",
    "two_simplicial_attention",
]
