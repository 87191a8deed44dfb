"""The summary of a network: counts, shapes, sharing and cost, without allocation."""

import dataclasses
import functools
import json
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import count_parameters, mostly_slow, shapes_of
from published_sizes import PUBLISHED, PUBLISHED_FOR_CIFAR

import jaxnets as jn
from jaxnets.__main__ import main
from jaxnets.models import registry
from jaxnets.tools import summary
from jaxnets.tools.summary import summarize, summarize_model
from jaxnets.training.optimizers import OPTIMIZERS

SEQUENCES = {
    "gpt2_small": 124_439_808,
    "tinyllama": 1_100_048_384,
    "bert_base": 109_482_240 + 768 * 2 + 2,
    "transformer_base": 63_073_280,
    "t5_small": 60_506_624,
    "whisper_tiny": 37_184_640,
    "vit_tiny16": 5_717_416,
    "mae_vit_base16": 111_907_840,
}
# Deep ones, whose counts are tested with the networks themselves.
DEEP = {"gpt2_medium", "gpt2_large", "gpt2_xl", "llama2_7b", "llama3_8b", "bert_large"}
DEEP |= {"t5_base", "t5_large", "flan_t5_small", "flan_t5_base", "flan_t5_large"}
DEEP |= {f"whisper_{size}" for size in ("base", "small", "medium", "large", "large_v3", "turbo")}
DEEP |= {"mistral_7b", "smollm2_135m", "qwen2_0_5b", "qwen3_0_6b", "gemma2_2b", "gemma3_1b"}
DEEP |= {"transformer_big", "vit_small16", "vit_base16", "vit_large16", "mae_vit_large16"}


KNOWN = PUBLISHED | PUBLISHED_FOR_CIFAR | SEQUENCES
KNOWN |= {"lenet5": 61_706, "pilotnet": 252_219, "mixer_b16": 59_880_472, "mixer_h14": 432_350_952}
ONE_OF_EACH = ["resnet18", "convnext_tiny", "resnet9", "lenet5", "pilotnet"]
ONE_OF_EACH += ["gpt2_small", "bert_base", "transformer_base", "vit_tiny16"]


@functools.cache
def summary_of(name):
    """Return the summary of a named model without a training step, once for all tests."""
    return without_step(name)


def without_step(name, batch_size=32, num_outputs=None, input_shape=None):
    model = registry.MODELS[name]
    batch = model.task.batch(batch_size, input_shape or model.input_shape)
    inputs = [batch[entry] for entry in model.task.inputs]
    return summarize(model.network(num_outputs), *inputs)


@pytest.mark.parametrize(
    ("name", "parameters"),
    mostly_slow(KNOWN.items(), [(name, KNOWN[name]) for name in ONE_OF_EACH]),
)
def test_a_named_model_has_the_published_number_of_parameters(name, parameters):
    result = summary_of(name)
    assert result.num_parameters == result.layers[0].num_parameters == parameters
    assert result.parameter_bytes == 4 * parameters


@pytest.mark.slow
def test_the_number_of_parameters_of_the_other_named_models_is_that_of_their_variables():
    for name in registry.MODELS.keys() - KNOWN.keys() - DEEP:
        model = registry.MODELS[name]
        batch = model.task.batch(2, model.input_shape)
        inputs = [batch[entry] for entry in model.task.inputs]
        variables, output = shapes_of(model.network(7), *inputs)
        result = without_step(name, batch_size=2, num_outputs=7)
        assert result.num_parameters == count_parameters(variables), name
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(output))
        assert result.layers[0].output == shapes, name
        assert (shapes[0][0], shapes[0][-1]) == (2, 7), name


