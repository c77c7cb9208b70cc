// Sums with a fixed order: what a block's threads hold, then what blocks have written. Nothing is added atomically.
#pragma once

#include "common/launch.h"

namespace sivae {

// The sum over the block, for thread 0. All threads of the block must come here; their number is a multiple of 32.
__device__ inline double block_sum(double value) {
  __shared__ double warps[THREADS / 32];
  const unsigned thread = threadIdx.x;
  for (unsigned delta = 16; delta > 0; delta /= 2) value += __shfl_down_sync(0xffffffffu, value, delta);
  if (thread % 32 == 0) warps[thread / 32] = value;
  __syncthreads();
  double sum = 0;
  if (thread == 0) {
    for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) sum += warps[warp];
  }
  __syncthreads();
  return sum;
}

// out[row] = the sum of a row of `count` partial sums; one block a row.
template <typename W>
__global__ void __launch_bounds__(THREADS) sum_rows(const W* __restrict__ parts, int64_t count, W* __restrict__ out) {
  const W* row = parts + blockIdx.x * count;
  double sum = 0;
  for (int64_t k = threadIdx.x; k < count; k += THREADS) sum += row[k];
  sum = block_sum(sum);
  if (threadIdx.x == 0) out[blockIdx.x] = static_cast<W>(sum);
}

}  // namespace sivae
