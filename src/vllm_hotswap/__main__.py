"""`python -m vllm_hotswap`: the command line."""

from vllm_hotswap.cli import main

raise SystemExit(main())