def test_every_network_and_preset_of_the_families_has_a_name():
    facades = (jn.convolutional, jn.recurrent, jn.transformer)
    preset_names = {name for facade in facades for name in facade.__all__ if name.islower()}
    preset_names |= {name for name in vars(jn.feedforward) if name.startswith("mixer_")}
    helpers = {"inpaint", "stack_layers", "unstack_layers", "recurrent_scan"}
    helpers |= {"whitening_kernel", "set_whitening_kernel"}
    assert preset_names - helpers <= set(registry.MODELS)
    classes = {type(model.network()) for model in registry.MODELS.values()}
    convolutional = {getattr(jn.convolutional, name) for name in jn.convolutional.__all__}
    networks = {value for value in convolutional if isinstance(value, type)}
    networks |= {jn.MLP, jn.MLPMixer}
    networks |= {
        getattr(facade, name)
        for facade, names in (
            (jn.recurrent, "SequenceClassifier TextClassifier RecurrentLM RecurrentTranslator"),
            (jn.recurrent, "SpeechRecognizer"),
            (jn.transformer, "TransformerLM TransformerClassifier TransformerTranslator"),
            (jn.transformer, "VisionTransformer AudioTransformer MaskedAutoencoder"),
            (jn.transformer, "SpeechTransformer"),
        )
        for name in names.split()
    }
    assert classes == networks


def test_the_output_of_a_layer_is_that_of_its_call_whatever_method_ran_before():
    # The embedding calls a method of its own during setup.
    layers = without_step("transformer_lm", input_shape=(6,)).layers
    assert {layer.path: layer.output for layer in layers}["embedding"] == ((32, 6, 128),)


TINY_BLOCK = jn.transformer.BlockConfig(features=8, num_heads=2)
TINY_MAE = {"num_layers": 1, "decoder_num_layers": 1}
TINY_WHISPER = {"num_layers": 1, "features": 8, "num_heads": 2}
# One model for each task: options of a tiny one, the shape of an example, outputs, inputs.
TASKS = {
    "mlp": ({"features": (4,)}, (5,), 3, ("float32[2, 5]",)),
    "pilotnet": ({}, (66, 200, 3), 1, ("float32[2, 66, 200, 3]",)),
    "mae_vit_base16": (TINY_MAE, (32, 32, 3), None, ("float32[2, 32, 32, 3]",)),
    "transformer_lm": ({"num_layers": 1, "config": TINY_BLOCK}, (6,), 11, ("int32[2, 6]",)),
    "recurrent_translator": ({"hidden_size": 4}, (5,), 11, ("int32[2, 5]", "int32[2, 5]")),
    "text_classifier": ({"hidden_size": 4}, (5,), 3, ("int32[2, 5]",)),
    "speech_recognizer": ({"hidden_size": 4}, (32, 4), 5, ("float32[2, 32, 4]",)),
    "whisper_tiny": (TINY_WHISPER, (32, 4), 11, ("float32[2, 32, 4]", "int32[2, 2]")),
}
MEASURED = ["transformer_lm", "recurrent_translator", "text_classifier", "speech_recognizer"]


def test_every_task_has_a_model_here():
    tasks = {id(model.task) for model in registry.MODELS.values()}
    assert {id(registry.MODELS[name].task) for name in TASKS} == tasks


@pytest.mark.parametrize("name", TASKS)
def test_the_batch_of_each_task_fits_its_objective(name):
    fields, shape, outputs, _ = TASKS[name]
    model = registry.MODELS[name]
    module, batch = model.network(outputs, **fields), model.task.batch(2, shape)
    update = jn.Update(model.task.objective(module), optax.sgd(0.1))

    def train(batch):
        inputs = [batch[entry] for entry in model.task.inputs]
        variables = module.init(jax.random.key(0), *inputs)
        state = jn.create_train_state(variables, update, rng=jax.random.key(0))
        return state, jn.make_train_step(update)(state, batch)

    before, (after, metrics) = jax.eval_shape(train, batch)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, before)
    assert metrics["loss"].total.shape == ()


