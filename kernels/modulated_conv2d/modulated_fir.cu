// FIR and epilogue of a modulated layer on a GPU, in one pass over the map either way.
//
// Forward: the kernels of upfirdn2d, which hand their sums to the epilogue. Backward: a block makes a strip of columns of dx,
// row by row downwards. Every new row of x completes a row of u in registers, this with the gradients of y and scaled a row
// of du, and this a row of dx; neighbours exchange rows of x and of du through shared memory. So a strip reads its x and
// its gradients once, but for three columns at either side and three rows above and below.
#include "modulated_conv2d/add_up.h"
#include "modulated_conv2d/fir_host.h"
#include "upfirdn2d/tiles.h"

namespace sivae::modulated_conv2d {
namespace {

constexpr int REACH = TAPS - 1;
constexpr int64_t BAND = 160;  // rows of dx of a block at most
constexpr int SEGMENT = 32;    // bytes of channels of a block, channels_last: what memory moves at once
constexpr int SUMS = 4;        // scale, bias, strength, next

template <typename T, typename W = Wide<T>>
struct End {
  Constants<W> constants;
  Formula<W> f;
  T *y, *scaled;

  template <bool LAST, int V>
  __device__ void operator()(int64_t outer, int64_t c, int64_t p, int64_t at, const W (&sum)[V], int many,
                             bool packs) const {
    const int64_t b = LAST ? outer : outer / constants.channels, first = LAST ? c : outer % constants.channels;
    const W* noise = constants.noise ? constants.noise + b * constants.noise_step + p : nullptr;
    Channel<W> channel = constants.channel(b, first);
    planes::Few<V, W> drawn{};
    if (noise) {
      if (!LAST && packs) {
        drawn = planes::load<V>(noise);
      } else {
#pragma unroll
        for (int i = 0; i < V; ++i) drawn.item[i] = i < many ? noise[LAST ? 0 : i] : W(0);
      }
    }
    planes::Few<V, T> plain, following;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if (LAST && i) channel = constants.channel(b, first + i);
      const W v = activated(f, value(channel, sum[i], drawn.item[i]));
      plain.item[i] = narrow<T>(v);
      following.item[i] = narrow<T>(v * channel.next);
    }
    if (y) put(plain, y + at, many, packs);
    if (scaled) put(following, scaled + at, many, packs);
  }

  template <int V>
  static __device__ void put(const planes::Few<V, T>& few, T* to, int many, bool packs) {
    if (packs) return planes::store(few, to);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if (i < many) to[i] = few.item[i];
    }
  }
};

template <typename T, typename W = Wide<T>>
struct Job {
  const T *x, *g, *g_scaled;
  T* dx;
  const W* f;
  W *parts, fir_gain;
  Constants<W> constants;
  Formula<W> formula;
  Span down, across;      // rows, columns
  Pieces bands, strips;   // of them
  int64_t batch;
  int lanes;  // channels of a block
  bool flip;
};

// The filter by tap, with the gain, and its factors where it is a product.
template <typename W>
struct Taps {
  W all[TAPS][TAPS], y[TAPS], x[TAPS];
  bool separable;
};

template <typename T, typename W>
__device__ inline void split(const Job<T>& job, Taps<W>& shared) {
  if (threadIdx.x == 0) {
    for (int t = 0; t < TAPS * TAPS; ++t) {
      shared.all[t / TAPS][t % TAPS] = job.f[element(t / TAPS, t % TAPS, job.flip)] * job.fir_gain;
    }
    shared.separable = upfirdn2d::separate<TAPS>(&shared.all[0][0], shared.y, shared.x);
  }
  __syncthreads();
}

// What a row gives to the TAPS rows that it is part of: sum[m] += sum over n of tap (m, n) times row[n stride].
template <typename W>
__device__ inline void spread(const Taps<W>& taps, const W* row, int stride, W (&sum)[TAPS]) {
  W v[TAPS];
#pragma unroll
  for (int n = 0; n < TAPS; ++n) v[n] = row[n * stride];
  if (taps.separable) {
    const W across = (v[0] * taps.x[0] + v[1] * taps.x[1]) + (v[2] * taps.x[2] + v[3] * taps.x[3]);
#pragma unroll
    for (int m = 0; m < TAPS; ++m) sum[m] += taps.y[m] * across;
  } else {
#pragma unroll
    for (int m = 0; m < TAPS; ++m) {
#pragma unroll
      for (int n = 0; n < TAPS; ++n) sum[m] += taps.all[m][n] * v[n];
    }
  }
}

