// SPDX-License-Identifier: Apache-2.0
// One step of averaged SGD, from what Paddle hands over to the kernel's arguments. Two doors lead here: the operator
// `averaged_sgd_update_` of static graphs, below, and dygraph's Python function (paddle_module.cc). Must not compute,
// nor read a tensor itself (paddle_tensor.h).
#include "paddle_average_sgd_op.h"

#include <string>
#include <vector>

#include "average_sgd_kernel.h"
#include "paddle/extension.h"
#include "paddle_rows.h"

namespace paddle_asgd {
namespace {

// The dtype of all etas, which is that of the first.
DataType eta_dtype(const ReceivedAveragedSgd& r) {
  if (!r.etas || r.etas->empty() || (*r.etas)[0]->dtype() != DataType::FLOAT32) return DataType::FLOAT64;
  return DataType::FLOAT32;
}

// Checks a parameter and its state, and says where they lie.
AveragedSgdTensor check_state(const ReceivedAveragedSgd& r, size_t i, const Check& check, DataType etas) {
  const DDim one({1});
  const Weights weights = check_weights(check, *r.params[i], r.masters, i);
  AveragedSgdTensor t{};
  t.param = weights.param;
  t.master = weights.master;
  t.numel = weights.numel;
  t.param_dtype = kernel_dtype(weights.dtype);
  t.steps = static_cast<int64_t*>(check.like("step", *r.steps[i], one, DataType::INT64));
  if (r.ax) t.ax = check.like("ax", *(*r.ax)[i], *weights.dims, weights.wide());
  if (r.t0s) t.t0 = static_cast<const double*>(check.like("t0", *(*r.t0s)[i], one, DataType::FLOAT64));
  if (r.etas) t.eta = check.like("eta", *(*r.etas)[i], one, etas);
  return t;
}

void check_lengths(const ReceivedAveragedSgd& r) {
  const size_t count = r.params.size();
  check_length("counters step", r.steps.size(), count);
  if (r.ax) check_length("averages ax", r.ax->size(), count);
  if (r.t0s) check_length("t0", r.t0s->size(), count);
  if (r.etas) check_length("eta", r.etas->size(), count);
  if (r.masters) check_length("master weights", r.masters->size(), count);
}

}  // namespace

PreparedAveragedSgd prepare(const ReceivedAveragedSgd& r) {
  const size_t count = r.params.size();
  check_lengths(r);
  PreparedAveragedSgd prepared;
  if (count == 0) return prepared;
  prepared.tensors.reserve(count);
  prepared.place = place_of(r.params, "step", r.steps);
  const DataType etas = eta_dtype(r);
  prepared.eta_dtype = kernel_dtype(etas);
  for (size_t i = 0; i < count; ++i) {
    if (i + kAhead < count) {
      for (const Tensors* list : {&r.params, &r.steps}) fetch_description(*(*list)[i + kAhead]);
      if (r.ax) fetch_description(*(*r.ax)[i + kAhead]);
    }
    prepared.tensors.push_back(check_state(r, i, Check(*r.params[i], i, prepared.place), etas));
  }
  return prepared;
}

AveragedSgdStep complete(const ReceivedAveragedSgd& r, const Tensors& grads, PreparedAveragedSgd* prepared,
                         SparseGradients* sparse) {
  const size_t count = prepared->tensors.size();
  const Place& place = prepared->place;
  for (size_t i = 0; i < count; ++i) {
    const CheckedGradient gradient = check_gradient(*r.params[i], i, *grads[i], place, sparse);
    prepared->tensors[i].grad = gradient.values;
    prepared->tensors[i].grad_dtype = kernel_dtype(gradient.dtype);
  }
  AveragedSgdStep step{};
  step.tensors = prepared->tensors.data();
  step.count = static_cast<int64_t>(count);
  step.learning_rate = scalar("learning_rate", r.learning_rate, place);
  step.weight_decay = scalar("weight_decay", r.weight_decay, place);
  step.lambd = scalar("lambd", r.lambd, place);
  step.alpha = scalar("alpha", r.alpha, place);
  step.t0 = scalar("t0", r.t0, place);
  step.sign = scalar("sign", r.sign, place);
  step.found_inf = flag("found_inf", r.found_inf, place);
  step.gradient_rows = sparse->data();
  step.eta_dtype = prepared->eta_dtype;
  return step;
}

void averaged_sgd_run(const AveragedSgdStep& step, const Tensor& first) {
  run_on_device(
      first, [&]() { average_sgd_cpu(step); },
      [&](int device, void* stream) { return average_sgd_cuda(step, device, stream); });
}

void averaged_sgd_update(const ReceivedAveragedSgd& r, const Tensors& grads, bool check_only) {
  check_length("gradients", grads.size(), r.params.size());
  if (r.params.empty()) return check_lengths(r);
  PreparedAveragedSgd prepared = prepare(r);
  SparseGradients sparse(grads.size());
  const AveragedSgdStep step = complete(r, grads, &prepared, &sparse);
  if (!check_only) averaged_sgd_run(step, *r.steps[0]);
}

// ---- The door of static graphs ------------------------------------------------------------------------------------

namespace {

void averaged_sgd_operator(std::vector<Tensor>& params, const std::vector<Tensor>& grads, const Tensor& learning_rate,
                           const Tensor& weight_decay, std::vector<Tensor>& steps, std::vector<Tensor>& ax,
                           const Tensor& lambd, const Tensor& alpha, const Tensor& t0, const Tensor& sign,
                           const paddle::optional<std::vector<Tensor>>& t0s,
                           paddle::optional<std::vector<Tensor>>& etas, paddle::optional<std::vector<Tensor>>& masters,
                           const paddle::optional<Tensor>& found_inf) {
  ReceivedAveragedSgd r;
  r.params = addresses(params);
  r.steps = addresses(steps);
  r.ax = addresses(ax);
  r.t0s = addresses(t0s);
  r.etas = addresses(etas);
  r.masters = addresses(masters);
  r.learning_rate.tensor = &learning_rate;
  r.weight_decay.tensor = &weight_decay;
  r.lambd.tensor = &lambd;
  r.alpha.tensor = &alpha;
  r.t0.tensor = &t0;
  r.sign.tensor = &sign;
  if (found_inf) r.found_inf = found_inf.get_ptr();
  run_operator("averaged_sgd_update_", [&]() { averaged_sgd_update(r, addresses(grads), false); });
}

}  // namespace
}  // namespace paddle_asgd

