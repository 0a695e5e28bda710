// SPDX-License-Identifier: Apache-2.0
// Reads and checks a gradient, dense or sparse. Paddle calls a sparse one selected rows: one tensor of values, and for
// each of its rows the row of the parameter that it belongs to. Must not add anything up (gradient_rows.h).
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "gradient_rows.h"
#include "paddle_tensor.h"
#pragma push_macro("PADDLE_WITH_CUDA")
#undef PADDLE_WITH_CUDA
#include "paddle/phi/core/selected_rows.h"
#pragma pop_macro("PADDLE_WITH_CUDA")

namespace paddle_asgd {

// Null: not defined, or of another kind.
inline const phi::SelectedRows* selected_rows(const Tensor& t) {
  const phi::TensorBase* impl = t.impl().get();
  return impl != nullptr && phi::SelectedRows::classof(impl) ? static_cast<const phi::SelectedRows*>(impl) : nullptr;
}

// The sparse gradients of one step, as the kernel takes them. Must outlive the kernel's call.
class SparseGradients {
 public:
  explicit SparseGradients(size_t count) : count_(count) {}

  // Checks the gradient of parameter `i`, which has these dimensions; returns its values.
  const DenseTensor& add(size_t i, const Check& check, const phi::SelectedRows& grad, const DDim& dims,
                         const Place& place) {
    if (place.GetType() != phi::AllocationType::CPU) {
      check.fail("gradient", "a sparse gradient on " + show(place), "a dense tensor, except on the CPU");
    }
    const std::vector<int64_t>& rows = grad.rows();
    const DDim values = dims_of_values(check, rows, dims);
    if (!same(grad.value().meta().dims, values)) {
      check.fail("gradient", "rows of values of shape " + show(grad.value().meta().dims),
                 "a dense tensor, or values of shape " + show(values));
    }
    std::vector<GradientRow> sorted;
    sorted.reserve(rows.size());
    for (size_t k = 0; k < rows.size(); ++k) {
      if (rows[k] < 0 || rows[k] >= dims[0]) {
        check.fail("row in the gradient", std::to_string(rows[k]), "0 to " + std::to_string(dims[0] - 1));
      }
      sorted.push_back(GradientRow{rows[k], static_cast<int64_t>(k)});
    }
    std::sort(sorted.begin(), sorted.end(), [](const GradientRow& a, const GradientRow& b) {
      return a.row != b.row ? a.row < b.row : a.position < b.position;
    });
    int64_t width = 1;
    for (int k = 1; k < dims.size(); ++k) width *= dims[k];
    rows_.resize(count_);  // at the first: a step of dense gradients allocates nothing
    rows_[i] = GradientRows{sorted.data(), sorted.data() + sorted.size(), width};
    sorted_.push_back(std::move(sorted));  // which does not move the entries
    return grad.value();
  }

  // What StepArgs takes.
  const GradientRows* data() const { return rows_.empty() ? nullptr : rows_.data(); }

 private:
  static DDim dims_of_values(const Check& check, const std::vector<int64_t>& rows, const DDim& dims) {
    if (dims.size() == 0) check.fail("gradient", "a sparse gradient", "a dense tensor, as the parameter is a scalar");
    DDim values = dims;
    values[0] = static_cast<int64_t>(rows.size());
    return values;
  }

  size_t count_;
  std::vector<GradientRows> rows_;
  std::vector<std::vector<GradientRow>> sorted_;
};

// A gradient that fits its parameter.
struct CheckedGradient {
  const void* values;
  DataType dtype;  // that of the parameter, or float32 for a 16-bit one
};

// Checks the gradient of parameter `i`, which has been checked.
inline CheckedGradient check_gradient(const Tensor& param, size_t i, const Tensor& gradient, const Place& place,
                                      SparseGradients* sparse) {
  const Check check(param, i, place);
  const phi::DenseTensorMeta& meta = dense_tensor(param)->meta();
  // Dense first: a gradient nearly always is, and asking for rows costs another look at its type.
  const DenseTensor* dense = dense_tensor(gradient);
  const phi::SelectedRows* rows = dense == nullptr ? selected_rows(gradient) : nullptr;
  const DenseTensor& grad = dense != nullptr  ? *dense
                            : rows != nullptr ? sparse->add(i, check, *rows, meta.dims, place)
                                              : check.dense("gradient", gradient);
  const bool grad32 = is_16_bit(meta.dtype) && grad.meta().dtype == DataType::FLOAT32;
  const DataType dtype = grad32 ? DataType::FLOAT32 : meta.dtype;
  return {check.like("gradient", grad, rows == nullptr ? meta.dims : grad.meta().dims, dtype), dtype};
}

}  // namespace paddle_asgd
