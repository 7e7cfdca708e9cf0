"""What is true without a clock, a network or a database: values in, values out."""
