// Tensors to the arguments of the rotation, for both devices' host code.
#pragma once
#include "common/op.h"
#include "grape/rotary.h"

namespace df {
// In the order of python/deltafuse/grape/raw_rotary.py.
enum RotaryFlag : int64_t {
  kInterleaved = 1,
  kClockwise = 2,
  kByPosition = 4,
  kAngleGrads = 8,
  kTableGrads = 16
};

inline OptTensor unit_last_stride(const OptTensor& t) {
  return t ? OptTensor(unit_last_stride(*t)) : t;
}
inline bool is_long(const OptTensor& t) {
  return t && t->scalar_type() == ScalarType::Long;
}

// Keeps alive what the arguments point to. With `backward` q and k are the incoming gradients.
struct RotaryInputs {
  Tensor q;
  OptTensor k, freqs, positions, offsets, cu_seqlens, tables[4];
  int64_t offset;
  double factor;
  int64_t flags;

  RotaryInputs(const Tensor& q_, const OptTensor& k_, const OptTensor& freqs_,
               const OptTensor& positions_, const OptTensor& offsets_, const OptTensor& cu_,
               const OptTensor& cos_q, const OptTensor& sin_q, const OptTensor& cos_k,
               const OptTensor& sin_k, int64_t offset_, double factor_, int64_t flags_)
      : q(unit_last_stride(q_)),
        k(unit_last_stride(k_)),
        freqs(freqs_ ? OptTensor(contiguous(*freqs_)) : freqs_),
        positions(positions_),
        offsets(offsets_ ? OptTensor(contiguous(*offsets_)) : offsets_),
        cu_seqlens(cu_ ? OptTensor(contiguous(*cu_)) : cu_),
        tables{unit_last_stride(cos_q), unit_last_stride(sin_q), unit_last_stride(cos_k),
               unit_last_stride(sin_k)},
        offset(offset_),
        factor(factor_),
        flags(flags_) {
    const bool pair = !k || (k->dim() == 4 && k->size(0) == q.size(0) && k->size(1) == q.size(1) &&
                             k->size(3) == q.size(3) && k->scalar_type() == q.scalar_type());
    STD_TORCH_CHECK(q.dim() == 4 && pair, "grape_rotary: q and k must be [B, T, H, D]");
    STD_TORCH_CHECK(freqs.has_value() != tables[0].has_value(), "grape_rotary: freqs or tables");
    STD_TORCH_CHECK(!freqs || (freqs->dim() == 3 && (compute_type(*freqs) == freqs->scalar_type())),
                    "grape_rotary: freqs must be [H, P, A] in float32 or float64");
    STD_TORCH_CHECK(!positions || positions->dim() == 4,
                    "grape_rotary: positions must be [B, T, H, A]");
    for (const OptTensor& t : tables)
      STD_TORCH_CHECK(!t || (t->dim() == 4 && t->sizes().equals(tables[0]->sizes())),
                      "grape_rotary: tables must be [B, T, H, P], all alike");
    STD_TORCH_CHECK(bool(tables[2]) == bool(tables[3]) && bool(tables[0]) == bool(tables[1]),
                    "grape_rotary: cos and sin belong together");
  }

  RotaryArgs args(bool backward) const {
    RotaryArgs p{};
    const Tensor& width = freqs ? *freqs : *tables[0];
    p.B = q.size(0), p.T = q.size(1), p.D = q.size(3);
    p.P = freqs ? freqs->size(1) : width.size(3), p.A = freqs ? freqs->size(2) : 1;
    p.Hf = freqs ? freqs->size(0) : 1;
    p.type = dtype(q);
    p.interleaved = flags & kInterleaved;
    p.sign = bool(flags & kClockwise) != backward ? -1 : 1, p.factor = factor;
    p.q = heads(q);
    if (k) p.k = heads(*k);
    if (freqs) p.freqs = freqs->const_data_ptr(), p.freqs64 = dtype(*freqs) == DType::f64;
    p.positions = position_args();
    p.Ha = freqs ? std::max(p.Hf, p.positions.Hp) : width.size(2);
    if (!freqs && (flags & kByPosition)) {
      p.rows = width.size(1);
      STD_TORCH_CHECK(p.rows > 0 || q.numel() == 0, "grape_rotary: cos and sin have no rows");
    }
    RotaryTable* const slots[] = {&p.cos_q, &p.sin_q, &p.cos_k, &p.sin_k};
    for (int i = 0; i < 4; ++i)
      if (tables[i]) *slots[i] = table(*tables[i]);
    check(p);
    return p;
  }

