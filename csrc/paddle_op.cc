// One step, from what Paddle hands over to the kernel's arguments. Two doors lead here, a Python function for dygraph
// and the operator `asgd_update_` for static graphs. Must not compute, nor read a tensor itself (paddle_tensor.h).
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "asgd_kernel.h"
#include "paddle/common/enforce.h"
#include "paddle/extension.h"
#include "paddle_tensor.h"
#include "plain_gradients.h"

namespace paddle_asgd {
namespace {

using Tensors = std::vector<const Tensor*>;

// What this library or the device cannot do. Becomes a RuntimeError.
struct DeviceError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The arguments of one step as both doors deliver them. All lists run parallel to `params`.
struct Received {
  Tensors params, grads, d, y, m;
  std::optional<Tensors> masters;
  const Tensor* learning_rate = nullptr;  // null: the number beside it holds
  double learning_rate_value = 0;
  const Tensor* weight_decay = nullptr;
  double weight_decay_value = 0;
  const Tensor* found_inf = nullptr;
};

void check_length(const char* what, size_t received, size_t expected) {
  if (received == expected) return;
  refuse(std::string("number of ") + what, std::to_string(received), std::to_string(expected) + ", one a parameter");
}

// The slots of a history that fits the parameter: y is [slots, *dims].
int64_t slots_of(const Check& check, const DDim& history, const DDim& dims) {
  bool fits = history.size() == dims.size() + 1 && history[0] > 0;
  for (int i = 0; fits && i < dims.size(); ++i) fits = history[i + 1] == dims[i];
  if (!fits) check.fail("shape of y", show(history), "[batch_num, *shape of the parameter], which is " + show(dims));
  return history[0];
}

// Checks one parameter with its gradient and state, and says where they lie; sets the number of slots in its history.
TensorArgs check_parameter(const Received& r, size_t i, const Place& place, int64_t* slots) {
  static const DDim kOne = common::make_ddim({1});
  const Check check(*r.params[i], i, place);
  const DenseTensor& param = check.dense("value", *r.params[i]);
  const DDim& dims = param.meta().dims;
  const DataType dtype = param.meta().dtype;
  const bool half = is_16_bit(dtype);
  if (!half && dtype != DataType::FLOAT32 && dtype != DataType::FLOAT64) {
    check.fail("dtype", show(dtype), "float16, bfloat16, float32 or float64");
  }
  const DataType received = check.dense("gradient", *r.grads[i]).meta().dtype;
  const DataType grad_dtype = half && received == DataType::FLOAT32 ? DataType::FLOAT32 : dtype;
  TensorArgs t{};
  t.param = check.memory("value", param);
  t.grad = check.like("gradient", *r.grads[i], dims, grad_dtype);
  t.d = check.like("d", *r.d[i], dims, dtype == DataType::FLOAT64 ? DataType::FLOAT64 : DataType::FLOAT32);
  t.m = static_cast<int64_t*>(check.like("m", *r.m[i], kOne, DataType::INT64));
  if (r.masters) {
    if (!half) check.fail("dtype", show(dtype), "float16 or bfloat16 beside a master weight");
    t.master = check.like("master weight", *(*r.masters)[i], dims, DataType::FLOAT32);
  }
  const DenseTensor& y = check.dense("y", *r.y[i]);
  *slots = slots_of(check, y.meta().dims, dims);
  if (y.meta().dtype != grad_dtype) {
    check.fail("dtype of the gradient", show(grad_dtype), show(y.meta().dtype) + ", as its history y has");
  }
  t.y = check.memory("y", y);
  t.numel = extent_of(param).numel;
  t.param_dtype = kernel_dtype(dtype);
  t.grad_dtype = kernel_dtype(grad_dtype);
  return t;
}

void run(const StepArgs& step, const Tensor& first) {
  const Place place = first.place();
  if (place.GetType() == phi::AllocationType::CPU) return asgd_cpu(step);
#ifdef PADDLE_WITH_CUDA
  if (place.GetType() == phi::AllocationType::GPU) {
    const char* error = asgd_cuda(step, place.GetDeviceId(), first.stream());
    if (error == nullptr) return;
    throw DeviceError(std::string("asgd_update_: CUDA says: ") + error);
  }
#endif
  throw DeviceError("asgd_update_: parameters on " + show(place) + ", but this build of paddle_asgd serves " +
#ifdef PADDLE_WITH_CUDA
                    "the CPU and NVIDIA GPUs only; move the parameters there");
#else
                    "the CPU only. Rebuild it where nvcc and a GPU build of Paddle are installed: "
                    "pip install --no-build-isolation --force-reinstall --no-deps .");
#endif
}

// After a forward and a backward pass the tensors' descriptions are in no cache, and a step of many small tensors waits
// for them more than for anything else. So those of a later parameter are fetched while this one is checked.
constexpr size_t kAhead = 8;

void fetch_ahead(const Received& r, size_t i) {
  for (const Tensors* list : {&r.params, &r.grads, &r.d, &r.y, &r.m}) {
    const char* description = reinterpret_cast<const char*>((*list)[i]->impl().get());
    for (int line = 0; line < 5; ++line) __builtin_prefetch(description + 64 * line);
  }
}

// The one function behind both doors. Nothing is written before everything has been checked.
void asgd_update(const Received& r, bool check_only = false) {
  const size_t count = r.params.size();
  check_length("gradients", r.grads.size(), count);
  check_length("sums d", r.d.size(), count);
  check_length("histories y", r.y.size(), count);
  check_length("counters m", r.m.size(), count);
  if (r.masters) check_length("master weights", r.masters->size(), count);
  if (count == 0) return;
  std::vector<TensorArgs> tensors;
  tensors.reserve(count);
  // An empty parameter says nothing about the device: its counter, which never is empty, does.
  const Tensor& first = *r.m[0];
  if (!first.defined() || !first.initialized())
    Check(*r.params[0], 0, Place()).fail("m", "no memory", "a tensor of one int64");
  const Place place = first.place();
  int64_t batch_num = 0;
  for (size_t i = 0; i < count; ++i) {
    if (i + kAhead < count) fetch_ahead(r, i + kAhead);
    int64_t slots = 0;
    tensors.push_back(check_parameter(r, i, place, &slots));
    if (i == 0) batch_num = slots;
    if (slots != batch_num) {
      Check(*r.params[i], i, place)
          .fail("number of slots in y", std::to_string(slots),
                std::to_string(batch_num) + ", as the first parameter has");
    }
  }
  StepArgs step{};
  step.tensors = tensors.data();
  step.count = static_cast<int64_t>(count);
  step.batch_num = batch_num;
  step.learning_rate = scalar("learning_rate", r.learning_rate, r.learning_rate_value, place);
  step.weight_decay = scalar("weight_decay", r.weight_decay, r.weight_decay_value, place);
  step.found_inf = flag("found_inf", r.found_inf, place);
  if (!check_only) run(step, first);
}

Tensors addresses(const std::vector<Tensor>& tensors) {
  Tensors result;
  for (const Tensor& t : tensors) result.push_back(&t);
  return result;
}

// ---- The door of static graphs ------------------------------------------------------------------------------------

void asgd_operator(std::vector<Tensor>& params, const std::vector<Tensor>& grads, const Tensor& learning_rate,
                   const Tensor& weight_decay, std::vector<Tensor>& d, std::vector<Tensor>& y, std::vector<Tensor>& m,
                   paddle::optional<std::vector<Tensor>>& masters, const paddle::optional<Tensor>& found_inf) {
  Received r;
  r.params = addresses(params);
  r.grads = addresses(grads);
  r.d = addresses(d);
  r.y = addresses(y);
  r.m = addresses(m);
  if (masters) r.masters = addresses(*masters);
  r.learning_rate = &learning_rate;
  r.weight_decay = &weight_decay;
  if (found_inf) r.found_inf = found_inf.get_ptr();
  try {
    asgd_update(r);
  } catch (const ArgumentError& error) {
    // Executors keep the text of Paddle's own exceptions only.
    PADDLE_THROW(common::errors::InvalidArgument("%s", error.what()));
  } catch (const DeviceError& error) {
    PADDLE_THROW(common::errors::Fatal("%s", error.what()));
  }
}

// ---- The door of dygraph ------------------------------------------------------------------------------------------

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

void asgd_function(const pybind11::object& params, const pybind11::object& grads, const pybind11::object& d,
                   const pybind11::object& y, const pybind11::object& m, const pybind11::object& masters,
                   const pybind11::object& learning_rate, const pybind11::object& weight_decay,
                   const pybind11::object& found_inf, bool check_only) {
  Received r;
  r.params = to_tensors(params, "params");
  r.grads = to_tensors(grads, "grads");
  r.d = to_tensors(d, "d");
  r.y = to_tensors(y, "y");
  r.m = to_tensors(m, "m");
  if (!masters.is_none()) r.masters = to_tensors(masters, "masters");
  to_scalar(learning_rate, "learning_rate", &r.learning_rate, &r.learning_rate_value);
  to_scalar(weight_decay, "weight_decay", &r.weight_decay, &r.weight_decay_value);
  if (!found_inf.is_none()) {
    if (!paddle::pybind::PyCheckTensor(found_inf.ptr()))
      wrong_type("found_inf", found_inf.ptr(), "a tensor of one bool");
    r.found_inf = &paddle::pybind::CastPyArg2Tensor(found_inf.ptr(), 0);
  }
  try {
    // The caller's lists keep every tensor alive while other threads run.
    pybind11::gil_scoped_release release;
    asgd_update(r, check_only);
  } catch (const ArgumentError& error) {
    throw pybind11::value_error(error.what());
  }
}

}  // namespace
}  // namespace paddle_asgd

