// What nvcc and g++ both compile: types, wide arithmetic, 16-byte packs.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__)
#define SIVAE_HD __host__ __device__ __forceinline__
#else
#define SIVAE_HD inline __attribute__((always_inline))
#endif

namespace sivae {

using Half = torch::headeronly::Half;
using BFloat16 = torch::headeronly::BFloat16;

// What sums are kept in: float, for double double.
template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
SIVAE_HD Wide<T> widen(T value) {
  return static_cast<Wide<T>>(value);
}

// bfloat16 is the upper half of a float; written out, so that g++ vectorises it.
template <>
SIVAE_HD float widen<BFloat16>(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.x) << 16;
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float result;
  __builtin_memcpy(&result, &bits, sizeof(result));
  return result;
#endif
}

template <typename T>
SIVAE_HD T narrow(Wide<T> value) {
  return static_cast<T>(value);
}

// As many elements as fill 16 bytes, loaded and stored at once.
template <typename T>
struct alignas(16) Pack {
  static constexpr int size = 16 / sizeof(T);
  T item[size];
};

// Quotient rounded towards minus infinity; the divisor is positive.
SIVAE_HD int64_t floor_div(int64_t a, int64_t b) {
  const int64_t q = a / b;
  return q - (a % b < 0);
}

// Quotient rounded towards plus infinity; the divisor is positive.
SIVAE_HD int64_t ceil_div(int64_t a, int64_t b) { return floor_div(a + b - 1, b); }

}  // namespace sivae
