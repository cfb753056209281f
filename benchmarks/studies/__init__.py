"""The experiments of papers over again: grids of unlearnings, each by the training that users have."""
