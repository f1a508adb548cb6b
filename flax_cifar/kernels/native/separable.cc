// Depthwise-separable units on CPUs: every function reads its inputs once, in blocks that stay in
// the cache, and computes all that can be computed meanwhile.
//
// Images are NHWC, in float or bfloat16; all sums are in float. The numbers of channels are
// multiples of 16. An "affine" is what normalization comes down to, (x - center) * slope + bias
// with three numbers for each channel of each image.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "pool.h"

namespace {

using Index = int64_t;
using bfloat16 = uint16_t;  // the upper half of a float

#ifdef __AVX512F__
constexpr Index LANES = 16;
#else
constexpr Index LANES = 8;
#endif
constexpr Index PIXELS = 32;  // of a block

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

inline Vector relu(Vector x) { return x <= 0 ? Vector{} : x; }  // NaN stays NaN

template <class T>
inline void store_all(T* to, const float* from, Index count) {
  for (Index i = 0; i < count; i += LANES) store(to + i, load(from + i));
}

// Asks for memory that the next block needs: processors do not foresee reads with gaps.
template <class T>
inline void prefetch(const T* from, Index count) {
  for (Index i = 0; i < count; i += 64 / sizeof(T)) __builtin_prefetch(from + i, 0, 2);
}

// Asks for memory little by little, between the tiles of a product.
struct Prefetch {
  static constexpr Index LINE = 64;
  const char* arrays[3] = {};
  Index sizes[3] = {}, used = 0, step = 0;

  template <class T>
  void add(const T* from, Index count) {
    arrays[used] = (const char*)from;
    sizes[used++] = count * sizeof(T);
  }

  void spread(Index tiles) {
    const Index bytes = sizes[0] + sizes[1] + sizes[2];
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

Pool* pool;

template <class Function>
inline void for_each(Index count, const Function& function) {
  pool->for_each(count, function);
}

struct Shape {
  Index count, height, width, channels, features;  // of the input; features of the output
  Index stride, relu, parts;  // parts: of the images, which have a gradient of the kernel each
  Index pixels() const { return height * width; }
  Index first(Index part) const { return part * count / parts; }
};

struct Affine {
  const float *center, *slope, *bias;
  Affine of(Index image, Index channels) const {
    const Index i = image * channels;
    return {center + i, slope + i, bias + i};
  }
  Vector apply(Vector x, Index channel) const {
    return (x - load(center + channel)) * load(slope + channel) + load(bias + channel);
  }
};

// Mean and variance of an image's channels, from the distance to its first pixel.
struct Moments {
  Index channels;
  float *mean, *variance;
  std::vector<float> first;

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
      first.resize(channels);
      for (Index i = 0; i < channels; i += LANES) store(first.data() + i, load(block + i));
    }
    for (Index i = 0; i < channels; i += LANES) {
      const Vector origin = load(first.data() + i);
      Vector sum = load(mean + i), squares = load(variance + i);
      for (Index p = 0; p < pixels; p++) {
        const Vector distance = load(block + p * channels + i) - origin;
        sum += distance;
        squares += distance * distance;
      }
      store(mean + i, sum);
      store(variance + i, squares);
    }
  }

