"""What is asked of a network: one module per measure, and beside them what they share."""
