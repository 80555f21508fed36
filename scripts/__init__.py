"""Command-line entry points, one per stage; `cli`, `options`, `stage` and `progress` are what they share."""
