// Passes over feature maps on a GPU: elementwise work whose constants belong to a channel of a sample, with sums over
// pixels in a fixed order. Every block works on a piece of the pixels and writes the sums of its piece; `gather` adds
// these up. Contiguous maps: packs of 16 bytes along the pixels, several channels a block, which find the noise they share
// in the first cache. channels_last: packs along the channels.
//
// A pass F has: T; IN, OUT, SUMS (numbers of maps read and written, and of sums); MOMENTS (its value's mean and squares
// are wanted instead); `const T* in(int)`, `T* out(int)`; Channel and channel(b, c); beside<V, LAST>(channels, b, c, p,
// values), one more value for each of V neighbours, and group(), how many channels share what that reads;
// operator()(channel, values read, value beside, values to write, sums to add to).
#pragma once

#include "common/launch.h"
#include "common/moments.h"
#include "common/place.h"

namespace sivae::planes {

constexpr int ROUNDS = 4;        // packs of a map that a thread reads in a row
constexpr int GROUP = 8;         // channels of a block that share what all of them read

// V neighbours, moved 16 bytes at a time if they fill them.
template <int V, typename T>
struct Few {
  T item[V];
};

template <int V, typename T>
__device__ inline Few<V, T> load(const T* from) {
  Few<V, T> few;
  constexpr int P = Pack<T>::size;
  if constexpr (V % P == 0) {
#pragma unroll
    for (int p = 0; p < V / P; ++p) {
      const Pack<T> pack = reinterpret_cast<const Pack<T>*>(from)[p];
#pragma unroll
      for (int i = 0; i < P; ++i) few.item[p * P + i] = pack.item[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) few.item[i] = from[i];
  }
  return few;
}

template <int V, typename T>
__device__ inline void store(const Few<V, T>& few, T* to) {
  constexpr int P = Pack<T>::size;
  if constexpr (V == P) {
    Pack<T> pack;
#pragma unroll
    for (int i = 0; i < P; ++i) pack.item[i] = few.item[i];
    *reinterpret_cast<Pack<T>*>(to) = pack;
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) to[i] = few.item[i];
  }
}

template <typename F>
constexpr int parts_of() {
  return F::MOMENTS ? 2 : F::SUMS;
}

template <int N>
constexpr int some() {
  return N > 0 ? N : 1;
}

// One pack through the pass: reads, calls, writes; the values written are left in `o`. C: one channel, or V.
template <int V, bool LAST, typename F, typename C, typename W = Wide<typename F::T>>
__device__ inline void step(const F& f, const C* channel, const Shape& shape, int64_t b, int64_t c, int64_t p,
                            W (&o)[V][some<F::OUT>()], W (&s)[LAST ? V : 1][some<F::SUMS>()]) {
  using T = typename F::T;
  const int64_t at = LAST ? shape.in_last(b, c, p) : shape.in_plane(b, c, p);
  Few<V, T> read_[some<F::IN>()];
#pragma unroll
  for (int k = 0; k < F::IN; ++k) read_[k] = load<V>(f.in(k) + at);
  W beside[V] = {};
  f.template beside<V, LAST>(channel, b, c, p, beside);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    W v[some<F::IN>()];
#pragma unroll
    for (int k = 0; k < F::IN; ++k) v[k] = widen(read_[k].item[i]);
    f(channel[LAST ? i : 0], v, beside[i], o[i], s[LAST ? i : 0]);
  }
  if constexpr (F::OUT > 0 && !F::MOMENTS) {
#pragma unroll
    for (int k = 0; k < F::OUT; ++k) {
      Few<V, T> few;
#pragma unroll
      for (int i = 0; i < V; ++i) few.item[i] = narrow<T>(o[i][k]);
      store(few, f.out(k) + at);
    }
  }
}

