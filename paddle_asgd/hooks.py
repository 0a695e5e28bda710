# SPDX-License-Identifier: Apache-2.0
"""Hooks: functions of the user's that an optimizer calls around its steps and checkpoints, in torch's words.

Must not know how a step is taken or what a checkpoint holds (fused.py).
"""

from __future__ import annotations

import itertools
from typing import Any, Callable

import paddle

from .arguments import shown

Hook = Callable[..., Any]
_numbers = itertools.count()


class HookHandle:
    """What a registration returns: ``remove()`` undoes it, and so does leaving it as a context."""

    def __init__(self, hooks: dict[int, Hook], number: int) -> None:
        self._hooks = hooks
        self._number = number

    def remove(self) -> None:
        """Stop calling the hook; nothing happens if it has been removed already."""
        self._hooks.pop(self._number, None)

    def __enter__(self) -> HookHandle:
        return self

    def __exit__(self, *error: Any) -> None:
        self.remove()


class _Hooks:
    """The hooks of one optimizer, by what they surround, in the order of their calls."""

    def __init__(self) -> None:
        self.step_pre: dict[int, Hook] = {}
        self.step_post: dict[int, Hook] = {}
        self.state_dict_pre: dict[int, Hook] = {}
        self.state_dict_post: dict[int, Hook] = {}
        self.load_pre: dict[int, Hook] = {}
        self.load_post: dict[int, Hook] = {}
        #: whether a call of step() surrounds what happens now, which then calls the hooks of a step itself
        self.within_step = False


class Hooked:
    """Registers hooks, and calls them where a subclass says.

    A subclass implements ``step``, ``_collect_for_rank`` and ``_load_of_rank``.
    """

    #: None until the first is registered: a step without hooks asks for nothing else
    _hooks: _Hooks | None = None

    def register_step_pre_hook(self, hook: Callable[[Any, tuple, dict], Any]) -> HookHandle:
        """Call ``hook(optimizer, args, kwargs)`` before every step in dygraph.

        ``args`` and ``kwargs`` are those of ``step``. A hook may return others, as a tuple of both, in their place; it
        is called before a closure, and without autograd. ``minimize`` and wrappers that come without a call of ``step``
        bring the gradients along, and the hook may change these in place. A step that GradScaler skips for an Inf
        calls no hook, and neither do static graphs, where no Python runs in a step.
        """
        return self._register("step_pre", hook)

    def register_step_post_hook(self, hook: Callable[[Any, tuple, dict], None]) -> HookHandle:
        """Call ``hook(optimizer, args, kwargs)`` after every step in dygraph that was taken.

        What it raises does not undo the step.
        """
        return self._register("step_post", hook)

    def register_state_dict_pre_hook(self, hook: Callable[[Any], None], prepend: bool = False) -> HookHandle:
        """Call ``hook(optimizer)`` before ``state_dict`` collects; with ``prepend`` before all hooks so far."""
        return self._register("state_dict_pre", hook, prepend)

    def register_state_dict_post_hook(self, hook: Callable[[Any, dict], Any], prepend: bool = False) -> HookHandle:
        """Call ``hook(optimizer, state_dict)`` with what ``state_dict`` returns; it may return another in its place."""
        return self._register("state_dict_post", hook, prepend)

    def register_load_state_dict_pre_hook(self, hook: Callable[[Any, dict], Any], prepend: bool = False) -> HookHandle:
        """Call ``hook(optimizer, state_dict)`` before ``set_state_dict`` checks; it may return another in its place."""
        return self._register("load_pre", hook, prepend)

    def register_load_state_dict_post_hook(self, hook: Callable[[Any], None], prepend: bool = False) -> HookHandle:
        """Call ``hook(optimizer)`` after ``set_state_dict`` has loaded everything."""
        return self._register("load_post", hook, prepend)

    def _register(self, kind: str, hook: Hook, prepend: bool = False) -> HookHandle:
        if not callable(hook):
            raise TypeError(f"hook: received {shown(hook)}, expected a function")
        if self._hooks is None:
            self._hooks = _Hooks()
        hooks, number = getattr(self._hooks, kind), next(_numbers)
        before = dict(hooks) if prepend else {}
        hooks[number] = hook
        for key, other in before.items():  # moved behind the one that comes first
            del hooks[key]
            hooks[key] = other
        return HookHandle(hooks, number)

    # ---- Where they are called --------------------------------------------------------------------------------------

    def _before_step(self, args: tuple = ()) -> tuple[tuple, dict[str, Any]]:
        """Call the hooks; returns the arguments of the step."""
        given: tuple[tuple, dict[str, Any]] = (args, {})
        for hook in list(self._hooks.step_pre.values()):
            with paddle.no_grad():
                changed = hook(self, *given)
            if changed is None:
                continue
            if not (isinstance(changed, tuple) and [type(part) for part in changed] == [tuple, dict]):
                raise TypeError(
                    f"step pre hook: returned {shown(changed)}, expected None or the arguments of step in a tuple: "
                    "(args, kwargs)"
                )
            given = changed
        return given

    def _after_step(self, args: tuple = (), kwargs: dict[str, Any] | None = None) -> None:
        for hook in list(self._hooks.step_post.values()):
            with paddle.no_grad():
                hook(self, args, kwargs or {})

    def _step_with_hooks(self, closure: Any) -> Any:
        """A call of ``step`` that will not be skipped."""
        args, kwargs = self._before_step(() if closure is None else (closure,))
        self._hooks.within_step = True
        try:
            result = self.step(*args, **kwargs)
        finally:
            self._hooks.within_step = False
        self._after_step(args, kwargs)
        return result

    def _has_step_hooks(self) -> bool:
        """Whether there may be hooks that no call of ``step`` around this one takes care of."""
        return self._hooks is not None and not self._hooks.within_step

    def _collect_with_hooks(self) -> dict[str, Any]:
        for hook in list(self._hooks.state_dict_pre.values()):
            hook(self)
        collected = self._collect_for_rank()
        for hook in list(self._hooks.state_dict_post.values()):
            changed = hook(self, collected)
            collected = collected if changed is None else changed
        return collected

    def _load_with_hooks(self, state_dict: dict[str, Any]) -> None:
        # A copy, of the dict alone: what a hook takes out of it must stay in the caller's.
        given = dict(state_dict) if isinstance(state_dict, dict) else state_dict
        for hook in list(self._hooks.load_pre.values()):
            changed = hook(self, given)
            given = given if changed is None else changed
        self._load_of_rank(given)
        for hook in list(self._hooks.load_post.values()):
            hook(self)
