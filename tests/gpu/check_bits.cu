// SPDX-License-Identifier: Apache-2.0
// Whether the GPU's kernel gives the bits of the CPU's: every combination of types and mode, sizes, offsets, many
// tensors, long histories, special numbers, steps that must change nothing. A line of JSON for each check, exit status
// 1 for a difference. `check_bits [quick] [exact] [flip]`: fewer cases; no guard bytes, for a memory checker; one bit
// wrong on purpose.
#include "twin.h"

namespace gpu {
namespace {

bool quick = false, flip = false, whole = true;

std::string place(const Twin& twin, int64_t step) {
  return std::string(twin.plan.mode.name) + ", n " + std::to_string(twin.plan.n) + ", step " + std::to_string(step);
}

// A wrong kernel, for the test of this program.
void flip_a_bit(Twin* twin) {
  for (const TensorArgs& t : twin->mirrored().args()) {
    if (t.numel == 0) continue;
    uint8_t byte;
    CUDA(cudaMemcpy(&byte, t.d, 1, cudaMemcpyDeviceToHost));
    byte ^= 1;
    CUDA(cudaMemcpy(t.d, &byte, 1, cudaMemcpyHostToDevice));
    return;
  }
}

// The forms take turns, every fifth step finds an Inf, and the watch is on unless the tensors' sums overflow.
void check_steps(Twin* twin, int64_t steps, bool one_launch, bool watches, Tally* tally) {
  twin->plan.watches = watches;
  for (int64_t k = 0; k < steps; ++k) {
    twin->draw();
    twin->known.found_inf = k % 5 == 3;
    twin->step(static_cast<Form>(k % 3), k % 5 >= 2);
    if (flip && k == 1) flip_a_bit(twin);
    twin->compare(place(*twin, k), tally);
    if (watches) twin->compare_watch(place(*twin, k), one_launch, tally);
  }
  if (watches && !flip) twin->compare_norm(place(*twin, steps), tally);
}

Twin make_twin(const Types& types, const std::vector<int64_t>& sizes, const Mode& mode, int64_t n, int64_t offset) {
  Random random(21);
  return Twin(native_test::make(types, sizes, n, offset, &random, mode.indexed), mode, n, 22);
}

void check_types_and_modes() {
  Tally tally("types and modes");
  for (const Types& types : native_test::every_types()) {
    for (int i = 0; i < 12; i += quick ? 5 : 1) {
      for (const int64_t n : {1, 3, 7}) {
        if (quick && n != 3) continue;
        Twin twin = make_twin(types, {0, 257, 1, 8193, 0, 129, 64}, kModes[i], n, n % 2);
        check_steps(&twin, 3 * n + 2, true, true, &tally);
      }
    }
  }
  whole &= tally.report();
}

void check_sizes_and_offsets() {
  Tally tally("sizes and offsets");
  const std::vector<int64_t> sizes = {1,    2,    255,  256,  257,  1023, 1024,  1025,
                                      4095, 4096, 4097, 8191, 8192, 8193, 12301, 33 * 4096 + 5};
  for (const Types& types : native_test::every_types()) {
    for (int64_t offset = 0; offset < (quick ? 2 : 9); ++offset) {
      Twin twin = make_twin(types, quick ? std::vector<int64_t>{4095, 4097, 8192} : sizes, kModes[0], 3, offset);
      check_steps(&twin, quick ? 4 : 11, true, true, &tally);
    }
  }
  whole &= tally.report();
}

void check_many_tensors() {
  Tally tally("2,603 tensors of all types");
  for (const int i : {0, 10}) {
    Random random(23);
    Twin twin(native_test::make_many(2603, 3, &random, kModes[i].indexed), kModes[i], 3, 24);
    check_steps(&twin, quick ? 3 : 11, false, true, &tally);
  }
  whole &= tally.report();
}

void check_long_histories() {
  Tally tally("long histories");
  for (const Types& types : {kTypes[0], kTypes[1], kTypes[3], kTypes[7], kNarrowTypes[1], kNarrowTypes[2]}) {
    for (const int64_t n : {65, 130}) {
      for (const int i : {0, 3, 6, 10}) {
        if (quick && (n != 65 || i != 10)) continue;
        Twin twin = make_twin(types, {17, 2049}, kModes[i], n, 0);
        check_steps(&twin, quick ? 8 : n + 9, true, true, &tally);
      }
    }
  }
  whole &= tally.report();
}

// What arithmetic treats apart: zeros of both signs, subnormal numbers, the largest, Inf and NaN.
void check_special_numbers() {
  Tally tally("special numbers");
  const double kSpecial[] = {0.0,     -0.0,    0x1p-149, -0x1p-140,       0x1p-126, 0x1p-24,   -0x1.8p-25, 65504,
                             65519.9, -65520., 0x1p127,  -0x1.fffffep127, INFINITY, -INFINITY, NAN,        0x1p-1074};
  for (const Types& types : native_test::every_types()) {
    for (const int i : {0, 1, 10}) {
      Twin twin = make_twin(types, {257, 1031}, kModes[i], 3, 0);
      for (int64_t k = 0; k < 11; ++k) {
        for (const auto& t : twin.tensors()) {
          for (int64_t e = 0; e < t->numel; ++e) t->grad.put(e, kSpecial[(e * 7 + k * 3) % 16]);
        }
        twin.mirrored().upload_gradients();
        twin.plan.draw();
        twin.known.index = twin.plan.slot;
        twin.step(static_cast<Form>(k % 3), false);
        twin.compare(place(twin, k), &tally);
      }
    }
  }
  whole &= tally.report();
}

void check_refusals() {
  Tally tally("indices out of range");
  for (int i = 6; i < 12; i += quick ? 5 : 1) {
    Random random(25);
    Twin twin(native_test::make_many(603, 3, &random, true), kModes[i], 3, 26);
    check_steps(&twin, 4, false, true, &tally);
    for (const bool watches : {false, true}) {
      for (const int64_t index : {int64_t{-1}, int64_t{3}, INT64_MIN, INT64_MAX}) {
        for (const bool inf : {false, true}) {
          twin.plan.watches = watches;
          twin.known.index = index;
          twin.known.found_inf = inf;
          twin.step(Form::kFloat64, true);
          twin.compare(place(twin, 4), &tally);
          twin.compare_watch(place(twin, 4), false, &tally);
        }
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
  check_long_histories();
  check_special_numbers();
  check_refusals();
  return whole ? 0 : 1;
}
