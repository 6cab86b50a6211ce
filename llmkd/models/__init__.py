"""Backbones from a hub id, a directory or a tiny config; adapters; pooling; artifacts from disk."""
