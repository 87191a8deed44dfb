"""The public names, each imported when it is first used; see `__init__.py`."""

from . import data, functional, layers, metrics, objectives, pretrained
from .core import (
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
    capture,
    rng_streams,
    weights_keyword,
)
from .distributed import (
    DistributedError,
    agree_to_stop,
    check_agreement,
    init_distributed,
)
from .export import Program, export_onnx, export_program, load_program
from .finetuning.heads import replace_head
from .finetuning.learning_rates import freeze, layerwise_decay
from .finetuning.lora import (
    LoRASummary,
    lora_init,
    lora_objective,
    lora_summary,
    merge_lora,
    unmerge_lora,
)
from .finetuning.quantization import quantize_int8
from .functional.patches import patchify, unpatchify
from .generation.beam_search import beam_search
from .generation.ctc import ctc_beam_search, ctc_greedy
from .generation.generate import generate
from .generation.sampling import Sampling
from .host import keep_freed_memory
from .layers.spectral_norm import SpectralNorm
from .metrics.generative import (
    class_coverage,
    classifier_features,
    frechet_distance,
    precision_recall,
)
from .models import autoencoder, convolutional, feedforward, gan, recurrent, transformer
from .models.autoencoder import VAE, VQVAE, Autoencoder, EncoderDecoderConfig
from .models.convolutional import (
    ConvNet,
    ConvNeXt,
    LeNet5,
    PilotNet,
    ResNet,
    ResNet9,
    WhitenedConvNet,
    WideResNet,
)
from .models.feedforward import MLP, MLPMixer
from .models.gan import (
    GAN,
    DCGANDiscriminator,
    DCGANGenerator,
    ResNetDiscriminator,
    ResNetGenerator,
    dcgan,
    generate_images,
    resnet_gan,
)
from .models.recurrent import (
    Recurrent,
    RecurrentLM,
    RecurrentTranslator,
    SequenceClassifier,
    SpeechRecognizer,
    TextClassifier,
)
from .models.sharding import sharding_rules
from .models.transformer import (
    AudioTransformer,
    BlockConfig,
    MaskedAutoencoder,
    SpeechTransformer,
    TransformerClassifier,
    TransformerEncoder,
    TransformerLM,
    TransformerTranslator,
    VisionTransformer,
)
from .objectives import (
    absolute_error,
    classification,
    cross_entropy,
    huber_loss,
    regression,
    squared_error,
    with_batch_transform,
)
from .objectives.adversarial import adversarial
from .objectives.heads import DiscretizedHead, GaussianHead, head_regression
from .objectives.hyperparameters import scheduled, with_hyperparameters
from .objectives.latent import (
    importance_weighted,
    importance_weighted_bound,
    vae,
    vq_vae,
)
from .objectives.likelihoods import Bernoulli, DiscretizedLogistic, Gaussian, SquaredError
from .objectives.losses import binary_cross_entropy
from .objectives.reconstruction import (
    contractive,
    denoising,
    masked_reconstruction,
    reconstruction,
    sparse_reconstruction,
)
from .objectives.sequence import ctc, language_modeling, sequence_to_sequence, with_carry
from .tools.memory_fit import fit_memory
from .tools.report import write_report
from .tools.results import write_result
from .tools.saliency import input_gradient, visual_backprop
from .tools.summary import Summary, summarize, summarize_model
from .training import checkpoint
from .training.checkpoint import CheckpointError, parameters_sha256
from .training.diagnostics import find_learning_rate, overfit_one_batch
from .training.equivalence import check_equivalence
from .training.executors import (
    jit_step,
    pmap_step,
    population_step,
    resident_steps,
    scan_steps,
    sharded_step,
)
from .training.histograms import gradient_histograms, parameter_histograms
from .training.history import History, NonFiniteError
from .training.hooks import Checkpointing, EarlyStopping, every, resume, validation
from .training.initialization import initialize
from .training.loop import Hook, Interrupted, StopTraining, evaluate, evaluate_sums, fit
from .training.media import Histogram, Image
from .training.optimizers import (
    averaged_parameters,
    decay_mask,
    muon_dimensions,
    with_parameter_average,
)
from .training.population import PopulationExecutor
from .training.recalibration import recalibrate_batch_norm
from .training.sharding import (
    data_mesh,
    describe_sharding,
    device_mesh,
    fsdp_sharding,
    replicate,
    state_sharding,
)
from .training.step import TrainStep, create_train_state, make_eval_step, make_train_step
from .training.writers import jsonl_writer, tensorboard_writer, wandb_writer

__version__: str

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
    "ConvNeXt",
    "ConvNet",
    "DCGANDiscriminator",
    "DCGANGenerator",
    "DiscretizedHead",
    "DiscretizedLogistic",
    "DistributedError",
    "EarlyStopping",
    "EncoderDecoderConfig",
    "Executor",
    "Gaussian",
    "GaussianHead",
    "Histogram",
    "History",
    "Hook",
    "Image",
    "Interrupted",
    "LeNet5",
    "LoRASummary",
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
    "PopulationExecutor",
    "Precision",
    "Program",
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
    "SpeechTransformer",
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
    "WhitenedConvNet",
    "WideResNet",
    "absolute_error",
    "adversarial",
    "agree_to_stop",
    "apply_module",
    "autoencoder",
    "averaged_parameters",
    "beam_search",
    "binary_cross_entropy",
    "capture",
    "check_agreement",
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
    "ctc_beam_search",
    "ctc_greedy",
    "data",
    "data_mesh",
    "dcgan",
    "decay_mask",
    "denoising",
    "describe_sharding",
    "device_mesh",
    "evaluate",
    "evaluate_sums",
    "every",
    "export_onnx",
    "export_program",
    "feedforward",
    "find_learning_rate",
    "fit",
    "fit_memory",
    "frechet_distance",
    "freeze",
    "fsdp_sharding",
    "functional",
    "gan",
    "generate",
    "generate_images",
    "gradient_histograms",
    "head_regression",
    "huber_loss",
    "importance_weighted",
    "importance_weighted_bound",
    "init_distributed",
    "initialize",
    "input_gradient",
    "jit_step",
    "jsonl_writer",
    "keep_freed_memory",
    "language_modeling",
    "layers",
    "layerwise_decay",
    "load_program",
    "lora_init",
    "lora_objective",
    "lora_summary",
    "make_eval_step",
    "make_train_step",
    "masked_reconstruction",
    "merge_lora",
    "metrics",
    "muon_dimensions",
    "objectives",
    "overfit_one_batch",
    "parameter_histograms",
    "parameters_sha256",
    "patchify",
    "pmap_step",
    "population_step",
    "precision_recall",
    "pretrained",
    "quantize_int8",
    "recalibrate_batch_norm",
    "reconstruction",
    "recurrent",
    "regression",
    "replace_head",
    "replicate",
    "resident_steps",
    "resnet_gan",
    "resume",
    "rng_streams",
    "scan_steps",
    "scheduled",
    "sequence_to_sequence",
    "sharded_step",
    "sharding_rules",
    "sparse_reconstruction",
    "squared_error",
    "state_sharding",
    "summarize",
    "summarize_model",
    "tensorboard_writer",
    "transformer",
    "unmerge_lora",
    "unpatchify",
    "vae",
    "validation",
    "visual_backprop",
    "vq_vae",
    "wandb_writer",
    "weights_keyword",
    "with_batch_transform",
    "with_carry",
    "with_hyperparameters",
    "with_parameter_average",
    "write_report",
    "write_result",
]
