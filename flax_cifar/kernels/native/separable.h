// Depthwise-separable units on CPUs: every function reads its inputs once, in blocks that stay in
// the cache, and computes all that can be computed meanwhile. Channels are multiples of 16.

#pragma once

#include <algorithm>
#include <vector>

#include "images.h"
#include "pool.h"
#include "product.h"

// Functions get pointers one by one where their loops are short: of arrays that a struct or a
// lambda refers to, compilers would read the addresses again after each store.

// The gradient of an output: `gradients` + factor * (output - mean) + constant, because the moments
// have gradients too. Its pixels are written `step` pixels apart.
template <class T>
void join_gradients(const T* gradients, const T* outputs, Affine moments, Index pixels,
                    Index channels, Index step, float* to) {
  for (Index p = 0; p < pixels; p++, to += (step - 1) * channels)
    for (Index i = 0; i < channels; i += LANES, gradients += LANES, outputs += LANES, to += LANES)
      store(to, load(gradients) + moments.apply(load(outputs), i));
}

template <class T>
void add(const T* values, const float* others, Index count, T* to) {
  for (Index i = 0; i < count; i += LANES) store(to + i, load(values + i) + load(others + i));
}

// ---- Depthwise 3x3 with one pixel of zeros around the image

// Three successive rows in float, with a border of zeros.
struct Rows {
  Index width, channels, size;
  Array data;

  Rows(Index width, Index channels)
      : width(width), channels(channels), size((width + 2) * channels), data(3 * size) {}

  float* at(Index row) { return data.data() + (row + 3) % 3 * size; }

  void clear(Index row) { std::fill_n(at(row), size, 0.f); }

  template <class T>
  void read(const T* image, Index height, Index row) {
    if (row < 0 || row >= height) return clear(row);
    const T* from = image + row * width * channels;
    float* to = at(row) + channels;
    for (Index i = 0; i < width * channels; i += LANES) store(to + i, load(from + i));
  }
};

// Nine weights or sums per channel, tap by tap.
struct Taps {
  Vector t[9];
  Taps(const float* from, Index step) {
    for (int i = 0; i < 9; i++) t[i] = load(from + i * step);
  }
  void write(float* to, Index step) const {
    for (int i = 0; i < 9; i++) store(to + i * step, t[i]);
  }
};

// Adds up the pixels under the nine taps, for `count` positions around `row`.
inline void convolve_row(Rows& rows, Index row, const float* kernel, Index step, Index stride,
                         Index count, float* out) {
  const Index channels = rows.channels;
  for (Index i = 0; i < channels; i += LANES) {
    const Taps k(kernel + i, step);
    const float *a = rows.at(row - 1) + i, *b = rows.at(row) + i, *c = rows.at(row + 1) + i;
    for (Index x = 0; x < count; x++) {
      const Vector upper =
          k.t[0] * load(a) + k.t[1] * load(a + channels) + k.t[2] * load(a + 2 * channels);
      const Vector middle =
          k.t[3] * load(b) + k.t[4] * load(b + channels) + k.t[5] * load(b + 2 * channels);
      const Vector lower =
          k.t[6] * load(c) + k.t[7] * load(c + channels) + k.t[8] * load(c + 2 * channels);
      store(out + x * channels + i, upper + middle + lower);
      a += stride * channels;
      b += stride * channels;
      c += stride * channels;
    }
  }
}

// Adds to the kernel's gradient what the gradient `row` of the output has to do with the input.
inline void add_kernel_gradient(Rows& input, Rows& gradient, Index row, Index stride, Index count,
                                float* kernel) {
  const Index channels = input.channels, step = stride * channels;
  for (Index i = 0; i < channels; i += LANES) {
    Taps k(kernel + i, channels);
    const float *a = input.at(row - 1) + i, *b = input.at(row) + i, *c = input.at(row + 1) + i;
    const float* g = gradient.at(row) + channels + i;
    for (Index x = 0; x < count; x++, a += step, b += step, c += step, g += step) {
      const Vector value = load(g);
      k.t[0] += value * load(a);
      k.t[1] += value * load(a + channels);
      k.t[2] += value * load(a + 2 * channels);
      k.t[3] += value * load(b);
      k.t[4] += value * load(b + channels);
      k.t[5] += value * load(b + 2 * channels);
      k.t[6] += value * load(c);
      k.t[7] += value * load(c + channels);
      k.t[8] += value * load(c + 2 * channels);
    }
    k.write(kernel + i, channels);
  }
}

