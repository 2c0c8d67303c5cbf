"""What a careful person wants to know of an adapter before using it."""
