// Counts, violations and captures, and the functions through which Python reads them.
#include "state.h"

#include <execinfo.h>

#include <cstdio>
#include <cstdlib>
#include <unordered_map>

namespace nullgpu {

std::recursive_mutex lock;

namespace {

// Made on first use, which may come before this library's constructors, and never destroyed: threads outlive main.
template <class T>
T& forever() {
  static T& made = *new T;
  return made;
}

struct Count {
  long recorded = 0, done = 0;
};

auto& work_by_name() { return forever<std::unordered_map<const char*, Count>>(); }
auto& calls_by_name() { return forever<std::unordered_map<const char*, long>>(); }
auto& violations() { return forever<std::vector<std::string>>(); }

}  // namespace

Stream* of(cudaStream_t stream) {
  // Handles 0, 1 and 2 are the default stream's.
  static Stream& first = *new Stream;
  return size_t(stream) <= 2 ? &first : reinterpret_cast<Stream*>(stream);
}

std::map<unsigned long long, Capture*>& captures() {
  static auto& made = *new std::map<unsigned long long, Capture*>;
  return made;
}

Capture* own_capture() {
  for (const auto& [id, capture] : captures())
    if (capture->thread == std::this_thread::get_id()) return capture;
  return nullptr;
}

cudaStreamCaptureMode& thread_mode() {
  thread_local cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
  return mode;
}

void work(cudaStream_t handle, const char* name) {
  Guard guard(lock);
  Stream* stream = of(handle);
  stream->done++;
  if (stream->capture) {
    work_by_name()[name].recorded++;
    stream->capture->graph->nodes.push_back(name);
    return;
  }
  work_by_name()[name].done++;
  if (captures().empty()) return;
  const std::string where = std::string(name) + " on stream " + std::to_string(stream->number);
  if (own_capture()) violate("work beside the capture, which a replay does not repeat: " + where);
  for (const auto& [id, capture] : captures())
    if (handle == nullptr && capture->origin->blocking) violate("the legacy stream is used during capture: " + where);
}

void called(const char* name) {
  Guard guard(lock);
  calls_by_name()[name]++;
}

void violate(const std::string& what) {
  Guard guard(lock);
  violations().push_back(what);
  if (!std::getenv("NULLGPU_TRAP")) return;
  std::fprintf(stderr, "VIOLATION %s\n", what.c_str());
  void* frames[60];
  backtrace_symbols_fd(frames, backtrace(frames, 60), 2);
}

void unsafe(const char* name) {
  Guard guard(lock);
  if (thread_mode() == cudaStreamCaptureModeRelaxed) return;
  for (const auto& [id, capture] : captures()) {
    const bool own = capture->thread == std::this_thread::get_id();
    const bool global = capture->mode == cudaStreamCaptureModeGlobal && thread_mode() == cudaStreamCaptureModeGlobal;
    if (own ? capture->mode != cudaStreamCaptureModeRelaxed : global)
      return violate(std::string(name) + (own ? " during capture" : " during another thread's global capture"));
  }
}

const char* interned(const std::string& text) {
  Guard guard(lock);
  return forever<std::set<std::string>>().insert(text).first->c_str();
}

}  // namespace nullgpu

using namespace nullgpu;

extern "C" {

// A launch that came by no function of the runtime: Triton's, inductor's, cuBLAS', cuDNN's.
void nullgpu_launch(void* stream, const char* name) { work(static_cast<cudaStream_t>(stream), name); }

void nullgpu_violation(const char* what) { violate(what); }

const char* nullgpu_interned(const char* text) { return interned(text); }

// Whether the calling thread has a capture under way.
int nullgpu_capturing() {
  Guard guard(lock);
  return own_capture() != nullptr;
}

// Forget all counts and violations.
void nullgpu_reset() {
  Guard guard(lock);
  work_by_name().clear();
  calls_by_name().clear();
  violations().clear();
}

// Lines "recorded|done|called TAB count TAB name" and "violation TAB 1 TAB what". The text lasts until the calling
// thread's next call.
const char* nullgpu_report() {
  static thread_local std::string text;
  Guard guard(lock);
  text.clear();
  const auto line = [](const char* kind, long count, const std::string& name) {
    if (count) text += std::string(kind) + "\t" + std::to_string(count) + "\t" + name + "\n";
  };
  for (const auto& [name, count] : work_by_name()) {
    line("recorded", count.recorded, name);
    line("done", count.done, name);
  }
  for (const auto& [name, count] : calls_by_name()) line("called", count, name);
  for (const auto& what : violations()) line("violation", 1, what);
  return text.c_str();
}

}  // extern "C"
