"""What the commands share: norms, programs, shapes, timing, compilers, tables."""
