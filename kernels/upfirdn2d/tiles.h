// The kernels of upfirdn2d on a GPU, for whoever goes on with their sums: an End is called with them in place of a store.
//
// Four taps along each axis, 2x up, 2x down or neither, in 4 and 2 byte types:
//   contiguous     a block makes a tile of output rows: one vertical pass from memory (16-byte loads) into shared memory,
//                  one horizontal pass from there to memory (16-byte stores);
//   channels_last  a thread makes 2 x 2 pixels of 16 bytes of channels in registers; the cache serves the overlap.
// A filter of 4 x 4 taps is split into its two factors by every block; where that cannot be, the block goes pixel by pixel.
// Everything else: a thread an output element.
//
// An End has operator()<LAST>(outer, c, p, at, sum, many, packs): the first `many` of `sum` are, for contiguous maps,
// neighbours from pixel p on of plane `outer` (c does not count); for channels_last, channels from c on of pixel p of sample
// `outer`. `at` is the place of the first in the result; packs: they fill 16 bytes there, which are aligned.
#pragma once

#include "common/launch.h"
#include "upfirdn2d/host.h"

namespace sivae::upfirdn2d {

constexpr int TAPS = 4;

struct Filter {
  const float* f;
  bool one_dimensional, flip;
  float gain;
};

// The factors by tap in shared memory, the gain in the vertical one. Ends with a barrier.
struct Factors {
  float y[TAPS], x[TAPS];
  bool separable;
};

__device__ inline void split(const Filter& filter, Factors& shared) {
  if (threadIdx.x == 0 && threadIdx.y == 0) {
    float fy[TAPS], fx[TAPS];
    bool separable = true;
    if (filter.one_dimensional) {
      for (int t = 0; t < TAPS; ++t) fy[t] = fx[t] = filter.f[t];
    } else {
      separable = separate<TAPS>(filter.f, fy, fx);
    }
    shared.separable = separable;
    for (int t = 0; separable && t < TAPS; ++t) {
      shared.y[t] = fy[element(t, TAPS, filter.flip)] * filter.gain;
      shared.x[t] = fx[element(t, TAPS, filter.flip)];
    }
  }
  __syncthreads();
}

// ---- contiguous maps

template <typename T, int UP, int DOWN>
struct Tile {
  static constexpr int pack = Pack<T>::size;
  static constexpr int step = pack * DOWN / UP;  // input columns from one thread's first output to the next one's
  static constexpr int group = step % 4 == 0 ? 4 : 2;  // floats that are read at once: 16 or 8 bytes
  static constexpr int narrowest = 2;  // threads across
  // Packs of input columns for `across` threads: what the outputs span, the taps, and the way to a multiple of 16 bytes.
  static SIVAE_HD constexpr int packs(int across) { return (across * step + TAPS + pack - 2) / pack + 1; }
  static SIVAE_HD constexpr int pitch(int across) { return skewed(packs(across) * pack) + 4; }
  // Four words after every 32: threads that are 32, 16 or 8 words apart read different banks.
  static SIVAE_HD constexpr int skewed(int i) { return i + i / 32 * 4; }
  static constexpr int largest(int across) { return THREADS / across * pitch(across); }
  static constexpr int shared = largest(narrowest) > largest(16) ? largest(narrowest) : largest(16);
};

// Weighted sum of the input rows that output row oy reaches, for the pack of columns that begins at cx.
template <typename T, int UP, int DOWN>
__device__ inline void column_sums(const T* plane, const Axis& ay, const Axis& ax, const float (&w)[TAPS], int oy, int cx,
                                   bool whole_packs, float (&sum)[Pack<T>::size]) {
  constexpr int V = Pack<T>::size;
  for (int i = 0; i < V; ++i) sum[i] = 0.0f;
  const int in_w = static_cast<int>(ax.in), in_h = static_cast<int>(ay.in);
  if (cx >= in_w || cx + V <= 0) return;
  const int origin = oy * DOWN - ay.pad, odd = UP == 2 ? origin & 1 : 0, first = (origin + odd) / UP;
#pragma unroll
  for (int j = 0; j < TAPS / UP; ++j) {
    const int iy = first + j;
    if (iy < 0 || iy >= in_h) continue;
    const float weight = UP == 2 ? (odd ? w[2 * j + 1] : w[2 * j]) : w[j];
    const T* row = plane + static_cast<int64_t>(iy) * in_w;
    if (whole_packs) {
      const Pack<T> loaded = *reinterpret_cast<const Pack<T>*>(row + cx);
#pragma unroll
      for (int i = 0; i < V; ++i) sum[i] += widen(loaded.item[i]) * weight;
    } else {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        if (cx + i >= 0 && cx + i < in_w) sum[i] += widen(row[cx + i]) * weight;
      }
    }
  }
}

