"""Gradients, curvature, factors and trajectories: what estimators are made of."""