inline Index get_outputs(Index inputs, Index stride) { return (inputs - 1) / stride + 1; }

template <class T>
void depthwise_forward(const Shape& s, const T* images, const float* kernel, T* outputs,
                       float* means, float* variances) {
  const Index height = get_outputs(s.height, s.stride), width = get_outputs(s.width, s.stride);
  const Index row_size = width * s.channels;
  for_each(s.count, [&](Index n) {
    const T* image = images + n * s.pixels() * s.channels;
    Rows rows(s.width, s.channels);
    Array sums(row_size);
    Moments moments(n, s.channels, means, variances);
    Index next = -1;
    for (Index y = 0; y < height; y++) {
      while (next <= y * s.stride + 1) rows.read(image, s.height, next++);
      convolve_row(rows, y * s.stride, kernel, s.channels, s.stride, width, sums.data());
      T* row = outputs + (n * height + y) * row_size;
      store_all(row, sums.data(), row_size);
      moments.add(row, width);
    }
    moments.finish(height * width);
  });
}

// The gradient of an output is that of `join_gradients`; the one of the images is added to
// `shortcuts`.
template <class T>
void depthwise_backward(const Shape& s, const T* gradients, const T* outputs, const float* mean,
                        const float* factor, const float* constant, const T* images,
                        const float* kernel, const T* shortcuts, T* to_images, float* to_kernels) {
  const Index height = get_outputs(s.height, s.stride), width = get_outputs(s.width, s.stride);
  const Index row_size = s.width * s.channels;
  for_each(s.parts, [&](Index part) {
    Rows input(s.width, s.channels), gradient(s.width, s.channels);
    Array sums(row_size);
    float* to_kernel = to_kernels + part * 9 * s.channels;
    std::fill_n(to_kernel, 9 * s.channels, 0.f);
    for (Index n = s.first(part); n < s.first(part + 1); n++) {
      const T* image = images + n * s.pixels() * s.channels;
      const Affine moments = Affine{mean, factor, constant}.of(n, s.channels);
      Index next = -1;
      gradient.clear(-1);
      for (Index y = 0; y <= s.height; y++) {  // reads row y of the gradient, writes row y - 1
        while (next <= y + 1) input.read(image, s.height, next++);
        gradient.clear(y);
        if (y < s.height && y % s.stride == 0) {
          const Index start = (n * height + y / s.stride) * width * s.channels;
          join_gradients(gradients + start, outputs + start, moments, width, s.channels, s.stride,
                         gradient.at(y) + s.channels);
          add_kernel_gradient(input, gradient, y, s.stride, width, to_kernel);
        }
        if (y == 0) continue;
        convolve_row(gradient, y - 1, kernel + 8 * s.channels, -s.channels, 1, s.width,
                     sums.data());
        const Index start = (n * s.height + y - 1) * row_size;
        add(shortcuts + start, sums.data(), row_size, to_images + start);
      }
    }
  });
}

// ---- Pointwise, of a normalized input

template <class T>
void normalize(const T* block, Index pixels, Index channels, Affine affine, float* out) {
  for (Index i = 0; i < channels; i += LANES)
    for (Index p = 0; p < pixels; p++)
      store(out + p * channels + i, affine.apply(load(block + p * channels + i), i));
}

// Turns the gradient of what `normalize` gives into that of its input, in place, and adds to those
// of slope and bias.
template <class T>
void normalize_backward(const T* block, Index pixels, Index channels, Affine affine,
                        float* gradient, float* to_slope, float* to_bias) {
  for (Index i = 0; i < channels; i += LANES) {
    const Vector center = load(affine.center + i), slope = load(affine.slope + i);
    Vector slopes = load(to_slope + i), biases = load(to_bias + i);
    for (Index at = i; at < pixels * channels; at += channels) {
      const Vector g = load(gradient + at);
      biases += g;
      slopes += g * (load(block + at) - center);
      store(gradient + at, g * slope);
    }
    store(to_slope + i, slopes);
    store(to_bias + i, biases);
  }
}

