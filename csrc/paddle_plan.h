// SPDX-License-Identifier: Apache-2.0
// The plan of a step that is like the last one: everything that the last step found, kept and compared, so that only
// the gradients have to be read. Must not know any optimizer's arguments; in the least doubt the plan is stale, nothing
// is written, and the step goes the full way (fused.py).
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "paddle_door.h"
#include "paddle_rows.h"

namespace egr {
// The tensor that a parameter's gradient is kept in. Every Paddle from 2.6 on exports it, but no header of the wheel
// declares it. So it is weak, which makes it null where it is missing, and each plan tries it before it relies on it.
class EagerUtils {
 public:
  __attribute__((weak)) static paddle::Tensor* mutable_grad(const paddle::Tensor& target);
};
}  // namespace egr

namespace paddle_asgd {

// Something differs from what the last step found. Becomes a ValueError, like a gradient that does not fit.
struct Stale : ArgumentError {
  Stale() : ArgumentError("the step is not like the last one") {}
};

// What a tensor's memory is known by. Its owner, where Paddle shows it: an address alone may be that of a later tensor.
template <typename Dense>
auto memory_key(const Dense& t, int) -> decltype(t.Holder(), static_cast<const void*>(nullptr)) {
  return t.Holder().get();
}

template <typename Dense>
const void* memory_key(const Dense& t, long) {
  return memory_of(t, 0).begin;
}

template <typename Dense>
auto memory_owner(const Dense& t, int) -> decltype(t.Holder(), std::shared_ptr<const void>()) {
  return t.Holder();
}

template <typename Dense>
std::shared_ptr<const void> memory_owner(const Dense&, long) {
  return nullptr;
}

// Before Python 3.12 a dictionary has a number that every change of it replaces, and that no other dictionary ever
// gets. Later Pythons have none, so the answer is one that was never given before. It is never 0.
inline uint64_t version_of([[maybe_unused]] PyObject* dictionary) {
#if PY_VERSION_HEX < 0x030C0000
  return reinterpret_cast<PyDictObject*>(dictionary)->ma_version_tag;
#else
  static uint64_t answers = 0;
  return ++answers;
#endif
}

// A dictionary of Python as it was: the same values under its keys, in their order; or under a few of its keys.
class SeenDictionary {
 public:
  explicit SeenDictionary(const pybind11::dict& dictionary) : dictionary_(dictionary) {
    PyObject *key, *value;
    for (Py_ssize_t at = 0; PyDict_Next(dictionary_.ptr(), &at, &key, &value);) add(key, value);
  }

  SeenDictionary(const pybind11::dict& dictionary, const pybind11::tuple& keys) : dictionary_(dictionary), few_(true) {
    for (const pybind11::handle key : keys) add(key.ptr(), PyDict_GetItemWithError(dictionary_.ptr(), key.ptr()));
  }

  bool unchanged() {
    const uint64_t version = version_of(dictionary_.ptr());
    if (version == version_) return true;
    if (!(few_ ? has_values() : has_items())) return false;
    version_ = version;
    return true;
  }

  template <typename Visit>
  int visit(const Visit& visit) const {
    int found = visit(dictionary_.ptr());
    for (const auto& [key, value] : items_) {
      if (found == 0 && value) found = visit(value.ptr());
    }
    return found;
  }

 private:
  void add(PyObject* key, PyObject* value) {
    items_.emplace_back(pybind11::reinterpret_borrow<pybind11::object>(key),
                        pybind11::reinterpret_borrow<pybind11::object>(value));
  }

  bool has_values() const {
    for (const auto& [key, value] : items_) {
      if (PyDict_GetItemWithError(dictionary_.ptr(), key.ptr()) != value.ptr()) return false;
    }
    return true;
  }

  bool has_items() const {
    if (static_cast<size_t>(PyDict_GET_SIZE(dictionary_.ptr())) != items_.size()) return false;
    PyObject *key, *value;
    auto item = items_.begin();
    for (Py_ssize_t at = 0; PyDict_Next(dictionary_.ptr(), &at, &key, &value); ++item) {
      if (key != item->first.ptr() || value != item->second.ptr()) return false;
    }
    return true;
  }