  static RotaryHeads heads(const Tensor& t) {
    return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2), t.size(2)};
  }
  static RotaryOutput output(const Tensor& t) {
    return {t.mutable_data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
  }

 private:
  static RotaryTable table(const Tensor& t) {
    return {t.const_data_ptr(), dtype(t), t.size(0) == 1 ? 0 : t.stride(0), t.stride(1),
            t.stride(2)};
  }

  RotaryPositions position_args() const {
    RotaryPositions x{};
    x.offset = offset;
    x.N = cu_seqlens ? cu_seqlens->numel() - 1 : q.size(0);
    x.offsets = data(offsets), x.offsets64 = is_long(offsets);
    x.cu_seqlens = data(cu_seqlens), x.cu64 = is_long(cu_seqlens);
    if (!positions) return x;
    switch (positions->scalar_type()) {
      case ScalarType::Int: x.type = PositionType::i32; break;
      case ScalarType::Long: x.type = PositionType::i64; break;
      case ScalarType::Float: x.type = PositionType::f32; break;
      case ScalarType::Double: x.type = PositionType::f64; break;
      default: STD_TORCH_CHECK(false, "grape_rotary: positions of this dtype");
    }
    x.data = positions->const_data_ptr();
    x.b = positions->stride(0), x.t = positions->stride(1);
    x.h = positions->stride(2), x.a = positions->stride(3);
    x.Hp = positions->size(2);
    return x;
  }

  void check(const RotaryArgs& p) const {
    STD_TORCH_CHECK(2 * p.P <= p.D && p.Ha > 0, "grape_rotary: 2 P must be at most D");
    STD_TORCH_CHECK(p.q.H % p.Ha == 0 && p.k.H % p.Ha == 0 && (p.Hf == 1 || p.Hf == p.Ha) &&
                        (p.positions.Hp == 1 || p.positions.Hp == p.Ha),
                    "grape_rotary: heads of angles must divide those of q and k");
    STD_TORCH_CHECK(!positions || (positions->size(0) == p.B && positions->size(1) == p.T &&
                                   positions->size(3) == p.A),
                    "grape_rotary: positions must be [B, T, H, A]");
    STD_TORCH_CHECK(
        !tables[0] || (flags & kByPosition) ||
            (tables[0]->size(1) == p.T && (tables[0]->size(0) == 1 || tables[0]->size(0) == p.B)),
        "grape_rotary: tables must have a row a token");
    STD_TORCH_CHECK(!offsets || offsets->numel() == p.positions.N,
                    "grape_rotary: offsets must have an element a sequence");
    STD_TORCH_CHECK(!cu_seqlens || (p.B == 1 && cu_seqlens->numel() > 0),
                    "grape_rotary: cu_seqlens needs B = 1");
  }
};

// Given outputs; one with another last stride than 1 is made aside and copied.
struct RotaryOutputs {
  Tensor out_q, q;
  OptTensor out_k, k;

  RotaryOutputs(const Tensor& q_, const OptTensor& k_, const Tensor& to_q, const OptTensor& to_k)
      : out_q(to_q), q(dense(to_q)), out_k(to_k), k(to_k ? OptTensor(dense(*to_k)) : to_k) {
    const auto like = [](const Tensor& x, const Tensor& y) {
      return x.sizes().equals(y.sizes()) && x.scalar_type() == y.scalar_type();
    };
    STD_TORCH_CHECK(like(to_q, q_) && bool(k_) == bool(to_k) && (!k_ || like(*to_k, *k_)),
                    "grape_rotary_out: outputs must be like q and k");
  }
  void finish() const {
    back(out_q, q);
    if (k) back(*out_k, *k);
  }

 private:
  static Tensor dense(const Tensor& t) {
    return t.dim() == 4 && t.stride(3) != 1 && t.size(3) != 1
               ? empty(t, {t.size(0), t.size(1), t.size(2), t.size(3)})
               : t;
  }
  static void back(Tensor to, const Tensor& from) {
    if (to.const_data_ptr() != from.const_data_ptr()) torch::stable::copy_(to, from);
  }
};

