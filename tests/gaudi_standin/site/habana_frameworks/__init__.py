"""A stand-in for Intel's runtime, for tests on machines without a Gaudi."""


def autoload() -> None:
    """Do what torch calls when it is imported, as in the real one."""
    import habana_frameworks.torch  # noqa: F401
