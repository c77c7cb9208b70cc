// norm_act on a GPU: a pass that measures, one that writes the result; backward a pass for the sums that the statistics'
// derivative needs, one that writes the gradients. Where the size changes, every thread gathers what its pixels need;
// neighbours find it in the cache.
#include "common/planes.h"
#include "norm_act/host.h"

namespace sivae::norm_act {
namespace {

using planes::Cut;

template <typename T, typename W = Wide<T>>
struct Arrays {
  const T *x, *skip, *g;
  T *y, *beside;  // the result, and the gradient of a skip that comes last
  const W *mean, *scale, *shift, *level, *by_u;
  int64_t channels, height, width, per_sample;
  bool first;
  Resample resample;
  W alpha;

  explicit Arrays(const Call& call)
      : x(read<T>(call.x.tensor)),
        skip(call.skip ? read<T>(call.skip->tensor) : nullptr),
        g(nullptr),
        y(nullptr),
        beside(nullptr),
        mean(read<W>(call.mean)),
        scale(read<W>(call.scale)),
        shift(read<W>(call.shift)),
        level(nullptr),
        by_u(nullptr),
        channels(call.x.channels),
        height(call.height),
        width(call.width),
        per_sample(call.per_sample),
        first(call.first),
        resample(call.resample),
        alpha(static_cast<W>(call.alpha)) {}

  bool all_aligned() const { return aligned(x) && aligned(skip) && aligned(g) && aligned(y) && aligned(beside); }
  __device__ Norm<W> norm(int64_t b, int64_t c) const {
    const int64_t k = b * per_sample + c;
    return {mean[k], scale[k], shift[k]};
  }
  // v from what was read of x and the skip.
  __device__ W u_of(W read_x, W read_skip) const { return first ? read_x + read_skip : read_x; }
  __device__ W v_of(const Norm<W>& f, W u, W read_skip) const { return first ? value(f, u) : value(f, u) + read_skip; }
};

// IN: 1 without a skip, 2 with one.
template <typename T_, int IN_, int OUT_, int SUMS_>
struct Pass : Arrays<T_> {
  using T = T_;
  using W = Wide<T>;
  static constexpr int IN = IN_, OUT = OUT_, SUMS = SUMS_;
  static constexpr bool MOMENTS = false;
  explicit Pass(const Arrays<T>& arrays) : Arrays<T>(arrays) {}
  __device__ const T* in(int k) const { return k == 0 ? this->x : this->skip; }
  __device__ T* out(int k) const { return k == 0 ? this->y : this->beside; }
  int group() const { return 1; }
};

template <typename T_, int IN_>
struct Measure {
  using T = T_;
  using W = Wide<T>;
  using Channel = Resample;  // none is needed
  static constexpr int IN = IN_, OUT = 1, SUMS = 0;
  static constexpr bool MOMENTS = true;
  const T *x, *skip;
  __device__ const T* in(int k) const { return k == 0 ? x : skip; }
  __device__ T* out(int) const { return nullptr; }
  int group() const { return 1; }
  __device__ Channel channel(int64_t, int64_t) const { return NONE; }
  template <int V, bool LAST>
  __device__ void beside(const Channel*, int64_t, int64_t, int64_t, W (&)[V]) const {}
  __device__ void operator()(const Channel&, const W (&v)[IN], W, W (&o)[1], W (&)[1]) const {
    if constexpr (IN == 2) o[0] = v[0] + v[1];
    else o[0] = v[0];
  }
};

template <typename T, int IN, typename W = Wide<T>>
struct Apply : Pass<T, IN, 1, 0> {
  using Pass<T, IN, 1, 0>::Pass;
  using Channel = Norm<W>;
  __device__ Channel channel(int64_t b, int64_t c) const { return this->norm(b, c); }
  template <int V, bool LAST>
  __device__ void beside(const Channel*, int64_t, int64_t, int64_t, W (&)[V]) const {}
  __device__ void operator()(const Channel& f, const W (&v)[IN], W, W (&o)[1], W (&)[1]) const {
    const W skip = IN == 2 ? v[IN - 1] : W(0);
    o[0] = leaky(this->v_of(f, this->u_of(v[0], skip), skip), this->alpha);
  }
};

// Writes a map of another size than x: `beside` makes the pixel p of the result.
template <typename T, bool DOWNWARD, typename W = Wide<T>>
struct Resized : Pass<T, 0, 1, 0> {
  using Pass<T, 0, 1, 0>::Pass;
  using Channel = Norm<W>;
  __device__ Channel channel(int64_t b, int64_t c) const { return this->norm(b, c); }

