// The end of a unit: normalization, ReLU, dropout, and the sum with a shortcut.

#pragma once

#include "images.h"
#include "pool.h"

struct Ending {
  Index count, pixels, channels;
  Index relu, has_shortcut, drops;
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

template <class T>
void finish_forward(const Ending& s, const T* images, Affine affines, const T* shortcuts,
                    const uint32_t* numbers, T* outputs) {
  const Mask mask(s.drops ? numbers : KEEP_ALL);
  for_each(s.count, [&](Index n) {
    const Affine affine = affines.of(n, s.channels);
    for (Index p = 0; p < s.pixels; p++)
      for (Index i = 0; i < s.channels; i += LANES) {
        const Index at = (n * s.pixels + p) * s.channels + i, rest = s.channels - i;
        Vector y = affine.apply(load(images + at, rest), i, rest);
        if (s.relu) y = relu(y);
        if (s.drops) y = mask.apply(y, at);
        if (s.has_shortcut) y += load(shortcuts + at, rest);
        store(outputs + at, y, rest);
      }
  });
}

template <class T>
void finish_backward(const Ending& s, const T* gradients, const T* images, Affine affines,
                     const uint32_t* numbers, T* to_images, float* to_slopes, float* to_biases) {
  const Mask mask(s.drops ? numbers : KEEP_ALL);
  for_each(s.count, [&](Index n) {
    const Affine affine = affines.of(n, s.channels);
    for (Index i = 0; i < s.channels; i += LANES) {
      store(to_slopes + n * s.channels + i, Vector{}, s.channels - i);
      store(to_biases + n * s.channels + i, Vector{}, s.channels - i);
    }
    for (Index p = 0; p < s.pixels; p += PIXELS) {
      const Index start = (n * s.pixels + p) * s.channels;
      const Index size = std::min(PIXELS, s.pixels - p);
      prefetch(gradients + start + PIXELS * s.channels, PIXELS * s.channels);
      prefetch(images + start + PIXELS * s.channels, PIXELS * s.channels);
      for (Index i = 0; i < s.channels; i += LANES) {
        const Index rest = s.channels - i;
        const Vector center = load(affine.center + i, rest), slope = load(affine.slope + i, rest);
        const Vector bias = load(affine.bias + i, rest);
        float *to_slope = to_slopes + n * s.channels + i, *to_bias = to_biases + n * s.channels + i;
        Vector slopes = load(to_slope, rest), biases = load(to_bias, rest);
        for (Index q = 0; q < size; q++) {
          const Index at = start + q * s.channels + i;
          const Vector distance = load(images + at, rest) - center;
          Vector g = load(gradients + at, rest);
          if (s.drops) g = mask.apply(g, at);
          if (s.relu) g = distance * slope + bias > 0 ? g : Vector{};
          biases += g;
          slopes += g * distance;
          store(to_images + at, g * slope, rest);
        }
        store(to_slope, slopes, rest);
        store(to_bias, biases, rest);
      }
    }
  });
}