  pybind11::dict dictionary_;
  bool few_ = false;
  uint64_t version_ = 0;  // when it was last compared
  std::vector<std::pair<pybind11::object, pybind11::object>> items_;
};

// Dense tensors as they were: the same objects, memory, dtypes, dimensions and strides.
class SeenTensors {
 public:
  void add(const Tensor& t) {
    const DenseTensor* dense = dense_tensor(t);
    if (dense == nullptr) throw Stale();
    const Memory memory = memory_of(*dense, 0);
    on_gpu_ = on_gpu_ || (memory.place != nullptr && memory.place->GetType() != phi::AllocationType::CPU);
    entries_.push_back(Entry{&t, dense, memory_key(*dense, 0), memory.begin});
    owners_.emplace_back(t.impl(), memory_owner(*dense, 0));
    for_each_number(dense->meta(), [&](int64_t number) {
      numbers_.push_back(number);
      return true;
    });
  }

  // Whether what is kept alive is the memory, too, as Paddle shows its owner from 3.2 on.
  bool keeps_memory() const { return !owners_.empty() && owners_[0].second != nullptr; }

  size_t size() const { return entries_.size(); }

  // What a later comparison reads, for it is in no cache after a forward and a backward pass.
  void fetch(size_t i) const {
    const Entry& entry = entries_[i];
    __builtin_prefetch(entry.tensor);
    const char* description = reinterpret_cast<const char*>(entry.dense);
    for (int line = 0; line < 5; ++line) __builtin_prefetch(description + 64 * line);
  }

  // Compares tensor `i`, whose numbers begin at `*number`, and moves that on to the next tensor's. On a GPU the address
  // is compared, too: its allocator may move what an owner has.
  bool unchanged(size_t i, size_t* number) const {
    const Entry& entry = entries_[i];
    if (entry.tensor->impl().get() != entry.dense || memory_key(*entry.dense, 0) != entry.memory) return false;
    if (on_gpu_ && memory_of(*entry.dense, 0).begin != entry.begin) return false;
    // The rank comes first, so as many numbers are compared as were added.
    return for_each_number(entry.dense->meta(), [&](int64_t value) { return numbers_[(*number)++] == value; });
  }

 private:
  struct Entry {
    const Tensor* tensor;
    const DenseTensor* dense;
    const void* memory;
    const void* begin;
  };

  // Without the lists that DenseTensorMeta is made of: a comparison of many tensors reads as few bytes as it can.
  template <typename Use>
  static bool for_each_number(const phi::DenseTensorMeta& meta, const Use& use) {
    const int rank = meta.dims.size();
    if (!use(rank) || !use(static_cast<int64_t>(meta.dtype)) || !use(static_cast<int64_t>(meta.offset))) return false;
    for (int i = 0; i < rank; ++i) {
      if (!use(meta.dims[i]) || !use(meta.strides[i])) return false;
    }
    return true;
  }

  bool on_gpu_ = false;
  std::vector<Entry> entries_;
  std::vector<int64_t> numbers_;
  // Kept alive: what is freed might be made anew at the same address.
  std::vector<std::pair<std::shared_ptr<phi::TensorBase>, std::shared_ptr<const void>>> owners_;
};

// The attributes of Python that lie on a parameter and would change its step.
class Attributes {
 public:
  // What lies on a parameter under this name; borrowed, null if nothing or None does.
  static PyObject* own(PyObject* dict, PyObject* name) {
    PyObject* value = dict == nullptr ? nullptr : PyDict_GetItemWithError(dict, name);
    if (value == nullptr && PyErr_Occurred()) throw pybind11::error_already_set();
    return value == Py_None ? nullptr : value;
  }

  static pybind11::object get(PyObject* param, PyObject* name) {
    PyObject* value = PyObject_GetAttr(param, name);
    if (value == nullptr) throw pybind11::error_already_set();
    return pybind11::reinterpret_steal<pybind11::object>(value);
  }

  // Asks the function behind the attribute, where Paddle has one in C: looked up anew for each, as anybody may replace
  // it.
  static bool is_frozen(PyObject* param) {
    static PyObject* const kStopGradient = PyUnicode_InternFromString("stop_gradient");
    PyObject* const found = _PyType_Lookup(Py_TYPE(param), kStopGradient);
    if (found == nullptr || Py_TYPE(found) != &PyGetSetDescr_Type) return get(param, kStopGradient).ptr() == Py_True;
    const PyGetSetDef* const attribute = reinterpret_cast<PyGetSetDescrObject*>(found)->d_getset;
    const auto value = pybind11::reinterpret_steal<pybind11::object>(attribute->get(param, attribute->closure));
    if (!value) throw pybind11::error_already_set();
    return value.ptr() == Py_True;
  }

