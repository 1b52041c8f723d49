"""Answers that are numbers or expressions: reading, comparing, tables."""
