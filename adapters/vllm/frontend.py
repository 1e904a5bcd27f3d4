"""The front end's half: which recipe a request gets, whether there is room for it, and what is sent to the workers with it.

One :class:`FrontEnd` belongs to one engine; it hangs on the engine's InputProcessor. Everything that can be wrong with a request is
found here, before the engine sees it. The workers hold as many recipes as the flag says; as a request counts here from before they
hear of it until after they have let go of it, what fits here fits there.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from headpatch.adapters.vllm.errors import bad_request, too_many
from headpatch.adapters.vllm.flag import NONE, Armed, check_fits, check_name
from headpatch.adapters.vllm.one_step import WHOLE, longest_prompt, too_many_images
from headpatch.adapters.vllm.prompts import image_ranges, prompt_content, span_ranges, text_of
from headpatch.adapters.vllm.request import FIELD, PREFIX, Wish, pack, read_wish, salted
from headpatch.adapters.vllm.row_ranges import MOST, ranges_needed
from headpatch.adapters.vllm.shape import model_shape
from headpatch.adapters.vllm.split_flag import refuse_policy
from headpatch.adapters.vllm.supplies import is_segment_edit, whole_prompt
from headpatch.errors import EngineError, HeadpatchError, RecipeError
from headpatch.recipe import Recipe
from headpatch.registry import closest

__all__ = ["Entry", "FrontEnd", "Record"]

INLINE_CACHE = 256
SPANS = {"spans", "beside_spans"}
IMAGES = {"image_tokens", "image_queries"}


@dataclass(frozen=True)
class Entry:
    """A recipe that requests may get: `body` is what travels with them, None for the flag's, which the workers have."""

    recipe: Recipe
    body: bytes | None

    @property
    def key(self) -> str:
        """What the workers know it by: the recipe's content, never its name."""
        return self.recipe.digest


@dataclass(frozen=True)
class Record:
    """One recipe that was applied by a call."""

    id: int
    recipe: Recipe


