"""Tokenizers of characters, bytes and words; loading of saved tokenizers."""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
from collections.abc import Iterable
from typing import Any, ClassVar, TypedDict

import numpy as np
import numpy.typing as npt

from jaxnets.data.text.subwords import SubwordTokenizer
from jaxnets.data.text.vocabulary import (
    SPECIAL,
    UNKNOWN,
    SavedTokenizer,
    Tokenizer,
    check_ids,
    list_texts,
    sentence_ids,
)
from jaxnets.storage import read_json


@dataclasses.dataclass(frozen=True)
class CharacterTokenizer(SavedTokenizer):
    """One token per Unicode code point.

    Attributes:
        characters: the vocabulary in order; character i has id i.

    Raises:
        ValueError: no characters, or not sorted by code point and distinct.

    Example:
        >>> tokenizer = CharacterTokenizer.from_text("hello world")
        >>> tokenizer.vocabulary_size, tokenizer.encode("hold").tolist()
        (8, [3, 5, 4, 1])
        >>> tokenizer.decode([3, 5, 4, 1])
        'hold'
    """

    characters: str

    kind: ClassVar[str] = "character"

    def __post_init__(self) -> None:
        if not isinstance(self.characters, str) or not self.characters:
            raise ValueError(
                f"characters are {self.characters!r}; give a string with at least one character"
            )
        if "".join(sorted(set(self.characters))) != self.characters:
            raise ValueError(
                f"characters {self.characters[:40]!r} are not sorted and distinct; "
                "use CharacterTokenizer.from_text"
            )

    @classmethod
    def from_text(cls, text: str) -> CharacterTokenizer:
        """Build the vocabulary from the distinct characters of a text, sorted by code point.

        Args:
            text: must contain every character to encode later: the whole text, not only its
                training part.

        Returns:
            The tokenizer.

        Raises:
            ValueError: the text is empty.
        """
        return cls("".join(sorted(set(text))))

    @property
    def vocabulary_size(self) -> int:
        """Number of characters."""
        return len(self.characters)

    @functools.cached_property
    def _code_points(self) -> np.ndarray:
        return _code_points(self.characters)

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of the characters, int32 [characters].

        Raises:
            ValueError: a character that is not in the vocabulary.
        """
        code_points = _code_points(text)
        ids = np.searchsorted(self._code_points, code_points)
        ids = np.minimum(ids, self.vocabulary_size - 1)  # code points above the last character
        unknown = self._code_points[ids] != code_points
        if unknown.any():
            position = int(np.argmax(unknown))
            raise ValueError(
                f"character {text[position]!r} at position {position} is not among the "
                f"{self.vocabulary_size} of this tokenizer; build it with from_text from the whole "
                "text, or use ByteTokenizer, which encodes every character"
            )
        return ids.astype(np.int32)

    def decode(self, ids: npt.ArrayLike) -> str:
        """Return the characters of integer ids [characters].

        Raises:
            ValueError: ids that are not integers or outside the vocabulary.
        """
        checked = check_ids(ids, self.vocabulary_size)
        return self._code_points[checked].tobytes().decode("utf-32-le", "surrogatepass")


@dataclasses.dataclass(frozen=True)
class ByteTokenizer(SavedTokenizer):
    """One token per byte of the UTF-8 encoding: 256 tokens for every language.

    Example:
        >>> ByteTokenizer().encode("né").tolist()
        [110, 195, 169]
    """

    kind: ClassVar[str] = "byte"

    @property
    def vocabulary_size(self) -> int:
        """256."""
        return 256

    def encode(self, text: str) -> np.ndarray:
        """Return the bytes of the text, int32 [bytes]."""
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, ids: npt.ArrayLike) -> str:
        """Return the text of integer ids [bytes]; bytes that are not UTF-8 become U+FFFD.

        Raises:
            ValueError: ids that are not integers or outside the vocabulary.
        """
        checked = check_ids(ids, self.vocabulary_size)
        return checked.astype(np.uint8).tobytes().decode(errors="replace")


@dataclasses.dataclass(frozen=True)
class WordTokenizer(SavedTokenizer):
    """One token per word, split at white space; rare words are unknown.

    Decoding joins the words with single spaces and writes unknown ones as "<unk>". Corresponds to
    `tokenizers.models.WordLevel` with the `WhitespaceSplit` pre-tokenizer.

    Attributes:
        words: the vocabulary in order; word i has id i + 4, after the special ids.

    Raises:
        ValueError: no words, a repeated word or one with white space.

    Example:
        >>> tokenizer = WordTokenizer.train(["a good film", "a bad film", "a film"], min_count=2)
        >>> tokenizer.words, tokenizer.encode("a dull film").tolist()
        (('a', 'film'), [4, 3, 5])
    """

    words: tuple[str, ...]

    kind: ClassVar[str] = "word"

    def __post_init__(self) -> None:
        if not self.words or not all(isinstance(word, str) for word in self.words):
            raise ValueError(f"words are {self.words!r}; give at least one string")
        object.__setattr__(self, "words", tuple(self.words))
        for word, count in collections.Counter(self.words).items():
            if count > 1 or word.split() != [word]:
                state = "listed twice" if count > 1 else "not one word"
                raise ValueError(f"word {word!r} is {state}; give distinct words without spaces")

    @classmethod
    def train(cls, texts: Iterable[str], *, min_count: int = 1) -> WordTokenizer:
        """Build the vocabulary from the words of some texts, most frequent first.

        Args:
            texts: the training sentences.
            min_count: rarer words are left out and encoded as `UNKNOWN`, so that training has
                examples of unknown words, as test data will.

        Returns:
            The tokenizer; words of equal frequency are in alphabetical order.

        Raises:
            ValueError: no word is frequent enough, or `texts` is a single string.
        """
        counts = collections.Counter(word for text in list_texts(texts) for word in text.split())
        words = [word for word, count in counts.items() if count >= min_count]
        if not words:
            raise ValueError(
                f"none of the {len(counts)} words of the texts occurs {min_count} times; "
                "give more text or lower min_count"
            )
        return cls(tuple(sorted(words, key=lambda word: (-counts[word], word))))

    @property
    def vocabulary_size(self) -> int:
        """Number of words and special ids."""
        return len(SPECIAL) + len(self.words)

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        return {word: index for index, word in enumerate(self.words, start=len(SPECIAL))}

    @functools.cached_property
    def _vocabulary(self) -> tuple[str, ...]:
        return (*SPECIAL, *self.words)

    def encode(self, text: str, *, add_special: bool = False) -> np.ndarray:
        """Return the ids of the words, int32 [words].

        Args:
            text: one sentence.
            add_special: add `BEGIN` at the start and `END` at the end.
        """
        return sentence_ids(
            [self._ids.get(word, UNKNOWN) for word in text.split()], add_special=add_special
        )

    def decode(self, ids: npt.ArrayLike) -> str:
        """Return the words of integer ids [words], without `PAD`, `BEGIN` and `END`.

        Raises:
            ValueError: ids that are not integers or outside the vocabulary.
        """
        checked = check_ids(ids, self.vocabulary_size).tolist()
        return " ".join(self._vocabulary[index] for index in checked if index >= UNKNOWN)


_KINDS: dict[str, type[Any]] = {
    kind.kind: kind for kind in (CharacterTokenizer, ByteTokenizer, WordTokenizer, SubwordTokenizer)
}


class _Saved(TypedDict):
    tokenizer: str


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Read a tokenizer that was saved with its `save`.

    Args:
        path: the JSON file.

    Returns:
        A tokenizer equal to the saved one.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a tokenizer file, or one that was changed; names the file and the line.
        ImportError: a subword tokenizer, and `tokenizers` is not installed.
    """
    remedy = "write it with tokenizer.save"
    document = read_json(path, what="a saved tokenizer", remedy=remedy, half_pairs=True)
    kind = document.check(_Saved)["tokenizer"]
    if kind not in _KINDS:
        known = ", ".join(map(repr, _KINDS))
        raise document.error(f"tokenizer is {kind!r}, not one of {known}", key="tokenizer")
    fields = {name: value for name, value in document.content.items() if name != "tokenizer"}
    dataclasses.replace(document, content=fields).check(_KINDS[kind], closed=True)
    try:
        tokenizer: Tokenizer = _KINDS[kind](**fields)
    except ValueError as error:
        raise document.error(str(error)) from error
    return tokenizer


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
