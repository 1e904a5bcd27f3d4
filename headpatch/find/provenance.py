"""What every finder writes into its recipes: the versions that made them."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["versions"]


def versions(about: Mapping[str, str]) -> dict[str, str]:
    """Headpatch's version, and of a bench's ``about()`` all but the model's name."""
    import headpatch

    return {"headpatch": headpatch.__version__, **{k: v for k, v in about.items() if k != "model"}}
