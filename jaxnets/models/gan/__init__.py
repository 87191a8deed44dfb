"""Generative adversarial networks: generators, discriminators, and pairs of them."""

from jaxnets.models.gan.dcgan import DCGANDiscriminator, DCGANGenerator
from jaxnets.models.gan.gan import (
    GAN,
    dcgan,
    generate_images,
    interpolate_latents,
    recalibrate_batch_norm,
    resnet_gan,
)
from jaxnets.models.gan.resnet import ResNetDiscriminator, ResNetGenerator

__all__ = [
    "GAN",
    "DCGANDiscriminator",
    "DCGANGenerator",
    "ResNetDiscriminator",
    "ResNetGenerator",
    "dcgan",
    "generate_images",
    "interpolate_latents",
    "recalibrate_batch_norm",
    "resnet_gan",
]
