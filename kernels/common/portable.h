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

#if !defined(__CUDACC__)
// Half by half (IEEE 754 binary16) in whole numbers: compilers make one conversion at a time of the processor's instruction,
// but sixteen at a time of this. Numbers are shifted into place and the exponent's bias (15, 127) is made good.
template <>
SIVAE_HD float widen<Half>(Half value) {
  const uint32_t magnitude = (value.x & 0x7fffu) << 13, sign = (value.x & 0x8000u) << 16;
  const uint32_t bias = 112u << 23, smallest = 1u << 23, endless = 31u << 23;  // of magnitudes: normal, infinite
  // Below the smallest normal one: as a fraction behind 2^-14, which is then taken away.
  const float fraction = __builtin_bit_cast(float, magnitude + bias + smallest) - 0x1p-14f;
  const uint32_t normal = magnitude + bias + (magnitude >= endless ? bias : 0u);
  const uint32_t bits = magnitude < smallest ? __builtin_bit_cast(uint32_t, fraction) : normal;
  return __builtin_bit_cast(float, bits | sign);
}

// To the nearest, ties to even.
template <>
SIVAE_HD Half narrow<Half>(float value) {
  const uint32_t given = __builtin_bit_cast(uint32_t, value), magnitude = given & 0x7fffffffu, sign = given >> 16 & 0x8000u;
  const uint32_t bias = 112u << 23;
  const uint32_t normal = (magnitude - bias + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  // Below 2^-14 the addition rounds: the last place of a half is that of a float at one half.
  const uint32_t fraction =
      __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, magnitude) + 0.5f) - __builtin_bit_cast(uint32_t, 0.5f);
  const uint32_t endless = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = magnitude < 113u << 23 ? fraction : normal;
  return Half(static_cast<unsigned short>(sign | (magnitude >= 143u << 23 ? endless : finite)), Half::from_bits());
}
#endif

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
