// The end of a unit: normalization, activation, dropout, and the sum with a shortcut.

#pragma once

#include "activation.h"
#include "images.h"
#include "pool.h"

struct Ending {
  Index count, pixels, channels;
  Index activation, has_shortcut, drops;
};

// Keeps elements whose hash is at least `threshold`, and divides them by `kept`, their share. The
// hash of an element depends on its index in memory; it is that of flax_cifar/models/dropout.py.
struct Mask {
  uint32_t start, step, threshold;
  float kept;

  Vector apply(Vector x, Index index) const {
    Bits bits = counter + (start + (uint32_t)index * step);
    bits = (bits ^ (bits >> 16)) * 0x7feb352du;
    bits = (bits ^ (bits >> 15)) * 0x846ca68bu;
    bits ^= bits >> 16;
    return bits >= threshold ? x / kept : Vector{};
  }

  explicit Mask(const uint32_t* numbers)
      : start(numbers[0]), step(numbers[1]), threshold(numbers[2]) {
    std::memcpy(&kept, numbers + 3, sizeof(kept));
    for (Index i = 0; i < LANES; i++) counter[i] = (uint32_t)i * step;
  }

 private:
  Bits counter;
};

constexpr uint32_t KEEP_ALL[4] = {0, 0, 0, 0x3f800000};

// One pixel after the other, because memory is read fastest in its order.
template <class T>
void finish_image(const Ending& shape, Mask mask, Index start, const T* images, Affine affine,
                  const T* shortcuts, T* outputs) {
  const Ending s = shape;
  for (Index p = 0, at = start; p < s.pixels; p++, at += s.channels)
    for (Index i = 0; i < s.channels; i += LANES) {
      const Index rest = s.channels - i;
      Vector y = activate(affine.apply(load(images + at + i, rest), i, rest), s.activation);
      if (s.drops) y = mask.apply(y, at + i);
      if (s.has_shortcut) y += load(shortcuts + at + i, rest);
      store(outputs + at + i, y, rest);
    }
}

template <class T>
void finish_forward(const Ending& s, const T* images, Affine affines, const T* shortcuts,
                    const uint32_t* numbers, T* outputs) {
  const Mask mask(s.drops ? numbers : KEEP_ALL);
  for_each(s.count, [&](Index n) {
    finish_image(s, mask, n * s.pixels * s.channels, images, affines.of(n, s.channels), shortcuts,
                 outputs);
  });
}

template <class T>
void finish_image_backward(const Ending& shape, Mask mask, Index start, const T* gradients,
                           const T* images, Affine affine, T* to_images, float* to_slope,
                           float* to_bias) {
  const Ending s = shape;
  for (Index p = 0, at = start; p < s.pixels; p++, at += s.channels)
    for (Index i = 0; i < s.channels; i += LANES) {
      const Index rest = s.channels - i;
      const Vector slope = load(affine.slope + i, rest);
      const Vector distance = load(images + at + i, rest) - load(affine.center + i, rest);
      Vector g = load(gradients + at + i, rest);
      if (s.drops) g = mask.apply(g, at + i);
      g = pull_back(g, distance * slope + load(affine.bias + i, rest), s.activation);
      store(to_bias + i, load(to_bias + i, rest) + g, rest);
      store(to_slope + i, load(to_slope + i, rest) + g * distance, rest);
      store(to_images + at + i, g * slope, rest);
    }
}

template <class T>
void finish_backward(const Ending& s, const T* gradients, const T* images, Affine affines,
                     const uint32_t* numbers, T* to_images, float* to_slopes, float* to_biases) {
  const Mask mask(s.drops ? numbers : KEEP_ALL);
  for_each(s.count, [&](Index n) {
    float *to_slope = to_slopes + n * s.channels, *to_bias = to_biases + n * s.channels;
    std::fill_n(to_slope, s.channels, 0.f);
    std::fill_n(to_bias, s.channels, 0.f);
    finish_image_backward(s, mask, n * s.pixels * s.channels, gradients, images,
                          affines.of(n, s.channels), to_images, to_slope, to_bias);
  });
}
