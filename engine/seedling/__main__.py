"""`python -m engine.seedling`: make the embedded model from nothing, or go on where the last run stopped."""

import argparse
import logging
from pathlib import Path

from engine.catalog import SHIPPED
from engine.seedling import parallel, recipe


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m engine.seedling", description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/seedling"), help="checkpoints (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=SHIPPED, help="where the packs are written (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="one core each (default: %(default)s)")
    parser.add_argument("--only", choices=recipe.STAGES, help="do this stage alone and export nothing")
    parser.add_argument("--from", dest="start", type=Path, help="go on from a dense pack instead of from nothing")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format=parallel.LOG_FORMAT)
    settings = recipe.Recipe(args.runs, args.processes)
    if args.start:
        recipe.take_up(settings, args.start)
    if args.only:
        recipe.do(settings, args.only)
        return
    recipe.make(settings)
    recipe.write_packs(settings, args.out)


if __name__ == "__main__":
    main()
