#include "residency.h"

#include <stdexcept>

#include "require.h"

namespace river {
namespace {

using State = WeightFile::State;

}  // namespace

void Residency::open(const std::string& path) { file_ = WeightFile(path, model_.packed_bytes()); }

void Residency::keep(int layers) {
  require(layers >= 0 && layers <= model_.shape.num_layers, "the model hasn't so many layers to keep");
  if (!file_.is_open() && layers != resident_)
    throw std::runtime_error("there is no file that evicted layers could come back from");
  for (; resident_ > layers; --resident_) model_.drop_layer(resident_ - 1);
  for (; resident_ < layers; ++resident_) {
    model_.take_layer(resident_);
    const Model::Part part = model_.packed_layer(resident_);
    const size_t begin = part.bytes * static_cast<size_t>(resident_);
    const State state = file_.read(begin, begin + part.bytes, part.data);
    if (state == State::kWhole) continue;
    model_.drop_layer(resident_);
    refuse(state);
  }
}

void Residency::copy(size_t begin, size_t end, uint8_t* out) const {
  if (!file_.is_open() || begin > end || end > model_.packed_bytes())
    throw std::runtime_error("there is no file with these weights");
  const State state = file_.read(begin, end, out);
  if (state != State::kWhole) refuse(state);
}

void Residency::begin() {
  if (resident_ == model_.shape.num_layers) return;
  if (!file_.is_open())
    throw std::runtime_error("there is no file that evicted layers could come back from");
  if (staging_.size() == 0) staging_ = Buffer(model_.layer_bytes(0, kBackbone) + kSlack);
  state_ = State::kWhole;
  missed_ = false;
}

void Residency::stage(int layer) noexcept {
  if (staged_ >= 0) model_.place_layer(staged_, nullptr);
  staged_ = layer;
  model_.place_layer(layer, staging_.data());
  const size_t bytes = model_.layer_bytes(layer, kBackbone);
  if (layer + 1 < model_.shape.num_layers)  // while this one computes
    file_.fetch(bytes * static_cast<size_t>(layer + 1), bytes * static_cast<size_t>(layer + 2));
  missed_ = true;
  ++misses_;
  bytes_read_ += bytes;
}

void Residency::read(int thread, int threads) noexcept {
  const size_t bytes = model_.layer_bytes(staged_, kBackbone);
  const size_t begin = bytes * static_cast<size_t>(thread) / static_cast<size_t>(threads);
  const size_t end = bytes * static_cast<size_t>(thread + 1) / static_cast<size_t>(threads);
  const size_t start = bytes * static_cast<size_t>(staged_);
  const State state = file_.read(start + begin, start + end, staging_.data() + begin);
  if (state != State::kWhole) state_ = state;
}

void Residency::end() {
  if (staged_ >= 0) model_.place_layer(staged_, nullptr);
  staged_ = -1;
  idle_ = missed_ ? 0 : idle_ + 1;
  if (idle_ == kIdlePasses) staging_.give_back();
  const State state = state_.exchange(State::kWhole);
  if (state != State::kWhole) refuse(state);
}

void Residency::refuse(State state) const {
  throw std::runtime_error(
      state == State::kChanged
          ? "the file of the packed weights was changed while it was in use; load the model again"
          : "the file of the packed weights can't be read; load the model again");
}

}  // namespace river
