#include "packing.h"

#include <cstring>

namespace river {
namespace {

constexpr int kPairBlock = 16;  // pairs that are read of one row before the next one's

struct SourceRow {
  const SourceMatrix* matrix = nullptr;  // null: padding
  size_t row = 0;
};

SourceRow find_row(const std::vector<SourceMatrix>& sources, bool interleaved, int row) {
  if (interleaved) {
    const int panel = row / kLanes, count = static_cast<int>(sources.size());
    const int source_row = panel / count * kLanes + row % kLanes;
    const SourceMatrix& source = sources[static_cast<size_t>(panel % count)];
    if (source_row < source.rows) return {&source, static_cast<size_t>(source_row)};
    return {};
  }
  for (const SourceMatrix& source : sources) {
    if (row < source.rows) return {&source, static_cast<size_t>(row)};
    row -= source.rows;
  }
  return {};
}

void pack_weights(const SourceRow* rows, int columns, uint32_t* out) {
  const int pairs = columns / 2;
  for (int start = 0; start < pairs; start += kPairBlock) {
    const int end = start + kPairBlock < pairs ? start + kPairBlock : pairs;
    for (int lane = 0; lane < kLanes; ++lane) {
      if (rows[lane].matrix == nullptr) continue;
      const bf16* row = rows[lane].matrix->weights + rows[lane].row * columns;
      for (int k = start; k < end; ++k)
        std::memcpy(out + k * kLanes + lane, row + 2 * k, sizeof(uint32_t));
    }
  }
}

void pack_codes(const SourceRow* rows, int columns, int bits, int group_size, uint32_t* out) {
  const size_t num_groups = static_cast<size_t>(columns / group_size);
  const int words = group_size * bits / 32;  // of one row and group
  for (size_t g = 0; g < num_groups; ++g, out += kLanes * (1 + words)) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const SourceMatrix* matrix = rows[lane].matrix;
      if (matrix == nullptr) continue;
      const size_t place = rows[lane].row * num_groups + g;
      out[lane] = static_cast<uint32_t>(matrix->scales[place]) << 16 | matrix->zeros[place];
      const uint8_t* codes = matrix->codes + place * words * 4;
      for (int w = 0; w < words; ++w) {
        uint32_t word;
        if (bits == 4) {
          std::memcpy(&word, codes + 4 * w, sizeof word);
        } else {
          const uint8_t* eight = codes + w / 2 * 8 + w % 2;
          word = eight[0] | eight[2] << 8 | eight[4] << 16 | static_cast<uint32_t>(eight[6]) << 24;
        }
        out[(1 + w) * kLanes + lane] = word;
      }
    }
  }
}

}  // namespace

size_t panel_bytes(int columns, int bits, int group_size) {
  if (bits == 16) {
    const int padded = (columns + kInputBlock - 1) / kInputBlock * kInputBlock;
    return static_cast<size_t>(padded) * kLanes * sizeof(bf16);
  }
  const size_t group_bytes = sizeof(uint32_t) * kLanes * static_cast<size_t>(1 + group_size * bits / 32);
  return static_cast<size_t>(columns / group_size) * group_bytes;
}

void pack_panels(const std::vector<SourceMatrix>& sources, bool interleaved, int columns, int bits,
                 int group_size, int first, int last, uint8_t* out) {
  const size_t bytes = panel_bytes(columns, bits, group_size);
  for (int p = first; p < last; ++p) {
    SourceRow rows[kLanes];
    for (int lane = 0; lane < kLanes; ++lane)
      rows[lane] = find_row(sources, interleaved, p * kLanes + lane);
    auto* panel = reinterpret_cast<uint32_t*>(out + bytes * static_cast<size_t>(p));
    if (bits == 16)
      pack_weights(rows, columns, panel);
    else
      pack_codes(rows, columns, bits, group_size, panel);
  }
}

void unpack_row(const PackedMatrix& matrix, int row, float* out) {
  const auto* panel = reinterpret_cast<const uint32_t*>(matrix.panel(row / kLanes)) + row % kLanes;
  for (int k = 0; k < matrix.columns / 2; ++k) {
    out[2 * k] = to_float(static_cast<bf16>(panel[k * kLanes]));
    out[2 * k + 1] = to_float(static_cast<bf16>(panel[k * kLanes] >> 16));
  }
}

}  // namespace river
