"""Which plan runs, and why: data in, a plan out. Nothing here imports what runs plans, or kernels."""
