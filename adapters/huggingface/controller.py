"""The recipes that are on one model, and the changes that put them there.

A :class:`Controller` hangs on the model itself, so that a deep copy or an unpickled copy of a patched model is patched on its own
and two models never share anything. :meth:`Controller.install` resolves and checks everything before it touches the model.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import secrets
import sys
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from headpatch.adapters.huggingface import attention as patched
from headpatch.adapters.huggingface.discover import Attention, Layout, find_layout
from headpatch.adapters.huggingface.hooks import LayerInputHook, PrefillProbe, RootHook
from headpatch.adapters.huggingface.images import ClassTokenWatch, tower_layers, tower_problems
from headpatch.adapters.huggingface.kvadopt import CacheProbe, GenerateProbe
from headpatch.adapters.huggingface.kvdetect import kv_features
from headpatch.adapters.huggingface.kvplan import check_together, find_policies, unbounded
from headpatch.adapters.huggingface.marks import Mark, StaleUpdate, inner_caches
from headpatch.adapters.huggingface.operands import SUPPLIES
from headpatch.adapters.huggingface.plan import Edit, LayerPlan, home, rows_key
from headpatch.adapters.huggingface.rows import StackHooks
from headpatch.errors import EngineError, HeadpatchError, UnsupportedModelError
from headpatch.operands import refusals
from headpatch.recipe import Recipe, resolve

__all__ = ["ATTRIBUTE", "Controller", "Record", "controller_of"]

ATTRIBUTE = "_headpatch_controller"
NEVER_WITH = {
    "tensor_parallel": "its heads are sharded over ranks (tp_plan); load it on one device or with device_map",
    "implementation_branch": "its attention forward compares the implementation's name itself, so another name changes it",
}
"""Features of a layer under which no edit at all is exact."""
OF_THE_PROMPT = {"prompt_len", "spans", "beside_spans", "column_sinks", "residual_sinks", "vision_salient"}
"""Operands for which generate() must say where each prompt ends."""


@dataclass
class Record:
    """One applied recipe. Its `id` is never used again: a handle of a recipe that is off means no other.

    `strengths` are keyed (patch, part, layer) and aligned with the edits' heads.
    """

    id: int
    recipe: Recipe
    resolved: tuple[Any, ...]
    thread: int
    strengths: dict[tuple[int, str, int], Tensor] = field(default_factory=dict)
    trainable: bool = False

    @property
    def salt(self) -> str:
        """What caches made under this recipe are marked with."""
        return f"{self.recipe.digest}+trained{self.id}" if self.trainable else self.recipe.digest


class Controller:
    """All that headpatch keeps for one model. Made on the first apply or observe, gone with the last handle."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.records: list[Record] = []
        self.observers: list[Any] = []
        self.states: dict[str, patched.LayerState] = {}
        self.stacks: dict[str, StackHooks] = {}
        self.extras: list[Any] = []
        self.data_by_thread: dict[int, dict[str, Any]] = {}
        self.traced_data: dict[str, Any] = {}
        self.recipe_salt = ""
        self.by_prompt = self.by_request = False
        self.caches: weakref.WeakSet[Any] = weakref.WeakSet()
        self.ledger: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "caches": None,
            "ledger": None,
            "observers": [],
            "data_by_thread": {},
            "traced_data": {},
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.caches = weakref.WeakSet()
        for layer in self.states.values():
            # (A layer that is still being copied has none yet.)
            layer.observers = [o for o in getattr(layer, "observers", ()) if o in self.extras]
        for record in self.records:
            record.thread = threading.get_ident()

    # --- putting on and taking off ----------------------------------------------------------------------------------------

    def install(self, recipe: Recipe, layout: Layout | None = None) -> Record:
        """Add a recipe: everything is resolved, checked and built first, so an error leaves the model as it was.

        `layout` saves looking for the model's attention layers again, where the caller knows that it is still right.
        """
        self.refuse_while_running("apply a recipe")
        me = threading.get_ident()
        alive = {t.ident for t in threading.enumerate()}
        for other in self.records:
            if other.thread != me and other.thread in alive:
                raise HeadpatchError(
                    "another thread has a recipe on this model; one model carries the recipes of one thread at a time. "
                    "Remove that handle first, or give each thread its own copy of the model"
                )
        layout = layout or find_layout(self.root)
        resolved = resolve(recipe, layout.shape)
        record = Record(secrets.randbits(62), recipe, resolved, me)
        for patch in resolved:
            self._refuse(patch, layout)
            if patch.method.family == "cache":
                continue
            for layer, heads in patch.heads.items():
                where = layout.attention[patch.part, layer]
                values = torch.tensor(list(heads.values()), dtype=torch.float64)
                record.strengths[patch.index, patch.part, layer] = values.to(*home(where.module))
        check_together([*self.records, record])
        self._swap([*self.records, record], layout)
        return record

    def uninstall(self, record_id: int, layout: Layout | None = None) -> None:
        """Take a recipe off; nothing happens if it is off already."""
        if any(r.id == record_id for r in self.records):
            self.refuse_while_running("remove a recipe")
            self._swap([r for r in self.records if r.id != record_id], layout or find_layout(self.root))

    def refresh(self) -> None:
        """Build all plans anew, after strengths or observers changed."""
        self._swap(self.records, find_layout(self.root))

    def freeze(self, record: Record) -> None:
        """Make trained strengths the recipe's own for this model, so that heads at the identity are left alone again."""
        record.resolved = tuple(
            dataclasses.replace(
                patch,
                heads={
                    layer: dict(zip(heads, record.strengths[patch.index, patch.part, layer].tolist(), strict=True))
                    for layer, heads in patch.heads.items()
                },
            )
            if patch.method.family != "cache"
            else patch
            for patch in record.resolved
        )

    def _refuse(self, patch: Any, layout: Layout) -> None:
        bounded = unbounded(patch, layout) if patch.method.family == "cache" else ()
        for layer in patch.heads:
            where = layout.attention[patch.part, layer]
            features = (*where.features, *bounded, *(kv_features(where) if patch.method.family == "cache" else ()))
            problems = [NEVER_WITH[f] for f in where.features if f in NEVER_WITH]
            problems += refusals(patch.method.operands(), SUPPLIES, features) or tower_problems(
                patch.method.segments(), layout
            )
            if problems:
                raise UnsupportedModelError(
                    f"patches[{patch.index}] ({patch.method.name}) on layer {patch.part}.{layer} "
                    f"({type(where.module).__name__}): {'; '.join(problems)}"
                )

    def _swap(self, records: list[Record], layout: Layout) -> None:
        plans, policies = _plans(records, layout), find_policies(records, layout)
        looked_at = tower_layers(plans.values(), layout)
        watched = looked_at.union(*(observer.layers for observer in self.observers))
        wanted = {
            a.path: a for key, a in layout.attention.items() if {key} & (plans.keys() | policies.keys() | watched)
        }
        for path, where in wanted.items():
            other = where.module.__dict__.get(patched.HEAD_ATTR)
            if other is not None and other is not self.states.get(path):
                raise HeadpatchError(
                    f"{path} is already patched through another object that contains it; apply to the same object each time"
                )
        # From here on nothing can fail: plain assignments only.
        for path in [p for p in self.states if p not in wanted]:
            self._restore(path)
        stacks = {a.stack_path: a.stack for a in wanted.values()}
        for path in [p for p in self.stacks if p not in stacks]:
            self.stacks.pop(path).remove()
        for path, stack in stacks.items():
            if path not in self.stacks:
                self.stacks[path] = StackHooks(self, stack)
        for extra in self.extras:
            extra.remove()
        self.extras = [ClassTokenWatch(self, layout, looked_at)] if looked_at else []
        observers = [*self.observers, *self.extras]
        for where in wanted.values():
            state = self.states.get(where.path) or self._patch(where)
            state.hooks = self.stacks[where.stack_path]
            state.plan, state.policy = plans.get((where.part, where.layer)), policies.get((where.part, where.layer))
            state.some = {}
            state.parts = state.policy.split(state.plan) if state.policy is not None else (None, None)
            state.observers = [o for o in observers if (where.part, where.layer) in o.layers]
        for path, hooks in self.stacks.items():
            mine = [self.states[a.path] for a in wanted.values() if a.stack_path == path]
            hooks.policies = {
                s.cache_layer: s.policy for s in mine if s.policy is not None and s.cache_layer is not None
            }
        self.records = records
        self._extras(wanted)
        self._update_salt()
        self._mark_stale()
        if not records and not self.observers:
            self.root.__dict__.pop(ATTRIBUTE, None)
        else:
            self.root.__dict__[ATTRIBUTE] = self

    def _patch(self, where: Attention) -> patched.LayerState:
        module: Any = where.module
        index = getattr(module, "layer_idx", None)
        state = patched.LayerState(
            f"{where.part}.{where.layer}", where.part, where.layer, index if isinstance(index, int) else None,
            where.num_heads, where.num_kv_heads, module.config,
        )  # fmt: skip
        own = copy.copy(module.config)
        own._attn_implementation_internal = patched.NAME
        module.__dict__[patched.HEAD_ATTR] = state
        module.config = own
        self.states[where.path] = state
        return state

    def _restore(self, path: str) -> None:
        state = self.states.pop(path)
        module: Any = self.root.get_submodule(path)
        module.config = state.config
        module.__dict__.pop(patched.HEAD_ATTR, None)

    def _extras(self, wanted: dict[str, Attention]) -> None:
        """Hooks that only some operands need: layer inputs, token ids, the prompt's length."""
        needs: dict[str, set[str]] = {}
        for path, where in wanted.items():
            state = self.states[path]
            asked = set(state.plan.needs if state.plan else ()).union(*(o.needs for o in state.observers))
            if state.plan and any(e.method.state for e in state.plan.edits):
                asked.add("prompt_len")  # state is frozen where the prompt ends
            needs[path] = asked
            if asked & {"layer_input", "residual_sinks"}:
                self.extras.append(LayerInputHook(self.root, where.path, state.hooks, where.layer))
            if state.policy is not None and state.hooks is not None:
                self.extras.append(CacheProbe(self.root, where.path, state.hooks))
        if any(hooks.policies for hooks in self.stacks.values()):
            self.extras.append(GenerateProbe(self))
            if any(p.selection for hooks in self.stacks.values() for p in hooks.policies.values()):
                needs["policies"] = {"prompt_len"}
        asked_anywhere = set().union(*needs.values()) if needs else set()
        if asked_anywhere & {"image_tokens", "image_queries", "vision_salient"}:
            self.extras.append(RootHook(self))
        companions = "without_image" in asked_anywhere
        if companions or asked_anywhere & OF_THE_PROMPT:
            self.extras.append(PrefillProbe(self, companions))

    # --- caches -----------------------------------------------------------------------------------------------------------

    def _update_salt(self) -> None:
        active = {e.key[0] for s in self.states.values() if s.plan for e in s.plan.edits}
        active |= {s.policy.key[0] for s in self.states.values() if s.policy}
        self.recipe_salt = "|".join(r.salt for r in self.records if r.recipe.digest in active)
        scopes = {patch.method.scope for r in self.records for patch in r.resolved}
        self.by_prompt, self.by_request = "prompt" in scopes, "request" in scopes

    @property
    def salt(self) -> str:
        """What keys and values made now depend on, beside the tokens: the recipes, and data of this call where one asks for it."""
        given = self.call_data
        salt = f"{self.recipe_salt}|{given.get('spans')!r}" if self.by_request else self.recipe_salt
        chosen = [(r.recipe.digest, given[key]) for r in self.records if (key := rows_key(r.id)) in given]
        return f"{salt}|{chosen!r}" if chosen else salt

    def admit(self, cache: Any) -> None:
        """Refuse a cache whose keys and values were made under another recipe, and mark a fresh one."""
        if torch.compiler.is_compiling():
            return
        salt, mark = self.salt, getattr(cache, "headpatch_salt", None)
        if mark == salt and inner_caches(cache)[0] in self.caches and "headpatch_state" not in cache.__dict__:
            return  # without looking at its length, which may lie on the device
        if int(cache.get_seq_length()) == 0:
            self.mark(cache, fresh=True)
        elif mark == salt:
            self.mark(cache)
        elif mark is not None or salt:
            raise EngineError(
                "this cache was filled under "
                + (f"another recipe ({mark[:12]}...)" if mark else "no recipe")
                + f", and the model now runs {f'recipe {salt[:12]}...' if salt else 'none'}: its keys and values would not fit. "
                "Start with an empty cache"
            )

    def mark(self, cache: Any, fresh: bool = False) -> None:
        """Remember under which recipes a cache is being filled."""
        if torch.compiler.is_compiling():
            return
        if fresh or getattr(cache, "headpatch_salt", None) is None:
            cache.headpatch_salt = self.salt
            if fresh:
                cache.__dict__.pop("headpatch_state", None)
                cache.__dict__.pop("headpatch_first", None)
        for part in inner_caches(cache):
            if part in self.caches and not fresh:
                continue
            part.headpatch_mark = Mark(part, self.recipe_salt, self.caches)
            part.__dict__.pop("update", None)
            self.caches.add(part)

    def _mark_stale(self) -> None:
        for cache in list(self.caches):
            if cache.headpatch_mark.salt == self.recipe_salt:
                cache.__dict__.pop("update", None)
            elif "update" not in cache.__dict__:
                cache.update = StaleUpdate(cache)

    # --- guards -----------------------------------------------------------------------------------------------------------

    def refuse_while_running(self, what: str) -> None:
        """Raise HeadpatchError where a forward or generate of this model is on any thread's stack."""
        mine = {id(m) for m in self.root.modules()}
        for frame in sys._current_frames().values():
            at: Any = frame
            while at is not None:
                if at.f_code.co_name in ("forward", "generate") and id(at.f_locals.get("self")) in mine:
                    raise HeadpatchError(
                        f"cannot {what} while the model is running ({at.f_code.co_name}() is on the stack); "
                        "do it before or after"
                    )
                at = at.f_back

    @property
    def call_data(self) -> dict[str, Any]:
        """Data of this thread's calls. A compiler cannot ask for the thread: compiled calls see what was given last."""
        if torch.compiler.is_compiling():
            return self.traced_data
        return self.data_by_thread.setdefault(threading.get_ident(), {})

    @contextlib.contextmanager
    def given(self, data: dict[str, Any]) -> Iterator[None]:
        """Data for this thread's calls inside the with block."""
        mine = self.call_data
        twice = sorted(mine.keys() & data.keys())
        if twice:
            raise HeadpatchError(f"inputs({twice[0]}=...) is already given by an enclosing inputs()")
        mine.update(data)
        before, self.traced_data = self.traced_data, mine
        try:
            yield
        finally:
            for name in data:
                mine.pop(name, None)
            self.traced_data = before


