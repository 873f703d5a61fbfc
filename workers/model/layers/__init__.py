"""The layers of models on one rank, each small; a family composes them."""
