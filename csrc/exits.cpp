// Where a token leaves the backbone for the river.
#include "pass_run.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace river {

bool Decoder::Run::needs_similarity(int layers_run) const {
  return pass_.record_similarities ||
         (layers_run < shape_.num_layers && std::isfinite(pass_.thresholds[size(layers_run)]));
}

Decoder::Run::Chunk Decoder::Run::chunk(int first, Private& own) const {
  const int count = std::min(kChunkRows, rows_ - first);
  own.order.clear();
  for (const char backbone : {1, 0})
    for (int row = 0; row < count; ++row)
      if (own.in_backbone[size(first + row)] == backbone) own.order.push_back(row);
  const auto begin = own.in_backbone.begin() + first;
  return {first, count, static_cast<int>(std::count(begin, begin + count, 1)), own.order.data()};
}

// Every thread comes to the same decision from the same similarities.
void Decoder::Run::decide(int layers_run, Private& own, int thread) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  if (layers_run >= shape_.num_layers) return;
  const float threshold = pass_.thresholds[size(layers_run)];
  if (threshold == -kInfinity)
    leave_all(own, thread, layers_run);
  else if (threshold < kInfinity && layers_run > 0)
    leave_by_similarity(own, thread, layers_run, threshold);
  if (layers_run < pass_.depth_limit) return;
  if (thread == 0)
    pass_.held_back += static_cast<int>(std::count(own.in_backbone.begin(), own.in_backbone.end(), 1));
  leave_all(own, thread, layers_run);
}

void Decoder::Run::leave_by_similarity(Private& own, int thread, int layers_run, float threshold) {
  const std::vector<float>& similarity = private_ ? own.similarity : buffers_.similarity;
  std::vector<float>& joined = own.joined;
  joined.assign(similarity.begin(), similarity.end());
  const auto join = [&](const std::vector<int>& groups, bool mean) {
    if (groups.empty()) return;
    std::vector<double>& value = own.group_values;
    std::vector<int>& members = own.group_members;
    value.assign(size(rows_), mean ? 0.0 : 2.0);
    members.assign(size(rows_), 0);
    for (int row = 0; row < rows_; ++row) {
      if (!own.in_backbone[size(row)]) continue;
      double& v = value[size(groups[size(row)])];
      const double s = joined[size(row)];
      v = mean ? v + s : std::min(v, s);
      ++members[size(groups[size(row)])];
    }
    for (int row = 0; row < rows_; ++row) {
      const size_t g = size(groups[size(row)]);
      if (own.in_backbone[size(row)])
        joined[size(row)] = static_cast<float>(mean ? value[g] / members[g] : value[g]);
    }
  };
  join(pass_.mean_groups, true);
  join(pass_.minimum_groups, false);
  for (int row = 0; row < rows_; ++row)
    if (own.in_backbone[size(row)] && joined[size(row)] > threshold)
      leave(own, thread, row, layers_run);
}

void Decoder::Run::leave_all(Private& own, int thread, int layers_run) {
  for (int row = 0; row < rows_; ++row)
    if (own.in_backbone[size(row)]) leave(own, thread, row, layers_run);
}

void Decoder::Run::leave(Private& own, int thread, int row, int layers_run) {
  own.in_backbone[size(row)] = 0;
  if (thread == 0) pass_.exit_layers[size(row)] = layers_run;
}

}  // namespace river
