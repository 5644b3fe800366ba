"""Whole networks over the mixers of `jattn.nn`."""
