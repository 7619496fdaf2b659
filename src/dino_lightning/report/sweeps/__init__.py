"""The runs of a sweep as a table, a plot and curves."""
