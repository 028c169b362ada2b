"""Bokeh figures that several sections share.

- `kit`: panels, marks of lines, and how figures get into a page.
- `spectrum`: one spectrum with its explanation, and what changes along its ascent.
"""

__all__: list[str] = []
