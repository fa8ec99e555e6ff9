// The gradient of the taps from the partial sums of the chunks.
#include "common/cuda/column_sums.cuh"
#include "ddl/mix.h"

void df::mix_sums_cuda(const MixShape& s, const MixSums& sums, void* stream) {
  cuda::column_sums(sums.partial, sums.rows, s.K * s.channels(),
                    cuda::DenseSums{sums.dw, DType::f32}, static_cast<cudaStream_t>(stream));
}
