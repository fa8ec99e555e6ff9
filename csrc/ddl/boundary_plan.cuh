// How the shared memory of an SM is given to tokens in flight and to weights. Host code.
#pragma once
#include <algorithm>
#include <functional>

#include "ddl/boundary_tile.cuh"

namespace df::cuda {
constexpr int kBoundaryWarps = 16;  // of a CTA, at most

inline int round_up(int64_t x, int to) {
  return int((x + to - 1) / to * to);
}

struct BoundaryDevice {
  int sms, shared;
};
inline BoundaryDevice boundary_device() {
  int device = 0;
  BoundaryDevice x{};
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&x.sms, cudaDevAttrMultiProcessorCount, device);
  cudaDeviceGetAttribute(&x.shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return x;
}

template <class T>
struct BoundaryPlanner {
  const BoundaryArgs& a;
  BoundaryDevice device;
  int max_warps, warp_items, max_groups;      // items that a warp should have at least
  std::function<int(int items)> stage_bytes;  // of what is fetched for one token
  int64_t token_bytes = 0;                    // else of a group, without reductions
  bool sums = false;                          // gradients of the weights, too
  bool readout = false, projections = false;  // places for these weights, absent or not
  int width = 0;                              // floats that a warp gives to a sum
  BoundaryPlan plan{};

  int item_bytes() const { return plan.items * T::kUnits * 16; }
  int feature_bytes() const { return round_up(int64_t(plan.items) * T::kFeatures * 4, 32); }
  int64_t group_bytes(int stages) const {
    return stages * int64_t(stage_bytes(plan.part)) + token_bytes +
           round_up(2 * plan.warps * width * int64_t(sizeof(float)), 32);
  }

  // The parts of a token that fit: all of it, or else as much as whole rounds of the threads are.
  bool divide() {
    plan.items = int((a.d + T::kFeatures - 1) / T::kFeatures);
    plan.warps = std::clamp((plan.items + warp_items - 1) / warp_items, 1, max_warps);
    plan.part = plan.items, plan.parts = 1;
    const auto fits = [&] { return group_bytes(1) <= device.shared; };
    if (fits()) return true;
    const int round = plan.warps * 32;
    for (plan.part = plan.items / round * round; plan.part > 0 && !fits();) plan.part -= round;
    if (plan.part <= 0) return false;
    plan.parts = (plan.items + plan.part - 1) / plan.part;
    return true;
  }

  struct Place {
    int BoundaryPlan::* offset;
    const Weight& weight;
    bool wanted;
    int bytes;
    bool always = false;  // even for an absent weight
  };
  // The weights, and before them their gradients, from the largest on, as far as they fit.
  int64_t place(int64_t room, bool all) {
    const int items = item_bytes(), features = feature_bytes();
    const Place places[] = {{&BoundaryPlan::sum_read, a.read, sums, items},
                            {&BoundaryPlan::sum_W_v, a.W_v, sums, items},
                            {&BoundaryPlan::sum_norm, a.norm, sums, features},
                            {&BoundaryPlan::sum_W_beta, a.W_beta, sums, features},
                            {&BoundaryPlan::read, a.read, true, items, readout},
                            {&BoundaryPlan::W_v, a.W_v, true, items, projections},
                            {&BoundaryPlan::norm, a.norm, true, features, readout},
                            {&BoundaryPlan::W_beta, a.W_beta, true, features, projections}};
    int64_t used = 0;
    for (const Place& x : places) {
      plan.*x.offset = -1;
      if (!x.wanted || (x.weight.data == nullptr && !x.always)) continue;
      if (used + x.bytes <= room) {
        plan.*x.offset = int(used);
        used += x.bytes;
      } else if (all) {
        return -1;
      }
    }
    return used;
  }

  bool settle(int groups, int stages, bool all, bool weights) {
    const int64_t own = groups * group_bytes(stages);
    const int64_t used = place(weights ? device.shared - own : 0, all && weights);
    if (used < 0 || used + own > device.shared) return false;
    plan.groups = groups, plan.stages = stages;
    plan.base = int(used), plan.group_bytes = int(group_bytes(stages));
    plan.stage_bytes = stage_bytes(plan.part);
    plan.bytes = used + own;
    return true;
  }

  // All weights with two or one tokens ahead, else what of them fits beside one group.
  void choose() {
    const int64_t tokens = (a.N + device.sms - 1) / device.sms;  // for an SM
    const int groups_at_most = std::clamp(max_warps / plan.warps, 1, max_groups);
    const int most = int(std::clamp<int64_t>(tokens, 1, groups_at_most));
    if (plan.parts > 1) return void(settle(1, 1, false, false));
    if (tokens <= most && settle(most, 1, false, sums)) return;
    for (int groups : {most, std::max(1, most / 2)})
      for (int stages : {3, 2})
        if (settle(groups, stages, true, true)) return;
    for (int stages : {2, 1})
      if (settle(1, stages, false, true)) return;
  }

  // All weights and one or two tokens ahead, in no more groups than the rounds need: whoever has
  // one token more than the others makes them wait.
  bool choose_even() {
    const int64_t tokens = std::max<int64_t>(1, (a.N + device.sms - 1) / device.sms);
    const int groups_at_most = std::clamp(max_warps / plan.warps, 1, max_groups);
    for (int64_t most = std::min<int64_t>(tokens, groups_at_most); most > 0; --most) {
      const int64_t rounds = (tokens + most - 1) / most;
      const int groups = int((tokens + rounds - 1) / rounds);
      const int least = rounds == 1 || groups == 1 ? 1 : 2;
      for (int stages = int(std::min<int64_t>(rounds, 3)); stages >= least; --stages)
        if (settle(groups, stages, true, true)) return true;
    }
    return false;
  }

  template <class Kernel>
  void size_grid(Kernel kernel) {
    const int64_t rounds = (a.N + plan.groups - 1) / plan.groups;
    int resident = 0;
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(plan.bytes));
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, plan.groups * plan.warps * 32,
                                                  plan.bytes);
    // more warps would not be resident on a device, and each CTA costs a row of partial sums
    resident = std::clamp(resident, 1, std::max(1, kBoundaryWarps / (plan.groups * plan.warps)));
    plan.grid = std::clamp<int64_t>(rounds, 1, int64_t(device.sms) * resident);
  }
};

// fn(tile) with the channels padded to 1, 2, 4, 8 or 16.
template <class E, class Fn>
auto with_tile(int64_t d_v, Fn fn) {
  if (d_v == 1) return fn(BoundaryTile<E, 1>{});
  if (d_v == 2) return fn(BoundaryTile<E, 2>{});
  if (d_v <= 4) return fn(BoundaryTile<E, 4>{});
  if (d_v <= 8) return fn(BoundaryTile<E, 8>{});
  return fn(BoundaryTile<E, 16>{});
}

// Whether rows are aligned and whole for accesses of 16 bytes.
inline bool whole_vectors(const TokenRows& x, int64_t row, int size) {
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.stride * size % 16 == 0 &&
         row * size % 16 == 0;
}
constexpr int size_of(DType type) {
  return type == DType::f64 ? 8 : type == DType::f32 ? 4 : 2;
}
}  // namespace df::cuda
