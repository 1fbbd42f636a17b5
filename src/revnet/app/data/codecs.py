"""Examples as tokens: captions by their words, images by their patches."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

MOST_WORDS = 4096
PAD, START, FIRST_BYTE, FIRST_WORD = 0, 1, 2, 258


class Words:
    """Captions as tokens: frequent words as themselves, everything else as its UTF-8 bytes.

    Args:
        words: The words with a token of their own.
        length: Tokens per caption, `START` and padding included.
    """

    def __init__(self, words: Sequence[str], length: int) -> None:
        self.words = list(words)
        self.length = length
        self._ids = {word: FIRST_WORD + i for i, word in enumerate(self.words)}

    @classmethod
    def learn(cls, captions: Iterable[str], most: int = MOST_WORDS, longest: int = 64) -> Words:
        """Take the `most` frequent words, and a length for captions of up to `longest` tokens."""
        captions = list(captions)
        counts = Counter(word for caption in captions for word in split_words(caption))
        words = cls(
            [
                word
                for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:most]
            ],
            longest,
        )
        words.length = min(longest, 1 + max(len(words._tokens(caption)) for caption in captions))
        return words

    @property
    def vocab(self) -> int:
        """Return the number of different tokens."""
        return FIRST_WORD + len(self.words)

    def _tokens(self, caption: str) -> list[int]:
        tokens: list[int] = []
        for word in split_words(caption):
            known = self._ids.get(word)
            tokens += (
                [known] if known is not None else [FIRST_BYTE + byte for byte in word.encode()]
            )
        return tokens

    def read(self, caption: str) -> tuple[list[int], list[str], list[str]]:
        """Return a caption's tokens, at most `length` - 1, and the words left out of it.

        Args:
            caption: Any text.

        Returns:
            The tokens; the words that are not known, unless training had more words than tokens
            for them, so that it has seen bytes, too; and the words beyond the length.
        """
        found = split_words(caption)
        unknown: list[str] = []
        if len(self.words) < MOST_WORDS:
            unknown = [word for word in found if word not in self._ids]
            found = [word for word in found if word in self._ids]
        tokens: list[int] = []
        cut: list[str] = []
        for word in found:
            own = self._tokens(word)
            if cut or len(tokens) + len(own) > self.length - 1:
                cut.append(word)
            tokens += own
        return tokens[: self.length - 1], unknown, cut

    def encode(self, captions: Sequence[str]) -> Array:
        """Return (captions, length), int64: padding, captions (cut where too long), `START`."""
        out = np.full((len(captions), self.length), PAD, dtype=np.int64)
        for row, caption in zip(out, captions, strict=True):
            tokens = [*self.read(caption)[0], START]
            row[-len(tokens) :] = tokens
        return out


def split_words(caption: str) -> list[str]:
    """Return the words and punctuation marks in lower case."""
    return re.findall(r"\w+|[^\w\s]", caption.lower())


class Patches:
    """Images as tokens: each patch is the nearest entry of a code book.

    Args:
        codes: (vocab, patch, patch, channels), uint8.
        rows, columns: Patches per image.
    """

    def __init__(self, codes: Array, rows: int, columns: int) -> None:
        self.codes = codes
        self.rows, self.columns = rows, columns
        self._flat = codes.reshape(len(codes), -1).astype(np.float32)

    @classmethod
    def learn(cls, images: Array, patch: int, vocab: int, seed: int = 0) -> Patches:
        """Learn a code book of the patches of `images` (n, height, width, channels), uint8.

        It is lossless where there are no more than `vocab` different patches, otherwise their
        k-means centres.
        """
        pieces = cut(images, patch)
        distinct = np.unique(pieces.reshape(-1, pieces.shape[-1]), axis=0)
        if len(distinct) > vocab:
            from sklearn.cluster import MiniBatchKMeans

            sample = pieces.reshape(-1, pieces.shape[-1])
            sample = sample[np.random.default_rng(seed).permutation(len(sample))[:100_000]].astype(
                np.float32
            )
            means = (
                MiniBatchKMeans(vocab, random_state=seed, n_init=1, batch_size=4096)
                .fit(sample)
                .cluster_centers_
            )
            distinct = np.unique(means.round().clip(0, 255).astype(np.uint8), axis=0)
        _, height, width, channels = images.shape
        return cls(distinct.reshape(-1, patch, patch, channels), height // patch, width // patch)

    @property
    def vocab(self) -> int:
        """Return the number of different tokens."""
        return len(self.codes)

    def encode(self, images: Array) -> Array:
        """Return images (n, height, width, channels) as tokens (n, rows * columns), int64."""
        squares = (self._flat**2).sum(axis=1)
        # |piece - code|² without |piece|², which is the same for every code; of all images at once
        # it may be gigabytes.
        several = (
            squares - 2 * pieces.astype(np.float32) @ self._flat.T
            for pieces in cut(images, self.codes.shape[1])
        )
        return np.stack([distance.argmin(axis=-1).astype(np.int64) for distance in several])

    def decode(self, tokens: Array) -> Array:
        """Return tokens (n, rows * columns) as images (n, height, width, channels), uint8."""
        patch, channels = self.codes.shape[2:]
        grid = self.codes[tokens].reshape(
            len(tokens), self.rows, self.columns, patch, patch, channels
        )
        return grid.transpose(0, 1, 3, 2, 4, 5).reshape(
            len(tokens), self.rows * patch, self.columns * patch, channels
        )


def cut(images: Array, patch: int) -> Array:
    """Cut images (n, height, width, channels) into (n, patches, numbers of a patch), by rows."""
    n, height, width, channels = images.shape
    grid = images.reshape(n, height // patch, patch, width // patch, patch, channels)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(n, -1, patch * patch * channels)


def image_codecs(spec: dict[str, Any]) -> tuple[Words, Patches]:
    """Return the codecs that `Images.spec` describes."""
    codes = np.array(spec["codes"], dtype=np.uint8)
    return Words(spec["words"], spec["caption_length"]), Patches(
        codes, spec["rows"], spec["columns"]
    )


def codecs(
    spec: dict[str, Any] | None,
    captions: Sequence[Sequence[str]],
    images: Array | Callable[[], Array],
    patch: int,
    vocab: int,
) -> tuple[Words, Patches]:
    """Return the codecs of a `spec`, or without one learn them from captions and images."""
    if spec is not None:
        return image_codecs(spec)
    words = Words.learn(caption for several in captions for caption in several)
    return words, Patches.learn(images() if callable(images) else images, patch, vocab)