// J slots of a row for each thread. Slot s holds column j0 - REACH + s of x, and the output whose first tap is there.
template <typename T, bool LAST, int J, typename W = Wide<T>>
__global__ void __launch_bounds__(THREADS, 2) strips(Job<T> job) {
  __shared__ W x_row[THREADS * J], du_row[THREADS * J];
  __shared__ Taps<W> taps;
  split(job, taps);
  const int lanes = LAST ? job.lanes : 1, thread = static_cast<int>(threadIdx.x);
  const int lane = thread % lanes, column = thread / lanes, columns = static_cast<int>(blockDim.x) / lanes;
  const int64_t channels = job.constants.channels, tiles = (channels + lanes - 1) / lanes, step = LAST ? channels : 1;
  const int64_t chunks = job.bands.count * job.strips.count;
  const int in_h = static_cast<int>(job.down.in), out_h = static_cast<int>(job.down.out), pad = job.down.pad;
  const int64_t row_in = job.across.in * step, row_u = job.across.out * step;
  for (int64_t unit = blockIdx.x; unit < job.batch * tiles * chunks; unit += gridDim.x) {
    const Unit at = unit_of(unit, chunks, tiles);
    const int64_t b = at.sample, c = at.middle * lanes + lane, plane = LAST ? b : b * channels + c;
    const int64_t j0 = at.inner % job.strips.count * job.strips.length, j1 = smaller(j0 + job.strips.length, job.across.in);
    const int i0 = static_cast<int>(at.inner / job.strips.count * job.bands.length);
    const int i1 = static_cast<int>(smaller(i0 + job.bands.length, in_h));
    const bool there = c < channels;
    const Channel<W> channel = job.constants.channel(b, there ? c : 0);
    // Slot j of this thread is column first + j columns of x, and of u pad columns further. A bit for each slot: whether x
    // has it, whether u has it, whether its sums are this block's own.
    const int first = static_cast<int>(j0) - REACH + column, pad_x = job.across.pad, pitch = static_cast<int>(step);
    unsigned in_x = 0, in_u = 0, own = 0;
#pragma unroll
    for (int j = 0; j < J; ++j) {
      const int ix = first + j * columns, ox = ix + pad_x;
      in_x |= there && ix >= 0 && ix < job.across.in && ix < j1 + REACH ? 1u << j : 0u;
      in_u |= there && ox >= 0 && ox < job.across.out && ix < j1 ? 1u << j : 0u;
      own |= owns(job.across, j0, j1, ox) ? 1u << j : 0u;
    }
    const int64_t x_map = plane * in_h * row_in + (LAST ? c : 0);
    const T* x_from = job.x + x_map;
    T* dx = job.dx + x_map;
    const int64_t u_map = plane * out_h * row_u + (LAST ? c : 0);
    const W* noise = job.constants.noise ? job.constants.noise + b * job.constants.noise_step : nullptr;
    W u_sum[J][TAPS] = {}, dx_sum[J][TAPS] = {}, total[SUMS] = {};
    W next_x[J], next_g[J], next_scaled[J];

    // What row i of x, and the row of u that it completes, bring; asked for one row before it is needed.
    const auto ask = [&](int i) {
      const int o = i - REACH + pad;
      const bool row = i >= 0 && i < in_h, complete = i >= i0 && o >= 0 && o < out_h;
      const T* from = x_from + i * row_in;
      const int64_t u_from = u_map + o * row_u;
#pragma unroll
      for (int j = 0; j < J; ++j) {
        const int ix = first + j * columns, ox = ix + pad_x;
        const bool inside = complete && (in_u >> j & 1);
        next_x[j] = row && (in_x >> j & 1) ? widen(from[ix * pitch]) : W(0);
        next_g[j] = inside && job.g ? widen(job.g[u_from + ox * pitch]) : W(0);
        next_scaled[j] = inside && job.g_scaled ? widen(job.g_scaled[u_from + ox * pitch]) : W(0);
      }
    };
    ask(i0 - REACH);
    for (int i = i0 - REACH; i < i1 + REACH; ++i) {  // a row of x
      const int o = i - REACH + pad;                 // the row of u that it completes
      const bool complete = i >= i0 && o >= 0 && o < out_h;
      const bool own_row = i - REACH >= i0 || i0 == 0;  // rows above the first one are its block's as well
      W g[J], g_scaled[J], drawn[J];
#pragma unroll
      for (int j = 0; j < J; ++j) {
        x_row[j * static_cast<int>(blockDim.x) + thread] = next_x[j];
        g[j] = next_g[j];
        g_scaled[j] = next_scaled[j];
        const bool inside = complete && noise && (in_u >> j & 1);  // from the cache: all channels share it
        drawn[j] = inside ? noise[o * job.across.out + first + j * columns + pad_x] : W(0);
      }
      ask(i + 1);
      __syncthreads();
#pragma unroll
      for (int j = 0; j < J; ++j) {
        const int s = j * columns + column;
        W du = 0;
        if (s + REACH < columns * J) {
          spread(taps, x_row + s * lanes + lane, lanes, u_sum[j]);
          if (complete && (in_u >> j & 1)) {
            const Gradients<W> d = backward(channel, job.formula, u_sum[j][REACH], drawn[j], g[j], g_scaled[j]);
            du = d.x;
            if (own_row && (own >> j & 1)) {
              total[0] += d.scale;
              total[1] += d.bias;
              total[2] += d.strength;
              total[3] += d.next;
            }
          }
        }
        du_row[s * lanes + lane] = du;
#pragma unroll
        for (int m = REACH; m > 0; --m) u_sum[j][m] = u_sum[j][m - 1];
        u_sum[j][0] = 0;
      }
      __syncthreads();
#pragma unroll
      for (int j = 0; j < J; ++j) {
        const int s = j * columns + column;
        if (s + REACH < columns * J) {
          spread(taps, du_row + (s + REACH) * lanes + lane, -lanes, dx_sum[j]);
          const int row = i - REACH;  // of dx, which this row of du completes
          const int ix = first + j * columns + REACH;
          if (there && row >= i0 && ix < j1) dx[row * row_in + ix * pitch] = narrow<T>(dx_sum[j][0]);
        }
#pragma unroll
        for (int m = 0; m < REACH; ++m) dx_sum[j][m] = dx_sum[j][m + 1];
        dx_sum[j][REACH] = 0;
      }
    }
    W* part = job.parts + ((b * channels + c) * chunks + at.inner) * SUMS;
    if constexpr (LAST) {
#pragma unroll
      for (int k = 0; k < SUMS; ++k) {
        x_row[thread] = total[k];
        __syncthreads();
        if (column == 0 && there) {
          W sum = 0;
          for (int r = 0; r < columns; ++r) sum += x_row[r * lanes + lane];
          part[k] = sum;
        }
        __syncthreads();
      }
    } else {
      planes::block_sums(total);
      if (thread == 0) {
#pragma unroll
        for (int k = 0; k < SUMS; ++k) part[k] = total[k];
      }
    }
    __syncthreads();
  }
}

