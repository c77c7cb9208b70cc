// bias_act on a GPU: one pass over the map in packs of 16 bytes. Backward adds up the gradients of bias and strength on
// the way: every block writes the sums of its own piece of the map, and a second kernel adds these up in order.
#include "bias_act/host.h"
#include "common/reduce.h"

namespace sivae::bias_act {
namespace {

template <typename T>
struct Arrays {
  using W = Wide<T>;
  const T *x, *saved;  // x: the input, or the gradient
  T* y;
  const W *bias, *noise, *strength;
  bool noise_shared;
  int64_t batch, channels, space;

  explicit Arrays(const Call& call)
      : x(read<T>(call.map.tensor)),
        saved(call.saved ? read<T>(call.saved->tensor) : nullptr),
        y(write<T>(call.y)),
        bias(read<W>(call.sides.bias)),
        noise(read<W>(call.sides.noise)),
        strength(read<W>(call.sides.strength)),
        noise_shared(call.sides.noise_shared),
        batch(call.map.batch),
        channels(call.map.channels),
        space(call.map.space) {}

  bool all_aligned() const { return aligned(x) && aligned(saved) && aligned(y) && aligned(bias) && aligned(noise); }
};

// V neighbours, at once if there are several.
template <int V, typename T>
struct Few {
  T item[V];

  __device__ static Few load(const T* from) {
    Few few;
    if constexpr (V * sizeof(T) % 16 == 0) {
#pragma unroll
      for (int p = 0; p < V / Pack<T>::size; ++p) {
        const Pack<T> pack = reinterpret_cast<const Pack<T>*>(from)[p];
#pragma unroll
        for (int i = 0; i < Pack<T>::size; ++i) few.item[p * Pack<T>::size + i] = pack.item[i];
      }
    } else {
#pragma unroll
      for (int i = 0; i < V; ++i) few.item[i] = from[i];
    }
    return few;
  }

