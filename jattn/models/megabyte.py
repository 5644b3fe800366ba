"""MEGABYTE: a global model over patches of bytes, a local model inside each patch."""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from jattn.models import blocks
from jattn.models.blocks import BlockStack
from jattn.models.embedding import embed
from jattn.models.patches import CrossPatchAttention, PatchGrid, slide, take
from jattn.nn import cache as caches
from jattn.ops import _common

_EMBEDDING_INIT = nn.initializers.normal(0.02)


class MegabyteCache(struct.PyTreeNode):
    """What decoding needs of the bytes before.

    Attributes:
      global_blocks: Caches of the global layers, over patches.
      local_blocks: Caches of the local layers, of the current patch only (with
        cross-patch attention also of the end of the one before).
      recent: int32 [B, R], the bytes that the next patch's embedding may need.
      patch: [B, P, D_L], what the global stage says about the current patch.
      length: int32 [B], tokens seen so far.
    """

    global_blocks: tuple[Any, ...]
    local_blocks: tuple[Any, ...]
    recent: jax.Array
    patch: jax.Array
    length: jax.Array


class Megabyte(nn.Module):
    """MEGABYTE (arXiv 2305.07185), equations (1) to (6).

    With patches of P bytes, k = t div P and p = t mod P::

        h[t]      = Eg[x[t]] + Epos[t]                                        (1)
        gin[k]    = gpad if k = 0, else concat(h[(k-1)P : kP])                (2)
        gout      = global_stage(gin)                                         (3)
        lin[k, p] = w_gl gout[k, p] + (lpad if p = 0, else El[x[kP+p-1]])     (4)
        lout[k]   = local_stage(lin[k])                                       (5)
        logits[t] = El lout[k, p]                                             (6)

    The global stage is P D_G wide, the local one D_L. As fed token by token, the start
    symbol bos_id only says that a document begins: what the stages see there is the
    pads.

    Packed documents (segment_ids) never see each other. Positions count from the start
    of each document. A document that begins with a patch is treated as if it were
    alone. One that begins inside a patch gets gout of the pad there, as in its first
    patch when it is alone, begins with lpad, and sees only its own bytes of that patch;
    in the global input of the next patch, bytes of other documents are replaced by
    gpad.

    Attributes:
      bos_id: Fed before the first byte of a document; may lie outside the vocabulary.
      patch_size: Bytes of a patch, P.
      global_stage: Blocks over patches, of features P D_G.
      local_stage: Blocks inside a patch, of features D_L.
      vocab_size: Tokens, V.
      max_length: Longest row, which the table of absolute positions needs; None with
        rotary ones.
      positions: "absolute": Epos as in (1) and no rotary embedding in the stages, but
        for local layers with cross_patch. "rope": no Epos; the stages' mixers rotate.
      local_positions: Whether lin also has a trained term for each p.
      pads: "trainable", or "id": both pads are embeddings of bos_id.
      order: "embed_then_shift" as in (1) and (2). "shift_then_embed" gives positions
        after the shift by one patch, so that the pads have some too: byte t gets
        Epos[t + P], gpad Epos[0 : P].
      global_to_local: Whether there is w_gl; without it D_G must equal D_L.
      tie_embeddings: Whether the logits' matrix is El, or one of its own.
      cross_patch: Last keys and values of the previous patch that each local layer,
        which must be "dense", also attends to; 0 as in the equations.
      conv_kernels: Widths of causal convolutions over h before it is cut into patches,
        each added to its input after a ReLU; (3, 5, 7) in the paper, () as in the
        equations.

    Raises:
      ValueError: On construction, if fields do not fit each other.
    """

    bos_id: int
    patch_size: int
    global_stage: BlockStack
    local_stage: BlockStack
    vocab_size: int = 256
    max_length: int | None = None
    positions: Literal["absolute", "rope"] = "absolute"
    local_positions: bool = False
    pads: Literal["trainable", "id"] = "trainable"
    order: Literal["embed_then_shift", "shift_then_embed"] = "embed_then_shift"
    global_to_local: bool = True
    tie_embeddings: bool = True
    cross_patch: int = 0
    conv_kernels: tuple[int, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "conv_kernels", tuple(self.conv_kernels))
        _common.check_positive(
            vocab_size=self.vocab_size,
            patch_size=self.patch_size,
            max_length=self.max_length,
        )
        blocks.check_bos_id(self.bos_id)
        for width in self.conv_kernels:
            _common.check_positive(conv_kernels=width)
        for name, value, known in (
            ("positions", self.positions, ("absolute", "rope")),
            ("pads", self.pads, ("trainable", "id")),
            ("order", self.order, ("embed_then_shift", "shift_then_embed")),
        ):
            if value not in known:
                raise ValueError(
                    f"{name} must be {known[0]!r} or {known[1]!r}; got {value!r}"
                )
        if (self.positions == "absolute") != (self.max_length is not None):
            raise ValueError(
                "positions='absolute' needs max_length and positions='rope' has none; "
                f"got positions={self.positions!r}, max_length={self.max_length}"
            )
        if self.global_stage.features % self.patch_size:
            raise ValueError(
                "global_stage.features must be a multiple of "
                f"patch_size={self.patch_size}; got {self.global_stage.features}"
            )
        widths = self.global_features, self.local_stage.features
        if not self.global_to_local and widths[0] != widths[1]:
            raise ValueError(
                "without global_to_local the global width of a byte must equal the "
                f"local width; got {widths[0]} and {widths[1]}"
            )
        if not 0 <= self.cross_patch <= self.patch_size:
            raise ValueError(
                f"cross_patch must be between 0 and patch_size={self.patch_size}; got "
                f"{self.cross_patch}"
            )
        if self.cross_patch and set(self.local_stage.pattern()) != {"dense"}:
            raise ValueError(
                "cross_patch is a form of dense attention and needs local_stage.mixers="
                f"'dense'; got {self.local_stage.mixers!r}"
            )
        # Options of a mixer that do not fit are reported here too.
        self._global_stack(parent=None)
        self._local_stack(parent=None)
        super().__post_init__()

    @property
    def dtype(self) -> Any:
        """Of the computation: that of the global stage."""
        return self.global_stage.dtype

    @property
    def param_dtype(self) -> Any:
        """Of the parameters: that of the global stage."""
        return self.global_stage.param_dtype

    @property
    def global_features(self) -> int:
        """Global width of one byte, D_G."""
        return self.global_stage.features // self.patch_size

    def _global_stack(self, **options) -> BlockStack:
        """The global stage with the positions this model gives it."""
        stage = self.global_stage
        if self.positions == "absolute":
            options["mixer_options"] = stage.options_without_rope()
        return blocks.copy_stack(stage, **options)

    def _local_stack(self, **options) -> BlockStack:
        """The local stage with the positions and mixers this model gives it."""
        stage = self.local_stage
        if self.cross_patch:
            mixer = CrossPatchAttention
            own = {"patch_size": self.patch_size, "overlap": self.cross_patch}
            options["mixers"] = (mixer,)
            options["mixer_options"] = {
                mixer: own | dict(stage.mixer_options.get("dense", {}))
            }
        elif self.positions == "absolute":
            options["mixer_options"] = stage.options_without_rope()
        return blocks.copy_stack(stage, **options)

    def init_cache(
        self, batch_size: int, max_length: int, dtype: Any = jnp.float32
    ) -> MegabyteCache:
        """An empty cache for up to max_length tokens a row, bos_id included."""
        self._check_length(max_length)
        patches = -(-max_length // self.patch_size)
        history = self.patch_size - 1 + sum(width - 1 for width in self.conv_kernels)
        return MegabyteCache(
            global_blocks=self._global_stack(parent=None).init_cache(
                batch_size, patches, dtype
            ),
            local_blocks=self._local_stack(parent=None).init_cache(
                batch_size, self.patch_size, dtype
            ),
            recent=jnp.zeros((batch_size, history), jnp.int32),
            patch=jnp.zeros(
                (batch_size, self.patch_size, self.local_stage.features), dtype
            ),
            length=jnp.zeros(batch_size, jnp.int32),
        )

    def setup(self):
        """Makes the parameters."""
        size, width = self.patch_size, self.global_features
        local_width = self.local_stage.features
        # bos_id is embedded only where it is the pad.
        rows = self.vocab_size
        if self.pads == "id":
            rows = max(rows, self.bos_id + 1)
        table = self._table
        self.global_embedding = table("global_embedding", rows, width)
        self.local_embedding = table("local_embedding", rows, local_width, local=True)
        if self.pads == "trainable":
            self.global_pad = table("global_pad", size, width)
            self.local_pad = table("local_pad", local_width, local=True)
        else:
            self.global_pad = jnp.tile(self.global_embedding[self.bos_id], (size, 1))
            self.local_pad = self.local_embedding[self.bos_id]
        if self.max_length is not None:
            self.global_positions = table(
                "global_positions", -(-self.max_length // size) * size, width
            )
        if self.local_positions:
            self.slot_positions = table(
                "local_positions", size, local_width, local=True
            )
        if self.global_to_local:
            self.projection = nn.Dense(
                local_width,
                use_bias=False,
                dtype=self.local_stage.dtype,
                param_dtype=self.local_stage.param_dtype,
                name="global_to_local",
            )
        self.convolutions = [
            self.param(
                f"conv_{index}",
                nn.initializers.lecun_normal(in_axis=(0, 1)),
                (kernel, width, width),
                self.global_stage.param_dtype,
            )
            for index, kernel in enumerate(self.conv_kernels)
        ]
        self.global_blocks = self._global_stack(name="global_blocks")
        self.local_blocks = self._local_stack(name="local_blocks")
        if not self.tie_embeddings:
            self.head = self.param(
                "head",
                nn.initializers.lecun_normal(),
                (local_width, self.vocab_size),
                self.local_stage.param_dtype,
            )

    def _table(self, name, *shape, local=False):
        stage = self.local_stage if local else self.global_stage
        table = self.param(name, _EMBEDDING_INIT, shape, stage.param_dtype)
        return table if stage.dtype is None else table.astype(stage.dtype)

    def score(
        self, tokens: jax.Array, segment_ids: jax.Array | None = None
    ) -> jax.Array:
        """Logits of each byte given what precedes it in its document.

        Args:
          tokens: int [B, T], for any T.
          segment_ids: int [B, T], the document of each byte; documents are contiguous
            and never see each other. One document a row if None.

        Returns:
          [B, T, V] in fp32.

        Raises:
          ValueError: Shapes do not fit, or T exceeds max_length.
        """
        blocks.check_tokens(tokens, segment_ids)
        previous = blocks.shift_right(tokens, self.bos_id, segment_ids)
        return self(previous, segment_ids=segment_ids)

    def __call__(
        self,
        tokens: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        cache: MegabyteCache | None = None,
        lengths: jax.Array | None = None,
    ) -> Any:
        """Logits of the byte after each token.

        Args:
          tokens: int [B, T]; each document begins with bos_id.
          segment_ids: int [B, T], the document of each token; not with a cache.
          cache: What came before, from init_cache or an earlier call.
          lengths: int32 [B], how many of the T tokens of each row are real; the rest
            is padding on the right and leaves no trace in the cache. All if None.
            Only with a cache.

        Returns:
          [B, T, V] in fp32, and the new cache if one was given.

        Raises:
          ValueError: Shapes do not fit, or T exceeds max_length.
        """
        blocks.check_tokens(tokens, segment_ids)
        caches.check_call(segment_ids, cache, lengths)
        if cache is None:
            self._check_length(tokens.shape[1])
            return self._logits(self._parallel(tokens, segment_ids))
        lengths = caches.all_real(lengths, *tokens.shape)
        out, cache = self._cached(tokens, cache, lengths)
        return self._logits(out), cache

    def _parallel(self, tokens, segment_ids):
        """Local output [B, T, D_L] of whole rows."""
        b, t = tokens.shape
        size = self.patch_size
        patches = -(-t // size)
        packed = segment_ids is not None
        if not packed:
            segment_ids = jnp.zeros((b, t), jnp.int32)
        # Rows are filled up to whole patches; what the filling gives is cut off.
        tokens, segment_ids = (
            jnp.pad(x, [(0, 0), (0, patches * size - t)], mode="edge")
            for x in (tokens, segment_ids)
        )
        starts = _common.document_starts(segment_ids)
        # Token t is the byte at this place of its document, -1 for bos_id.
        places = jnp.arange(patches * size) - starts - 1
        embedded = self._embed(tokens, places)  # [B, K P, D_G]
        # Patch k gets the P tokens up to its first one, k P.
        before = jnp.pad(embedded, [(0, 0), (size - 1, 0), (0, 0)])
        before = before[:, : patches * size].reshape(b, patches, size, -1)
        inputs = self._patch_inputs(before, places[:, ::size])  # [B, K, P D_G]
        slots = jnp.arange(patches * size) % size
        if packed:
            # Where a document begins inside a patch, the global stage says what it
            # says of a document's first patch: one more patch, a document by itself.
            first = self._patch_inputs(
                jnp.zeros_like(before[:, :1]), jnp.full((b, 1), -1)
            )
            documents = jnp.cumsum(places < 0, axis=1)[:, ::size]
            out = self.global_blocks(
                jnp.concatenate([inputs, first], axis=1),
                segment_ids=jnp.pad(documents, [(0, 0), (0, 1)]),
            )
            out = self._project(out)  # [B, K + 1, P, D_L]
            inside = (places + 1 < slots).reshape(b, patches, size, 1)
            out = jnp.where(inside, out[:, -1:], out[:, :-1])
        else:
            out = self._project(self.global_blocks(inputs))
        out = out.reshape(b, patches * size, -1)
        x = out + self._local_inputs(tokens, slots, (slots > 0) & (places >= 0))
        if self.cross_patch:
            x = self.local_blocks(x, segment_ids=segment_ids if packed else None)
        else:
            x = self.local_blocks(
                x.reshape(b * patches, size, -1),
                segment_ids=segment_ids.reshape(-1, size) if packed else None,
            ).reshape(b, patches * size, -1)
        return x[:, :t]

    def _cached(self, tokens, cache, lengths):
        """Local output [B, T, D_L] of the next tokens, and the cache after them."""
        b, t = tokens.shape
        size = self.patch_size
        grid = PatchGrid(cache.length, lengths, t, size)
        window, recent = slide(cache.recent, tokens, lengths)
        # New patches begin at every P-th token from here.
        first = -grid.phase % size
        begins = first[:, None] + jnp.arange(-(-t // size)) * size
        new_patches = -(-jnp.maximum(lengths - first, 0) // size)

        def run_global(stage, stage_cache):
            held = cache.recent.shape[1]
            places = grid.start[:, None] + jnp.arange(-held, t) - 1
            embedded = self._embed(window, places)
            index = begins[..., None] + held - size + 1 + jnp.arange(size)
            index = jnp.minimum(index, held + t - 1)
            before = take(embedded, index.reshape(b, -1))
            inputs = self._patch_inputs(
                before.reshape(*index.shape, -1), grid.start[:, None] + begins - 1
            )
            out, stage_cache = stage(inputs, cache=stage_cache, lengths=new_patches)
            return out.astype(cache.patch.dtype), stage_cache

        def skip_global(stage, stage_cache):
            shape = (b, begins.shape[1], stage.features)
            return jnp.zeros(shape, cache.patch.dtype), stage_cache

        if t < size and not self.is_initializing():
            # Most steps begin no patch, and then the global stage rests.
            out, global_cache = nn.cond(
                jnp.any(new_patches > 0),
                run_global,
                skip_global,
                self.global_blocks,
                cache.global_blocks,
            )
        else:
            out, global_cache = run_global(self.global_blocks, cache.global_blocks)
        known = self._project(out).astype(cache.patch.dtype)
        # [B, 1 + new patches, P, D_L]
        known = jnp.concatenate([cache.patch[:, None], known], axis=1)
        # The current patch is the first of these, unless a new one begins at once.
        fresh = (grid.phase == 0).astype(jnp.int32)
        last = take(known, (grid.last_patch + fresh)[:, None])[:, 0]
        which = jnp.minimum(grid.patches + fresh[:, None], known.shape[1] - 1)
        rows = jnp.arange(b)[:, None]
        local = self._local_inputs(tokens, grid.slots, grid.slots > 0)
        x = local + known[rows, which, grid.slots].astype(local.dtype)  # [B, T, D_L]
        if self.cross_patch:
            x, local_cache = self.local_blocks(
                x, cache=cache.local_blocks, lengths=lengths
            )
        else:
            x, local_cache = self._cached_local(x, cache.local_blocks, grid)
        cache = MegabyteCache(
            global_blocks=global_cache,
            local_blocks=local_cache,
            recent=recent,
            patch=last,
            length=cache.length + lengths,
        )
        return x, cache

    def _cached_local(self, x, cache, grid):
        """Runs the local stage on every touched patch at once, each a row of its own.

        The first patch goes on from the cache unless it begins here; the cache of the
        last one is kept.
        """
        b, patches = x.shape[0], grid.num_patches
        stack, size = self._local_stack(parent=None), self.patch_size
        empty = stack.init_cache(b * patches, size)
        goes_on = (jnp.arange(patches) == 0) & (grid.phase > 0)[:, None]
        # What all rows share, such as the kernels of long convolutions, just stays.
        one, two = (
            jax.eval_shape(lambda rows=rows: stack.init_cache(rows, size))
            for rows in (1, 2)
        )
        per_row = jax.tree.map(lambda a, b: a.shape != b.shape, one, two)

        def begin(per_row, empty, old):  # [B M, ...] and [B, ...] -> [B M, ...]
            if not per_row:
                return old
            empty = empty.reshape(b, patches, *old.shape[1:]).astype(old.dtype)
            mask = goes_on.reshape(b, patches, *[1] * (old.ndim - 1))
            return jnp.where(mask, old[:, None], empty).reshape(-1, *old.shape[1:])

        def keep(per_row, new):  # [B M, ...] -> [B, ...]
            if not per_row:
                return new
            new = new.reshape(b, patches, *new.shape[1:])
            return new[jnp.arange(b), jnp.maximum(grid.last_patch, 0)]

        split = grid.split(x)  # [B, M, Q, D_L]
        out, new = self.local_blocks(
            split.reshape(b * patches, *split.shape[2:]),
            cache=jax.tree.map(begin, per_row, empty, cache),
            lengths=grid.counts.reshape(-1),
        )
        return grid.join(out.reshape(*split.shape[:3], -1)), jax.tree.map(
            keep, per_row, new
        )

    def _embed(self, tokens, places):
        """Returns h [B, S, D_G] of bytes at these places of their documents, or 0.

        There is no byte where the place is negative.
        """
        real = (places >= 0)[..., None]
        x = embed(self.global_embedding, jnp.where(places >= 0, tokens, 0))
        if self.positions == "absolute":
            shift = self.patch_size if self.order == "shift_then_embed" else 0
            x = x + embed(self.global_positions, jnp.maximum(places + shift, 0))
        x = jnp.where(real, x, 0)
        for kernel in self.convolutions:
            taps = []
            for lag in range(kernel.shape[0]):
                # A byte's document begins `places` before it.
                earlier = jnp.pad(x, [(0, 0), (lag, 0), (0, 0)])[:, : x.shape[1]]
                taps.append(jnp.where((places >= lag)[..., None], earlier, 0))
            x = x + nn.relu(
                jnp.einsum("lbsd,ldf->bsf", jnp.stack(taps), kernel.astype(x.dtype))
            )
        return x

    def _patch_inputs(self, before, places):
        """Global input [B, K, P D_G].

        Args:
          before: h [B, K, P, D_G] of the P bytes before each patch.
          places: int [B, K], place in its document of the last of them, -1 where the
            patch begins one.
        """
        size = self.patch_size
        own = jnp.arange(size) - (size - 1) + places[..., None]  # place of each slot
        pad = self.global_pad
        if self.positions == "absolute" and self.order == "shift_then_embed":
            pad = pad + embed(self.global_positions, jnp.maximum(own + size, 0))
        inputs = jnp.where((own >= 0)[..., None], before, pad)
        return inputs.reshape(*inputs.shape[:2], -1)

    def _project(self, out):
        """Global output [B, K, P D_G] as [B, K, P, D_L]."""
        out = out.reshape(*out.shape[:2], self.patch_size, -1)
        return self.projection(out) if self.global_to_local else out

    def _local_inputs(self, tokens, slots, has_previous):
        """The byte's part of lin, [B, T, D_L]."""
        x = embed(self.local_embedding, jnp.where(has_previous, tokens, 0))
        x = jnp.where(has_previous[..., None], x, self.local_pad)
        return x + embed(self.slot_positions, slots) if self.local_positions else x

    def _logits(self, x):
        head = (
            self.local_embedding[: self.vocab_size].T
            if self.tie_embeddings
            else self.head
        )
        return blocks.project_logits(x, head)

    def _check_length(self, length):
        if self.max_length is not None and length > self.max_length:
            raise ValueError(
                f"the table of positions ends at max_length={self.max_length}; got "
                f"{length} tokens"
            )


def strided_score(
    model: Megabyte,
    params: Any,
    tokens: jax.Array,
    segment_ids: jax.Array | None = None,
) -> jax.Array:
    """Scores bytes in two passes, each of which gives the first half of its patches.

    Early bytes of a patch are predicted better than late ones, whose nearest context
    the global stage has not seen. The second pass begins half a patch later, so that
    the second half of each patch becomes the first half of one. It costs twice as
    much as `Megabyte.score`.

    Args:
      model: The model.
      params: Its parameters, as ``model.init`` returned them.
      tokens: int [B, T].
      segment_ids: int [B, T], the document of each byte, or None.

    Returns:
      Logits [B, T, V]. Those of the second pass do not see the first half patch.
    """
    shift = model.patch_size // 2
    logits: Any = model.apply(params, tokens, segment_ids, method="score")
    if not shift or tokens.shape[1] <= shift:
        return logits
    later: Any = model.apply(
        params,
        tokens[:, shift:],
        None if segment_ids is None else segment_ids[:, shift:],
        method="score",
    )
    later = jnp.pad(later, [(0, 0), (shift, 0), (0, 0)])
    early = jnp.arange(tokens.shape[1]) % model.patch_size < shift
    return jnp.where(early[:, None], logits, later)