std::tuple<Tensor, Tensor> run(const Tensor& x, const Tensor& f, int64_t pad_x0, int64_t pad_x1, int64_t pad_y0,
                               int64_t pad_y1, bool flip, double fir_gain, const Tensor& scale, const Side& noise,
                               const Side& strength, const Side& bias, const Side& next, double alpha, double gain,
                               double clamp, bool both) {
  const Launcher launch(x);
  const FirCall call = prepare(x, f, pad_x0, pad_x1, pad_y0, pad_y1, flip, fir_gain, scale, noise, strength, bias, next,
                               alpha, gain, clamp);
  const bool plain = both || !next.has_value();
  const Tensor y = call.empty_map(plain), scaled = call.empty_map(next.has_value());
  if (y.numel() + scaled.numel() == 0) return {y, scaled};
  const auto axis = [](const Span& s) {
    return upfirdn2d::Axis{s.in, s.out, 1, 1, TAPS, s.pad};
  };
  const upfirdn2d::Call filter{call.call.x, call.call.x.tensor, axis(call.y), axis(call.x), f, flip, fir_gain};
  by_type(x, [&](auto one) {
    using T = decltype(one);
    using W = Wide<T>;
    const End<T> end{Constants<W>(call.call), call.call.formula<W>(), plain ? write<T>(y) : nullptr,
                     next.has_value() ? write<T>(scaled) : nullptr};
    if constexpr (!std::is_same_v<T, double>) {
      const bool out_aligned = aligned(end.y) && aligned(end.scaled) && aligned(end.constants.noise);
      if (upfirdn2d::four_taps<T>(filter, out_aligned)) {
        return upfirdn2d::launch_four<T, 1, 1>(filter, launch, end, out_aligned);
      }
    }
    upfirdn2d::launch_elements<T>(filter, launch, end);
  });
  return {y, scaled};
}

