// The seam of rotations in coordinate planes. Plane p of a head has the channels (p, p + P), or
// (2p, 2p + 1) if interleaved; D - 2P channels are left as they are. With the token's angle f:
//   C = m cos f, S = sg m sin f (sg = 1 counter-clockwise, -1 clockwise)
//   y0 = x0 C - x1 S,  y1 = x0 S + x1 C;   backward the same with -S
//   df = sg (dy1 y0 - dy0 y1), summed over the heads that share the angle
//   dC = dy0 x0 + dy1 x1,  dS = dy1 x0 - dy0 x1  (of tables; times m, dS times sg)
//   dfreqs = sum_tokens position df,  dposition = sum_planes freqs df
// Angles f_p = sum_a position_a freqs[p, a]. Integer positions are reduced exactly: freqs / (2 pi)
// is a 64-bit fraction of a turn (rotary_turns.h), and products wrap. Real ones are multiplied and
// reduced in double.
#pragma once
#include "common/dtype.h"

namespace df {
struct RotaryHeads {  // [B, T, H, D], the last dimension contiguous
  const void* data = nullptr;
  int64_t b = 0, t = 0, h = 0;  // strides in elements
  int64_t H = 0;
};
struct RotaryOutput {
  void* data = nullptr;
  int64_t b = 0, t = 0, h = 0;
};

enum class PositionType { none, i32, i64, f32, f64 };

struct RotaryPositions {  // [B, T, Hp, A]; none: the token's index in its sequence, plus offsets
  const void* data = nullptr;
  PositionType type = PositionType::none;
  int64_t b = 0, t = 0, h = 0, a = 0;
  int64_t Hp = 1;
  int64_t offset = 0;
  const void* offsets = nullptr;  // [N], of sequences
  bool offsets64 = false;
  const void* cu_seqlens = nullptr;  // [N + 1]; null: a sequence is a row of the batch
  bool cu64 = false;
  int64_t N = 0;
};

struct RotaryTable {  // cos or sin: [B, T, Ha, P], or [rows, P] by position
  const void* data = nullptr;
  DType type = DType::f32;
  int64_t b = 0, t = 0, h = 0;
};

struct RotaryArgs {
  int64_t B, T, D, P, A;
  int64_t Ha, Hf;  // heads of angles (or tables) and of freqs; they divide those of q and k
  DType type;      // of q, k and the outputs
  bool interleaved;
  double sign, factor;  // sg of S, negative again in a backward pass; m
  RotaryHeads q, k;     // k.H = 0 without k
  RotaryOutput y_q, y_k;
  const void* freqs = nullptr;  // [Hf, P, A], contiguous; null: tables
  bool freqs64 = false;
  RotaryPositions positions;
  RotaryTable cos_q, sin_q, cos_k, sin_k;  // cos_k null: those of q
  int64_t rows = 0;                        // of tables by position; 0: a row a token
};

// What a backward pass gives beside dq and dk. `saved`: y for the angles, x for the tables.
struct RotaryGrads {
  RotaryHeads saved_q, saved_k;
  double sign;                                // sg of the forward pass
  bool angles;                                // else tables
  double* dpositions = nullptr;               // [B, T, Hp, A]
  void *dcos_q = nullptr, *dsin_q = nullptr;  // [B, T, Ha, P], compute type
  void *dcos_k = nullptr, *dsin_k = nullptr;
};
}  // namespace df
