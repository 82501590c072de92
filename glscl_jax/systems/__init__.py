"""One file a published system: its views, passes and objectives."""
