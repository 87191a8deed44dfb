"""The import direction of the library, read from its sources."""

import ast
import pathlib
import subprocess
import sys
import types

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "jaxnets"

ENGINE = {
    *("core", "training", "parallel", "population", "media", "history", "writers", "loop", "hooks"),
    *("histograms", "checkpoint", "equivalence", "progress"),
}

# module -> modules of jaxnets it may import; a module that is not here may import none.
ALLOWED = {
    "padding": {"core"},
    "spatial": set(),
    "platforms": set(),
    "layouts": {"fusion", "platforms"},
    "linear": {"fusion", "layouts", "platforms"},
    "host_memory": set(),
    "few_channels": {"spatial"},
    "channels": {"core", "few_channels", "platforms"},
    "cores": set(),
    "fusion": set(),
    "chunks": set(),
    "tap_products": {"chunks", "fusion", "layouts", "linear", "spatial"},
    "winograd": {"chunks", "fusion", "linear", "spatial"},
    "convolution": {
        *("chunks", "few_channels", "fusion", "linear", "platforms", "spatial", "tap_products"),
        "winograd",
    },
    "pooling": {"few_channels", "fusion", "platforms", "spatial"},
    "functional": {"convolution", "linear", "pooling", "spatial"},
    "normalization": {"channels", "core"},
    "attention_masks": set(),
    "attention_weights": {"attention_masks", "layouts"},
    "attention_blocks": {"attention_masks", "platforms"},
    "weighted_attention": {"attention_blocks", "attention_masks", "attention_weights", "layouts"},
    "fused_attention": {"attention_masks"},
    "attention": {
        *("attention_masks", "attention_weights", "fused_attention", "weighted_attention"),
    },
    "positions": {"attention_masks", "core"},
    "loop_product": {"layouts", "platforms"},
    "sequence": {"channels", "core", "functional", "loop_product", "normalization", "padding"},
    "parallel_recurrence": {"core", "functional", "sequence"},
    "activations": {"core"},
    "layers": {"activations", "channels", "core", "functional", "normalization"},
    "embedding": {"core", "functional", "layers"},
    "feedforward": {"core", "functional", "layers"},
    "convolutional": {
        *("core", "functional", "layers", "resnet", "convnext", "pilotnet", "whitened_convnet"),
    },
    "whitened_convnet": {"channels", "core", "functional", "layers"},
    "pilotnet": {"core", "layers"},
    "regression_heads": {"core", "objectives"},
    "saliency": set(),
    "resnet": {"core", "functional", "layers"},
    "convnext": {"channels", "core", "functional", "layers"},
    "recurrent_cells": {"channels", "core", "functional", "normalization", "sequence"},
    "attention_decoder": {"core", "functional", "layers", "recurrent_layers", "sequence"},
    "recurrent_layers": {"recurrent_cells", "core", "layers", "parallel_recurrence", "sequence"},
    "recurrent_classifier": {
        *("core", "embedding", "layers", "padding", "recurrent_layers", "sequence"),
    },
    "recurrent_language_model": {
        *("core", "embedding", "layers", "padding", "recurrent_layers", "sequence"),
    },
    "shortening": {"core", "layers", "padding"},
    "recurrent_recognizer": {"core", "layers", "recurrent_layers", "sequence", "shortening"},
    "recurrent_translator": {
        "attention_decoder",
        "core",
        "embedding",
        "functional",
        "layers",
        "recurrent_layers",
        "sequence",
        "padding",
    },
    "recurrent": {
        *("parallel_recurrence", "recurrent_cells", "recurrent_classifier", "recurrent_layers"),
        *("recurrent_language_model", "recurrent_recognizer", "recurrent_translator"),
    },
    "transformer_layers": {
        *("attention", "attention_masks", "attention_weights"),
        "positions",
        "core",
        "embedding",
        "functional",
        "layers",
        "normalization",
        "padding",
    },
    "transformer_encoder": {
        *("attention", "core", "embedding", "layers", "padding", "transformer_layers"),
    },
    "transformer_translator": {"attention", "core", "embedding", "layers", "transformer_layers"},
    "patches": set(),
    "vision_transformer": {"core", "functional", "layers", "patches", "transformer_layers"},
    "masked_autoencoder": {
        *("core", "layers", "patches", "transformer_layers", "vision_transformer"),
    },
    "audio_transformer": {
        *("core", "functional", "layers", "padding", "shortening", "transformer_layers"),
    },
    "transformer": {
        *("attention", "core", "embedding", "layers", "transformer_layers"),
        *("transformer_encoder", "transformer_translator"),
        *("vision_transformer", "audio_transformer", "masked_autoencoder"),
    },
    "image_range": set(),
    "logistic_loss": {"core"},
    "likelihoods": {"core", "fusion", "image_range", "logistic_loss", "platforms"},
    "normal_codes": {"core"},
    "upsampling": {"channels", "core", "functional", "layers"},
    "image_coders": {"core", "functional", "layers", "upsampling"},
    "latent_space": {"image_range"},
    "variational_autoencoder": {"core", "image_coders", "layers", "likelihoods", "normal_codes"},
    "vector_quantization": {"core", "image_coders", "layers", "likelihoods"},
    "autoencoder": {
        *("core", "image_coders", "latent_space", "layers", "likelihoods"),
        *("variational_autoencoder", "vector_quantization"),
    },
    "reconstruction_objectives": {"core", "image_range", "likelihoods", "objectives", "patches"},
    "latent_objectives": {
        *("core", "image_range", "metrics", "normal_codes", "objectives"),
        "reconstruction_objectives",
    },
    "hyperparameters": {"core"},
    "spectral_norm": {"channels", "core", "layers"},
    "gan_layers": {"core", "embedding", "layers", "spectral_norm", "upsampling"},
    "gan_dcgan": {"core", "gan_layers", "layers", "spectral_norm", "upsampling"},
    "gan_resnet": {
        *("core", "functional", "gan_layers", "layers", "spectral_norm", "upsampling"),
    },
    "adversarial_losses": {"core"},
    "adversarial": {"adversarial_losses", "core", "image_range"},
    "gan": {
        *("adversarial", "adversarial_losses", "gan_dcgan", "gan_layers", "gan_resnet"),
        *("layers", "spectral_norm", "upsampling"),
    },
    "generative_metrics": {"core", "layers"},
    "metrics": {"core"},
    "comparison": {"metrics"},
    "objectives": {"core", "metrics"},
    "sequence_objectives": {"core", "metrics", "objectives", "padding"},
    "sampling": {"core"},
    "generation": {"core", "sampling", "padding"},
    "beam_search": {"core", "generation", "sampling"},
    "ctc_decoding": {"core", "padding"},
    "optimizers": {"core"},
    "training": {"core"},
    "parallel": {"core", "training"},
    "population": {"core", "cores", "parallel"},
    "media": set(),
    "history": {"core", "media"},
    "writers": {"history", "media"},
    "histograms": {"core", "loop", "media", "training"},
    "progress": {"history"},
    "loop": {"core", "parallel", "history", "progress"},
    "checkpoint": {"core"},
    "hooks": {"core", "checkpoint", "history", "loop"},
    "equivalence": {"core", "training", "parallel"},
    "diagnostics": {"core", "training", "parallel"},
    "data": {"core", "padding"},
    "presets": {
        *{"core", "feedforward", "convolutional", "layers", "recurrent", "transformer"},
        *{"objectives", "reconstruction_objectives", "sequence_objectives", "optimizers"},
    },
    "summary": {"core", "layers", "presets", "training"},
    "doctor": {"core", "cores", "data", "feedforward", "objectives", "parallel", "training"},
    "core": set(),
}
# The command line and the facade put everything together.
FREE = {"__init__", "__main__"}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        yield pytest.param(path, parts[0], id="/".join(parts))


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module == "jaxnets":
                yield from (f"jaxnets.{alias.name}" for alias in node.names)
            else:
                yield node.module


