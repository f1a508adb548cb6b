// Products of small matrices.

#pragma once

#include "vectors.h"

constexpr Index PANEL = 2 * LANES;  // columns that are computed together

// The operands and the result, with the distances in memory between their neighbours.
struct Left {
  const float* data;
  Index row, inner;
};
struct Right {
  const float* data;
  Index inner, panel;
};
struct Result {
  float* data;
  Index row;
};

struct Product {
  Index rows, inner, columns;  // columns: a multiple of LANES
  Left left;
  Right right;
  Result result;
  Prefetch* next = nullptr;

  Index count_tiles() const {
    return (rows / 6 + rows % 6 / 4 + rows % 6 % 4 / 2 + rows % 2) *
           ((columns + PANEL - 1) / PANEL);
  }

  // Computes R rows and V vectors of columns, and if ADD adds them to what is there. Distances are
  // copied and loops unrolled, so that compilers keep all of them in registers.
  template <bool ADD, int R, int V>
  void compute_tile(Index row, Index column) const {
    const Left a = {left.data + row * left.row, left.row, left.inner};
    const Right b = {right.data + column / PANEL * right.panel, right.inner, right.panel};
    const Result to = {result.data + row * result.row + column, result.row};
    const Index count = inner;
    if (next) next->advance();
    Vector sums[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int v = 0; v < V; v++)
        sums[r][v] = ADD ? load(to.data + r * to.row + v * LANES) : Vector{};
    for (Index k = 0; k < count; k++) {
      Vector vectors[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) vectors[v] = load(b.data + k * b.inner + v * LANES);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) sums[r][v] += vectors[v] * a.data[k * a.inner + r * a.row];
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) store(to.data + r * to.row + v * LANES, sums[r][v]);
  }

  // Six rows and two vectors are as much as the registers hold.
  template <bool ADD, int V>
  void compute_columns(Index column) const {
    Index r = 0;
    for (; r + 6 <= rows; r += 6) compute_tile<ADD, 6, V>(r, column);
    for (; r + 4 <= rows; r += 4) compute_tile<ADD, 4, V>(r, column);
    for (; r + 2 <= rows; r += 2) compute_tile<ADD, 2, V>(r, column);
    for (; r < rows; r++) compute_tile<ADD, 1, V>(r, column);
  }

  template <bool ADD>
  void compute() const {
    Index c = 0;
    for (; c + PANEL <= columns; c += PANEL) compute_columns<ADD, 2>(c);
    for (; c < columns; c += LANES) compute_columns<ADD, 1>(c);
  }
};