  // Whether nothing lies on the parameter that would change its step, and its learning rate has this multiplier.
  static bool are_plain(PyObject* param, PyObject* multiplier) {
    static PyObject* const kRegularizer = PyUnicode_InternFromString("regularizer");
    static PyObject* const kMainGrad = PyUnicode_InternFromString("main_grad");
    static PyObject* const kOptimizeAttr = PyUnicode_InternFromString("optimize_attr");
    static PyObject* const kLearningRate = PyUnicode_InternFromString("learning_rate");
    PyObject* attributes = PyObject_GenericGetDict(param, nullptr);
    if (attributes == nullptr) PyErr_Clear();  // a plain tensor may have nothing to keep them in
    const auto dict = pybind11::reinterpret_steal<pybind11::object>(attributes);
    if (own(dict.ptr(), kRegularizer) != nullptr || own(dict.ptr(), kMainGrad) != nullptr) return false;
    PyObject* options = own(dict.ptr(), kOptimizeAttr);
    if (options != nullptr && !PyDict_Check(options)) return false;
    PyObject* rate = own(options, kLearningRate);
    return (rate == nullptr ? Py_None : rate) == multiplier;
  }
};

// The attributes of a parameter as they were when nothing among them was found that would change its step. Where
// dictionaries have no version, everything is looked up at each step.
class SeenAttributes {
 public:
  SeenAttributes() = default;

  explicit SeenAttributes(PyObject* param) {
    static PyObject* const kOptimizeAttr = PyUnicode_InternFromString("optimize_attr");
    PyObject* const dict = dict_of(param);
    if (dict == nullptr) return;
    options_ = Attributes::own(dict, kOptimizeAttr);
    options_version_ = options_ == nullptr ? 0 : version_of(options_);
    version_ = version_of(dict);
  }

  // False if they may have changed.
  bool unchanged(PyObject* param) const {
    PyObject* const dict = dict_of(param);
    return dict != nullptr && version_of(dict) == version_ &&
           (options_ == nullptr || version_of(options_) == options_version_);
  }

 private:
  // Null: there is none, or it need not exist.
  static PyObject* dict_of(PyObject* param) {
    PyObject** const place = _PyObject_GetDictPtr(param);
    return place == nullptr ? nullptr : *place;
  }

  PyObject* options_ = nullptr;  // held by the dictionary of that version
  uint64_t version_ = 0, options_version_ = 0;
};

// The plan of an optimizer's step: for each trained parameter the tensors of its lists, the parameter first, and
// behind these the tensors of lists of another length.
class StepPlan {
 public:
  // All parameters of an optimizer; those of them that had a gradient, in their order; for each of these what lay in
  // its optimize_attr["learning_rate"], or None; its lists, the parameters themselves first; and the dictionaries that
  // must stay as they are, each alone or in a pair with the keys that matter.
  StepPlan(const pybind11::list& parameters, const pybind11::tuple& trained, const pybind11::tuple& multipliers,
           const pybind11::tuple& lists, const pybind11::list& dictionaries)
      : parameters_(parameters), trained_(trained), multipliers_(multipliers), lists_(lists) {
    for (const pybind11::handle list : lists) {
      tensors_.push_back(to_tensors(pybind11::reinterpret_borrow<pybind11::object>(list), "lists"));
      width_ += tensors_.back().size() == trained.size();
    }
    if (!trained.empty() && (tensors_.empty() || tensors_[0].size() != trained.size())) throw Stale();
    for (const pybind11::handle dictionary : dictionaries) {
      if (PyTuple_Check(dictionary.ptr())) {
        const auto pair = pybind11::reinterpret_borrow<pybind11::tuple>(dictionary);
        dictionaries_.emplace_back(pair[0].cast<pybind11::dict>(), pair[1].cast<pybind11::tuple>());
      } else {
        dictionaries_.emplace_back(pybind11::reinterpret_borrow<pybind11::dict>(dictionary));
      }
    }
    // In the order in which a step needs them; a list that is not one a parameter comes behind the others.
    for (size_t i = 0; i < trained.size(); ++i) {
      for (const Tensors& list : tensors_) {
        if (list.size() == trained.size()) seen_.add(*list[i]);
      }
    }
    for (const Tensors& list : tensors_) {
      for (size_t j = 0; j < list.size() && list.size() != trained.size(); ++j) seen_.add(*list[j]);
    }
    attributes_.resize(trained.size());
    gradients_.resize(trained.size());
    held_.resize(trained.size());
    direct_ = can_read_gradients();
  }

