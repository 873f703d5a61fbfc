"""What multiplies by a weight of each kind on each device. Knows nothing of checkpoints' formats."""

from workers.model.products.choose import experts_of, linear_of

__all__ = ["experts_of", "linear_of"]
