"""What the suite reaches and costs, measured."""
