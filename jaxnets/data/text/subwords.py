"""Subword tokenizers: byte-pair encoding, trained on the fly."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from jaxnets.data.text.vocabulary import (
    BEGIN,
    END,
    PAD,
    SPECIAL,
    UNKNOWN,
    SavedTokenizer,
    check_ids,
    list_texts,
    sentence_ids,
)


@dataclasses.dataclass(frozen=True)
class SubwordTokenizer(SavedTokenizer):
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
        smallest = len(SPECIAL) + 256
        if vocabulary_size < smallest:
            raise ValueError(
                f"vocabulary_size={vocabulary_size} has no room for the {len(SPECIAL)} special "
                f"ids and 256 bytes; give at least {smallest}"
            )
        texts = list_texts(texts)
        if not any(texts):
            raise ValueError(f"the {len(texts)} texts are empty; give texts to learn merges from")
        tokenizer = library.Tokenizer(library.models.BPE())
        pieces = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.pre_tokenizer = pieces
        tokenizer.decoder = library.decoders.ByteLevel()
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocabulary_size,
            min_frequency=min_count,
            special_tokens=list(SPECIAL),
            initial_alphabet=sorted(pieces.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer.to_str())

    def __post_init__(self) -> None:
        found = [self._tokenizer.token_to_id(token) for token in SPECIAL]
        if found != [PAD, BEGIN, END, UNKNOWN]:
            raise ValueError(
                f"special tokens {SPECIAL} have the ids {found} instead of [0, 1, 2, 3]; "
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
        return sentence_ids(self._tokenizer.encode(text).ids, add_special=add_special)

    def decode(self, ids: npt.ArrayLike) -> str:
        """Return the text of integer ids [tokens], without the special ones.

        Bytes that are not UTF-8, as in a text cut within a character, become U+FFFD.

        Raises:
            ValueError: ids that are no integers or outside the vocabulary.
        """
        return self._tokenizer.decode(check_ids(ids, self.vocabulary_size).tolist())

    # A pickled library tokenizer forgets its option; the model alone says everything.
    def __reduce__(self) -> tuple[type[SubwordTokenizer], tuple[str]]:
        return type(self), (self.model,)


def _library() -> Any:
    """Import `tokenizers` when it is needed."""
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            "subword tokenizers need Hugging Face's package; run `pip install tokenizers`"
        ) from error
    return tokenizers
