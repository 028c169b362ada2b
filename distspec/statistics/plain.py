"""Results as plain values for JSON."""

from typing import Any

import numpy as np

__all__ = ["Plain"]


class Plain:
    """A result whose attributes are numbers, arrays, and results again."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; None for what is unknown."""
        return {name: _plain(value) for name, value in vars(self).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Plain):
        return value.to_dict()
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    value = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value
