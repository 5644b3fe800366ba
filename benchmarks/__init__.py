"""Measurements of speed, and the tables made from them."""
