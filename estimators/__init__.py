"""Gradient estimators of the further-training gold standard, a file each over shared operators."""
