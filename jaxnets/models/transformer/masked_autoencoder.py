"""The masked autoencoder (MAE): a transformer that reconstructs masked patches."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxnets.checks import check_sizes
from jaxnets.core import Precision, at_least_float32, drawn_in_float32, record
from jaxnets.functional.patches import normalize_patches, patchify, unpatchify
from jaxnets.layers import Dense
from jaxnets.models.transformer.config import BlockConfig, build_preset
from jaxnets.models.transformer.embeddings import PositionEmbedding
from jaxnets.models.transformer.stack import Stack
from jaxnets.models.transformer.vision import PatchEncoder


class Masked(NamedTuple):
    """What a masked autoencoder returns.

    Attributes:
        outputs: predicted pixels of every patch, [batch, patches, size * size * channels], in the
            order of `patchify`.
        masked: bool [batch, patches], True for the patches that the encoder did not get.
    """

    outputs: jax.Array
    masked: jax.Array


class MAEOutput(NamedTuple):
    """What `inpaint` returns.

    Attributes:
        images: [batch, height, width, channels].
        masked: bool [batch, patches], True for the patches that were inpainted.
    """

    images: jax.Array
    masked: jax.Array


class MaskedAutoencoder(nn.Module):
    """An encoder of the visible patches and a small decoder that predicts the pixels of all.

    The encoder computes the visible patches only. After training with `masked_reconstruction` it
    can be fine-tuned as a classifier with few labels:

        head = classifier.init(key, images)["params"]
        params = {**head, **trained["params"]["encoder"]}  # of a VisionTransformer of its fields

    It has no latent code, so the functions of `latent_space` do not take it: features of whole
    images are `module.apply(variables, images, method="encode")`, images come from `inpaint`.

    Attributes:
        patch_size: height and width of a patch.
        num_layers: number of the encoder's blocks.
        config: options of the encoder's blocks.
        decoder_num_layers: number of the decoder's blocks.
        decoder_config: options of the decoder's blocks.
        mask_ratio: fraction of the patches that are masked, between 0 and 1.
        precision: dtypes.

    Raises:
        ValueError: a field is out of range; positions inside the attention, which would encode the
            rank of a patch among the visible ones instead of its place in the image.

    Example:
        >>> block = BlockConfig(features=16)
        >>> module = MaskedAutoencoder(2, 2, block, decoder_num_layers=1, decoder_config=block)
        >>> images = jnp.ones((3, 8, 8, 1))
        >>> outputs, masked = module.apply(module.init(jax.random.key(0), images), images)
        >>> outputs.shape, masked.sum(axis=1).tolist()
        ((3, 16, 4), [12, 12, 12])

    References:
        He et al. 2022, arXiv:2111.06377, section 3. Differs from the paper: positions are learned
        by default, instead of sines and cosines of row and column.
    """

    patch_size: int = 4
    num_layers: int = 6
    config: BlockConfig = BlockConfig()
    decoder_num_layers: int = 2
    decoder_config: BlockConfig = BlockConfig(features=64)
    mask_ratio: float = 0.75
    precision: Precision = Precision()

    def __post_init__(self) -> None:
        check_sizes(decoder_num_layers=self.decoder_num_layers)
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"mask_ratio is {self.mask_ratio}; give a fraction between 0 and 1")
        for name in ("config", "decoder_config"):
            config = getattr(self, name)
            if config.positions not in ("learned", "sinusoidal") or config.window is not None:
                raise ValueError(
                    f"{name} has positions={config.positions!r} and window={config.window}; masked "
                    "patches need 'learned' or 'sinusoidal' positions and window=None"
                )
        super().__post_init__()

    def setup(self) -> None:
        policy = self.precision
        self.encoder = PatchEncoder(self.patch_size, self.num_layers, self.config, precision=policy)
        self.decoder = _PatchDecoder(self.decoder_config, self.decoder_num_layers, policy)

    def __call__(
        self, inputs: jax.Array, *, noise: jax.Array | None = None, train: bool = False
    ) -> Masked:
        """Mask patches and predict the pixels of all; records "features", those of the token.

        Args:
            inputs: images [batch, height, width, channels] of the size that the network was
                initialized with.
            noise: [batch, patches]; the patches with the smallest values are visible. By default
                drawn from the stream "mask" in training, and constant in evaluation.
            train: training mode.

        Returns:
            Masked.

        Raises:
            ValueError: images that do not split into patches, or too few patches to mask some and
                leave some visible; noise of another shape.
        """
        batch, height, width, channels = inputs.shape
        num_patches = (height // self.patch_size) * (width // self.patch_size)
        num_visible = num_patches - round(self.mask_ratio * num_patches)
        if not 0 < num_visible < num_patches:
            raise ValueError(
                f"of {num_patches} patches mask_ratio {self.mask_ratio} leaves {num_visible} "
                "visible; it must mask some and leave some, so choose smaller patches"
            )
        shape = (batch, num_patches)
        if noise is None and train:
            noise = jax.random.uniform(self.make_rng("mask"), shape)
        elif noise is None:
            noise = jax.random.uniform(jax.random.key(0), (1, num_patches))
            noise = jnp.broadcast_to(noise, shape)
        if noise.shape != shape:
            raise ValueError(f"noise of shape {noise.shape} does not fit; give one of {shape}")
        order = jnp.argsort(noise, axis=1)  # [batch, patches], visible ones first
        rank = jnp.argsort(order, axis=1)  # its inverse: the place of each patch in `order`
        encoded = self.encoder(inputs, order[:, :num_visible], train=train)
        record(self, "features", encoded[:, 0])
        num_pixels = self.patch_size**2 * channels
        outputs = self.decoder(encoded, rank, num_pixels, train=train)
        return Masked(outputs.astype(self.precision.output), rank >= num_visible)

    def encode(self, images: jax.Array) -> jax.Array:
        """Map unmasked images to the mean of their patches' features, [batch, features]."""
        x = self.encoder(images)
        return jnp.mean(x[:, 1:], axis=1).astype(self.precision.output)


