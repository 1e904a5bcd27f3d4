"""What hangs on a key-value cache: under which recipes it was filled, and what stops it once they are off."""

from __future__ import annotations

import weakref
from typing import Any

from headpatch.adapters.huggingface.kvadopt import release
from headpatch.errors import EngineError

__all__ = ["Mark", "StaleUpdate", "inner_caches"]


def inner_caches(cache: Any) -> tuple[Any, ...]:
    """The caches that layers update: both of an encoder-decoder's, else the cache itself."""
    parts = tuple(getattr(cache, name, None) for name in ("self_attention_cache", "cross_attention_cache"))
    return (cache,) if None in parts else parts


class _OnCache:
    """Hangs on a cache and goes with its deep copies."""

    def __init__(self, cache: Any) -> None:
        self.cache = weakref.ref(cache)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        original = self.cache()
        copied = None if original is None else memo.get(id(original))
        return None if copied is None else self.on(copied)

    def on(self, cache: Any) -> Any:
        raise NotImplementedError


class Mark(_OnCache):
    """Under which recipes (`salt`) a cache was filled, and the set that knows it: copies are entered there, too."""

    def __init__(self, cache: Any, salt: str, known: weakref.WeakSet[Any]) -> None:
        super().__init__(cache)
        self.salt, self.known = salt, weakref.ref(known)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def on(self, cache: Any) -> Mark | None:
        """The mark of a copy; None once the model is plain again (the copy is then stopped by its :class:`StaleUpdate`)."""
        known = self.known()
        if known is None:
            return None
        known.add(cache)
        return Mark(cache, self.salt, known)


class StaleUpdate(_OnCache):
    """Stands in for ``cache.update`` once the recipe that filled the cache is off; works again when the cache was reset."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse, unless the cache is empty by now: then take itself off and go on."""
        cache = self.cache()
        if cache is not None and int(cache.get_seq_length()) == 0:
            del cache.update
            cache.headpatch_salt = None
            release(cache)
            return cache.update(*args, **kwargs)
        return _refuse()

    def __reduce__(self) -> tuple[Any, ...]:
        return _refusal, ()

    def on(self, cache: Any) -> StaleUpdate:
        """The same for a copy."""
        return StaleUpdate(cache)


def _refusal() -> Any:
    return _refuse


def _refuse(*args: Any, **kwargs: Any) -> Any:
    raise EngineError(
        "this cache was filled under a headpatch recipe that is no longer on the model; start with an empty cache"
    )
