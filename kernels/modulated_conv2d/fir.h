// The filter between a transposed convolution and the epilogue, and its derivative, along one axis:
//
//   u[o] = sum over t of taps[t] x[o + t - pad]        dx[i] = sum over t of taps[t] du[i - t + pad]
//
// with zeros outside. Zeros before and after are fewer than taps, so every output lies among what some inputs reach.
#pragma once

#include "common/portable.h"

namespace sivae::modulated_conv2d {

constexpr int TAPS = 4;

struct Span {
  int64_t in, out;  // pixels
  int32_t pad;      // zeros before the first
};

// Backward, pieces of the input share the work. The piece from .. to - 1 makes the outputs whose sums are its own, and
// the TAPS - 1 before these again. Output o is the own one of the piece that holds input o - pad, or of the first one.
SIVAE_HD bool owns(const Span& s, int64_t from, int64_t to, int64_t o) {
  const int64_t i = o - s.pad < 0 ? 0 : o - s.pad;
  return o >= 0 && o < s.out && i >= from && i < to;
}

// How an axis of `in` pixels is cut up into pieces of `most` at most, as equal as can be.
struct Pieces {
  int64_t count, length;
};

SIVAE_HD Pieces pieces_of(int64_t in, int64_t most) {
  const int64_t count = ceil_div(in, most), length = ceil_div(in, count);
  return {ceil_div(in, length), length};
}

SIVAE_HD int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The filter's element for tap (ty, tx): a convolution turns it round, `flip` does not.
SIVAE_HD int element(int ty, int tx, bool flip) {
  return flip ? ty * TAPS + tx : TAPS * TAPS - 1 - (ty * TAPS + tx);
}

}  // namespace sivae::modulated_conv2d
