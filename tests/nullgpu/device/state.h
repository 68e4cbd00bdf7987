// What the parts of the null GPU share: counts, violations, streams, events and captures.
#pragma once

#include <cuda_runtime_api.h>

#include <map>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

// Macros in some versions of the header.
#undef cudaGetDeviceProperties
#undef cudaStreamGetCaptureInfo

namespace nullgpu {

struct Stream;

// A captured graph: the names of the work that it holds.
struct Graph {
  std::vector<const char*> nodes;
};

// A capture under way. Work on every stream in `streams` is recorded in `graph`.
struct Capture {
  unsigned long long id;
  cudaStreamCaptureMode mode;
  std::thread::id thread;  // the thread that began it
  Stream* origin;
  Graph* graph;
  std::set<Stream*> streams;
};

struct Stream {
  int number = 0;
  bool blocking = true;  // whether it waits for the legacy stream, as streams do unless cudaStreamNonBlocking was given
  Capture* capture = nullptr;
  long done = 0;    // pieces of work and waits so far
  long joined = 0;  // how many of them a stream of the same capture has waited for
};

struct Event {
  bool recorded = false;
  unsigned long long capture = 0;  // the id of the capture that it was recorded in, or 0
  Stream* stream = nullptr;        // where it was recorded, and what had been done there
  long done = 0;
};

// Held by every function below, and by whoever reads or writes the objects above.
extern std::recursive_mutex lock;
using Guard = std::lock_guard<std::recursive_mutex>;

Stream* of(cudaStream_t stream);
inline Event* of(cudaEvent_t event) { return reinterpret_cast<Event*>(event); }
inline Graph* of(cudaGraph_t graph) { return reinterpret_cast<Graph*>(graph); }

// Captures under way, by id.
std::map<unsigned long long, Capture*>& captures();
// The capture that the calling thread began and that is under way, or null.
Capture* own_capture();
// How the calling thread treats captures, as cudaThreadExchangeStreamCaptureMode sets it.
cudaStreamCaptureMode& thread_mode();

// One piece of work of the device: recorded where its stream is capturing, done otherwise. `name` lives for ever.
void work(cudaStream_t stream, const char* name);
// One call of the host that is no work of the device.
void called(const char* name);
// Something that CUDA refuses, or that a replay would not repeat. NULLGPU_TRAP=1 prints the C++ stack.
void violate(const std::string& what);
// A call that CUDA's documentation has as potentially unsafe: a violation where this thread's mode forbids it.
void unsafe(const char* name);
// The same characters for equal texts, for ever.
const char* interned(const std::string& text);

}  // namespace nullgpu

extern "C" {
void nullgpu_launch(void* stream, const char* name);
void nullgpu_violation(const char* what);
int nullgpu_capturing();
}
