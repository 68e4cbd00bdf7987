// Captures and graphs. A replay is counted and does nothing, not even the copies that it holds.
#include "state.h"

using namespace nullgpu;

extern "C" {

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  Guard guard(lock);
  *status = of(stream)->capture ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t* graph, const cudaGraphNode_t** dependencies,
                                     const cudaGraphEdgeData** edges, size_t* count) {
  Guard guard(lock);
  const Capture* capture = of(stream)->capture;
  cudaStreamIsCapturing(stream, status);
  if (id) *id = capture ? capture->id : 0;
  if (graph) *graph = reinterpret_cast<cudaGraph_t>(capture ? capture->graph : nullptr);
  if (dependencies) *dependencies = nullptr;
  if (edges) *edges = nullptr;
  if (count) *count = 0;
  return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  static unsigned long long begun = 0;
  Guard guard(lock);
  Stream* stream = of(handle);
  if (size_t(handle) <= 1) violate("a capture begins on the legacy stream");
  if (stream->capture) violate("a capture begins on a stream that is capturing");
  auto* capture = new Capture{++begun, mode, std::this_thread::get_id(), stream, new Graph, {stream}};
  stream->capture = captures()[capture->id] = capture;
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
  Guard guard(lock);
  Capture* capture = of(handle)->capture;
  if (!capture) {
    violate("the end of a capture that was not begun");
    *graph = nullptr;
    return cudaErrorStreamCaptureInvalidated;
  }
  if (capture->origin != of(handle)) violate("a capture ends on another stream than it began");
  if (capture->mode != cudaStreamCaptureModeRelaxed && capture->thread != std::this_thread::get_id())
    violate("a capture ends in another thread than it began");
  for (Stream* stream : capture->streams) {
    if (stream != capture->origin && stream->joined < stream->done)
      violate("a capture ends before stream " + std::to_string(stream->number) + " is joined again");
    stream->capture = nullptr;
  }
  *graph = reinterpret_cast<cudaGraph_t>(capture->graph);
  captures().erase(capture->id);
  delete capture;
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  return std::swap(*mode, thread_mode()), cudaSuccess;
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* made, cudaGraph_t graph, unsigned long long) {
  *made = reinterpret_cast<cudaGraphExec_t>(new Graph(*of(graph)));
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
  const size_t nodes = reinterpret_cast<Graph*>(graph)->nodes.size();
  work(stream, interned("graph of " + std::to_string(nodes) + " nodes"));
  return cudaSuccess;
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* count) {
  *count = of(graph)->nodes.size();
  return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete of(graph), cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) { return delete reinterpret_cast<Graph*>(graph), cudaSuccess; }
cudaError_t cudaGraphRetainUserObject(cudaGraph_t, cudaUserObject_t, unsigned, unsigned) { return cudaSuccess; }
cudaError_t cudaUserObjectRelease(cudaUserObject_t, unsigned) { return cudaSuccess; }

cudaError_t cudaUserObjectCreate(cudaUserObject_t* object, void*, cudaHostFn_t, unsigned, unsigned) {
  *object = nullptr;
  return cudaSuccess;
}

}  // extern "C"
