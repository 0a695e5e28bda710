// SPDX-License-Identifier: Apache-2.0
// Whether the GPU's kernel of averaged SGD gives the bits of the CPU's: every combination of types and mode, sizes,
// offsets, many tensors, special numbers, steps that must change nothing. A line of JSON for each check, exit status 1
// for a difference. `check_average_sgd [quick] [exact] [flip]`: fewer cases; no guard bytes, for a memory checker; one
// bit wrong on purpose.
#include "averaged.h"
#include "mirror.h"

namespace gpu {
namespace {

using native_test::AveragedList;
using native_test::AveragedMode;
using native_test::kAveragedModes;
using native_test::kTypes;
using native_test::Random;
using native_test::Types;
using paddle_asgd::AveragedSgdStep;
using paddle_asgd::AveragedSgdTensor;
using paddle_asgd::Scalar;

bool quick = false, flip = false, whole = true;

// The numbers of a step, as tensors that lie where its kernel runs.
constexpr int kCount = 6;
struct Numbers {
  double wide[kCount];
  float narrow[kCount];
  bool found_inf;
};
enum class Form { kValues, kFloat64, kFloat32 };

// `numbers` lies where the kernel runs.
void set_form(AveragedSgdStep* step, Form form, const Numbers* numbers, bool flag) {
  Scalar* scalars[] = {&step->learning_rate, &step->weight_decay, &step->lambd, &step->alpha, &step->t0, &step->sign};
  for (int i = 0; i < kCount && form != Form::kValues; ++i) {
    const void* data = form == Form::kFloat64 ? static_cast<const void*>(&numbers->wide[i]) : &numbers->narrow[i];
    *scalars[i] = Scalar{data, form == Form::kFloat64 ? DType::kFloat64 : DType::kFloat32, NAN};
  }
  if (flag) step->found_inf = &numbers->found_inf;
}

// One optimizer twice: on the host, stepped by the CPU's kernel, and on the device, stepped by the other.
class Twin {
 public:
  Twin(AveragedList list, const AveragedMode& mode) : list_(std::move(list)), mode_(mode), numbers_(sizeof(Numbers)) {
    for (const auto& t : list_) {
      gradients_.add(t->grad, t->types.grad);
      state_.add(t->param, t->types.param);
      state_.add(t->ax, t->types.compute());
      state_.add(t->master, DType::kFloat32);
      state_.add(t->clock, DType::kFloat64, true);
      state_.add(t->t0, DType::kFloat64);
      state_.add(t->eta, mode.eta);
    }
    gradients_.commit();
    state_.commit();
    const AveragedSgdStep step = native_test::step_of({}, mode);
    const double numbers[] = {step.learning_rate.value, step.weight_decay.value, step.lambd.value,
                              step.alpha.value,         step.t0.value,           step.sign.value};
    for (int i = 0; i < kCount; ++i) known_.wide[i] = numbers[i], known_.narrow[i] = static_cast<float>(numbers[i]);
  }

  const AveragedList& tensors() const { return list_; }
  void upload_gradients() { gradients_.upload(); }
  void step(Form form, bool found_inf, bool flag) {
    known_.found_inf = found_inf;
    numbers_.upload(&known_);
    const auto here = native_test::averaged_args(list_), there = device_args();
    AveragedSgdStep on_host = native_test::step_of(here, mode_), on_device = native_test::step_of(there, mode_);
    set_form(&on_host, form, &known_, flag);
    set_form(&on_device, form, numbers_.at<Numbers>(), flag);
    paddle_asgd::average_sgd_cpu(on_host);
    const char* error = paddle_asgd::average_sgd_cuda(on_device, 0, nullptr);
    CHECK(error == nullptr, "%s", error);
    CUDA(cudaDeviceSynchronize());
  }
  void compare(int64_t step, Tally* tally) {
    static constexpr const char* kNames[kKept] = {"param", "ax", "master", "step", "t0", "eta"};
    const std::string where = std::string(mode_.name) + ", step " + std::to_string(step);
    state_.download();
    for (size_t i = 0; i < state_.size(); ++i) {
      tally->count();
      const int64_t byte = state_.difference(i);
      if (byte < 0) continue;
      const auto& t = *list_[i / kKept];
      tally->differ(where + ": tensor " + std::to_string(i / kKept) + " (" + t.types.name + ", " +
                    std::to_string(t.numel) + "): " + kNames[i % kKept] + " from byte " + std::to_string(byte));
    }
    if (!state_.guards_whole()) tally->differ(where + ": written outside of a tensor");
  }
  // A wrong kernel, for the test of this program: one bit of the first array that is not empty.
  void flip_a_bit(size_t kept) {
    for (size_t i = kept; i < state_.size(); i += kKept) {
      void* memory = state_.device(i);
      if (memory == nullptr) continue;
      uint8_t byte;
      CUDA(cudaMemcpy(&byte, memory, 1, cudaMemcpyDeviceToHost));
      byte ^= 1;
      CUDA(cudaMemcpy(memory, &byte, 1, cudaMemcpyHostToDevice));
      return;
    }
  }

