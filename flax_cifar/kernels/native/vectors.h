// Vectors of floats, and memory in float or bfloat16.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>

using Index = int64_t;
using bfloat16 = uint16_t;  // the upper half of a float

#ifdef __AVX512F__
constexpr Index LANES = 16;
#else
constexpr Index LANES = 8;
#endif

typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

inline Vector load(const float* from) { return *(const Vector*)from; }

inline Vector load(const bfloat16* from) {
  return (Vector)(__builtin_convertvector(*(const Halves*)from, Bits) << 16);
}

inline void store(float* to, Vector value) { *(Vector*)to = value; }

inline void store(bfloat16* to, Vector value) {  // rounds to the nearest, half to even
  Bits bits = (Bits)value;
  const Bits rounded = bits + 0x7fff + ((bits >> 16) & 1);
  bits = value == value ? rounded : bits | 0x400000;  // NaN stays NaN
  *(Halves*)to = __builtin_convertvector(bits >> 16, Halves);
}

inline float widen(float value) { return value; }

inline float widen(bfloat16 value) {
  const uint32_t bits = (uint32_t)value << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof(wide));
  return wide;
}

// Loads and stores of the first `rest` elements; the others are zero.
template <class T>
inline Vector load(const T* from, Index rest) {
  if (rest >= LANES) return load(from);
  Vector part = {};
#pragma GCC unroll 16
  for (Index i = 0; i < LANES; i++) {
    if (i == rest) break;
    part[i] = widen(from[i]);
  }
  return part;
}

template <class T>
inline void store(T* to, Vector value, Index rest) {
  if (rest >= LANES) return store(to, value);
  T part[LANES];
  store(part, value);
  for (Index i = 0; i < rest; i++) to[i] = part[i];
}

inline Vector relu(Vector x) { return x <= 0 ? Vector{} : x; }  // NaN stays NaN

inline Index round_up(Index count) { return (count + LANES - 1) / LANES * LANES; }

template <class T>
inline void store_all(T* to, const float* from, Index count) {
  for (Index i = 0; i < count; i += LANES) store(to + i, load(from + i));
}

// Asks for memory that the next block needs, little by little, between the tiles of a product:
// processors do not foresee reads with gaps.
struct Prefetch {
  static constexpr Index LINE = 64;
  static constexpr Index MOST = 4;
  const char* arrays[MOST] = {};
  Index sizes[MOST] = {}, used = 0, step = 0;

  template <class T>
  void add(const T* from, Index count) {
    arrays[used] = (const char*)from;
    sizes[used++] = count * sizeof(T);
  }

  void spread(Index tiles) {
    const Index bytes = std::accumulate(sizes, sizes + used, Index(0));
    step = (bytes / LINE + tiles - 1) / tiles;
  }

  void advance() {
    for (Index i = 0; i < step && used; i++) {
      __builtin_prefetch(arrays[used - 1], 0, 2);
      arrays[used - 1] += LINE;
      sizes[used - 1] -= LINE;
      if (sizes[used - 1] <= 0) used--;
    }
  }
};