// Every tensor that is written is in the map: an operator that writes without it races with the graph's readers.
PD_BUILD_OP(asgd_update_)
    .Inputs({paddle::Vec("params"), paddle::Vec("grads"), "learning_rate", "weight_decay", paddle::Vec("d"),
             paddle::Vec("y"), paddle::Vec("m"), paddle::Optional(paddle::Vec("masters")),
             paddle::Optional("found_inf")})
    .Outputs({paddle::Vec("params_out"), paddle::Vec("d_out"), paddle::Vec("y_out"), paddle::Vec("m_out"),
              paddle::Optional(paddle::Vec("masters_out"))})
    .SetInplaceMap({{paddle::Vec("params"), paddle::Vec("params_out")},
                    {paddle::Vec("d"), paddle::Vec("d_out")},
                    {paddle::Vec("y"), paddle::Vec("y_out")},
                    {paddle::Vec("m"), paddle::Vec("m_out")},
                    {paddle::Optional(paddle::Vec("masters")), paddle::Optional(paddle::Vec("masters_out"))}})
    .SetKernelFn(PD_KERNEL(paddle_asgd::asgd_operator));

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
             py::arg("found_inf"), py::arg("check_only"));
  module.def("plain_gradients", &paddle_asgd::plain_gradients, py::arg("parameters"), py::arg("trainable"),
             py::arg("multipliers"));
}
