// Host side of the short convolution: states between their public layout [N,D,W-1] and rows of
// channels, tiles, the fixed partition of the taps' gradients, registration.
#include "common/cpu/partial_sums.h"
#include "gated_delta/host.h"
#include "gated_delta/short_conv.h"

namespace df::cpu {
namespace {
constexpr int64_t kUnitTokens = 256;  // a partial sum of the taps' gradients covers about as many

// to[n][w][d] = from[n][d][w] for elements of the given size.
template <class Word>
void swap_last(const void* from, void* to, int64_t N, int64_t D, int64_t W) {
  const Word* in = static_cast<const Word*>(from);
  Word* out = static_cast<Word*>(to);
  for (int64_t n = 0; n < N; ++n)
    for (int64_t w = 0; w < W; ++w)
      for (int64_t d = 0; d < D; ++d) out[(n * W + w) * D + d] = in[(n * D + d) * W + w];
}
// A contiguous [N,D,W] as a contiguous [N,W,D].
Tensor swapped(const Tensor& t) {
  const int64_t N = t.size(0), D = t.size(1), W = t.size(2);
  const Tensor to = empty(t, {N, W, D});
  auto* swap = t.element_size() == 2   ? &swap_last<uint16_t>
               : t.element_size() == 4 ? &swap_last<uint32_t>
                                       : &swap_last<uint64_t>;
  swap(t.const_data_ptr(), to.mutable_data_ptr(), N, D, W);
  return to;
}
Tensor as(const Tensor& t, ScalarType type) {
  return contiguous(torch::stable::to(t, type));
}

// Keeps alive what ConvInputs points to.
struct Inputs {
  Tensor x, weight, bias, history;
  std::vector<Sequence> sequences;
  int64_t covered;
  bool given;  // whether there is an initial state
  bool silu;