class FrontEnd:
    """Recipes of one engine, as its front end sees them."""

    def __init__(self, vllm_config: Any, armed: Armed, tokenizer: Any = None) -> None:
        self.armed, self.tokenizer, self.config = armed, tokenizer, vllm_config
        self.shape = model_shape(vllm_config.model_config)
        self.served = {name: Entry(recipe, None) for name, recipe in armed.recipes.items()}
        self.records: list[Record] = []
        self.fixed = frozenset(entry.key for entry in self.served.values())
        # Several API servers share one engine and know nothing of each other: each has its share of the slots.
        servers = int(getattr(vllm_config.parallel_config, "_api_process_count", 1) or 1)
        if armed.slots < servers:
            raise EngineError(
                f'{armed.slots} slots cannot be shared by {servers} API servers; raise "slots" in the flag'
            )
        self.room = armed.slots // servers
        self.low = _lowest_weight(vllm_config)
        self._default = self.served[armed.default] if armed.default is not None else None
        self._base = self._default
        self._live: dict[str, str] = {}
        self._inline: OrderedDict[str, Entry] = OrderedDict()
        self._ids = itertools.count(1)
        self._lock = threading.RLock()
        for recipe in armed.recipes.values():
            self.check(recipe)

    # --- recipes --------------------------------------------------------------------------------------------------------

    def check(self, recipe: Recipe, stacked: bool = False) -> None:
        """Raise a HeadpatchError where this engine cannot do the recipe exactly; `stacked`: on top of its default."""
        check_fits(recipe, self.shape, self.armed.features)
        if why := refuse_policy(recipe, self.shape, self.armed.split, stacked):
            raise EngineError(f"{recipe.source or recipe.name or 'recipe'}: {why}")
        if why := self.armed.unarmed(recipe, self.shape):
            raise EngineError(
                f"{recipe.source or recipe.name or 'recipe'}: {why}; name the recipe in the flag, or start the engine with "
                "--additional-config '{\"headpatch\": {}}' to arm every layer"
            )
        _check_weights(recipe, self.low)

    def add(self, name: str, recipe: Recipe) -> None:
        """Serve a recipe under a name; running requests keep what the name meant before."""
        check_name(name)
        self.check(recipe)
        with self._lock:
            known = next((entry for entry in self.served.values() if entry.key == recipe.digest), None)
            body = None if recipe.digest in self.fixed else pack(recipe)
            self.served[name] = Entry(recipe, body) if known is None else known
            if name == self.armed.default:
                self._base = self.served[name]
                self._restack()

    def remove(self, name: str) -> None:
        """Serve it no longer."""
        with self._lock:
            if name not in self.served:
                raise HeadpatchError(f"no recipe is served as {name!r}; {closest(name, self.served)}")
            if name == self.armed.default:
                raise HeadpatchError(
                    f"{name!r} is the server's default and stays; put another recipe in its place instead"
                )
            del self.served[name]

    def stack(self, recipe: Recipe) -> Record:
        """Put a recipe on top of the default: requests that name none get both."""
        self.check(recipe, stacked=True)
        with self._lock:
            record = Record(next(self._ids), recipe)
            self.records.append(record)
            try:
                self._restack()
            except HeadpatchError:
                self.records.remove(record)
                raise
        return record

    def unstack(self, record: Record) -> None:
        """Take it off again; it may be gone already."""
        with self._lock:
            if record in self.records:
                self.records.remove(record)
                self._restack()

    def _restack(self) -> None:
        """The default: the flag's recipe and, in the order of their handles, those that were applied."""
        recipes = [*([self._base.recipe] if self._base else []), *(record.recipe for record in self.records)]
        if len(recipes) <= 1:
            whole = recipes[0] if recipes else None
        else:
            whole = _together(recipes)
            self.check(whole)
        if whole is None or (self._base is not None and whole.digest == self._base.key):
            self._default = self._base
        else:
            self._default = Entry(whole, None if whole.digest in self.fixed else pack(whole))

    # --- requests -------------------------------------------------------------------------------------------------------

    def entry_of(self, params: Any) -> tuple[Entry | None, Mapping[str, Any] | None]:
        """The recipe of a request with these SamplingParams, and its per-call data.

        Raises
        ------
        ValueError
            Whatever is wrong with the field; answered with 400.
        """
        extra = getattr(params, "extra_args", None) or {}
        try:
            wish = read_wish(extra.get(FIELD))
            entry = self._entry(wish)
        except (RecipeError, HeadpatchError) as error:
            raise bad_request(str(error)) from error
        except ValueError as error:
            raise bad_request(str(error)) from None
        needs = entry.recipe.needs if entry is not None else ()
        marked = bool(SPANS & set(needs))
        if wish.data and not marked:
            raise bad_request(f"{', '.join(wish.data)}: this request's recipe takes no such data")
        if marked and not wish.data:
            raise bad_request(
                "this request's recipe needs operand 'spans' and none were given: "
                '{"recipe": ..., "spans": ["a substring", [3, 7]]}, or headpatch.sampling_params(..., spans=[...])'
            )
        return entry, wish.data

    def wire(
        self, entry: Entry, data: Mapping[str, Any] | None, ids: Any, prompt: Any, features: Any
    ) -> dict[str, Any]:
        """What the workers need to know of a request's prompt, as plain values.

        Parameters
        ----------
        ids, prompt, features
            The prompt's token ids, the prompt as the engine was given it, and vLLM's multimodal features.
        """
        needs, found = set(entry.recipe.needs), dict[str, Any]()
        if needs & SPANS:
            if ids is None:
                raise bad_request("spans: a prompt of embeddings has no tokens that spans could name")
            try:
                found["spans"] = span_ranges((data or {}).get("spans"), ids, text_of(prompt), self.tokenizer)
            except HeadpatchError as error:
                raise bad_request(str(error)) from None
        if needs & IMAGES:
            found["images"] = image_ranges(features)
        if (count := ranges_needed(found.get("spans", ()), found.get("images", ()))) > MOST:
            raise bad_request(
                f"spans and images of a request may be {MOST} separate ranges of tokens, these are {count}"
            )
        if whole_prompt(entry.recipe):
            found[WHOLE] = True
            self._check_whole(ids, features)
        return found

    def _check_whole(self, ids: Any, features: Any) -> None:
        """Raise where a prompt that must come in one step cannot."""
        longest = longest_prompt(self.config)
        if ids is None:
            raise bad_request("a recipe that depends on the whole prompt cannot be used with a prompt of embeddings")
        if len(ids) > longest:
            raise bad_request(
                f"this recipe needs the whole prompt in one step, and a step takes {longest} tokens of the prompt's {len(ids)}: "
                "start the engine with a higher --max-num-batched-tokens (and no --long-prefill-token-threshold)"
            )
        if too_many_images(self.config, features):
            raise bad_request(
                "this recipe needs the whole prompt in one step, and its pictures are more than the encoder takes at once: start the "
                "engine with a higher --max-num-batched-tokens"
            )

    def _entry(self, wish: Wish) -> Entry | None:
        if wish.recipe is None:
            return self._default
        if isinstance(wish.recipe, Mapping):
            return self._inline_entry(wish.recipe)
        if wish.recipe == NONE:
            if self.armed.split is not None:
                raise ValueError(
                    f"{NONE!r} cannot be had here: this engine's KV cache drops tokens for all requests "
                    f"({self.armed.split.describe()})"
                )
            return None
        with self._lock:
            if wish.recipe in self.served:
                return self.served[wish.recipe]
            names = sorted({*self.served, NONE})
        raise ValueError(f"no recipe is served as {wish.recipe[:200]!r}; {closest(wish.recipe[:200], names)}")

    def _inline_entry(self, data: Mapping[str, Any]) -> Entry:
        if not self.armed.allow_inline:
            raise ValueError(
                'a request may bring a recipe of its own only where the flag says {"allow_inline": true}; '
                f"served names: {', '.join(sorted(self.served)) or 'none'}"
            )
        try:
            text = hashlib.sha256(json.dumps(data, sort_keys=False).encode("utf-8", "surrogatepass")).hexdigest()
        except (TypeError, ValueError, RecursionError):
            raise ValueError("the recipe holds something other than plain values") from None
        with self._lock:
            if text in self._inline:
                self._inline.move_to_end(text)
                return self._inline[text]
        recipe = Recipe.from_dict(data, source="the request's recipe")
        self.check(recipe)
        entry = Entry(recipe, None if recipe.digest in self.fixed else pack(recipe))
        with self._lock:
            self._inline[text] = entry
            while len(self._inline) > INLINE_CACHE:
                self._inline.popitem(last=False)
        return entry

    def check_request(self, params: Any, states: Mapping[str, Any], prompt: Any = None) -> None:
        """Raise what :meth:`mark` and :meth:`admit` would, before anything is queued or streamed."""
        entry, data = self.entry_of(params)
        if entry is None:
            return
        if isinstance(prompt, Mapping) and prompt.get("prompt_token_ids") is not None:
            self.wire(entry, data, prompt["prompt_token_ids"], prompt, None)
        self._make_room(entry.key, states)

    def split(self, params: Any) -> tuple[Any, Entry | None, Mapping[str, Any] | None]:
        """A request's params without our field, and what the field asked for."""
        entry, data = self.entry_of(params)
        extra = getattr(params, "extra_args", None)
        if extra and FIELD in extra:
            params = copy.copy(params)
            params.extra_args = {key: value for key, value in extra.items() if key != FIELD} or None
        return params, entry, data

    def mark(self, request: Any, entry: Entry | None, data: Mapping[str, Any] | None, prompt: Any = None) -> None:
        """Write into an EngineCoreRequest what the workers need to know, and the salt that its cached blocks are known by."""
        if request.cache_salt and str(request.cache_salt).startswith(PREFIX):
            raise bad_request(f"cache_salt: salts that begin with {PREFIX!r} are headpatch's own")
        params = request.sampling_params
        if entry is None or params is None:
            return
        if entry.recipe.scope == "prompt" and getattr(request, "resumable", False):
            raise bad_request("a recipe that depends on the whole prompt cannot be used with streamed input")
        ids = request.prompt_token_ids
        found = self.wire(entry, data, ids, prompt, request.mm_features)
        # What was generated becomes prompt in the next turn, and then lies beside the spans: hence the length.
        given = {"spans": found["spans"], "prompt_len": len(ids)} if "spans" in found else None
        salt = entry.recipe.salt(given, prompt_content(request) if entry.recipe.scope != "prefix" else ())
        request.cache_salt = salted(request.cache_salt, salt)
        wire: dict[str, Any] = {"key": entry.key, **found}
        if entry.body is not None:
            wire["body"] = entry.body
        if WHOLE in found:  # what the workers derive from a prompt is not in the cache
            params.skip_reading_prefix_cache = True
        params.extra_args = {**(params.extra_args or {}), FIELD: wire}

    # --- room -----------------------------------------------------------------------------------------------------------

    def admit(self, request: Any, states: Mapping[str, Any]) -> None:
        """Count a request's recipe as live; called where the request becomes known to the front end."""
        params = getattr(request, "sampling_params", None)
        wire = ((getattr(params, "extra_args", None) or {}).get(FIELD)) if params is not None else None
        if wire is None:
            return
        with self._lock:
            self._make_room(wire["key"], states)
            self._live[request.request_id] = wire["key"]
            if len(self._live) > 2 * len(states) + 64:
                self._prune(states)

    def live(self, states: Mapping[str, Any]) -> set[str]:
        """Contents of the recipes, beyond the flag's, that requests are running with."""
        with self._lock:
            self._prune(states)
            return set(self._live.values()) - self.fixed

    def _make_room(self, key: str, states: Mapping[str, Any]) -> None:
        with self._lock:
            if key in self.fixed or key in self._live.values():
                return
            if len(self.live(states) | {key}) > self.room:
                raise too_many(
                    f'all {self.room} recipe slots are taken by running requests; try again, or raise "slots" in the flag'
                )

    def _prune(self, states: Mapping[str, Any]) -> None:
        for request_id in [r for r in self._live if r not in states]:
            del self._live[request_id]


