// Planned launches without Python: the CUDA kernel of an operator that looks the call's plan up and launches it by the driver.
//
// kernels/plans.py works a plan out the first time and hands it over by keep_plan. From then on a call of the same kind, forward
// or in autograd's thread, allocates its results and launches, and Python is not entered. Every other call goes to the operator
// of the same name in realuid_fast_triton, whose kernel is in Python.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/ScopeExit.h>
#include <c10/util/hash.h>
#include <torch/library.h>

#include <dlfcn.h>

#include <atomic>
#include <cstring>
#include <memory>
#include <shared_mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace plans {

using at::Tensor;
using torch::jit::Stack;
using Words = c10::SmallVector<int64_t, 192>;

// The functions of CUDA's driver that a launch takes. They are looked up because torch for CPUs comes without CUDA's headers.
struct Driver {
  template <class F>
  static F* function(const char* name) {
    void* library = dlopen("libcuda.so.1", RTLD_LAZY);
    void* found = library ? dlsym(library, name) : nullptr;
    if (!found) throw std::runtime_error(std::string("the CUDA driver has no ") + name);
    return reinterpret_cast<F*>(found);
  }
  int (*launch)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**);
  int (*context)(void**);
  int (*set_context)(void*);
  int (*device)(int*, int);
  int (*retain)(void**, int);

  Driver() {
    launch = function<std::remove_pointer_t<decltype(launch)>>("cuLaunchKernel");
    context = function<std::remove_pointer_t<decltype(context)>>("cuCtxGetCurrent");
    set_context = function<std::remove_pointer_t<decltype(set_context)>>("cuCtxSetCurrent");
    device = function<std::remove_pointer_t<decltype(device)>>("cuDeviceGet");
    retain = function<std::remove_pointer_t<decltype(retain)>>("cuDevicePrimaryCtxRetain");
  }
  static const Driver& get() {
    static const Driver driver;
    return driver;
  }
  static void check(int error) {
    if (error) throw std::runtime_error("the CUDA driver refuses a launch: error " + std::to_string(error));
  }
  // A thread that has called nothing of CUDA's runtime, as autograd's may be, has no context yet.
  void need_context(int index) const {
    void* current = nullptr;
    check(context(&current));
    if (current) return;
    int number = 0;
    check(device(&number, index));
    check(retain(&current, number));
    check(set_context(current));
  }
};

// An argument of a kernel: the address of a tensor of the call, arguments first and then allocated ones, or a number's bits.
struct Argument {
  bool address;
  int64_t value;
};

struct Launch {
  void* function;
  unsigned grid[3], threads, shared;
  std::vector<Argument> arguments;
};

struct Plan {
  std::vector<Tensor> kept;  // tensors without elements, which all calls share; undefined where a call allocates
  std::vector<std::vector<int64_t>> sizes, strides;
  std::vector<at::ScalarType> dtypes;
  size_t results;
  std::vector<Launch> launches;
};

struct Hash {
  size_t operator()(const Words& words) const {
    size_t seed = words.size();
    for (const int64_t word : words) seed = c10::hash_combine(seed, size_t(word));
    return seed;
  }
};

// Never destroyed: torch's CUDA side may be gone before.
inline auto& known = *new std::unordered_map<Words, std::shared_ptr<const Plan>, Hash>;
inline std::shared_mutex guard;
inline std::atomic<bool> stopped = false;  // while somebody has a hook on Triton's launches
inline thread_local Words asked;           // what the call in Python that is under way follows from; empty where it is not to be kept

// The call's tensors by position, lists of tensors laid out; and all that its launches follow from. Only Python has an answer for
// a call that gets no words: float64, a noise key whose numbers are no neighbours, tensors of several devices.
inline Words describe(const c10::OperatorHandle& op, at::ArrayRef<c10::IValue> inputs, c10::SmallVectorImpl<const Tensor*>& tensors) {
  Words words;
  words.push_back(reinterpret_cast<int64_t>(&op.schema()));  // the device comes second: every operator begins with a tensor
  int64_t device = -1;
  bool fits = true;
  const auto add = [&](const Tensor& t) {
    tensors.push_back(&t);
    const bool key = t.scalar_type() == at::kLong;
    if (device < 0) words.push_back(device = t.get_device());
    if (!t.is_cuda() || t.get_device() != device || t.scalar_type() == at::kDouble || (key && !t.is_contiguous())) {
      fits = false;
      return;
    }
    const bool aligned = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
    words.push_back(-2 - (int64_t(t.scalar_type()) * 64 + t.dim()) * 2 - aligned);
    words.append(t.sizes().begin(), t.sizes().end());
    words.append(t.strides().begin(), t.strides().end());
  };
  for (const c10::IValue& input : inputs) {
    if (input.isTensor()) {
      add(input.toTensor());
    } else if (input.isTensorList()) {
      for (const c10::IValue& each : input.toListRef()) add(each.toTensor());
    } else {
      tensors.push_back(nullptr);
      if (input.isDouble()) {
        const double number = input.toDouble();
        int64_t bits;
        std::memcpy(&bits, &number, sizeof bits);
        words.push_back(bits);
      } else {
        words.push_back(input.isNone() ? -1 : input.isBool() ? input.toBool() : input.toInt());
      }
    }
  }
  if (!fits) words.clear();
  return words;
}

// CUDA's handle of a stream. A torch whose streams do not tell it takes the second function.
template <class Stream>
auto handle_of(const Stream& stream, int) -> decltype(stream.native_handle()) {
  return stream.native_handle();
}
template <class Stream>
void* handle_of(const Stream&, long) {
  TORCH_CHECK(false, "this torch does not tell CUDA's handle of a stream");
}