// Results of the backward pass, empty where not wanted.
struct RotaryGradTensors {
  Tensor dq, dk, dfreqs, dpositions, tables[4];

  RotaryGradTensors(const RotaryInputs& in, const RotaryArgs& p)
      : dq(empty(in.q, {p.B, p.T, p.q.H, p.D})),
        dk(in.k ? empty(*in.k, {p.B, p.T, p.k.H, p.D}) : none(in)),
        dfreqs(in.flags & kAngleGrads ? empty(*in.freqs, {p.Hf, p.P, p.A}) : none(in)),
        dpositions(wants_positions(in, p)
                       ? empty(in.q, {p.B, p.T, p.positions.Hp, p.A}, ScalarType::Double)
                       : none(in)),
        tables{table(in, p, 0), table(in, p, 1), table(in, p, 2), table(in, p, 3)} {}

  RotaryGrads args(const RotaryInputs& in, const RotaryArgs& p, const OptTensor& q,
                   const OptTensor& k) const {
    RotaryGrads g{};
    STD_TORCH_CHECK(q && (!in.k || k), "grape_rotary_bwd: saved tensors are missing");
    g.saved_q = RotaryInputs::heads(*q);
    if (k) g.saved_k = RotaryInputs::heads(*k);
    g.sign = in.flags & kClockwise ? -1 : 1;
    g.angles = in.flags & kAngleGrads;
    if (wants_positions(in, p)) g.dpositions = dpositions.mutable_data_ptr<double>();
    void** const slots[] = {&g.dcos_q, &g.dsin_q, &g.dcos_k, &g.dsin_k};
    for (int i = 0; i < 4; ++i) *slots[i] = tables[i].mutable_data_ptr();
    return g;
  }

 private:
  static Tensor none(const RotaryInputs& in) { return empty(in.q, {0}); }
  static bool wants_positions(const RotaryInputs& in, const RotaryArgs& p) {
    return (in.flags & kAngleGrads) &&
           (p.positions.type == PositionType::f32 || p.positions.type == PositionType::f64);
  }
  static Tensor table(const RotaryInputs& in, const RotaryArgs& p, int i) {
    const ScalarType type = compute_type(in.q);
    if (!(in.flags & kTableGrads) || !in.tables[i]) return empty(in.q, {0}, type);
    return empty(in.q, {p.B, p.T, p.Ha, p.P}, type);
  }
};

// The operators that a device's apply(inputs, arguments, y_q, y_k) gives.
using RotaryResult = std::tuple<Tensor, Tensor>;

template <auto apply>
RotaryResult rotary_fwd_op(const Tensor& q, const OptTensor& k, const OptTensor& freqs,
                           const OptTensor& positions, const OptTensor& offsets,
                           const OptTensor& cu_seqlens, const OptTensor& cos_q,
                           const OptTensor& sin_q, const OptTensor& cos_k, const OptTensor& sin_k,
                           int64_t offset, double factor, int64_t flags) {
  const RotaryInputs in(q, k, freqs, positions, offsets, cu_seqlens, cos_q, sin_q, cos_k, sin_k,
                        offset, factor, flags);
  const RotaryArgs p = in.args(false);
  const Tensor y_q = empty(q, {p.B, p.T, p.q.H, p.D});
  const OptTensor y_k = k ? OptTensor(empty(*k, {p.B, p.T, p.k.H, p.D})) : std::nullopt;
  apply(in, p, y_q, y_k);
  return {y_q, y_k ? *y_k : empty(q, {0})};
}

template <auto apply>
void rotary_out_op(const Tensor& q, const OptTensor& k, const OptTensor& freqs,
                   const OptTensor& positions, const OptTensor& offsets,
                   const OptTensor& cu_seqlens, const OptTensor& cos_q, const OptTensor& sin_q,
                   const OptTensor& cos_k, const OptTensor& sin_k, int64_t offset, double factor,
                   int64_t flags, const Tensor& out_q, const OptTensor& out_k) {
  const RotaryInputs in(q, k, freqs, positions, offsets, cu_seqlens, cos_q, sin_q, cos_k, sin_k,
                        offset, factor, flags);
  const RotaryOutputs to(q, k, out_q, out_k);
  apply(in, in.args(false), to.q, to.k);
  to.finish();
}
}  // namespace df
