"""Differentiable ODE solvers for PyTorch with the exact gradient of the computed solution."""
