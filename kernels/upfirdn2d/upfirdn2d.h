// Which input pixels an output pixel is made of, along one axis: the whole index arithmetic of upfirdn2d.
//
// u is the input with up - 1 zeros after every pixel, padded. Output o reads u[o * down + t - pad] for t = 0 .. taps - 1,
// which is input pixel (o * down + t - pad) / up where that is whole and inside, and zero elsewhere. Zeros are never
// multiplied: a tap that meets one is skipped, so that infinities stay where the filter carries them.
#pragma once

#include "common/portable.h"

namespace sivae::upfirdn2d {

struct Axis {
  int64_t in, out;  // pixels
  int32_t up, down, taps;
  int32_t pad;  // zeros before the first pixel of u; negative crops
};

// The taps t = first, first + up, ... (count of them) meet the input pixels start, start + 1, ...
struct Reach {
  int64_t start;
  int32_t first, count;
};

SIVAE_HD int64_t out_size(int64_t in, int32_t up, int32_t down, int64_t pads, int32_t taps) {
  return (in * up + pads - taps) / down + 1;
}

SIVAE_HD Reach reach(const Axis& a, int64_t o) {
  const int64_t origin = o * a.down - a.pad;  // of tap 0, in u without its padding
  int64_t start = ceil_div(origin, a.up);
  start = start < 0 ? 0 : start;
  const int64_t first = start * a.up - origin;
  if (first >= a.taps || start >= a.in) return {0, 0, 0};
  const int64_t fit = (a.taps - 1 - first) / a.up + 1, left = a.in - start;
  return {start, static_cast<int32_t>(first), static_cast<int32_t>(fit < left ? fit : left)};
}

// The filter's element for tap t: a convolution turns the filter round, `flip` does not.
SIVAE_HD int32_t element(int32_t t, int32_t taps, bool flip) { return flip ? t : taps - 1 - t; }

// Output pixel (oy, ox) of one map, without the gain. x: its first element; f: (taps_y, taps_x), or (taps,) for both axes
// if one_dimensional, or null for ones.
template <typename T, typename W = Wide<T>>
SIVAE_HD W pixel(const T* x, int64_t row_stride, int64_t col_stride, const W* f, bool one_dimensional, const Axis& ay,
                 const Axis& ax, bool flip, int64_t oy, int64_t ox) {
  const Reach ry = reach(ay, oy), rx = reach(ax, ox);
  W sum = 0;
  for (int32_t j = 0; j < ry.count; ++j) {
    const T* row = x + (ry.start + j) * row_stride + rx.start * col_stride;
    const int32_t fy = element(ry.first + j * ay.up, ay.taps, flip);
    for (int32_t i = 0; i < rx.count; ++i) {
      const int32_t fx = element(rx.first + i * ax.up, ax.taps, flip);
      const W weight = !f ? W(1) : one_dimensional ? f[fy] * f[fx] : f[fy * ax.taps + fx];
      sum += widen(row[i * col_stride]) * weight;
    }
  }
  return sum;
}

// R neighbouring outputs of one axis from the inputs they share, everything about the taps known when compiling.
// P: where tap 0 of the first output lies between two input pixels, (pad - o * down) mod up. Input j meets tap
// up * j + P - r * down of output r; sum[r] is added to for the taps there are.
template <int UP, int DOWN, int TAPS, int P, int R>
struct Block {
  static constexpr int inputs = ((R - 1) * DOWN + TAPS - 1 - P) / UP + 1;

  // Adds all inputs: value(integral_constant<j>) is the j-th.
  template <int J, typename F, typename W>
  static SIVAE_HD void each(const F& value, const W (&w)[TAPS], W (&sum)[R]) {
    add_to<J, 0>(value(std::integral_constant<int, J>{}), w, sum);
    if constexpr (J + 1 < inputs) each<J + 1>(value, w, sum);
  }

 private:
  template <int J, int r, typename W>
  static SIVAE_HD void add_to(W value, const W (&w)[TAPS], W (&sum)[R]) {
    constexpr int t = UP * J + P - r * DOWN;
    if constexpr (t >= 0 && t < TAPS) sum[r] += value * w[t];
    if constexpr (r + 1 < R) add_to<J, r + 1>(value, w, sum);
  }
};

// Splits a filter of n x n taps into column and row factors, f[i][j] = fy[i] * fx[j], if that holds to rounding.
template <int N, typename W>
SIVAE_HD bool separate(const W* f, W (&fy)[N], W (&fx)[N]) {
  int top = 0;
  for (int k = 1; k < N * N; ++k) {
    if ((f[k] < 0 ? -f[k] : f[k]) > (f[top] < 0 ? -f[top] : f[top])) top = k;
  }
  const W pivot = f[top];
  const W size = pivot < 0 ? -pivot : pivot;
  if (!(size > 0)) return false;
  bool exact = true;
  for (int i = 0; i < N; ++i) {
    fy[i] = f[i * N + top % N];
    fx[i] = f[top / N * N + i] / pivot;
  }
  for (int k = 0; k < N * N; ++k) {
    const W miss = fy[k / N] * fx[k % N] - f[k];
    exact = exact && (miss < 0 ? -miss : miss) <= size * W(sizeof(W) == 8 ? 1e-15 : 2.5e-7);
  }
  return exact;
}

}  // namespace sivae::upfirdn2d
