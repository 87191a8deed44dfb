"""Functional neural networks on JAX: one definition, every executor, proved equal.

import jaxnets as jn

module = jn.MLP(features=(128, 128), num_outputs=10)
update = jn.Update(jn.classification(module), optax.adamw(1e-3))
state = jn.create_train_state(module.init(key, images[:1]), update, rng=key)
step = jn.jit_step(jn.make_train_step(update))
state, history = jn.fit(step, state, batches, num_steps=1_000)
"""

from jaxnets import (
    autoencoder,
    checkpoint,
    convolutional,
    data,
    feedforward,
    functional,
    gan,
    generative_metrics,
    layers,
    metrics,
    recurrent,
    sequence,
    transformer,
)
from jaxnets.autoencoder import VAE, VQVAE, Autoencoder, CoderConfig
from jaxnets.beam_search import beam_search
from jaxnets.checkpoint import CheckpointError, parameters_sha256
from jaxnets.convolutional import (
    ConvNet,
    ConvNeXt,
    LeNet5,
    PilotNet,
    ResNet,
    ResNet9,
    WideResNet,
)
from jaxnets.core import (
    DATA_AXIS,
    Batch,
    BatchSource,
    Executor,
    Mean,
    Metrics,
    ModelState,
    Objective,
    ObjectiveOutput,
    Params,
    Precision,
    StepFn,
    TrainState,
    Update,
    apply_module,
    rng_streams,
)
from jaxnets.diagnostics import find_learning_rate, overfit_one_batch
from jaxnets.equivalence import check_equivalence
from jaxnets.feedforward import MLP, MLPMixer
from jaxnets.gan import (
    GAN,
    DCGANDiscriminator,
    DCGANGenerator,
    ResNetDiscriminator,
    ResNetGenerator,
    adversarial,
    dcgan,
    generate_images,
    resnet_gan,
)
from jaxnets.generation import generate
from jaxnets.generative_metrics import (
    class_coverage,
    classifier_features,
    frechet_distance,
    precision_recall,
)
from jaxnets.history import History, NonFiniteError, jsonl_writer, tensorboard_writer
from jaxnets.hooks import Checkpointing, EarlyStopping, evaluation, every, resume
from jaxnets.host_memory import keep_memory
from jaxnets.hyperparameters import scheduled, with_hyperparameters
from jaxnets.latent_objectives import (
    importance_weighted,
    importance_weighted_bound,
    vae,
    vq_vae,
)
from jaxnets.layers import capture
from jaxnets.likelihoods import Bernoulli, DiscretizedLogistic, Gaussian, SquaredError
from jaxnets.loop import Hook, Interrupted, StopTraining, evaluate, fit
from jaxnets.objectives import (
    absolute_error,
    binary_cross_entropy,
    classification,
    cross_entropy,
    huber_error,
    regression,
    squared_error,
    with_batch_transform,
)
from jaxnets.optimizers import (
    averaged_parameters,
    decay_mask,
    muon_dimensions,
    with_parameter_average,
)
from jaxnets.parallel import (
    data_mesh,
    fsdp_sharding,
    jit_step,
    pmap_step,
    population_step,
    replicate,
    resident_steps,
    scan_steps,
    sharded_step,
)
from jaxnets.patches import join_patches, split_patches
from jaxnets.reconstruction_objectives import (
    contractive,
    denoising,
    masked_reconstruction,
    reconstruction,
    sparse_reconstruction,
)
from jaxnets.recurrent import (
    Recurrent,
    RecurrentLM,
    RecurrentTranslator,
    SequenceClassifier,
    SpeechRecognizer,
    TextClassifier,
)
from jaxnets.regression_heads import DiscretizedHead, GaussianHead, head_regression
from jaxnets.saliency import input_gradient, visual_backprop
from jaxnets.sampling import Sampling
from jaxnets.sequence_objectives import ctc, language_modelling, sequence_to_sequence, with_carry
from jaxnets.spectral_norm import SpectralNorm
from jaxnets.summary import Summary, summarize, summarize_model
from jaxnets.training import TrainStep, create_train_state, make_eval_step, make_train_step
from jaxnets.transformer import (
    AudioTransformer,
    BlockConfig,
    MaskedAutoencoder,
    TransformerClassifier,
    TransformerEncoder,
    TransformerLM,
    TransformerTranslator,
    VisionTransformer,
)

