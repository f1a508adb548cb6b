// Dense 3x3 convolutions by Winograd's algorithm F(4x4, 3x3): 36 multiplications for 16 outputs of
// a pair of channels, in place of 144.
//
// A tile of 4x4 outputs reads 6x6 inputs. Inputs and kernels, as polynomials in two variables, are
// evaluated at 6x6 points, multiplied there, and the outputs interpolated. The points are 0, +-A,
// +-B and infinity; with these A and B, which are not the usual 1 and 2, float loses only one bit.
// The sums over channels make each point a product of matrices. Gradients are the transposes of
// the same maps.
//
// Sources: Lavin and Gray 2016 (arXiv:1509.09308); Barabasz et al. 2020 (arXiv:1803.10986) for the
// choice of points.

#pragma once

#include <algorithm>
#include <vector>

#include "convolution.h"
#include "images.h"
#include "pool.h"
#include "product.h"

constexpr int OUT = 4, IN = 6, POINTS = IN * IN, TAPS = 3;
constexpr float A = 0.70710678118654752f, A2 = 0.5f, B = 1.41421356237309505f, B2 = 2;

// ---- The maps, of one variable

struct InputMap {  // six inputs to their values at the points
  static constexpr int FROM = IN, TO = IN;
  static void apply(const Vector* x, Vector* v) {
    const Vector even_a = x[4] - B2 * x[2], odd_a = A * (x[3] - B2 * x[1]);
    const Vector even_b = x[4] - A2 * x[2], odd_b = B * (x[3] - A2 * x[1]);
    v[0] = x[0] - (A2 + B2) * x[2] + x[4];
    v[1] = even_a + odd_a;
    v[2] = even_a - odd_a;
    v[3] = even_b + odd_b;
    v[4] = even_b - odd_b;
    v[5] = x[1] - (A2 + B2) * x[3] + x[5];
  }
};

struct InputMapTransposed {
  static constexpr int FROM = IN, TO = IN;
  static void apply(const Vector* v, Vector* x) {
    const Vector even_a = v[1] + v[2], odd_a = A * (v[1] - v[2]);
    const Vector even_b = v[3] + v[4], odd_b = B * (v[3] - v[4]);
    x[0] = v[0];
    x[1] = v[5] - B2 * odd_a - A2 * odd_b;
    x[2] = -(A2 + B2) * v[0] - B2 * even_a - A2 * even_b;
    x[3] = odd_a + odd_b - (A2 + B2) * v[5];
    x[4] = v[0] + even_a + even_b;
    x[5] = v[5];
  }
};

struct OutputMap {  // values at the points to four outputs
  static constexpr int FROM = IN, TO = OUT;
  static void apply(const Vector* m, Vector* y) {
    const Vector even_a = m[1] + m[2], odd_a = A * (m[1] - m[2]);
    const Vector even_b = m[3] + m[4], odd_b = B * (m[3] - m[4]);
    y[0] = m[0] + even_a + even_b;
    y[1] = odd_a + odd_b;
    y[2] = A2 * even_a + B2 * even_b;
    y[3] = A2 * odd_a + B2 * odd_b + m[5];
  }
};

struct OutputMapTransposed {
  static constexpr int FROM = OUT, TO = IN;
  static void apply(const Vector* y, Vector* m) {
    const Vector even_a = y[0] + A2 * y[2], odd_a = A * (y[1] + A2 * y[3]);
    const Vector even_b = y[0] + B2 * y[2], odd_b = B * (y[1] + B2 * y[3]);
    m[0] = y[0];
    m[1] = even_a + odd_a;
    m[2] = even_a - odd_a;
    m[3] = even_b + odd_b;
    m[4] = even_b - odd_b;
    m[5] = y[3];
  }
};

// Lagrange's denominators at the points +-A and +-B.
constexpr float SHARE_A = 1 / (2 * A2 * (A2 - B2)), SHARE_B = 1 / (2 * B2 * (B2 - A2));

struct KernelMap {  // three taps to their values at the points
  static constexpr int FROM = TAPS, TO = IN;
  static void apply(const Vector* k, Vector* u) {
    const Vector even_a = SHARE_A * (k[0] + A2 * k[2]), odd_a = SHARE_A * A * k[1];
    const Vector even_b = SHARE_B * (k[0] + B2 * k[2]), odd_b = SHARE_B * B * k[1];
    u[0] = k[0];
    u[1] = even_a + odd_a;
    u[2] = even_a - odd_a;
    u[3] = even_b + odd_b;
    u[4] = even_b - odd_b;
    u[5] = k[2];
  }
};

