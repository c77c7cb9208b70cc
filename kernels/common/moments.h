// Mean and variance in one pass that does not cancel: partial results carry squares around their own mean.
// Chan, Golub & LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
#pragma once

#include "common/portable.h"

namespace sivae {

// Of `count` numbers: their sum, and the sum of squared distances from their mean. Sums, not means, are merged, so that
// infinities and NaN go where a plain sum takes them.
template <typename W>
struct Moments {
  W count, sum, squares;
};

template <typename W>
SIVAE_HD Moments<W> merge(const Moments<W>& a, const Moments<W>& b) {
  if (a.count == 0) return b;
  if (b.count == 0) return a;
  const W count = a.count + b.count;
  const W apart = b.sum / b.count - a.sum / a.count;
  return {count, a.sum + b.sum, a.squares + b.squares + apart * apart * (a.count / count * b.count)};
}

// The numbers get(0) .. get(count - 1), which are asked for twice.
template <typename W, typename F>
SIVAE_HD Moments<W> moments_of(int count, const F& get) {
  W sum = 0;
  for (int i = 0; i < count; ++i) sum += get(i);
  const W mean = sum / static_cast<W>(count);
  W squares = 0;
  for (int i = 0; i < count; ++i) squares += (get(i) - mean) * (get(i) - mean);
  return {static_cast<W>(count), count > 0 ? sum : 0, count > 0 ? squares : 0};
}

}  // namespace sivae
