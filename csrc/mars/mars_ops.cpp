#include "common/op.h"

DF_SCHEMAS(m) {
  // One step of all tensors. sections and constants: csrc/mars/mars_host.h. schedule: [sections, 3]
  // float64, lr, weight_decay and gamma instead of the constants. norms: float64 [params], what the
  // clip compares instead of each tensor's own norm. seed: of stochastic rounding.
  m.def(
      "mars_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,"
      " Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] last_grads, Tensor(f!)[] masters,"
      " Tensor(g!)[] absmaxes, Tensor(h!)[] state_steps, int[] sections, float[] constants,"
      " Tensor? schedule, Tensor? norms, Tensor? grad_scale, Tensor? found_inf, int seed) -> ()");
  // ||(1 + s) g - s h||^2 of each tensor, float64
  m.def(
      "mars_squares(Tensor[] grads, Tensor[] last_grads, Tensor[] absmaxes, int[] sections,"
      " float[] constants, Tensor? schedule, Tensor? grad_scale) -> Tensor");
}