// The block's sum of each of `value`, for thread 0; over the threads of a warp, then over warps. Whole blocks only.
template <int K, typename W>
__device__ inline void block_sums(W (&value)[K]) {
  __shared__ W warps[K][THREADS / 32];
  const unsigned thread = threadIdx.x;
  for (unsigned delta = 16; delta > 0; delta /= 2) {
#pragma unroll
    for (int k = 0; k < K; ++k) value[k] += __shfl_down_sync(0xffffffffu, value[k], delta);
  }
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (thread % 32 == 0) warps[k][thread / 32] = value[k];
  }
  __syncthreads();
  if (thread == 0) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      for (unsigned warp = 1; warp < blockDim.x / 32; ++warp) value[k] += warps[k][warp];
    }
  }
  __syncthreads();
}

// The merged moments of 32 neighbouring threads, for the first of them.
template <typename W>
__device__ inline Moments<W> warp_merged(Moments<W> m) {
  for (unsigned delta = 16; delta > 0; delta /= 2) {
    const Moments<W> other{__shfl_down_sync(0xffffffffu, m.count, delta), __shfl_down_sync(0xffffffffu, m.sum, delta),
                           __shfl_down_sync(0xffffffffu, m.squares, delta)};
    if (threadIdx.x % 32 + delta < 32) m = merge(m, other);
  }
  return m;
}

template <typename W>
__device__ inline Moments<W> block_merged(Moments<W> m) {
  __shared__ Moments<W> warps[THREADS / 32];
  m = warp_merged(m);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = m;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (unsigned warp = 1; warp < blockDim.x / 32; ++warp) m = merge(m, warps[warp]);
  }
  __syncthreads();
  return m;
}

// Contiguous maps. parts[(b channels + c) chunks + chunk][k].
template <int V, typename F, typename W = Wide<typename F::T>>
__global__ void __launch_bounds__(THREADS, 2) rows(F f, Shape shape, int64_t chunks, int group, W* parts) {
  constexpr int K = parts_of<F>();
  const int64_t groups = (shape.channels + group - 1) / group, length = int64_t{ROUNDS} * blockDim.x * V;
  for (int64_t unit = blockIdx.x; unit < shape.batch * groups * chunks; unit += gridDim.x) {
    const Unit at = unit_of(unit, chunks, groups);
    const int64_t chunk = at.inner, g = at.middle, b = at.sample;
    const int64_t from = chunk * length + static_cast<int64_t>(threadIdx.x) * V;
    const int64_t last = (g + 1) * group < shape.channels ? (g + 1) * group : shape.channels;
    for (int64_t c = g * group; c < last; ++c) {
      const typename F::Channel channel = f.channel(b, c);
      W o[ROUNDS][V][some<F::OUT>()], s[1][some<F::SUMS>()] = {};
      int many = 0;
#pragma unroll
      for (int r = 0; r < ROUNDS; ++r) {
        const int64_t p = from + static_cast<int64_t>(r) * blockDim.x * V;
        if (p < shape.space) {
          step<V, false>(f, &channel, shape, b, c, p, o[r], s);
          many = (r + 1) * V;
        }
      }
      const int64_t part = (b * shape.channels + c) * chunks + chunk;
      if constexpr (F::MOMENTS) {
        W sum = 0, squares = 0;
#pragma unroll
        for (int i = 0; i < ROUNDS * V; ++i) sum += i < many ? o[i / V][i % V][0] : W(0);
        const W mean = sum / static_cast<W>(many);
#pragma unroll
        for (int i = 0; i < ROUNDS * V; ++i) {
          const W far = o[i / V][i % V][0] - mean;
          squares += i < many ? far * far : W(0);
        }
        const Moments<W> all = block_merged(Moments<W>{static_cast<W>(many), sum, squares});
        if (threadIdx.x == 0) {
          parts[part * K] = all.sum;
          parts[part * K + 1] = all.squares;
        }
      } else if constexpr (F::SUMS > 0) {
        block_sums(s[0]);
        if (threadIdx.x == 0) {
#pragma unroll
          for (int k = 0; k < K; ++k) parts[part * K + k] = s[0][k];
        }
      }
    }
  }
}

