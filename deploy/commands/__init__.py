"""Commands of `switchyard` that run or look at one part of a cluster, each in a module of its own."""
