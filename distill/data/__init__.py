"""Training data: real images, their captions or labels."""
