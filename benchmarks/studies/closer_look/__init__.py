"""What a single number hides: four methods under all metrics at once (`python -m benchmarks.studies.closer_look`)."""
