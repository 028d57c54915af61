// How weights lie in memory: panels of 16 outputs, so that a vector register holds one input pair
// (or eight codes) of sixteen outputs and the activation is broadcast.
//
//   bfloat16   panel[K / 2][16][2]: the lanes' words are pairs of inputs. 32 inputs are a tile of
//              the AMX unit.
//   codes      panel[K / group]: 16 words (scale << 16 | zero, both bfloat16), then the group's
//              codes. 4 bits: [group / 8][16] words of eight codes, as they were packed in rows.
//              6 bits: [group / 16][3][16] words of four codes each, in the lower six bits of their
//              bytes: of the inputs 0 2 4 6, 1 3 5 7 and 8 10 12 14. The codes of 9 11 13 15 are in
//              the upper two bits of the three, lowest first.
//              3 bits: [group / 32][3][16] words in the same manner, of six bits that are two codes:
//              of the inputs 0 2 4 6 the lower three, of 1 3 5 7 the upper three, ...
//              5 bits: [group / 32][5][16] words: four of eight nibbles, as those of 4 bits, and the
//              32 upper bits. In a byte of theirs, the bits are of the nibbles at that byte of the
//              four, lower nibble first.
//              8 bits: [group / 4][16] words of four codes, of the inputs 0 2 4 6, 1 3 5 7, ...
//
// Inputs of bfloat16 are padded with zeros to a multiple of 32, outputs to a multiple of 16. Where
// gate and up projections are packed together, their panels lie in turn.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/kernel_set.h"

namespace river {

// Rows of a matrix as they come from Python, row-major without gaps.
struct SourceMatrix {
  int rows = 0;
  const bf16* weights = nullptr;   // [rows, K], for 16 bits
  const uint8_t* codes = nullptr;  // [rows, K * bits / 8]; 6 bits: K nibbles, then K times two bits;
                                   // 5 bits: K nibbles, then K bits; 3: K times two, then K bits
  const bf16* scales = nullptr;    // [rows, K / group]
  const bf16* zeros = nullptr;     // [rows, K / group]
};

size_t panel_bytes(int columns, int bits, int group_size);

// Packs panels [first, last) of the sources, put below each other or (interleaved) panel by panel
// in turn, to `out`, the place of panel 0.
void pack_panels(const std::vector<SourceMatrix>& sources, bool interleaved, int columns, int bits,
                 int group_size, int first, int last, uint8_t* out);

// The first `columns` values of a row of a bfloat16 matrix, back from its panel.
void unpack_row(const PackedMatrix& matrix, int row, int columns, float* out);

}  // namespace river
