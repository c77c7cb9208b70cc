// Reductions on the CPU that g++ vectorises without leave to reorder sums: as many sums side by side as fill registers.
// Their order depends on the sizes alone, never on the number of threads.
#pragma once

#include <algorithm>

#include "common/moments.h"

namespace sivae {

constexpr int64_t CHUNK = 1024;   // numbers that stay in the first cache
constexpr int64_t COLUMNS = 64;   // channels worked on together where they are innermost
constexpr int64_t GRAIN = 1 << 15;  // elements a thread should at least have

// at least 1; how many pieces of `each` elements a thread should take.
inline int64_t pieces(int64_t each) { return GRAIN / std::max<int64_t>(each, 1) + 1; }

template <typename W>
W sum_of(const W* values, int64_t count) {
  constexpr int LANES = 32;
  W lane[LANES] = {};
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    for (int l = 0; l < LANES; ++l) lane[l] += values[i + l];
  }
  for (int l = 0; i + l < count; ++l) lane[l] += values[i + l];
  for (int half = LANES / 2; half; half /= 2) {
    for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
  }
  return lane[0];
}

// values become their squared distances from the mean.
template <typename W>
Moments<double> chunk_moments(W* values, int64_t count) {
  const W sum = sum_of(values, count);
  const W mean = sum / static_cast<W>(count);
  for (int64_t i = 0; i < count; ++i) {
    const W far = values[i] - mean;
    values[i] = far * far;
  }
  return {static_cast<double>(count), static_cast<double>(sum), static_cast<double>(sum_of(values, count))};
}

// Moments of `count` numbers; fill(from, many, W* to) writes some of them.
template <typename W, typename F>
Moments<double> row_moments(int64_t count, const F& fill) {
  W buffer[CHUNK];
  Moments<double> all{0, 0, 0};
  for (int64_t from = 0; from < count; from += CHUNK) {
    const int64_t many = std::min(CHUNK, count - from);
    fill(from, many, buffer);
    all = merge(all, chunk_moments(buffer, many));
  }
  return all;
}

// Moments of each of `columns` <= COLUMNS columns; fill(pixel, W* to) writes one row of them.
template <typename W, typename F>
void column_moments(int64_t pixels, int64_t columns, Moments<double>* all, const F& fill) {
  constexpr int64_t ROWS = 32;
  W rows[ROWS][COLUMNS], sum[COLUMNS], mean[COLUMNS], squares[COLUMNS];
  std::fill_n(all, columns, Moments<double>{0, 0, 0});
  for (int64_t from = 0; from < pixels; from += ROWS) {
    const int64_t many = std::min(ROWS, pixels - from);
    std::fill_n(sum, columns, W(0));
    std::fill_n(squares, columns, W(0));
    for (int64_t p = 0; p < many; ++p) {
      fill(from + p, rows[p]);
      for (int64_t c = 0; c < columns; ++c) sum[c] += rows[p][c];
    }
    for (int64_t c = 0; c < columns; ++c) mean[c] = sum[c] / static_cast<W>(many);
    for (int64_t p = 0; p < many; ++p) {
      for (int64_t c = 0; c < columns; ++c) squares[c] += (rows[p][c] - mean[c]) * (rows[p][c] - mean[c]);
    }
    for (int64_t c = 0; c < columns; ++c) {
      all[c] = merge(all[c], {static_cast<double>(many), static_cast<double>(sum[c]), static_cast<double>(squares[c])});
    }
  }
}

}  // namespace sivae
