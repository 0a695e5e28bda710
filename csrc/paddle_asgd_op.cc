// SPDX-License-Identifier: Apache-2.0
// One step of SAG, from what Paddle hands over to the kernel's arguments. Two doors lead here: the operator
// `asgd_update_` of static graphs, below, and dygraph's Python functions (paddle_module.cc). Must not compute, nor read
// a tensor itself (paddle_tensor.h).
#include "paddle_asgd_op.h"

#include <algorithm>
#include <string>
#include <vector>

#include "asgd_kernel.h"
#include "asgd_slots.h"
#include "asgd_watch.h"
#include "block_scale.h"
#include "paddle/extension.h"
#include "paddle_rows.h"

namespace paddle_asgd {
namespace {

// The slots of a history that fits the parameter: y is [slots, *dims].
int64_t slots_of(const Check& check, const DDim& history, const DDim& dims) {
  bool fits = history.size() == dims.size() + 1 && history[0] > 0;
  for (int i = 0; fits && i < dims.size(); ++i) fits = history[i + 1] == dims[i];
  if (!fits) check.fail("shape of y", show(history), "[batch_num, *shape of the parameter], which is " + show(dims));
  return history[0];
}

// The clock m of a step with a batch index knows the slots.
DDim clock_shape(const Received& r, int64_t slots) {
  return common::make_ddim({r.has_batch_index ? clock_length(slots) : 1});
}

// Checks a parameter and what every call needs of its state, and says where they lie.
TensorArgs check_state(const Received& r, size_t i, const Check& check, const DDim& clock) {
  const Weights weights = check_weights(check, *r.params[i], r.masters, i);
  TensorArgs t{};
  t.param = weights.param;
  t.master = weights.master;
  t.numel = weights.numel;
  t.param_dtype = kernel_dtype(weights.dtype);
  t.d = check.like("d", *r.d[i], *weights.dims, weights.wide());
  t.m = static_cast<int64_t*>(check.like("m", *r.m[i], clock, DataType::INT64));
  return t;
}

History history_of(const Tensor& y) {
  const DenseTensor* dense = dense_tensor(y);
  const DataType dtype = dense == nullptr ? DataType::FLOAT32 : dense->meta().dtype;
  return dtype == DataType::INT16 ? History::kInt16 : dtype == DataType::INT8 ? History::kInt8 : History::kExact;
}

// Checks one parameter with its state, and says where they lie. `scale` is the position of the next scale.
TensorArgs check_parameter(const Received& r, size_t i, const Place& place, int64_t batch_num, const DDim& clock,
                           size_t* scale) {
  const Check check(*r.params[i], i, place);
  const phi::DenseTensorMeta& param = check.dense("value", *r.params[i]).meta();
  const DenseTensor& y = check.dense("y", *r.y[i]);
  const int64_t slots = slots_of(check, y.meta().dims, param.dims);
  if (slots != batch_num) {
    check.fail("number of slots in y", std::to_string(slots),
               std::to_string(batch_num) + ", as the first parameter has");
  }
  TensorArgs t = check_state(r, i, check, clock);
  t.y = check.memory("y", y);
  t.history = history_of(*r.y[i]);
  if (t.history != History::kExact) {
    const DDim scales = common::make_ddim({batch_num, scale_blocks(t.numel)});
    t.y_scale = static_cast<float*>(check.like("y_scale", *(*r.y_scale)[(*scale)++], scales, DataType::FLOAT32));
  }
  return t;
}

// Checks the gradient of a parameter that has been checked, and says where it lies.
void check_gradient(const Received& r, size_t i, const Tensor& given, const Place& place, TensorArgs* t,
                    SparseGradients* sparse) {
  const CheckedGradient gradient = check_gradient(*r.params[i], i, given, place, sparse);
  const DataType stored = dense_tensor(*r.y[i])->meta().dtype;
  if (t->history == History::kExact && stored != gradient.dtype) {
    Check(*r.params[i], i, place)
        .fail("dtype of the gradient", show(gradient.dtype), show(stored) + ", as its history y has");
  }
  t->grad = gradient.values;
  t->grad_dtype = kernel_dtype(gradient.dtype);
}

// A slot of the history. What the host can read is checked here, the rest by the kernel, which cannot raise.
BatchIndex batch_index(const Tensor* t, int64_t value, int64_t batch_num, const Place& place) {
  BatchIndex index{true, nullptr, value};
  if (t != nullptr) {
    const std::string expected = "one int64 on the host or on " + show(place);
    const Memory memory = one_element("batch_index", *t, expected);
    const bool on_host = memory.place->GetType() == phi::AllocationType::CPU;
    if (t->dtype() != DataType::INT64 || !(on_host || same(*memory.place, place))) {
      refuse("batch_index", show(t->dtype()) + " on " + show(*memory.place), expected);
    }
    index.data = static_cast<const int64_t*>(memory.begin);
    if (!on_host) return index;
    index = BatchIndex{true, nullptr, load(index)};
  }
  if (!in_range(index.value, batch_num)) {
    refuse("batch_index", std::to_string(index.value),
           "0 to " + std::to_string(batch_num - 1) + ", for batch_num is " + std::to_string(batch_num));
  }
  return index;
}

// The scales come without gaps, so their number must be that of the narrow histories.
void check_scales(const Received& r) {
  const size_t received = r.y_scale ? r.y_scale->size() : 0;
  const auto narrow = [](const Tensor* y) { return history_of(*y) != History::kExact; };
  const size_t expected = static_cast<size_t>(std::count_if(r.y.begin(), r.y.end(), narrow));
  if (received == expected) return;
  refuse("number of scales y_scale", std::to_string(received),
         std::to_string(expected) + ", one for each history y of int8 or int16");
}

void fetch_ahead(const Received& r, size_t i) {
  for (const Tensors* list : {&r.params, &r.d, &r.y, &r.m}) fetch_description(*(*list)[i]);
}

}  // namespace

Prepared prepare(const Received& r) {
  const size_t count = r.params.size();
  check_length("sums d", r.d.size(), count);
  check_length("histories y", r.y.size(), count);
  check_length("counters m", r.m.size(), count);
  if (r.masters) check_length("master weights", r.masters->size(), count);
  check_scales(r);
  Prepared prepared;
  if (count == 0) return prepared;
  prepared.tensors.reserve(count);
  prepared.place = place_of(r.params, "m", r.m);
  const Check check(*r.params[0], 0, prepared.place);
  const DDim& dims = check.dense("value", *r.params[0]).meta().dims;
  prepared.batch_num = slots_of(check, check.dense("y", *r.y[0]).meta().dims, dims);
  const DDim clock = clock_shape(r, prepared.batch_num);
  size_t scale = 0;
  for (size_t i = 0; i < count; ++i) {
    if (i + kAhead < count) fetch_ahead(r, i + kAhead);
    prepared.tensors.push_back(check_parameter(r, i, prepared.place, prepared.batch_num, clock, &scale));
  }
  return prepared;
}

StepArgs complete(const Received& r, const Tensors& grads, Prepared* prepared, SparseGradients* sparse) {
  const size_t count = prepared->tensors.size();
  const Place& place = prepared->place;
  for (size_t i = 0; i < count; ++i) check_gradient(r, i, *grads[i], place, &prepared->tensors[i], sparse);
  StepArgs step{};
  step.tensors = prepared->tensors.data();
  step.count = static_cast<int64_t>(count);
  step.batch_num = prepared->batch_num;
  step.learning_rate = scalar("learning_rate", r.learning_rate, place);
  step.weight_decay = scalar("weight_decay", r.weight_decay, place);
  step.found_inf = flag("found_inf", r.found_inf, place);
  if (r.has_batch_index) step.batch_index = batch_index(r.batch_index, r.batch_index_value, step.batch_num, place);
  step.batch_weights = doubles("batch_weights", r.batch_weights, step.batch_num, place);
  step.has_theta = r.has_theta;
  step.theta = scalar("theta", r.theta, place);
  step.watch = doubles("watch", r.watch, kWatchSize, place);
  step.gradient_rows = sparse->data();
  return step;
}

void asgd_run(const StepArgs& step, const Tensor& first) {
  run_on_device(
      first, [&]() { asgd_cpu(step); }, [&](int device, void* stream) { return asgd_cuda(step, device, stream); });
}

void asgd_update(const Received& r, const Tensors& grads, bool check_only) {
  check_length("gradients", grads.size(), r.params.size());
  Prepared prepared = prepare(r);
  if (r.params.empty()) return;
  SparseGradients sparse(grads.size());
  const StepArgs step = complete(r, grads, &prepared, &sparse);
  if (!check_only) asgd_run(step, *r.m[0]);
}

void asgd_norm(const Received& r, int64_t batch_num, const Tensor& sum) {
  const size_t count = r.params.size();
  check_length("sums d", r.d.size(), count);
  check_length("counters m", r.m.size(), count);
  if (r.masters) check_length("master weights", r.masters->size(), count);
  const Place place = sum.place();
  std::vector<TensorArgs> tensors;
  const DDim clock = clock_shape(r, batch_num);
  for (size_t i = 0; i < count; ++i) tensors.push_back(check_state(r, i, Check(*r.params[i], i, place), clock));
  StepArgs step{};
  step.tensors = tensors.data();
  step.count = static_cast<int64_t>(count);
  step.batch_num = batch_num;
  step.weight_decay = scalar("weight_decay", r.weight_decay, place);
  step.batch_index.given = r.has_batch_index;
  step.batch_weights = doubles("batch_weights", r.batch_weights, batch_num, place);
  double* total = doubles("sum", &sum, 1, place);
  run_on_device(
      sum, [&]() { asgd_norm_cpu(step, total); },
      [&](int device, void* stream) { return asgd_norm_cuda(step, total, device, stream); });
}

// ---- The door of static graphs ------------------------------------------------------------------------------------

namespace {

void asgd_operator(std::vector<Tensor>& params, const std::vector<Tensor>& grads, const Tensor& learning_rate,
                   const Tensor& weight_decay, std::vector<Tensor>& d, std::vector<Tensor>& y,
                   paddle::optional<std::vector<Tensor>>& y_scale, std::vector<Tensor>& m,
                   paddle::optional<std::vector<Tensor>>& masters, const paddle::optional<Tensor>& found_inf,
                   const paddle::optional<Tensor>& batch_index, const paddle::optional<Tensor>& batch_weights,
                   const paddle::optional<Tensor>& theta, paddle::optional<Tensor>& watch) {
  Received r;
  r.params = addresses(params);
  r.d = addresses(d);
  r.y = addresses(y);
  r.y_scale = addresses(y_scale);
  r.m = addresses(m);
  r.masters = addresses(masters);
  r.learning_rate.tensor = &learning_rate;
  r.weight_decay.tensor = &weight_decay;
  if (found_inf) r.found_inf = found_inf.get_ptr();
  r.has_batch_index = static_cast<bool>(batch_index);
  if (batch_index) r.batch_index = batch_index.get_ptr();
  if (batch_weights) r.batch_weights = batch_weights.get_ptr();
  r.has_theta = static_cast<bool>(theta);
  if (theta) r.theta.tensor = theta.get_ptr();
  if (watch) r.watch = watch.get_ptr();
  run_operator("asgd_update_", [&]() { asgd_update(r, addresses(grads), false); });
}

}  // namespace
}  // namespace paddle_asgd

