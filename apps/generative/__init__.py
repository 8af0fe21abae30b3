"""Applications that make something new: text."""
