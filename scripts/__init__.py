"""Command-line entry points, one per stage; `cli`, `options`, `stage` and `progress` are what they share."""

import sys
from pathlib import Path

# `python scripts/search.py` puts this folder first on the path, where search.py would hide the package `search`.
_HERE = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != _HERE]
