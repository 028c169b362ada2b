"""Addresses of folders and buckets, and what object stores say when something goes wrong there.

Buckets are reached by obstore, in Rust, which tries again on 429, 503 and broken connections; credentials and end
points come from the environment, such as AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL and AWS_REGION.
"""

from pathlib import Path
from typing import Final

__all__ = ["BUCKETS", "SETTINGS", "absolute", "brief", "in_bucket"]

BUCKETS: Final = ("s3://", "gs://", "az://", "abfs://")
"""Schemes that obstore serves."""

SETTINGS: Final = ("AWS_", "AZURE_", "GOOGLE_")
"""How the names of variables begin that tell where object stores are and who asks."""


def in_bucket(text: str) -> bool:
    """Tell whether an address is one in a bucket."""
    return text.startswith(BUCKETS)


def absolute(text: str) -> str:
    """Give a path from the root, as this process means it; a URL stays as it is."""
    return text if "://" in text else str(Path(text).resolve())


def brief(error: BaseException) -> str:
    """Give the first sentence of an error: those of object stores go on with the server's own pages."""
    first = (str(error) or repr(error)).partition("Debug source")[0]
    return " ".join(first.split())[:300]
