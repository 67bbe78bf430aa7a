"""The engine as a part of other systems. Each module needs an extra of its own."""