// One thread's outputs of a row. `from` is a multiple of the group; the first input is OFF after it.
template <typename T, int UP, int DOWN, int P, int OFF>
__device__ inline void row_outputs(const float* row, int from, const float (&w)[TAPS], float (&sum)[Pack<T>::size]) {
  using Tiling = Tile<T, UP, DOWN>;
  using Sums = Block<UP, DOWN, TAPS, P, Pack<T>::size>;
  constexpr int G = Tiling::group, groups = (OFF + Sums::inputs + G - 1) / G;
  struct alignas(4 * G) Group {
    float item[G];
  };
  Group value[groups];
#pragma unroll
  for (int g = 0; g < groups; ++g) value[g] = *reinterpret_cast<const Group*>(row + Tiling::skewed(from + g * G));
  for (int i = 0; i < Pack<T>::size; ++i) sum[i] = 0.0f;
  Sums::template each<0>([&](auto j) { return value[(OFF + j) / G].item[(OFF + j) % G]; }, w, sum);
}

template <typename T, int UP, int DOWN, int P>
__device__ inline void row_outputs_at(const float* row, int from, const float (&w)[TAPS], float (&sum)[Pack<T>::size]) {
  constexpr int G = Tile<T, UP, DOWN>::group;
  const int off = from % G, base = from - off;  // off is the same for the whole grid
  if (off == 0) {
    row_outputs<T, UP, DOWN, P, 0>(row, base, w, sum);
  } else if (off == 1) {
    row_outputs<T, UP, DOWN, P, 1>(row, base, w, sum);
  } else if (G == 4 && off == 2) {
    row_outputs<T, UP, DOWN, P, G == 4 ? 2 : 0>(row, base, w, sum);
  } else {
    row_outputs<T, UP, DOWN, P, G == 4 ? 3 : 0>(row, base, w, sum);
  }
}

