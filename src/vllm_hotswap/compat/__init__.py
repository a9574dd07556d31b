"""Everything that depends on vLLM's version.

`names` says where vLLM keeps what it has moved, `versions` which versions have been run. The others
wrap vLLM for one part of this package each, and are the place for whatever a version does in its
own way. Modules that subclass vLLM's classes are beside what they are part of (`host`), and hold no
case for a version.
"""
