// Vectors of floats, and memory in float or bfloat16.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <numeric>
#include <vector>

#if defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>
#define MASKED 1  // loads and stores of a part of a vector
#endif

using Index = int64_t;
using bfloat16 = uint16_t;  // the upper half of a float

#ifdef __AVX512F__
constexpr Index LANES = 16;
#else
constexpr Index LANES = 8;
#endif

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
// In memory, at any place. Vectors of the stack are aligned, so that none lies in two cache lines.
typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

constexpr size_t LINE = 64;  // bytes of the cache

// Memory that starts with a cache line.
template <class T>
struct AlignedAllocator {
  using value_type = T;
  AlignedAllocator() = default;
  template <class U>
  AlignedAllocator(const AlignedAllocator<U>&) {}
  T* allocate(size_t count) { return (T*)::operator new(count * sizeof(T), std::align_val_t(LINE)); }
  void deallocate(T* from, size_t) { ::operator delete(from, std::align_val_t(LINE)); }
  bool operator==(const AlignedAllocator&) const { return true; }
  bool operator!=(const AlignedAllocator&) const { return false; }
};
using Array = std::vector<float, AlignedAllocator<float>>;

inline Vector load(const float* from) { return *(const Floats*)from; }

inline Vector load(const bfloat16* from) {
  return (Vector)(__builtin_convertvector(*(const Halves*)from, Bits) << 16);
}

inline void store(float* to, Vector value) { *(Floats*)to = value; }

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
#ifdef MASKED
inline __mmask16 get_mask(Index rest) { return rest >= LANES ? 0xffff : (1u << rest) - 1; }

inline Vector load(const float* from, Index rest) {
  return (Vector)_mm512_maskz_loadu_ps(get_mask(rest), from);
}

inline Vector load(const bfloat16* from, Index rest) {
  const __m256i halves = _mm256_maskz_loadu_epi16(get_mask(rest), from);
  return (Vector)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
}

inline void store(float* to, Vector value, Index rest) {
  _mm512_mask_storeu_ps(to, get_mask(rest), (__m512)value);
}

inline void store(bfloat16* to, Vector value, Index rest) {
  bfloat16 part[LANES];
  store(part, value);
  _mm256_mask_storeu_epi16(to, get_mask(rest), _mm256_loadu_si256((const __m256i*)part));
}
#else
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
#endif

inline Vector relu(Vector x) { return x <= 0 ? Vector{} : x; }  // NaN stays NaN

inline Index round_up(Index count) { return (count + LANES - 1) / LANES * LANES; }

template <class T>
inline void store_all(T* to, const float* from, Index count) {
  for (Index i = 0; i < count; i += LANES) store(to + i, load(from + i));
}

// Asks for memory that the next block needs, little by little, between the tiles of a product:
// processors do not foresee reads with gaps.
struct Prefetch {
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
    step = (bytes / Index(LINE) + tiles - 1) / tiles;
  }

  void advance() {
    for (Index i = 0; i < step && used; i++) {
      __builtin_prefetch(arrays[used - 1], 0, 2);
      arrays[used - 1] += LINE;
      sizes[used - 1] -= Index(LINE);
      if (sizes[used - 1] <= 0) used--;
    }
  }
};