__version__ = "0.1.0"

__all__ = [
    "DATA_AXIS",
    "GAN",
    "MLP",
    "VAE",
    "VQVAE",
    "AudioTransformer",
    "Autoencoder",
    "Batch",
    "BatchSource",
    "Bernoulli",
    "BlockConfig",
    "CheckpointError",
    "Checkpointing",
    "CoderConfig",
    "ConvNeXt",
    "ConvNet",
    "DCGANDiscriminator",
    "DCGANGenerator",
    "DiscretizedHead",
    "DiscretizedLogistic",
    "EarlyStopping",
    "Executor",
    "Gaussian",
    "GaussianHead",
    "History",
    "Hook",
    "Interrupted",
    "LeNet5",
    "MLPMixer",
    "MaskedAutoencoder",
    "Mean",
    "Metrics",
    "ModelState",
    "NonFiniteError",
    "Objective",
    "ObjectiveOutput",
    "Params",
    "PilotNet",
    "Precision",
    "Recurrent",
    "RecurrentLM",
    "RecurrentTranslator",
    "ResNet",
    "ResNet9",
    "ResNetDiscriminator",
    "ResNetGenerator",
    "Sampling",
    "SequenceClassifier",
    "SpectralNorm",
    "SpeechRecognizer",
    "SquaredError",
    "StepFn",
    "StopTraining",
    "Summary",
    "TextClassifier",
    "TrainState",
    "TrainStep",
    "TransformerClassifier",
    "TransformerEncoder",
    "TransformerLM",
    "TransformerTranslator",
    "Update",
    "VisionTransformer",
    "WideResNet",
    "absolute_error",
    "adversarial",
    "apply_module",
    "autoencoder",
    "averaged_parameters",
    "beam_search",
    "binary_cross_entropy",
    "capture",
    "check_equivalence",
    "checkpoint",
    "class_coverage",
    "classification",
    "classifier_features",
    "contractive",
    "convolutional",
    "create_train_state",
    "cross_entropy",
    "ctc",
    "data",
    "data_mesh",
    "dcgan",
    "decay_mask",
    "denoising",
    "evaluate",
    "evaluation",
    "every",
    "feedforward",
    "find_learning_rate",
    "fit",
    "frechet_distance",
    "fsdp_sharding",
    "functional",
    "gan",
    "generate",
    "generate_images",
    "generative_metrics",
    "head_regression",
    "huber_error",
    "importance_weighted",
    "importance_weighted_bound",
    "input_gradient",
    "jit_step",
    "join_patches",
    "jsonl_writer",
    "keep_memory",
    "language_modelling",
    "layers",
    "make_eval_step",
    "make_train_step",
    "masked_reconstruction",
    "metrics",
    "muon_dimensions",
    "overfit_one_batch",
    "parameters_sha256",
    "pmap_step",
    "population_step",
    "precision_recall",
    "reconstruction",
    "recurrent",
    "regression",
    "replicate",
    "resident_steps",
    "resnet_gan",
    "resume",
    "rng_streams",
    "scan_steps",
    "scheduled",
    "sequence",
    "sequence_to_sequence",
    "sharded_step",
    "sparse_reconstruction",
    "split_patches",
    "squared_error",
    "summarize",
    "summarize_model",
    "tensorboard_writer",
    "transformer",
    "vae",
    "visual_backprop",
    "vq_vae",
    "with_batch_transform",
    "with_carry",
    "with_hyperparameters",
    "with_parameter_average",
]
