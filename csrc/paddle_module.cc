// SPDX-License-Identifier: Apache-2.0
// The door of dygraph: Python functions that take lists of tensors. Must not check a tensor (paddle_tensor.h) nor know
// what a step or an average is (paddle_asgd_op.cc, paddle_average_op.cc).
#include "asgd_watch.h"
#include "paddle_asgd_op.h"
#include "paddle_average_op.h"
#include "paddle_average_sgd_op.h"
#include "paddle_door.h"
#include "paddle_plan.h"
#include "pybind11/stl.h"

namespace paddle_asgd {
namespace {

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

// What a step takes besides tensors, for the doors of a full step and of a planned one.
struct Inputs {
  const pybind11::object &learning_rate, &weight_decay, &batch_index, &batch_weights, &theta, &watch;

  void read(Received* r) const {
    r->learning_rate = to_number(learning_rate, "learning_rate");
    r->weight_decay = to_number(weight_decay, "weight_decay");
    to_index(batch_index, r);
    r->batch_weights = to_tensor(batch_weights, "batch_weights", "a tensor of one float64 a batch");
    r->has_theta = !theta.is_none();
    if (r->has_theta) r->theta = to_number(theta, "theta");
    r->watch = to_tensor(watch, "watch", "a float64 tensor");
  }
};

void asgd_function(const pybind11::object& params, const pybind11::object& grads, const pybind11::object& d,
                   const pybind11::object& y, const pybind11::object& m, const pybind11::object& masters,
                   const pybind11::object& learning_rate, const pybind11::object& weight_decay,
                   const pybind11::object& found_inf, bool check_only, const pybind11::object& batch_index,
                   const pybind11::object& batch_weights, const pybind11::object& theta, const pybind11::object& watch,
                   const pybind11::object& y_scale) {
  Tensors gradients;
  answer(
      "asgd_update_",
      [&]() {
        Received r;
        r.params = to_tensors(params, "params");
        gradients = to_tensors(grads, "grads");
        r.d = to_tensors(d, "d");
        r.y = to_tensors(y, "y");
        r.y_scale = to_optional_tensors(y_scale, "y_scale");
        r.m = to_tensors(m, "m");
        r.masters = to_optional_tensors(masters, "masters");
        r.found_inf = to_tensor(found_inf, "found_inf", "a tensor of one bool");
        Inputs{learning_rate, weight_decay, batch_index, batch_weights, theta, watch}.read(&r);
        return r;
      },
      [&](const Received& r) { asgd_update(r, gradients, check_only); });
}

// What a plan keeps of its steps.
struct Planned {
  Received received;
  Prepared prepared;
  bool indexed;  // whether the clocks are those of a batch index
};

Planned plan_of(const StepPlan& plan, bool narrow, bool indexed) {
  Planned planned;
  Received& r = planned.received;
  r.params = plan.list(0);
  r.d = plan.list(1);
  r.y = plan.list(2);
  r.m = plan.list(3);
  if (plan.lists() > 4u + narrow) r.masters = plan.list(4);
  if (narrow) r.y_scale = plan.list(plan.lists() - 1);
  r.has_batch_index = planned.indexed = indexed;
  planned.prepared = prepare(r);
  return planned;
}

// A step by a plan of the lists params, d, y, m, master weights where there are any, and, if it is `narrow`, scales.
void asgd_planned(StepPlan& plan, const pybind11::object& learning_rate, const pybind11::object& weight_decay,
                  const pybind11::object& batch_index, const pybind11::object& batch_weights,
                  const pybind11::object& theta, const pybind11::object& watch, bool narrow,
                  const pybind11::list& notes) {
  plan.take(
      "asgd_update_", notes,
      [&]() {
        const bool indexed = !batch_index.is_none();
        if (plan.lists() < 4u + narrow) throw Stale();
        Planned& planned = plan.prepared<Planned>([&]() { return plan_of(plan, narrow, indexed); });
        if (indexed != planned.indexed) throw Stale();
        Inputs{learning_rate, weight_decay, batch_index, batch_weights, theta, watch}.read(&planned.received);
        return &planned;
      },
      [](Planned* planned, const Tensors& grads, SparseGradients* sparse) {
        return complete(planned->received, grads, &planned->prepared, sparse);
      },
      [&](const StepArgs& step) { asgd_run(step, *plan.list(0)[0]); });
}

void norm_function(const pybind11::object& params, const pybind11::object& d, const pybind11::object& m,
                   const pybind11::object& masters, int64_t batch_num, bool indexed, const pybind11::object& weights,
                   const pybind11::object& weight_decay, const pybind11::object& sum) {
  const Tensor* total = nullptr;
  answer(
      "asgd_update_",
      [&]() {
        Received r;
        r.params = to_tensors(params, "params");
        r.d = to_tensors(d, "d");
        r.m = to_tensors(m, "m");
        r.masters = to_optional_tensors(masters, "masters");
        r.has_batch_index = indexed;
        r.batch_weights = to_tensor(weights, "batch_weights", "a tensor of one float64 a batch");
        r.weight_decay = to_number(weight_decay, "weight_decay");
        total = to_tensor(sum, "sum", "a tensor of one float64");
        if (total == nullptr) wrong_type("sum", sum.ptr(), "a tensor of one float64");
        return r;
      },
      [&](const Received& r) { asgd_norm(r, batch_num, *total); });
}

// Where the host cannot read the watch, the answer is yes.
bool watch_wants_a_look(const pybind11::object& watch, double threshold) {
  bool wants = true;
  answer(
      "asgd_update_", [&]() { return to_tensor(watch, "watch", "a float64 tensor"); },
      [&](const Tensor* tensor) {
        if (tensor == nullptr || !tensor->is_cpu()) return;
        wants = wants_a_look(doubles("watch", tensor, kWatchSize, tensor->place()), threshold);
      });
  return wants;
}

double to_weight(const pybind11::object& object) {
  const double weight = PyFloat_AsDouble(object.ptr());
  if (!PyErr_Occurred()) return weight;
  PyErr_Clear();
  wrong_type("weight", object.ptr(), "a number");
}

void average_update_function(const pybind11::object& averages, const pybind11::object& values,
                             const pybind11::object& weight, const pybind11::object& copies,
                             const pybind11::object& originals) {
  double number = 0;
  answer(
      "average_update",
      [&]() {
        AverageUpdate r;
        r.averaged = {to_tensors(averages, "averages"), to_tensors(values, "values")};
        number = to_weight(weight);
        r.copied = {to_tensors(copies, "copies"), to_tensors(originals, "originals")};
        return r;
      },
      [&](const AverageUpdate& r) {
        const PreparedAverages prepared = prepare(r);
        average_run(prepared.first, complete(prepared, number));
      });
}

// An update by a plan of the lists averages, values, copies and originals, without parameters.
void average_planned(StepPlan& plan, const pybind11::object& weight, const pybind11::list& notes) {
  const PreparedAverages* prepared = nullptr;
  plan.take(
      "average_update", notes,
      [&]() {
        if (plan.lists() != 4) throw Stale();
        prepared = &plan.prepared<PreparedAverages>(
            [&]() { return prepare(AverageUpdate{{plan.list(0), plan.list(1)}, {plan.list(2), plan.list(3)}}); });
        return to_weight(weight);
      },
      [&](double number, const Tensors&, SparseGradients*) { return complete(*prepared, number); },
      [&](const AverageArgs& args) { average_run(prepared->first, args); });
}

void average_swap_function(const pybind11::object& averages, const pybind11::object& values,
                           const pybind11::object& targets, const pybind11::object& sources) {
  answer(
      "average_swap",
      [&]() {
        AverageSwap r;
        r.exchanged = {to_tensors(averages, "averages"), to_tensors(values, "values")};
        r.assigned = {to_tensors(targets, "targets"), to_tensors(sources, "sources")};
        return r;
      },
      [](const AverageSwap& r) { average_swap(r); });
}

struct AveragedSgdInputs {
  const pybind11::object &learning_rate, &weight_decay;
  double lambd, alpha, t0, sign;
  void read(ReceivedAveragedSgd* r) const {
    r->learning_rate = to_number(learning_rate, "learning_rate");
    r->weight_decay = to_number(weight_decay, "weight_decay");
    r->lambd.value = lambd;
    r->alpha.value = alpha;
    r->t0.value = t0;
    r->sign.value = sign;
  }
};

void averaged_sgd_function(const pybind11::object& params, const pybind11::object& grads, const pybind11::object& steps,
                           const pybind11::object& ax, const pybind11::object& t0s, const pybind11::object& etas,
                           const pybind11::object& masters, const pybind11::object& learning_rate,
                           const pybind11::object& weight_decay, const pybind11::object& found_inf, bool check_only,
                           double lambd, double alpha, double t0, double sign) {
  Tensors gradients;
  answer(
      "averaged_sgd_update_",
      [&]() {
        ReceivedAveragedSgd r;
        r.params = to_tensors(params, "params");
        gradients = to_tensors(grads, "grads");
        r.steps = to_tensors(steps, "steps");
        r.ax = to_optional_tensors(ax, "ax");
        r.t0s = to_optional_tensors(t0s, "t0s");
        r.etas = to_optional_tensors(etas, "etas");
        r.masters = to_optional_tensors(masters, "masters");
        AveragedSgdInputs{learning_rate, weight_decay, lambd, alpha, t0, sign}.read(&r);
        r.found_inf = to_tensor(found_inf, "found_inf", "a tensor of one bool");
        return r;
      },
      [&](const ReceivedAveragedSgd& r) { averaged_sgd_update(r, gradients, check_only); });
}

// What a plan keeps of its steps.
struct PlannedAveragedSgd {
  ReceivedAveragedSgd received;
  PreparedAveragedSgd prepared;
};

// `kept` says for ax, t0s, etas and masters whether the plan has a list of them.
PlannedAveragedSgd averaged_plan_of(const StepPlan& plan, const std::vector<bool>& kept) {
  PlannedAveragedSgd planned;
  ReceivedAveragedSgd& r = planned.received;
  size_t k = 0;
  const auto next = [&](bool is_kept) { return is_kept ? std::optional<Tensors>(plan.list(k++)) : std::nullopt; };
  r.params = plan.list(k++);
  r.ax = next(kept[0]);
  r.steps = plan.list(k++);
  r.t0s = next(kept[1]);
  r.etas = next(kept[2]);
  r.masters = next(kept[3]);
  planned.prepared = prepare(r);
  return planned;
}

// A step by a plan of the lists params, ax, steps, t0s, etas and masters, of which `kept` tells.
void averaged_sgd_planned(StepPlan& plan, const std::vector<bool>& kept, const pybind11::object& learning_rate,
                          const pybind11::object& weight_decay, double lambd, double alpha, double t0, double sign,
                          const pybind11::list& notes) {
  plan.take(
      "averaged_sgd_update_", notes,
      [&]() {
        if (kept.size() != 4 || plan.lists() != 2u + kept[0] + kept[1] + kept[2] + kept[3]) throw Stale();
        auto& planned = plan.prepared<PlannedAveragedSgd>([&]() { return averaged_plan_of(plan, kept); });
        AveragedSgdInputs{learning_rate, weight_decay, lambd, alpha, t0, sign}.read(&planned.received);
        return &planned;
      },
      [](PlannedAveragedSgd* planned, const Tensors& grads, SparseGradients* sparse) {
        return complete(planned->received, grads, &planned->prepared, sparse);
      },
      [&](const AveragedSgdStep& step) { averaged_sgd_run(step, *plan.list(0)[0]); });
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
             py::arg("theta"), py::arg("watch"), py::arg("y_scale") = py::none());
  module.def("asgd_norm", &paddle_asgd::norm_function, py::arg("params"), py::arg("d"), py::arg("m"),
             py::arg("masters"), py::arg("batch_num"), py::arg("indexed"), py::arg("batch_weights"),
             py::arg("weight_decay"), py::arg("sum"));
  module.def("average_update", &paddle_asgd::average_update_function, py::arg("averages"), py::arg("values"),
             py::arg("weight"), py::arg("copies"), py::arg("originals"));
  module.def("average_swap", &paddle_asgd::average_swap_function, py::arg("averages"), py::arg("values"),
             py::arg("targets"), py::arg("sources"));
  module.def("watch_wants_a_look", &paddle_asgd::watch_wants_a_look, py::arg("watch"), py::arg("threshold"));
  using paddle_asgd::StepPlan;
  py::class_<StepPlan>(module, "StepPlan", py::custom_type_setup(&StepPlan::make_collectable))
      .def(py::init<const py::list&, const py::tuple&, const py::tuple&, const py::tuple&, const py::list&>(),
           py::arg("parameters"), py::arg("trained"), py::arg("multipliers"), py::arg("lists"), py::arg("dictionaries"))
      .def_property_readonly("keeps_memory", &StepPlan::keeps_memory)
      .def_property_readonly("reads_gradients", &StepPlan::reads_gradients);
  module.def("average_planned", &paddle_asgd::average_planned, py::arg("plan"), py::arg("weight"), py::arg("notes"));
  module.def("asgd_planned", &paddle_asgd::asgd_planned, py::arg("plan"), py::arg("learning_rate"),
             py::arg("weight_decay"), py::arg("batch_index"), py::arg("batch_weights"), py::arg("theta"),
             py::arg("watch"), py::arg("narrow"), py::arg("notes"));
  module.def("averaged_sgd_update", &paddle_asgd::averaged_sgd_function, py::arg("params"), py::arg("grads"),
             py::arg("steps"), py::arg("ax"), py::arg("t0s"), py::arg("etas"), py::arg("masters"),
             py::arg("learning_rate"), py::arg("weight_decay"), py::arg("found_inf"), py::arg("check_only"),
             py::arg("lambd"), py::arg("alpha"), py::arg("t0"), py::arg("sign"));
  module.def("averaged_sgd_planned", &paddle_asgd::averaged_sgd_planned, py::arg("plan"), py::arg("kept"),
             py::arg("learning_rate"), py::arg("weight_decay"), py::arg("lambd"), py::arg("alpha"), py::arg("t0"),
             py::arg("sign"), py::arg("notes"));
}
