// Host side of the token shift: tiles of tokens, last tokens, registration.
#include "ddl/shift_host.h"

namespace df::cpu {
namespace {
std::vector<ShiftTile> tiles_of(const std::vector<Sequence>& sequences) {
  std::vector<ShiftTile> tiles;
  for (int64_t n = 0; n < int64_t(sequences.size()); ++n) {
    const Sequence& s = sequences[n];
    if (s.first == s.last) tiles.push_back({n, s.batch, s.first, s.last, s.first, s.last});
    for (int64_t t = s.first; t < s.last; t += kShiftTile)
      tiles.push_back({n, s.batch, s.first, s.last, t, std::min(t + kShiftTile, s.last)});
  }
  return tiles;
}

template <class Args, class Kernel>
void run(const Args& args, const std::vector<Sequence>& sequences, Kernel* kernel) {
  const std::vector<ShiftTile> tiles = tiles_of(sequences);
  const int64_t row = std::max<int64_t>(1, args.shape.H * args.shape.D);
  // a thread takes at least some 16 k elements
  const int64_t grain =
      std::max<int64_t>(1, 16384 / (std::min(kShiftTile, args.shape.T + 1) * row));
  parallel_for(0, int64_t(tiles.size()), grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) kernel(args, tiles[i]);
  });
}

// The last token of every sequence, or its cache.
void last_tokens(const ShiftFwdArgs& p, const std::vector<Sequence>& sequences, int64_t size) {
  const int64_t bytes = p.shape.D * size;
  char* to = static_cast<char*>(p.last);
  for (int64_t n = 0; n < p.shape.N; ++n)
    for (int64_t h = 0; h < p.shape.H; ++h, to += bytes) {
      const Sequence& s = sequences[n];
      const int64_t token = s.batch * p.x.b + (s.last - 1) * p.x.t + h * p.x.h;
      const char* from = static_cast<const char*>(p.x.data) + token * size;
      if (s.first == s.last)
        from = p.cache ? static_cast<const char*>(p.cache) + (n * p.shape.H + h) * bytes : nullptr;
      from ? std::memcpy(to, from, bytes) : std::memset(to, 0, bytes);
    }
}

std::tuple<Tensor, Tensor> fwd(const Tensor& x, const Tensor& previous, const Tensor& current,
                               const OptTensor& cache, const OptTensor& cu_seqlens,
                               bool output_cache) {
  const ShiftTensors in = shift_tensors(x, previous, current, cache, cu_seqlens);
  const std::vector<Sequence> sequences = sequences_of("token_shift", x, cu_seqlens);
  const auto [B, T, N, H, D] = in.shape;
  const Tensor y = empty(x, {B, T, H, D});
  const Tensor last = output_cache ? in.state(x.scalar_type()) : empty(x, {0});
  const ShiftFwdArgs args = in.fwd(y, output_cache ? &last : nullptr);
  zero_behind(y, sequences, cu_seqlens);
  run(args, sequences, DF_CPU(shift_fwd));
  if (output_cache) last_tokens(args, sequences, int64_t(x.element_size()));
  return {y, last};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bwd(const Tensor& dy, const OptTensor& d_last,
                                               const Tensor& x, const Tensor& previous,
                                               const Tensor& current, const OptTensor& cache,
                                               const OptTensor& cu_seqlens) {
  const ShiftTensors in = shift_tensors(x, previous, current, cache, cu_seqlens);
  const std::vector<Sequence> sequences = sequences_of("token_shift", x, cu_seqlens);
  const ShiftGrads grads = shift_grads(in, dy, d_last);
  for (const Tensor* t : {&grads.dx, &grads.d_previous, &grads.d_current})
    zero_behind(*t, sequences, cu_seqlens);
  run(grads.args(in), sequences, DF_CPU(shift_bwd));
  return shift_results(grads, previous, current, cache);
}
}  // namespace
}  // namespace df::cpu

DF_IMPL(CPU, m) {
  m.impl("token_shift_fwd", TORCH_BOX(&df::cpu::fwd));
  m.impl("token_shift_bwd", TORCH_BOX(&df::cpu::bwd));
}
