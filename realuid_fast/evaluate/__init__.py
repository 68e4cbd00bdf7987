"""Distances between samples: the measure of a data set, Inception features, the published protocol, the table."""