// Every tensor that is written is in the map: an operator that writes without it races with the graph's readers. The
// averages are no optional input, for an executor takes a list with an empty tensor in it for none at all.
PD_BUILD_OP(averaged_sgd_update_)
    .Inputs({paddle::Vec("params"), paddle::Vec("grads"), "learning_rate", "weight_decay", paddle::Vec("steps"),
             paddle::Vec("ax"), "lambd", "alpha", "t0", "sign", paddle::Optional(paddle::Vec("t0s")),
             paddle::Optional(paddle::Vec("etas")), paddle::Optional(paddle::Vec("masters")),
             paddle::Optional("found_inf")})
    .Outputs({paddle::Vec("params_out"), paddle::Vec("steps_out"), paddle::Vec("ax_out"),
              paddle::Optional(paddle::Vec("etas_out")), paddle::Optional(paddle::Vec("masters_out"))})
    .SetInplaceMap({{paddle::Vec("params"), paddle::Vec("params_out")},
                    {paddle::Vec("steps"), paddle::Vec("steps_out")},
                    {paddle::Vec("ax"), paddle::Vec("ax_out")},
                    {paddle::Optional(paddle::Vec("etas")), paddle::Optional(paddle::Vec("etas_out"))},
                    {paddle::Optional(paddle::Vec("masters")), paddle::Optional(paddle::Vec("masters_out"))}})
    .SetKernelFn(PD_KERNEL(paddle_asgd::averaged_sgd_operator));
