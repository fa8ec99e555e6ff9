// The products of csrc/common/cuda/mma_sm80.cuh and mma_sm90.cuh against float64, for every way
// round of both operands, A from registers and from shared memory. Prints a line a case,
//   <architecture> <type> N <n> K <k> A <major> B <major> <registers|shared> <relative error>
// and fails if a launch does. Built for the emulator (`make emulated`) and run by test_tiles.py.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "common/cuda/mma_sm80.cuh"
#include "common/cuda/mma_sm90.cuh"

namespace df::cuda {
template <class Arch_, class E_, int kN_, int kK_, Major kMajorA_, Major kMajorB_, bool kRegisters_>
struct Product {
  using Arch = Arch_;
  using E = E_;
  static constexpr int kN = kN_, kK = kK_;
  static constexpr Major kMajorA = kMajorA_, kMajorB = kMajorB_;
  static constexpr bool kRegisters = kRegisters_;
};

template <class E>
__device__ void store_shared(uint32_t to, float x) {
  E e;
  from_float(x, &e);
  if constexpr (sizeof(E) == 2)
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(to), "h"(e.bits) : "memory");
  else
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(e) : "memory");
}

template <class P>
__global__ void product_kernel(const float* a, const float* b, float* c) {
  using E = typename P::E;
  constexpr int kN = P::kN, kK = P::kK, kPanel = kPanelCols<E>;
  constexpr bool kAlongA = P::kMajorA == Major::k, kAlongB = P::kMajorB == Major::k;
  constexpr int kWide = (kK + kPanel - 1) / kPanel * kPanel;
  extern __shared__ char raw[];
  const Tile<E, kAlongA ? 64 : kK, kAlongA ? kWide : 64> sA{(shared_address(raw) + 1023) / 1024 *
                                                            1024};
  const Tile<E, kAlongB ? kN : kK, kAlongB ? kWide : kN> sB{sA.base +
                                                            (sA.kBytes + 1023) / 1024 * 1024};
  for (int i = threadIdx.x; i < 64 * kK; i += 128)
    store_shared<E>(kAlongA ? sA.at(i / kK, i % kK) : sA.at(i % kK, i / kK), a[i]);
  for (int i = threadIdx.x; i < kK * kN; i += 128)
    store_shared<E>(kAlongB ? sB.at(i % kN, i / kN) : sB.at(i / kN, i % kN), b[i]);
  P::Arch::stores_visible();
  __syncthreads();

  const Operand<E, P::kMajorA> left{sA.base, uint32_t(sA.kRows) * 128};
  const Operand<E, P::kMajorB> right{sB.base, uint32_t(sB.kRows) * 128};
  float sum[kN / 8][4];
  clear<kN>(sum);
  if constexpr (P::kRegisters) {
    Fragment<E, kK> fragment;
    load_fragment<kK>(fragment, left);
    P::Arch::begin(sum);
    P::Arch::template mma<kN>(sum, fragment, right);
  } else {
    P::Arch::begin(sum);
    P::Arch::template mma<kN, kK>(sum, left, right);
  }
  P::Arch::commit();
  P::Arch::template wait<0>(sum);
#pragma unroll
  for (int n = 0; n < kN / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) c[fragment_row(i) * kN + fragment_col(n, i)] = sum[n][i];
}

// Numbers that bfloat16 and float16 hold exactly.
float random_number() {
  return float(std::rand() % 511 - 255) / 256;
}

template <class P>
bool run(const char* name) {
  constexpr int kN = P::kN, kK = P::kK, kShared = 160 << 10;
  std::vector<float> a(64 * kK), b(kK * kN), c(64 * kN);
  for (float& x : a) x = random_number();
  for (float& x : b) x = random_number();
  cudaFuncSetAttribute(product_kernel<P>, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  product_kernel<P><<<1, 128, kShared>>>(a.data(), b.data(), c.data());
  if (cudaGetLastError() != cudaSuccess) return false;
  double error = 0, size = 0;
  for (int m = 0; m < 64; ++m)
    for (int n = 0; n < kN; ++n) {
      double sum = 0;
      for (int k = 0; k < kK; ++k) sum += double(a[m * kK + k]) * b[k * kN + n];
      error += std::pow(c[m * kN + n] - sum, 2), size += sum * sum;
    }
  const auto major = [](Major m) { return m == Major::k ? "k" : "mn"; };
  std::printf("%s N %d K %d A %s B %s %s %.2e\n", name, kN, kK, major(P::kMajorA),
              major(P::kMajorB), P::kRegisters ? "registers" : "shared", std::sqrt(error / size));
  return true;
}

template <class Arch, class E, int kN, int kK>
bool all_ways(const char* name) {
  return run<Product<Arch, E, kN, kK, Major::k, Major::k, true>>(name) &&
         run<Product<Arch, E, kN, kK, Major::mn, Major::mn, true>>(name) &&
         run<Product<Arch, E, kN, kK, Major::k, Major::mn, false>>(name) &&
         run<Product<Arch, E, kN, kK, Major::mn, Major::k, false>>(name);
}

bool all() {
#ifdef TEST_SM90
  return all_ways<Sm90, bf16, 64, 64>("sm90 bfloat16") &&
         all_ways<Sm90, bf16, 192, 128>("sm90 bfloat16") &&
         all_ways<Sm90, f16, 256, 64>("sm90 float16");
#else
  return all_ways<Sm80, bf16, 64, 64>("sm80 bfloat16") &&
         all_ways<Sm80, f16, 128, 128>("sm80 float16") &&
         all_ways<Sm80, float, 64, 64>("sm80 float32") &&
         all_ways<Sm80, float, 64, 32>("sm80 float32");
#endif
}
}  // namespace df::cuda

int main() {
  return df::cuda::all() ? 0 : 1;
}
