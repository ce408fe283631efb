"""Decimal numbers of a text, many at once: as `float` reads them, without calling it for each.

A number `d.ddd` of one digit, a point and one to eight more is a whole number below 10^9 over a
power of ten. Both are exact as float64, so their quotient is the float64 nearest to the number,
which is what `float` gives. The eight digits are added up as bytes of one 64-bit word.
"""

from __future__ import annotations

import numpy as np

MARGIN = 8
"""Bytes that must stand before the first number, for the words that are read."""

_MINUS, _POINT, _ZERO = b"-.0"
_MOST_DIGITS = 8  # after the point
_POWERS = 10.0 ** np.arange(_MOST_DIGITS + 1)
_ZEROS = np.uint64(0x3030303030303030)
_HIGH_BITS = np.uint64(0x8080808080808080)
_ABOVE_NINE = np.uint64(0x7676767676767676)  # of a byte over 9 the sum has the high bit
_PAIRS = np.uint64(0x000000FF000000FF)
_HUNDREDS = np.uint64(100 + (1_000_000 << 32))
_ONES = np.uint64(1 + (10_000 << 32))


def parse_numbers(
    text: np.ndarray, starts: np.ndarray, ends: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Read the numbers of the form `d.ddd` or `-d.ddd` (up to eight digits after the point).

    Args:
        text: uint8 [B].
        starts, ends: int64 of one shape, places in `text`, ends exclusive; `MARGIN` or later, and
            every end before the last byte.

    Returns:
        float64 of that shape, the same numbers as of `float`; and bool, whether it has this form.
        The others' values mean nothing.
    """
    negative = text[starts] == _MINUS
    point = starts + negative + 1
    digits = ends - point - 1
    first = text[point - 1] - np.uint8(_ZERO)
    fits = (text[point] == _POINT) & (first <= 9) & (digits >= 1) & (digits <= _MOST_DIGITS)
    digits = np.clip(digits, 1, _MOST_DIGITS)
    # Byte by byte: the last of the number is the highest of the word.
    words = np.ndarray(len(text) - 7, "<u8", text, strides=(1,))[ends - 8] ^ _ZEROS
    shift = (8 * (_MOST_DIGITS - digits)).astype(np.uint64)
    words = (words >> shift) << shift  # leaves the digits after the point
    fits &= ((words + _ABOVE_NINE) | words) & _HIGH_BITS == 0
    words = words * np.uint64(10) + (words >> np.uint64(8))
    pairs = (words & _PAIRS) * _HUNDREDS
    pairs += ((words >> np.uint64(16)) & _PAIRS) * _ONES
    powers = _POWERS[digits]
    values = (first * powers + (pairs >> np.uint64(32))) / powers
    return np.where(negative, -values, values), fits
