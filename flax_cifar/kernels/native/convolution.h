// What a dense convolution of stride 1 computes, for both of its algorithms.

#pragma once

#include <vector>

#include "vectors.h"

struct Convolution {
  Index count, height, width, channels, features;  // of the input; features of the output
  Index kernel_height, kernel_width;               // in taps
  Index out_height, out_width;
  Index top, left, reflect;  // pixels before the image: zeros, or the image reflected
  Index dilation;
  Index relu;       // of the output
  Index measured;   // whether the output's moments are asked for
  Index parts;      // of the images, which have a gradient of the kernel each
  Index to_images;  // whether their gradient is computed
  Index first(Index part) const { return part * count / parts; }
};

// The input at each place of an axis of the padded input; -1 for padding with zeros.
inline std::vector<Index> list_inputs(Index size, Index places, Index before, bool reflect) {
  std::vector<Index> inputs(places, -1);
  for (Index i = 0; i < places; i++) {
    Index place = i - before;
    if (reflect && place < 0) place = -place;
    if (reflect && place >= size) place = 2 * (size - 1) - place;
    if (place >= 0 && place < size) inputs[i] = place;
  }
  return inputs;
}

// Memory of the calling thread, of at least `size` floats, kept from call to call.
template <int SLOT>
inline float* get_memory(Index size) {
  thread_local Array memory;
  if ((Index)memory.size() < size) memory.resize(size);
  return memory.data();
}
