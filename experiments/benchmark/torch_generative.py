"""The generative networks and their training in torch, as in its examples of VAE and DCGAN."""

from __future__ import annotations

import itertools

import torch
from torch import nn
from torch.nn import functional

from experiments.benchmark.architectures import AdversarialPair, Network, VariationalAutoencoder
from experiments.benchmark.torch_variants import adam, callable_of
from experiments.benchmark.workloads import ADVERSARIAL_BETA1, ADVERSARIAL_RATE, LEARNING_RATE


class VAE(nn.Module):
    """A dense variational autoencoder."""

    def __init__(self, network: VariationalAutoencoder) -> None:
        super().__init__()
        pixels, hidden, latent = network.num_pixels, network.hidden, network.latent
        self.encoder = nn.Sequential(nn.Linear(pixels, hidden), nn.ReLU())
        self.mean, self.log_variance = nn.Linear(hidden, latent), nn.Linear(hidden, latent)
        self.decoder = nn.Sequential(
            nn.Linear(latent, hidden), nn.ReLU(), nn.Linear(hidden, pixels)
        )

    def forward(
        self, pixels: torch.Tensor, noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Map [batch, pixels] and noise [batch, latent] to logits, mean and log variance."""
        hidden = self.encoder(pixels)
        mean, log_variance = self.mean(hidden), self.log_variance(hidden)
        return self.decoder(mean + torch.exp(log_variance / 2) * noise), mean, log_variance


def _generator(network: AdversarialPair) -> nn.Module:
    height, width = network.smallest
    channels = network.channels[::-1]
    layers: list[nn.Module] = [
        nn.Linear(network.latent, channels[0] * height * width, bias=False),
        nn.Unflatten(1, (channels[0], height, width)),
        nn.BatchNorm2d(channels[0]),
        nn.ReLU(),
    ]
    for before, after in itertools.pairwise(channels):
        conv = nn.Conv2d(before, after, 3, padding=1, bias=False)
        layers += [nn.Upsample(scale_factor=2), conv, nn.BatchNorm2d(after), nn.ReLU()]
    last = nn.Conv2d(channels[-1], network.image[2], 3, padding=1)
    return _init_weights(nn.Sequential(*layers, nn.Upsample(scale_factor=2), last, nn.Tanh()))


def _discriminator(network: AdversarialPair) -> nn.Module:
    (height, width), channels = network.smallest, network.channels
    layers: list[nn.Module] = [nn.Conv2d(network.image[2], channels[0], 4, 2, 1), nn.LeakyReLU(0.2)]
    for before, after in itertools.pairwise(channels):
        conv = nn.Conv2d(before, after, 4, 2, 1, bias=False)
        layers += [conv, nn.BatchNorm2d(after), nn.LeakyReLU(0.2)]
    logit = nn.Linear(height * width * channels[-1], 1)
    return _init_weights(nn.Sequential(*layers, nn.Flatten(), logit, nn.Flatten(0)))


def _init_weights(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.normal_(module.weight, std=0.02)
    return model


class Autoencoding:
    """A variational autoencoder in training.

    Args:
        network: its architecture.
        variant: see `torch_variants`.

    Attributes:
        models: the network.
    """

    def __init__(self, network: VariationalAutoencoder, variant: str) -> None:
        model = VAE(network)
        self.models = (model,)
        self.latent = network.latent
        self.called, self.optimizer = (
            callable_of(model, variant),
            adam(model, variant, LEARNING_RATE),
        )

    def step(self, images: torch.Tensor) -> torch.Tensor:
        """Train on images in [0, 1], [batch, ...], and return the loss."""
        return self.update(images, torch.randn(len(images), self.latent, device=images.device))

    def update(self, images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Train with the noise of the codes, [batch, latent], and return the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        pixels = images.flatten(1)
        logits, mean, log_variance = self.called(pixels, noise)
        errors = functional.binary_cross_entropy_with_logits(logits, pixels, reduction="sum")
        divergence = -0.5 * (1 + log_variance - mean.pow(2) - log_variance.exp()).sum()
        loss = (errors + divergence) / len(images)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


class Competing:
    """A generator and a discriminator in training.

    Args:
        network: their architecture.
        variant: see `torch_variants`.

    Attributes:
        models: discriminator, generator.
    """

    def __init__(self, network: AdversarialPair, variant: str) -> None:
        self.models = (_discriminator(network), _generator(network))
        self.latent = network.latent
        self.discriminate, self.generate = (callable_of(model, variant) for model in self.models)
        self.optimizers = [
            adam(model, variant, ADVERSARIAL_RATE, ADVERSARIAL_BETA1) for model in self.models
        ]

    def step(self, images: torch.Tensor) -> torch.Tensor:
        """Train both on images in [-1, 1], [batch, ...], and return the sum of their losses."""
        first, second = torch.randn(2, len(images), self.latent, device=images.device)
        return self.update_discriminator(images, first) + self.update_generator(second)

    def update_discriminator(self, images: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """Train the discriminator on images and as many generated ones; return its loss."""
        optimizer, _ = self.optimizers
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            fakes = self.generate(latents)
        real, fake = self.discriminate(images), self.discriminate(fakes)
        loss = (functional.softplus(-real) + functional.softplus(fake)).mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    def update_generator(self, latents: torch.Tensor) -> torch.Tensor:
        """Train the generator with latents, [batch, latent]; return its loss."""
        (discriminator, _), (_, optimizer) = self.models, self.optimizers
        optimizer.zero_grad(set_to_none=True)
        # Skip the gradients of the discriminator, which this update does not change.
        discriminator.requires_grad_(False)
        loss = functional.softplus(-self.discriminate(self.generate(latents))).mean()
        loss.backward()
        discriminator.requires_grad_(True)
        optimizer.step()
        return loss.detach()


def create(network: Network, variant: str) -> Autoencoding | Competing:
    """Return the training of a generative network."""
    if isinstance(network, VariationalAutoencoder):
        return Autoencoding(network, variant)
    assert isinstance(network, AdversarialPair)
    return Competing(network, variant)
