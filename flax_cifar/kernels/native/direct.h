// Dense convolutions of stride 1 by their definition, as products of matrices.
//
// A row of the left matrix is a patch: the inputs that one output reads, tap by tap. The kernel is
// the right matrix. Patches are copied for a block of outputs at a time, which stays in the cache.

#pragma once

#include <algorithm>
#include <vector>

#include "convolution.h"
#include "images.h"
#include "pool.h"
#include "product.h"

// A right operand whose panels are contiguous: (panels, inner, PANEL).
struct Packed {
  Index inner;
  Array data;

  // From (inner, columns), or if `swap` (columns, inner).
  Packed(const float* from, Index inner, Index columns, bool swap)
      : inner(inner), data((columns + PANEL - 1) / PANEL * PANEL * inner) {
    for_each((columns + PANEL - 1) / PANEL, [&](Index panel) {
      float* to = data.data() + panel * PANEL * inner;
      const Index first = panel * PANEL, count = std::min(PANEL, columns - first);
      for (Index k = 0; k < inner; k++, to += PANEL)
        for (Index i = 0; i < count; i++)
          to[i] = swap ? from[(first + i) * inner + k] : from[k * columns + first + i];
    });
  }

  Right get() const { return {data.data(), PANEL, inner * PANEL}; }
};

// Copies the inputs of outputs, and adds up gradients of them.
struct Patches {
  const Convolution& c;
  const Index size, row;                   // floats of a patch, and from patch to patch
  const std::vector<Index> rows, columns;  // of the image; -1: outside, zero

  explicit Patches(const Convolution& c)
      : c(c),
        size(c.kernel_height * c.kernel_width * c.channels),
        row(round_up(size)),
        rows(list_inputs(c.height, c.out_height + c.kernel_height * c.dilation, c.top, c.reflect)),
        columns(
            list_inputs(c.width, c.out_width + c.kernel_width * c.dilation, c.left, c.reflect)) {}

  // Calls work(floats before the tap, place in the image or -1) for each tap of an output.
  template <class Work>
  void for_each_tap(Index output, const Work& work) const {
    const Index y = output / c.out_width, x = output % c.out_width;
    Index at = 0;
    for (Index i = 0; i < c.kernel_height; i++)
      for (Index j = 0; j < c.kernel_width; j++, at += c.channels) {
        const Index row = rows[y + i * c.dilation], column = columns[x + j * c.dilation];
        work(at, row < 0 || column < 0 ? -1 : (row * c.width + column) * c.channels);
      }
  }

  // Writes whole vectors, of which the next tap overwrites what does not belong to this one.
  template <class T>
  void read(const T* image, Index output, float* patch) const {
    const Index channels = c.channels;
    for_each_tap(output, [=](Index at, Index place) {
      for (Index k = 0; k < channels; k += LANES)
        store(patch + at + k, place < 0 ? Vector{} : load(image + place + k, channels - k));
    });
  }

  void add(const float* patch, Index output, float* image) const {
    const Index channels = c.channels;
    for_each_tap(output, [=](Index at, Index place) {
      if (place < 0) return;
      for (Index k = 0; k < channels; k += LANES) {
        const Index rest = channels - k;
        float* to = image + place + k;
        store(to, load(to, rest) + load(patch + at + k, rest), rest);
      }
    });
  }
};

constexpr Index LEAST_ROWS = 12, MOST_ROWS = 48;  // of a block
constexpr Index CACHED_PATCHES = 256 * 1024 / 4;  // floats of a block, if that leaves enough rows

// What both directions share: blocks of outputs, which may belong to several images.
template <class T>
struct Blocks {
  const Convolution& c;
  const Patches& patches;
  const Index pixels, in_size, out_size;  // of an image
  const Index columns;                    // features, in whole vectors
  const Index most;                       // rows of a block
  float *const left, *const right;        // patches and outputs of a block; of this thread

  Blocks(const Convolution& c, const Patches& patches)
      : c(c),
        patches(patches),
        pixels(c.out_height * c.out_width),
        in_size(c.height * c.width * c.channels),
        out_size(pixels * c.features),
        columns(round_up(c.features)),
        most(std::clamp(CACHED_PATCHES / patches.row / TILE * TILE, LEAST_ROWS, MOST_ROWS)),
        left(get_memory<5>(most * patches.row + LANES)),
        right(get_memory<6>(most * columns)) {}

  // Calls work(rows) for each block of a part. Before and after, it calls before(...) and
  // after(...) with (image, its first pixel, number of pixels, row) for each image in the block.
  template <class Before, class Work, class After>
  void for_each_block(Index part, const Before& before, const Work& work,
                      const After& after) const {
    const Index end = c.first(part + 1) * pixels;
    for (Index start = c.first(part) * pixels; start < end; start += most) {
      const Index rows = std::min(most, end - start);
      for_each_image(start, rows, before);
      work(rows);
      for_each_image(start, rows, after);
    }
  }

  template <class Work>
  void for_each_image(Index start, Index rows, const Work& work) const {
    for (Index row = 0; row < rows;) {
      const Index n = (start + row) / pixels, pixel = (start + row) % pixels;
      const Index count = std::min(pixels - pixel, rows - row);
      work(n, pixel, count, row);
      row += count;
    }
  }