// channels_last maps; `across` packs of channels side by side in a block, a divisor of its threads.
template <int V, typename F, typename W = Wide<typename F::T>>
__global__ void __launch_bounds__(THREADS, 2) columns(F f, Shape shape, int64_t chunks, int across, W* parts) {
  constexpr int K = parts_of<F>();
  __shared__ W shared[some<K>()][THREADS * V];
  const int thread = static_cast<int>(threadIdx.x), column = thread % across, row = thread / across;
  const int down = THREADS / across, width = across * V;
  const int64_t tiles = (shape.channels + width - 1) / width, length = int64_t{ROUNDS} * down;
  for (int64_t unit = blockIdx.x; unit < shape.batch * tiles * chunks; unit += gridDim.x) {
    const Unit at = unit_of(unit, tiles, chunks);
    const int64_t tile = at.inner, chunk = at.middle, b = at.sample;
    const int64_t c = tile * width + column * V, left = shape.space - chunk * length;
    W o[ROUNDS][V][some<F::OUT>()], s[V][some<F::SUMS>()] = {};
    if (c < shape.channels) {
      typename F::Channel channel[V];
#pragma unroll
      for (int i = 0; i < V; ++i) channel[i] = f.channel(b, c + i);
#pragma unroll
      for (int r = 0; r < ROUNDS; ++r) {
        const int64_t p = chunk * length + r * down + row;
        if (p < shape.space) {
          step<V, true>(f, channel, shape, b, c, p, o[r], s);
        }
      }
    }
    if constexpr (K > 0) {
      const auto rounds_of = [&](int at) {  // pixels that the threads of row `at` have seen
        const int64_t seen = (left - at + down - 1) / down;
        return static_cast<int>(seen < 0 ? 0 : seen < ROUNDS ? seen : ROUNDS);
      };
      if (c < shape.channels) {
        const int many = rounds_of(row);
#pragma unroll
        for (int i = 0; i < V; ++i) {
          if constexpr (F::MOMENTS) {
            W sum = 0, squares = 0;
#pragma unroll
            for (int r = 0; r < ROUNDS; ++r) sum += r < many ? o[r][i][0] : W(0);
            const W mean = sum / static_cast<W>(many);
#pragma unroll
            for (int r = 0; r < ROUNDS; ++r) {
              const W far = o[r][i][0] - mean;
              squares += r < many ? far * far : W(0);
            }
            shared[0][row * width + column * V + i] = sum;
            shared[1][row * width + column * V + i] = squares;
          } else {
#pragma unroll
            for (int k = 0; k < K; ++k) shared[k][row * width + column * V + i] = s[i][k];
          }
        }
      }
      __syncthreads();
      for (int w = thread; w < width; w += THREADS) {
        if (tile * width + w >= shape.channels) continue;
        const int64_t part = ((b * shape.channels + tile * width + w) * chunks + chunk) * K;
        if constexpr (F::MOMENTS) {
          Moments<W> all{0, 0, 0};
          for (int r = 0; r < down; ++r) {
            all = merge(all, Moments<W>{static_cast<W>(rounds_of(r)), shared[0][r * width + w], shared[1][r * width + w]});
          }
          parts[part] = all.sum;
          parts[part + 1] = all.squares;
        } else {
#pragma unroll
          for (int k = 0; k < K; ++k) {
            W sum = 0;
            for (int r = 0; r < down; ++r) sum += shared[k][r * width + w];
            parts[part + k] = sum;
          }
        }
      }
      __syncthreads();
    }
  }
}

