// SPDX-License-Identifier: Apache-2.0
// The door of dygraph: Python functions that take lists of tensors. Must not check a tensor (paddle_tensor.h) nor know
// a step (paddle_op.cc).
#include <string>
#include <vector>

#include "paddle/extension.h"
#include "paddle_op.h"
#include "plain_gradients.h"

namespace paddle_asgd {
namespace {

[[noreturn]] void wrong_type(const std::string& what, PyObject* received, const char* expected) {
  throw pybind11::type_error("asgd_update_: " + what + ": received " + Py_TYPE(received)->tp_name + ", expected " +
                             expected);
}

// Items are read one by one: the ready-made casters copy every handle and cost twice the time.
Tensors to_tensors(const pybind11::object& object, const char* what) {
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
void to_scalar(const pybind11::object& object, const char* what, const Tensor** tensor, double* value) {
  if (paddle::pybind::PyCheckTensor(object.ptr())) {
    *tensor = &paddle::pybind::CastPyArg2Tensor(object.ptr(), 0);
    return;
  }
  *value = PyFloat_AsDouble(object.ptr());
  if (!PyErr_Occurred()) return;
  PyErr_Clear();
  wrong_type(what, object.ptr(), "a number or a tensor of one element");
}

// Null for None.
const Tensor* to_tensor(const pybind11::object& object, const char* what, const char* expected) {
  if (object.is_none()) return nullptr;
  if (!paddle::pybind::PyCheckTensor(object.ptr())) wrong_type(what, object.ptr(), expected);
  return &paddle::pybind::CastPyArg2Tensor(object.ptr(), 0);
}

// None, an int or a tensor of one element.
void to_index(const pybind11::object& object, Received* r) {
  r->has_batch_index = !object.is_none();
  if (!r->has_batch_index) return;
  if (paddle::pybind::PyCheckTensor(object.ptr())) {
    r->batch_index = &paddle::pybind::CastPyArg2Tensor(object.ptr(), 0);
    return;
  }
  if (!PyLong_Check(object.ptr())) wrong_type("batch_index", object.ptr(), "an int or a tensor of one int64");
  int overflow = 0;
  r->batch_index_value = PyLong_AsLongLongAndOverflow(object.ptr(), &overflow);
  // Out of every range, which is said where the range is known.
  if (overflow != 0) r->batch_index_value = overflow > 0 ? INT64_MAX : INT64_MIN;
}

void asgd_function(const pybind11::object& params, const pybind11::object& grads, const pybind11::object& d,
                   const pybind11::object& y, const pybind11::object& m, const pybind11::object& masters,
                   const pybind11::object& learning_rate, const pybind11::object& weight_decay,
                   const pybind11::object& found_inf, bool check_only, const pybind11::object& batch_index,
                   const pybind11::object& batch_weights, const pybind11::object& theta,
                   const pybind11::object& watch) {
  Received r;
  r.params = to_tensors(params, "params");
  r.grads = to_tensors(grads, "grads");
  r.d = to_tensors(d, "d");
  r.y = to_tensors(y, "y");
  r.m = to_tensors(m, "m");
  if (!masters.is_none()) r.masters = to_tensors(masters, "masters");
  to_scalar(learning_rate, "learning_rate", &r.learning_rate, &r.learning_rate_value);
  to_scalar(weight_decay, "weight_decay", &r.weight_decay, &r.weight_decay_value);
  r.found_inf = to_tensor(found_inf, "found_inf", "a tensor of one bool");
  to_index(batch_index, &r);
  r.batch_weights = to_tensor(batch_weights, "batch_weights", "a tensor of one float64 a batch");
  r.has_theta = !theta.is_none();
  if (r.has_theta) to_scalar(theta, "theta", &r.theta, &r.theta_value);
  r.watch = to_tensor(watch, "watch", "a float64 tensor");
  try {
    // The caller's lists keep every tensor alive while other threads run.
    pybind11::gil_scoped_release release;
    asgd_update(r, check_only);
  } catch (const ArgumentError& error) {
    throw pybind11::value_error(error.what());
  }
}

void norm_function(const pybind11::object& params, const pybind11::object& d, const pybind11::object& m,
                   const pybind11::object& masters, int64_t batch_num, bool indexed, const pybind11::object& weights,
                   const pybind11::object& weight_decay, const pybind11::object& sum) {
  Received r;
  r.params = to_tensors(params, "params");
  r.d = to_tensors(d, "d");
  r.m = to_tensors(m, "m");
  if (!masters.is_none()) r.masters = to_tensors(masters, "masters");
  r.has_batch_index = indexed;
  r.batch_weights = to_tensor(weights, "batch_weights", "a tensor of one float64 a batch");
  to_scalar(weight_decay, "weight_decay", &r.weight_decay, &r.weight_decay_value);
  const Tensor* total = to_tensor(sum, "sum", "a tensor of one float64");
  if (total == nullptr) wrong_type("sum", sum.ptr(), "a tensor of one float64");
  try {
    pybind11::gil_scoped_release release;
    asgd_norm(r, batch_num, *total);
  } catch (const ArgumentError& error) {
    throw pybind11::value_error(error.what());
  }
}

}  // namespace
}  // namespace paddle_asgd

PYBIND11_MODULE(PADDLE_ASGD_MODULE, module) {
  namespace py = pybind11;
  module.doc() = "The native door of paddle_asgd; use paddle_asgd.native, which documents it.";
  module.attr("built_for_paddle") = PADDLE_ASGD_BUILT_FOR_PADDLE;
#ifdef PADDLE_WITH_CUDA
  module.attr("built_with_cuda") = true;
#else
  module.attr("built_with_cuda") = false;
#endif
  module.def("asgd_update", &paddle_asgd::asgd_function, py::arg("params"), py::arg("grads"), py::arg("d"),
             py::arg("y"), py::arg("m"), py::arg("masters"), py::arg("learning_rate"), py::arg("weight_decay"),
             py::arg("found_inf"), py::arg("check_only"), py::arg("batch_index"), py::arg("batch_weights"),
             py::arg("theta"), py::arg("watch"));
  module.def("asgd_norm", &paddle_asgd::norm_function, py::arg("params"), py::arg("d"), py::arg("m"),
             py::arg("masters"), py::arg("batch_num"), py::arg("indexed"), py::arg("batch_weights"),
             py::arg("weight_decay"), py::arg("sum"));
  module.def("plain_gradients", &paddle_asgd::plain_gradients, py::arg("parameters"), py::arg("trainable"),
             py::arg("multipliers"));
}
