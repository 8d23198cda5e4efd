"""Planted defects: proof that every conformance check can fail.  `make mutants` runs them all."""