struct KernelMapTransposed {
  static constexpr int FROM = IN, TO = TAPS;
  static void apply(const Vector* u, Vector* k) {
    const Vector even_a = SHARE_A * (u[1] + u[2]), odd_a = SHARE_A * A * (u[1] - u[2]);
    const Vector even_b = SHARE_B * (u[3] + u[4]), odd_b = SHARE_B * B * (u[3] - u[4]);
    k[0] = u[0] + even_a + even_b;
    k[1] = odd_a + odd_b;
    k[2] = A2 * even_a + B2 * even_b + u[5];
  }
};

// Applies a map to both axes: from[row * FROM + column] to to[row * TO + column].
template <class Map>
inline void transform(const Vector* from, Vector* to) {
  Vector rows[Map::TO * Map::FROM];
  for (int j = 0; j < Map::FROM; j++) {
    Vector in[Map::FROM], out[Map::TO];
    for (int i = 0; i < Map::FROM; i++) in[i] = from[i * Map::FROM + j];
    Map::apply(in, out);
    for (int i = 0; i < Map::TO; i++) rows[i * Map::FROM + j] = out[i];
  }
  for (int i = 0; i < Map::TO; i++) Map::apply(rows + i * Map::FROM, to + i * Map::TO);
}

// ---- The convolution

// Where a tile's values are in an image, in elements; -1 for those outside of it.
template <int SIDE>
struct Places {
  Index at[SIDE * SIDE];
};

// Where tiles lie, and what pixel of the input is at a place of the padded input.
struct Grid {
  struct Tile {
    Index y, x;  // of its first output
  };
  const Convolution& c;
  std::vector<Tile> tiles;
  std::vector<Index> rows, columns;  // -1: outside, zero

  explicit Grid(const Convolution& c)
      : c(c),
        rows(list_inputs(c.height, c.out_height + IN * c.dilation, c.top, c.reflect)),
        columns(list_inputs(c.width, c.out_width + IN * c.dilation, c.left, c.reflect)) {
    for (Index y : list(c.out_height, c.dilation))
      for (Index x : list(c.out_width, c.dilation)) tiles.push_back({y, x});
  }

  // `channels` of an input in memory.
  Places<IN> find_inputs(Tile tile, Index channels) const {
    Places<IN> places;
    for (int i = 0; i < IN; i++)
      for (int j = 0; j < IN; j++) {
        const Index row = rows[tile.y + i * c.dilation], column = columns[tile.x + j * c.dilation];
        const bool inside = row >= 0 && column >= 0;
        places.at[i * IN + j] = inside ? (row * c.width + column) * channels : -1;
      }
    return places;
  }

  Places<OUT> find_outputs(Tile tile) const {
    Places<OUT> places;
    for (int i = 0; i < OUT; i++)
      for (int j = 0; j < OUT; j++) {
        const Index row = tile.y + i * c.dilation, column = tile.x + j * c.dilation;
        const bool inside = row < c.out_height && column < c.out_width;
        places.at[i * OUT + j] = inside ? (row * c.out_width + column) * c.features : -1;
      }
    return places;
  }

  // Outputs that start a tile. The outputs of a tile are as far apart as the taps.
  static std::vector<Index> list(Index size, Index dilation) {
    std::vector<Index> starts;
    for (Index phase = 0; phase < std::min(dilation, size); phase++)
      for (Index i = phase; i < size; i += OUT * dilation) starts.push_back(i);
    return starts;
  }
};

// Values at the points, for the tiles of a block: (POINTS, tiles, channels). The points are a bit
// more apart than they need, because caches can keep few lines whose distance is a power of two.
struct Values {
  Index channels, step;
  float* data;
  Values(float* data, Index tiles, Index channels)
      : channels(round_up(channels)), step(get_step(tiles, channels)), data(data) {}
  static Index get_step(Index tiles, Index channels) { return tiles * round_up(channels) + 16; }
  float* at(Index point) const { return data + point * step; }
  void write(Index tile, Index channel, const Vector* values) const {
    float* to = data + tile * channels + channel;
    for (int p = 0; p < POINTS; p++) store(to + p * step, values[p]);
  }
  void read(Index tile, Index channel, Vector* values) const {
    const float* from = data + tile * channels + channel;
    for (int p = 0; p < POINTS; p++) values[p] = load(from + p * step);
  }
};

