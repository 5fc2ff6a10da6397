"""Division by a number that is the same for a whole launch, without dividing in the kernel."""

from __future__ import annotations

__all__ = ["division"]


def division(divisor: int) -> tuple[int, int]:
    """Return (multiplier, shift) with which ``divide`` of ``common.cuh`` divides by `divisor`; zeros for 1.

    ``n // d == (h + (n - h) // 2) >> (shift - 1)``, ``h = n * multiplier >> 64``, for every n below 2^64. Source:
    Granlund, Montgomery 1994, "Division by invariant integers using multiplication", figure 4.1.

    >>> multiplier, shift = division(49)
    >>> high = 4900 * multiplier >> 64
    >>> (high + (4900 - high) // 2) >> (shift - 1)
    100
    """
    if divisor == 1:
        return 0, 0
    shift = (divisor - 1).bit_length()
    return ((1 << 64) * ((1 << shift) - divisor)) // divisor + 1, shift