@pytest.mark.parametrize("name", mostly_slow(MEASURED, ["transformer_lm"]))
def test_a_training_step_of_each_task_is_measured(name, monkeypatch):
    fields, shape, outputs, inputs = TASKS[name]
    model = registry.MODELS[name]
    tiny = dataclasses.replace(model, build=functools.partial(model.build, **fields))
    monkeypatch.setitem(registry.MODELS, name, tiny)
    result = summarize_model(name, input_shape=shape, num_outputs=outputs, batch_size=2)
    assert result.inputs == inputs
    assert result.train_step.flops > 2 * result.forward.flops > 0


def test_parameters_inside_add_up_to_those_of_the_module_around_them():
    layers = summary_of("resnet18").layers
    paths = [layer.path for layer in layers]
    assert paths[0] == "" and len(set(paths)) == len(paths)
    for layer in layers:
        prefix = f"{layer.path}/" if layer.path else ""
        inside = [
            other.num_parameters
            for other in layers
            if other.depth == layer.depth + 1 and other.path.startswith(prefix)
        ]
        own = sum(math.prod(shape) for shape in layer.shapes.values())
        assert layer.num_parameters == own + sum(inside), layer.path


def test_the_shapes_of_layers_are_those_of_the_network():
    layers = {layer.path: layer for layer in summary_of("lenet5").layers}
    assert layers["conv_1"].output == ((32, 10, 10, 16),)
    assert layers["conv_1"].shapes == {"kernel": (5, 5, 6, 16), "bias": (16,)}
    assert layers["conv_1"].kind == "Convolution"


class Step(nn.Module):
    @nn.compact
    def __call__(self, carry, _):
        return nn.Dense(4, name="inner")(carry), carry


class Composite(nn.Module):
    """A shared layer, a scanned one, a rematerialized one, and a parameter of its own."""

    def setup(self):
        self.shared = nn.Dense(4)
        self.gain = self.param("gain", nn.initializers.ones, (3,))
        self.scanned = nn.scan(
            Step, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )()
        self.again = nn.remat(nn.Dense)(4)

    def __call__(self, x):
        x = self.shared(self.shared(x))
        x, stacked = self.scanned(x, None)
        return self.again(x), stacked, self.helper(x)

    def helper(self, x):
        return jnp.sum(x) * self.gain


def test_shared_scanned_and_rematerialized_layers_count_once():
    result = summarize(Composite(), (2, 4))
    layers = {layer.path: layer for layer in result.layers}
    assert result.num_parameters == 20 + 3 + 3 * 20 + 20
    assert {path: layer.num_parameters for path, layer in layers.items()} == {
        "": 103,
        "shared": 20,
        "scanned": 60,
        "scanned/inner": 60,
        "again": 20,
    }
    assert layers[""].output == ((2, 4), (3, 2, 4), (3,))
    assert layers[""].shapes == {"gain": (3,)}
    assert layers["scanned/inner"].shapes == {"kernel": (3, 4, 4), "bias": (3, 4)}


def test_boxed_parameters_count_like_plain_ones():
    init = nn.with_partitioning(nn.initializers.ones, ("rows", None))
    result = summarize(nn.Dense(4, kernel_init=init), (2, 3))
    assert result.layers[0].shapes == {"kernel": (3, 4), "bias": (4,)}
    assert result.num_parameters == 16


def test_a_network_larger_than_memory_is_summarized_without_allocation():
    module = jn.MLP(features=(1_000_000, 1_000_000), num_outputs=10)
    update = jn.Update(jn.classification(module), optax.adamw(1e-3))
    before = {id(array) for array in jax.live_arrays()}
    result = summarize(module, (8, 4), update=update, memory=True)
    assert {id(array) for array in jax.live_arrays()} <= before
    parameters = 5_000_000 + 1_000_001_000_000 + 10_000_010
    assert result.num_parameters == parameters
    assert result.train_step.memory.peak_bytes > 3 * 4 * parameters  # with the two moments of Adam


