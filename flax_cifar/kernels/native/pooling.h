// Max pooling over adjacent square windows; pixels that fill no window are cut off.

#pragma once

#include <algorithm>

#include "images.h"
#include "pool.h"

struct Pooling {
  Index count, height, width, channels;  // of the input
  Index window;                          // pixels of a side
  Index measured;                        // whether the output's moments are asked for
  Index out_height() const { return height / window; }
  Index out_width() const { return width / window; }
};

// Writes a row of the output. NaN is larger than any number.
template <class T>
void pool_row(const Pooling& shape, const T* rows, T* to) {
  const Pooling s = shape;
  const Index line = s.width * s.channels;
  for (Index x = 0; x < s.out_width(); x++, rows += s.window * s.channels, to += s.channels)
    for (Index k = 0; k < s.channels; k += LANES) {
      const Index rest = s.channels - k;
      Vector best = load(rows + k, rest);
      for (Index i = 0; i < s.window; i++)
        for (Index j = 0; j < s.window; j++) {
          const Vector value = load(rows + i * line + j * s.channels + k, rest);
          best = (value > best) | (value != value) ? value : best;
        }
      store(to + k, best, rest);
    }
}

// Gives the gradient of each output to the first pixel that is the maximum, and zero to the others
// of its window. It is that of `join_gradients` if there are moments.
template <class T>
void pool_row_backward(const Pooling& shape, const T* gradients, const T* rows, Affine terms,
                       T* to_rows) {
  const Pooling s = shape;
  const Index line = s.width * s.channels, step = s.window * s.channels;
  for (Index x = 0; x < s.out_width(); x++, gradients += s.channels, rows += step, to_rows += step)
    for (Index k = 0; k < s.channels; k += LANES) {
      const Index rest = s.channels - k;
      Vector best = load(rows + k, rest);
      Bits winner = {};
      for (Index p = 1; p < s.window * s.window; p++) {
        const Index at = p / s.window * line + p % s.window * s.channels + k;
        const Vector value = load(rows + at, rest);
        winner = value > best ? Bits{} + (uint32_t)p : winner;
        best = value > best ? value : best;
      }
      Vector g = load(gradients + k, rest);
      if (s.measured) g += terms.apply(best, k, rest);
      for (Index p = 0; p < s.window * s.window; p++) {
        const Index at = p / s.window * line + p % s.window * s.channels + k;
        store(to_rows + at, winner == Bits{} + (uint32_t)p ? g : Vector{}, rest);
      }
    }
}

template <class T>
void pool_forward(const Pooling& s, const T* images, T* outputs, float* means, float* variances) {
  const Index in_row = s.width * s.channels, out_row = s.out_width() * s.channels;
  for_each(s.count, [&](Index n) {
    const T* image = images + n * s.height * in_row;
    T* to = outputs + n * s.out_height() * out_row;
    for (Index y = 0; y < s.out_height(); y++)
      pool_row(s, image + y * s.window * in_row, to + y * out_row);
    if (!s.measured) return;
    Moments moments(n, s.channels, means, variances);
    moments.add(to, s.out_height() * s.out_width());
    moments.finish(s.out_height() * s.out_width());
  });
}

template <class T>
void pool_backward(const Pooling& s, const T* gradients, const T* images, Affine terms,
                   T* to_images) {
  const Index in_row = s.width * s.channels, out_row = s.out_width() * s.channels;
  const Index used = s.out_width() * s.window * s.channels;
  for_each(s.count, [&](Index n) {
    const T* image = images + n * s.height * in_row;
    T* to_image = to_images + n * s.height * in_row;
    const Affine own = s.measured ? terms.of(n, s.channels) : terms;
    for (Index y = 0; y < s.out_height(); y++)
      pool_row_backward(s, gradients + (n * s.out_height() + y) * out_row,
                        image + y * s.window * in_row, own, to_image + y * s.window * in_row);
    for (Index y = 0; y < s.out_height() * s.window; y++)
      std::fill(to_image + y * in_row + used, to_image + (y + 1) * in_row, T{});
    std::fill(to_image + s.out_height() * s.window * in_row, to_image + s.height * in_row, T{});
  });
}
