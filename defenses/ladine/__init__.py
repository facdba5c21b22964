"""LaDiNE: diffusion models over the label, nested in one vision transformer."""
