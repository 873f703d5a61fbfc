"""Weight formats. Each file is one: the tensors that stand for a matrix, and the product with them."""
