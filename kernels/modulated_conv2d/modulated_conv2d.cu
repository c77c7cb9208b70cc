// The epilogue of a modulated layer on a GPU: one pass over the map either way; backward adds up the gradients of scale,
// bias, strength and next style on the way.
#include "modulated_conv2d/add_up.h"

namespace sivae::modulated_conv2d {
namespace {

using planes::Cut;

template <typename T_, int IN_, int OUT_, int SUMS_>
struct Pass {
  using T = T_;
  using W = Wide<T>;
  using Channel = sivae::modulated_conv2d::Channel<W>;
  static constexpr int IN = IN_, OUT = OUT_, SUMS = SUMS_;
  static constexpr bool MOMENTS = false;

  Constants<W> constants;
  Formula<W> f;
  const T *x, *g, *g_scaled;
  T *y, *scaled;

  __device__ Channel channel(int64_t b, int64_t c) const { return constants.channel(b, c); }
  int group() const { return constants.noise ? planes::GROUP : 1; }
  template <int V, bool LAST>
  __device__ void beside(const Channel*, int64_t b, int64_t, int64_t p, W (&values)[V]) const {
    if (!constants.noise) return;
    const W* from = constants.noise + b * constants.noise_step + p;
    if constexpr (LAST) {
#pragma unroll
      for (int i = 0; i < V; ++i) values[i] = *from;
    } else {
      const planes::Few<V, W> few = planes::load<V>(from);
#pragma unroll
      for (int i = 0; i < V; ++i) values[i] = few.item[i];
    }
  }
};

// PLAIN, SCALED: which results are written.
template <typename T, bool PLAIN, bool SCALED, typename W = Wide<T>>
struct Forward : Pass<T, 1, int{PLAIN} + int{SCALED}, 0> {
  using Base = Pass<T, 1, int{PLAIN} + int{SCALED}, 0>;
  explicit Forward(const Base& base) : Base(base) {}
  __device__ const T* in(int) const { return this->x; }
  __device__ T* out(int k) const { return PLAIN && k == 0 ? this->y : this->scaled; }
  __device__ void operator()(const typename Base::Channel& c, const W (&v)[1], W noise, W (&o)[Base::OUT],
                             W (&)[1]) const {
    const W result = activated(this->f, value(c, v[0], noise));
    if constexpr (PLAIN) o[0] = result;
    if constexpr (SCALED) o[Base::OUT - 1] = result * c.next;
  }
};

// PLAIN, SCALED: which gradients there are. Sums: scale, bias, strength, next.
template <typename T, bool PLAIN, bool SCALED, typename W = Wide<T>>
struct Backward : Pass<T, 1 + int{PLAIN} + int{SCALED}, 1, 4> {
  using Base = Pass<T, 1 + int{PLAIN} + int{SCALED}, 1, 4>;
  explicit Backward(const Base& base) : Base(base) {}
  __device__ const T* in(int k) const { return k == 0 ? this->x : PLAIN && k == 1 ? this->g : this->g_scaled; }
  __device__ T* out(int) const { return this->y; }
  __device__ void operator()(const typename Base::Channel& c, const W (&v)[Base::IN], W noise, W (&o)[1],
                             W (&s)[4]) const {
    const Gradients<W> d =
        backward(c, this->f, v[0], noise, PLAIN ? v[1] : W(0), SCALED ? v[Base::IN - 1] : W(0));
    o[0] = d.x;
    s[0] += d.scale;
    s[1] += d.bias;
    s[2] += d.strength;
    s[3] += d.next;
  }
};

std::tuple<Tensor, Tensor> run(const Tensor& x, const Tensor& scale, const Side& noise, const Side& strength,
                               const Side& bias, const Side& next, double alpha, double gain, double clamp, bool both) {
  const Launcher launch(x);
  const Call call = prepare(x, scale, noise, strength, bias, next, alpha, gain, clamp);
  const bool plain = both || !next.has_value(), second = next.has_value();
  const Tensor y = empty_result(call, plain), scaled = empty_result(call, second);
  if (x.numel() == 0) return {y, scaled};
  const Shape shape{call.x.batch, call.x.channels, call.x.space};
  by_type(x, [&](auto element) {
    using T = decltype(element);
    using W = Wide<T>;
    const T* from = read<T>(call.x.tensor);
    T *to = plain ? write<T>(y) : nullptr, *to_scaled = second ? write<T>(scaled) : nullptr;
    const Constants<W> constants(call);
    const bool all_aligned = aligned(from) && aligned(to) && aligned(to_scaled) && aligned(constants.noise);
    const Cut how = planes::cut<T>(shape, call.x.last, all_aligned);
    const auto go = [&](auto one, auto two) {
      constexpr bool P = decltype(one)::value, S = decltype(two)::value;
      using F = Forward<T, P, S>;
      planes::pass(launch, F({constants, call.formula<W>(), from, nullptr, nullptr, to, to_scaled}), shape, how,
                   static_cast<W*>(nullptr));
    };
    if (!second) {
      go(std::true_type{}, std::false_type{});
    } else if (plain) {
      go(std::true_type{}, std::true_type{});
    } else {
      go(std::false_type{}, std::true_type{});
    }
  });
  return {y, scaled};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> run_backward(const Side& g, const Side& g_scaled, const Tensor& x,
                                                                const Tensor& scale, const Side& noise,
                                                                const Side& strength, const Side& bias, const Side& next,
                                                                double alpha, double gain, double clamp) {
  const Launcher launch(x);
  const Call call = prepare(x, scale, noise, strength, bias, next, alpha, gain, clamp);
  const std::optional<Map> plain = like_map(g, call.x), beside = like_map(g_scaled, call.x);
  const Shape shape{call.x.batch, call.x.channels, call.x.space};
  const Tensor dx = empty_result(call, true);
  const Tensor dscale = empty_wide(call, {shape.batch, shape.channels});
  const Tensor dnext = empty_wide(call, {shape.batch, shape.channels});
  Tensor dbias = empty_wide(call, {shape.channels}), dstrength = empty_wide(call, {});
  STD_TORCH_CHECK(plain || beside, "there is no gradient");
  if (x.numel() == 0) {
    torch::stable::zero_(dbias);
    torch::stable::zero_(dstrength);
    return {dx, dscale, dbias, dstrength, dnext};
  }
  by_type(x, [&](auto element) {
    using T = decltype(element);
    using W = Wide<T>;
    const T *from = read<T>(call.x.tensor), *one = plain ? read<T>(plain->tensor) : nullptr;
    const T* two = beside ? read<T>(beside->tensor) : nullptr;
    T* to = write<T>(dx);
    const Constants<W> constants(call);
    const bool all_aligned = aligned(from) && aligned(one) && aligned(two) && aligned(to) && aligned(constants.noise);
    const Cut how = planes::cut<T>(shape, call.x.last, all_aligned);
    const Tensor parts = empty_wide(call, {shape.batch, shape.channels, how.chunks, 4});
    W* at = write<W>(parts);
    const auto go = [&](auto with_plain, auto with_scaled) {
      using F = Backward<T, decltype(with_plain)::value, decltype(with_scaled)::value>;
      planes::pass(launch, F({constants, call.formula<W>(), from, one, two, to, nullptr}), shape, how, at);
    };
    if (!beside) {
      go(std::true_type{}, std::false_type{});
    } else if (plain) {
      go(std::true_type{}, std::true_type{});
    } else {
      go(std::false_type{}, std::true_type{});
    }
    add_up<W>(launch, call, at, how.chunks, {dscale, dnext, dbias, dstrength});
  });
  return {dx, dscale, dbias, dstrength, dnext};
}

}  // namespace
}  // namespace sivae::modulated_conv2d

SIVAE_OPERATORS {
  m.impl("modulated_epilogue", TORCH_BOX(&sivae::modulated_conv2d::run));
  m.impl("modulated_epilogue_backward", TORCH_BOX(&sivae::modulated_conv2d::run_backward));
}
