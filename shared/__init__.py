"""What the tasks share: data, metrics, training, export and serving."""
