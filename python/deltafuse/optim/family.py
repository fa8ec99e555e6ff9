"""Names of the family's members. Those without an implementation say so."""

from .mars import MARS

MARSAdamW = MARS


class MARS_M(MARS):
    """MARS-M (arXiv 2510.21800): not implemented yet."""

    def __init__(self, *args, **kwargs):
        raise NotImplementedError("MARS_M (mars_type='mars-m') is not implemented yet")


class MARSLion(MARS):
    """MARS with mars_type="mars-lion": not implemented yet."""

    def __init__(self, *args, **kwargs):
        raise NotImplementedError("MARSLion (mars_type='mars-lion') is not implemented yet")


class MARSShampoo(MARS):
    """MARS with mars_type="mars-shampoo": not implemented yet."""

    def __init__(self, *args, **kwargs):
        raise NotImplementedError("MARSShampoo (mars_type='mars-shampoo') is not implemented yet")
