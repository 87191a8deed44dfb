"""The vision transformer: an encoder over the patches of an image."""

from __future__ import annotations

import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxnets.checks import IMAGES, check_rank, check_sizes
from jaxnets.core import Precision, at_least_int32, drawn_in_float32, known_values, record
from jaxnets.functional.patches import patchify
from jaxnets.functional.pooling import global_average_pool
from jaxnets.layers import Dense, Dropout
from jaxnets.models.transformer.config import BlockConfig, build_preset
from jaxnets.models.transformer.embeddings import PositionEmbedding
from jaxnets.models.transformer.stack import Stack


class PatchEncoder(nn.Module):
    """An encoder of image patches: features of each patch, attending to the whole image.

    Attributes:
        patch_size: height and width of a patch.
        num_layers: number of blocks.
        config: options of the blocks.
        use_token: prepend a learned token (the class token) to the patches.
        use_distillation_token: prepend another one to the patches, after the class token if there
            is one (Touvron et al. 2021, arXiv:2012.12877, section 4).
        precision: dtypes.

    Raises:
        ValueError: a field is out of range.

    References:
        Dosovitskiy et al. 2021, arXiv:2010.11929, section 3.1.
    """

    patch_size: int = 4
    num_layers: int = 6
    config: BlockConfig = BlockConfig()
    use_token: bool = True
    use_distillation_token: bool = False
    precision: Precision = Precision()

    def __post_init__(self) -> None:
        check_sizes(patch_size=self.patch_size)
        super().__post_init__()

    @nn.compact
    def __call__(
        self, inputs: jax.Array, visible: jax.Array | None = None, *, train: bool = False
    ) -> jax.Array:
        """Map [batch, height, width, channels] to [batch, patches, features].

        Args:
            inputs: images of the size that the network was initialized with.
            visible: integer [batch, num_visible], indices of the patches to encode, in the order in
                which they are returned; by default all of them, row by row. An index out of range
                that is known only at run time gives NaN.
            train: training mode.

        Returns:
            Features in the compute dtype; those of the learned tokens come first.

        Raises:
            ValueError: images that do not split into patches, or indices that do not fit.
        """
        check_rank(inputs, self, layouts=IMAGES)
        config, policy = self.config, self.precision
        x = Dense(
            config.features, kernel_init=config.kernel_init(), precision=policy, name="patch"
        )(patchify(inputs, self.patch_size))
        shape, init = (config.features,), drawn_in_float32(nn.initializers.normal(0.02))
        used = {"token": self.use_token, "distillation_token": self.use_distillation_token}
        tokens = [
            jnp.broadcast_to(
                self.param(name, init, shape, policy.parameter).astype(x.dtype)[None, None],
                (x.shape[0], 1, config.features),
            )
            for name, is_used in used.items()
            if is_used
        ]
        num_tokens = len(tokens)
        x = jnp.concatenate([*tokens, x], axis=1) if tokens else x
        x = PositionEmbedding(config, x.shape[1], policy, name="position")(x)
        if visible is not None:
            patches = _take(x[:, num_tokens:], visible)
            x = jnp.concatenate([x[:, :num_tokens], patches], axis=1)
            # [batch, num_tokens + num_visible, features]
        x = Dropout(config.dropout_rate, name="dropout")(x, train=train)
        return Stack(config, self.num_layers, precision=policy, name="stack")(x, train=train)


def _take(patches: jax.Array, indices: jax.Array) -> jax.Array:
    """Take patches [batch, indices, features] from [batch, patches, features]."""
    batch, num_patches = patches.shape[:2]
    shape, known = jnp.shape(indices), known_values(indices)
    integers = len(shape) == 2 and jnp.issubdtype(jnp.result_type(indices), jnp.integer)
    if not integers or shape[0] != batch:
        raise ValueError(
            f"visible of shape {shape} and type {jnp.result_type(indices)} does not fit {batch} "
            "images; give integers [batch, num_visible]"
        )
    indices = at_least_int32(indices if known is None else known)
    outside = (indices < 0) | (indices >= num_patches)
    if known is not None and outside.any():
        raise ValueError(f"visible holds {known[outside][0]}; give indices in [0, {num_patches})")
    taken = jnp.take_along_axis(patches, jnp.where(outside, 0, indices)[..., None], axis=1)
    return jnp.where(outside[..., None], jnp.asarray(jnp.nan, taken.dtype), taken)


