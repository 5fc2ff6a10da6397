"""The handwritten digits that the main job trains on; attribution and licence stand in this folder's README.md."""

from __future__ import annotations

from importlib import resources
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Digits", "load_digits"]

_HELD_OUT = 360  # a fifth of 1,797, rounded up
_SPLIT_SEED = 1998


class Digits(NamedTuple):
    """Images and labels on the host, split once and for all into a training part and a held-out fifth.

    Images are uint8, shape (N, 8, 8), values 0 (paper) to 16 (ink); labels are uint8, shape (N,), values 0 to 9.
    """

    train_images: np.ndarray[Any, np.dtype[np.uint8]]
    train_labels: np.ndarray[Any, np.dtype[np.uint8]]
    test_images: np.ndarray[Any, np.dtype[np.uint8]]
    test_labels: np.ndarray[Any, np.dtype[np.uint8]]


def load_digits() -> Digits:
    """Return the 1,797 UCI handwritten digits as `Digits`: 1,437 to train on and 360 held out.

    The split is a permutation with a fixed seed, so that every run, machine and NumPy version holds the same digits
    out. The arrays are new on every call and may be changed.

    Source: UCI Machine Learning Repository, Optical Recognition of Handwritten Digits (E. Alpaydin, C. Kaynak), CC BY
    4.0.

    Examples
    --------
    >>> digits = load_digits()
    >>> digits.train_images.shape, digits.test_images.shape
    ((1437, 8, 8), (360, 8, 8))
    >>> int(digits.train_images.max()), sorted(set(digits.test_labels.tolist()))
    (16, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    """
    with resources.files(__package__).joinpath("digits.npz").open("rb") as file, np.load(file) as stored:
        images, labels = stored["images"], stored["labels"]
    # PCG64's raw stream is specified; Generator methods may change between NumPy versions, so the order is taken from
    # the raw numbers.
    order = np.argsort(np.random.PCG64(_SPLIT_SEED).random_raw(len(images)), kind="stable")
    test, train = order[:_HELD_OUT], order[_HELD_OUT:]
    return Digits(images[train], labels[train], images[test], labels[test])