template <class T>
void pointwise_forward(const Shape& s, const T* images, Affine affines, const float* kernel,
                       T* outputs, float* means, float* variances) {
  for_each(s.count, [&](Index n) {
    Array input(PIXELS * s.channels), product(PIXELS * s.features);
    const Affine affine = affines.of(n, s.channels);
    Moments moments(n, s.features, means, variances);
    for (Index p = 0; p < s.pixels(); p += PIXELS) {
      const Index size = std::min(PIXELS, s.pixels() - p);
      const T* block = images + (n * s.pixels() + p) * s.channels;
      Prefetch next;
      next.add(block + PIXELS * s.channels, PIXELS * s.channels);
      normalize(block, size, s.channels, affine, input.data());
      const Product forward{size,
                            s.channels,
                            s.features,
                            {input.data(), s.channels, 1},
                            {kernel, s.features, PANEL},
                            {product.data(), s.features},
                            &next};
      next.spread(forward.count_tiles());
      forward.compute<false>();
      T* to = outputs + (n * s.pixels() + p) * s.features;
      store_all(to, product.data(), size * s.features);
      moments.add(to, size);
    }
    moments.finish(s.pixels());
  });
}

// The gradient of an output is that of `join_gradients`; `transposed` is (features, channels).
template <class T>
void pointwise_backward(const Shape& s, const T* gradients, const T* outputs, const float* mean,
                        const float* factor, const float* constant, const T* images, Affine affines,
                        const float* transposed, T* to_images, float* to_slopes, float* to_biases,
                        float* to_kernels) {
  for_each(s.parts, [&](Index part) {
    Array input(PIXELS * s.channels), back(PIXELS * s.channels);
    Array gradient(PIXELS * s.features);
    float* to_kernel = to_kernels + part * s.channels * s.features;
    std::fill_n(to_kernel, s.channels * s.features, 0.f);
    for (Index n = s.first(part); n < s.first(part + 1); n++) {
      const Affine affine = affines.of(n, s.channels);
      const Affine moments = Affine{mean, factor, constant}.of(n, s.features);
      float *to_slope = to_slopes + n * s.channels, *to_bias = to_biases + n * s.channels;
      std::fill_n(to_slope, s.channels, 0.f);
      std::fill_n(to_bias, s.channels, 0.f);
      for (Index p = 0; p < s.pixels(); p += PIXELS) {
        const Index size = std::min(PIXELS, s.pixels() - p);
        const Index from = (n * s.pixels() + p) * s.features;
        const Index to = (n * s.pixels() + p) * s.channels;
        Prefetch next;
        next.add(gradients + from + PIXELS * s.features, PIXELS * s.features);
        next.add(outputs + from + PIXELS * s.features, PIXELS * s.features);
        next.add(images + to + PIXELS * s.channels, PIXELS * s.channels);
        join_gradients(gradients + from, outputs + from, moments, size, s.features, 1,
                       gradient.data());
        normalize(images + to, size, s.channels, affine, input.data());
        const Product outer{s.channels,
                            size,
                            s.features,
                            {input.data(), 1, s.channels},
                            {gradient.data(), s.features, PANEL},
                            {to_kernel, s.features},
                            &next};
        const Product backward{size,
                               s.features,
                               s.channels,
                               {gradient.data(), s.features, 1},
                               {transposed, s.channels, PANEL},
                               {back.data(), s.channels},
                               &next};
        next.spread(outer.count_tiles() + backward.count_tiles());
        outer.compute<true>();
        backward.compute<false>();
        normalize_backward(images + to, size, s.channels, affine, back.data(), to_slope, to_bias);
        store_all(to_images + to, back.data(), size * s.channels);
      }
    }
  });
}