template <typename T, int UP, int DOWN, typename End>
__global__ void __launch_bounds__(THREADS, 3)
    tiles(const T* __restrict__ x, End end, Filter filter, Axis ay, Axis ax, int64_t rows, int across, bool load_packs,
          bool store_packs) {
  using Tiling = Tile<T, UP, DOWN>;
  constexpr int V = Pack<T>::size;
  alignas(16) __shared__ float sums[Tiling::shared];
  __shared__ Factors factors;
  split(filter, factors);

  const int thread = static_cast<int>(threadIdx.x), down = THREADS / across;
  const int packs = Tiling::packs(across), pitch = Tiling::pitch(across), width = across * V;
  const int out_h = static_cast<int>(ay.out), out_w = static_cast<int>(ax.out);
  const int tiles_across = (out_w + width - 1) / width;
  const int64_t tiles_down = (rows + down - 1) / down, plane_in = ay.in * ax.in;

  for (int64_t tile = blockIdx.x; tile < tiles_down * tiles_across; tile += gridDim.x) {
    const int64_t row0 = tile / tiles_across * down;
    const int ox0 = static_cast<int>(tile % tiles_across) * width;
    if (!factors.separable) {
      for (int k = thread; k < down * width; k += THREADS) {
        const int64_t row = row0 + k / width;
        const int ox = ox0 + k % width;
        if (row >= rows || ox >= out_w) continue;
        const T* plane = x + row / out_h * plane_in;
        float sum[1] = {pixel(plane, ax.in, int64_t{1}, filter.f, false, ay, ax, filter.flip, row % out_h, ox)};
        sum[0] *= filter.gain;
        end.template operator()<false>(row / out_h, 0, row % out_h * out_w + ox, row * out_w + ox, sum, 1, false);
      }
      continue;
    }
    // The first input column of the tile, and the multiple of a pack below it.
    const int origin = ox0 * DOWN - ax.pad, odd = UP == 2 ? origin & 1 : 0, first = (origin + odd) / UP;
    const int start = first >= 0 ? first / V * V : -((-first + V - 1) / V * V);
    for (int k = thread; k < down * packs; k += THREADS) {
      const int r = k / packs, p = k % packs;
      const int64_t row = row0 + r;
      if (row >= rows) continue;
      float sum[V];
      column_sums<T, UP, DOWN>(x + row / out_h * plane_in, ay, ax, factors.y, static_cast<int>(row % out_h),
                               start + p * V, load_packs, sum);
#pragma unroll
      for (int i = 0; i < V; i += 4) {
        Pack<float> four;
        for (int j = 0; j < 4; ++j) four.item[j] = sum[i + j];
        *reinterpret_cast<Pack<float>*>(sums + r * pitch + Tiling::skewed(p * V + i)) = four;
      }
    }
    __syncthreads();
    const int r = thread / across, column = thread % across, ox = ox0 + column * V;
    const int64_t row = row0 + r;
    if (row < rows && ox < out_w) {
      const float* from = sums + r * pitch;
      const int at = first - start + column * Tiling::step;
      float sum[V];
      if (odd) {
        row_outputs_at<T, UP, DOWN, UP == 2 ? 1 : 0>(from, at, factors.x, sum);
      } else {
        row_outputs_at<T, UP, DOWN, 0>(from, at, factors.x, sum);
      }
      const int many = out_w - ox < V ? out_w - ox : V;
      end.template operator()<false>(row / out_h, 0, row % out_h * out_w + ox, row * out_w + ox, sum, many, store_packs);
    }
    __syncthreads();
  }
}

// ---- channels_last maps

// 2 x 2 output pixels of one pack of channels; PY, PX: where tap 0 lies between input pixels.
template <typename T, int UP, int DOWN, int PY, int PX>
__device__ inline void patch(const T* map, const Axis& ay, const Axis& ax, int64_t channels, const Factors& factors,
                             int oy, int ox, float (&sum)[2][2][Pack<T>::size]) {
  constexpr int V = Pack<T>::size;
  using Rows = Block<UP, DOWN, TAPS, PY, 2>;
  using Columns = Block<UP, DOWN, TAPS, PX, 2>;
  const int iy0 = (oy * DOWN - ay.pad + PY) / UP, ix0 = (ox * DOWN - ax.pad + PX) / UP;
  const int in_h = static_cast<int>(ay.in), in_w = static_cast<int>(ax.in);
#pragma unroll
  for (int j = 0; j < Rows::inputs; ++j) {
    const int iy = iy0 + j;
    if (iy < 0 || iy >= in_h) continue;
    float across[2][V] = {};
#pragma unroll
    for (int i = 0; i < Columns::inputs; ++i) {
      const int ix = ix0 + i;
      if (ix < 0 || ix >= in_w) continue;
      const int64_t at = (static_cast<int64_t>(iy) * in_w + ix) * channels;
      const Pack<T> loaded = *reinterpret_cast<const Pack<T>*>(map + at);
#pragma unroll
      for (int o = 0; o < 2; ++o) {
        const int t = UP * i + PX - o * DOWN;
        if (t < 0 || t >= TAPS) continue;
#pragma unroll
        for (int v = 0; v < V; ++v) across[o][v] += widen(loaded.item[v]) * factors.x[t];
      }
    }
#pragma unroll
    for (int o = 0; o < 2; ++o) {
      const int t = UP * j + PY - o * DOWN;
      if (t < 0 || t >= TAPS) continue;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        sum[o][0][v] += across[0][v] * factors.y[t];
        sum[o][1][v] += across[1][v] * factors.y[t];
      }
    }
  }
}

