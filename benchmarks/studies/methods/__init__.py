"""Every method on one world, as papers compare them (`python -m benchmarks.studies.methods`)."""
