// Where a token leaves the backbone for the river.
#include "pass_run.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace river {

// Whether a row that is in the backbone still compares the similarity after so many layers.
bool Decoder::Run::needs_similarity(int layers_run, const Private& own) const {
  if (pass_.record_similarities) return true;
  if (layers_run >= shape_.num_layers) return false;
  for (int row = 0; row < (own_thresholds_ ? rows_ : 1); ++row)
    if (std::isfinite(threshold(row, layers_run)) && (!own_thresholds_ || own.in_backbone[size(row)]))
      return true;
  return false;
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
  const std::vector<float>& similarity = join_groups(own);
  for (int row = 0; row < rows_; ++row) {
    if (!own.in_backbone[size(row)]) continue;
    const float threshold = this->threshold(row, layers_run);
    const bool exceeds =
        threshold == -kInfinity || (layers_run > 0 && similarity[size(row)] > threshold);
    if (!exceeds && layers_run < pass_.depth_limit) continue;
    own.in_backbone[size(row)] = 0;
    if (thread > 0) continue;
    pass_.exit_layers[size(row)] = layers_run;
    pass_.depth_capped += !exceeds;
  }
}

// The similarities that rows in the backbone compare: joined by mean, and then by minimum.
const std::vector<float>& Decoder::Run::join_groups(Private& own) const {
  const std::vector<float>& similarity = private_ ? own.similarity : buffers_.similarity;
  if (pass_.mean_groups.empty() && pass_.minimum_groups.empty()) return similarity;
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
  return joined;
}

}  // namespace river
