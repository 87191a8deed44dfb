"""Recurrent networks: stacks of layers, classifiers, and models of language, translation, speech.

The stack is in `layers.py`, the LSTM and GRU equations in `jaxnets/functional/recurrence/cells.py`.
"""

from jaxnets.functional.recurrence.associative import MinGRUCell, MinLSTMCell
from jaxnets.functional.recurrence.cells import ElmanCell, GRUCell, LSTMCell, MinimalGatedCell
from jaxnets.models.recurrent.classifier import SequenceClassifier, TextClassifier
from jaxnets.models.recurrent.language_model import RecurrentLM
from jaxnets.models.recurrent.layers import Recurrent, RecurrentLayer
from jaxnets.models.recurrent.speech_recognizer import SpeechRecognizer
from jaxnets.models.recurrent.translator import RecurrentTranslator

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