def _together(recipes: list[Recipe]) -> Recipe:
    """Recipes as one, in order."""
    data: dict[str, Any] = {
        "headpatch": 1,
        "patches": [patch for recipe in recipes for patch in recipe.to_dict()["patches"]],
    }
    files = {recipe.tensors.sha256: recipe for recipe in recipes if recipe.tensors is not None}
    if len(files) > 1:
        names = " and ".join(recipe.name or "a recipe" for recipe in files.values())
        raise EngineError(
            f"{names} have arrays, and only one recipe that acts by default may: let requests name the others"
        )
    arrays = None
    for recipe in files.values():
        assert recipe.tensors is not None
        data["tensors"], arrays = recipe.to_dict()["tensors"], recipe.tensors.read()
    return Recipe.from_dict(data, source="recipes applied together", arrays=arrays)


def _lowest_weight(vllm_config: Any) -> float:
    """The smallest first-token weight that keeps enough digits in what attention kernels of this engine hand over."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return 0.0
    return 1e-3 if "float32" in str(vllm_config.model_config.dtype) else 0.05


def _check_weights(recipe: Recipe, low: float) -> None:
    import torch

    if low <= 0:
        return
    for patch in recipe.patches:
        if patch.method.family != "mass" or is_segment_edit(patch.method):
            continue
        strengths = torch.tensor([value for _, value in patch.heads], dtype=torch.float64)
        weights = patch.method.weights(strengths)  # type: ignore[attr-defined]
        if float(weights.min()) < low:
            raise EngineError(
                f"{recipe.source or recipe.name or 'recipe'}: {patch.key}: a weight of {float(weights.min()):g} on operand "
                f"'first_token' cannot be exact here: at this engine's precision it takes {low:g} or more"
            )
