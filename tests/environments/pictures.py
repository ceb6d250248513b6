"""A tool that answers with pictures, in a module that a worker loads quickly."""

from typing import Any


def photo(name: str) -> Any:
    """A picture.

    Args:
        name: of the kind
    """
    from PIL import Image

    picture = Image.new("RGB", (1, 1))
    return {
        "alone": picture,
        "block": [{"type": "text", "text": "see"}, {"type": "image", "image": picture}],
        "text": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}],
        "list": ["one", 2],
    }[name]
