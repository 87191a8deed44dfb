"""Figures: what their titles say, and that they leave Matplotlib's settings alone."""

import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure

from jaxnets.tools.pictures import figures
from jaxnets.training.history import History

NAMES = ("cat", "dog")
CONFUSION = np.array([[2, 0.5], [0, 3]])


@pytest.fixture
def texts(monkeypatch):
    """Collect the texts of the figures that are saved."""
    found = []
    save = Figure.savefig

    def collect(figure, path, **options):
        found.extend(text.get_text() for text in figure.findobj(lambda a: hasattr(a, "get_text")))
        save(figure, path, **options)

    monkeypatch.setattr(Figure, "savefig", collect)
    return found


@pytest.mark.parametrize(
    ("seeds", "words"),
    [(1, "the network's predictions"), (5, "the predictions of 5 networks together")],
)
def test_mistakes_say_whose_predictions_are_wrong(seeds, words, texts, tmp_path):
    images = np.zeros((4, 6, 6, 1), np.uint8)
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7], [0.6, 0.4]])
    labels = np.array([0, 1, 0, 1])
    path = tmp_path / "new" / "mistakes.png"
    figures.mistakes(images, labels, probabilities, NAMES, path, num_networks=seeds)
    (title,) = (text for text in texts if words in text)
    assert title.startswith("2 of 4 of") and "predicted class, its probability, true class" in title
    assert "dog 70%\nnot cat" in texts and path.read_bytes().startswith(b"\x89PNG")


def test_no_mistakes_are_said_to_be_none(texts, tmp_path):
    images, probabilities = np.zeros((1, 6, 6, 3), np.uint8), np.array([[1.0, 0.0]])
    figures.mistakes(images, np.array([0]), probabilities, NAMES, tmp_path / "mistakes.png")
    assert any("0 of 1" in text and "no mistakes to show" in text for text in texts)


@pytest.mark.parametrize(
    ("seeds", "title"), [(1, "number of examples"), (3, "number of examples, mean of 3 networks")]
)
def test_a_confusion_says_whether_it_is_a_mean(seeds, title, texts, tmp_path):
    figures.confusion(CONFUSION, NAMES, tmp_path / "confusion.png", num_networks=seeds)
    assert {title, "predicted class", "true class", "0.5", "3"} <= set(texts)


@pytest.mark.parametrize(
    ("losses", "band"), [([2.0, 1.0], False), ([[2.0, 3.0], [1.0, 2.0]], True)]
)
def test_curves_explain_their_band(losses, band, texts, tmp_path):
    history = History(rows=[{"step": i, "loss": loss} for i, loss in enumerate(losses)])
    figures.curves(history, {"loss": ["loss", "none"]}, tmp_path / "curves.png")
    words = "line: mean of 2 networks; band: from the lowest to the highest"
    assert (words in texts) == band


def test_the_backend_of_matplotlib_is_not_chosen():
    code = (
        "import sys, jaxnets.tools.pictures; "
        "names = 'matplotlib.pyplot', 'matplotlib.backends.backend_agg'; "
        "print(*(name in sys.modules for name in names))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"


@pytest.mark.parametrize("package", ["matplotlib", "PIL"])
def test_a_missing_package_is_reported_with_the_remedy(package):
    code = f"import sys; sys.modules[{package!r}] = None; import jaxnets.tools.pictures"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "need Matplotlib and Pillow: pip install 'jaxnets[pictures]'" in done.stderr


@pytest.mark.parametrize("names", [[], ["one"], ["one", "two", "three"]])
def test_there_is_a_name_for_every_class(names, tmp_path):
    message = f"{len(names)} names for 2 classes; give one name per class"
    images, labels = np.zeros((2, 3, 3, 1), np.uint8), np.array([0, 1])
    with pytest.raises(ValueError, match=message):
        figures.mistakes(images, labels, np.eye(2)[::-1], names, tmp_path / "mistakes.png")
    with pytest.raises(ValueError, match=message):
        figures.confusion(np.eye(2), names, tmp_path / "confusion.png")
