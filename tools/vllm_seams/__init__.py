"""Does another version of vLLM still have what this project uses of it? Read, never run.

`tree` finds names and signatures in the sources of a vLLM; `uses` finds in our own sources what we
import, call and override; `declared` lists what no import shows: attributes of objects that vLLM
gives us. `wheel` gets the sources of a version, and `report` compares.
"""
