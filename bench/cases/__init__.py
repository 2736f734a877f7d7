"""What is measured: kernels, pieces of a step, whole steps, steps against size, a rival's form."""
