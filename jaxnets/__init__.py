"""Functional neural networks on JAX: one definition, every executor, proved equal.

import jaxnets as jn

module = jn.MLP(features=(128, 128), num_outputs=10)
update = jn.Update(jn.classification(module), optax.adamw(1e-3))
state = jn.create_train_state(jn.initialize(module, key, images[:1]), update, rng=key)
step = jn.jit_step(jn.make_train_step(update))
state, history = jn.fit(step, state, batches, num_steps=1_000)
"""

import lazy_loader

__version__ = "0.1.0"  # first: with EAGER_IMPORT set, the next line imports all modules

# The stub `__init__.pyi` lists the names. A module is imported when one of its names is first used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
