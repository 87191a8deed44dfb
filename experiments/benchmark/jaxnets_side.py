"""jaxnets: its networks and its executors."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import optax

import jaxnets as jn
from experiments.benchmark import jaxnets_generative
from experiments.benchmark.architectures import (
    BidirectionalGRU,
    Blocks,
    Convolutional,
    LanguageTransformer,
    Llama,
    Network,
    Perceptron,
    RecurrentLanguage,
    Residual,
    Vision,
)
from experiments.benchmark.reading import reading
from experiments.benchmark.sides import Prepared, Settings, ready
from experiments.benchmark.workloads import LEARNING_RATE, Workload
from experiments.embeddings import embed, load_encoder

LIBRARIES = ("jaxnets", "jax", "flax", "optax")


def prepare(settings: Settings) -> Prepared:
    """Build a workload.

    The variant "kept" calls `keep_freed_memory`; "split" also computes float32 matmuls as three
    bfloat16 matmuls.
    """
    if settings.variant in ("kept", "split"):
        jn.keep_freed_memory()
    if settings.variant == "split":
        jax.config.update("jax_default_matmul_precision", "BF16_BF16_F32_X3")
    workload = settings.workload
    make = {
        "train": train,
        "population": train_population,
        "infer": infer,
        "epoch": lambda workload: train_epoch(workload, Path(settings.images).parent),
        "autoencode": train_generative,
        "adversarial": train_generative,
        "generate": lambda workload: generate(workload, settings.pretrained),
        "positions": generate_by_position,
        "embed": lambda workload: embed_sentences(workload, settings),
        "read": lambda workload: read_file(workload, settings),
        "read-cold": lambda workload: read_file(workload, settings),
    }[workload.task]
    return make(workload)


def build(network: Network, precision: jn.Precision) -> Any:
    """Return the module of an architecture."""
    policy: dict[str, Any] = {"precision": precision, "num_outputs": network.num_outputs}
    match network:
        case Perceptron():
            return jn.MLP(features=network.features, **policy)
        case Convolutional():
            return jn.ConvNet(features=network.channels, hidden_features=network.features, **policy)
        case Residual():
            stages = (2,) * network.num_stages
            return jn.ResNet(stages, stem="cifar", width=network.width, **policy)
        case LanguageTransformer():
            return jn.TransformerLM(
                network.num_outputs,
                num_layers=network.num_layers,
                config=_blocks(network),
                max_length=network.context,
                tied=network.tied,
                precision=precision,
            )
        case Vision():
            return jn.VisionTransformer(
                patch_size=network.patch,
                num_layers=network.num_layers,
                config=_blocks(network),
                **policy,
            )
        case RecurrentLanguage():
            return jn.RecurrentLM(
                network.num_outputs,
                embedding_size=network.embedding,
                hidden_size=network.hidden,
                cell="lstm",
                num_layers=network.num_layers,
                precision=precision,
            )
        case BidirectionalGRU():
            return jn.SequenceClassifier(
                hidden_size=network.hidden, cell="gru", bidirectional=True, **policy
            )
    raise TypeError(f"no module for {network}")


def _blocks(network: Blocks) -> jn.BlockConfig:
    # The attention of the other libraries has all biases.
    return jn.BlockConfig(
        features=network.width,
        num_heads=network.num_heads,
        activation="gelu_tanh",
        key_bias=True,
        scan_layers=network.scanned,
    )


def _module(workload: Workload) -> Any:
    return build(workload.network, jn.Precision(compute=jnp.dtype(workload.precision)))


def _update(workload: Workload, module: Any) -> jn.Update:
    make = jn.language_modeling if workload.network.reads_tokens else jn.classification
    return jn.Update(make(module, metrics={}), optax.adam(LEARNING_RATE))


def _create(workload: Workload, module: Any, update: jn.Update, seed: Any) -> jn.TrainState:
    key = jax.random.key(seed)
    variables = jn.initialize(module, key, workload.inputs()[:1])
    return jn.create_train_state(variables, update, rng=key)


def _size(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def train(workload: Workload) -> Prepared:
    """Single steps, or a scan over the steps of a dispatch."""
    module = _module(workload)
    update = _update(workload, module)
    # One compiled program, as in the experiments: eager creation dispatches every array.
    state = jax.jit(lambda seed: _create(workload, module, update, seed))(0)
    step, batches = _bundled(workload, jn.make_train_step(update))
    run = _steps(jn.jit_step(step, donate=True), state, batches, workload.steps_per_dispatch)
    return ready(workload, run, _size(state.params), steps_first=workload.steps_per_dispatch)


def train_population(workload: Workload) -> Prepared:
    """A step of every network; the first call chooses the fastest loop over the members."""
    module = _module(workload)
    update = _update(workload, module)
    seeds = np.arange(workload.members)
    states = jax.jit(jax.vmap(lambda seed: _create(workload, module, update, seed)))(seeds)
    step, batches = _bundled(workload, jn.make_train_step(update))
    executor = jn.PopulationExecutor(step, donate=True)
    run = _steps(executor, states, batches, workload.steps_per_dispatch)
    return ready(
        workload,
        run,
        _size(states.params) // workload.members,
        steps_first=workload.steps_per_dispatch,
        details=lambda: {"loops": executor.milliseconds},
    )


def _bundled(workload: Workload, step: jn.StepFn) -> tuple[jn.StepFn, list[Any]]:
    """Return the step of a dispatch and its batches."""
    if workload.steps_per_dispatch > 1:
        return jn.scan_steps(step), [jax.device_put(workload.bundle())]
    inputs, labels = workload.inputs(), workload.labels()
    return step, [jax.device_put({"inputs": inputs, "labels": each}) for each in labels]


def train_generative(workload: Workload) -> Prepared:
    """Single steps of one network, or of two in one state."""
    state, step = jaxnets_generative.create(workload)
    batches = [jax.device_put({"inputs": workload.inputs()})]
    run = _steps(jn.jit_step(step, donate=True), state, batches, 1)
    return ready(workload, run, _size(state.params))


def _steps(
    executor: jn.Executor, state: jn.TrainState, batches: list[Any], bundled: int
) -> Callable[[int], float]:
    endless = itertools.cycle(batches)

    def run(num_steps: int) -> float:
        nonlocal state
        metrics: jn.Metrics = {}
        for _ in range(num_steps // bundled):
            state, metrics = executor(state, next(endless))
        metrics = jax.device_get(jax.block_until_ready((state, metrics))[1])
        # One loss, or one per network.
        losses = [metrics[name] for name in metrics if name.split("/")[-1] == "loss"]
        return float(sum(np.sum(loss.total) / np.sum(loss.count) for loss in losses))

    return run


def infer(workload: Workload) -> Prepared:
    """Logits of a batch."""
    module = _module(workload)
    inputs = jax.device_put(workload.inputs())
    variables = jn.initialize(module, jax.random.key(0), inputs[:1])
    predict = jax.jit(module.apply)

    def run(num_steps: int) -> None:
        for _ in range(num_steps):
            logits = predict(variables, inputs)
        jax.block_until_ready(logits)

    return ready(workload, run, _size(variables["params"]))


def train_epoch(workload: Workload, folder: Path) -> Prepared:
    """From the files to trained parameters, with `fit`."""
    module = _module(workload)

    def normalized(batch: jn.Batch, rng: jax.Array, train: bool) -> jn.Batch:
        return {**batch, "inputs": jn.data.normalize(batch["inputs"], mean, deviation)}

    # As in `ImageDataset` of the library.
    mean, deviation = (0.2860,), (0.3530,)
    update = _update(workload, module)
    objective = jn.with_batch_transform(update.objective, normalized)
    update = jn.Update(objective, update.optimizer)
    executor = jn.jit_step(jn.make_train_step(update), donate=True)
    create = jax.jit(lambda: _create(workload, module, update, 0))

    def run(num_steps: int) -> float:
        dataset = jn.data.fashion_mnist(folder, download=False)
        batches = jn.data.shuffled_batches(dataset.train, workload.batch_size, seed=0)
        state, history = jn.fit(
            *(executor, create(), jn.data.prefetch(batches)), num_steps=num_steps, progress=False
        )
        jax.block_until_ready(state)
        return history.column("loss")[1][-1]

    return ready(workload, run, _size(jax.eval_shape(create).params))


def _language_model(
    workload: Workload, pretrained: str = ""
) -> tuple[Any, Mapping[str, Any], jax.Array]:
    prompts = jnp.asarray(workload.prompts())
    if isinstance(workload.network, Llama):
        network = jn.pretrained.load(pretrained)
        return network.module, network.variables, prompts
    module = _module(workload)
    variables = jn.initialize(module, jax.random.key(0), prompts)
    return module, variables, prompts


def generate(workload: Workload, pretrained: str) -> Prepared:
    """Continue prompts greedily, prefill included."""
    module, variables, prompts = _language_model(workload, pretrained)

    def run(num_calls: int) -> None:
        for _ in range(num_calls):
            written = _continue(module, variables, prompts, workload.new_tokens[0])
        jax.block_until_ready(written)

    return ready(workload, run, _size(variables["params"]))


def generate_by_position(workload: Workload) -> Prepared:
    """Time per token at several positions of a cache of constant size."""
    module, variables, prompts = _language_model(workload)
    times: dict[int, list[float]] = {length: [] for length in workload.new_tokens}
    programs = 0

    def count(event: str, duration_secs: float, **_: Any) -> None:
        nonlocal programs
        programs += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(count)
    after_first = 0

    def run(num_calls: int) -> None:
        nonlocal after_first
        for length in times:
            started = time.perf_counter()
            # Other prompts of the same shape must not compile another program.
            rolled = np.roll(prompts, len(times[length]), axis=1)
            jax.block_until_ready(
                _continue(module, variables, jnp.asarray(rolled), length, workload.capacity)
            )
            times[length].append(time.perf_counter() - started)
        after_first = after_first or programs

    def details() -> dict[str, Any]:
        # The first call of each length compiles.
        medians = {length: float(np.median(each[1:])) for length, each in times.items()}
        costs, start, before = {}, 0, 0.0
        for length, median in medians.items():
            costs[f"{start} to {length}"] = 1000 * (median - before) / (length - start)
            start, before = length, median
        return {
            "ms a token by position": {name: round(cost, 4) for name, cost in costs.items()},
            "programs compiled after the first calls": programs - after_first,
        }

    return ready(workload, run, _size(variables["params"]), details=details)


def embed_sentences(workload: Workload, settings: Settings) -> Prepared:
    """From texts to vectors in NumPy."""
    network = load_encoder(Path(settings.pretrained))
    sentences = Path(settings.sentences).read_text(encoding="utf-8").split("\n")

    def run(num_calls: int) -> None:
        for _ in range(num_calls):
            vectors = embed(network, sentences, batch_size=workload.batch_size)
            assert len(vectors) == len(sentences)

    return ready(workload, run, _size(network.variables["params"]))


def read_file(workload: Workload, settings: Settings) -> Prepared:
    """The tensors of a file to arrays on the device."""

    def read(path: Path) -> Any:
        tensors = jn.pretrained.read_tensors(path)
        arrays = {name: jax.device_put(tensors[name]) for name in tensors}
        return jax.block_until_ready(arrays)

    assert isinstance(workload.network, Llama)
    shapes = workload.network.tensors.values()
    return reading(settings, read, sum(math.prod(shape) for shape in shapes))


def _continue(
    module: Any, variables: Any, prompts: jax.Array, num_tokens: int, capacity: int | None = None
) -> jax.Array:
    return jn.generate(
        module,
        variables,
        prompts,
        num_tokens=num_tokens,
        rng=jax.random.key(0),
        sampling=jn.Sampling(temperature=0),
        capacity=capacity,
    ).tokens
