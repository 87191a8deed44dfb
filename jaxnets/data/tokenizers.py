"""Tokenizers: text to token ids and back, by characters, bytes, words or subwords.

Tokenizers of sentences (`SubwordTokenizer`, `WordTokenizer`) share four special ids: `PAD` 0,
`BEGIN` 1, `END` 2 and `UNKNOWN` 3. Those of running text (`CharacterTokenizer`, `ByteTokenizer`)
have none.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from jaxnets.data.files import atomic_file

#: Fills rows up to the length of the longest.
PAD = 0
#: In front of a sentence.
BEGIN = 1
#: Behind a sentence.
END = 2
#: A word that is not in the vocabulary.
UNKNOWN = 3

_SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")  # in the order of their ids


class Tokenizer(Protocol):
    """What every tokenizer can do."""

    @property
    def vocabulary_size(self) -> int:
        """Number of token ids, 0 ... vocabulary_size - 1."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """Return the token ids of a text, int32 [tokens]."""
        ...

    def decode(self, ids: npt.ArrayLike) -> str:
        """Return the text of token ids, integer [tokens]; special ids have none."""
        ...

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file for `load_tokenizer`; it appears only once it is complete."""
        ...


class _Saved:
    """Writes the fields of a tokenizer as JSON."""

    kind: ClassVar[str]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file for `load_tokenizer`; it appears only once it is complete.

        Args:
            path: where to; missing folders are made, a file there is replaced.
        """
        assert dataclasses.is_dataclass(self)
        content = {"tokenizer": self.kind}
        content |= {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        with atomic_file(Path(path)) as stream:
            stream.write(json.dumps(content).encode())


@dataclasses.dataclass(frozen=True)
class CharacterTokenizer(_Saved):
    """One token per character.

    Attributes:
        characters: the vocabulary in order; character i has id i.

    Raises:
        ValueError: no characters, or not sorted by code point without repetition.

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
        """Take the distinct characters of a text, sorted by code point, as the vocabulary.

        Args:
            text: with every character that is to be encoded later: the whole text, not only its
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
        wanted = _code_points(text)
        ids = np.searchsorted(self._code_points, wanted)
        ids = np.minimum(ids, self.vocabulary_size - 1)  # beyond the last character
        unknown = self._code_points[ids] != wanted
        if unknown.any():
            position = int(np.argmax(unknown))
            raise ValueError(
                f"character {text[position]!r} at position {position} is not among the "
                f"{self.vocabulary_size} of this tokenizer; build it with from_text from all of "
                "the text, or use ByteTokenizer, which knows every character"
            )
        return ids.astype(np.int32)

    def decode(self, ids: npt.ArrayLike) -> str:
        """Return the characters of integer ids [characters].

        Raises:
            ValueError: ids that are no integers or outside the vocabulary.
        """
        checked = _checked_ids(ids, self.vocabulary_size)
        return self._code_points[checked].tobytes().decode("utf-32-le", "surrogatepass")


@dataclasses.dataclass(frozen=True)
class ByteTokenizer(_Saved):
    """One token per byte of the UTF-8 encoding: 256 tokens for any text of any language.

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
            ValueError: ids that are no integers or outside the vocabulary.
        """
        checked = _checked_ids(ids, self.vocabulary_size)
        return checked.astype(np.uint8).tobytes().decode(errors="replace")


@dataclasses.dataclass(frozen=True)
class WordTokenizer(_Saved):
    """One token per word between white space; rare words are unknown.

    Decoding joins the words with single spaces and writes unknown ones as "<unk>".

    Attributes:
        words: the vocabulary in order; word i has id i + 4, behind the special ids.

    Raises:
        ValueError: no words, a word twice or with white space.

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
        """Take the words of some texts as the vocabulary, the most frequent ones first.

        Args:
            texts: the training sentences.
            min_count: words that occur less often are left out, and so are unknown: training
                then has examples of unknown words, which the test will hold.

        Returns:
            The tokenizer; words of equal frequency are in alphabetical order.

        Raises:
            ValueError: no word is frequent enough, or `texts` is a single string.
        """
        counts = collections.Counter(word for text in _listed(texts) for word in text.split())
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
        return len(_SPECIAL) + len(self.words)

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        return {word: index for index, word in enumerate(self.words, start=len(_SPECIAL))}

    @functools.cached_property
    def _vocabulary(self) -> tuple[str, ...]:
        return (*_SPECIAL, *self.words)

    def encode(self, text: str, *, add_special: bool = False) -> np.ndarray:
        """Return the ids of the words, int32 [words].

        Args:
            text: one sentence.
            add_special: put `BEGIN` in front and `END` behind.
        """
        return _int32([self._ids.get(word, UNKNOWN) for word in text.split()], add_special)

    def decode(self, ids: npt.ArrayLike) -> str:
        """Return the words of integer ids [words], without `PAD`, `BEGIN` and `END`.

        Raises:
            ValueError: ids that are no integers or outside the vocabulary.
        """
        checked = _checked_ids(ids, self.vocabulary_size).tolist()
        return " ".join(self._vocabulary[index] for index in checked if index >= UNKNOWN)