  __device__ void store(T* to) const {
    if constexpr (V * sizeof(T) == 16) {
      Pack<T> pack;
#pragma unroll
      for (int i = 0; i < V; ++i) pack.item[i] = item[i];
      *reinterpret_cast<Pack<T>*>(to) = pack;
    } else {
#pragma unroll
      for (int i = 0; i < V; ++i) to[i] = item[i];
    }
  }
};

// The noise and the bias of V neighbours.
template <bool LAST, int V, typename T, typename W = Wide<T>>
__device__ inline void sides(const Arrays<T>& a, int64_t channel, int64_t pixel, W (&noise)[V], W (&bias)[V]) {
  if (a.noise) {
    const int64_t at = a.noise_shared ? pixel % a.space : pixel;
    if constexpr (LAST) {
      const W one = a.noise[at];
#pragma unroll
      for (int i = 0; i < V; ++i) noise[i] = one;
    } else {
      const auto few = Few<V, W>::load(a.noise + at);
#pragma unroll
      for (int i = 0; i < V; ++i) noise[i] = few.item[i];
    }
  }
  if (a.bias) {
    if constexpr (LAST) {
      const auto few = Few<V, W>::load(a.bias + channel);
#pragma unroll
      for (int i = 0; i < V; ++i) bias[i] = few.item[i];
    } else {
      const W one = a.bias[channel];
#pragma unroll
      for (int i = 0; i < V; ++i) bias[i] = one;
    }
  }
}

template <int A, bool LAST, int V, typename T, typename W = Wide<T>>
__global__ void __launch_bounds__(THREADS) elementwise(Arrays<T> a, Formula<W> f, int64_t packs, bool small) {
  const W strength = a.noise ? *a.strength : W(0);
  for (int64_t k = blockIdx.x * int64_t{THREADS} + threadIdx.x; k < packs; k += gridDim.x * int64_t{THREADS}) {
    const int64_t at = k * V;
    Place<int64_t> where;
    if (small) {  // 32-bit division is several times faster
      const auto p = place<uint32_t>(static_cast<uint32_t>(at), static_cast<uint32_t>(a.channels),
                                     static_cast<uint32_t>(a.space), LAST);
      where = {p.channel, p.pixel};
    } else {
      where = place<int64_t>(at, a.channels, a.space, LAST);
    }
    W noise[V] = {}, bias[V] = {};
    sides<LAST, V>(a, where.channel, where.pixel, noise, bias);
    const auto x = Few<V, T>::load(a.x + at);
    Few<V, T> y;
#pragma unroll
    for (int i = 0; i < V; ++i) y.item[i] = narrow<T>(forward<A>(widen(x.item[i]) + strength * noise[i] + bias[i], f));
    y.store(a.y + at);
  }
}

// The gradients of V neighbours: written, and added to the sums (one of the bias for each channel there is).
template <int A, int S, bool LAST, int V, typename T, typename W = Wide<T>>
__device__ inline void gradients(const Arrays<T>& a, const Formula<W>& f, W bound, W strength, int64_t at, int64_t channel,
                                 int64_t pixel, W (&sum)[LAST ? V : 1], W& weighted) {
  W noise[V] = {}, bias[V] = {};
  sides<LAST, V>(a, channel, pixel, noise, bias);
  const auto g = Few<V, T>::load(a.x + at);
  Few<V, T> saved, dx;
  if constexpr (S != NOTHING) saved = Few<V, T>::load(a.saved + at);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    W slope = f.gain;
    if constexpr (S == OUTPUT) slope = slope_from_y<A>(widen(saved.item[i]), bound, f);
    if constexpr (S == INPUT) slope = slope_from_v(widen(saved.item[i]) + strength * noise[i] + bias[i], f);
    const W value = widen(g.item[i]) * slope;
    dx.item[i] = narrow<T>(value);
    sum[LAST ? i : 0] += value;
    weighted += value * noise[i];
  }
  dx.store(a.y + at);
}

// Contiguous maps: a block takes pieces of one plane. bias_parts[c][b * pieces + piece], strength_parts likewise.
template <int A, int S, int V, typename T, typename W = Wide<T>>
__global__ void __launch_bounds__(THREADS, 2)
    backward_planes(Arrays<T> a, Formula<W> f, W bound, int64_t pieces, int64_t piece_packs, W* bias_parts,
                    W* strength_parts) {
  const W strength = a.noise ? *a.strength : W(0);
  const int64_t packs = a.space / V, count = a.batch * pieces;
  for (int64_t unit = blockIdx.x; unit < a.channels * count; unit += gridDim.x) {
    const int64_t plane = unit / pieces, piece = unit % pieces, b = plane / a.channels, c = plane - b * a.channels;
    const int64_t past = (piece + 1) * piece_packs < packs ? (piece + 1) * piece_packs : packs;
    W sum[1] = {}, weighted = 0;
    for (int64_t k = piece * piece_packs + threadIdx.x; k < past; k += blockDim.x) {
      gradients<A, S, false, V>(a, f, bound, strength, plane * a.space + k * V, c, b * a.space + k * V, sum, weighted);
    }
    const int64_t part = c * count + b * pieces + piece;
    if (bias_parts) {
      const double total = block_sum(sum[0]);
      if (threadIdx.x == 0) bias_parts[part] = static_cast<W>(total);
    }
    if (strength_parts) {
      const double total = block_sum(weighted);
      if (threadIdx.x == 0) strength_parts[part] = static_cast<W>(total);
    }
  }
}

// channels_last: a block takes `across` packs of channels of a piece of the pixels. bias_parts[c][piece],
// strength_parts[group of channels][piece].
template <int A, int S, int V, typename T, typename W = Wide<T>>
__global__ void __launch_bounds__(THREADS, 2)
    backward_last(Arrays<T> a, Formula<W> f, W bound, int across, int64_t groups, int64_t pieces, int64_t piece_pixels,
                  W* bias_parts, W* strength_parts) {
  alignas(16) __shared__ W sums[THREADS * V];
  const W strength = a.noise ? *a.strength : W(0);
  const int thread = static_cast<int>(threadIdx.x), column = thread % across, row = thread / across;
  const int down = THREADS / across, width = across * V;
  const int64_t pixels = a.batch * a.space;
  for (int64_t unit = blockIdx.x; unit < groups * pieces; unit += gridDim.x) {
    const int64_t group = unit % groups, piece = unit / groups, channel = group * width + column * V;
    const int64_t past = (piece + 1) * piece_pixels < pixels ? (piece + 1) * piece_pixels : pixels;
    W sum[V] = {}, weighted = 0;
    if (channel < a.channels) {
      for (int64_t pixel = piece * piece_pixels + row; pixel < past; pixel += down) {
        gradients<A, S, true, V>(a, f, bound, strength, pixel * a.channels + channel, channel, pixel, sum, weighted);
      }
    }
    if (bias_parts) {
#pragma unroll
      for (int i = 0; i < V; ++i) sums[row * width + column * V + i] = sum[i];
      __syncthreads();
      for (int c = thread; c < width; c += THREADS) {
        double total = 0;
        for (int r = 0; r < down; ++r) total += sums[r * width + c];
        if (group * width + c < a.channels) bias_parts[(group * width + c) * pieces + piece] = static_cast<W>(total);
      }
      __syncthreads();
    }
    if (strength_parts) {
      const double total = block_sum(weighted);
      if (thread == 0) strength_parts[group * pieces + piece] = static_cast<W>(total);
    }
  }
}

// Calls f(Constant<V>): the pack if the map's rows consist of whole ones, else 1.
template <typename T, typename F>
void by_pack(const Call& call, const Arrays<T>& a, const F& f) {
  if (a.all_aligned() && (call.map.last ? a.channels : a.space) % Pack<T>::size == 0) {
    f(Constant<Pack<T>::size>{});
  } else {
    f(Constant<1>{});
  }
}

template <int A, typename T>
void launch_forward(const Call& call, const Launcher& launch) {
  const Arrays<T> a(call);
  const auto f = call.formula<Wide<T>>();
  const int64_t total = call.y.numel();
  by_pack<T>(call, a, [&](auto pack) {
    constexpr int V = decltype(pack)::value, B = V == 1 ? int{COUNT} : A;  // one by one: as little code as possible
    const int64_t packs = total / V, blocks = std::min((packs + THREADS - 1) / THREADS, launch.resident_blocks() * 8);
    const bool small = total < (int64_t{1} << 32);
    call.map.last ? launch(elementwise<B, true, V, T>, blocks, dim3(THREADS), a, f, packs, small)
                  : launch(elementwise<B, false, V, T>, blocks, dim3(THREADS), a, f, packs, small);
  });
}

template <int A, int S, typename T>
void launch_backward(const Call& call, const Launcher& launch) {
  using W = Wide<T>;
  const Arrays<T> a(call);
  const auto f = call.formula<W>();
  const W bound = widen(narrow<T>(f.clamp));
  const bool want_bias = call.dbias.numel() > 0, want_strength = call.dstrength.numel() > 0;
  const auto parts = [&](bool wanted, int64_t rows, int64_t count) {
    return empty_wide(call.y, {wanted ? rows : 0, count});
  };
  const auto add_up = [&](const Tensor& from, int64_t rows, int64_t count, const Tensor& to) {
    launch(sum_rows<W>, rows, dim3(THREADS), static_cast<const W*>(write<W>(from)), count, write<W>(to));
  };
  const auto finish = [&](const Tensor& bias_parts, const Tensor& strength_parts, int64_t rows, int64_t count) {
    if (want_bias) add_up(bias_parts, a.channels, count, call.dbias);
    if (want_strength) {
      const Tensor per_row = empty_wide(call.y, {rows});
      add_up(strength_parts, rows, count, per_row);
      add_up(per_row, 1, rows, call.dstrength);
    }
  };
  const auto pointer = [](const Tensor& x) { return x.numel() ? write<W>(x) : nullptr; };
  by_pack<T>(call, a, [&](auto pack) {
    constexpr int V = decltype(pack)::value, B = V == 1 && S != NOTHING ? int{COUNT} : A;
    if (call.map.last) {
      const int64_t channel_packs = (a.channels + V - 1) / V, pixels = a.batch * a.space;
      int across = 1;
      while (across < 32 && across < channel_packs) across *= 2;
      const int64_t groups = (channel_packs + across - 1) / across, down = THREADS / across;
      // Pieces enough to fill the device twice, few enough to be added up quickly.
      const int64_t wanted = std::max<int64_t>(1, launch.resident_blocks() * 2 / groups);
      const int64_t piece = std::max((pixels + wanted - 1) / wanted, down * 4), pieces = (pixels + piece - 1) / piece;
      const Tensor bias_parts = parts(want_bias, a.channels, pieces), strength_parts = parts(want_strength, groups, pieces);
      launch(backward_last<B, S, V, T>, groups * pieces, dim3(THREADS), a, f, bound, across, groups, pieces, piece,
             pointer(bias_parts), pointer(strength_parts));
      finish(bias_parts, strength_parts, groups, pieces);
    } else {
      const int64_t packs = a.space / V, threads = std::clamp<int64_t>((packs + 31) / 32 * 32, 32, THREADS);
      const int64_t piece = threads * 8, pieces = (packs + piece - 1) / piece, count = a.batch * pieces;
      const Tensor bias_parts = parts(want_bias, a.channels, count), strength_parts = parts(want_strength, a.channels, count);
      const int64_t blocks = std::min(a.channels * count, launch.resident_blocks() * 8 * (THREADS / threads));
      launch(backward_planes<B, S, V, T>, blocks, dim3(static_cast<unsigned>(threads)), a, f, bound, pieces, piece,
             pointer(bias_parts), pointer(strength_parts));
      finish(bias_parts, strength_parts, a.channels, count);
    }
  });
}

Tensor run(const Tensor& x, const std::optional<Tensor>& bias, const std::optional<Tensor>& noise,
           const std::optional<Tensor>& strength, int64_t act, double alpha, double gain, double clamp) {
  const Launcher launch(x);
  const Call call = prepare(x, bias, noise, strength, act, alpha, gain, clamp);
  if (call.y.numel() == 0) return call.y;
  by_type(x, [&](auto element) {
    using T = decltype(element);
    by_act<T>(act, [&](auto a) { launch_forward<decltype(a)::value, T>(call, launch); });
  });
  return call.y;
}

std::tuple<Tensor, Tensor, Tensor> run_backward(const Tensor& gradient, const std::optional<Tensor>& saved,
                                                const std::optional<Tensor>& bias, const std::optional<Tensor>& noise,
                                                const std::optional<Tensor>& strength, int64_t act, double alpha,
                                                double gain, double clamp, bool from_output, bool want_bias,
                                                bool want_strength) {
  const Launcher launch(gradient);
  const Call call = prepare_backward(gradient, saved, bias, noise, strength, act, alpha, gain, clamp, from_output,
                                     want_bias, want_strength);
  if (call.y.numel() == 0) {
    torch::stable::zero_(const_cast<Tensor&>(call.dbias));
    torch::stable::zero_(const_cast<Tensor&>(call.dstrength));
    return {call.y, call.dbias, call.dstrength};
  }
  by_type(gradient, [&](auto element) {
    using T = decltype(element);
    by_act_and_source<T>(call, [&](auto a, auto s) {
      launch_backward<decltype(a)::value, decltype(s)::value, T>(call, launch);
    });
  });
  return {call.y, call.dbias, call.dstrength};
}

}  // namespace
}  // namespace sivae::bias_act

SIVAE_OPERATORS {
  m.impl("bias_act", TORCH_BOX(&sivae::bias_act::run));
  m.impl("bias_act_backward", TORCH_BOX(&sivae::bias_act::run_backward));
}