// Kernels at the points, as right operands: (POINTS, panels, inner, PANEL).
struct Kernels {
  Index inner, step;
  Array data;

  // From a kernel (TAPS * TAPS, inner, columns), or if `swap` (TAPS * TAPS, columns, inner).
  Kernels(const float* kernel, Index inner, Index columns, bool swap)
      : inner(inner),
        step((round_up(columns) + PANEL - 1) / PANEL * PANEL * inner),
        data(POINTS * step) {
    for_each(inner, [&](Index k) {
      for (Index c = 0; c < columns; c += LANES) {
        Vector taps[TAPS * TAPS], values[POINTS];
        for (int t = 0; t < TAPS * TAPS; t++) {
          const float* tap = kernel + t * inner * columns;
          if (swap)
            for (Index i = 0; i < LANES; i++)
              taps[t][i] = c + i < columns ? tap[(c + i) * inner + k] : 0;
          else
            taps[t] = load(tap + k * columns + c, columns - c);
        }
        transform<KernelMap>(taps, values);
        float* to = data.data() + (c / PANEL * inner + k) * PANEL + c % PANEL;
        for (int p = 0; p < POINTS; p++) store(to + p * step, values[p]);
      }
    });
  }

  Right at(Index point) const { return {data.data() + point * step, PANEL, inner * PANEL}; }
};

constexpr Index BLOCK = 48, LEAST = 24;   // most tiles of a block: of few channels, of many
constexpr Index CACHED = 384 * 1024 / 4;  // floats of a block, if that leaves enough tiles

// Divides the tiles of some images into blocks: of a part of an image, or of several images.
struct TileBlocks {
  Index tiles, size, images;  // of an image; tiles of a block at most; images of a block
  TileBlocks(const Convolution& c, Index tiles) : tiles(tiles) {
    const Index fitting = CACHED / (POINTS * (round_up(c.channels) + round_up(c.features)));
    const Index most = std::clamp(fitting, LEAST, BLOCK);
    images = std::max<Index>(1, most / tiles);
    const Index number = (images * tiles + most - 1) / most;
    size = (images * tiles + number - 1) / number;
  }

  // Asks for the part of `arrays` that belongs to the block that starts at a tile after image `n`.
  template <class T>
  void add(Prefetch& next, const T* arrays, Index size_of_image, Index n, Index tile) const {
    next.add(arrays + n * size_of_image + tile * size_of_image / tiles,
             size * size_of_image / tiles);
  }
};

// Evaluates the 6x6 inputs of a tile at the points.
template <class T>
void read_tile(Index channels, const Places<IN> places, const T* image, Index number,
               const Values values) {
  for (Index k = 0; k < channels; k += LANES) {
    Vector x[POINTS], v[POINTS];
    for (int p = 0; p < POINTS; p++)
      x[p] = places.at[p] < 0 ? Vector{} : load(image + places.at[p] + k, channels - k);
    transform<InputMap>(x, v);
    values.write(number, k, v);
  }
}

// Adds to the gradient of an image, in float, what it gets from a tile.
inline void add_tile(const Places<IN> places, Index number, const Values values, float* image) {
  for (Index k = 0; k < values.channels; k += LANES) {
    Vector v[POINTS], x[POINTS];
    values.read(number, k, v);
    transform<InputMapTransposed>(v, x);
    for (int p = 0; p < POINTS; p++) {
      if (places.at[p] < 0) continue;
      float* to = image + places.at[p] + k;
      store(to, load(to) + x[p]);
    }
  }
}

// Interpolates the outputs of a tile, and adds them to the moments.
template <class T>
void write_outputs(Index features, bool with_relu, const Places<OUT> places, Index number,
                   const Values values, const float* bias, T* image, Moments* moments) {
  for (Index k = 0; k < features; k += LANES) {
    const Index rest = features - k;
    Vector m[POINTS], y[OUT * OUT];
    values.read(number, k, m);
    transform<OutputMap>(m, y);
    const Vector shift = load(bias + k, rest);
    for (int p = 0; p < OUT * OUT; p++) {
      if (places.at[p] < 0) continue;
      T* to = image + places.at[p] + k;
      store(to, with_relu ? relu(y[p] + shift) : y[p] + shift, rest);
      y[p] = load(to, rest);
    }
    if (moments) moments->add(k, y, places.at, OUT * OUT);
  }
}

