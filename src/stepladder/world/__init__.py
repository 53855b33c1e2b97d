"""The bundled world: scenes that can be drawn, described and judged exactly."""
