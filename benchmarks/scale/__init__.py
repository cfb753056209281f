"""Whole steps and scores of models in the size of those in use, of random weights."""
