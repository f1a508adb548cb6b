// Activations and their gradients.

#pragma once

#include "vectors.h"

enum Activation : Index { NONE, RELU, SILU, GELU };  // the order of ACTIVATIONS in finish.py

// e^x for |x| <= 87, to 3e-7 of itself: 2^n * e^r, where |r| <= ln(2) / 2.
inline Vector exponential(Vector x) {
  constexpr float ROUND = 12582912;  // 1.5 * 2^23: the sum with it has no bits for fractions
  const Vector sum = x * 1.44269504f + ROUND, n = sum - ROUND;
  const Vector r = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln(2) in two parts
  Vector power = r * (1.f / 720) + 1.f / 120;  // Taylor's series
  power = power * r + 1.f / 24;
  power = power * r + 1.f / 6;
  power = power * r + 0.5f;
  power = power * r + 1.f;
  power = power * r + 1.f;
  return power * (Vector)(((Bits)sum << 23) + (127u << 23));
}

inline Vector sigmoid(Vector x) {
  constexpr float MOST = 87;  // e^89 is more than a float holds
  const Vector near = x > MOST ? Vector{} + MOST : x < -MOST ? Vector{} - MOST : x;
  return x < -MOST ? Vector{} : 1.f / (exponential(-near) + 1.f);
}

// GELU is x * sigmoid(z): the approximation by tanh, Hendrycks and Gimpel 2016 (arXiv:1606.08415).
constexpr float GELU_LINEAR = 1.59576912f, GELU_CUBIC = GELU_LINEAR * 0.044715f;

inline Vector get_gelu_z(Vector x) { return x * (x * x * GELU_CUBIC + GELU_LINEAR); }

inline Vector activate(Vector x, Index activation) {
  if (activation == RELU) return relu(x);
  if (activation == SILU) return x * sigmoid(x);
  if (activation == GELU) return x * sigmoid(get_gelu_z(x));
  return x;
}

// The gradient of x from that of activate(x).
inline Vector pull_back(Vector gradient, Vector x, Index activation) {
  if (activation == NONE) return gradient;
  if (activation == RELU) return x > 0 ? gradient : Vector{};
  const bool smooth = activation == SILU;
  const Vector share = sigmoid(smooth ? x : get_gelu_z(x));
  const Vector z_slope = smooth ? Vector{} + 1.f : x * x * (3 * GELU_CUBIC) + GELU_LINEAR;
  return gradient * share * ((1.f - share) * z_slope * x + 1.f);
}
