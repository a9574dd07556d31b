"""`vllm-hotswap`, and `python -m vllm_hotswap`: the command line."""

from __future__ import annotations


def main() -> int:
    """The exit status; Ctrl-C ends it without a word even while it imports what it needs."""
    try:
        from vllm_hotswap.cli import main as cli

        return cli.main()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    from vllm_hotswap import start_folder

    start_folder.leave()
    raise SystemExit(main())
