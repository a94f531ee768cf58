"""The light UniFormer family: local blocks, then global blocks that prune tokens by a running score (arXiv 2201.09450).

A class token joins in the third stage. Its attention to the map is the score by which every global block but the first keeps
half of the tokens; see `nn.token_pruning`.

    model = UniFormerLight.sized("xs")
    variables = model.init(jax.random.key(0), images)             # images [B, Y, X, 3]
    logits = model.apply(variables, images)
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from attnlab.errors import ConfigError, nearest
from attnlab.models.lm import REMAT_POLICIES
from attnlab.models.options import ImageModel
from attnlab.models.uniformer import patch_embed
from attnlab.nn.norm import LayerNorm
from attnlab.nn.partitioning import named
from attnlab.nn.projection import Projection
from attnlab.nn.token_pruning import PruningBlock
from attnlab.nn.uniformer import LocalBlock
from attnlab.nn.vision import BatchNorm
from attnlab.ops.token_pruning import pool_scores

SIZES: dict[str, dict[str, Any]] = {
    "xxs": {"depths": (2, 5, 8, 2), "dims": (56, 112, 224, 448), "head_dim": 28},
    "xs": {"depths": (3, 5, 9, 3), "dims": (64, 128, 256, 512), "head_dim": 32},
}


class UniFormerLight(ImageModel):
    """Two stages of local blocks and two of pruning blocks; one classifier for the map, one for the class token.

    Parameters: `embed_{i}`, `stage_{i}_{j}` (block j of stage i), `class_token` [1, 1, D], `class_embed`, `norm`, `head`,
    `class_norm`, `class_head`; running statistics in `batch_stats`, mutable in training. Blocks that drop tokens sow `kept`
    to `intermediates`.

    Attributes:
        num_classes: of both classifiers.
        depths: blocks of the four stages.
        dims: channels of the four stages.
        head_dim: H, divides the channels of the last two stages.
        mlp_ratio: width inside the MLP over the channels.
        keep: part of the tokens that every global block but the first keeps.
        trade_off: share of the present attention in the score.
        dpe_kernel: of the depthwise convolution for position; 0 = none.
        layer_scale: its initial value in global blocks; 0 = none.
        remat: what the backward pass keeps of a block, a name of `models.lm.REMAT_POLICIES`.
        implementation: of `ops.softmax_attention`.
        capture_attention: every attention sows its weights.
    """

    sizes = SIZES

    num_classes: int = 1000
    depths: tuple[int, ...] = (2, 5, 8, 2)
    dims: tuple[int, ...] = (56, 112, 224, 448)
    head_dim: int = 28
    mlp_ratio: float = 3.0
    keep: float = 0.5
    trade_off: float = 0.5
    dpe_kernel: int = 3
    layer_scale: float = 0.0
    remat: str = "none"
    implementation: str | None = None
    capture_attention: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        """Declares the parts; called by flax."""
        self._check()
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        # Only the first embedding overlaps.
        self.embeds = [patch_embed(i, dim, i == 0, types | {"name": f"embed_{i}"}) for i, dim in enumerate(self.dims)]
        self.stages = [[self._block(i, j) for j in range(depth)] for i, depth in enumerate(self.depths)]
        zeros = named(nn.initializers.zeros_init(), None, None, "norm")
        self.class_token = self.param("class_token", zeros, (1, 1, self.dims[2]), self.param_dtype)
        self.class_embed = Projection((self.dims[2], self.dims[3]), ("embed", None), use_bias=True, **types)
        self.last_norm = BatchNorm(param_dtype=self.param_dtype, name="norm")
        self.head = Projection((self.dims[-1], self.num_classes), ("embed", "vocab"), use_bias=True, **types)
        self.class_norm = LayerNorm(1e-5, self.param_dtype)
        self.class_head = Projection((self.dims[-1], self.num_classes), ("embed", "vocab"), use_bias=True, **types)

    def __call__(self, images: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Maps images [B, Y, X, 3] to the map's logits [B, num_classes] float32.

        Raises:
            ConfigError: fields that do not fit each other, or something other than [B, Y, X, C].
        """
        return self.training_logits(images, deterministic=deterministic)[0]

    def training_logits(self, images: jax.Array, *, deterministic: bool = False) -> tuple[jax.Array, jax.Array]:
        """Returns the logits of the map and of the class token; training takes the mean of both losses."""
        maps, class_token = self._maps(images, deterministic)
        x = self.last_norm(maps[-1], deterministic=deterministic)
        mean = x.mean((1, 2), dtype=jnp.float32).astype(x.dtype)
        by_class = self.class_head(self.class_norm(class_token[:, 0]))
        return self.head(mean).astype(jnp.float32), by_class.astype(jnp.float32)

    def features(self, images: jax.Array, *, deterministic: bool = True) -> tuple[jax.Array, ...]:
        """The feature pyramid: the map after each stage, of strides 4, 8, 16 and 32."""
        return self._maps(images, deterministic)[0]

    def _maps(self, images: jax.Array, deterministic: bool) -> tuple[tuple[jax.Array, ...], jax.Array]:
        if images.ndim != 4:
            raise ConfigError(f"images have shape {images.shape}: they need [B, height, width, channels].")
        x, maps, scores = images.astype(self.dtype), [], None
        class_token = jnp.broadcast_to(self.class_token.astype(self.dtype), (x.shape[0], 1, self.dims[2]))
        for i, (embed, stage) in enumerate(zip(self.embeds, self.stages, strict=True)):
            if i == 3:
                scores, class_token = pool_scores(scores, x.shape[1:3]), self.class_embed(class_token)
            x = embed(x, deterministic=deterministic)
            for block in stage:
                if i < 2:
                    x = block(x, deterministic)
                else:
                    x, class_token, scores = block(x, class_token, scores)
            maps.append(x)
        return tuple(maps), class_token

    def _block(self, i: int, j: int) -> nn.Module:
        """Returns block j of stage i."""
        policy = REMAT_POLICIES[self.remat]
        dim = self.dims[i]
        shared = {
            "hidden": int(self.mlp_ratio * dim),
            "dpe_kernel": self.dpe_kernel,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "name": f"stage_{i}_{j}",
        }
        if i < 2:
            # 0 is self, 2 is `deterministic`
            return (LocalBlock if policy is None else nn.remat(LocalBlock, policy=policy, static_argnums=(2,)))(**shared)
        return (PruningBlock if policy is None else nn.remat(PruningBlock, policy=policy))(
            num_heads=dim // self.head_dim,
            keep=1.0 if (i, j) == (2, 0) else self.keep,
            trade_off=self.trade_off,
            layer_scale=self.layer_scale,
            implementation=self.implementation,
            capture_attention=self.capture_attention,
            **shared,
        )

    def _check(self) -> None:
        """Refuses fields that do not fit each other."""
        for name in ("depths", "dims"):
            if len(getattr(self, name)) != 4:
                raise ConfigError(f"{name} = {getattr(self, name)}: there are four stages. Give one entry each.")
        if not 0 < self.keep <= 1:
            raise ConfigError(f"keep = {self.keep}: must be in (0, 1].")
        for dim in self.dims[2:]:
            if dim % self.head_dim:
                raise ConfigError(f"head_dim = {self.head_dim}: does not divide a stage of width {dim}. Choose a divisor.")
        if self.remat not in REMAT_POLICIES:
            raise ConfigError(f"remat = {self.remat!r}: unknown, {nearest(self.remat, REMAT_POLICIES)}")
