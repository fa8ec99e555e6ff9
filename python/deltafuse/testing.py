"""Error metrics shared by tests and benches; the shape registries are in each operator's tests."""


def relative_error(actual, expected):
    """||actual - expected||_2 / ||expected||_2 in float64; absolute where expected is all zero."""
    expected = expected.double()
    error = (actual.double() - expected).norm().item()
    size = expected.norm().item()
    return error / size if size else error


def assert_close(name, actual, expected, limit):
    """relative_error within limit, and no NaN or Inf that `expected` does not have."""
    if actual.shape != expected.shape:
        raise AssertionError(f"{name}: shape {tuple(actual.shape)} != {tuple(expected.shape)}")
    error = relative_error(actual, expected)
    if not error <= limit:  # NaN fails, too
        raise AssertionError(f"{name}: relative error {error:.3e} > {limit:.1e}")
