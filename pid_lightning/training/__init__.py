"""Everything that needs Lightning."""
