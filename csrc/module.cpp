// The Python module river_llm._core. Arrays come and go as NumPy arrays (bfloat16 as uint16); what
// is wrong with them becomes a ValueError, never a crash.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <set>
#include <stdexcept>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

#include "decoder.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace river {
namespace {

using Matrix16 = nb::ndarray<const uint16_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Matrix8 = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using FloatVector = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using FloatMatrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Codes = std::tuple<Matrix8, Matrix16, Matrix16>;

int process_id() {
#if defined(__unix__) || defined(__APPLE__)
  return static_cast<int>(getpid());
#else
  return 0;
#endif
}

const KernelSet& choose_kernels(const std::string& name) {
  const KernelSet* sets[kMaxKernelSets];
  const int count = available_kernel_sets(sets);
  if (name.empty()) return *sets[0];
  std::string known;
  for (int i = 0; i < count; ++i) {
    if (name == sets[i]->name) return *sets[i];
    known += std::string(i > 0 ? ", " : "") + sets[i]->name;
  }
  throw std::invalid_argument("this processor has no kernels named '" + name + "'; it has " + known);
}

std::vector<std::string> kernel_names() {
  const KernelSet* sets[kMaxKernelSets];
  const int count = available_kernel_sets(sets);
  std::vector<std::string> names;
  for (int i = 0; i < count; ++i) names.emplace_back(sets[i]->name);
  return names;
}

template <class T>
nb::object numpy_array(std::vector<T>&& values, std::vector<size_t> shape,
                       std::vector<int64_t> strides = {}) {
  auto* owner = new std::vector<T>(std::move(values));
  nb::capsule capsule(owner, [](void* p) noexcept { delete static_cast<std::vector<T>*>(p); });
  return nb::cast(nb::ndarray<nb::numpy, T>(owner->data(), shape.size(), shape.data(), capsule,
                                            strides.empty() ? nullptr : strides.data()));
}

// As int64, which PyTorch takes without a conversion.
nb::object whole_numbers(const std::vector<int>& values) {
  return numpy_array(std::vector<int64_t>(values.begin(), values.end()), {values.size()});
}

std::vector<float> to_vector(const FloatVector& values) {
  return {values.data(), values.data() + values.size()};
}

int whole_number(const nb::dict& values, const char* name) {
  const nb::object given = values[name];  // a KeyError where there is none
  int value;
  if (!nb::try_cast<int>(given, value, false))
    throw std::invalid_argument(std::string(name) + " has to be a whole number");
  return value;
}

int checked_threads(int threads) {
  if (threads < 1 || threads > 1024) throw std::invalid_argument("threads have to be 1 to 1024");
  return threads;
}

// What Python holds: the weights, the threads and one KV cache. One pass at a time.
class Engine {
 public:
  Engine(const nb::dict& shape, std::pair<int, int> backbone, std::pair<int, int> river,
         std::pair<int, int> head, int rotary_tables, int threads, const std::string& kernels)
      : kernels_(choose_kernels(kernels)),
        team_(std::make_unique<Team>(checked_threads(threads))),
        model_(read_shape(shape), {backbone.first, backbone.second}, {river.first, river.second},
               {head.first, head.second}, rotary_tables),
        decoder_(model_, kernels_, *team_),
        process_(process_id()) {}

  // A forked child has no threads to end.
  ~Engine() {
    if (process_ != process_id()) static_cast<void>(team_.release());
  }

  // Keeps a second thread out, and a forked child, whose copy of the engine has no threads.
  class Turn {
   public:
    explicit Turn(Engine& engine) : engine_(engine) {
      if (engine.process_ != process_id())
        throw std::runtime_error(
            "this engine belongs to the process that made it; make another one after a fork");
      if (engine.busy_.exchange(true))
        throw std::runtime_error("another thread is using this engine; give each thread its own");
    }
    ~Turn() { engine_.busy_ = false; }

   private:
    Engine& engine_;
  };

