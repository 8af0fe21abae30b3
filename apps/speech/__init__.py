"""From recordings to what they hold."""
