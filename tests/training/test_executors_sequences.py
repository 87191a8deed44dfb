"""One definition, every executor, for networks of sequences: equal to rounding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import slow_or_exhaustive

from jaxnets import recurrent, transformer
from jaxnets.core import Precision, Update
from jaxnets.objectives.sequence import ctc, language_modeling, sequence_to_sequence
from jaxnets.objectives.supervised import classification
from jaxnets.training.equivalence import check_equivalence
from jaxnets.training.executors import jit_step, population_step, scan_steps
from jaxnets.training.step import create_train_state, make_train_step

DOUBLE = Precision(jnp.float64, jnp.float64, jnp.float64)
SMALL = {"features": 8, "num_heads": 2, "mlp_dim": 12}
LLAMA = transformer.BlockConfig(
    **SMALL,
    positions="rotary",
    norm="rms",
    activation="swiglu",
    num_kv_heads=1,
    use_bias=False,
    scan_layers=True,
)
ENCODER = transformer.BlockConfig(**SMALL, positions="sinusoidal", norm_first=False)
RANDOM = np.random.default_rng(0)
LENGTHS = np.array([5, 3, 1, 5, 4, 2, 4, 5], np.int32)
WEIGHTS = np.array([1, 1, 0.5, 1, 0, 1, 2, 1])
TOKENS = RANDOM.integers(4, 11, (8, 6)).astype(np.int32)
CLASSES = RANDOM.integers(0, 3, 8).astype(np.int32)
LANGUAGE = {"inputs": TOKENS[:, :-1], "labels": TOKENS[:, 1:], "lengths": LENGTHS}
PAIRS = {
    **{"inputs": TOKENS[:, :5], "lengths": LENGTHS, "decoder_inputs": TOKENS[::-1, :-1]},
    **{"labels": TOKENS[::-1, 1:], "label_lengths": LENGTHS[::-1].copy()},
}
SENTENCES = {"inputs": TOKENS[:, :5], "lengths": LENGTHS, "labels": CLASSES}
MASK = RANDOM.random((8, 5)) < 0.4
MASKED = {
    **{"inputs": np.where(MASK, 3, TOKENS[:, :5]), "labels": TOKENS[:, :5], "lengths": LENGTHS},
    "weights": WEIGHTS[:, None] * MASK,
}
IMAGES = {"inputs": RANDOM.normal(size=(8, 4, 4, 2)), "labels": CLASSES}
AUDIO = {"inputs": RANDOM.normal(size=(8, 5, 3)), "lengths": LENGTHS, "labels": CLASSES}
SPEECH = {
    **{"inputs": RANDOM.normal(size=(8, 9, 3)), "lengths": LENGTHS + 4},
    **{"labels": np.tile([[1, 1], [3, 2]], (4, 1)), "label_lengths": np.array([2, 1] * 4)},
}
# name -> (objective, constructor, batch)
NETWORKS = {
    "gpt2": (
        language_modeling,
        lambda p: transformer.TransformerLM(
            11, num_layers=1, config=transformer.BlockConfig(**SMALL), max_length=8, precision=p
        ),
        LANGUAGE,
    ),
    "llama": (
        language_modeling,
        lambda p: transformer.TransformerLM(11, num_layers=2, config=LLAMA, precision=p),
        LANGUAGE,
    ),
    "bert": (
        classification,
        lambda p: transformer.TransformerClassifier(
            11, num_layers=1, config=ENCODER, num_outputs=3, precision=p
        ),
        SENTENCES,
    ),
    "masked_language_model": (
        language_modeling,  # the labels are the inputs, with weights at the masked positions
        # BERT's initial deviation of 0.02 is for hundreds of features; with 8 of them the norm
        # before the output makes gradients of ten.
        lambda p: transformer.MaskedLM(
            11, num_layers=1, config=dataclasses.replace(ENCODER, init_std=None), precision=p
        ),
        MASKED,
    ),
    "transformer_translator": (
        sequence_to_sequence,
        lambda p: transformer.TransformerTranslator(11, num_layers=1, config=ENCODER, precision=p),
        PAIRS,
    ),
    "vision_transformer": (
        classification,
        lambda p: transformer.VisionTransformer(
            3, patch_size=2, num_layers=1, config=transformer.BlockConfig(**SMALL), precision=p
        ),
        IMAGES,
    ),
    "audio_transformer": (
        classification,
        lambda p: transformer.AudioTransformer(3, num_layers=1, config=ENCODER, precision=p),
        AUDIO,
    ),
    "lstm_language_model": (
        language_modeling,
        lambda p: recurrent.RecurrentLM(11, embedding_size=4, hidden_size=4, precision=p),
        LANGUAGE,
    ),
    "min_gru_language_model": (
        language_modeling,
        lambda p: recurrent.RecurrentLM(
            11, embedding_size=4, hidden_size=4, cell="mingru", tie_embeddings=True, precision=p
        ),
        LANGUAGE,
    ),
    "min_lstm_language_model": (
        language_modeling,
        lambda p: recurrent.RecurrentLM(
            11, embedding_size=4, hidden_size=4, cell="minlstm", precision=p
        ),
        LANGUAGE,
    ),
    "minimal_gated_text_classifier": (
        classification,
        lambda p: recurrent.TextClassifier(
            11, 3, embedding_size=4, hidden_size=4, cell="mgu", bidirectional=True, precision=p
        ),
        SENTENCES,
    ),
    "bahdanau": (
        sequence_to_sequence,
        lambda p: recurrent.RecurrentTranslator(11, embedding_size=4, hidden_size=4, precision=p),
        PAIRS,
    ),
    "luong": (
        sequence_to_sequence,
        lambda p: recurrent.RecurrentTranslator(
            11, embedding_size=4, hidden_size=4, cell="lstm", attention="luong", precision=p
        ),
        PAIRS,
    ),
    "elman_luong_without_feeding": (
        sequence_to_sequence,
        lambda p: recurrent.RecurrentTranslator(
            11,
            **{"embedding_size": 4, "hidden_size": 4, "cell": "rnn"},
            **{"attention": "luong", "input_feeding": False, "precision": p},
        ),
        PAIRS,
    ),
    "recognizer": (
        ctc,
        lambda p: recurrent.SpeechRecognizer(
            4, features=4, strides=(1,), hidden_size=4, num_layers=1, precision=p
        ),
        SPEECH,
    ),
}


def problem(name, optimizer, precision=Precision()):
    """Return the update, a function that creates the state of a seed, and the batch."""
    make_objective, make_module, arrays = NETWORKS[name]
    module = make_module(precision)
    batch = {
        key: array.astype(precision.parameter) if array.dtype.kind == "f" else array
        for key, array in {"weights": WEIGHTS, **arrays}.items()
    }
    decoder = [batch["decoder_inputs"]] if "decoder_inputs" in batch else []
    update = Update(make_objective(module), optimizer)

    def create(seed):
        keys = jax.random.split(jax.random.key(seed))
        variables = module.init(keys[0], batch["inputs"], *decoder)
        return create_train_state(variables, update, rng=keys[1])

    return update, create, batch


# No executor knows a family, and `test_executors.py` has a network for each of their code paths.
SLOW = ["llama", "transformer_translator", "lstm_language_model", "recognizer"]


@pytest.mark.parametrize("name", slow_or_exhaustive(NETWORKS, ["llama"]))
def test_executors_agree_in_float32_under_momentum(name):
    update, create, batch = problem(name, optax.sgd(0.1, momentum=0.9))
    check_executors(update, jax.jit(create)(0), batch, tolerance=1e-6)


@pytest.mark.parametrize("name", slow_or_exhaustive(NETWORKS, SLOW))
def test_executors_agree_in_float64_under_adam(name, enable_x64):
    update, create, batch = problem(name, optax.adam(1e-2), DOUBLE)
    state = jax.jit(create)(0)
    check_double(state)
    check_executors(update, state, batch, tolerance=1e-10)


def check_double(state):
    floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert {x.dtype for x in floats} == {jnp.dtype("float64")}


def check_executors(update, state, batch, *, tolerance):
    # check_module shows for each network that jit = eager.
    step = make_train_step(update)
    report = check_equivalence(step, state, batch, num_steps=3, reference="jit")
    expected = {"scan", "pmap", "replicated", "fsdp", "microbatched"}
    assert set(report.differences) == expected, report.skipped
    assert report.num_devices == jax.device_count()
    assert report.largest < tolerance, report.table()


STRATEGIES = [*((name, "vmap") for name in NETWORKS), ("llama", "map"), ("luong", "map")]


SLOW_STRATEGIES = [("llama", "map"), ("lstm_language_model", "vmap"), ("luong", "map")]


@pytest.mark.parametrize(("name", "strategy"), slow_or_exhaustive(STRATEGIES, SLOW_STRATEGIES))
def test_each_member_of_a_population_equals_its_solo_run(name, strategy):
    optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
    check_population(*problem(name, optimizer), np.linspace(0.01, 0.2, 3), strategy, tolerance=1e-6)


@pytest.mark.parametrize(("name", "strategy"), slow_or_exhaustive(STRATEGIES, SLOW_STRATEGIES))
def test_each_of_eight_members_equals_its_solo_run_in_float64_under_adam(
    name, strategy, enable_x64
):
    optimizer = optax.inject_hyperparams(optax.adam)(learning_rate=0.1)
    update, create, batch = problem(name, optimizer, DOUBLE)
    check_double(jax.eval_shape(create, 0))
    check_population(update, create, batch, np.linspace(1e-3, 2e-2, 8), strategy, tolerance=1e-10)


def check_population(update, create, batch, rates, strategy, *, tolerance):
    """Check that a population of seeds and learning rates equals solo runs, from creation on."""

    def start(seed, rate):
        state = create(seed)
        opt_state = optax.tree.set(state.opt_state, learning_rate=rate)
        return dataclasses.replace(state, opt_state=opt_state)

    seeds = np.arange(len(rates))
    step = jit_step(scan_steps(population_step(make_train_step(update), strategy=strategy)))
    states = jax.jit(jax.vmap(start))(seeds, rates)
    states, metrics = step(states, jax.tree.map(lambda x: np.stack([x] * 2), batch))
    assert metrics["loss"].count.shape == rates.shape
    begin, solo = jax.jit(start), jit_step(make_train_step(update))
    for member, (seed, rate) in enumerate(zip(seeds, rates, strict=True)):
        alone = begin(seed, rate)
        for _ in range(2):
            alone, _ = solo(alone, batch)
        for single, several in zip(
            jax.tree.leaves(alone.params), jax.tree.leaves(states.params), strict=True
        ):
            np.testing.assert_allclose(several[member], single, rtol=0, atol=tolerance)
