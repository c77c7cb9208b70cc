// The end of both backward passes on a GPU: sums of pieces of the map become the gradients of scale, next, bias, strength.
#pragma once

#include "common/planes.h"
#include "common/reduce.h"
#include "modulated_conv2d/host.h"

namespace sivae::modulated_conv2d {

template <typename W>
struct Kept {
  W *scale, *next, *bias, *strength;  // bias, strength: (C, B), to be added up over the samples
  int64_t batch, channels;
  __device__ void operator()(int64_t b, int64_t c, const W (&total)[4]) const {
    scale[b * channels + c] = total[0];
    bias[c * batch + b] = total[1];
    strength[c * batch + b] = total[2];
    next[b * channels + c] = total[3];
  }
};

struct Results {
  Tensor scale, next, bias, strength;
};

// parts[(b channels + c) chunks + chunk][4]: sums of scale, bias, strength, next.
template <typename W>
void add_up(const Launcher& launch, const Call& call, const W* parts, int64_t chunks, const Results& to) {
  const Shape shape{call.x.batch, call.x.channels, call.x.space};
  const int64_t rows = shape.batch * shape.channels;
  const Tensor per_sample = empty_wide(call, {2, shape.channels, shape.batch});
  W *biases = write<W>(per_sample), *strengths = biases + rows;
  const Kept<W> end{write<W>(to.scale), write<W>(to.next), biases, strengths, shape.batch, shape.channels};
  launch(planes::gather<4, Kept<W>, W>, std::min(rows, launch.resident_blocks() * 8), dim3(32), parts, shape, chunks, end);
  launch(sum_rows<W>, shape.channels, dim3(THREADS), static_cast<const W*>(biases), shape.batch, write<W>(to.bias));
  launch(sum_rows<W>, int64_t{1}, dim3(THREADS), static_cast<const W*>(strengths), rows, write<W>(to.strength));
}

}  // namespace sivae::modulated_conv2d