def test_the_cost_of_a_dense_layer_is_known_by_hand():
    result = summarize(jn.layers.Dense(64, use_bias=False), (32, 128), memory=True)
    assert result.forward.flops == 2 * 32 * 128 * 64
    assert result.forward.memory.argument_bytes == 4 * (32 * 128 + 128 * 64)
    assert result.forward.memory.output_bytes == 4 * 32 * 64
    assert result.train_step is None


def test_a_training_step_counts_parameters_moments_and_batch_as_arguments():
    result = summarize_model("mlp", batch_size=4, optimizer="adam", memory=True)
    memory = result.train_step.memory
    expected = 3 * result.parameter_bytes + 4 * (4 * 784 + 4)
    # Further arguments are step counters and the key.
    assert expected <= memory.argument_bytes <= expected + 64
    assert memory.alias_bytes >= 3 * result.parameter_bytes
    # The other outputs are the metrics and XLA's tuple table.
    assert 0 < memory.output_bytes - memory.alias_bytes < 1024


def test_the_operations_of_a_training_step_are_known_by_hand():
    result = summarize_model("mlp", batch_size=256, optimizer="sgd")
    first, others = 784 * 128, 128 * 128 + 128 * 10
    # One matmul forward, one for the gradient of the kernel and, except for the first layer, one
    # for the gradient of the input; biases, activations and the update are the rest.
    products = 2 * 256 * (2 * first + 3 * others)
    assert products < result.train_step.flops < 1.03 * products


@pytest.mark.parametrize(
    ("name", "billions"),  # multiply-adds of an image or a sequence, of the papers
    [("resnet18", 1.82), ("resnet50", 4.11), ("convnext_tiny", 4.47), ("vit_tiny16", 1.26)],
)
def test_a_named_model_has_the_published_number_of_operations(name, billions):
    flops = summary_of(name).forward.flops / 32
    assert 2e9 * billions < flops < 2e9 * billions * 1.03


def test_the_summary_compiles_nothing(monkeypatch):
    monkeypatch.setattr(jax.stages.Lowered, "compile", None)
    assert summarize_model("lenet5").train_step.flops > 0


def test_running_averages_are_state_and_not_parameters():
    result = summarize(jn.ConvNet(features=(4,), norm="batch"), (2, 8, 8, 1))
    assert result.num_state == 2 * (4 + 128)
    assert result.state_bytes == 4 * result.num_state


def test_tokens_a_custom_batch_and_keywords_are_accepted():
    class Lookup(nn.Module):
        @nn.compact
        def __call__(self, tokens, *, scale=1.0, train=False):
            return scale * nn.Embed(11, 5, name="table")(tokens)

    module = Lookup()
    inputs = np.zeros((2, 3), np.int32)
    batch = {"inputs": inputs, "labels": jax.ShapeDtypeStruct((2, 3, 5), jnp.float32)}
    update = jn.Update(jn.regression(module), optax.sgd(0.1))
    result = summarize(module, inputs, update=update, batch=batch, scale=2.0)
    assert result.inputs == ("int32[2, 3]",)
    assert result.num_parameters == 55
    assert result.train_step.flops > 0


def test_the_table_states_how_many_deep_layers_it_hides():
    result = summary_of("resnet18")
    table = result.table(depth=1)
    assert "stage_1_block_1" in table and "shortcut_conv" not in table
    shown = sum(layer.depth <= 1 for layer in result.layers)
    assert f"({len(result.layers) - shown} modules inside these are not shown)" in table
    assert "shortcut_conv" in str(result) and "not shown" not in str(result)
    assert "kernel [7, 7, 3, 64]" in result.table(shapes=True)


def test_a_notebook_prints_the_table():
    class Printer:
        def text(self, value):
            self.shown = value

    printer, result = Printer(), summarize(jn.MLP(), (2, 3))
    result._repr_pretty_(printer, False)
    assert printer.shown == str(result)


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 2**41, "6.0 TiB")]
)
def test_sizes_are_written_in_powers_of_1024(size, text):
    assert summary._binary(size) == text


