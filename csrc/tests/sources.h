// Random matrices as they come from Python, and the weights that they mean.
#pragma once

#include <cstdint>
#include <vector>

#include "buffer.h"
#include "check.h"
#include "packing.h"

namespace river::test {

// A matrix [rows, columns] of bfloat16 weights, or of codes in groups.
class Source {
 public:
  Source(int rows, int columns, int bits, int group_size, Random& random);

  SourceMatrix matrix() const;
  double weight(int row, int column) const;
  // Every code's bits are ones, or zeros.
  void set_codes(bool ones);
  int rows() const { return rows_; }

 private:
  int code(int row, int column) const;

  int rows_, columns_, bits_, group_size_;
  std::vector<bf16> weights_, scales_, zeros_;
  std::vector<uint8_t> codes_;
};

// Sources packed below each other or in turn, at the end of what may be read.
class Packed {
 public:
  Packed(const std::vector<const Source*>& sources, bool interleaved, int columns, int bits,
         int group_size);

  PackedMatrix matrix;

 private:
  Guarded memory_;
};

// Rows of activations, prepared for a product.
class Inputs {
 public:
  Inputs(const KernelSet& kernels, const PackedMatrix& matrix, const std::vector<float>& x, int rows,
         int columns);

  const uint8_t* row(int index) const { return memory_.as<uint8_t>() + stride * index; }

  size_t stride;

 private:
  Guarded memory_;
};

}  // namespace river::test
