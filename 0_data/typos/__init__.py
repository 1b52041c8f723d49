"""Typo styles: rules, variants, checks."""
