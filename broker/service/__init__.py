"""What the broker does, one verb a module: decisions joined with the catalogue and the stores."""
