"""Recurrent networks: stacks, classifiers, models of language, translation and speech.

`Recurrent` is defined in `recurrent_layers`, the cells in `recurrent_cells` and
`parallel_recurrence`, the classifiers, the language model, the translator and the recognizer of
speech in modules of their names; this one module names the whole family.
"""

from jaxnets.parallel_recurrence import MinGRUCell, MinLSTMCell
from jaxnets.recurrent_cells import ElmanCell, GRUCell, LSTMCell, MinimalGatedCell
from jaxnets.recurrent_classifier import SequenceClassifier, TextClassifier
from jaxnets.recurrent_language_model import RecurrentLM
from jaxnets.recurrent_layers import Recurrent, RecurrentLayer
from jaxnets.recurrent_recognizer import SpeechRecognizer
from jaxnets.recurrent_translator import RecurrentTranslator

__all__ = [
    "ElmanCell",
    "GRUCell",
    "LSTMCell",
    "MinGRUCell",
    "MinLSTMCell",
    "MinimalGatedCell",
    "Recurrent",
    "RecurrentLM",
    "RecurrentLayer",
    "RecurrentTranslator",
    "SequenceClassifier",
    "SpeechRecognizer",
    "TextClassifier",
]