  void finish(Index pixels) {
    const float share = 1.f / pixels;
    for (Index i = 0; i < channels; i += LANES) {
      const Vector shift = load(mean + i) * share;
      store(variance + i, load(variance + i) * share - shift * shift);
      store(mean + i, load(first.data() + i) + shift);
    }
  }
};

// ---- Depthwise 3x3 with one pixel of zeros around the image

// Three successive rows in float, with a border of zeros.
struct Rows {
  Index width, channels, size;
  std::vector<float> data;

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
void convolve_row(Rows& rows, Index row, const float* kernel, Index step, Index stride, Index count,
                  float* out) {
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
void add_kernel_gradient(Rows& input, Rows& gradient, Index row, Index stride, Index count,
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

Index get_outputs(Index inputs, Index stride) { return (inputs - 1) / stride + 1; }

template <class T>
void depthwise_forward(const Shape& s, const T* images, const float* kernel, T* outputs,
                       float* means, float* variances) {
  const Index height = get_outputs(s.height, s.stride), width = get_outputs(s.width, s.stride);
  const Index row_size = width * s.channels;
  for_each(s.count, [&](Index n) {
    const T* image = images + n * s.pixels() * s.channels;
    Rows rows(s.width, s.channels);
    std::vector<float> sums(row_size);
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

// The gradient of an output is `gradients` + factor * (output - mean) + constant, because the
// moments have gradients too. The one of the images is added to `shortcuts`.
template <class T>
void depthwise_backward(const Shape& s, const T* gradients, const T* outputs, const float* mean,
                        const float* factor, const float* constant, const T* images,
                        const float* kernel, const T* shortcuts, T* to_images, float* to_kernels) {
  const Index height = get_outputs(s.height, s.stride), width = get_outputs(s.width, s.stride);
  const Index row_size = s.width * s.channels;
  for_each(s.parts, [&](Index part) {
    Rows input(s.width, s.channels), gradient(s.width, s.channels);
    std::vector<float> sums(row_size);
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
          prefetch(gradients + start + width * s.channels, width * s.channels);
          prefetch(outputs + start + width * s.channels, width * s.channels);
          for (Index x = 0; x < width; x++)
            for (Index i = 0; i < s.channels; i += LANES) {
              const Index at = start + x * s.channels + i;
              store(gradient.at(y) + (x * s.stride + 1) * s.channels + i,
                    load(gradients + at) + moments.apply(load(outputs + at), i));
            }
          add_kernel_gradient(input, gradient, y, s.stride, width, to_kernel);
        }
        if (y == 0) continue;
        convolve_row(gradient, y - 1, kernel + 8 * s.channels, -s.channels, 1, s.width,
                     sums.data());
        const Index start = (n * s.height + y - 1) * row_size;
        for (Index i = 0; i < row_size; i += LANES)
          store(to_images + start + i, load(shortcuts + start + i) + load(sums.data() + i));
      }
    }
  });
}

// ---- Products of small matrices, which lie row by row

// The left operand of a product: `a` (rows, inner), or, to be added to the result, the transpose of
// `a` (inner, rows).
enum class Left { PLAIN, ADD_TRANSPOSED };

struct Product {
  const float* a;
  Index rows, inner;
  const float* b;  // (inner, columns)
  Index columns;
  float* out;  // (rows, columns)
  Prefetch& next;

  Index count_tiles() const {
    return (rows / 6 + rows % 6 / 2 + rows % 2) * ((columns + 2 * LANES - 1) / (2 * LANES));
  }

  // Computes R rows and V vectors of columns.
  template <Left LEFT, int R, int V>
  void compute_tile(Index row, Index column) const {
    const Index row_step = LEFT == Left::PLAIN ? inner : 1, step = LEFT == Left::PLAIN ? 1 : rows;
    const float *left = a + row * row_step, *right = b + column;
    float* to = out + row * columns + column;
    next.advance();
    Vector sums[R][V] = {};
    if (LEFT == Left::ADD_TRANSPOSED)
      for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) sums[r][v] = load(to + r * columns + v * LANES);
    for (Index k = 0; k < inner; k++, left += step, right += columns) {
      Vector vectors[V];
      for (int v = 0; v < V; v++) vectors[v] = load(right + v * LANES);
      for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) sums[r][v] += vectors[v] * left[r * row_step];
    }
    for (int r = 0; r < R; r++)
      for (int v = 0; v < V; v++) store(to + r * columns + v * LANES, sums[r][v]);
  }

  // Six rows and two vectors are as much as the registers hold.
  template <Left LEFT, int V>
  void compute_columns(Index column) const {
    Index r = 0;
    for (; r + 6 <= rows; r += 6) compute_tile<LEFT, 6, V>(r, column);
    for (; r + 2 <= rows; r += 2) compute_tile<LEFT, 2, V>(r, column);
    for (; r < rows; r++) compute_tile<LEFT, 1, V>(r, column);
  }

  template <Left LEFT>
  void compute() const {
    Index c = 0;
    for (; c + 2 * LANES <= columns; c += 2 * LANES) compute_columns<LEFT, 2>(c);
    for (; c < columns; c += LANES) compute_columns<LEFT, 1>(c);
  }
};

// ---- Pointwise, of a normalized input

template <class T>
void normalize(const T* block, Index pixels, Index channels, const Affine& affine, bool with_relu,
               float* out) {
  for (Index i = 0; i < channels; i += LANES)
    for (Index p = 0; p < pixels; p++) {
      const Vector y = affine.apply(load(block + p * channels + i), i);
      store(out + p * channels + i, with_relu ? relu(y) : y);
    }
}

template <class T>
void pointwise_forward(const Shape& s, const T* images, Affine affines, const float* kernel,
                       T* outputs, float* means, float* variances) {
  for_each(s.count, [&](Index n) {
    std::vector<float> input(PIXELS * s.channels), product(PIXELS * s.features);
    const Affine affine = affines.of(n, s.channels);
    Moments moments(n, s.features, means, variances);
    for (Index p = 0; p < s.pixels(); p += PIXELS) {
      const Index size = std::min(PIXELS, s.pixels() - p);
      const T* block = images + (n * s.pixels() + p) * s.channels;
      Prefetch next;
      next.add(block + PIXELS * s.channels, PIXELS * s.channels);
      normalize(block, size, s.channels, affine, s.relu, input.data());
      const Product forward{input.data(), size,           s.channels, kernel,
                            s.features,   product.data(), next};
      next.spread(forward.count_tiles());
      forward.compute<Left::PLAIN>();
      T* to = outputs + (n * s.pixels() + p) * s.features;
      store_all(to, product.data(), size * s.features);
      moments.add(to, size);
    }
    moments.finish(s.pixels());
  });
}

// The gradient of an output is that of `depthwise_backward`; `transposed` is (features, channels).
template <class T>
void pointwise_backward(const Shape& s, const T* gradients, const T* outputs, const float* mean,
                        const float* factor, const float* constant, const T* images, Affine affines,
                        const float* transposed, T* to_images, float* to_slopes, float* to_biases,
                        float* to_kernels) {
  for_each(s.parts, [&](Index part) {
    std::vector<float> input(PIXELS * s.channels), back(PIXELS * s.channels);
    std::vector<float> gradient(PIXELS * s.features);
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
        for (Index i = 0; i < s.features; i += LANES)
          for (Index q = 0; q < size; q++) {
            const Index at = from + q * s.features + i;
            store(gradient.data() + q * s.features + i,
                  load(gradients + at) + moments.apply(load(outputs + at), i));
          }
        normalize(images + to, size, s.channels, affine, s.relu, input.data());
        const Product outer{input.data(), s.channels, size, gradient.data(),
                            s.features,   to_kernel,  next};
        const Product backward{gradient.data(), size,        s.features, transposed,
                               s.channels,      back.data(), next};
        next.spread(outer.count_tiles() + backward.count_tiles());
        outer.compute<Left::ADD_TRANSPOSED>();
        backward.compute<Left::PLAIN>();
        for (Index i = 0; i < s.channels; i += LANES) {
          const Vector center = load(affine.center + i), slope = load(affine.slope + i);
          Vector slopes = load(to_slope + i), biases = load(to_bias + i);
          for (Index q = 0; q < size; q++) {
            const Index at = q * s.channels + i;
            Vector g = load(back.data() + at);
            if (s.relu) g = load(input.data() + at) > 0 ? g : Vector{};
            biases += g;
            slopes += g * (load(images + to + at) - center);
            store(back.data() + at, g * slope);
          }
          store(to_slope + i, slopes);
          store(to_bias + i, biases);
        }
        store_all(to_images + to, back.data(), size * s.channels);
      }
    }
  });
}

