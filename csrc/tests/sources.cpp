#include "sources.h"

namespace river::test {

Source::Source(int rows, int columns, int bits, int group_size, Random& random)
    : rows_(rows), columns_(columns), bits_(bits), group_size_(group_size) {
  const auto count = static_cast<size_t>(rows) * columns;
  if (bits == 16) {
    for (size_t i = 0; i < count; ++i) weights_.push_back(to_bf16(random.real(-1, 1)));
    return;
  }
  for (size_t i = 0; i < count * bits / 8; ++i)
    codes_.push_back(static_cast<uint8_t>(random.whole(0, 255)));
  for (size_t i = 0; i < count / group_size; ++i) {
    scales_.push_back(to_bf16(random.real(0.01f, 0.1f)));
    zeros_.push_back(to_bf16(random.real(-0.1f, 0.1f)));
  }
}

SourceMatrix Source::matrix() const {
  if (bits_ == 16) return {rows_, weights_.data(), nullptr, nullptr, nullptr};
  return {rows_, nullptr, codes_.data(), scales_.data(), zeros_.data()};
}

int Source::code(int row, int column) const {
  const size_t place = static_cast<size_t>(row) * columns_ + column;
  if (bits_ == 8) return codes_[place];
  if (bits_ == 6) {  // the row's nibbles, then two bits each
    const uint8_t* nibbles = codes_.data() + static_cast<size_t>(row) * columns_ * 6 / 8;
    const int nibble = nibbles[column / 2] >> (column % 2 * 4) & 15;
    return nibble | (nibbles[columns_ / 2 + column / 4] >> (column % 4 * 2) & 3) << 4;
  }
  if (bits_ == 5) {  // the row's nibbles, then one bit each
    const uint8_t* nibbles = codes_.data() + static_cast<size_t>(row) * columns_ * 5 / 8;
    const int nibble = nibbles[column / 2] >> (column % 2 * 4) & 15;
    return nibble | (nibbles[columns_ / 2 + column / 8] >> column % 8 & 1) << 4;
  }
  if (bits_ == 3) {  // two bits each, then one bit each
    const uint8_t* lower = codes_.data() + static_cast<size_t>(row) * columns_ * 3 / 8;
    const int two_bits = lower[column / 4] >> (column % 4 * 2) & 3;
    return two_bits | (lower[columns_ / 4 + column / 8] >> column % 8 & 1) << 2;
  }
  return codes_[place / 2] >> (place % 2 * 4) & 15;
}

void Source::set_codes(bool ones) { codes_.assign(codes_.size(), ones ? 0xff : 0); }

double Source::weight(int row, int column) const {
  const size_t place = static_cast<size_t>(row) * columns_ + column;
  if (bits_ == 16) return to_float(weights_[place]);
  const size_t group = place / group_size_;
  return (code(row, column) - (1 << (bits_ - 1))) * static_cast<double>(to_float(scales_[group])) +
         to_float(zeros_[group]);
}

namespace {

PackedMatrix describe(const std::vector<const Source*>& sources, int columns, int bits,
                      int group_size) {
  PackedMatrix matrix;
  for (const Source* source : sources) matrix.rows += source->rows();
  matrix.columns =
      bits == 16 ? (columns + kInputBlock - 1) / kInputBlock * kInputBlock : columns;
  matrix.bits = bits;
  matrix.group_size = group_size;
  matrix.panel_bytes = panel_bytes(columns, bits, group_size);
  return matrix;
}

size_t row_bytes(const KernelSet& kernels, const PackedMatrix& matrix) {
  return matrix.bits == 16 ? kernels.pairs_bytes(matrix.columns)
                           : kernels.fixed_bytes(matrix.columns, matrix.group_size);
}

}  // namespace

Packed::Packed(const std::vector<const Source*>& sources, bool interleaved, int columns, int bits,
               int group_size)
    : matrix(describe(sources, columns, bits, group_size)),
      memory_(matrix.panel_bytes * static_cast<size_t>(matrix.panels())) {
  std::vector<SourceMatrix> matrices;
  for (const Source* source : sources) matrices.push_back(source->matrix());
  pack_panels(matrices, interleaved, columns, bits, group_size, 0, matrix.panels(),
              memory_.as<uint8_t>());
  matrix.data = memory_.as<uint8_t>();
}

Inputs::Inputs(const KernelSet& kernels, const PackedMatrix& matrix, const std::vector<float>& x,
               int rows, int columns)
    : stride(row_bytes(kernels, matrix)), memory_(stride * static_cast<size_t>(rows)) {
  const Guarded copy(static_cast<size_t>(columns) * sizeof(float));
  for (int r = 0; r < rows; ++r) {
    for (int k = 0; k < columns; ++k)
      copy.as<float>()[k] = x[static_cast<size_t>(r) * columns + k];
    uint8_t* out = memory_.as<uint8_t>() + stride * static_cast<size_t>(r);
    if (matrix.bits == 16)
      kernels.prepare_pairs(copy.as<float>(), columns, out);
    else
      kernels.prepare_fixed(copy.as<float>(), columns, matrix.group_size, out);
  }
}

}  // namespace river::test
