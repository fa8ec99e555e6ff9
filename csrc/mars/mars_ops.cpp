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
  // The same from step to step: mars_plan keeps every list but the gradients
  // (csrc/mars/mars_plan.h). False: nothing was done, because these gradients or the parameters do
  // not fit any more.
  m.def(
      "mars_plan(Tensor[] params, Tensor[] exp_avgs, Tensor[] exp_avg_sqs,"
      " Tensor[] max_exp_avg_sqs, Tensor[] last_grads, Tensor[] masters, Tensor[] absmaxes,"
      " Tensor[] state_steps, int[] sections) -> Tensor");
  m.def(
      "mars_planned_(Tensor[] grads, Tensor(a!) plan, float[] constants, Tensor? schedule,"
      " Tensor? grad_scale, Tensor? found_inf, int seed) -> bool");
  // ||(1 + s) g - s h||^2 of each tensor, float64
  m.def(
      "mars_squares(Tensor[] grads, Tensor[] last_grads, Tensor[] absmaxes, int[] sections,"
      " float[] constants, Tensor? schedule, Tensor? grad_scale) -> Tensor");
  // x [n, rows, cols], rows <= cols; steps times A = X X^T, B = b A + c A A, X <- a X + B X
  m.def("newton_schulz(Tensor x, int steps, float a, float b, float c) -> Tensor");
}
