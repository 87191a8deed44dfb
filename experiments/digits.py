"""Handwritten digits of 8 x 8 pixels, which come with scikit-learn: no download, under a minute.

    python -m experiments.digits --seeds 5

1,437 training and 360 held-out images, stratified by class.
"""

from experiments.classification import Config, main
from jaxnets.data import digits

RECIPES = {
    "convnet": Config(
        model="convnet",
        epochs=60,
        batch_size=64,
        learning_rate=5e-3,
        average_decay=0.99,
        eval_every=100,
        checkpoint_every=500,
    ),
    "mlp": Config(model="mlp", epochs=60, batch_size=64, learning_rate=5e-3),
    "perceptron": Config(model="perceptron", epochs=60, batch_size=64, weight_decay=0.0),
    "mixer": Config(model="mixer", epochs=60, batch_size=64),
}

if __name__ == "__main__":
    main("digits", lambda config: digits(), RECIPES)
