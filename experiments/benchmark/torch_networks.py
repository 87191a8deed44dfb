"""The networks in torch, as its documentation and nanoGPT write them."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from experiments.benchmark.architectures import (
    BidirectionalGRU,
    Blocks,
    Convolutional,
    LanguageTransformer,
    Network,
    Perceptron,
    RecurrentLanguage,
    Residual,
    Vision,
)


def _mlp(network: Perceptron) -> nn.Module:
    widths = (network.num_inputs, *network.features)
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], network.num_outputs))


def _cnn(network: Convolutional) -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise((network.image[2], *network.channels)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    layers.append(nn.Flatten())
    widths = (network.num_flat, *network.features)
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], network.num_outputs))


class ResidualBlock(nn.Module):
    """Two convolutions with a shortcut."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(after)
        nn.init.zeros_(self.norm2.weight)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or before != after:
            self.shortcut = nn.Sequential(
                nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [batch, channels, height, width]."""
        y = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.shortcut(x) + self.norm2(self.conv2(y)))


def _resnet(network: Residual) -> nn.Module:
    width = network.width
    stem = nn.Conv2d(network.image[2], width, 3, padding=1, bias=False)
    layers: list[nn.Module] = [stem, nn.BatchNorm2d(width), nn.ReLU()]
    for features, stride in network.stages:
        layers += [
            ResidualBlock(width, features, stride),
            ResidualBlock(features, features, 1),
        ]
        width = features
    head = nn.Linear(width, network.num_outputs)
    model: Any = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
    # The memory format that torch recommends for convolutional networks on CPU.
    return model.to(memory_format=torch.channels_last)


class Block(nn.Module):
    """A pre-norm block of attention and an MLP."""

    def __init__(self, network: Blocks, causal: bool) -> None:
        super().__init__()
        width = network.width
        self.heads, self.causal = network.num_heads, causal
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.joined, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [batch, time, features]."""
        batch, time, width = x.shape
        joined = self.joined(self.norm1(x)).view(batch, time, 3, self.heads, width // self.heads)
        query, key, value = joined.permute(2, 0, 3, 1, 4)
        h = functional.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        x = x + self.projection(h.transpose(1, 2).reshape(batch, time, width))
        return x + self.down(functional.gelu(self.up(self.norm2(x)), approximate="tanh"))


def _start_small(model: nn.Module) -> None:
    # As nanoGPT does.
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)


class GPT(nn.Module):
    """A causal transformer."""

    def __init__(self, network: LanguageTransformer) -> None:
        super().__init__()
        width = network.width
        self.tokens = nn.Embedding(network.num_outputs, width)
        self.positions = nn.Embedding(network.context, width)
        self.blocks = nn.Sequential(*(Block(network, True) for _ in range(network.num_layers)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, network.num_outputs, bias=False)
        if network.tied:
            self.head.weight = self.tokens.weight
        _start_small(self)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Map [batch, time] to [batch, time, num_outputs]."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.tokens(tokens) + self.positions(places)
        return self.head(self.norm(self.blocks(x)))


class ViT(nn.Module):
    """A transformer over patches."""

    def __init__(self, network: Vision) -> None:
        super().__init__()
        width, patch = network.width, network.patch
        self.patches = nn.Conv2d(network.image[2], width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, network.num_patches + 1, width))
        self.blocks = nn.Sequential(*(Block(network, False) for _ in range(network.num_layers)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, network.num_outputs)
        _start_small(self)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map [batch, channels, height, width] to [batch, num_outputs]."""
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


class LSTM(nn.Module):
    """A recurrent language model."""

    def __init__(self, network: RecurrentLanguage) -> None:
        super().__init__()
        self.tokens = nn.Embedding(network.num_outputs, network.embedding)
        self.lstm = nn.LSTM(network.embedding, network.hidden, network.num_layers, batch_first=True)
        self.head = nn.Linear(network.hidden, network.num_outputs)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Map [batch, time] to [batch, time, num_outputs]."""
        return self.head(self.lstm(self.tokens(tokens))[0])


class GRU(nn.Module):
    """A GRU in both directions."""

    def __init__(self, network: BidirectionalGRU) -> None:
        super().__init__()
        self.gru = nn.GRU(network.channels, network.hidden, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * network.hidden, network.num_outputs)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """Map [batch, time, channels] to [batch, num_outputs]."""
        last = self.gru(frames)[1]  # [directions, batch, hidden]
        return self.head(last.transpose(0, 1).flatten(1))


_MODULES: dict[type[Network], Any] = {
    Perceptron: _mlp,
    Convolutional: _cnn,
    Residual: _resnet,
    LanguageTransformer: GPT,
    Vision: ViT,
    RecurrentLanguage: LSTM,
    BidirectionalGRU: GRU,
}


def build(network: Network) -> nn.Module:
    """Return the module of an architecture."""
    return _MODULES[type(network)](network)
