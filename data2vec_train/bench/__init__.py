"""Measurements of speed, beside other programs where these are installed."""
