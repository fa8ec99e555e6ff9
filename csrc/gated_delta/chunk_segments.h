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

// The model that decides. Its unit is a twelfth of what a chunk takes a CTA with 128 rows of V; of
// 64 rows it takes little less, as the chain of products is as long. A CTA starts with a chunk that
// nothing overlaps. A step of the scan is shared by the groups of 16 columns of an SM.
struct SegmentChoice {
  int64_t chains, chunks;                      // value heads of all sequences, chunks of a sequence
  int64_t tiles, tiles_of_k, sms, most_parts;  // tiles of V and K, a CTA each

  static constexpr int64_t kChunk = 12, kHalfChunk = 11, kStart = 12;
  static constexpr int64_t kPasses = 40, kStep = 6;  // two more kernels; of a group

  static int64_t ceil_div(int64_t n, int64_t m) { return (n + m - 1) / m; }
  // A pass of `working` CTAs of `all`, one an SM. Where SMs would be left without one, a tile is
  // two CTAs (chunk_fwd_rows).
  int64_t pass(int64_t all, int64_t working, int64_t length) const {
    return 2 * all > sms ? ceil_div(working, sms) * (kStart + length * kChunk)
                         : ceil_div(2 * working, sms) * (kStart + length * kHalfChunk);
  }
  // Of segments of that many chunks. The first pass has tiles of K besides those of V, nothing to
  // do for the last segment, and no M for the first.
  int64_t time(int64_t length) const {
    const int64_t parts = ceil_div(chunks, length), all = chains * parts * tiles;
    const int64_t outputs = pass(all, all, length);
    if (parts == 1) return outputs;
    const int64_t summaries = chains * ((parts - 1) * tiles + (parts - 2) * tiles_of_k);
    const int64_t groups = ceil_div(chains * tiles * 8, sms);
    return outputs + pass(all + chains * parts * tiles_of_k, summaries, length) + kPasses +
           kStep * groups * (parts - 1);
  }
  // Chunks of a segment, or 0: whole sequences, unless a twentieth of the time is gained.
  int64_t segment(bool forced) const {
    const int64_t most = forced || most_parts > chunks ? chunks : most_parts;
    int64_t best = 0, least = forced ? INT64_MAX : time(chunks) * 19 / 20;
    for (int64_t parts = 2; parts <= most;) {
      const int64_t length = ceil_div(chunks, parts), t = time(length);
      if (t < least) best = length, least = t;
      if (length == 1) break;
      parts = ceil_div(chunks, length - 1);  // the fewest that are shorter
    }
    return best;
  }
};
}  // namespace df