  void set_layer(int layer, const nb::dict& parts) {
    Turn turn(*this);
    Layer changed = layer_at(layer);
    std::set<std::string> unknown;
    for (const auto& item : parts) unknown.insert(nb::cast<std::string>(item.first));
    const size_t hidden = static_cast<size_t>(model_.shape.hidden_size);
    const size_t dims = static_cast<size_t>(model_.shape.head_dim);
    const size_t heads = static_cast<size_t>(model_.shape.num_heads) * dims;
    const size_t kv_heads = static_cast<size_t>(model_.shape.num_kv_heads) * dims;
    const auto read = [&](const char* name, std::vector<float>& out, size_t size, size_t other) {
      if (unknown.erase(name) == 0) return;
      const nb::object given = parts[name];
      FloatVector values;
      if (!nb::try_cast<FloatVector>(given, values, false) ||
          (values.size() != size && values.size() != other))
        throw std::invalid_argument(std::string(name) +
                                    " is no float32 vector of the right size without gaps");
      out = to_vector(values);
    };
    const auto read_whole = [&](const char* name, int& out) {
      if (unknown.erase(name) > 0) out = whole_number(parts, name);
    };
    read("attention_norm", changed.attention_norm, hidden, hidden);
    read("post_attention_norm", changed.post_attention_norm, hidden, hidden);
    read("mlp_norm", changed.mlp_norm, hidden, hidden);
    read("post_mlp_norm", changed.post_mlp_norm, hidden, hidden);
    read("query_norm", changed.query_norm, dims, heads);
    read("key_norm", changed.key_norm, dims, kv_heads);
    read("qkv_bias", changed.biases[kQkv], heads + 2 * kv_heads, heads + 2 * kv_heads);
    read("output_bias", changed.biases[kOutput], hidden, hidden);
    const size_t inner = 2 * static_cast<size_t>(model_.shape.intermediate_size);
    read("gate_up_bias", changed.biases[kGateUp], inner, inner);
    read("down_bias", changed.biases[kDown], hidden, hidden);
    read_whole("window", changed.window);
    read_whole("rope", changed.rope);
    if (changed.window < 0) throw std::invalid_argument("a negative window");
    if (changed.rope < -1 || changed.rope >= static_cast<int>(model_.rotary.size()))
      throw std::invalid_argument("there is no such rotary table");
    if (!unknown.empty()) throw std::invalid_argument("an unknown part of a layer: " + *unknown.begin());
    layer_at(layer) = std::move(changed);
  }

  void set_weights(int layer, int projection, const std::vector<Matrix16>& matrices) {
    Turn turn(*this);
    std::vector<SourceMatrix> sources;
    const PackedMatrix& packed = projection_at(layer, projection, kBackbone);
    if (packed.bits != 16) throw std::invalid_argument("the backbone takes codes");
    for (const Matrix16& matrix : matrices) {
      if (matrix.shape(1) != columns(projection)) throw std::invalid_argument("a matrix has the wrong width");
      sources.push_back({static_cast<int>(matrix.shape(0)), matrix.data(), nullptr, nullptr, nullptr});
    }
    nb::gil_scoped_release release;
    model_.set_projection(layer, static_cast<Projection>(projection), kBackbone, sources, *team_);
  }

  void set_codes(int layer, int projection, int side, const std::vector<Codes>& matrices) {
    Turn turn(*this);
    if (side != kBackbone && side != kRiver) throw std::invalid_argument("no such side");
    const PackedMatrix& packed = projection_at(layer, projection, static_cast<Side>(side));
    std::vector<SourceMatrix> sources;
    for (const Codes& codes : matrices)
      sources.push_back(read_codes(codes, columns(projection), packed));
    nb::gil_scoped_release release;
    model_.set_projection(layer, static_cast<Projection>(projection), static_cast<Side>(side),
                          sources, *team_);
  }

  void set_head_weights(const Matrix16& matrix) {
    Turn turn(*this);
    if (model_.head.bits != 16) throw std::invalid_argument("the LM head takes codes");
    if (matrix.shape(1) != hidden_size()) throw std::invalid_argument("the LM head has the wrong width");
    nb::gil_scoped_release release;
    model_.set_head({static_cast<int>(matrix.shape(0)), matrix.data(), nullptr, nullptr, nullptr}, *team_);
  }

  void set_head_codes(const Codes& codes) {
    Turn turn(*this);
    const SourceMatrix source = read_codes(codes, hidden_size(), model_.head);
    nb::gil_scoped_release release;
    model_.set_head(source, *team_);
  }

  void set_final_norm(const FloatVector& weight) {
    Turn turn(*this);
    if (weight.size() != hidden_size()) throw std::invalid_argument("the final norm has the wrong size");
    model_.final_norm = to_vector(weight);
  }

