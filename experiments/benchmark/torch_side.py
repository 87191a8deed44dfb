"""torch: eager, eager with the fused Adam, and compiled with the fused Adam."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from experiments.benchmark import torch_generative
from experiments.benchmark.architectures import Residual
from experiments.benchmark.sides import Prepared, Settings, read_idx, ready
from experiments.benchmark.torch_networks import build
from experiments.benchmark.torch_variants import adam, begin, callable_of, num_parameters
from experiments.benchmark.workloads import LEARNING_RATE, PIXEL_DEVIATION, PIXEL_MEAN, Workload

LIBRARIES = ("torch",)

Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def prepare(settings: Settings) -> Prepared:
    """Build a workload; the variants are "", "fused" and "compile"."""
    device = begin(settings)
    make = {
        "train": train,
        "infer": infer,
        "population": train_one_after_the_other,
        "epoch": train_epoch,
        "autoencode": train_generative,
        "adversarial": train_generative,
    }[settings.workload.task]
    return make(settings, device)


def _precision(workload: Workload, device: torch.device) -> Any:
    if workload.precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, workload.precision))


def _make_step(settings: Settings, device: torch.device) -> tuple[torch.nn.Module, Step]:
    workload = settings.workload
    with device:
        model = build(workload.network)
    called = callable_of(model, settings.variant)
    optimizer = adam(model, settings.variant, LEARNING_RATE)

    def step(inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        with _precision(workload, device):
            logits = called(inputs)
            loss = functional.cross_entropy(logits.flatten(0, -2), labels.flatten())
        loss.backward()
        optimizer.step()
        return loss

    return model, step


def _inputs(workload: Workload, device: torch.device) -> torch.Tensor:
    inputs = torch.from_numpy(workload.inputs()).to(device)
    if workload.network.reads_tokens:
        return inputs.long()
    return _channels_first(inputs, workload) if inputs.ndim == 4 else inputs


def _channels_first(images: torch.Tensor, workload: Workload) -> torch.Tensor:
    images = images.permute(0, 3, 1, 2)
    if isinstance(workload.network, Residual):
        return images.contiguous(memory_format=torch.channels_last)
    return images.contiguous()


def train(settings: Settings, device: torch.device) -> Prepared:
    """Single steps."""
    workload = settings.workload
    model, step = _make_step(settings, device)
    inputs = _inputs(workload, device)
    endless = itertools.cycle(torch.from_numpy(workload.labels()).long().to(device))

    def run(num_steps: int) -> float:
        for _ in range(num_steps):
            loss = step(inputs, next(endless))
        return loss.item()

    return ready(workload, run, num_parameters(model))


def train_generative(settings: Settings, device: torch.device) -> Prepared:
    """Single steps of one network or of two."""
    workload = settings.workload
    with device:
        trained = torch_generative.create(workload.network, settings.variant)
    images = _inputs(workload, device)

    def run(num_steps: int) -> float:
        for _ in range(num_steps):
            loss = trained.step(images)
        return loss.item()

    return ready(workload, run, num_parameters(*trained.models))


def train_one_after_the_other(settings: Settings, device: torch.device) -> Prepared:
    """A step of each network in turn."""
    workload = settings.workload
    members = [_make_step(settings, device) for _ in range(workload.members)]
    inputs = _inputs(workload, device)
    endless = itertools.cycle(torch.from_numpy(workload.labels()).long().to(device))

    def run(num_steps: int) -> float:
        for _ in range(num_steps):
            labels = next(endless)
            losses = [step(inputs, labels) for _, step in members]
        return float(np.mean([loss.item() for loss in losses]))

    return ready(workload, run, num_parameters(members[0][0]))


def infer(settings: Settings, device: torch.device) -> Prepared:
    """Logits of a batch."""
    workload = settings.workload
    with device:
        model = build(workload.network)
    called = callable_of(model, settings.variant)
    model.eval()
    inputs = _inputs(workload, device)

    @torch.inference_mode()
    def run(num_steps: int) -> None:
        with _precision(workload, device):
            for _ in range(num_steps):
                called(inputs)
        if inputs.is_cuda:
            torch.cuda.synchronize()

    return ready(workload, run, num_parameters(model))


def train_epoch(settings: Settings, device: torch.device) -> Prepared:
    """From the files to trained parameters, with a loader that fetches whole batches."""
    workload = settings.workload
    model, step = _make_step(settings, device)
    start = {name: value.clone() for name, value in model.state_dict().items()}

    def run(num_steps: int) -> float:
        model.load_state_dict(start)
        images = torch.from_numpy(read_idx(settings.images)[..., None].astype(np.float32) / 255)
        images = _channels_first((images - PIXEL_MEAN) / PIXEL_DEVIATION, workload)
        labels = torch.from_numpy(read_idx(settings.labels).astype(np.int64))
        dataset = TensorDataset(images, labels)
        sampler = BatchSampler(RandomSampler(dataset), workload.batch_size, drop_last=True)
        loader = DataLoader(dataset, sampler=sampler, batch_size=None)
        losses = [
            step(*(each.to(device) for each in batch)).detach()
            for batch in itertools.islice(loader, num_steps)
        ]
        return torch.stack(losses[-50:]).mean().item()

    return ready(workload, run, num_parameters(model))