  template <int V>
  __device__ void activated(const Channel* f, int64_t at, W (&values)[V]) const {
    const auto x = planes::load<V>(this->x + at);
    planes::Few<V, T> skip = x;
    if (this->skip) skip = planes::load<V>(this->skip + at);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const W beside = this->skip ? widen(skip.item[i]) : W(0);
      values[i] = leaky(this->v_of(f[i], this->u_of(widen(x.item[i]), beside), beside), this->alpha);
    }
  }

  template <int V, bool LAST>
  __device__ void beside(const Channel* f, int64_t b, int64_t c, int64_t p, W (&values)[V]) const {
    const Shape from{0, this->channels, this->height * this->width};
    const int64_t wide = DOWNWARD ? this->width / 2 : this->width * 2;
    constexpr int N = LAST ? V : 1;  // neighbours in memory
#pragma unroll
    for (int i = 0; i < V / N; ++i) {
      const int64_t row = (p + i) / wide, column = (p + i) % wide;
      W sum[N], next[N];
      if constexpr (DOWNWARD) {
        const int64_t corner = 2 * row * this->width + 2 * column;
        const int64_t at = LAST ? from.in_last(b, c, corner) : from.in_plane(b, c, corner);
        const int64_t right = LAST ? this->channels : 1, below = right * this->width;
        activated(f, at, sum);
        activated(f, at + right, next);
#pragma unroll
        for (int n = 0; n < N; ++n) sum[n] += next[n];
        W lower[N];
        activated(f, at + below, lower);
        activated(f, at + below + right, next);
#pragma unroll
        for (int n = 0; n < N; ++n) sum[n] = (sum[n] + (lower[n] + next[n])) / 4;
      } else {
        const int64_t pixel = row / 2 * this->width + column / 2;
        activated(f, LAST ? from.in_last(b, c, pixel) : from.in_plane(b, c, pixel), sum);
      }
#pragma unroll
      for (int n = 0; n < N; ++n) values[i * N + n] = sum[n];
    }
  }
  __device__ void operator()(const Channel&, const W (&)[1], W beside, W (&o)[1], W (&)[1]) const { o[0] = beside; }
};

// The gradient of leaky(v) at V neighbours: from `g`, which may have another size.
template <typename T, int IN, int OUT, int SUMS, typename W = Wide<T>>
struct Backward : Pass<T, IN, OUT, SUMS> {
  using Pass<T, IN, OUT, SUMS>::Pass;

