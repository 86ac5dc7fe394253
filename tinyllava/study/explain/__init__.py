"""Explaining: one answer about pictures, watched tap by tap, as an HTML page or as a table for the terminal."""