  // Embedding rows that don't come from the LM head's weights; the array is kept alive.
  void set_embedding(const Matrix16& rows) {
    Turn turn(*this);
    if (rows.shape(0) != static_cast<size_t>(model_.shape.vocab_size) || rows.shape(1) != hidden_size())
      throw std::invalid_argument("the embedding has the wrong shape");
    embedding_ = rows;
    model_.embedding = rows.data();
  }

  // Angles of the positions from `first` on; what stood there before is replaced.
  void set_rotary(int table, int first, const FloatMatrix& cosines, const FloatMatrix& sines) {
    Turn turn(*this);
    const size_t half = static_cast<size_t>(model_.shape.rotary_dim) / 2;
    if (table < 0 || table >= static_cast<int>(model_.rotary.size()) || cosines.shape(1) != half ||
        sines.shape(1) != half || cosines.shape(0) != sines.shape(0))
      throw std::invalid_argument("rotary angles of the wrong shape");
    RotaryTable& angles = model_.rotary[static_cast<size_t>(table)];
    const size_t start = static_cast<size_t>(first) * half;
    if (first < 0 || start > angles.cosines.size()) throw std::invalid_argument("rotary angles leave a gap");
    angles.cosines.resize(start);
    angles.sines.resize(start);
    angles.cosines.insert(angles.cosines.end(), cosines.data(), cosines.data() + cosines.size());
    angles.sines.insert(angles.sines.end(), sines.data(), sines.data() + sines.size());
  }

  void set_query_scales(const FloatVector& scales) {
    Turn turn(*this);
    model_.query_scales = to_vector(scales);
  }

  int positions() const { return model_.positions(); }

  nb::tuple forward(std::vector<int> tokens, std::vector<int> sequences,
                    std::vector<float> thresholds, std::vector<int> logit_rows,
                    std::vector<int> mean_groups, std::vector<int> minimum_groups,
                    bool record_similarities) {
    Turn turn(*this);
    for (const Layer& layer : model_.layers)
      if (layer.rope >= 0 && model_.rotary.empty()) throw std::invalid_argument("no rotary table is set");
    if (model_.embedding == nullptr && !(model_.shape.tied_head && model_.head.bits == 16))
      throw std::invalid_argument("no embedding is set");
    Pass pass;
    pass.tokens = std::move(tokens);
    pass.sequences = std::move(sequences);
    pass.thresholds = std::move(thresholds);
    pass.logit_rows = std::move(logit_rows);
    pass.mean_groups = std::move(mean_groups);
    pass.minimum_groups = std::move(minimum_groups);
    pass.record_similarities = record_similarities;
    logit_count_ = 0;
    logits_.swap(pass.logits);  // use the memory of the last pass again
    {
      nb::gil_scoped_release release;
      decoder_.forward(pass);
    }
    logits_.swap(pass.logits);
    logit_stride_ = pass.logit_stride;
    logit_count_ = pass.logit_rows.size();
    const size_t rows = pass.tokens.size(), layers = static_cast<size_t>(model_.shape.num_layers);
    nb::object similarities = nb::none();
    if (record_similarities) similarities = numpy_array(std::move(pass.similarities), {layers, rows});
    return nb::make_tuple(whole_numbers(pass.best_tokens), whole_numbers(pass.exit_layers),
                          similarities);
  }

  // A copy of the last pass's logits [rows, V].
  nb::object logits() {
    Turn turn(*this);
    const size_t vocabulary = static_cast<size_t>(model_.shape.vocab_size);
    std::vector<float> copy(logit_count_ * vocabulary);
    for (size_t i = 0; i < logit_count_; ++i)
      std::copy_n(logits_.data() + i * logit_stride_, vocabulary, copy.data() + i * vocabulary);
    return numpy_array(std::move(copy), {logit_count_, vocabulary});
  }