  int64_t B() const { return x.size(0); }
  int64_t T() const { return x.size(1); }
  int64_t D() const { return x.size(2); }
  int64_t W() const { return weight.size(0); }
  int64_t N() const { return int64_t(sequences.size()); }
  ConvInputs args() const {
    return {{x.const_data_ptr(), dtype(x), x.stride(0), x.stride(1), 0},
            D(),
            W(),
            weight.const_data_ptr(),
            bias.const_data_ptr(),
            history.const_data_ptr(),
            given ? (W() - 1) * D() : 0,
            sequences.data(),
            silu};
  }
};

Inputs gather(const Tensor& x, const Tensor& weight, const OptTensor& bias,
              const OptTensor& initial_state, const OptTensor& cu_seqlens, bool silu) {
  STD_TORCH_CHECK(x.dim() == 3 && weight.dim() == 2 && weight.size(0) == x.size(2),
                  "causal_conv1d: x must be [B,T,D] and weight [D,W]");
  const int64_t D = x.size(2), W = weight.size(1);
  STD_TORCH_CHECK(W >= 2 && W <= kMaxConvWidth, "causal_conv1d: W = ", W);
  const ScalarType type = compute_type(x);
  const Tensor taps = torch::stable::view(as(weight, type), {1, D, W});
  Inputs in{unit_last_stride(x),
            torch::stable::view(swapped(taps), {W, D}),
            bias ? as(*bias, type) : zeros(x, {D}, type),
            initial_state ? swapped(as(*initial_state, x.scalar_type()))
                          : zeros(x, {W - 1, D}, x.scalar_type()),
            sequences_of(x, cu_seqlens),
            x.size(1),
            initial_state.has_value(),
            silu};
  if (cu_seqlens) in.covered = in.sequences.empty() ? 0 : in.sequences.back().end;
  STD_TORCH_CHECK(!initial_state || initial_state->size(0) == in.N(),
                  "causal_conv1d: initial_state of ", initial_state->size(0), " sequences, not ",
                  in.N());
  return in;
}

// The last W - 1 inputs of every sequence, from its history where it is shorter, as [N,D,W-1].
Tensor last_inputs(const Inputs& in) {
  const int64_t rows = in.W() - 1, row = in.D() * int64_t(in.x.element_size());
  const Tensor state = empty(in.x, {in.N(), rows, in.D()});
  char* to = static_cast<char*>(state.mutable_data_ptr());
  const ConvInputs p = in.args();
  for (int64_t n = 0; n < in.N(); ++n) {
    const Sequence& s = in.sequences[n];
    for (int64_t i = 0; i < rows; ++i, to += row) {
      const int64_t t = s.end - s.begin - rows + i, bytes = int64_t(in.x.element_size());
      const void* from =
          t >= 0 ? static_cast<const char*>(p.x.data) + p.x.at(s.batch, s.begin + t, 0) * bytes
                 : static_cast<const char*>(p.history) +
                       (n * p.history_stride + (t + rows) * in.D()) * bytes;
      std::memcpy(to, from, row);
    }
  }
  return torch::stable::view(swapped(state), {in.N(), in.D(), rows});
}

std::vector<ConvTile> tiles_of(const Inputs& in, bool empty_ones) {
  std::vector<ConvTile> tiles;
  for (int64_t n = 0; n < in.N(); ++n) {
    const int64_t length = in.sequences[n].end - in.sequences[n].begin;
    if (length == 0 && empty_ones) tiles.push_back({n, 0, 0});
    for (int64_t t = 0; t < length; t += kConvTile)
      tiles.push_back({n, t, std::min(t + kConvTile, length)});
  }
  return tiles;
}

Tensor run_fwd(const Inputs& in) {
  const Tensor y = empty(in.x, {in.B(), in.T(), in.D()});
  zero_padding(y, in.covered);
  const ConvFwdArgs args{in.args(), in.T(), y.mutable_data_ptr()};
  const std::vector<ConvTile> tiles = tiles_of(in, false);
  auto* kernel = DF_CPU(short_conv_fwd);
  // a thread takes at least some 16 k elements
  const int64_t grain = std::max<int64_t>(1, 16384 / (kConvTile * std::max<int64_t>(1, in.D())));
  parallel_for(0, int64_t(tiles.size()), grain, [&](int64_t begin, int64_t end) {
    const FlushSubnormals flush;
    for (int64_t i = begin; i < end; ++i) kernel(args, tiles[i]);
  });
  return y;
}

std::tuple<Tensor, Tensor> fwd(const Tensor& x, const Tensor& weight, const OptTensor& bias,
                               const OptTensor& initial_state, const OptTensor& cu_seqlens,
                               bool silu, bool output_final_state) {
  const Inputs in = gather(x, weight, bias, initial_state, cu_seqlens, silu);
  return {run_fwd(in), output_final_state ? last_inputs(in) : empty(x, {0})};
}

Tensor update(const Tensor& x, const Tensor& state, const Tensor& weight, const OptTensor& bias,
              bool silu) {
  const Inputs in = gather(x, weight, bias, state, std::nullopt, silu);
  const Tensor y = run_fwd(in);
  Tensor to = state;
  torch::stable::copy_(to, last_inputs(in));
  return y;
}

// Runs of consecutive tiles, one partial sum each; they depend on the lengths alone.
std::vector<int64_t> units_of(const std::vector<ConvTile>& tiles) {
  std::vector<int64_t> starts{0};
  int64_t tokens = 0;
  for (int64_t i = 0; i < int64_t(tiles.size()); ++i) {
    tokens += tiles[i].end - tiles[i].begin + 1;
    if (tokens >= kUnitTokens) starts.push_back(i + 1), tokens = 0;
  }
  if (starts.back() != int64_t(tiles.size())) starts.push_back(int64_t(tiles.size()));
  return starts;
}

// Gradients of the taps [D,W] and the bias [D], in the compute type.
std::tuple<Tensor, Tensor> run_bwd(const Inputs& in, const ConvBwdArgs& args) {
  const ScalarType type = compute_type(in.x);
  const std::vector<ConvTile> tiles = tiles_of(in, args.d_initial);
  const std::vector<int64_t> units = units_of(tiles);
  const int64_t count = int64_t(units.size()) - 1, W = in.W(), D = in.D();
  const Tensor partial = zeros(in.x, {count, W + 1, D}, type);
  char* sums = static_cast<char*>(partial.mutable_data_ptr());
  const int64_t stride = (W + 1) * D * int64_t(partial.element_size());
  int64_t bytes;
  DF_CPU(short_conv_bwd_scratch)(args, &bytes);
  auto* kernel = DF_CPU(short_conv_bwd);
  parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<void, decltype(&std::free)> scratch(std::calloc(bytes, 1), &std::free);
    STD_TORCH_CHECK(scratch, "causal_conv1d: no memory for ", bytes, " bytes of scratch");
    const FlushSubnormals flush;
    for (int64_t u = begin; u < end; ++u)
      for (int64_t i = units[u]; i < units[u + 1]; ++i)
        kernel(args, tiles[i], sums + u * stride, scratch.get());
  });
  Tensor total = torch::stable::view(sum_blocks(partial, (W + 1) * D), {W + 1, D});
  const Tensor taps = torch::stable::view(torch::stable::narrow(total, 0, 0, W), {1, W, D});
  Tensor dbias = empty(total, {D});  // a tensor of its own, not a view
  torch::stable::copy_(dbias, torch::stable::view(torch::stable::narrow(total, 0, W, 1), {D}));
  return {torch::stable::view(swapped(taps), {D, W}), dbias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bwd(const Tensor& dy_, const OptTensor& d_final_,
                                               const Tensor& x, const Tensor& weight,
                                               const OptTensor& bias,
                                               const OptTensor& initial_state,
                                               const OptTensor& cu_seqlens, bool silu) {
  const Inputs in = gather(x, weight, bias, initial_state, cu_seqlens, silu);
  const ScalarType type = compute_type(x);
  const Tensor dy = unit_last_stride(dy_);
  const Tensor dx = empty(x, {in.B(), in.T(), in.D()});
  zero_padding(dx, in.covered);
  OptTensor d_final;
  if (d_final_) d_final = swapped(as(*d_final_, type));
  const Tensor d_initial =
      initial_state ? empty(x, {in.N(), in.W() - 1, in.D()}, type) : empty(x, {0}, type);
  const ConvBwdArgs args{in.args(),
                         in.T(),
                         {dy.const_data_ptr(), dtype(dy), dy.stride(0), dy.stride(1), 0},
                         data(d_final),
                         dx.mutable_data_ptr(),
                         initial_state ? d_initial.mutable_data_ptr() : nullptr};
  const auto [dweight, dbias] = run_bwd(in, args);
  const auto to = [](const Tensor& t, const Tensor& like) {
    return torch::stable::to(t, like.scalar_type());
  };
  return {dx, to(dweight, weight), bias ? to(dbias, *bias) : empty(x, {0}, type),
          initial_state ? to(swapped(d_initial), *initial_state) : d_initial};
}
}  // namespace
}  // namespace df::cpu

DF_IMPL(CPU, m) {
  m.impl("causal_conv1d_fwd", TORCH_BOX(&df::cpu::fwd));
  m.impl("causal_conv1d_bwd", TORCH_BOX(&df::cpu::bwd));
  m.impl("causal_conv1d_update", TORCH_BOX(&df::cpu::update));
}
