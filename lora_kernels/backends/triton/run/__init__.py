"""How a plan runs: which kernels, on which grids and streams, with what memory between them."""