  void resize(int sequences) {
    Turn turn(*this);
    if (sequences < 0) throw std::invalid_argument("a negative number of sequences");
    decoder_.cache.resize(sequences);
  }
  void truncate(int sequence, int length) {
    Turn turn(*this);
    check_sequence(sequence);
    if (length < 0) throw std::invalid_argument("a negative length");
    decoder_.cache.truncate(sequence, length);
  }
  int length(int sequence) const {
    check_sequence(sequence);
    return decoder_.cache.length(sequence);
  }
  // Keys and values [2, layers, kv_heads, length, head_dim] of a sequence, as bfloat16 in uint16.
  nb::object read_cache(int sequence) {
    Turn turn(*this);
    check_sequence(sequence);
    const Shape& s = model_.shape;
    const auto length = static_cast<size_t>(decoder_.cache.length(sequence));
    const auto layers = static_cast<size_t>(s.num_layers), heads = static_cast<size_t>(s.num_kv_heads),
               dims = static_cast<size_t>(s.head_dim);
    const size_t half = layers * heads * length * dims;
    std::vector<uint16_t> out(2 * half);
    for (size_t l = 0; l < layers; ++l)
      for (size_t h = 0; h < heads; ++h)
        for (size_t p = 0; p < length; ++p) {
          uint16_t* key = out.data() + ((l * heads + h) * length + p) * dims;
          decoder_.cache.read(sequence, static_cast<int>(p), static_cast<int>(l), static_cast<int>(h),
                              key, key + half);
        }
    return numpy_array(std::move(out), {2, layers, heads, length, dims});
  }

  size_t layer_bytes(int layer, int side) {
    layer_at(layer);
    return model_.layer_bytes(layer, side == kRiver ? kRiver : kBackbone);
  }
  size_t head_bytes() const { return model_.head_bytes(); }
  size_t weight_bytes() const { return model_.weight_bytes(); }
  size_t cache_bytes() const { return decoder_.cache.bytes(); }
  int threads() const { return team_->size(); }
  const char* kernels() const { return kernels_.name; }

 private:
  static Shape read_shape(const nb::dict& d) {
    const auto whole = [&](const char* name) { return whole_number(d, name); };
    const auto real = [&](const char* name) { return nb::cast<float>(d[name]); };
    const auto flag = [&](const char* name) { return nb::cast<bool>(d[name]); };
    return {whole("num_layers"), whole("hidden_size"), whole("num_heads"), whole("num_kv_heads"),
            whole("head_dim"), whole("intermediate_size"), whole("vocab_size"), whole("rotary_dim"),
            real("norm_epsilon"), real("attention_scale"), real("embedding_scale"),
            real("logit_cap"), flag("gelu"), flag("tied_head")};
  }

  Layer& layer_at(int layer) {
    if (layer < 0 || layer >= model_.shape.num_layers) throw std::invalid_argument("there is no such layer");
    return model_.layers[static_cast<size_t>(layer)];
  }
  const PackedMatrix& projection_at(int layer, int projection, Side side) {
    if (projection < 0 || projection > kDown) throw std::invalid_argument("there is no such projection");
    return layer_at(layer).projections[projection][side];
  }
  size_t columns(int projection) const {
    const Shape& s = model_.shape;
    return static_cast<size_t>(projection == kOutput ? s.num_heads * s.head_dim
                               : projection == kDown ? s.intermediate_size
                                                     : s.hidden_size);
  }
  size_t hidden_size() const { return static_cast<size_t>(model_.shape.hidden_size); }

  static SourceMatrix read_codes(const Codes& codes, size_t columns, const PackedMatrix& packed) {
    const auto& [packed_codes, scales, zeros] = codes;
    if (packed.bits == 16) throw std::invalid_argument("these weights are bfloat16, not codes");
    const size_t rows = packed_codes.shape(0), groups = columns / static_cast<size_t>(packed.group_size);
    if (packed_codes.shape(1) != columns * static_cast<size_t>(packed.bits) / 8 ||
        scales.shape(0) != rows || zeros.shape(0) != rows || scales.shape(1) != groups ||
        zeros.shape(1) != groups)
      throw std::invalid_argument("codes, scales and zeros don't fit together");
    return {static_cast<int>(rows), nullptr, packed_codes.data(), scales.data(), zeros.data()};
  }

  void check_sequence(int sequence) const {
    if (sequence < 0 || sequence >= decoder_.cache.sequences())
      throw std::invalid_argument("there is no such sequence");
  }