@pytest.mark.parametrize(
    ("count", "text"), [(12.0, "12 FLOP"), (2.5e9, "2.5 GFLOP"), (3e18, "3000 PFLOP")]
)
def test_operations_are_written_in_powers_of_1000(count, text):
    assert summary._decimal(count, "FLOP") == text


def test_the_command_prints_the_table(capsys):
    assert main(["summary", "mlp", "--input", "5", "--batch", "3", "--outputs", "4"]) == 0
    output = capsys.readouterr().out
    assert "MLP of float32[3, 5]" in output
    assert "17,796 trainable" in output  # 5 * 128 + 128 + 128 * 128 + 128 + 128 * 4 + 4
    assert "FLOP" in output and "memory" not in output
    assert main(["summary", "mlp", "--input", "5", "--batch", "3", "--memory"]) == 0
    output = capsys.readouterr().out
    assert "FLOP" in output and "peak memory" in output and "compiled in" in output


def test_the_command_prints_one_json_object(capsys):
    assert main(["summary", "lenet5", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["num_parameters"] == 61_706
    assert result["forward"]["flops"] > 2 * 32 * 416_520 and result["forward"]["memory"] is None
    assert result["layers"][1]["shapes"] == {"kernel": [5, 5, 1, 6], "bias": [6]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet51"], "unknown model 'resnet51'; choose from mlp, .*resnet50"),
        (["mlp", "--optimizer", "adm"], "unknown optimizer 'adm'; choose from sgd, .*adamw"),
        (["mlp", "--batch", "0"], "batch_size=0 must be a positive"),
        (["mlp", "--outputs", "0"], "num_outputs=0 must be a positive"),
        (["mae_vit_base16", "--outputs", "5"], "num_outputs is 5, and .* leave it out"),
        (["mlp", "--input", "8", "-1"], r"input_shape=\(8, -1\) must be made of positive"),
        (["lenet5", "--input", "30", "30", "1"], "LeNet5 got images of"),
        (["resnet18", "--input", "30"], "ResNet got inputs of shape"),
    ],
)
def test_the_command_refuses_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["summary", *arguments])
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_named_optimizer_determines_the_size_of_its_state():
    costs = {
        name: summarize_model("mlp", input_shape=(4,), batch_size=2, optimizer=name, memory=True)
        for name in ("sgd", "adamw")
    }
    sgd, adamw = (cost.train_step.memory.argument_bytes for cost in costs.values())
    moments = 2 * costs["adamw"].parameter_bytes
    assert moments <= adamw - sgd <= moments + 16  # and the counter of Adam


def test_every_named_optimizer_takes_a_rate_and_trains_every_parameter():
    params = {"kernel": np.full((3, 2), 2.0, np.float32), "bias": np.full(2, 2.0, np.float32)}
    gradients = jax.tree.map(np.ones_like, params)

    @jax.jit
    def updates_of_all():
        found = {}
        for name, make in OPTIMIZERS.items():
            optimizer = make(0.1)
            found[name], _ = optimizer.update(gradients, optimizer.init(params), params)
        return found

    for name, updates in updates_of_all().items():
        for leaf in jax.tree.leaves(updates):
            assert np.all(np.asarray(leaf) < 0), name  # against the gradient
        if name in ("sgd", "momentum"):
            np.testing.assert_allclose(updates["kernel"], -0.1, rtol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
def test_weight_decay_of_a_named_optimizer_shrinks_kernels_only(name):
    params = {"kernel": np.full((3, 2), 2.0, np.float32), "bias": np.full(2, 2.0, np.float32)}
    gradients = jax.tree.map(np.zeros_like, params)
    optimizer = OPTIMIZERS[name](0.1, weight_decay=0.5)
    update = jax.jit(lambda: optimizer.update(gradients, optimizer.init(params), params)[0])()
    np.testing.assert_allclose(update["kernel"], -0.1 * 0.5 * 2.0, rtol=1e-6)
    np.testing.assert_array_equal(update["bias"], 0)