class VisionTransformer(nn.Module):
    """A vision transformer: a `PatchEncoder` with a pooled output, such as class logits.

    The parameters include those of the `PatchEncoder` under the same names, so the encoder of a
    trained `MaskedAutoencoder` fits.

    Attributes:
        num_outputs: size of the output; None returns the input of the head.
        patch_size: height and width of a patch.
        num_layers: number of blocks.
        config: options of the blocks.
        pool: input of the head: the learned "token", or the "mean" over the patches.
        pooler_dim: size of a dense layer with tanh in front of the head, the hidden layer of
            pretraining; None has none.
        distillation: "token" adds the distillation token of DeiT, "head" also a head on it; the
            output is then the mean of both heads.
        precision: dtypes.

    Raises:
        ValueError: a field is out of range.

    Example:
        >>> config = BlockConfig(features=16)
        >>> module = VisionTransformer(num_outputs=3, patch_size=4, num_layers=2, config=config)
        >>> images = jnp.ones((2, 8, 12, 3))
        >>> module.apply(module.init(jax.random.key(0), images), images).shape
        (2, 3)

    References:
        Dosovitskiy et al. 2021, arXiv:2010.11929, section 3.1; Touvron et al. 2021,
        arXiv:2012.12877, section 4 (the distillation token).
    """

    num_outputs: int | None = 10
    patch_size: int = 4
    num_layers: int = 6
    config: BlockConfig = BlockConfig()
    pool: Literal["token", "mean"] = "token"
    pooler_dim: int | None = None
    distillation: Literal["token", "head"] | None = None
    precision: Precision = Precision()

    def __post_init__(self) -> None:
        check_sizes(patch_size=self.patch_size)
        for name in ("num_outputs", "pooler_dim"):
            if getattr(self, name) is not None:
                check_sizes(**{name: getattr(self, name)})
        if self.pool not in ("token", "mean"):
            raise ValueError(f"pool is {self.pool!r}; choose 'token' or 'mean'")
        if self.distillation not in ("token", "head", None):
            raise ValueError(
                f"distillation is {self.distillation!r}; choose 'token', 'head' or None"
            )
        if self.distillation is not None and self.pool != "token":
            raise ValueError(
                f"distillation={self.distillation!r} with pool={self.pool!r}; a distillation token "
                "needs pool='token'"
            )
        if self.distillation == "head" and (self.num_outputs is None or self.pooler_dim):
            raise ValueError(
                f"distillation='head' with num_outputs={self.num_outputs} and pooler_dim="
                f"{self.pooler_dim}; two heads need num_outputs and no pooler"
            )
        super().__post_init__()

    def setup(self) -> None:
        self.encoder = PatchEncoder(
            self.patch_size,
            self.num_layers,
            self.config,
            use_token=self.pool == "token",
            use_distillation_token=self.distillation is not None,
            precision=self.precision,
        )
        nn.share_scope(self, self.encoder)
        dense = functools.partial(
            Dense, kernel_init=self.config.kernel_init(), precision=self.precision
        )
        if self.pooler_dim is not None:
            self.pooler = dense(self.pooler_dim)
        if self.num_outputs is not None:
            self.head = dense(self.num_outputs)
            if self.distillation == "head":
                self.distillation_head = dense(self.num_outputs)

    def __call__(self, inputs: jax.Array, *, train: bool = False) -> jax.Array:
        """Map [batch, height, width, channels] to [batch, num_outputs]; records "features".

        Args:
            inputs: images of the size that the network was initialized with.
            train: training mode.

        Returns:
            [batch, num_outputs]; without a head [batch, pooler_dim or features].

        Raises:
            ValueError: images that do not split into patches.
        """
        tokens = self.encode(inputs, train=train)
        x = tokens[:, 0] if self.pool == "token" else global_average_pool(tokens)
        if self.pooler_dim is not None:
            x = jnp.tanh(self.pooler(x))
        record(self, "features", x)
        if self.num_outputs is not None:
            x = self.head(x)
        if self.distillation == "head":
            x = (x + self.distillation_head(tokens[:, 1])) / 2
        return x.astype(self.precision.output)

    def encode(self, inputs: jax.Array, *, train: bool = False) -> jax.Array:
        """Return the features of tokens and patches, [batch, tokens + patches, features].

        They are in the compute dtype, those of the learned tokens first; the arguments are those
        of a call.
        """
        return self.encoder(inputs, train=train)


def vit_tiny16(num_classes: int = 1000, **fields: Any) -> VisionTransformer:
    """Build ViT-Ti/16: 5,717,416 parameters for 224 x 224 images and 1000 classes.

    Args:
        num_classes: size of the output.
        fields: override those of the network and of its config.

    References:
        Touvron et al. 2021, arXiv:2012.12877, table 1 (DeiT-Ti).
    """
    return _vit(12, 3, 192, num_classes, fields)


def vit_small16(num_classes: int = 1000, **fields: Any) -> VisionTransformer:
    """Build ViT-S/16: 22,050,664 parameters (DeiT-S), as `vit_tiny16`."""
    return _vit(12, 6, 384, num_classes, fields)


def vit_base16(num_classes: int = 1000, **fields: Any) -> VisionTransformer:
    """Build ViT-B/16: 86,567,656 parameters, as `vit_tiny16`.

    References:
        Dosovitskiy et al. 2021, arXiv:2010.11929, table 1.
    """
    return _vit(12, 12, 768, num_classes, fields)


def vit_large16(num_classes: int = 1000, **fields: Any) -> VisionTransformer:
    """Build ViT-L/16: 304,326,632 parameters, as `vit_base16`."""
    return _vit(24, 16, 1024, num_classes, fields)


def _vit(
    num_layers: int, num_heads: int, features: int, num_classes: int, fields: dict[str, Any]
) -> VisionTransformer:
    preset = {
        "num_outputs": num_classes,
        "patch_size": 16,
        "num_layers": num_layers,
        "features": features,
        "num_heads": num_heads,
        "key_bias": True,
    }
    return build_preset(VisionTransformer, preset, fields)
