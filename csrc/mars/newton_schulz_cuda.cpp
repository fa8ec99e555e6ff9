// Newton-Schulz iterations on batches of matrices: three products a step (product.h).
#include "common/cuda/tma.h"
#include "common/cuda_shim.h"
#include "mars/product.h"

namespace df::cuda {
namespace {
Matrices matrices(const Tensor& t) {
  return {t.data_ptr(), t.size(1), t.size(2), t.stride(1), t.stride(0)};
}

// [n, rows, cols] with rows on multiples of 128 bytes, as TMA and stores of 16 bytes want them.
struct Padded {
  Tensor storage;
  Matrices m;
  Padded(const Tensor& like, int64_t n, int64_t rows, int64_t cols)
      : storage(empty(like, {n, rows, (cols + 63) / 64 * 64})), m(matrices(storage)) {
    m.cols = cols;
  }
};

Tensor4 tensor4(const Matrices& m, int64_t count, DType type) {
  return {m.data, type, {m.cols, 1, m.rows, count}, {m.ld, m.ld, m.batch}};
}

// False: this build, device or these strides want the other kernel.
bool launch_sm90(const Product& p, DType type, void* stream) {
  const Tensor4 left = tensor4(p.left, p.count, type), right = tensor4(p.right, p.count, type);
  auto* const launch = type == DType::bf16 ? &product_bf16_sm90_cuda : &product_f16_sm90_cuda;
  if (!launch || sm() != 90 || !has_tensor_map(left) || !has_tensor_map(right)) return false;
  CUtensorMap maps[2];
  for (int i = 0; i < 2; ++i) {
    const cudaError_t e = make_tensor_map(&maps[i], i == 0 ? left : right, kProductBox);
    STD_TORCH_CHECK(e == cudaSuccess, "newton_schulz: tensor map: ", cudaGetErrorString(e));
  }
  launch(p, maps[0], maps[1], stream);
  return true;
}

void launch_product(const Product& p, DType type, void* stream) {
  if (launch_sm90(p, type, stream)) return;
  (type == DType::bf16 ? product_bf16_cuda : product_f16_cuda)(p, stream);
}

Product symmetric(const Matrices& x, const Matrices& out, int64_t n, double scale, double add) {
  return {x, x, out, n, true, out.whole_vectors(), float(scale), float(add)};
}

void check(const Tensor& x, int64_t steps) {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(1) <= x.size(2) && steps > 0,
                  "newton_schulz: x must be [n, rows, cols] with rows <= cols, steps positive");
  const DType type = dtype(x);
  STD_TORCH_CHECK(type == DType::bf16 || type == DType::f16,
                  "newton_schulz: x must be bfloat16 or float16");
  const auto tiles = [](int64_t side) { return (side + kProductTile - 1) / kProductTile; };
  STD_TORCH_CHECK(x.size(2) < INT32_MAX - kProductTile &&
                      double(x.size(0)) * tiles(x.size(1)) * tiles(x.size(2)) < INT32_MAX,
                  "newton_schulz: x is too large for one launch");
}
}  // namespace

static Tensor newton_schulz(const Tensor& given, int64_t steps, double a, double b, double c) {
  check(given, steps);
  const int64_t n = given.size(0), rows = given.size(1), cols = given.size(2);
  const Tensor x = unit_last_stride(given);
  const Tensor out = empty(x, {n, rows, cols});
  if (out.numel() == 0) return out;
  const DType type = dtype(x);
  const bool whole = matrices(out).whole_vectors();  // out can take every other step, too
  const Padded gram(x, n, rows, rows), polynomial(x, n, rows, rows);
  const Padded first(x, steps > 1 ? n : 0, rows, cols);
  const Padded second(x, steps > 2 && !whole ? n : 0, rows, cols);
  Launch launch(x, out, gram.storage, polynomial.storage, first.storage, second.storage);
  Matrices from = matrices(x);
  for (int64_t left = steps - 1; left >= 0; --left) {
    const bool ends = left == 0 || (whole && left % 2 == 0);
    const Matrices to = ends ? matrices(out) : left % 2 ? first.m : second.m;
    launch_product(symmetric(from, gram.m, n, 1, 0), type, launch.stream());
    launch_product(symmetric(gram.m, polynomial.m, n, c, b), type, launch.stream());
    launch_product({polynomial.m, from, to, n, false, to.whole_vectors(), 1, float(a)}, type,
                   launch.stream());
    launch.check();
    from = to;
  }
  return out;
}
}  // namespace df::cuda

DF_IMPL(DF_CUDA, m) {
  m.impl("newton_schulz", TORCH_BOX(&df::cuda::newton_schulz));
}
