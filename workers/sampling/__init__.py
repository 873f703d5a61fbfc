"""How a request's tokens are chosen: its parameters, and the sampler that goes by them."""
