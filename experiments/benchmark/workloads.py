"""The workloads: networks with their tasks and batch sizes.

Every measured process imports this module, so it imports NumPy only.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import numpy as np

from experiments.benchmark.architectures import (
    AdversarialPair,
    BidirectionalGRU,
    Convolutional,
    LanguageTransformer,
    Llama,
    Network,
    Perceptron,
    RecurrentLanguage,
    Residual,
    SentenceFolder,
    VariationalAutoencoder,
    Vision,
)

#: Batches of a data set, with the same inputs and different random labels: no network can fit them,
#: so gradients do not shrink to denormal numbers, which would cost extra time.
NUM_BATCHES = 8
#: Learning rate of Adam; no time depends on it.
LEARNING_RATE = 1e-3
#: Learning rate of the Adam of generator and discriminator, and its decay of the first moment.
ADVERSARIAL_RATE, ADVERSARIAL_BETA1 = 2e-4, 0.5
#: Mean and standard deviation of the pixels of Fashion-MNIST in [0, 1].
PIXEL_MEAN, PIXEL_DEVIATION = 0.2860, 0.3530

#: Sentences of SST that are embedded.
NUM_SENTENCES = 2000

Precision = Literal["float32", "bfloat16"]
Task = Literal[
    "train",
    "infer",
    "population",
    "epoch",
    "autoencode",
    "adversarial",
    "generate",
    "positions",
    "embed",
    "read",
    "read-cold",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """A network and its task.

    Attributes:
        name: on the command line.
        network: its architecture.
        batch_size: examples per step.
        task: "train": steps of Adam. "infer": logits of a batch. "population": a step of each of
            `members` networks on one batch. "epoch": read Fashion-MNIST from its files and train
            for one epoch. "autoencode": steps of Adam on the negative evidence lower bound with
            Bernoulli pixels and one sample per image. "adversarial": an update of the
            discriminator, then one of the generator, with the non-saturating loss and separate
            latents; the loss is the sum of both. "generate": continue prompts greedily.
            "positions": the same for several numbers of tokens in a cache of one size. "embed":
            embed NUM_SENTENCES sentences of mixed lengths. "read": the tensors of a safetensors
            file to arrays on the device; "read-cold": after dropping the file from the page cache.
        precision: of matmuls and activations; parameters are float32, and so is all of
            "autoencode" and "adversarial".
        steps_per_call: steps that are dispatched before the result is awaited; many if a step is
            short, as in a real loop.
        steps_per_dispatch: steps that a side may combine in one program.
        steps_per_fit: batches of the data set of a `fit`, enough to make its fixed cost negligible.
        members: networks of a population.
        prompt: tokens of a prompt.
        new_tokens: numbers of generated tokens; one entry except for "positions".
        platform: of the default workloads; those of a GPU are large enough to fill one.
    """

    name: str
    network: Network
    batch_size: int
    task: Task = "train"
    precision: Precision = "float32"
    steps_per_call: int = 1
    steps_per_dispatch: int = 1
    steps_per_fit: int = 10
    members: int = 1
    prompt: int = 0
    new_tokens: tuple[int, ...] = ()
    platform: Literal["cpu", "gpu"] = "cpu"

    @property
    def unit(self) -> str:
        """What a measured time refers to."""
        return {
            "train": "step",
            "infer": "batch",
            "population": f"step of all {self.members}",
            "epoch": "epoch",
            "autoencode": "step",
            "adversarial": "step",
            "generate": "token",
            "positions": "token",
            "embed": f"{NUM_SENTENCES} sentences",
            "read": "file",
            "read-cold": "file",
        }[self.task]

    @property
    def capacity(self) -> int:
        """Length of the longest generated sequence, prompt included."""
        return self.prompt + max(self.new_tokens)

    def inputs(self) -> np.ndarray:
        """Return the inputs of every batch, float32 or int32 [batch, ...]."""
        rng = np.random.default_rng(0)
        shape = (self.batch_size, *self.network.input_shape)
        if self.network.reads_tokens:
            return rng.integers(0, self.network.num_outputs, shape, np.int32)
        if self.network.input_range is not None:
            return rng.uniform(*self.network.input_range, shape).astype(np.float32)
        return rng.standard_normal(shape, np.float32)

    def labels(self) -> np.ndarray:
        """Return the labels of all batches, int32 [NUM_BATCHES, batch, ...]."""
        rng = np.random.default_rng(1)
        shape = (NUM_BATCHES, self.batch_size, *self.network.label_shape)
        return rng.integers(0, self.network.num_outputs, shape, np.int32)

    def bundle(self) -> dict[str, np.ndarray]:
        """Return the batches of a dispatch, "inputs" and "labels" [steps, batch, ...]."""
        steps, inputs, labels = self.steps_per_dispatch, self.inputs(), self.labels()
        return {
            "inputs": np.broadcast_to(inputs, (steps, *inputs.shape)),
            "labels": np.resize(labels, (steps, *labels.shape[1:])),
        }

    def prompts(self) -> np.ndarray:
        """Return the prompts, int32 [batch, prompt]."""
        rng = np.random.default_rng(2)
        shape = (self.batch_size, self.prompt)
        return rng.integers(0, self.network.num_outputs, shape, np.int32)


_MLP = Perceptron(num_inputs=784, features=(512, 512))
_SMALL_MLP = Perceptron(num_inputs=64, features=(64, 64))
_CNN = Convolutional()
_GPT = LanguageTransformer(num_outputs=65, num_layers=6, num_heads=6, width=384, context=128)
_LONG_GPT = LanguageTransformer(num_outputs=65, num_layers=6, num_heads=6, width=384, context=1024)
_GPT2 = LanguageTransformer(
    num_outputs=50_257, num_layers=12, num_heads=12, width=768, context=1024, tied=True
)
_SMOLLM2 = Llama(
    num_outputs=49_152,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    width=576,
    mlp_dim=1536,
    context=8192,
)
_CONTINUED: dict[str, Any] = {"network": _SMOLLM2, "task": "generate", "prompt": 128}

_LSTM = RecurrentLanguage(num_outputs=65, embedding=256, hidden=512, num_layers=2, time=64)
_WIDE_LSTM = RecurrentLanguage(num_outputs=65, embedding=512, hidden=1024, num_layers=2, time=128)
_VIT = Vision(num_layers=12, num_heads=6, width=384, image=(128, 128, 3), patch=8)
_ON_GPU: dict[str, Any] = {"platform": "gpu", "steps_per_call": 10}

#: Name -> workload, in the order of the report.
WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        Workload(name="mlp", network=_MLP, batch_size=128, steps_per_call=20, steps_per_fit=100),
        Workload(name="cnn", network=_CNN, batch_size=128, steps_per_call=2, steps_per_fit=20),
        Workload(name="gpt", network=_GPT, batch_size=8, steps_per_fit=4),
        Workload(
            name="gpt-bf16", network=_GPT, batch_size=8, precision="bfloat16", steps_per_fit=8
        ),
        Workload(name="gpt-1024", network=_LONG_GPT, batch_size=1, steps_per_fit=4),
        Workload(name="lstm", network=_LSTM, batch_size=32, steps_per_fit=6),
        Workload(name="resnet18", network=Residual(), batch_size=32, steps_per_fit=3),
        Workload(
            name="vit",
            network=Vision(num_layers=6, num_heads=3, width=192),
            batch_size=32,
            steps_per_fit=8,
        ),
        Workload(
            name="bigru",
            network=BidirectionalGRU(channels=40, hidden=128, time=100),
            batch_size=32,
            steps_per_call=2,
            steps_per_fit=20,
        ),
        Workload(
            name="vae",
            network=VariationalAutoencoder(),
            batch_size=128,
            task="autoencode",
            steps_per_call=20,
        ),
        Workload(name="dcgan", network=AdversarialPair(), batch_size=64, task="adversarial"),
        Workload(
            name="small-mlp",
            network=_SMALL_MLP,
            batch_size=32,
            steps_per_call=500,
            steps_per_dispatch=50,
            steps_per_fit=2000,
        ),
        Workload(
            name="population-64-64-10",
            network=_SMALL_MLP,
            batch_size=32,
            task="population",
            members=16,
            steps_per_call=100,
            steps_per_dispatch=50,
            steps_per_fit=50,
        ),
        Workload(
            name="population-784-128-10",
            network=Perceptron(num_inputs=784, features=(128,)),
            batch_size=128,
            task="population",
            members=16,
            steps_per_call=20,
            steps_per_dispatch=20,
            steps_per_fit=20,
        ),
        Workload(
            name="population-cnn",
            network=Convolutional(channels=(8, 16), features=()),
            batch_size=32,
            task="population",
            members=16,
        ),
        Workload(name="cnn-infer-1", network=_CNN, batch_size=1, task="infer", steps_per_call=100),
        Workload(name="cnn-infer-256", network=_CNN, batch_size=256, task="infer"),
        Workload(
            name="resnet18-infer-1",
            network=Residual(),
            batch_size=1,
            task="infer",
            steps_per_call=5,
        ),
        Workload(name="resnet18-infer-256", network=Residual(), batch_size=256, task="infer"),
        Workload(
            name="generate",
            network=_GPT2,
            batch_size=1,
            task="generate",
            prompt=128,
            new_tokens=(256,),
        ),
        Workload(
            name="positions",
            network=_GPT2,
            batch_size=1,
            task="positions",
            prompt=12,
            new_tokens=(64, 128, 256, 500),
        ),
        # Their number of tokens includes the first one, which "-first" times alone.
        Workload(name="smollm2-1", batch_size=1, new_tokens=(128,), **_CONTINUED),
        Workload(name="smollm2-1-first", batch_size=1, new_tokens=(1,), **_CONTINUED),
        Workload(name="smollm2-8", batch_size=8, new_tokens=(128,), **_CONTINUED),
        Workload(name="smollm2-8-first", batch_size=8, new_tokens=(1,), **_CONTINUED),
        Workload(name="embed", network=SentenceFolder(), batch_size=32, task="embed"),
        Workload(name="weights", network=_SMOLLM2, batch_size=1, task="read"),
        Workload(name="weights-cold", network=_SMOLLM2, batch_size=1, task="read-cold"),
        # 468 full batches are one epoch of the 60,000 images.
        Workload(
            name="epoch", network=_CNN, batch_size=128, task="epoch", steps_per_call=60_000 // 128
        ),
        Workload(
            name="mlp-4096",
            network=Perceptron(num_inputs=784, features=(4096, 4096)),
            batch_size=4096,
            **_ON_GPU,
        ),
        Workload(name="cnn-4096", network=_CNN, batch_size=4096, **_ON_GPU),
        Workload(name="gpt2-bf16", network=_GPT2, batch_size=16, precision="bfloat16", **_ON_GPU),
        Workload(name="lstm-1024", network=_WIDE_LSTM, batch_size=128, **_ON_GPU),
        Workload(name="resnet18-1024", network=Residual(), batch_size=1024, **_ON_GPU),
        Workload(
            name="resnet18-1024-bf16",
            network=Residual(),
            batch_size=1024,
            precision="bfloat16",
            **_ON_GPU,
        ),
        Workload(
            name="vit-256-bf16", network=_VIT, batch_size=256, precision="bfloat16", **_ON_GPU
        ),
    )
}

_DEEP = LanguageTransformer(num_outputs=65, num_layers=12, num_heads=6, width=384, context=128)
#: Name -> workload of `startup`, which times the first step.
STARTS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        Workload(name="gpt-12", network=_DEEP, batch_size=1),
        Workload(
            name="gpt-12-scanned", network=dataclasses.replace(_DEEP, scanned=True), batch_size=1
        ),
    )
}


def shrink(workload: Workload) -> Workload:
    """Return a small workload of the same kind, to check that a side runs.

    Args:
        workload: to shrink.

    Returns:
        The workload with small shapes and few steps.
    """
    network, one = workload.network, workload.batch_size == 1
    hidden = (8,) * len(getattr(network, "features", ()))
    small: dict[type[Network], dict[str, Any]] = {
        Perceptron: {"num_inputs": 12, "features": hidden},
        Convolutional: {
            "channels": (2, 3),
            "features": hidden,
        },
        Residual: {"image": (8, 8, 3), "width": 4, "num_stages": 2},
        LanguageTransformer: {"num_layers": 1, "num_heads": 2, "width": 8, "context": 16},
        Llama: {
            "num_layers": 1,
            "num_heads": 4,
            "num_kv_heads": 2,
            "width": 16,
            "mlp_dim": 12,
            "context": 16,
        },
        SentenceFolder: {},
        Vision: {"num_layers": 1, "num_heads": 2, "width": 8, "image": (8, 8, 3)},
        RecurrentLanguage: {"embedding": 6, "hidden": 8, "num_layers": 1, "time": 5},
        BidirectionalGRU: {"channels": 3, "hidden": 8, "time": 5},
        VariationalAutoencoder: {"image": (4, 4, 1), "hidden": 8, "latent": 3},
        AdversarialPair: {"image": (16, 16, 1), "latent": 5, "width": 4, "num_doublings": 2},
    }
    changes = small[type(network)]
    if network.reads_tokens:
        changes["num_outputs"] = 20
    return dataclasses.replace(
        workload,
        network=dataclasses.replace(network, **changes),
        batch_size=1 if one else 8,
        steps_per_call=4,
        steps_per_dispatch=min(workload.steps_per_dispatch, 2),
        steps_per_fit=4,
        members=min(workload.members, 3),
        prompt=min(workload.prompt, 4),
        new_tokens=(3, 5)[: len(workload.new_tokens)],
    )