// Every tensor that is written is in the map: an operator that writes without it races with the graph's readers.
PD_BUILD_OP(asgd_update_)
    .Inputs({paddle::Vec("params"), paddle::Vec("grads"), "learning_rate", "weight_decay", paddle::Vec("d"),
             paddle::Vec("y"), paddle::Optional(paddle::Vec("y_scale")), paddle::Vec("m"),
             paddle::Optional(paddle::Vec("masters")), paddle::Optional("found_inf"), paddle::Optional("batch_index"),
             paddle::Optional("batch_weights"), paddle::Optional("theta"), paddle::Optional("watch")})
    .Outputs({paddle::Vec("params_out"), paddle::Vec("d_out"), paddle::Vec("y_out"),
              paddle::Optional(paddle::Vec("y_scale_out")), paddle::Vec("m_out"),
              paddle::Optional(paddle::Vec("masters_out")), paddle::Optional("watch_out")})
    .SetInplaceMap({{paddle::Vec("params"), paddle::Vec("params_out")},
                    {paddle::Vec("d"), paddle::Vec("d_out")},
                    {paddle::Vec("y"), paddle::Vec("y_out")},
                    {paddle::Optional(paddle::Vec("y_scale")), paddle::Optional(paddle::Vec("y_scale_out"))},
                    {paddle::Vec("m"), paddle::Vec("m_out")},
                    {paddle::Optional(paddle::Vec("masters")), paddle::Optional(paddle::Vec("masters_out"))},
                    {paddle::Optional("watch"), paddle::Optional("watch_out")}})
    .SetKernelFn(PD_KERNEL(paddle_asgd::asgd_operator));
