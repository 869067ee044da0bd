"""Tests of safe image decoding."""