  const KernelSet& kernels_;
  std::unique_ptr<Team> team_;
  Model model_;
  Decoder decoder_;
  int process_;
  std::atomic<bool> busy_{false};
  Matrix16 embedding_;
  std::vector<float> logits_;
  size_t logit_stride_ = 0, logit_count_ = 0;
};

// Bytes a second that the threads read together, the median of some passes over memory of that size.
double read_bandwidth(size_t bytes, int threads) {
  if (bytes < (1u << 20) || threads < 1) throw std::invalid_argument("read at least 1 MiB, with a thread");
  const KernelSet& kernels = choose_kernels("");
  nb::gil_scoped_release release;
  Buffer buffer(bytes + (16u << 10));
  Team team(checked_threads(threads));
  std::atomic<uint32_t> sink{0};
  const size_t part = bytes / static_cast<size_t>(threads) / 256 * 256;
  team.run([&](int t) { std::fill_n(buffer.data() + part * static_cast<size_t>(t), part, uint8_t{1}); });
  std::vector<double> rates;
  for (int repeat = 0; repeat < 5; ++repeat) {
    const auto start = std::chrono::steady_clock::now();
    team.run([&](int t) { sink += kernels.read(buffer.data() + part * static_cast<size_t>(t), part); });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    rates.push_back(static_cast<double>(part) * threads / seconds.count());
  }
  std::sort(rates.begin(), rates.end());
  return rates[rates.size() / 2];
}

// Seconds that so many threads take to meet once, the mean of many times.
double barrier_seconds(int threads) {
  constexpr int kTimes = 20000;
  Team team(checked_threads(threads));
  nb::gil_scoped_release release;
  const auto meet = [&](int times) {
    team.run([&](int t) {
      for (int i = 0; i < times; ++i) team.barrier(t);
    });
  };
  meet(kTimes / 10);  // the threads start
  const auto start = std::chrono::steady_clock::now();
  meet(kTimes);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  return seconds.count() / kTimes;
}

}  // namespace
}  // namespace river

NB_MODULE(_core, m) {
  using river::Engine;
  // an engine may live as long as the interpreter; what is left then is no leak to report
  nb::set_leak_warnings(false);
  m.attr("__doc__") = "The native core of River-LLM; see river_llm.engines.cpu_engine.";
  m.def("kernel_names", &river::kernel_names, "Kernel sets that this processor can run, best first.");
  m.def("usable_threads", &river::usable_threads,
        "Threads that this process may use: its affinity mask and its control group's limit.");
  m.def("read_bandwidth", &river::read_bandwidth, "buffer_bytes"_a, "threads"_a,
        "Bytes a second that so many threads read from memory of that size, the median of five passes.");
  m.def("barrier_seconds", &river::barrier_seconds, "threads"_a,
        "Seconds that so many threads take to meet once, the mean of many times.");
  nb::class_<Engine>(m, "Engine", "Weights, threads and KV cache of one model.")
      .def(nb::init<const nb::dict&, std::pair<int, int>, std::pair<int, int>, std::pair<int, int>, int,
                    int, const std::string&>(),
           "shape"_a, "backbone"_a, "river"_a, "head"_a, "rotary_tables"_a, "threads"_a, "kernels"_a)
      .def("set_layer", &Engine::set_layer, "layer"_a, "parts"_a)
      .def("set_weights", &Engine::set_weights, "layer"_a, "projection"_a,
           "matrices"_a.noconvert())
      .def("set_codes", &Engine::set_codes, "layer"_a, "projection"_a, "side"_a,
           "matrices"_a.noconvert())
      .def("set_head_weights", &Engine::set_head_weights, "matrix"_a.noconvert())
      .def("set_head_codes", &Engine::set_head_codes, "codes"_a.noconvert())
      .def("set_final_norm", &Engine::set_final_norm, "weight"_a)
      .def("set_embedding", &Engine::set_embedding, "rows"_a.noconvert())
      .def("set_rotary", &Engine::set_rotary, "table"_a, "first"_a, "cosines"_a, "sines"_a)
      .def("set_query_scales", &Engine::set_query_scales, "scales"_a)
      .def("forward", &Engine::forward, "tokens"_a, "sequences"_a, "thresholds"_a, "logit_rows"_a,
           "mean_groups"_a, "minimum_groups"_a, "record_similarities"_a)
      .def("logits", &Engine::logits)
      .def("resize", &Engine::resize, "sequences"_a)
      .def("truncate", &Engine::truncate, "sequence"_a, "length"_a)
      .def("length", &Engine::length, "sequence"_a)
      .def("read_cache", &Engine::read_cache, "sequence"_a)
      .def("layer_bytes", &Engine::layer_bytes, "layer"_a, "side"_a)
      .def_prop_ro("head_bytes", &Engine::head_bytes)
      .def_prop_ro("weight_bytes", &Engine::weight_bytes)
      .def_prop_ro("cache_bytes", &Engine::cache_bytes)
      .def_prop_ro("positions", &Engine::positions)
      .def_prop_ro("threads", &Engine::threads)
      .def_prop_ro("kernels", &Engine::kernels);
}
