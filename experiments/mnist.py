"""MNIST: handwritten digits, 28 x 28 pixels, 60,000 training and 10,000 test images.

    python -m experiments.mnist --seeds 3

Reference: 99.17% after 10 epochs for the network of Flax's own MNIST example.
"""

from experiments.classification import Config, main
from jaxnets.data import mnist

RECIPES = {
    "convnet": Config(model="convnet", epochs=8, learning_rate=5e-3, crop=2, average_decay=0.999),
    "mlp": Config(model="mlp", epochs=10, learning_rate=3e-3),
    "lenet5": Config(model="lenet5", epochs=10, weight_decay=0.01),
    "perceptron": Config(model="perceptron", epochs=5, weight_decay=0.0),
}

if __name__ == "__main__":
    main("mnist", lambda config: mnist(config.data), RECIPES)
