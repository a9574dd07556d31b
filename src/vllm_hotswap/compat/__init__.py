"""Everything that depends on vLLM's version.

`names` says where vLLM keeps names that it has moved, `versions` which versions have been run. Each
other module wraps vLLM for one part of this package, and holds what differs between versions.
Modules that subclass vLLM's classes are beside what they are part of (`host`), and hold no case for
a version.
"""
