"""Run in an environment that has nothing but torch and the wheel: import, build info, one op."""

import sys

import torch

import deltafuse

assert sys.argv[1] in deltafuse.build_info(), deltafuse.build_info()
q, v = torch.randn(1, 70, 2, 16), torch.randn(1, 70, 2, 16)
g = torch.zeros(1, 70, 2)
o, state = deltafuse.chunk_gated_delta_rule(q, q, v, g, g + 1, use_qk_l2norm_in_kernel=True)
assert state is None
# beta = 1 and q = k of unit length: o = scale * v
torch.testing.assert_close(o, v / 4, rtol=1e-4, atol=1e-5)
print("wheel:", deltafuse.__version__, deltafuse.build_info(), "on torch", torch.__version__)
