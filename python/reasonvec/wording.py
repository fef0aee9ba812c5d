"""Numbers and names as people read them: counts, bytes, shares, magnitudes, strangers' strings.

Everything here is a pure function of its arguments: the pages and cards made with it are the same
on every machine, whatever its locale.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence

_DIGEST = re.compile(r"\b[0-9a-fA-F]{32,}\b")


def count(n: int) -> str:
    """All digits of a count, in groups of three: ``1,543,714,304``."""
    return f"{n:,}"


def short_count(n: int) -> str:
    """A count in three digits: ``912``, ``12.3 K``, ``1.54 B``."""
    return _scaled(n, ("", " K", " M", " B", " T"))


def size(n: int) -> str:
    """Bytes in decimal units, as disks and shard names count them: ``452 MB``."""
    return _scaled(n, (" B", " kB", " MB", " GB", " TB"))


def _scaled(n: int, units: Sequence[str]) -> str:
    if n < 1000:
        return f"{n}{units[0]}"
    value = float(n)
    power = 0
    # 999.5 and not 1000: a value that would be printed as "1000 kB" is a megabyte.
    while value >= 999.5 and power < len(units) - 1:
        value /= 1000
        power += 1
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f}{units[power]}"


def percent(part: int, whole: int) -> str:
    """``part`` of ``whole`` in percent, without the sign; of nothing it is ``0``.

    ``0`` and ``100`` are said only when they are exact; anything in between that would round to
    them is written ``<0.01`` or ``>99.9``.
    """
    if part == 0 or whole == 0:
        return "0"
    if part == whole:
        return "100"
    value = 100 * part / whole
    if value < 0.01:
        return "<0.01"
    if value > 99.9:
        return ">99.9"
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}"


def magnitude(x: float, digits: int = 3) -> str:
    """A size in significant digits: ``0.0123``, ``12.3``, ``1.23e-5``, ``NaN``, ``inf``."""
    if math.isnan(x):
        return "NaN"
    if math.isinf(x):
        return "inf" if x > 0 else "-inf"
    if x == 0:
        return "0"
    mantissa, exponent = f"{x:.{digits - 1}e}".split("e")
    power = int(exponent)
    if -3 <= power < 4:
        return f"{x:.{max(0, digits - 1 - power)}f}"
    return f"{mantissa}e{power}"


def legible(text: str) -> str:
    """The text with every character that is not seen, or moves others about, spelled out.

    Names come out of files from strangers: a right-to-left override, a zero-width space or an
    escape sequence in a tensor name must show and not act. Lone surrogates, which cannot be
    written as UTF-8, are spelled out for the same reason.
    """
    return "".join(f"\\u{ord(c):04x}" if unicodedata.category(c) in _UNSEEN else c for c in text)


_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Cn", "Zl", "Zp"})


def shortened(text: str, limit: int) -> str:
    """At most ``limit`` characters: the middle goes, since names differ at both ends."""
    if len(text) <= limit:
        return text
    tail = (limit - 1) // 2
    return f"{text[: limit - 1 - tail]}…{text[len(text) - tail :]}"


def short_digests(text: str) -> str:
    """The text with every run of 32 or more hexadecimal digits cut to its first twelve."""
    return _DIGEST.sub(lambda found: f"{found.group()[:12]}…", text)


def place(flat: int, shape: Sequence[int]) -> str:
    """The coordinates of a flat row-major index: ``[12, 345]``; ``[]`` for a scalar."""
    if 0 in shape:
        return "[]"
    coordinates: list[int] = []
    for extent in reversed(shape):
        flat, here = divmod(flat, extent)
        coordinates.append(here)
    return f"[{', '.join(str(c) for c in reversed(coordinates))}]"
