"""`python -m router --spec FILE`: one router process. FILE is the JSON or YAML of config.RouterSpec."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys

from router.app import run
from router.config import RouterSpec
from router.errors import StartupError
from settings.loading import SettingsError, load


def main(arguments: list[str] | None = None) -> int:
    """0 after SIGTERM, 2 when it cannot start."""
    parser = argparse.ArgumentParser(prog="python -m router", description="One router of a Switchyard cluster.")
    parser.add_argument("--spec", required=True, help="JSON or YAML file of a RouterSpec")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        asyncio.run(run(load(RouterSpec, options.spec), lambda line: print(line, flush=True)))
    except (SettingsError, StartupError) as error:
        print(f"router: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
