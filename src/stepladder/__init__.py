"""Stepladder: few-step diffusion generators that climb resolutions."""

__version__ = "0.1.0"
