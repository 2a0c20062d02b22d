// CUDA's small vectors, with the alignment that a vector load or store needs.
#pragma once

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
  constexpr unsigned long long count() const { return 1ull * x * y * z; }
};

#define FUSEDPO_VECTORS(scalar, name)                          \
  struct alignas(2 * sizeof(scalar)) name##2 { scalar x, y; }; \
  inline name##2 make_##name##2(scalar x, scalar y) { return {x, y}; }
FUSEDPO_VECTORS(int, int)
FUSEDPO_VECTORS(unsigned, uint)
FUSEDPO_VECTORS(float, float)
FUSEDPO_VECTORS(double, double)
#undef FUSEDPO_VECTORS

#define FUSEDPO_VECTORS(scalar, name)                                \
  struct alignas(4 * sizeof(scalar)) name##4 { scalar x, y, z, w; }; \
  inline name##4 make_##name##4(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }
FUSEDPO_VECTORS(int, int)
FUSEDPO_VECTORS(unsigned, uint)
FUSEDPO_VECTORS(float, float)
#undef FUSEDPO_VECTORS
