"""What the GPU session measures, one file a section; each yields rows as it finds them."""
