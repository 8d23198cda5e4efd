"""Trains the models of `pegbox.zoo` again, from the data sets beside the project: `make zoo`."""
