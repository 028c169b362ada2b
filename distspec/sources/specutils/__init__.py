"""Spectra that `specutils` reads or holds in memory.

- `files`: survey files in any format that `specutils` knows.
- `objects`: its objects turned into a batch on one grid, and back.
"""

from distspec.sources.specutils.objects import from_specutils, to_specutils

__all__ = ["from_specutils", "to_specutils"]
