"""Helpers that every kernel shares."""
