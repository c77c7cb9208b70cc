// norm_act on the CPU. Contiguous maps: rows of a channel of a sample (the whole channel counts as one row where nothing
// is resampled). channels_last: COLUMNS channels of a sample, pixel by pixel.
#include "common/rows_cpu.h"
#include "norm_act/host.h"

namespace sivae::norm_act {
namespace {

template <typename T, typename W = Wide<T>>
struct Reader {
  const T *x, *skip;
  const W *mean, *scale, *shift;
  int64_t batch, channels, height, width, per_sample;
  bool first, last;
  Resample resample;
  W alpha;

  explicit Reader(const Call& call)
      : x(read<T>(call.x.tensor)),
        skip(call.skip ? read<T>(call.skip->tensor) : nullptr),
        mean(read<W>(call.mean)),
        scale(read<W>(call.scale)),
        shift(read<W>(call.shift)),
        batch(call.x.batch),
        channels(call.x.channels),
        height(call.resample == NONE ? 1 : call.height),
        width(call.resample == NONE ? call.height * call.width : call.width),
        per_sample(call.per_sample),
        first(call.first),
        last(call.x.last),
        resample(call.resample),
        alpha(static_cast<W>(call.alpha)) {}

  int64_t space() const { return height * width; }
  int64_t out_width() const { return resample == DOWN ? width / 2 : resample == UP ? width * 2 : width; }
  int64_t out_height() const { return resample == DOWN ? height / 2 : resample == UP ? height * 2 : height; }
  int64_t out_space() const { return out_height() * out_width(); }
  Norm<W> norm(int64_t b, int64_t c) const {
    const int64_t k = b * per_sample + c;
    return {mean[k], scale[k], shift[k]};
  }
};

// u and v of `many` neighbours from offset `at` on; f(i) gives the norm.
template <typename T, typename W, typename F>
void values(const Reader<T>& in, int64_t at, int64_t many, const F& f, W* __restrict u, W* __restrict v) {
  const T *x = in.x + at, *skip = in.skip + at;
  if (in.skip == nullptr) {
    for (int64_t i = 0; i < many; ++i) u[i] = widen(x[i]);
    for (int64_t i = 0; i < many; ++i) v[i] = value(f(i), u[i]);
  } else if (in.first) {
    for (int64_t i = 0; i < many; ++i) u[i] = widen(x[i]) + widen(skip[i]);
    for (int64_t i = 0; i < many; ++i) v[i] = value(f(i), u[i]);
  } else {
    for (int64_t i = 0; i < many; ++i) u[i] = widen(x[i]);
    for (int64_t i = 0; i < many; ++i) v[i] = value(f(i), u[i]) + widen(skip[i]);
  }
}

template <typename T, typename W, typename F>
void activations(const Reader<T>& in, int64_t at, int64_t many, const F& f, W* __restrict out) {
  W u[CHUNK];
  values(in, at, many, f, u, out);
  for (int64_t i = 0; i < many; ++i) out[i] = leaky(out[i], in.alpha);
}

// Calls work(k) for k below count; each makes `size` elements.
template <typename F>
void share(int64_t count, int64_t size, const F& work) {
  torch::stable::parallel_for(0, count, pieces(size), [&](int64_t from, int64_t to) {
    for (int64_t k = from; k < to; ++k) work(k);
  });
}

// Calls work(b, c0, many) for every COLUMNS channels of every sample.
template <typename T, typename F>
void share_columns(const Reader<T>& in, const F& work) {
  const int64_t tiles = (in.channels + COLUMNS - 1) / COLUMNS;
  share(in.batch * tiles, in.space() * COLUMNS, [&](int64_t k) {
    const int64_t c0 = k % tiles * COLUMNS;
    work(k / tiles, c0, std::min(COLUMNS, in.channels - c0));
  });
}

template <typename T, typename W>
void apply_rows(const Reader<T>& in, T* y) {
  share(in.batch * in.channels, in.space(), [&](int64_t k) {
    const Norm<W> norm = in.norm(k / in.channels, k % in.channels);
    const auto f = [&](int64_t) { return norm; };
    const int64_t plane = k * in.space(), wide = in.out_width();
    T* out = y + k * in.out_space();
    W one[CHUNK], two[CHUNK];
    for (int64_t row = 0; row < (in.resample == DOWN ? in.height / 2 : in.height); ++row) {
      for (int64_t from = 0; from < in.width; from += CHUNK) {
        const int64_t many = std::min(CHUNK, in.width - from);
        if (in.resample == DOWN) {
          activations(in, plane + 2 * row * in.width + from, many, f, one);
          activations(in, plane + (2 * row + 1) * in.width + from, many, f, two);
          T* __restrict to = out + row * wide + from / 2;
          for (int64_t i = 0; i < many / 2; ++i) {
            to[i] = narrow<T>(((one[2 * i] + one[2 * i + 1]) + (two[2 * i] + two[2 * i + 1])) / 4);
          }
          continue;
        }
        activations(in, plane + row * in.width + from, many, f, one);
        if (in.resample == UP) {
          T* to = out + 2 * row * wide + 2 * from;
          for (int64_t i = 0; i < many; ++i) to[2 * i] = to[2 * i + 1] = narrow<T>(one[i]);
          std::copy_n(to, 2 * many, to + wide);
        } else {
          T* __restrict to = out + row * wide + from;
          for (int64_t i = 0; i < many; ++i) to[i] = narrow<T>(one[i]);
        }
      }
    }
  });
}

template <typename T, typename W>
void apply_columns(const Reader<T>& in, T* y) {
  share_columns(in, [&](int64_t b, int64_t c0, int64_t many) {
    Norm<W> norms[COLUMNS];
    for (int64_t c = 0; c < many; ++c) norms[c] = in.norm(b, c0 + c);
    const auto f = [&](int64_t i) { return norms[i]; };
    const auto at = [&](int64_t p) { return (b * in.space() + p) * in.channels + c0; };
    const auto to = [&](int64_t p) { return y + (b * in.out_space() + p) * in.channels + c0; };
    W all[4][COLUMNS];
    const int64_t wide = in.out_width();
    if (in.resample == DOWN) {
      for (int64_t p = 0; p < in.out_space(); ++p) {
        const int64_t corner = p / wide * 2 * in.width + p % wide * 2;
        for (int k = 0; k < 4; ++k) activations(in, at(corner + k / 2 * in.width + k % 2), many, f, all[k]);
        T* __restrict out = to(p);
        for (int64_t c = 0; c < many; ++c) {
          out[c] = narrow<T>(((all[0][c] + all[1][c]) + (all[2][c] + all[3][c])) / 4);
        }
      }
      return;
    }
    for (int64_t p = 0; p < in.space(); ++p) {
      activations(in, at(p), many, f, all[0]);
      const int64_t corner = in.resample == UP ? p / in.width * 2 * wide + p % in.width * 2 : p;
      T* __restrict out = to(corner);
      for (int64_t c = 0; c < many; ++c) out[c] = narrow<T>(all[0][c]);
      if (in.resample == UP) {
        for (const int64_t next : {int64_t{1}, wide, wide + 1}) std::copy_n(out, many, to(corner + next));
      }
    }
  });
}

// The gradient of leaky(v) at `many` neighbours of a row of a contiguous plane.
template <typename T, typename W>
void gradient_row(const Reader<T>& in, const T* g, int64_t row, int64_t from, int64_t many, W* __restrict out) {
  if (in.resample == NONE) {
    for (int64_t i = 0; i < many; ++i) out[i] = widen(g[row * in.width + from + i]);
  } else if (in.resample == DOWN) {
    const int64_t wide = in.width / 2, inside = row / 2 < in.height / 2 ? std::clamp<int64_t>(2 * wide - from, 0, many) : 0;
    const T* each = g + row / 2 * wide + from / 2;  // `from` is even, as CHUNK is, and so is `inside`
    for (int64_t i = 0; i < inside / 2; ++i) out[2 * i] = out[2 * i + 1] = widen(each[i]) / 4;
    std::fill(out + inside, out + many, W(0));  // of an odd size, the last row and column are left out
  } else {
    const T *above = g + 4 * row * in.width + 2 * from, *below = above + 2 * in.width;
    for (int64_t i = 0; i < many; ++i) {
      out[i] = (widen(above[2 * i]) + widen(above[2 * i + 1])) + (widen(below[2 * i]) + widen(below[2 * i + 1]));
    }
  }
}

// The same at `many` channels of a pixel of a channels_last map.
template <typename T, typename W>
void gradient_pixel(const Reader<T>& in, const T* g, int64_t p, int64_t many, W* __restrict out) {
  if (in.resample == NONE) {
    for (int64_t c = 0; c < many; ++c) out[c] = widen(g[p * in.channels + c]);
  } else if (in.resample == DOWN) {
    const int64_t row = p / in.width / 2, column = p % in.width / 2;
    if (row >= in.height / 2 || column >= in.width / 2) {
      std::fill_n(out, many, W(0));
      return;
    }
    const T* from = g + (row * (in.width / 2) + column) * in.channels;
    for (int64_t c = 0; c < many; ++c) out[c] = widen(from[c]) / 4;
  } else {
    const int64_t next = 2 * in.width * in.channels;
    const T* from = g + p / in.width * 2 * next + p % in.width * 2 * in.channels;
    for (int64_t c = 0; c < many; ++c) {
      const T *above = from + c, *below = above + next;
      out[c] = (widen(above[0]) + widen(above[in.channels])) + (widen(below[0]) + widen(below[in.channels]));
    }
  }
}

// u and h of every piece of a plane: piece(at, many, u, h).
template <typename T, typename W, typename F>
void sweep_rows(const Reader<T>& in, const T* g, int64_t k, const Norm<W>& norm, const F& piece) {
  W u[CHUNK], h[CHUNK], v[CHUNK];
  for (int64_t row = 0; row < in.height; ++row) {
    for (int64_t from = 0; from < in.width; from += CHUNK) {
      const int64_t many = std::min(CHUNK, in.width - from), at = k * in.space() + row * in.width + from;
      gradient_row(in, g + k * in.out_space(), row, from, many, h);
      values(in, at, many, [&](int64_t) { return norm; }, u, v);
      for (int64_t i = 0; i < many; ++i) h[i] = behind(v[i], h[i], in.alpha);
      piece(at, many, u, h);
    }
  }
}

template <typename T, typename W, typename F>
void sweep_columns(const Reader<T>& in, const T* g, int64_t b, int64_t c0, int64_t many, const Norm<W>* norms,
                   const F& piece) {
  W u[COLUMNS], h[COLUMNS], v[COLUMNS];
  for (int64_t p = 0; p < in.space(); ++p) {
    const int64_t at = (b * in.space() + p) * in.channels + c0;
    gradient_pixel(in, g + b * in.out_space() * in.channels + c0, p, many, h);
    values(in, at, many, [&](int64_t i) { return norms[i]; }, u, v);
    for (int64_t c = 0; c < many; ++c) h[c] = behind(v[c], h[c], in.alpha);
    piece(at, many, u, h);
  }
}

std::tuple<Tensor, Tensor> moments(const Tensor& x, const Side& skip) {
  STD_TORCH_CHECK(x.dim() == 4, "norm_act expects (B, C, H, W)");
  const Map map = dense(x);
  std::optional<Map> second;
  if (skip.has_value()) second = second_map(*skip, map, sizes_of(x), "the skip");
  const Tensor mean = empty_wide(map, {map.batch, map.channels}), squares = empty_wide(map, {map.batch, map.channels});
  by_type(x, [&](auto element) {
    using T = decltype(element);
    using W = Wide<T>;
    const T *first = read<T>(map.tensor), *other = second ? read<T>(second->tensor) : nullptr;
    const auto fill = [&](int64_t at, int64_t many, W* __restrict out) {
      for (int64_t i = 0; i < many; ++i) out[i] = widen(first[at + i]);
      if (other == nullptr) return;
      for (int64_t i = 0; i < many; ++i) out[i] += widen(other[at + i]);
    };
    const auto keep = [&](int64_t k, const Moments<double>& found) {
      write<W>(mean)[k] = static_cast<W>(found.sum / found.count);
      write<W>(squares)[k] = static_cast<W>(found.squares);
    };
    if (!map.last) {
      share(map.batch * map.channels, map.space, [&](int64_t k) {
        keep(k, row_moments<W>(map.space, [&](int64_t from, int64_t many, W* out) {
               fill(k * map.space + from, many, out);
             }));
      });
      return;
    }
    const int64_t tiles = (map.channels + COLUMNS - 1) / COLUMNS;
    share(map.batch * tiles, map.space * COLUMNS, [&](int64_t k) {
      const int64_t b = k / tiles, c0 = k % tiles * COLUMNS, many = std::min(COLUMNS, map.channels - c0);
      Moments<double> found[COLUMNS];
      column_moments<W>(map.space, many, found, [&](int64_t p, W* out) {
        fill((b * map.space + p) * map.channels + c0, many, out);
      });
      for (int64_t c = 0; c < many; ++c) keep(b * map.channels + c0 + c, found[c]);
    });
  });
  return {mean, squares};
}

Tensor apply(const Tensor& x, const Side& skip, const Tensor& mean, const Tensor& scale, const Tensor& shift, bool first,
             int64_t resample, double alpha) {
  const Call call = prepare(x, skip, mean, scale, shift, first, resample, alpha);
  const Tensor y = empty_like_map(call.x, call.result_sizes());
  if (y.numel() == 0) return y;
  by_type(x, [&](auto element) {
    using T = decltype(element);
    const Reader<T> in(call);
    (in.last ? apply_columns<T, Wide<T>> : apply_rows<T, Wide<T>>)(in, write<T>(y));
  });
  return y;
}

// Sums over pixels of h, and of h (u - mean).
std::tuple<Tensor, Tensor> sums(const Tensor& g, const Tensor& x, const Side& skip, const Tensor& mean,
                                const Tensor& scale, const Tensor& shift, bool first, int64_t resample, double alpha) {
  const Call call = prepare(x, skip, mean, scale, shift, first, resample, alpha);
  const Map gradient = second_map(g, call.x, call.result_sizes(), "the gradient");
  const Tensor sum = empty_wide(call.x, {call.x.batch, call.x.channels});
  const Tensor moment = empty_wide(call.x, {call.x.batch, call.x.channels});
  by_type(x, [&](auto element) {
    using T = decltype(element);
    using W = Wide<T>;
    const Reader<T> in(call);
    const T* from = read<T>(gradient.tensor);
    if (!in.last) {
      share(in.batch * in.channels, in.space(), [&](int64_t k) {
        const Norm<W> norm = in.norm(k / in.channels, k % in.channels);
        double one = 0, two = 0;
        sweep_rows<T, W>(in, from, k, norm, [&](int64_t, int64_t many, W* __restrict u, const W* __restrict h) {
          for (int64_t i = 0; i < many; ++i) u[i] = (u[i] - norm.mean) * h[i];
          one += sum_of(h, many);
          two += sum_of(u, many);
        });
        write<W>(sum)[k] = static_cast<W>(one);
        write<W>(moment)[k] = static_cast<W>(two);
      });
      return;
    }
    share_columns(in, [&](int64_t b, int64_t c0, int64_t many) {
      Norm<W> norms[COLUMNS];
      double one[COLUMNS] = {}, two[COLUMNS] = {};
      for (int64_t c = 0; c < many; ++c) norms[c] = in.norm(b, c0 + c);
      sweep_columns<T, W>(in, from, b, c0, many, norms, [&](int64_t, int64_t, const W* u, const W* h) {
        for (int64_t c = 0; c < many; ++c) one[c] += h[c];
        for (int64_t c = 0; c < many; ++c) two[c] += (u[c] - norms[c].mean) * h[c];
      });
      for (int64_t c = 0; c < many; ++c) {
        write<W>(sum)[b * in.channels + c0 + c] = static_cast<W>(one[c]);
        write<W>(moment)[b * in.channels + c0 + c] = static_cast<W>(two[c]);
      }
    });
  });
  return {sum, moment};
}

// The gradients of u, and (where want_skip) of a skip that comes last.
std::tuple<Tensor, Tensor> gradients(const Tensor& g, const Tensor& x, const Side& skip, const Tensor& mean,
                                     const Tensor& scale, const Tensor& shift, const Tensor& level, const Tensor& by_u,
                                     bool first, int64_t resample, double alpha, bool want_skip) {
  const Call call = prepare(x, skip, mean, scale, shift, first, resample, alpha);
  const Map gradient = second_map(g, call.x, call.result_sizes(), "the gradient");
  for (const Tensor* side : {&level, &by_u}) check_constant(*side, call.x, call.per_sample ? call.x.batch : 1);
  const Tensor dx = empty_like_map(call.x, sizes_of(x));
  const Tensor dskip = empty_like_map(call.x, want_skip ? sizes_of(x) : std::vector<int64_t>{0, 1, 1, 1});
  if (dx.numel() == 0) return {dx, dskip};
  by_type(x, [&](auto element) {
    using T = decltype(element);
    using W = Wide<T>;
    const Reader<T> in(call);
    const T* from = read<T>(gradient.tensor);
    T *to_x = write<T>(dx), *to_skip = want_skip ? write<T>(dskip) : nullptr;
    const auto slope = [&](int64_t b, int64_t c) {
      const int64_t k = b * in.per_sample + c;
      return Slope<W>{read<W>(level)[k], read<W>(by_u)[k]};
    };
    const auto emit = [&](int64_t at, int64_t many, const W* __restrict u, const W* __restrict h, const auto& norm,
                          const auto& slopes) {
      T* __restrict out = to_x + at;
      for (int64_t i = 0; i < many; ++i) out[i] = narrow<T>(backward(norm(i), slopes(i), u[i], h[i]));
      if (to_skip == nullptr) return;
      T* __restrict beside = to_skip + at;
      for (int64_t i = 0; i < many; ++i) beside[i] = narrow<T>(h[i]);
    };
    if (!in.last) {
      share(in.batch * in.channels, in.space(), [&](int64_t k) {
        const Norm<W> norm = in.norm(k / in.channels, k % in.channels);
        const Slope<W> s = slope(k / in.channels, k % in.channels);
        sweep_rows<T, W>(in, from, k, norm, [&](int64_t at, int64_t many, const W* u, const W* h) {
          emit(at, many, u, h, [&](int64_t) { return norm; }, [&](int64_t) { return s; });
        });
      });
      return;
    }
    share_columns(in, [&](int64_t b, int64_t c0, int64_t many) {
      Norm<W> norms[COLUMNS];
      Slope<W> slopes[COLUMNS];
      for (int64_t c = 0; c < many; ++c) norms[c] = in.norm(b, c0 + c);
      for (int64_t c = 0; c < many; ++c) slopes[c] = slope(b, c0 + c);
      sweep_columns<T, W>(in, from, b, c0, many, norms, [&](int64_t at, int64_t n, const W* u, const W* h) {
        emit(at, n, u, h, [&](int64_t i) { return norms[i]; }, [&](int64_t i) { return slopes[i]; });
      });
    });
  });
  return {dx, dskip};
}

}  // namespace
}  // namespace sivae::norm_act

STABLE_TORCH_LIBRARY_IMPL(sivae, CPU, m) {
  m.impl("norm_act_moments", TORCH_BOX(&sivae::norm_act::moments));
  m.impl("norm_act_apply", TORCH_BOX(&sivae::norm_act::apply));
  m.impl("norm_act_sums", TORCH_BOX(&sivae::norm_act::sums));
  m.impl("norm_act_gradients", TORCH_BOX(&sivae::norm_act::gradients));
}
