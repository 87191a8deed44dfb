"""The masked autoencoder: a transformer that paints the patches it has not seen."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxnets.checks import check_sizes
from jaxnets.core import Precision, at_least_float32, record
from jaxnets.functional.patches import normalize_patches, patchify, unpatchify
from jaxnets.layers import Dense
from jaxnets.models.transformer.config import BlockConfig, build_preset
from jaxnets.models.transformer.embeddings import PositionEmbedding
from jaxnets.models.transformer.stack import Stack
from jaxnets.models.transformer.vision import PatchEncoder


class Masked(NamedTuple):
    """What a masked autoencoder returns.

    Attributes:
        outputs: pixels of every patch, [batch, patches, size * size * channels], see
            `patchify`.
        masked: bool [batch, patches], True for the patches that were not seen.
    """

    outputs: jax.Array
    masked: jax.Array


class MAEOutput(NamedTuple):
    """What `inpaint` returns.

    Attributes:
        images: [batch, height, width, channels].
        masked: bool [batch, patches], True for the patches that were painted.
    """

    images: jax.Array
    masked: jax.Array


class MaskedAutoencoder(nn.Module):
    """An encoder of the patches that are seen, and a small decoder that paints the others.

    The encoder's cost is that of the few patches it sees. Trained by `masked_reconstruction`, it
    becomes a classifier with few labels:

        head = classifier.init(key, images)["params"]
        params = {**head, **trained["params"]["encoder"]}  # of a VisionTransformer of its fields

    It has no code to decode, so the functions of `latent_space` do not take it: features of whole
    images are `module.apply(variables, images, method="encode")`, pictures are made by `inpaint`.

    Attributes:
        patch_size: height and width of a patch.
        num_layers: number of the encoder's blocks.
        config: what the encoder's blocks look like.
        decoder_num_layers: number of the decoder's blocks.
        decoder_config: what the decoder's blocks look like.
        mask_ratio: share of the patches that are not seen, between 0 and 1.
        precision: dtypes.

    Raises:
        ValueError: a field is out of range; positions inside the attention, which tell the order
            of the patches that are seen instead of where they were.

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
            raise ValueError(f"mask_ratio is {self.mask_ratio}; give a share between 0 and 1")
        for name in ("config", "decoder_config"):
            config = getattr(self, name)
            if config.positions not in ("learned", "sinusoidal") or config.window is not None:
                raise ValueError(
                    f"{name} has positions={config.positions!r} and window={config.window}; a "
                    "patch keeps its place only with 'learned' or 'sinusoidal' positions and "
                    "window=None"
                )
        super().__post_init__()

    def setup(self) -> None:
        policy = self.precision
        self.encoder = PatchEncoder(self.patch_size, self.num_layers, self.config, precision=policy)
        self.decoder = _PatchDecoder(self.decoder_config, self.decoder_num_layers, policy)

    def __call__(
        self, inputs: jax.Array, *, noise: jax.Array | None = None, train: bool = False
    ) -> Masked:
        """Hide patches and paint all of them; records "features", those of the token.

        Args:
            inputs: images [batch, height, width, channels] of the size that the network was
                initialized with.
            noise: [batch, patches]; the patches with the smallest numbers are seen. By default
                drawn from the stream "mask" in training, and always the same in evaluation.
            train: training mode.

        Returns:
            Masked.

        Raises:
            ValueError: images that do not split into patches or have too few to hide some and
                see some; noise of another shape.
        """
        batch, height, width, channels = inputs.shape
        num_patches = (height // self.patch_size) * (width // self.patch_size)
        num_visible = num_patches - round(self.mask_ratio * num_patches)
        if not 0 < num_visible < num_patches:
            raise ValueError(
                f"of {num_patches} patches mask_ratio {self.mask_ratio} leaves {num_visible} to "
                "see; it must hide some and leave some, so choose smaller patches"
            )
        shape = (batch, num_patches)
        if noise is None and train:
            noise = jax.random.uniform(self.make_rng("mask"), shape)
        elif noise is None:
            noise = jax.random.uniform(jax.random.key(0), (1, num_patches))
            noise = jnp.broadcast_to(noise, shape)
        if noise.shape != shape:
            raise ValueError(f"noise of shape {noise.shape} does not fit; give one of {shape}")
        order = jnp.argsort(noise, axis=1)
        place = jnp.argsort(order, axis=1)  # where in the order each patch stands
        seen = self.encoder(inputs, order[:, :num_visible], train=train)
        record(self, "features", seen[:, 0])
        num_pixels = self.patch_size**2 * channels
        outputs = self.decoder(seen, place, num_pixels, train=train)
        return Masked(outputs.astype(self.precision.output), place >= num_visible)

    def encode(self, images: jax.Array) -> jax.Array:
        """Map whole images to the mean of the features of their patches, [batch, features]."""
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
    """Hide patches of images and put what the network paints in their places.

    Args:
        module: `MaskedAutoencoder`.
        variables: its parameters and other collections.
        images: [batch, height, width, channels].
        noise: as for the module, which says what is hidden.
        normalized: the network was trained with `masked_reconstruction(normalize=True)`: what it
            paints then gets the mean and the variance of the true patch. These are looked up, not
            predicted: the result is a picture and no measure.

    Returns:
        MAEOutput; the patches that were seen are as they were.

    Raises:
        ValueError: images or noise that do not fit.
    """
    found: Any = module.apply(variables, images, noise=noise)
    patches = patchify(at_least_float32(images), module.patch_size)
    outputs, (_, height, width, channels) = found.outputs, images.shape
    if normalized:
        _, mean, scale = normalize_patches(patches)
        outputs = mean + scale * outputs
    painted = jnp.where(found.masked[..., None], outputs, patches)
    return MAEOutput(unpatchify(painted, (height, width, channels)), found.masked)


class _PatchDecoder(nn.Module):
    """Put the patches that were seen in their places, a learned vector in all others, and paint."""

    config: BlockConfig
    num_layers: int
    precision: Precision

    @nn.compact
    def __call__(
        self, seen: jax.Array, place: jax.Array, num_pixels: int, *, train: bool
    ) -> jax.Array:
        config, policy = self.config, self.precision
        shared: dict[str, Any] = {"kernel_init": config.kernel_init(), "precision": policy}
        x = Dense(config.features, name="embed", **shared)(seen)
        shape, init = (config.features,), nn.initializers.normal(0.02)
        hidden = self.param("mask", init, shape, policy.parameter).astype(x.dtype)
        num_hidden = place.shape[1] + 1 - x.shape[1]
        hidden = jnp.broadcast_to(hidden[None, None], (x.shape[0], num_hidden, config.features))
        patches = jnp.concatenate([x[:, 1:], hidden], axis=1)
        patches = jnp.take_along_axis(patches, place[..., None], axis=1)
        x = jnp.concatenate([x[:, :1], patches], axis=1)
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