def controller_of(root: nn.Module) -> Controller | None:
    """The controller of a patched model, or None."""
    return root.__dict__.get(ATTRIBUTE)


def _plans(records: list[Record], layout: Layout) -> dict[tuple[str, int], LayerPlan]:
    edits: dict[tuple[str, int], list[Edit]] = {}
    for record in records:
        for patch in record.resolved:
            for layer, heads in patch.heads.items() if patch.method.family != "cache" else ():
                strength = record.strengths[patch.index, patch.part, layer]
                ids = list(heads)
                if not record.trainable:
                    # Heads at the identity are not touched at all, and a layer with none left is not patched.
                    keep = [i for i, value in enumerate(heads.values()) if value != patch.method.identity()]
                    if not keep:
                        continue
                    ids, strength = [ids[i] for i in keep], strength[keep]
                arrays = {
                    name: array.to(strength.device, strength.dtype if array.is_floating_point() else None)
                    for name, array in patch.pick(layer, ids).items()
                }
                index = torch.tensor(ids, dtype=torch.long, device=strength.device)
                edits.setdefault((patch.part, layer), []).append(
                    Edit(patch.method, index, strength, (record.recipe.digest, patch.index), arrays, record.id)
                )
    return {key: LayerPlan.build(layout.attention[key].num_heads, found) for key, found in edits.items()}