// ---- The end of a unit: normalization, ReLU, and the sum with a shortcut

template <class T>
void finish_forward(const Shape& s, const T* images, Affine affines, const T* shortcuts,
                    T* outputs) {
  for_each(s.count, [&](Index n) {
    const Affine affine = affines.of(n, s.channels);
    for (Index p = 0; p < s.pixels(); p++)
      for (Index i = 0; i < s.channels; i += LANES) {
        const Index at = (n * s.pixels() + p) * s.channels + i;
        Vector y = affine.apply(load(images + at), i);
        if (s.relu) y = relu(y);
        if (shortcuts) y += load(shortcuts + at);
        store(outputs + at, y);
      }
  });
}

template <class T>
void finish_backward(const Shape& s, const T* gradients, const T* images, Affine affines,
                     T* to_images, float* to_slopes, float* to_biases) {
  for_each(s.count, [&](Index n) {
    const Affine affine = affines.of(n, s.channels);
    float *to_slope = to_slopes + n * s.channels, *to_bias = to_biases + n * s.channels;
    std::fill_n(to_slope, s.channels, 0.f);
    std::fill_n(to_bias, s.channels, 0.f);
    for (Index p = 0; p < s.pixels(); p += PIXELS) {
      const Index start = (n * s.pixels() + p) * s.channels;
      const Index size = std::min(PIXELS, s.pixels() - p);
      prefetch(gradients + start + PIXELS * s.channels, PIXELS * s.channels);
      prefetch(images + start + PIXELS * s.channels, PIXELS * s.channels);
      for (Index i = 0; i < s.channels; i += LANES) {
        const Vector center = load(affine.center + i), slope = load(affine.slope + i);
        const Vector bias = load(affine.bias + i);
        Vector slopes = load(to_slope + i), biases = load(to_bias + i);
        for (Index q = 0; q < size; q++) {
          const Index at = q * s.channels + i;
          const Vector distance = load(images + start + at) - center;
          Vector g = load(gradients + start + at);
          if (s.relu) g = distance * slope + bias > 0 ? g : Vector{};
          biases += g;
          slopes += g * distance;
          store(to_images + start + at, g * slope);
        }
        store(to_slope + i, slopes);
        store(to_bias + i, biases);
      }
    }
  });
}

