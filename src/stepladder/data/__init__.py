"""Prompts, and what the text encoders made of them."""
