"""How `Portable` was trained, chosen and measured."""
