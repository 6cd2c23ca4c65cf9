"""Starters of the real parts that tests run against."""
