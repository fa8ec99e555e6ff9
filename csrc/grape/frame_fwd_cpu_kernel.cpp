// Forward of the rotation on tiles of tokens: C = X W, the planes' change by vectors over tokens,
// Y = X + change W^T. X comes from memory once; W of the head stays in the cache.
#include "grape/frame_tile.h"

namespace df::cpu::DF_ISA {
namespace {
template <class T>
void forward(const FrameCpu& p, int64_t h, int64_t first, int64_t last, T* memory) {
  const FrameTile<T> tile(p, h, first, last);
  Scratch<T> scratch{memory};
  T* const rows = scratch.take(p.D * kTile);
  T* const by_row = scratch.take(p.K * kTile);
  T* const planes = scratch.take(p.K * kTile);
  T* const half = scratch.take(kTile);
  T* const low = scratch.take(kTile);
  tile.load_rows(p.args.x, rows);
  tile.coordinates(rows, by_row, planes);
  for (int64_t k = 0; k < p.args.r; ++k) {
    tile.half_angles(k, half, low);
    T *at0 = planes + 2 * k * kTile, *at1 = at0 + kTile;
    for (int i = 0; i < kTile; i += kLanes<T>) {
      const SinCos<T> of(load(half + i), load(low + i));
      const Vec<T> turn = of.turn(), less_one = of.less_one();
      const Vec<T> c0 = load(at0 + i), c1 = load(at1 + i);
      store(at0 + i, Vec<T>(c0 * less_one + c1 * turn));
      store(at1 + i, Vec<T>(c1 * less_one - c0 * turn));
    }
  }
  tile.add_planes(planes, by_row, rows);
  tile.store_rows(rows, p.args.y);
}
}  // namespace

void frame_fwd(const FrameCpu& p, bool wide, int64_t h, int64_t first, int64_t last,
               void* scratch) {
  wide ? forward(p, h, first, last, static_cast<double*>(scratch))
       : forward(p, h, first, last, static_cast<float*>(scratch));
}
}  // namespace df::cpu::DF_ISA