inline void* stream_on(c10::Device device) {
  return handle_of(c10::impl::VirtualGuardImpl(device.type()).getStream(device), 0);
}

inline void run(const Plan& plan, c10::SmallVectorImpl<const Tensor*>& tensors, c10::Device device, std::vector<Tensor>& made) {
  const c10::DeviceGuard on_device(device);
  made.reserve(plan.kept.size());
  for (size_t i = 0; i < plan.kept.size(); ++i) {
    made.push_back(plan.kept[i].defined() ? plan.kept[i]
                                          : at::empty_strided(plan.sizes[i], plan.strides[i], at::dtype(plan.dtypes[i]).device(device)));
    tensors.push_back(&made.back());
  }
  const Driver& driver = Driver::get();
  driver.need_context(device.index());
  void* stream = stream_on(device);
  for (const Launch& launch : plan.launches) {
    c10::SmallVector<int64_t, 48> words;
    c10::SmallVector<void*, 48> pointers;
    for (const Argument& each : launch.arguments)
      words.push_back(each.address ? reinterpret_cast<int64_t>(tensors[each.value]->data_ptr()) : each.value);
    for (int64_t& word : words) pointers.push_back(&word);
    const auto [x, y, z] = launch.grid;
    Driver::check(driver.launch(launch.function, x, y, z, launch.threads, 1, 1, launch.shared, stream, pointers.data(), nullptr));
  }
}

// The kernel for CUDA tensors of every operator with planned launches.
inline void planned(const c10::OperatorHandle& op, Stack* stack) {
  const size_t count = op.schema().arguments().size();
  c10::SmallVector<const Tensor*, 32> tensors;
  Words words = describe(op, torch::jit::last(*stack, count), tensors);
  std::shared_ptr<const Plan> plan;
  if (!words.empty() && !stopped) {
    const std::shared_lock<std::shared_mutex> lock(guard);
    const auto found = known.find(words);
    if (found != known.end()) plan = found->second;
  }
  if (plan) {
    std::vector<Tensor> made;
    run(*plan, tensors, c10::Device(at::kCUDA, c10::DeviceIndex(words[1])), made);
    torch::jit::drop(*stack, count);
    for (size_t i = 0; i < plan->results; ++i) stack->emplace_back(std::move(made[i]));
    return;
  }
  const std::string& name = op.schema().name();
  const auto in_python = c10::Dispatcher::singleton().findSchemaOrThrow(
      ("realuid_fast_triton::" + name.substr(name.find("::") + 2)).c_str(), "");
  asked = std::move(words);
  const auto forget = c10::make_scope_exit([] { asked.clear(); });
  const at::AutoDispatchBelowADInplaceOrView below;
  in_python.callBoxed(stack);
}

// Keeps what Python recorded of the call under way. `words` is, for each launch: function, grid, threads, bytes of shared memory, the
// number of arguments, and two words an argument.
inline void keep(const std::vector<Tensor>& made, int64_t results, at::IntArrayRef words) {
  if (asked.empty() || stopped) return;
  try {
    stream_on(c10::Device(at::kCUDA, c10::DeviceIndex(asked[1])));
  } catch (const c10::Error&) {
    return;  // a torch that does not give CUDA's handle of a stream
  }
  auto plan = std::make_shared<Plan>();
  for (const Tensor& each : made) {
    plan->kept.push_back(each.numel() ? Tensor() : each);
    plan->sizes.push_back(each.sizes().vec());
    plan->strides.push_back(each.strides().vec());
    plan->dtypes.push_back(each.scalar_type());
  }
  plan->results = size_t(results);
  for (const int64_t* next = words.begin(); next != words.end();) {
    Launch launch{reinterpret_cast<void*>(next[0]), {unsigned(next[1]), unsigned(next[2]), unsigned(next[3])},
                  unsigned(next[4]), unsigned(next[5]), {}};
    const int64_t count = next[6];
    next += 7;
    for (int64_t i = 0; i < count; ++i, next += 2) launch.arguments.push_back({next[0] != 0, next[1]});
    // Triton's scratch memory, which these kernels do not use. The driver takes as many arguments as a kernel has.
    launch.arguments.insert(launch.arguments.end(), 2, {false, 0});
    plan->launches.push_back(std::move(launch));
  }
  const std::unique_lock<std::shared_mutex> lock(guard);
  if (known.size() >= 512) known.clear();
  known[asked] = std::move(plan);
}

}  // namespace plans

TORCH_LIBRARY_FRAGMENT(realuid_fast_node, m) {
  m.def("keep_plan(Tensor[] made, int results, int[] words) -> ()",
        [](const std::vector<at::Tensor>& made, int64_t results, at::IntArrayRef words) { plans::keep(made, results, words); });
  m.def("stop_plans(bool stop) -> ()", [](bool stop) { plans::stopped = stop; });
  m.def("forget_plans() -> ()", []() {
    const std::unique_lock<std::shared_mutex> lock(plans::guard);
    plans::known.clear();
  });
  m.def("plan_on_cuda(str[] ops) -> ()", [](const c10::List<std::string>& ops) {
    static torch::Library library(torch::Library::IMPL, "realuid_fast", c10::DispatchKey::CUDA, __FILE__, __LINE__);
    for (const std::string& op : ops) library.impl(op.c_str(), torch::CppFunction::makeFromBoxedFunction<&plans::planned>());
  });
}
