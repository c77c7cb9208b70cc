// upfirdn2d on the CPU. Separable filters: per output row one vertical pass into a buffer of the wide type, then one
// horizontal pass; both are plain loops over a row that g++ vectorises. Other filters: pixel by pixel.
#include "upfirdn2d/host.h"

namespace sivae::upfirdn2d {
namespace {

constexpr int64_t GRAIN = 1 << 15;  // output elements a thread should at least have

// A separable filter by tap, not element: turned round where need be, with the gain in the vertical part.
template <typename W>
struct Separable {
  std::vector<W> y, x;
};

template <typename W>
std::optional<Separable<W>> factors(const Call& call) {
  const W gain = static_cast<W>(call.gain);
  const int32_t ty = call.ay.taps, tx = call.ax.taps;
  Separable<W> found{std::vector<W>(ty, W(1)), std::vector<W>(tx, W(1))};
  if (call.f.has_value() && call.f->dim() == 1) {
    std::copy_n(read<W>(*call.f), ty, found.y.begin());
    found.x = found.y;
  } else if (call.f.has_value()) {
    W fy[4], fx[4];
    if (ty != 4 || tx != 4 || !separate<4>(read<W>(*call.f), fy, fx)) return std::nullopt;
    found = {{fy, fy + 4}, {fx, fx + 4}};
  }
  if (!call.flip) {
    std::reverse(found.y.begin(), found.y.end());
    std::reverse(found.x.begin(), found.x.end());
  }
  for (W& weight : found.y) weight *= gain;
  return found;
}

// buffer[i] = sum of the weighted input rows that output row oy reaches.
template <typename T, typename W>
void vertical(const T* plane, int64_t row, const Axis& a, const std::vector<W>& taps, int64_t oy, W* buffer) {
  const Reach r = reach(a, oy);
  if (r.count == 0) {
    std::fill_n(buffer, row, W(0));
    return;
  }
  const T* first = plane + r.start * row;
  const W w0 = taps[r.first];
  if (r.count == 1) {
    for (int64_t i = 0; i < row; ++i) buffer[i] = widen(first[i]) * w0;
    return;
  }
  const T* second = first + row;
  const W w1 = taps[r.first + a.up];
  int32_t done = 2;
  if (r.count >= 4) {  // four rows at once: the buffer is written once
    const T *third = second + row, *fourth = third + row;
    const W w2 = taps[r.first + 2 * a.up], w3 = taps[r.first + 3 * a.up];
    for (int64_t i = 0; i < row; ++i) {
      buffer[i] = (widen(first[i]) * w0 + widen(second[i]) * w1) + (widen(third[i]) * w2 + widen(fourth[i]) * w3);
    }
    done = 4;
  } else {
    for (int64_t i = 0; i < row; ++i) buffer[i] = widen(first[i]) * w0 + widen(second[i]) * w1;
  }
  for (; done < r.count; ++done) {
    const T* next = first + done * row;
    const W weight = taps[r.first + done * a.up];
    for (int64_t i = 0; i < row; ++i) buffer[i] += widen(next[i]) * weight;
  }
}

// The outputs o = from .. to - 1 whose taps all lie inside, for 4 taps and the factors that matter. `in` is the buffer.
template <int UP, int DOWN, typename T, typename W>
void horizontal4(const W* in, const Axis& a, const W* w, int64_t from, int64_t to, T* out) {
  if constexpr (UP == 2) {
    const Reach even = reach(a, from), odd = reach(a, from + 1);
    const W a0 = w[even.first], a1 = w[even.first + 2], b0 = w[odd.first], b1 = w[odd.first + 2];
    const W *pa = in + even.start, *pb = in + odd.start;
    T* __restrict pair = out + from;
    for (int64_t m = 0; m < (to - from) / 2; ++m) {
      pair[2 * m] = narrow<T>(pa[m] * a0 + pa[m + 1] * a1);
      pair[2 * m + 1] = narrow<T>(pb[m] * b0 + pb[m + 1] * b1);
    }
  } else {
    const W w0 = w[0], w1 = w[1], w2 = w[2], w3 = w[3];
    const W* p = in + (from * DOWN - a.pad);
    T* __restrict q = out + from;
    for (int64_t m = 0; m < to - from; ++m) {
      const W* s = p + m * DOWN;
      q[m] = narrow<T>((s[0] * w0 + s[1] * w1) + (s[2] * w2 + s[3] * w3));
    }
  }
}

template <typename T, typename W>
void one_by_one(const W* in, const Axis& a, const std::vector<W>& taps, int64_t from, int64_t to, T* out) {
  for (int64_t o = from; o < to; ++o) {
    const Reach r = reach(a, o);
    W sum = 0;
    for (int32_t k = 0; k < r.count; ++k) sum += in[r.start + k] * taps[r.first + k * a.up];
    out[o] = narrow<T>(sum);
  }
}

// One row of outputs from a row of sums, channels innermost or none (channels = 1 and contiguous rows).
template <typename T, typename W>
void horizontal(const W* in, const Axis& a, const std::vector<W>& taps, T* out) {
  if (a.taps == 4 && a.up <= 2 && a.down <= 2 && a.up * a.down <= 2) {
    // From the first output that reaches over no edge to the last; an even number of them where they come in pairs.
    const int64_t from = std::clamp<int64_t>(ceil_div(a.pad, a.down), 0, a.out);
    int64_t to = std::clamp<int64_t>(floor_div(a.in * a.up - 4 + a.pad, a.down) + 1, from, a.out);
    if (a.up == 2) to -= (to - from) % 2;
    one_by_one(in, a, taps, 0, from, out);
    if (to == from) {
    } else if (a.up == 2) {
      horizontal4<2, 1>(in, a, taps.data(), from, to, out);
    } else if (a.down == 2) {
      horizontal4<1, 2>(in, a, taps.data(), from, to, out);
    } else {
      horizontal4<1, 1>(in, a, taps.data(), from, to, out);
    }
    one_by_one(in, a, taps, to, a.out, out);
  } else {
    one_by_one(in, a, taps, 0, a.out, out);
  }
}

template <typename T, typename W>
void horizontal_last(const W* in, const Axis& a, const std::vector<W>& taps, int64_t channels, T* out) {
  for (int64_t o = 0; o < a.out; ++o) {
    const Reach r = reach(a, o);
    T* __restrict q = out + o * channels;
    const W* p = in + r.start * channels;
    if (r.count == 4) {
      const W w0 = taps[r.first], w1 = taps[r.first + a.up], w2 = taps[r.first + 2 * a.up];
      const W w3 = taps[r.first + 3 * a.up];
      const W *p1 = p + channels, *p2 = p1 + channels, *p3 = p2 + channels;
      for (int64_t c = 0; c < channels; ++c) q[c] = narrow<T>((p[c] * w0 + p1[c] * w1) + (p2[c] * w2 + p3[c] * w3));
    } else if (r.count == 2) {
      const W w0 = taps[r.first], w1 = taps[r.first + a.up];
      const W* p1 = p + channels;
      for (int64_t c = 0; c < channels; ++c) q[c] = narrow<T>(p[c] * w0 + p1[c] * w1);
    } else {
      for (int64_t c = 0; c < channels; ++c) {
        W sum = 0;
        for (int32_t k = 0; k < r.count; ++k) sum += p[k * channels + c] * taps[r.first + k * a.up];
        q[c] = narrow<T>(sum);
      }
    }
  }
}

template <typename T>
void separable(const Call& call, const Separable<Wide<T>>& f) {
  using W = Wide<T>;
  const Axis ay = call.ay, ax = call.ax;
  const int64_t channels = call.x.last ? call.x.channels : 1;
  const int64_t planes = call.x.batch * call.x.channels / std::max<int64_t>(channels, 1);
  const int64_t row_in = ax.in * channels, row_out = ax.out * channels;
  const T* x = read<T>(call.x.tensor);
  T* y = write<T>(call.y);
  torch::stable::parallel_for(0, planes * ay.out, GRAIN / std::max<int64_t>(row_out, 1) + 1, [&](int64_t from, int64_t to) {
    std::vector<W> buffer(row_in);
    for (int64_t k = from; k < to; ++k) {
      const int64_t plane = k / ay.out, oy = k % ay.out;
      vertical(x + plane * ay.in * row_in, row_in, ay, f.y, oy, buffer.data());
      if (call.x.last) {
        horizontal_last(buffer.data(), ax, f.x, channels, y + k * row_out);
      } else {
        horizontal(buffer.data(), ax, f.x, y + k * row_out);
      }
    }
  });
}

template <typename T>
void direct(const Call& call) {
  using W = Wide<T>;
  const Axis ay = call.ay, ax = call.ax;
  const int64_t channels = call.x.channels, step = call.x.last ? channels : 1;
  const int64_t plane_in = ay.in * ax.in, total = call.x.batch * ay.out;
  const W gain = static_cast<W>(call.gain);
  const W* f = read<W>(call.f);
  const T* x = read<T>(call.x.tensor);
  T* y = write<T>(call.y);
  const int64_t row = std::max<int64_t>(ax.out * channels, 1);
  torch::stable::parallel_for(0, total, GRAIN / 8 / row + 1, [&](int64_t from, int64_t to) {
    for (int64_t k = from; k < to; ++k) {
      const int64_t b = k / ay.out, oy = k % ay.out;
      for (int64_t c = 0; c < channels; ++c) {
        const T* map = x + b * channels * plane_in + c * (call.x.last ? 1 : plane_in);
        T* out = call.x.last ? y + k * row + c : y + ((b * channels + c) * ay.out + oy) * ax.out;
        for (int64_t ox = 0; ox < ax.out; ++ox) {
          out[ox * step] = narrow<T>(pixel(map, ax.in * step, step, f, false, ay, ax, call.flip, oy, ox) * gain);
        }
      }
    }
  });
}

Tensor run(const Tensor& x, const std::optional<Tensor>& f, int64_t up_x, int64_t up_y, int64_t down_x, int64_t down_y,
           int64_t pad_x0, int64_t pad_x1, int64_t pad_y0, int64_t pad_y1, bool flip, double gain) {
  const Call call = prepare(x, f, up_x, up_y, down_x, down_y, pad_x0, pad_x1, pad_y0, pad_y1, flip, gain);
  if (call.y.numel() == 0) return call.y;
  by_type(x, [&](auto element) {
    using T = decltype(element);
    if (const auto split = factors<Wide<T>>(call)) {
      separable<T>(call, *split);
    } else {
      direct<T>(call);
    }
  });
  return call.y;
}

}  // namespace
}  // namespace sivae::upfirdn2d

STABLE_TORCH_LIBRARY_IMPL(sivae, CPU, m) { 
  m.impl("upfirdn2d", TORCH_BOX(&sivae::upfirdn2d::run));
  m.impl("upfirdn2d_backward", TORCH_BOX(&sivae::upfirdn2d::run));  // its transpose is of its kind
}
