// Normalization of images: what it does to them, and what it needs to know of them.

#pragma once

#include <vector>

#include "vectors.h"

struct Shape {
  Index count, height, width, channels, features;  // of the input; features of the output
  Index stride, parts;  // parts: of the images, which have a gradient of the kernel each
  Index pixels() const { return height * width; }
  Index first(Index part) const { return part * count / parts; }
};

constexpr Index PIXELS = 32;  // of a block

// Normalization: (x - center) * slope + bias, with numbers for each channel of each image.
struct Affine {
  const float *center, *slope, *bias;
  Affine of(Index image, Index channels) const {
    const Index i = image * channels;
    return {center + i, slope + i, bias + i};
  }
  Vector apply(Vector x, Index channel, Index rest = LANES) const {
    return (x - load(center + channel, rest)) * load(slope + channel, rest) +
           load(bias + channel, rest);
  }
};

// Mean and variance of an image's channels, from the distance to its first pixel. Sums of short
// stretches are added up, so that rounding grows less with the number of pixels.
struct Moments {
  static constexpr Index STRETCH = 32;  // pixels
  Index channels;
  float *mean, *variance;
  Array first;

  Moments(Index number, Index channels, float* means, float* variances)
      : channels(channels),
        mean(means + number * channels),
        variance(variances + number * channels) {
    std::fill_n(mean, channels, 0.f);
    std::fill_n(variance, channels, 0.f);
  }

  template <class T>
  void add(const T* block, Index pixels) {
    if (first.empty()) {
      first.resize(round_up(channels));
      for (Index i = 0; i < channels; i += LANES)
        store(first.data() + i, load(block + i, channels - i));
    }
    for (Index i = 0; i < channels; i += LANES) {
      const Index rest = channels - i;
      const Vector origin = load(first.data() + i);
      Vector sum = load(mean + i, rest), squares = load(variance + i, rest);
      for (Index p = 0; p < pixels;) {
        Vector part{}, part_squares{};
        for (const Index end = std::min(p + STRETCH, pixels); p < end; p++) {
          const Vector distance = load(block + p * channels + i, rest) - origin;
          part += distance;
          part_squares += distance * distance;
        }
        sum += part;
        squares += part_squares;
      }
      store(mean + i, sum, rest);
      store(variance + i, squares, rest);
    }
  }

  // Adds values of some channels; those with a negative place are of no pixel. The first value of
  // the first call is of the first pixel.
  void add(Index channel, const Vector* values, const Index* places, Index count) {
    if ((Index)first.size() <= channel) {
      first.resize(channel + LANES);
      store(first.data() + channel, values[0]);
    }
    const Index rest = channels - channel;
    const Vector origin = load(first.data() + channel);
    Vector part{}, part_squares{};
    for (Index p = 0; p < count; p++) {
      const Vector distance = places[p] < 0 ? Vector{} : values[p] - origin;
      part += distance;
      part_squares += distance * distance;
    }
    store(mean + channel, load(mean + channel, rest) + part, rest);
    store(variance + channel, load(variance + channel, rest) + part_squares, rest);
  }

  void finish(Index pixels) {
    const float share = 1.f / pixels;
    for (Index i = 0; i < channels; i += LANES) {
      const Index rest = channels - i;
      const Vector shift = load(mean + i, rest) * share;
      const Vector difference = load(variance + i, rest) * share - shift * shift;
      store(variance + i, relu(difference), rest);  // rounding may make it negative
      store(mean + i, load(first.data() + i) + shift, rest);
    }
  }
};
