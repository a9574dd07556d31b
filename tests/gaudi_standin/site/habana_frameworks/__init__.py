"""A stand-in for Intel's runtime, for tests on machines without a Gaudi."""


def autoload() -> None:
    """torch calls it when it is imported, as it calls the real one's."""
    import habana_frameworks.torch  # noqa: F401
