"""Whether data is worth compressing, judged by a sample of its bytes.

zstd takes as long over media, archives and encrypted files as over anything, and gains nothing.  Their bytes are all
equally frequent; those of text, code and databases are far from it.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

PAGE: Final = 4096
SAMPLE: Final = slice(2016, 2080)  # bytes of each page, from its middle: the beginning may be a header
MOST: Final = 1.1  # of what random bytes have: archives and media have a little more


def dense(data: Any) -> bool:
    """Whether whole grains look like random bytes; a pattern (0, 1, 2, ...) is more even than these, and is not dense.

    Judged by the sum of the squares of how often each byte occurs.  In n bytes it is n^2 / 256 where all occur equally
    often, about n more where they are random (half of that is 5.7 standard deviations less), and much more in text.
    """
    sample = np.frombuffer(data, np.uint8).reshape(-1, PAGE)[:, SAMPLE].ravel()
    counts, n = np.bincount(sample), len(sample)
    even = n * n / 256
    return even + n / 2 < int(counts @ counts) < MOST * (even + n)
