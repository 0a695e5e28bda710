# SPDX-License-Identifier: Apache-2.0
"""The only door to C++: finds the library, registers its operators, and has one documented function for each.

No other file may import the library; and none of Paddle's Optimizer is known here.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import paddle
from paddle import _C_ops
from paddle.base.framework import OpProtoHolder, in_dygraph_mode, in_pir_mode
from paddle.base.layer_helper import LayerHelper
from paddle.utils.cpp_extension import load_op_meta_info_and_register_op

from .caller import warn

_LIBRARY = Path(__file__).with_name("_C.so")
REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."


def _load(path: Path = _LIBRARY) -> ModuleType:
    """Load the library and register its operators; ImportError says how to build it if it cannot be loaded."""
    if not path.is_file():
        raise ImportError(
            f"paddle_asgd: its native library {path} does not exist. Build it in the project's folder with: {REBUILD} "
            "(If it is installed already, Python found this source folder first: start it from elsewhere.)"
        )
    try:
        spec = importlib.util.spec_from_file_location("paddle_asgd._C", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        _refuse_foreign(module)
        load_op_meta_info_and_register_op(str(path))
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        raise ImportError(
            f"paddle_asgd: {path} cannot be loaded under Paddle {paddle.__version__}: {error} "
            f"Rebuild it in the project's folder with: {REBUILD}"
        ) from error
    return module


def _refuse_foreign(module: Any) -> None:
    """Before anything of the library is used: it reads tensors as the Paddle that it was built for lays them out."""
    if module.built_for_paddle != paddle.__version__:
        raise ImportError(
            f"it was built for Paddle {module.built_for_paddle}, whose tensors may be laid out otherwise."
        )


def _warn_without_cuda(module: Any) -> None:
    """Warn when the library was built without CUDA where Paddle sees a GPU."""
    if not module.built_with_cuda and paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count() > 0:
        warn(
            "paddle_asgd was built without CUDA and will refuse parameters on the GPU. Rebuild it where nvcc is "
            f"installed with: {REBUILD}",
            RuntimeWarning,
        )


_C = _load()
_warn_without_cuda(_C)

Tensors = Sequence[Any]

#: the inputs of the operator, in the order of PD_BUILD_OP
_ASGD_INPUTS = (
    *("params", "grads", "learning_rate", "weight_decay", "d", "y", "y_scale", "m", "masters", "found_inf"),
    *("batch_index", "batch_weights", "theta", "watch"),
)


def asgd_update(
    params: Tensors,
    grads: Tensors,
    d: Tensors,
    y: Tensors,
    m: Tensors,
    masters: Tensors | None,
    learning_rate: float | Any,
    weight_decay: float | Any,
    found_inf: Any | None = None,
    check_only: bool = False,
    batch_index: int | Any | None = None,
    batch_weights: Any | None = None,
    theta: float | Any | None = None,
    watch: Any | None = None,
    y_scale: Tensors | None = None,
) -> None:
    """Take one SAG step for all parameters: at once in dygraph, as one operator appended to the static graph else.

    The formula is in ``csrc/asgd_formula.h``. All sequences but ``y_scale`` run parallel to ``params``.

    Args:
        params: the parameters, float16, bfloat16, float32 or float64, of any shape; written.
        grads: their gradients, of the same shapes; dtype of the parameter, or float32 for a 16-bit parameter. In
            dygraph on the CPU, a sparse gradient may come as it is: the kernel adds up its rows block by block, and no
            dense copy is made.
        d: the sums of the stored gradients, of the same shapes, float32 (float64 for float64); written.
        y: the stored gradients, ``[batch_num, *shape]``, dtype of the gradients, or int8 or int16; written.
        m: the clocks, int64: ``[1]``, the steps taken; with a ``batch_index`` ``[clock_length(batch_num)]``; written.
        masters: the float32 weights of 16-bit parameters, one for each; None without; written.
        learning_rate: a number, or a tensor of one float32 or float64; a tensor in static graphs.
        weight_decay: the same.
        found_inf: a tensor of one bool; where True the step changes nothing.
        check_only: dygraph only, check everything and change nothing.
        batch_index: the slot of this step's batch, an int or a tensor of one int64, on the host or beside the
            parameters; None: the slots take turns. Out of range on a GPU, it changes nothing but ``watch``.
        batch_weights: what each batch weighs, float64 ``[batch_num]`` of mean 1; None: all the same.
        theta: how much of the change of a gradient enters the direction, a number or a tensor of one float32 or
            float64; None: SAG.
        watch: float64 ``[kWatchSize]``, what ``csrc/asgd_watch.h`` keeps; written.
        y_scale: float32 ``[batch_num, ceil(numel / 128)]`` for each parameter whose ``y`` is int8 or int16, in their
            order; None if there is no such parameter; written.

    Raises:
        TypeError: an argument is not of the kind it must be.
        ValueError: a list, shape, dtype, layout or place does not fit. Nothing has been written. In a static graph this
            comes from the run of the graph.
        RuntimeError: the library does not serve the parameters' device, or CUDA reports an error.
    """
    if in_dygraph_mode():
        _C.asgd_update(
            *(params, grads, d, y, m, masters, learning_rate, weight_decay, found_inf, check_only),
            *(batch_index, batch_weights, theta, watch, y_scale),
        )
        return
    _check_static("asgd_update_", params, masters, learning_rate=learning_rate, weight_decay=weight_decay)
    read = {"grads": grads, "learning_rate": learning_rate, "weight_decay": weight_decay, "found_inf": found_inf}
    read.update(batch_index=batch_index, batch_weights=batch_weights, theta=theta)
    written = {"params": params, "d": d, "y": y, "y_scale": y_scale, "m": m, "masters": masters, "watch": watch}
    _append_operator("asgd_update_", _ASGD_INPUTS, written, read)


def asgd_call(*arguments: Any) -> Callable[[], None]:
    """A call of ``asgd_update`` with all its arguments, yet to be made; in dygraph it is a call of C++ alone."""
    return partial(_C.asgd_update if in_dygraph_mode() else asgd_update, *arguments)


def asgd_norm(
    params: Tensors,
    d: Tensors,
    m: Tensors,
    masters: Tensors | None,
    batch_num: int,
    indexed: bool,
    batch_weights: Any | None,
    weight_decay: float | Any,
    total: Any,
) -> None:
    """Add the squares of ``d / m + weight_decay * x``, over all elements, to ``total``; dygraph only.

    Args:
        params: the parameters x, as for ``asgd_update``.
        d: the sums of the stored gradients.
        m: the clocks.
        masters: the float32 weights of 16-bit parameters, which then are x; None without.
        batch_num: the number of slots.
        indexed: whether the clocks know the slots seen.
        batch_weights: as for ``asgd_update``.
        weight_decay: a number, or a tensor of one float32 or float64.
        total: float64 ``[1]`` on the parameters' device; written.

    Raises:
        TypeError, ValueError, RuntimeError: as ``asgd_update``. Nothing has been written.
    """
    _C.asgd_norm(params, d, m, masters, batch_num, indexed, batch_weights, weight_decay, total)


def average_update(
    averages: Tensors, values: Tensors, weight: float, copies: Tensors = (), originals: Tensors = ()
) -> None:
    """Move averages towards the values that they follow, and renew copies; dygraph only.

    ``a <- a + weight * (x - a)`` for each average a and its value x, one pass over the memory and no temporary. The
    formula is in ``csrc/average_formula.h``.

    Args:
        averages: float32 or float64; written.
        values: of the same shapes, float16, bfloat16, float32 or, with a float64 average, float64.
        weight: a number from 0 to 1; with 1 the averages become the values, to the bit.
        copies: of any dtype; written.
        originals: what they become, of the same shapes and dtypes.

    Raises:
        TypeError: an argument is not of the kind it must be.
        ValueError: a list, shape, dtype, layout, place or the weight does not fit. Nothing has been written.
        RuntimeError: the library does not serve the tensors' device, or CUDA reports an error.
    """
    _C.average_update(averages, values, weight, copies, originals)


#: Takes the update of ``average_update`` by a plan of the lists averages, values, copies and originals, in dygraph.
#:
#: Arguments: the plan, made by ``step_plan`` with none that is trained; the weight; and notes, a list of functions of C
#: that are called after the update. No interrupt can come between. ValueError: something is not as the plan knows it,
#: or the weight is out of range, and nothing has been done.
average_planned = _C.average_planned


def average_swap(averages: Tensors, values: Tensors, targets: Tensors = (), sources: Tensors = ()) -> None:
    """Exchange the contents of tensors in place, and write others in the dtype that they have; dygraph only.

    Args:
        averages: of any dtype; written with what ``values`` held.
        values: of the same shapes and dtypes; written with what ``averages`` held.
        targets: written with ``sources``, each rounded once if the dtypes differ.
        sources: of the same shapes; float32 or float64, or of the target's own dtype.

    Raises:
        TypeError, ValueError, RuntimeError: as ``average_update``. Nothing has been written.
    """
    _C.average_swap(averages, values, targets, sources)


def average_swap_call(*arguments: Any) -> Callable[[], None]:
    """A call of ``average_swap`` with all its arguments, yet to be made: of C++ alone."""
    return partial(_C.average_swap, *arguments)


def watch_wants_a_look(watch: Any, threshold: float) -> bool:
    """Whether the last whole pass of a ``watch`` exceeds the threshold, or it notes a refused index.

    True as well where the host cannot read it without waiting.
    """
    return _C.watch_wants_a_look(watch, threshold)


def step_plan(parameters: list, trained: list, multipliers: list, lists: list[list], dictionaries: list) -> Any | None:
    """The plan of a step that is like the last one but for its gradients; None if there can be none. Dygraph only.

    Args:
        parameters: all parameters of an optimizer; the list itself, which may change. All that are not in ``trained``
            must be frozen at each step.
        trained: those of them that had a gradient, in their order.
        multipliers: for each of ``trained`` what lay in its ``optimize_attr["learning_rate"]``, or None.
        lists: the tensors of each of ``trained`` in parallel lists, of which ``trained`` is the first, and lists of
            another length with tensors that some of them have or all share.
        dictionaries: those that must hold the same objects at each step, each alone or in a pair with the keys that
            matter.
    """
    try:
        return _C.StepPlan(parameters, tuple(trained), tuple(multipliers), tuple(lists), dictionaries)
    except ValueError:
        return None


#: Takes the step of ``asgd_update`` by a plan of the lists params, d, y, m, masters and y_scale, if there are any.
#:
#: Arguments: the plan, made by ``step_plan``; learning_rate, weight_decay, batch_index, batch_weights, theta and watch
#: as for ``asgd_update``; whether the last list is ``y_scale``; and notes, a list of functions of C that are called
#: after the update. No interrupt can come between. ValueError: anything but the gradients is not as the plan knows it,
#: and nothing has been done.
asgd_planned = _C.asgd_planned

#: likewise of the operator of averaged SGD
_AVERAGED_SGD_INPUTS = (
    *("params", "grads", "learning_rate", "weight_decay", "steps", "ax", "lambd", "alpha"),
    *("t0", "sign", "t0s", "etas", "masters", "found_inf"),
)


def averaged_sgd_update(
    params: Tensors,
    grads: Tensors,
    steps: Tensors,
    ax: Tensors | None,
    t0s: Tensors | None,
    etas: Tensors | None,
    masters: Tensors | None,
    learning_rate: float | Any,
    weight_decay: float | Any,
    found_inf: Any | None,
    check_only: bool,
    lambd: float | Any,
    alpha: float | Any,
    t0: float | Any,
    sign: float | Any,
) -> None:
    """Take one step of averaged SGD for all parameters, in either mode as ``asgd_update`` does.

    The formula is in ``csrc/average_formula.h``. All sequences run parallel to ``params``.

    Args:
        params: the parameters, as for ``asgd_update``; written.
        grads: their gradients, likewise.
        steps: the clocks, int64 ``[1]``; written.
        ax: the averages, of the shapes of ``params``, float32 (float64 for float64); written. None: there are none yet,
            which a static graph does not know.
        t0s: a t0 for each parameter in place of ``t0``, float64 ``[1]``; None without.
        etas: the rates of this step, float32 or float64 ``[1]``, as the last step left them; written. None: each step
            takes the present learning rate.
        masters: the float32 weights of 16-bit parameters, one for each; None without; written.
        learning_rate: a number, or a tensor of one float32 or float64; a tensor in static graphs.
        weight_decay: the same.
        found_inf: a tensor of one bool; where True the step changes nothing.
        check_only: dygraph only, check everything and change nothing.
        lambd: how fast the weights decay and the rate falls; a number, in static graphs a tensor of one float64.
        alpha: the power of the rate's fall; the same.
        t0: the steps after which averaging begins; the same.
        sign: 1, or -1 to climb; the same.

    Raises:
        TypeError, ValueError, RuntimeError: as ``asgd_update``. Nothing has been written.
    """
    if in_dygraph_mode():
        _C.averaged_sgd_update(
            *(params, grads, steps, ax, t0s, etas, masters, learning_rate, weight_decay, found_inf, check_only),
            *(lambd, alpha, t0, sign),
        )
        return
    _check_static(
        "averaged_sgd_update_", params, masters, learning_rate=learning_rate, weight_decay=weight_decay, ax=ax
    )
    read = {"grads": grads, "learning_rate": learning_rate, "weight_decay": weight_decay, "found_inf": found_inf}
    read.update(t0s=t0s, lambd=lambd, alpha=alpha, t0=t0, sign=sign)
    written = {"params": params, "steps": steps, "ax": ax, "etas": etas, "masters": masters}
    _append_operator("averaged_sgd_update_", _AVERAGED_SGD_INPUTS, written, read)


def averaged_sgd_call(*arguments: Any) -> Callable[[], None]:
    """A call of ``averaged_sgd_update`` with all its arguments, yet to be made; in dygraph a call of C++ alone."""
    return partial(_C.averaged_sgd_update if in_dygraph_mode() else averaged_sgd_update, *arguments)


#: Takes the step of ``averaged_sgd_update`` by a plan of the lists params, ax, steps, t0s, etas and masters.
#:
#: Arguments: the plan; whether it has the lists ax, t0s, etas and masters, four bools; learning_rate, weight_decay,
#: lambd, alpha, t0 and sign as for ``averaged_sgd_update``; and notes, as for ``asgd_planned``, which raises the same.
averaged_sgd_planned = _C.averaged_sgd_planned


def _check_static(operator: str, params: Tensors, masters: Tensors | None, **scalars: Any) -> None:
    """Refuse what would end the process when the operator is built."""
    if not params or (masters is not None and len(masters) != len(params)):
        raise ValueError(
            f"{operator}: received {len(params)} params and {'no' if masters is None else len(masters)} masters, "
            "expected at least one of params, and masters None or as many"
        )
    for name, value in scalars.items():
        if isinstance(value, (int, float)) or value is None:
            raise TypeError(f"{operator}: {name}: received {value!r}, expected a variable of the static graph")


def _append_operator(operator: str, order: tuple[str, ...], written: dict[str, Any], read: dict[str, Any]) -> None:
    """Append an operator to the static graph, in either of Paddle's graph formats.

    Args:
        operator: its name.
        order: the names of its inputs, as it was registered with them.
        written: the inputs that it writes, ``params`` first; None for one that it goes without.
        read: all other inputs, likewise.
    """
    if in_pir_mode():
        given = {**written, **read}
        outputs = _C_ops._run_custom_op(operator, *(given[name] for name in order))
        _drop_splits(outputs)
    else:
        _append_to_block(operator, written, read)


def _drop_splits(outputs: list) -> None:
    """Remove the operators that take the lists among an operator's outputs apart again: nothing reads their tensors.

    The executor's key to a program is the program's text, printed anew at every run, and this is an eighth of it.
    """
    i = 0
    while i < len(outputs):
        split = outputs[i].get_defining_op()
        is_list = split.name() == "builtin.split"
        # Its results follow one another, and are gone with it.
        i += split.num_results() if is_list else 1
        if is_list:
            split.get_parent_block().remove_op(split)


def _append_to_block(operator: str, written: dict[str, Any], read: dict[str, Any]) -> None:
    """Append the operator to a block of the graph format before PIR, whose slots carry the kind of their input."""
    inputs = {name: value for name, value in {**written, **read}.items() if value is not None}
    outputs = {f"{name}_out": value for name, value in written.items() if value is not None}
    proto = OpProtoHolder.instance().get_op_proto(operator)

    def spelled(slots: Any, given: dict) -> dict:
        return {slot.name: given[slot.name.split("@")[0]] for slot in slots if slot.name.split("@")[0] in given}

    LayerHelper(operator).append_op(
        type=operator,
        inputs=spelled(proto.inputs, inputs),
        outputs=spelled(proto.outputs, outputs),
        stop_gradient=True,
    )
