"""Whole journeys, on real stores and with real clients."""
