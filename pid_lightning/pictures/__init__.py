"""Pixels: files, sizes, colours, metrics."""