// Evaluates the gradient of a tile's outputs at the points, with what their moments add to it; adds
// up that of the bias.
template <class T>
void read_gradient(const Convolution& shape, const Places<OUT> places, Index number,
                   const T* gradients, const T* outputs, const Affine terms, const Values values,
                   float* to_bias) {
  const Convolution c = shape;
  for (Index k = 0; k < c.features; k += LANES) {
    const Index rest = c.features - k;
    Vector g[OUT * OUT], m[POINTS], total = {};
    for (int p = 0; p < OUT * OUT; p++) {
      g[p] = Vector{};
      if (places.at[p] < 0) continue;
      const Index at = places.at[p] + k;
      g[p] = load(gradients + at, rest);
      if (c.measured) g[p] += terms.apply(load(outputs + at, rest), k, rest);
      if (c.relu) g[p] = load(outputs + at, rest) > 0 ? g[p] : Vector{};
      total += g[p];
    }
    store(to_bias + k, load(to_bias + k) + total);
    transform<OutputMapTransposed>(g, m);
    values.write(number, k, m);
  }
}

// What both directions share: images by groups, whose tiles are computed block by block.
struct Direction {
  const Convolution& c;
  const Grid& grid;
  const Kernels& kernels;
  const Index tiles, in_size, out_size;  // of an image
  const TileBlocks blocks;
  const Values inputs, outputs;  // of a block, at the points; of this thread

  Direction(const Convolution& c, const Grid& grid, const Kernels& kernels)
      : c(c),
        grid(grid),
        kernels(kernels),
        tiles(grid.tiles.size()),
        in_size(c.height * c.width * c.channels),
        out_size(c.out_height * c.out_width * c.features),
        blocks(c, tiles),
        inputs(get_memory<0>(POINTS * Values::get_step(blocks.size, c.channels)), blocks.size,
               c.channels),
        outputs(get_memory<1>(POINTS * Values::get_step(blocks.size, c.features)), blocks.size,
                c.features) {}

  // Calls work(first image of a group, number of its images).
  template <class Work>
  void for_each_group(Index part, const Work& work) const {
    const Index end = c.first(part + 1);
    for (Index n = c.first(part); n < end; n += blocks.images)
      work(n, std::min(blocks.images, end - n));
  }

  // Calls work(first tile of a block, number of its tiles) for a group of images.
  template <class Work>
  void for_each_block(Index images, const Work& work) const {
    for (Index start = 0; start < images * tiles; start += blocks.size)
      work(start, std::min(blocks.size, images * tiles - start));
  }

  // Calls work(image of the group, tile, number in the block).
  template <class Work>
  void for_each_tile(Index start, Index size, const Work& work) const {
    for (Index t = 0; t < size; t++) work((start + t) / tiles, grid.tiles[(start + t) % tiles], t);
  }
};

template <class T>
struct Forward : Direction {
  const T* images;
  const float* bias;
  T* results;
  float *means, *variances;

  void run(Index part) const {
    for_each_group(part, [&](Index n, Index number) {
      std::vector<Moments> moments;
      for (Index i = 0; c.measured && i < number; i++)
        moments.emplace_back(n + i, c.features, means, variances);
      for_each_block(number, [&](Index start, Index size) {
        for_each_tile(start, size, [&](Index i, Grid::Tile tile, Index t) {
          read_tile(c.channels, grid.find_inputs(tile, c.channels), images + (n + i) * in_size, t,
                    inputs);
        });
        multiply(n, start, size);
        for_each_tile(start, size, [&](Index i, Grid::Tile tile, Index t) {
          write_outputs(c.features, c.relu, grid.find_outputs(tile), t, outputs, bias,
                        results + (n + i) * out_size, c.measured ? &moments[i] : nullptr);
        });
      });
      for (Moments& own : moments) own.finish(c.out_height * c.out_width);
    });
  }

  void multiply(Index n, Index start, Index size) const {
    Prefetch next;
    blocks.add(next, images, in_size, n, start + size);
    blocks.add(next, results, out_size, n, start);
    for (int p = 0; p < POINTS; p++) {
      const Product product{size,
                            c.channels,
                            outputs.channels,
                            {inputs.at(p), inputs.channels, 1},
                            kernels.at(p),
                            {outputs.at(p), outputs.channels},
                            &next};
      if (p == 0) next.spread(POINTS * product.count_tiles());
      product.compute<false>();
    }
  }
};

template <class T>
void winograd_forward(const Convolution& c, const T* images, const float* kernel, const float* bias,
                      T* outputs, float* means, float* variances) {
  const Grid grid(c);
  const Kernels kernels(kernel, c.channels, c.features, false);
  for_each(c.parts, [&](Index part) {
    Forward<T>{{c, grid, kernels}, images, bias, outputs, means, variances}.run(part);
  });
}

