"""Hydra configuration; a package so that installed commands find it."""
