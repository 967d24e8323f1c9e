"""Caches of what the frozen encoders say about each picture: planned, built, continued, verified."""