  void read_patches(const T* images, Index n, Index pixel, Index count, Index row) const {
    for (Index i = 0; i < count; i++)
      patches.read(images + n * in_size, pixel + i, left + (row + i) * patches.row);
  }
};

// Adds the bias to `count` outputs, and applies ReLU.
template <class T>
void write_rows(const float* rows, Index count, Index features, const float* bias, bool with_relu,
                T* outputs) {
  for (Index p = 0; p < count; p++, rows += round_up(features), outputs += features)
    for (Index i = 0; i < features; i += LANES) {
      const Vector y = load(rows + i) + load(bias + i, features - i);
      store(outputs + i, with_relu ? relu(y) : y, features - i);
    }
}

template <class T>
void direct_forward(const Convolution& c, const T* images, const float* kernel, const float* bias,
                    T* outputs, float* means, float* variances) {
  const Patches patches(c);
  const Packed packed(kernel, patches.size, c.features, false);
  for_each(c.parts, [&](Index part) {
    const Blocks<T> blocks(c, patches);
    std::vector<Moments> moments;  // of the current image
    blocks.for_each_block(
        part,
        [&](Index n, Index pixel, Index count, Index row) {
          blocks.read_patches(images, n, pixel, count, row);
        },
        [&](Index rows) {
          Product{rows,           patches.size,
                  blocks.columns, {blocks.left, patches.row, 1},
                  packed.get(),   {blocks.right, blocks.columns}}
              .template compute<false>();
        },
        [&](Index n, Index pixel, Index count, Index row) {
          T* to = outputs + n * blocks.out_size + pixel * c.features;
          write_rows(blocks.right + row * blocks.columns, count, c.features, bias, c.relu, to);
          if (!c.measured) return;
          if (pixel == 0) moments.assign(1, Moments(n, c.features, means, variances));
          moments[0].add(to, count);
          if (pixel + count == blocks.pixels) moments[0].finish(blocks.pixels);
        });
  });
}

// Reads the gradient of `count` outputs, with what their moments add to it; adds up that of the
// bias.
template <class T>
void read_rows(const Convolution& shape, Index count, const T* gradients, const T* outputs,
               Affine terms, float* rows, float* to_bias) {
  const Convolution c = shape;
  const Index columns = round_up(c.features);
  for (Index p = 0; p < count; p++, rows += columns, gradients += c.features, outputs += c.features)
    for (Index i = 0; i < c.features; i += LANES) {
      const Index rest = c.features - i;
      Vector g = load(gradients + i, rest);
      if (c.measured) g += terms.apply(load(outputs + i, rest), i, rest);
      if (c.relu) g = load(outputs + i, rest) > 0 ? g : Vector{};
      store(rows + i, g);
      store(to_bias + i, load(to_bias + i, rest) + g, rest);
    }
}

template <class T>
void direct_backward(const Convolution& c, const T* gradients, const T* outputs, Affine terms,
                     const T* images, const float* kernel, T* to_images, float* to_kernels,
                     float* to_biases) {
  const Patches patches(c);
  const Packed packed(kernel, c.features, patches.size, true);
  for_each(c.parts, [&](Index part) {
    const Blocks<T> blocks(c, patches);
    float* const sums = get_memory<7>(patches.size * blocks.columns);
    float* const to_image = get_memory<8>(blocks.in_size);  // the current one
    float* to_bias = to_biases + part * c.features;
    std::fill_n(sums, patches.size * blocks.columns, 0.f);
    std::fill_n(to_bias, c.features, 0.f);
    blocks.for_each_block(
        part,
        [&](Index n, Index pixel, Index count, Index row) {
          blocks.read_patches(images, n, pixel, count, row);
          const Index from = n * blocks.out_size + pixel * c.features;
          read_rows(c, count, gradients + from, outputs + from,
                    c.measured ? terms.of(n, c.features) : terms,
                    blocks.right + row * blocks.columns, to_bias);
        },
        [&](Index rows) {
          const Right right = {blocks.right, blocks.columns, PANEL};
          Product{patches.size,          rows, blocks.columns, {blocks.left, 1, patches.row}, right,
                  {sums, blocks.columns}}
              .template compute<true>();
          if (!c.to_images) return;
          Product{rows,         c.features,
                  patches.row,  {blocks.right, blocks.columns, 1},
                  packed.get(), {blocks.left, patches.row}}
              .template compute<false>();
        },
        [&](Index n, Index pixel, Index count, Index row) {
          if (!c.to_images) return;
          if (pixel == 0) std::fill_n(to_image, blocks.in_size, 0.f);
          for (Index i = 0; i < count; i++)
            patches.add(blocks.left + (row + i) * patches.row, pixel + i, to_image);
          if (pixel + count < blocks.pixels) return;
          for (Index i = 0; i < blocks.in_size; i += LANES)
            store(to_images + n * blocks.in_size + i, load(to_image + i, blocks.in_size - i),
                  blocks.in_size - i);
        });
    for (Index i = 0; i < patches.size; i++)
      std::copy_n(sums + i * blocks.columns, c.features,
                  to_kernels + (part * patches.size + i) * c.features);
  });
}
