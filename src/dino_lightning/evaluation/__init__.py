"""Evaluations: features of whole data sets and what is measured on them."""
