"""Pure tensor functions: no networks, no configuration."""
