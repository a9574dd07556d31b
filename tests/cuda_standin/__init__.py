"""A stand-in for a CUDA device, for machines that have none. README.md says what it is."""
