"""Training: the step, executors, the loop, hooks, checkpoints, diagnostics."""

from jaxnets.training.checkpoint import CheckpointError, parameters_sha256
from jaxnets.training.diagnostics import (
    LearningRateSearch,
    OverfitReport,
    find_learning_rate,
    overfit_one_batch,
)
from jaxnets.training.equivalence import EquivalenceReport, check_equivalence
from jaxnets.training.executors import (
    jit_step,
    pmap_step,
    population_step,
    resident_steps,
    scan_steps,
    sharded_step,
)
from jaxnets.training.histograms import gradient_histograms, parameter_histograms
from jaxnets.training.history import History, NonFiniteError
from jaxnets.training.hooks import Checkpointing, EarlyStopping, every, resume, validation
from jaxnets.training.initialization import initialize
from jaxnets.training.loop import Hook, Interrupted, StopTraining, evaluate, evaluate_sums, fit
from jaxnets.training.media import Histogram, Image
from jaxnets.training.optimizers import (
    ParameterAverageState,
    averaged_parameters,
    decay_mask,
    muon_dimensions,
    with_parameter_average,
)
from jaxnets.training.population import PopulationExecutor
from jaxnets.training.recalibration import recalibrate_batch_norm
from jaxnets.training.sharding import (
    ShardingRules,
    ShardingSummary,
    data_mesh,
    describe_sharding,
    device_mesh,
    fsdp_sharding,
    replicate,
    state_sharding,
)
from jaxnets.training.step import TrainStep, create_train_state, make_eval_step, make_train_step
from jaxnets.training.writers import jsonl_writer, tensorboard_writer, wandb_writer

__all__ = [
    "CheckpointError",
    "Checkpointing",
    "EarlyStopping",
    "EquivalenceReport",
    "Histogram",
    "History",
    "Hook",
    "Image",
    "Interrupted",
    "LearningRateSearch",
    "NonFiniteError",
    "OverfitReport",
    "ParameterAverageState",
    "PopulationExecutor",
    "ShardingRules",
    "ShardingSummary",
    "StopTraining",
    "TrainStep",
    "averaged_parameters",
    "check_equivalence",
    "create_train_state",
    "data_mesh",
    "decay_mask",
    "describe_sharding",
    "device_mesh",
    "evaluate",
    "evaluate_sums",
    "every",
    "find_learning_rate",
    "fit",
    "fsdp_sharding",
    "gradient_histograms",
    "initialize",
    "jit_step",
    "jsonl_writer",
    "make_eval_step",
    "make_train_step",
    "muon_dimensions",
    "overfit_one_batch",
    "parameter_histograms",
    "parameters_sha256",
    "pmap_step",
    "population_step",
    "recalibrate_batch_norm",
    "replicate",
    "resident_steps",
    "resume",
    "scan_steps",
    "sharded_step",
    "state_sharding",
    "tensorboard_writer",
    "validation",
    "wandb_writer",
    "with_parameter_average",
]
