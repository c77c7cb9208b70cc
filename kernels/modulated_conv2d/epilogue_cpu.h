// Rows of the epilogue on the CPU, for maps read from memory and for those that a filter has just left.
#pragma once

#include "common/rows_cpu.h"
#include "modulated_conv2d/modulated_conv2d.h"

namespace sivae::modulated_conv2d {

// `many` <= CHUNK neighbours of one channel. noise, y, scaled: null where there is none or it is not wanted.
template <typename T, typename S, typename W>
void row(const Formula<W> f, const Channel<W> c, const S* x, const W* noise, int64_t many, T* __restrict y,
         T* __restrict scaled) {
  W result[CHUNK];  // f and c are copies: what may change behind a reference keeps g++ from vectorising
  if (noise) {
    for (int64_t i = 0; i < many; ++i) result[i] = activated(f, value(c, widen(x[i]), noise[i]));
  } else {
    for (int64_t i = 0; i < many; ++i) result[i] = activated(f, value(c, widen(x[i]), W(0)));
  }
  if (y) {
    for (int64_t i = 0; i < many; ++i) y[i] = narrow<T>(result[i]);
  }
  if (scaled) {
    for (int64_t i = 0; i < many; ++i) scaled[i] = narrow<T>(result[i] * c.next);
  }
}

}  // namespace sivae::modulated_conv2d
