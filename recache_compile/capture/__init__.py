"""The door to `torch.export`: a module becomes a program whose inputs have roles."""
