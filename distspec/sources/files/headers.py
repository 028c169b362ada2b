"""The headers of FITS files: keywords and their values, of the type that is needed.

References:
    FITS Standard 4.0, https://fits.gsfc.nasa.gov/fits_standard.html
"""

import re
from typing import TypeVar

from distspec.errors import SourceError

__all__ = ["CARD", "Header"]

CARD = 80
"""Characters of one keyword, value and comment."""

Value = TypeVar("Value", bool, int, float, str)


class Header:
    """The cards of one header, interpreted only when asked for; of repeated keywords the first counts."""

    def __init__(self, text: str, place: str) -> None:
        self.place = place
        self._cards: dict[str, str] = {}
        for i in range(0, len(text), CARD):
            if text[i + 8 : i + 10] == "= ":
                self._cards.setdefault(text[i : i + 8].rstrip(), text[i + 10 : i + CARD])

    def __contains__(self, key: str) -> bool:
        return key in self._cards

    def keys(self) -> list[str]:
        """Give the keywords in the order of the file."""
        return list(self._cards)

    def get(self, key: str) -> bool | int | float | str | None:
        """Give a keyword's value, None where it is absent or undefined."""
        card = self._cards.get(key)
        if card is None:
            return None
        quoted = re.match(r" *'((?:[^']|'')*)'", card)
        if quoted:
            return quoted[1].replace("''", "'").rstrip()
        word = card.partition("/")[0].strip()
        if word in ("", "T", "F"):
            return {"": None, "T": True, "F": False}[word]
        try:
            return int(word)
        except ValueError:
            pass
        try:
            return float(word.upper().replace("D", "E"))
        except ValueError:
            raise SourceError(f"{self.place}: keyword {key} holds {word!r}; expected a FITS value") from None

    def value(self, key: str, kind: type[Value], default: Value | None = None) -> Value:
        """Give a keyword's value of the type that is needed.

        Raises:
            SourceError: the keyword is missing and has no default, or is of another type.
        """
        found = self.get(key)
        if found is None and default is not None:
            return default
        if found is None:
            raise SourceError(f"{self.place}: no keyword {key} in the header; expected a {kind.__name__}")
        if kind is float and type(found) is int:
            return kind(found)
        if type(found) is not kind:
            raise SourceError(f"{self.place}: keyword {key} is {found!r}; expected a {kind.__name__}")
        return found
