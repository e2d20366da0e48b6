"""Photographs and captions."""
