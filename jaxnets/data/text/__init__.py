"""Text: vocabularies, tokenizers, padding."""

from jaxnets.data.text.padding import pad_sequences
from jaxnets.data.text.subwords import SubwordTokenizer
from jaxnets.data.text.tokenizers import (
    ByteTokenizer,
    CharacterTokenizer,
    WordTokenizer,
    load_tokenizer,
)
from jaxnets.data.text.vocabulary import BEGIN, END, PAD, UNKNOWN, Tokenizer

__all__ = [
    "BEGIN",
    "END",
    "PAD",
    "UNKNOWN",
    "ByteTokenizer",
    "CharacterTokenizer",
    "SubwordTokenizer",
    "Tokenizer",
    "WordTokenizer",
    "load_tokenizer",
    "pad_sequences",
]