  template <int V, bool LAST, typename C>
  __device__ void beside(const C*, int64_t b, int64_t c, int64_t p, W (&values)[V]) const {
    const int64_t factor = this->resample == UP ? 2 : 1, divisor = this->resample == DOWN ? 2 : 1;
    const int64_t wide = this->width / divisor * factor, high = this->height / divisor * factor;
    const Shape from{0, this->channels, wide * high};
    const auto place = [&](int64_t pixel) { return LAST ? from.in_last(b, c, pixel) : from.in_plane(b, c, pixel); };
    if (this->resample == NONE) {
      const auto few = planes::load<V>(this->g + place(p));
#pragma unroll
      for (int i = 0; i < V; ++i) values[i] = widen(few.item[i]);
      return;
    }
    constexpr int N = LAST ? V : 1;
#pragma unroll
    for (int i = 0; i < V / N; ++i) {
      const int64_t row = (p + i) / this->width, column = (p + i) % this->width;
      W found[N] = {};
      if (this->resample == DOWN) {
        if (row / 2 < high && column / 2 < wide) {  // of an odd size, the last row and column are left out
          const auto few = planes::load<N>(this->g + place(row / 2 * wide + column / 2));
#pragma unroll
          for (int n = 0; n < N; ++n) found[n] = widen(few.item[n]) / 4;
        }
      } else {
#pragma unroll
        for (int down = 0; down < 2; ++down) {
          const int64_t corner = (2 * row + down) * wide + 2 * column;
          const auto one = planes::load<N>(this->g + place(corner)), two = planes::load<N>(this->g + place(corner + 1));
#pragma unroll
          for (int n = 0; n < N; ++n) found[n] += widen(one.item[n]) + widen(two.item[n]);
        }
      }
#pragma unroll
      for (int n = 0; n < N; ++n) values[i * N + n] = found[n];
    }
  }
};

template <typename T, int IN, typename W = Wide<T>>
struct Weigh : Backward<T, IN, 0, 2> {
  using Backward<T, IN, 0, 2>::Backward;
  using Channel = Norm<W>;
  __device__ Channel channel(int64_t b, int64_t c) const { return this->norm(b, c); }
  __device__ void operator()(const Channel& f, const W (&v)[IN], W g, W (&)[1], W (&s)[2]) const {
    const W skip = IN == 2 ? v[IN - 1] : W(0), u = this->u_of(v[0], skip);
    const W h = behind(this->v_of(f, u, skip), g, this->alpha);
    s[0] += h;
    s[1] += h * (u - f.mean);
  }
};

template <typename W>
struct Both {
  Norm<W> norm;
  Slope<W> slope;
};

template <typename T, int IN, int OUT, typename W = Wide<T>>
struct Differentiate : Backward<T, IN, OUT, 0> {
  using Backward<T, IN, OUT, 0>::Backward;
  using Channel = Both<W>;
  __device__ Channel channel(int64_t b, int64_t c) const {
    const int64_t k = b * this->per_sample + c;
    return {this->norm(b, c), {this->level[k], this->by_u[k]}};
  }
  __device__ void operator()(const Channel& f, const W (&v)[IN], W g, W (&o)[OUT], W (&)[1]) const {
    const W skip = IN == 2 ? v[IN - 1] : W(0), u = this->u_of(v[0], skip);
    const W h = behind(this->v_of(f.norm, u, skip), g, this->alpha);
    o[0] = backward(f.norm, f.slope, u, h);
    if constexpr (OUT == 2) o[OUT - 1] = h;
  }
};

// Where gathered sums go.
template <typename W>
struct Two {
  W *one, *two;
  int64_t channels;
  W times;  // of the second
  __device__ void operator()(int64_t b, int64_t c, const W (&total)[2]) const {
    one[b * channels + c] = total[0];
    two[b * channels + c] = total[1] * times;
  }
};

int64_t gathering_blocks(const Launcher& launch, const Shape& shape) {
  return std::min(shape.batch * shape.channels, launch.resident_blocks() * 8);
}

std::tuple<Tensor, Tensor> moments(const Tensor& x, const Side& skip) {
  STD_TORCH_CHECK(x.dim() == 4, "norm_act expects (B, C, H, W)");
  const Launcher launch(x);
  const Map map = dense(x);
  std::optional<Map> second;
  if (skip.has_value()) second = second_map(*skip, map, sizes_of(x), "the skip");
  const Tensor mean = empty_wide(map, {map.batch, map.channels}), squares = empty_wide(map, {map.batch, map.channels});
  const Shape shape{map.batch, map.channels, map.space};
  if (x.numel() == 0) return {mean, squares};
  by_type(x, [&](auto element) {
    using T = decltype(element);
    using W = Wide<T>;
    const T *one = read<T>(map.tensor), *two = second ? read<T>(second->tensor) : nullptr;
    const Cut how = planes::cut<T>(shape, map.last, aligned(one) && aligned(two));
    const Tensor parts = empty_wide(map, {shape.batch, shape.channels, how.chunks, 2});
    W* at = write<W>(parts);
    two ? planes::pass(launch, Measure<T, 2>{one, two}, shape, how, at)
        : planes::pass(launch, Measure<T, 1>{one, two}, shape, how, at);
    const Two<W> end{write<W>(mean), write<W>(squares), shape.channels, static_cast<W>(shape.space)};
    launch(planes::gather_moments<Two<W>, W>, gathering_blocks(launch, shape), dim3(32), static_cast<const W*>(at), shape,
           how.chunks, how.length, end);
  });
  return {mean, squares};
}

Tensor apply(const Tensor& x, const Side& skip, const Tensor& mean, const Tensor& scale, const Tensor& shift, bool first,
             int64_t resample, double alpha) {
  const Launcher launch(x);
  const Call call = prepare(x, skip, mean, scale, shift, first, resample, alpha);
  const Tensor y = empty_like_map(call.x, call.result_sizes());
  if (y.numel() == 0) return y;
  by_type(x, [&](auto element) {
    using T = decltype(element);
    using W = Wide<T>;
    Arrays<T> arrays(call);
    arrays.y = write<T>(y);
    const Shape result{call.x.batch, call.x.channels, y.size(2) * y.size(3)};
    const Cut how = planes::cut<T>(result, call.x.last, arrays.all_aligned());
    W* none = nullptr;
    if (call.resample == DOWN) {
      planes::pass(launch, Resized<T, true>(arrays), result, how, none);
    } else if (call.resample == UP) {
      planes::pass(launch, Resized<T, false>(arrays), result, how, none);
    } else if (arrays.skip) {
      planes::pass(launch, Apply<T, 2>(arrays), result, how, none);
    } else {
      planes::pass(launch, Apply<T, 1>(arrays), result, how, none);
    }
  });
  return y;
}

std::tuple<Tensor, Tensor> sums(const Tensor& g, const Tensor& x, const Side& skip, const Tensor& mean,
                                const Tensor& scale, const Tensor& shift, bool first, int64_t resample, double alpha) {
  const Launcher launch(x);
  const Call call = prepare(x, skip, mean, scale, shift, first, resample, alpha);
  const Map gradient = second_map(g, call.x, call.result_sizes(), "the gradient");
  const Shape shape{call.x.batch, call.x.channels, call.x.space};
  const Tensor sum = empty_wide(call.x, {shape.batch, shape.channels});
  const Tensor moment = empty_wide(call.x, {shape.batch, shape.channels});
  if (x.numel() == 0) return {sum, moment};
  by_type(x, [&](auto element) {
    using T = decltype(element);
    using W = Wide<T>;
    Arrays<T> arrays(call);
    arrays.g = read<T>(gradient.tensor);
    const Cut how = planes::cut<T>(shape, call.x.last, arrays.all_aligned());
    const Tensor parts = empty_wide(call.x, {shape.batch, shape.channels, how.chunks, 2});
    W* at = write<W>(parts);
    arrays.skip ? planes::pass(launch, Weigh<T, 2>(arrays), shape, how, at)
                : planes::pass(launch, Weigh<T, 1>(arrays), shape, how, at);
    const Two<W> end{write<W>(sum), write<W>(moment), shape.channels, W(1)};
    launch(planes::gather<2, Two<W>, W>, gathering_blocks(launch, shape), dim3(32), static_cast<const W*>(at), shape,
           how.chunks, end);
  });
  return {sum, moment};
}

std::tuple<Tensor, Tensor> gradients(const Tensor& g, const Tensor& x, const Side& skip, const Tensor& mean,
                                     const Tensor& scale, const Tensor& shift, const Tensor& level, const Tensor& by_u,
                                     bool first, int64_t resample, double alpha, bool want_skip) {
  const Launcher launch(x);
  const Call call = prepare(x, skip, mean, scale, shift, first, resample, alpha);
  const Map gradient = second_map(g, call.x, call.result_sizes(), "the gradient");
  for (const Tensor* side : {&level, &by_u}) check_constant(*side, call.x, call.per_sample ? call.x.batch : 1);
  const Tensor dx = empty_like_map(call.x, sizes_of(x));
  const Tensor dskip = empty_like_map(call.x, want_skip ? sizes_of(x) : std::vector<int64_t>{0, 1, 1, 1});
  if (dx.numel() == 0) return {dx, dskip};
  STD_TORCH_CHECK(!want_skip || call.skip, "there is no skip");
  const Shape shape{call.x.batch, call.x.channels, call.x.space};
  by_type(x, [&](auto element) {
    using T = decltype(element);
    using W = Wide<T>;
    Arrays<T> arrays(call);
    arrays.g = read<T>(gradient.tensor);
    arrays.level = read<W>(level);
    arrays.by_u = read<W>(by_u);
    arrays.y = write<T>(dx);
    arrays.beside = want_skip ? write<T>(dskip) : nullptr;
    const Cut how = planes::cut<T>(shape, call.x.last, arrays.all_aligned());
    W* none = nullptr;
    if (want_skip) {
      planes::pass(launch, Differentiate<T, 2, 2>(arrays), shape, how, none);
    } else if (arrays.skip) {
      planes::pass(launch, Differentiate<T, 2, 1>(arrays), shape, how, none);
    } else {
      planes::pass(launch, Differentiate<T, 1, 1>(arrays), shape, how, none);
    }
  });
  return {dx, dskip};
}

}  // namespace
}  // namespace sivae::norm_act

SIVAE_OPERATORS {
  m.impl("norm_act_moments", TORCH_BOX(&sivae::norm_act::moments));
  m.impl("norm_act_apply", TORCH_BOX(&sivae::norm_act::apply));
  m.impl("norm_act_sums", TORCH_BOX(&sivae::norm_act::sums));
  m.impl("norm_act_gradients", TORCH_BOX(&sivae::norm_act::gradients));
}