template <typename T, bool LAST, int J>
void launch_strips(const Launcher& launch, const FirCall& call, Job<T>& job, const Results& results) {
  job.lanes = 1;
  while (LAST && job.lanes * static_cast<int>(sizeof(T)) < SEGMENT && job.lanes < call.call.x.channels) job.lanes *= 2;
  job.bands = pieces_of(call.y.in, BAND);
  job.strips = pieces_of(call.x.in, THREADS / job.lanes * J - 2 * REACH);
  const int64_t threads = (job.strips.length + 2 * REACH + J - 1) / J * job.lanes;
  const dim3 block(static_cast<unsigned>((threads + 31) / 32 * 32));
  const int64_t chunks = job.bands.count * job.strips.count;
  const Tensor parts = empty_wide(call.call, {job.batch, call.call.x.channels, chunks, SUMS});
  job.parts = write<Wide<T>>(parts);
  const int64_t work = job.batch * chunks * ((call.call.x.channels + job.lanes - 1) / job.lanes);
  launch(strips<T, LAST, J>, std::min(work, launch.resident_blocks() * 16), block, job);
  add_up<Wide<T>>(launch, call.call, job.parts, chunks, results);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> run_backward(
    const Side& g, const Side& g_scaled, const Tensor& x, const Tensor& f, int64_t pad_x0, int64_t pad_x1, int64_t pad_y0,
    int64_t pad_y1, bool flip, double fir_gain, const Tensor& scale, const Side& noise, const Side& strength,
    const Side& bias, const Side& next, double alpha, double gain, double clamp) {
  const Launcher launch(x);
  const FirCall call = prepare(x, f, pad_x0, pad_x1, pad_y0, pad_y1, flip, fir_gain, scale, noise, strength, bias, next,
                               alpha, gain, clamp);
  const std::optional<Map> plain = call.gradient(g), beside = call.gradient(g_scaled);
  STD_TORCH_CHECK(plain || beside, "there is no gradient");
  const int64_t batch = call.call.x.batch, channels = call.call.x.channels;
  const Tensor dx = empty_like_map(call.call.x, sizes_of(x));
  const Tensor dscale = empty_wide(call.call, {batch, channels}), dnext = empty_wide(call.call, {batch, channels});
  Tensor dbias = empty_wide(call.call, {channels}), dstrength = empty_wide(call.call, {});
  if (x.numel() == 0) {
    torch::stable::zero_(dbias);
    torch::stable::zero_(dstrength);
    return {dx, dscale, dbias, dstrength, dnext};
  }
  by_type(x, [&](auto element) {
    using T = decltype(element);
    using W = Wide<T>;
    Job<T> job{read<T>(call.call.x.tensor), plain ? read<T>(plain->tensor) : nullptr,
               beside ? read<T>(beside->tensor) : nullptr, write<T>(dx), read<W>(f), nullptr, static_cast<W>(fir_gain),
               Constants<W>(call.call), call.call.formula<W>(), call.y, call.x, {}, {}, batch, 1, flip};
    const Results results{dscale, dnext, dbias, dstrength};
    constexpr int slots = sizeof(T) == 8 ? 1 : 2;  // as many as registers hold
    call.call.x.last ? launch_strips<T, true, slots>(launch, call, job, results)
                     : launch_strips<T, false, slots>(launch, call, job, results);
  });
  return {dx, dscale, dbias, dstrength, dnext};
}

}  // namespace
}  // namespace sivae::modulated_conv2d

SIVAE_OPERATORS {
  m.impl("modulated_fir_epilogue", TORCH_BOX(&sivae::modulated_conv2d::run));
  m.impl("modulated_fir_epilogue_backward", TORCH_BOX(&sivae::modulated_conv2d::run_backward));
}
