"""Samplers side by side: images, figures, tables."""
