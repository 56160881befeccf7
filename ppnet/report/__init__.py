"""Figures and tables of a run, made from its records alone."""
