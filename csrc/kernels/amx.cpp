// Intel's tile unit for products of bfloat16: a panel's 32 inputs x 16 outputs are one tile as they
// lie in memory, and sixteen rows cost no more than one. The tile unit sums the pairs of a block in
// order and the blocks in order, whatever the number of rows.
#define RIVER_VNNI
#include "simd_avx512.h"

#include "kernels.inc.h"

namespace river {
namespace {

constexpr int kTileRows = 16;
constexpr size_t kTileBytes = 1024;
constexpr int kTilePrefetchBytes = 2048;  // a tile takes longer than its vectors would: less ahead
constexpr size_t kPanelGroupBytes = 512u << 10;  // weights that stay in the second level cache

struct TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes_per_row[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0-3: sums [row tile][panel]; 4, 5: activations; 6, 7: weights.
void configure_tiles(int first_rows, int second_rows) {
  TileConfig config;
  const int rows[8] = {first_rows, first_rows,  second_rows, second_rows,
                       first_rows, second_rows, kTileRows,   kTileRows};
  for (int i = 0; i < 8; ++i) {
    config.bytes_per_row[i] = 64;
    config.rows[i] = static_cast<uint8_t>(rows[i]);
  }
  _tile_loadconfig(&config);
}

size_t tile_pairs_bytes(int columns) {
  return sizeof(bf16) * static_cast<size_t>(round_up(columns, kInputBlock));
}

void prepare_tile_pairs(const float* x, int count, void* out) {
  auto* rounded = static_cast<bf16*>(out);
  int i = 0;
  for (; i + 16 <= count; i += 16) {
    const __m512i halves = _mm512_srli_epi32(upper_halves(load(x + i)), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(rounded + i), _mm512_cvtepi32_epi16(halves));
  }
  for (; i < count; ++i) rounded[i] = to_bf16(x[i]);
  for (; i < round_up(count, kInputBlock); ++i) rounded[i] = 0;
}

// Up to 2 x 16 rows times one or two panels.
template <int RowTiles, int Panels>
void multiply_tiles(const uint8_t* panel, size_t panel_bytes, int blocks, const uint8_t* x,
                    size_t x_stride, float* out, size_t out_stride) {
  const uint8_t* second_x = x + kTileRows * x_stride;
  const uint8_t* second_panel = panel + panel_bytes;
  _tile_zero(0);
  if constexpr (Panels == 2) _tile_zero(1);
  if constexpr (RowTiles == 2) _tile_zero(2);
  if constexpr (RowTiles == 2 && Panels == 2) _tile_zero(3);
  for (int b = 0; b < blocks; ++b) {
    const size_t offset = b * kTileBytes;
    if constexpr (RowTiles == 1 && Panels == 1)
      for (size_t line = 0; line < kTileBytes; line += 64)
        prefetch(panel + offset + kTilePrefetchBytes + line);
    _tile_loadd(6, panel + offset, 64);
    _tile_loadd(4, x + b * 64, x_stride);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (Panels == 2) {
      _tile_loadd(7, second_panel + offset, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (RowTiles == 2) {
      _tile_loadd(5, second_x + b * 64, x_stride);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (Panels == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  const size_t stride = out_stride * sizeof(float);
  _tile_stored(0, out, stride);
  if constexpr (Panels == 2) _tile_stored(1, out + kLanes, stride);
  if constexpr (RowTiles == 2) _tile_stored(2, out + kTileRows * out_stride, stride);
  if constexpr (RowTiles == 2 && Panels == 2)
    _tile_stored(3, out + kTileRows * out_stride + kLanes, stride);
}

// Panels [first, last) times at most 32 rows, for which the tiles are configured.
template <int RowTiles>
void multiply_rows(const PackedMatrix& matrix, int first, int last, const uint8_t* x,
                   size_t x_stride, float* out, size_t out_stride) {
  const int blocks = matrix.columns / kInputBlock;
  int p = first;
  if constexpr (RowTiles == 2)
    for (; p + 2 <= last; p += 2)
      multiply_tiles<2, 2>(matrix.panel(p), matrix.panel_bytes, blocks, x, x_stride,
                           out + p * kLanes, out_stride);
  for (; p < last; ++p)
    multiply_tiles<RowTiles, 1>(matrix.panel(p), matrix.panel_bytes, blocks, x, x_stride,
                                out + p * kLanes, out_stride);
}

void tile_matmul(const PackedMatrix& matrix, int first, int last, const void* x, size_t x_stride,
                 int rows, float* out, size_t out_stride) {
  if (matrix.bits != 16) {
    matmul(matrix, first, last, x, x_stride, rows, out, out_stride);
    return;
  }
  const auto* inputs = static_cast<const uint8_t*>(x);
  // few rows: one pass over the weights; many: the weights in groups that stay in the cache
  int group = last - first;
  if (rows > 2 * kTileRows) {
    const auto fitting = static_cast<int>(kPanelGroupBytes / matrix.panel_bytes);
    group = fitting < 2 ? 2 : fitting;
  }
  for (int start = first; start < last; start += group) {
    const int end = start + group < last ? start + group : last;
    for (int r = 0; r < rows; r += 2 * kTileRows) {
      const int count = rows - r < 2 * kTileRows ? rows - r : 2 * kTileRows;
      const int first_rows = count < kTileRows ? count : kTileRows;
      const int second_rows = count - first_rows;
      configure_tiles(first_rows, second_rows > 0 ? second_rows : 1);
      if (second_rows > 0)
        multiply_rows<2>(matrix, start, end, inputs + r * x_stride, x_stride,
                         out + r * out_stride, out_stride);
      else
        multiply_rows<1>(matrix, start, end, inputs + r * x_stride, x_stride,
                         out + r * out_stride, out_stride);
    }
  }
  _tile_release();
}

constexpr KernelSet make_amx_kernel_set() {
  KernelSet set = make_kernel_set("amx");
  set.pairs_bytes = tile_pairs_bytes;
  set.prepare_pairs = prepare_tile_pairs;
  set.matmul = tile_matmul;
  return set;
}

}  // namespace

extern const KernelSet amx_kernels;
constinit const KernelSet amx_kernels = make_amx_kernel_set();
}  // namespace river
