"""One definition, every executor, for the networks of sequences: equal to rounding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxnets import recurrent, transformer
from jaxnets.core import Precision, Update
from jaxnets.equivalence import check_equivalence
from jaxnets.objectives import classification
from jaxnets.parallel import jit_step, population_step, scan_steps
from jaxnets.sequence_objectives import ctc, language_modelling, sequence_to_sequence
from jaxnets.training import create_train_state, make_train_step

DOUBLE = Precision(jnp.float64, jnp.float64, jnp.float64)
SMALL = {"features": 8, "num_heads": 2, "hidden_size": 12}
LLAMA = transformer.BlockConfig(
    **SMALL,
    positions="rotary",
    norm="rms",
    activation="swiglu",
    num_key_value_heads=1,
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
IMAGES = {"inputs": RANDOM.normal(size=(8, 4, 4, 2)), "labels": CLASSES}
AUDIO = {"inputs": RANDOM.normal(size=(8, 5, 3)), "lengths": LENGTHS, "labels": CLASSES}
SPEECH = {
    **{"inputs": RANDOM.normal(size=(8, 9, 3)), "lengths": LENGTHS + 4},
    **{"labels": np.tile([[1, 1], [3, 2]], (4, 1)), "label_lengths": np.array([2, 1] * 4)},
}
# name -> (objective, constructor, batch)
NETWORKS = {
    "gpt2": (
        language_modelling,
        lambda p: transformer.TransformerLM(
            11, num_layers=1, config=transformer.BlockConfig(**SMALL), max_length=8, precision=p
        ),
        LANGUAGE,
    ),
    "llama": (
        language_modelling,
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
        language_modelling,
        lambda p: recurrent.RecurrentLM(11, embedding_size=4, hidden_size=4, precision=p),
        LANGUAGE,
    ),
    "min_gru_language_model": (
        language_modelling,
        lambda p: recurrent.RecurrentLM(
            11, embedding_size=4, hidden_size=4, cell="mingru", tie_embeddings=True, precision=p
        ),
        LANGUAGE,
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
    "recognizer": (
        ctc,
        lambda p: recurrent.SpeechRecognizer(
            4, features=4, strides=(1,), hidden_size=4, num_layers=1, precision=p
        ),
        SPEECH,
    ),
}


def problem(name, optimizer, precision=Precision()):
    make_objective, make_module, arrays = NETWORKS[name]
    module = make_module(precision)
    batch = {
        key: array.astype(precision.parameter) if array.dtype.kind == "f" else array
        for key, array in {**arrays, "weights": WEIGHTS}.items()
    }
    decoder = [batch["decoder_inputs"]] if "decoder_inputs" in batch else []
    variables = jax.jit(module.init)(jax.random.key(0), batch["inputs"], *decoder)
    update = Update(make_objective(module), optimizer)
    state = create_train_state(variables, update, rng=jax.random.key(1))
    return update, state, batch


@pytest.mark.parametrize("name", NETWORKS)
def test_executors_agree_in_float32_under_momentum(name):
    check_executors(*problem(name, optax.sgd(0.1, momentum=0.9)), tolerance=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_executors_agree_in_float64_under_adam(name, enable_x64):
    update, state, batch = problem(name, optax.adam(1e-2), DOUBLE)
    floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert {x.dtype for x in floats} == {jnp.dtype("float64")}
    check_executors(update, state, batch, tolerance=1e-10)


def check_executors(update, state, batch, *, tolerance):
    # That jit = eager is shown for each network by check_module.
    step = make_train_step(update)
    report = check_equivalence(step, state, batch, num_steps=3, reference="jit")
    expected = {"scan", "pmap", "replicated", "fsdp", "microbatched"}
    assert set(report.differences) == expected, report.skipped
    assert report.num_devices == 4
    assert report.largest < tolerance, report.table()


@pytest.mark.parametrize(
    ("name", "loop"),
    [*((name, "vmap") for name in NETWORKS), ("llama", "map"), ("luong", "map")],
)
def test_each_member_of_a_population_equals_its_solo_run(name, loop):
    optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
    update, state, batch = problem(name, optimizer)

    def create(rate):
        params = jax.tree.map(lambda x: x * (1 + rate), state.params)
        opt_state = optax.tree.set(state.opt_state, learning_rate=rate)
        return dataclasses.replace(state, params=params, opt_state=opt_state)

    rates = jnp.linspace(0.01, 0.2, 3)
    step = jit_step(scan_steps(population_step(make_train_step(update), loop=loop)))
    batches = jax.tree.map(lambda x: np.stack([x] * 2), batch)
    states, metrics = step(jax.vmap(create)(rates), batches)
    assert metrics["loss"].count.shape == (3,)
    solo = jit_step(make_train_step(update))
    for member, rate in enumerate(rates):
        alone = create(rate)
        for _ in range(2):
            alone, _ = solo(alone, batch)
        for one, all_of_them in zip(
            jax.tree.leaves(alone.params), jax.tree.leaves(states.params), strict=True
        ):
            np.testing.assert_allclose(all_of_them[member], one, rtol=0, atol=1e-6)
