// Products of small matrices.

#pragma once

#include "vectors.h"

constexpr Index PANEL = 2 * LANES;  // columns that are computed together
// Rows that are computed together: with two vectors as many as the registers hold.
#ifdef __AVX512F__
constexpr Index TILE = 8;
#else
constexpr Index TILE = 6;
#endif

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
    return (rows / TILE + rows % TILE / 4 + rows % TILE % 4 / 2 + rows % 2) *
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
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
      for (int v = 0; v < V; v++)
        sums[r][v] = ADD ? load(to.data + r * to.row + v * LANES) : Vector{};
    for (Index k = 0; k < count; k++) {
      Vector vectors[V];
#pragma GCC unroll 16
      for (int v = 0; v < V; v++) vectors[v] = load(b.data + k * b.inner + v * LANES);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++)
#pragma GCC unroll 16
        for (int v = 0; v < V; v++) sums[r][v] += vectors[v] * a.data[k * a.inner + r * a.row];
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
      for (int v = 0; v < V; v++) store(to.data + r * to.row + v * LANES, sums[r][v]);
  }

  template <bool ADD, int V>
  void compute_columns(Index column) const {
    Index r = 0;
    if (TILE == 8 && V == 1)  // eight sums would wait for each other
      for (; r + 16 <= rows; r += 16) compute_tile<ADD, 16, V>(r, column);
    for (; r + TILE <= rows; r += TILE) compute_tile<ADD, TILE, V>(r, column);
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