@dataclasses.dataclass(frozen=True)
class SubwordTokenizer(_Saved):
    """Byte-pair encoding over the bytes of the text, by Hugging Face's `tokenizers`.

    Merges never cross the border between a word with its leading space, a number and
    punctuation. All 256 bytes are in the vocabulary, so every text is encoded without unknown
    tokens and comes back exactly; `UNKNOWN` is never produced. A text that spells a special token
    ("<pad>") is encoded as the characters it is.

    Attributes:
        model: the trained tokenizer as the JSON of `tokenizers`.

    Raises:
        ImportError: `tokenizers` is not installed.

    References:
        Sennrich, Haddow and Birch 2016, arXiv:1508.07909 (byte-pair encoding); Radford et al.
        2019, "Language Models are Unsupervised Multitask Learners", section 2.2 (over bytes).

    Example:
        >>> tokenizer = SubwordTokenizer.train(["ein Haus", "zwei Häuser"], vocabulary_size=280)
        >>> tokenizer.decode(tokenizer.encode("drei Häuser,  neu"))
        'drei Häuser,  neu'
    """

    model: str

    kind: ClassVar[str] = "subword"

    @classmethod
    def train(
        cls, texts: Iterable[str], *, vocabulary_size: int, min_count: int = 2
    ) -> SubwordTokenizer:
        """Learn merges from some texts; the same texts in any order give the same tokenizer.

        Args:
            texts: the training sentences, of both languages for a shared vocabulary.
            vocabulary_size: at least 260: the special ids, the 256 bytes, then the merges.
            min_count: pairs that occur less often are not merged, so that few texts may give
                fewer tokens than asked for.

        Returns:
            The tokenizer.

        Raises:
            ValueError: no text, `texts` is a single string, or the vocabulary is too small.
            ImportError: `tokenizers` is not installed.
        """
        library = _library()
        smallest = len(_SPECIAL) + 256
        if vocabulary_size < smallest:
            raise ValueError(
                f"vocabulary_size={vocabulary_size} has no room for the {len(_SPECIAL)} special "
                f"ids and 256 bytes; give at least {smallest}"
            )
        texts = _listed(texts)
        if not any(texts):
            raise ValueError(f"the {len(texts)} texts are empty; give texts to learn merges from")
        tokenizer = library.Tokenizer(library.models.BPE())
        pieces = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.pre_tokenizer = pieces
        tokenizer.decoder = library.decoders.ByteLevel()
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocabulary_size,
            min_frequency=min_count,
            special_tokens=list(_SPECIAL),
            initial_alphabet=sorted(pieces.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer.to_str())

    def __post_init__(self) -> None:
        found = [self._tokenizer.token_to_id(token) for token in _SPECIAL]
        if found != [PAD, BEGIN, END, UNKNOWN]:
            raise ValueError(
                f"special tokens {_SPECIAL} have the ids {found} instead of [0, 1, 2, 3]; "
                "make the tokenizer with SubwordTokenizer.train"
            )

    @functools.cached_property
    def _tokenizer(self) -> Any:
        library = _library()
        try:
            tokenizer = library.Tokenizer.from_str(self.model)
        except Exception as error:  # the library raises nothing more specific
            raise ValueError(
                f"model {str(self.model)[:40]!r} is no tokenizer's JSON ({error}); "
                "make the tokenizer with SubwordTokenizer.train"
            ) from error
        tokenizer.encode_special_tokens = True  # as ordinary characters; the JSON lacks the option
        return tokenizer

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens, special ids among them."""
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str, *, add_special: bool = False) -> np.ndarray:
        """Return the ids of the subwords, int32 [tokens].

        Args:
            text: any text.
            add_special: put `BEGIN` in front and `END` behind.
        """
        return _int32(self._tokenizer.encode(text).ids, add_special)

    def decode(self, ids: npt.ArrayLike) -> str:
        """Return the text of integer ids [tokens], without the special ones.

        Bytes that are not UTF-8, as in a text cut within a character, become U+FFFD.

        Raises:
            ValueError: ids that are no integers or outside the vocabulary.
        """
        return self._tokenizer.decode(_checked_ids(ids, self.vocabulary_size).tolist())

    # A pickled library tokenizer forgets its option; the model alone says everything.
    def __reduce__(self) -> tuple[type[SubwordTokenizer], tuple[str]]:
        return type(self), (self.model,)


_KINDS: dict[str, Callable[..., Tokenizer]] = {
    kind.kind: kind for kind in (CharacterTokenizer, ByteTokenizer, WordTokenizer, SubwordTokenizer)
}


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Read a tokenizer that was saved with its `save`.

    Args:
        path: the JSON file.

    Returns:
        A tokenizer that gives the same ids as the saved one.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not the file of a tokenizer.
        ImportError: a subword tokenizer where `tokenizers` is not installed.
    """
    content = Path(path).read_bytes()
    try:
        fields = json.loads(content)
        build = _KINDS[fields.pop("tokenizer")]
        return build(**fields)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{os.fspath(path)} is not a saved tokenizer ({type(error).__name__}: {error}); "
            "write it with tokenizer.save"
        ) from error


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def _listed(texts: Iterable[str]) -> list[str]:
    if isinstance(texts, str):
        raise ValueError(f"texts is the single string {texts[:40]!r}; give a list of strings")
    return list(texts)


def _int32(ids: Sequence[int], add_special: bool) -> np.ndarray:
    return np.array([BEGIN, *ids, END] if add_special else ids, np.int32)


def _checked_ids(ids: npt.ArrayLike, vocabulary_size: int) -> np.ndarray:
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


def _library() -> Any:
    """Import `tokenizers` when it is needed."""
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            "subword tokenizers need Hugging Face's package; run `pip install tokenizers`"
        ) from error
    return tokenizers
