"""`python -m lowvram`: the same door as the `lowvram` command."""

from lowvram.cli.app import main

if __name__ == "__main__":
    raise SystemExit(main())
