"""Attention, residual stream and neurons: reading runs, measures, statistics, plots."""
