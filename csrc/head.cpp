// The LM head: final norm, logits, and the best token of each row.
#include "pass_run.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace river {

void Decoder::Run::head(Private& own, int thread) {
  const int total = static_cast<int>(pass_.logit_rows.size());
  const size_t input_size = input_bytes(head_);
  own.best.assign(size(total), Best{});
  for (int first = 0; first < total; first += kChunkRows) {
    const int count = std::min(kChunkRows, total - first);
    const Range rows = rows_of(count, thread);
    uint8_t* input = inputs(own, kBackbone);
    for (int i = rows.begin; i < rows.end; ++i) {
      kernels_.rms_norm(hidden(own, pass_.logit_rows[size(first + i)]), or_null(model_.final_norm),
                        shape_.hidden_size, shape_.norm_epsilon, own.normed.data());
      if (head_.bits == 16)
        kernels_.prepare_pairs(own.normed.data(), shape_.hidden_size, input + size(i) * input_size);
      else
        kernels_.prepare_fixed(own.normed.data(), shape_.hidden_size, head_.group_size,
                               input + size(i) * input_size);
    }
    barrier_unless_private(thread);
    float* logits = pass_.logits.data() + size(first) * pass_.logit_stride;
    const auto multiply_and_rank = [&](Range panels) {
      kernels_.matmul(head_, panels.begin, panels.end, input, input_size, count, logits,
                      pass_.logit_stride);
      const int token = panels.begin * kLanes;
      const int tokens = std::min(panels.end * kLanes, shape_.vocab_size) - token;
      for (int i = 0; i < count; ++i) {
        float* part = logits + size(i) * pass_.logit_stride + token;
        Best& best = own.best[size(first + i)];
        float value;
        const int place = kernels_.argmax(part, tokens, &value);
        best.take({value, token + place, second_best(part, tokens, place)});
        if (shape_.logit_cap > 0)
          for (int j = 0; j < tokens; ++j)
            part[j] = shape_.logit_cap * std::tanh(part[j] / shape_.logit_cap);
      }
    };
    buffers_.panels->parallel_for(head_.panels(), grain(head_, count), thread,
                              own.loops++, multiply_and_rank);
    barrier_unless_private(thread);
  }
}

// The largest of some logits but one; minus infinity where it isn't asked for or there is none.
float Decoder::Run::second_best(float* logits, int count, int best) const {
  constexpr float kNone = -std::numeric_limits<float>::infinity();
  if (!pass_.rank_second) return kNone;
  const float value = std::exchange(logits[best], kNone);
  float second;
  kernels_.argmax(logits, count, &second);
  logits[best] = value;
  return second;
}

// 1 - p2 / p1 of the two best tokens.
float Decoder::Run::margin(const Best& best) const {
  const float cap = shape_.logit_cap;
  const float gap = cap > 0 ? cap * (std::tanh(best.value / cap) - std::tanh(best.second / cap))
                            : best.value - best.second;
  return 1 - std::exp(-gap);
}

}  // namespace river
