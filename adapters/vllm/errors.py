"""Errors that belong to one request: vLLM turns them into an HTTP status, Python callers catch a ValueError."""

from __future__ import annotations

import functools
from http import HTTPStatus
from typing import Any

__all__ = ["bad_request", "too_many"]


@functools.cache
def _bad_request_class() -> type[Exception]:
    """A ValueError that every vLLM of the window answers with 400: newer ones no longer take a bare ValueError for one."""
    from vllm.exceptions import VLLMValidationError

    bases = (
        (VLLMValidationError,) if issubclass(VLLMValidationError, ValueError) else (VLLMValidationError, ValueError)
    )
    return type("HeadpatchRequestError", bases, {"__doc__": "A request's headpatch field is wrong."})


@functools.cache
def _too_many_class() -> type[Exception]:
    """A ValueError that is answered with 429."""
    import vllm.exceptions as known

    graceful = getattr(known, "GracefulHTTPError", None)
    if graceful is None:
        from starlette.exceptions import HTTPException

        graceful = HTTPException
    return type("TooManyRecipes", (graceful, ValueError), {"__doc__": "All recipe slots are taken."})


def bad_request(message: str) -> Exception:
    """The error of a request whose ``headpatch`` field is wrong."""
    return _bad_request_class()(f"headpatch: {message}")


def too_many(message: str) -> Exception:
    """The error of a request whose recipe finds no free slot; the client may try again."""
    cls: Any = _too_many_class()
    text = f"headpatch: {message}"
    if any(base.__name__ == "HTTPException" for base in cls.__mro__):
        return cls(HTTPStatus.TOO_MANY_REQUESTS, text)
    return cls(text, HTTPStatus.TOO_MANY_REQUESTS)
