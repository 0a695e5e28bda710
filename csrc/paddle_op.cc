// The only native file that knows Paddle: checks what Paddle hands over and calls the kernel. Two doors lead here, a
// Python function for dygraph and the operator `asgd_update_` for static graphs. Must not compute anything itself.
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "asgd_kernel.h"
#include "paddle/common/ddim.h"
#include "paddle/common/enforce.h"
#include "paddle/extension.h"

namespace paddle_asgd {
namespace {

using paddle::Tensor;
using Tensors = std::vector<const Tensor*>;

// What was received does not fit. Becomes a ValueError at both doors.
struct ArgumentError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

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

using common::DDim;

std::string show(const DDim& shape) {
  std::ostringstream text;
  text << "[";
  for (int i = 0; i < shape.size(); ++i) text << (i ? ", " : "") << shape[i];
  text << "]";
  return text.str();
}

template <typename Printable>
std::string show(const Printable& value) {
  std::ostringstream text;
  text << value;
  return text.str();
}

// Tensor::is_contiguous does not exist in Paddle 2.6.
bool is_contiguous(const Tensor& t, const DDim& dims) {
  const DDim& strides = t.strides();
  int64_t expected = 1;
  for (int i = dims.size() - 1; i >= 0; --i) {
    if (dims[i] != 1 && strides[i] != expected) return false;
    expected *= dims[i];
  }
  return true;
}

// Place's own comparison computes two hashes. Kinds of custom devices are not told apart: none is served (run).
bool same(const paddle::Place& a, const paddle::Place& b) {
  return a.GetType() == b.GetType() && a.GetDeviceId() == b.GetDeviceId();
}

// The checks of one parameter's tensors. They run at every step, so they allocate nothing unless they fail.
class Check {
 public:
  Check(const Tensor& param, size_t position) : param_(param), position_(position) {}

  [[noreturn]] void fail(const std::string& what, const std::string& received, const std::string& expected) const {
    // Executors pass tensors without a name, so the position stands in.
    const std::string& name = param_.name();
    throw ArgumentError("asgd_update_: " + what + " of parameter " +
                        (name.empty() ? "#" + std::to_string(position_) : "'" + name + "'") + ": received " + received +
                        ", expected " + expected);
  }

  // A dense tensor of these dimensions and dtype, in one piece of memory on `place`.
  void like(const char* what, const Tensor& t, const DDim& dims, paddle::DataType dtype,
            const paddle::Place& place) const {
    if (dense(what, t) != dims) fail(std::string("shape of ") + what, show(t.dims()), show(dims));
    if (t.dtype() != dtype) fail(std::string("dtype of ") + what, show(t.dtype()), show(dtype));
    memory(what, t, dims, place);
  }

  const DDim& dense(const char* what, const Tensor& t) const {
    if (!t.defined() || !t.is_dense_tensor()) fail(what, "no dense tensor", "a dense tensor");
    return t.dims();
  }

  void memory(const char* what, const Tensor& t, const DDim& dims, const paddle::Place& place) const {
    // An empty tensor may have no memory, and then no device either.
    if (t.numel() == 0) return;
    if (!t.initialized()) fail(what, "a tensor without memory", "an initialised tensor");
    // A strided tensor would be copied, and what is written to the copy would be lost without a word.
    if (!is_contiguous(t, dims)) {
      fail(std::string("layout of ") + what, "a strided view", "a contiguous tensor; call .contiguous() on it");
    }
    if (!same(t.place(), place)) fail(std::string("place of ") + what, show(t.place()), show(place));
  }

