"""Whole networks: an embedding, a stack of blocks, a head."""
