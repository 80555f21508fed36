"""Command-line entry points, one per stage.

What they share: `cli`, `options`, `mistakes`, `stage`, `shared`, `progress` and `parts`.
"""
