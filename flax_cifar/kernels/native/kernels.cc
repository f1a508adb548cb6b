// The functions that Python calls.
//
// Images are NHWC, in float, or in bfloat16 if the macro BFLOAT16 is defined: compiled apart,
// because most runs need float alone. All sums are in float.

#include "direct.h"
#include "finish.h"
#include "pooling.h"
#include "separable.h"
#include "winograd.h"

namespace {

// The arrays of a call: the operands of a function, then its results.
template <class T>
struct Arrays {
  void** arrays;
  T* images(int i) const { return (T*)arrays[i]; }
  float* floats(int i) const { return (float*)arrays[i]; }
  uint32_t* numbers(int i) const { return (uint32_t*)arrays[i]; }
  Affine affine(int i) const { return {floats(i), floats(i + 1), floats(i + 2)}; }
};

template <class T>
void run_separable(Index function, const Shape& s, Arrays<T> a) {
  switch (function) {
    case 0:
      return depthwise_forward(s, a.images(0), a.floats(1), a.images(2), a.floats(3), a.floats(4));
    case 1:
      return depthwise_backward(s, a.images(0), a.images(1), a.floats(2), a.floats(3), a.floats(4),
                                a.images(5), a.floats(6), a.images(7), a.images(8), a.floats(9));
    case 2:
      return pointwise_forward(s, a.images(0), a.affine(1), a.floats(4), a.images(5), a.floats(6),
                               a.floats(7));
    case 3:
      return pointwise_backward(s, a.images(0), a.images(1), a.floats(2), a.floats(3), a.floats(4),
                                a.images(5), a.affine(6), a.floats(9), a.images(10), a.floats(11),
                                a.floats(12), a.floats(13));
  }
}

template <class T>
void run_finish(Index function, const Ending& s, Arrays<T> a) {
  if (function == 4) {
    const int mask = 4 + s.has_shortcut, to = mask + s.drops;
    return finish_forward(s, a.images(0), a.affine(1), a.images(4), a.numbers(mask), a.images(to));
  }
  const int to = 5 + s.drops;
  finish_backward(s, a.images(0), a.images(1), a.affine(2), a.numbers(5), a.images(to),
                  a.floats(to + 1), a.floats(to + 2));
}

template <class T>
void run_dense(Index function, const Convolution& c, Arrays<T> a) {
  if (function % 2 == 0) {
    const auto forward = function == 6 ? winograd_forward<T> : direct_forward<T>;
    return forward(c, a.images(0), a.floats(1), a.floats(2), a.images(3), a.floats(4), a.floats(5));
  }
  const auto backward = function == 7 ? winograd_backward<T> : direct_backward<T>;
  backward(c, a.images(0), a.images(1), a.affine(2), a.images(5), a.floats(6), a.images(7),
           a.floats(8), a.floats(9));
}

template <class T>
void run_pooling(Index function, const Pooling& s, Arrays<T> a) {
  if (function == 10) return pool_forward(s, a.images(0), a.images(1), a.floats(2), a.floats(3));
  pool_backward(s, a.images(0), a.images(1), a.affine(2), a.images(5));
}

template <class Struct>
Struct read(const int64_t* fields) {
  Struct shape;
  std::memcpy(&shape, fields, sizeof(shape));
  return shape;
}

#ifdef BFLOAT16
using Element = bfloat16;
#else
using Element = float;
#endif

void run(Index function, const int64_t* fields, void** arrays) {
  const Arrays<Element> a{arrays};
  if (function < 4) return run_separable(function, read<Shape>(fields), a);
  if (function < 6) return run_finish(function, read<Ending>(fields), a);
  if (function < 10) return run_dense(function, read<Convolution>(fields), a);
  run_pooling(function, read<Pooling>(fields), a);
}

}  // namespace

// Starts `threads` threads for the functions, unless the library of the other type has: the linker
// gives both the same `pool`.
extern "C" void flax_cifar_start(int threads) {
  if (!pool) pool = new Pool(threads);
}

// Runs a function on arrays: its operands, then its results. `key` has the function's number and
// the fields of the struct that describes the arrays.
extern "C" void flax_cifar_run(const int64_t* key, void** arrays) { run(key[0], key + 1, arrays); }