  // Python's search for circles: the optimizer owns the plan, and the plan holds the optimizer's dictionary.
  static void make_collectable(PyHeapTypeObject* heap_type) {
    heap_type->ht_type.tp_flags |= Py_TPFLAGS_HAVE_GC;
    heap_type->ht_type.tp_traverse = [](PyObject* self, visitproc visit, void* arg) -> int {
      Py_VISIT(Py_TYPE(self));
      auto* instance = reinterpret_cast<pybind11::detail::instance*>(self);
      // The search may come while the plan is being made.
      if (!instance->get_value_and_holder().holder_constructed()) return 0;
      const StepPlan& plan = pybind11::cast<const StepPlan&>(pybind11::handle(self));
      const auto show = [&](PyObject* object) { return visit(object, arg); };
      int found = 0;
      for (PyObject* object :
           {plan.parameters_.ptr(), plan.trained_.ptr(), plan.multipliers_.ptr(), plan.lists_.ptr()}) {
        if (found == 0) found = show(object);
      }
      for (const SeenDictionary& dictionary : plan.dictionaries_) {
        if (found == 0) found = dictionary.visit(show);
      }
      return found;
    };
  }

  // Whether without an object of Python for each.
  bool reads_gradients() const { return direct_; }

  bool keeps_memory() const { return seen_.keeps_memory(); }

  size_t lists() const { return tensors_.size(); }
  const Tensors& list(size_t k) const { return tensors_[k]; }

  // What an optimizer derives from the lists: it holds as long as the plan does.
  template <typename Prepared, typename Prepare>
  Prepared& prepared(const Prepare& prepare) {
    if (prepared_ == nullptr) prepared_ = std::make_shared<Prepared>(prepare());
    return *static_cast<Prepared*>(prepared_.get());
  }

  // Takes a step: `read` reads the arguments from Python, `check` makes the kernel's arguments of them and of the
  // gradients, and `run` runs the kernel, while other threads may run. Behind it come `notes`, functions of C without
  // arguments: no interrupt can come between. A ValueError means that nothing has been done.
  template <typename Read, typename Check, typename Run>
  void take(const char* name, const pybind11::list& notes, const Read& read, const Check& check, const Run& run) {
    // Another thread is within a step of this plan.
    if (busy_) throw pybind11::value_error("the plan is in use");
    const Busy busy(this);
    say_errors(name, [&]() {
      // Whatever may run code of Python comes first: nothing that is compared may change behind the comparison.
      auto received = read();
      compare_attributes();
      compare_tensors();
      SparseGradients sparse(gradients_.size());
      const auto step = check(received, gradients_, &sparse);
      // Other threads may drop what a gradient was.
      for (size_t i = 0; i < gradients_.size(); ++i) held_[i] = gradients_[i]->impl();
      {
        pybind11::gil_scoped_release release;
        run(step);
      }
      for (const pybind11::handle note : notes) note();
    });
  }

 private:
  // Parameters ahead of the one that is compared: far enough that what they need has come when it is their turn.
  static constexpr size_t kFar = 12, kNear = 4;

  // Set while a step is being taken.
  struct Busy {
    explicit Busy(StepPlan* plan) : plan(plan) { plan->busy_ = true; }
    ~Busy() {
      for (auto& held : plan->held_) held.reset();
      plan->objects_.clear();
      plan->busy_ = false;
    }
    StepPlan* plan;
  };

