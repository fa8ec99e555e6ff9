"""The members of the family by name."""

from .mars import MARS

MARSAdamW = MARS


class MARSLion(MARS):
    """MARS with mars_type="mars-lion"; arguments as in MARS."""

    def __init__(self, params, *args, **options):
        super().__init__(params, *args, **{"mars_type": "mars-lion"} | options)


class MARSShampoo(MARS):
    """MARS with mars_type="mars-shampoo"; arguments as in MARS."""

    def __init__(self, params, *args, **options):
        super().__init__(params, *args, **{"mars_type": "mars-shampoo"} | options)


class MARS_M(MARS):
    """MARS-M (arXiv 2510.21800): Muon on the variance-reduced gradient, AdamW for other parameters.

    Args:
        lr, wd: of both; the matrices' step is lr 0.2 sqrt(max(rows, cols)) U V^T.
        muon_params, adamw_params: tensors; one of the two may be None. Those of muon_params have
            two or more dimensions, [dim 0, the rest].
        momentum, ns_steps, gamma, is_approx: of the matrices.
        adamw_betas, adamw_eps: of the others.
        clip_c: None and True clip ||c||_2 of a matrix to 1, False does not.
        options: further keywords of MARS.
    """

    def __init__(
        self,
        lr=1e-3,
        wd=0.1,
        muon_params=None,
        momentum=0.95,
        ns_steps=5,
        adamw_params=None,
        adamw_betas=(0.9, 0.95),
        adamw_eps=1e-8,
        gamma=0.025,
        clip_c=None,
        is_approx=True,
        **options,
    ):
        matrices, others = list(muon_params or []), list(adamw_params or [])
        adamw = dict(params=others, mars_type="mars-adamw", matrix_ndim="none", eps=adamw_eps)
        groups = [{"params": matrices}] * bool(matrices) + [adamw] * bool(others)
        super().__init__(
            groups,
            lr=lr,
            betas=(momentum, 0.99),
            weight_decay=wd,
            gamma=gamma,
            is_approx=is_approx,
            mars_type="mars-m",
            lr_1d=lr,
            betas_1d=adamw_betas,
            weight_decay_1d=None,
            clip=None if clip_c is False else 1.0,
            matrix_ndim="ge2",
            flatten=True,
            ns_steps=ns_steps,
            **options,
        )
