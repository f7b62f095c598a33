"""Measurements of cupyattn: the grid (configs), clock (timing), rows, peers, records and their report."""