template <class T>
struct Backward : Direction {
  const T *gradients, *results;
  Affine terms;
  const T* images;
  T* to_images;
  float *to_kernels, *to_biases;
  // Of this thread: sums at the points, and a group of images.
  const Index kernel_step = c.channels * outputs.channels + 16, pixels = c.height * c.width;
  float* const sums = get_memory<2>(POINTS * kernel_step);
  float* const to_group = get_memory<3>(blocks.images * pixels * inputs.channels);
  float* const to_bias = get_memory<4>(outputs.channels);

  void run(Index part) const {
    std::fill_n(sums, POINTS * kernel_step, 0.f);
    std::fill_n(to_bias, outputs.channels, 0.f);
    for_each_group(part, [&](Index n, Index number) {
      std::fill_n(to_group, number * pixels * inputs.channels, 0.f);
      for_each_block(number, [&](Index start, Index size) {
        for_each_tile(start, size, [&](Index i, Grid::Tile tile, Index t) {
          read_tile(c.channels, grid.find_inputs(tile, c.channels), images + (n + i) * in_size, t,
                    inputs);
          read_gradient(c, grid.find_outputs(tile), t, gradients + (n + i) * out_size,
                        results + (n + i) * out_size,
                        c.measured ? terms.of(n + i, c.features) : terms, outputs, to_bias);
        });
        multiply(n, start, size);
        for_each_tile(start, size, [&](Index i, Grid::Tile tile, Index t) {
          if (c.to_images)
            add_tile(grid.find_inputs(tile, inputs.channels), t, inputs,
                     to_group + i * pixels * inputs.channels);
        });
      });
      if (c.to_images) write_images(n, number);
    });
    write_kernel(to_kernels + part * TAPS * TAPS * c.channels * c.features);
    for (Index k = 0; k < c.features; k += LANES)
      store(to_biases + part * c.features + k, load(to_bias + k), c.features - k);
  }

  // Adds to the gradient of the kernel, and replaces the inputs of a block by their gradient.
  void multiply(Index n, Index start, Index size) const {
    Prefetch next;
    blocks.add(next, images, in_size, n, start + size);
    blocks.add(next, gradients, out_size, n, start + size);
    if (c.measured || c.relu) blocks.add(next, results, out_size, n, start + size);
    for (int p = 0; p < POINTS; p++) {
      const Product outer{c.channels,
                          size,
                          outputs.channels,
                          {inputs.at(p), 1, inputs.channels},
                          {outputs.at(p), outputs.channels, PANEL},
                          {sums + p * kernel_step, outputs.channels},
                          &next};
      const Product backward{size,
                             c.features,
                             inputs.channels,
                             {outputs.at(p), outputs.channels, 1},
                             kernels.at(p),
                             {inputs.at(p), inputs.channels},
                             &next};
      if (p == 0) next.spread(POINTS * (outer.count_tiles() + backward.count_tiles()));
      outer.compute<true>();
      if (c.to_images) backward.compute<false>();
    }
  }

  void write_images(Index n, Index number) const {
    for (Index i = 0; i < number * pixels; i++)
      for (Index k = 0; k < c.channels; k += LANES)
        store(to_images + (n * pixels + i) * c.channels + k,
              load(to_group + i * inputs.channels + k), c.channels - k);
  }

  void write_kernel(float* to_kernel) const {
    for (Index i = 0; i < c.channels; i++)
      for (Index k = 0; k < c.features; k += LANES) {
        Vector values[POINTS], taps[TAPS * TAPS];
        for (int p = 0; p < POINTS; p++)
          values[p] = load(sums + p * kernel_step + i * outputs.channels + k);
        transform<KernelMapTransposed>(values, taps);
        for (int t = 0; t < TAPS * TAPS; t++)
          store(to_kernel + (t * c.channels + i) * c.features + k, taps[t], c.features - k);
      }
  }
};

template <class T>
void winograd_backward(const Convolution& c, const T* gradients, const T* outputs, Affine terms,
                       const T* images, const float* kernel, T* to_images, float* to_kernels,
                       float* to_biases) {
  const Grid grid(c);
  const Kernels kernels(kernel, c.features, c.channels, true);
  for_each(c.parts, [&](Index part) {
    Backward<T>{{c, grid, kernels}, gradients,  outputs,  terms, images,
                to_images,          to_kernels, to_biases}
        .run(part);
  });
}
