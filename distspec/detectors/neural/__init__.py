"""Scores of a trained model: what it fails to reconstruct, and how rare its latents are.

- `scores`: `ModelScores`, all of them from one pass.
- `reconstruction`: eight scores of what is left, and chi-squared.
- `differentiable`: scores that torch can differentiate by the flux.
- `perturbed`: scores of many versions of one spectrum without writing them out.
"""
