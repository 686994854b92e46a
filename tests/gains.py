"""Powers of averages and a size of tensors, for the tests of a pull that sets itself."""

FAST, SLOW = 0.3, 0.6  # powers of the average that it goes toward, and of the one it returns
LARGE = 2**16  # elements from which on every 251st stands for all
