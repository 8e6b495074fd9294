"""A trained network and a folder of pictures in, a small file that can be trusted out."""