 private:
  static constexpr size_t kKept = 6;  // buffers of one tensor that are compared
  std::vector<AveragedSgdTensor> device_args() const {
    std::vector<AveragedSgdTensor> args = native_test::averaged_args(list_);
    for (size_t i = 0; i < args.size(); ++i) {
      args[i].grad = gradients_.device(i);
      args[i].param = state_.device(kKept * i);
      args[i].ax = state_.device(kKept * i + 1);
      args[i].master = state_.device(kKept * i + 2);
      args[i].steps = static_cast<int64_t*>(state_.device(kKept * i + 3));
      args[i].t0 = static_cast<const double*>(state_.device(kKept * i + 4));
      args[i].eta = state_.device(kKept * i + 5);
    }
    return args;
  }

  AveragedList list_;
  AveragedMode mode_;
  Numbers known_{};
  Image gradients_, state_;
  Memory numbers_;
};

Twin make_twin(const Types& types, const std::vector<int64_t>& sizes, const AveragedMode& mode, int64_t offset) {
  Random random(31);
  AveragedList list;
  for (const int64_t numel : sizes) native_test::add_averaged(&list, types, mode, numel, offset, &random);
  return Twin(std::move(list), mode);
}

// The forms take turns, and every fifth step finds an Inf.
void check_steps(Twin* twin, int64_t steps, Tally* tally) {
  Random random(32);
  for (int64_t k = 0; k < steps; ++k) {
    native_test::set_gradients(twin->tensors(), &random);
    twin->upload_gradients();
    twin->step(static_cast<Form>(k % 3), k % 5 == 3, k % 5 >= 2);
    if (flip && k == 1) twin->flip_a_bit(0);
    twin->compare(k, tally);
  }
}

void check_types_and_modes() {
  Tally tally("types and modes of averaged SGD");
  for (const Types& types : kTypes) {
    for (const AveragedMode& mode : kAveragedModes) {
      Twin twin = make_twin(types, {0, 257, 1, 8193, 0, 64}, mode, 0);
      check_steps(&twin, quick ? 6 : 12, &tally);
    }
  }
  whole &= tally.report();
}

void check_sizes_and_offsets() {
  Tally tally("sizes and offsets of averaged SGD");
  const std::vector<int64_t> sizes = {1,    2,    255,  256,  257,  1023, 1024,  1025,
                                      4095, 4096, 4097, 8191, 8192, 8193, 12301, 33 * 4096 + 5};
  for (const Types& types : kTypes) {
    for (int64_t offset = 0; offset < (quick ? 2 : 9); ++offset) {
      Twin twin = make_twin(types, quick ? std::vector<int64_t>{4095, 4097, 8192} : sizes, kAveragedModes[1], offset);
      check_steps(&twin, quick ? 4 : 9, &tally);
    }
  }
  whole &= tally.report();
}

void check_many_tensors() {
  Tally tally("2,603 tensors of averaged SGD");
  for (const int i : {2, 4}) {
    Random random(33);
    Twin twin(native_test::many_averaged(kAveragedModes[i], &random), kAveragedModes[i]);
    check_steps(&twin, quick ? 3 : 9, &tally);
  }
  whole &= tally.report();
}

// What arithmetic treats apart: zeros of both signs, subnormal numbers, the largest, Inf and NaN.
void check_special_numbers() {
  Tally tally("special numbers of averaged SGD");
  const double kSpecial[] = {0.0,     -0.0,    0x1p-149, -0x1p-140,       0x1p-126, 0x1p-24,   -0x1.8p-25, 65504,
                             65519.9, -65520., 0x1p127,  -0x1.fffffep127, INFINITY, -INFINITY, NAN,        0x1p-1074};
  for (const Types& types : kTypes) {
    for (const int i : {0, 1, 4}) {
      Twin twin = make_twin(types, {257, 1031}, kAveragedModes[i], 0);
      for (int64_t k = 0; k < 8; ++k) {
        for (const auto& t : twin.tensors()) {
          for (int64_t e = 0; e < t->numel; ++e) t->grad.put(e, kSpecial[(e * 7 + k * 3) % 16]);
        }
        twin.upload_gradients();
        twin.step(static_cast<Form>(k % 3), false, false);
        if (flip && k == 1) twin.flip_a_bit(3);
        twin.compare(k, &tally);
      }
    }
  }
  whole &= tally.report();
}

}  // namespace
}  // namespace gpu

int main(int argc, char** argv) {
  using namespace gpu;
  for (int i = 1; i < argc; ++i) {
    const std::string option = argv[i];
    quick |= option == "quick";
    flip |= option == "flip";
    if (option == "exact") guarded = false;
  }
  check_types_and_modes();
  check_sizes_and_offsets();
  check_many_tensors();
  check_special_numbers();
  return whole ? 0 : 1;
}
