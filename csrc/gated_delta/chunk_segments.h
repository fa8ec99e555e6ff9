// Sequences in segments that run side by side (gated_delta.md, 2.7). What a segment of several
// chunks makes of the state that enters it is linear, S_out = M S_in + H; both come from a pass
// over the chunks with S_in = 0 and, for V = K further columns with v = 0, S_in = I. Segments have
// slots as chunks do, with C times as many tokens.
#pragma once
#include "gated_delta/chunk_cuda.h"

namespace df {
struct Segments {
  int64_t chunks;      // of a segment; 0: sequences are whole
  float* states;       // [slots, HV, Vp, Kp] H^T, which the scan replaces by the entering S^T
  float* transitions;  // [slots, HV, Kp, Kp] M^T of segments between others
};

inline int64_t segment_slots(const ChunkCuda& p, int64_t chunks) {
  ChunkShape shape = p.shape;
  shape.C *= chunks;
  return saved_slots(shape, p.B, p.N, p.cu_seqlens != nullptr);
}

inline Segments segment_room(const ChunkCuda& p, int64_t chunks, void* room) {
  float* const states = static_cast<float*>(room);
  const int64_t K = pad64(p.shape.K), V = pad64(p.shape.V);
  return {chunks, states, states + segment_slots(p, chunks) * p.shape.HV * V * K};
}

// In place of H^T, in the order of a sequence's segments: S_in(j + 1) = M_j S_in(j) + H_j. The
// first one's H is made with the sequence's own initial state, so that it is S_in(1) and stays.
// Backward, from the last segment on, the same for dS (chunk_bwd_cuda.h).
struct ChunkScan {
  ChunkCuda in;
  Segments segments;
  bool backward = false;
};
void chunk_scan_cuda(const ChunkScan&, void* stream);

// The model that decides: a CTA an SM takes as long as its chunks, a step of the scan as three. The
// first pass has tiles of K besides those of V.
struct SegmentChoice {
  int64_t chains, chunks;  // value heads of all sequences, chunks of a sequence
  int64_t tiles, tiles_of_k, sms, most_parts;

  int64_t time(int64_t parts) const {
    const auto rounds = [&](int64_t tiles) { return (chains * parts * tiles + sms - 1) / sms; };
    if (parts == 1) return rounds(tiles) * chunks;
    const int64_t length = (chunks + parts - 1) / parts;
    return (rounds(tiles) + rounds(tiles + tiles_of_k)) * length + 3 * parts;
  }
  // Chunks of a segment, or 0: whole sequences, unless a tenth of the time is gained.
  int64_t segment(bool forced) const {
    int64_t best = 1;
    for (int64_t parts = 2; parts <= chunks && (forced || parts <= most_parts); parts *= 2)
      if ((forced && best == 1) || time(parts) < time(best)) best = parts;
    if (best == 1 || (!forced && 10 * time(best) > 9 * time(1))) return 0;
    return (chunks + best - 1) / best;
  }
};
}  // namespace df
