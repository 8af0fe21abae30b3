"""Pictures in, answers out."""
