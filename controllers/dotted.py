"""Names that stand for code, as the queue reads them."""

from transfer_queue.dotted import load_attribute

__all__ = ["load_attribute"]
