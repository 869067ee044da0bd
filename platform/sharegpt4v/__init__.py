"""The library: records, images, prompts, engines and models. It imports no Ray and no server.

`Captioner` and `Chat` are the two models for notebooks and scripts (python_api.py).
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sharegpt4v.python_api import Captioner as Captioner
    from sharegpt4v.python_api import Chat as Chat

__all__ = ["Captioner", "Chat"]


def __getattr__(name: str) -> Any:
    """Imports a model's class when it is asked for: importing the package costs nothing."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sharegpt4v import python_api

    return getattr(python_api, name)
