// SPDX-License-Identifier: Apache-2.0
// What the Python functions of all optimizers share: Python's objects as tensors and numbers, and errors as Python's.
// Must not check a tensor (paddle_tensor.h) nor know any one function's arguments.
#pragma once

#include <optional>
#include <stdexcept>
#include <string>

#include "paddle/extension.h"
#include "paddle_op.h"

namespace paddle_asgd {

// An argument is not of the kind it must be. Becomes a TypeError.
struct KindError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

[[noreturn]] inline void wrong_type(const std::string& what, PyObject* received, const char* expected) {
  throw KindError(what + ": received " + Py_TYPE(received)->tp_name + ", expected " + expected);
}

// Items are read one by one: the ready-made casters copy every handle and cost twice the time.
inline Tensors to_tensors(const pybind11::object& object, const char* what) {
  PyObject* list = object.ptr();
  if (!PyList_Check(list) && !PyTuple_Check(list)) wrong_type(what, list, "a list of tensors");
  const Py_ssize_t size = PySequence_Fast_GET_SIZE(list);
  PyObject** items = PySequence_Fast_ITEMS(list);
  Tensors result;
  result.reserve(size);
  for (Py_ssize_t i = 0; i < size; ++i) {
    if (i + 16 < size) __builtin_prefetch(items[i + 16]);
    if (!paddle::pybind::PyCheckTensor(items[i])) {
      wrong_type(std::string(what) + "[" + std::to_string(i) + "]", items[i], "a paddle.Tensor");
    }
    result.push_back(&paddle::pybind::CastPyArg2Tensor(items[i], i));
  }
  return result;
}

// A Python number or a tensor of one element.
inline Number to_number(const pybind11::object& object, const char* what) {
  if (paddle::pybind::PyCheckTensor(object.ptr())) {
    return Number{&paddle::pybind::CastPyArg2Tensor(object.ptr(), 0), 0};
  }
  const double value = PyFloat_AsDouble(object.ptr());
  if (!PyErr_Occurred()) return Number{nullptr, value};
  PyErr_Clear();
  wrong_type(what, object.ptr(), "a number or a tensor of one element");
}

// Null for None.
inline const Tensor* to_tensor(const pybind11::object& object, const char* what, const char* expected) {
  if (object.is_none()) return nullptr;
  if (!paddle::pybind::PyCheckTensor(object.ptr())) wrong_type(what, object.ptr(), expected);
  return &paddle::pybind::CastPyArg2Tensor(object.ptr(), 0);
}

// The same as `to_tensors`; nothing for None.
inline std::optional<Tensors> to_optional_tensors(const pybind11::object& object, const char* what) {
  return object.is_none() ? std::nullopt : std::optional<Tensors>(to_tensors(object, what));
}

// Makes a call and says its errors in the name of the operator, as Python's.
template <typename Call>
void say_errors(const std::string& name, const Call& call) {
  try {
    call();
  } catch (const KindError& error) {
    throw pybind11::type_error(name + ": " + error.what());
  } catch (const ArgumentError& error) {
    throw pybind11::value_error(name + ": " + error.what());
  } catch (const DeviceError& error) {
    throw DeviceError(name + ": " + error.what());
  }
}

// Reads the arguments with the interpreter's lock held and makes the call without it: the caller's lists keep every
// tensor alive while other threads run.
template <typename Read, typename Call>
void answer(const std::string& name, const Read& read, const Call& call) {
  say_errors(name, [&]() {
    const auto received = read();
    pybind11::gil_scoped_release release;
    call(received);
  });
}

}  // namespace paddle_asgd
