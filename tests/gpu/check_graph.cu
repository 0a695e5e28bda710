// SPDX-License-Identifier: Apache-2.0
// Whether a step captured into a CUDA graph and replayed gives the bits of as many steps of the CPU's kernel, and what
// the graph consists of: capture refuses allocation and synchronisation, and the kinds of nodes are counted.
#include "twin.h"

namespace gpu {
namespace {

bool whole = true;

struct Graph {
  Graph(Twin* twin, Form form, bool flag) {
    CUDA(cudaStreamBeginCapture(twin->stream, cudaStreamCaptureModeGlobal));
    twin->step_on_device(form, flag);
    CUDA(cudaStreamEndCapture(twin->stream, &graph));
    CUDA(cudaGraphInstantiate(&run, graph, 0));
    size_t count = 0;
    CUDA(cudaGraphGetNodes(graph, nullptr, &count));
    std::vector<cudaGraphNode_t> nodes(count);
    CUDA(cudaGraphGetNodes(graph, nodes.data(), &count));
    for (const cudaGraphNode_t node : nodes) {
      cudaGraphNodeType type;
      CUDA(cudaGraphNodeGetType(node, &type));
      type == cudaGraphNodeTypeKernel ? ++kernels : ++others;
    }
  }
  ~Graph() { cudaGraphExecDestroy(run), cudaGraphDestroy(graph); }
  cudaGraph_t graph;
  cudaGraphExec_t run;
  int kernels = 0, others = 0;
};

// Rates and slots given by value stay what they were when captured; those in memory are read at each replay.
void check_replays(const Types& types, const Mode& mode, Form form, bool watches, Tally* tally) {
  Random random(31);
  const std::vector<int64_t> sizes = {0, 257, 8193, 1, 65};
  Twin twin(native_test::make(types, sizes, 3, 0, &random, mode.indexed), mode, 3, 32);
  twin.plan.watches = watches;
  const bool flag = form != Form::kValues;
  twin.draw();
  twin.send_numbers();
  const Graph graph(&twin, form, flag);
  const int64_t captured = twin.known.index;
  const std::string where = std::string(types.name) + ", " + mode.name;
  tally->count();
  if (graph.others != 0 || graph.kernels != (watches ? 3 : 2)) {
    tally->differ(where + ": " + std::to_string(graph.kernels) + " kernels, " + std::to_string(graph.others) +
                  " other nodes");
  }
  for (int64_t k = 0; k < 50; ++k) {
    if (k > 0) twin.draw();
    if (form == Form::kValues) {
      twin.known.index = captured;
    } else {
      twin.known.wide[0] = native_test::kRate / static_cast<double>(1 + k);
      twin.known.narrow[0] = 0.0625f / static_cast<float>(1 + k);
      twin.known.found_inf = k % 7 == 5;
    }
    twin.send_numbers();
    twin.step_on_host(form, flag);
    CUDA(cudaGraphLaunch(graph.run, twin.stream));
    CUDA(cudaStreamSynchronize(twin.stream));
    if (k % 10 == 9 || k < 7) twin.compare(where + ", replay " + std::to_string(k), tally);
  }
  if (watches) twin.compare_watch(where, true, tally);
}

void check_graphs() {
  Tally tally("50 replays of a captured step");
  for (const Types& types : kTypes) {
    for (const int i : {0, 1, 3, 6, 10}) {
      for (const Form form : {Form::kValues, Form::kFloat64, Form::kFloat32}) {
        check_replays(types, kModes[i], form, i % 2 == 0, &tally);
      }
    }
  }
  whole &= tally.report();
}

// The launches of one step of tensors alike, by their number.
void count_launches() {
  Tally tally("launches of a step");
  std::string rows;
  for (const int64_t count : {1, 161, 478, 479, 1000}) {
    for (const bool watches : {false, true}) {
      Random random(33);
      Twin twin(native_test::make(kTypes[0], std::vector<int64_t>(count, 5), 3, 0, &random), kModes[0], 3, 34);
      twin.plan.watches = watches;
      const Graph graph(&twin, Form::kValues, false);
      tally.count();
      if (graph.others != 0) tally.differ(std::to_string(count) + ": nodes that are no kernels");
      rows += (rows.empty() ? "[" : ", [") + std::to_string(count) + ", " + (watches ? "true" : "false") + ", " +
              std::to_string(graph.kernels) + ", " + std::to_string(graph.others) + "]";
    }
  }
  tally.note("tensors, watch, kernels, other nodes", "[" + rows + "]");
  whole &= tally.report();
}

}  // namespace
}  // namespace gpu

int main() {
  // Loading a kernel is no work that a stream can capture.
  setenv("CUDA_MODULE_LOADING", "EAGER", 1);
  gpu::check_graphs();
  gpu::count_launches();
  return gpu::whole ? 0 : 1;
}
