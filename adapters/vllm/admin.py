"""The OpenAI-compatible server: recipes over HTTP where the flag says ``"admin": true``, and requests that could only be ignored.

Routes lie under /v1, where ``--api-key`` guards them: ``GET``, ``POST`` (``{"name": ..., "recipe": {...}}``) and ``DELETE``
``/v1/headpatch/recipes[/name]``. A recipe comes as a whole or as the name of a shipped one, never as a path: what lies on the
server's disk is not a client's to name.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from headpatch.adapters.vllm.request import FIELD
from headpatch.errors import HeadpatchError, RecipeError
from headpatch.sources import list_recipes, load_recipe

__all__ = ["install_server"]

PATH = "/v1/headpatch/recipes"
SERVERS = ("vllm.entrypoints.launchers.api_server.entry", "vllm.entrypoints.openai.api_server", "__main__")
"""Modules that may hold the ``build_app`` that this process will call; only those that are loaded are looked at."""
PROTOCOLS = (
    ("vllm.entrypoints.openai.completion.protocol", "CompletionRequest"),
    ("vllm.entrypoints.openai.chat_completion.protocol", "ChatCompletionRequest"),
)


def install_server() -> None:
    """Let the apps that this process builds know about us; does nothing where no server runs."""
    from headpatch.adapters.vllm.install import wrap

    for name in SERVERS:
        module = sys.modules.get(name)
        build = getattr(module, "build_app", None)
        if module is not None and str(getattr(build, "__module__", "")).startswith(("vllm.", "__main__")):
            wrap(module, "build_app", _build_app)


def _build_app(original: Any, *args: Any, **kwargs: Any) -> Any:
    from headpatch.adapters.vllm.install import wrap

    app = original(*args, **kwargs)
    for name, cls in PROTOCOLS:
        module = sys.modules.get(name)
        if module is not None and hasattr(module, cls):
            wrap(getattr(module, cls), "to_beam_search_params", _to_beam_search_params)
    _add_routes(app)
    return app


def _to_beam_search_params(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Beams are requests of the server's own, which carry nothing of the client's field: refused rather than ignored."""
    if FIELD in (getattr(self, "vllm_xargs", None) or ()):
        from headpatch.adapters.vllm.errors import bad_request

        raise bad_request(
            "beam search over HTTP cannot carry a recipe of the request's own; leave vllm_xargs.headpatch out"
        )
    return original(self, *args, **kwargs)


def _add_routes(app: Any) -> None:
    """The routes; they answer 404 where the engine's flag does not allow them."""
    from starlette.requests import Request
    from starlette.responses import JSONResponse

    def answer(status: int, **content: Any) -> Any:
        return JSONResponse(content, status_code=status)

    def refuse(status: int, message: str) -> Any:
        return answer(status, error={"message": message, "type": "BadRequestError", "param": None, "code": status})

    def front_of(request: Request) -> Any:
        client = getattr(request.app.state, "engine_client", None)
        front = vars(getattr(client, "input_processor", None) or _Nothing()).get("headpatch")
        return front if front is not None and front.armed.admin else None

    async def recipes(request: Request) -> Any:
        front = front_of(request)
        if front is None:
            return refuse(404, 'recipes over HTTP need {"admin": true} in the server\'s headpatch flag')
        if request.method == "GET":
            return answer(200, **describe(front, request.app.state.engine_client))
        try:
            body = await request.json()
        except ValueError:
            return refuse(400, "the body is not valid JSON")
        if not isinstance(body, Mapping) or set(body) != {"name", "recipe"}:
            return refuse(400, 'the body is {"name": "...", "recipe": {...}}')
        try:
            front.add(body["name"], _recipe(body["recipe"]))
        except HeadpatchError as error:
            return refuse(400, str(error))
        return answer(200, added=body["name"])

    async def recipe(request: Request) -> Any:
        front = front_of(request)
        if front is None:
            return refuse(404, 'recipes over HTTP need {"admin": true} in the server\'s headpatch flag')
        try:
            front.remove(request.path_params["name"])
        except HeadpatchError as error:
            return refuse(404, str(error))
        return answer(200, removed=request.path_params["name"])

    app.add_route(PATH, recipes, methods=["GET", "POST"])
    app.add_route(f"{PATH}/{{name:path}}", recipe, methods=["DELETE"])


class _Nothing:
    """Stands for an input processor where there is none (a server that only renders)."""


def describe(front: Any, client: Any) -> dict[str, Any]:
    """What ``GET`` says."""
    states = client.output_processor.request_states
    split = front.armed.split
    return {
        **({} if split is None else {"cache": split.describe()}),
        "default": front.armed.default,
        "recipes": {
            name: {"key": entry.key, "name": entry.recipe.name, "description": entry.recipe.description}
            for name, entry in sorted(front.served.items())
        },
        "slots": front.room,
        "live": len(front.live(states)),
    }


def _recipe(given: Any) -> Any:
    if isinstance(given, Mapping):
        return load_recipe(given)
    if isinstance(given, str) and given in list_recipes():
        return load_recipe(given)
    raise RecipeError(
        "is neither a recipe nor the name of a shipped one", key="recipe", remedy="send the recipe itself"
    )
