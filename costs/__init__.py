"""Pure arithmetic: what an operation costs in memory traffic and flops. Imports neither torch nor triton."""
