// SPDX-License-Identifier: Apache-2.0
// The one pass over an optimizer's parameters that a plain step begins with (shortcut.py): Python attributes only. Must
// not look into a tensor, nor know what is done with the gradients.
#pragma once

#include <pybind11/pybind11.h>

#include <utility>

namespace paddle_asgd {

inline PyObject* interned(const char* name) { return PyUnicode_InternFromString(name); }

// What lies on a parameter under this name; borrowed, null if nothing or None does.
inline PyObject* own_attribute(PyObject* dict, PyObject* name) {
  PyObject* value = dict == nullptr ? nullptr : PyDict_GetItemWithError(dict, name);
  if (value == nullptr && PyErr_Occurred()) throw pybind11::error_already_set();
  return value == Py_None ? nullptr : value;
}

inline pybind11::object own_attributes(PyObject* param) {
  PyObject* dict = PyObject_GenericGetDict(param, nullptr);
  if (dict == nullptr) PyErr_Clear();  // a plain tensor may have nothing to keep them in
  return pybind11::reinterpret_steal<pybind11::object>(dict);
}

inline pybind11::object attribute(PyObject* param, PyObject* name) {
  PyObject* value = PyObject_GetAttr(param, name);
  if (value == nullptr) throw pybind11::error_already_set();
  return pybind11::reinterpret_steal<pybind11::object>(value);
}

// Whether nothing lies on the parameter that would change its step, and its learning rate has this multiplier.
inline bool is_plain(PyObject* param, PyObject* multiplier) {
  static PyObject* const kRegularizer = interned("regularizer");
  static PyObject* const kMainGrad = interned("main_grad");
  static PyObject* const kOptimizeAttr = interned("optimize_attr");
  static PyObject* const kLearningRate = interned("learning_rate");
  const pybind11::object own = own_attributes(param);
  if (own_attribute(own.ptr(), kRegularizer) != nullptr || own_attribute(own.ptr(), kMainGrad) != nullptr) return false;
  PyObject* options = own_attribute(own.ptr(), kOptimizeAttr);
  if (options != nullptr && !PyDict_Check(options)) return false;
  PyObject* rate = own_attribute(options, kLearningRate);
  return (rate == nullptr ? Py_None : rate) == multiplier;
}

// The gradients of `trainable`, in one pass over all parameters of an optimizer; None as soon as anything differs from
// what shortcut.py found before: which parameters want a gradient and have one, and what lies on them.
inline pybind11::object plain_gradients(const pybind11::list& parameters, const pybind11::list& trainable,
                                        const pybind11::list& multipliers) {
  static PyObject* const kStopGradient = interned("stop_gradient");
  static PyObject* const kGrad = interned("grad");
  pybind11::list grads;
  size_t count = 0;
  // Reading an attribute may run any code, so nothing about the lists is kept over it.
  for (size_t i = 0; i < parameters.size(); ++i) {
    const pybind11::object param = parameters[i];
    if (attribute(param.ptr(), kStopGradient).ptr() == Py_True) continue;
    if (count >= trainable.size() || count >= multipliers.size()) return pybind11::none();
    if (PyList_GET_ITEM(trainable.ptr(), count) != param.ptr()) return pybind11::none();
    if (!is_plain(param.ptr(), PyList_GET_ITEM(multipliers.ptr(), count))) return pybind11::none();
    const pybind11::object grad = attribute(param.ptr(), kGrad);
    if (grad.is_none()) return pybind11::none();
    grads.append(grad);
    ++count;
  }
  if (count != trainable.size()) return pybind11::none();
  return std::move(grads);
}

}  // namespace paddle_asgd
