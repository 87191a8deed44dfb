"""The definition of an experiment: data, network, objective, optimizer; always a population."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

import jaxnets as jn
from experiments.harness.optimizers import make_optimizer
from experiments.harness.options import Options
from experiments.harness.run_folder import RunFolder

#: Training batches for the batch norms of averaged parameters. Of a momentum of 0.9 they leave a
#: weight of 0.005 to the statistics of the last parameters.
_RECALIBRATION_BATCHES = 50
#: Of the sharded executor: [seeds, batch, ...].
_BATCH_SPEC = jax.sharding.PartitionSpec(None, jn.DATA_AXIS)


@dataclasses.dataclass(frozen=True)
class Measured:
    """The outcome of a run.

    Attributes:
        metric: name of the metric, such as "test accuracy".
        values: one per seed; NaN for a network that diverged.
        unit: "%" if the values are fractions, else a unit such as "nats per character".
        details: further entries of `result.json`.
    """

    metric: str
    values: np.ndarray
    unit: str = "%"
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Problem(abc.ABC):
    """The data and network of an experiment, and their training with its options.

    A subclass sets the attributes in its constructor and defines the abstract methods.

    Attributes:
        options: of the run.
        dataset_name: for the result.
        dataset: what the run folder keeps a digest of; None if the options determine the data.
        module: the network.
        objective: its training objective.
        population_strategy: how a population is executed, see `jaxnets.population_step`.
        resident: training arrays that the scan executor stores on the device; None if the batches
            come from the host.
        steps_per_epoch: batches per epoch.
        eval_batches: held-out batches for the curves.
        eval_name: prefix of the metrics of `eval_batches`.
    """

    options: Options
    dataset_name: str
    dataset: Any = None
    module: Any
    objective: jn.Objective
    population_strategy: Literal["vmap", "map"] = "map"
    resident: Mapping[str, np.ndarray] | None = None
    steps_per_epoch: int
    eval_batches: Sequence[jn.Batch]
    eval_name: str = "test"
    _recalibrating: tuple[jn.Objective, jn.Executor] | None = None

    @abc.abstractmethod
    def example(self) -> tuple[Any, ...]:
        """Return example inputs, to initialize the network."""

    def member_source(self, seed: int) -> jn.BatchSource:
        """Return the training batches of one seed: by default the `resident` arrays, shuffled."""
        options, train = self.options, self.resident
        assert train is not None, "a problem without resident arrays has a source of its own"
        if options.executor == "scan":  # they are on the device: transfer indices only
            count = len(next(iter(train.values())))
            return jn.data.index_batches(count, options.batch_size, seed=seed)
        return jn.data.shuffled_batches(train, options.batch_size, seed=seed)

    @abc.abstractmethod
    def measure(self, states: jn.TrainState) -> Measured:
        """Evaluate the final networks."""

    @abc.abstractmethod
    def draw(
        self, folder: RunFolder, states: jn.TrainState, history: jn.History, measured: Measured
    ) -> Mapping[str, str]:
        """Write figures and samples into the run folder.

        Returns:
            {name of a picture, without its suffix: sentence that explains it in the report}.
        """

    def initial_variables(self, key: jax.Array) -> Mapping[str, Any]:
        """Initialize one network."""
        return jn.initialize(self.module, key, *self.example())

    @property
    def num_steps(self) -> int:
        """Number of steps of the run."""
        options = self.options
        return options.steps or max(round(options.epochs * self.steps_per_epoch), 1)

    @property
    def stages(self) -> Sequence[int]:
        """Last step of each stage of the run, ascending to `num_steps`; one stage by default.

        Before each stage `prepare` is called, then `batches` and `executor`.
        """
        return (self.num_steps,)

    def prepare(self, folder: RunFolder, stage: int, states: jn.TrainState) -> str | None:
        """Prepare the data or the objective of a stage; nothing by default.

        A resumed run also calls this for the finished stages, with later states: read what they
        produced from the folder.

        Args:
            folder: of the run.
            stage: counts from 0.
            states: the networks at the start of the stage.

        Returns:
            A line to print, or None.
        """
        return None

    @property
    def update(self) -> jn.Update | Sequence[jn.Update]:
        """The update of a step, or a sequence of them."""
        return jn.Update(self.objective, make_optimizer(self.options, self.num_steps))

    @property
    def seeds(self) -> np.ndarray:
        """Seed of every network."""
        return np.arange(self.options.seed, self.options.seed + self.options.seeds)

    def create_states(self) -> jn.TrainState:
        """Initialize the population: every leaf has a leading axis of seeds."""

        def create(seed: jax.Array) -> jn.TrainState:
            keys = jn.rng_streams(jax.random.key(seed), "params", "run")
            variables = self.initial_variables(keys["params"])
            return jn.create_train_state(variables, self.update, rng=keys["run"])

        return jax.jit(jax.vmap(create))(self.seeds)

    def batches(self) -> jn.BatchSource:
        """Return the batches of all seeds: each keeps its own order, so it equals its solo run."""
        options = self.options
        source = jn.data.member_batches([self.member_source(int(seed)) for seed in self.seeds])
        if options.executor == "scan":
            return jn.data.chunked(source, options.steps_per_dispatch)
        if options.executor == "sharded":
            return jn.data.sharded_batches(source, jn.data_mesh(), batch_spec=_BATCH_SPEC)
        # pmap transfers each batch from the host and splits it over the devices.
        return jn.data.prefetch(source) if options.executor == "jit" else source

    def train_step(self) -> jn.StepFn:
        """Build the step of one network."""
        return jn.make_train_step(self.update)

    def hooks(self, folder: RunFolder) -> Sequence[jn.Hook]:
        """Return further hooks, such as one that draws images; none by default."""
        return ()

    def executor(self) -> jn.Executor:
        """Build the executor of the options."""
        step = jn.population_step(
            self.train_step(),
            shared_batch=False,
            strategy=self.population_strategy,
            on_non_finite=self.options.on_non_finite,
        )
        if self.options.executor == "scan":
            if self.resident is not None:
                return jn.resident_steps(step, self.resident, donate=True)
            return jn.jit_step(jn.scan_steps(step), donate=True)
        if self.options.executor == "pmap":
            return jn.pmap_step(step, batch_axis=1, donate=True)
        if self.options.executor == "sharded":
            return jn.sharded_step(step, jn.data_mesh(), batch_spec=_BATCH_SPEC, donate=True)
        return jn.jit_step(step, donate=True)

    def eval_step(
        self, objective: jn.Objective | None = None
    ) -> Callable[[jn.TrainState, jn.Batch], jn.Metrics]:
        """Compile the evaluation of the population, for `jaxnets.evaluate` of `evaluated`."""
        step: Any = jn.population_step(
            jn.make_eval_step(self.objective if objective is None else objective),
            strategy=self.population_strategy,
        )
        return jn.jit_step(step)

    def evaluated(self, states: jn.TrainState) -> jn.TrainState:
        """Return the states to evaluate: with the averaged parameters, if any.

        Batch norms get the running statistics that belong to these.
        """
        if not self.options.average_decay:
            return states
        update = self.update
        assert isinstance(update, jn.Update), "several networks average their own way"
        return jn.recalibrate_batch_norm(
            update,
            dataclasses.replace(states, params=jn.averaged_parameters(states)),
            self._host_batches,
            num_batches=_RECALIBRATION_BATCHES,
            executor=self._recalibration,
        )

    def _host_batches(self, first_step: int) -> Iterator[jn.Batch]:
        """Yield the training batches of all seeds, the examples themselves in every executor."""
        source = jn.data.member_batches([self.member_source(int(seed)) for seed in self.seeds])
        for batch in source(first_step):
            arrays = dict(batch)
            if self.options.executor == "scan" and self.resident is not None:
                rows = arrays.pop("indices")  # [seeds, batch]
                arrays |= {name: array[rows] for name, array in self.resident.items()}
            yield arrays

    def _recalibration(self, step: jn.StepFn) -> jn.Executor:
        """Compile the recalibration of batch norms, once for each objective."""
        if self._recalibrating is None or self._recalibrating[0] is not self.objective:
            population = jn.population_step(
                step, shared_batch=False, strategy=self.population_strategy
            )
            self._recalibrating = self.objective, jn.jit_step(population)
        return self._recalibrating[1]


def member(population: Any, index: int) -> Any:
    """Return one member of a population: every leaf at `index` of its leading axis."""
    return jax.tree.map(lambda leaf: leaf[index], population)


def thousands(examples: Sequence[Any] | np.ndarray) -> list[slice]:
    """Split examples into consecutive slices of at most 1000, to bound the memory of one call."""
    return [slice(start, start + 1000) for start in range(0, len(examples), 1000)]
