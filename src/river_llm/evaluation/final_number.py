"""The number that an answer in words comes to, as GSM8K asks for it."""

from __future__ import annotations

import re
from fractions import Fraction

_MARK = "####"  # GSM8K's own answers end with it and the number
_WHOLE = r"\d{1,3}(?:,\d{3})+(?!\d)|\d+"
_DECIMAL = rf"(?:(?:{_WHOLE})(?:\.\d+)?|\.\d+)"
# A minus between two numbers is a subtraction or a range; a digit in a word (H2O) is no number.
_NUMBER = re.compile(
    r"(?<![\w.])"
    r"(?P<sign>(?<![\d)] )(?<![\d)])-\s?)?[$€£¥]?\s?(?P<sign2>(?<=[$€£¥])-)?"
    rf"(?:(?P<mixed>\d{{1,9}}) (?=\d{{1,9}}/\d))?"
    rf"(?P<number>{_DECIMAL})"
    r"(?:/(?P<denominator>\d+)(?![/\d]))?"
)
_FRACTION = re.compile(r"(-?)\s*\\[dt]?frac\s*\{\s*(-?)(\d+)\s*\}\s*\{\s*(\d+)\s*\}")
_DATE = re.compile(r"\d+(?:/\d+){2,}")  # no fraction
_LONGEST = 100  # digits; what is longer is no answer


def final_number(text: str) -> Fraction | None:
    """The number after the last ``####``, or where none stands there, the text's last number.

    Signs, thousands separators, currency signs, decimals, percentages (``50%`` is 50), fractions,
    mixed numbers and LaTeX's ``\\frac`` are understood. None where there is no number.
    """
    marked = marked_number(text)
    return next(reversed(_numbers(text)), None) if marked is None else marked


def marked_number(text: str) -> Fraction | None:
    """The first number after the last ``####``, on its line; None where there is none."""
    if _MARK not in text:
        return None
    line = text.rpartition(_MARK)[2].lstrip().split("\n", 1)[0]
    return next(iter(_numbers(line)), None)


def _numbers(text: str) -> list[Fraction]:
    text = text.replace("\u2212", "-").replace("\\$", "$").replace("{,}", ",")
    text = _DATE.sub(lambda date: date[0].replace("/", " "), text)
    text = _FRACTION.sub(r" \1\2\3/\4", text)
    found = (_value(match) for match in _NUMBER.finditer(text))
    return [number for number in found if number is not None]


def _value(match: re.Match[str]) -> Fraction | None:
    if len(match[0]) > _LONGEST:
        return None
    value = Fraction(match["number"].replace(",", ""))
    denominator = int(match["denominator"] or 1)
    if denominator == 0:
        return None
    value = value / denominator + int(match["mixed"] or 0)
    return -value if match["sign"] or match["sign2"] else value