template <typename T, int UP, int DOWN, typename End>
__global__ void __launch_bounds__(THREADS, 2)
    patches(const T* __restrict__ x, End end, Filter filter, Axis ay, Axis ax, int64_t batch, int64_t channels) {
  constexpr int V = Pack<T>::size;
  __shared__ Factors factors;
  split(filter, factors);
  const int64_t packs = channels / V, wide = (ax.out + 1) / 2, high = (ay.out + 1) / 2;
  const int64_t total = batch * high * wide * packs;
  const int odd_y = UP == 2 ? ay.pad & 1 : 0, odd_x = UP == 2 ? ax.pad & 1 : 0;  // outputs begin at even numbers
  for (int64_t k = blockIdx.x * int64_t{THREADS} + threadIdx.x; k < total; k += gridDim.x * int64_t{THREADS}) {
    int64_t rest = k / packs;
    const int64_t c = (k - rest * packs) * V, px = rest % wide;
    rest /= wide;
    const int64_t b = rest / high;
    const int oy = static_cast<int>(rest - b * high) * 2, ox = static_cast<int>(px) * 2;
    const T* map = x + b * ay.in * ax.in * channels + c;
    float sum[2][2][V] = {};
    if (!factors.separable) {
      for (int o = 0; o < 4; ++o) {
        if (oy + o / 2 >= ay.out || ox + o % 2 >= ax.out) continue;
        for (int v = 0; v < V; ++v) {
          float one[1] = {pixel(map + v, ax.in * channels, channels, filter.f, false, ay, ax, filter.flip,
                                int64_t{oy + o / 2}, int64_t{ox + o % 2})};
          one[0] *= filter.gain;
          const int64_t p = (oy + o / 2) * ax.out + ox + o % 2;
          end.template operator()<true>(b, c + v, p, (b * ay.out * ax.out + p) * channels + c + v, one, 1, false);
        }
      }
      continue;
    }
    if constexpr (UP == 2) {
      if (odd_y && odd_x) {
        patch<T, UP, DOWN, 1, 1>(map, ay, ax, channels, factors, oy, ox, sum);
      } else if (odd_y) {
        patch<T, UP, DOWN, 1, 0>(map, ay, ax, channels, factors, oy, ox, sum);
      } else if (odd_x) {
        patch<T, UP, DOWN, 0, 1>(map, ay, ax, channels, factors, oy, ox, sum);
      } else {
        patch<T, UP, DOWN, 0, 0>(map, ay, ax, channels, factors, oy, ox, sum);
      }
    } else {
      patch<T, UP, DOWN, 0, 0>(map, ay, ax, channels, factors, oy, ox, sum);
    }
#pragma unroll
    for (int o = 0; o < 4; ++o) {
      if (oy + o / 2 >= ay.out || ox + o % 2 >= ax.out) continue;
      const int64_t p = (oy + o / 2) * ax.out + ox + o % 2;
      end.template operator()<true>(b, c, p, (b * ay.out * ax.out + p) * channels + c, sum[o / 2][o % 2], V, true);
    }
  }
}

// ---- everything else

