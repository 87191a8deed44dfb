"""A small sentence encoder, in a folder as sentence-transformers writes them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from checks import perturbed, shapes_of

import jaxnets as jn
from jaxnets.models.transformer import SentenceEncoder
from jaxnets.pretrained import PretrainedNetwork


def save_encoder(folder, words, *, max_length):
    """Write an encoder and its vocabulary; return the module and its variables."""
    config = jn.BlockConfig(8, 2, mlp_dim=8, norm_first=False, key_bias=True, norm_epsilon=1e-12)
    module = SentenceEncoder(len(words), 1, config, max_length, num_segments=2, embedding_norm=True)
    shapes, _ = shapes_of(module, jnp.zeros((1, 2), jnp.int32))
    variables = perturbed(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes), scale=0.3)
    jn.pretrained.save(folder, PretrainedNetwork(module, variables), layout="torch")
    (folder / "vocab.txt").write_text("\n".join(words))
    return module, variables


def write_modules(folder, kinds, *, pooling=None, **files):
    """Write modules.json, the options of the pooling, and further JSON files.

    Args:
        folder: where to.
        kinds: {path of a module: its class}.
        pooling: options of the pooling; the mean by default.
        files: content by name, without the ending; these overwrite the others.
    """
    (folder / "1_Pooling").mkdir(parents=True, exist_ok=True)
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds.items())
    ]
    files = {"modules": modules, "1_Pooling/config": pooling or {"pooling_mode": "mean"}} | files
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
