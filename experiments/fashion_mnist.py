"""Fashion-MNIST: articles of clothing, 28 x 28 pixels, 60,000 training and 10,000 test images.

    python -m experiments.fashion_mnist --model mlp --seeds 3
    python -m experiments.fashion_mnist --model convnet --seeds 3

Reference: 93.2% for a convolutional network in the table of the data set's own README.
"""

from experiments.classification import Config, main
from jaxnets.data import fashion_mnist

RECIPES = {
    "convnet": Config(
        model="convnet",
        epochs=18,
        learning_rate=5e-3,
        label_smoothing=0.05,
        flip="random",
        average_decay=0.999,
    ),
    "mlp": Config(model="mlp", epochs=15, learning_rate=3e-3, label_smoothing=0.05),
    "resnet9": Config(
        model="resnet9",
        epochs=8,
        learning_rate=4e-3,
        label_smoothing=0.05,
        flip="random",
        average_decay=0.999,
    ),
}

if __name__ == "__main__":
    main("fashion_mnist", lambda config: fashion_mnist(config.data), RECIPES)