template <class T>
void run(Index function, const Shape& s, void** arrays) {
  auto images = [&](int i) { return (T*)arrays[i]; };
  auto floats = [&](int i) { return (float*)arrays[i]; };
  auto affine = [&](int i) { return Affine{floats(i), floats(i + 1), floats(i + 2)}; };
  switch (function) {
    case 0:
      return depthwise_forward<T>(s, images(0), floats(1), images(2), floats(3), floats(4));
    case 1:
      return depthwise_backward<T>(s, images(0), images(1), floats(2), floats(3), floats(4),
                                   images(5), floats(6), images(7), images(8), floats(9));
    case 2:
      return pointwise_forward<T>(s, images(0), affine(1), floats(4), images(5), floats(6),
                                  floats(7));
    case 3:
      return pointwise_backward<T>(s, images(0), images(1), floats(2), floats(3), floats(4),
                                   images(5), affine(6), floats(9), images(10), floats(11),
                                   floats(12), floats(13));
    case 4:
      return finish_forward<T>(s, images(0), affine(1), (T*)nullptr, images(4));
    case 5:
      return finish_forward<T>(s, images(0), affine(1), images(4), images(5));
    case 6:
      return finish_backward<T>(s, images(0), images(1), affine(2), images(5), floats(6),
                                floats(7));
  }
}

}  // namespace

// Starts `threads` threads for the functions; once in a process.
extern "C" void flax_cifar_start(int threads) { pool = new Pool(threads); }

// Runs a function on arrays: its operands, then its results. `key` has the function's number, 1 for
// bfloat16, and the fields of Shape.
extern "C" void flax_cifar_separable(const int64_t* key, void** arrays) {
  const Shape shape{key[2], key[3], key[4], key[5], key[6], key[7], key[8], key[9]};
  if (key[1]) return run<bfloat16>(key[0], shape, arrays);
  run<float>(key[0], shape, arrays);
}
