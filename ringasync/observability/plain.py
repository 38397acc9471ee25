"""Text from outside as text, and numbers as people read them."""

from __future__ import annotations

from rich.text import Text


def plain(value: object) -> Text:
    """A value as text that rich takes literally: no markup, no terminal control characters."""
    return Text(printable(str(value)))


def printable(text: str, keep: str = "") -> str:
    """Replace what is not printable, escape sequences included; characters in ``keep`` stay."""
    return "".join(
        letter if letter.isprintable() or letter in keep else "\N{REPLACEMENT CHARACTER}"
        for letter in text
    )


def is_number(value: object) -> bool:
    """Whether a value out of a metrics line is one that can be shown as a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def human(number: float) -> str:
    """``1234567`` as ``1.23M``; small whole numbers as they are."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(number) >= limit:
            return f"{number / (1e3 if unit == 'k' else limit):.3g}{unit}"
    return f"{number:.0f}" if abs(number) >= 10 or number == int(number) else f"{number:.1f}"


def duration(seconds: float) -> str:
    """``3725`` as ``1 h 2 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
