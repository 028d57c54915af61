// The Python module river_llm._core: what Python sees of the core, by name.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <climits>
#include <string>
#include <utility>
#include <vector>

#include "buffer.h"
#include "engine.h"
#include "kernels/kernel_set.h"
#include "python_values.h"
#include "require.h"
#include "thread_pool.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace river {
namespace {

std::vector<std::string> kernel_names() {
  const KernelSet* sets[kMaxKernelSets];
  const int count = available_kernel_sets(sets);
  std::vector<std::string> names;
  for (int i = 0; i < count; ++i) names.emplace_back(sets[i]->name);
  return names;
}

// How fast the threads together read memory of that size: what a pass can't beat.
double read_bandwidth(size_t bytes, int threads) {
  require(bytes >= (1u << 20), "read at least 1 MiB");
  const KernelSet* sets[kMaxKernelSets];
  available_kernel_sets(sets);
  const KernelSet& kernels = *sets[0];
  nb::gil_scoped_release release;
  Buffer buffer(bytes + (16u << 10));
  ThreadPool pool(checked_threads(threads));
  std::atomic<uint32_t> sink{0};
  const size_t part = bytes / static_cast<size_t>(threads) / 256 * 256;
  pool.run([&](int t) { std::fill_n(buffer.data() + part * static_cast<size_t>(t), part, uint8_t{1}); });
  std::vector<double> rates;
  for (int repeat = 0; repeat < 5; ++repeat) {
    const auto start = std::chrono::steady_clock::now();
    pool.run([&](int t) { sink += kernels.read(buffer.data() + part * static_cast<size_t>(t), part); });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    rates.push_back(static_cast<double>(part) * threads / seconds.count());
  }
  std::sort(rates.begin(), rates.end());
  return rates[rates.size() / 2];
}

}  // namespace
}  // namespace river

NB_MODULE(_core, m) {
  using river::Engine;
  // an engine may live as long as the interpreter; what is left then is no leak to report
  nb::set_leak_warnings(false);
  m.attr("__doc__") = "The native core of River-LLM; see river_llm.engines.cpu.";
  m.attr("weight_layout") = river::kWeightLayout;
  m.attr("cache_layout") = river::kCacheLayout;
  m.def("kernel_names", &river::kernel_names, "Kernel sets that this processor can run, best first.");
  m.def("usable_threads", &river::usable_threads,
        "Threads that this process may use: its affinity mask and its control group's limit.");
  m.def("read_bandwidth", &river::read_bandwidth, "buffer_bytes"_a, "threads"_a,
        "Bytes a second that so many threads read from memory of that size, the median of five passes.");
  nb::class_<Engine>(m, "Engine", "Weights, threads and KV cache of one model; see csrc/engine.h.")
      .def(nb::init<const nb::dict&, std::pair<int, int>,
                    const std::pair<std::vector<std::array<int, 4>>, int>&, std::pair<int, int>, int,
                    const std::string&, int, int>(),
           "shape"_a, "backbone"_a, "river"_a, "head"_a, "threads"_a, "kernels"_a,
           "resident_layers"_a, "kv_bits"_a = 16)
      .def("load_layer", &Engine::load_layer, "layer"_a, "parts"_a)
      .def("load_head", &Engine::load_head, "parts"_a)
      .def("load_draft_head", &Engine::load_draft_head, "codes"_a.noconvert(), "bits"_a, "group_size"_a)
      .def("load_positions", &Engine::load_positions, "first"_a, "angles"_a.noconvert(),
           "query_scales"_a.noconvert())
      .def("head_rows", &Engine::head_rows, "first"_a, "count"_a)
      .def("forward", &Engine::forward, "tokens"_a, "sequences"_a, "thresholds"_a.noconvert(),
           "logit_rows"_a, "mean_groups"_a, "minimum_groups"_a, "record_similarities"_a,
           "record_margins"_a = false, "draft_head"_a = false, "depth_limit"_a = INT_MAX)
      .def("logits", &Engine::logits, "number"_a)
      .def("draft", &Engine::draft, "sequences"_a, "tokens"_a, "most"_a, "exit_layer"_a,
           "least_margin"_a, "stop_tokens"_a, "draft_head"_a = false)
      .def("add_sequence", &Engine::add_sequence, "prompt_length"_a = 0)
      .def("drop_sequence", &Engine::drop_sequence, "sequence"_a)
      .def("truncate", &Engine::truncate, "sequence"_a, "length"_a)
      .def("length", &Engine::length, "sequence"_a)
      .def("sequences", &Engine::sequences)
      .def("longest_after", &Engine::longest_after, "sequences"_a)
      .def("read_pages", &Engine::read_pages, "sequence"_a, "length"_a)
      .def("write_pages", &Engine::write_pages, "sequence"_a, "pages"_a.noconvert(), "length"_a)
      .def("open_weights", &Engine::open_weights, "path"_a)
      .def("stored_weights", &Engine::stored_weights, "begin"_a, "end"_a)
      .def("keep_layers", &Engine::keep_layers, "layers"_a)
      .def("layer_bytes", &Engine::layer_bytes, "layer"_a, "side"_a)
      .def_prop_ro("packed_weights", &Engine::packed_weights)
      .def_prop_ro("offload_counts", &Engine::offload_counts)
      .def_prop_ro("resident_layers", &Engine::resident_layers)
      .def_prop_ro("head_bytes", [](const Engine& e) { return e.model().head_bytes(); })
      .def_prop_ro("weight_bytes", [](const Engine& e) { return e.model().weight_bytes(); })
      .def_prop_ro("packed_bytes", [](const Engine& e) { return e.model().packed_bytes(); })
      .def_prop_ro("cache_bytes", [](const Engine& e) { return e.cache().bytes(); })
      .def_prop_ro("position_bytes", [](const Engine& e) { return e.cache().position_bytes(); })
      .def_prop_ro("kv_bits", [](const Engine& e) { return e.cache().bits(); })
      .def_prop_ro("positions", &Engine::positions)
      .def_prop_ro("threads", &Engine::threads)
      .def_prop_ro("kernels", &Engine::kernels);
}
