"""Shared by the tokenizers: special ids, protocol, file format, checks.

Tokenizers of sentences (`SubwordTokenizer`, `WordTokenizer`) have four special ids: `PAD` 0,
`BEGIN` 1, `END` 2 and `UNKNOWN` 3. Those of running text (`CharacterTokenizer`, `ByteTokenizer`)
have none.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from typing import ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from jaxnets.storage import write_json

#: Padding, on the right of a sequence.
PAD = 0
#: Beginning of a sentence.
BEGIN = 1
#: End of a sentence.
END = 2
#: A word that is not in the vocabulary.
UNKNOWN = 3

#: Strings of the special tokens, in the order of their ids.
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")


class Tokenizer(Protocol):
    """Interface of every tokenizer."""

    @property
    def vocabulary_size(self) -> int:
        """Number of token ids, 0 ... vocabulary_size - 1."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """Return the token ids of a text, int32 [tokens]."""
        ...

    def decode(self, ids: npt.ArrayLike) -> str:
        """Return the text of token ids, integer [tokens], without special ids."""
        ...

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file for `load_tokenizer`, atomically."""
        ...


class SavedTokenizer:
    """Writes the fields of a tokenizer as JSON."""

    kind: ClassVar[str]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file for `load_tokenizer`, atomically, with a digest of its content.

        Args:
            path: missing folders are created, an existing file is replaced.
        """
        assert dataclasses.is_dataclass(self)
        content = {"tokenizer": self.kind}
        content |= {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        write_json(path, content)


def list_texts(texts: Iterable[str]) -> list[str]:
    """Return texts as a list.

    Args:
        texts: any number of them.

    Raises:
        ValueError: a single string.
    """
    if isinstance(texts, str):
        raise ValueError(f"texts is the single string {texts[:40]!r}; give a list of strings")
    return list(texts)


def sentence_ids(ids: Sequence[int], *, add_special: bool) -> np.ndarray:
    """Return ids as int32 [tokens]; with `add_special` between `BEGIN` and `END`."""
    return np.array([BEGIN, *ids, END] if add_special else ids, np.int32)


def check_ids(ids: npt.ArrayLike, vocabulary_size: int) -> np.ndarray:
    """Check ids to decode and return them as an array.

    Args:
        ids: integer [tokens].
        vocabulary_size: number of tokens.

    Returns:
        The ids, integer [tokens].

    Raises:
        ValueError: ids that are not integers, have another number of axes, or are outside the
            vocabulary.
    """
    array = np.asarray(ids)
    if array.size == 0:
        return np.empty(0, np.int64)
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise ValueError(
            f"ids of shape {array.shape} and type {array.dtype} cannot be decoded; "
            "give integers [tokens], one row of a batch at a time"
        )
    wrong = array[(array < 0) | (array >= vocabulary_size)]
    if wrong.size:
        raise ValueError(
            f"token id {wrong[0]} is outside the vocabulary of {vocabulary_size}; "
            "decode with the tokenizer that the network was built for"
        )
    return array