 private:
  const Tensor& param_;
  size_t position_;
};

bool is_16_bit(paddle::DataType dtype) {
  return dtype == paddle::DataType::FLOAT16 || dtype == paddle::DataType::BFLOAT16;
}

DType kernel_dtype(paddle::DataType dtype) {
  switch (dtype) {
    case paddle::DataType::FLOAT64:
      return DType::kFloat64;
    case paddle::DataType::FLOAT16:
      return DType::kFloat16;
    case paddle::DataType::BFLOAT16:
      return DType::kBFloat16;
    default:
      return DType::kFloat32;
  }
}

[[noreturn]] void refuse(const std::string& what, const std::string& received, const std::string& expected) {
  throw ArgumentError("asgd_update_: " + what + ": received " + received + ", expected " + expected);
}

void check_length(const char* what, size_t received, size_t expected) {
  if (received == expected) return;
  refuse(std::string("number of ") + what, std::to_string(received), std::to_string(expected) + ", one a parameter");
}

// The slots of a history that fits the parameter: y is [slots, *dims].
int64_t slots_of(const Check& check, const Tensor& y, const DDim& dims) {
  const DDim& history = check.dense("y", y);
  bool fits = history.size() == dims.size() + 1 && history[0] > 0;
  for (int i = 0; fits && i < dims.size(); ++i) fits = history[i + 1] == dims[i];
  if (!fits) check.fail("shape of y", show(history), "[batch_num, *shape of the parameter], which is " + show(dims));
  return history[0];
}

// Checks one parameter with its gradient and state; returns the number of slots in its history.
int64_t check_parameter(const Received& r, size_t i, const paddle::Place& place) {
  static const DDim kOne = common::make_ddim({1});
  using paddle::DataType;
  const Tensor& param = *r.params[i];
  const Tensor& grad = *r.grads[i];
  const Tensor& y = *r.y[i];
  const Check check(param, i);
  const DDim& dims = check.dense("value", param);
  const DataType dtype = param.dtype();
  const bool half = is_16_bit(dtype);
  if (!half && dtype != DataType::FLOAT32 && dtype != DataType::FLOAT64) {
    check.fail("dtype", show(dtype), "float16, bfloat16, float32 or float64");
  }
  check.memory("value", param, dims, place);
  check.dense("gradient", grad);
  const DataType grad_dtype = half && grad.dtype() == DataType::FLOAT32 ? DataType::FLOAT32 : dtype;
  check.like("gradient", grad, dims, grad_dtype, place);
  check.like("d", *r.d[i], dims, dtype == DataType::FLOAT64 ? DataType::FLOAT64 : DataType::FLOAT32, place);
  check.like("m", *r.m[i], kOne, DataType::INT64, place);
  if (r.masters) {
    if (!half) check.fail("dtype", show(dtype), "float16 or bfloat16 beside a master weight");
    check.like("master weight", *(*r.masters)[i], dims, DataType::FLOAT32, place);
  }
  const int64_t slots = slots_of(check, y, dims);
  if (y.dtype() != grad_dtype) {
    check.fail("dtype of the gradient", show(grad_dtype), show(y.dtype()) + ", as its history y has");
  }
  check.memory("y", y, y.dims(), place);
  return slots;
}

// A number in a tensor: on the host it is read here, on a device by the kernel.
Scalar scalar(const char* what, const Tensor* t, double value, const paddle::Place& place) {
  Scalar result{nullptr, DType::kFloat64, value};
  if (t == nullptr) return result;
  const std::string expected = "one float32 or float64 number";
  if (!t->defined() || !t->is_dense_tensor() || !t->initialized()) refuse(what, "a tensor without memory", expected);
  if (t->numel() != 1) refuse(what, "a tensor of shape " + show(t->dims()), expected);
  if (t->dtype() != paddle::DataType::FLOAT32 && t->dtype() != paddle::DataType::FLOAT64) {
    refuse(what, "a tensor of " + show(t->dtype()), expected);
  }
  const bool wide = t->dtype() == paddle::DataType::FLOAT64;
  if (t->place().GetType() == phi::AllocationType::CPU) {
    result.value = wide ? *t->data<double>() : static_cast<double>(*t->data<float>());
    return result;
  }
  if (!same(t->place(), place))
    refuse(what, "a tensor on " + show(t->place()), show(place) + ", where the parameters are");
  result.dtype = wide ? DType::kFloat64 : DType::kFloat32;
  result.data = wide ? static_cast<const void*>(t->data<double>()) : static_cast<const void*>(t->data<float>());
  return result;
}

const bool* flag(const Tensor* t, const paddle::Place& place) {
  if (t == nullptr) return nullptr;
  const std::string expected = "one bool on " + show(place);
  if (!t->defined() || !t->is_dense_tensor() || !t->initialized())
    refuse("found_inf", "a tensor without memory", expected);
  if (t->numel() != 1 || t->dtype() != paddle::DataType::BOOL || !same(t->place(), place)) {
    refuse("found_inf", show(t->dtype()) + " " + show(t->dims()) + " on " + show(t->place()), expected);
  }
  return t->data<bool>();
}

TensorArgs pointers(const Received& r, size_t i) {
  Tensor& param = const_cast<Tensor&>(*r.params[i]);
  TensorArgs t{};
  t.numel = param.numel();
  t.m = const_cast<int64_t*>(r.m[i]->data<int64_t>());
  t.param_dtype = kernel_dtype(param.dtype());
  t.grad_dtype = kernel_dtype(r.grads[i]->dtype());
  if (t.numel == 0) return t;  // no memory to point to
  t.param = param.data();
  t.grad = r.grads[i]->data();
  t.d = const_cast<Tensor*>(r.d[i])->data();
  t.y = const_cast<Tensor*>(r.y[i])->data();
  if (r.masters) t.master = const_cast<Tensor*>((*r.masters)[i])->data();
  return t;
}

void run(const StepArgs& step, const Tensor& first) {
  const paddle::Place place = first.place();
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
  if (!first.defined() || !first.initialized()) Check(*r.params[0], 0).fail("m", "no memory", "a tensor of one int64");
  const paddle::Place place = first.place();
  int64_t batch_num = 0;
  for (size_t i = 0; i < count; ++i) {
    if (i + kAhead < count) fetch_ahead(r, i + kAhead);
    const int64_t slots = check_parameter(r, i, place);
    if (i == 0) batch_num = slots;
    if (slots != batch_num) {
      Check(*r.params[i], i)
          .fail("number of slots in y", std::to_string(slots),
                std::to_string(batch_num) + ", as the first parameter has");
    }
    tensors.push_back(pointers(r, i));
  }
  StepArgs step{};
  step.tensors = tensors.data();
  step.count = static_cast<int64_t>(count);
  step.batch_num = batch_num;
  step.learning_rate = scalar("learning_rate", r.learning_rate, r.learning_rate_value, place);
  step.weight_decay = scalar("weight_decay", r.weight_decay, r.weight_decay_value, place);
  step.found_inf = flag(r.found_inf, place);
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
#ifdef PADDLE_THROW
  try {
    asgd_update(r);
  } catch (const ArgumentError& error) {
    // The executor of Paddle 3 keeps the text of its own exceptions only.
    PADDLE_THROW(common::errors::InvalidArgument("%s", error.what()));
  } catch (const DeviceError& error) {
    PADDLE_THROW(common::errors::Fatal("%s", error.what()));
  }
#else
  asgd_update(r);
#endif
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
}
