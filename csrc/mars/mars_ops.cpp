#include "common/op.h"

DF_SCHEMAS(m) {
  // The first len(last_grads) parameters take the MARS path, the others the 1-D AdamW path.
  // max_exp_avg_sqs: empty without amsgrad. schedule: [lr, lr_1d, weight_decay, weight_decay_1d,
  // gamma], overrides the numbers. norm: what clip compares instead of each tensor's own norm.
  // caution: 0 off, 1 elementwise, 2 mean. update_last_grad false: last_grads are only read, in the
  // gradient's sign.
  m.def(
      "mars_adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs,"
      " Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] last_grads, Tensor(e!)[] max_exp_avg_sqs,"
      " Tensor(f!)[] state_steps, float lr, float beta1, float beta2, float eps,"
      " float weight_decay, float gamma, float? clip, float lr_1d, float beta1_1d, float beta2_1d,"
      " float weight_decay_1d, int caution, bool maximize, bool update_last_grad,"
      " Tensor? schedule, Tensor? norm, Tensor? grad_scale, Tensor? found_inf) -> ()");
  // ||(1 + s) g - s h|| of each tensor, float64
  m.def(
      "mars_norm(Tensor[] grads, Tensor[] last_grads, float beta1, float gamma, bool maximize,"
      " bool negate_last_grad, Tensor? schedule, Tensor? grad_scale) -> Tensor");
}