def inpaint(
    module: MaskedAutoencoder,
    variables: Any,
    images: jax.Array,
    *,
    noise: jax.Array | None = None,
    normalized: bool = True,
) -> MAEOutput:
    """Mask patches of images and replace them by the network's predictions.

    Args:
        module: `MaskedAutoencoder`.
        variables: its parameters and other collections.
        images: [batch, height, width, channels].
        noise: as for the module; it determines which patches are masked.
        normalized: the network was trained with `masked_reconstruction(normalize=True)`. Its
            predictions then get the mean and the variance of the true patch, which are not
            predicted: use the result to look at, not to measure.

    Returns:
        MAEOutput; visible patches are unchanged.

    Raises:
        ValueError: images or noise that do not fit.
    """
    predicted: Any = module.apply(variables, images, noise=noise)
    # [batch, patches, size * size * channels]
    patches = patchify(at_least_float32(images), module.patch_size)
    pixels, (_, height, width, channels) = predicted.outputs, images.shape
    if normalized:
        _, mean, scale = normalize_patches(patches)
        pixels = mean + scale * pixels
    inpainted = jnp.where(predicted.masked[..., None], pixels, patches)
    return MAEOutput(unpatchify(inpainted, (height, width, channels)), predicted.masked)


class _PatchDecoder(nn.Module):
    """Restore the order of the patches, with a learned mask token for masked ones, and decode."""

    config: BlockConfig
    num_layers: int
    precision: Precision

    @nn.compact
    def __call__(
        self, encoded: jax.Array, rank: jax.Array, num_pixels: int, *, train: bool
    ) -> jax.Array:
        config, policy = self.config, self.precision
        shared: dict[str, Any] = {"kernel_init": config.kernel_init(), "precision": policy}
        x = Dense(config.features, name="embed", **shared)(encoded)
        shape, init = (config.features,), nn.initializers.normal(0.02)
        mask = self.param("mask", drawn_in_float32(init), shape, policy.parameter).astype(x.dtype)
        num_masked = rank.shape[1] + 1 - x.shape[1]
        masked = jnp.broadcast_to(mask[None, None], (x.shape[0], num_masked, config.features))
        patches = jnp.concatenate([x[:, 1:], masked], axis=1)  # [batch, patches, features]
        patches = jnp.take_along_axis(patches, rank[..., None], axis=1)
        x = jnp.concatenate([x[:, :1], patches], axis=1)  # [batch, 1 + patches, features]
        x = PositionEmbedding(config, x.shape[1], policy, name="position")(x)
        x = Stack(config, self.num_layers, precision=policy, name="stack")(x, train=train)
        return Dense(num_pixels, name="pixels", **shared)(x[:, 1:])


def mae_vit_base16(**fields: Any) -> MaskedAutoencoder:
    """Build the masked autoencoder of ViT-B/16: 111,907,840 parameters for 224 x 224 images.

    Args:
        fields: override those of the network and of its encoder's config.

    References:
        He et al. 2022, arXiv:2111.06377, section 4 and appendix A.1.
    """
    return _mae(12, 12, 768, fields)


def mae_vit_large16(**fields: Any) -> MaskedAutoencoder:
    """Build the masked autoencoder of ViT-L/16: 329,541,888 parameters, as `mae_vit_base16`."""
    return _mae(24, 16, 1024, fields)


def _mae(
    num_layers: int, num_heads: int, features: int, fields: dict[str, Any]
) -> MaskedAutoencoder:
    preset = {
        "patch_size": 16,
        "num_layers": num_layers,
        "features": features,
        "num_heads": num_heads,
        "key_bias": True,
        "decoder_num_layers": 8,
        "decoder_config": BlockConfig(features=512, num_heads=16, key_bias=True),
    }
    return build_preset(MaskedAutoencoder, preset, fields)
