// The LM head: final norm, logits, and the best token of each row.
#include "pass_run.h"

#include <algorithm>
#include <cmath>

namespace river {

void Decoder::Run::head(Private& own, int thread) {
  const int total = static_cast<int>(pass_.logit_rows.size());
  const size_t input_size = input_bytes(model_.head);
  own.best.assign(size(total), Best{});
  for (int first = 0; first < total; first += kChunkRows) {
    const int count = std::min(kChunkRows, total - first);
    const Range rows = rows_of(count, thread);
    uint8_t* input = inputs(own, kBackbone);
    for (int i = rows.begin; i < rows.end; ++i) {
      kernels_.rms_norm(hidden(own, pass_.logit_rows[size(first + i)]), or_null(model_.final_norm),
                        shape_.hidden_size, shape_.norm_epsilon, own.normed.data());
      if (model_.head.bits == 16)
        kernels_.prepare_pairs(own.normed.data(), shape_.hidden_size, input + size(i) * input_size);
      else
        kernels_.prepare_fixed(own.normed.data(), shape_.hidden_size, model_.head.group_size,
                               input + size(i) * input_size);
    }
    meet_unless_private(thread);
    float* logits = pass_.logits.data() + size(first) * pass_.logit_stride;
    const auto multiply_and_rank = [&](Range panels) {
      kernels_.matmul(model_.head, panels.begin, panels.end, input, input_size, count, logits,
                      pass_.logit_stride);
      const int token = panels.begin * kLanes;
      const int tokens = std::min(panels.end * kLanes, shape_.vocab_size) - token;
      for (int i = 0; i < count; ++i) {
        float* part = logits + size(i) * pass_.logit_stride + token;
        Best& best = own.best[size(first + i)];
        float value;
        const int place = kernels_.argmax(part, tokens, &value);
        best.take({value, token + place});
        if (shape_.logit_cap > 0)
          for (int j = 0; j < tokens; ++j)
            part[j] = shape_.logit_cap * std::tanh(part[j] / shape_.logit_cap);
      }
    };
    buffers_.panels->hand_out(model_.head.panels(), piece(model_.head, count), thread, own.turn++,
                              multiply_and_rank);
    meet_unless_private(thread);
  }
}

}  // namespace river