  void compare_attributes() {
    for (SeenDictionary& dictionary : dictionaries_) {
      if (!dictionary.unchanged()) throw Stale();
    }
    size_t count = 0;
    // Reading an attribute may run any code, so nothing about the list is kept over it.
    for (size_t at = 0; at < parameters_.size(); ++at) {
      if (count + kFar < trained_.size()) __builtin_prefetch(PyTuple_GET_ITEM(trained_.ptr(), count + kFar));
      if (count + kNear < trained_.size()) fetch_attributes(count + kNear);
      const pybind11::object param = parameters_[at];
      if (Attributes::is_frozen(param.ptr())) continue;
      if (count == trained_.size() || PyTuple_GET_ITEM(trained_.ptr(), count) != param.ptr()) throw Stale();
      if (!attributes_[count].unchanged(param.ptr())) {
        if (!Attributes::are_plain(param.ptr(), PyTuple_GET_ITEM(multipliers_.ptr(), count))) throw Stale();
        attributes_[count] = SeenAttributes(param.ptr());
      }
      ++count;
    }
    if (count != trained_.size()) throw Stale();
    if (!direct_) show_gradients();
  }

  void compare_tensors() {
    const size_t count = trained_.size();
    size_t number = 0;
    for (size_t i = 0; i < count && i < kFar; ++i) fetch(i);
    for (size_t i = 0; i < count && i < kNear; ++i) find_gradient(i);
    for (size_t i = 0; i < count; ++i) {
      if (i + kFar < count) fetch(i + kFar);
      if (i + kNear < count) find_gradient(i + kNear);
      for (size_t k = 0; k < width_; ++k) {
        if (!seen_.unchanged(i * width_ + k, &number)) throw Stale();
      }
    }
    for (size_t i = count * width_; i < seen_.size(); ++i) {
      if (i + kFar < seen_.size()) seen_.fetch(i + kFar);
      if (!seen_.unchanged(i, &number)) throw Stale();
    }
  }

  // What autograd keeps of a parameter, whether it is frozen among that, and where Python keeps its attributes.
  void fetch_attributes(size_t i) const {
    __builtin_prefetch(tensors_[0][i]->get_autograd_meta());
    PyObject** dict = _PyObject_GetDictPtr(PyTuple_GET_ITEM(trained_.ptr(), i));
    if (dict != nullptr) __builtin_prefetch(*dict);
  }

  void fetch(size_t i) const {
    for (size_t k = 0; k < width_; ++k) seen_.fetch(i * width_ + k);
    __builtin_prefetch(gradients_[i]);
  }

  // Finds a gradient, and fetches what a later check reads of it.
  void find_gradient(size_t i) {
    if (direct_) gradients_[i] = egr::EagerUtils::mutable_grad(*tensors_[0][i]);
    if (gradients_[i] == nullptr) throw Stale();
    fetch_description(*gradients_[i]);
  }

  // The gradients as Python shows them, where they cannot be read directly.
  void show_gradients() {
    objects_.clear();
    for (size_t i = 0; i < trained_.size(); ++i) {
      objects_.push_back(shown_gradient(i));
      if (!paddle::pybind::PyCheckTensor(objects_.back().ptr())) throw Stale();
      gradients_[i] = &paddle::pybind::CastPyArg2Tensor(objects_.back().ptr(), 0);
    }
  }

  pybind11::object shown_gradient(size_t i) const {
    static PyObject* const kGrad = PyUnicode_InternFromString("grad");
    return Attributes::get(trained_[i].ptr(), kGrad);
  }

  bool can_read_gradients() const {
    if (&egr::EagerUtils::mutable_grad == nullptr || trained_.empty()) return false;
    const Tensor* read = egr::EagerUtils::mutable_grad(*tensors_[0][0]);
    const pybind11::object shown = shown_gradient(0);
    return read != nullptr && paddle::pybind::PyCheckTensor(shown.ptr()) &&
           paddle::pybind::CastPyArg2Tensor(shown.ptr(), 0).impl() == read->impl();
  }

  pybind11::list parameters_;
  pybind11::tuple trained_, multipliers_, lists_;
  std::vector<SeenAttributes> attributes_;
  std::vector<SeenDictionary> dictionaries_;
  std::vector<Tensors> tensors_;
  size_t width_ = 0;  // lists that have one tensor a parameter
  SeenTensors seen_;
  bool direct_ = false;
  bool busy_ = false;
  Tensors gradients_;
  std::vector<pybind11::object> objects_;
  std::vector<std::shared_ptr<phi::TensorBase>> held_;
  std::shared_ptr<void> prepared_;
};

}  // namespace paddle_asgd
