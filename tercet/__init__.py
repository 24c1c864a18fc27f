"""Tercet: a disaggregated inference cluster."""