@pytest.mark.parametrize(("path", "module"), list(modules()))
def test_modules_import_only_what_lies_below_them(path, module):
    if module in FREE:
        return
    names = [name.split(".") for name in imported(path)]
    own = {name[1] for name in names if name[0] == "jaxnets" and len(name) > 1}
    assert own - {module} <= ALLOWED[module]


@pytest.mark.parametrize(
    "module", sorted(ENGINE | {"functional", "sequence", "objectives", "metrics", "adversarial"})
)
def test_the_engine_does_not_import_flax(module):
    names = [name.split(".")[0] for name in imported(PACKAGE / f"{module}.py")]
    assert "flax" not in names


def test_only_the_checkpoint_imports_orbax():
    users = {
        path.name
        for path in PACKAGE.rglob("*.py")
        if any(name.split(".")[0] == "orbax" for name in imported(path))
    }
    assert users == {"checkpoint.py"}


def run(code):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()


def test_names_are_loaded_when_they_are_used():
    loaded = "sorted(name for name in sys.modules if name.startswith('jaxnets.'))"
    output = run(f"import sys, jaxnets; print({loaded}); jaxnets.fit; print({loaded})")
    before, after = (set(ast.literal_eval(line)) for line in output.splitlines())
    assert before == set()
    assert "jaxnets.loop" in after and "jaxnets.transformer" not in after


def test_the_whole_library_is_light_and_changes_no_configuration():
    code = (
        "import sys, jax; before = dict(jax.config.values); import jaxnets;"
        "[getattr(jaxnets, name) for name in jaxnets.__all__];"
        "assert all(jax.config.values[name] == value for name, value in before.items());"
        "heavy = {'orbax', 'grain', 'matplotlib', 'sklearn', 'PIL', 'torch', 'tyro', "
        "'tensorboardX', 'wandb', 'gymnasium', 'pygame', 'Box2D'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert run(code) == "[]"


def test_a_function_called_like_a_module_stays_a_function():
    look = (
        "print([callable(getattr(jn, name)) for name in ('adversarial', 'beam_search', 'dcgan')])"
    )
    modules = "import jaxnets.beam_search, jaxnets.adversarial, jaxnets.gan; "
    for first in ("", modules):
        assert run(f"{first}import jaxnets as jn; {look}") == "[True, True, True]"


def test_every_exported_name_exists_and_is_documented():
    import jaxnets

    for name in jaxnets.__all__:
        value = getattr(jaxnets, name)
        if isinstance(value, type | types.FunctionType | types.ModuleType):
            assert value.__doc__, name


def test_no_file_is_two_things():
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for folder in ("jaxnets", "experiments")
        for path in (ROOT / folder).rglob("*.py")
    }
    assert {name: length for name, length in lengths.items() if length > 400} == {}
