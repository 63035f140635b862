"""Loading, quantizing, adapting and exporting models."""
