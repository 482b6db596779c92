"""scikit-learn's handwritten digits: 1797 pictures of 8x8, embedded in the package, so nothing is downloaded."""

from __future__ import annotations

import numpy as np

from vitexp.data.images import ArrayImages, Source, check_channels, split_source


def digits(*, channels: int = 3) -> Source:
    """1438 pictures for training and 359 for validation, each class in its share; the same for every seed."""
    from sklearn.datasets import load_digits  # a second to import

    check_channels(channels)
    flat, labels = load_digits(return_X_y=True)
    gray = np.rint(np.reshape(flat, (-1, 8, 8)) * (255 / 16)).astype(np.uint8)  # stored as 0..16
    images = ArrayImages(
        np.repeat(gray[..., None], channels, axis=-1),
        np.asarray(labels, np.int64),
        [f"{i:04d}" for i in range(len(gray))],
    )
    source = Source("digits", images, None, [str(digit) for digit in range(10)], "sklearn.datasets.load_digits")
    return split_source(source, val_fraction=0.2, split_seed=0)
