"""Tries readers on changed inputs and prints one line of JSON for each; see engine.py."""

import argparse
import json
import logging
import sys
import warnings
from pathlib import Path

from fuzz import engine, readers


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reader", nargs="*", default=list(readers.READERS), choices=list(readers.READERS))
    parser.add_argument("--count", type=int, default=10_000, help="inputs of each reader; of slow ones less")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", default="/tmp/fuzz", help="folder of inputs that failed")
    parser.add_argument("--input", help="one file that is tried alone, with its traceback")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable()
    readers.use_own_cache()
    failed = 0
    for name in chosen.reader:
        reader = readers.READERS[name]()
        if chosen.input:
            path = Path(readers.tempfile.mkdtemp()) / reader.file
            path.write_bytes(Path(chosen.input).read_bytes())
            reader.read(path)
            continue
        count = max(round(chosen.count * reader.share), 1)
        summary, failures = engine.run(reader, count, chosen.seed, chosen.keep)
        failed += len(failures)
        for failure in failures:
            print(f"{failure['input']}: {failure['wrong']}", file=sys.stderr)
        print(json.dumps({"reader": name, "failures": len(failures)} | summary), flush=True)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
