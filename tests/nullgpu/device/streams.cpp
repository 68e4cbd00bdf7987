// Streams, events and waiting. A stream that waits for an event of a capture joins that capture.
#include <algorithm>
#include <atomic>

#include "state.h"

using namespace nullgpu;

namespace {

cudaError_t create(cudaStream_t* stream, unsigned flags) {
  static std::atomic<int> made{0};
  *stream = reinterpret_cast<cudaStream_t>(new Stream{++made, !(flags & cudaStreamNonBlocking)});
  return cudaSuccess;
}

cudaError_t create(cudaEvent_t* event) {
  *event = reinterpret_cast<cudaEvent_t>(new Event);
  return cudaSuccess;
}

// Whether a capture is under way that recorded the event.
bool captured(const Event* event) { return event->capture && captures().count(event->capture); }

// Waiting for, or asking after, something that is being captured is refused in every mode; other waits are unsafe.
void wait(const char* name, bool captures_it) {
  called(name);
  if (captures_it)
    violate(std::string(name) + " of what is being captured");
  else
    unsafe(name);
}

}  // namespace

extern "C" {

cudaError_t cudaStreamCreate(cudaStream_t* stream) { return create(stream, 0); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) { return create(stream, flags); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int) { return create(stream, flags); }
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) { return *priority = 0, cudaSuccess; }

cudaError_t cudaEventCreate(cudaEvent_t* event) { return create(event); }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return create(event); }
cudaError_t cudaEventDestroy(cudaEvent_t event) { return delete of(event), cudaSuccess; }
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t, cudaEvent_t) { return *ms = 1, cudaSuccess; }

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  Guard guard(lock);
  wait("cudaStreamSynchronize", of(stream)->capture);
  return cudaSuccess;
}

// The device holds every stream, so it may not be waited for while any is capturing.
cudaError_t cudaDeviceSynchronize() {
  Guard guard(lock);
  wait("cudaDeviceSynchronize", !captures().empty());
  return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  Guard guard(lock);
  wait("cudaEventSynchronize", captured(of(event)));
  return cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t stream) {
  Guard guard(lock);
  wait("cudaStreamQuery", of(stream)->capture);
  return cudaSuccess;
}

// An event that was recorded in a capture never happens, not even after the capture has ended.
cudaError_t cudaEventQuery(cudaEvent_t event) {
  Guard guard(lock);
  wait("cudaEventQuery", of(event)->capture);
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  Guard guard(lock);
  const Stream* there = of(stream);
  *of(event) = {true, there->capture ? there->capture->id : 0, of(stream), there->done};
  called("cudaEventRecord");
  return cudaSuccess;
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  return cudaEventRecord(event, stream);
}

cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t handle_of_event, unsigned) {
  Guard guard(lock);
  Stream* stream = of(handle);
  const Event* event = of(handle_of_event);
  if (!event->recorded) return cudaSuccess;
  stream->done++;
  if (!event->capture) {
    if (stream->capture) violate("a capturing stream waits for work outside the capture");
    return cudaSuccess;
  }
  const auto found = captures().find(event->capture);
  if (found == captures().end()) {
    violate("a stream waits for an event of a capture that has ended");
  } else if (!stream->capture) {
    stream->capture = found->second;
    found->second->streams.insert(stream);
  } else if (stream->capture != found->second) {
    violate("a capture waits for another capture");
  }
  event->stream->joined = std::max(event->stream->joined, event->done);
  return cudaSuccess;
}

// Host functions run at once, in a capture too.
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  work(stream, "host function");
  function(data);
  return cudaSuccess;
}

cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t callback, void* data, unsigned) {
  work(stream, "host function");
  callback(stream, cudaSuccess, data);
  return cudaSuccess;
}

}  // extern "C"
