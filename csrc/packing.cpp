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

// A group's codes of a row as words, kLanes apart.
void pack_four_bits(const uint8_t* codes, int group_size, uint32_t* out) {
  for (int w = 0; w < group_size / 8; ++w) std::memcpy(out + w * kLanes, codes + 4 * w, sizeof *out);
}

void pack_eight_bits(const uint8_t* codes, int group_size, uint32_t* out) {
  for (int w = 0; w < group_size / 4; ++w) {
    const uint8_t* eight = codes + w / 2 * 8 + w % 2;
    out[w * kLanes] =
        eight[0] | eight[2] << 8 | eight[4] << 16 | static_cast<uint32_t>(eight[6]) << 24;
  }
}

// Four words of four times six bits as three words, kLanes apart.
void store_sixes(const uint32_t (&words)[4], uint32_t* out) {
  for (int w = 0; w < 3; ++w)
    out[w * kLanes] = words[w] | (words[3] >> (2 * w) & 0x03030303u) << 6;
}

// `upper` points to the group's bits above the nibbles, two for each code.
void pack_six_bits(const uint8_t* nibbles, const uint8_t* upper, int group_size, uint32_t* out) {
  for (int k = 0; k < group_size; k += 16, nibbles += 8, upper += 4, out += 3 * kLanes) {
    uint32_t words[4] = {};  // of the inputs 0 2 4 6, 1 3 5 7, 8 10 12 14, 9 11 13 15
    for (int i = 0; i < 16; ++i) {
      const uint32_t nibble = nibbles[i / 2] >> (i % 2 * 4) & 15u;
      const uint32_t code = nibble | (upper[i / 4] >> (i % 4 * 2) & 3u) << 4;
      words[i / 8 * 2 + i % 2] |= code << (i % 8 / 2 * 8);
    }
    store_sixes(words, out);
  }
}

// `upper` points to the group's bits above the lower two, one for each code.
void pack_three_bits(const uint8_t* lower, const uint8_t* upper, int group_size, uint32_t* out) {
  for (int k = 0; k < group_size; k += 32, lower += 8, upper += 4, out += 3 * kLanes) {
    uint32_t words[4] = {};  // of eight inputs each
    for (int i = 0; i < 32; ++i) {
      const uint32_t code = (lower[i / 4] >> (i % 4 * 2) & 3u) | (upper[i / 8] >> i % 8 & 1u) << 2;
      words[i / 8] |= code << (i % 8 / 2 * 8 + i % 2 * 3);
    }
    store_sixes(words, out);
  }
}

// `upper` points to the group's bits above the nibbles, one for each code.
void pack_five_bits(const uint8_t* nibbles, const uint8_t* upper, int group_size, uint32_t* out) {
  for (int k = 0; k < group_size; k += 32, nibbles += 16, upper += 4, out += 5 * kLanes) {
    pack_four_bits(nibbles, 32, out);
    uint32_t bits = 0;
    for (int i = 0; i < 32; ++i)
      bits |= (upper[i / 8] >> i % 8 & 1u) << (i % 8 / 2 * 8 + i / 8 * 2 + i % 2);
    out[4 * kLanes] = bits;
  }
}

void pack_codes(const SourceRow* rows, int columns, int bits, int group_size, uint32_t* out) {
  const auto num_groups = static_cast<size_t>(columns / group_size);
  const auto row_bytes = static_cast<size_t>(columns) * bits / 8;
  const int words = group_size * bits / 32;  // of one row and group
  for (size_t g = 0; g < num_groups; ++g, out += kLanes * (1 + words)) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const SourceMatrix* matrix = rows[lane].matrix;
      if (matrix == nullptr) continue;
      const size_t place = rows[lane].row * num_groups + g;
      out[lane] = static_cast<uint32_t>(matrix->scales[place]) << 16 | matrix->zeros[place];
      const uint8_t* row = matrix->codes + rows[lane].row * row_bytes;
      const size_t first = g * static_cast<size_t>(group_size);
      uint32_t* packed = out + kLanes + lane;
      if (bits == 3)
        pack_three_bits(row + first / 4, row + columns / 4 + first / 8, group_size, packed);
      else if (bits == 4)
        pack_four_bits(row + first / 2, group_size, packed);
      else if (bits == 5)
        pack_five_bits(row + first / 2, row + columns / 2 + first / 8, group_size, packed);
      else if (bits == 6)
        pack_six_bits(row + first / 2, row + columns / 2 + first / 4, group_size, packed);
      else
        pack_eight_bits(row + first, group_size, packed);
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

void unpack_row(const PackedMatrix& matrix, int row, int columns, float* out) {
  const auto* panel = reinterpret_cast<const uint32_t*>(matrix.panel(row / kLanes)) + row % kLanes;
  for (int k = 0; k < columns / 2; ++k) {
    out[2 * k] = to_float(static_cast<bf16>(panel[k * kLanes]));
    out[2 * k + 1] = to_float(static_cast<bf16>(panel[k * kLanes] >> 16));
  }
}

}  // namespace river