template <typename T, typename End, typename W = Wide<T>>
__global__ void __launch_bounds__(THREADS)
    elements(const T* __restrict__ x, End end, const W* __restrict__ f, bool one_dimensional, Axis ay, Axis ax, bool flip,
             W gain, int64_t channels, bool last, int64_t total) {
  const int64_t plane_in = ay.in * ax.in;
  for (int64_t k = blockIdx.x * int64_t{THREADS} + threadIdx.x; k < total; k += gridDim.x * int64_t{THREADS}) {
    int64_t rest = k, c = 0;
    if (last) {
      rest = k / channels;
      c = k - rest * channels;
    }
    const int64_t ox = rest % ax.out, above = rest / ax.out, oy = above % ay.out, outer = above / ay.out;
    const int64_t step = last ? channels : 1;
    const T* map = x + outer * plane_in * step + c;
    const W sum[1] = {pixel(map, ax.in * step, step, f, one_dimensional, ay, ax, flip, oy, ox) * gain};
    if (last) {
      end.template operator()<true>(outer, c, oy * ax.out + ox, k, sum, 1, false);
    } else {
      end.template operator()<false>(outer, 0, oy * ax.out + ox, k, sum, 1, false);
    }
  }
}

// The number of outputs.
inline int64_t total_of(const Call& call) { return call.x.batch * call.x.channels * call.ay.out * call.ax.out; }

// Whether the kernels for four taps can take the call; their factors of size are up to the caller.
template <typename T>
bool four_taps(const Call& call, bool out_aligned) {
  const Axis &ay = call.ay, &ax = call.ax;
  const int64_t most = int64_t{1} << 28;  // coordinates, doubled, in 32 bits
  if (!call.f.has_value() || ay.taps != TAPS || ax.taps != TAPS || ay.up != ax.up || ay.down != ax.down) return false;
  if (std::max({ay.in, ax.in, ay.out, ax.out}) > most || std::abs(ay.pad) > most || std::abs(ax.pad) > most) return false;
  const bool whole = call.x.channels % Pack<T>::size == 0 && aligned(read<T>(call.x.tensor)) && out_aligned;
  return !call.x.last || whole;
}

template <typename T, int UP, int DOWN, typename End>
void launch_four(const Call& call, const Launcher& launch, const End& end, bool out_aligned) {
  constexpr int V = Pack<T>::size;
  const T* x = read<T>(call.x.tensor);
  const Filter filter{read<float>(*call.f), call.f->dim() == 1, call.flip, static_cast<float>(call.gain)};
  if (call.x.last) {
    const int64_t work = total_of(call) / V / 4 + 1;
    launch(patches<T, UP, DOWN, End>, std::min((work + THREADS - 1) / THREADS, launch.resident_blocks() * 8),
           dim3(THREADS), x, end, filter, call.ay, call.ax, call.x.batch, call.x.channels);
    return;
  }
  int across = 16;
  while (across > Tile<T, UP, DOWN>::narrowest && (across / 2) * V >= call.ax.out) across /= 2;
  const int64_t rows = call.x.batch * call.x.channels * call.ay.out, down = THREADS / across;
  const int64_t work = ((rows + down - 1) / down) * ((call.ax.out + across * V - 1) / (across * V));
  launch(tiles<T, UP, DOWN, End>, std::min(work, launch.resident_blocks() * 2), dim3(THREADS), x, end, filter, call.ay,
         call.ax, rows, across, aligned(x) && call.ax.in % V == 0, out_aligned && call.ax.out % V == 0);
}

template <typename T, typename End>
void launch_elements(const Call& call, const Launcher& launch, const End& end) {
  const int64_t total = total_of(call);
  launch(elements<T, End>, std::min((total + THREADS - 1) / THREADS, launch.resident_blocks() * 8), dim3(THREADS),
         read<T>(call.x.tensor), end, read<Wide<T>>(call.f), call.f.has_value() && call.f->dim() == 1, call.ay, call.ax,
         call.flip, static_cast<Wide<T>>(call.gain), call.x.channels, call.x.last, total);
}

}  // namespace sivae::upfirdn2d
