"""The handle that ``headpatch.apply`` returns for a vLLM engine."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from headpatch.errors import HeadpatchError

if TYPE_CHECKING:
    from headpatch.adapters.vllm.frontend import FrontEnd, Record
    from headpatch.recipe import Recipe

__all__ = ["Report", "VllmHandle"]


@dataclass(frozen=True)
class Report:
    """What is patched in an engine. ``str(report)`` is for people.

    Attributes
    ----------
    recipe
        Name of the handle's recipe.
    default
        Recipes that requests get which name none, in the order they act.
    served
        Names that requests may give.
    ranks
        One mapping per worker: its layers (with heads, backend, how the first token's share is had, eager calls), modules that were
        passed over, the self-check's results, and slots with their users; under ``cache``, where recipes have a cache policy, the
        room that it makes (:func:`headpatch.adapters.vllm.split_report.capacity`).
    pool
        Blocks of the cache as the engine counts them now, where recipes have a cache policy: all, free ones, and by group what
        running requests hold of the blocks in their tables. None otherwise.
    """

    recipe: str
    default: tuple[str, ...]
    served: tuple[str, ...]
    ranks: tuple[dict[str, Any], ...]
    pool: dict[str, Any] | None = None

    @property
    def fires(self) -> bool | None:
        """Whether every armed layer passed the self-check through the path that serves (None before it ran). Replays of captured
        graphs cannot be counted; eager calls are, under ``ranks``.
        """
        if not all(rank["checks"] for rank in self.ranks):
            return None
        return all(check["error"] <= check["bound"] for rank in self.ranks for check in rank["checks"])

    def __str__(self) -> str:
        lines = [
            f"{self.recipe}: default is {' + '.join(self.default) or 'no recipe'}; served: {', '.join(self.served) or 'none'}"
        ]
        for number, rank in enumerate(self.ranks):
            on = [layer for layer in rank["layers"] if layer["armed"]]
            how = ", ".join(sorted({f"{layer['backend']} ({layer['how']})" for layer in on}))
            calls = sum(layer["calls"] for layer in on)
            heads = on[0]["heads"] if on else [0, 0]
            lines.append(
                f"  rank {number}: {len(on)} layers armed, heads {heads[0]}-{heads[1] - 1}, {how}; {calls} eager calls"
            )
            lines += [f"  rank {number}: not patched: {name}" for name in rank["skipped"]]
            lines += [
                f"  rank {number}: self-check of layer {check['layer']}: error {check['error']:.1e} (bound {check['bound']:.0e})"
                for check in rank["checks"]
            ]
        cache = next((rank["cache"] for rank in self.ranks if rank.get("cache")), None)
        if cache is not None:
            lines += [
                f"  KV cache: {cache['split']}",
                f"  KV cache: room for {cache['tokens']} tokens, {cache['unsplit_tokens']} if nothing were dropped",
            ]
        if self.pool is not None:
            held = [
                (sum(h for h, _ in g["held"].values()), sum(n for _, n in g["held"].values()))
                for g in self.pool["groups"]
            ]
            words = ", ".join(f"{h} of {n} in use kept" for h, n in held)
            lines.append(f"  KV cache: {self.pool['free']} of {self.pool['blocks']} blocks free; by group {words}")
        return "\n".join(lines)


class VllmHandle:
    """One recipe on one engine: requests that name no recipe of their own get it, on top of the server's default.

    Requests that run already keep what they had. Handles stack in the order they were applied and may come off in any order.
    """

    def __init__(self, engine: Any, front: FrontEnd, record: Record) -> None:
        self._engine, self._front, self._record = engine, front, record

    def __repr__(self) -> str:
        state = "applied" if self.active else "removed"
        return f"<headpatch handle: {self.recipe.name or 'unnamed recipe'} on {type(self._engine).__name__}, {state}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VllmHandle) and self._front is other._front and self._record.id == other._record.id

    def __hash__(self) -> int:
        return hash(self._record.id)

    @property
    def recipe(self) -> Recipe:
        """The recipe that was applied."""
        return self._record.recipe

    @property
    def active(self) -> bool:
        """Whether it still is."""
        return self._record in self._front.records

    def remove(self) -> None:
        """Take it off; requests from now on are as if it had never been applied. A second call does nothing."""
        self._front.unstack(self._record)

    def report(self) -> Any:
        """What is patched, on every rank: a :class:`Report`; of an AsyncLLM's handle, a coroutine that returns it."""
        if not self.active:
            raise HeadpatchError("this handle's recipe was removed from its engine; apply it again")
        found = getattr(self._engine, "collective_rpc", None) or self._engine.engine_core.collective_rpc
        ranks = found("headpatch_report")
        return self._later(ranks) if isinstance(ranks, Coroutine) else self._report(ranks, self._pool())

    async def _later(self, ranks: Any) -> Report:
        found = self._pool()
        return self._report(await ranks, await found if isinstance(found, Coroutine) else found)

    def _pool(self) -> Any:
        """Blocks of the scheduler's pool, where the engine's cache is cut; of an AsyncLLM, a coroutine."""
        if self._front.armed.split is None:
            return None
        core: Any = getattr(self._engine, "llm_engine", self._engine).engine_core
        for verb in ("call_utility", "call_utility_async"):
            if hasattr(core, verb):
                return getattr(core, verb)("headpatch_pool")
        return core.engine_core.headpatch_pool()  # an engine in this very process

    def _report(self, ranks: Any, pool: Any) -> Report:
        front = self._front
        base = [front.armed.default] if front.armed.default is not None else []
        stacked = [record.recipe.name or "unnamed recipe" for record in front.records]
        return Report(self.recipe.name or "unnamed recipe", (*base, *stacked), tuple(front.served), tuple(ranks), pool)

    @property
    def inputs(self) -> Callable[..., Any]:
        """Data for calls goes with each request here: ``headpatch.sampling_params(recipe, spans=...)``."""
        raise HeadpatchError(
            "vLLM serves many requests at once: give data with the request, headpatch.sampling_params(...)"
        )
