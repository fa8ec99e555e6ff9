// Host side of the convolutions: tiles of tokens, blocks of features, the fixed partition of the
// taps' gradient, registration.
#include "common/cpu/partial_sums.h"
#include "ddl/mix_host.h"

namespace df::cpu {
namespace {
constexpr int64_t kUnitTokens = 256;     // a partial sum of the taps' gradient covers about as many
constexpr int64_t kLeastWork = 1 << 15;  // elements that are worth waking a thread for

std::vector<MixTile> tiles_of(const std::vector<Sequence>& sequences, bool empty_ones) {
  std::vector<MixTile> tiles;
  for (int64_t n = 0; n < int64_t(sequences.size()); ++n) {
    const Sequence& s = sequences[n];
    const int64_t length = s.last - s.first;
    if (length == 0 && empty_ones) tiles.push_back({n, s.batch, s.first, s.last, 0, 0});
    for (int64_t t = 0; t < length; t += kMixTile)
      tiles.push_back({n, s.batch, s.first, s.last, t, std::min(t + kMixTile, length)});
  }
  return tiles;
}

// Runs of consecutive tiles, one partial sum each; they depend on the lengths alone.
std::vector<int64_t> units_of(const std::vector<MixTile>& tiles) {
  std::vector<int64_t> starts{0};
  int64_t tokens = 0;
  for (int64_t i = 0; i < int64_t(tiles.size()); ++i) {
    tokens += tiles[i].end - tiles[i].begin + 1;
    if (tokens >= kUnitTokens) starts.push_back(i + 1), tokens = 0;
  }
  if (starts.back() != int64_t(tiles.size())) starts.push_back(int64_t(tiles.size()));
  return starts;
}

// run(i, f0, scratch) for every i < count and block of features, `tokens` an i.
template <class Run>
void run_blocks(const MixShape& s, DType dtype, int64_t count, int64_t tokens, Run run) {
  const int64_t width = mix_block(s), blocks = (s.d + width - 1) / width;
  const int64_t work = tokens * std::min(s.d, width) * s.dv;
  int64_t bytes;
  DF_CPU(mix_scratch)(s, dtype, &bytes);
  const int64_t grain = std::max<int64_t>(1, kLeastWork / std::max<int64_t>(1, work));
  parallel_for(0, count * blocks, grain, [&](int64_t begin, int64_t end) {
    const Memory scratch = zeroed(bytes);
    for (int64_t i = begin; i < end; ++i) run(i / blocks, i % blocks * width, scratch.get());
  });
}

// The last K - 1 inputs of every sequence, from its initial state where it is shorter.
template <class Word>
void last_inputs(const MixFwdArgs& p, const std::vector<Sequence>& sequences) {
  const int64_t slots = p.shape.K - 1, channels = p.shape.in();
  const Word* const x = static_cast<const Word*>(p.x.data);
  const Word* const initial = static_cast<const Word*>(p.initial);
  for (int64_t n = 0; n < p.shape.N; ++n) {
    const Sequence& s = sequences[n];
    for (int64_t i = 0; i < slots; ++i) {
      const int64_t t = s.last - s.first - slots + i, at = n * channels * slots;
      Word* const to = static_cast<Word*>(p.final) + at + i;
      if (t >= 0) {
        const Word* const from = x + s.batch * p.x.b + (s.first + t) * p.x.t;
        for (int64_t c = 0; c < channels; ++c) to[c * slots] = from[c];
      } else {
        const Word* const from = initial + at + t + slots;
        for (int64_t c = 0; c < channels; ++c) to[c * slots] = initial ? from[c * slots] : Word(0);
      }
    }
  }
}

MixFwdResult fwd(bool expand, const Tensor& x, const Tensor& w, const OptTensor& initial_state,
                 const OptTensor& cu_seqlens, bool output_final_state) {
  const MixTensors in = mix_tensors(expand, x, w, initial_state, cu_seqlens);
  const std::vector<Sequence> sequences =
      sequences_of(expand ? "ddl_expand" : "ddl_compress_tc", x, cu_seqlens);
  const Tensor y = in.output();
  const Tensor final = output_final_state ? in.state(x.scalar_type()) : empty(x, {0});
  const MixFwdArgs args = in.fwd(y, output_final_state ? &final : nullptr);
  zero_behind(y, sequences, cu_seqlens);
  const std::vector<MixTile> tiles = tiles_of(sequences, false);
  auto* kernel = DF_CPU(mix_fwd);
  run_blocks(args.shape, args.dtype, int64_t(tiles.size()), std::min(kMixTile, args.shape.T),
             [&](int64_t i, int64_t f0, void* scratch) { kernel(args, tiles[i], f0, scratch); });
  if (output_final_state) {
    const int64_t size = int64_t(x.element_size());
    (size == 2   ? &last_inputs<uint16_t>
     : size == 4 ? &last_inputs<uint32_t>
                 : &last_inputs<uint64_t>)(args, sequences);
  }
  return {y, final};
}

MixBwdResult bwd(bool expand, const Tensor& dy, const OptTensor& d_final, const Tensor& x,
                 const Tensor& w, const OptTensor& initial_state, const OptTensor& cu_seqlens) {
  const MixTensors in = mix_tensors(expand, x, w, initial_state, cu_seqlens);
  const std::vector<Sequence> sequences =
      sequences_of(expand ? "ddl_expand" : "ddl_compress_tc", x, cu_seqlens);
  const MixGrads grads = mix_grads(in, dy, d_final);
  zero_behind(grads.dx, sequences, cu_seqlens);
  const MixBwdArgs args = grads.args(in);
  const std::vector<MixTile> tiles = tiles_of(sequences, in.initial.has_value());
  const std::vector<int64_t> units = units_of(tiles);
  const int64_t count = int64_t(units.size()) - 1;
  const auto [_, B, T, N, d, dv, K] = in.shape;
  const int64_t taps = K * d * dv;
  const Tensor partial = zeros(x, {count, taps}, compute_type(x));
  char* sums = static_cast<char*>(partial.mutable_data_ptr());
  const int64_t stride = taps * int64_t(partial.element_size());
  auto* kernel = DF_CPU(mix_bwd);
  run_blocks(args.shape, args.dtype, count, std::min(kUnitTokens, B * T),
             [&](int64_t u, int64_t f0, void* scratch) {
               for (int64_t i = units[u]; i < units[u + 1]; ++i)
                 kernel(args, tiles[i], f0, sums + u * stride, scratch);
             });
  const Tensor dw = torch::stable::view(sum_blocks(partial, taps), {K, d, dv});
  return mix_results(grads, dw, w, initial_state);
}
}  // namespace
}  // namespace df::cpu

DF_IMPL(CPU, m) {
  m.impl("ddl_tc_fwd", TORCH_BOX((&df::mix_fwd_op<false, &df::cpu::fwd>)));
  m.impl("ddl_tc_bwd", TORCH_BOX((&df::mix_bwd_op<false, &df::cpu::bwd>)));
  m.impl("ddl_ec_fwd", TORCH_BOX((&df::mix_fwd_op<true, &df::cpu::fwd>)));
  m.impl("ddl_ec_bwd", TORCH_BOX((&df::mix_bwd_op<true, &df::cpu::bwd>)));
}