// Adds up the parts of every channel of every sample, a warp each, and hands the totals to end(b, c, totals).
template <int K, typename E, typename W>
__global__ void __launch_bounds__(32) gather(const W* parts, Shape shape, int64_t chunks, E end) {
  for (int64_t k = blockIdx.x; k < shape.batch * shape.channels; k += gridDim.x) {
    W total[K] = {};
    for (int64_t chunk = threadIdx.x; chunk < chunks; chunk += 32) {
#pragma unroll
      for (int i = 0; i < K; ++i) total[i] += parts[(k * chunks + chunk) * K + i];
    }
    block_sums(total);
    if (threadIdx.x == 0) end(k / shape.channels, k % shape.channels, total);
  }
}

// The same for moments; `length` numbers a part, fewer in the last. The totals are mean and variance.
template <typename E, typename W>
__global__ void __launch_bounds__(32)
    gather_moments(const W* parts, Shape shape, int64_t chunks, int64_t length, E end) {
  for (int64_t k = blockIdx.x; k < shape.batch * shape.channels; k += gridDim.x) {
    Moments<W> all{0, 0, 0};
    for (int64_t chunk = threadIdx.x; chunk < chunks; chunk += 32) {
      const int64_t left = shape.space - chunk * length, at = (k * chunks + chunk) * 2;
      all = merge(all, Moments<W>{static_cast<W>(left < length ? left : length), parts[at], parts[at + 1]});
    }
    all = warp_merged(all);
    const W total[2] = {all.sum / all.count, all.squares / all.count};
    if (threadIdx.x == 0) end(k / shape.channels, k % shape.channels, total);
  }
}

// Sums over the samples: out[c] = sum over b of from[b channels + c], in order.
template <typename W>
__global__ void __launch_bounds__(THREADS) over_samples(const W* from, Shape shape, W* out) {
  for (int64_t c = blockIdx.x * int64_t{THREADS} + threadIdx.x; c < shape.channels; c += gridDim.x * int64_t{THREADS}) {
    W sum = 0;
    for (int64_t b = 0; b < shape.batch; ++b) sum += from[b * shape.channels + c];
    out[c] = sum;
  }
}

// How a map is cut up: the same for every pass over it.
struct Cut {
  bool last, packs;  // packs: whole packs of 16 bytes everywhere
  int threads, across;
  int64_t length, chunks;
};

template <typename T>
Cut cut(const Shape& shape, bool last, bool all_aligned) {
  constexpr int V = Pack<T>::size;
  const bool packs = all_aligned && (last ? shape.channels : shape.space) % V == 0;
  const int64_t v = packs ? V : 1;
  Cut made{last, packs, THREADS, 1, 0, 0};
  if (last) {
    while (made.across < 32 && made.across * v < shape.channels) made.across *= 2;
    made.length = int64_t{ROUNDS} * (THREADS / made.across);
  } else {
    while (made.threads > 32 && made.threads / 2 * v * ROUNDS >= shape.space) made.threads /= 2;
    made.length = int64_t{ROUNDS} * made.threads * v;
  }
  made.chunks = (shape.space + made.length - 1) / made.length;
  return made;
}

// Runs a pass over all of a map.
template <typename F, typename W = Wide<typename F::T>>
void pass(const Launcher& launch, const F& f, const Shape& shape, const Cut& how, W* parts) {
  constexpr int V = Pack<typename F::T>::size;
  const int group = f.group();
  const int64_t width = how.last ? how.across * (how.packs ? V : 1) : group;  // channels a block
  const int64_t many = shape.batch * how.chunks * ((shape.channels + width - 1) / width);
  const int64_t blocks = std::min(many, launch.resident_blocks() * 16);
  const dim3 block(static_cast<unsigned>(how.threads));
  if (how.last) {
    how.packs ? launch(columns<V, F, W>, blocks, block, f, shape, how.chunks, how.across, parts)
              : launch(columns<1, F, W>, blocks, block, f, shape, how.chunks, how.across, parts);
  } else {
    how.packs ? launch(rows<V, F, W>, blocks, block, f, shape, how.chunks, group, parts)
              : launch(rows<1, F, W>, blocks, block, f, shape, how.chunks, group, parts);
  }
}

}  // namespace sivae::planes
