"""Numbers, as people write them, to the international digits that the provider takes."""

from __future__ import annotations

import re
from typing import Final

_CANONICAL: Final = re.compile(r"[1-9][0-9]{9,14}")
_WRITTEN: Final = re.compile(r"\+?[0-9 \t\u00a0\u202f().\-/]+")


def normalise(written: str, region: str) -> str | None:
    """Return a number as 10 to 15 international digits, or None if it is not a number.

    Digits that already have that form are taken as they are, for the provider judges them.
    Others are read with the numbering plans in `phonenumbers`; `region` (ISO 3166, two capitals)
    says where a number without a country code belongs.
    """
    written = written.strip()
    if _CANONICAL.fullmatch(written):
        return written
    if not _WRITTEN.fullmatch(written):
        return None
    import phonenumbers  # slow to load, and seldom needed

    digits = re.sub(r"[^0-9+]", "", written)
    if digits.startswith("00"):
        digits = "+" + digits[2:]
    try:
        number = phonenumbers.parse(digits, region)
    except phonenumbers.NumberParseException:
        return None
    if not phonenumbers.is_valid_number(number):
        return None
    international = phonenumbers.format_number(number, phonenumbers.PhoneNumberFormat.E164)[1:]
    return international if _CANONICAL.fullmatch(international) else None


def masked(number: str) -> str:
    """A number with its middle hidden, for logs: `35988***4567`; `***` for what is no number."""
    digits = number
    if not _CANONICAL.fullmatch(number):
        digits = re.sub(r"[^0-9]", "", number)
        if len(digits) < 10 or not _WRITTEN.fullmatch(number.strip()):
            return "***"
    return f"{digits[: min(5, len(digits) - 7)]}***{digits[-4:]}"
